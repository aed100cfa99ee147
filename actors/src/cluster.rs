//! The node's handle on the cluster: routing, writing and reading with deadlines.
//!
//! ```text
//!  write: route ─▶ leader known? ─▶ propose here, or one hop ─▶ applied ─▶ outcome + position
//!                      ▲    nobody leads, or it moved: look again until the deadline
//!  read:  local replica, else the least loaded one ─▶ fresh enough? (read index / position) ─▶ answer
//! ```
//!
//! A write is retried here only when nothing was proposed, or when it carries a request id,
//! which the shard deduplicates. What stays unknown at the deadline is reported as unknown.

use std::collections::{BTreeMap, HashMap};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use bytes::Bytes;
use parking_lot::{Mutex, RwLock};
use shoal_engine::Shard;
use shoal_engine::command::{Answer, Command, Envelope, FileRecord, Outcome, Read};
use shoal_proto::peer::CallRequest;
use shoal_proto::planted::{Bug, is_planted};
use shoal_proto::{Error, ErrorCode, GroupId, Level, NodeId, Position, RequestId, ShardId, codec};
use shoal_raft::cluster::{self, ClusterState};
use shoal_raft::{Error as RaftError, Group, Groups, Lane};
use tokio::sync::{Semaphore, watch};

use crate::backup::{Backups, Job};
use crate::blobs::BlobStore;
use crate::call::{Call, Consistency, Reply};
use crate::latencies::Latencies;
use crate::levels::Promise;
use crate::limits;
use crate::mesh::{self, NoAnswer};
use crate::placement::Plan;
use crate::progress::{Attempt, Progress};
use crate::turns::{Asked, Candidate, Place, UnderWay};
use crate::work::Work;

/// A shard replica that is open on this node.
#[derive(Clone)]
pub struct LocalShard {
    /// The data.
    pub shard: Arc<Shard>,
    /// Its group.
    pub group: Group,
    /// The bytes of its files.
    pub(crate) blobs: BlobStore,
}

/// How a request wants its reads, and until when.
#[derive(Clone, Debug)]
pub struct ReadOptions {
    /// How fresh.
    pub level: Consistency,
    /// What the client has seen, for session reads.
    pub position: Position,
    /// When the client gives up.
    pub deadline: Instant,
    /// Where eventual reads note how old their answers may be.
    pub staleness: Staleness,
}

impl ReadOptions {
    /// A read that sees all that was acknowledged before it began.
    pub fn linearizable(deadline: Instant) -> ReadOptions {
        ReadOptions {
            level: Consistency::Linearizable,
            position: Position::default(),
            deadline,
            staleness: Staleness::default(),
        }
    }
}

/// How old the oldest of several answers may be. Clones share it.
#[derive(Clone, Debug, Default)]
pub struct Staleness(Arc<Mutex<Option<Option<u64>>>>);

impl Staleness {
    /// Notes an answer's age in milliseconds; none when it is not known.
    pub fn note(&self, age: Option<u64>) {
        let mut oldest = self.0.lock();
        *oldest = Some(match *oldest {
            None => age,
            Some(known) => known.zip(age).map(|(known, age)| known.max(age)),
        });
    }

    /// The age in milliseconds, or that it is not known; nothing when nothing was noted.
    pub fn get(&self) -> Option<Option<u64>> {
        *self.0.lock()
    }
}

/// The node's handle on the cluster. Cheap to clone.
#[derive(Clone)]
pub struct Cluster {
    inner: Arc<Inner>,
}

/// A command on its way to whoever leads a group.
struct Proposal {
    command: Bytes,
    /// Whether it may be applied twice without harm.
    is_idempotent: bool,
    /// Whether it takes more disk space.
    grows: bool,
    /// Whether it comes into the log of a shard that is frozen.
    passes_freeze: bool,
}

struct Inner {
    groups: Groups,
    state: watch::Receiver<Arc<ClusterState>>,
    shards: RwLock<HashMap<ShardId, LocalShard>>,
    proposal_bytes: Semaphore,
    reads: Semaphore,
    latencies: Latencies,
    reads_waiting: AtomicUsize,
    under_way: UnderWay,
    mesh: mesh::Caller,
    /// Counts reads, so that each begins at another one of equal replicas.
    rotation: AtomicUsize,
    shard_proposals: RwLock<HashMap<GroupId, Arc<Semaphore>>>,
    writable: std::sync::atomic::AtomicBool,
    disk_free_bytes: AtomicU64,
    /// What placement would do, where the control group's leader is.
    plan: RwLock<Option<Arc<Plan>>>,
    /// Why something moves and how far it is, where the control group's leader is.
    progress: RwLock<Progress>,
    /// Parsers and embedders; set once, while the node starts.
    work: std::sync::OnceLock<Work>,
    /// Set once, while the node starts.
    backups: std::sync::OnceLock<Backups>,
    /// Set once, before anything is served.
    promise: std::sync::OnceLock<Arc<Promise>>,
}

