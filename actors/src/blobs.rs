//! Original bytes, content-addressed by BLAKE3, one folder per shard replica.
//!
//! An upload is spooled to a file, hashed on the way, synced, and renamed to its hash: a blob
//! is there whole and durable or not at all. [`replicate`] makes a blob durable on a majority
//! of a shard's replicas *before* the log entry that names it is proposed. A replica that
//! lacks one fetches it from another and checks the hash of what it got: when somebody waits for the bytes
//! ([`fetch`]), or for a copy of its own ([`copy_here`]), for which nobody sends faster than moves may. A move
//! that is interrupted goes on blob by blob: what is here whole is not sent again.

use std::collections::BTreeSet;
use std::io;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use bytes::Bytes;
use futures::Stream;
use parking_lot::Mutex;
use shoal_proto::peer::{GetBlobRequest, Piece};
use shoal_proto::{BlobHash, DocumentId, Error, ErrorCode, NodeId, ShardId, codec};
use shoal_raft::Lane;
use shoal_raft::cluster::ClusterState;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio_stream::StreamExt;

use crate::FILES_COLLECTION;
use crate::cluster::Cluster;

/// Bytes in one piece of a blob on its way between nodes.
const PIECE_BYTES: usize = 1 << 20;

/// The blobs on this node's disk. Cheap to clone.
#[derive(Clone)]
pub struct BlobStore {
    dir: Arc<PathBuf>,
    /// Shards whose replicas are being deleted here, by tasks that may outlive whoever has begun them.
    leaving: Arc<Mutex<BTreeSet<ShardId>>>,
}

/// Bytes on their way into a blob.
pub struct Upload {
    path: PathBuf,
    file: tokio::fs::File,
    hasher: blake3::Hasher,
    bytes: u64,
    is_done: bool,
}

impl BlobStore {
    /// Opens the store in a directory; uploads that a crash left behind are deleted.
    pub fn open(dir: &Path) -> io::Result<BlobStore> {
        let spool = dir.join("spool");
        if spool.exists() {
            std::fs::remove_dir_all(&spool)?;
        }
        std::fs::create_dir_all(&spool)?;
        Ok(BlobStore { dir: Arc::new(dir.to_owned()), leaving: Arc::default() })
    }

    /// The shards whose replicas are being deleted here: nothing is taken in for them until that is over, since
    /// all their blobs go.
    pub(crate) fn leaving(&self) -> &Mutex<BTreeSet<ShardId>> {
        &self.leaving
    }

    fn path(&self, shard: ShardId, hash: BlobHash) -> PathBuf {
        let name = hash.to_string();
        self.dir.join(shard.to_string()).join(&name[..2]).join(name)
    }

    /// Whether a blob is here.
    pub fn contains(&self, shard: ShardId, hash: BlobHash) -> bool {
        self.path(shard, hash).exists()
    }

    /// Begins an upload.
    pub async fn begin(&self) -> io::Result<Upload> {
        static NEXT: AtomicU64 = AtomicU64::new(0);
        let path = self.dir.join("spool").join(format!("{:016x}", NEXT.fetch_add(1, Ordering::Relaxed)));
        let file = tokio::fs::File::create_new(&path).await?;
        Ok(Upload { path, file, hasher: blake3::Hasher::new(), bytes: 0, is_done: false })
    }

    /// Reads a whole blob and checks its hash.
    pub async fn read(&self, shard: ShardId, hash: BlobHash) -> io::Result<Vec<u8>> {
        let bytes = tokio::fs::read(self.path(shard, hash)).await?;
        if *blake3::hash(&bytes).as_bytes() != hash.0 {
            return Err(io::Error::new(io::ErrorKind::InvalidData, format!("blob {hash} is damaged")));
        }
        Ok(bytes)
    }

    /// Reads a blob in pieces. The reader checks the hash.
    pub async fn read_stream(
        &self,
        shard: ShardId,
        hash: BlobHash,
    ) -> io::Result<impl Stream<Item = io::Result<Bytes>> + Send + use<>> {
        let file = tokio::fs::File::open(self.path(shard, hash)).await?;
        Ok(futures::stream::try_unfold(file, |mut file| async move {
            let mut piece = vec![0; PIECE_BYTES];
            let len = file.read(&mut piece).await?;
            piece.truncate(len);
            Ok((len > 0).then(|| (Bytes::from(piece), file)))
        }))
    }

