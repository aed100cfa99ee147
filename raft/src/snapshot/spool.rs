//! Snapshots on the leader's disk, which can be sent again from any piece on: one for each group that has a member
//! too far behind.
//!
//! ```text
//!  <group>-<random>.frames   the pieces, synced
//!  <group>-<random>.note     what they are; written last, so that what has a note is whole
//! ```

use std::collections::{BTreeSet, HashMap};
use std::fs::File;
use std::io::{self, BufReader, Write};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use parking_lot::Mutex;
use shoal_proto::{GroupId, NodeId, codec};
use tokio::time::Instant;

use super::frames::{Frame, FrameWriter, HEAD_BYTES, read_head};
use super::hold::Holds;
use super::room::Room;
use super::tally::{SnapshotId, Tally};
use super::{KEPT, is_stale};
use crate::machine::Export;
use crate::types::{SnapshotMetaOf, TypeConfig};

/// The ending of the file with the pieces.
const FRAMES: &str = "frames";
/// The ending of the file that says what they are.
const NOTE: &str = "note";
/// How long the log is kept for a member that does not answer any more in the middle of a snapshot.
const HELD_AFTER_BREAK: Duration = Duration::from_secs(60);
/// The most bytes of a group's log that are kept so that a member can go on after its snapshot.
pub(crate) const HELD_LOG_BYTES: u64 = 512 << 20;
/// A spool that was read to its end so many times and not taken is of no use to anybody: an export is copied
/// as it is read, and that what is in it is damaged is seen where it is installed.
const MAX_REFUSALS: u32 = 2;

/// What a note says.
type Note = (GroupId, SnapshotMetaOf<TypeConfig>, SnapshotId);

/// A snapshot in a file. The file goes with it once it is retired.
pub(crate) struct Spool {
    pub(crate) meta: SnapshotMetaOf<TypeConfig>,
    pub(crate) id: SnapshotId,
    frames: PathBuf,
    usage: Mutex<Usage>,
}

struct Usage {
    /// Attempts to send it that are under way, from the offer on.
    sending: usize,
    /// When it was made, or a member took a piece of it.
    last: Instant,
    /// Members that have got a part of it.
    waiting: BTreeSet<NodeId>,
    /// Whether a member has got all of it.
    is_delivered: bool,
    /// How often it was sent to its end and not taken, since somebody has taken it.
    refusals: u32,
    is_retired: bool,
}

impl Spool {
    fn new(meta: SnapshotMetaOf<TypeConfig>, id: SnapshotId, frames: PathBuf) -> Arc<Spool> {
        let (last, waiting) = (Instant::now(), BTreeSet::new());
        let (is_delivered, is_retired) = (false, false);
        let usage = Usage { sending: 0, last, waiting, is_delivered, refusals: 0, is_retired };
        Arc::new(Spool { meta, id, frames, usage: Mutex::new(usage) })
    }

    /// The index of the last entry that is in it.
    fn index(&self) -> u64 {
        self.meta.last_log_id.map_or(0, |id| id.index)
    }

    /// Notes that somebody is to get it, until what is returned is dropped. Whether it is of use shows only
    /// when a piece is taken: a member that refuses it must not keep it alive.
    pub(crate) fn lend(self: &Arc<Spool>) -> Lent {
        self.usage.lock().sending += 1;
        Lent(self.clone())
    }

    /// A member has taken a piece.
    pub(crate) fn taken(&self, by: NodeId) {
        let mut usage = self.usage.lock();
        usage.last = Instant::now();
        usage.waiting.insert(by);
    }

    /// It was sent to its end, and the member has not taken it. That may be the member's or the network's
    /// fault once.
    pub(crate) fn refused(&self) {
        let is_given_up = {
            let mut usage = self.usage.lock();
            usage.refusals += 1;
            usage.refusals >= MAX_REFUSALS
        };
        if is_given_up {
            tracing::warn!(index = self.index(), "a snapshot was refused again: another one will be made");
            self.retire();
        }
    }

    /// Never to be used again; its file goes with whoever still reads it.
    pub(crate) fn retire(&self) {
        let mut usage = self.usage.lock();
        if !usage.is_retired {
            usage.is_retired = true;
            remove(&self.frames.with_extension(NOTE));
        }
    }

