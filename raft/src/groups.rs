//! Many groups in one process: opening, finding, serving and closing them.

mod group;
mod receive;

use std::collections::{BTreeSet, HashMap};
use std::io;
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use openraft::async_runtime::WatchReceiver;
use openraft::raft::{AppendEntriesRequest, VoteRequest};
use openraft::{Raft, SnapshotPolicy};
use parking_lot::RwLock;
use shoal_proto::peer::{RaftKind, RaftMessage, RaftReply};
use shoal_proto::{GroupId, NodeId, codec};

pub use group::{Group, GroupStatus};

use group::MAX_LAG;

use crate::error::Error;
use crate::log::LogStore;
use crate::machine::{Machine, StateMachine, Tag};
use crate::network::{Network, Peers};
use crate::runtime::blocking;
use crate::snapshot::{Snapshots, Throttle};
use crate::types::TypeConfig;

/// How long a leader may take to say who is in its group.
const MEMBERSHIP_TIMEOUT: Duration = Duration::from_secs(1);
/// The most entries that wait to be purged together.
const PURGE_BATCH: u64 = 256;

/// Timers and limits of every group.
#[derive(Clone, Debug)]
pub struct RaftConfig {
    /// How often a leader is heard of when there is nothing to say.
    pub heartbeat: Duration,
    /// The shortest and the longest time without a leader before an election; the longest one
    /// is also the leader's lease.
    pub election_timeout: (Duration, Duration),
    /// A checkpoint is made after so many entries.
    pub checkpoint_entries: u64,
    /// Entries kept behind a checkpoint, so that a follower slightly behind needs no snapshot.
    pub keep_entries: u64,
    /// Bytes a second that this node sends for moves, of all groups together; no limit when zero.
    pub move_bytes_per_second: u64,
}

impl Default for RaftConfig {
    fn default() -> Self {
        RaftConfig {
            heartbeat: Duration::from_millis(60),
            election_timeout: (Duration::from_millis(250), Duration::from_millis(400)),
            checkpoint_entries: 20_000,
            keep_entries: 2_000,
            move_bytes_per_second: 64 << 20,
        }
    }
}

/// All groups of this node.
#[derive(Clone)]
pub struct Groups {
    inner: Arc<Inner>,
}

struct Inner {
    node: NodeId,
    log: LogStore,
    peers: Peers,
    config: Arc<openraft::Config>,
    snapshots: Snapshots,
    groups: RwLock<HashMap<GroupId, Group>>,
}

impl Groups {
    /// No groups yet. Snapshots on their way in and out are in the folders `incoming` and `outgoing` of
    /// `dir`, which is on the same file system as the data; what can be gone on with stays there. Of that
    /// file system `reserve_bytes` stay free.
    pub fn new(
        node: NodeId,
        log: LogStore,
        peers: Peers,
        config: &RaftConfig,
        dir: &Path,
        reserve_bytes: u64,
    ) -> io::Result<Groups> {
        let snapshots = Snapshots::open(dir, config.move_bytes_per_second, reserve_bytes)?;
        let config = openraft::Config {
            cluster_name: "shoal".into(),
            heartbeat_interval: config.heartbeat.as_millis() as u64,
            election_timeout_min: config.election_timeout.0.as_millis() as u64,
            election_timeout_max: config.election_timeout.1.as_millis() as u64,
            install_snapshot_timeout: 600_000,
            max_payload_entries: 256,
            snapshot_policy: SnapshotPolicy::LogsSinceLast(config.checkpoint_entries),
            max_in_snapshot_log_to_keep: config.keep_entries,
            purge_batch_size: config.keep_entries.clamp(1, PURGE_BATCH),
            enable_pre_vote: Some(true),
            // A restarted leader must be elected again: its state may be behind what it had
            // committed, and its lease is gone.
            enable_leader_restore: Some(false),
            log_stage_capacity: Some(1),
            state_machine_channel_size: Some(256),
            api_channel_size: Some(4096),
            notification_channel_size: Some(4096),
            ..openraft::Config::default()
        };
        let config = Arc::new(config.validate().map_err(io::Error::other)?);
        let groups = RwLock::default();
        Ok(Groups { inner: Arc::new(Inner { node, log, peers, config, snapshots, groups }) })
    }

    /// Channels to the other nodes.
    pub fn peers(&self) -> &Peers {
        &self.inner.peers
    }

    /// This node.
    pub fn node(&self) -> NodeId {
        self.inner.node
    }

    /// The pace of what this node sends for moves.
    pub fn throttle(&self) -> &Throttle {
        self.inner.snapshots.throttle()
    }

    /// Says whether the disk has room for snapshots. Without it one is sent as it is read, and begins anew
    /// after a break; none is taken in, and what is here of them is deleted.
    pub fn set_room(&self, has_room: bool) {
        self.inner.snapshots.set_room(has_room);
    }

