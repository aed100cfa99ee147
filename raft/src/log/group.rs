//! One group's part of the log, as openraft sees it.

use std::collections::BTreeMap;
use std::fmt::Debug;
use std::io;
use std::ops::{Bound, RangeBounds};
use std::sync::Arc;
use std::sync::atomic::{AtomicU8, Ordering};

use openraft::entry::RaftEntry;
use openraft::storage::{IOFlushed, RaftLogStorage};
use openraft::{EntryPayload, LogState, OptionalSend, RaftLogReader};
use parking_lot::Mutex;
use shoal_proto::GroupId;
use shoal_proto::planted::{Bug, is_planted};

use super::record;
use super::writer::{Change, Done, LogStore, Op};
use crate::types::{EntryOf, LogIdOf, TypeConfig, VoteOf};

/// How many bytes of recent entries a group keeps in memory for replication and apply; older
/// ones are read back from the log.
const CACHE_BYTES: usize = 16 << 20;
/// About the most bytes that one read for replication returns.
const READ_BYTES: usize = 4 << 20;
/// Entries that are read back from the log at a time.
const STORED_SLICE: u64 = 64;

type Entry = EntryOf<TypeConfig>;
type LogId = LogIdOf<TypeConfig>;

#[derive(Default)]
struct State {
    vote: Option<VoteOf<TypeConfig>>,
    committed: Option<LogId>,
    purged: Option<LogId>,
    last: Option<LogId>,
    /// The last log id that was here when the group let this node go; it may have come back since.
    left: Option<LogId>,
    /// Whether a truncation waits for the append that ends it.
    tail_is_cut: bool,
    /// The newest entries, without a gap up to `last`.
    cache: BTreeMap<u64, Entry>,
    cached_bytes: usize,
    /// Bytes of entries since the last purge: what a restart would have to replay.
    live_bytes: u64,
}

/// One group's part of a node's log. Clones share their state.
#[derive(Clone)]
pub struct GroupLog {
    store: LogStore,
    group: u64,
    state: Arc<Mutex<State>>,
    company: Arc<Company>,
}

/// Whether the last membership in a log has more than one member. It is noted before that
/// membership can reach any other node, so that who reads "alone" knows that nobody else can
/// have been elected since, and that nobody else asks for a read index.
#[derive(Default)]
pub(crate) struct Company(AtomicU8);

impl Company {
    const ALONE: u8 = 1;
    const NOT_ALONE: u8 = 2;

    /// Notes the number of members of a membership that is about to be appended.
    fn note(&self, members: usize) {
        self.0.store(if members == 1 { Self::ALONE } else { Self::NOT_ALONE }, Ordering::SeqCst);
    }

    /// Notes the membership that a log was opened with, unless a newer one was noted.
    pub(crate) fn note_first(&self, members: usize) {
        let first = if members == 1 { Self::ALONE } else { Self::NOT_ALONE };
        // Whatever was noted in between is newer.
        _ = self.0.compare_exchange(0, first, Ordering::SeqCst, Ordering::SeqCst);
    }

    /// Whether the last membership has one member.
    pub(crate) fn is_alone(&self) -> bool {
        self.0.load(Ordering::SeqCst) == Self::ALONE
    }
}

