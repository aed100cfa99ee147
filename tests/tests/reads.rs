//! Reads when a replica does not answer: another one is asked before anybody has waited long, and a node
//! that is silent costs its time-out once, and a lost shard fails a search unless its client takes a part.

use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use serde_json::{Value, json};
use shoal_tests::{Cluster, Freshness, Points, Request, point, vector};

/// How long a search may take that meets a silent replica: far below the node's own deadline of 10 s.
const HEDGED: Duration = Duration::from_secs(2);

/// The first shard of collection `c`.
async fn first_shard(cluster: &Cluster) -> Result<u64> {
    cluster.shards("c").await?.first().copied().context("no shard")
}

/// The places of the nodes that hold a shard, by their ids.
async fn holders(cluster: &Cluster, shard: u64) -> Result<Vec<usize>> {
    let view = cluster.node(0).view().await?;
    let found = view.shards.iter().find(|found| found.id == shard).context("the shard is not placed")?;
    let mut places = Vec::new();
    for id in &found.replicas {
        let name = &view.nodes.iter().find(|node| node.id == *id).context("an unknown node")?.name;
        let place = (0..cluster.len()).find(|at| cluster.node(*at).name() == name);
        places.push(place.with_context(|| format!("no node {name}"))?);
    }
    Ok(places)
}

#[tokio::test]
async fn a_node_without_replica_asks_another_one_when_the_first_is_silent() -> Result<()> {
    let mut cluster = Cluster::of(4).start().await?;
    let points = Points::of(cluster.client(0), "c");
    points.create(1, 3).await?;
    let all: Vec<Value> = (1..=20).map(|id| point(id, json!({}))).collect();
    points.upsert(&all).await?;
    cluster.rested(|_| true).await?;
    cluster.converged().await?;
    let shard = first_shard(&cluster).await?;
    let holders = holders(&cluster, shard).await?;
    ensure!(holders.len() == 3, "the shard is on {holders:?}");
    let outside = (0..4).find(|at| !holders.contains(at)).context("every node holds the shard")?;

    // The one with the lowest id: the one that was always asked, by the first read and by its hedge.
    // Any replica may answer, so that it does not matter whether it led the shard.
    cluster.node_mut(holders[0]).pause()?;
    let reader = cluster.client(outside);
    for id in 1..=20 {
        let started = Instant::now();
        let hits = Points::of(reader, "c").at(Freshness::Eventual).search(&vector(id), 1, None).await?;
        let took = started.elapsed();
        ensure!(took < HEDGED, "search {id} took {took:?} although two replicas answer");
        ensure!(hits.first().is_some_and(|hit| hit["id"] == id), "{hits:?} for {id}");
    }
    ensure!(reader.metric("shoal_hedged_reads_total").await? > 0.0, "no second replica was asked");
    // Once there is a leader that is heard, nobody waits for the silent one either.
    cluster.leader(shard).await?;
    ensure!(Points::of(reader, "c").at(Freshness::Linearizable).count(None).await? == 20, "points are gone");
    let started = Instant::now();
    Points::of(reader, "c").at(Freshness::Linearizable).search(&vector(1), 1, None).await?;
    ensure!(started.elapsed() < HEDGED, "a linearizable search took {:?}", started.elapsed());
    cluster.node_mut(holders[0]).resume()?;
    cluster.finish()
}

#[tokio::test]
async fn a_silent_node_costs_the_time_out_once() -> Result<()> {
    let mut cluster = Cluster::of(3).start().await?;
    Points::of(cluster.client(0), "c").create(1, 1).await?;
    cluster.rested(|_| true).await?;
    let shard = first_shard(&cluster).await?;
    let holder = *holders(&cluster, shard).await?.first().context("nobody holds the shard")?;
    let reader = cluster.client((holder + 1) % 3).clone();
    cluster.node_mut(holder).pause()?;
    // Over the mesh, and then over gRPC because the mesh had no answer: each may take what is left.
    let search = Request::ask("/collections/c/points/query?timeout=2", &json!({"query": vector(1)}));
    for attempt in 1..=2 {
        let started = Instant::now();
        let reply = reader.once(&search).await?;
        let took = started.elapsed();
        ensure!(reply.status == 503, "attempt {attempt}: {} {}", reply.status, reply.text());
        ensure!(took < Duration::from_millis(3200), "attempt {attempt} with a time of 2 s took {took:?}");
    }
    cluster.node_mut(holder).resume()?;
    cluster.finish()
}

#[tokio::test]
async fn a_lost_shard_fails_a_search_unless_its_client_takes_a_part() -> Result<()> {
    let mut cluster = Cluster::of(3).start().await?;
    let points = Points::of(cluster.client(0), "c");
    points.create(3, 1).await?;
    let all: Vec<Value> = (1..=60).map(|id| point(id, json!({}))).collect();
    points.upsert(&all).await?;
    cluster.rested(|_| true).await?;
    let mut places = Vec::new();
    for shard in cluster.shards("c").await? {
        places.extend(holders(&cluster, shard).await?);
    }
    ensure!(places.len() == 3, "three shards of one replica are on {places:?}");
    let victim = places[0];
    let lost = places.iter().filter(|place| **place == victim).count();
    ensure!(lost < 3, "every shard is on one node");

    let reader = cluster.client((victim + 1) % 3).clone();
    let body = json!({"query": vector(1), "limit": 60});
    let search = || Request::ask("/collections/c/points/query?timeout=2", &body);
    let whole = reader.json(&search()).await?;
    ensure!(whole["result"]["shards"] == json!({"total": 3, "ok": 3, "failed": 0}), "{whole}");
    ensure!(found(&whole)? == 60, "{} points are found", found(&whole)?);

    cluster.node_mut(victim).kill()?;
    let refused = reader.once(&search()).await?;
    ensure!(refused.status == 503, "a search without a shard: {} {}", refused.status, refused.text());
    let refused = reader.once(&search().header("x-shoal-partial", "false")).await?;
    ensure!(refused.status == 503, "a part was not asked for: {} {}", refused.status, refused.text());
    let part = reader.once(&search().header("x-shoal-partial", "true")).await?;
    ensure!(part.status == 200, "a part is refused: {} {}", part.status, part.text());
    let part = part.json()?;
    let counts = json!({"total": 3, "ok": 3 - lost, "failed": lost});
    ensure!(part["result"]["shards"] == counts, "{} instead of {counts}", part["result"]["shards"]);
    ensure!((1..60).contains(&found(&part)?), "{} points are found", found(&part)?);
    // Calls that found no session are counted: a broken mesh shows, although gRPC takes its place.
    let unreachable = reader.metric_with("shoal_mesh_calls_total", "outcome=\"unreachable\"").await?;
    ensure!(unreachable > 0.0, "calls to a node that is gone are not counted");
    cluster.finish()
}

/// How many points an answer has.
fn found(answer: &Value) -> Result<usize> {
    Ok(answer["result"]["points"].as_array().with_context(|| format!("no points: {answer}"))?.len())
}
