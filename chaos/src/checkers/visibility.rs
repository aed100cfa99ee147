//! Search: what was acknowledged is found by every way at once, and what was deleted by none.
//!
//! A probe is judged only when nothing else may have touched its key meanwhile. By id, by an
//! exact search with its own vector and by a filter on its uid a document must be found. The
//! graph is approximate by nature: its misses are counted, and are too many beyond
//! [`MAX_GRAPH_MISSES`].

use std::collections::BTreeMap;

use super::{Verdict, describe};
use crate::history::{Answer, Call, Level, Operation, Way};

/// The share of probes through the graph that may miss.
pub const MAX_GRAPH_MISSES: f64 = 0.001;

/// Judges every probe.
pub fn check(operations: &[Operation]) -> Verdict {
    let mut verdict = Verdict::new("visibility");
    let mut touching: BTreeMap<u64, Vec<&Operation>> = BTreeMap::new();
    for operation in operations.iter().filter(|operation| operation.may_have_happened()) {
        if let Call::Write { key, .. } | Call::Delete { key } = &operation.call {
            touching.entry(*key).or_default().push(operation);
        }
    }
    let (mut judged, mut graph, mut graph_missed) = (0u64, 0u64, 0u64);
    for probe in operations.iter().filter(|operation| operation.is_ok()) {
        let (Call::Find { key, uid, way, level }, Some(Answer::Value { uid: found, .. })) =
            (&probe.call, &probe.answer)
        else {
            continue;
        };
        if *level == Level::Eventual {
            continue;
        }
        let touched = touching.get(key).map_or(&[][..], Vec::as_slice);
        let Some(last) = last_certain(touched, probe) else { continue };
        // At session level a client is owed what it has seen itself.
        if *level == Level::Session && last.process != probe.process {
            continue;
        }
        let is_alone = touched
            .iter()
            .all(|other| other.ended < last.began || std::ptr::eq(*other, last) || other.began > probe.ended);
        if !is_alone {
            continue;
        }
        let expected = match &last.call {
            Call::Write { uid, .. } => Some(uid.as_str()),
            _ => None,
        };
        // A value that was replaced must not be found either.
        let is_current = expected == Some(uid.as_str());
        judged += 1;
        verdict.count(&format!("probes_{way:?}").to_lowercase(), 1.0);
        let is_found = found.as_deref() == Some(uid.as_str());
        graph += u64::from(*way == Way::Graph && is_current);
        match (is_current, is_found) {
            (true, true) | (false, false) => {}
            (true, false) if *way == Way::Graph => graph_missed += 1,
            (true, false) => {
                verdict.violation("missed", format!("not found: {}", describe(probe)));
                verdict.show([last, probe]);
            }
            (false, true) => {
                let what = if expected.is_some() { "replaced_found" } else { "deleted_found" };
                verdict.violation(what, format!("found though it is gone: {}", describe(probe)));
                verdict.show([last, probe]);
            }
        }
    }
    verdict.figure("judged", judged as f64);
    verdict.figure("graph_probes", graph as f64);
    if graph > 0 {
        let recall = 1.0 - graph_missed as f64 / graph as f64;
        verdict.figure("graph_self_recall", recall);
        if 1.0 - recall > MAX_GRAPH_MISSES {
            verdict
                .violation("graph_recall", format!("the graph misses {graph_missed} of {graph} documents"));
        }
    }
    if judged == 0 {
        verdict.cannot_tell("no probe could be judged".to_owned());
    }
    verdict
}

/// What a probe is judged by, of all that touches its key: the last that was certain to have happened
/// before it. Only when nothing overlaps or follows that until the answer is the probe judged.
pub(crate) fn last_certain<'a>(touching: &[&'a Operation], probe: &Operation) -> Option<&'a Operation> {
    let certain = touching.iter().copied().filter(|other| other.is_ok() && other.ended < probe.began);
    certain.max_by_key(|other| other.began)
}

#[cfg(test)]
mod tests {
    use super::super::Judgement;
    use super::super::testing::{by, delete, find, write};
    use super::*;

    #[test]
    fn what_is_there_must_be_found_and_what_is_gone_must_not() {
        let good = [
            write(1, "a", 1, 2),
            find(1, "a", Way::Exact, "a", 3, 4),
            delete(1, 5, 6),
            find(1, "a", Way::Filter, "", 7, 8),
        ];
        assert_eq!(check(&good).judgement, Judgement::Valid);
        let missed = [write(1, "a", 1, 2), find(1, "a", Way::Id, "", 3, 4)];
        assert_eq!(check(&missed).figures["missed"], 1.0);
        let torn = [write(1, "a", 1, 2), find(1, "a", Way::Exact, "b", 3, 4)];
        assert_eq!(check(&torn).judgement, Judgement::Invalid);
        let ghost = [write(1, "a", 1, 2), delete(1, 3, 4), find(1, "a", Way::Exact, "a", 5, 6)];
        assert_eq!(check(&ghost).figures["deleted_found"], 1.0);
        let old = [write(1, "a", 1, 2), write(1, "b", 3, 4), find(1, "a", Way::Exact, "a", 5, 6)];
        assert_eq!(check(&old).figures["replaced_found"], 1.0);
    }

    #[test]
    fn what_overlaps_is_not_judged() {
        let mut elsewhere = by(find(1, "a", Way::Id, "", 3, 4), 2);
        if let Call::Find { level, .. } = &mut elsewhere.call {
            *level = Level::Session;
        }
        assert_eq!(check(&[write(1, "a", 1, 2), elsewhere]).judgement, Judgement::Unknown);
        let overlapping = [write(1, "a", 1, 2), delete(1, 3, 0), find(1, "a", Way::Exact, "", 5, 6)];
        assert_eq!(check(&overlapping).judgement, Judgement::Unknown);
    }

    #[test]
    fn a_graph_that_misses_too_much_is_caught() {
        let mut history = vec![write(1, "a", 1, 2)];
        history.extend(
            (0..10).map(|n| find(1, "a", Way::Graph, if n == 3 { "" } else { "a" }, 10 + 2 * n, 11 + 2 * n)),
        );
        assert_eq!(check(&history).judgement, Judgement::Invalid);
    }
}