impl Cluster {
    /// A handle over the node's groups and the control group's state.
    pub fn new(groups: Groups, state: watch::Receiver<Arc<ClusterState>>) -> Cluster {
        let inner = Inner {
            groups,
            state,
            shards: RwLock::default(),
            proposal_bytes: Semaphore::new(limits::MAX_PROPOSAL_BYTES_IN_FLIGHT),
            reads: Semaphore::new(limits::MAX_READS),
            latencies: Latencies::default(),
            reads_waiting: AtomicUsize::new(0),
            under_way: UnderWay::default(),
            mesh: mesh::Caller::default(),
            rotation: AtomicUsize::new(0),
            shard_proposals: RwLock::default(),
            writable: std::sync::atomic::AtomicBool::new(true),
            disk_free_bytes: AtomicU64::new(0),
            plan: RwLock::default(),
            progress: RwLock::default(),
            work: std::sync::OnceLock::new(),
            backups: std::sync::OnceLock::new(),
            promise: std::sync::OnceLock::new(),
        };
        Cluster { inner: Arc::new(inner) }
    }

    /// This node.
    pub fn node(&self) -> NodeId {
        self.inner.groups.node()
    }

    /// The node's groups.
    pub fn groups(&self) -> &Groups {
        &self.inner.groups
    }

    /// The cluster's state as this node knows it.
    pub fn state(&self) -> Arc<ClusterState> {
        self.inner.state.borrow().clone()
    }

    /// News of changes of the cluster's state.
    pub fn watch(&self) -> watch::Receiver<Arc<ClusterState>> {
        self.inner.state.clone()
    }

    /// The replicas that are open here.
    pub fn local_shards(&self) -> HashMap<ShardId, LocalShard> {
        self.inner.shards.read().clone()
    }

    /// A replica that is open here.
    pub fn local_shard(&self, id: ShardId) -> Option<LocalShard> {
        self.inner.shards.read().get(&id).cloned()
    }

    pub(crate) fn add_local(&self, id: ShardId, shard: LocalShard) {
        self.inner.shards.write().insert(id, shard);
    }

    pub(crate) fn drop_local(&self, id: ShardId) -> Option<LocalShard> {
        self.inner.shards.write().remove(&id)
    }

    pub(crate) fn set_work(&self, work: Work) {
        drop(self.inner.work.set(work));
    }

    pub(crate) fn set_backups(&self, backups: Backups) {
        drop(self.inner.backups.set(backups));
    }

    pub(crate) fn set_promise(&self, promise: Arc<Promise>) {
        drop(self.inner.promise.set(promise));
    }

    /// Asks nodes over the mesh.
    pub(crate) fn mesh(&self) -> &mesh::Caller {
        &self.inner.mesh
    }

    pub(crate) fn promise(&self) -> Option<&Arc<Promise>> {
        self.inner.promise.get()
    }

    /// What this node does with a backup, or did last.
    pub(crate) fn backup_job(&self) -> Option<Job> {
        self.inner.backups.get().and_then(Backups::job)
    }

    pub(crate) fn work(&self) -> Option<&Work> {
        self.inner.work.get()
    }

    /// Lets writes in or keeps them out: below the disk's reserve nothing new is taken.
    pub fn set_writable(&self, writable: bool) {
        self.inner.writable.store(writable, Ordering::Release);
    }

    /// Notes how much of the disk is free.
    pub(crate) fn note_disk(&self, free_bytes: u64) {
        self.inner.disk_free_bytes.store(free_bytes, Ordering::Relaxed);
    }

    pub(crate) fn disk_free_bytes(&self) -> u64 {
        self.inner.disk_free_bytes.load(Ordering::Relaxed)
    }

    /// Keeps what placement would do, for those who ask; nothing where it does not act.
    pub(crate) fn set_plan(&self, plan: Option<Arc<Plan>>) {
        *self.inner.plan.write() = plan;
    }

    /// Keeps why shards move, for those who ask; nothing where placement does not act.
    pub(crate) fn note_moves(&self, moves: BTreeMap<ShardId, String>) {
        self.inner.progress.write().moves = moves;
    }

