//! What a node spends on collections that nobody uses: each has one shard, and so one Raft group.

use std::time::Duration;

use anyhow::Result;
use serde_json::json;

use super::report::{Report, Row};
use super::{Pace, process};
use crate::cluster::Cluster;
use crate::points::Points;

/// Numbers of collections at which CPU time is read.
const COUNTS: [usize; 3] = [1, 50, 200];
/// How long the node is left alone before, so that what creating them has started is done.
const CALM: Duration = Duration::from_secs(3);

/// Measures the CPU time of a node that has nothing to do.
///
/// # Errors
/// When a collection cannot be created.
pub(super) async fn run(pace: &Pace, report: &mut Report) -> Result<()> {
    let cluster = Cluster::of(1).start().await?;
    let mut created = 0;
    for count in COUNTS {
        for number in created..count {
            Points::of(cluster.client(0), &format!("idle-{number}")).create(1, 1).await?;
        }
        created = count;
        cluster.settled().await?;
        tokio::time::sleep(CALM).await;
        let before = process::cpu_seconds(cluster.node(0))?;
        tokio::time::sleep(pace.idle).await;
        let used = process::cpu_seconds(cluster.node(0))? - before;
        let percent = used * 100.0 / pace.idle.as_secs_f64();
        let resident = process::memory_bytes(cluster.node(0), "VmRSS")?;
        let note = format!("over {} s; resident {} MiB", pace.idle.as_secs(), resident >> 20);
        let row =
            Row::new(format!("idle node, {count} empty collections"), format!("{percent:.1} % of a core"));
        let goal = if count == 200 { "< 3 % of a core" } else { "" };
        report.row(row.goal(goal).note(note));
        let numbers = json!({
            "cpu_seconds": used,
            "seconds": pace.idle.as_secs_f64(),
            "percent_of_a_core": percent,
            "resident_bytes": resident,
        });
        report.raw("idle", &format!("collections_{count}"), numbers);
    }
    cluster.finish()
}
