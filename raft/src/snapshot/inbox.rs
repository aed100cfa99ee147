//! Snapshots that are here in part: one at most for each group, in a file that outlives the process.
//!
//! ```text
//!  <group>-<digest>.partial   pieces that have come, each with its checksum
//!  <group>-<digest>.N.whole   all of them, while they are installed; after a crash a partial again
//! ```
//!
//! Only the latest attempt writes: a stream that a cut or a leader's restart has left behind finds that another one
//! has begun, and ends. Nothing is taken in of what the disk's reserve leaves no room for. All methods block.

use std::collections::HashMap;
use std::fs::File;
use std::io::{self, BufReader, Read, Seek, SeekFrom};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use parking_lot::Mutex;
use shoal_proto::GroupId;

use super::frames::{Frame, FrameWriter, HEAD_BYTES};
use super::is_stale;
use super::room::Room;
use super::tally::{SnapshotId, Tally};
use crate::machine::ReceivedFile;

/// The ending of a file that has come in part.
const PARTIAL: &str = "partial";
/// The ending of a file that is being installed.
const WHOLE: &str = "whole";

/// A snapshot that is here in part.
struct Partial {
    id: SnapshotId,
    path: PathBuf,
    frames: FrameWriter,
    tally: Tally,
}

impl Partial {
    /// Goes on with a file, or begins it. What is not whole at its end is cut off.
    fn open(path: PathBuf, id: SnapshotId, position: &[u8], room: Room) -> io::Result<Partial> {
        let mut file = File::options().read(true).write(true).create(true).truncate(false).open(&path)?;
        let (tally, end) = read_back(&mut BufReader::new(&file), &id, Tally::of(position))?;
        file.set_len(end)?;
        file.seek(SeekFrom::Start(end))?;
        Ok(Partial { id, path, frames: FrameWriter::new(file, room), tally })
    }

    fn take(&mut self, piece: &[u8]) -> io::Result<()> {
        if !self.tally.may_take(piece, &self.id) {
            return Err(invalid("more has come than was promised"));
        }
        self.frames.write(piece)?;
        self.tally.take(piece);
        Ok(())
    }

    /// Bytes of the pieces that have not come.
    fn missing_bytes(&self) -> u64 {
        self.id.bytes.saturating_sub(self.tally.bytes())
    }

    fn is_whole(&self) -> bool {
        self.tally.pieces() == self.id.pieces
    }

    /// Checks and syncs the whole, and gives it a name of its own. What is not what was promised is deleted.
    fn finish(self, whole: PathBuf) -> io::Result<ReceivedFile> {
        let Partial { id, path, frames, tally } = self;
        if tally.id() != id {
            std::fs::remove_file(&path)?;
            return Err(invalid("the pieces are not those that were promised"));
        }
        frames.finish()?;
        std::fs::rename(&path, &whole)?;
        Ok(ReceivedFile(whole))
    }
}

/// What a file has of a promised snapshot, and where that ends.
fn read_back(file: &mut impl Read, promised: &SnapshotId, mut tally: Tally) -> io::Result<(Tally, u64)> {
    let mut end = 0;
    while let Frame::Piece(piece) = Frame::read(file)? {
        if !tally.may_take(&piece, promised) {
            break;
        }
        tally.take(&piece);
        end += HEAD_BYTES + piece.len() as u64;
    }
    Ok((tally, end))
}

/// What comes in for one group.
#[derive(Default)]
struct Desk {
    /// Counts offers and streams: only the last of them may write.
    attempt: u64,
    partial: Option<Partial>,
    is_installing: bool,
}

/// All snapshots that are here in part.
pub(crate) struct Inbox {
    dir: PathBuf,
    room: Room,
    desks: Mutex<HashMap<GroupId, Arc<Mutex<Desk>>>>,
}

impl Inbox {
    /// Opens the folder. Partial snapshots that are not old stay while there is room, all else is deleted.
    pub(crate) fn open(dir: &Path, room: Room) -> io::Result<Inbox> {
        std::fs::create_dir_all(dir)?;
        let has_room = room.check(0).is_ok();
        for entry in std::fs::read_dir(dir)? {
            let path = entry?.path();
            let ending = path.extension().and_then(|ending| ending.to_str());
            match ending {
                Some(PARTIAL) if has_room && !is_stale(&path) => {}
                // It was whole, and may have been installed or not.
                Some(WHOLE) if has_room && !is_stale(&path) => {
                    let partial = path.with_extension("").with_extension(PARTIAL);
                    std::fs::rename(path, partial)?;
                }
                _ => std::fs::remove_file(path)?,
            }
        }
        Ok(Inbox { dir: dir.to_owned(), room, desks: Mutex::default() })
    }

