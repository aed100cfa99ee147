//! The one who owns the log's records: it writes in batches and reads what is not cached.

use std::io;
use std::path::Path;
use std::sync::Arc;
use std::sync::mpsc::{Receiver, RecvTimeoutError, SyncSender, TrySendError, sync_channel};
use std::time::{Duration, Instant};

use openraft::storage::IOFlushed;
use shoal_proto::GroupId;
use tokio::sync::oneshot;

use super::GroupLog;
use super::files::{Files, LogConfig};
use super::record;
use crate::types::TypeConfig;

/// The most operations that wait for the writer thread.
const QUEUE_LENGTH: usize = 16_384;
/// The most operations in one batch.
const BATCH_OPERATIONS: usize = 1024;
/// A batch takes no more operations once it has this many bytes.
const BATCH_BYTES: usize = 8 << 20;
pub(crate) enum Done {
    Append(IOFlushed<TypeConfig>),
    Wait(oneshot::Sender<()>),
    Nobody,
}

#[derive(Clone, Debug)]
pub(crate) enum Change {
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
    /// Drops everything of the group and puts these small records.
    Reset {
        kept: Vec<(&'static [u8], Vec<u8>)>,
    },
}

pub(crate) enum Op {
    Write { group: u64, change: Change, sync: bool, done: Done },
    Read { group: u64, first: u64, end: u64, reply: oneshot::Sender<io::Result<Vec<Vec<u8>>>> },
    Get { group: u64, key: &'static [u8], reply: oneshot::Sender<Option<Vec<u8>>> },
    Span { group: u64, reply: oneshot::Sender<Option<(u64, u64)>> },
    Groups { reply: oneshot::Sender<Vec<u64>> },
}

/// Where a node's records are kept. Whoever cannot write or sync ends the process: what is on the
/// disk is not known any more.
pub(crate) trait Records {
    /// Writes changes, all or none of them, and durably if `sync`.
    fn write(&mut self, changes: Vec<(u64, Change)>, sync: bool);

    /// A group's encoded entries from `first` up to `end`, as far as they are there.
    fn entries(&self, group: u64, first: u64, end: u64) -> io::Result<Vec<Vec<u8>>>;

    /// One of a group's small records.
    fn get(&self, group: u64, key: &[u8]) -> Option<Vec<u8>>;

    /// The indexes of a group's first and last entry.
    fn span(&self, group: u64) -> Option<(u64, u64)>;

    /// The groups that have anything.
    fn groups(&self) -> Vec<u64>;

    /// How long [`Records::tend`] can wait when there is nothing to do.
    fn patience(&self) -> Duration;

    /// Does what is due from time to time.
    fn tend(&mut self, is_idle: bool);
}

/// The way to the writer.
pub(crate) trait Queue: Send + Sync {
    /// Puts an operation behind all others.
    ///
    /// # Errors
    /// When the writer has stopped.
    fn submit(&self, op: Op) -> io::Result<()>;
}

impl Queue for SyncSender<Op> {
    fn submit(&self, op: Op) -> io::Result<()> {
        // The queue is bounded, and full only when the disk has stopped answering: then the
        // caller waits, which is the back-pressure that everything above it needs.
        match self.try_send(op) {
            Ok(()) => Ok(()),
            Err(TrySendError::Full(op)) => {
                tokio::task::block_in_place(|| self.send(op)).map_err(|_| stopped())
            }
            Err(TrySendError::Disconnected(_)) => Err(stopped()),
        }
    }
}

/// The log of a node. Cheap to clone; the files close when the last clone is gone.
#[derive(Clone)]
pub struct LogStore {
    queue: Arc<dyn Queue>,
}

impl LogStore {
    /// Opens or creates the log in a directory and starts its writer thread.
    ///
    /// # Errors
    /// When the files cannot be read, and when something is missing that was acknowledged.
    pub fn open(dir: &Path, config: &LogConfig) -> io::Result<LogStore> {
        let files = Files::open(dir, config)?;
        let (queue, ops) = sync_channel(QUEUE_LENGTH);
        std::thread::Builder::new().name("raft-log".into()).spawn(move || Writer::new(files).run(&ops))?;
        Ok(LogStore { queue: Arc::new(queue) })
    }

    /// A log behind a queue of another kind.
    #[cfg(test)]
    pub(crate) fn behind(queue: Arc<dyn Queue>) -> LogStore {
        LogStore { queue }
    }

    /// Opens one group's part of the log.
    pub async fn group(&self, id: GroupId) -> io::Result<GroupLog> {
        GroupLog::open(self.clone(), id).await
    }

