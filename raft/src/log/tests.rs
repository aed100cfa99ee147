//! openraft's own conformance suite on our log, as it is and with the log reopened before every read, and
//! the cases that the suite does not know: group commit, restarts, truncation, damage.

use std::collections::BTreeMap;
use std::fmt::Debug;
use std::io;
use std::ops::RangeBounds;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use bytes::Bytes;
use openraft::storage::{IOFlushed, LogState, RaftLogStorage};
use openraft::testing::log::{StoreBuilder, Suite};
use openraft::type_config::TypeConfigExt;
use openraft::{Entry, EntryPayload, OptionalSend, RaftLogReader, StorageError};
use parking_lot::Mutex;
use shoal_proto::{GroupId, NodeId};
use tempfile::TempDir;
use tokio::sync::{OwnedMappedMutexGuard, OwnedMutexGuard};

use super::*;
use crate::machine::{Committed, Export, Exported, Machine, StateMachine};
use crate::snapshot::Snapshots;
use crate::types::{EntryOf, LogIdOf, Payload, TypeConfig, VoteOf};

/// The smallest state machine: it remembers its tag and every command.
#[derive(Default)]
struct Recorder(Mutex<Recorded>);

#[derive(Default)]
struct Recorded {
    tag: Option<Vec<u8>>,
    commands: BTreeMap<u64, Bytes>,
}

struct Empty;

impl Export for Empty {
    fn next_piece(&self) -> io::Result<Option<Vec<u8>>> {
        Ok(None)
    }
}

impl StateMachine for Recorder {
    fn applied_tag(&self) -> io::Result<Option<Vec<u8>>> {
        Ok(self.0.lock().tag.clone())
    }

    fn apply(&self, entries: Vec<Committed>) -> io::Result<Vec<Bytes>> {
        let mut state = self.0.lock();
        Ok(entries
            .into_iter()
            .map(|entry| {
                state.tag = Some(entry.tag);
                let command = entry.command.unwrap_or_default();
                state.commands.insert(entry.index, command.clone());
                command
            })
            .collect())
    }

    fn checkpoint(&self) -> io::Result<Option<Vec<u8>>> {
        self.applied_tag()
    }

    fn export(&self) -> io::Result<Exported> {
        Ok((self.applied_tag()?, Box::new(Empty)))
    }

    fn install(&self, tag: Vec<u8>, _file: &Path) -> io::Result<()> {
        self.0.lock().tag = Some(tag);
        Ok(())
    }
}

/// A log that is closed and opened again before whatever is asked of it.
#[derive(Clone)]
struct Reopened {
    dir: PathBuf,
    log: Arc<tokio::sync::Mutex<Option<GroupLog>>>,
}

impl Reopened {
    async fn asked(&self) -> OwnedMappedMutexGuard<Option<GroupLog>, GroupLog> {
        let mut log = self.log.clone().lock_owned().await;
        drop(log.take());
        *log = Some(open(&self.dir).await);
        OwnedMutexGuard::map(log, |log| log.as_mut().expect("it was opened just now"))
    }

    async fn told(&self) -> OwnedMappedMutexGuard<Option<GroupLog>, GroupLog> {
        let log = self.log.clone().lock_owned().await;
        OwnedMutexGuard::map(log, |log| log.as_mut().expect("it is only closed to be opened"))
    }
}

impl RaftLogReader<TypeConfig> for Reopened {
    async fn try_get_log_entries<RB>(&mut self, range: RB) -> io::Result<Vec<EntryOf<TypeConfig>>>
    where
        RB: RangeBounds<u64> + Clone + Debug + OptionalSend,
    {
        self.asked().await.try_get_log_entries(range).await
    }

    async fn read_vote(&mut self) -> io::Result<Option<VoteOf<TypeConfig>>> {
        self.asked().await.read_vote().await
    }

    async fn limited_get_log_entries(
        &mut self,
        start: u64,
        end: u64,
    ) -> io::Result<Vec<EntryOf<TypeConfig>>> {
        self.asked().await.limited_get_log_entries(start, end).await
    }
}

impl RaftLogStorage<TypeConfig> for Reopened {
    type LogReader = Self;

    async fn get_log_state(&mut self) -> io::Result<LogState<TypeConfig>> {
        self.asked().await.get_log_state().await
    }

