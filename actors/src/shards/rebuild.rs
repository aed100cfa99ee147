//! A damaged replica is made anew from another one, and a replica that has gone another way than
//! the others is found out.
//!
//! Only the state is replaced. The log and the vote of the replica are whole and hold what it has
//! promised to the group, so it stays the voter that it was: the fetched state must only reach to
//! where its own log begins, which then brings it up to date. What was damaged is kept beside
//! until the next time, for whoever wants to know.

use std::collections::BTreeMap;
use std::path::Path;
use std::time::Duration;

use shoal_proto::planted::crash_point;
use shoal_proto::{CollectionConfig, Error, ErrorCode, NodeId, ShardId};

use crate::call::{Call, Reply};
use crate::cluster::Cluster;

/// How long another node may take to tell its sums.
const SUMS_TIMEOUT: Duration = Duration::from_secs(2);
/// How long a whole state may take to come.
const FETCH_TIMEOUT: Duration = Duration::from_secs(300);
/// How many other replicas must agree with each other before a replica doubts itself.
const WITNESSES: usize = 2;

/// Replaces the state in `dir` by another replica's, which must reach to index `least`: there the
/// log here begins.
///
/// # Errors
/// Unavailable when no other replica can give its state now, disk full when there is no room for
/// it; it is tried again later.
pub(super) async fn from_another(
    cluster: &Cluster,
    id: ShardId,
    dir: &Path,
    config: &CollectionConfig,
    least: u64,
) -> Result<(), Error> {
    let others = other_replicas(cluster, id);
    if others.is_empty() {
        return Err(Error::internal(format!(
            "the only replica of shard {id} is damaged: it can only be restored from a backup"
        )));
    }
    if !cluster.is_writable() {
        return Err(Error::new(
            ErrorCode::DiskFull,
            format!(
                "shard {id} is damaged, and the disk's reserve leaves no room to make it anew: add space"
            ),
        ));
    }
    let mut reasons = Vec::new();
    for node in others {
        let fetch = tokio::time::timeout(FETCH_TIMEOUT, cluster.groups().fetch_state(id.into(), node));
        let fetched = fetch.await.unwrap_or_else(|_| {
            Err(shoal_raft::Error::Timeout { group: id.into(), reason: "the state took too long".into() })
        });
        match fetched {
            Ok((tag, index, file)) if index >= least => {
                let (dir, config) = (dir.to_owned(), config.clone());
                let replaced =
                    tokio::task::spawn_blocking(move || replace(&dir, config, &tag, &file.0)).await;
                if let Err(error) = replaced.map_err(Error::internal)?.map_err(Error::from) {
                    reasons.push(format!("node {node}: {}", error.message));
                    continue;
                }
                metrics::counter!("shoal_shard_rebuilds_total").increment(1);
                tracing::warn!(shard = id.0, from = node.0, index, "a damaged replica was made anew");
                return Ok(());
            }
            Ok((_, index, _)) => {
                reasons.push(format!("node {node} is at {index}, the log here begins after {least}"))
            }
            Err(error) => reasons.push(format!("node {node}: {error}")),
        }
    }
    Err(Error::unavailable(format!("no replica can give its state now: {}", reasons.join("; "))))
}

/// Moves what is in `dir` beside, in place of what was there from another time.
pub(super) fn set_aside(dir: &Path) -> std::io::Result<()> {
    let damaged = dir.with_extension("damaged");
    if damaged.exists() {
        std::fs::remove_dir_all(&damaged)?;
    }
    if dir.exists() {
        std::fs::rename(dir, &damaged)?;
    }
    Ok(())
}

/// Builds the new state beside the old one and exchanges them: a crash leaves one or the other.
fn replace(dir: &Path, config: CollectionConfig, tag: &[u8], file: &Path) -> shoal_engine::Result<()> {
    let fresh = dir.with_extension("fresh");
    if fresh.exists() {
        std::fs::remove_dir_all(&fresh)?;
    }
    shoal_engine::Shard::open(&fresh, config)?.install(tag, file)?;
    crash_point("rebuild-loaded");
    set_aside(dir)?;
    crash_point("rebuild-aside");
    std::fs::rename(&fresh, dir)?;
    Ok(shoal_engine::files::sync_dir(dir.parent().unwrap_or(dir))?)
}

/// Compares the sums over this replica's state with those of the others, at the latest index
/// that two of them have as well. Returns why this replica cannot be right, when the others agree
/// with each other and not with it.
pub(super) async fn diverged(cluster: &Cluster, id: ShardId, mine: &[(u64, u64)]) -> Option<String> {
    let asks = other_replicas(cluster, id).into_iter().map(|node| async move {
        match cluster.call(node, Call::StateSums { group: id.into() }, SUMS_TIMEOUT).await {
            Reply::StateSums(sums) => Some(sums.into_iter().collect()),
            _ => None,
        }
    });
    let others: Vec<BTreeMap<u64, u64>> =
        futures::future::join_all(asks).await.into_iter().flatten().collect();
    judge(mine, &others)
}

fn judge(mine: &[(u64, u64)], others: &[BTreeMap<u64, u64>]) -> Option<String> {
    let seen_by_all =
        |index: &u64| others.iter().filter(|sums| sums.contains_key(index)).count() >= WITNESSES;
    let (index, sum) = mine.iter().rev().find(|(index, _)| seen_by_all(index))?;
    let theirs: Vec<u64> = others.iter().filter_map(|sums| sums.get(index).copied()).collect();
    let agree = theirs.windows(2).all(|pair| pair[0] == pair[1]);
    (agree && theirs[0] != *sum).then(|| {
        format!(
            "at index {index} the state here has the sum {sum:016x}, and {:016x} on {} other nodes",
            theirs[0],
            theirs.len()
        )
    })
}

fn other_replicas(cluster: &Cluster, id: ShardId) -> Vec<NodeId> {
    let state = cluster.state();
    let replicas = state.shards.get(&id).map(|shard| shard.replicas.clone()).unwrap_or_default();
    replicas.into_iter().filter(|node| *node != cluster.node()).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_two_who_agree_can_say_that_one_is_wrong() {
        let sums = |pairs: &[(u64, u64)]| pairs.iter().copied().collect::<BTreeMap<u64, u64>>();
        let mine = [(256, 1), (512, 2)];
        assert_eq!(judge(&mine, &[sums(&[(512, 2)]), sums(&[(512, 2)])]), None);
        assert!(judge(&mine, &[sums(&[(512, 9)]), sums(&[(512, 9)])]).is_some());
        // Two against each other prove nothing, and neither does one alone.
        assert_eq!(judge(&mine, &[sums(&[(512, 9)]), sums(&[(512, 8)])]), None);
        assert_eq!(judge(&mine, &[sums(&[(512, 9)])]), None);
        // The latest index that two others have as well.
        assert!(judge(&mine, &[sums(&[(256, 7), (512, 2)]), sums(&[(256, 7)])]).is_some());
        assert_eq!(judge(&[], &[sums(&[(512, 2)]), sums(&[(512, 2)])]), None);
    }
}
