//! A node that starts again in another zone: the others hear of it, and replicas spread over the zones.

use std::time::Duration;

use anyhow::{Context, Result, ensure};
use serde_json::json;
use shoal_tests::{Cluster, Points, Request};

/// How long a clean stop may take.
const STOP_DEADLINE: Duration = Duration::from_secs(30);
/// The place of the node that moves.
const MOVED: usize = 2;

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn replicas_spread_over_the_zone_that_a_node_comes_back_in() -> Result<()> {
    let mut cluster = Cluster::of(3).env("SHOAL_ZONE", "east").start().await?;
    Points::of(&cluster.any(), "c").create(4, 2).await?;
    cluster.rested(|spread| spread.iter().sum::<usize>() == 8 && spread.iter().all(|held| *held < 4)).await?;
    let code = cluster.node_mut(MOVED).terminate(STOP_DEADLINE).await?;
    ensure!(code == Some(0), "a clean stop has exit code {code:?}");
    cluster.node_mut(MOVED).set_env("SHOAL_ZONE", "west");
    cluster.restart(MOVED).await?;
    cluster.rested(|spread| spread.iter().sum::<usize>() == 8 && spread.contains(&4)).await?;

    let report = cluster.any().json(&Request::get("/admin/cluster/report")).await?;
    let nodes = report["nodes"].as_array().context("no nodes")?;
    let moved = nodes.iter().find(|node| node["name"] == json!("n3")).context("no n3")?;
    ensure!(moved["zone"] == json!("west"), "the others do not know of it: {moved}");
    let view = cluster.node(0).view().await?;
    let id = cluster.node(MOVED).view().await?.node.id;
    let together: Vec<_> = view.shards.iter().filter(|shard| !shard.replicas.contains(&id)).collect();
    ensure!(together.is_empty(), "these have no replica in the other zone: {together:?}");
    cluster.settled().await?;
    cluster.finish()
}