    /// Keeps how far the change of a collection's shards is, for those who ask; none when there is none here.
    pub(crate) fn note_attempt(&self, attempt: Option<(String, Attempt)>) {
        self.inner.progress.write().reshards = attempt.into_iter().collect();
    }

    /// Whether the disk has room for writes.
    pub fn is_writable(&self) -> bool {
        self.inner.writable.load(Ordering::Acquire)
    }

    /// Puts a command through the control group.
    ///
    /// # Errors
    /// What the control group refused; conflict while a node of an earlier build would not understand the
    /// command; unavailable or unknown when the control group did not answer in time.
    pub async fn control(
        &self,
        command: cluster::Command,
        deadline: Instant,
    ) -> Result<cluster::Response, Error> {
        self.require(command.level()).await?;
        let command = codec::encode(&command).into();
        let proposal = Proposal { command, is_idempotent: true, grows: false, passes_freeze: false };
        let (_, response) = self.propose(GroupId::CONTROL, proposal, deadline).await?;
        match codec::decode(&response)? {
            cluster::Response::Rejected(error) => Err(error),
            response => Ok(response),
        }
    }

    /// Waits until this node knows a state of the cluster that satisfies a condition.
    ///
    /// # Errors
    /// Unavailable when it does not come in time.
    pub async fn wait_state(
        &self,
        deadline: Instant,
        until: impl FnMut(&Arc<ClusterState>) -> bool,
    ) -> Result<Arc<ClusterState>, Error> {
        let mut watch = self.inner.state.clone();
        let waited = tokio::time::timeout_at(deadline.into(), watch.wait_for(until)).await;
        match waited {
            Ok(Ok(state)) => Ok(state.clone()),
            _ => Err(Error::unavailable("the cluster's state has not reached this node in time")),
        }
    }

    /// Puts a command through a shard. Applied once, however often it is retried with the same
    /// request id. Returns the outcome and the log index it was applied at.
    ///
    /// # Errors
    /// What the shard refused; busy, unavailable, disk full: nothing was done; conflict: neither, since a node
    /// of an earlier build would not understand it; unknown: it may have been.
    pub async fn write(
        &self,
        shard: ShardId,
        request_id: Option<RequestId>,
        command: &Command,
        deadline: Instant,
    ) -> Result<(Outcome, u64), Error> {
        let grows = grows(command);
        if grows && !self.is_writable() {
            return Err(disk_full());
        }
        self.require(command.level()).await?;
        let proposal = Proposal {
            command: Envelope::bytes(request_id, unix_now(), command).into(),
            is_idempotent: request_id.is_some() || is_idempotent(command),
            grows,
            passes_freeze: matches!(command, Command::Freeze { .. } | Command::Thaw { .. }),
        };
        let (index, outcome) = self.propose(shard.into(), proposal, deadline).await?;
        match codec::decode(&outcome)? {
            Outcome::Rejected(error) => Err(error),
            outcome => Ok((outcome, index)),
        }
    }

