//! Making a backup.
//!
//! A file whose bytes no replica has any more does not keep everything else from being backed up: the backup
//! is made without them, and says so in its head, for whoever made it, lists it or verifies it. That is told
//! from a file that was deleted meanwhile by another cut: what that names and nobody has is missing.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;
use std::time::{Duration, Instant};

use bytes::Bytes;
use futures::{StreamExt, TryStreamExt};
use shoal_engine::backup::{Contents, cut};
use shoal_engine::command::Read;
use shoal_proto::{Error, ErrorCode, NodeId, ShardId};
use shoal_raft::ReceivedFile;
use shoal_raft::cluster::ClusterState;
use tokio_stream::wrappers::ReceiverStream;

use super::manifest::{Blob, CollectionCopy, FORMAT, Head, Manifest, Object, ShardCopy};
use super::target::{AT_ONCE, LARGE_AT_ONCE, Lock, Target};
use super::{Backups, age};
use crate::cluster::{ReadOptions, unix_now};
use crate::{FILES_COLLECTION, blobs};

/// How long the cluster may take to say what there is.
const ASK_TIMEOUT: Duration = Duration::from_secs(30);
/// How long one replica may take to give a shard's state.
const FETCH_TIMEOUT: Duration = Duration::from_secs(1200);
/// How long a replica is looked for that gives it.
const CUT_TIMEOUT: Duration = Duration::from_secs(3600);
/// So many times a shard is cut anew because a file was deleted before its bytes were read.
const MAX_CUTS: usize = 5;
/// The pause before the next cut: a node that was just not reached may have the bytes.
const CUT_PAUSE: Duration = Duration::from_secs(2);
/// The pause before no replica that has everything is looked for again.
const LOOK_PAUSE: Duration = Duration::from_millis(200);

impl Backups {
    pub(super) async fn create_now(
        &self,
        target: &Target,
        lock: &Lock,
        id: &str,
        names: Option<Vec<String>>,
    ) -> Result<(), Error> {
        let head = self.bring(target, id, names).await?;
        // What it names must still be there.
        lock.check().await?;
        target.publish(&head).await?;
        if let Err(error) = lock.check().await {
            target.forget(id).await?;
            return Err(error);
        }
        if let Some(lost) = head.missing.first() {
            let (count, first) = (head.missing_files, lost.document.to_string());
            tracing::warn!(backup = id, count, first, "no replica has the bytes of some files");
        }
        if head.is_full {
            age::tell(&head);
        }
        Ok(())
    }

    /// Brings everything that a backup consists of to the target. Its head, which is returned, makes it one.
    pub(super) async fn bring(
        &self,
        target: &Target,
        id: &str,
        names: Option<Vec<String>>,
    ) -> Result<Head, Error> {
        let state = self.inner.cluster.fresh_state(Instant::now() + ASK_TIMEOUT).await?;
        // What is being restored is not there yet.
        let is_full = names.is_none() && state.restoring.is_empty();
        let chosen = chosen(&state, names)?;
        let mut manifest = Manifest::default();
        // The files come last: whatever names one was cut before it.
        let (files, others): (Vec<&String>, Vec<&String>) =
            chosen.iter().partition(|name| *name == FILES_COLLECTION);
        for name in others.into_iter().chain(files) {
            if let Some(copy) = self.collection(target, &state, name).await? {
                manifest.collections.push(copy);
            }
        }
        manifest.aliases =
            state.aliases.clone().into_iter().filter(|(_, name)| chosen.contains(name)).collect();
        let text = serde_json::to_vec(&manifest).map_err(Error::internal)?;
        let (object, _) = target.put(text.into()).await?;
        let named: BTreeMap<_, _> = manifest.objects().map(|object| (object.hash, object.bytes)).collect();
        let (missing_files, missing) = manifest.missing();
        Ok(Head {
            format: FORMAT,
            id: id.to_owned(),
            created_at: unix_now(),
            cluster_id: state.cluster_id.clone(),
            is_full,
            version: env!("CARGO_PKG_VERSION").to_owned(),
            manifest: object,
            collections: manifest.summaries(),
            bytes: named.values().sum(),
            new_bytes: self.job().map_or(0, |job| job.bytes_new),
            missing_files,
            missing,
        })
    }

