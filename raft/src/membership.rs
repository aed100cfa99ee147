//! How a group's membership is led from what it is to what it should be, one step at a time.
//!
//! A voter is replaced in one joint change (Ongaro 2014, section 4.3) once the node that takes its
//! place has caught up and answers. A group never gets a voter more in order to lose one later: the
//! one to be replaced is often dead, and a larger quorum might then have nobody to form it.

use std::collections::BTreeSet;

use shoal_proto::NodeId;

/// Who is in a group, or should be.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) struct Members {
    /// Those that vote.
    pub(crate) voters: BTreeSet<NodeId>,
    /// Those that are only kept up to date.
    pub(crate) learners: BTreeSet<NodeId>,
    /// Whether a change was begun and not ended: `voters` are those before it and after it, and each
    /// of the two must have its own majority.
    pub(crate) is_joint: bool,
}

/// The next change of a membership.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Step {
    /// A node begins to receive the log.
    AddLearner(NodeId),
    /// Exactly these vote; whoever did before goes on as a learner.
    SetVoters(BTreeSet<NodeId>),
    /// These learners leave.
    Remove(BTreeSet<NodeId>),
}

/// The next step from `now` to a group of `wanted` nodes, of which `voters` vote; none when there
/// is none now. `is_ready` tells whether a learner has caught up and answers.
pub(crate) fn next_step(
    now: &Members,
    wanted: &BTreeSet<NodeId>,
    voters: &BTreeSet<NodeId>,
    is_ready: impl Fn(NodeId) -> bool,
) -> Option<Step> {
    let is_known = |node: &NodeId| now.voters.contains(node) || now.learners.contains(node);
    if let Some(new) = wanted.iter().find(|node| !is_known(node)) {
        return Some(Step::AddLearner(*new));
    }
    let can_vote = |node: &&NodeId| now.voters.contains(*node) || (is_known(node) && is_ready(**node));
    let mut target: BTreeSet<NodeId> = voters.iter().filter(can_vote).copied().collect();
    // Whoever is to go stays until somebody has taken the place.
    let least = now.voters.len().min(voters.len());
    let surplus: Vec<NodeId> = now.voters.difference(voters).copied().collect();
    let missing = least.saturating_sub(target.len());
    target.extend(surplus.into_iter().take(missing));
    // One voter more than an odd number makes the quorum larger and no failure bearable.
    let is_worse = target.len() > now.voters.len() && target.len().is_multiple_of(2) && target != *voters;
    if !target.is_empty() && !is_worse && (target != now.voters || now.is_joint) {
        return Some(Step::SetVoters(target));
    }
    let gone: BTreeSet<NodeId> = now.learners.difference(wanted).copied().collect();
    (!gone.is_empty()).then_some(Step::Remove(gone))
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn nodes(ids: &[u64]) -> BTreeSet<NodeId> {
        ids.iter().copied().map(NodeId).collect()
    }

    fn members(voters: &[u64], learners: &[u64]) -> Members {
        Members { voters: nodes(voters), learners: nodes(learners), is_joint: false }
    }

    #[test]
    fn a_dead_voter_is_replaced_in_one_change() {
        let wanted = nodes(&[2, 3, 4]);
        let step = |now: &Members, is_ready: bool| next_step(now, &wanted, &wanted, |_| is_ready);
        assert_eq!(step(&members(&[1, 2, 3], &[]), false), Some(Step::AddLearner(NodeId(4))));
        assert_eq!(step(&members(&[1, 2, 3], &[4]), false), None, "nobody votes who was never heard of");
        assert_eq!(step(&members(&[1, 2, 3], &[4]), true), Some(Step::SetVoters(wanted.clone())));
        assert_eq!(step(&members(&[2, 3, 4], &[1]), true), Some(Step::Remove(nodes(&[1]))));
        assert_eq!(step(&members(&[2, 3, 4], &[]), true), None);
        // A change that a leader left half-way: the union votes, and may look like what is wanted.
        assert_eq!(step(&members(&[1, 2, 3, 4], &[]), false), Some(Step::SetVoters(wanted.clone())));
        let half_way = Members { is_joint: true, ..members(&[2, 3, 4], &[]) };
        assert_eq!(step(&half_way, false), Some(Step::SetVoters(wanted.clone())));
    }

    #[test]
    fn places_are_taken_one_by_one() {
        let wanted = nodes(&[3, 4, 5, 6, 7]);
        let now = members(&[1, 2, 3, 4, 5], &[6, 7]);
        let step = next_step(&now, &wanted, &wanted, |node| node == NodeId(6));
        assert_eq!(step, Some(Step::SetVoters(nodes(&[1, 3, 4, 5, 6]))));
        // Growth does not stop at an even number, unless that is what is wanted.
        let grown = |wanted: &[u64], ready: &[u64]| {
            let (wanted, ready) = (nodes(wanted), nodes(ready));
            next_step(&members(&[1], &[2, 3]), &wanted, &wanted, |node| ready.contains(&node))
        };
        assert_eq!(grown(&[1, 2, 3], &[2]), None);
        assert_eq!(grown(&[1, 2, 3], &[2, 3]), Some(Step::SetVoters(nodes(&[1, 2, 3]))));
        assert_eq!(grown(&[1, 2], &[2]), Some(Step::SetVoters(nodes(&[1, 2]))));
        // A learner that is wanted as one stays one.
        assert_eq!(next_step(&members(&[1], &[2]), &nodes(&[1, 2]), &nodes(&[1]), |_| true), None);
    }

    fn some_nodes() -> impl Strategy<Value = BTreeSet<NodeId>> {
        proptest::collection::btree_set((1u64..8).prop_map(NodeId), 1..6)
    }

    proptest! {
        /// Whatever is wanted is reached once everybody is ready; and on the way no change takes
        /// more voters away than it brings, unless fewer are wanted.
        #[test]
        fn every_wish_is_reached(first in some_nodes(), wanted in some_nodes(), ready in some_nodes()) {
            let mut now = Members { voters: first, learners: BTreeSet::new(), is_joint: false };
            for round in 0..40 {
                let is_ready = |node: NodeId| round >= 10 || ready.contains(&node);
                match next_step(&now, &wanted, &wanted, is_ready) {
                    None => {}
                    Some(Step::AddLearner(node)) => prop_assert!(now.learners.insert(node)),
                    Some(Step::SetVoters(voters)) => {
                        prop_assert!(voters.len() >= now.voters.len().min(wanted.len()));
                        let known: BTreeSet<NodeId> = now.voters.union(&now.learners).copied().collect();
                        prop_assert!(voters.is_subset(&known));
                        now.learners = known.difference(&voters).copied().collect();
                        now.voters = voters;
                    }
                    Some(Step::Remove(gone)) => now.learners.retain(|node| !gone.contains(node)),
                }
            }
            prop_assert_eq!(now, Members { voters: wanted, learners: BTreeSet::new(), is_joint: false });
        }
    }
}
