//! Collections that nobody uses: their groups stop their timers, and are there at once when a
//! write comes or the node that leads them dies.

use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use serde_json::json;
use shoal_tests::{Cluster, Freshness, Points, Request, point, wait_until};

const COLLECTIONS: usize = 12;
/// How long the groups may take to fall asleep once nothing is written.
const ASLEEP_DEADLINE: Duration = Duration::from_secs(30);
/// How long a write to a group whose leader has died in its sleep may take.
const FAILOVER_LIMIT: Duration = Duration::from_secs(4);

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn groups_that_sleep_wake_for_a_write_and_for_the_death_of_their_leader() -> Result<()> {
    let mut cluster = Cluster::of(3).start().await?;
    for number in 0..COLLECTIONS {
        Points::of(&cluster.any(), &name(number)).create(1, 3).await?;
        Points::of(&cluster.any(), &name(number)).upsert(&[point(1, json!({"of": number}))]).await?;
    }
    cluster.settled().await?;
    all_asleep(&cluster, &[0, 1, 2]).await?;

    // A write to one wakes that one; it falls asleep again.
    for at in 0..cluster.len() {
        let points = name(at);
        Points::of(cluster.client(at), &points).upsert(&[point(2, json!({"of": at}))]).await?;
        let found = Points::of(cluster.client((at + 1) % 3), &points).get(&[1, 2]).await?;
        ensure!(found.len() == 2, "a linearizable read on another node sees the write: {found:?}");
    }
    all_asleep(&cluster, &[0, 1, 2]).await?;

    // The node that leads most of them dies in its sleep.
    let leaders = leaders_of(&cluster).await?;
    let victim =
        (0..3).max_by_key(|at| leaders.iter().filter(|leader| *leader == at).count()).context("three")?;
    let led: Vec<usize> = (0..COLLECTIONS).filter(|number| leaders[*number] == victim).collect();
    ensure!(!led.is_empty(), "nobody leads anything");
    cluster.node_mut(victim).kill()?;
    let killed = Instant::now();
    let client = cluster.any_but(&[victim]);
    for number in &led {
        let points = name(*number);
        Points::of(&client, &points).upsert(&[point(3, json!({"of": number}))]).await?;
    }
    let gap = killed.elapsed();
    eprintln!("{} groups that slept under a node that died were written to after {gap:?}", led.len());
    ensure!(gap < FAILOVER_LIMIT, "it took {gap:?}");
    for number in &led {
        let points = name(*number);
        let found = Points::of(&client, &points).at(Freshness::Linearizable).get(&[1, 3]).await?;
        ensure!(found.len() == 2, "{points} has lost something: {found:?}");
    }
    cluster.restart(victim).await?;
    cluster.settled().await?;
    all_asleep(&cluster, &[0, 1, 2]).await?;

    // A node that starts again takes nothing from leaders that sleep and live.
    let before = leaders_of(&cluster).await?;
    let follower =
        (0..3).min_by_key(|at| before.iter().filter(|leader| *leader == at).count()).context("three")?;
    cluster.node_mut(follower).kill()?;
    cluster.restart(follower).await?;
    cluster.settled().await?;
    all_asleep(&cluster, &[0, 1, 2]).await?;
    for (number, (was, is)) in before.iter().zip(leaders_of(&cluster).await?).enumerate() {
        ensure!(*was == follower || *was == is, "{} was led by {was}, is led by {is}", name(number));
    }
    cluster.finish()
}

fn name(number: usize) -> String {
    format!("quiet-{number}")
}

async fn leaders_of(cluster: &Cluster) -> Result<Vec<usize>> {
    let mut leaders = Vec::new();
    for number in 0..COLLECTIONS {
        let shard = *cluster.shards(&name(number)).await?.first().context("a shard")?;
        leaders.push(cluster.leader(shard).await?);
    }
    Ok(leaders)
}

/// Waits until every group but the control group sleeps on these nodes.
async fn all_asleep(cluster: &Cluster, nodes: &[usize]) -> Result<()> {
    wait_until(ASLEEP_DEADLINE, "all groups to sleep", || async {
        for at in nodes {
            let text = cluster.client(*at).succeed(&Request::get("/metrics")).await?.text();
            let line = text.lines().find_map(|line| line.strip_prefix("shoal_raft_groups_asleep "));
            let asleep: f64 = line.context("no metric shoal_raft_groups_asleep")?.parse()?;
            ensure!(asleep as usize >= COLLECTIONS, "{asleep} groups sleep on node {at}");
        }
        Ok(Some(()))
    })
    .await
}
