//! What several tests of this crate need.

use std::path::Path;

use shoal_engine::store::ExportCursor;

/// Writes an export into a file as it travels: frames of length, CRC-32 and piece, and one of length zero.
pub fn write_frames(cursor: &ExportCursor, file: &Path) {
    let mut frames = Vec::new();
    let mut frame = |piece: &[u8]| {
        frames.extend_from_slice(&(piece.len() as u32).to_le_bytes());
        frames.extend_from_slice(&crc32fast::hash(piece).to_le_bytes());
        frames.extend_from_slice(piece);
    };
    while let Some(piece) = cursor.next_piece().expect("a piece") {
        frame(&piece);
    }
    frame(&[]);
    std::fs::write(file, frames).expect("written");
}
