//! Leaders die, stop and pause under load, and no acknowledged write is lost, none is applied
//! twice, and nobody reads what is no longer true.

use std::time::{Duration, Instant};

use anyhow::{Result, ensure};
use futures::future::try_join_all;
use serde_json::json;
use shoal_tests::{Cluster, Freshness, Points, Writers, point};

/// The longest time in which nothing may be acknowledged while a node is stopped as planned and comes back: it
/// hands its leadership over first.
const PLANNED_GAP_LIMIT: Duration = Duration::from_millis(500);

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn acknowledged_writes_survive_killed_leaders() -> Result<()> {
    let mut cluster = Cluster::of(3).start().await?;
    let any = cluster.any();
    Points::of(&any, "c").create(3, 3).await?;
    cluster.settled().await?;
    let shards = cluster.shards("c").await?;
    let writers = Writers::start(&cluster, "c", 4);
    for group in [shards[0], 0, shards[2]] {
        writers.progress(100).await?;
        let leader = cluster.leader(group).await?;
        cluster.node_mut(leader).kill()?;
        writers.progress(200).await?;
        cluster.leader(group).await?;
        if group == 0 {
            // The control group takes commands again, and a new collection takes points.
            let made = Points::of(&any, "made-meanwhile");
            made.create(2, 3).await?;
            made.upsert(&[point(1, json!({}))]).await?;
        }
        cluster.restart(leader).await?;
        cluster.settled().await?;
    }
    let written = writers.stop().await?;
    written.report("three leaders killed");
    for at in 0..cluster.len() {
        written.verify(cluster.client(at), "c", Freshness::Linearizable).await?;
    }
    cluster.converged().await?;
    for at in 0..cluster.len() {
        written.verify(cluster.client(at), "c", Freshness::Eventual).await?;
    }
    assert_eq!(Points::of(&any, "made-meanwhile").count(None).await?, 1);
    cluster.finish()
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_rolling_restart_fails_no_write() -> Result<()> {
    let mut cluster = Cluster::of(3).start().await?;
    Points::of(&cluster.any(), "c").create(3, 3).await?;
    cluster.settled().await?;
    let writers = Writers::start(&cluster, "c", 4);
    let mut steps = Vec::new();
    for at in 0..cluster.len() {
        writers.progress(100).await?;
        steps.push(Instant::now());
        let code = cluster.node_mut(at).terminate(Duration::from_secs(30)).await?;
        ensure!(code == Some(0), "a clean stop of node {at} has exit code {code:?}");
        writers.progress(100).await?;
        cluster.restart(at).await?;
        cluster.settled().await?;
    }
    writers.progress(100).await?;
    steps.push(Instant::now());
    let written = writers.stop().await?;
    written.report("rolling restart");
    for (at, step) in steps.windows(2).enumerate() {
        let gap = written.gap_within(step[0], step[1]);
        ensure!(
            gap <= PLANNED_GAP_LIMIT,
            "while node {at} was restarted nothing was acknowledged for {gap:?}"
        );
    }
    cluster.converged().await?;
    for at in 0..cluster.len() {
        written.verify(cluster.client(at), "c", Freshness::Linearizable).await?;
        written.verify(cluster.client(at), "c", Freshness::Eventual).await?;
    }
    cluster.finish()
}

#[tokio::test]
async fn a_leader_that_was_paused_answers_nothing_stale() -> Result<()> {
    let mut cluster = Cluster::of(3).start().await?;
    Points::of(&cluster.any(), "c").create(1, 3).await?;
    cluster.settled().await?;
    let shard = cluster.shards("c").await?[0];
    for round in 1..=4 {
        let paused = cluster.leader(shard).await?;
        let others = cluster.any_but(&[paused]);
        let others = Points::of(&others, "c");
        others.upsert(&[point(1, json!({"round": round, "value": "old"}))]).await?;
        cluster.node_mut(paused).pause()?;
        let new = json!({"round": round, "value": "new"});
        others.upsert(&[point(1, new.clone())]).await?;
        // It wakes up and believes that it still leads.
        cluster.node_mut(paused).resume()?;
        let woken = Points::of(cluster.client(paused), "c").at(Freshness::Linearizable);
        for found in try_join_all((0..8).map(|_| woken.get(&[1]))).await? {
            ensure!(found.get(&1) == Some(&new), "round {round}: the paused leader answers {found:?}");
        }
        cluster.settled().await?;
    }
    cluster.finish()
}
