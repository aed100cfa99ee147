//! Putting a backup back.

use std::collections::{BTreeMap, BTreeSet};

use std::sync::Arc;
use std::time::{Duration, Instant};

use futures::{StreamExt, TryStreamExt};
use shoal_engine::backup::Archive;
use shoal_engine::command::{Answer, Command, Document, FileRecord, Read};
use shoal_proto::{CollectionConfig, DocumentId, Error, ErrorCode, GroupId, RequestId, ShardId};
use shoal_raft::cluster::{self, ClusterState};

use super::Backups;
use super::manifest::{CollectionCopy, Manifest, Object, ShardCopy};
use super::target::{AT_ONCE, LARGE_AT_ONCE, Target};
use crate::FILES_COLLECTION;
use crate::blobs;
use crate::cluster::ReadOptions;
use crate::entries::{by_shard, entries};
use crate::scratch::{Scratch, ScratchCopy};

/// How long the cluster may take for one step: long enough for an election.
const STEP_TIMEOUT: Duration = Duration::from_secs(60);
/// How long the nodes may take to hear of what has taken the place of a collection, and the pause before
/// they are asked again.
const HEARD_TIMEOUT: Duration = Duration::from_secs(10);
const HEARD_PAUSE: Duration = Duration::from_millis(20);
/// Entries on their way into shards at once.
const WRITES_AT_ONCE: usize = 8;
/// Bytes of points, and of documents, that are read at a time.
const READ_BYTES: usize = 8 << 20;

/// What is put back of a backup, and how.
#[derive(Clone, Debug, Default)]
pub struct RestoreOptions {
    /// These collections; all when absent.
    pub collections: Option<Vec<String>>,
    /// Shards of each collection; as many as it had when absent.
    pub shard_count: Option<u32>,
    /// Replicas of each shard; as many as it had when absent.
    pub replication_factor: Option<u32>,
}

/// What takes the place of a collection.
pub(super) struct Place {
    /// The name that it is restored under.
    pub(super) hidden: String,
    /// The name that it gets.
    pub(super) name: String,
    /// Whether that must be free.
    pub(super) only_if_free: bool,
}

/// A restore under way.
struct Restore<'a> {
    backups: &'a Backups,
    target: &'a Target,
    place: Option<Place>,
    id: RequestId,
    /// Under which its writes are remembered.
    scope: String,
}

/// Where a collection's records go.
struct Destination {
    name: String,
    config: CollectionConfig,
    state: Arc<ClusterState>,
    /// Whether this restore has made it.
    is_begun: bool,
}

impl Destination {
    fn shard_of(&self, route: shoal_proto::Route) -> ShardId {
        self.state.shard_of(&self.state.collections[&self.name], route)
    }
}

impl Backups {
    pub(super) async fn restore_now(
        &self,
        target: &Target,
        id: &str,
        options: RestoreOptions,
    ) -> Result<(), Error> {
        let head = target.head(id).await?;
        let manifest = target.manifest(&head).await?;
        self.put_back(target, &manifest, &options, None).await
    }

    /// Puts back what a manifest names, where it was or in the place of a collection.
    pub(super) async fn put_back(
        &self,
        target: &Target,
        manifest: &Manifest,
        options: &RestoreOptions,
        place: Option<Place>,
    ) -> Result<(), Error> {
        let _alone = self.inner.restoring.lock().await;
        self.try_end_leftovers().await?;
        let chosen = chosen(manifest, options.collections.as_deref())?;
        let state = self.inner.cluster.fresh_state(Instant::now() + STEP_TIMEOUT).await?;
        for collection in &chosen {
            // Files are put to those that are there.
            if collection.name != FILES_COLLECTION && state.collection(&collection.name).is_ok() {
                let message = format!(
                    "`{}` exists already: delete it, or name the collections that are to be restored",
                    collection.name
                );
                return Err(Error::new(ErrorCode::Conflict, message));
            }
        }
        let objects = chosen.iter().flat_map(|collection| &collection.shards);
        let bytes = |shard: &ShardCopy| {
            let blobs = shard.blobs.iter().map(|blob| blob.object.bytes);
            shard.pieces.iter().map(|piece| piece.bytes).chain(blobs).sum::<u64>()
        };
        let total = objects.map(bytes).sum();
        self.note(|job| (job.bytes_done, job.bytes_total) = (0, total));
        let id = uuid::Uuid::new_v4();
        let scope = id.to_string();
        let restore = Restore { backups: self, target, place, id: RequestId(id.into_bytes()), scope };
        let restored = restore.run(manifest, &chosen, options).await;
        let scratch = self.inner.scratch.clone();
        drop(tokio::task::spawn_blocking(move || std::fs::remove_dir_all(scratch)).await);
        if restored.is_err() {
            restore.give_up().await;
        }
        restored
    }
}

