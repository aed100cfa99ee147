//! The bytes of a deleted file are freed on every node; those of a file that is there are not.

use std::collections::BTreeSet;
use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::{Result, ensure};
use shoal_tests::documents::{blob_files, upload};
use shoal_tests::{Cluster, Request, wait_until};

/// How long a blob is kept that no file names, in seconds.
const GRACE: &str = "3";
const SWEPT_DEADLINE: Duration = Duration::from_secs(40);

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_deleted_files_bytes_are_freed_on_every_node() -> Result<()> {
    let cluster = Cluster::of(3).env("SHOAL_BLOB_GRACE_SECONDS", GRACE).start().await?;
    let client = cluster.any();
    let kept = upload(&client, "kept.txt", b"these bytes are needed", None).await?;
    let gone = upload(&client, "gone.txt", b"these bytes are not", None).await?;
    // The same bytes under another name: they are needed as long as one of the two is there.
    let twin = upload(&client, "twin.txt", b"these bytes are needed", None).await?;
    let (needed, freed) = (hash(b"these bytes are needed"), hash(b"these bytes are not"));
    client.succeed(&Request::delete(format!("/v1/files/{gone}"))).await?;
    client.succeed(&Request::delete(format!("/v1/files/{twin}"))).await?;
    wait_until(SWEPT_DEADLINE, "the deleted file's bytes to be freed", || async {
        for at in 0..cluster.len() {
            let found = blobs(&cluster.node(at).data_dir())?;
            ensure!(!found.contains(&freed), "node {at} still has them");
        }
        Ok(Some(()))
    })
    .await?;
    // Long enough for a sweep that takes too much.
    tokio::time::sleep(Duration::from_secs(8)).await;
    for at in 0..cluster.len() {
        ensure!(blobs(&cluster.node(at).data_dir())?.contains(&needed), "node {at} has lost needed bytes");
        let reply = cluster.client(at).succeed(&Request::get(format!("/v1/files/{kept}/content"))).await?;
        ensure!(reply.body == b"these bytes are needed", "node {at} serves something else");
    }
    cluster.finish()
}

fn hash(bytes: &[u8]) -> String {
    blake3::hash(bytes).to_hex().to_string()
}

/// The names of the blobs in a data directory.
fn blobs(data: &Path) -> Result<BTreeSet<String>> {
    let name = |path: PathBuf| path.file_name().unwrap_or_default().to_string_lossy().into_owned();
    Ok(blob_files(data)?.into_iter().map(name).collect())
}
