//! Many groups in one process: opening, finding, serving and closing them.

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::io;
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use bytes::Bytes;
use futures::{Stream, StreamExt};
use openraft::async_runtime::WatchReceiver;
use openraft::errors::{ClientWriteError, LinearizableReadError, RaftError};
use openraft::raft::{AppendEntriesRequest, VoteRequest};
use openraft::{
    ChangeMembers, EmptyNode, EntryPayload, Instant, Raft, ReadPolicy, ServerState, SnapshotPolicy,
};
use parking_lot::RwLock;
use shoal_proto::peer::{FetchStateRequest, Piece, RaftKind, RaftMessage, RaftReply};
use shoal_proto::planted::{Bug, is_planted};
use shoal_proto::{GroupId, NodeId, codec};

use crate::error::Error;
use crate::idle::Idle;
use crate::log::{GroupLog, LogStore};
use crate::machine::{FrameFile, Machine, ReceivedFile, SnapshotData, StateMachine, Tag};
use crate::membership::{Members, Step, next_step};
use crate::network::{Lane, Network, Peers, pieces};
use crate::runtime::blocking;
use crate::staleness::Heard;
use crate::types::{Payload, SnapshotMetaOf, SnapshotOf, TypeConfig, VoteOf};

/// Entries that a learner may be behind when it gets a vote.
const MAX_LAG: u64 = 1000;
/// How recently a learner must have answered when it gets a vote.
const HEARD_LATELY: Duration = Duration::from_secs(2);
/// How long a leader may take to say who is in its group.
const MEMBERSHIP_TIMEOUT: Duration = Duration::from_secs(1);
/// The most entries that wait to be purged together.
const PURGE_BATCH: u64 = 256;
/// After so long without a new leader another member is asked to lead.
const TRANSFER_RETRY: Duration = Duration::from_millis(300);

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
}

