//! What has been promised, and whether it is kept: known to nobody in the cluster.

use std::collections::BTreeMap;
use std::fmt::Display;
use std::hash::{DefaultHasher, Hash, Hasher};

use parking_lot::Mutex;
use shoal_proto::{GroupId, NodeId};
use tokio::time::Instant;

use crate::groups::GroupStatus;

/// What came of a run.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Outcome {
    pub violations: Vec<String>,
    pub counts: BTreeMap<&'static str, u64>,
    /// A hash over all messages and their times.
    pub trace: u64,
    /// What happened, in order.
    pub story: Vec<String>,
}

impl Outcome {
    /// Adds the counts of another run.
    pub fn add(&mut self, other: &Outcome) {
        for (what, count) in &other.counts {
            *self.counts.entry(what).or_default() += count;
        }
    }
}

/// A key of one group.
pub type Key = (GroupId, u8);

struct State {
    outcome: Outcome,
    trace: DefaultHasher,
    began: Instant,
    /// Hash of the command at each index of each group, as first applied by anybody.
    applied: BTreeMap<(GroupId, u64), u64>,
    leaders: BTreeMap<(GroupId, u64), NodeId>,
    terms: BTreeMap<(GroupId, NodeId), u64>,
    /// The newest version of each key that somebody has seen or was told of.
    floors: BTreeMap<Key, u64>,
    acknowledged: BTreeMap<(GroupId, u64), u64>,
    refused: BTreeMap<u64, GroupId>,
}

/// What is known from outside.
pub struct Truth(Mutex<State>);

impl Truth {
    pub fn new() -> Truth {
        Truth(Mutex::new(State {
            outcome: Outcome::default(),
            trace: DefaultHasher::new(),
            began: Instant::now(),
            applied: BTreeMap::new(),
            leaders: BTreeMap::new(),
            terms: BTreeMap::new(),
            floors: BTreeMap::new(),
            acknowledged: BTreeMap::new(),
            refused: BTreeMap::new(),
        }))
    }

    pub fn violation(&self, what: String) {
        let mut state = self.0.lock();
        let at = state.began.elapsed().as_secs_f64();
        state.outcome.story.push(format!("{at:.3} s: WRONG: {what}"));
        state.outcome.violations.push(format!("{at:.3} s: {what}"));
    }

    /// Something happens that a reader of the run wants to know.
    pub fn tell(&self, what: &'static str, detail: impl Display) {
        self.count(what);
        let mut state = self.0.lock();
        let at = state.began.elapsed().as_secs_f64();
        state.outcome.story.push(format!("{at:.3} s: {what}: {detail}"));
    }

    pub fn count(&self, what: &'static str) {
        *self.0.lock().outcome.counts.entry(what).or_default() += 1;
    }

    pub fn note_message(&self, from: NodeId, to: NodeId) {
        let mut state = self.0.lock();
        let at = state.began.elapsed();
        (at, from, to).hash(&mut state.trace);
        *state.outcome.counts.entry("messages").or_default() += 1;
    }

    /// A replica applies an entry, whose tag holds its term and the membership: all replicas the same
    /// at the same index.
    pub fn applied(&self, group: GroupId, index: u64, tag: &[u8], command: Option<&[u8]>, node: NodeId) {
        let mut hasher = DefaultHasher::new();
        (tag, command).hash(&mut hasher);
        let hash = hasher.finish();
        let first = *self.0.lock().applied.entry((group, index)).or_insert(hash);
        if first != hash {
            self.violation(format!("group {group}: node {node} applies another command at {index}"));
        }
    }

    /// What a node says of a group: one leader a term, and no term is forgotten.
    pub fn observe(&self, node: NodeId, status: &GroupStatus) {
        let mut state = self.0.lock();
        let mut wrong = Vec::new();
        if status.role == "leader" {
            let leader = *state.leaders.entry((status.id, status.term)).or_insert(node);
            if leader != node {
                wrong.push(format!("group {}, term {}: {leader} and {node} lead", status.id, status.term));
            }
        }
        let term = state.terms.entry((status.id, node)).or_default();
        if status.term < *term {
            wrong.push(format!("group {}: node {node} went from term {term} to {}", status.id, status.term));
        }
        *term = status.term.max(*term);
        let order = [status.purged, status.checkpoint, status.applied, status.last_index];
        if !order.is_sorted() {
            wrong.push(format!(
                "group {} at node {node}: purged, checkpoint, applied, last: {order:?}",
                status.id
            ));
        }
        drop(state);
        wrong.into_iter().for_each(|what| self.violation(what));
    }

    /// What an operation on a key that begins now must see.
    pub fn floor(&self, key: Key) -> u64 {
        self.0.lock().floors.get(&key).copied().unwrap_or_default()
    }

    fn raise(&self, key: Key, version: u64) {
        let mut state = self.0.lock();
        let floor = state.floors.entry(key).or_default();
        *floor = version.max(*floor);
    }

    /// A write was acknowledged; `floor` is what the key's floor was when it began.
    pub fn acknowledged(&self, key: Key, index: u64, uid: u64, floor: u64) {
        self.tell("acknowledged", format_args!("{key:?}: write {uid} at {index}"));
        if index <= floor {
            self.violation(format!("{key:?}: a write at {index} began after {floor} was seen"));
        }
        self.raise(key, index);
        self.0.lock().acknowledged.insert((key.0, index), uid);
    }

    /// A write was refused with the word that nothing was proposed.
    pub fn refused(&self, group: GroupId, uid: u64, asked: &[NodeId]) {
        self.tell("refused", format_args!("group {group}: write {uid}: nodes {asked:?} do not lead"));
        self.0.lock().refused.insert(uid, group);
    }

    /// A read was answered with the version of a key.
    pub fn read(&self, key: Key, version: u64, floor: u64) {
        self.tell("read", format_args!("{key:?}: version {version}"));
        if version < floor {
            self.violation(format!("{key:?}: a read saw version {version}, after {floor} was seen"));
        }
        self.raise(key, version);
    }

    /// All that was promised of a group must be in a replica's history of writes.
    pub fn check_history(&self, node: NodeId, group: GroupId, history: &BTreeMap<u64, u64>) {
        let mut wrong = Vec::new();
        {
            let state = self.0.lock();
            let acknowledged = state.acknowledged.range((group, 0)..=(group, u64::MAX));
            for ((_, index), uid) in acknowledged {
                if history.get(index) != Some(uid) {
                    wrong.push(format!("group {group}: write {uid} at {index} is lost at node {node}"));
                }
            }
            let mut indexes = BTreeMap::new();
            for (index, uid) in history {
                if state.refused.contains_key(uid) {
                    wrong.push(format!("group {group}: write {uid} was refused and is there"));
                }
                if let Some(before) = indexes.insert(uid, index) {
                    wrong.push(format!("group {group}: write {uid} is there at {before} and {index}"));
                }
            }
        }
        wrong.into_iter().for_each(|what| self.violation(what));
    }

    pub fn outcome(&self) -> Outcome {
        let state = self.0.lock();
        Outcome { trace: state.trace.finish(), ..state.outcome.clone() }
    }
}
