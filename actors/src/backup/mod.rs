//! Backups: the whole cluster, or some of its collections, to a directory or to S3, and back.
//!
//! ```text
//!  create:   for every shard: a consistent cut from a replica that has all that was acknowledged
//!            ─▶ cut where keys say so ─▶ objects, each once ─▶ bytes of files ─▶ manifest ─▶ head
//!  restore:  head ─▶ manifest ─▶ hidden collections ─▶ every record proposed anew ─▶ counted ─▶ shown
//! ```
//!
//! Any node does it, for the whole cluster, while everything goes on. Because records are proposed
//! anew, a backup of three nodes can be put back into one, five, or as many shards as one likes.
//! What is restored is shown in one step at the end: a restore that breaks off has shown nothing, and
//! is begun again. The same holds for a backup: without its head it does not exist, and what it
//! has brought so far the next one finds.
//!
//! A [`Snapshot`] is a backup of one collection that can be taken away as one file, an archive that is
//! made as it is downloaded, and be put in the place of a collection in one step.

mod age;
mod archive;
mod create;
mod download;
mod job;
mod manifest;
mod receive;
mod restore;
mod snapshot;
mod target;

use std::collections::{BTreeMap, BTreeSet};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, Instant};

use futures::TryStreamExt;
use parking_lot::Mutex;
use shoal_engine::backup::Inspection;
use shoal_proto::{Error, ErrorCode, RequestId};
use shoal_raft::cluster::Command;
use tokio::sync::{OnceCell, Semaphore, oneshot};

pub use job::{Begun, Job, JobKind, JobState};
pub use manifest::{Blob, CollectionCopy, FORMAT, Head, Manifest, Object, ShardCopy, Summary};
pub use receive::{Receipt, ReceiveLimits, Received};
pub use restore::RestoreOptions;
pub use snapshot::{Recovery, Snapshot};
pub use target::Target;

use self::download::DOWNLOADS_AT_ONCE;
use self::target::{AT_ONCE, LARGE_AT_ONCE, Lock};
use crate::blobs::BlobStore;
use crate::cluster::Cluster;

/// How long the cluster may take to say what this node has left, and to end it.
const LEFTOVERS_TIMEOUT: Duration = Duration::from_secs(10);
/// The pause before that is tried again.
const LEFTOVERS_PAUSE: Duration = Duration::from_secs(1);

/// Snapshots that a node takes in at once.
const RECEIVING_AT_ONCE: usize = 2;

/// How backups are made.
#[derive(Clone, Debug, Default)]
pub struct BackupConfig {
    /// Where they are kept, as [`Target::open`] takes it; nowhere when empty.
    pub target: String,
    /// How many of this cluster's backups are kept; all when zero.
    pub keep: usize,
}

/// Makes backups and puts them back, one at a time on this node. Cheap to clone.
#[derive(Clone)]
pub struct Backups {
    inner: Arc<Inner>,
}

struct Inner {
    config: BackupConfig,
    /// Opened when it is needed first: a target that does not answer must not keep a node from starting.
    target: OnceCell<Target>,
    cluster: Cluster,
    blobs: BlobStore,
    /// Shards on their way back.
    scratch: PathBuf,
    /// Snapshots on their way in.
    received: PathBuf,
    receiving: Arc<Semaphore>,
    downloads: Arc<Semaphore>,
    job: Mutex<Option<Job>>,
    /// Held by a restore, and by whoever ends what restores of this node have left.
    restoring: tokio::sync::Mutex<()>,
}

impl Backups {
    /// What a restore or an upload has left here that a crash has ended is deleted.
    pub(crate) fn open(
        config: BackupConfig,
        cluster: Cluster,
        blobs: BlobStore,
        data: &Path,
    ) -> std::io::Result<Backups> {
        let (scratch, received) = (data.join("restore"), data.join("received"));
        for left in [&scratch, &received] {
            if left.exists() {
                std::fs::remove_dir_all(left)?;
            }
        }
        // Known from the beginning, so that what comes first is seen to have come.
        let kinds = [JobKind::Create, JobKind::Verify, JobKind::Restore, JobKind::Delete, JobKind::Snapshot];
        for kind in kinds {
            for result in ["ok", "failed"] {
                metrics::counter!("shoal_backup_jobs_total", "kind" => kind.name(), "result" => result)
                    .increment(0);
            }
        }
        let inner = Inner {
            config,
            target: OnceCell::new(),
            cluster,
            blobs,
            scratch,
            received,
            receiving: Arc::new(Semaphore::new(RECEIVING_AT_ONCE)),
            downloads: Arc::new(Semaphore::new(DOWNLOADS_AT_ONCE)),
            job: Mutex::default(),
            restoring: tokio::sync::Mutex::default(),
        };
        Ok(Backups { inner: Arc::new(inner) })
    }