    fn desk(&self, group: GroupId) -> Arc<Mutex<Desk>> {
        self.desks.lock().entry(group).or_default().clone()
    }

    /// Makes ready for a snapshot that ends at `position`. Returns how many of its pieces are here. What is here
    /// of any other one of the group goes.
    ///
    /// # Errors
    /// Would block, while a snapshot of the group is being installed. Storage full, when there is no room for
    /// what is missing: then what is here goes, too.
    pub(crate) fn offered(&self, group: GroupId, id: &SnapshotId, position: &[u8]) -> io::Result<u64> {
        let desk = self.desk(group);
        let mut desk = desk.lock();
        if desk.is_installing {
            return Err(io::Error::new(io::ErrorKind::WouldBlock, "a snapshot is being installed"));
        }
        desk.attempt += 1;
        let partial = match desk.partial.take().filter(|partial| partial.id == *id) {
            Some(partial) => partial,
            None => {
                let path = self.dir.join(id.name(group)).with_extension(PARTIAL);
                self.remove_partials(group, Some(&path))?;
                Partial::open(path, *id, position, self.room.clone())?
            }
        };
        if let Err(full) = self.room.check(partial.missing_bytes()) {
            self.remove_partials(group, None)?;
            return Err(full);
        }
        let pieces = partial.tally.pieces();
        desk.partial = Some(partial);
        Ok(pieces)
    }

    /// Begins to take in what is missing of a snapshot after its first `from` pieces.
    ///
    /// # Errors
    /// When it is not that which is missing.
    pub(crate) fn begin(&self, group: GroupId, id: &SnapshotId, from: u64) -> io::Result<Receipt> {
        let desk = self.desk(group);
        let attempt = {
            let mut desk = desk.lock();
            let here = desk.partial.as_ref().filter(|partial| partial.id == *id);
            if here.is_none_or(|partial| partial.tally.pieces() != from) {
                return Err(invalid("it does not go on where it ends here"));
            }
            desk.attempt += 1;
            desk.attempt
        };
        Ok(Receipt { dir: self.dir.clone(), room: self.room.clone(), group, desk, attempt })
    }

    /// Deletes what is here of a group.
    pub(crate) fn forget(&self, group: GroupId) -> io::Result<()> {
        let desk = self.desk(group);
        let mut desk = desk.lock();
        desk.attempt += 1;
        desk.partial = None;
        self.remove_partials(group, None)
    }

    /// Deletes what has not grown for long, and everything when there is no room.
    pub(crate) fn sweep(&self) -> io::Result<()> {
        let has_room = self.room.is_there();
        for entry in std::fs::read_dir(&self.dir)? {
            let path = entry?.path();
            let is_partial = path.extension().is_some_and(|ending| ending == PARTIAL);
            if !is_partial || (has_room && !is_stale(&path)) {
                continue;
            }
            for desk in self.desks.lock().values() {
                // Who writes just now sees for itself that there is no room.
                if let Some(mut desk) = desk.try_lock()
                    && desk.partial.as_ref().is_some_and(|partial| partial.path == path)
                {
                    desk.partial = None;
                }
            }
            tracing::info!(file = %path.display(), has_room, "part of a snapshot is deleted");
            remove(&path)?;
        }
        Ok(())
    }

    fn remove_partials(&self, group: GroupId, but: Option<&Path>) -> io::Result<()> {
        let prefix = SnapshotId::prefix(group);
        for entry in std::fs::read_dir(&self.dir)? {
            let path = entry?.path();
            let is_of_group =
                path.file_name().and_then(|name| name.to_str()).is_some_and(|name| name.starts_with(&prefix));
            let is_partial = path.extension().is_some_and(|ending| ending == PARTIAL);
            if is_of_group && is_partial && Some(path.as_path()) != but {
                std::fs::remove_file(path)?;
            }
        }
        Ok(())
    }
}