    /// Whether it is of no use any more.
    pub(crate) fn is_retired(&self) -> bool {
        self.usage.lock().is_retired
    }

    /// Whether somebody has got it, and nobody else waits for it.
    fn is_over(&self) -> bool {
        let usage = self.usage.lock();
        usage.is_delivered && usage.sending == 0 && usage.waiting.is_empty()
    }

    /// Whether nobody has had use for it for long.
    fn is_expired(&self) -> bool {
        let usage = self.usage.lock();
        usage.sending == 0 && usage.last.elapsed() > KEPT
    }

    /// Whether nobody reads it just now.
    fn is_idle(&self) -> bool {
        self.usage.lock().sending == 0
    }

    fn is_in_use(&self) -> bool {
        let usage = self.usage.lock();
        usage.sending > 0 || usage.last.elapsed() < HELD_AFTER_BREAK
    }

    /// Reads the pieces after the first `from`. Blocks, as does the reader.
    ///
    /// # Errors
    /// When the file cannot be read that far.
    pub(crate) fn read_from(&self, from: u64) -> io::Result<SpoolReader> {
        let left = self.id.pieces.checked_sub(from).ok_or_else(damaged)?;
        let mut file = BufReader::new(File::open(&self.frames)?);
        let mut skipped_bytes = 0;
        for _ in 0..from {
            let (length, _) = read_head(&mut file)?.filter(|(length, _)| *length > 0).ok_or_else(damaged)?;
            file.seek_relative(i64::from(length))?;
            skipped_bytes += u64::from(length);
        }
        Ok(SpoolReader { file, left, skipped_bytes })
    }
}

impl Drop for Spool {
    fn drop(&mut self) {
        if self.usage.get_mut().is_retired {
            remove(&self.frames);
        }
    }
}

/// A spool that is being offered or sent to one member.
pub(crate) struct Lent(Arc<Spool>);

impl Drop for Lent {
    fn drop(&mut self) {
        self.0.usage.lock().sending -= 1;
        if self.0.is_over() {
            self.0.retire();
        }
    }
}

/// The pieces of a spool, one after the other.
pub(crate) struct SpoolReader {
    file: BufReader<File>,
    /// Pieces that are yet to come. A block of zeros reads as an end.
    left: u64,
    /// Bytes of the pieces that were left out.
    pub(crate) skipped_bytes: u64,
}

impl SpoolReader {
    /// The next piece, or none at the end.
    ///
    /// # Errors
    /// Invalid data, when it is not what was written.
    pub(crate) fn next_piece(&mut self) -> io::Result<Option<Vec<u8>>> {
        match Frame::read(&mut self.file)? {
            Frame::Piece(piece) if self.left > 0 => {
                self.left -= 1;
                Ok(Some(piece))
            }
            Frame::End if self.left == 0 => Ok(None),
            Frame::Piece(_) | Frame::End | Frame::Torn => Err(damaged()),
        }
    }
}

/// Passed by whoever is to make a group's spool. It is held while one is made, so it is a lock of tasks.
type Turn = Arc<tokio::sync::Mutex<()>>;

/// All spools of this node.
pub(crate) struct Spools {
    dir: PathBuf,
    room: Room,
    /// Those of groups that are not open.
    found: Mutex<HashMap<GroupId, Arc<Spool>>>,
    shelf: Mutex<HashMap<GroupId, Arc<Spool>>>,
    turns: Mutex<HashMap<GroupId, Turn>>,
    holds: Holds,
    /// Whether every member knows what an offer is.
    are_understood: AtomicBool,
}

impl Spools {
    /// Opens the folder. What was begun and not ended is deleted, and what is old. Until somebody says
    /// otherwise there may be members that do not know what an offer is.
    pub(crate) fn open(dir: &Path, room: Room) -> io::Result<Spools> {
        std::fs::create_dir_all(dir)?;
        let mut found = HashMap::new();
        let mut known = BTreeSet::new();
        let paths: Vec<PathBuf> =
            std::fs::read_dir(dir)?.map(|entry| Ok(entry?.path())).collect::<io::Result<_>>()?;
        for path in paths.iter().filter(|path| path.extension().is_some_and(|ending| ending == NOTE)) {
            let Some((group, spool)) = read_note(path).filter(|_| !is_stale(path)) else { continue };
            known.extend([path.clone(), spool.frames.clone()]);
            if let Some(other) = found.insert(group, spool) {
                // At most one is of use; which one does not matter.
                other.retire();
            }
        }
        for path in paths.iter().filter(|path| !known.contains(*path)) {
            std::fs::remove_file(path)?;
        }
        let (found, shelf) = (Mutex::new(found), Mutex::default());
        let (holds, are_understood) = (Holds::default(), AtomicBool::new(false));
        let turns = Mutex::default();
        Ok(Spools { dir: dir.to_owned(), room, found, shelf, turns, holds, are_understood })
    }

