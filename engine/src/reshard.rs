//! How what a shard holds comes to other shards while it goes on being written to: the engine's side of
//! splitting and merging.
//!
//! ```text
//!  old shard:  ── writes ──────────────┬───── writes ──────┬─ Freeze: writes are refused
//!                    export, at index e│    log from e on  │f
//!  new shard:                          └▶ Seed … Seed ──────▶ Replay (e, f] ─▶ EndAdoption: on its own
//! ```
//!
//! A new shard applies the commands of the old one's log, in their order, as far as they concern its range
//! of routes: so it comes to the same state, answers to remembered requests and versions of documents
//! included. What is numbered by log index must go on growing: a shard's indexes are counted from a `base`
//! that is raised above all that was taken over.
//!
//! Where shards are merged, a request may have been done by some of them and not by others: its client is still
//! trying. Its answer is *partial*: it goes with the ranges in which the request was done, and when it comes
//! again, it is done in the others.

use std::collections::{BTreeMap, BTreeSet};

use serde::{Deserialize, Serialize};
use shoal_proto::{Error, ErrorCode, RequestId, Route, ShardId, codec};

use crate::command::{Command, Envelope, Outcome, Replay, Seed, SeedPartial};
use crate::error::Result;
use crate::keys;
use crate::state::{Change, Effect, REMEMBERED_REQUESTS, State, decode, read_meta};
use crate::store::{Batch, Store};

/// How far a shard has come in taking over what others held.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Adoption {
    /// The change of shards that it is part of.
    by: RequestId,
    /// The old shards, with the first and the last route of what comes from each. Together they are the shard's
    /// own range, or more.
    parents: BTreeMap<ShardId, Range>,
    /// The last index of each old shard's log that was replayed.
    replayed: BTreeMap<ShardId, u64>,
    /// Whether it is over.
    is_done: bool,
}

/// The first and the last route of a range.
pub(crate) type Range = (Route, Route);

impl Adoption {
    fn range(&self) -> Range {
        let first = self.parents.values().map(|(first, _)| *first).min();
        let last = self.parents.values().map(|(_, last)| *last).max();
        (first.unwrap_or(Route(0)), last.unwrap_or(Route(u32::MAX)))
    }

    /// The old shards whose ranges these are; none when one is no such range.
    fn shards_of(&self, ranges: &[Range]) -> Option<BTreeSet<ShardId>> {
        let shard_of = |range: &Range| self.parents.iter().find(|(_, known)| *known == range);
        ranges.iter().map(|range| shard_of(range).map(|(shard, _)| *shard)).collect()
    }

    fn ranges_of(&self, shards: &BTreeSet<ShardId>) -> Vec<Range> {
        shards.iter().filter_map(|shard| self.parents.get(shard).copied()).collect()
    }
}

/// The ranges in which a request was done, by what a store says; none when that was everywhere.
pub(crate) fn done_in(
    store: &Store,
    adoption: Option<&Adoption>,
    id: RequestId,
) -> Result<Option<Vec<Range>>> {
    if let Some(shards) = read_meta::<BTreeSet<ShardId>>(store, &keys::partial_by_shard(id))? {
        return Ok(adoption.map(|adoption| adoption.ranges_of(&shards)));
    }
    read_meta(store, &keys::partial(id))
}

/// What is in a range and in none of some others.
fn gaps(range: Range, done: &[Range]) -> Vec<Range> {
    let mut done: Vec<Range> = done.to_vec();
    done.sort_unstable();
    let mut gaps = Vec::new();
    let mut next = Some(range.0);
    for (first, last) in done {
        let Some(from) = next.filter(|from| *from <= range.1) else { break };
        if first > from {
            gaps.push((from, Route(first.0 - 1).min(range.1)));
        }
        // The end of all routes has nothing behind it.
        next = last.0.checked_add(1).map(|after| Route(after).max(from));
    }
    if let Some(from) = next.filter(|from| *from <= range.1) {
        gaps.push((from, range.1));
    }
    gaps
}

