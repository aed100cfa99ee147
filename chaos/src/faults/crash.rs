//! Nodes that die exactly between two steps of the durability order.

use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use shoal_proto::planted::CRASH_POINTS;
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
/// When it does not die there; then it does not run.
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
    // By a signal it has no code.
    ensure!(code.is_none(), "{name} ended with {code:?} instead of dying at {point}");
    Ok(format!("{name} at {point}"))
}

/// The crash point at which a node died, by what was recorded of it; none when this build knows no
/// such point.
pub fn point_of(detail: &str) -> Option<&'static str> {
    let (_, at) = detail.split_once(" at ")?;
    CRASH_POINTS.iter().map(|(point, _)| *point).find(|point| *point == at)
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
    let output = shoal("crash-points")?.output()?;
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
        assert_eq!(point_of("n2 at somewhere"), None);
        assert_eq!(point_of("n2"), None);
    }
}