    /// Whether a spool can be made, kept and offered.
    pub(crate) fn are_of_use(&self) -> bool {
        self.room.is_there() && self.are_understood.load(Ordering::Relaxed)
    }

    /// Whether there is room for the copy of an export, as far as its size is known. Blocks.
    pub(crate) fn have_room_for(&self, export: &dyn Export) -> bool {
        self.room.check(export.about_bytes()).is_ok()
    }

    pub(crate) fn set_understood(&self, are_understood: bool) {
        self.are_understood.store(are_understood, Ordering::Relaxed);
    }

    /// Puts a group's spool away until the group is open again.
    pub(crate) fn withhold(&self, group: GroupId) {
        if let Some(spool) = self.shelf.lock().remove(&group)
            && let Some(older) = self.found.lock().insert(group, spool)
        {
            older.retire();
        }
    }

    /// Takes what an earlier run of the process or of the group has left, if the log still reaches back to it.
    pub(crate) fn adopt(&self, group: GroupId, purged: u64) {
        let Some(spool) = self.found.lock().remove(&group) else { return };
        if spool.index() < purged {
            return spool.retire();
        }
        tracing::info!(group = group.0, index = spool.index(), "a snapshot that was being sent goes on");
        if let Some(other) = self.shelf.lock().insert(group, spool) {
            other.retire();
        }
    }

    /// The snapshot that members of a group get, if one has been made and is still of use.
    pub(crate) fn of(&self, group: GroupId) -> Option<Arc<Spool>> {
        if !self.are_of_use() {
            return None;
        }
        self.shelf.lock().get(&group).filter(|spool| !spool.is_retired()).cloned()
    }

    /// For whom logs are kept besides those that get a spool.
    pub(crate) fn holds(&self) -> &Holds {
        &self.holds
    }

    /// Whether a member needs the log as it is, to go on after the snapshot that it is getting. On a disk
    /// without room no log is kept for anybody.
    pub(crate) fn is_held(&self, group: GroupId) -> bool {
        let is_in_use = || self.of(group).is_some_and(|spool| spool.is_in_use());
        self.room.is_there() && (self.holds.is_held(group) || is_in_use())
    }

    /// A group's turn to make a spool: of several members that are too far behind one makes it, and the
    /// others find it once they have the turn.
    pub(crate) fn turn(&self, group: GroupId) -> Turn {
        self.turns.lock().entry(group).or_default().clone()
    }

    /// Writes an export to a file. Blocks.
    ///
    /// # Errors
    /// When it cannot be read or written, or the disk's reserve is reached.
    pub(crate) fn make(
        &self,
        group: GroupId,
        meta: SnapshotMetaOf<TypeConfig>,
        export: &dyn Export,
    ) -> io::Result<Arc<Spool>> {
        let name = format!("{}{}", SnapshotId::prefix(group), uuid::Uuid::new_v4().simple());
        let path = self.dir.join(name).with_extension(FRAMES);
        let made = self.write(group, &path, &meta, export);
        let id = made.inspect_err(|_| {
            remove(&path.with_extension(NOTE));
            remove(&path);
        })?;
        let spool = Spool::new(meta, id, path);
        if let Some(before) = self.shelf.lock().insert(group, spool.clone()) {
            before.retire();
        }
        Ok(spool)
    }

    fn write(
        &self,
        group: GroupId,
        path: &Path,
        meta: &SnapshotMetaOf<TypeConfig>,
        export: &dyn Export,
    ) -> io::Result<SnapshotId> {
        let mut frames = FrameWriter::new(File::create_new(path)?, self.room.clone());
        let mut tally = Tally::of(&codec::encode(meta));
        while let Some(piece) = export.next_piece()? {
            // The end of a file is a piece without bytes.
            if piece.is_empty() {
                continue;
            }
            self.room.require()?;
            frames.write(&piece)?;
            tally.take(&piece);
        }
        frames.finish()?;
        let id = tally.id();
        let note: Note = (group, meta.clone(), id);
        let mut file = File::create_new(path.with_extension(NOTE))?;
        file.write_all(&codec::encode(&note))?;
        file.sync_all()?;
        Ok(id)
    }

