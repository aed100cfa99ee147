//! Whether a cluster that is asked for more than it can do still does what it can.

use super::Verdict;
use crate::history::{History, Operation, Phase};

/// The fault that this is about.
const FAULT: &str = "overload";
/// How long before it throughput is taken as the usual one: a cluster that has only just begun, with
/// nothing stored yet and no graph to build, is quicker than it will ever be again.
const USUAL_NS: u64 = 10_000_000_000;
/// The least part of the usual throughput that must be left under overload.
const LEAST_GOODPUT: f64 = 0.8;
/// How long the cluster may take to be as quick as before, in nanoseconds.
const RECOVERY_NS: u64 = 10_000_000_000;
/// How much slower than before the slowest hundredth may be then.
const MOST_SLOWER: f64 = 2.0;
/// Latencies below this count as this, in milliseconds: a few more say nothing.
const LATENCY_FLOOR_MS: f64 = 50.0;

/// Compares throughput during the fault, and latency after it, with what was before.
pub fn check(history: &History, operations: &[Operation]) -> Verdict {
    let mut verdict = Verdict::new("overload");
    let mut windows: Vec<(u64, u64)> = Vec::new();
    for (ns, name, phase, _) in history.faults().filter(|(_, name, ..)| *name == FAULT) {
        match (phase, windows.last_mut()) {
            (Phase::Begin, _) => windows.push((ns, u64::MAX)),
            (Phase::End, Some(window)) => window.1 = ns,
            _ => verdict.note(format!("{name} at {ns}: {phase:?}")),
        }
    }
    let Some((first, _)) = windows.first().copied() else {
        verdict.cannot_tell("there was no overload".to_owned());
        return verdict;
    };
    let began = operations.iter().map(|operation| operation.began_ns).min().unwrap_or_default();
    let began = began.max(first.saturating_sub(USUAL_NS));
    let ended = operations.iter().filter(|operation| operation.is_ok()).map(|operation| operation.ended_ns);
    let rate = |from: u64, to: u64| {
        let count = ended.clone().filter(|at| (from..to).contains(at)).count();
        count as f64 / (to.saturating_sub(from) as f64 / 1e9).max(1e-9)
    };
    let p99_ms = |from: u64, to: u64| {
        let within = operations
            .iter()
            .filter(|operation| operation.is_ok() && (from..to).contains(&operation.began_ns));
        let mut times: Vec<u64> = within.map(|operation| operation.ended_ns - operation.began_ns).collect();
        times.sort_unstable();
        shoal_tests::percentile(&times, 0.99).map(|ns| ns as f64 / 1e6)
    };
    let (usual, usual_p99) = (rate(began, first), p99_ms(began, first));
    verdict.figure("usual_per_second", usual);
    verdict.figure("usual_p99_ms", usual_p99.unwrap_or_default());
    let nexts = windows.iter().skip(1).map(|(from, _)| *from).chain([u64::MAX]);
    for ((from, to), next) in windows.iter().zip(nexts) {
        let goodput = rate(*from, *to);
        let known = verdict.figures.get("goodput_per_second").copied().unwrap_or(f64::MAX);
        verdict.figure("goodput_per_second", goodput.min(known));
        if goodput < LEAST_GOODPUT * usual {
            let finding = format!("{goodput:.0} a second under overload, and {usual:.0} before it");
            verdict.violation("goodput_collapsed", finding);
        }
        let (Some(after), Some(before)) = (p99_ms(to + RECOVERY_NS, next), usual_p99) else {
            verdict.cannot_tell("the run ended before the cluster had to be well again".to_owned());
            continue;
        };
        verdict.figure("recovered_p99_ms", after);
        if after > MOST_SLOWER * before.max(LATENCY_FLOOR_MS) {
            verdict.violation("not_recovered", format!("p99 {after:.0} ms after it, and {before:.0} before"));
        }
    }
    verdict
}

#[cfg(test)]
mod tests {
    use super::super::Judgement;
    use super::super::testing::write;
    use super::*;
    use crate::history::Event;

    /// Ten writes a second before and long after an overload from 10 s to 20 s, `during` a second
    /// in it, each taking `after_ms` in the end.
    fn judged(during: u64, after_ms: u64) -> Verdict {
        let mut history = History::default();
        for (ns, phase) in [(10_000_000_000, Phase::Begin), (20_000_000_000, Phase::End)] {
            history.events.push(Event::Fault {
                seq: 0,
                ns,
                name: FAULT.into(),
                phase,
                detail: String::new(),
            });
        }
        let mut operations = Vec::new();
        let mut add = |from_ms: u64, to_ms: u64, rate: u64, takes: u64| {
            for at in (from_ms..to_ms).step_by((1000 / rate) as usize) {
                operations.push(write(1, "a", at, at + takes));
            }
        };
        add(1, 10_000, 10, 20);
        add(10_000, 20_000, during, 500);
        add(30_001, 40_000, 10, after_ms);
        check(&history, &operations)
    }

    #[test]
    fn goodput_and_recovery_are_judged() {
        assert_eq!(judged(10, 20).judgement, Judgement::Valid);
        assert_eq!(judged(5, 20).judgement, Judgement::Invalid);
        assert_eq!(judged(10, 900).judgement, Judgement::Invalid);
        assert_eq!(check(&History::default(), &[write(1, "a", 1, 2)]).judgement, Judgement::Unknown);
    }
}
