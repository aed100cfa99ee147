//! From the kill of a shard's leader to the first write that is acknowledged without it.

use std::collections::BTreeMap;
use std::time::{Duration, Instant};

use anyhow::{Context, Result};
use serde_json::json;

use super::Pace;
use super::load::{latency_json, percentile, words};
use super::report::{Report, Row};
use crate::cluster::Cluster;
use crate::points::{Points, point};

const COLLECTION: &str = "failover";
/// No new kill after this time; the section then reports those it has.
const LIMIT: Duration = Duration::from_secs(540);
/// Width of a bar of the histogram, in milliseconds.
const BAR_MS: u128 = 100;
/// How long a write may take with all its repetitions, and one attempt of it.
const WRITE_DEADLINE: Duration = Duration::from_secs(30);
const ATTEMPT_TIMEOUT: Duration = Duration::from_secs(3);

/// Kills leaders one after another, each in a settled cluster.
///
/// # Errors
/// When the cluster does not recover; what was measured before is reported.
pub(super) async fn run(pace: &Pace, report: &mut Report) -> Result<()> {
    let started = Instant::now();
    let mut cluster = Cluster::of(3).start().await?;
    Points::of(&cluster.any(), COLLECTION).create(1, 3).await?;
    cluster.settled().await?;
    let shard = *cluster.shards(COLLECTION).await?.first().context("a collection without shard")?;
    let mut gaps = Vec::new();
    let mut failure = None;
    while gaps.len() < pace.failovers && failure.is_none() && started.elapsed() < LIMIT {
        match lose_leader(&mut cluster, COLLECTION, shard, Loss::Killed).await {
            Ok(gap) => gaps.push(gap),
            Err(error) => failure = Some(error.context(format!("kill {}", gaps.len() + 1))),
        }
    }
    report_gaps(&gaps, pace.failovers, report);
    match failure {
        Some(error) => Err(error),
        None => cluster.finish(),
    }
}

/// How a leader is lost.
#[derive(Clone, Copy)]
pub(super) enum Loss {
    /// SIGKILL, and started again afterwards.
    Killed,
    /// SIGSTOP, and SIGCONT afterwards.
    Paused,
}

/// Takes the leader away until another has acknowledged a write, and returns how long that took.
///
/// # Errors
/// When nobody acknowledges it, or the cluster does not settle afterwards.
pub(super) async fn lose_leader(
    cluster: &mut Cluster,
    collection: &str,
    shard: u64,
    loss: Loss,
) -> Result<Duration> {
    let leader = cluster.leader(shard).await?;
    let client = cluster.any_but(&[leader]).with_limits(WRITE_DEADLINE, ATTEMPT_TIMEOUT);
    let points = Points::of(&client, collection);
    points.upsert(&[point(1, json!({"leader": "old"}))]).await?;
    let lost = Instant::now();
    match loss {
        Loss::Killed => cluster.node_mut(leader).kill()?,
        Loss::Paused => cluster.node_mut(leader).pause()?,
    }
    points.upsert(&[point(1, json!({"leader": "new"}))]).await?;
    let gap = lost.elapsed();
    match loss {
        Loss::Killed => cluster.restart(leader).await?,
        Loss::Paused => cluster.node_mut(leader).resume()?,
    }
    cluster.settled().await?;
    Ok(gap)
}

fn report_gaps(gaps: &[Duration], wanted: usize, report: &mut Report) {
    if gaps.is_empty() {
        return;
    }
    let mut sorted = gaps.to_vec();
    sorted.sort_unstable();
    let at = |part: f64| words(percentile(&sorted, part));
    let measured = format!("p50 {}, p99 {}, max {}", at(0.5), at(0.99), at(1.0));
    let note = match gaps.len() == wanted {
        true => format!("{wanted} kills: {}", histogram(gaps)),
        false => format!("only {} of {wanted} kills, for lack of time or after an error", gaps.len()),
    };
    let row = Row::new("leader kill -9 to the first acknowledged write", measured);
    report.row(row.goal("p50 ≤ 0.9 s, p99 ≤ 2 s").note(note));
    let each: Vec<f64> = gaps.iter().map(|gap| gap.as_secs_f64() * 1000.0).collect();
    report.raw("failover", "gaps_ms", json!({"each": each, "of_all": latency_json(&sorted)}));
}

/// How many gaps there are in each hundred milliseconds, in words.
fn histogram(gaps: &[Duration]) -> String {
    let mut bars: BTreeMap<u128, usize> = BTreeMap::new();
    for gap in gaps {
        *bars.entry(gap.as_millis() / BAR_MS).or_default() += 1;
    }
    let words = bars.iter().map(|(bar, count)| format!("{count} under {} ms", (bar + 1) * BAR_MS));
    words.collect::<Vec<_>>().join(", ")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_histogram_counts_every_gap_once() {
        let gaps = [301, 399, 400, 1250].map(Duration::from_millis);
        assert_eq!(histogram(&gaps), "2 under 400 ms, 1 under 500 ms, 1 under 1300 ms");
    }
}
