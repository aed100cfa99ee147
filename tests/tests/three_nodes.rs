//! Three nodes: any of them takes any request, a position token makes every node show what was
//! written, replication rises when nodes arrive, and a node may come back under a new address.

use std::collections::BTreeMap;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use serde_json::{Value, json};
use shoal_tests::writers::verify;
use shoal_tests::{Client, Cluster, Freshness, Points, Request, point, vector, wait_until};

#[tokio::test]
async fn any_node_reads_and_writes() -> Result<()> {
    let cluster = Cluster::of(3).start().await?;
    Points::of(cluster.client(2), "c").create(3, 3).await?;
    for id in 1..=30u64 {
        let writer = id as usize % 3;
        Points::of(cluster.client(writer), "c").upsert(&[point(id, json!({"n": id}))]).await?;
        // The write is acknowledged, so every node shows it from now on.
        for reader in 0..3 {
            let points = Points::of(cluster.client(reader), "c").at(Freshness::Linearizable);
            let found = points.get(&[id]).await?;
            ensure!(found.get(&id) == Some(&json!({"n": id})), "node {reader} lacks {id} of node {writer}");
            let hits = points.search(&vector(id), 1, None).await?;
            ensure!(hits.first().is_some_and(|hit| hit["id"] == id), "node {reader} finds {hits:?} for {id}");
        }
    }
    Points::of(cluster.client(0), "c").delete(&[1, 2, 3]).await?;
    for reader in 0..3 {
        // Linearizable is what a client gets that asks for nothing.
        let points = Points::of(cluster.client(reader), "c");
        ensure!(points.get(&[1, 2, 3]).await?.is_empty(), "deleted points are there on node {reader}");
        ensure!(points.count(None).await? == 27, "node {reader} counts otherwise");
    }
    cluster.finish()
}

#[tokio::test]
async fn a_position_shows_what_was_written_on_every_node() -> Result<()> {
    let cluster = Cluster::of(3).start().await?;
    Points::of(cluster.client(0), "c").create(2, 3).await?;
    cluster.settled().await?;
    for round in 1..=60u64 {
        let writer = Points::of(cluster.client(round as usize % 3), "c");
        let id = round % 5;
        let position = writer.upsert(&[point(id, json!({"round": round}))]).await?.position()?;
        for reader in 0..3 {
            let points = Points::of(cluster.client(reader), "c").at(Freshness::Session(position.clone()));
            let found = points.get(&[id]).await?;
            let seen = found.get(&id).and_then(|payload| payload["round"].as_u64());
            ensure!(seen == Some(round), "node {reader} shows round {seen:?} after round {round}");
        }
    }
    cluster.finish()
}

#[tokio::test]
async fn an_eventual_read_says_how_old_it_may_be() -> Result<()> {
    let mut cluster = Cluster::of(3).start().await?;
    Points::of(cluster.client(0), "c").create(2, 3).await?;
    Points::of(cluster.client(0), "c").upsert(&[point(1, json!({})), point(2, json!({}))]).await?;
    cluster.settled().await?;
    cluster.converged().await?;
    let age = async |client: &Client| -> Result<u64> {
        let count = Request::ask("/collections/c/points/count", &json!({"exact": true}));
        let reply = client.succeed(&Freshness::Eventual.of(count)).await?;
        ensure!(reply.json()?["result"]["count"] == 2, "{}", reply.text());
        let header = reply.header("x-shoal-staleness-ms").context("no header about staleness")?;
        header.parse().with_context(|| format!("not a number: {header}"))
    };
    // Busy or asleep, every replica has heard its leader of late.
    for _ in 0..4 {
        for at in 0..3 {
            let found = age(cluster.client(at)).await?;
            ensure!(found < 1500, "node {at} says {found} ms although nothing is wrong");
        }
        tokio::time::sleep(Duration::from_secs(1)).await;
    }
    let linearizable = Request::ask("/collections/c/points/count", &json!({"exact": true}));
    let reply = cluster.client(0).succeed(&linearizable).await?;
    ensure!(reply.header("x-shoal-staleness-ms").is_none(), "a linearizable read is not stale");
    // A node that hears nobody answers with what it has, and says how old that is.
    for at in [0, 1] {
        cluster.node_mut(at).pause()?;
    }
    tokio::time::sleep(Duration::from_secs(4)).await;
    let found = age(cluster.client(2)).await?;
    ensure!((3000..20_000).contains(&found), "node 2 says {found} ms after 4 s alone");
    for at in [0, 1] {
        cluster.node_mut(at).resume()?;
    }
    cluster.finish()
}