    /// Where backups are kept.
    ///
    /// # Errors
    /// Invalid, when that is not set, or is nothing that a backup could go to.
    pub async fn target(&self) -> Result<Target, Error> {
        let name = self.inner.config.target.clone();
        if name.is_empty() {
            let message = "is not set on this node: a directory, or s3://bucket/prefix";
            return Err(Error::invalid("backup.target", message));
        }
        // A directory may be a mount that hangs.
        let open = || async {
            tokio::task::spawn_blocking(move || Target::open(&name)).await.map_err(Error::internal)?
        };
        Ok(self.inner.target.get_or_try_init(open).await?.clone())
    }

    /// What this node does, or did last.
    pub fn job(&self) -> Option<Job> {
        self.inner.job.lock().clone()
    }

    /// Begins a backup of everything, or of these collections (names or aliases); with stores of
    /// documents goes the collection of files.
    ///
    /// # Errors
    /// Conflict, when this node is at something else, or somebody else uses the target; not found, when
    /// there is no such collection.
    pub async fn create(&self, collections: Option<Vec<String>>) -> Result<Job, Error> {
        let target = self.target().await?;
        if let Some(names) = &collections {
            let state = self.inner.cluster.state();
            names.iter().try_for_each(|name| state.collection(name).map(drop))?;
        }
        let id = new_id();
        let this = self.clone();
        self.begin_locked(JobKind::Create, &id, target, async move |target, lock, id| {
            this.create_now(&target, &lock, &id, collections).await?;
            // The backup is there, whatever becomes of older ones.
            if let Err(error) = this.retire(&target, &lock, &id).await {
                tracing::warn!(%error, "old backups could not be deleted; the next one tries it again");
            }
            Ok(())
        })
        .await
        .map(|begun| begun.job)
    }

    /// Begins to read a whole backup: every object is compared with its hash, and every record looked at.
    ///
    /// # Errors
    /// Conflict, when this node is at something else.
    pub async fn verify(&self, id: &str) -> Result<Job, Error> {
        let target = self.target().await?;
        let this = self.clone();
        let begun = self.begin(JobKind::Verify, id, async move |id| {
            let head = target.head(&id).await?;
            this.verify_now(&target, &target.manifest(&head).await?).await
        });
        begun.map(|begun| begun.job)
    }

    async fn verify_now(&self, target: &Target, manifest: &Manifest) -> Result<(), Error> {
        self.note(|job| job.bytes_total = manifest.objects().map(|object| object.bytes).sum());
        for collection in &manifest.collections {
            for shard in &collection.shards {
                self.note(|job| job.at = format!("shard {} of {}", shard.shard, collection.name));
                self.verify_shard(target, shard).await?;
            }
        }
        Ok(())
    }

    async fn verify_shard(&self, target: &Target, shard: &ShardCopy) -> Result<(), Error> {
        let damaged = |error: &dyn std::fmt::Display| {
            Error::internal(format!("shard {} cannot be restored from this backup: {error}", shard.shard))
        };
        let mut inspection = Inspection::default();
        let mut pieces = target.get_all(shard.pieces.clone(), AT_ONCE);
        while let Some(piece) = pieces.try_next().await? {
            self.note_bytes(piece.len() as u64);
            let looked = move || inspection.take(&piece).map(|()| inspection);
            inspection = tokio::task::spawn_blocking(looked)
                .await
                .map_err(Error::internal)?
                .map_err(|error| damaged(&error))?;
            if inspection.contents().blobs.len() > shard.blobs.len() + shard.missing.len() {
                return Err(damaged(&"its records name bytes of more files than it has"));
            }
        }
        let contents = inspection.finish().map_err(|error| damaged(&error))?;
        let found = (contents.points, contents.documents, contents.files);
        if found != (shard.points, shard.documents, shard.files) {
            return Err(damaged(&format!("it holds {found:?} points, documents and files")));
        }
        let objects: Vec<Object> = shard.blobs.iter().map(|blob| blob.object).collect();
        let mut blobs = target.get_all(objects, LARGE_AT_ONCE);
        while let Some(blob) = blobs.try_next().await? {
            self.note_bytes(blob.len() as u64);
        }
        Ok(())
    }

