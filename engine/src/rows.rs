//! The f32 vectors of one name by slot, in one flat file, for rescoring: one positioned read
//! instead of a page of the store.
//!
//! The file is derived and never synced. A slot's vector never changes and a slot is never given
//! out twice, so a row whose checksum (over slot and numbers) is right is the right one; any
//! other is read from the store again.

use std::fs::{File, OpenOptions};
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::sync::atomic::{AtomicBool, Ordering};

use nix::fcntl::{FallocateFlags, fallocate};
use roaring::RoaringBitmap;

use crate::error::Result;

/// Runs of at least so many dead rows are given back.
const FREED_ROWS: u32 = 256;
/// Bytes of the checksum in front of a row.
const SUM_BYTES: usize = 4;

pub(crate) struct Rows {
    file: File,
    stride: usize,
    /// Whether a failed write was reported: a full disk would repeat it for every vector.
    has_complained: AtomicBool,
}

impl Rows {
    /// Opens or creates the file for vectors of `size` dimensions.
    pub(crate) fn open(path: &Path, size: usize) -> Result<Rows> {
        let file = OpenOptions::new().read(true).write(true).create(true).truncate(false).open(path)?;
        Ok(Rows { file, stride: SUM_BYTES + size * 4, has_complained: AtomicBool::new(false) })
    }

    /// Keeps a slot's vector. That it cannot is no error: the row is then missing.
    pub(crate) fn put(&self, slot: u32, vector: &[f32]) {
        let mut row = vec![0; SUM_BYTES];
        row.extend(vector.iter().flat_map(|x| x.to_le_bytes()));
        let sum = checksum(slot, &row[SUM_BYTES..]).to_le_bytes();
        row[..SUM_BYTES].copy_from_slice(&sum);
        if let Err(error) = self.file.write_all_at(&row, self.offset(slot))
            && !self.has_complained.swap(true, Ordering::Relaxed)
        {
            tracing::warn!(%error, "vectors for rescoring cannot be kept; they are read from the store");
        }
    }

    /// A slot's vector, if its row is there and whole.
    pub(crate) fn get(&self, slot: u32) -> Option<Vec<f32>> {
        let mut row = vec![0; self.stride];
        self.file.read_exact_at(&mut row, self.offset(slot)).ok()?;
        let (sum, numbers) = row.split_at(SUM_BYTES);
        (sum == checksum(slot, numbers).to_le_bytes())
            .then(|| numbers.chunks_exact(4).map(|x| f32::from_le_bytes([x[0], x[1], x[2], x[3]])).collect())
    }

    /// Gives the disk space of long runs of dead rows back. That it cannot is no error.
    pub(crate) fn free_dead(&self, live: &RoaringBitmap) {
        let mut next = 0;
        for slot in live {
            if slot - next >= FREED_ROWS {
                let (start, end) = (self.offset(next), self.offset(slot));
                let mode = FallocateFlags::FALLOC_FL_PUNCH_HOLE | FallocateFlags::FALLOC_FL_KEEP_SIZE;
                if let Err(error) = fallocate(&self.file, mode, start as i64, (end - start) as i64) {
                    tracing::debug!(%error, "dead vectors keep their disk space");
                    return;
                }
            }
            next = slot.saturating_add(1);
        }
    }

    fn offset(&self, slot: u32) -> u64 {
        u64::from(slot) * self.stride as u64
    }
}

fn checksum(slot: u32, numbers: &[u8]) -> u32 {
    let mut hasher = crc32fast::Hasher::new();
    hasher.update(&slot.to_le_bytes());
    hasher.update(numbers);
    hasher.finalize()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_space_of_dead_rows_is_given_back() {
        use std::os::unix::fs::MetadataExt;
        let dir = tempfile::tempdir().expect("a directory");
        let path = dir.path().join("rows");
        let rows = Rows::open(&path, 256).expect("opens");
        (0..4_000).for_each(|slot| rows.put(slot, &[slot as f32; 256]));
        let blocks = || std::fs::metadata(&path).expect("there").blocks();
        let before = blocks();
        rows.free_dead(&RoaringBitmap::from_iter([1_000, 3_999]));
        assert!(blocks() < before / 4, "{} of {before} blocks", blocks());
        assert_eq!(rows.get(1_000), Some(vec![1_000.0; 256]));
        assert_eq!(rows.get(3_999), Some(vec![3_999.0; 256]));
        assert_eq!(rows.get(2_000), None);
    }

    #[test]
    fn a_row_is_the_right_one_or_none() {
        let dir = tempfile::tempdir().expect("a directory");
        let path = dir.path().join("rows");
        let rows = Rows::open(&path, 3).expect("opens");
        rows.put(0, &[1.0, 2.0, 3.0]);
        rows.put(7, &[4.0, 5.0, 6.0]);
        assert_eq!(rows.get(0), Some(vec![1.0, 2.0, 3.0]));
        assert_eq!(rows.get(7), Some(vec![4.0, 5.0, 6.0]));
        assert_eq!(rows.get(3), None, "a hole");
        assert_eq!(rows.get(8), None, "beyond the end");
        let mut bytes = std::fs::read(&path).expect("readable");
        let row = bytes[..16].to_vec();
        bytes[16..32].copy_from_slice(&row);
        bytes[9] ^= 1;
        std::fs::write(&path, bytes).expect("writable");
        let rows = Rows::open(&path, 3).expect("opens again");
        assert_eq!(rows.get(0), None, "a flipped bit");
        assert_eq!(rows.get(1), None, "another slot's row");
        assert_eq!(rows.get(7), Some(vec![4.0, 5.0, 6.0]));
    }
}