    /// Deletes the blobs of a shard replica that has left this node.
    pub fn drop_shard(&self, shard: ShardId) -> io::Result<()> {
        match std::fs::remove_dir_all(self.dir.join(shard.to_string())) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => Err(error),
            _ => Ok(()),
        }
    }

    /// The shards that have blobs here.
    pub(crate) fn shards(&self) -> io::Result<Vec<ShardId>> {
        let mut shards = Vec::new();
        for entry in std::fs::read_dir(self.dir.as_path())? {
            let name = entry?.file_name();
            shards.extend(name.to_str().and_then(|name| name.parse().ok()).map(ShardId));
        }
        Ok(shards)
    }

    /// A shard's blobs that were written longer ago than `age`.
    pub(crate) fn older_than(&self, shard: ShardId, age: Duration) -> io::Result<Vec<BlobHash>> {
        let mut found = Vec::new();
        for folder in std::fs::read_dir(self.dir.join(shard.to_string()))? {
            for entry in std::fs::read_dir(folder?.path())? {
                let entry = entry?;
                // A crash in the middle of a deletion has left it.
                if entry.path().extension().is_some_and(|extension| extension == "swept") {
                    std::fs::remove_file(entry.path())?;
                    continue;
                }
                let hash = entry.file_name().to_str().and_then(|name| name.parse().ok());
                if let Some(hash) = hash.filter(|_| is_older(&entry.path(), age)) {
                    found.push(hash);
                }
            }
        }
        Ok(found)
    }

    /// Deletes a blob unless it was written anew since it was listed. Returns whether it did.
    pub(crate) fn delete_older_than(
        &self,
        shard: ShardId,
        hash: BlobHash,
        age: Duration,
    ) -> io::Result<bool> {
        let path = self.path(shard, hash);
        // Out of the way first: what an upload puts there from now on is not touched.
        let doomed = path.with_extension("swept");
        match std::fs::rename(&path, &doomed) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(false),
            renamed => renamed?,
        }
        if is_older(&doomed, age) {
            std::fs::remove_file(doomed)?;
            return Ok(true);
        }
        std::fs::rename(doomed, path)?;
        Ok(false)
    }

    /// Deletes one blob that nothing names any more.
    pub fn delete(&self, shard: ShardId, hash: BlobHash) -> io::Result<()> {
        match std::fs::remove_file(self.path(shard, hash)) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => Err(error),
            _ => Ok(()),
        }
    }
}

fn is_older(path: &Path, age: Duration) -> bool {
    let written = std::fs::metadata(path).and_then(|metadata| metadata.modified());
    written.ok().and_then(|written| written.elapsed().ok()).is_some_and(|elapsed| elapsed > age)
}

impl Upload {
    /// Adds bytes.
    pub async fn write(&mut self, bytes: &[u8]) -> io::Result<()> {
        self.hasher.update(bytes);
        self.bytes += bytes.len() as u64;
        self.file.write_all(bytes).await
    }

    /// How many bytes have come so far.
    pub fn bytes(&self) -> u64 {
        self.bytes
    }

    /// The hash of what has come so far.
    pub fn hash(&self) -> BlobHash {
        BlobHash(*self.hasher.finalize().as_bytes())
    }

    /// Makes the blob durable under its hash. Returns its size.
    ///
    /// # Errors
    /// Resource busy while the shard's replica is being deleted here; and what the disk says.
    pub async fn finish(mut self, store: &BlobStore, shard: ShardId) -> io::Result<u64> {
        let target = store.path(shard, self.hash());
        let parent = target.parent().expect("a blob's path has a folder").to_owned();
        self.file.flush().await?;
        self.file.sync_all().await?;
        let path = self.path.clone();
        let (root, leaving) = (store.dir.clone(), store.leaving.clone());
        tokio::task::spawn_blocking(move || {
            std::fs::create_dir_all(&parent)?;
            std::fs::rename(path, &target)?;
            // The file's name, and the names of the folders that may be new.
            for dir in parent.ancestors().take_while(|dir| dir.starts_with(root.as_path())) {
                shoal_engine::files::sync_dir(dir)?;
            }
            // Whoever is told that it is here counts on it, even if the shard comes back to this node at once.
            match leaving.lock().contains(&shard) || !target.exists() {
                true => Err(io::Error::new(io::ErrorKind::ResourceBusy, "the replica is being deleted here")),
                false => Ok(()),
            }
        })
        .await
        .map_err(io::Error::other)?
        .map(|()| {
            self.is_done = true;
            self.bytes
        })
    }

    /// As [`Upload::finish`], when the hash was promised: other bytes are refused.
    pub async fn finish_as(self, store: &BlobStore, shard: ShardId, hash: BlobHash) -> io::Result<u64> {
        if self.hash() != hash {
            return Err(io::Error::new(
                io::ErrorKind::InvalidData,
                "the bytes do not have the promised hash",
            ));
        }
        self.finish(store, shard).await
    }
}

impl Drop for Upload {
    fn drop(&mut self) {
        if !self.is_done {
            // What is left is also deleted at the next start.
            drop(std::fs::remove_file(&self.path));
        }
    }
}