    /// A member has got all of it. When nobody else waits for it, it goes.
    pub(crate) fn delivered(&self, lent: Lent, to: NodeId) {
        {
            let mut usage = lent.0.usage.lock();
            usage.waiting.remove(&to);
            usage.is_delivered = true;
            usage.refusals = 0;
        }
        drop(lent);
        self.drop_retired(|_| false);
    }

    /// The log is going to be dropped up to an index at most: what ends before it is of no use to anybody.
    pub(crate) fn retire_before(&self, group: GroupId, index: u64) {
        let mut shelf = self.shelf.lock();
        if let Some(spool) = shelf.get(&group).filter(|spool| spool.index() < index) {
            spool.retire();
            shelf.remove(&group);
        }
    }

    /// Deletes what is here of a group.
    pub(crate) fn retire(&self, group: GroupId) {
        self.turns.lock().remove(&group);
        let (kept, found) = (self.shelf.lock().remove(&group), self.found.lock().remove(&group));
        kept.iter().chain(&found).for_each(|spool| spool.retire());
    }

    /// Deletes what nobody has had use for for long, and when there is no room what nobody reads just now.
    pub(crate) fn sweep(&self) {
        let has_room = self.room.is_there();
        self.drop_retired(|spool| spool.is_expired() || (!has_room && spool.is_idle()));
    }

    fn drop_retired(&self, is_over: impl Fn(&Spool) -> bool) {
        for all in [&self.shelf, &self.found] {
            all.lock().retain(|_, spool| {
                let is_over = spool.is_retired() || is_over(spool);
                if is_over {
                    spool.retire();
                }
                !is_over
            });
        }
    }
}

/// What a note and the file beside it are; none when they are not whole.
fn read_note(path: &Path) -> Option<(GroupId, Arc<Spool>)> {
    let (group, meta, id): Note = codec::decode(&std::fs::read(path).ok()?).ok()?;
    let frames = path.with_extension(FRAMES);
    let length = id.bytes.checked_add(id.pieces.checked_add(1)?.checked_mul(HEAD_BYTES)?)?;
    let is_whole = std::fs::metadata(&frames).ok()?.len() == length;
    is_whole.then(|| (group, Spool::new(meta, id, frames)))
}

fn remove(path: &Path) {
    match std::fs::remove_file(path) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => {
            tracing::warn!(%error, file = %path.display(), "a snapshot that was sent could not be deleted");
        }
        _ => {}
    }
}

