//! The thread that owns raft-engine: it writes batches, reads what is not cached, and purges.

use std::io;
use std::path::{Path, PathBuf};
use std::sync::mpsc::{Receiver, RecvTimeoutError, SyncSender, TrySendError, sync_channel};
use std::time::{Duration, Instant};

use openraft::storage::IOFlushed;
use raft_engine::{Command, Config, Engine, LogBatch, ReadableSize};
use shoal_proto::GroupId;
use shoal_proto::planted::{Bug, crash_point, is_planted};
use tokio::sync::oneshot;

use super::GroupLog;
use super::mark::{self, Mark};
use super::record::{self, Record};
use crate::types::TypeConfig;

/// The exit code when the log could not be written or synced: the node cannot keep its promise.
pub const EXIT_LOG_FAILED: i32 = 74;

/// The most operations that wait for the writer thread.
const QUEUE_LENGTH: usize = 16_384;
/// The most operations in one batch.
const BATCH_OPERATIONS: usize = 1024;
/// A batch takes no more operations once it has this many bytes.
const BATCH_BYTES: usize = 8 << 20;
/// About how many bytes are read at a time when the log is checked at its opening.
const VERIFY_BYTES: usize = 4 << 20;
/// How often files that hold only purged entries are looked for.
const PURGE_EVERY: Duration = Duration::from_secs(10);

/// Settings of the log.
#[derive(Clone, Debug)]
pub struct LogConfig {
    /// Size at which a log file is closed and the next one begun, in bytes.
    pub file_bytes: u64,
    /// Size of all log files beyond which old ones are rewritten or dropped, in bytes.
    pub purge_threshold_bytes: u64,
}

impl Default for LogConfig {
    fn default() -> Self {
        LogConfig { file_bytes: 32 << 20, purge_threshold_bytes: 256 << 20 }
    }
}

pub(super) enum Done {
    Append(IOFlushed<TypeConfig>),
    Wait(oneshot::Sender<()>),
    Nobody,
}

pub(super) enum Change {
    Append {
        first: u64,
        bodies: Vec<Vec<u8>>,
        clear_tail: bool,
    },
    Put {
        key: &'static [u8],
        value: Vec<u8>,
    },
    Purge {
        upto: u64,
        purged: Vec<u8>,
    },
    /// Drops everything of the group but its vote.
    Reset {
        vote: Option<Vec<u8>>,
    },
}

pub(super) enum Op {
    Write { group: u64, change: Change, sync: bool, done: Done },
    Read { group: u64, first: u64, end: u64, reply: oneshot::Sender<io::Result<Vec<Vec<u8>>>> },
    Get { group: u64, key: &'static [u8], reply: oneshot::Sender<Option<Vec<u8>>> },
    Span { group: u64, reply: oneshot::Sender<Option<(u64, u64)>> },
    Groups { reply: oneshot::Sender<Vec<u64>> },
}

/// The log of a node. Cheap to clone; the files close when the last clone is gone.
#[derive(Clone)]
pub struct LogStore {
    queue: SyncSender<Op>,
}

impl LogStore {
    /// Opens or creates the log in a directory and starts its writer thread.
    ///
    /// A torn record at the end of the newest file (a crash in mid-write) is cut off: it was
    /// never acknowledged.
    ///
    /// # Errors
    /// When the files cannot be read, and when something is missing that was acknowledged.
    pub fn open(dir: &Path, config: &LogConfig) -> io::Result<LogStore> {
        std::fs::create_dir_all(dir)?;
        let mark = Mark::open(dir)?;
        let engine = Engine::open(Config {
            dir: dir.to_str().ok_or_else(|| io::Error::other("the log's path is not UTF-8"))?.to_owned(),
            target_file_size: ReadableSize(config.file_bytes),
            purge_threshold: ReadableSize(config.purge_threshold_bytes.max(config.file_bytes)),
            enable_log_recycle: false,
            ..Config::default()
        })
        .map_err(|error| match error {
            raft_engine::Error::Corruption(what) => mark::damaged(&what),
            error => io::Error::other(error),
        })?;
        let sequence = match engine.get(record::BATCHES, record::SEQUENCE) {
            Some(number) => u64::from_le_bytes(number.try_into().unwrap_or_default()),
            None => 0,
        };
        if sequence < mark.sequence() {
            let what = format!("it ends at batch {sequence} of {}", mark.sequence());
            return Err(mark::damaged(&what));
        }
        verify(&engine)?;
        sync_directories(dir)?;
        let (queue, ops) = sync_channel(QUEUE_LENGTH);
        std::thread::Builder::new()
            .name("raft-log".into())
            .spawn(move || Writer { engine, mark, sequence, purged_at: Instant::now() }.run(&ops))?;
        Ok(LogStore { queue })
    }

    /// Opens one group's part of the log.
    pub async fn group(&self, id: GroupId) -> io::Result<GroupLog> {
        GroupLog::open(self.clone(), id).await
    }

