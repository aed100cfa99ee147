//! The file that a snapshot is on either side: frames of length, CRC-32 and piece; a frame of length zero ends it.

use std::fs::File;
use std::io::{self, Read, Write};
use std::path::Path;
use std::sync::atomic::{AtomicU64, Ordering};

use super::room::Room;
use crate::machine::ReceivedFile;
use crate::network::MAX_PEER_MESSAGE_BYTES;

/// Bytes before each piece.
pub(crate) const HEAD_BYTES: u64 = 8;
/// After so many bytes a file is synced: a power cut costs no more, and the log's own syncs do not wait behind one
/// that brings a whole shard to the disk. The disk's reserve is looked at as often.
const SYNC_BYTES: u64 = 32 << 20;

/// A file of frames that is being written.
pub(crate) struct FrameWriter {
    file: File,
    room: Room,
    unsynced_bytes: u64,
}

impl FrameWriter {
    /// Goes on where the file stands, on a disk with that room.
    pub(crate) fn new(file: File, room: Room) -> FrameWriter {
        FrameWriter { file, room, unsynced_bytes: 0 }
    }

    /// Adds a piece.
    ///
    /// # Errors
    /// Storage full, when what is written before the next sync could take of the disk's reserve.
    pub(crate) fn write(&mut self, piece: &[u8]) -> io::Result<()> {
        self.file.write_all(&(piece.len() as u32).to_le_bytes())?;
        self.file.write_all(&crc32fast::hash(piece).to_le_bytes())?;
        self.file.write_all(piece)?;
        self.unsynced_bytes += HEAD_BYTES + piece.len() as u64;
        if self.unsynced_bytes >= SYNC_BYTES {
            self.file.sync_data()?;
            self.unsynced_bytes = 0;
            self.room.check(SYNC_BYTES)?;
        }
        Ok(())
    }

    /// Ends and syncs the file.
    pub(crate) fn finish(mut self) -> io::Result<()> {
        self.write(&[])?;
        self.file.sync_all()
    }
}

/// What comes next in a file.
#[derive(Debug, PartialEq, Eq)]
pub(crate) enum Frame {
    /// A piece, as it was written.
    Piece(Vec<u8>),
    /// The end, as it was written.
    End,
    /// Nothing, or nothing that is whole.
    Torn,
}

impl Frame {
    /// Reads what comes next.
    ///
    /// # Errors
    /// When the file cannot be read. That what is in it is not whole is no error.
    pub(crate) fn read(file: &mut impl Read) -> io::Result<Frame> {
        let Some((length, sum)) = read_head(file)? else { return Ok(Frame::Torn) };
        if length == 0 {
            return Ok(if sum == crc32fast::hash(&[]) { Frame::End } else { Frame::Torn });
        }
        let mut piece = Vec::new();
        file.take(u64::from(length)).read_to_end(&mut piece)?;
        let is_whole = piece.len() == length as usize && sum == crc32fast::hash(&piece);
        Ok(if is_whole { Frame::Piece(piece) } else { Frame::Torn })
    }
}

/// Length and checksum of what comes next; none when the file has no more.
pub(crate) fn read_head(file: &mut impl Read) -> io::Result<Option<(u32, u32)>> {
    let mut head = [0; HEAD_BYTES as usize];
    match file.read_exact(&mut head) {
        Err(error) if error.kind() == io::ErrorKind::UnexpectedEof => return Ok(None),
        read => read?,
    }
    let [a, b, c, d, e, f, g, h] = head;
    let (length, sum) = (u32::from_le_bytes([a, b, c, d]), u32::from_le_bytes([e, f, g, h]));
    // What is longer than any message was not written by us.
    Ok((length as usize <= MAX_PEER_MESSAGE_BYTES).then_some((length, sum)))
}

/// A snapshot on its way into a file that nobody will go on with.
pub(crate) struct FrameFile {
    frames: FrameWriter,
    received: ReceivedFile,
}

impl FrameFile {
    /// Creates a file that no other snapshot uses.
    pub(crate) fn create(dir: &Path, room: Room) -> io::Result<FrameFile> {
        static NEXT: AtomicU64 = AtomicU64::new(0);
        let path = dir.join(format!("{:016x}", NEXT.fetch_add(1, Ordering::Relaxed)));
        let frames = FrameWriter::new(File::create_new(&path)?, room);
        Ok(FrameFile { frames, received: ReceivedFile(path) })
    }

    /// Adds a piece.
    pub(crate) fn write(&mut self, piece: &[u8]) -> io::Result<()> {
        self.frames.write(piece)
    }

    /// Ends and syncs the file.
    pub(crate) fn finish(self) -> io::Result<ReceivedFile> {
        self.frames.finish()?;
        Ok(self.received)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn frames_stay_as_they_are() {
        let dir = tempfile::tempdir().expect("a directory");
        let mut frames = FrameFile::create(dir.path(), Room::above(dir.path(), 0)).expect("created");
        frames.write(b"piece").expect("written");
        let file = frames.finish().expect("finished");
        let piece = [5, 0, 0, 0, 35, 11, 202, 68, b'p', b'i', b'e', b'c', b'e'];
        assert_eq!(std::fs::read(&file.0).expect("readable"), [&piece[..], &[0; 8]].concat());
    }

    #[test]
    fn what_is_cut_off_or_flipped_is_torn() {
        let dir = tempfile::tempdir().expect("a directory");
        let mut frames = FrameFile::create(dir.path(), Room::above(dir.path(), 0)).expect("created");
        frames.write(b"piece").expect("written");
        let file = frames.finish().expect("finished");
        let bytes = std::fs::read(&file.0).expect("readable");
        let mut rest = bytes.as_slice();
        assert_eq!(Frame::read(&mut rest).expect("read"), Frame::Piece(b"piece".to_vec()));
        assert_eq!(Frame::read(&mut rest).expect("read"), Frame::End);
        assert_eq!(Frame::read(&mut rest).expect("read"), Frame::Torn);
        for end in 0..13 {
            assert_eq!(Frame::read(&mut &bytes[..end]).expect("read"), Frame::Torn, "cut at {end}");
        }
        for at in 0..13 {
            let mut flipped = bytes.clone();
            flipped[at] ^= 0x10;
            assert_eq!(Frame::read(&mut flipped.as_slice()).expect("read"), Frame::Torn, "flipped at {at}");
        }
    }

    #[test]
    fn a_file_that_grows_into_the_reserve_is_given_up_and_goes() {
        let dir = tempfile::tempdir().expect("a directory");
        let mut frames = FrameFile::create(dir.path(), Room::above(dir.path(), u64::MAX)).expect("created");
        let piece = vec![7; SYNC_BYTES as usize / 4];
        let refused = (0..4).find_map(|_| frames.write(&piece).err()).expect("refused at the first sync");
        assert_eq!(refused.kind(), io::ErrorKind::StorageFull);
        drop(frames);
        assert_eq!(std::fs::read_dir(dir.path()).expect("listed").count(), 0);
    }
}