fn damaged() -> io::Error {
    io::Error::new(io::ErrorKind::InvalidData, "the copy of a snapshot on this disk is damaged")
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::types::LogIdOf;

    const GROUP: GroupId = GroupId(5);
    const MEMBER: NodeId = NodeId(2);

    struct Pieces(Mutex<Vec<Vec<u8>>>);

    impl Export for Pieces {
        fn next_piece(&self) -> io::Result<Option<Vec<u8>>> {
            let mut rest = self.0.lock();
            Ok((!rest.is_empty()).then(|| rest.remove(0)))
        }
    }

    fn pieces() -> Vec<Vec<u8>> {
        (1..=4u8).map(|byte| vec![byte; 100 * usize::from(byte)]).collect()
    }

    fn open(dir: &Path) -> Spools {
        let spools = Spools::open(dir, Room::above(dir, 0)).expect("opens");
        spools.set_understood(true);
        spools
    }

    fn make(spools: &Spools, index: u64) -> Arc<Spool> {
        let last_log_id = Some(LogIdOf::<TypeConfig>::new_term_index(1, index));
        let meta = SnapshotMetaOf::<TypeConfig> { last_log_id, ..SnapshotMetaOf::<TypeConfig>::default() };
        spools.make(GROUP, meta, &Pieces(Mutex::new(pieces()))).expect("made")
    }

    fn read(spool: &Spool, from: u64) -> (Vec<Vec<u8>>, u64) {
        let mut reader = spool.read_from(from).expect("readable");
        let mut all = Vec::new();
        while let Some(piece) = reader.next_piece().expect("readable") {
            all.push(piece);
        }
        (all, reader.skipped_bytes)
    }

    fn files(dir: &Path) -> usize {
        std::fs::read_dir(dir).expect("listed").count()
    }

    #[test]
    fn a_spool_is_read_from_any_piece_on_also_after_a_restart() {
        let dir = tempfile::tempdir().expect("a directory");
        let id = {
            let spools = open(dir.path());
            let spool = make(&spools, 70);
            assert_eq!(read(&spool, 0), (pieces(), 0));
            assert_eq!(read(&spool, 3), (pieces()[3..].to_vec(), 600));
            assert_eq!(read(&spool, 4), (Vec::new(), 1000));
            assert!(spool.read_from(6).is_err());
            spool.id
        };
        // Half made, as a crash leaves it.
        std::fs::write(dir.path().join("0-half.frames"), b"abc").expect("written");
        let spools = open(dir.path());
        assert_eq!(files(dir.path()), 2);
        assert!(spools.of(GROUP).is_none(), "its group is not open yet");
        spools.adopt(GROUP, 70);
        let spool = spools.of(GROUP).expect("adopted");
        assert_eq!((spool.id, spool.index()), (id, 70));
        assert_eq!(read(&spool, 2), (pieces()[2..].to_vec(), 300));
    }

    #[test]
    fn what_the_log_does_not_reach_back_to_is_not_adopted() {
        let dir = tempfile::tempdir().expect("a directory");
        make(&open(dir.path()), 70);
        let spools = open(dir.path());
        spools.adopt(GROUP, 71);
        assert!(spools.of(GROUP).is_none());
        assert_eq!(files(dir.path()), 0);
    }

    #[test]
    fn it_goes_when_nobody_waits_for_it_any_more() {
        let dir = tempfile::tempdir().expect("a directory");
        let spools = open(dir.path());
        let spool = make(&spools, 70);
        let (first, second) = (spool.lend(), spool.lend());
        assert!(spools.is_held(GROUP));
        spool.taken(MEMBER);
        spools.delivered(first, MEMBER);
        assert!(spools.of(GROUP).is_some(), "the other one reads back what it has");
        spool.taken(NodeId(3));
        drop(second);
        assert!(spools.of(GROUP).is_some(), "the other one's stream has broken");
        spools.delivered(spool.lend(), NodeId(3));
        assert!(spools.of(GROUP).is_none() && !spools.is_held(GROUP));
        drop(spool);
        assert_eq!(files(dir.path()), 0);

        // The last attempt comes to nothing, and its member has got nothing.
        let spool = make(&spools, 80);
        let (first, second) = (spool.lend(), spool.lend());
        spools.delivered(first, MEMBER);
        drop((second, spool));
        assert!(spools.of(GROUP).is_none());
        spools.sweep();
        assert_eq!(files(dir.path()), 0);
    }

    #[tokio::test(start_paused = true)]
    async fn who_takes_nothing_keeps_neither_the_copy_nor_the_log() {
        let dir = tempfile::tempdir().expect("a directory");
        let spools = open(dir.path());
        let spool = make(&spools, 70);
        for _ in 0..3 {
            let lent = spool.lend();
            tokio::time::advance(KEPT / 2).await;
            assert!(spools.is_held(GROUP), "an offer is under way");
            drop(lent);
            assert!(!spools.is_held(GROUP), "it has come to nothing");
        }
        drop(spool);
        spools.sweep();
        assert_eq!(files(dir.path()), 0);
    }

    #[test]
    fn it_goes_when_the_log_goes_or_another_takes_its_place() {
        let dir = tempfile::tempdir().expect("a directory");
        let spools = open(dir.path());
        drop(make(&spools, 70));
        drop(make(&spools, 80));
        assert_eq!((files(dir.path()), spools.of(GROUP).map(|spool| spool.index())), (2, Some(80)));
        spools.retire_before(GROUP, 80);
        assert!(spools.of(GROUP).is_some());
        let reader = spools.of(GROUP).expect("there");
        spools.retire_before(GROUP, 81);
        assert!(spools.of(GROUP).is_none());
        assert_eq!(read(&reader, 0).0, pieces(), "who reads it reads on");
        drop(reader);
        assert_eq!(files(dir.path()), 0);
    }

    #[test]
    fn no_room_leaves_nothing_behind() {
        let dir = tempfile::tempdir().expect("a directory");
        let spools = open(dir.path());
        spools.room.set(false);
        let meta = SnapshotMetaOf::<TypeConfig>::default();
        let made = spools.make(GROUP, meta, &Pieces(Mutex::new(pieces())));
        assert!(made.is_err_and(|error| error.kind() == io::ErrorKind::StorageFull));
        assert_eq!(files(dir.path()), 0);
    }

    #[test]
    fn without_room_no_log_is_kept_and_what_nobody_reads_goes() {
        let dir = tempfile::tempdir().expect("a directory");
        let spools = open(dir.path());
        let spool = make(&spools, 70);
        let lent = spool.lend();
        spools.room.set(false);
        spools.sweep();
        assert!(!spools.is_held(GROUP));
        assert_eq!((files(dir.path()), read(&spool, 0).0), (2, pieces()), "who reads it reads on");
        drop((lent, spool));
        spools.sweep();
        assert_eq!(files(dir.path()), 0);
    }

    #[test]
    fn nothing_is_offered_to_those_who_may_not_understand_it() {
        let dir = tempfile::tempdir().expect("a directory");
        drop(make(&open(dir.path()), 70));
        let spools = Spools::open(dir.path(), Room::above(dir.path(), 0)).expect("opens");
        spools.adopt(GROUP, 0);
        assert!(spools.of(GROUP).is_none());
        spools.set_understood(true);
        assert!(spools.of(GROUP).is_some());
    }

    #[test]
    fn a_copy_is_not_begun_that_would_not_fit() {
        struct Huge;
        impl Export for Huge {
            fn next_piece(&self) -> io::Result<Option<Vec<u8>>> {
                unreachable!("it is not begun")
            }

            fn about_bytes(&self) -> u64 {
                u64::MAX
            }
        }
        let dir = tempfile::tempdir().expect("a directory");
        let spools = open(dir.path());
        assert!(spools.have_room_for(&Pieces(Mutex::new(pieces()))) && !spools.have_room_for(&Huge));
    }

    #[test]
    fn damage_is_not_sent() {
        let dir = tempfile::tempdir().expect("a directory");
        let spools = open(dir.path());
        let spool = make(&spools, 70);
        let mut bytes = std::fs::read(&spool.frames).expect("readable");
        bytes[20] ^= 1;
        std::fs::write(&spool.frames, bytes).expect("written");
        assert!(spool.read_from(0).expect("opens").next_piece().is_err());
        // A reader that leaves it out does not look at it.
        assert_eq!(read(&spool, 1).0, pieces()[1..].to_vec());
    }

    #[test]
    fn a_block_of_zeros_is_no_end() {
        let dir = tempfile::tempdir().expect("a directory");
        let spools = open(dir.path());
        let spool = make(&spools, 70);
        let mut bytes = std::fs::read(&spool.frames).expect("readable");
        let second = HEAD_BYTES as usize + 100;
        bytes[second..second + 64].fill(0);
        std::fs::write(&spool.frames, bytes).expect("written");
        let mut reader = spool.read_from(0).expect("opens");
        assert!(reader.next_piece().expect("readable").is_some());
        assert!(reader.next_piece().is_err());
        assert!(spool.read_from(2).is_err());
    }

    #[test]
    fn what_was_sent_to_its_end_and_refused_twice_is_not_offered_again() {
        let dir = tempfile::tempdir().expect("a directory");
        let spools = open(dir.path());
        let spool = make(&spools, 70);
        spool.refused();
        assert!(spools.of(GROUP).is_some(), "an answer may be lost once");
        spool.refused();
        assert!(spools.of(GROUP).is_none());
        spools.sweep();
        drop(spool);
        assert_eq!(files(dir.path()), 0);
    }

    #[test]
    fn adopting_one_retires_the_other() {
        let dir = tempfile::tempdir().expect("a directory");
        let spools = open(dir.path());
        drop(make(&spools, 70));
        spools.withhold(GROUP);
        drop(make(&spools, 80));
        spools.adopt(GROUP, 0);
        assert_eq!((files(dir.path()), spools.of(GROUP).map(|spool| spool.index())), (2, Some(70)));
    }
}