impl Default for RaftConfig {
    fn default() -> Self {
        RaftConfig {
            heartbeat: Duration::from_millis(60),
            election_timeout: (Duration::from_millis(250), Duration::from_millis(400)),
            checkpoint_entries: 20_000,
            keep_entries: 2_000,
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
    /// Where snapshots are received, on the same file system as the data.
    incoming: PathBuf,
    groups: RwLock<HashMap<GroupId, Group>>,
}

/// One group on this node. Cheap to clone.
#[derive(Clone)]
pub struct Group {
    id: GroupId,
    node: NodeId,
    raft: Raft<TypeConfig, Machine>,
    state: Arc<dyn StateMachine>,
    log: GroupLog,
    peers: Peers,
    idle: Arc<Idle>,
    heard: Arc<Heard>,
    /// The term in which this node, its leader, hands the group over; zero when it does not.
    handing_over: Arc<AtomicU64>,
}

/// What is known about a group on this node.
#[derive(Clone, Debug)]
pub struct GroupStatus {
    /// The group.
    pub id: GroupId,
    /// Who leads it, as far as this node knows.
    pub leader: Option<NodeId>,
    /// `leader`, `follower`, `learner`, `candidate` or `stopped`.
    pub role: &'static str,
    /// The current term.
    pub term: u64,
    /// The index of the last entry in this node's log.
    pub last_index: u64,
    /// The last applied index.
    pub applied: u64,
    /// The index of the last checkpoint.
    pub checkpoint: u64,
    /// The index up to which the log is purged.
    pub purged: u64,
    /// Voting members; before and after it, in the middle of a change.
    pub voters: BTreeSet<NodeId>,
    /// Whether the group is in the middle of a change of its voters.
    pub is_joint: bool,
    /// Members that do not vote (yet).
    pub learners: BTreeSet<NodeId>,
    /// On the leader: how far each member's log is known to match.
    pub matched: BTreeMap<NodeId, u64>,
}

impl GroupStatus {
    /// Everybody in the group.
    pub fn members(&self) -> BTreeSet<NodeId> {
        self.voters.union(&self.learners).copied().collect()
    }
}

impl Groups {
    /// No groups yet. `incoming` is a directory for snapshots that are being received; what a
    /// crash left in it is deleted.
    pub fn new(
        node: NodeId,
        log: LogStore,
        peers: Peers,
        config: &RaftConfig,
        incoming: PathBuf,
    ) -> io::Result<Groups> {
        if incoming.exists() {
            std::fs::remove_dir_all(&incoming)?;
        }
        std::fs::create_dir_all(&incoming)?;
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
        Ok(Groups { inner: Arc::new(Inner { node, log, peers, config, incoming, groups }) })
    }

    /// Channels to the other nodes.
    pub fn peers(&self) -> &Peers {
        &self.inner.peers
    }

    /// This node.
    pub fn node(&self) -> NodeId {
        self.inner.node
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
        let network = Network { group: id, peers: self.inner.peers.clone() };
        let state = machine.clone();
        let machine = Machine::new(machine, &self.inner.incoming, tag.membership);
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
                let answer = raft.append_entries(request).await.map_err(|e| stopped(e.to_string()))?;
                if answer.is_success() {
                    group.heard.note(commit);
                }
                group.stand_again();
                // Only now: a tick before it would find the leader's lease run out.
                group.wake();
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
            RaftKind::Sleep | RaftKind::Unspecified => return Err(Error::BadMessage("no kind".into())),
        };
        Ok(RaftReply { body: reply.into() })
    }

    /// A group's whole state as it is here, in pieces, for a peer whose own copy is damaged.
    pub async fn state_pieces(&self, id: GroupId) -> Result<impl Stream<Item = Piece> + Send + use<>, Error> {
        let group = self.get(id)?;
        let stopped = |reason: String| Error::Stopped { group: id, reason };
        let exported = blocking(move || group.state.export()).await;
        let (tag, export) = exported.map_err(|error| stopped(error.to_string()))?;
        let tag = tag.ok_or_else(|| stopped("nothing was applied here yet".into()))?;
        Ok(pieces(tag.into(), export.into()))
    }

    /// Fetches a group's whole state from a node, this one or another: its tag, the last index that it holds,
    /// and a file for [`StateMachine::install`].
    pub async fn fetch_state(
        &self,
        id: GroupId,
        from: NodeId,
    ) -> Result<(Vec<u8>, u64, ReceivedFile), Error> {
        let failed = |reason: String| Error::Timeout { group: id, reason };
        let (tag, received) = if from == self.inner.node {
            self.receive(&mut self.state_pieces(id).await?.map(Ok).boxed()).await?
        } else {
            let mut client = self.peers().client(from, Lane::Bulk).map_err(failed)?;
            let answer = client.fetch_state(FetchStateRequest { group: id.0 }).await;
            self.receive(&mut answer.map_err(|status| failed(status.message().to_owned()))?.into_inner())
                .await?
        };
        let index = crate::machine::index_of(&tag).map_err(|error| Error::BadMessage(error.to_string()))?;
        Ok((tag.into(), index, received))
    }

    /// The index up to which a group's log was dropped here. A state older than that cannot be
    /// brought up to date by the log.
    pub async fn purged(&self, id: GroupId) -> Result<u64, Error> {
        let log = self.inner.log.group(id).await;
        let log = log.map_err(|error| Error::Stopped { group: id, reason: error.to_string() })?;
        Ok(log.purged())
    }

    /// Receives pieces into a file: the header of the first, and the file once all were there.
    async fn receive(
        &self,
        pieces: &mut (impl Stream<Item = Result<Piece, tonic::Status>> + Unpin),
    ) -> Result<(Bytes, ReceivedFile), Error> {
        let mut header: Option<Bytes> = None;
        let broken = |reason: &dyn std::fmt::Display| Error::BadMessage(format!("snapshot: {reason}"));
        let mut frames = FrameFile::create(&self.inner.incoming).map_err(|error| broken(&error))?;
        let mut whole = false;
        while let Some(piece) = pieces.next().await {
            let piece = piece.map_err(|status| broken(&status.message()))?;
            if !piece.header.is_empty() {
                header = Some(piece.header.clone());
            }
            let (sum, body) = piece.data.split_at_checked(4).ok_or_else(|| broken(&"a piece is short"))?;
            if sum != crc32fast::hash(body).to_le_bytes() {
                return Err(broken(&"a piece has the wrong checksum"));
            }
            whole = body.is_empty();
            if !whole {
                let body = piece.data.slice(4..);
                let written = blocking(move || frames.write(&body).map(|()| frames)).await;
                frames = written.map_err(|error| broken(&error))?;
            }
        }
        let header = header.ok_or_else(|| broken(&"no header"))?;
        if !whole {
            return Err(broken(&"it ended early"));
        }
        let received = blocking(|| frames.finish()).await.map_err(|error| broken(&error))?;
        Ok((header, received))
    }

    /// Takes in a snapshot from a group's leader.
    pub async fn handle_snapshot(
        &self,
        mut pieces: impl Stream<Item = Result<Piece, tonic::Status>> + Unpin,
    ) -> Result<RaftReply, Error> {
        type Header = (GroupId, NodeId, VoteOf<TypeConfig>, SnapshotMetaOf<TypeConfig>);
        let (header, received) = self.receive(&mut pieces).await?;
        let (id, target, vote, meta): Header = read(&header)?;
        if target != self.inner.node {
            return Err(Error::BadMessage("a snapshot for another node".into()));
        }
        let group = self.get(id)?;
        let snapshot =
            SnapshotOf::<TypeConfig, SnapshotData> { meta, snapshot: SnapshotData::File(received) };
        let answer = group.raft.install_full_snapshot(vote, snapshot).await;
        let answer = answer.map_err(|error| Error::Stopped { group: id, reason: error.to_string() })?;
        group.stand_again();
        metrics::counter!("shoal_raft_snapshots_installed_total").increment(1);
        Ok(RaftReply { body: codec::encode(&answer).into() })
    }
}

fn read<T: serde::de::DeserializeOwned>(body: &[u8]) -> Result<T, Error> {
    codec::decode(body).map_err(|error| Error::BadMessage(error.to_string()))
}

impl Group {
    /// The group's id.
    pub fn id(&self) -> GroupId {
        self.id
    }