    async fn get_log_reader(&mut self) -> Self {
        self.clone()
    }

    async fn save_vote(&mut self, vote: &VoteOf<TypeConfig>) -> io::Result<()> {
        self.told().await.save_vote(vote).await
    }

    async fn save_committed(&mut self, committed: Option<LogIdOf<TypeConfig>>) -> io::Result<()> {
        self.told().await.save_committed(committed).await
    }

    async fn read_committed(&mut self) -> io::Result<Option<LogIdOf<TypeConfig>>> {
        self.asked().await.read_committed().await
    }

    async fn append<I>(&mut self, entries: I, callback: IOFlushed<TypeConfig>) -> io::Result<()>
    where
        I: IntoIterator<Item = EntryOf<TypeConfig>> + OptionalSend,
        I::IntoIter: OptionalSend,
    {
        self.told().await.append(entries, callback).await
    }

    async fn truncate_after(&mut self, last: Option<LogIdOf<TypeConfig>>) -> io::Result<()> {
        self.told().await.truncate_after(last).await
    }

    async fn purge(&mut self, upto: LogIdOf<TypeConfig>) -> io::Result<()> {
        self.told().await.purge(upto).await
    }
}

struct Builder;

impl StoreBuilder<TypeConfig, GroupLog, Machine, TempDir> for Builder {
    async fn build(&self) -> Result<(TempDir, GroupLog, Machine), StorageError<TypeConfig>> {
        let dir = tempfile::tempdir().expect("a temporary directory");
        let log = open(dir.path()).await;
        let machine = machine(dir.path(), &log);
        Ok((dir, log, machine))
    }
}

struct RestartingBuilder;

impl StoreBuilder<TypeConfig, Reopened, Machine, TempDir> for RestartingBuilder {
    async fn build(&self) -> Result<(TempDir, Reopened, Machine), StorageError<TypeConfig>> {
        let dir = tempfile::tempdir().expect("a temporary directory");
        let log = open(dir.path()).await;
        // A machine keeps its log open.
        let machine = machine(dir.path(), &open(&dir.path().join("other")).await);
        let log = Arc::new(tokio::sync::Mutex::new(Some(log)));
        let log = Reopened { dir: dir.path().to_owned(), log };
        Ok((dir, log, machine))
    }
}

fn machine(dir: &Path, log: &GroupLog) -> Machine {
    let snapshots = Snapshots::open(dir, 0, 0).expect("the folders are made");
    Machine::new(GroupId(7), Arc::new(Recorder::default()), log.clone(), snapshots, Default::default())
}

async fn open(dir: &Path) -> GroupLog {
    // The writer thread of the log before this one may need a moment to let go of the lock.
    for _ in 0..500 {
        if let Ok(store) = LogStore::open(&dir.join("log"), &LogConfig::default()) {
            return store.group(GroupId(7)).await.expect("the group opens");
        }
        std::thread::sleep(std::time::Duration::from_millis(10));
    }
    panic!("the log did not open within five seconds");
}

fn entry(term: u64, index: u64) -> EntryOf<TypeConfig> {
    let body = Bytes::from(format!("{term}-{index}").into_bytes());
    Entry {
        log_id: LogIdOf::<TypeConfig>::new_term_index(term, index),
        payload: EntryPayload::Normal(Payload(body)),
    }
}

async fn append(log: &mut GroupLog, entries: Vec<EntryOf<TypeConfig>>) {
    let (done, synced) = TypeConfig::oneshot();
    log.append(entries, IOFlushed::signal(done)).await.expect("appends");
    synced.await.expect("signalled").expect("synced");
}

async fn indexes(log: &mut GroupLog) -> Vec<(u64, u64)> {
    let entries = log.try_get_log_entries(..).await.expect("readable");
    entries.iter().map(|entry| (entry.log_id.leader_id.term, entry.log_id.index)).collect()
}

#[test]
fn openraft_conformance_suite() {
    TypeConfig::run(async { Suite::test_all(Builder).await.expect("the suite passes") });
}