    async fn propose(
        &self,
        group: GroupId,
        proposal: Proposal,
        deadline: Instant,
    ) -> Result<(u64, Bytes), Error> {
        let Proposal { command, is_idempotent, grows, passes_freeze } = proposal;
        let busy = || Error::new(ErrorCode::Busy, "too much is being written through this node; try again");
        let bytes = u32::try_from(command.len()).map_err(|_| busy())?;
        let _bytes = self.inner.proposal_bytes.try_acquire_many(bytes).map_err(|_| busy())?;
        let slots = self.proposal_slots(group);
        let _slot = slots.try_acquire().map_err(|_| busy())?;
        let mut hint: Option<NodeId> = None;
        let mut is_unknown = false;
        let mut reason = String::from("no leader");
        let mut attempt = 0usize;
        while let Some(left) = left(deadline) {
            let target = match hint.take().or_else(|| self.known_leader(group)) {
                Some(target) => target,
                None => match self.some_member(group, attempt) {
                    Some(member) => member,
                    // What was proposed to it before may have been applied, and is then in its successors.
                    None if is_unknown => break,
                    None => {
                        return Err(Error::new(
                            ErrorCode::Stale,
                            format!("group {group} does not exist any more"),
                        ));
                    }
                },
            };
            attempt += 1;
            let (command, timeout_ms) = (command.clone(), left.as_millis() as u64);
            // Only the log can tell whether what may be in it already was done before the shard was frozen.
            let passes_freeze = passes_freeze || is_unknown;
            let call = match passes_freeze && self.state().level >= Level::PASSES_FREEZE {
                true => Call::ProposeFrozen { group, command, grows, timeout_ms },
                false => Call::Propose { group, command, grows, timeout_ms },
            };
            match self.call(target, call, left).await {
                Reply::Proposed(index, outcome) => return Ok((index, outcome)),
                Reply::NotLeader(leader) => {
                    reason = format!("node {target} does not lead it");
                    hint = leader.filter(|leader| *leader != target);
                }
                Reply::Failed(error) if error.code == ErrorCode::Unknown => {
                    is_unknown = true;
                    reason = error.message;
                    if !is_idempotent {
                        break;
                    }
                }
                // Whoever has asked has an old shard map, or comes again when the shard goes on.
                Reply::Failed(error) if error.code == ErrorCode::Stale && !is_unknown => return Err(error),
                Reply::Failed(error) if error.code.is_retryable() => {
                    self.doubt_leader(group, target, error.code);
                    reason = error.message;
                }
                // A refusal of this attempt says nothing of the one before.
                Reply::Failed(error) if is_unknown => {
                    reason = error.message;
                    break;
                }
                Reply::Failed(error) => return Err(error),
                _ => {
                    return Err(Error::internal("a peer answered a proposal with something else"));
                }
            }
            if hint.is_none() {
                tokio::time::sleep(limits::RETRY_PAUSE.min(left)).await;
            }
        }
        let (code, what) = match is_unknown {
            true => (
                ErrorCode::Unknown,
                "whether the write was applied is not known; retry it with the same Idempotency-Key",
            ),
            false => (ErrorCode::Unavailable, "nothing was written"),
        };
        Err(Error::new(code, format!("group {group} did not answer in time ({reason}); {what}")))
    }

    /// A leader that cannot be used may have lost its replica while its node lives, which a group
    /// that sleeps does not notice: with its timers on, the group finds another.
    fn doubt_leader(&self, group: GroupId, leader: NodeId, code: ErrorCode) {
        if code == ErrorCode::Unavailable
            && leader != self.node()
            && let Ok(group) = self.inner.groups.get(group)
        {
            group.wake();
        }
    }

    /// The cluster's state as of now: everything that was agreed before this call is in it.
    ///
    /// # Errors
    /// Unavailable when the control group does not answer in time.
    pub async fn fresh_state(&self, deadline: Instant) -> Result<Arc<ClusterState>, Error> {
        let control = self.inner.groups.get(GroupId::CONTROL)?;
        let index = self.read_index(&control, deadline).await?;
        control.wait_applied(index, deadline.saturating_duration_since(Instant::now())).await?;
        Ok(self.state())
    }

    /// The shard map for a read: a newer one than this node has, when the client has seen shards of it.
    ///
    /// # Errors
    /// Unavailable when the control group does not answer in time.
    pub(crate) async fn map_for(&self, options: &ReadOptions) -> Result<Arc<ClusterState>, Error> {
        let state = self.state();
        match options.level == Consistency::Session && state.is_behind(&options.position) {
            true => self.fresh_state(options.deadline).await,
            false => Ok(state),
        }
    }

    fn proposal_slots(&self, group: GroupId) -> Arc<Semaphore> {
        if let Some(slots) = self.inner.shard_proposals.read().get(&group) {
            return slots.clone();
        }
        let mut all = self.inner.shard_proposals.write();
        all.entry(group).or_insert_with(|| Arc::new(Semaphore::new(limits::MAX_PROPOSALS_PER_SHARD))).clone()
    }

    fn known_leader(&self, group: GroupId) -> Option<NodeId> {
        self.inner.groups.get(group).ok().and_then(|group| group.leader())
    }

    /// A node that may know more about a group: in turn those that are to be its members, then the
    /// others, of whom one may still have what has not arrived at its new place.
    fn some_member(&self, group: GroupId, attempt: usize) -> Option<NodeId> {
        let state = self.state();
        let members: Vec<NodeId> = match group {
            GroupId::CONTROL => state.nodes.keys().copied().collect(),
            group => {
                let replicas = &state.shards.get(&ShardId(group.0))?.replicas;
                let others = state.nodes.keys().filter(|node| !replicas.contains(node));
                replicas.iter().chain(others).copied().collect()
            }
        };
        // Before the first node is added, the control group is this node alone.
        let alone = (group == GroupId::CONTROL).then(|| self.node());
        let others: Vec<NodeId> = members.iter().copied().filter(|node| *node != self.node()).collect();
        // Every member gets its turn, whichever attempts go to this node itself.
        let turn = if others.is_empty() { members.first() } else { others.get(attempt / 2 % others.len()) };
        turn.copied().or(alone)
    }