    /// A follower has no use for what only a leader can do, and with its timers on it would look
    /// for another leader.
    fn wake_leader(&self) {
        if self.is_leader() {
            self.wake();
        }
    }

    pub(crate) fn node(&self) -> NodeId {
        self.node
    }

    pub(crate) fn raft(&self) -> &Raft<TypeConfig, Machine> {
        &self.raft
    }

    pub(crate) fn peers(&self) -> &Peers {
        &self.peers
    }

    pub(crate) fn heard(&self) -> &Heard {
        &self.heard
    }

    pub(crate) fn idle(&self) -> &Idle {
        &self.idle
    }

    /// Starts a new group with these voters. Harmless when the group has started already, and
    /// when several of the voters do it with the same set, and when this node was a member before.
    pub async fn initialize(&self, voters: &BTreeSet<NodeId>) -> Result<(), Error> {
        if self.log.has_left() {
            return Ok(());
        }
        let members: BTreeMap<NodeId, EmptyNode> = voters.iter().map(|&node| (node, EmptyNode {})).collect();
        match self.raft.initialize(members).await {
            Ok(()) | Err(RaftError::APIError(openraft::errors::InitializeError::NotAllowed(_))) => Ok(()),
            Err(error) => Err(self.stopped(error)),
        }
    }

    /// Whether the group has started, as far as this node knows.
    pub async fn is_initialized(&self) -> Result<bool, Error> {
        self.raft.is_initialized().await.map_err(|error| self.stopped(error))
    }

    /// Proposes a command and waits until it is applied here.
    ///
    /// # Errors
    /// [`Error::NotLeader`] proves that nothing was proposed; [`Error::OutcomeUnknown`] means
    /// that it may have been.
    pub async fn propose(&self, command: Bytes, timeout: Duration) -> Result<(u64, Bytes), Error> {
        self.wake_leader();
        let write = self.raft.client_write(Payload(command));
        match tokio::time::timeout(timeout, write).await {
            Ok(Ok(answer)) => Ok((answer.log_id.index, answer.data.0)),
            Ok(Err(RaftError::APIError(ClientWriteError::ForwardToLeader(to)))) => {
                let leader = to.leader_id.filter(|leader| *leader != self.node);
                Err(Error::NotLeader { group: self.id, leader })
            }
            Ok(Err(RaftError::APIError(ClientWriteError::LogEntryDiscarded(_)))) | Err(_) => {
                Err(Error::OutcomeUnknown(self.id))
            }
            Ok(Err(RaftError::APIError(error))) => {
                Err(Error::Membership { group: self.id, reason: error.to_string() })
            }
            // The group may have stopped after it had written the entry.
            Ok(Err(RaftError::Fatal(_))) => Err(Error::OutcomeUnknown(self.id)),
        }
    }

