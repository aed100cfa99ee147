//! Whether the run means anything: the faults struck, enough succeeded, and nothing happened on
//! the way that must not happen at all (a panic, a wrong exit code, replicas that stay apart).

use std::collections::BTreeMap;

use super::Verdict;
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
}
