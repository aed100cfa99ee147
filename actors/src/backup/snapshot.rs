//! Snapshots: backups of one collection, which can be taken away as one file and be put in the place of a
//! collection, by whatever name.
//!
//! ```text
//!  create:    as a backup of the collection ─▶ read once more as it will be downloaded ─▶ head
//!  download:  head, manifest, objects ─▶ archive, as it goes out
//!  recover:   a snapshot of the target, or one that was received ─▶ every record looked at
//!             ─▶ a collection that nobody sees ─▶ counted ─▶ it takes the name, in one step
//! ```
//!
//! Their objects are those of backups, each kept once, but backups and snapshots do not know each other
//! otherwise: none is listed with the other, and `backup.keep` retires no snapshot.

use std::sync::Arc;

use bytes::Bytes;
use futures::{Stream, TryStreamExt};
use serde::{Deserialize, Serialize};
use sha2::{Digest, Sha256};
use shoal_proto::{Error, ErrorCode, Level};

use super::archive::{MAX_ENTRY_BYTES, hex, pack};
use super::job::{Begun, JobKind};
use super::manifest::{FORMAT, Manifest, Object};
use super::receive::Received;
use super::restore::{Place, RestoreOptions};
use super::target::{Lock, Target};
use super::{Backups, new_id};
use crate::FILES_COLLECTION;

/// How the name of every snapshot ends.
const ENDING: &str = ".snapshot";
/// The length of what `new_id` makes.
const ID_BYTES: usize = 25;

/// What a snapshot is to become.
#[derive(Clone, Debug)]
pub struct Recovery {
    /// The collection: one that is there, whose place it takes, or a new one.
    pub name: String,
    /// Whether there must be none of that name.
    pub only_if_free: bool,
    /// The field of a request that has named the snapshot: what is wrong with it is said of that.
    pub field: &'static str,
}

/// The head of a snapshot: written last, so that it is whole or is not there.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Snapshot {
    /// [`FORMAT`] of the build that wrote it.
    pub format: u32,
    /// The time in UTC, and a few digits that make it unique. They sort by age.
    pub id: String,
    /// The collection that it was made of.
    pub collection: String,
    /// Seconds since the Unix epoch.
    pub created_at: u64,
    /// Bytes of its archive.
    pub bytes: u64,
    /// SHA-256 of its archive, in hexadecimal digits.
    pub checksum: String,
    /// The object that goes into the archive as the head of a backup.
    pub head: Object,
    /// The object that holds the [`Manifest`].
    pub manifest: Object,
}

impl Snapshot {
    /// Its name, as that of a file.
    pub fn name(&self) -> String {
        name_of(&self.collection, &self.id)
    }

    /// The id in a name, when it may be the name of a snapshot.
    pub(super) fn id_of(name: &str) -> Option<&str> {
        let rest = name.strip_suffix(ENDING)?;
        let id = rest.get(rest.len().checked_sub(ID_BYTES)?..)?;
        // Part of a path.
        id.bytes().all(|byte| byte.is_ascii_alphanumeric() || byte == b'-').then_some(id)
    }
}

fn name_of(collection: &str, id: &str) -> String {
    format!("{collection}-{id}{ENDING}")
}

impl Backups {
    /// Begins a snapshot of a collection (a name or an alias); with a store of documents goes the collection
    /// of files. Returns what it will be called.
    ///
    /// # Errors
    /// Conflict, when this node is at something else, somebody else uses the target, or a node of an earlier
    /// build would not understand what this one then says of itself; not found, when there is no such collection.
    pub async fn create_snapshot(&self, collection: &str) -> Result<(String, Begun), Error> {
        self.inner.cluster.require(Level::SNAPSHOTS).await?;
        let collection = self.inner.cluster.state().collection(collection)?.0.to_owned();
        let target = self.target().await?;
        let id = new_id();
        let name = name_of(&collection, &id);
        let this = self.clone();
        let begun = self
            .begin_locked(JobKind::Snapshot, &id, target, async move |target, lock, id| {
                this.snapshot_now(&target, &lock, id, collection).await
            })
            .await?;
        Ok((name, begun))
    }

    async fn snapshot_now(
        &self,
        target: &Target,
        lock: &Arc<Lock>,
        id: String,
        collection: String,
    ) -> Result<(), Error> {
        let head = self.bring(target, &id, Some(vec![collection.clone()])).await?;
        if !head.collections.iter().any(|kept| kept.name == collection) {
            return Err(Error::not_found(format!("`{collection}` was deleted meanwhile")));
        }
        // Qdrant's shapes have no place to say so.
        if let Some(lost) = head.missing.first() {
            let (count, first) = (head.missing_files, lost.document);
            return Err(Error::unavailable(format!(
                "the bytes of {count} files are nowhere, {first} among them: delete or upload them again"
            )));
        }
        let text = serde_json::to_vec_pretty(&head).map_err(Error::internal)?;
        let mut snapshot = Snapshot {
            format: FORMAT,
            id,
            collection,
            created_at: head.created_at,
            bytes: 0,
            checksum: String::new(),
            head: target.put(text.into()).await?.0,
            manifest: head.manifest,
        };
        // As it will be downloaded: what cannot be read is found out now.
        self.note(|job| job.at = "its checksum".to_owned());
        let manifest = target.manifest(&head).await?;
        if let Some(large) = manifest.objects().find(|object| object.bytes > MAX_ENTRY_BYTES) {
            let message = format!("a file of {} bytes is too large for an archive", large.bytes);
            return Err(Error::new(ErrorCode::Unprocessable, message));
        }
        (snapshot.bytes, snapshot.checksum) = sum(pack(target, &snapshot, &manifest)).await?;
        // What it names must still be there.
        lock.check().await?;
        target.publish_snapshot(&snapshot).await?;
        if let Err(error) = lock.check().await {
            target.forget_snapshot(&snapshot.id).await?;
            return Err(error);
        }
        Ok(())
    }