    /// Says whether all nodes are of builds to which a snapshot can be offered. To those from before that,
    /// and until this is said, it is sent as it is read.
    pub fn set_snapshot_offers(&self, are_understood: bool) {
        self.inner.snapshots.spools().set_understood(are_understood);
    }

    /// Deletes the copy of a group's state that was being sent: it was made of a state that is no more.
    pub async fn drop_copy(&self, id: GroupId) {
        let snapshots = self.inner.snapshots.clone();
        let dropped = blocking(move || {
            snapshots.spools().retire(id);
            Ok(())
        });
        if let Err(error) = dropped.await {
            tracing::warn!(group = id.0, %error, "the copy of a state that is no more could not be deleted");
        }
    }

    /// Keeps no log any longer for members that have got a snapshot and do not need it any more: they have
    /// nearly all, or another node leads.
    pub(crate) fn release_logs(&self) {
        let holds = self.inner.snapshots.spools().holds();
        // Who lacks more than is kept behind a checkpoint would need another snapshot after it.
        let enough = MAX_LAG.min(self.inner.config.max_in_snapshot_log_to_keep);
        for (id, member) in holds.behind() {
            let is_needed = self.get(id).is_ok_and(|group| {
                let status = group.status();
                let matched = status.matched.get(&member).copied();
                status.role == "leader" && matched.is_some_and(|matched| matched + enough < status.last_index)
            });
            if !is_needed {
                holds.release(id, member);
            }
        }
    }

    /// Deletes now and then what is left of snapshots that nobody goes on with.
    pub(crate) fn sweep_snapshots(&self) {
        self.inner.snapshots.sweep();
    }

    /// Opens a group's replica on this node, or returns the one that is open.
    pub async fn open(&self, id: GroupId, machine: Arc<dyn StateMachine>) -> Result<Group, Error> {
        if let Ok(group) = self.get(id) {
            return Ok(group);
        }
        let stopped = |reason: String| Error::Stopped { group: id, reason };
        let failed = |error: io::Error| stopped(error.to_string());
        let mut log = self.inner.log.group(id).await.map_err(failed)?;
        let tag = machine.applied_tag().and_then(Tag::read).map_err(failed)?;
        if let Some(applied) = tag.log_id {
            log.adopt(applied).await.map_err(failed)?;
        }
        let snapshots = self.inner.snapshots.clone();
        // openraft reads its own state by way of a snapshot when it starts: not of an older one.
        snapshots.spools().withhold(id);
        let network = Network { group: id, peers: self.inner.peers.clone(), snapshots: snapshots.clone() };
        let state = machine.clone();
        let machine = Machine::new(id, machine, log.clone(), snapshots.clone(), tag.membership);
        let mut config = self.inner.config.clone();
        if log.has_forgotten() {
            Arc::make_mut(&mut config).enable_elect = false;
        }
        let raft = Raft::new(self.inner.node, config, network, log.clone(), machine)
            .await
            .map_err(|error| stopped(error.to_string()))?;
        // Its metrics are those of an empty log until the core has begun; an answer from the core
        // says that it has. Who asked earlier would think that this replica has forgotten all.
        raft.is_initialized().await.map_err(|error| stopped(error.to_string()))?;
        snapshots.spools().adopt(id, log.purged());
        let members = raft.metrics().borrow_watched().membership_config.membership().nodes().count();
        log.company().note_first(members);
        let (node, peers) = (self.inner.node, self.inner.peers.clone());
        let (idle, heard, handing_over) = (Arc::default(), Arc::default(), Arc::default());
        let group = Group { id, node, raft, state, log, peers, idle, heard, handing_over };
        self.inner.groups.write().insert(id, group.clone());
        Ok(group)
    }

    /// The group's replica on this node.
    pub fn get(&self, id: GroupId) -> Result<Group, Error> {
        self.inner.groups.read().get(&id).cloned().ok_or(Error::UnknownGroup(id))
    }

    /// All replicas on this node, by group.
    pub fn all(&self) -> Vec<Group> {
        let mut groups: Vec<Group> = self.inner.groups.read().values().cloned().collect();
        groups.sort_by_key(|group| group.id);
        groups
    }

    /// Stops a group's replica on this node; its log stays.
    pub async fn close(&self, id: GroupId) {
        let group = self.inner.groups.write().remove(&id);
        if let Some(group) = group
            && let Err(error) = group.raft.shutdown().await
        {
            tracing::warn!(group = id.0, %error, "a group did not shut down cleanly");
        }
    }

    /// Stops the replica of a group that is no more and forgets its log.
    pub async fn forget(&self, id: GroupId) -> io::Result<()> {
        self.close(id).await;
        self.inner.snapshots.forget(id).await?;
        self.inner.log.forget(id).await
    }