impl GroupLog {
    pub(super) async fn open(store: LogStore, id: GroupId) -> io::Result<GroupLog> {
        let group = id.0;
        let get = async |key: &'static [u8]| store.ask(|reply| Op::Get { group, key, reply }).await;
        let mut state = State::default();
        if let Some(bytes) = get(record::VOTE).await? {
            state.vote = Some(record::from_bytes(&bytes)?);
        }
        if let Some(bytes) = get(record::COMMITTED).await? {
            state.committed = Some(record::from_bytes(&bytes)?);
        }
        if let Some(bytes) = get(record::PURGED).await? {
            state.purged = Some(record::from_bytes(&bytes)?);
        }
        if let Some(bytes) = get(record::LEFT).await? {
            state.left = Some(record::from_bytes(&bytes)?);
        }
        let tail: Option<u64> =
            get(record::TAIL).await?.map(|bytes| record::from_bytes(&bytes)).transpose()?;
        state.tail_is_cut = tail.is_some();
        let span = store.ask(|reply| Op::Span { group, reply }).await?;
        let log = GroupLog { store, group, state: Arc::default(), company: Arc::default() };
        state.last = state.purged;
        if let Some((first, last)) = span {
            let last = tail.map_or(last, |tail| tail.min(last));
            if last >= first {
                let entries = log.read_stored(last, last + 1).await?;
                state.last = entries.last().map(|entry| entry.log_id);
            }
        }
        *log.state.lock() = state;
        Ok(log)
    }

    /// The index up to which entries were dropped.
    pub(crate) fn purged(&self) -> u64 {
        self.state.lock().purged.map_or(0, |id| id.index)
    }

    /// Whether this node was in the group before, and was let go.
    pub(crate) fn has_left(&self) -> bool {
        self.state.lock().left.is_some()
    }

    /// Whether this node was let go, came back and has not caught up with what it had acknowledged
    /// before. Until then it must not stand for election, and a candidate must have as much as was
    /// here: one that lags behind the group could be elected by it and others like it.
    pub(crate) fn has_forgotten(&self) -> bool {
        let state = self.state.lock();
        state.left.is_some_and(|left| state.last.is_none_or(|last| last < left))
    }

    /// Whether a candidate whose log ends there has as much as this node ever acknowledged.
    pub(crate) fn may_vote_for(&self, last: Option<LogId>) -> bool {
        !self.has_forgotten() || last >= self.state.lock().left
    }

    /// Forgets all but the vote and how far the log went, for a node that the group has let go.
    pub(crate) async fn leave(&self) -> io::Result<()> {
        let kept = {
            let mut state = self.state.lock();
            let left = state.last.max(state.left);
            *state = State { vote: state.vote, left, ..State::default() };
            Self::kept(&state)
        };
        self.store.write_and_wait(self.group, Change::Reset { kept }, true).await
    }

    /// The small records that outlive a log.
    fn kept(state: &State) -> Vec<(&'static [u8], Vec<u8>)> {
        let vote = state.vote.as_ref().map(|vote| (record::VOTE, record::to_bytes(vote)));
        let left = state.left.as_ref().map(|left| (record::LEFT, record::to_bytes(left)));
        vote.into_iter().chain(left).collect()
    }

    /// Makes the log fit a state that ends at `applied`, which may have been fetched from another
    /// node: where the log holds another entry at that index, that entry and all after it were never
    /// committed, and all before it are in the state.
    pub(crate) async fn adopt(&mut self, applied: LogId) -> io::Result<()> {
        if applied.index <= self.purged() {
            return Ok(());
        }
        let found = self.try_get_log_entries(applied.index..=applied.index).await?;
        if found.first().is_none_or(|entry| entry.log_id == applied) {
            return Ok(());
        }
        tracing::warn!(
            group = self.group,
            index = applied.index,
            "entries that were never committed are dropped"
        );
        let purged = self.state.lock().purged;
        self.truncate_after(purged).await?;
        self.purge(applied).await
    }

    /// Bytes of entries appended since the last purge (since the start, after a restart).
    pub fn live_bytes(&self) -> u64 {
        self.state.lock().live_bytes
    }

    /// Whether the last membership in the log has more than one member.
    pub(crate) fn company(&self) -> &Company {
        &self.company
    }

    async fn read_stored(&self, first: u64, end: u64) -> io::Result<Vec<Entry>> {
        let group = self.group;
        let bodies = self.store.ask(|reply| Op::Read { group, first, end, reply }).await??;
        bodies.iter().map(|body| record::from_bytes(body)).collect()
    }

