//! A node whose disk is gone for good, and with it the only replica of a shard: nothing is lost silently,
//! nobody else waits for it, and the cluster is made whole again without being built anew.

use std::collections::BTreeMap;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use serde_json::{Value, json};
use shoal_tests::{Cluster, Points, Request, point, wait_until, writers};

/// How long placement may take.
const DEADLINE: Duration = Duration::from_secs(90);
/// The place of the node that is lost.
const LOST: usize = 2;

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_node_with_the_only_replica_of_a_shard_is_removed_once_that_is_given_up() -> Result<()> {
    let mut cluster = Cluster::of(3).start().await?;
    let any = cluster.any_but(&[LOST]);
    let points = Points::of(&any, "c");
    points.create(3, 1).await?;
    cluster.rested(|spread| spread == [1, 1, 1]).await?;
    let expected: BTreeMap<u64, Value> = (0..300).map(|id| (id, json!({"number": id}))).collect();
    let written: Vec<Value> = expected.iter().map(|(id, payload)| point(*id, payload.clone())).collect();
    points.upsert(&written).await?;
    let view = cluster.node(0).view().await?;
    let node = cluster.node(LOST).view().await?.node.id;
    let lost =
        view.shards.iter().find(|shard| shard.replicas.contains(&node)).context("it holds a shard")?.id;
    let other = view.shards.iter().find(|shard| shard.id != lost).context("there are others")?.id;
    cluster.node_mut(LOST).kill()?;

    // Somebody is told, although no node that runs has anything of that shard.
    wait_until(DEADLINE, "the shard to be missed", || async {
        let mut missed = 0;
        for at in [0, 1] {
            let metrics = cluster.client(at).succeed(&Request::get("/metrics")).await?.text();
            missed += metrics.lines().filter(|line| *line == "shoal_shards_without_leader 1").count();
        }
        Ok((missed == 1).then_some(()))
    })
    .await?;

    // It does not go by itself, by force neither, and what would be lost is said.
    for path in ["/admin/nodes/n3", "/admin/nodes/n3?force=true"] {
        let refused = any.send(&Request::delete(path)).await?;
        let names = format!("shard {lost} of `c`");
        let says_how = refused.text().contains(&names) && refused.text().contains("shoal cluster abandon");
        ensure!(refused.status == 409 && says_how, "{path}: {} {}", refused.status, refused.text());
    }
    // Another node's drain does not wait for it.
    any.json(&Request::post("/admin/nodes/n2/drain", &json!({}))).await?;
    wait_until(DEADLINE, "n2 to be drained", || async {
        let status = any.json(&Request::get("/admin/nodes/n2/drain")).await?;
        ensure!(status["is_done"] == json!(true), "{status}");
        Ok(Some(()))
    })
    .await?;
    any.json(&Request::delete("/admin/nodes/n2/drain")).await?;

    // What lives is not given up, nor what somebody has mistyped.
    let abandon = |shard: u64, collection: &str| {
        Request::post(format!("/admin/shards/{shard}/abandon"), &json!({"collection": collection}))
    };
    let report = any.json(&Request::get("/admin/cluster/report")).await?;
    let shards = report["shards"].as_array().context("no shards")?.iter();
    let out: Vec<&Value> = shards.filter(|shard| shard["is_out_of_reach"] == json!(true)).collect();
    ensure!(out.len() == 1 && out[0]["id"] == json!(lost), "out of reach: {out:?}");
    let refused = any.send(&abandon(other, "c")).await?;
    ensure!(refused.status == 409, "a shard that lives was given up: {}", refused.text());
    let refused = any.send(&abandon(lost, "d")).await?;
    ensure!(refused.status == 404, "there is no collection d: {}", refused.text());
    any.json(&abandon(lost, "c")).await?;
    any.json(&Request::delete("/admin/nodes/n3")).await?;

    // Everything is served again; what was on the other disks is still there, and what is written stays.
    let kept =
        wait_until(DEADLINE, "every shard to answer", || async { Ok(Some(points.scroll().await?)) }).await?;
    ensure!(!kept.is_empty() && kept.len() < expected.len(), "{} of {} points", kept.len(), expected.len());
    points.upsert(&written).await?;
    writers::verify(&expected, &points).await?;
    cluster.node_mut(LOST).start()?;
    let code = cluster.node_mut(LOST).exited(Duration::from_secs(30)).await?;
    ensure!(code == Some(76), "a removed node that comes back ends with 76, not {code:?}");
    cluster.finish()
}