    /// Forgets everything about a group that will never be again: entries, vote, positions.
    pub async fn forget(&self, id: GroupId) -> io::Result<()> {
        self.write_and_wait(id.0, Change::Reset { kept: Vec::new() }, true).await
    }

    /// The groups that this node has a log of.
    pub async fn groups(&self) -> io::Result<Vec<GroupId>> {
        let groups = self.ask(|reply| Op::Groups { reply }).await?;
        Ok(groups.into_iter().map(GroupId).collect())
    }

    pub(super) fn submit(&self, op: Op) -> io::Result<()> {
        self.queue.submit(op)
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

pub(crate) fn stopped() -> io::Error {
    io::Error::other("the log's writer thread has stopped")
}

/// Writes that go to the disk together.
#[derive(Default)]
pub(crate) struct Batch {
    changes: Vec<(u64, Change)>,
    bytes: usize,
    sync: bool,
    waiting: Vec<Done>,
}

impl Batch {
    /// Takes an operation, and as many writes as wait behind it up to the first that is something
    /// else: that one is handed back, and must be done after this batch.
    pub(crate) fn gather(first: Op, mut next: impl FnMut() -> Option<Op>) -> (Batch, Option<Op>) {
        let mut batch = Batch::default();
        let mut op = Some(first);
        while let Some(Op::Write { group, change, sync, done }) = op {
            batch.bytes += change.bytes();
            batch.changes.push((group, change));
            batch.sync |= sync;
            batch.waiting.push(done);
            let is_full = batch.waiting.len() >= BATCH_OPERATIONS || batch.bytes >= BATCH_BYTES;
            op = if is_full { None } else { next() };
        }
        (batch, op)
    }

    /// Whether there is nothing to write.
    pub(crate) fn is_empty(&self) -> bool {
        self.waiting.is_empty()
    }
}

impl Change {
    /// About how much is written.
    fn bytes(&self) -> usize {
        match self {
            Change::Append { bodies, .. } => bodies.iter().map(Vec::len).sum(),
            Change::Put { value, .. } => value.len(),
            Change::Purge { .. } | Change::Reset { .. } => 0,
        }
    }
}

pub(crate) struct Writer<R> {
    records: R,
}

impl<R: Records> Writer<R> {
    pub(crate) fn new(records: R) -> Writer<R> {
        Writer { records }
    }

    fn run(mut self, ops: &Receiver<Op>) {
        loop {
            let is_idle = match ops.recv_timeout(self.records.patience()) {
                Ok(op) => {
                    self.step(op, || ops.try_recv().ok());
                    false
                }
                Err(RecvTimeoutError::Timeout) => true,
                Err(RecvTimeoutError::Disconnected) => return self.records.tend(true),
            };
            self.records.tend(is_idle);
        }
    }

    /// Handles one operation and, when it is a write, all writes that wait behind it.
    pub(crate) fn step(&mut self, first: Op, next: impl FnMut() -> Option<Op>) {
        let (batch, read) = Batch::gather(first, next);
        self.commit(batch);
        if let Some(read) = read {
            self.read(read);
        }
    }

    /// Writes a batch and answers everybody who waits for it.
    pub(crate) fn commit(&mut self, batch: Batch) {
        if batch.is_empty() {
            return;
        }
        let Batch { changes, sync, waiting, .. } = batch;
        let started = Instant::now();
        self.records.write(changes, sync);
        if sync {
            metrics::histogram!("shoal_raft_log_sync_seconds").record(started.elapsed());
            metrics::histogram!("shoal_raft_log_batch_operations").record(waiting.len() as f64);
        }
        for done in waiting {
            match done {
                Done::Append(callback) => callback.io_completed(Ok(())),
                // A waiter that has gone away no longer needs the answer.
                Done::Wait(reply) => drop(reply.send(())),
                Done::Nobody => {}
            }
        }
    }

    /// Answers an operation that writes nothing.
    pub(crate) fn read(&self, op: Op) {
        match op {
            Op::Write { .. } => unreachable!("writes are gathered in batches"),
            Op::Read { group, first, end, reply } => {
                _ = reply.send(self.records.entries(group, first, end));
            }
            Op::Get { group, key, reply } => drop(reply.send(self.records.get(group, key))),
            Op::Span { group, reply } => drop(reply.send(self.records.span(group))),
            Op::Groups { reply } => {
                let mut groups = self.records.groups();
                let has_log = |group| {
                    self.records.span(group).is_some() || self.records.get(group, record::PURGED).is_some()
                };
                groups.retain(|group| has_log(*group));
                _ = reply.send(groups);
            }
        }
    }
}
