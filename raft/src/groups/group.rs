//! One group on this node: proposing, reading, membership and what is known about it.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use bytes::Bytes;
use openraft::async_runtime::WatchReceiver;
use openraft::errors::{ClientWriteError, LinearizableReadError, RaftError};
use openraft::{ChangeMembers, EmptyNode, EntryPayload, Instant, Raft, ReadPolicy, ServerState};
use shoal_proto::planted::{Bug, is_planted};
use shoal_proto::{GroupId, NodeId};

use super::MEMBERSHIP_TIMEOUT;
use crate::error::Error;
use crate::idle::Idle;
use crate::log::GroupLog;
use crate::machine::{Machine, StateMachine};
use crate::membership::{Members, Step, next_step};
use crate::network::Peers;
use crate::staleness::Heard;
use crate::types::{Payload, TypeConfig};

/// Entries that a learner may be behind when it gets a vote, and a member that goes on by the log after a
/// snapshot.
pub(super) const MAX_LAG: u64 = 1000;
/// How recently a learner must have answered when it gets a vote.
const HEARD_LATELY: Duration = Duration::from_secs(2);
/// How long a change of members may take to be agreed on. It is led on at the next look; without an end a
/// leader that has lost its quorum would wait for as long as it believes in itself.
const CHANGE_TIMEOUT: Duration = Duration::from_secs(10);
/// After so long without a new leader another member is asked to lead.
const TRANSFER_RETRY: Duration = Duration::from_millis(300);

/// One group on this node. Cheap to clone.
#[derive(Clone)]
pub struct Group {
    pub(super) id: GroupId,
    pub(super) node: NodeId,
    pub(super) raft: Raft<TypeConfig, Machine>,
    pub(super) state: Arc<dyn StateMachine>,
    pub(super) log: GroupLog,
    pub(super) peers: Peers,
    pub(super) idle: Arc<Idle>,
    pub(super) heard: Arc<Heard>,
    /// The term in which this node, its leader, hands the group over; zero when it does not.
    pub(super) handing_over: Arc<AtomicU64>,
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
    pub(super) fn stand_again(&self) {
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
                let added = self.raft.add_learner(new, EmptyNode {}, false);
                let added = tokio::time::timeout(CHANGE_TIMEOUT, added).await;
                added.map_err(|late| refused(&late))?.map_err(|error| refused(&error))?;
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
        let changed = tokio::time::timeout(CHANGE_TIMEOUT, self.raft.change_membership(change, true)).await;
        changed.map_err(|late| refused(&late))?.map_err(|error| refused(&error))?;
        Ok(false)
    }

    /// Whether the group has let a node go: only a leader that a quorum confirms knows.
    pub(super) async fn has_let_go(&self, node: NodeId) -> Result<bool, Error> {
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