    /// Who could answer a question about a shard; none when there is no such shard any more.
    fn candidates(&self, shard: ShardId) -> Option<Vec<Candidate>> {
        let state = self.state();
        let replicas = &state.shards.get(&shard)?.replicas;
        let is_here = self.local_shard(shard).is_some();
        let place = |node: NodeId| match node == self.node() {
            true if is_here => Some(Place::Here),
            // It is not open yet, or not any more.
            true => None,
            false if replicas.contains(&node) => Some(Place::Replica),
            false => Some(Place::Elsewhere),
        };
        let others = state.nodes.keys().filter(|node| !replicas.contains(node));
        let candidates = replicas.iter().chain(others).filter_map(|node| {
            Some(Candidate {
                node: *node,
                place: place(*node)?,
                is_silent: *node != self.node() && self.inner.groups.is_silent(*node),
                under_way: self.inner.under_way.to(*node),
            })
        });
        Some(candidates.collect())
    }

    fn nobody_asked(&self) -> Asked {
        Asked::nobody(self.inner.rotation.fetch_add(1, Ordering::Relaxed))
    }

    /// Asks a question of a shard as [`Cluster::read`] does, and a second replica as well when
    /// the first is slower than its recent 95th percentile. The first good answer counts.
    ///
    /// # Errors
    /// As [`Cluster::read`].
    pub async fn read_hedged(
        &self,
        shard: ShardId,
        question: Read,
        options: &ReadOptions,
    ) -> Result<(Answer, u64), Error> {
        let started = Instant::now();
        let replicas = self.state().shards.get(&shard).map_or(0, |shard| shard.replicas.len());
        let asked = self.nobody_asked();
        let first = self.read_from(shard, question.clone(), options, &asked);
        tokio::pin!(first);
        let answered = match replicas {
            0 | 1 => first.await,
            _ => match tokio::time::timeout(self.inner.latencies.hedge_after(), &mut first).await {
                Ok(answered) => answered,
                Err(_) => {
                    metrics::counter!("shoal_hedged_reads_total").increment(1);
                    let second = self.read_from(shard, question, options, &asked);
                    tokio::pin!(second);
                    match futures::future::select(first, second).await {
                        // No other replica of this shard would know better.
                        futures::future::Either::Left((Err(error), _))
                        | futures::future::Either::Right((Err(error), _))
                            if error.code == ErrorCode::Stale =>
                        {
                            Err(error)
                        }
                        futures::future::Either::Left((Err(_), second)) => second.await,
                        futures::future::Either::Right((Err(_), first)) => first.await,
                        futures::future::Either::Left((answered, _)) => answered,
                        futures::future::Either::Right((answered, _)) => answered,
                    }
                }
            },
        };
        self.inner.latencies.note(started.elapsed());
        answered
    }

    /// Asks a question of a shard, at the nearest replica that is fresh enough. Returns the
    /// answer and the index that was applied when it was made.
    ///
    /// # Errors
    /// What the engine refused; unavailable when no replica answered in time.
    pub async fn read(
        &self,
        shard: ShardId,
        question: Read,
        options: &ReadOptions,
    ) -> Result<(Answer, u64), Error> {
        self.read_from(shard, question, options, &self.nobody_asked()).await
    }

    async fn read_from(
        &self,
        shard: ShardId,
        question: Read,
        options: &ReadOptions,
        asked: &Asked,
    ) -> Result<(Answer, u64), Error> {
        let group = GroupId::from(shard);
        let begins_at = self.state().shards.get(&shard).map_or(0, |shard| shard.begins_at);
        let floor = match options.level {
            Consistency::Session => options.position.floor(group).max(begins_at),
            Consistency::Linearizable | Consistency::Eventual => begins_at,
        };
        let mut reason = String::from("no replica");
        while let Some(left) = left(options.deadline) {
            let Some(candidates) = self.candidates(shard) else {
                let message = format!("shard {shard} does not exist any more");
                return Err(Error::new(ErrorCode::Stale, message));
            };
            let Some(target) = asked.next(&candidates) else {
                // This node alone is to hold it and has not opened it yet.
                tokio::time::sleep(limits::RETRY_PAUSE.min(left)).await;
                continue;
            };
            // A replica that does not answer must not use up the whole time.
            let patience = left.min(Duration::from_secs(2).max(left / 2));
            let call = Call::Read {
                group,
                level: options.level,
                floor,
                timeout_ms: patience.as_millis() as u64,
                question: question.clone(),
            };
            match self.call(target, call, patience).await {
                Reply::Answered(index, answer, staleness) => {
                    if options.level == Consistency::Eventual {
                        options.staleness.note(staleness);
                    }
                    return Ok((answer, index));
                }
                // No other replica of this shard would know better.
                Reply::Failed(error) if error.code == ErrorCode::Stale => return Err(error),
                Reply::Failed(error) if error.code.is_retryable() => reason = error.message,
                Reply::Failed(error) => return Err(error),
                _ => {
                    reason = format!("node {target} could not answer");
                }
            }
            tokio::time::sleep(limits::RETRY_PAUSE.min(left)).await;
        }
        Err(Error::unavailable(format!("shard {shard} did not answer in time ({reason})")))
    }