    /// The index that a replica must have applied to serve a linearizable read now. Only the
    /// leader knows it, and it asks a quorum first (ReadIndex, Raft dissertation §6.4).
    pub async fn read_index(&self, timeout: Duration) -> Result<u64, Error> {
        if let Some(index) = self.read_index_alone() {
            return Ok(index);
        }
        if is_planted(Bug::ReadWithoutQuorum) && self.is_leader() {
            return Ok(self.applied());
        }
        self.wake_leader();
        let ask = self.raft.get_read_linearizer(ReadPolicy::ReadIndex);
        match tokio::time::timeout(timeout, ask).await {
            Ok(Ok(linearizer)) => Ok(linearizer.read_log_id().index()),
            Ok(Err(RaftError::APIError(LinearizableReadError::ForwardToLeader(to)))) => {
                let leader = to.leader_id.filter(|leader| *leader != self.node);
                Err(Error::NotLeader { group: self.id, leader })
            }
            Ok(Err(RaftError::APIError(error))) => Err(self.timed_out(error)),
            Ok(Err(RaftError::Fatal(error))) => Err(self.stopped(error)),
            Err(_) => Err(self.timed_out("a quorum for a read")),
        }
    }

    /// The read index of a leader that is its group's only member: nobody can have been elected
    /// without it, nobody but this node reads, and what it has acknowledged its state machine has
    /// applied. An entry of its own term must be applied, since before that the leader does not
    /// know all that was committed.
    fn read_index_alone(&self) -> Option<u64> {
        if !self.log.company().is_alone() {
            return None;
        }
        let server = self.raft.server_metrics();
        let term = {
            let server = server.borrow_watched();
            let members = server.membership_config.membership().nodes().count();
            (server.state == ServerState::Leader && members == 1).then_some(server.vote.leader_id.term)?
        };
        let applied = self.raft.data_metrics().borrow_watched().last_applied?;
        (applied.leader_id.term == term).then_some(applied.index)
    }

    /// Waits until this replica has applied an index.
    pub async fn wait_applied(&self, index: u64, timeout: Duration) -> Result<(), Error> {
        if self.applied() >= index {
            return Ok(());
        }
        let waited = self.raft.wait(Some(timeout)).applied_index_at_least(Some(index), "a read").await;
        waited.map(drop).map_err(|_| self.timed_out(format!("index {index} to be applied")))
    }

    /// The last applied index.
    pub fn applied(&self) -> u64 {
        let metrics = self.raft.data_metrics();
        let applied = metrics.borrow_watched().last_applied;
        applied.map_or(0, |id| id.index)
    }

    /// Who leads the group, as far as this node knows.
    pub fn leader(&self) -> Option<NodeId> {
        self.raft.server_metrics().borrow_watched().current_leader
    }

    /// Whether this replica has stopped for good: its state machine or its log failed.
    pub fn is_stopped(&self) -> bool {
        let metrics = self.raft.metrics();
        let metrics = metrics.borrow_watched();
        metrics.running_state.is_err() || metrics.state == ServerState::Shutdown
    }

    /// Whether this node leads the group, as far as it knows.
    pub fn is_leader(&self) -> bool {
        self.leader() == Some(self.node)
    }

    /// Waits until somebody leads the group.
    pub async fn wait_leader(&self, timeout: Duration) -> Result<NodeId, Error> {
        let wait = self.raft.wait(Some(timeout));
        match wait.metrics(|metrics| metrics.current_leader.is_some(), "a leader").await {
            Ok(metrics) => metrics.current_leader.ok_or_else(|| self.timed_out("a leader")),
            Err(_) => Err(self.timed_out("a leader")),
        }
    }

    /// Starts an election at once, for a group whose only voter is this node.
    pub async fn elect(&self) -> Result<(), Error> {
        if self.log.has_forgotten() {
            return Ok(());
        }
        self.wake();
        self.raft.trigger().elect(false).await.map_err(|error| self.stopped(error))
    }