#[tokio::test]
async fn replication_rises_when_nodes_join() -> Result<()> {
    let mut cluster = Cluster::of(1).start().await?;
    let expected: BTreeMap<u64, Value> = (1..=300).map(|id| (id, json!({"n": id}))).collect();
    let first = Points::of(cluster.client(0), "c");
    first.create(2, 3).await?;
    let all: Vec<Value> = expected.iter().map(|(id, payload)| point(*id, payload.clone())).collect();
    for some in all.chunks(50) {
        first.upsert(some).await?;
    }
    for nodes in 2..=3 {
        let joined = cluster.add_node().await?;
        // A node that has joined serves at once, whether or not it has a replica yet.
        verify(&expected, &Points::of(cluster.client(joined), "c").at(Freshness::Linearizable)).await?;
        cluster.settled().await?;
        let view = cluster.node(joined).view().await?;
        let replicas: Vec<usize> = view.shards.iter().map(|shard| shard.replicas.len()).collect();
        ensure!(replicas.iter().all(|count| *count == nodes), "{replicas:?} replicas on {nodes} nodes");
    }
    // The new replicas are as good as the old ones: the first node is not needed any more.
    cluster.converged().await?;
    cluster.node_mut(0).kill()?;
    let others = cluster.any_but(&[0]);
    Points::of(&others, "c").upsert(&[point(301, json!({"n": 301}))]).await?;
    let mut expected = expected;
    expected.insert(301, json!({"n": 301}));
    for survivor in 1..3 {
        let points = Points::of(cluster.client(survivor), "c");
        verify(&expected, &points.clone().at(Freshness::Linearizable)).await?;
    }
    cluster.finish()
}

#[tokio::test]
async fn a_node_returns_under_a_new_address() -> Result<()> {
    let mut cluster = Cluster::of(3).start().await?;
    let any = cluster.any_but(&[2]);
    let points = Points::of(&any, "c");
    points.create(3, 3).await?;
    cluster.settled().await?;
    let before = cluster.node(2).view().await?;
    let mut expected = BTreeMap::new();
    for id in 1..=50 {
        points.upsert(&[point(id, json!({"n": id}))]).await?;
        expected.insert(id, json!({"n": id}));
    }
    cluster.node_mut(2).kill()?;
    for id in 51..=100 {
        points.upsert(&[point(id, json!({"n": id}))]).await?;
        expected.insert(id, json!({"n": id}));
    }
    // The others still know the old address; the node itself knows theirs.
    cluster.node_mut(2).readdress()?;
    cluster.restart(2).await?;

    let address = cluster.node(2).http_address();
    for other in 0..3 {
        wait_until(Duration::from_secs(30), "the new address to be known", || async {
            let view = cluster.node(other).view().await?;
            let known = view.nodes.iter().find(|node| node.id == before.node.id);
            ensure!(known.is_some_and(|node| node.http.contains(&address)), "it is {known:?}");
            ensure!(view.nodes.len() == 3, "there are {} nodes", view.nodes.len());
            Ok(Some(()))
        })
        .await?;
    }
    cluster.settled().await?;
    cluster.converged().await?;
    verify(&expected, &Points::of(cluster.client(2), "c").at(Freshness::Eventual)).await?;
    // It is a full member again: with it, and without another, there is a majority.
    cluster.node_mut(0).kill()?;
    Points::of(cluster.client(2), "c").upsert(&[point(101, json!({"n": 101}))]).await?;
    expected.insert(101, json!({"n": 101}));
    verify(&expected, &Points::of(cluster.client(1), "c").at(Freshness::Linearizable)).await?;
    cluster.finish()
}