    /// Calls a node: a function call when it is this one, otherwise the mesh for what is small and gRPC
    /// for what is not, or where there is no mesh. The time is for both ways together.
    pub(crate) async fn call(&self, target: NodeId, call: Call, timeout: Duration) -> Reply {
        if target == self.node() {
            return self.serve(call).await;
        }
        let _counted = self.inner.under_way.begin(target);
        let deadline = Instant::now() + timeout;
        let is_write = matches!(call, Call::Propose { .. } | Call::ProposeFrozen { .. });
        if !is_write {
            match self.inner.mesh.ask(target, &call, timeout).await {
                Ok(reply) => return reply,
                Err(NoAnswer::TimedOut) => return Reply::Failed(Error::unavailable(late(target))),
                Err(NoAnswer::TooLarge | NoAnswer::Unreachable) => {}
            }
        }
        let mut client = match self.inner.groups.peers().client(target, Lane::Fast) {
            Ok(client) => client,
            Err(reason) => return Reply::Failed(Error::unavailable(reason)),
        };
        let request = CallRequest { group: 0, body: codec::encode(&call).into() };
        match tokio::time::timeout_at(deadline.into(), client.call(request)).await {
            Ok(Ok(reply)) => codec::decode(&reply.into_inner().body)
                .unwrap_or_else(|error| Reply::Failed(Error::internal(format!("node {target}: {error}")))),
            Ok(Err(status)) => {
                // A connection that was never made proves that nothing was proposed.
                let refused = status.code() == tonic::Code::Unavailable
                    && status.message().contains("tcp connect error");
                let code = if is_write && !refused { ErrorCode::Unknown } else { ErrorCode::Unavailable };
                Reply::Failed(Error::new(code, format!("node {target}: {}", status.message())))
            }
            Err(_) => {
                let code = if is_write { ErrorCode::Unknown } else { ErrorCode::Unavailable };
                Reply::Failed(Error::new(code, late(target)))
            }
        }
    }

    /// Serves a call on this node.
    pub(crate) async fn serve(&self, call: Call) -> Reply {
        match self.try_serve(call).await {
            Ok(reply) => reply,
            Err(RaftError::NotLeader { leader, .. }) => Reply::NotLeader(leader),
            Err(error) => Reply::Failed(error.into()),
        }
    }