#[test]
fn openraft_conformance_suite_with_restarts() {
    TypeConfig::run(async { Suite::test_all(RestartingBuilder).await.expect("the suite passes") });
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn everything_is_there_after_a_restart() {
    let dir = tempfile::tempdir().expect("a temporary directory");
    let vote = VoteOf::<TypeConfig>::new(3, NodeId(2));
    {
        let mut log = open(dir.path()).await;
        log.save_vote(&vote).await.expect("saved");
        append(&mut log, (1..=10).map(|index| entry(1, index)).collect()).await;
        log.purge(LogIdOf::<TypeConfig>::new_term_index(1, 3)).await.expect("purged");
    }
    let mut log = open(dir.path()).await;
    assert_eq!(log.read_vote().await.expect("readable"), Some(vote));
    let state = log.get_log_state().await.expect("readable");
    assert_eq!(state.last_purged_log_id.map(|id| id.index), Some(3));
    assert_eq!(state.last_log_id.map(|id| id.index), Some(10));
    assert_eq!(indexes(&mut log).await, (4..=10).map(|index| (1, index)).collect::<Vec<_>>());
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_cut_tail_does_not_come_back_after_a_restart() {
    let dir = tempfile::tempdir().expect("a temporary directory");
    {
        let mut log = open(dir.path()).await;
        append(&mut log, (1..=10).map(|index| entry(1, index)).collect()).await;
        log.truncate_after(Some(LogIdOf::<TypeConfig>::new_term_index(1, 6))).await.expect("cut");
    }
    {
        let mut log = open(dir.path()).await;
        assert_eq!(log.get_log_state().await.expect("readable").last_log_id.map(|id| id.index), Some(6));
        assert_eq!(indexes(&mut log).await.len(), 6);
        append(&mut log, vec![entry(2, 7)]).await;
    }
    let mut log = open(dir.path()).await;
    let expected: Vec<_> = (1..=6).map(|index| (1, index)).chain([(2, 7)]).collect();
    assert_eq!(indexes(&mut log).await, expected);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_purge_beyond_a_cut_tail_leaves_nothing_stale() {
    let dir = tempfile::tempdir().expect("a temporary directory");
    {
        let mut log = open(dir.path()).await;
        append(&mut log, (1..=10).map(|index| entry(1, index)).collect()).await;
        log.truncate_after(Some(LogIdOf::<TypeConfig>::new_term_index(1, 5))).await.expect("cut");
        log.purge(LogIdOf::<TypeConfig>::new_term_index(2, 8)).await.expect("purged");
    }
    let mut log = open(dir.path()).await;
    assert_eq!(log.get_log_state().await.expect("readable").last_log_id.map(|id| id.index), Some(8));
    assert_eq!(indexes(&mut log).await, []);
    append(&mut log, vec![entry(2, 9)]).await;
    assert_eq!(indexes(&mut log).await, [(2, 9)]);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn entries_beyond_the_cache_are_read_back() {
    let dir = tempfile::tempdir().expect("a temporary directory");
    let mut log = open(dir.path()).await;
    let big = Bytes::from(vec![7u8; 1 << 20]);
    for index in 1..=40 {
        let log_id = LogIdOf::<TypeConfig>::new_term_index(1, index);
        append(&mut log, vec![Entry { log_id, payload: EntryPayload::Normal(Payload(big.clone())) }]).await;
    }
    let mut next = 1;
    while next <= 40 {
        let entries = log.limited_get_log_entries(next, 41).await.expect("readable");
        assert_eq!(entries.first().map(|entry| entry.log_id.index), Some(next), "no gap");
        next += entries.len() as u64;
    }
    assert_eq!(next, 41);
}

/// Reading a range that ends before the first entry in memory once made the leader panic: the
/// log was reopened, new entries were in memory, and a follower wanted old ones.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn old_entries_are_read_while_new_ones_are_in_memory() {
    let dir = tempfile::tempdir().expect("a temporary directory");
    {
        let mut log = open(dir.path()).await;
        append(&mut log, (1..=200).map(|index| entry(1, index)).collect()).await;
    }
    let mut log = open(dir.path()).await;
    append(&mut log, (201..=210).map(|index| entry(2, index)).collect()).await;
    for (first, end) in [(5, 20), (1, 201), (150, 205), (201, 211), (0, 211)] {
        let entries = log.limited_get_log_entries(first, end).await.expect("readable");
        let found: Vec<u64> = entries.iter().map(|entry| entry.log_id.index).collect();
        assert_eq!(found, (first.max(1)..end).collect::<Vec<_>>());
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn groups_do_not_see_each_other_and_can_be_forgotten() {
    let dir = tempfile::tempdir().expect("a temporary directory");
    let store = LogStore::open(&dir.path().join("log"), &LogConfig::default()).expect("opens");
    let mut logs = Vec::new();
    for id in 1..=20 {
        logs.push(store.group(GroupId(id)).await.expect("opens"));
    }
    let writes = logs.iter_mut().map(|log| append(log, (1..=5).map(|index| entry(1, index)).collect()));
    futures::future::join_all(writes).await;
    for log in &mut logs {
        assert_eq!(indexes(log).await.len(), 5);
    }
    store.forget(GroupId(3)).await.expect("forgotten");
    assert_eq!(store.groups().await.expect("listed").len(), 19);
    let mut again = store.group(GroupId(3)).await.expect("opens");
    assert_eq!(indexes(&mut again).await, []);
}

#[test]
fn a_damaged_or_misplaced_record_is_refused() {
    let good = record::wrap(7, 3, b"body");
    assert_eq!(record::unwrap(7, &good).expect("whole"), b"body");
    assert!(record::unwrap(8, &good).is_err(), "another group's record");
    let mut flipped = good.clone();
    flipped.value[14] ^= 1;
    assert!(record::unwrap(7, &flipped).is_err(), "a flipped bit");
}

/// A log of 60 batches whose newest file is then changed by hand; what opening it says.
async fn opened_after(change: impl FnOnce(&mut Vec<u8>)) -> io::Result<LogStore> {
    let dir = tempfile::tempdir().expect("a temporary directory");
    let path = dir.path().join("log");
    {
        let mut log = open(dir.path()).await;
        for index in 1..=60 {
            append(&mut log, vec![entry(1, index)]).await;
        }
    }
    // A copy, because the writer thread may hold its lock a moment longer. The file may be longer
    // than what was written to it; that part is zeros.
    let copy = tempfile::tempdir().expect("a temporary directory");
    for entry in std::fs::read_dir(&path).expect("listed") {
        let entry = entry.expect("an entry");
        std::fs::copy(entry.path(), copy.path().join(entry.file_name())).expect("copied");
    }
    let files = std::fs::read_dir(copy.path()).expect("listed").map(|entry| entry.expect("an entry").path());
    let newest = files.filter(|path| path.extension().is_some_and(|end| end == "raftlog")).max();
    let newest = newest.expect("there is a file");
    let mut bytes = std::fs::read(&newest).expect("readable");
    let written = bytes.iter().rposition(|byte| *byte != 0).expect("something was written");
    bytes.truncate(written + 1);
    change(&mut bytes);
    std::fs::write(&newest, bytes).expect("writable");
    LogStore::open(copy.path(), &LogConfig::default())
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_was_acknowledged_and_is_damaged_is_refused() {
    opened_after(|_| {}).await.expect("an untouched log opens");
    opened_after(|bytes| bytes.extend_from_slice(&[7; 50])).await.expect("a torn end is cut off");
    for part in [0.3, 0.6, 0.9] {
        let flipped = opened_after(|bytes| {
            let at = (bytes.len() as f64 * part) as usize;
            bytes[at] ^= 4;
        });
        let refused = flipped.await.err().expect("a flipped bit is refused").to_string();
        assert!(refused.contains("damaged") && refused.contains("must not vote"), "{refused}");
    }
    let cut = opened_after(|bytes| bytes.truncate(bytes.len() - 20)).await;
    assert!(cut.err().expect("a lost batch is refused").to_string().contains("batch 59 of 60"));
}

#[test]
fn moved_entries_are_checked_and_one_unreadable_mark_is_enough() {
    let dir = tempfile::tempdir().expect("a temporary directory");
    let moved = dir.path().join("0000000000000001.rewrite");
    std::fs::write(&moved, [1, 2, 3, 4, 0, 0]).expect("writable");
    let mut mark = mark::Mark::open(dir.path()).expect("opens");
    (1..=5).for_each(|sequence| mark.note(sequence).expect("noted"));
    mark.note_rewritten().expect("noted");
    // The end of a file may be written to after it was looked at, its beginning not.
    std::fs::write(&moved, [1, 2, 3, 4, 5, 6]).expect("writable");
    assert_eq!(mark::Mark::open(dir.path()).expect("opens again").sequence(), 5);
    std::fs::write(&moved, [1, 2, 7, 4, 5, 6]).expect("writable");
    assert!(mark::Mark::open(dir.path()).is_err(), "another beginning");
    std::fs::remove_file(&moved).expect("removed");
    let synced = dir.path().join("synced");
    let mut bytes = std::fs::read(&synced).expect("readable");
    bytes[13] ^= 1;
    std::fs::write(&synced, &bytes).expect("writable");
    assert_eq!(mark::Mark::open(dir.path()).expect("opens").sequence(), 4, "the other place counts");
    bytes[1] ^= 1;
    std::fs::write(&synced, &bytes).expect("writable");
    assert!(mark::Mark::open(dir.path()).is_err(), "no place is readable");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn entries_that_raft_engine_has_moved_are_marked_and_checked() {
    let dir = tempfile::tempdir().expect("a temporary directory");
    let config = LogConfig { file_bytes: 64 << 10, purge_threshold_bytes: 128 << 10 };
    let open_small = || {
        (0..500).find_map(|_| {
            std::thread::sleep(std::time::Duration::from_millis(10));
            LogStore::open(dir.path(), &config).ok()
        })
    };
    {
        let store = open_small().expect("opens");
        let mut still = store.group(GroupId(1)).await.expect("opens");
        append(&mut still, (1..=20).map(|index| entry(1, index)).collect()).await;
        // A busy group fills file after file, so that what the quiet one has must be moved.
        let mut busy = store.group(GroupId(2)).await.expect("opens");
        for round in 0..60u64 {
            append(&mut busy, (round * 200 + 1..=round * 200 + 200).map(|index| entry(1, index)).collect())
                .await;
            busy.purge(LogIdOf::<TypeConfig>::new_term_index(1, round * 200 + 199)).await.expect("purges");
        }
        // The purge of files runs on its own clock.
        for _ in 0..300 {
            std::thread::sleep(std::time::Duration::from_millis(100));
            if dir.path().join("rewritten").exists() {
                break;
            }
            store.groups().await.expect("listed");
        }
    }
    assert!(dir.path().join("rewritten").exists(), "nothing was moved");
    {
        let store = open_small().expect("opens again");
        let mut still = store.group(GroupId(1)).await.expect("opens");
        assert_eq!(indexes(&mut still).await.len(), 20, "nothing was lost by moving it");
    }
    std::thread::sleep(std::time::Duration::from_millis(300));
    let files = std::fs::read_dir(dir.path()).expect("listed").map(|entry| entry.expect("an entry").path());
    let moved = files.filter(|path| path.extension().is_some_and(|end| end == "rewrite")).max();
    let moved = moved.expect("a file of moved entries");
    let mut bytes = std::fs::read(&moved).expect("readable");
    let written = bytes.iter().rposition(|byte| *byte != 0).expect("something was written");
    bytes[written / 2] ^= 2;
    std::fs::write(&moved, bytes).expect("writable");
    let refused = LogStore::open(dir.path(), &config).err().expect("refused").to_string();
    assert!(refused.contains("is not what it was"), "{refused}");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_log_is_made_to_fit_a_state_that_was_fetched() {
    let id = LogIdOf::<TypeConfig>::new_term_index;
    let dir = tempfile::tempdir().expect("a temporary directory");
    {
        let mut log = open(dir.path()).await;
        append(&mut log, (1..=10).map(|index| entry(1, index)).collect()).await;
        // The same entry, and one that is not here yet: what is here may still be right.
        for fits in [id(1, 4), id(2, 12)] {
            log.adopt(fits).await.expect("adopted");
            assert_eq!(indexes(&mut log).await.len(), 10);
        }
        // Another entry there: what is here was never committed from some index on.
        log.adopt(id(2, 7)).await.expect("adopted");
    }
    let mut log = open(dir.path()).await;
    let state = log.get_log_state().await.expect("readable");
    assert_eq!((state.last_purged_log_id, state.last_log_id), (Some(id(2, 7)), Some(id(2, 7))));
    assert_eq!(indexes(&mut log).await, []);
    append(&mut log, vec![entry(2, 8)]).await;
    assert_eq!(indexes(&mut log).await, [(2, 8)]);
}