/// A blob that is durable on a majority of a shard's replicas.
pub struct Replicated {
    /// Its hash.
    pub hash: BlobHash,
    shard: ShardId,
    /// The replicas that the shard was to have when it was sent.
    replicas: BTreeSet<NodeId>,
}

/// Makes a finished upload durable on a majority of a shard's replicas.
///
/// # Errors
/// Unavailable when no majority could take it; nothing names the blob then.
pub async fn replicate(
    cluster: &Cluster,
    store: &BlobStore,
    shard: ShardId,
    upload: Upload,
) -> Result<Replicated, Error> {
    let hash = upload.hash();
    let replicas = replicas_of(&cluster.state(), shard)?;
    // It is finished here first, so that it can be sent from here; when this node holds no
    // replica, the copy is deleted again below.
    upload.finish(store, shard).await.map_err(|error| match error.kind() {
        io::ErrorKind::StorageFull => Error::new(ErrorCode::DiskFull, "the disk of this node is full"),
        io::ErrorKind::ResourceBusy => Error::unavailable(format!("shard {shard}: {error}")),
        _ => Error::internal(format!("the upload could not be stored: {error}")),
    })?;
    spread(cluster, store, shard, hash, &replicas).await?;
    Ok(Replicated { hash, shard, replicas })
}

impl Replicated {
    /// To be called when the log names the blob: if the shard has been given other replicas since it was
    /// sent, a majority of those is to have it before anybody is told that it is safe. From then on
    /// whoever gets a vote has counted it among its files.
    ///
    /// # Errors
    /// Unknown, when that could not be done in time: the file is there, and may not be safe.
    pub async fn settle(
        mut self,
        cluster: &Cluster,
        store: &BlobStore,
        deadline: Instant,
    ) -> Result<(), Error> {
        let unknown = |error: Error| Error::new(ErrorCode::Unknown, error.message);
        loop {
            let state = cluster.fresh_state(deadline).await.map_err(unknown)?;
            let replicas = replicas_of(&state, self.shard)?;
            if replicas == self.replicas {
                return Ok(());
            }
            let bytes = fetch(cluster, store, self.shard, self.hash).await.map_err(unknown)?;
            if !store.contains(self.shard, self.hash) {
                keep(store, self.shard, self.hash, &bytes).await;
            }
            spread(cluster, store, self.shard, self.hash, &replicas).await.map_err(unknown)?;
            self.replicas = replicas;
        }
    }
}

fn replicas_of(state: &ClusterState, shard: ShardId) -> Result<BTreeSet<NodeId>, Error> {
    let shard =
        state.shards.get(&shard).ok_or_else(|| Error::not_found(format!("shard {shard} does not exist")))?;
    Ok(shard.replicas.clone())
}

/// Sends a blob that is here to the others of these, until a majority has it.
async fn spread(
    cluster: &Cluster,
    store: &BlobStore,
    shard: ShardId,
    hash: BlobHash,
    replicas: &BTreeSet<NodeId>,
) -> Result<(), Error> {
    let majority = replicas.len() / 2 + 1;
    let is_replica = replicas.contains(&cluster.node());
    let mut durable = usize::from(is_replica);
    let others = replicas.iter().filter(|node| **node != cluster.node());
    let mut sends: futures::stream::FuturesUnordered<_> = others
        .map(|node| send(cluster.clone(), store.clone(), shard, hash, *node))
        .map(tokio::spawn)
        .collect();
    let mut reason = String::new();
    while durable < majority {
        match sends.next().await {
            Some(Ok(Ok(()))) => durable += 1,
            Some(Ok(Err(error))) => reason = error,
            Some(Err(error)) => reason = error.to_string(),
            None => break,
        }
    }
    if !is_replica && sends.is_empty() {
        drop(store.delete(shard, hash));
    }
    // The sends that are still under way go on by themselves.
    if durable >= majority {
        return Ok(());
    }
    Err(Error::unavailable(format!(
        "the upload reached {durable} of {} replicas of shard {shard}: {reason}",
        replicas.len()
    )))
}

async fn send(
    cluster: Cluster,
    store: BlobStore,
    shard: ShardId,
    hash: BlobHash,
    to: NodeId,
) -> Result<(), String> {
    let mut client = cluster.groups().peers().client(to, Lane::Bulk)?;
    let pieces = store.read_stream(shard, hash).await.map_err(|error| error.to_string())?;
    let header = Piece { header: codec::encode(&(shard, hash)).into(), data: Bytes::new() };
    let body = pieces.filter_map(|piece| piece.ok()).map(|data| Piece { header: Bytes::new(), data });
    let stream = tokio_stream::once(header).chain(body);
    match client.put_blob(stream).await {
        Ok(_) => Ok(()),
        Err(status) => Err(format!("node {to}: {}", status.message())),
    }
}

