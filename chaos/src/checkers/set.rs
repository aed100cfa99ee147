//! Documents that are written, replaced and deleted: what was acknowledged is there, once, and
//! what was deleted stays away ("set-full" in Jepsen's words, with updates).
//!
//! Listings at the end are made on every node after the faults have healed and the replicas have
//! caught up, so they are judged like linearizable reads whatever level they were made at.

use std::collections::{BTreeMap, BTreeSet, HashMap};

use super::order::{self, Known, Writes};
use super::{Verdict, describe};
use crate::history::{Answer, Call, Level, Operation};

const NOT_FOUND: u16 = 404;

/// Judges every read and every listing.
pub fn check(operations: &[Operation]) -> Verdict {
    let mut verdict = Verdict::new("set");
    let writes = order::writes_by_key(operations);
    let mut known: BTreeMap<u64, Known> = BTreeMap::new();
    let mut at_begin: HashMap<u64, BTreeMap<u64, Known>> = HashMap::new();
    let mut acknowledged = 0u64;
    let (mut reads, mut listings) = (0u64, 0u64);
    let mut lags: Vec<u64> = Vec::new();
    let mut unseen: HashMap<&str, u64> = HashMap::new();
    for (_, is_end, operation) in order::moments(operations) {
        if !is_end {
            match &operation.call {
                Call::Read { key, level: Level::Linearizable } => {
                    let of_key = known.get(key).copied().unwrap_or_default();
                    at_begin.insert(operation.began, BTreeMap::from([(*key, of_key)]));
                }
                Call::List { .. } => drop(at_begin.insert(operation.began, known.clone())),
                _ => {}
            }
            continue;
        }
        let before = at_begin.remove(&operation.began);
        if operation.status == Some(NOT_FOUND) {
            // A point that is not there is an answer; this says that there is no collection.
            let finding =
                format!("the collection, which was acknowledged, is not known: {}", describe(operation));
            verdict.violation("collection_lost", finding);
        }
        if !operation.is_ok() {
            continue;
        }
        match (&operation.call, &operation.answer) {
            (Call::Write { key, uid }, _) => {
                acknowledged += 1;
                known.entry(*key).or_default().learn(operation);
                unseen.insert(uid, operation.ended_ns);
            }
            (Call::Batch { keys, .. }, _) => {
                acknowledged += keys.len() as u64;
                for key in keys {
                    known.entry(*key).or_default().learn(operation);
                }
            }
            (Call::Delete { key }, _) => known.entry(*key).or_default().learn(operation),
            (Call::Read { key, level: Level::Linearizable }, Some(Answer::Value { uid, .. })) => {
                reads += 1;
                let floor = before.and_then(|before| before.get(key).copied()).unwrap_or_default();
                judge(&mut verdict, &writes, operations, operation, (*key, uid.as_deref(), floor));
                if let Some(uid) = uid {
                    // Once seen, it has taken effect.
                    if let Some(write) = writes.get(key).and_then(|writes| writes.of(uid)) {
                        known.entry(*key).or_default().learn(write);
                    }
                    if let Some(at) = unseen.remove(uid.as_str()) {
                        lags.push(operation.began_ns.saturating_sub(at));
                    }
                }
            }
            (Call::List { .. }, Some(Answer::Listing { points })) => {
                listings += 1;
                let before = before.unwrap_or_default();
                judge_listing(&mut verdict, &writes, operations, operation, points, &before);
            }
            _ => {}
        }
    }
    compare_listings(&mut verdict, operations);
    verdict.figure("acknowledged_writes", acknowledged as f64);
    verdict.figure("keys", writes.len() as f64);
    verdict.figure("reads", reads as f64);
    verdict.figure("listings", listings as f64);
    if listings == 0 {
        verdict.cannot_tell("nobody has listed what is there in the end".to_owned());
    }
    lags.sort_unstable();
    for (name, share) in [("stable_latency_p50_ms", 0.5), ("stable_latency_p99_ms", 0.99)] {
        if let Some(lag) = shoal_tests::percentile(&lags, share) {
            verdict.figure(name, lag as f64 / 1e6);
        }
    }
    verdict
}

