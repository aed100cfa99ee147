//! The trait that a group's state implements, and its adapter to openraft.
//!
//! A state machine keeps, with its data and in the same atomic step, the *tag* of the last
//! command it applied: opaque bytes that hold openraft's log id and membership. It may hold its
//! data in volatile form between checkpoints; the log is purged only below a checkpoint.

use std::io;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use bytes::Bytes;
use futures::TryStreamExt;
use openraft::storage::{EntryResponder, RaftSnapshotBuilder, RaftStateMachine};
use openraft::{EntryPayload, OptionalSend};
use serde::{Deserialize, Serialize};
use shoal_proto::{GroupId, codec};

use crate::log::GroupLog;
use crate::runtime::blocking;
use crate::snapshot::Snapshots;
use crate::snapshot::hold::Kept;
use crate::snapshot::spool::{HELD_LOG_BYTES, Spool};
use crate::types::{LogIdOf, Reply, SnapshotMetaOf, SnapshotOf, StoredMembershipOf, TypeConfig};

/// The most entries that are applied in one step of the blocking pool.
const APPLY_BATCH: usize = 64;

/// One committed entry on its way into a state machine.
#[derive(Clone, Debug)]
pub struct Committed {
    /// Its index in the log.
    pub index: u64,
    /// To be stored with its effect; see the module's documentation.
    pub tag: Vec<u8>,
    /// The command; none for entries that are Raft's own.
    pub command: Option<Bytes>,
}

/// A consistent copy of a state, fixed at the moment it was made, that can be read at leisure
/// while the state goes on.
pub trait Export: Send + Sync + 'static {
    /// The next piece, or none at the end. Pieces are at most a few MiB.
    fn next_piece(&self) -> io::Result<Option<Vec<u8>>>;

    /// About how many bytes all pieces have together, as far as that is known.
    fn about_bytes(&self) -> u64 {
        0
    }
}

/// A tag and the consistent copy that it belongs to.
pub type Exported = (Option<Vec<u8>>, Box<dyn Export>);

/// What a group replicates. All methods block; the adapter calls them off the async threads.
pub trait StateMachine: Send + Sync + 'static {
    /// The tag of the last applied command, if there was one.
    fn applied_tag(&self) -> io::Result<Option<Vec<u8>>>;

    /// Applies committed entries in order and answers each. An error stops the group on this
    /// node: a command that is merely wrong gets an answer that says so.
    fn apply(&self, entries: Vec<Committed>) -> io::Result<Vec<Bytes>>;

    /// Makes everything applied so far durable and returns the tag that is durable now.
    fn checkpoint(&self) -> io::Result<Option<Vec<u8>>>;

    /// Fixes a consistent copy with its tag.
    fn export(&self) -> io::Result<Exported>;

    /// Replaces the state by an export that was received into a file, durably, with its tag.
    /// A crash in between leaves the old state or none, never a mixture.
    fn install(&self, tag: Vec<u8>, file: &Path) -> io::Result<()>;
}

/// Log id and membership in a tag.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub(crate) struct Tag {
    pub(crate) log_id: Option<LogIdOf<TypeConfig>>,
    pub(crate) membership: StoredMembershipOf<TypeConfig>,
}

impl Tag {
    pub(crate) fn read(bytes: Option<Vec<u8>>) -> io::Result<Tag> {
        match bytes {
            None => Ok(Tag::default()),
            Some(bytes) => {
                codec::decode(&bytes).map_err(|error| io::Error::new(io::ErrorKind::InvalidData, error))
            }
        }
    }

    fn meta(self) -> SnapshotMetaOf<TypeConfig> {
        SnapshotMetaOf::<TypeConfig> { last_log_id: self.log_id, last_membership: self.membership }
    }
}