    /// A collection; none when it was deleted since the backup began. When its shards were split or merged
    /// in the middle of it, it is begun anew.
    async fn collection(
        &self,
        target: &Target,
        state: &Arc<ClusterState>,
        name: &str,
    ) -> Result<Option<CollectionCopy>, Error> {
        let mut state = state.clone();
        loop {
            let collection = &state.collections[name];
            let copied = self.shards(target, name, &collection.shards).await;
            let now = self.inner.cluster.fresh_state(Instant::now() + ASK_TIMEOUT).await?;
            let shards = now.collections.get(name).map(|collection| &collection.shards);
            match (copied, shards) {
                (_, None) => {
                    tracing::info!(collection = name, "it was deleted while it was backed up");
                    return Ok(None);
                }
                (_, Some(shards)) if *shards != collection.shards => {
                    tracing::info!(collection = name, "its shards have changed: it is backed up anew");
                    state = now;
                }
                (Err(error), Some(_)) => return Err(error),
                (Ok(shards), Some(_)) => {
                    return Ok(Some(CollectionCopy {
                        name: name.to_owned(),
                        config: collection.config.clone(),
                        replication_factor: collection.replication_factor,
                        created_at: collection.created_at,
                        shards,
                    }));
                }
            }
        }
    }

    async fn shards(&self, target: &Target, name: &str, ids: &[ShardId]) -> Result<Vec<ShardCopy>, Error> {
        let mut shards = Vec::new();
        for shard in ids {
            self.note(|job| job.at = format!("shard {shard} of {name}"));
            let copy = self.shard(target, *shard).await.map_err(|error| Error {
                message: format!("shard {shard} of {name}: {}", error.message),
                ..error
            })?;
            shards.push(copy);
        }
        Ok(shards)
    }

    async fn shard(&self, target: &Target, shard: ShardId) -> Result<ShardCopy, Error> {
        let mut damaged = BTreeSet::new();
        let mut suspected = BTreeSet::new();
        let mut reason = Error::internal("it was not tried");
        for _ in 0..MAX_CUTS {
            let (node, index, file) = self.cut(shard, &damaged).await?;
            let (pieces, contents) = match self.pieces(target, file).await? {
                Ok(cut) => cut,
                Err(error) => {
                    tracing::warn!(shard = shard.0, node = node.0, %error, "another replica is backed up");
                    reason = error;
                    damaged.insert(node);
                    continue;
                }
            };
            let brought = self.bytes_of_files(target, &contents).await?;
            // Who deletes a file deletes its bytes as well, perhaps before they were read: then the next
            // cut does not name it any more. What it still names is missing.
            if brought.missing.is_subset(&suspected) {
                let Contents { points, documents, files, .. } = contents;
                let (blobs, missing) = (brought.kept, brought.missing.into_iter().collect());
                return Ok(ShardCopy { shard, index, points, documents, files, pieces, blobs, missing });
            }
            suspected = brought.missing;
            if let Some(error) = brought.reason {
                tracing::info!(shard = shard.0, %error, "a shard is cut anew");
                reason = error;
            }
            tokio::time::sleep(CUT_PAUSE).await;
        }
        Err(reason)
    }

    /// A shard's state from a replica that has all that was acknowledged before this call.
    async fn cut(
        &self,
        shard: ShardId,
        damaged: &BTreeSet<NodeId>,
    ) -> Result<(NodeId, u64, ReceivedFile), Error> {
        let cluster = &self.inner.cluster;
        if !cluster.is_writable() {
            let message =
                "the disk's reserve is reached on this node, and a shard's state has to go somewhere";
            return Err(Error::new(ErrorCode::DiskFull, message));
        }
        let deadline = Instant::now() + CUT_TIMEOUT;
        let options = ReadOptions::linearizable(Instant::now() + ASK_TIMEOUT);
        let (_, least) = cluster.read(shard, Read::Stats, &options).await?;
        let mut reason = String::from("it has no replica that is whole");
        while Instant::now() < deadline {
            let state = cluster.state();
            let Some(known) = state.shards.get(&shard) else {
                return Err(Error::not_found(format!("shard {shard} does not exist any more")));
            };
            // This node first: nothing has to travel.
            let mut nodes: Vec<NodeId> = known.replicas.difference(damaged).copied().collect();
            if nodes.is_empty() {
                break;
            }
            nodes.sort_by_key(|node| *node != cluster.node());
            for node in nodes {
                let fetch = cluster.groups().fetch_state(shard.into(), node);
                match tokio::time::timeout(FETCH_TIMEOUT, fetch).await {
                    Ok(Ok((_, index, file))) if index >= least => return Ok((node, index, file)),
                    Ok(Ok((_, index, _))) => reason = format!("node {node} is at {index} of {least}"),
                    Ok(Err(error)) => reason = format!("node {node}: {error}"),
                    Err(_) => reason = format!("node {node} took too long"),
                }
            }
            tokio::time::sleep(LOOK_PAUSE).await;
        }
        Err(Error::unavailable(format!("no replica of shard {shard} gives its state: {reason}")))
    }

