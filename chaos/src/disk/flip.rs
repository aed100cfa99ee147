//! Flipped bits in what a node has stored.

use std::fs::OpenOptions;
use std::io;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};

use rand::RngExt;
use rand::rngs::StdRng;

/// A bit that was flipped.
#[derive(Clone, Debug)]
pub struct Flip {
    /// The file, below the data directory.
    pub file: PathBuf,
    /// The byte.
    pub offset: u64,
    /// The bit, from 0.
    pub bit: u8,
}

/// How often a byte is chosen anew that is zero: files are longer than what is written in them.
const ATTEMPTS: u32 = 1000;

/// Flips one bit of one file below `dir`, chosen by bytes among those that `wanted` keeps, so
/// that a large file is hit more often than a small one, and a byte that holds something. None
/// when there is none.
///
/// # Errors
/// When the files cannot be read or changed.
pub fn flip(dir: &Path, wanted: impl Fn(&Path) -> bool, coin: &mut StdRng) -> io::Result<Option<Flip>> {
    let mut files = Vec::new();
    collect(dir, &mut files)?;
    files.retain(|(path, length)| *length > 0 && wanted(path.strip_prefix(dir).unwrap_or(path)));
    let total: u64 = files.iter().map(|(_, length)| length).sum();
    if total == 0 {
        return Ok(None);
    }
    for _ in 0..ATTEMPTS {
        let mut at = coin.random_range(0..total);
        let within = files.iter().find(|(_, length)| {
            let is_here = at < *length;
            at -= if is_here { 0 } else { *length };
            is_here
        });
        let Some((path, _)) = within else { continue };
        let file = OpenOptions::new().read(true).write(true).open(path)?;
        let mut byte = [0];
        file.read_exact_at(&mut byte, at)?;
        if byte[0] == 0 {
            continue;
        }
        let bit = coin.random_range(0..8u8);
        byte[0] ^= 1 << bit;
        file.write_all_at(&byte, at)?;
        file.sync_all()?;
        let file = path.strip_prefix(dir).unwrap_or(path).to_owned();
        return Ok(Some(Flip { file, offset: at, bit }));
    }
    Ok(None)
}

fn collect(dir: &Path, files: &mut Vec<(PathBuf, u64)>) -> io::Result<()> {
    let mut entries: Vec<_> = std::fs::read_dir(dir)?.collect::<io::Result<_>>()?;
    // The order of a directory is not the same twice.
    entries.sort_by_key(std::fs::DirEntry::file_name);
    for entry in entries {
        let kind = entry.file_type()?;
        if kind.is_dir() {
            collect(&entry.path(), files)?;
        } else if kind.is_file() {
            files.push((entry.path(), entry.metadata()?.len()));
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use rand::SeedableRng;

    use super::*;

    #[test]
    fn one_bit_of_the_wanted_files() {
        let dir = tempfile::tempdir().expect("a directory");
        std::fs::create_dir(dir.path().join("d")).expect("a folder");
        std::fs::write(dir.path().join("d/wanted"), [255u8; 100]).expect("written");
        std::fs::write(dir.path().join("other"), [255u8; 100]).expect("written");
        let mut coin = StdRng::seed_from_u64(1);
        let flip = flip(dir.path(), |path| path.starts_with("d"), &mut coin).expect("flipped").expect("one");
        let bytes = std::fs::read(dir.path().join("d/wanted")).expect("read");
        assert_eq!(bytes.iter().map(|byte| byte.count_zeros()).sum::<u32>(), 1);
        assert_eq!(bytes[flip.offset as usize], !(1 << flip.bit));
        assert!(std::fs::read(dir.path().join("other")).expect("read").iter().all(|byte| *byte == 255));
    }
}