/// The index of the last applied entry in a tag.
///
/// # Errors
/// Invalid data, when it is not a tag.
pub fn index_of(tag: &[u8]) -> io::Result<u64> {
    Ok(Tag::read(Some(tag.to_vec()))?.log_id.map_or(0, |id| id.index))
}

/// A snapshot's data: on the leader an export or what became of it, on a follower the file that was received.
pub(crate) enum SnapshotData {
    /// A copy that is yet to be read.
    Export(Arc<dyn Export>),
    /// A copy that was read into a file, and may have been sent in part.
    Spool(Arc<Spool>),
    /// A received file; deleted when dropped.
    File(ReceivedFile),
}

/// A file that is deleted when nobody needs it any more.
pub struct ReceivedFile(pub PathBuf);

impl Drop for ReceivedFile {
    fn drop(&mut self) {
        if let Err(error) = std::fs::remove_file(&self.0) {
            tracing::warn!(%error, file = %self.0.display(), "a received snapshot could not be deleted");
        }
    }
}

/// The adapter: openraft's state machine over a [`StateMachine`].
#[derive(Clone)]
pub(crate) struct Machine {
    group: GroupId,
    inner: Arc<dyn StateMachine>,
    log: GroupLog,
    snapshots: Snapshots,
    membership: StoredMembershipOf<TypeConfig>,
}

impl Machine {
    /// The machine of a group's state, whose last membership is `membership`.
    pub(crate) fn new(
        group: GroupId,
        inner: Arc<dyn StateMachine>,
        log: GroupLog,
        snapshots: Snapshots,
        membership: StoredMembershipOf<TypeConfig>,
    ) -> Machine {
        Machine { group, inner, log, snapshots, membership }
    }

    async fn blocking<T: Send + 'static>(
        &self,
        work: impl FnOnce(&dyn StateMachine) -> io::Result<T> + Send + 'static,
    ) -> io::Result<T> {
        let inner = self.inner.clone();
        blocking(move || work(inner.as_ref())).await
    }

    async fn apply_batch(
        &self,
        batch: &mut Vec<Committed>,
        waiting: &mut Vec<Option<Responder>>,
    ) -> io::Result<()> {
        let entries = std::mem::take(batch);
        let replies = self.blocking(move |inner| inner.apply(entries)).await?;
        assert_eq!(replies.len(), waiting.len(), "a state machine answers every entry");
        for (responder, reply) in waiting.drain(..).zip(replies) {
            if let Some(responder) = responder {
                responder.send(Reply(reply));
            }
        }
        Ok(())
    }
}

type Responder = openraft::storage::ApplyResponder<TypeConfig>;

impl RaftStateMachine<TypeConfig> for Machine {
    type SnapshotData = SnapshotData;
    type SnapshotBuilder = Self;

    async fn applied_state(
        &mut self,
    ) -> Result<(Option<LogIdOf<TypeConfig>>, StoredMembershipOf<TypeConfig>), io::Error> {
        let tag = Tag::read(self.blocking(|inner| inner.applied_tag()).await?)?;
        Ok((tag.log_id, tag.membership))
    }

    async fn apply<Strm>(&mut self, mut entries: Strm) -> Result<(), io::Error>
    where
        Strm: futures::Stream<Item = Result<EntryResponder<TypeConfig>, io::Error>> + Unpin + OptionalSend,
    {
        let mut batch = Vec::new();
        let mut waiting = Vec::new();
        while let Some((entry, responder)) = entries.try_next().await? {
            let log_id = entry.log_id;
            let command = match entry.payload {
                EntryPayload::Blank => None,
                EntryPayload::Normal(payload) => Some(payload.0),
                EntryPayload::Membership(membership) => {
                    self.membership = StoredMembershipOf::<TypeConfig>::new(Some(log_id), membership);
                    None
                }
            };
            let tag = Tag { log_id: Some(log_id), membership: self.membership.clone() };
            batch.push(Committed { index: log_id.index, tag: codec::encode(&tag), command });
            waiting.push(responder);
            if batch.len() == APPLY_BATCH {
                self.apply_batch(&mut batch, &mut waiting).await?;
            }
        }
        if !batch.is_empty() {
            self.apply_batch(&mut batch, &mut waiting).await?;
        }
        Ok(())
    }

