//! How long nothing was acknowledged.

use super::Verdict;
use crate::history::{History, Operation};

/// Measures the gaps between acknowledged writes, and between answered reads, and judges the
/// longest gap of writes where the scenario sets a limit.
pub fn check(history: &History, operations: &[Operation]) -> Verdict {
    let mut verdict = Verdict::new("availability");
    for (what, is_write) in [("write", true), ("read", false)] {
        let mut ends: Vec<u64> = operations
            .iter()
            .filter(|operation| operation.is_ok() && operation.call.is_write() == is_write)
            .map(|operation| operation.ended_ns)
            .collect();
        // An outage at the beginning or at the end is one too.
        let asked = operations.iter().filter(|operation| operation.call.is_write() == is_write);
        let (first, last) =
            asked.fold((u64::MAX, 0), |(first, last), one| (first.min(one.began_ns), last.max(one.began_ns)));
        if last > first {
            ends.extend([first, last]);
        }
        ends.sort_unstable();
        let mut gaps: Vec<(u64, u64)> = ends.windows(2).map(|pair| (pair[1] - pair[0], pair[0])).collect();
        gaps.sort_unstable();
        let Some((longest, at)) = gaps.last().copied() else { continue };
        let ms = longest as f64 / 1e6;
        verdict.figure(&format!("longest_{what}_gap_ms"), ms);
        let span = ends.last().unwrap_or(&0) - ends.first().unwrap_or(&0);
        verdict.figure(&format!("{what}s_per_second"), ends.len() as f64 / (span as f64 / 1e9).max(1e-9));
        if let Some(limit) = history.header.longest_gap_ms.filter(|limit| is_write && ms > *limit as f64) {
            let at = at as f64 / 1e9;
            verdict.violation(
                "too_long",
                format!("no write was acknowledged for {ms:.0} ms after {at:.1} s; {limit} ms are allowed"),
            );
        }
    }
    let mut latencies: Vec<u64> = operations
        .iter()
        .filter(|operation| operation.is_ok() && operation.call.is_write())
        .map(|operation| operation.ended_ns - operation.began_ns)
        .collect();
    latencies.sort_unstable();
    for (name, share) in [("write_p50_ms", 0.5), ("write_p99_ms", 0.99), ("write_max_ms", 1.0)] {
        if let Some(latency) = shoal_tests::percentile(&latencies, share) {
            verdict.figure(name, latency as f64 / 1e6);
        }
    }
    verdict
}

#[cfg(test)]
mod tests {
    use super::super::Judgement;
    use super::super::testing::write;
    use super::*;

    #[test]
    fn a_gap_beyond_the_limit_is_caught() {
        let mut history = History::default();
        let operations = [write(1, "a", 1, 2), write(1, "b", 3, 1002)];
        assert_eq!(check(&history, &operations).figures["longest_write_gap_ms"], 999.0);
        let ends_badly = [write(1, "a", 1, 2), write(1, "b", 3, 4), write(1, "c", 2004, 0)];
        assert_eq!(check(&history, &ends_badly).figures["longest_write_gap_ms"], 2000.0);
        history.header.longest_gap_ms = Some(998);
        assert_eq!(check(&history, &operations).judgement, Judgement::Invalid);
        history.header.longest_gap_ms = Some(1000);
        assert_eq!(check(&history, &operations).judgement, Judgement::Valid);
    }
}
