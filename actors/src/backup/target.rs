//! Where backups are kept: a directory or an S3 bucket, by the same rules.
//!
//! ```text
//!  objects/ab/<BLAKE3>   pieces of shards, bytes of files, manifests: each once, under its hash
//!  backups/<id>.json     names a manifest; written last
//!  snapshots/<id>.json   the same for a snapshot
//!  locks/<number>        who writes or deletes; the highest number counts
//! ```
//!
//! Several clusters may share a target: what they have in common is kept once. While one writes or
//! deletes, the others are refused, so that nobody deletes what somebody else is about to name. A lock
//! ends by itself when nobody renews it; who was stopped for so long finds that out before it names or
//! deletes anything. Clocks of nodes that use one target must agree to within minutes.

use std::collections::BTreeSet;
use std::path::Path as FilePath;
use std::sync::Arc;
use std::time::{Duration, Instant};

use bytes::Bytes;
use futures::{Stream, StreamExt, TryStreamExt};
use object_store::ClientConfigKey;
use object_store::aws::{AmazonS3Builder, AmazonS3ConfigKey};
use object_store::local::LocalFileSystem;
use object_store::path::Path;
use object_store::prefix::PrefixStore;
use object_store::{ObjectStore, ObjectStoreExt, PutMode, PutOptions};
use parking_lot::Mutex;
use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};
use shoal_engine::backup::PIECE_LIMIT_BYTES;
use shoal_proto::{BlobHash, Error, ErrorCode};

use super::manifest::{FORMAT, Head, Manifest, Object};
use super::snapshot::Snapshot;
use crate::cluster::unix_now;

/// How long a lock holds that nobody renews: its holder is gone.
const LOCK_SECONDS: u64 = 300;
/// How often it is renewed.
const RENEW_EVERY: Duration = Duration::from_secs(60);
/// How long one renewal may take, and the pause before a failed one is tried again.
const RENEW_TIMEOUT: Duration = Duration::from_secs(30);
const RENEW_PAUSE: Duration = Duration::from_secs(5);
/// Who could not renew it for so long does not rely on it any more.
const RELY_ON_LOCK: Duration = Duration::from_secs(200);
/// Whether the lock still holds is asked again after so many deletions.
const DELETIONS_A_CHECK: u64 = 100;
/// How long one request to S3 may take: an object may have 256 MiB, and the line may be slow.
const S3_TIMEOUT: &str = "30 minutes";
/// What to do about an object that cannot be used.
const AGAIN: &str =
    "this backup cannot be restored; when that object is deleted, the next backup that has it writes it anew";
/// Requests to the target at once.
pub(crate) const AT_ONCE: usize = 8;
/// Of those that bring the bytes of a file, which may be as large as an upload may be.
pub(crate) const LARGE_AT_ONCE: usize = 2;

/// Where backups are kept. Cheap to clone.
#[derive(Clone)]
pub struct Target {
    store: Arc<dyn ObjectStore>,
    name: String,
}

#[derive(Serialize, Deserialize)]
struct LockFile {
    holder: String,
    /// Seconds since the Unix epoch.
    until: u64,
}

/// The right to write and delete.
pub(crate) struct Lock {
    target: Target,
    number: u64,
    renewed: Arc<Mutex<Instant>>,
    renewal: tokio::task::JoinHandle<()>,
}

