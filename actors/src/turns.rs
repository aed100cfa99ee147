//! Whom a read asks next.
//!
//! ```text
//!  first round:  here ─▶ replicas that are heard, least loaded first ─▶ other nodes ─▶ silent nodes
//!  next rounds:  the same again, until the deadline
//! ```
//!
//! A read that is repeated and its hedge share one list of whom they have asked, so neither asks a
//! node again before everybody else had a turn. A node's load is the number of calls that this node
//! has under way to it: what others ask of it is not known here, and shows in how long it takes.

use std::collections::BTreeMap;
use std::sync::Arc;

use parking_lot::Mutex;
use shoal_proto::NodeId;

/// Where a node stands to a shard; better ones first.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) enum Place {
    /// This node, which has a replica open.
    Here,
    /// It is to hold a replica.
    Replica,
    /// It may still have what has not arrived at its new place.
    Elsewhere,
}

/// A node that could be asked.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Candidate {
    pub(crate) node: NodeId,
    pub(crate) place: Place,
    /// Whether it has not been heard for so long that it counts as gone.
    pub(crate) is_silent: bool,
    /// Calls of this node to it that are under way.
    pub(crate) under_way: usize,
}

/// The node to ask next, given who was asked before. `rotation` breaks ties: each of the equals is
/// first for an equal share of its values.
fn next(candidates: &[Candidate], asked: &[NodeId], rotation: usize) -> Option<NodeId> {
    let key = |(at, candidate): &(usize, &Candidate)| {
        let turns = asked.iter().filter(|node| **node == candidate.node).count();
        let count = |some: &[Candidate]| some.iter().filter(|other| other.place == candidate.place).count();
        // Its place among its equals: others may stand between them.
        let (rank, equals) = (count(&candidates[..*at]), count(candidates));
        let tie = (rank + rotation % equals) % equals;
        (turns, candidate.is_silent, candidate.place, candidate.under_way, tie)
    };
    candidates.iter().enumerate().min_by_key(key).map(|(_, candidate)| candidate.node)
}

/// Whom a read has asked, with its repetitions and its hedge.
pub(crate) struct Asked {
    rotation: usize,
    nodes: Mutex<Vec<NodeId>>,
}

impl Asked {
    /// Nobody yet.
    pub(crate) fn nobody(rotation: usize) -> Asked {
        Asked { rotation, nodes: Mutex::default() }
    }

    /// The node to ask next, which counts as asked from now on; none when there is nobody.
    pub(crate) fn next(&self, candidates: &[Candidate]) -> Option<NodeId> {
        let mut nodes = self.nodes.lock();
        let next = next(candidates, &nodes, self.rotation)?;
        nodes.push(next);
        Some(next)
    }
}

/// The calls of this node that are under way, by the node that was asked. Clones share them.
#[derive(Clone, Default)]
pub(crate) struct UnderWay(Arc<Mutex<BTreeMap<NodeId, usize>>>);

/// A call that is under way until this is dropped.
pub(crate) struct Counted {
    calls: UnderWay,
    node: NodeId,
}

impl UnderWay {
    /// Counts a call to a node.
    pub(crate) fn begin(&self, node: NodeId) -> Counted {
        *self.0.lock().entry(node).or_default() += 1;
        Counted { calls: self.clone(), node }
    }

    /// How many calls to a node are under way.
    pub(crate) fn to(&self, node: NodeId) -> usize {
        self.0.lock().get(&node).copied().unwrap_or_default()
    }
}

impl Drop for Counted {
    fn drop(&mut self) {
        let mut calls = self.calls.0.lock();
        if let Some(count) = calls.get_mut(&self.node) {
            *count -= 1;
            // Nodes come and go: what is kept is only who is being asked.
            if *count == 0 {
                calls.remove(&self.node);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn candidate(node: u64, place: Place) -> Candidate {
        Candidate { node: NodeId(node), place, is_silent: false, under_way: 0 }
    }

    fn replicas(nodes: &[u64]) -> Vec<Candidate> {
        nodes.iter().map(|node| candidate(*node, Place::Replica)).collect()
    }

    fn order(candidates: &[Candidate], rotation: usize) -> Vec<u64> {
        let asked = Asked::nobody(rotation);
        candidates.iter().filter_map(|_| asked.next(candidates)).map(|node| node.0).collect()
    }

    #[test]
    fn a_hedge_from_a_node_without_replica_asks_another_one_than_the_first_read() {
        let candidates = replicas(&[1, 2, 3]);
        for rotation in 0..9 {
            let asked = Asked::nobody(rotation);
            let (first, second) = (asked.next(&candidates), asked.next(&candidates));
            assert_ne!(first, second, "rotation {rotation}");
        }
    }

    #[test]
    fn reads_begin_at_each_replica_equally_often() {
        let mut candidates = replicas(&[1, 2, 3]);
        candidates.extend([5, 6, 7, 8].map(|node| candidate(node, Place::Elsewhere)));
        let mut begins = BTreeMap::<u64, u32>::new();
        for rotation in 0..30 {
            *begins.entry(order(&candidates, rotation)[0]).or_default() += 1;
        }
        assert_eq!(begins, BTreeMap::from([(1, 10), (2, 10), (3, 10)]));
    }

    #[test]
    fn a_node_in_the_middle_of_its_replicas_asks_the_others_equally_often() {
        let mut candidates = replicas(&[1, 2, 3]);
        candidates[1].place = Place::Here;
        let mut seconds = BTreeMap::<u64, u32>::new();
        for rotation in 0..30 {
            *seconds.entry(order(&candidates, rotation)[1]).or_default() += 1;
        }
        assert_eq!(seconds, BTreeMap::from([(1, 15), (3, 15)]));
    }

    #[test]
    fn the_least_loaded_comes_first_and_the_silent_last() {
        let mut candidates = replicas(&[1, 2, 3]);
        candidates[0].is_silent = true;
        candidates[1].under_way = 2;
        candidates[2].under_way = 1;
        candidates.push(candidate(4, Place::Elsewhere));
        for rotation in 0..4 {
            assert_eq!(order(&candidates, rotation), [3, 2, 4, 1], "rotation {rotation}");
        }
    }

    #[test]
    fn a_replica_of_this_node_comes_first_and_everybody_has_a_turn_before_its_next() {
        let mut candidates = replicas(&[2, 3]);
        candidates.insert(0, Candidate { under_way: 9, ..candidate(1, Place::Here) });
        let asked = Asked::nobody(0);
        let turns: Vec<u64> = (0..6).filter_map(|_| asked.next(&candidates)).map(|node| node.0).collect();
        assert_eq!(turns, [1, 2, 3, 1, 2, 3]);
        assert_eq!(asked.next(&[]), None);
    }

    #[test]
    fn a_call_is_under_way_until_it_ends() {
        let calls = UnderWay::default();
        let (first, second) = (calls.begin(NodeId(2)), calls.begin(NodeId(2)));
        assert_eq!((calls.to(NodeId(2)), calls.to(NodeId(3))), (2, 0));
        drop((first, second));
        assert_eq!(calls.to(NodeId(2)), 0);
        assert!(calls.0.lock().is_empty());
    }
}
