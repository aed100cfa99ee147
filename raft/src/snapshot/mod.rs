//! Snapshots on their way from a group's leader to a member that is too far behind for the log.
//!
//! ```text
//!  leader                                              member
//!  export ─▶ spool: a file, synced
//!            offer {vote, where it ends, digest} ────▶ partial: a file, read back and checked
//!            ◀──────────────── so many pieces are here
//!            the pieces after those, at a limited pace ─▶ each checked, written, synced now and then
//!            the end ────────────────────────────────▶ digest of the whole ─▶ installed
//! ```
//!
//! | module | what |
//! |---|---|
//! | [`pace`] | how many bytes a second a node sends for moves |
//! | [`tally`] | what tells one snapshot from another |
//! | [`room`] | whether the disk has room for one |
//! | [`progress`] | whether a member still takes what is sent |
//! | [`frames`] | the file that a snapshot is on either side |
//! | [`hold`] | on the leader: for whom the log is kept |
//! | [`spool`] | on the leader: snapshots that can be sent again from any piece on |
//! | [`inbox`] | on the member: snapshots that are there in part |
//! | [`send`] | one attempt to send |
//!
//! **What goes on after a break.** A spool and a partial outlive the process. The next attempt of the same leader, be
//! it after a cut or after a restart of either side, finds the spool as long as the log still reaches back to it,
//! offers it, and sends what the member lacks. A snapshot is known by a digest over its position and all its pieces: a
//! partial is only ever continued by the same bytes, and is thrown away when another snapshot is offered. Another
//! leader makes a snapshot of its own, and that one begins at zero.
//!
//! **What is deleted when.** A spool: when nobody waits for it, when the log no longer reaches back to it,
//! and [`KEPT`] after its last use. A partial: when it is installed, when another snapshot is offered, when
//! the group leaves the node, and [`KEPT`] after its last piece. What a crash left half made: at the next
//! start. Once the disk's reserve is reached: spools that nobody reads, and partials, which are refused until
//! there is room for all of them.
//!
//! **2026-11, a copy on the leader's disk.** An export can be read once, and never again: the state goes on.
//! To be able to repeat a piece, the leader writes the export to a file first. That costs room for a copy of
//! the shard while it is sent; below the disk's reserve the export is sent as it is read, as before, and a
//! break costs all of it. In return the store sets old values aside only for as long as the file takes to
//! write, however slow the member is. From the export on until the member has caught up, the leader makes no
//! checkpoints of that group (at most [`spool::HELD_LOG_BYTES`] of log): else the log would often be gone
//! before a member at a limited pace could use it.

pub(crate) mod frames;
pub(crate) mod hold;
pub(crate) mod inbox;
mod pace;
mod progress;
pub(crate) mod room;
mod send;
pub(crate) mod spool;
pub(crate) mod tally;

use std::io;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use parking_lot::Mutex;
use serde::{Deserialize, Serialize};
use shoal_proto::codec::{self, CodecError};
use shoal_proto::{GroupId, NodeId};
use tokio::time::Instant;

pub use pace::Throttle;
pub(crate) use send::pieces;

use crate::runtime::blocking;
use crate::types::{SnapshotMetaOf, TypeConfig, VoteOf};
use frames::FrameFile;
use inbox::Inbox;
use room::Room;
use spool::Spools;
use tally::SnapshotId;

/// How long after its last use a snapshot that was not sent or received to its end is kept.
pub(crate) const KEPT: Duration = Duration::from_secs(3600);
/// Bytes of the checksum in front of each piece.
const SUM_BYTES: usize = 4;
/// How often it is looked for what is older.
const SWEEP_EVERY: Duration = Duration::from_secs(60);

/// What a leader asks before it sends a snapshot. The answer is how many of its pieces are there.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub(crate) struct Offer {
    pub(crate) vote: VoteOf<TypeConfig>,
    pub(crate) meta: SnapshotMetaOf<TypeConfig>,
    pub(crate) id: SnapshotId,
}

