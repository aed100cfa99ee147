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
//! Where shards are merged, a request may have been answered by some of them and not by others: its client
//! is still trying. Then its answer is *partial*, and when the request comes again, what the others had to do
//! is done.

use std::collections::{BTreeMap, BTreeSet};

use serde::{Deserialize, Serialize};
use shoal_proto::{Error, ErrorCode, RequestId, Route, ShardId, codec};

use crate::command::{Command, Envelope, Outcome, Replay, Seed};
use crate::error::Result;
use crate::keys;
use crate::state::{Change, Effect, REMEMBERED_REQUESTS, State};
use crate::store::Batch;

/// How far a shard has come in taking over what others held.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Adoption {
    /// The change of shards that it is part of.
    by: RequestId,
    /// The old shards, with the first and the last route of each.
    parents: BTreeMap<ShardId, (Route, Route)>,
    /// The last index of each old shard's log that was replayed.
    replayed: BTreeMap<ShardId, u64>,
    /// Whether it is over.
    is_done: bool,
}

impl Adoption {
    /// Whether an answer of these old shards is the whole answer.
    fn is_whole(&self, answered: &BTreeSet<ShardId>) -> bool {
        self.parents.keys().all(|parent| answered.contains(parent))
    }
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

    /// How many answered requests are remembered: of a shard that was merged as many as of each before.
    pub(crate) fn most_remembered(&self) -> usize {
        let parents = self.adoption.as_ref().map_or(1, |adoption| adoption.parents.len().max(1));
        REMEMBERED_REQUESTS * parents
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

    /// Notes that an old shard has answered a request, of which others may have answered their parts.
    fn note_answer(&mut self, batch: &mut Batch, id: RequestId, from: ShardId) {
        let mut answered = self.partial.remove(&id).unwrap_or_default();
        answered.insert(from);
        if self.adoption.as_ref().is_none_or(|adoption| adoption.is_whole(&answered)) {
            batch.remove(keys::partial(id));
        } else {
            batch.put(keys::partial(id), codec::encode(&answered));
            self.partial.insert(id, answered);
        }
    }

    /// What of a request that is remembered is still to be done: the parts of those old shards that have not
    /// answered it.
    pub(crate) fn left_of(&self, id: RequestId, command: &Command) -> Vec<Command> {
        let (Some(answered), Some(adoption)) = (self.partial.get(&id), &self.adoption) else {
            return Vec::new();
        };
        if matches!(command, Command::SetPayloadIndex { .. }) {
            // The shard has one index, whichever of them has told of it.
            return Vec::new();
        }
        let left = adoption.parents.iter().filter(|(parent, _)| !answered.contains(parent));
        left.filter_map(|(_, (first, last))| command.clone().within(*first, *last)).collect()
    }

    /// A request was done as a whole.
    pub(crate) fn note_whole(&mut self, batch: &mut Batch, id: RequestId) {
        if self.partial.remove(&id).is_some() {
            batch.remove(keys::partial(id));
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
        // Once its log is replayed, a seed that comes late would bring back what is gone.
        let is_late = self.adoption.as_ref().is_some_and(|known| known.replayed.contains_key(&seed.from));
        if is_late || !self.is_adopting(seed.by) {
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
        for (id, outcome) in &seed.answers {
            if !self.has_answered(*id) {
                self.remember(change.batch, self.base + index, *id, outcome);
                self.base += 1;
            } else if !self.partial.contains_key(id) {
                // It is whole: this seed has come before.
                continue;
            }
            self.note_answer(change.batch, *id, seed.from);
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
        let is_known = envelope.request_id.is_some_and(|id| self.has_answered(id));
        if let Some(id) = envelope.request_id.filter(|_| is_known) {
            // Another old shard's part of it, or the same one's again.
            if self.partial.get(&id).is_none_or(|answered| answered.contains(&from)) {
                return Ok(Vec::new());
            }
        }
        let mut change = Change { index, version, now: envelope.now, batch, effects: Vec::new() };
        let outcome = self.transition(&mut change, envelope.command)?;
        let effects = change.effects;
        if let Some(id) = envelope.request_id {
            if !is_known {
                self.remember(batch, index, id, &outcome);
            }
            self.note_answer(batch, id, from);
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
