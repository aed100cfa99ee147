//! Three nodes with three replicas of everything, writers that wait for each acknowledgement, and
//! a random node killed now and then.

use std::time::{Duration, Instant};

use anyhow::Result;
use serde_json::json;

use super::Pace;
use super::load::words;
use super::report::{Report, Row};
use crate::cluster::Cluster;
use crate::points::{DIMENSIONS, Freshness, Points};
use crate::writers::Writers;

const COLLECTION: &str = "kills";
const NODES: usize = 3;
const SHARDS: u32 = 6;
const WRITERS: u64 = 4;
/// How long a killed node stays down.
const DOWN: Duration = Duration::from_secs(2);

/// Measures acknowledged writes each second and the longest time without one.
///
/// # Errors
/// When the cluster does not recover, or an acknowledged write is lost.
pub(super) async fn run(pace: &Pace, report: &mut Report) -> Result<()> {
    let mut cluster = Cluster::of(NODES).start().await?;
    Points::of(&cluster.any(), COLLECTION).create(SHARDS, NODES as u32).await?;
    cluster.settled().await?;
    let writers = Writers::start(&cluster, COLLECTION, WRITERS);
    let started = Instant::now();
    let spacing = pace.write / (pace.kills_under_load as u32 + 1);
    for kill in 1..=pace.kills_under_load {
        let at = spacing * kill as u32;
        tokio::time::sleep(at.saturating_sub(started.elapsed())).await;
        let victim = rand::random_range(0..NODES);
        cluster.node_mut(victim).kill()?;
        tokio::time::sleep(DOWN).await;
        cluster.restart(victim).await?;
        // With a second node down before the first has caught up there would be no majority.
        cluster.settled().await?;
    }
    tokio::time::sleep(pace.write.saturating_sub(started.elapsed())).await;
    let written = writers.stop().await?;
    let (count, span) = (written.points.len(), written.span);
    let rate = count as f64 / span.as_secs_f64().max(0.001);
    let what = format!("3 nodes, 3 replicas, 6 shards, {WRITERS} sequential writers");
    let note = format!(
        "{count} acknowledged in {}, {} kills included; {DIMENSIONS} dimensions; \
         Qdrant 1.18.3 in the same test, elsewhere: 693 (strong ordering), 958 (weak)",
        words(span),
        pace.kills_under_load
    );
    report.row(Row::new(&what, format!("{rate:.0} acks/s")).goal("≥ 900 acks/s").note(note));
    let gap = format!("longest gap {}", words(written.gap_of_one));
    let note = format!(
        "of one writer, over {} kill -9 of a random node; {} of all writers together",
        pace.kills_under_load,
        words(written.gap_of_all)
    );
    report.row(Row::new(&what, gap).goal("≤ 2 s").note(note));
    let mut numbers = json!({
        "acknowledged": count,
        "seconds": span.as_secs_f64(),
        "acks_per_second": rate,
        "kills": pace.kills_under_load,
        "longest_gap_of_one_ms": written.gap_of_one.as_secs_f64() * 1000.0,
        "longest_gap_of_all_ms": written.gap_of_all.as_secs_f64() * 1000.0,
    });
    written.verify(&cluster.any(), COLLECTION, Freshness::Linearizable).await?;
    numbers["verified"] = json!(true);
    report.raw("cluster", "writers", numbers);
    cluster.finish()
}
