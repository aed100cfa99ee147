//! The file that an export travels in: frames of length, CRC-32 and piece; a frame of length zero
//! ends it.

use std::fs::File;
use std::io::{BufReader, Read as _};
use std::path::Path;

use crate::error::{Error, Result};

/// A file of frames, read from its beginning.
pub(crate) struct Frames {
    file: BufReader<File>,
}

impl Frames {
    pub(crate) fn open(path: &Path) -> Result<Frames> {
        Ok(Frames { file: BufReader::new(File::open(path)?) })
    }

    /// The next piece, or none at the frame that ends the file.
    ///
    /// # Errors
    /// Damaged, when a piece is not what was written, or the file ends before its end.
    pub(crate) fn next_piece(&mut self) -> Result<Option<Vec<u8>>> {
        let broken = |reason: &str| Error::Damaged { key: "snapshot".into(), reason: reason.into() };
        let mut head = [0u8; 8];
        self.file.read_exact(&mut head).map_err(|_| broken("it ends early"))?;
        let length = u32::from_le_bytes(head[..4].try_into().expect("four bytes")) as usize;
        if length == 0 {
            return Ok(None);
        }
        let mut piece = Vec::new();
        self.file.by_ref().take(length as u64).read_to_end(&mut piece)?;
        if piece.len() != length || head[4..] != crc32fast::hash(&piece).to_le_bytes() {
            return Err(broken("a piece is short or has the wrong checksum"));
        }
        Ok(Some(piece))
    }
}
