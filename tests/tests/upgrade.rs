//! Nodes are upgraded one by one, under load: builds of different age work in one cluster, each node can go
//! back as long as not all are upgraded, and what is new comes into force after the last. `make upgrade-test`
//! builds an earlier commit and runs this.

use std::path::Path;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use serde_json::{Value, json};
use shoal_tests::binary::{binary, old_binary};
use shoal_tests::{Cluster, Points, Request, Searcher, Writers, point, say, skip, wait_until};

/// How long a node may take to stop.
const STOP_DEADLINE: Duration = Duration::from_secs(30);
/// How long a level may take to come into force.
const LEVEL_DEADLINE: Duration = Duration::from_secs(30);
/// The longest time in which no writer has an acknowledgement, while a node is stopped, started and filled up.
const GAP_LIMIT: Duration = Duration::from_millis(500);
/// Shards of the collection.
const SHARDS: u32 = 4;
/// Points that are searched for.
const NEEDLES: u64 = 20;
/// Their ids, beyond what the writers write.
const FIRST_NEEDLE: u64 = 1 << 40;
/// From this level on shards can be split.
const SPLIT_LEVEL: u64 = 2;

/// Stops a node politely and starts it again with a binary.
async fn exchange(cluster: &mut Cluster, at: usize, binary: &Path) -> Result<()> {
    let code = cluster.node_mut(at).terminate(STOP_DEADLINE).await?;
    ensure!(code == Some(0), "a clean stop of n{} has exit code {code:?}", at + 1);
    cluster.node_mut(at).set_binary(binary);
    cluster.restart(at).await?;
    cluster.settled().await
}

/// The level that is in force, by the word of one node. A build that knows no levels has the first.
async fn level(cluster: &Cluster, at: usize) -> Result<u64> {
    Ok(cluster.node(at).view().await?.level.max(1))
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn nodes_are_upgraded_one_by_one_under_load() -> Result<()> {
    let Some(old) = old_binary()? else {
        skip("nodes_are_upgraded_one_by_one_under_load", "SHOAL_OLD_BIN is not set");
        return Ok(());
    };
    let new = binary()?;
    let mut cluster = Cluster::of(3).binary(&old).start().await?;
    let any = cluster.any();
    Points::of(&any, "c").create(SHARDS, 3).await?;
    let needles: Vec<u64> = (FIRST_NEEDLE..FIRST_NEEDLE + NEEDLES).collect();
    let points: Vec<Value> = needles.iter().map(|id| point(*id, json!({"needle": id}))).collect();
    Points::of(&any, "c").upsert(&points).await?;
    cluster.settled().await?;
    let before = level(&cluster, 0).await?;
    let writers = Writers::start(&cluster, "c", 4);
    let searcher = Searcher::start(&any, "c", needles.clone());
    writers.progress(200).await?;

    let mut steps = vec![(String::from("calm"), Instant::now())];
    let upgrades = [(0, true), (0, false), (0, true), (1, true), (1, false), (1, true), (2, true)];
    for (number, (at, is_new)) in upgrades.into_iter().enumerate() {
        writers.progress(200).await?;
        let direction = if is_new { "forth" } else { "back" };
        steps.push((format!("n{} {direction}", at + 1), Instant::now()));
        exchange(&mut cluster, at, if is_new { &new } else { &old }).await?;
        steps.push((String::from("mixed"), Instant::now()));
        // The control group takes commands whoever leads it, and every node follows.
        let name = format!("made-{number}");
        let made = Points::of(&any, &name);
        made.create(1, 3).await?;
        made.upsert(&[point(1, json!({}))]).await?;
        if number + 1 == upgrades.len() {
            break;
        }
        for other in 0..cluster.len() {
            let now = level(&cluster, other).await?;
            ensure!(now == before, "n{}: level {now} is in force before all are upgraded", other + 1);
        }
        if is_new && before < SPLIT_LEVEL {
            let shard = cluster.shards("c").await?[0];
            let location = json!({"location": "http://127.0.0.1:1/x"});
            for too_new in [
                Request::post(format!("/admin/shards/{shard}/split"), &json!({})),
                Request::post("/collections/c/snapshots", &json!({})),
                Request::put("/collections/c/snapshots/recover", &location),
            ] {
                let refused = cluster.client(at).send(&too_new).await?;
                let reason = refused.text();
                let is_clear = reason.contains("upgrade ") && reason.contains("n3");
                ensure!(refused.status == 409 && is_clear, "{too_new}: {} {reason}", refused.status);
            }
        }
    }
    let told = cluster.client(0).json(&Request::get("/admin/cluster")).await?;
    let newest = told["build"]["level"].as_u64().context("a build that tells no level")?;
    wait_until(LEVEL_DEADLINE, "the level to rise", || async {
        for at in 0..cluster.len() {
            let now = level(&cluster, at).await?;
            ensure!(now == newest, "n{}: level {now} of {newest}", at + 1);
        }
        Ok(Some(()))
    })
    .await?;
    writers.progress(200).await?;
    steps.push((String::from("end"), Instant::now()));
    let written = writers.stop().await?;
    let searched = searcher.stop().await?;
    written.report("from one build to the next");
    let mut worst = Duration::ZERO;
    for pair in steps.windows(2) {
        let [(name, from), (_, to)] = pair else { continue };
        let gap = written.gap_within(*from, *to);
        let times = searched.times(*from, *to).map(|times| times.map(|time| time.as_millis()));
        worst = worst.max(gap);
        say(format!(
            "{name}: {:.1} s, longest write gap {} ms, searches p50, p99, max in ms: {times:?}",
            to.duration_since(*from).as_secs_f64(),
            gap.as_millis(),
        ));
    }

    cluster.settled().await?;
    cluster.converged().await?;
    let mut expected = written.points.clone();
    expected.extend(needles.iter().map(|id| (*id, json!({"needle": id}))));
    for at in 0..cluster.len() {
        shoal_tests::writers::verify_at(cluster.client(at), "c", &expected).await?;
        for number in 0..upgrades.len() {
            let name = format!("made-{number}");
            let count = Points::of(cluster.client(at), &name).count(None).await?;
            ensure!(count == 1, "n{}: made-{number} has {count} points", at + 1);
        }
    }
    ensure!(worst <= GAP_LIMIT, "no write was acknowledged for {} ms", worst.as_millis());
    if newest > before {
        // There is no way back any more, and the earlier build says so instead of spoiling anything.
        let code = cluster.node_mut(2).terminate(STOP_DEADLINE).await?;
        ensure!(code == Some(0), "a clean stop of n3 has exit code {code:?}");
        cluster.node_mut(2).set_binary(&old);
        cluster.node_mut(2).start()?;
        let code = cluster.node_mut(2).exited(STOP_DEADLINE).await?;
        ensure!(code == Some(1), "a build that does not know the level ends with 1, not {code:?}");
        let said = cluster.node(2).log_tail(1);
        ensure!(said.contains("build"), "it says why: {said}");
        cluster.node_mut(2).set_binary(&new);
        cluster.restart(2).await?;
        cluster.settled().await?;
    }
    cluster.finish()
}