    /// Begins to delete a snapshot, and the objects that nothing else names.
    ///
    /// # Errors
    /// Conflict, when this node is at something else, or somebody else uses the target.
    pub async fn delete_snapshot(&self, snapshot: &Snapshot) -> Result<Begun, Error> {
        let target = self.target().await?;
        self.begin_locked(JobKind::Delete, &snapshot.id, target, async move |target, lock, id| {
            lock.check().await?;
            target.forget_snapshot(&id).await?;
            target.sweep(&lock).await.map(drop)
        })
        .await
    }

    /// Checks that all nodes would understand the end of a recovery: to be asked before a snapshot is brought.
    ///
    /// # Errors
    /// Conflict, while there is a node of an earlier build; unavailable, when all were upgraded just now.
    pub async fn check_recovery(&self) -> Result<(), Error> {
        self.inner.cluster.require(Level::RESTORES_REPLACE).await
    }

    /// Begins to put a snapshot of the target in the place of a collection, or where none is.
    ///
    /// # Errors
    /// Conflict, when this node is at something else, and as [`Backups::check_recovery`]. Waiting for its end
    /// tells invalid, when the snapshot is damaged, and conflict, when there is a collection and must not be.
    pub async fn recover(&self, snapshot: Snapshot, recovery: Recovery) -> Result<Begun, Error> {
        self.check_recovery().await?;
        let target = self.target().await?;
        let this = self.clone();
        self.begin(JobKind::Restore, &snapshot.id.clone(), async move |_| {
            let manifest = target.snapshot_manifest(&snapshot).await?;
            this.recover_now(&target, manifest, recovery).await
        })
    }

    /// Begins to do the same with a snapshot that was received.
    ///
    /// # Errors
    /// As [`Backups::recover`].
    pub async fn recover_received(&self, received: Received, recovery: Recovery) -> Result<Begun, Error> {
        self.check_recovery().await?;
        let this = self.clone();
        let id = received.id.clone();
        self.begin(JobKind::Restore, &id, async move |_| {
            // All of it: its files are deleted when this ends, however it does.
            let received = received;
            this.recover_now(&received.target, received.manifest.clone(), recovery).await
        })
    }

    async fn recover_now(
        &self,
        target: &Target,
        mut manifest: Manifest,
        recovery: Recovery,
    ) -> Result<(), Error> {
        let Recovery { name, only_if_free, field } = recovery;
        self.verify_now(target, &manifest).await.map_err(|error| refused(error, field))?;
        let hidden = format!("_recovering-{}", uuid::Uuid::new_v4().simple());
        let mut others =
            manifest.collections.iter_mut().filter(|collection| collection.name != FILES_COLLECTION);
        match (others.next(), others.next()) {
            (Some(collection), None) => collection.name.clone_from(&hidden),
            _ => return Err(Error::invalid(field, "a snapshot holds one collection, and this does not")),
        }
        // Those of the collection whose place it takes stay, as with Qdrant.
        manifest.aliases.clear();
        let options = RestoreOptions { collections: Some(vec![hidden.clone()]), ..RestoreOptions::default() };
        self.put_back(target, &manifest, &options, Some(Place { hidden, name, only_if_free })).await
    }
}

/// What is wrong with a snapshot is for whoever brings it, and not a fault of this node.
pub(super) fn refused(error: Error, field: &str) -> Error {
    match error.code {
        ErrorCode::Internal => Error::invalid(field, error.message),
        _ => error,
    }
}

/// How many bytes come, and their SHA-256.
async fn sum(archive: impl Stream<Item = Result<Bytes, Error>>) -> Result<(u64, String), Error> {
    let mut archive = std::pin::pin!(archive);
    let (mut bytes, mut hasher) = (0, Sha256::new());
    while let Some(part) = archive.try_next().await? {
        bytes += part.len() as u64;
        // One part may be a whole file.
        let hashed = move || {
            hasher.update(&part);
            hasher
        };
        hasher = tokio::task::spawn_blocking(hashed).await.map_err(Error::internal)?;
    }
    Ok((bytes, hex(&hasher.finalize())))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_id_is_found_in_a_name_and_nothing_else_is_one() {
        let id = new_id();
        assert_eq!(id.len(), ID_BYTES);
        for collection in ["docs", "a-b.c", "文档"] {
            assert_eq!(Snapshot::id_of(&name_of(collection, &id)), Some(id.as_str()));
        }
        let evil = name_of("docs", "../../../../etc/passwd000");
        for name in ["", ".snapshot", "docs.snapshot", "文文文文文文文文文.snapshot", &id, &evil] {
            assert_eq!(Snapshot::id_of(name), None, "{name}");
        }
    }
}
