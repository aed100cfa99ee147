//! Nodes that die exactly between two steps of the durability order.
//!
//! That a node died where it was to die is its own word: before it aborts it writes the point's name to its
//! log ([`crash_mark`]). A signal alone would prove nothing, since a crash anywhere else ends in one too.

use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use shoal_proto::planted::{CRASH_POINTS, crash_mark};
use shoal_tests::binary::shoal;

use crate::cluster::Cluster;

/// How long a node is away until the others' logs no longer reach back to it.
const SNAPSHOT_LAG: Duration = Duration::from_secs(7);
/// How long a node may take to come to its point.
const DEATH_LIMIT: Duration = Duration::from_secs(20);

/// Kills a node, prepares what leads it to the next of all crash points, and starts it to die
/// there. Returns what [`point_of`] reads.
///
/// # Errors
/// When it does not die there, or does not say so; then it does not run.
pub async fn at_next_point(cluster: &mut Cluster, at: usize) -> Result<String> {
    let (point, percent) = CRASH_POINTS[cluster.crash_points % CRASH_POINTS.len()];
    cluster.crash_points += 1;
    let node = &mut cluster.members[at].node;
    node.kill()?;
    let data = node.data_dir();
    if point.starts_with("rebuild-") {
        let replica = first_replica(&data)?;
        std::fs::write(replica.join("DAMAGED"), "by chaos")?;
    } else if point.starts_with("rejoin-") {
        std::fs::write(data.join("node.json"), "damaged by chaos")?;
    } else if point.starts_with("snapshot-") {
        // Behind the log of the others: only a snapshot brings it back.
        tokio::time::sleep(SNAPSHOT_LAG).await;
    }
    node.set_env("FAILPOINTS", &format!("{point}={percent}%return"));
    // The log is that of all its starts.
    let deaths_before = deaths_at(point, &node.log());
    cluster.start(at)?;
    let node = &mut cluster.members[at].node;
    let died = node.exited(DEATH_LIMIT).await;
    node.unset_env("FAILPOINTS");
    let name = node.name().to_owned();
    if died.is_err() {
        // It could still die there, at a time when nothing is done to it.
        node.kill()?;
    }
    let code = died.with_context(|| format!("{name} did not come to {point}"))?;
    let deaths = deaths_at(point, &node.log());
    ensure!(deaths > deaths_before, "{name} ended (code {code:?}) and does not say that it died at {point}");
    Ok(format!("{name} at {point}"))
}

/// How often a node has died at a point, by its log.
fn deaths_at(point: &str, log: &str) -> usize {
    let mark = crash_mark(point);
    log.lines().filter(|line| line.ends_with(&mark)).count()
}

/// The crash point at which a node died, by what was recorded of it.
pub fn point_of(detail: &str) -> Option<&str> {
    Some(detail.split_once(" at ")?.1)
}

fn first_replica(data: &Path) -> Result<PathBuf> {
    let mut replicas: Vec<_> = std::fs::read_dir(data.join("shards"))?
        .filter_map(|entry| Some(entry.ok()?.path()))
        .filter(|path| path.join("CURRENT").is_file() && path.extension().is_none())
        .collect();
    replicas.sort();
    replicas.into_iter().next().context("the node has no replica")
}

/// Whether the nodes' build has the crash points that this one knows.
///
/// # Errors
/// When it has none, or others: a point that only one of the two knows would never be hit.
pub fn probe() -> Result<()> {
    check_points(shoal("crash-points")?)
}

/// The same for a build whose command that lists them is given.
///
/// # Errors
/// As [`probe`].
pub fn check_points(mut list: Command) -> Result<()> {
    let output = list.output()?;
    ensure!(output.status.success(), "the nodes' build has none (make chaos-planted makes one that has)");
    let listed = String::from_utf8_lossy(&output.stdout);
    let are_known = listed.lines().eq(CRASH_POINTS.iter().map(|(point, _)| *point));
    ensure!(are_known, "the nodes' build has other crash points than this one");
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_point_is_read_from_what_is_recorded() {
        let (point, _) = CRASH_POINTS[3];
        assert_eq!(point_of(&format!("n2 at {point}")), Some(point));
        assert_eq!(point_of("n2"), None);
    }

    #[test]
    fn a_death_counts_where_the_node_says_that_it_died() {
        let log = format!(
            "INFO shoal: ready\nshoal: {}\nthread 'x' panicked at log-synced\nshoal: {}\n",
            crash_mark("log-synced"),
            crash_mark("log-marked"),
        );
        assert_eq!(
            ["log-synced", "log-marked", "store-flushed"].map(|point| deaths_at(point, &log)),
            [1, 1, 0]
        );
    }
}
