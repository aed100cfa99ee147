//! Requests that write several points of one shard: all of them or none.

use std::collections::{BTreeMap, BTreeSet};

use super::Verdict;
use crate::history::{Answer, Call, Operation};

/// Judges every listing: of the keys of a batch that nothing else touches, all carry its uid or
/// none does.
pub fn check(operations: &[Operation]) -> Verdict {
    let mut verdict = Verdict::new("batch");
    let batches: Vec<(&Operation, &Vec<u64>, &String)> = operations
        .iter()
        .filter_map(|operation| match &operation.call {
            Call::Batch { keys, uid } => Some((operation, keys, uid)),
            _ => None,
        })
        .collect();
    let mut written: BTreeMap<u64, u64> = BTreeMap::new();
    for (_, keys, _) in &batches {
        for key in keys.iter() {
            *written.entry(*key).or_default() += 1;
        }
    }
    let mut judged = 0u64;
    for listing in operations.iter().filter(|operation| operation.is_ok()) {
        let (Call::List { .. }, Some(Answer::Listing { points })) = (&listing.call, &listing.answer) else {
            continue;
        };
        let mut with_uid: BTreeMap<&str, BTreeSet<u64>> = BTreeMap::new();
        for (key, uid) in points {
            with_uid.entry(uid).or_default().insert(*key);
        }
        for (operation, keys, uid) in &batches {
            let is_alone = keys.iter().all(|key| written[key] == 1);
            if !is_alone || operation.began > listing.ended {
                continue;
            }
            judged += 1;
            let have = with_uid.get(uid.as_str()).map_or(0, BTreeSet::len);
            if have != 0 && have != keys.len() {
                verdict.violation(
                    "partial",
                    format!("{have} of {} points of {uid} at node {}", keys.len(), listing.node),
                );
                verdict.show([*operation]);
            }
        }
    }
    verdict.figure("batches", batches.len() as f64);
    verdict.figure("judged", judged as f64);
    if judged == 0 {
        verdict.cannot_tell("no batch could be judged".to_owned());
    }
    verdict
}

#[cfg(test)]
mod tests {
    use super::super::Judgement;
    use super::super::testing::{list, operation};
    use super::*;

    #[test]
    fn half_a_batch_is_caught() {
        let batch = |ended| {
            operation(Call::Batch { keys: vec![1, 2], uid: "a".into() }, 1, ended, Some(Answer::Done))
        };
        assert_eq!(check(&[batch(2), list(&[(1, "a"), (2, "a")], 3, 4)]).judgement, Judgement::Valid);
        assert_eq!(check(&[batch(0), list(&[], 3, 4)]).judgement, Judgement::Valid);
        assert_eq!(check(&[batch(0), list(&[(2, "a")], 3, 4)]).figures["partial"], 1.0);
        assert_eq!(check(&[batch(0)]).judgement, Judgement::Unknown);
    }
}