    /// None while a member gets a snapshot, and goes on from there: after a checkpoint the log would be
    /// dropped that it needs for that.
    async fn try_create_snapshot_builder(&mut self, force: bool) -> Option<Self::SnapshotBuilder> {
        let is_held = self.snapshots.spools().is_held(self.group) && self.log.live_bytes() < HELD_LOG_BYTES;
        (force || !is_held).then(|| self.clone())
    }

    async fn get_snapshot_builder(&mut self) -> Self::SnapshotBuilder {
        self.clone()
    }

    async fn install_snapshot(
        &mut self,
        meta: &SnapshotMetaOf<TypeConfig>,
        snapshot: SnapshotData,
    ) -> Result<(), io::Error> {
        let tag = Tag { log_id: meta.last_log_id, membership: meta.last_membership.clone() };
        self.membership = tag.membership.clone();
        // It was made of a state that is no more.
        self.snapshots.spools().retire(self.group);
        let snapshots = self.snapshots.clone();
        self.blocking(move |inner| {
            let file = match snapshot {
                SnapshotData::File(file) => file,
                SnapshotData::Export(export) => {
                    let mut frames = snapshots.file()?;
                    while let Some(piece) = export.next_piece()? {
                        frames.write(&piece)?;
                    }
                    frames.finish()?
                }
                SnapshotData::Spool(_) => {
                    return Err(io::Error::other("what is sent to others is not installed here"));
                }
            };
            inner.install(codec::encode(&tag), &file.0)
        })
        .await
    }

    async fn get_current_snapshot(
        &mut self,
    ) -> Result<Option<SnapshotOf<TypeConfig, SnapshotData>>, io::Error> {
        let spools = self.snapshots.spools();
        // A checkpoint may have been under way when it was made.
        spools.retire_before(self.group, self.log.purged());
        if let Some(spool) = spools.of(self.group) {
            let meta = spool.meta.clone();
            return Ok(Some(SnapshotOf::<TypeConfig, SnapshotData> {
                meta,
                snapshot: SnapshotData::Spool(spool),
            }));
        }
        // From before the copy is fixed: the log must go on where it ends.
        let hold = spools.holds().begin(self.group);
        let (tag, export) = self.blocking(|inner| inner.export()).await?;
        if tag.is_none() {
            return Ok(None);
        }
        let meta = Tag::read(tag)?.meta();
        Ok(Some(SnapshotOf::<TypeConfig, SnapshotData> {
            meta,
            snapshot: SnapshotData::Export(Arc::new(Kept { export, _hold: hold })),
        }))
    }
}

impl RaftSnapshotBuilder<TypeConfig> for Machine {
    type SnapshotData = SnapshotData;

    /// A "snapshot" on this node is a durable checkpoint: the export is made only when a
    /// follower asks for it.
    async fn build_snapshot(&mut self) -> Result<SnapshotOf<TypeConfig, SnapshotData>, io::Error> {
        struct Nothing;
        impl Export for Nothing {
            fn next_piece(&self) -> io::Result<Option<Vec<u8>>> {
                Err(io::Error::other("a checkpoint is not an export"))
            }
        }
        let tag = self.blocking(|inner| inner.checkpoint()).await?;
        let meta = Tag::read(tag)?.meta();
        // Before anything is purged: from now on a snapshot of before may end where no log begins.
        self.snapshots.spools().retire_before(self.group, meta.last_log_id.map_or(0, |id| id.index));
        Ok(SnapshotOf::<TypeConfig, SnapshotData> { meta, snapshot: SnapshotData::Export(Arc::new(Nothing)) })
    }
}
