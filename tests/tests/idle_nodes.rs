//! Idle nodes help a busy one: what is ingested on one node is parsed and embedded on all of them, by
//! calls over the actor mesh that are counted.

use std::time::Duration;

use anyhow::{Context, Result, ensure};
use futures::{StreamExt, TryStreamExt, stream};
use serde_json::json;
use shoal_tests::{Cluster, Request, Store, models, skip};

/// More than one node takes up at once.
const DOCUMENTS: usize = 40;
/// Uploads in flight at once.
const CONCURRENCY: usize = 8;
/// How long they may take.
const DEADLINE: Duration = Duration::from_secs(240);

/// The sum of a metric over the nodes, of the samples that have this label.
async fn sum(cluster: &Cluster, metric: &str, label: &str) -> Result<f64> {
    let mut sum = 0.0;
    for at in 0..cluster.len() {
        sum += cluster.client(at).metric_with(metric, label).await?;
    }
    Ok(sum)
}

fn text(number: usize) -> String {
    (0..12).map(|line| format!("Line {line} of ledger {number} tells of {}.\n", number * 31 + line)).collect()
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn parsers_and_embedders_of_idle_nodes_take_work_of_a_busy_one() -> Result<()> {
    if models().is_none() {
        skip("parsers_and_embedders_of_idle_nodes_take_work_of_a_busy_one", "there are no models");
        return Ok(());
    }
    // One parser a node, so that a few documents are more than one node can do on any machine.
    let settings = tempfile::NamedTempFile::new()?;
    std::fs::write(settings.path(), "parsers = 1\n")?;
    let path = settings.path().to_str().context("a path that is no text")?;
    let cluster = Cluster::of(3).env("SHOAL_CONFIG", path).start().await?;
    let client = cluster.any();
    // All of its documents are ingested where its one shard is led.
    let body = json!({"name": "pile", "shard_number": 1});
    let created = client.json(&Request::post("/v1/vector_stores", &body)).await?;
    let store = Store { id: created["id"].as_str().context("a store without id")?.to_owned() };
    cluster.settled().await?;
    let add = |number: usize| {
        let (client, store) = (&client, &store);
        async move { store.add(client, &format!("ledger-{number}.txt"), &text(number), json!({})).await }
    };
    let files: Vec<String> = stream::iter(0..DOCUMENTS).map(add).buffered(CONCURRENCY).try_collect().await?;
    store.completed(&client, &files, DEADLINE).await?;

    for kind in ["parse", "embed"] {
        let label = format!("kind=\"{kind}\"");
        let done = sum(&cluster, "shoal_remote_work_total", &label).await?;
        ensure!(done > 0.0, "no node did any {kind} of another one");
        let asked = sum(&cluster, "shoal_mesh_calls_total", &label).await?;
        ensure!(asked >= done, "{asked} calls to {kind} were counted, and {done} were done");
    }
    let answered = sum(&cluster, "shoal_mesh_calls_total", "outcome=\"answered\"").await?;
    ensure!(answered > 0.0, "nothing went over the mesh");

    let body = json!({"query": "ledger 7", "max_num_results": 3});
    let path = format!("/v1/vector_stores/{}/search", store.id);
    let found = client.json(&Request::ask(path, &body)).await?;
    ensure!(found["shards"] == json!({"total": 1, "ok": 1, "failed": 0}), "{}", found["shards"]);
    cluster.finish()
}