impl Target {
    /// A directory's path, or `s3://bucket/prefix`. What S3 needs besides comes from the environment:
    /// `AWS_ACCESS_KEY_ID`, `AWS_SECRET_ACCESS_KEY`, `AWS_REGION`, and `AWS_ENDPOINT_URL` (with
    /// `AWS_ALLOW_HTTP=true` without TLS) for those who are not Amazon.
    ///
    /// # Errors
    /// Invalid, when it is neither, or there is no such directory.
    pub fn open(name: &str) -> Result<Target, Error> {
        let wrong =
            |error: &dyn std::fmt::Display| Error::invalid("backup.target", format!("{name}: {error}"));
        let store: Arc<dyn ObjectStore> = match name.strip_prefix("s3://") {
            Some(rest) => {
                let (bucket, prefix) = rest.split_once('/').unwrap_or((rest, ""));
                let timeout = AmazonS3ConfigKey::Client(ClientConfigKey::Timeout);
                let s3 =
                    AmazonS3Builder::from_env().with_bucket_name(bucket).with_config(timeout, S3_TIMEOUT);
                Arc::new(PrefixStore::new(s3.build().map_err(|error| wrong(&error))?, prefix))
            }
            None => {
                let dir = FilePath::new(name);
                if !dir.is_absolute() {
                    return Err(wrong(&"neither the absolute path of a directory nor s3://bucket/prefix"));
                }
                // Not made here: what is to be mounted there and is not would fill the node's own disk.
                if !dir.is_dir() {
                    return Err(wrong(&"there is no such directory: make it, or mount what belongs there"));
                }
                let files = LocalFileSystem::new_with_prefix(dir).map_err(|error| wrong(&error))?;
                Arc::new(files.with_fsync(true).with_automatic_cleanup(false))
            }
        };
        Ok(Target { store, name: name.to_owned() })
    }

    /// As it was named.
    pub fn name(&self) -> &str {
        &self.name
    }

    fn failed(&self, error: &object_store::Error) -> Error {
        Error::unavailable(format!("the backup target {} failed: {error}", self.name))
    }

    /// Writes an object, unless it is there. Returns whether it was new.
    pub(crate) async fn put(&self, bytes: Bytes) -> Result<(Object, bool), Error> {
        let object = Object { hash: BlobHash(*blake3::hash(&bytes).as_bytes()), bytes: bytes.len() as u64 };
        if self.has(&object).await? {
            return Ok((object, false));
        }
        let put = self.store.put(&object_path(object.hash), bytes.into()).await;
        put.map_err(|error| self.failed(&error))?;
        Ok((object, true))
    }

    /// Whether an object is there, with the size that it should have.
    pub(crate) async fn has(&self, object: &Object) -> Result<bool, Error> {
        match self.store.head(&object_path(object.hash)).await {
            Ok(meta) => Ok(meta.size == object.bytes),
            Err(object_store::Error::NotFound { .. }) => Ok(false),
            Err(error) => Err(self.failed(&error)),
        }
    }

    /// Reads an object.
    ///
    /// # Errors
    /// Internal, when it is missing or is not what was written; unavailable when the target fails.
    pub(crate) async fn get(&self, object: &Object) -> Result<Bytes, Error> {
        let path = object_path(object.hash);
        let damaged = |what: &str| Error::internal(format!("{path} of {} {what}: {AGAIN}", self.name));
        let bytes = match self.read_within(&path, object.bytes).await? {
            Some(bytes) => bytes,
            None => return Err(damaged("is missing")),
        };
        match *blake3::hash(&bytes).as_bytes() == object.hash.0 {
            true => Ok(bytes),
            false => Err(damaged("is damaged")),
        }
    }

    /// Reads objects in their order, so many at once.
    pub(crate) fn get_all(
        &self,
        objects: Vec<Object>,
        at_once: usize,
    ) -> impl Stream<Item = Result<Bytes, Error>> + Send + use<> {
        let target = self.clone();
        let get = move |object: Object| {
            let target = target.clone();
            async move { target.get(&object).await }
        };
        futures::stream::iter(objects).map(get).buffered(at_once)
    }

    async fn read(&self, path: &Path) -> Result<Option<Bytes>, Error> {
        self.read_within(path, u64::MAX).await
    }

    /// Reads a file; nothing of one that has more bytes than that.
    async fn read_within(&self, path: &Path, most: u64) -> Result<Option<Bytes>, Error> {
        let read = async {
            let found = self.store.get(path).await?;
            if found.meta.size > most { Ok(Bytes::new()) } else { found.bytes().await }
        };
        match read.await {
            Ok(bytes) => Ok(Some(bytes)),
            Err(object_store::Error::NotFound { .. }) => Ok(None),
            Err(error) => Err(self.failed(&error)),
        }
    }

    /// Writes the head of a backup whose objects are all there.
    pub(crate) async fn publish(&self, head: &Head) -> Result<(), Error> {
        self.write(&head_path(&head.id), head).await
    }