/// Which commands in a shard's log it has refused because it was frozen: whoever replays the log leaves them
/// out.
#[derive(Clone, Copy, Debug)]
pub struct Refusals {
    frozen: Option<RequestId>,
}

impl Refusals {
    /// Of a log from an index at which the shard was frozen by that, or was not.
    pub fn after(frozen: Option<RequestId>) -> Refusals {
        Refusals { frozen }
    }

    /// Whether the next command was refused, or is one that only freezes or thaws.
    pub fn has_refused(&mut self, command: &Command) -> bool {
        match command {
            Command::Freeze { by } => self.frozen = self.frozen.or(Some(*by)),
            Command::Thaw { by } if self.frozen == Some(*by) => self.frozen = None,
            Command::Thaw { .. } => {}
            _ => return self.frozen.is_some(),
        }
        true
    }
}

fn refused(code: ErrorCode, reason: &str) -> Outcome {
    Outcome::Rejected(Error::new(code, reason))
}

fn takes_nothing() -> Outcome {
    refused(ErrorCode::Conflict, "the shard takes nothing over, or not any more")
}

impl State {
    /// What a frozen shard answers to a command instead of applying it.
    pub(crate) fn refuses(&self, command: &Command) -> Option<Outcome> {
        match command {
            Command::Freeze { .. } | Command::Thaw { .. } => None,
            _ => {
                self.frozen.map(|_| refused(ErrorCode::Stale, "the shard's range is moving to other shards"))
            }
        }
    }

    pub(crate) fn freeze(&mut self, batch: &mut Batch, by: RequestId) -> Outcome {
        match self.frozen {
            Some(other) if other != by => {
                refused(ErrorCode::Conflict, "another change of shards has frozen it")
            }
            _ => {
                batch.put(keys::FROZEN.to_vec(), codec::encode(&by));
                self.frozen = Some(by);
                Outcome::Done(0)
            }
        }
    }

    pub(crate) fn thaw(&mut self, batch: &mut Batch, by: RequestId) -> Outcome {
        if self.frozen == Some(by) {
            batch.remove(keys::FROZEN.to_vec());
            self.frozen = None;
        }
        Outcome::Done(0)
    }

    /// How many answered requests are remembered: of a shard that was merged as many as of each before. While
    /// it takes over, all that come: those of the shards before do not come in the order of their age.
    pub(crate) fn most_remembered(&self) -> usize {
        match &self.adoption {
            Some(adoption) if !adoption.is_done => usize::MAX,
            Some(adoption) => REMEMBERED_REQUESTS * adoption.parents.len().max(1),
            None => REMEMBERED_REQUESTS,
        }
    }

    /// Whether a change of shards may still bring something.
    fn is_adopting(&self, by: RequestId) -> bool {
        self.adoption.as_ref().is_some_and(|known| known.by == by && !known.is_done)
    }

    fn note_adoption(&self, batch: &mut Batch) {
        batch.put(keys::ADOPTION.to_vec(), codec::encode(&self.adoption));
        batch.put(keys::BASE.to_vec(), codec::encode(&self.base));
        batch.put(keys::NEXT_SLOT.to_vec(), codec::encode(&self.next_slot));
    }

    /// Numbers that are given out at log index `index` and later are above `version` from now on.
    fn raise(&mut self, index: u64, version: u64) {
        self.base = self.base.max((version + 1).saturating_sub(index));
    }