/// What the first piece of a snapshot says of it.
#[derive(Clone, Debug)]
pub(crate) struct Header {
    pub(crate) group: GroupId,
    pub(crate) target: NodeId,
    pub(crate) vote: VoteOf<TypeConfig>,
    pub(crate) meta: SnapshotMetaOf<TypeConfig>,
    /// Which snapshot it is and how many pieces are left out, since they are there already; none when it
    /// comes from no file and cannot be continued.
    pub(crate) resumed: Option<(SnapshotId, u64)>,
}

/// As it travels when it cannot be continued.
type Whole = (GroupId, NodeId, VoteOf<TypeConfig>, SnapshotMetaOf<TypeConfig>);
/// As it travels when it can.
type Resumed = (GroupId, NodeId, VoteOf<TypeConfig>, SnapshotMetaOf<TypeConfig>, SnapshotId, u64);

impl Header {
    pub(crate) fn write(self) -> Vec<u8> {
        let Header { group, target, vote, meta, resumed } = self;
        match resumed {
            None => codec::encode::<Whole>(&(group, target, vote, meta)),
            Some((id, from)) => codec::encode::<Resumed>(&(group, target, vote, meta, id, from)),
        }
    }

    /// Reads either form: one is longer than the other, and nothing may be left over.
    pub(crate) fn read(bytes: &[u8]) -> Result<Header, CodecError> {
        if let Ok((group, target, vote, meta, id, from)) = codec::decode::<Resumed>(bytes) {
            return Ok(Header { group, target, vote, meta, resumed: Some((id, from)) });
        }
        let (group, target, vote, meta) = codec::decode::<Whole>(bytes)?;
        Ok(Header { group, target, vote, meta, resumed: None })
    }
}

/// All snapshots of this node that are on their way in or out. Cheap to clone.
#[derive(Clone)]
pub(crate) struct Snapshots(Arc<Inner>);

struct Inner {
    incoming: PathBuf,
    room: Room,
    inbox: Inbox,
    spools: Spools,
    throttle: Throttle,
    swept: Mutex<Instant>,
}

impl Snapshots {
    /// Opens what an earlier run of the process has left in the folders `incoming` and `outgoing` of `dir`,
    /// and deletes what is of no use. `bytes_per_second` is what may be sent; no limit when zero.
    /// `reserve_bytes` of the disk stay free.
    pub(crate) fn open(dir: &Path, bytes_per_second: u64, reserve_bytes: u64) -> io::Result<Snapshots> {
        let incoming = dir.join("incoming");
        let room = Room::above(dir, reserve_bytes);
        let inbox = Inbox::open(&incoming, room.clone())?;
        let spools = Spools::open(&dir.join("outgoing"), room.clone())?;
        let throttle = Throttle::new(bytes_per_second);
        let swept = Mutex::new(Instant::now());
        Ok(Snapshots(Arc::new(Inner { incoming, room, inbox, spools, throttle, swept })))
    }

    /// A new file for a snapshot that is received in one go.
    pub(crate) fn file(&self) -> io::Result<FrameFile> {
        FrameFile::create(&self.0.incoming, self.0.room.clone())
    }

    /// Says whether the disk has room. When it has none any more, what nobody uses just now is deleted at
    /// once.
    pub(crate) fn set_room(&self, is_there: bool) {
        self.0.room.set(is_there);
        if !is_there {
            self.clean();
        }
    }

    pub(crate) fn inbox(&self) -> &Inbox {
        &self.0.inbox
    }

    pub(crate) fn spools(&self) -> &Spools {
        &self.0.spools
    }

    pub(crate) fn throttle(&self) -> &Throttle {
        &self.0.throttle
    }

    /// Deletes all that is here of a group that has left this node.
    pub(crate) async fn forget(&self, group: GroupId) -> io::Result<()> {
        let this = self.clone();
        blocking(move || {
            this.spools().retire(group);
            this.inbox().forget(group)
        })
        .await
    }