    /// Begins to put a backup back.
    ///
    /// # Errors
    /// Conflict, when this node is at something else.
    pub async fn restore(&self, id: &str, options: RestoreOptions) -> Result<Job, Error> {
        let target = self.target().await?;
        let this = self.clone();
        let begun =
            self.begin(JobKind::Restore, id, async move |id| this.restore_now(&target, &id, options).await);
        begun.map(|begun| begun.job)
    }

    /// Begins to delete a backup, and the objects that no other one names.
    ///
    /// # Errors
    /// Not found; conflict, when this node is at something else, or somebody else uses the target.
    pub async fn delete(&self, id: &str) -> Result<Job, Error> {
        let target = self.target().await?;
        target.head(id).await?;
        self.begin_locked(JobKind::Delete, id, target, async move |target, lock, id| {
            lock.check().await?;
            target.forget(&id).await?;
            target.sweep(&lock).await.map(drop)
        })
        .await
        .map(|begun| begun.job)
    }

    /// Deletes this cluster's oldest backups, so that as many stay as are to be kept: of those that hold
    /// everything, and of those of the same collections, and of both those apart that lack files, which take
    /// the place of no whole one. Never the one that was just made, and none while one is being restored.
    async fn retire(&self, target: &Target, lock: &Lock, made: &str) -> Result<(), Error> {
        let keep = self.inner.config.keep;
        if keep == 0 {
            return Ok(());
        }
        let state = self.inner.cluster.fresh_state(Instant::now() + LEFTOVERS_TIMEOUT).await?;
        let reports = self.inner.cluster.reports().await;
        let is_restore = |job: &Job| job.kind == JobKind::Restore && job.state == JobState::Running;
        let restores = reports.values().filter_map(|report| report.job.as_ref()).any(is_restore);
        if restores || !state.restoring.is_empty() {
            tracing::info!("no backup is deleted while one is restored");
            return Ok(());
        }
        let heads = target.heads().await?;
        let mut alike: BTreeMap<(bool, Vec<&str>), Vec<&Head>> = BTreeMap::new();
        for head in heads.iter().filter(|head| head.cluster_id == state.cluster_id) {
            let names = head.collections.iter().map(|collection| collection.name.as_str());
            let names = if head.is_full { Vec::new() } else { names.collect() };
            alike.entry((head.missing_files == 0, names)).or_default().push(head);
        }
        for ours in alike.values() {
            let surplus = &ours[..ours.len().saturating_sub(keep)];
            for head in surplus.iter().filter(|head| head.id != made) {
                lock.check().await?;
                target.forget(&head.id).await?;
                tracing::info!(backup = head.id, "an old backup was deleted");
            }
        }
        // Also what broken backups have left.
        let (objects, bytes) = target.sweep(lock).await?;
        tracing::info!(objects, bytes, "what no backup needs was deleted");
        Ok(())
    }

    /// Ends the restores that this node has left half-way, because its process ended or the cluster did not
    /// answer: nobody else would.
    pub(crate) fn end_leftovers(&self) {
        let this = self.clone();
        tokio::spawn(async move {
            loop {
                let _alone = this.inner.restoring.lock().await;
                match this.try_end_leftovers().await {
                    Ok(()) => return,
                    Err(error) => tracing::debug!(%error, "what restores have left will be ended later"),
                }
                tokio::time::sleep(LEFTOVERS_PAUSE).await;
            }
        });
    }