    /// Writes the head of a snapshot whose objects are all there.
    pub(crate) async fn publish_snapshot(&self, snapshot: &Snapshot) -> Result<(), Error> {
        self.write(&snapshot_path(&snapshot.id), snapshot).await
    }

    async fn write(&self, path: &Path, head: &impl Serialize) -> Result<(), Error> {
        let text = serde_json::to_vec_pretty(head).map_err(Error::internal)?;
        let put = self.store.put(path, text.into()).await;
        put.map(drop).map_err(|error| self.failed(&error))
    }

    /// The backups that are there, oldest first.
    ///
    /// # Errors
    /// Unavailable when the target fails; internal when a head is damaged.
    pub async fn heads(&self) -> Result<Vec<Head>, Error> {
        let mut heads: Vec<Head> = self.read_folder("backups").await?;
        heads.sort_by(|a, b| a.id.cmp(&b.id));
        Ok(heads)
    }

    /// The snapshots that are there, of all collections, oldest first.
    ///
    /// # Errors
    /// As [`Target::heads`].
    pub async fn snapshots(&self) -> Result<Vec<Snapshot>, Error> {
        let mut snapshots: Vec<Snapshot> = self.read_folder("snapshots").await?;
        snapshots.sort_by(|a, b| a.id.cmp(&b.id));
        Ok(snapshots)
    }

    /// The latest backup of everything that a cluster has made, if there is any.
    ///
    /// # Errors
    /// As [`Target::heads`], as far as it has to look.
    pub(crate) async fn newest_full(&self, cluster_id: &str) -> Result<Option<Head>, Error> {
        let mut paths = self.list_folder("backups").await?;
        // Ids sort by age.
        paths.sort_unstable();
        for path in paths.iter().rev() {
            let Some(text) = self.read(path).await? else { continue };
            let head: Head = self.parse(path, &text)?;
            if head.is_full && head.cluster_id == cluster_id {
                return Ok(Some(head));
            }
        }
        Ok(None)
    }

    async fn read_folder<T: DeserializeOwned>(&self, folder: &str) -> Result<Vec<T>, Error> {
        let mut heads = Vec::new();
        for path in self.list_folder(folder).await? {
            // One that was deleted meanwhile is none.
            if let Some(text) = self.read(&path).await? {
                heads.push(self.parse(&path, &text)?);
            }
        }
        Ok(heads)
    }

    async fn list_folder(&self, folder: &str) -> Result<Vec<Path>, Error> {
        let listed = self.store.list(Some(&Path::from(folder)));
        let paths: Vec<Path> =
            listed.map_ok(|meta| meta.location).try_collect().await.map_err(|error| self.failed(&error))?;
        // Somebody may have put a downloaded snapshot beside its head.
        Ok(paths.into_iter().filter(|path| path.extension() == Some("json")).collect())
    }

    /// The snapshot of that name.
    ///
    /// # Errors
    /// Not found; and as [`Target::heads`].
    pub async fn snapshot(&self, name: &str) -> Result<Snapshot, Error> {
        let missing = || Error::not_found(format!("no snapshot `{name}` in {}", self.name));
        let id = Snapshot::id_of(name).ok_or_else(missing)?;
        let path = snapshot_path(id);
        let text = self.read(&path).await?.ok_or_else(missing)?;
        let snapshot: Snapshot = self.parse(&path, &text)?;
        if snapshot.id == id && snapshot.name() == name { Ok(snapshot) } else { Err(missing()) }
    }

    /// One backup.
    ///
    /// # Errors
    /// Not found; and as [`Target::heads`].
    pub async fn head(&self, id: &str) -> Result<Head, Error> {
        let missing = || Error::not_found(format!("no backup {id} in {}", self.name));
        // Part of a path.
        if !id.bytes().all(|byte| byte.is_ascii_alphanumeric() || byte == b'-') {
            return Err(missing());
        }
        let path = head_path(id);
        let text = self.read(&path).await?.ok_or_else(missing)?;
        self.parse(&path, &text)
    }

    fn parse<T: DeserializeOwned>(&self, path: &Path, text: &[u8]) -> Result<T, Error> {
        let damaged = |error: serde_json::Error| {
            Error::internal(format!(
                "{path} of {} is not the head of a backup ({error}): repair or delete it",
                self.name
            ))
        };
        serde_json::from_slice(text).map_err(damaged)
    }

