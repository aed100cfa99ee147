//! A node that has lost its disk comes back empty under its old name and gets everything again:
//! its replicas, and the original bytes of every file that was uploaded.

use std::collections::{BTreeMap, BTreeSet};
use std::ops::Range;
use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use futures::{StreamExt, TryStreamExt, stream};
use shoal_tests::documents::{blob_files, upload};
use shoal_tests::{Client, Cluster, Freshness, Request, wait_until};

/// The node that loses its disk: the one that has created the cluster, and that must not create
/// another one when it knows nothing any more.
const WIPED: usize = 0;
/// Files uploaded before the disk is lost, and those uploaded while the node is away. Of so many,
/// one of three shards has more than a replica fetches in one go, which is 16.
const BEFORE: Range<usize> = 0..50;
const AWAY: Range<usize> = 50..60;
/// Uploads in flight at once.
const CONCURRENCY: usize = 8;
/// Size of the first file: it travels between nodes in more than one piece.
const LARGE_BYTES: usize = (2 << 20) + 12_345;
/// How long the bytes may take. A replica looks every 10 s for what it lacks.
const BLOBS_DEADLINE: Duration = Duration::from_secs(90);

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_node_with_an_empty_disk_gets_every_replica_and_every_file_back() -> Result<()> {
    let mut cluster = Cluster::of(3).start().await?;
    let mut files = upload_all(&cluster.any(), BEFORE).await?;
    cluster.settled().await?;
    cluster.converged().await?;
    let before = cluster.node(WIPED).view().await?;
    let data = cluster.node(WIPED).data_dir();
    cluster.node_mut(WIPED).kill()?;
    std::fs::remove_dir_all(&data).with_context(|| format!("empty {}", data.display()))?;
    files.extend(upload_all(&cluster.any_but(&[WIPED]), AWAY).await?);

    cluster.restart(WIPED).await?;
    cluster.settled().await?;
    cluster.converged().await?;
    let after = cluster.node(WIPED).view().await?;
    let (old, new) = (before.node.id, after.node.id);
    ensure!(after.cluster_id == before.cluster_id, "it has made a cluster of its own");
    ensure!(new != old, "the id {old} was given to another disk");
    let holds = after.shards.iter().all(|shard| shard.replicas.contains(&new));
    ensure!(holds && !after.shards.is_empty(), "it does not hold every shard: {:?}", after.shards);

    // Nobody has asked this node for a file yet: it fetches them without being asked.
    let expected: BTreeSet<String> = files.values().map(|number| hash(&content(*number))).collect();
    ensure!(expected.len() == AWAY.end, "two files have the same content");
    wait_until(BLOBS_DEADLINE, "every file to be on the new disk", || async {
        let stored = blobs(&data)?;
        let missing = expected.difference(&stored).count();
        ensure!(missing == 0, "{missing} of {} files are missing", expected.len());
        Ok(Some(()))
    })
    .await?;

    // And it needs nobody else to serve them.
    for at in (0..cluster.len()).filter(|at| *at != WIPED) {
        cluster.node_mut(at).kill()?;
    }
    for (id, number) in &files {
        let request = Freshness::Eventual.of(Request::get(format!("/v1/files/{id}/content")));
        let reply = cluster.client(WIPED).succeed(&request).await?;
        ensure!(reply.body == content(*number), "file {number} comes back changed");
    }
    cluster.finish()
}

/// Uploads files, several at a time, and returns the number of each by its id.
async fn upload_all(client: &Client, numbers: Range<usize>) -> Result<BTreeMap<String, usize>> {
    let upload = |number: usize| async move {
        let (name, bytes) = (format!("file-{number}.bin"), content(number));
        upload(client, &name, &bytes, None).await.map(|id| (id, number))
    };
    stream::iter(numbers).map(upload).buffer_unordered(CONCURRENCY).try_collect().await
}

/// The bytes of a file; no two files have the same.
fn content(number: usize) -> Vec<u8> {
    let seed = hash(&number.to_be_bytes());
    let len = if number == 0 { LARGE_BYTES } else { 1000 + number };
    seed.bytes().cycle().take(len).collect()
}

fn hash(bytes: &[u8]) -> String {
    blake3::hash(bytes).to_hex().to_string()
}

/// The hashes of the blobs in a data directory, each of which must be whole.
fn blobs(data: &Path) -> Result<BTreeSet<String>> {
    let check = |path: PathBuf| {
        let found = hash(&std::fs::read(&path)?);
        ensure!(path.ends_with(&found), "{} is damaged", path.display());
        Ok(found)
    };
    blob_files(data)?.into_iter().map(check).collect()
}
