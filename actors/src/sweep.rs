//! The sweep: frees blobs that no file names any more.
//!
//! A blob is durable before the log entry that names it, so one that is not named yet may be on
//! its way into the log: only blobs that are old enough are looked at. A node that holds a
//! replica asks the shard at the linearizable level, so that a replica that lags does not take a
//! new file's blob for nobody's; documents that are not parsed yet name their blobs as well. What
//! lies here of a shard that this node holds no replica of (it took the upload for others) goes.
//! Nothing is deleted while the control group does not answer.

use std::collections::BTreeSet;
use std::time::{Duration, Instant};

use shoal_engine::command::{Answer, DocumentState, Read};
use shoal_proto::{BlobHash, Error, ShardId};
use shoal_raft::cluster::ClusterState;

use crate::blobs::BlobStore;
use crate::cluster::{Cluster, ReadOptions};

/// How long one shard may take to say which blobs its files name.
const ASK_TIMEOUT: Duration = Duration::from_secs(10);
/// The shortest pause between two sweeps.
const MIN_PAUSE: Duration = Duration::from_secs(1);

/// Sweeps for as long as the process runs: blobs older than `age`, several times in that time.
pub(crate) fn keep_sweeping(cluster: Cluster, blobs: BlobStore, age: Duration) {
    tokio::spawn(async move {
        loop {
            tokio::time::sleep((age / 4).max(MIN_PAUSE)).await;
            for shard in blobs.shards().unwrap_or_default() {
                match sweep(&cluster, &blobs, shard, age).await {
                    Ok(0) => {}
                    Ok(freed) => tracing::info!(shard = shard.0, freed, "unreferenced blobs were deleted"),
                    Err(error) => {
                        tracing::debug!(shard = shard.0, %error, "a shard's blobs will be swept later");
                    }
                }
            }
        }
    });
}

async fn sweep(cluster: &Cluster, blobs: &BlobStore, shard: ShardId, age: Duration) -> Result<usize, Error> {
    let old = {
        let blobs = blobs.clone();
        let listed = tokio::task::spawn_blocking(move || blobs.older_than(shard, age)).await;
        listed.map_err(Error::internal)?.map_err(Error::internal)?
    };
    if old.is_empty() {
        return Ok(0);
    }
    let state = cluster.fresh_state(Instant::now() + ASK_TIMEOUT).await?;
    let is_replica = state.shards.get(&shard).is_some_and(|shard| shard.replicas.contains(&cluster.node()));
    let mut named = BTreeSet::new();
    if is_replica || cluster.local_shard(shard).is_some() {
        named = files(cluster, shard).await?;
        named.extend(documents_in_progress(cluster, &state).await?);
    }
    let unnamed: Vec<BlobHash> = old.into_iter().filter(|hash| !named.contains(hash)).collect();
    let blobs = blobs.clone();
    let swept = tokio::task::spawn_blocking(move || {
        unnamed.into_iter().try_fold(0, |freed, hash| {
            let is_freed = blobs.delete_older_than(shard, hash, age)?;
            Ok::<usize, std::io::Error>(freed + usize::from(is_freed))
        })
    });
    swept.await.map_err(Error::internal)?.map_err(Error::internal)
}

/// The blobs that a shard's files name.
async fn files(cluster: &Cluster, shard: ShardId) -> Result<BTreeSet<BlobHash>, Error> {
    match ask(cluster, shard, Read::ListFiles).await? {
        Answer::Files(files) => Ok(files.into_iter().map(|file| file.blob).collect()),
        _ => Err(Error::internal("a shard did not answer with files")),
    }
}

/// The blobs of documents that are not parsed yet: a file's record may have been replaced or
/// deleted since they were accepted.
async fn documents_in_progress(cluster: &Cluster, state: &ClusterState) -> Result<BTreeSet<BlobHash>, Error> {
    let mut blobs = BTreeSet::new();
    for collection in state.collections.values().filter(|collection| collection.config.embedder.is_some()) {
        for shard in &collection.shards {
            let question = Read::ListDocuments(Some(DocumentState::InProgress));
            if let Answer::Documents(documents) = ask(cluster, *shard, question).await? {
                blobs.extend(documents.into_iter().map(|document| document.blob));
            }
        }
    }
    Ok(blobs)
}

async fn ask(cluster: &Cluster, shard: ShardId, question: Read) -> Result<Answer, Error> {
    let options = ReadOptions::linearizable(Instant::now() + ASK_TIMEOUT);
    Ok(cluster.read(shard, question, &options).await?.0)
}
