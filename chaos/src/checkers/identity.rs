//! Who is who: the cluster gives an id once, to one node with one disk.
//!
//! - an id that was seen is never seen again at another node, nor at the same one after it has lost its disk:
//!   whoever has forgotten everything and votes under its old id may vote twice;
//! - a node that keeps its disk keeps its id.
//!
//! It is for scenarios in which disks are kept or lost as wholes: a node whose log is damaged takes a new id on
//! its old disk, as it should.

use std::collections::{BTreeMap, BTreeSet};

use super::Verdict;
use crate::history::{History, Origin};

/// Judges what nodes were called and which disks they had when they spoke.
pub fn check(history: &History) -> Verdict {
    let mut verdict = Verdict::new("identity");
    let mut by_id: BTreeMap<u64, BTreeSet<&Origin>> = BTreeMap::new();
    let mut by_origin: BTreeMap<&Origin, BTreeSet<u64>> = BTreeMap::new();
    for sample in history.samples() {
        let Some(origin) = &sample.of else { continue };
        by_id.entry(sample.node).or_default().insert(origin);
        by_origin.entry(origin).or_default().insert(sample.node);
    }
    for (id, origins) in by_id.iter().filter(|(_, origins)| origins.len() > 1) {
        verdict.violation("id_reused", format!("the id {id} was that of {origins:?}"));
    }
    for (origin, ids) in by_origin.iter().filter(|(_, ids)| ids.len() > 1) {
        verdict.violation("id_changed", format!("{origin:?} had the ids {ids:?}"));
    }
    verdict.figure("ids", by_id.len() as f64);
    verdict.figure("disks", by_origin.len() as f64);
    if by_id.is_empty() {
        verdict.cannot_tell("the history does not say which node and which disk had which id".to_owned());
    }
    verdict
}

#[cfg(test)]
mod tests {
    use super::super::Judgement;
    use super::*;
    use crate::history::{Event, Sample};

    /// A history in which nodes spoke under ids: the name, the number of lost disks, the id.
    fn history(seen: &[(&str, u64, u64)]) -> History {
        let probe = |(at, (name, disk, id)): (usize, &(&str, u64, u64))| {
            let of = Some(Origin { name: (*name).to_owned(), disk: *disk });
            let (seq, ns) = (at as u64, at as u64);
            Event::Probe { seq, ns, sample: Sample { node: *id, of, ..Sample::default() } }
        };
        History { events: seen.iter().enumerate().map(probe).collect(), ..History::default() }
    }

    #[test]
    fn an_id_is_used_once() {
        // The second node comes back on its disk, and then on an empty one.
        let good = history(&[("n1", 0, 1), ("n2", 0, 2), ("n1", 0, 1), ("n2", 0, 2), ("n2", 1, 3)]);
        let verdict = check(&good);
        assert_eq!(verdict.judgement, Judgement::Valid);
        assert_eq!((verdict.figures["ids"], verdict.figures["disks"]), (3.0, 3.0));
        let same_after_loss = history(&[("n1", 0, 1), ("n2", 0, 2), ("n2", 1, 2)]);
        assert_eq!(check(&same_after_loss).figures["id_reused"], 1.0);
        let of_another = history(&[("n1", 0, 1), ("n2", 0, 2), ("n3", 0, 2)]);
        assert_eq!(check(&of_another).figures["id_reused"], 1.0);
        let forgotten = history(&[("n1", 0, 1), ("n1", 0, 2)]);
        assert_eq!(check(&forgotten).figures["id_changed"], 1.0);
        assert_eq!(check(&forgotten).judgement, Judgement::Invalid);
    }

    #[test]
    fn an_older_history_does_not_tell() {
        let line = r#"{"kind":"probe","seq":1,"ns":2,"sample":{"node":1,"run":1,"group":0,"is_leader":false,
            "term":1,"purged":0,"checkpoint":0,"applied":0,"last":0,"hash":null}}"#;
        let event = serde_json::from_str(line).expect("an event");
        let old = History { events: vec![event], ..History::default() };
        assert_eq!(old.samples().count(), 1);
        assert_eq!(check(&old).judgement, Judgement::Unknown);
        assert_eq!(check(&history(&[])).judgement, Judgement::Unknown);
    }
}
