//! The disk's reserve is reached: writes are refused with 507, reads and deletes go on, and
//! writes come back with the space. Of three nodes, the disk of the one that leads counts.

use std::collections::BTreeMap;
use std::time::Duration;

use anyhow::{Result, bail, ensure};
use serde_json::json;
use shoal_tests::documents::upload_request;
use shoal_tests::writers::verify;
use shoal_tests::{Cluster, Points, point, vector, wait_until};

/// More than any disk has free.
const RESERVE_BYTES: u64 = 1 << 60;
/// How long a node may take to stop.
const STOP_DEADLINE: Duration = Duration::from_secs(30);
/// How often leadership may be handed on until the wanted node has it. Two times should do.
const HANDOVERS: usize = 10;

#[tokio::test]
async fn below_the_reserve_only_writes_are_refused() -> Result<()> {
    let mut cluster = Cluster::of(1).start().await?;
    let client = cluster.client(0).clone();
    let points = Points::of(&client, "c");
    points.create(2, 1).await?;
    let mut expected = BTreeMap::new();
    for id in 1..=50 {
        points.upsert(&[point(id, json!({"n": id}))]).await?;
        expected.insert(id, json!({"n": id}));
    }
    cluster.node_mut(0).terminate(Duration::from_secs(30)).await?;
    cluster.node_mut(0).set_env("SHOAL_DISK_RESERVE", &RESERVE_BYTES.to_string());
    cluster.restart(0).await?;

    // A point that is there already, so that a write before the node has looked at its disk
    // changes nothing.
    let write = points.upsert_request(&[point(1, json!({"n": 1}))]);
    wait_until(Duration::from_secs(10), "writes to be refused", || async {
        let reply = client.once(&write).await?;
        ensure!(reply.status == 507, "a write is answered {} {}", reply.status, reply.text());
        Ok(Some(()))
    })
    .await?;
    let reply = client.once(&upload_request("a.txt", b"a file", None)).await?;
    ensure!(reply.status == 507, "an upload is answered {} {}", reply.status, reply.text());

    verify(&expected, &points).await?;
    let hits = points.search(&vector(9), 1, None).await?;
    ensure!(hits.first().is_some_and(|hit| hit["id"] == 9), "a search finds {hits:?}");
    points.delete(&[1, 2, 3]).await?;
    [1, 2, 3].iter().for_each(|id| drop(expected.remove(id)));
    verify(&expected, &points).await?;
    ensure!(client.once(&write).await?.status == 507, "a delete has let writes in");

    cluster.node_mut(0).terminate(Duration::from_secs(30)).await?;
    cluster.node_mut(0).unset_env("SHOAL_DISK_RESERVE");
    cluster.restart(0).await?;
    verify(&expected, &points).await?;
    points.upsert(&[point(1, json!({"n": 1}))]).await?;
    expected.insert(1, json!({"n": 1}));
    verify(&expected, &points).await?;
    cluster.finish()
}

/// Only the disk of the shard's leader is full. A write is refused with 507 whichever node it is
/// sent to; reads and deletes go on through the full node and the others; and as soon as a node
/// with space leads, writes go on too.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_full_disk_of_the_leader_refuses_writes_sent_to_any_node() -> Result<()> {
    // Not the first node, which has the lowest id: of equals, the highest is handed leadership.
    const FULL: usize = 2;
    let mut cluster = Cluster::of(3).start().await?;
    let client = cluster.client(0).clone();
    let points = Points::of(&client, "c");
    points.create(1, 3).await?;
    cluster.settled().await?;
    let shard = cluster.shards("c").await?[0];
    let mut expected = BTreeMap::new();
    for id in 1..=50 {
        points.upsert(&[point(id, json!({"n": id}))]).await?;
        expected.insert(id, json!({"n": id}));
    }
    cluster.node_mut(FULL).terminate(STOP_DEADLINE).await?;
    cluster.node_mut(FULL).set_env("SHOAL_DISK_RESERVE", &RESERVE_BYTES.to_string());
    cluster.restart(FULL).await?;
    cluster.settled().await?;
    lead(&mut cluster, shard, FULL).await?;

    // A point that is there already, in case that the leader has not looked at its disk yet.
    let write = points.upsert_request(&[point(1, json!({"n": 1}))]);
    for at in 0..cluster.len() {
        wait_until(Duration::from_secs(10), "writes to be refused", || async {
            let reply = cluster.client(at).once(&write).await?;
            ensure!(reply.status == 507, "node {at} answers a write {} {}", reply.status, reply.text());
            Ok(Some(()))
        })
        .await?;
    }
    for at in 0..cluster.len() {
        let points = Points::of(cluster.client(at), "c");
        verify(&expected, &points).await?;
        let hits = points.search(&vector(9), 1, None).await?;
        ensure!(hits.first().is_some_and(|hit| hit["id"] == 9), "a search on node {at} finds {hits:?}");
    }
    points.delete(&[1, 2, 3]).await?;
    [1, 2, 3].iter().for_each(|id| drop(expected.remove(id)));
    verify(&expected, &points).await?;
    ensure!(cluster.leader(shard).await? == FULL, "another node leads now, so this has shown nothing");

    // The others have room, and one of them leads when the full node stops.
    cluster.node_mut(FULL).terminate(STOP_DEADLINE).await?;
    points.upsert(&[point(1, json!({"n": 1}))]).await?;
    expected.insert(1, json!({"n": 1}));
    verify(&expected, &points).await?;
    cluster.finish()
}

/// Makes a node lead a group: whoever leads instead is stopped, hands over, and is started again.
async fn lead(cluster: &mut Cluster, group: u64, wanted: usize) -> Result<()> {
    for _ in 0..HANDOVERS {
        let leader = cluster.leader(group).await?;
        if leader == wanted {
            return Ok(());
        }
        cluster.node_mut(leader).terminate(STOP_DEADLINE).await?;
        cluster.restart(leader).await?;
        cluster.settled().await?;
    }
    bail!("node {wanted} does not lead group {group} after {HANDOVERS} handovers")
}