    /// Notes in which ranges a request was done, besides those that are known: by the old shards whose ranges they
    /// are, where that says it all. At the first level nothing else comes up, and its builds know no other way:
    /// all replicas must store the same.
    fn note_done(&mut self, batch: &mut Batch, id: RequestId, ranges: &[Range]) {
        let mut done = self.partial.remove(&id).unwrap_or_default();
        done.extend_from_slice(ranges);
        done.sort_unstable();
        done.dedup();
        batch.remove(keys::partial(id));
        batch.remove(keys::partial_by_shard(id));
        let Some(adoption) = &self.adoption else { return };
        if gaps(adoption.range(), &done).is_empty() {
            return;
        }
        match adoption.shards_of(&done) {
            Some(shards) => batch.put(keys::partial_by_shard(id), codec::encode(&shards)),
            None => batch.put(keys::partial(id), codec::encode(&done)),
        }
        self.partial.insert(id, done);
    }

    /// Reads where requests were done that were not done everywhere.
    pub(crate) fn recover_partial(&mut self) -> Result<()> {
        let id_of = |key: &[u8]| RequestId(key[1..].try_into().expect("such a key has 17 bytes"));
        for item in self.store.scan(&[keys::PARTIAL_BY_SHARD]) {
            let (key, value) = item?;
            let shards: BTreeSet<ShardId> = decode(&key, &value)?;
            let done = self.adoption.as_ref().map(|adoption| adoption.ranges_of(&shards));
            self.partial.insert(id_of(&key), done.unwrap_or_default());
        }
        for item in self.store.scan(&[keys::PARTIAL]) {
            let (key, value) = item?;
            self.partial.insert(id_of(&key), decode(&key, &value)?);
        }
        Ok(())
    }

    /// The range of an old shard.
    fn range_of(&self, from: ShardId) -> Option<Range> {
        self.adoption.as_ref()?.parents.get(&from).copied()
    }

    /// What of a request that is remembered is still to be done.
    pub(crate) fn left_of(&self, id: RequestId, command: &Command) -> Vec<Command> {
        match &self.adoption {
            Some(adoption) => self.left_within(id, command, adoption.range()),
            None => Vec::new(),
        }
    }

    /// The same, in a range.
    fn left_within(&self, id: RequestId, command: &Command, range: Range) -> Vec<Command> {
        let Some(done) = self.partial.get(&id) else { return Vec::new() };
        if matches!(command, Command::SetPayloadIndex { .. }) {
            // The shard has one index, wherever it was told of it.
            return Vec::new();
        }
        let left = gaps(range, done).into_iter();
        left.filter_map(|(first, last)| command.clone().within(first, last)).collect()
    }

    /// A request was done as a whole.
    pub(crate) fn note_whole(&mut self, batch: &mut Batch, id: RequestId) {
        if self.partial.remove(&id).is_some() {
            batch.remove(keys::partial(id));
            batch.remove(keys::partial_by_shard(id));
        }
    }

    pub(crate) fn seed(&mut self, change: &mut Change<'_>, index: u64, seed: Seed) -> Result<Outcome> {
        // An empty shard that nobody has written to belongs to the first change that brings something.
        if self.adoption.is_none() && self.live.is_empty() && self.next_slot == 0 {
            let parents =
                seed.parents.iter().map(|(parent, first, last)| (*parent, (*first, *last))).collect();
            let replayed = BTreeMap::new();
            self.adoption = Some(Adoption { by: seed.by, parents, replayed, is_done: false });
        }
        if !self.takes_seeds(seed.by, seed.from) {
            return Ok(takes_nothing());
        }
        self.raise(index, seed.version);
        change.index = self.base + index;
        change.version = change.index;
        for point in seed.points {
            self.put_normal_point(change, point)?;
        }
        for document in &seed.documents {
            change.put_document(document);
        }
        for staged in &seed.staged {
            let key = keys::staged(staged.document, Some(staged.version), Some(staged.chunk));
            change.batch.put(key, codec::encode(&staged.point));
        }
        let all_of_it: Vec<Range> = self.range_of(seed.from).into_iter().collect();
        for (id, outcome) in &seed.answers {
            self.take_answer(change.batch, index, *id, outcome, &all_of_it);
        }
        if let Some(wanted) = seed.indexes {
            let gone: Vec<String> =
                self.indexes.keys().filter(|field| !wanted.contains_key(*field)).cloned().collect();
            for field in gone {
                self.set_index(change, field, None)?;
            }
            for (field, kind) in wanted {
                if self.indexes.get(&field).is_none_or(|index| index.kind() != kind) {
                    self.set_index(change, field, Some(kind))?;
                }
            }
        }
        self.note_adoption(change.batch);
        Ok(Outcome::Done(0))
    }