    /// Hands leadership to a member, or to another one if that one does not take it. Nothing happens
    /// where this node does not lead.
    pub async fn transfer_leader(&self, to: NodeId) -> Result<(), Error> {
        let status = self.status();
        if status.role == "leader" && self.handing_over.swap(status.term, Ordering::AcqRel) != status.term {
            let group = self.clone();
            // First of all: whoever waits here may go away.
            tokio::spawn(async move {
                group.insist_on_transfer(to, status.term).await;
                let of_now = &group.handing_over;
                _ = of_now.compare_exchange(status.term, 0, Ordering::AcqRel, Ordering::Acquire);
            });
            self.ask_to_lead(to).await?;
        }
        Ok(())
    }

    /// Lets this replica stand for election again once it has what it had before it was let go.
    fn stand_again(&self) {
        if self.log.has_left() && !self.log.has_forgotten() {
            self.raft.runtime_config().elect(true);
        }
    }

    /// Whether this node was a member before, and was let go.
    #[cfg(test)]
    pub(crate) fn has_come_back(&self) -> bool {
        self.log.has_left()
    }

    async fn ask_to_lead(&self, heir: NodeId) -> Result<(), Error> {
        self.wake();
        self.raft.trigger().transfer_leader(heir).await.map_err(|error| self.stopped(error))
    }

    /// openraft takes no proposals once it has asked somebody to lead, and asks once: were the
    /// question lost, or the heir behind or dead, the group would take no writes while this node lives.
    async fn insist_on_transfer(&self, to: NodeId, term: u64) {
        for turn in 1.. {
            tokio::time::sleep(TRANSFER_RETRY).await;
            let status = self.status();
            let mut heirs: Vec<NodeId> =
                status.voters.iter().copied().filter(|voter| *voter != self.node).collect();
            heirs.sort_by_key(|heir| *heir != to);
            if status.role != "leader" || status.term != term || heirs.is_empty() {
                return;
            }
            if self.ask_to_lead(heirs[turn % heirs.len()]).await.is_err() {
                return;
            }
        }
    }

    /// Makes a checkpoint, after which the log can be purged.
    pub async fn checkpoint(&self) -> Result<(), Error> {
        self.raft.trigger().snapshot().await.map_err(|error| self.stopped(error))
    }

    /// The commands that were applied here after a log index, each with its own: so many bytes of them, and one at
    /// least. Entries that are Raft's own have none.
    ///
    /// # Errors
    /// When the log does not reach back so far.
    pub async fn applied_after(
        &self,
        index: u64,
        limit_bytes: usize,
    ) -> Result<Vec<(u64, Option<Bytes>)>, Error> {
        let end = self.applied() + 1;
        let read = self.log.read(index + 1, end, limit_bytes).await;
        let entries = read.map_err(|error| self.stopped(error))?;
        if entries.first().is_some_and(|entry| entry.log_id.index != index + 1) || self.log.purged() > index {
            let reason = format!("its log does not reach back to {index} any more");
            return Err(Error::Stopped { group: self.id, reason });
        }
        let mut commands = Vec::new();
        let mut bytes = 0;
        for entry in entries {
            let command = match entry.payload {
                EntryPayload::Normal(Payload(command)) => Some(command),
                EntryPayload::Blank | EntryPayload::Membership(_) => None,
            };
            bytes += command.as_ref().map_or(0, Bytes::len);
            // What is stored is read in slices, which may be more than was asked for.
            if bytes > limit_bytes && !commands.is_empty() {
                break;
            }
            commands.push((entry.log_id.index, command));
        }
        Ok(commands)
    }

    /// Bytes in this group's log since its last purge.
    pub fn log_bytes(&self) -> u64 {
        self.log.live_bytes()
    }