    /// Forgets everything about a group: entries, vote, positions.
    pub async fn forget(&self, id: GroupId) -> io::Result<()> {
        self.write_and_wait(id.0, Change::Reset { vote: None }, true).await
    }

    /// The groups that have anything in the log.
    pub async fn groups(&self) -> io::Result<Vec<GroupId>> {
        let groups = self.ask(|reply| Op::Groups { reply }).await?;
        Ok(groups.into_iter().map(GroupId).collect())
    }

    pub(super) fn submit(&self, op: Op) -> io::Result<()> {
        // The queue is bounded, and full only when the disk has stopped answering: then the
        // caller waits, which is the back-pressure that everything above it needs.
        match self.queue.try_send(op) {
            Ok(()) => Ok(()),
            Err(TrySendError::Full(op)) => {
                tokio::task::block_in_place(|| self.queue.send(op)).map_err(|_| stopped())
            }
            Err(TrySendError::Disconnected(_)) => Err(stopped()),
        }
    }

    pub(super) async fn write_and_wait(&self, group: u64, change: Change, sync: bool) -> io::Result<()> {
        self.ask(|done| Op::Write { group, change, sync, done: Done::Wait(done) }).await
    }

    pub(super) async fn ask<T>(&self, op: impl FnOnce(oneshot::Sender<T>) -> Op) -> io::Result<T> {
        let (reply, answer) = oneshot::channel();
        self.submit(op(reply))?;
        answer.await.map_err(|_| stopped())
    }
}

/// Reads every entry once: raft-engine checks the list of a batch's entries when it opens, the
/// entries themselves only when they are read.
fn verify(engine: &Engine) -> io::Result<()> {
    for group in engine.raft_groups() {
        let (Some(first), Some(last)) = (engine.first_index(group), engine.last_index(group)) else {
            continue;
        };
        let mut next = first;
        while next <= last {
            let mut found = Vec::new();
            let read =
                engine.fetch_entries_to::<Record>(group, next, last + 1, Some(VERIFY_BYTES), &mut found);
            read.map_err(|error| match error {
                raft_engine::Error::Corruption(what) => {
                    mark::damaged(&format!("an entry of group {group}: {what}"))
                }
                error => io::Error::other(error),
            })?;
            for entry in &found {
                record::unwrap(group, entry).map_err(|error| mark::damaged(&error.to_string()))?;
            }
            next += found.len().max(1) as u64;
        }
    }
    Ok(())
}

fn stopped() -> io::Error {
    io::Error::other("the log's writer thread has stopped")
}

/// raft-engine syncs the directory only when it rotates files; the first file needs it too.
fn sync_directories(dir: &Path) -> io::Result<()> {
    std::fs::File::open(dir)?.sync_all()?;
    let parent = dir.parent().map(PathBuf::from).filter(|parent| !parent.as_os_str().is_empty());
    std::fs::File::open(parent.unwrap_or_else(|| PathBuf::from(".")))?.sync_all()
}

struct Writer {
    engine: Engine,
    mark: Mark,
    /// The number of the last batch.
    sequence: u64,
    purged_at: Instant,
}

impl Writer {
    fn run(mut self, ops: &Receiver<Op>) {
        loop {
            match ops.recv_timeout(if self.mark.is_dirty() { mark::SYNC_EVERY } else { PURGE_EVERY }) {
                Ok(op) => {
                    self.step(op, ops);
                    self.marked(Mark::sync_if_due);
                }
                Err(RecvTimeoutError::Timeout) => self.marked(Mark::sync),
                Err(RecvTimeoutError::Disconnected) => return self.marked(Mark::sync),
            }
            if self.purged_at.elapsed() >= PURGE_EVERY {
                self.purge();
            }
        }
    }

    /// Handles one operation and, when it is a write, all writes that wait behind it.
    fn step(&mut self, first: Op, ops: &Receiver<Op>) {
        let mut batch = LogBatch::default();
        let mut waiting = Vec::new();
        let mut sync = false;
        let mut next = Some(first);
        while let Some(op) = next.take() {
            match op {
                Op::Write { group, change, sync: wants_sync, done } => {
                    add(&mut batch, group, change);
                    sync |= wants_sync;
                    waiting.push(done);
                    if waiting.len() < BATCH_OPERATIONS && batch.approximate_size() < BATCH_BYTES {
                        next = ops.try_recv().ok();
                    }
                }
                read => {
                    // A read must see the writes before it.
                    self.write(&mut batch, sync, &mut waiting);
                    sync = false;
                    self.read(read);
                }
            }
        }
        self.write(&mut batch, sync, &mut waiting);
    }

    /// Notes how far the log is good. A mark that cannot be written would let damage pass for a
    /// torn end later, so it counts as a failure of the log.
    fn marked(&mut self, note: impl FnOnce(&mut Mark) -> io::Result<()>) {
        if let Err(error) = note(&mut self.mark) {
            fail(&format!("how far it is good cannot be noted: {error}"));
        }
    }