    pub(crate) fn seed_partial(&mut self, change: &mut Change<'_>, index: u64, seed: SeedPartial) -> Outcome {
        if !self.takes_seeds(seed.by, seed.from) {
            return takes_nothing();
        }
        for answer in &seed.answers {
            self.take_answer(change.batch, index, answer.id, &answer.outcome, &answer.ranges);
        }
        self.note_adoption(change.batch);
        Outcome::Done(0)
    }

    /// Once an old shard's log is replayed, a seed of it that comes late would bring back what is gone.
    fn takes_seeds(&self, by: RequestId, from: ShardId) -> bool {
        let is_late = self.adoption.as_ref().is_some_and(|known| known.replayed.contains_key(&from));
        !is_late && self.is_adopting(by)
    }

    /// Remembers an old shard's answer, and where the request was done.
    fn take_answer(
        &mut self,
        batch: &mut Batch,
        index: u64,
        id: RequestId,
        outcome: &Outcome,
        ranges: &[Range],
    ) {
        if !self.has_answered(id) {
            self.remember(batch, self.base + index, id, outcome);
            self.base += 1;
        } else if !self.partial.contains_key(&id) {
            // It is whole: this seed has come before.
            return;
        }
        self.note_done(batch, id, ranges);
    }

    /// Applies commands of another shard's log. Each is a step of its own in the store, so that it sees
    /// what those before it did; how far it came is stored with each, so that a crash in between does no
    /// harm. `tag` goes with the last one.
    pub(crate) fn replay(&mut self, index: u64, tag: Vec<u8>, replay: Replay) -> Result<Outcome> {
        let mut last = Batch::default();
        last.put(keys::TAG.to_vec(), tag);
        if !self.is_adopting(replay.by) {
            self.store.commit(last)?;
            return Ok(takes_nothing());
        }
        for (version, envelope) in replay.commands {
            let known = self.adoption.as_ref().and_then(|adoption| adoption.replayed.get(&replay.from));
            if known.is_some_and(|known| *known >= version) {
                continue;
            }
            self.raise(index, version);
            let mut batch = Batch::default();
            let effects = self.replay_one(&mut batch, index, (replay.from, version), envelope)?;
            self.base += 1;
            if let Some(adoption) = &mut self.adoption {
                adoption.replayed.insert(replay.from, version);
            }
            self.note_adoption(&mut batch);
            self.store.commit(batch)?;
            for effect in effects {
                self.follow(effect)?;
            }
        }
        self.note_adoption(&mut last);
        self.store.commit(last)?;
        Ok(Outcome::Done(0))
    }

    fn replay_one(
        &mut self,
        batch: &mut Batch,
        index: u64,
        (from, version): (ShardId, u64),
        envelope: Envelope,
    ) -> Result<Vec<Effect>> {
        let index = self.base + index;
        let range: Vec<Range> = self.range_of(from).into_iter().collect();
        let known = envelope.request_id.filter(|id| self.has_answered(*id));
        // Of what is known the old shard has done only what was not done before, and so does this one.
        let left = match (known, range.first()) {
            (Some(id), Some(range)) => self.left_within(id, &envelope.command, *range),
            (Some(_), None) => Vec::new(),
            (None, _) => vec![envelope.command],
        };
        let mut change = Change { index, version, now: envelope.now, batch, effects: Vec::new() };
        let mut outcome = Outcome::Done(0);
        for command in left {
            outcome = self.transition(&mut change, command)?;
        }
        let effects = change.effects;
        if let Some(id) = envelope.request_id {
            if known.is_none() {
                self.remember(batch, index, id, &outcome);
                self.note_done(batch, id, &range);
            } else if self.partial.contains_key(&id) {
                self.note_done(batch, id, &range);
            }
        }
        Ok(effects)
    }