    /// As [`Backups::end_leftovers`], once, while no restore of this node runs.
    async fn try_end_leftovers(&self) -> Result<(), Error> {
        let cluster = &self.inner.cluster;
        let state = cluster.fresh_state(Instant::now() + LEFTOVERS_TIMEOUT).await?;
        let ours = state.restoring.values().filter(|restore| restore.node == cluster.node());
        let ours: BTreeSet<RequestId> = ours.map(|restore| restore.id).collect();
        for restore in ours {
            tracing::warn!("a restore that this node has left half-way is ended");
            cluster.control(Command::AbortRestore { restore }, Instant::now() + LEFTOVERS_TIMEOUT).await?;
        }
        Ok(())
    }

    /// Who says that the target is in use.
    fn holder(&self, id: &str) -> String {
        let state = self.inner.cluster.state();
        let name = state.nodes.get(&self.inner.cluster.node()).map_or("", |node| node.name.as_str());
        format!("node {name} of cluster {} for backup {id}", state.cluster_id)
    }

    /// As [`Backups::begin`], with the right to write and delete, which is given back when it is done.
    async fn begin_locked<F>(
        &self,
        kind: JobKind,
        backup: &str,
        target: Target,
        run: impl FnOnce(Target, Arc<Lock>, String) -> F + Send + 'static,
    ) -> Result<Begun, Error>
    where
        F: Future<Output = Result<(), Error>> + Send + 'static,
    {
        let (this, backup) = (self.clone(), backup.to_owned());
        // A task of its own: a client that goes away must not leave the lock behind.
        let begun = tokio::spawn(async move {
            let lock = Arc::new(target.lock(&this.holder(&backup)).await?);
            let taken = lock.clone();
            let begun = this.begin(kind, &backup, async move |id| {
                let ran = run(target, taken.clone(), id).await;
                taken.release().await;
                ran
            });
            if begun.is_err() {
                lock.release().await;
            }
            begun
        });
        begun.await.map_err(Error::internal)?
    }

    fn begin<F>(&self, kind: JobKind, backup: &str, run: impl FnOnce(String) -> F) -> Result<Begun, Error>
    where
        F: Future<Output = Result<(), Error>> + Send + 'static,
    {
        let job = {
            let mut slot = self.inner.job.lock();
            check_idle(slot.as_ref())?;
            slot.insert(Job::begin(kind, backup, self.inner.cluster.node())).clone()
        };
        let (sender, receiver) = oneshot::channel();
        let this = self.clone();
        let running = tokio::spawn(run(backup.to_owned()));
        tokio::spawn(async move {
            let ended = running.await.unwrap_or_else(|error| Err(Error::internal(error)));
            let result = if ended.is_ok() { "ok" } else { "failed" };
            metrics::counter!("shoal_backup_jobs_total", "kind" => kind.name(), "result" => result)
                .increment(1);
            this.note(|job| {
                job.end(&ended);
                match &ended {
                    Ok(()) => tracing::info!(kind = kind.name(), backup = job.backup, "done"),
                    Err(error) => tracing::error!(kind = kind.name(), backup = job.backup, %error, "failed"),
                }
            });
            // Nobody has to wait for it.
            drop(sender.send(ended));
        });
        Ok(Begun { job, ended: receiver })
    }

    /// Notes that so many bytes more were read or written.
    fn note_bytes(&self, bytes: u64) {
        self.note(|job| job.bytes_done += bytes);
    }

    fn note(&self, change: impl FnOnce(&mut Job)) {
        if let Some(job) = &mut *self.inner.job.lock() {
            change(job);
        }
    }
}

/// One thing at a time.
fn check_idle(job: Option<&Job>) -> Result<(), Error> {
    match job.filter(|job| job.state == JobState::Running) {
        None => Ok(()),
        Some(busy) => {
            let message = format!("this node is at the {} of backup {}", busy.kind.name(), busy.backup);
            Err(Error::new(ErrorCode::Conflict, message))
        }
    }
}

/// The time in UTC, so that names sort by age, and a few digits that make it unique.
fn new_id() -> String {
    let now = jiff::Timestamp::from_second(crate::cluster::unix_now() as i64).unwrap_or_default();
    format!("{}-{:08x}", now.strftime("%Y%m%dT%H%M%SZ"), rand::random::<u32>())
}