    /// Stops the replica of a group, and drops its log if the group has let this node go. Returns
    /// whether it has. What is kept of the log makes it safe to come back.
    ///
    /// It is asked when nothing can be acknowledged here any longer: what a replica acknowledges
    /// after the answer may count, if the node is taken back. `set_aside` takes away the state, before
    /// the log goes: with its log gone, a state would make this node the member that it once was.
    pub async fn leave_if_let_go(
        &self,
        id: GroupId,
        among: &BTreeSet<NodeId>,
        set_aside: impl FnOnce() -> io::Result<()> + Send + 'static,
    ) -> io::Result<bool> {
        self.close(id).await;
        if !self.was_let_go(id, among).await {
            return Ok(false);
        }
        blocking(set_aside).await?;
        self.inner.snapshots.forget(id).await?;
        self.inner.log.group(id).await?.leave().await?;
        Ok(true)
    }

    /// The shards' groups that this node has a replica of, whether it is open or not.
    pub async fn held(&self) -> io::Result<BTreeSet<GroupId>> {
        let mut held: BTreeSet<GroupId> = self.inner.log.groups().await?.into_iter().collect();
        held.extend(self.inner.groups.read().keys());
        held.remove(&GroupId::CONTROL);
        Ok(held)
    }

    /// Whether a group has let this node go, by the word of its leader, who is one of these. A node
    /// that is let go is not told: nothing more is sent to it.
    pub async fn was_let_go(&self, id: GroupId, among: &BTreeSet<NodeId>) -> bool {
        for node in among.iter().filter(|node| **node != self.node()) {
            let asked = self.peers().has_let_go(id, *node, self.node(), MEMBERSHIP_TIMEOUT);
            if let Some(answer) = asked.await {
                return answer;
            }
        }
        false
    }

    /// Serves one Raft message from a peer.
    pub async fn handle(&self, message: RaftMessage) -> Result<RaftReply, Error> {
        if message.target != self.inner.node.0 {
            let reason = format!("meant for node {}, this is node {}", message.target, self.inner.node);
            return Err(Error::BadMessage(reason));
        }
        let id = GroupId(message.group);
        let group = self.get(id)?;
        let kind = RaftKind::try_from(message.kind).unwrap_or_default();
        if kind == RaftKind::Sleep {
            let answer = group.agree_to_sleep(&read(&message.body)?);
            return Ok(RaftReply { body: codec::encode(&answer).into() });
        }
        if matches!(kind, RaftKind::Vote | RaftKind::PreVote) {
            let request: VoteRequest<TypeConfig> = read(&message.body)?;
            if !group.log.may_vote_for(request.last_log_id) {
                let reason = "the candidate has less than this replica had before".to_owned();
                return Err(Error::Timeout { group: id, reason });
            }
        }
        if kind == RaftKind::PreVote && group.refuses_pre_vote() {
            let reason = "the group has a leader that lives, and sleeps or has just woken".to_owned();
            return Err(Error::Timeout { group: id, reason });
        }
        let raft = group.raft.clone();
        let stopped = |error: String| Error::Stopped { group: id, reason: error };
        let body = &message.body;
        let reply = match kind {
            RaftKind::Append => {
                let request: AppendEntriesRequest<TypeConfig> = read(body)?;
                let commit = request.leader_commit.map_or(0, |id| id.index);
                let is_late = request.entries.is_empty() && group.has_just_agreed_to_sleep();
                let answer = raft.append_entries(request).await.map_err(|e| stopped(e.to_string()))?;
                if answer.is_success() {
                    group.heard.note(commit);
                }
                group.stand_again();
                // Only now: a tick before it would find the leader's lease run out.
                if !is_late {
                    group.wake();
                }
                codec::encode(&answer)
            }
            RaftKind::Vote => {
                group.wake();
                codec::encode(&raft.vote(read(body)?).await.map_err(|e| stopped(e.to_string()))?)
            }
            RaftKind::PreVote => {
                group.wake();
                codec::encode(&raft.pre_vote(read(body)?).await.map_err(|e| stopped(e.to_string()))?)
            }
            RaftKind::TransferLeader => {
                group.wake();
                let answer = raft.handle_transfer_leader(read(body)?).await;
                codec::encode(&answer.map_err(|e| stopped(e.to_string()))?)
            }
            RaftKind::Membership => codec::encode(&group.has_let_go(read(body)?).await?),
            RaftKind::SnapshotOffer => codec::encode(&self.offered(&group, read(body)?).await?),
            RaftKind::Sleep | RaftKind::Unspecified => return Err(Error::BadMessage("no kind".into())),
        };
        Ok(RaftReply { body: reply.into() })
    }

    /// The index up to which a group's log was dropped here. A state older than that cannot be
    /// brought up to date by the log.
    pub async fn purged(&self, id: GroupId) -> Result<u64, Error> {
        let log = self.inner.log.group(id).await;
        let log = log.map_err(|error| Error::Stopped { group: id, reason: error.to_string() })?;
        Ok(log.purged())
    }
}

fn read<T: serde::de::DeserializeOwned>(body: &[u8]) -> Result<T, Error> {
    codec::decode(body).map_err(|error| Error::BadMessage(error.to_string()))
}