    async fn try_serve(&self, call: Call) -> Result<Reply, RaftError> {
        match call {
            Call::Propose { grows: true, .. } | Call::ProposeFrozen { grows: true, .. }
                if !self.is_writable() =>
            {
                Ok(Reply::Failed(disk_full()))
            }
            Call::Propose { group, .. } if self.leads_frozen(group) => Ok(Reply::Failed(passed_on(group))),
            Call::Propose { group, command, timeout_ms, .. }
            | Call::ProposeFrozen { group, command, timeout_ms, .. } => {
                let timeout = Duration::from_millis(timeout_ms);
                let (index, outcome) = self.inner.groups.get(group)?.propose(command, timeout).await?;
                Ok(Reply::Proposed(index, outcome))
            }
            Call::ReadIndex { group } => {
                Ok(Reply::Index(self.inner.groups.get(group)?.read_index(Duration::from_secs(2)).await?))
            }
            Call::StateSums { group } => {
                let local = self.local_shard(ShardId(group.0)).ok_or(RaftError::UnknownGroup(group))?;
                Ok(Reply::StateSums(local.shard.state_sums()))
            }
            Call::Report => Ok(Reply::Reported(self.report())),
            Call::Plan => Ok(match self.inner.plan.read().clone() {
                Some(plan) => Reply::Planned((*plan).clone()),
                None => Reply::Failed(Error::unavailable("this node does not lead the control group")),
            }),
            Call::Progress => Ok(Reply::Progress(self.inner.progress.read().clone())),
            Call::TransferLeader { group, to } => {
                self.inner.groups.get(group)?.transfer_leader(to).await?;
                Ok(Reply::Done)
            }
            Call::MissingBlobs { group, least } => {
                let local = self.local_shard(ShardId(group.0)).ok_or(RaftError::UnknownGroup(group))?;
                local.group.wait_applied(least, Duration::ZERO).await?;
                Ok(match self.missing_blobs(&local).await {
                    Ok(missing) if missing.len() > limits::MAX_MISSING_NAMED => {
                        Reply::Failed(Error::unavailable("too many blobs are missing here to name them"))
                    }
                    Ok(missing) => Reply::Missing(missing.into_iter().map(|file| file.blob).collect()),
                    Err(error) => Reply::Failed(error),
                })
            }
            Call::Tail { group, after, limit_bytes } => {
                let group = self.inner.groups.get(group)?;
                let applied = group.applied();
                Ok(Reply::Tail(group.applied_after(after, limit_bytes as usize).await?, applied))
            }
            Call::PromiseLevel { level } => Ok(match self.promise_level(level).await {
                Ok(()) => Reply::Done,
                Err(error) => Reply::Failed(error),
            }),
            work @ (Call::Parse { .. } | Call::Embed { .. }) => Ok(match self.work() {
                Some(pool) => pool.serve(work).await,
                None => Reply::Failed(Error::unavailable("this node is still starting")),
            }),
            Call::Read { group, level, floor, timeout_ms, question } => {
                let local = self.local_shard(ShardId(group.0)).ok_or(RaftError::UnknownGroup(group))?;
                let deadline = Instant::now() + Duration::from_millis(timeout_ms);
                // The shards that take its range over may have taken writes already.
                let is_passed_on = || level == Consistency::Linearizable && local.shard.frozen_by().is_some();
                if is_passed_on() {
                    return Ok(Reply::Failed(passed_on(group)));
                }
                let index = match level {
                    _ if is_planted(Bug::ReadOnFollower) => 0,
                    Consistency::Linearizable => self.read_index(&local.group, deadline).await?.max(floor),
                    Consistency::Session | Consistency::Eventual => floor,
                };
                let left = || deadline.saturating_duration_since(Instant::now());
                if level == Consistency::Session
                    && local.group.wait_applied(index, left().min(limits::TOKEN_PATIENCE)).await.is_err()
                    && self.read_index(&local.group, deadline).await? < index
                {
                    // What nobody has come to yet nobody can have seen, and it may never be.
                    let message =
                        format!("not a position token of this cluster: shard {group} has not come so far");
                    return Ok(Reply::Failed(Error::invalid("X-Shoal-Position", message)));
                }
                local.group.wait_applied(index, left()).await?;
                if is_passed_on() {
                    return Ok(Reply::Failed(passed_on(group)));
                }
                // What Raft knows may lag behind what the engine has applied, and after a start
                // the other way round.
                let known = local.group.applied();
                let staleness = match level {
                    Consistency::Eventual => local.group.staleness().map(|age| age.as_millis() as u64),
                    Consistency::Linearizable | Consistency::Session => None,
                };
                Ok(match self.run_read(local.shard, question).await {
                    Ok((applied, answer)) => Reply::Answered(applied.max(known), answer, staleness),
                    Err(error) => Reply::Failed(error),
                })
            }
        }
    }

    /// Whether this node leads a shard that is frozen, by what is applied here. What is refused for that
    /// before it is proposed need not be refused when it is applied, which is what counts: a log that nothing
    /// comes of does not grow while clients try again. Before all nodes tell what may come into such a log,
    /// it is left to the log: what thaws a shard looks like any other proposal.
    fn leads_frozen(&self, group: GroupId) -> bool {
        if self.state().level < Level::PASSES_FREEZE {
            return false;
        }
        let shards = self.inner.shards.read();
        let local = shards.get(&ShardId(group.0));
        local.is_some_and(|local| local.shard.frozen_by().is_some() && local.group.is_leader())
    }