/// One attempt to take in a snapshot.
#[derive(Clone)]
pub(crate) struct Receipt {
    dir: PathBuf,
    room: Room,
    group: GroupId,
    desk: Arc<Mutex<Desk>>,
    attempt: u64,
}

impl Receipt {
    /// Adds the next piece.
    ///
    /// # Errors
    /// When another attempt has begun, or the piece cannot be written. Storage full, when there is no room
    /// any more: then what was here goes.
    pub(crate) fn take(&self, piece: &[u8]) -> io::Result<()> {
        let mut desk = self.desk.lock();
        let partial = self.partial(&mut desk)?;
        let taken = self.room.require().and_then(|()| partial.take(piece));
        if let Err(error) = &taken {
            let is_full = error.kind() == io::ErrorKind::StorageFull;
            // Otherwise how much of the piece is in the file is seen when it is read back.
            if let Some(given_up) = desk.partial.take().filter(|_| is_full) {
                remove(&given_up.path)?;
            }
        }
        taken
    }

    /// Checks the whole: a file to be installed, and a mark that says that this is being done.
    ///
    /// # Errors
    /// When another attempt has begun, pieces are missing, or it is not what was promised.
    pub(crate) fn finish(&self) -> io::Result<(ReceivedFile, Installing)> {
        static NEXT: AtomicU64 = AtomicU64::new(0);
        let mut desk = self.desk.lock();
        if !self.partial(&mut desk)?.is_whole() {
            return Err(io::Error::new(io::ErrorKind::UnexpectedEof, "it ended early"));
        }
        let partial = desk.partial.take().ok_or_else(superseded)?;
        let number = NEXT.fetch_add(1, Ordering::Relaxed);
        let whole = self.dir.join(format!("{}.{number}.{WHOLE}", partial.id.name(self.group)));
        let file = partial.finish(whole)?;
        desk.is_installing = true;
        Ok((file, Installing(self.desk.clone())))
    }

    fn partial<'a>(&self, desk: &'a mut Desk) -> io::Result<&'a mut Partial> {
        if desk.attempt != self.attempt {
            return Err(superseded());
        }
        desk.partial.as_mut().ok_or_else(superseded)
    }
}

/// Says for as long as it lives that a snapshot of the group is being installed.
pub(crate) struct Installing(Arc<Mutex<Desk>>);

impl Drop for Installing {
    fn drop(&mut self) {
        self.0.lock().is_installing = false;
    }
}

/// Deletes a file that may be gone.
fn remove(path: &Path) -> io::Result<()> {
    match std::fs::remove_file(path) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => Err(error),
        _ => Ok(()),
    }
}

fn superseded() -> io::Error {
    io::Error::other("another attempt has begun")
}