    fn write(&mut self, batch: &mut LogBatch, sync: bool, waiting: &mut Vec<Done>) {
        if waiting.is_empty() {
            return;
        }
        let sync = sync && !is_planted(Bug::AckBeforeSync);
        if sync {
            self.sequence += 1;
            let number = self.sequence.to_le_bytes().to_vec();
            put(batch, record::BATCHES, record::SEQUENCE, number);
        }
        crash_point("log-unwritten");
        let started = Instant::now();
        // raft-engine panics when fdatasync fails, and reports other failures as errors: both
        // end the process, because what is on the disk is not known any more.
        let write = std::panic::AssertUnwindSafe(|| self.engine.write(batch, sync));
        match std::panic::catch_unwind(write) {
            Ok(Ok(_)) => {}
            Ok(Err(error)) => fail(&error.to_string()),
            Err(_) => fail("fdatasync failed"),
        }
        crash_point("log-synced");
        *batch = LogBatch::default();
        if sync {
            let sequence = self.sequence;
            self.marked(|mark| mark.note(sequence));
            crash_point("log-marked");
            metrics::histogram!("shoal_raft_log_sync_seconds").record(started.elapsed());
            metrics::histogram!("shoal_raft_log_batch_operations").record(waiting.len() as f64);
        }
        for done in waiting.drain(..) {
            match done {
                Done::Append(callback) => callback.io_completed(Ok(())),
                // A waiter that has gone away no longer needs the answer.
                Done::Wait(reply) => drop(reply.send(())),
                Done::Nobody => {}
            }
        }
    }

    fn read(&self, op: Op) {
        match op {
            Op::Write { .. } => unreachable!("writes are batched by the caller"),
            Op::Read { group, first, end, reply } => drop(reply.send(self.entries(group, first, end))),
            Op::Get { group, key, reply } => drop(reply.send(self.engine.get(group, key))),
            Op::Span { group, reply } => {
                let span = self.engine.first_index(group).zip(self.engine.last_index(group));
                _ = reply.send(span);
            }
            Op::Groups { reply } => {
                let mut groups = self.engine.raft_groups();
                groups.retain(|group| *group != record::BATCHES);
                _ = reply.send(groups);
            }
        }
    }

    fn entries(&self, group: u64, first: u64, end: u64) -> io::Result<Vec<Vec<u8>>> {
        let mut found = Vec::new();
        // A log's first index need not be zero: what was never there is not asked for.
        let first = first.max(self.engine.first_index(group).unwrap_or(end));
        if first >= end {
            return Ok(Vec::new());
        }
        self.engine
            .fetch_entries_to::<Record>(group, first, end, None, &mut found)
            .map_err(|error| io::Error::other(format!("log of group {group}: {error}")))?;
        found.iter().map(|entry| record::unwrap(group, entry).map(<[u8]>::to_vec)).collect()
    }

    fn purge(&mut self) {
        self.purged_at = Instant::now();
        metrics::gauge!("shoal_raft_log_bytes").set(self.engine.get_used_size() as f64);
        // It may sync, and raft-engine panics when that fails.
        let purge = std::panic::AssertUnwindSafe(|| self.engine.purge_expired_files());
        match std::panic::catch_unwind(purge) {
            Ok(Ok(_)) => {}
            Ok(Err(error)) => fail(&format!("old files could not be purged: {error}")),
            Err(_) => fail("fdatasync failed while old files were purged"),
        }
        self.marked(Mark::note_rewritten);
    }
}

fn add(batch: &mut LogBatch, group: u64, change: Change) {
    match change {
        Change::Append { first, bodies, clear_tail } => {
            if clear_tail {
                batch.delete(group, record::TAIL.to_vec());
            }
            let wrapped: Vec<_> =
                (first..).zip(&bodies).map(|(index, body)| record::wrap(group, index, body)).collect();
            if let Err(error) = batch.add_entries::<Record>(group, &wrapped) {
                fail(&format!("a batch of {} entries does not fit: {error}", wrapped.len()));
            }
        }
        Change::Put { key, value } => put(batch, group, key, value),
        Change::Purge { upto, purged } => {
            put(batch, group, record::PURGED, purged);
            batch.add_command(group, Command::Compact { index: upto + 1 });
        }
        Change::Reset { vote } => {
            batch.add_command(group, Command::Clean);
            if let Some(vote) = vote {
                put(batch, group, record::VOTE, vote);
            }
        }
    }
}

fn put(batch: &mut LogBatch, group: u64, key: &[u8], value: Vec<u8>) {
    batch.put(group, key.to_vec(), value).expect("our keys are not raft-engine's own");
}

fn fail(reason: &str) -> ! {
    tracing::error!(reason, "the Raft log cannot be written: this node stops, nothing more is acknowledged");
    eprintln!("shoal: the Raft log cannot be written ({reason}); stopping with exit code {EXIT_LOG_FAILED}");
    std::process::exit(EXIT_LOG_FAILED)
}
