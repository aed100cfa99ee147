//! A follower that was away for longer than the leader keeps its log is brought up by a snapshot. Whoever is killed in
//! the middle of it, what has come is not sent again.

use std::collections::BTreeMap;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use futures::{StreamExt, TryStreamExt, stream};
use serde_json::{Value, json};
use shoal_tests::cluster::Builder;
use shoal_tests::writers::verify;
use shoal_tests::{Client, Cluster, Freshness, Points, point, say, wait_until};

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

/// How many large points there are, and how many go into one log entry.
const LARGE: u64 = 3200;
const LARGE_AT_ONCE: usize = 8;
/// Bytes a second that a node may send for moves: a snapshot of all large points takes more than ten seconds.
const PACE: &str = "1048576";
/// Bytes of a snapshot that have come when somebody is killed.
const BEFORE_KILL: f64 = 4_000_000.0;
/// Of those, what may have to be sent again: pieces that were on their way.
const ON_THEIR_WAY: f64 = 3_000_000.0;
const SENT: &str = "shoal_raft_snapshot_bytes_sent_total";
const RESUMED: &str = "shoal_raft_snapshot_resumed_bytes_total";

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_receiver_killed_in_the_middle_goes_on_where_it_was() -> Result<()> {
    let mut cluster = slow(3).start().await?;
    let any = cluster.any();
    let points = Points::of(&any, "c");
    points.create(1, 3).await?;
    cluster.settled().await?;
    let shard = cluster.shards("c").await?[0];
    let leader = cluster.leader(shard).await?;
    let follower = (leader + 1) % 3;
    cluster.node_mut(follower).kill()?;
    let expected = write_large(&points).await?;
    purged_at(&cluster, leader, shard).await?;

    let client = cluster.client(leader).clone();
    let before = client.metric(SENT).await?;
    cluster.node_mut(follower).start()?;
    let sent_first = under_way(&client, before).await? - before;
    cluster.node_mut(follower).kill()?;
    let at_kill = client.metric(SENT).await?;
    cluster.restart(follower).await?;
    cluster.settled().await?;
    cluster.converged().await?;
    let (sent_then, resumed) = (client.metric(SENT).await? - at_kill, client.metric(RESUMED).await?);
    say(format!("the receiver killed: {sent_first} bytes before, {sent_then} after it, {resumed} not again"));
    ensure!(resumed > BEFORE_KILL - ON_THEIR_WAY, "only {resumed} bytes were not sent again");
    let installed = cluster.client(follower).metric("shoal_raft_snapshots_installed_total").await?;
    ensure!(installed >= 1.0, "the follower has caught up, but not by a snapshot");
    verify(&expected, &Points::of(cluster.client(follower), "c").at(Freshness::Eventual)).await?;
    no_leftovers(&cluster).await?;
    cluster.finish()
}

/// The only voter is killed, so that nobody else can take its place: when it comes back it goes on with the copy that
/// it has on its disk.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_sender_killed_in_the_middle_goes_on_where_it_was() -> Result<()> {
    let mut cluster = slow(1).start().await?;
    let any = cluster.any();
    let points = Points::of(&any, "c");
    points.create(1, 2).await?;
    cluster.settled().await?;
    let shard = cluster.shards("c").await?[0];
    let expected = write_large(&points).await?;
    purged_at(&cluster, 0, shard).await?;

    let client = cluster.client(0).clone();
    let before = client.metric(SENT).await?;
    // The shard is given to it as soon as it is there.
    let joined = cluster.place_node()?;
    cluster.node_mut(joined).start()?;
    let sent_first = under_way(&client, before).await? - before;
    cluster.node_mut(0).kill()?;
    cluster.restart(0).await?;
    cluster.node_mut(joined).ready().await?;
    cluster.settled().await?;
    cluster.converged().await?;
    let (sent_then, resumed) = (client.metric(SENT).await?, client.metric(RESUMED).await?);
    say(format!("the sender killed: {sent_first} bytes before, {sent_then} after it, {resumed} not again"));
    ensure!(resumed > BEFORE_KILL - ON_THEIR_WAY, "only {resumed} bytes were not sent again");
    verify(&expected, &Points::of(cluster.client(joined), "c").at(Freshness::Eventual)).await?;
    no_leftovers(&cluster).await?;
    cluster.finish()
}

/// Nodes that drop their logs soon and send snapshots slowly.
fn slow(count: usize) -> Builder {
    Cluster::of(count)
        .env("SHOAL_RAFT_CHECKPOINT_ENTRIES", "200")
        .env("SHOAL_RAFT_KEEP_ENTRIES", "50")
        .env("SHOAL_MOVE_BYTES_PER_SECOND", PACE)
}

/// Writes all large points.
async fn write_large(points: &Points<'_>) -> Result<BTreeMap<u64, Value>> {
    let expected: BTreeMap<u64, Value> = (1..=LARGE).map(|id| (id, large(id))).collect();
    let all: Vec<Value> = expected.iter().map(|(id, payload)| point(*id, payload.clone())).collect();
    let writes = stream::iter(all.chunks(LARGE_AT_ONCE)).map(|some| async move {
        let written = points.upsert(some).await;
        written.map(drop)
    });
    writes.buffer_unordered(CONCURRENCY).try_collect::<()>().await?;
    Ok(expected)
}

fn large(id: u64) -> Value {
    json!({"n": id, "text": blake3::hash(&id.to_be_bytes()).to_hex().repeat(64)})
}

/// Waits until a node's log no longer reaches back to the first large points.
async fn purged_at(cluster: &Cluster, at: usize, shard: u64) -> Result<()> {
    wait_until(DEADLINE, "the log to be dropped", || async {
        let view = cluster.node(at).view().await?;
        let purged = view.group(shard).context("it has the shard")?.purged;
        ensure!(purged > 100, "the log begins after {purged}");
        Ok(Some(()))
    })
    .await
}

/// Waits until a part of a snapshot was sent. Returns the counter.
async fn under_way(client: &Client, before: f64) -> Result<f64> {
    wait_until(DEADLINE, "a part of a snapshot to be sent", || async {
        let sent = client.metric(SENT).await?;
        ensure!(sent - before >= BEFORE_KILL, "{} bytes were sent", sent - before);
        Ok(Some(sent))
    })
    .await
}

/// Waits until no node has a file of a snapshot any more.
async fn no_leftovers(cluster: &Cluster) -> Result<()> {
    wait_until(DEADLINE, "the files of snapshots to be deleted", || async {
        for at in 0..cluster.len() {
            for folder in ["incoming", "outgoing"] {
                let dir = cluster.node(at).data_dir().join(folder);
                let left = std::fs::read_dir(&dir)?.count();
                ensure!(left == 0, "{left} files are left in {}", dir.display());
            }
        }
        Ok(Some(()))
    })
    .await
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