/// Listings after the last write are of one and the same state.
fn compare_listings(verdict: &mut Verdict, operations: &[Operation]) {
    let writes = operations.iter().filter(|operation| operation.call.is_write());
    let last = writes.map(|write| if write.is_ok() { write.ended } else { write.began }).max().unwrap_or(0);
    let mut first: Option<(&Operation, BTreeMap<u64, &str>)> = None;
    for operation in operations.iter().filter(|operation| operation.is_ok() && operation.began > last) {
        let Some(Answer::Listing { points }) = &operation.answer else { continue };
        let listed: BTreeMap<u64, &str> = points.iter().map(|(key, uid)| (*key, uid.as_str())).collect();
        match &first {
            None => first = Some((operation, listed)),
            Some((other, seen)) if *seen != listed => {
                let differs = |key: &&u64| seen.get(*key) != listed.get(*key);
                let key = seen.keys().chain(listed.keys()).find(differs).copied().unwrap_or_default();
                let (one, two) = (other.node, operation.node);
                verdict.violation("listings_differ", format!("nodes {one} and {two} differ about key {key}"));
            }
            Some(_) => {}
        }
    }
}

fn judge(
    verdict: &mut Verdict,
    writes: &BTreeMap<u64, Writes>,
    operations: &[Operation],
    operation: &Operation,
    (key, uid, known): (u64, Option<&str>, Known),
) {
    let none = Writes::default();
    let of_key = writes.get(&key).unwrap_or(&none);
    if let Err(anomaly) = of_key.judge(uid, known, operation.ended) {
        let finding = format!("key {key} is {} ({uid:?}) at node {}", anomaly.name(), operation.node);
        verdict.violation(anomaly.name(), finding);
        let shown = operations.iter().filter(|other| touches(other, key) && other.began <= operation.ended);
        verdict.show(shown);
        if !matches!(operation.call, Call::List { .. }) {
            verdict.note(describe(operation));
        }
    }
}

fn judge_listing(
    verdict: &mut Verdict,
    writes: &BTreeMap<u64, Writes>,
    operations: &[Operation],
    operation: &Operation,
    points: &[(u64, String)],
    known: &BTreeMap<u64, Known>,
) {
    let mut listed: BTreeSet<u64> = BTreeSet::new();
    for (key, uid) in points {
        if !listed.insert(*key) {
            verdict.violation(
                "duplicate",
                format!("key {key} stands twice in a listing of node {}", operation.node),
            );
        }
        let floor = known.get(key).copied().unwrap_or_default();
        judge(verdict, writes, operations, operation, (*key, Some(uid), floor));
    }
    for key in writes.keys().filter(|key| !listed.contains(key)) {
        let floor = known.get(key).copied().unwrap_or_default();
        judge(verdict, writes, operations, operation, (*key, None, floor));
    }
}

/// Whether an operation is about a key.
pub(super) fn touches(operation: &Operation, key: u64) -> bool {
    match &operation.call {
        Call::Write { key: of, .. } | Call::Delete { key: of } | Call::Read { key: of, .. } => *of == key,
        Call::Batch { keys, .. } => keys.contains(&key),
        _ => false,
    }
}

#[cfg(test)]
mod tests {
    use super::super::Judgement;
    use super::super::testing::{delete, failed, list, read, write};
    use super::*;

    fn judged(operations: &[Operation]) -> (Judgement, Vec<String>) {
        let verdict = check(operations);
        let kinds = ["lost", "stale", "phantom", "duplicate", "resurrected", "future", "collection_lost"];
        let found = kinds.iter().filter(|kind| verdict.figures.contains_key(**kind));
        (verdict.judgement, found.map(|kind| (*kind).to_owned()).collect())
    }