    /// Entries from `first` up to `end`, without a gap: from memory where they are there, from
    /// the log where they are not. Stops early once `limit_bytes` are reached.
    pub(crate) async fn read(&self, first: u64, end: u64, limit_bytes: usize) -> io::Result<Vec<Entry>> {
        let mut entries: Vec<Entry> = Vec::new();
        let mut bytes = 0;
        let mut next = first;
        while bytes < limit_bytes {
            // Memory may lose its oldest entries between two rounds, so each round looks anew.
            let stored_end = {
                let state = self.state.lock();
                next = next.max(state.purged.map_or(0, |id| id.index + 1));
                let end = end.min(state.last.map_or(0, |id| id.index + 1));
                if next >= end {
                    break;
                }
                let before = entries.len();
                for (index, entry) in state.cache.range(next..end) {
                    if *index != next || bytes >= limit_bytes {
                        break;
                    }
                    next += 1;
                    bytes += size_of_entry(entry);
                    entries.push(entry.clone());
                }
                if entries.len() > before {
                    continue;
                }
                let cached_from = state.cache.range(next..).next().map_or(end, |(index, _)| *index);
                cached_from.min(end).min(next + STORED_SLICE)
            };
            let slice = self.read_stored(next, stored_end).await?;
            // A log's first index need not be zero: nothing stored means nothing to find there.
            let found = slice.last().map_or(stored_end, |entry| entry.log_id.index + 1);
            bytes += slice.iter().map(size_of_entry).sum::<usize>();
            entries.extend(slice);
            next = found;
        }
        Ok(entries)
    }
}

fn size_of_entry(entry: &Entry) -> usize {
    64 + match &entry.payload {
        EntryPayload::Normal(payload) => payload.0.len(),
        EntryPayload::Blank | EntryPayload::Membership(_) => 0,
    }
}

impl RaftLogReader<TypeConfig> for GroupLog {
    async fn try_get_log_entries<RB>(&mut self, range: RB) -> Result<Vec<Entry>, io::Error>
    where
        RB: RangeBounds<u64> + Clone + Debug + OptionalSend,
    {
        let first = match range.start_bound() {
            Bound::Included(first) => *first,
            Bound::Excluded(before) => before + 1,
            Bound::Unbounded => 0,
        };
        let end = match range.end_bound() {
            Bound::Included(last) => last + 1,
            Bound::Excluded(end) => *end,
            Bound::Unbounded => u64::MAX,
        };
        self.read(first, end, usize::MAX).await
    }

    async fn read_vote(&mut self) -> Result<Option<VoteOf<TypeConfig>>, io::Error> {
        Ok(self.state.lock().vote)
    }

    async fn limited_get_log_entries(&mut self, start: u64, end: u64) -> Result<Vec<Entry>, io::Error> {
        self.read(start, end, READ_BYTES).await
    }
}

impl RaftLogStorage<TypeConfig> for GroupLog {
    type LogReader = Self;

    async fn get_log_state(&mut self) -> Result<LogState<TypeConfig>, io::Error> {
        let state = self.state.lock();
        Ok(LogState { last_purged_log_id: state.purged, last_log_id: state.last })
    }

    async fn get_log_reader(&mut self) -> Self::LogReader {
        self.clone()
    }

    async fn save_vote(&mut self, vote: &VoteOf<TypeConfig>) -> Result<(), io::Error> {
        if !is_planted(Bug::ForgottenVote) {
            let change = Change::Put { key: record::VOTE, value: record::to_bytes(vote) };
            self.store.write_and_wait(self.group, change, true).await?;
        }
        self.state.lock().vote = Some(*vote);
        Ok(())
    }

    async fn save_committed(&mut self, committed: Option<LogId>) -> Result<(), io::Error> {
        // Not synced: it only lets a restart apply sooner. It rides along with the next batch.
        self.state.lock().committed = committed;
        if let Some(committed) = committed {
            let change = Change::Put { key: record::COMMITTED, value: record::to_bytes(&committed) };
            self.store.submit(Op::Write { group: self.group, change, sync: false, done: Done::Nobody })?;
        }
        Ok(())
    }