fn invalid(reason: &'static str) -> io::Error {
    io::Error::new(io::ErrorKind::InvalidData, reason)
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    const GROUP: GroupId = GroupId(3);
    const AT: &[u8] = b"where it ends";

    /// What is sent: some pieces and the snapshot that they are.
    fn snapshot(seed: u8, count: usize) -> (Vec<Vec<u8>>, SnapshotId) {
        let pieces: Vec<Vec<u8>> =
            (0..count).map(|at| vec![seed.wrapping_add(at as u8); 10 + 7 * at]).collect();
        let mut tally = Tally::of(AT);
        pieces.iter().for_each(|piece| tally.take(piece));
        (pieces, tally.id())
    }

    fn open(dir: &Path) -> io::Result<Inbox> {
        Inbox::open(dir, Room::above(dir, 0))
    }

    fn files(dir: &Path) -> usize {
        std::fs::read_dir(dir).expect("listed").count()
    }

    /// What the engine would read of a file.
    fn read(file: &ReceivedFile) -> Vec<Vec<u8>> {
        let mut file = File::open(&file.0).expect("opens");
        let mut pieces = Vec::new();
        loop {
            match Frame::read(&mut file).expect("readable") {
                Frame::Piece(piece) => pieces.push(piece),
                Frame::End => return pieces,
                Frame::Torn => panic!("a received file is whole"),
            }
        }
    }

    #[test]
    fn a_break_and_a_restart_cost_no_piece() {
        let dir = tempfile::tempdir().expect("a directory");
        let (pieces, id) = snapshot(1, 5);
        let inbox = open(dir.path()).expect("opens");
        assert_eq!(inbox.offered(GROUP, &id, AT).expect("taken"), 0);
        let receipt = inbox.begin(GROUP, &id, 0).expect("begun");
        receipt.take(&pieces[0]).expect("taken");
        receipt.take(&pieces[1]).expect("taken");
        assert!(receipt.finish().is_err(), "pieces are missing");
        // A break.
        assert_eq!(inbox.offered(GROUP, &id, AT).expect("taken"), 2);
        assert!(receipt.take(&pieces[2]).is_err(), "another attempt has begun");
        inbox.begin(GROUP, &id, 2).expect("begun").take(&pieces[2]).expect("taken");
        // A restart in the middle of a write.
        let inbox = {
            drop(inbox);
            let path = dir.path().join(id.name(GROUP)).with_extension(PARTIAL);
            let mut bytes = std::fs::read(&path).expect("readable");
            bytes.extend_from_slice(&[9, 0, 0, 0, 1, 2]);
            std::fs::write(&path, bytes).expect("written");
            open(dir.path()).expect("opens")
        };
        assert_eq!(inbox.offered(GROUP, &id, AT).expect("taken"), 3);
        let receipt = inbox.begin(GROUP, &id, 3).expect("begun");
        pieces[3..].iter().for_each(|piece| receipt.take(piece).expect("taken"));
        let (file, installing) = receipt.finish().expect("whole");
        assert_eq!(read(&file), pieces);
        assert!(inbox.offered(GROUP, &id, AT).is_err(), "it is being installed");
        // A restart before it was installed: nothing has to be sent again.
        std::mem::forget(file);
        drop((installing, inbox));
        let inbox = open(dir.path()).expect("opens");
        assert_eq!(inbox.offered(GROUP, &id, AT).expect("taken"), 5);
        let (file, installing) = inbox.begin(GROUP, &id, 5).expect("begun").finish().expect("whole");
        assert_eq!(read(&file), pieces);
        drop((file, installing));
        assert_eq!(files(dir.path()), 0, "nothing is left behind");
    }

    #[test]
    fn another_snapshot_begins_at_zero_and_the_old_one_goes() {
        let dir = tempfile::tempdir().expect("a directory");
        let inbox = open(dir.path()).expect("opens");
        let ((old, old_id), (new, new_id)) = (snapshot(1, 4), snapshot(2, 4));
        inbox.offered(GROUP, &old_id, AT).expect("taken");
        let receipt = inbox.begin(GROUP, &old_id, 0).expect("begun");
        receipt.take(&old[0]).expect("taken");
        assert_eq!(inbox.offered(GROUP, &new_id, AT).expect("taken"), 0);
        assert!(receipt.take(&old[1]).is_err(), "the old stream writes no more");
        assert!(inbox.begin(GROUP, &old_id, 1).is_err());
        assert!(inbox.begin(GROUP, &new_id, 1).is_err(), "a hole");
        assert_eq!(files(dir.path()), 1);
        let receipt = inbox.begin(GROUP, &new_id, 0).expect("begun");
        new.iter().for_each(|piece| receipt.take(piece).expect("taken"));
        assert!(receipt.take(b"more").is_err());
        inbox.offered(GroupId(4), &old_id, AT).expect("another group's is its own");
        inbox.forget(GROUP).expect("forgotten");
        assert_eq!(files(dir.path()), 1);
    }

    #[test]
    fn what_is_not_what_was_promised_is_not_installed() {
        let dir = tempfile::tempdir().expect("a directory");
        let inbox = open(dir.path()).expect("opens");
        let (pieces, id) = snapshot(1, 2);
        inbox.offered(GROUP, &id, AT).expect("taken");
        let receipt = inbox.begin(GROUP, &id, 0).expect("begun");
        receipt.take(&pieces[0]).expect("taken");
        receipt.take(&vec![0; pieces[1].len()]).expect("taken");
        assert!(receipt.finish().is_err());
        assert_eq!(files(dir.path()), 0);
        assert_eq!(inbox.offered(GROUP, &id, AT).expect("taken"), 0, "it begins anew");
        // A file of another run that has another position.
        inbox.begin(GROUP, &id, 0).expect("begun").take(&pieces[0]).expect("taken");
        let inbox = open(dir.path()).expect("opens");
        assert_eq!(inbox.offered(GROUP, &id, b"elsewhere").expect("taken"), 1);
        let receipt = inbox.begin(GROUP, &id, 1).expect("begun");
        receipt.take(&pieces[1]).expect("taken");
        assert!(receipt.finish().is_err());
    }

    #[test]
    fn a_snapshot_without_room_is_refused_and_what_is_here_of_it_goes() {
        let dir = tempfile::tempdir().expect("a directory");
        let room = Room::above(dir.path(), 0);
        let is_full = |error: io::Error| error.kind() == io::ErrorKind::StorageFull;
        let (pieces, id) = snapshot(1, 3);
        let inbox = Inbox::open(dir.path(), room.clone()).expect("opens");
        let begin = || {
            room.set(true);
            inbox.offered(GROUP, &id, AT).expect("taken");
            let receipt = inbox.begin(GROUP, &id, 0).expect("begun");
            receipt.take(&pieces[0]).expect("taken");
            room.set(false);
            receipt
        };
        // In the middle of it, at the next offer, and when nobody comes.
        assert!(begin().take(&pieces[1]).is_err_and(is_full));
        assert_eq!(files(dir.path()), 0);
        begin();
        assert!(inbox.offered(GROUP, &id, AT).is_err_and(is_full));
        assert_eq!(files(dir.path()), 0);
        begin();
        inbox.sweep().expect("swept");
        assert_eq!(files(dir.path()), 0);
        // What is promised is more than there is room for.
        room.set(true);
        let large = SnapshotId { bytes: u64::MAX, ..id };
        assert!(inbox.offered(GROUP, &large, AT).is_err_and(is_full));
        assert_eq!(files(dir.path()), 0);
        // A start on a full disk.
        inbox.offered(GROUP, &id, AT).expect("taken");
        drop(Inbox::open(dir.path(), Room::above(dir.path(), u64::MAX)).expect("opens"));
        assert_eq!(files(dir.path()), 0);
    }

    proptest! {
        /// Whatever breaks in between, each piece is in the file once, in order, and what a member says that it
        /// has never shrinks but by what a crash has torn off.
        #[test]
        fn any_schedule_of_breaks_ends_with_the_whole(
            count in 1usize..12,
            steps in prop::collection::vec((0usize..5, 0u8..4, 0u64..40), 0..12),
        ) {
            let dir = tempfile::tempdir().expect("a directory");
            let (pieces, id) = snapshot(7, count);
            let path = dir.path().join(id.name(GROUP)).with_extension(PARTIAL);
            let mut inbox = open(dir.path()).expect("opens");
            for (sent, event, torn) in steps {
                let held = inbox.offered(GROUP, &id, AT).expect("taken") as usize;
                let receipt = inbox.begin(GROUP, &id, held as u64).expect("begun");
                for piece in pieces.iter().skip(held).take(sent) {
                    receipt.take(piece).expect("taken");
                }
                let now = (held + sent).min(count);
                match event {
                    // A break only.
                    0 | 1 => prop_assert_eq!(inbox.offered(GROUP, &id, AT).expect("taken") as usize, now),
                    // The process is killed.
                    2 => {
                        inbox = open(dir.path()).expect("opens");
                        prop_assert_eq!(inbox.offered(GROUP, &id, AT).expect("taken") as usize, now);
                    }
                    // The power fails.
                    _ => {
                        let file = File::options().write(true).open(&path).expect("opens");
                        let length = file.metadata().expect("known").len();
                        file.set_len(length.saturating_sub(torn)).expect("cut");
                        inbox = open(dir.path()).expect("opens");
                        prop_assert!(inbox.offered(GROUP, &id, AT).expect("taken") as usize <= now);
                    }
                }
            }
            let held = inbox.offered(GROUP, &id, AT).expect("taken");
            let receipt = inbox.begin(GROUP, &id, held).expect("begun");
            for piece in pieces.iter().skip(held as usize) {
                receipt.take(piece).expect("taken");
            }
            let (file, _installing) = receipt.finish().expect("whole");
            prop_assert_eq!(read(&file), pieces);
        }
    }
}