    pub(crate) fn end_adoption(&mut self, batch: &mut Batch, by: RequestId) -> Outcome {
        if self.is_adopting(by) {
            if let Some(adoption) = &mut self.adoption {
                adoption.is_done = true;
            }
            self.note_adoption(batch);
        }
        match &self.adoption {
            Some(known) if known.by == by => Outcome::Done(0),
            _ => takes_nothing(),
        }
    }
}

#[cfg(test)]
mod tests {
    use shoal_proto::CollectionConfig;

    use super::*;

    #[test]
    fn what_was_noted_by_shard_is_read() {
        let dir = tempfile::tempdir().expect("a directory");
        let (by, id) = (RequestId([1; 16]), RequestId([2; 16]));
        let ranges = [(Route(0), Route(99)), (Route(100), Route(u32::MAX))];
        let parents = (4..).map(ShardId).zip(ranges).collect();
        let adoption = Some(Adoption { by, parents, replayed: BTreeMap::new(), is_done: true });
        let mut batch = Batch::default();
        batch.put(keys::ADOPTION.to_vec(), codec::encode(&adoption));
        let by_shard = codec::encode(&BTreeSet::from([ShardId(5)]));
        batch.put(keys::partial_by_shard(id), by_shard.clone());
        let store = Store::open(&dir.path().join("store")).expect("a store");
        store.commit(batch).expect("noted");
        let mut state = State::with_store(store, dir.path(), CollectionConfig::default()).expect("opened");
        assert_eq!(state.partial.get(&id), Some(&vec![ranges[1]]));
        let stored = |state: &State| {
            let get = |key: Vec<u8>| state.store.get(&key).expect("readable");
            (get(keys::partial_by_shard(id)), get(keys::partial(id)))
        };
        assert_eq!(stored(&state), (Some(by_shard.clone()), None), "opening changes nothing");
        assert_eq!(
            done_in(&state.store, state.adoption.as_ref(), id).expect("readable"),
            Some(vec![ranges[1]])
        );

        // What is whole shards stays noted by shard, as all replicas of earlier builds do it; what is less cannot.
        let mut note = |ranges: &[Range]| {
            let mut batch = Batch::default();
            state.note_done(&mut batch, id, ranges);
            state.store.commit(batch).expect("noted");
            stored(&state)
        };
        assert_eq!(note(&[ranges[1]]), (Some(by_shard), None));
        let part = (Route(0), Route(9));
        assert_eq!(note(&[part]), (None, Some(codec::encode(&vec![part, ranges[1]]))));
        assert_eq!(note(&[ranges[0]]), (None, None), "it is whole");
    }

    #[test]
    fn gaps_are_what_is_not_done() {
        let range = |first: u32, last: u32| (Route(first), Route(last));
        let all = range(0, u32::MAX);
        assert_eq!(gaps(all, &[]), [all]);
        assert_eq!(gaps(all, &[all]), []);
        assert_eq!(gaps(all, &[range(10, 19), range(0, 4)]), [range(5, 9), range(20, u32::MAX)]);
        assert_eq!(gaps(range(5, 30), &[range(0, 9), range(8, 12), range(20, 99)]), [range(13, 19)]);
        assert_eq!(gaps(range(5, 30), &[range(31, 40)]), [range(5, 30)]);
        assert_eq!(gaps(range(5, 30), &[range(12, u32::MAX)]), [range(5, 11)]);
        assert_eq!(gaps(range(5, 30), &[range(0, u32::MAX), range(7, 9)]), []);
    }
}