    /// Leads the membership one step towards `wanted`, of whom `voters_wanted` vote. Returns
    /// whether nothing is left to do. Only the leader can. A node gets a vote when its log has caught up
    /// and it `is_whole`: has whatever else a member must have.
    pub async fn steer_members(
        &self,
        wanted: &BTreeSet<NodeId>,
        voters_wanted: &BTreeSet<NodeId>,
        is_whole: impl Fn(NodeId) -> bool,
    ) -> Result<bool, Error> {
        let status = self.status();
        let refused =
            |error: &dyn std::fmt::Display| Error::Membership { group: self.id, reason: error.to_string() };
        if !status.is_joint && status.voters == *voters_wanted && status.members() == *wanted {
            return Ok(true);
        }
        if self.handing_over.load(Ordering::Acquire) == status.term {
            // An entry more in this log, and it would not vote for the heir.
            return Ok(false);
        }
        // Asleep it would never hear whether a learner is ready.
        self.wake();
        let GroupStatus { voters, learners, is_joint, matched, last_index, .. } = status;
        let now = Members { voters, learners, is_joint };
        let is_ready = |node| {
            let matched = matched.get(&node).copied().unwrap_or_default();
            matched > 0 && matched + MAX_LAG >= last_index && self.answers(node) && is_whole(node)
        };
        let change = match next_step(&now, wanted, voters_wanted, is_ready) {
            None => return Ok(false),
            Some(Step::AddLearner(new)) => {
                self.raft.add_learner(new, EmptyNode {}, false).await.map_err(|error| refused(&error))?;
                return Ok(false);
            }
            Some(Step::SetVoters(voters)) => {
                let heir =
                    voters.iter().copied().find(|node| now.voters.contains(node) && self.answers(*node));
                if let Some(heir) = heir.filter(|_| !voters.contains(&self.node) && !now.is_joint) {
                    // A leader that goes would leave the group without one until somebody misses it.
                    self.transfer_leader(heir).await?;
                    return Ok(false);
                }
                ChangeMembers::ReplaceAllVoters(voters)
            }
            Some(Step::Remove(gone)) => ChangeMembers::RemoveNodes(gone),
        };
        self.raft.change_membership(change, true).await.map_err(|error| refused(&error))?;
        Ok(false)
    }

    /// Whether the group has let a node go: only a leader that a quorum confirms knows.
    async fn has_let_go(&self, node: NodeId) -> Result<bool, Error> {
        self.read_index(MEMBERSHIP_TIMEOUT).await?;
        let metrics = self.raft.metrics();
        let metrics = metrics.borrow_watched();
        let config = &metrics.membership_config;
        let is_committed = config.log_id().as_ref() <= metrics.last_applied.as_ref();
        let is_joint = config.membership().get_joint_config().len() > 1;
        Ok(is_committed && !is_joint && config.membership().get_node(&node).is_none())
    }

    /// Whether a member has acknowledged something of this leader lately.
    fn answers(&self, node: NodeId) -> bool {
        let metrics = self.raft.metrics();
        let metrics = metrics.borrow_watched();
        let heard = metrics.heartbeat.as_ref().and_then(|heard| heard.get(&node).copied().flatten());
        heard.is_some_and(|at| at.elapsed() < HEARD_LATELY)
    }

    /// What is known about the group here.
    pub fn status(&self) -> GroupStatus {
        let watch = self.raft.metrics();
        let metrics = watch.borrow_watched();
        let membership = metrics.membership_config.membership();
        let index =
            |id: Option<openraft::type_config::alias::LogIdOf<TypeConfig>>| id.map_or(0, |id| id.index);
        let matched = metrics.replication.as_ref().map_or_else(BTreeMap::new, |replication| {
            replication.iter().map(|(node, id)| (*node, index(*id))).collect()
        });
        GroupStatus {
            id: self.id,
            leader: metrics.current_leader,
            role: match (&metrics.running_state, metrics.state) {
                (Err(_), _) | (_, ServerState::Shutdown) => "stopped",
                (_, ServerState::Learner) => "learner",
                (_, ServerState::Follower) => "follower",
                (_, ServerState::Candidate) => "candidate",
                (_, ServerState::Leader) => "leader",
            },
            term: metrics.current_term,
            last_index: metrics.last_log_index.unwrap_or(0),
            applied: index(metrics.last_applied),
            checkpoint: index(metrics.snapshot),
            purged: index(metrics.purged),
            voters: membership.voter_ids().collect(),
            is_joint: membership.get_joint_config().len() > 1,
            learners: membership.learner_ids().collect(),
            matched,
        }
    }

    fn stopped(&self, reason: impl std::fmt::Display) -> Error {
        Error::Stopped { group: self.id, reason: reason.to_string() }
    }

    fn timed_out(&self, reason: impl std::fmt::Display) -> Error {
        Error::Timeout { group: self.id, reason: reason.to_string() }
    }
}
