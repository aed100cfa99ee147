//! Whether the run means anything: the faults struck, enough succeeded, and nothing happened on
//! the way that must not happen at all (a panic, a wrong exit code, replicas that stay apart).
//!
//! Where nodes die at crash points, every point that the history's header names must have been hit: the
//! points of the build that was run, not of the one that judges. Older histories name none, and then nobody
//! can tell. A point that a node was started for and did not come to is a fault that could not be injected,
//! and a violation.

use std::collections::{BTreeMap, BTreeSet};

use super::Verdict;
use crate::faults::{Fault, crash};
use crate::history::{Answer, History, Operation, Outcome, Phase};

/// Counts faults, outcomes and statuses.
pub fn check(history: &History, operations: &[Operation]) -> Verdict {
    let mut verdict = Verdict::new("coverage");
    let mut struck: BTreeMap<&str, u64> = BTreeMap::new();
    for (_, name, phase, detail) in history.faults() {
        match phase {
            Phase::Begin | Phase::Moment => *struck.entry(name).or_default() += 1,
            Phase::Wrong => verdict.violation(name, format!("{name}: {detail}")),
            Phase::End => {}
        }
    }
    for (name, count) in &struck {
        verdict.figure(&format!("fault_{name}"), *count as f64);
    }
    cover_crash_points(&mut verdict, history);
    let count = |outcome| operations.iter().filter(|operation| operation.outcome == outcome).count() as f64;
    let ok = count(Outcome::Ok);
    verdict.figure("ok", ok);
    verdict.figure("fail", count(Outcome::Fail));
    verdict.figure("unknown", count(Outcome::Unknown));
    for operation in operations {
        if let Some(status) = operation.status {
            verdict.count(&format!("status_{status}"), 1.0);
        }
    }
    let repeated = operations.iter().filter(|operation| operation.answer == Some(Answer::Repeated));
    verdict.figure("repeated", repeated.count() as f64);
    for (name, least) in &history.header.required {
        let seen = verdict.figures.get(name).copied().unwrap_or_default();
        if seen < *least as f64 {
            verdict.cannot_tell(format!("{name} was to reach {least} and is {seen}"));
        }
    }
    if ok < history.header.least_ok as f64 {
        verdict.cannot_tell(format!("only {ok} operations succeeded, not {}", history.header.least_ok));
    }
    verdict
}

/// Counts the crash points that were hit, where the scenario is about them.
fn cover_crash_points(verdict: &mut Verdict, history: &History) {
    let name = Fault::CrashPoint.name();
    let begun = history.faults().filter(|(_, fault, phase, _)| *fault == name && *phase == Phase::Begin);
    let hit: BTreeSet<&str> = begun.filter_map(|(_, _, _, detail)| crash::point_of(detail)).collect();
    if hit.is_empty() && !history.header.required.contains_key(&format!("fault_{name}")) {
        return;
    }
    let known: BTreeSet<&str> = history.header.crash_points.iter().map(String::as_str).collect();
    verdict.figure("crash_points_hit", hit.len() as f64);
    verdict.figure("crash_points_known", known.len() as f64);
    if known.is_empty() {
        verdict.cannot_tell("the history does not say which crash points there were".to_owned());
    }
    for point in hit.difference(&known).filter(|_| !known.is_empty()) {
        verdict.violation("unknown_crash_point", format!("the nodes' build had no crash point {point}"));
    }
    let missed: Vec<&str> = known.difference(&hit).copied().collect();
    if !missed.is_empty() {
        verdict.cannot_tell(format!("no node died at {}", missed.join(", ")));
    }
}

#[cfg(test)]
mod tests {
    use super::super::Judgement;
    use super::super::testing::write;
    use super::*;
    use crate::history::Event;

    #[test]
    fn a_run_in_which_nothing_happened_does_not_pass() {
        let mut history = History::default();
        history.header.required = BTreeMap::from([("fault_kill".to_owned(), 1)]);
        assert_eq!(check(&history, &[]).judgement, Judgement::Unknown);
        let event = |name: &str, phase| Event::Fault {
            seq: 0,
            ns: 0,
            name: name.into(),
            phase,
            detail: String::new(),
        };
        history.events.push(event("kill", Phase::Moment));
        assert_eq!(check(&history, &[]).judgement, Judgement::Valid);
        history.header.least_ok = 2;
        assert_eq!(check(&history, &[write(1, "a", 1, 2)]).judgement, Judgement::Unknown);
        history.events.push(event("panic", Phase::Wrong));
        assert_eq!(check(&history, &[]).judgement, Judgement::Invalid);
    }

    #[test]
    fn every_crash_point_must_be_hit() {
        let mut history = History::default();
        assert!(!check(&history, &[]).figures.contains_key("crash_points_known"));
        // Points of another build than this one.
        let points = ["log-torn", "log-mended", "log-forgotten"];
        let required = ("fault_crash-point".to_owned(), points.len() as u64);
        history.header.required = BTreeMap::from([required]);
        history.header.crash_points = points.map(str::to_owned).to_vec();
        assert_eq!(check(&history, &[]).figures["crash_points_hit"], 0.0);
        // One point as often as there are points is not all of them.
        let died_at = |point: &str| Event::Fault {
            seq: 0,
            ns: 0,
            name: "crash-point".into(),
            phase: Phase::Begin,
            detail: format!("n1 at {point}"),
        };
        history.events = points.iter().map(|_| died_at(points[0])).collect();
        let verdict = check(&history, &[]);
        assert_eq!((verdict.judgement, verdict.figures["crash_points_hit"]), (Judgement::Unknown, 1.0));
        history.events = points.iter().map(|point| died_at(point)).collect();
        let verdict = check(&history, &[]);
        assert_eq!(verdict.judgement, Judgement::Valid);
        assert_eq!(verdict.figures["crash_points_hit"], verdict.figures["crash_points_known"]);
        history.events.push(died_at("nowhere"));
        assert_eq!(check(&history, &[]).figures["unknown_crash_point"], 1.0);
        history.header.crash_points.clear();
        assert_eq!(check(&history, &[]).judgement, Judgement::Unknown, "an older history");
    }
}