    /// What a backup consists of.
    ///
    /// # Errors
    /// Unprocessable, when a later version has written it; and as [`Target::get`].
    pub async fn manifest(&self, head: &Head) -> Result<Manifest, Error> {
        if head.format > FORMAT {
            let message =
                format!("backup {} was written by version {} in a later format", head.id, head.version);
            return Err(Error::new(ErrorCode::Unprocessable, message));
        }
        self.read_manifest(&head.id, &head.manifest).await
    }

    /// What a snapshot consists of.
    ///
    /// # Errors
    /// As [`Target::manifest`].
    pub(crate) async fn snapshot_manifest(&self, snapshot: &Snapshot) -> Result<Manifest, Error> {
        if snapshot.format > FORMAT {
            let message = format!("snapshot {} was written in a later format", snapshot.name());
            return Err(Error::new(ErrorCode::Unprocessable, message));
        }
        self.read_manifest(&snapshot.id, &snapshot.manifest).await
    }

    async fn read_manifest(&self, id: &str, manifest: &Object) -> Result<Manifest, Error> {
        let wrong = |reason: &dyn std::fmt::Display| {
            Error::internal(format!("the manifest of {id} is not understood: {reason}"))
        };
        let text = self.get(manifest).await?;
        let manifest: Manifest = serde_json::from_slice(&text).map_err(|error| wrong(&error))?;
        // Pieces are read as a whole, several at once.
        match manifest.largest_piece() {
            large if large > PIECE_LIMIT_BYTES => Err(wrong(&format!("a piece of {large} bytes"))),
            _ => Ok(manifest),
        }
    }

    /// Takes a backup's head away, if it is there. Its objects stay until [`Target::sweep`].
    pub(crate) async fn forget(&self, id: &str) -> Result<(), Error> {
        self.delete(&head_path(id)).await
    }

    /// Takes a snapshot's head away, as [`Target::forget`] does with a backup's.
    pub(crate) async fn forget_snapshot(&self, id: &str) -> Result<(), Error> {
        self.delete(&snapshot_path(id)).await
    }

    async fn delete(&self, path: &Path) -> Result<(), Error> {
        match self.store.delete(path).await {
            Ok(()) | Err(object_store::Error::NotFound { .. }) => Ok(()),
            Err(error) => Err(self.failed(&error)),
        }
    }

    /// Deletes the objects that no backup and no snapshot names. Returns how many, and their bytes.
    pub(crate) async fn sweep(&self, lock: &Lock) -> Result<(u64, u64), Error> {
        let mut named = BTreeSet::new();
        for head in self.heads().await? {
            named.insert(object_path(head.manifest.hash));
            named.extend(self.manifest(&head).await?.objects().map(|object| object_path(object.hash)));
        }
        for snapshot in self.snapshots().await? {
            named.extend([object_path(snapshot.head.hash), object_path(snapshot.manifest.hash)]);
            let manifest = self.snapshot_manifest(&snapshot).await?;
            named.extend(manifest.objects().map(|object| object_path(object.hash)));
        }
        let (mut count, mut bytes) = (0, 0);
        let mut all = self.store.list(Some(&Path::from("objects")));
        while let Some(meta) = all.next().await {
            let meta = meta.map_err(|error| self.failed(&error))?;
            if !named.contains(&meta.location) {
                if u64::is_multiple_of(count, DELETIONS_A_CHECK) {
                    lock.check().await?;
                }
                lock.check_age()?;
                self.store.delete(&meta.location).await.map_err(|error| self.failed(&error))?;
                count += 1;
                bytes += meta.size;
            }
        }
        Ok((count, bytes))
    }

