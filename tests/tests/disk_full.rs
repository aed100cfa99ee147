//! The disk's reserve is reached: writes are refused with 507, reads and deletes go on, and
//! writes come back with the space.

use std::collections::BTreeMap;
use std::time::Duration;

use anyhow::{Result, ensure};
use serde_json::json;
use shoal_tests::documents::upload_request;
use shoal_tests::writers::verify;
use shoal_tests::{Cluster, Points, point, vector, wait_until};

/// More than any disk has free.
const RESERVE_BYTES: u64 = 1 << 60;

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
