//! What nodes hold of the machine, and whether it grows.

use std::collections::BTreeMap;

use super::Verdict;
use crate::history::History;

/// The part of a run that is left out at its beginning: caches fill up first.
const WARM_UP: f64 = 0.25;
/// How many more files than at first a node may hold in the end.
const MORE_FILES: f64 = 16.0;

/// Memory and open files of one node: seconds, bytes, files.
type Series = Vec<(f64, f64, f64)>;

/// Measures the growth of memory and of open files, and judges both where the scenario sets a
/// limit for memory.
pub fn check(history: &History) -> Verdict {
    let mut verdict = Verdict::new("usage");
    let mut nodes: BTreeMap<usize, Series> = BTreeMap::new();
    for (ns, node, rss_bytes, files) in history.usage() {
        nodes.entry(node).or_default().push((ns as f64 / 1e9, rss_bytes as f64, f64::from(files)));
    }
    for (node, series) in &nodes {
        let series = &series[(series.len() as f64 * WARM_UP) as usize..];
        let growth = 3600.0 * slope(series.iter().map(|(at, rss, _)| (*at, *rss)));
        let mean = mean(series.iter().map(|(_, rss, _)| *rss));
        let percent = if mean > 0.0 { 100.0 * growth / mean } else { 0.0 };
        let (early, late) = series.split_at(series.len() / 2);
        let median = |series: &[(f64, f64, f64)]| {
            let mut files: Vec<f64> = series.iter().map(|(_, _, files)| *files).collect();
            files.sort_unstable_by(f64::total_cmp);
            shoal_tests::percentile(&files, 0.5).unwrap_or_default()
        };
        let more_files = median(late) - median(early);
        let largest = series.iter().map(|(_, rss, _)| *rss).fold(0.0, f64::max);
        for (name, value) in [
            ("most_memory_mib", largest / f64::from(1 << 20)),
            ("most_growth_percent_per_hour", percent),
            ("most_files_more", more_files),
        ] {
            let known = verdict.figures.get(name).copied().unwrap_or(f64::MIN);
            verdict.figure(name, value.max(known));
        }
        let Some(limit) = history.header.most_growth_percent_per_hour else { continue };
        if percent > limit {
            let finding =
                format!("n{}: memory grows by {percent:.1} % an hour; {limit} % are allowed", node + 1);
            verdict.violation("memory_grows", finding);
        }
        if more_files > MORE_FILES {
            verdict.violation("files_grow", format!("n{}: {more_files} files more than before", node + 1));
        }
    }
    if nodes.is_empty() && history.header.most_growth_percent_per_hour.is_some() {
        verdict.cannot_tell("nothing was measured".to_owned());
    }
    verdict
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
            history.events.push(Event::Usage { seq: minute, ns, node: 0, rss_bytes, files });
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

    #[test]
    fn a_limit_without_a_measurement_is_no_pass() {
        let mut nothing = History::default();
        assert_eq!(check(&nothing).judgement, Judgement::Valid);
        nothing.header.most_growth_percent_per_hour = Some(1.0);
        assert_eq!(check(&nothing).judgement, Judgement::Unknown);
    }
}