    /// Brings a state's pieces to the target. The inner error says that the state is damaged.
    async fn pieces(
        &self,
        target: &Target,
        file: ReceivedFile,
    ) -> Result<Result<(Vec<Object>, Contents), Error>, Error> {
        let (sender, pieces) = tokio::sync::mpsc::channel(AT_ONCE);
        let cutting = tokio::task::spawn_blocking(move || {
            // Who does not take pieces any more has failed, and says why.
            let gone = |_| std::io::Error::from(std::io::ErrorKind::BrokenPipe);
            cut(&file.0, |piece| Ok(sender.blocking_send(piece).map_err(gone)?))
        });
        let puts = ReceiverStream::new(pieces).map(|piece| self.put(target, piece.into()));
        let objects: Vec<Object> = puts.buffered(AT_ONCE).try_collect().await?;
        match cutting.await.map_err(Error::internal)? {
            Ok(contents) => Ok(Ok((objects, contents))),
            Err(error) if error.is_damage() => Ok(Err(error.into())),
            Err(error) => Err(error.into()),
        }
    }

    async fn put(&self, target: &Target, bytes: Bytes) -> Result<Object, Error> {
        let (object, is_new) = target.put(bytes).await?;
        self.note(|job| {
            job.bytes_done += object.bytes;
            job.bytes_new += if is_new { object.bytes } else { 0 };
        });
        Ok(object)
    }

    /// Brings the bytes of files to the target, as far as they are to be had.
    async fn bytes_of_files(&self, target: &Target, contents: &Contents) -> Result<Brought, Error> {
        let kept = contents.blobs.iter().map(|(document, hash, bytes)| async move {
            let blob = Blob { document: *document, object: Object { hash: *hash, bytes: *bytes } };
            if target.has(&blob.object).await? {
                self.note(|job| job.bytes_done += blob.object.bytes);
            } else {
                let Backups { inner } = self;
                match blobs::fetch_original(&inner.cluster, &inner.blobs, *document, *hash).await {
                    Ok(bytes) => self.put(target, bytes.into()).await.map(drop)?,
                    Err(error) => return Ok((blob, Some(error))),
                }
            }
            Ok::<_, Error>((blob, None))
        });
        let kept: Vec<_> = kept.collect();
        // Each may be as large as an upload may be.
        let mut looked = futures::stream::iter(kept).buffered(LARGE_AT_ONCE);
        let mut brought = Brought::default();
        while let Some((blob, error)) = looked.try_next().await? {
            match error {
                None => brought.kept.push(blob),
                Some(error) => {
                    brought.missing.insert(blob);
                    brought.reason = Some(error);
                }
            }
        }
        Ok(brought)
    }
}

/// The bytes of a shard's files.
#[derive(Default)]
struct Brought {
    /// Those that are in the target.
    kept: Vec<Blob>,
    /// Those that nobody gives.
    missing: BTreeSet<Blob>,
    /// Why not.
    reason: Option<Error>,
}

/// The real names of what is to be kept, the collection of files among them when a store of documents is.
fn chosen(state: &ClusterState, names: Option<Vec<String>>) -> Result<BTreeSet<String>, Error> {
    let Some(names) = names else {
        return Ok(state.usable_collections().map(|(name, _)| name.clone()).collect());
    };
    let mut chosen = BTreeSet::new();
    for name in names {
        let (name, collection) = state.collection(&name)?;
        chosen.insert(name.to_owned());
        if collection.config.embedder.is_some() && state.collection(FILES_COLLECTION).is_ok() {
            chosen.insert(FILES_COLLECTION.to_owned());
        }
    }
    Ok(chosen)
}