    /// Takes the right to write and delete.
    ///
    /// # Errors
    /// Conflict, when somebody else has it.
    pub(crate) async fn lock(&self, holder: &str) -> Result<Lock, Error> {
        let locks = self.locks().await?;
        let newest = locks.last().copied().unwrap_or(0);
        if let Some(text) = self.read(&lock_path(newest)).await?
            && let Ok(held) = serde_json::from_slice::<LockFile>(&text)
            && held.until > unix_now()
        {
            let message = format!(
                "{} is in use by {}; should that be gone, it is free in {} s",
                self.name,
                held.holder,
                held.until.saturating_sub(unix_now())
            );
            return Err(Error::new(ErrorCode::Conflict, message));
        }
        let number = newest + 1;
        let options = PutOptions { mode: PutMode::Create, ..PutOptions::default() };
        let until = unix_now() + LOCK_SECONDS;
        match self.store.put_opts(&lock_path(number), lock_file(holder, until).into(), options).await {
            Ok(_) => {}
            Err(object_store::Error::AlreadyExists { .. } | object_store::Error::Precondition { .. }) => {
                let message = format!("somebody else has begun to use {}", self.name);
                return Err(Error::new(ErrorCode::Conflict, message));
            }
            Err(error) => return Err(self.failed(&error)),
        }
        for stale in &locks {
            drop(self.store.delete(&lock_path(*stale)).await);
        }
        let renewed = Arc::new(Mutex::new(Instant::now()));
        let (target, noted, holder) = (self.clone(), renewed.clone(), holder.to_owned());
        let renewal = tokio::spawn(async move {
            let mut pause = RENEW_EVERY;
            loop {
                tokio::time::sleep(pause).await;
                let now = Instant::now();
                let text = lock_file(&holder, unix_now() + LOCK_SECONDS);
                let path = lock_path(number);
                let put = tokio::time::timeout(RENEW_TIMEOUT, target.store.put(&path, text.into()));
                let is_renewed = matches!(put.await, Ok(Ok(_)));
                pause = if is_renewed { RENEW_EVERY } else { RENEW_PAUSE };
                match is_renewed {
                    true => *noted.lock() = now,
                    false => tracing::warn!("the lock of the backup target could not be renewed"),
                }
            }
        });
        let lock = Lock { target: self.clone(), number, renewed, renewal };
        if let Err(error) = lock.check().await {
            lock.release().await;
            return Err(error);
        }
        Ok(lock)
    }

    /// The numbers of the locks that are there, the one that counts last.
    async fn locks(&self) -> Result<Vec<u64>, Error> {
        let listed = self.store.list(Some(&Path::from("locks")));
        let paths: Vec<Path> =
            listed.map_ok(|meta| meta.location).try_collect().await.map_err(|error| self.failed(&error))?;
        let mut numbers: Vec<u64> = paths.iter().filter_map(|path| path.filename()?.parse().ok()).collect();
        numbers.sort_unstable();
        Ok(numbers)
    }
}

impl Lock {
    /// To be called before anything is done that needs the right.
    ///
    /// # Errors
    /// Conflict, when it was lost.
    pub(crate) async fn check(&self) -> Result<(), Error> {
        self.check_age()?;
        match self.target.locks().await?.last() == Some(&self.number) {
            true => self.check_age(),
            false => Err(self.lost()),
        }
    }

    /// As [`Lock::check`], as far as it can be known without asking.
    fn check_age(&self) -> Result<(), Error> {
        let is_fresh = self.renewed.lock().elapsed() < RELY_ON_LOCK;
        if is_fresh { Ok(()) } else { Err(self.lost()) }
    }

    fn lost(&self) -> Error {
        let message = format!("the lock of {} was lost: it was not reached for too long", self.target.name);
        Error::new(ErrorCode::Conflict, message)
    }

    /// Gives the right back. The file stays, so that its number is not given out again.
    pub(crate) async fn release(&self) {
        self.renewal.abort();
        let ended = lock_file("nobody", 0);
        if let Err(error) = self.target.store.put(&lock_path(self.number), ended.into()).await {
            tracing::warn!(%error, "the lock of the backup target could not be given back; it ends by itself");
        }
    }
}

impl Drop for Lock {
    fn drop(&mut self) {
        self.renewal.abort();
    }
}

fn lock_path(number: u64) -> Path {
    Path::from(format!("locks/{number}"))
}

fn lock_file(holder: &str, until: u64) -> Vec<u8> {
    let file = LockFile { holder: holder.to_owned(), until };
    serde_json::to_vec(&file).unwrap_or_default()
}

