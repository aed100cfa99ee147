//! How long it takes to get over what happens to nodes, beyond the death of one leader: a process that
//! is silent, a restart that was asked for, all nodes at once, a node that leads a hundred groups.

use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use serde_json::json;

use super::Pace;
use super::failover::{Loss, lose_leader};
use super::load::{latency_json, percentile, words};
use super::report::{Report, Row};
use crate::client::Request;
use crate::cluster::Cluster;
use crate::points::{Points, point};
use crate::wait::wait_until;
use crate::writers::Writers;

const NODES: usize = 3;
const COLLECTION: &str = "recovery";
/// Clients that write through restarts.
const WRITERS: u64 = 4;
/// How long a polite stop may take.
const STOP_DEADLINE: Duration = Duration::from_secs(30);
/// Shards that one node leads when it is killed.
const LED: usize = 100;
/// How long leaders may take to move, or to be elected.
const LEADERS_DEADLINE: Duration = Duration::from_secs(60);
/// Pause between two looks at who leads; part of what is measured.
const LOOK_EVERY: Duration = Duration::from_millis(20);

/// Measures each, in a cluster of three.
///
/// # Errors
/// When the cluster does not recover, or loses something.
pub(super) async fn run(pace: &Pace, report: &mut Report) -> Result<()> {
    let mut cluster = Cluster::of(NODES).start().await?;
    Points::of(&cluster.any(), COLLECTION).create(1, NODES as u32).await?;
    cluster.settled().await?;
    silences(&mut cluster, pace, report).await?;
    restarts(&mut cluster, pace, report).await?;
    outages(&mut cluster, pace, report).await?;
    many_groups(&mut cluster, report).await?;
    cluster.finish()
}

/// The leader's process is stopped in its tracks, and goes on when another one has taken over.
async fn silences(cluster: &mut Cluster, pace: &Pace, report: &mut Report) -> Result<()> {
    let shard = *cluster.shards(COLLECTION).await?.first().context("a collection without shard")?;
    let mut gaps = Vec::new();
    for _ in 0..pace.recoveries {
        gaps.push(lose_leader(cluster, COLLECTION, shard, Loss::Paused).await?);
    }
    row("leader SIGSTOP to the first acknowledged write", &mut gaps, "p50 ≤ 0.9 s, p99 ≤ 2 s", report);
    Ok(())
}

/// Nodes are stopped and started one after the other while clients write.
async fn restarts(cluster: &mut Cluster, pace: &Pace, report: &mut Report) -> Result<()> {
    let writers = Writers::start(cluster, COLLECTION, WRITERS);
    writers.progress(100).await?;
    let mut spans = Vec::new();
    for turn in 0..pace.recoveries {
        let at = turn % NODES;
        let from = Instant::now();
        let code = cluster.node_mut(at).terminate(STOP_DEADLINE).await?;
        ensure!(code == Some(0), "a polite stop has exit code {code:?}");
        cluster.restart(at).await?;
        cluster.settled().await?;
        spans.push((from, Instant::now()));
        writers.progress(20).await?;
    }
    let written = writers.stop().await?;
    let mut gaps: Vec<Duration> = spans.iter().map(|(from, to)| written.gap_within(*from, *to)).collect();
    row("planned restart: longest time without an acknowledged write", &mut gaps, "≤ 500 ms", report);
    // Every writer repeats what is refused: that none has given up is the other half of the goal.
    written.verify(&cluster.any(), COLLECTION, crate::points::Freshness::Linearizable).await
}

/// All nodes die at once and start again.
async fn outages(cluster: &mut Cluster, pace: &Pace, report: &mut Report) -> Result<()> {
    let mut times = Vec::new();
    for turn in 0..pace.recoveries as u64 {
        cluster.kill_all()?;
        let started = Instant::now();
        cluster.start_all().await?;
        Points::of(&cluster.any(), COLLECTION).upsert(&[point(turn, json!({"after": turn}))]).await?;
        times.push(started.elapsed());
        cluster.settled().await?;
    }
    row("all nodes killed: start to the first acknowledged write", &mut times, "≤ 15 s", report);
    Ok(())
}

/// A node that leads a hundred shards dies: until each of them has another leader.
async fn many_groups(cluster: &mut Cluster, report: &mut Report) -> Result<()> {
    let any = cluster.any();
    any.succeed(&Request::post("/admin/placement/pause", &json!({}))).await?;
    Points::of(&any, "many").create(LED as u32, NODES as u32).await?;
    cluster.settled().await?;
    let shards = cluster.shards("many").await?;
    let victim = 0;
    let name = cluster.node(victim).name().to_owned();
    wait_until(LEADERS_DEADLINE, "one node to lead all shards", || async {
        let view = cluster.node(victim).view().await?;
        let led = |shard: &u64| view.group(*shard).is_some_and(|group| group.is_leader());
        let others: Vec<u64> = shards.iter().copied().filter(|shard| !led(shard)).collect();
        for shard in &others {
            let order = Request::post(format!("/admin/shards/{shard}/leader"), &json!({"to": name}));
            any.succeed(&order).await?;
        }
        ensure!(others.is_empty(), "{} shards are led by others", others.len());
        Ok(Some(()))
    })
    .await?;
    let lost = cluster.node(victim).view().await?.node.id;
    cluster.node_mut(victim).kill()?;
    let killed = Instant::now();
    loop {
        let view = cluster.node(1).view().await?;
        let left = shards.iter().filter(|shard| {
            let leader = view.group(**shard).and_then(|group| group.leader);
            leader.is_none_or(|leader| leader == lost)
        });
        let left = left.count();
        if left == 0 {
            break;
        }
        ensure!(killed.elapsed() < LEADERS_DEADLINE, "{left} shards have no leader");
        tokio::time::sleep(LOOK_EVERY).await;
    }
    let measured = killed.elapsed();
    let what = format!("kill -9 of a node that leads {LED} groups: all led again");
    report.row(Row::new(what, words(measured)).goal("≤ 3 s").note("one kill"));
    report.raw("recovery", "hundred_groups_ms", json!(measured.as_secs_f64() * 1000.0));
    cluster.restart(victim).await?;
    any.succeed(&Request::post("/admin/placement/resume", &json!({}))).await?;
    Ok(())
}

fn row(what: &str, times: &mut [Duration], goal: &str, report: &mut Report) {
    times.sort_unstable();
    let measured = format!("p50 {}, max {}", words(percentile(times, 0.5)), words(percentile(times, 1.0)));
    report.row(Row::new(what, measured).goal(goal).note(format!("{} times", times.len())));
    report.raw("recovery", what, latency_json(times));
}