    /// The index that a linearizable read on this node must wait for: from the leader, which
    /// asks a quorum.
    async fn read_index(&self, group: &Group, deadline: Instant) -> Result<u64, RaftError> {
        let mut attempts = 0u32;
        loop {
            let left = deadline.saturating_duration_since(Instant::now());
            let timed_out =
                |reason: &str| RaftError::Timeout { group: group.id(), reason: reason.to_owned() };
            if left.is_zero() {
                return Err(timed_out("a leader to read from"));
            }
            match group.leader() {
                Some(leader) if leader == self.node() => match group.read_index(left).await {
                    Ok(index) => return Ok(index),
                    Err(RaftError::NotLeader { .. } | RaftError::Timeout { .. }) => {}
                    Err(error) => return Err(error),
                },
                Some(leader) => {
                    let call = Call::ReadIndex { group: group.id() };
                    let asked = Box::pin(self.call(leader, call, left.min(Duration::from_secs(1))));
                    match asked.await {
                        Reply::Index(index) => return Ok(index),
                        Reply::Failed(error) => self.doubt_leader(group.id(), leader, error.code),
                        _ => {}
                    }
                }
                None => {}
            }
            attempts += 1;
            tokio::time::sleep(limits::RETRY_PAUSE * attempts.min(4)).await;
        }
    }

    /// The files that a replica names and whose bytes are not here.
    pub(crate) async fn missing_blobs(&self, local: &LocalShard) -> Result<Vec<FileRecord>, Error> {
        let (_, answer) = self.run_read(local.shard.clone(), Read::ListFiles).await?;
        let Answer::Files(mut files) = answer else {
            return Err(Error::internal("a shard did not answer with its files"));
        };
        let (blobs, shard) = (local.blobs.clone(), ShardId(local.group.id().0));
        let missing = tokio::task::spawn_blocking(move || {
            files.retain(|file| !blobs.contains(shard, file.blob));
            files
        });
        missing.await.map_err(Error::internal)
    }

    /// Answers a cheap question right here, and any other on the blocking pool, a bounded number
    /// at a time: handing a search over costs more than most searches do.
    pub(crate) async fn run_read(&self, shard: Arc<Shard>, question: Read) -> Result<(u64, Answer), Error> {
        let panicked = || Error::internal("a read panicked; the replica's files may be damaged");
        let cheap = std::panic::AssertUnwindSafe(|| shard.try_read(&question));
        if let Some(answered) = std::panic::catch_unwind(cheap).map_err(|_| panicked())? {
            return answered.map_err(Error::from);
        }
        let waiting = self.inner.reads_waiting.fetch_add(1, Ordering::AcqRel);
        let permit = match waiting < limits::MAX_READS_WAITING {
            true => self.inner.reads.acquire().await.map_err(Error::internal),
            false => Err(Error::new(ErrorCode::Busy, "too many reads wait on this node; try again")),
        };
        self.inner.reads_waiting.fetch_sub(1, Ordering::AcqRel);
        let _permit = permit?;
        let answered = tokio::task::spawn_blocking(move || shard.read(&question)).await;
        match answered {
            Ok(answer) => answer.map_err(Error::from),
            Err(_) => Err(panicked()),
        }
    }
}

/// Whether a command takes more space; the others are let through on a full disk.
fn grows(command: &Command) -> bool {
    !matches!(
        command,
        Command::Delete(_)
            | Command::DeletePayload { .. }
            | Command::DeleteFile(_)
            | Command::DeleteDocument(_)
            | Command::EndDocument { .. }
            | Command::EndAdoption { .. }
            | Command::Freeze { .. }
            | Command::Thaw { .. }
    )
}

/// Whether a command may be applied twice without harm, so that it needs no request id.
fn is_idempotent(command: &Command) -> bool {
    matches!(
        command,
        Command::Seed(_)
            | Command::SeedPartial(_)
            | Command::Replay(_)
            | Command::EndAdoption { .. }
            | Command::Freeze { .. }
            | Command::Thaw { .. }
    )
}

fn passed_on(group: GroupId) -> Error {
    Error::new(ErrorCode::Stale, format!("the range of shard {group} is moving to other shards"))
}

fn late(node: NodeId) -> String {
    format!("node {node} did not answer in time")
}

fn disk_full() -> Error {
    Error::new(ErrorCode::DiskFull, "the disk's reserve is reached on a node; delete something or add space")
}

fn left(deadline: Instant) -> Option<Duration> {
    let left = deadline.saturating_duration_since(Instant::now());
    (!left.is_zero()).then_some(left)
}

/// Seconds since the Unix epoch, for what is proposed.
pub fn unix_now() -> u64 {
    #[expect(clippy::disallowed_methods, reason = "the one place where proposals get their time")]
    let now = std::time::SystemTime::now();
    now.duration_since(std::time::UNIX_EPOCH).map_or(0, |since| since.as_secs())
}