/// The bytes of a blob, from this disk or from a replica that has it.
///
/// # Errors
/// Unavailable when no replica that could be reached has it whole.
pub async fn fetch(
    cluster: &Cluster,
    store: &BlobStore,
    shard: ShardId,
    hash: BlobHash,
) -> Result<Vec<u8>, Error> {
    fetch_as(Purpose::Read, cluster, store, shard, hash).await
}

/// Brings a blob that this replica lacks, at the pace of moves.
///
/// # Errors
/// Unavailable when no replica that could be reached has it whole.
pub async fn copy_here(
    cluster: &Cluster,
    store: &BlobStore,
    shard: ShardId,
    hash: BlobHash,
) -> Result<(), Error> {
    fetch_as(Purpose::Move, cluster, store, shard, hash).await.map(drop)
}

/// What a blob is fetched for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Purpose {
    /// Somebody waits for the bytes.
    Read,
    /// A replica is to have all of its files.
    Move,
}

async fn fetch_as(
    purpose: Purpose,
    cluster: &Cluster,
    store: &BlobStore,
    shard: ShardId,
    hash: BlobHash,
) -> Result<Vec<u8>, Error> {
    let mut reason = match store.read(shard, hash).await {
        Ok(bytes) => return Ok(bytes),
        Err(error) => error.to_string(),
    };
    let state = cluster.state();
    let replicas = state.shards.get(&shard).map(|shard| shard.replicas.clone()).unwrap_or_default();
    // While a shard moves, those that are to hold it may all be new to it.
    let others = state.nodes.keys().filter(|node| !replicas.contains(node));
    for node in replicas.iter().chain(others).filter(|node| **node != cluster.node()) {
        match fetch_from(purpose, cluster, shard, hash, *node).await {
            Ok(bytes) if *blake3::hash(&bytes).as_bytes() == hash.0 => {
                if replicas.contains(&cluster.node()) {
                    keep(store, shard, hash, &bytes).await;
                }
                return Ok(bytes);
            }
            Ok(_) => reason = format!("node {node} sent bytes with another hash"),
            Err(error) => reason = error,
        }
    }
    Err(Error::unavailable(format!(
        "blob {hash} could not be read from any replica of shard {shard}: {reason}"
    )))
}

/// The original bytes of a document, which are beside the files' shard.
///
/// # Errors
/// Unavailable when there is no collection of files that can be used, and as [`fetch`].
pub async fn fetch_original(
    cluster: &Cluster,
    store: &BlobStore,
    document: DocumentId,
    hash: BlobHash,
) -> Result<Vec<u8>, Error> {
    let state = cluster.state();
    let (_, files) = state.collection(FILES_COLLECTION).map_err(|error| Error::unavailable(error.message))?;
    fetch(cluster, store, state.shard_of(files, document.route()), hash).await
}

async fn keep(store: &BlobStore, shard: ShardId, hash: BlobHash, bytes: &[u8]) {
    let kept = async {
        let mut upload = store.begin().await?;
        upload.write(bytes).await?;
        upload.finish_as(store, shard, hash).await
    };
    if let Err(error) = kept.await {
        tracing::warn!(%error, %hash, "a fetched blob could not be kept");
    }
}

async fn fetch_from(
    purpose: Purpose,
    cluster: &Cluster,
    shard: ShardId,
    hash: BlobHash,
    node: NodeId,
) -> Result<Vec<u8>, String> {
    let mut client = cluster.groups().peers().client(node, Lane::Bulk)?;
    let is_move = purpose == Purpose::Move;
    let request = GetBlobRequest { group: shard.0, hash: hash.to_string(), is_move };
    let describe = |status: tonic::Status| format!("node {node}: {}", status.message());
    let mut pieces = client.get_blob(request).await.map_err(describe)?.into_inner();
    let mut bytes = Vec::new();
    while let Some(piece) = pieces.next().await {
        bytes.extend_from_slice(&piece.map_err(describe)?.data);
    }
    Ok(bytes)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// What was acknowledged would go with the replica, although the shard may have come back meanwhile.
    #[tokio::test]
    async fn a_replica_that_is_being_deleted_takes_no_blob() {
        let (dir, shard) = (tempfile::tempdir().expect("a directory"), ShardId(7));
        let store = BlobStore::open(dir.path()).expect("opened");
        let put = async || {
            let mut upload = store.begin().await?;
            upload.write(b"bytes").await?;
            upload.finish(&store, shard).await
        };
        assert_eq!(put().await.expect("taken in"), 5);
        store.leaving().lock().insert(shard);
        assert_eq!(put().await.expect_err("refused").kind(), io::ErrorKind::ResourceBusy);
        store.drop_shard(shard).expect("deleted");
        store.leaving().lock().remove(&shard);
        assert_eq!(put().await.expect("taken in again"), 5);
    }
}