    #[test]
    fn good_histories_pass() {
        let history = [
            write(1, "a", 1, 2),
            write(2, "b", 3, 4),
            delete(1, 5, 6),
            write(2, "c", 7, 8),
            write(3, "d", 9, 0),
            failed(write(4, "e", 10, 11)),
            delete(2, 12, 0),
            read(2, "c", 13, 14),
            list(&[(2, "c"), (3, "d")], 20, 21),
        ];
        assert_eq!(judged(&history), (Judgement::Valid, vec![]));
        // The unknown delete may as well have happened.
        let mut deleted = history.to_vec();
        deleted.pop();
        deleted.push(list(&[(3, "d")], 22, 23));
        assert_eq!(judged(&deleted), (Judgement::Valid, vec![]));
        // The unknown write may as well never happen.
        assert_eq!(judged(&[write(3, "d", 9, 0), list(&[], 20, 21)]), (Judgement::Valid, vec![]));
    }

    #[test]
    fn each_kind_of_wrong_is_caught() {
        let lost = [write(1, "a", 1, 2), list(&[], 5, 6)];
        assert_eq!(judged(&lost), (Judgement::Invalid, vec!["lost".to_owned()]));
        let stale = [write(1, "a", 1, 2), write(1, "b", 3, 4), list(&[(1, "a")], 5, 6)];
        assert_eq!(judged(&stale), (Judgement::Invalid, vec!["stale".to_owned()]));
        let phantom = [write(1, "a", 1, 2), list(&[(1, "a"), (9, "z")], 5, 6)];
        assert_eq!(judged(&phantom), (Judgement::Invalid, vec!["phantom".to_owned()]));
        let duplicate = [write(1, "a", 1, 2), list(&[(1, "a"), (1, "a")], 5, 6)];
        assert_eq!(judged(&duplicate), (Judgement::Invalid, vec!["duplicate".to_owned()]));
        let resurrected = [write(1, "a", 1, 2), delete(1, 3, 4), list(&[(1, "a")], 5, 6)];
        assert_eq!(judged(&resurrected), (Judgement::Invalid, vec!["resurrected".to_owned()]));
        let mut unknown = failed(read(1, "a", 3, 4));
        unknown.status = Some(NOT_FOUND);
        let nowhere = [write(1, "a", 1, 2), unknown, list(&[(1, "a")], 5, 6)];
        assert_eq!(judged(&nowhere), (Judgement::Invalid, vec!["collection_lost".to_owned()]));
        let refused = [failed(write(1, "a", 1, 2)), list(&[(1, "a")], 5, 6)];
        assert_eq!(judged(&refused), (Judgement::Invalid, vec!["phantom".to_owned()]));
    }

    #[test]
    fn what_was_seen_does_not_flip() {
        let flip = [write(1, "a", 1, 2), write(1, "b", 3, 0), read(1, "b", 4, 5), list(&[(1, "a")], 6, 7)];
        assert_eq!(judged(&flip), (Judgement::Invalid, vec!["stale".to_owned()]));
        // An unknown write that was seen does not come back after a delete, or after another write.
        let back = [write(1, "a", 1, 0), read(1, "a", 2, 3), delete(1, 4, 5), list(&[(1, "a")], 6, 7)];
        assert_eq!(judged(&back), (Judgement::Invalid, vec!["resurrected".to_owned()]));
        let back = [write(1, "a", 1, 0), read(1, "a", 2, 3), write(1, "b", 4, 5), list(&[(1, "a")], 6, 7)];
        assert_eq!(judged(&back), (Judgement::Invalid, vec!["stale".to_owned()]));
    }

    #[test]
    fn nodes_that_list_different_things_are_caught() {
        let apart = [write(1, "a", 1, 0), list(&[(1, "a")], 20, 21), list(&[], 22, 23)];
        assert_eq!(check(&apart).figures["listings_differ"], 1.0);
    }

    #[test]
    fn a_history_without_a_listing_does_not_pass() {
        assert_eq!(judged(&[write(1, "a", 1, 2)]).0, Judgement::Unknown);
    }
}
