//! A follower that was away for longer than the leader keeps its log is brought up by a snapshot.

use std::collections::BTreeMap;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use futures::{StreamExt, TryStreamExt, stream};
use serde_json::{Value, json};
use shoal_tests::writers::verify;
use shoal_tests::{Cluster, Freshness, Points, point, say, wait_until};

/// Writes in flight at once.
const CONCURRENCY: usize = 16;
/// How long the leader may take to drop its log, and the follower to catch up.
const DEADLINE: Duration = Duration::from_secs(90);

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_follower_far_behind_catches_up_by_snapshot() -> Result<()> {
    let settings =
        Cluster::of(3).env("SHOAL_RAFT_CHECKPOINT_ENTRIES", "200").env("SHOAL_RAFT_KEEP_ENTRIES", "50");
    let mut cluster = settings.start().await?;
    let any = cluster.any();
    let points = Points::of(&any, "c");
    points.create(1, 3).await?;
    cluster.settled().await?;
    let shard = cluster.shards("c").await?[0];
    let mut expected = BTreeMap::new();
    write(&points, &mut expected, 1..=100, "before").await?;
    cluster.converged().await?;

    let leader = cluster.leader(shard).await?;
    let follower = (leader + 1) % 3;
    let view = cluster.node(follower).view().await?;
    let known = view.group(shard).context("the follower has the shard")?.last_index;
    cluster.node_mut(follower).kill()?;
    // New points, points written over, and points that go: a snapshot must carry all three.
    write(&points, &mut expected, 101..=2600, "while away").await?;
    write(&points, &mut expected, 1..=50, "written over").await?;
    for ids in [[51, 52, 53], [200, 300, 400]] {
        points.delete(&ids).await?;
        ids.iter().for_each(|id| drop(expected.remove(id)));
    }
    let purged = wait_until(DEADLINE, "the leader to drop what the follower lacks", || async {
        let view = cluster.node(leader).view().await?;
        let purged = view.group(shard).context("the leader has the shard")?.purged;
        ensure!(purged > known, "its log begins after {purged}, and the follower knows {known}");
        Ok(Some(purged))
    })
    .await?;

    cluster.restart(follower).await?;
    cluster.settled().await?;
    cluster.converged().await?;
    let client = cluster.client(follower).clone();
    let installed = client.metric("shoal_raft_snapshots_installed_total").await?;
    say(format!("the follower knew {known}, the log began after {purged}: {installed} snapshots installed"));
    ensure!(installed >= 1.0, "the follower has caught up, but not by a snapshot");
    let restored = Points::of(&client, "c").at(Freshness::Eventual);
    verify(&expected, &restored).await?;

    // It goes on from there, a restart keeps it, and it needs nobody else to read it.
    write(&points, &mut expected, 3001..=3100, "after").await?;
    cluster.converged().await?;
    for at in 0..3 {
        cluster.node_mut(at).kill()?;
    }
    cluster.start_all().await?;
    cluster.settled().await?;
    cluster.converged().await?;
    for at in (0..3).filter(|at| *at != follower) {
        cluster.node_mut(at).kill()?;
    }
    verify(&expected, &restored).await?;
    cluster.finish()
}

/// Writes points one by one, which makes as many log entries, several at a time.
async fn write(
    points: &Points<'_>,
    expected: &mut BTreeMap<u64, Value>,
    ids: std::ops::RangeInclusive<u64>,
    when: &str,
) -> Result<()> {
    let writes = stream::iter(ids.clone()).map(|id| async move {
        let written = points.upsert(&[point(id, payload(id, when))]).await;
        written.map(drop)
    });
    writes.buffer_unordered(CONCURRENCY).try_collect::<()>().await?;
    expected.extend(ids.map(|id| (id, payload(id, when))));
    Ok(())
}

fn payload(id: u64, when: &str) -> Value {
    json!({"n": id, "when": when})
}