fn object_path(hash: BlobHash) -> Path {
    let name = hash.to_string();
    Path::from(format!("objects/{}/{name}", &name[..2]))
}

fn head_path(id: &str) -> Path {
    Path::from(format!("backups/{id}.json"))
}

fn snapshot_path(id: &str) -> Path {
    Path::from(format!("snapshots/{id}.json"))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn head(id: &str, manifest: Object) -> Head {
        Head {
            format: FORMAT,
            id: id.into(),
            created_at: 1,
            cluster_id: "c".into(),
            is_full: true,
            version: "0".into(),
            manifest,
            collections: Vec::new(),
            bytes: 0,
            new_bytes: 0,
            missing_files: 0,
            missing: Vec::new(),
        }
    }

    async fn publish(target: &Target, id: &str, content: &[u8]) -> Object {
        let (piece, _) = target.put(Bytes::copy_from_slice(content)).await.expect("written");
        let shard = super::super::manifest::ShardCopy {
            shard: shoal_proto::ShardId(1),
            index: 1,
            points: 0,
            documents: 0,
            files: 0,
            pieces: vec![piece],
            blobs: Vec::new(),
            missing: Vec::new(),
        };
        let collection = super::super::manifest::CollectionCopy {
            name: "c".into(),
            config: Default::default(),
            replication_factor: 1,
            created_at: 1,
            shards: vec![shard],
        };
        let manifest = Manifest { collections: vec![collection], ..Manifest::default() };
        let text = serde_json::to_vec(&manifest).expect("writable");
        let (manifest, _) = target.put(text.into()).await.expect("written");
        target.publish(&head(id, manifest)).await.expect("written");
        piece
    }

    #[tokio::test]
    async fn what_no_backup_names_is_swept_and_nothing_else() {
        let dir = tempfile::tempdir().expect("a directory");
        let target = Target::open(dir.path().to_str().expect("text")).expect("opens");
        let old = publish(&target, "1-a", b"only the old one has it").await;
        let new = publish(&target, "2-a", b"only the new one has it").await;
        assert!(!target.put(Bytes::from_static(b"only the new one has it")).await.expect("known").1);
        assert_eq!(target.heads().await.expect("listed").len(), 2);
        target.forget("1-a").await.expect("forgotten");
        let lock = target.lock("test").await.expect("free");
        assert_eq!(target.sweep(&lock).await.expect("swept").0, 2, "the old piece and the old manifest");
        assert!(target.get(&old).await.is_err());
        assert_eq!(&target.get(&new).await.expect("kept")[..], b"only the new one has it");
        assert_eq!(target.head("1-a").await.map_err(|error| error.code), Err(ErrorCode::NotFound));
        assert_eq!(target.head("../x").await.map_err(|error| error.code), Err(ErrorCode::NotFound));
    }

    #[tokio::test]
    async fn the_latest_is_of_this_cluster_and_of_everything() {
        let dir = tempfile::tempdir().expect("a directory");
        let target = Target::open(dir.path().to_str().expect("text")).expect("opens");
        assert_eq!(target.newest_full("c").await.expect("listed"), None);
        publish(&target, "1-a", b"old").await;
        publish(&target, "2-a", b"newer").await;
        let newest = target.head("2-a").await.expect("there");
        let of_others = Head { id: "3-a".into(), cluster_id: "d".into(), ..newest.clone() };
        target.publish(&of_others).await.expect("written");
        let of_a_part = Head { id: "4-a".into(), is_full: false, ..newest.clone() };
        target.publish(&of_a_part).await.expect("written");
        assert_eq!(target.newest_full("c").await.expect("listed"), Some(newest));
    }

    #[tokio::test]
    async fn what_a_snapshot_names_is_kept_while_it_is_there() {
        let dir = tempfile::tempdir().expect("a directory");
        let target = Target::open(dir.path().to_str().expect("text")).expect("opens");
        let id = "20260101T000000Z-00000000";
        let piece = publish(&target, "1-a", b"both have it").await;
        let backup = target.head("1-a").await.expect("there");
        let (head, _) = target.put(Bytes::from_static(b"its head")).await.expect("written");
        let snapshot = Snapshot {
            format: FORMAT,
            id: id.into(),
            collection: "c".into(),
            created_at: 1,
            bytes: 0,
            checksum: String::new(),
            head,
            manifest: backup.manifest,
        };
        target.publish_snapshot(&snapshot).await.expect("written");
        std::fs::write(dir.path().join("snapshots/c.snapshot"), b"downloaded").expect("writable");
        target.forget("1-a").await.expect("forgotten");
        let lock = target.lock("test").await.expect("free");
        assert_eq!(target.sweep(&lock).await.expect("swept").0, 0);
        target.get(&piece).await.expect("kept");
        assert_eq!(target.snapshots().await.expect("listed"), std::slice::from_ref(&snapshot));
        assert_eq!(target.snapshot(&snapshot.name()).await.expect("found"), snapshot);
        let other = target.snapshot(&format!("d-{id}.snapshot")).await;
        assert_eq!(other.map_err(|error| error.code), Err(ErrorCode::NotFound));
        target.forget_snapshot(id).await.expect("forgotten");
        assert_eq!(target.sweep(&lock).await.expect("swept").0, 3, "the piece, the manifest and the head");
    }

    #[tokio::test]
    async fn what_is_not_what_was_written_is_not_read() {
        let dir = tempfile::tempdir().expect("a directory");
        let target = Target::open(dir.path().to_str().expect("text")).expect("opens");
        let (object, is_new) = target.put(Bytes::from_static(b"bytes")).await.expect("written");
        assert!(is_new);
        let path = dir.path().join(object_path(object.hash).to_string());
        std::fs::write(&path, b"bytez").expect("writable");
        assert!(target.get(&object).await.is_err_and(|error| error.message.contains("damaged")));
        std::fs::write(&path, b"").expect("writable");
        // A short one is written again by the next backup that has it.
        assert!(target.put(Bytes::from_static(b"bytes")).await.expect("written").1);
        assert_eq!(&target.get(&object).await.expect("whole")[..], b"bytes");
    }

    #[tokio::test]
    async fn what_is_larger_than_it_may_be_is_not_read() {
        let dir = tempfile::tempdir().expect("a directory");
        let target = Target::open(dir.path().to_str().expect("text")).expect("opens");
        publish(&target, "1-a", &vec![0; PIECE_LIMIT_BYTES as usize + 1]).await;
        let refused = target.manifest(&target.head("1-a").await.expect("there")).await;
        assert!(refused.is_err_and(|error| error.message.contains("a piece of 8388609 bytes")));
        publish(&target, "2-a", &vec![0; PIECE_LIMIT_BYTES as usize]).await;
        target.manifest(&target.head("2-a").await.expect("there")).await.expect("not too large");
        // An object that has more bytes than was said is another one.
        let (object, _) = target.put(Bytes::from_static(b"bytes")).await.expect("written");
        let shorter = Object { bytes: 4, ..object };
        assert!(target.get(&shorter).await.is_err_and(|error| error.message.contains("is damaged")));
    }

    #[tokio::test]
    async fn one_at_a_time_writes() {
        let dir = tempfile::tempdir().expect("a directory");
        let target = Target::open(dir.path().to_str().expect("text")).expect("opens");
        let lock = target.lock("a").await.expect("free");
        let refused = target.lock("b").await.map(drop).expect_err("taken");
        assert_eq!(refused.code, ErrorCode::Conflict);
        lock.release().await;
        drop(target.lock("b").await.expect("free again"));
        // Its holder is gone without a word: it ends by itself.
        assert!(target.lock("c").await.is_err());
        let stale =
            serde_json::to_vec(&LockFile { holder: "b".into(), until: unix_now() - 1 }).expect("text");
        std::fs::write(dir.path().join("locks/2"), stale).expect("writable");
        let lock = target.lock("c").await.expect("free");
        assert_eq!((lock.number, target.locks().await.expect("listed")), (3, vec![3]));
        lock.check().await.expect("it holds");
        // Whoever had it before and comes back finds that it is somebody else's.
        std::fs::write(dir.path().join("locks/4"), b"{}").expect("writable");
        assert!(lock.check().await.is_err());
    }
}