    async fn read_committed(&mut self) -> Result<Option<LogId>, io::Error> {
        Ok(self.state.lock().committed)
    }

    async fn append<I>(&mut self, entries: I, callback: IOFlushed<TypeConfig>) -> Result<(), io::Error>
    where
        I: IntoIterator<Item = Entry> + OptionalSend,
        I::IntoIter: OptionalSend,
    {
        let entries: Vec<Entry> = entries.into_iter().collect();
        let Some(first) = entries.first().map(RaftEntry::index) else {
            callback.io_completed(Ok(()));
            return Ok(());
        };
        let bodies: Vec<Vec<u8>> = entries.iter().map(record::to_bytes).collect();
        let clear_tail = {
            let mut state = self.state.lock();
            for entry in entries {
                if let EntryPayload::Membership(membership) = &entry.payload {
                    self.company.note(membership.nodes().count());
                }
                let bytes = size_of_entry(&entry);
                state.cached_bytes += bytes;
                state.live_bytes += bytes as u64;
                state.last = Some(entry.log_id);
                state.cache.insert(entry.log_id.index, entry);
            }
            while state.cached_bytes > CACHE_BYTES && state.cache.len() > 1 {
                if let Some((_, oldest)) = state.cache.pop_first() {
                    state.cached_bytes -= size_of_entry(&oldest);
                }
            }
            std::mem::take(&mut state.tail_is_cut)
        };
        let change = Change::Append { first, bodies, clear_tail };
        self.store.submit(Op::Write { group: self.group, change, sync: true, done: Done::Append(callback) })
    }

    async fn truncate_after(&mut self, last: Option<LogId>) -> Result<(), io::Error> {
        let keep = last.map(|id| id.index);
        {
            let mut state = self.state.lock();
            if state.last.is_none_or(|id| keep.is_some_and(|keep| id.index <= keep)) {
                return Ok(());
            }
            let cut = state.cache.split_off(&keep.map_or(0, |keep| keep + 1));
            state.cached_bytes -= cut.values().map(size_of_entry).sum::<usize>();
            state.last = last.or(state.purged);
            state.tail_is_cut = true;
        }
        // Durable before returning: a follower may apply what replaces the tail before that
        // is synced, and must then not find the old tail again.
        let last = self.state.lock().last;
        let change = match last {
            Some(last) => Change::Put { key: record::TAIL, value: record::to_bytes(&last.index) },
            None => self.drop_all(),
        };
        self.store.write_and_wait(self.group, change, true).await
    }

    async fn purge(&mut self, upto: LogId) -> Result<(), io::Error> {
        {
            let mut state = self.state.lock();
            if state.purged.is_some_and(|purged| purged.index >= upto.index) {
                return Ok(());
            }
            let keep = state.cache.split_off(&(upto.index + 1));
            let dropped = std::mem::replace(&mut state.cache, keep);
            state.cached_bytes -= dropped.values().map(size_of_entry).sum::<usize>();
            state.live_bytes = state.cached_bytes as u64;
            state.purged = Some(upto);
            if state.last.is_none_or(|last| last.index < upto.index) {
                state.last = Some(upto);
            }
        }
        let change = Change::Purge { upto: upto.index, purged: record::to_bytes(&upto) };
        self.store.write_and_wait(self.group, change, true).await
    }
}

impl GroupLog {
    /// Cuts off a log that was never purged, from its first entry on. No `tail` record can name
    /// that, so the group's records are replaced by what must be kept.
    fn drop_all(&self) -> Change {
        let mut state = self.state.lock();
        state.tail_is_cut = false;
        state.committed = None;
        Change::Reset { kept: Self::kept(&state) }
    }
}
