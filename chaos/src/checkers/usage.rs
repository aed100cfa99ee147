//! What nodes hold of the machine, and whether it grows.
//!
//! A process that is started again begins with little and fills up, so each start of a node is a
//! run of its own. A node is judged by its last run that was long enough to tell: by the slope of
//! its memory, and by its open files. How long that is the scenario says, as a window. Where it sets a
//! limit, every node must be judged: one that lived for less than the window leaves the checker unable
//! to tell, whatever the others did. Older histories do not say which run a measurement is of; in those
//! a node has one run.

use std::collections::BTreeMap;

use super::Verdict;
use crate::history::{History, Usage};

/// The part of a run that is left out at its beginning: caches fill up first.
const WARM_UP: f64 = 0.25;
/// Seconds that a run must have lasted where the scenario does not say it: over less, what the allocator
/// keeps hides a slope of percents an hour.
pub const WINDOW_SECONDS: u64 = 1200;
/// How many more files than at first a process may hold in the end.
const MORE_FILES: f64 = 16.0;

/// Measures the growth of memory and of open files, and judges both where the scenario sets a
/// limit for memory.
pub fn check(history: &History) -> Verdict {
    let mut verdict = Verdict::new("usage");
    let limit = history.header.most_growth_percent_per_hour;
    let window_seconds = history.header.usage_window_seconds.unwrap_or(WINDOW_SECONDS);
    let mut nodes: BTreeMap<usize, BTreeMap<u64, Vec<Usage>>> = BTreeMap::new();
    for usage in history.usage() {
        nodes.entry(usage.node).or_default().entry(usage.run).or_default().push(usage);
        raise(&mut verdict, "most_memory_mib", usage.rss_bytes as f64 / f64::from(1 << 20));
    }
    // A node that nobody could measure is one of them.
    for node in 0..history.header.nodes {
        nodes.entry(node).or_default();
    }
    let mut judged = 0u64;
    for (node, runs) in &nodes {
        for run in runs.values() {
            raise(&mut verdict, "longest_run_seconds", seconds_of(run).round());
        }
        let is_long = |run: &&Vec<Usage>| seconds_of(run) >= window_seconds as f64;
        let Some(run) = runs.values().rev().find(is_long) else {
            if limit.is_some() {
                let n = node + 1;
                verdict.cannot_tell(format!("n{n}: no process ran for the {window_seconds} s that it takes"));
            }
            continue;
        };
        judged += 1;
        let run = &run[(run.len() as f64 * WARM_UP) as usize..];
        let percent = growth_percent_per_hour(run);
        let (early, late) = run.split_at(run.len() / 2);
        let more_files = median_files(late) - median_files(early);
        raise(&mut verdict, "most_growth_percent_per_hour", percent);
        raise(&mut verdict, "most_files_more", more_files);
        let Some(limit) = limit else { continue };
        if percent > limit {
            let finding =
                format!("n{}: memory grows by {percent:.1} % an hour; {limit} % are allowed", node + 1);
            verdict.violation("memory_grows", finding);
        }
        if more_files > MORE_FILES {
            verdict.violation("files_grow", format!("n{}: {more_files} files more than before", node + 1));
        }
    }
    verdict.figure("nodes_judged", judged as f64);
    if judged == 0 && limit.is_some() {
        verdict.cannot_tell("no node was judged".to_owned());
    }
    verdict
}

/// Sets a figure to the largest of its values.
fn raise(verdict: &mut Verdict, name: &str, value: f64) {
    let known = verdict.figures.get(name).copied().unwrap_or(f64::MIN);
    verdict.figure(name, value.max(known));
}

fn seconds_of(run: &[Usage]) -> f64 {
    let ends = run.first().zip(run.last());
    ends.map_or(0.0, |(first, last)| last.ns.saturating_sub(first.ns) as f64 / 1e9)
}

/// How much the memory grows in an hour, in percent of its mean.
fn growth_percent_per_hour(run: &[Usage]) -> f64 {
    let growth = 3600.0 * slope(run.iter().map(|usage| (usage.ns as f64 / 1e9, usage.rss_bytes as f64)));
    let mean = mean(run.iter().map(|usage| usage.rss_bytes as f64));
    if mean > 0.0 { 100.0 * growth / mean } else { 0.0 }
}

fn median_files(run: &[Usage]) -> f64 {
    let mut files: Vec<u32> = run.iter().map(|usage| usage.files).collect();
    files.sort_unstable();
    shoal_tests::percentile(&files, 0.5).map_or(0.0, f64::from)
}

fn mean(values: impl Iterator<Item = f64> + Clone) -> f64 {
    let count = values.clone().count().max(1) as f64;
    values.sum::<f64>() / count
}

/// The slope of the line that fits best (least squares).
fn slope(points: impl Iterator<Item = (f64, f64)> + Clone) -> f64 {
    let (x, y) = (mean(points.clone().map(|(x, _)| x)), mean(points.clone().map(|(_, y)| y)));
    let above: f64 = points.clone().map(|(at, value)| (at - x) * (value - y)).sum();
    let below: f64 = points.map(|(at, _)| (at - x) * (at - x)).sum();
    if below > 0.0 { above / below } else { 0.0 }
}