    /// Deletes now and then what nobody has gone on with for long. Returns at once.
    pub(crate) fn sweep(&self) {
        {
            let mut swept = self.0.swept.lock();
            if swept.elapsed() < SWEEP_EVERY {
                return;
            }
            *swept = Instant::now();
        }
        self.clean();
    }

    fn clean(&self) {
        let this = self.clone();
        tokio::spawn(async move {
            let swept = blocking(move || {
                this.spools().sweep();
                this.inbox().sweep()
            });
            if let Err(error) = swept.await {
                tracing::warn!(%error, "old snapshots could not be deleted");
            }
        });
    }
}

/// Whether a file was last written so long ago that nobody will go on with it.
fn is_stale(path: &Path) -> bool {
    let written = std::fs::metadata(path).and_then(|metadata| metadata.modified());
    // What lies in the future was written before the clock was set right.
    written.is_ok_and(|written| written.elapsed().is_ok_and(|age| age > KEPT))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::types::{LogIdOf, StoredMembershipOf};

    #[test]
    fn both_forms_of_a_header_are_told_apart() {
        let vote = VoteOf::<TypeConfig>::new(3, NodeId(2));
        let meta = SnapshotMetaOf::<TypeConfig>::default();
        let id = SnapshotId { digest: [7; 32], pieces: 9, bytes: 1 << 30 };
        for resumed in [None, Some((id, 0)), Some((id, 9))] {
            let header = Header { group: GroupId(4), target: NodeId(1), vote, meta: meta.clone(), resumed };
            let read = Header::read(&header.clone().write()).expect("readable");
            assert_eq!((read.group, read.target, read.vote), (header.group, header.target, header.vote));
            assert_eq!((read.meta, read.resumed), (header.meta, header.resumed));
        }
        assert!(Header::read(&[]).is_err());
    }

    /// Nodes of different builds send each other snapshots in the middle of an upgrade, and what has come of
    /// one outlives it on the disk.
    #[test]
    fn what_travels_stays_as_it_is() {
        let vote = VoteOf::<TypeConfig>::new_committed(3, NodeId(2));
        let members = (1..=2).map(NodeId);
        let membership = openraft::Membership::new_with_defaults(vec![members.clone().collect()], members);
        let log_id = |index| Some(LogIdOf::<TypeConfig>::new_term_index(3, index));
        let meta = SnapshotMetaOf::<TypeConfig> {
            last_log_id: log_id(9),
            last_membership: StoredMembershipOf::<TypeConfig>::new(log_id(4), membership),
        };
        let id = SnapshotId { digest: [7; 32], pieces: 9, bytes: 1 << 30 };
        let vote_bytes = [3, 1, 2, 1];
        // The end, the membership with where it stands, and an empty name from openraft's earlier versions.
        let meta_bytes = [1, 3, 9, 1, 3, 4, 1, 2, 1, 2, 2, 1, 2, 0];
        let id_bytes = [&[7; 32][..], &[9, 252, 0, 0, 0, 64]].concat();
        let offer = Offer { vote, meta: meta.clone(), id };
        let offer_bytes = [&[1][..], &vote_bytes, &meta_bytes, &id_bytes].concat();
        assert_eq!(codec::encode(&offer), offer_bytes);
        let read: Offer = codec::decode(&offer_bytes).expect("readable");
        assert_eq!((read.vote, read.meta, read.id), (vote, meta.clone(), id));
        let whole = [&[1, 4, 1][..], &vote_bytes, &meta_bytes].concat();
        let resumed = [&whole[..], &id_bytes, &[5]].concat();
        for (from, bytes) in [(None, whole), (Some((id, 5)), resumed)] {
            let (group, target) = (GroupId(4), NodeId(1));
            let header = Header { group, target, vote, meta: meta.clone(), resumed: from };
            assert_eq!(header.write(), bytes);
            let read = Header::read(&bytes).expect("readable");
            assert_eq!((read.group, read.target, read.vote), (group, target, vote));
            assert_eq!((read.meta, read.resumed), (meta.clone(), from));
        }
    }
}
