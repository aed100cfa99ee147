//! How a node comes to belong to a cluster that exists: found by a name in DNS, and refused under the name of
//! a node that lives.

use std::collections::BTreeMap;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use serde_json::{Value, json};
use shoal_tests::{Cluster, Freshness, Node, Points, point, wait_until, writers};

/// How long a node may try to join under a name that is taken: it hopes for 20 s that the other one ends.
const REFUSAL_DEADLINE: Duration = Duration::from_secs(60);

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_second_process_under_a_living_nodes_name_is_refused() -> Result<()> {
    let mut cluster = Cluster::of(2).start().await?;
    let any = cluster.any();
    let points = Points::of(&any, "c");
    // Each node has the only replica of a shard.
    points.create(2, 1).await?;
    let expected: BTreeMap<u64, Value> = (0..50).map(|id| (id, json!({"number": id}))).collect();
    let written: Vec<Value> = expected.iter().map(|(id, payload)| point(*id, payload.clone())).collect();
    points.upsert(&written).await?;
    let before = cluster.node(1).view().await?.node.id;

    let dir = tempfile::tempdir()?;
    let mut twin = Node::new("n2", dir.path(), &dir.path().join("no-models"), &[])?;
    twin.introduce(vec![cluster.node(0).grpc_address()], 2);
    twin.start()?;
    let code = twin.exited(REFUSAL_DEADLINE).await?;
    ensure!(code == Some(1), "it ends with {code:?}: {}", twin.log_tail(5));
    let reason = format!("a node called `n2` lives (id {before})");
    ensure!(twin.log().contains(&reason), "it does not say why: {}", twin.log_tail(5));
    // Nobody but the node itself is there to be asked.
    twin.introduce(vec![cluster.node(1).grpc_address()], 2);
    twin.start()?;
    let code = twin.exited(REFUSAL_DEADLINE).await?;
    ensure!(code == Some(1), "it ends with {code:?}: {}", twin.log_tail(5));

    ensure!(!cluster.node_mut(1).has_exited()?, "the node that lived was evicted");
    cluster.settled().await?;
    ensure!(cluster.node(1).view().await?.node.id == before, "the node has another id");
    for at in 0..2 {
        let points = Points::of(cluster.client(at), "c").at(Freshness::Linearizable);
        writers::verify(&expected, &points).await?;
    }

    // Once the other one is gone for good the name is free.
    cluster.node_mut(1).kill()?;
    twin.introduce(vec![cluster.node(0).grpc_address()], 2);
    twin.start()?;
    wait_until(REFUSAL_DEADLINE, "the name to be taken over", || async {
        let nodes = cluster.node(0).view().await?.nodes;
        let named = nodes.iter().find(|node| node.name == "n2").context("n2 is not known")?;
        Ok((named.id > before).then_some(()))
    })
    .await?;
    twin.check_panics()?;
    cluster.finish()
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_node_joins_by_a_name_in_dns() -> Result<()> {
    let mut cluster = Cluster::of(1).start().await?;
    let at = cluster.place_node()?;
    let address = cluster.node(0).grpc_address();
    let (_, port) = address.rsplit_once(':').context("an address has a port")?;
    let names = vec![format!("no-such-node.invalid:{port}"), format!("localhost:{port}")];
    cluster.node_mut(at).introduce(names, 2);
    cluster.restart(at).await?;
    cluster.settled().await?;
    cluster.finish()
}