#[cfg(test)]
mod tests {
    use super::super::Judgement;
    use super::*;
    use crate::history::Event;

    fn history(rss: impl Fn(u64) -> u64, files: impl Fn(u64) -> u32) -> History {
        let mut history = History::default();
        history.header.most_growth_percent_per_hour = Some(1.0);
        for minute in 0..120 {
            let (ns, rss_bytes, files) = (minute * 60_000_000_000, rss(minute), files(minute));
            history.events.push(Event::Usage { seq: minute, ns, node: 0, run: 1, rss_bytes, files });
        }
        history
    }

    #[test]
    fn steady_use_passes_and_growth_does_not() {
        let noise = |minute: u64| 500_000_000 + (minute * 7919 % 100) * 10_000;
        assert_eq!(check(&history(noise, |_| 100)).judgement, Judgement::Valid);
        // Caches fill in the first half hour.
        let warm = |minute: u64| noise(minute) + 5_000_000 * minute.min(25);
        assert_eq!(check(&history(warm, |_| 100)).judgement, Judgement::Valid);
        // 12 MB an hour.
        let leak = |minute: u64| noise(minute) + 200_000 * minute;
        assert_eq!(check(&history(leak, |_| 100)).judgement, Judgement::Invalid);
        let leaked_files = check(&history(noise, |minute| 100 + minute as u32));
        assert_eq!(leaked_files.judgement, Judgement::Invalid);
    }

    /// The node is started again at these minutes.
    fn restarted(mut history: History, at: &[u64]) -> Verdict {
        for event in &mut history.events {
            if let Event::Usage { seq: minute, run, .. } = event {
                *run = 1 + at.iter().filter(|at| **at <= *minute).count() as u64;
            }
        }
        check(&history)
    }

    #[test]
    fn each_start_of_a_process_is_judged_by_itself() {
        // Small after the start at minute 60, and larger at once: no slope of either process.
        let steps = |minute: u64| if minute < 60 { 300_000_000 } else { 500_000_000 };
        assert_eq!(check(&history(steps, |_| 100)).judgement, Judgement::Invalid);
        assert_eq!(restarted(history(steps, |_| 100), &[60]).judgement, Judgement::Valid);
        // A leak that each start hides from whoever looks at the whole.
        let leak = |minute: u64| 500_000_000 + 200_000 * (minute % 60);
        assert_eq!(restarted(history(leak, |_| 100), &[60]).judgement, Judgement::Invalid);
        let leaked_files = |minute: u64| 100 + (minute % 60) as u32;
        let verdict = restarted(history(|_| 500_000_000, leaked_files), &[60]);
        assert_eq!(verdict.figures["files_grow"], 1.0);
        // The last run is too short; the one before it is judged.
        assert_eq!(restarted(history(leak, |_| 100), &[110]).figures["nodes_judged"], 1.0);
    }

    #[test]
    fn runs_that_are_too_short_are_no_pass() {
        let every_minute: Vec<u64> = (1..120).collect();
        let verdict = restarted(history(|_| 500_000_000, |_| 100), &every_minute);
        assert_eq!((verdict.judgement, verdict.figures["nodes_judged"]), (Judgement::Unknown, 0.0));
        // One that was, and another that nobody has measured.
        let mut half = history(|_| 500_000_000, |_| 100);
        half.header.nodes = 2;
        let verdict = check(&half);
        assert_eq!((verdict.judgement, verdict.figures["nodes_judged"]), (Judgement::Unknown, 1.0));
        assert!(verdict.findings[0].starts_with("n2"), "{:?}", verdict.findings);
        let mut unlimited = history(|_| 500_000_000, |_| 100);
        unlimited.header.most_growth_percent_per_hour = None;
        let verdict = restarted(unlimited, &every_minute);
        assert_eq!((verdict.judgement, verdict.figures["nodes_judged"]), (Judgement::Valid, 0.0));
    }

    #[test]
    fn the_scenario_says_how_long_a_process_must_have_run() {
        let leak = |minute: u64| 500_000_000 + 200_000 * (minute % 60);
        // Runs of an hour less a minute.
        let mut halves = history(leak, |_| 100);
        halves.header.usage_window_seconds = Some(3600);
        assert_eq!(restarted(halves.clone(), &[60]).judgement, Judgement::Unknown);
        halves.header.usage_window_seconds = Some(3000);
        assert_eq!(restarted(halves, &[60]).judgement, Judgement::Invalid);
    }

    #[test]
    fn a_limit_without_a_measurement_is_no_pass() {
        let mut nothing = History::default();
        assert_eq!(check(&nothing).judgement, Judgement::Valid);
        nothing.header.most_growth_percent_per_hour = Some(1.0);
        assert_eq!(check(&nothing).judgement, Judgement::Unknown);
    }
}
