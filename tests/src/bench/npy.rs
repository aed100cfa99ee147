//! NumPy's `.npy` files, as much of the format as the data needs: little-endian arrays in C order.
//! The format: <https://numpy.org/doc/stable/reference/generated/numpy.lib.format.html>.

use std::path::Path;

use anyhow::{Context, Result, bail, ensure};
use half::f16;

/// An array as it is in the file.
pub(super) struct Array {
    shape: Vec<usize>,
    /// The type of its elements, such as `<f4`.
    kind: String,
    data: Vec<u8>,
}

impl Array {
    /// Reads a file.
    ///
    /// # Errors
    /// When it cannot be read or is not an array of this sort.
    pub(super) fn read(file: &Path) -> Result<Array> {
        let bytes = std::fs::read(file).with_context(|| format!("read {}", file.display()))?;
        Array::parse(&bytes).with_context(|| format!("{} is no array", file.display()))
    }

    fn parse(bytes: &[u8]) -> Result<Array> {
        ensure!(bytes.starts_with(b"\x93NUMPY") && bytes.len() > 12, "it does not begin like one");
        let (head, len) = match bytes[6] {
            1 => (10, usize::from(u16::from_le_bytes([bytes[8], bytes[9]]))),
            _ => (12, u32::from_le_bytes([bytes[8], bytes[9], bytes[10], bytes[11]]) as usize),
        };
        let header = bytes.get(head..head + len).context("the header is cut off")?;
        let header = std::str::from_utf8(header)?;
        ensure!(header.contains("'fortran_order': False"), "it is in Fortran order");
        let kind = between(header, "'descr': '", '\'').context("no type")?.to_owned();
        let shape = between(header, "'shape': (", ')').context("no shape")?;
        let sizes = shape.split(',').map(str::trim).filter(|size| !size.is_empty());
        let shape = sizes.map(str::parse).collect::<Result<Vec<usize>, _>>()?;
        Ok(Array { shape, kind, data: bytes[head + len..].to_vec() })
    }

    /// Rows and columns.
    ///
    /// # Errors
    /// When it has not two dimensions.
    pub(super) fn table(&self) -> Result<(usize, usize)> {
        match self.shape.as_slice() {
            [rows, columns] => Ok((*rows, *columns)),
            other => bail!("not a table but of shape {other:?}"),
        }
    }

    /// All elements.
    ///
    /// # Errors
    /// When they are not floating-point numbers, or some are missing.
    pub(super) fn floats(&self) -> Result<Vec<f32>> {
        let found: Vec<f32> = match self.kind.as_str() {
            "<f2" => self.pieces::<2>().iter().map(|piece| f16::from_le_bytes(*piece).to_f32()).collect(),
            "<f4" => self.pieces::<4>().iter().map(|piece| f32::from_le_bytes(*piece)).collect(),
            other => bail!("elements of type {other} are no floats"),
        };
        self.check(found.len())?;
        Ok(found)
    }

    /// All elements.
    ///
    /// # Errors
    /// When they are not integers from 0, or some are missing.
    pub(super) fn integers(&self) -> Result<Vec<u64>> {
        let found: Vec<i64> = match self.kind.as_str() {
            "<i4" => self.pieces::<4>().iter().map(|piece| i64::from(i32::from_le_bytes(*piece))).collect(),
            "<i8" => self.pieces::<8>().iter().map(|piece| i64::from_le_bytes(*piece)).collect(),
            other => bail!("elements of type {other} are no integers"),
        };
        self.check(found.len())?;
        let found = found.into_iter().map(u64::try_from).collect::<Result<Vec<u64>, _>>()?;
        Ok(found)
    }

    fn pieces<const SIZE: usize>(&self) -> &[[u8; SIZE]] {
        let (whole, _) = self.data.as_chunks();
        whole
    }

    fn check(&self, found: usize) -> Result<()> {
        let wanted: usize = self.shape.iter().product();
        ensure!(found == wanted, "{found} elements, not {wanted}");
        Ok(())
    }
}

fn between<'a>(text: &'a str, before: &str, after: char) -> Option<&'a str> {
    let (_, rest) = text.split_once(before)?;
    let (found, _) = rest.split_once(after)?;
    Some(found)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn file(kind: &str, shape: &str, data: &[u8]) -> Vec<u8> {
        let header = format!("{{'descr': '{kind}', 'fortran_order': False, 'shape': ({shape}), }}\n");
        let len = u16::try_from(header.len()).expect("the header is short").to_le_bytes();
        [b"\x93NUMPY\x01\x00".as_slice(), len.as_slice(), header.as_bytes(), data].concat()
    }

    #[test]
    fn tables_are_read() -> Result<()> {
        let data: Vec<u8> = [1.5f32, -2.0].iter().flat_map(|number| number.to_le_bytes()).collect();
        let array = Array::parse(&file("<f4", "1, 2", &data))?;
        assert_eq!((array.table()?, array.floats()?), ((1, 2), vec![1.5, -2.0]));
        let array = Array::parse(&file("<f2", "1,", &f16::from_f32(0.25).to_le_bytes()))?;
        assert_eq!(array.floats()?, [0.25]);
        let array = Array::parse(&file("<i4", "1,", &7i32.to_le_bytes()))?;
        assert_eq!(array.integers()?, [7]);
        Ok(())
    }

    #[test]
    fn what_is_cut_off_is_refused() -> Result<()> {
        assert!(Array::parse(b"\x93NUMPY").is_err());
        assert!(Array::parse(&file("<f4", "2,", &[0; 4]))?.floats().is_err());
        assert!(Array::parse(&file("<i4", "1,", &(-1i32).to_le_bytes()))?.integers().is_err());
        Ok(())
    }
}