fn chosen<'a>(manifest: &'a Manifest, names: Option<&[String]>) -> Result<Vec<&'a CollectionCopy>, Error> {
    let Some(names) = names else { return Ok(manifest.collections.iter().collect()) };
    let mut chosen: Vec<&CollectionCopy> = Vec::new();
    for name in names {
        let name = manifest.aliases.get(name).unwrap_or(name);
        let found = manifest.collections.iter().find(|collection| collection.name == *name);
        let found =
            found.ok_or_else(|| Error::not_found(format!("the backup holds no collection `{name}`")))?;
        if !chosen.iter().any(|known| known.name == found.name) {
            chosen.push(found);
        }
    }
    Ok(chosen)
}

impl Restore<'_> {
    async fn run(
        &self,
        manifest: &Manifest,
        chosen: &[&CollectionCopy],
        options: &RestoreOptions,
    ) -> Result<(), Error> {
        // The files' collection comes first, because documents that are not finished need its place, and
        // its records last, because they may go where everybody sees them.
        let files = manifest.collections.iter().find(|collection| collection.name == FILES_COLLECTION);
        let wants_files = chosen.iter().any(|collection| collection.name == FILES_COLLECTION);
        let needs_files = chosen.iter().any(|collection| collection.config.embedder.is_some());
        let files = match files.filter(|_| wants_files || needs_files) {
            Some(files) => Some((files, self.find_or_begin(files, options).await?)),
            None => None,
        };
        let place = files.as_ref().map(|(_, place)| place);
        let mut documents = BTreeSet::new();
        let others = || chosen.iter().filter(|collection| collection.name != FILES_COLLECTION);
        for collection in others() {
            let destination = self.begin(collection, options).await?;
            for shard in &collection.shards {
                self.note_at(format!("shard {} of {}", shard.shard, collection.name));
                let copy = self.copy(shard).await?;
                self.points(&destination, &copy, shard.shard).await?;
                documents.extend(self.documents(&destination, place, &copy, shard).await?);
            }
        }
        for collection in others() {
            self.note_at(format!("counting {}", collection.name));
            self.count(collection).await?;
        }
        if let Some((files, destination)) = &files {
            for shard in &files.shards {
                self.note_at(format!("shard {} of {}", shard.shard, files.name));
                let copy = self.copy(shard).await?;
                self.files(destination, &copy, shard, (!wants_files).then_some(&documents)).await?;
            }
            if wants_files && destination.is_begun {
                self.count(files).await?;
            }
        }
        let mut names: BTreeSet<String> = others().map(|collection| collection.name.clone()).collect();
        names.extend(files.filter(|(_, place)| place.is_begun).map(|(files, _)| files.name.clone()));
        let Some(place) = &self.place else {
            let aliases = manifest.aliases.clone().into_iter();
            let aliases = aliases.filter(|(_, name)| names.contains(name)).collect();
            let command = cluster::Command::EndRestore { restore: self.id, collections: names, aliases };
            return self.control(command).await.map(drop);
        };
        self.end_as(place, names).await?;
        self.heard().await;
        Ok(())
    }

    /// Lets what was restored take its place.
    async fn end_as(&self, place: &Place, collections: BTreeSet<String>) -> Result<(), Error> {
        let Place { hidden, name, only_if_free } = place;
        let made = origins_of(&self.backups.inner.cluster.state(), hidden);
        let command = cluster::Command::EndRestoreAs {
            restore: self.id,
            collections,
            hidden: hidden.clone(),
            name: name.clone(),
            only_if_free: *only_if_free,
        };
        let Err(error) = self.control(command).await else { return Ok(()) };
        // An answer that does not come in time says nothing of what was done.
        let state = self.backups.inner.cluster.fresh_state(Instant::now() + STEP_TIMEOUT).await;
        let is_in_place = |state: Arc<ClusterState>| made.is_some() && origins_of(&state, name) == made;
        if state.is_ok_and(is_in_place) { Ok(()) } else { Err(error) }
    }

    /// Waits until every node that answers has heard what was shown: nobody reads any more what it has taken
    /// the place of. What is shown stays shown, so that this cannot fail.
    async fn heard(&self) {
        let cluster = &self.backups.inner.cluster;
        let deadline = Instant::now() + HEARD_TIMEOUT;
        drop(cluster.fresh_state(deadline).await);
        let Ok(control) = cluster.groups().get(GroupId::CONTROL) else { return };
        let shown = control.status().applied;
        while Instant::now() < deadline {
            let reports = cluster.reports().await;
            let groups = reports.values().flat_map(|report| &report.groups);
            let mut controls = groups.filter(|group| group.group == GroupId::CONTROL);
            if controls.all(|control| control.applied >= shown) {
                return;
            }
            tokio::time::sleep(HEARD_PAUSE).await;
        }
    }

    /// Makes the collection, unseen.
    async fn begin(&self, copy: &CollectionCopy, options: &RestoreOptions) -> Result<Destination, Error> {
        let command = cluster::Command::BeginRestore {
            restore: self.id,
            node: self.backups.inner.cluster.node(),
            name: copy.name.clone(),
            config: copy.config.clone(),
            shard_count: Some(options.shard_count.unwrap_or(copy.shards.len() as u32)),
            replication_factor: options.replication_factor.unwrap_or(copy.replication_factor),
            created_at: copy.created_at,
        };
        self.control(command).await?;
        let is_begun =
            |state: &Arc<ClusterState>| state.restoring.get(&copy.name).is_some_and(|by| by.id == self.id);
        let state = self.backups.inner.cluster.wait_state(Instant::now() + STEP_TIMEOUT, is_begun).await?;
        Ok(Destination { name: copy.name.clone(), config: copy.config.clone(), state, is_begun: true })
    }

    async fn control(&self, command: cluster::Command) -> Result<cluster::Response, Error> {
        self.backups.inner.cluster.control(command, Instant::now() + STEP_TIMEOUT).await
    }

    fn note_at(&self, at: String) {
        self.backups.note(|job| job.at = at);
    }

    /// A shard's copy, in files of this node, checked.
    async fn copy(&self, shard: &ShardCopy) -> Result<Arc<ScratchCopy>, Error> {
        let cluster = &self.backups.inner.cluster;
        let full =
            || Error::new(ErrorCode::DiskFull, "this node's disk has no room for a shard on its way back");
        // Its pieces, and as much again for what the store makes of them.
        let needed = 2 * shard.pieces.iter().map(|piece| piece.bytes).sum::<u64>();
        if !cluster.is_writable() || cluster.disk_free_bytes() < needed {
            return Err(full());
        }
        let dir = self.backups.inner.scratch.join(uuid::Uuid::new_v4().to_string());
        let made = {
            let dir = dir.clone();
            blocking(move || Archive::create(&dir)).await?
        };
        let mut copy = ScratchCopy { archive: made, _dir: Scratch(dir) };
        let mut pieces = self.target.get_all(shard.pieces.clone(), AT_ONCE);
        while let Some(piece) = pieces.try_next().await? {
            self.backups.note_bytes(piece.len() as u64);
            if !cluster.is_writable() {
                return Err(full());
            }
            copy = blocking(move || copy.archive.take(&piece).map(|()| copy)).await?;
        }
        blocking(move || copy.archive.check().map(|()| Arc::new(copy))).await
    }

    async fn points(&self, to: &Destination, copy: &Arc<ScratchCopy>, from: ShardId) -> Result<(), Error> {
        let (mut after, mut number) = (None, 0u64);
        loop {
            let (copy, config) = (copy.clone(), to.config.clone());
            let (points, next) = blocking(move || {
                let mut after = after;
                copy.archive.points(&config, &mut after, READ_BYTES).map(|points| (points, after))
            })
            .await?;
            after = next;
            if points.is_empty() {
                return Ok(());
            }
            let parts = by_shard(points, |point| to.shard_of(point.id.route())).into_iter().flat_map(
                |(shard, points)| {
                    entries(points).into_iter().map(move |entry| (shard, Command::Upsert(entry)))
                },
            );
            let parts: Vec<_> = parts.collect();
            let writes = parts.into_iter().map(|(shard, command)| {
                number += 1;
                self.write(shard, format!("{}/{from}/{number}", to.name), command)
            });
            let writes: Vec<_> = writes.collect();
            futures::stream::iter(writes).buffer_unordered(WRITES_AT_ONCE).try_collect::<()>().await?;
        }
    }

    /// Puts a command through a shard, also when that is busy for a while.
    async fn write(&self, shard: ShardId, what: String, command: Command) -> Result<(), Error> {
        let request = RequestId::from_key(&self.scope, &what);
        let cluster = &self.backups.inner.cluster;
        let deadline = Instant::now() + STEP_TIMEOUT;
        cluster.write_when_free(shard, Some(request), &command, deadline).await.map(drop)
    }

    /// Puts files' records back with their bytes: all of them, or only these. One that is there stays, and
    /// one whose bytes the backup could not have is left out.
    async fn files(
        &self,
        to: &Destination,
        copy: &Arc<ScratchCopy>,
        shard: &ShardCopy,
        only: Option<&BTreeSet<DocumentId>>,
    ) -> Result<(), Error> {
        let copy = copy.clone();
        let files = blocking(move || copy.archive.files()).await?;
        let kept: BTreeSet<Object> = shard.blobs.iter().map(|blob| blob.object).collect();
        let missing: BTreeSet<DocumentId> = shard.missing.iter().map(|blob| blob.document).collect();
        let is_wanted = |id: &DocumentId| !missing.contains(id) && only.is_none_or(|only| only.contains(id));
        let mut puts = Vec::new();
        for file in files.into_iter().filter(|file| is_wanted(&file.id)) {
            let object = Object { hash: file.blob, bytes: file.bytes };
            if !kept.contains(&object) {
                return Err(Error::internal(format!("the backup lacks the bytes of {}", file.id)));
            }
            puts.push(self.file(to.shard_of(file.id.route()), file, object));
        }
        futures::stream::iter(puts).buffer_unordered(LARGE_AT_ONCE).try_collect().await
    }

    /// The bytes are safe before the log names them, as with an upload.
    async fn file(&self, shard: ShardId, file: FileRecord, object: Object) -> Result<(), Error> {
        let blob = self.bytes(shard, object).await?;
        let what = format!("{}/{}", FILES_COLLECTION, file.id);
        self.write(shard, what, Command::RestoreFile(file)).await?;
        self.settle(blob).await
    }

    async fn settle(&self, blob: blobs::Replicated) -> Result<(), Error> {
        let Backups { inner } = self.backups;
        blob.settle(&inner.cluster, &inner.blobs, Instant::now() + STEP_TIMEOUT).await
    }

    async fn bytes(&self, shard: ShardId, object: Object) -> Result<blobs::Replicated, Error> {
        let bytes = self.target.get(&object).await?;
        let Backups { inner } = self.backups;
        let mut upload = inner.blobs.begin().await.map_err(Error::internal)?;
        upload.write(&bytes).await.map_err(Error::internal)?;
        let replicated = blobs::replicate(&inner.cluster, &inner.blobs, shard, upload).await?;
        self.backups.note_bytes(object.bytes);
        Ok(replicated)
    }

    /// Puts documents' records back; their chunks are points. Returns their ids.
    async fn documents(
        &self,
        to: &Destination,
        files: Option<&Destination>,
        copy: &Arc<ScratchCopy>,
        shard: &ShardCopy,
    ) -> Result<Vec<DocumentId>, Error> {
        // Work in progress needs its bytes even when nobody keeps the file any more.
        let unfinished: BTreeMap<DocumentId, Object> =
            shard.blobs.iter().map(|blob| (blob.document, blob.object)).collect();
        let (mut ids, mut after) = (Vec::new(), None);
        loop {
            let source = copy.clone();
            let (documents, next) = blocking(move || {
                let mut after = after;
                source.archive.documents(&mut after, READ_BYTES).map(|documents| (documents, after))
            })
            .await?;
            after = next;
            if documents.is_empty() {
                return Ok(ids);
            }
            ids.extend(documents.iter().map(|document| document.id));
            let puts = documents.into_iter().map(|document| {
                let object = unfinished.get(&document.id).copied();
                self.document(to, files, document, object)
            });
            let puts: Vec<_> = puts.collect();
            futures::stream::iter(puts).buffer_unordered(LARGE_AT_ONCE).try_collect::<()>().await?;
        }
    }

    async fn document(
        &self,
        to: &Destination,
        files: Option<&Destination>,
        document: Document,
        unfinished: Option<Object>,
    ) -> Result<(), Error> {
        let kept = match unfinished {
            None => None,
            Some(object) => {
                let files = files.ok_or_else(|| {
                    Error::internal("the backup holds unfinished documents and no place for their bytes")
                })?;
                Some(self.bytes(files.shard_of(document.id.route()), object).await?)
            }
        };
        let place = to.shard_of(document.id.route());
        let what = format!("{}/document/{}", to.name, document.id);
        self.write(place, what, Command::RestoreDocument(Box::new(document))).await?;
        match kept {
            Some(kept) => self.settle(kept).await,
            None => Ok(()),
        }
    }

    /// The collection as it is, or a new one.
    async fn find_or_begin(
        &self,
        copy: &CollectionCopy,
        options: &RestoreOptions,
    ) -> Result<Destination, Error> {
        let state = self.backups.inner.cluster.fresh_state(Instant::now() + STEP_TIMEOUT).await?;
        let found = state.collection(&copy.name).map(|(name, known)| (name.to_owned(), known.config.clone()));
        match found {
            Ok((name, config)) => Ok(Destination { name, config, state, is_begun: false }),
            Err(_) => self.begin(copy, options).await,
        }
    }

    /// Whether all is there: nothing is shown before.
    async fn count(&self, collection: &CollectionCopy) -> Result<(), Error> {
        let state = self.backups.inner.cluster.state();
        let gone = || Error::new(ErrorCode::Conflict, format!("`{}` was deleted meanwhile", collection.name));
        let shards = state.collections.get(&collection.name).ok_or_else(gone)?.shards.clone();
        let mut found = [0u64; 3];
        for shard in shards {
            let options = ReadOptions::linearizable(Instant::now() + STEP_TIMEOUT);
            let cluster = &self.backups.inner.cluster;
            if let Answer::Stats(stats) = cluster.read(shard, Read::Stats, &options).await?.0 {
                found[0] += stats.points;
                found[1] += stats.documents.iter().sum::<u64>();
            }
            if let Answer::Files(files) = cluster.read(shard, Read::ListFiles, &options).await?.0 {
                found[2] += files.len() as u64;
            }
        }
        let summary = collection.summary();
        let left_out = if collection.name == FILES_COLLECTION { collection.missing_files() } else { 0 };
        let wanted = [summary.points, summary.documents, summary.files.saturating_sub(left_out)];
        match found == wanted {
            true => Ok(()),
            false => Err(Error::internal(format!(
                "`{}` has {found:?} points, documents and files after its restore, and {wanted:?} in the backup",
                collection.name
            ))),
        }
    }

    /// Takes away what was begun. What cannot be taken away now stays unseen, until it can.
    async fn give_up(&self) {
        if let Err(error) = self.control(cluster::Command::AbortRestore { restore: self.id }).await {
            tracing::warn!(%error, "what a failed restore has begun is still there, unseen, and will be ended later");
            self.backups.end_leftovers();
        }
    }
}

/// The shards that a collection was made with, which tell it from every other one.
fn origins_of(state: &ClusterState, name: &str) -> Option<Vec<cluster::Origin>> {
    state.collections.get(name).map(|collection| collection.origins.clone())
}

async fn blocking<T: Send + 'static>(
    work: impl FnOnce() -> shoal_engine::Result<T> + Send + 'static,
) -> Result<T, Error> {
    tokio::task::spawn_blocking(work).await.map_err(Error::internal)?.map_err(|error| match error {
        damaged if damaged.is_damage() => Error::internal(format!("the backup is damaged: {damaged}")),
        other => other.into(),
    })
}
