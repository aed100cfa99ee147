//! What the nodes say of their groups must fit together (Ongaro's invariants, seen from outside).
//!
//! - one leader a term;
//! - `purged ≤ checkpoint ≤ applied ≤ last` on every replica;
//! - applied never goes back while a process runs, and after a restart the log is never shorter
//!   than what the node had made durable in its state before (a node that forgets may vote twice);
//! - replicas that have hashed their state at the same index have the same hash.

use std::collections::{BTreeMap, BTreeSet};

use super::Verdict;
use crate::history::{History, Sample};

/// Judges all samples.
pub fn check(history: &History) -> Verdict {
    let mut verdict = Verdict::new("raft");
    let mut leaders: BTreeMap<(u64, u64), u64> = BTreeMap::new();
    let mut latest: BTreeMap<(u64, u64), &Sample> = BTreeMap::new();
    // By a leader's word no member any more; whether it has been taken back since.
    let mut let_go: BTreeMap<(u64, u64), bool> = BTreeMap::new();
    let mut hashes: BTreeMap<(u64, u64), BTreeMap<&str, u64>> = BTreeMap::new();
    let (mut samples, mut compared) = (0u64, 0u64);
    for sample in history.samples() {
        samples += 1;
        let Sample { node, group, term, .. } = *sample;
        if sample.is_leader {
            let leader = *leaders.entry((group, term)).or_insert(node);
            if leader != node {
                verdict.violation(
                    "two_leaders",
                    format!("group {group}, term {term}: nodes {leader} and {node}"),
                );
            }
        }
        let ordered = [sample.purged, sample.checkpoint, sample.applied, sample.last];
        if !ordered.is_sorted() {
            verdict.violation("disorder", format!("group {group} at node {node}: {sample:?}"));
        }
        // Only leaders say who is in the group, and older histories say nothing.
        if !sample.members.is_empty() {
            for key in latest.keys().filter(|(_, of)| *of == group) {
                match sample.members.contains(&key.0) {
                    false => drop(let_go.insert(*key, false)),
                    true => drop(let_go.get_mut(key).map(|is_back| *is_back = true)),
                }
            }
        }
        // Who was let go by a leader's word and comes back begins anew, once, and is filled by the others.
        // Its role says nothing: while it goes through the log it is what it was then. A voter that has
        // forgotten everything looks the same, but nobody has let it go.
        let key = (node, group);
        let has_less = latest.get(&key).is_some_and(|before| sample.applied < before.applied);
        let is_new = has_less && let_go.contains_key(&key);
        if is_new || let_go.get(&key) == Some(&true) {
            let_go.remove(&key);
        }
        if let Some(before) = latest.insert(key, sample).filter(|_| !is_new) {
            if before.run == sample.run && sample.applied < before.applied {
                verdict.violation(
                    "went_back",
                    format!(
                        "group {group} at node {node} applied {} after {}",
                        sample.applied, before.applied
                    ),
                );
            }
            if sample.last < before.checkpoint || sample.term < before.term {
                verdict.violation(
                    "amnesia",
                    format!("group {group} at node {node} has forgotten: {before:?}, then {sample:?}"),
                );
            }
        }
        if let Some((index, hash)) = &sample.hash {
            let of_index = hashes.entry((group, *index)).or_default();
            compared += u64::from(of_index.get(hash.as_str()).is_some_and(|other| *other != node));
            of_index.insert(hash, node);
        }
    }
    for ((group, index), of_index) in &hashes {
        if of_index.len() > 1 {
            verdict.violation("diverged", format!("group {group} at index {index}: {of_index:?}"));
        }
    }
    let groups: BTreeSet<u64> = leaders.keys().map(|(group, _)| *group).collect();
    let elections = (leaders.len() - groups.len()) as u64;
    verdict.figure("elections", elections as f64);
    if let Some(most) = history.header.most_elections.filter(|most| elections > *most) {
        verdict
            .violation("needless_elections", format!("{elections} leaders were elected, {most} are allowed"));
    }
    verdict.figure("samples", samples as f64);
    verdict.figure("hashes_compared", compared as f64);
    if samples == 0 {
        verdict.cannot_tell("no node was asked about its groups".to_owned());
    }
    verdict
}

#[cfg(test)]
mod tests {
    use super::super::Judgement;
    use super::*;
    use crate::history::Event;

    fn history(samples: Vec<Sample>) -> History {
        let events = samples.into_iter().enumerate().map(|(at, sample)| Event::Probe {
            seq: at as u64,
            ns: at as u64,
            sample,
        });
        History { events: events.collect(), ..History::default() }
    }

    fn sample(node: u64, term: u64, applied: u64) -> Sample {
        Sample { node, run: 1, group: 1, term, applied, last: applied, ..Sample::default() }
    }

    #[test]
    fn each_invariant_can_fail() {
        let good = vec![sample(1, 1, 5), sample(2, 1, 4), sample(1, 1, 6)];
        assert_eq!(check(&history(good)).judgement, Judgement::Valid);
        let leader = |node| Sample { is_leader: true, ..sample(node, 1, 5) };
        assert_eq!(check(&history(vec![leader(1), leader(2)])).figures["two_leaders"], 1.0);
        assert_eq!(check(&history(vec![sample(1, 1, 5), sample(1, 1, 4)])).figures["went_back"], 1.0);
        let durable = Sample { checkpoint: 5, ..sample(1, 1, 5) };
        let forgetful = Sample { run: 2, ..sample(1, 1, 3) };
        assert_eq!(check(&history(vec![durable.clone(), forgetful.clone()])).figures["amnesia"], 1.0);
        let new = forgetful.clone();
        assert_eq!(
            check(&history(vec![durable.clone(), new.clone()])).figures["amnesia"],
            1.0,
            "nobody let it go"
        );
        let lets_go = Sample { is_leader: true, members: vec![2, 3], ..sample(2, 1, 5) };
        let left = check(&history(vec![durable.clone(), lets_go.clone(), new.clone()]));
        assert_eq!(left.judgement, Judgement::Valid);
        let behind = Sample { applied: 2, ..new.clone() };
        let story = vec![durable.clone(), lets_go.clone(), new.clone(), behind];
        assert_eq!(check(&history(story)).figures["went_back"], 1.0);
        let takes_back = Sample { members: vec![1, 2, 3], ..lets_go.clone() };
        let story = vec![durable.clone(), lets_go, takes_back, durable.clone(), new];
        assert_eq!(check(&history(story)).figures["amnesia"], 1.0, "it was back already");
        let purged = Sample { purged: 9, ..sample(1, 1, 5) };
        assert_eq!(check(&history(vec![purged])).figures["disorder"], 1.0);
        let hashed = |node, hash: &str| Sample { hash: Some((5, hash.into())), ..sample(node, 1, 5) };
        assert_eq!(check(&history(vec![hashed(1, "a"), hashed(2, "b")])).figures["diverged"], 1.0);
        assert_eq!(check(&history(vec![hashed(1, "a"), hashed(2, "a")])).judgement, Judgement::Valid);
        assert_eq!(check(&history(vec![])).judgement, Judgement::Unknown);
        let mut deposed = history(vec![leader(1), Sample { is_leader: true, ..sample(2, 2, 5) }]);
        assert_eq!(check(&deposed).figures["elections"], 1.0);
        deposed.header.most_elections = Some(0);
        assert_eq!(check(&deposed).judgement, Judgement::Invalid);
    }
}
