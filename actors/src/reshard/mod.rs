//! Splitting and merging shards while they are read and written.
//!
//! ```text
//!  BeginReshard ─▶ new shards, unseen ─▶ seeded from an export ─▶ the log since then, replayed until little is left
//!                                                                        │
//!  EndReshard ◀─ new shards are on their own ◀─ what is left, replayed ◀─ old shards frozen
//! ```
//!
//! Both ways are one: neighbours of one collection give way to others that cover the same range. Where the
//! control group is led, one task drives one change. It keeps nothing: whoever leads next begins anew, with
//! new shards. From the freezing on the old shards refuse writes, and reads that must see the latest; edges
//! that have the old map ask again with the new one, unseen by clients. Who has frozen a shard and is gone
//! is found out by the shard's leader ([`thaw_if_given_up`]).

mod spool;

use std::collections::{BTreeMap, BTreeSet};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, Instant};

use bytes::Bytes;
use futures::{StreamExt, TryStreamExt};
use ractor::{Actor, ActorProcessingErr, ActorRef};
use ractor_cluster::RactorMessage;
use shoal_engine::backup::Archive;
use shoal_engine::check_point;
use shoal_engine::command::{
    Answer, Command, Document, Envelope, Point, Read, Replay, Seed, SeedPartial, StagedChunk,
};
use shoal_engine::reshard::Refusals;
use shoal_proto::{
    CollectionConfig, Error, ErrorCode, GroupId, Level, NodeId, RequestId, Route, ShardId, codec,
};
use shoal_raft::cluster::{self, ClusterState, MAX_SHARDS, Reshard};
use tokio::task::JoinHandle;

use self::spool::Spool;
use crate::FILES_COLLECTION;
use crate::call::{Call, Consistency, Reply};
use crate::cluster::{Cluster, LocalShard, ReadOptions};
use crate::entries::{bounded, by_shard, entries};
use crate::limits::MAX_ENTRY_BYTES;
use crate::placement::PlacementLimits;
use crate::scratch::{Scratch, ScratchCopy};

/// How often it is looked whether something is to be done.
const TICK: Duration = Duration::from_millis(500);
/// How often the sizes of shards are looked up.
const SIZES_EVERY: Duration = Duration::from_secs(60);
/// How long one step may take: long enough for an election.
const STEP_TIMEOUT: Duration = Duration::from_secs(60);
/// How long a replica may take to give its state.
const FETCH_TIMEOUT: Duration = Duration::from_secs(1200);
/// The pause before a failed change is begun anew; it doubles up to the second.
const RETRY_PAUSES: (Duration, Duration) = (Duration::from_secs(1), Duration::from_secs(60));
/// The pause before a log is looked at again in which there was nothing new.
const TAIL_PAUSE: Duration = Duration::from_millis(20);
/// The pause before something that is not to be had yet is tried again.
const BUSY_PAUSE: Duration = Duration::from_millis(50);
/// Entries on their way into the new shards at once.
const WRITES_AT_ONCE: usize = 8;
/// Bytes of points, and of documents, that are read of a copy at a time.
const READ_BYTES: usize = 8 << 20;
/// Answers to requests in one entry.
const ANSWERS_AT_ONCE: usize = 200;
/// The most documents in one entry.
const DOCUMENTS_AT_ONCE: usize = 50;
/// What a document takes in an entry besides its name and its attributes, in bytes, about.
const DOCUMENT_BYTES: usize = 256;
/// Bytes of the old shards' logs that are fetched at a time.
const TAIL_BYTES: u64 = 1 << 20;
/// Attempts after which a change is given up.
const MAX_ATTEMPTS: u32 = 8;
/// How long writes may be kept waiting: then the attempt has failed, and the old shards go on.
const FREEZE_LIMIT: Duration = Duration::from_secs(10);
/// How long asking whether a shard may thaw, and thawing it, may take each.
const THAW_TIMEOUT: Duration = Duration::from_secs(3);
/// The old shards are frozen when their logs have no more than this many entries that were not replayed.
const LITTLE: u64 = 200;

pub(crate) struct Reshards;

#[derive(Clone)]
pub(crate) struct ReshardsArguments {
    pub(crate) cluster: Cluster,
    pub(crate) limits: PlacementLimits,
    /// Where copies of shards lie while they are read.
    pub(crate) scratch: PathBuf,
}

/// A task that ends with whoever has begun it.
struct Running(JoinHandle<()>);

impl Drop for Running {
    fn drop(&mut self) {
        self.0.abort();
    }
}

#[derive(RactorMessage)]
pub(crate) enum ReshardsMessage {
    /// Look whether something is to be done.
    Tick,
}

pub(crate) struct ReshardsState {
    arguments: ReshardsArguments,
    running: Option<Running>,
    sizes_at: Instant,
}

impl Actor for Reshards {
    type Msg = ReshardsMessage;
    type State = ReshardsState;
    type Arguments = ReshardsArguments;

    async fn pre_start(
        &self,
        myself: ActorRef<ReshardsMessage>,
        arguments: ReshardsArguments,
    ) -> Result<ReshardsState, ActorProcessingErr> {
        // What a crash has left there is of no use to anybody.
        if arguments.scratch.exists() {
            std::fs::remove_dir_all(&arguments.scratch)?;
        }
        myself.send_interval(TICK, || ReshardsMessage::Tick);
        Ok(ReshardsState { arguments, running: None, sizes_at: Instant::now() + SIZES_EVERY })
    }

    async fn handle(
        &self,
        _: ActorRef<ReshardsMessage>,
        message: ReshardsMessage,
        state: &mut ReshardsState,
    ) -> Result<(), ActorProcessingErr> {
        match message {
            ReshardsMessage::Tick => state.tick(),
        }
        Ok(())
    }
}

impl ReshardsState {
    fn tick(&mut self) {
        let cluster = &self.arguments.cluster;
        let leads = cluster.groups().get(GroupId::CONTROL).is_ok_and(|control| control.is_leader());
        if !leads {
            self.running = None;
            return;
        }
        if self.running.as_ref().is_some_and(|running| !running.0.is_finished()) {
            return;
        }
        let state = cluster.state();
        if state.level < Level::PARTIAL_ANSWERS {
            if let Some(name) = state.resharding.keys().next().cloned() {
                self.running = Some(Running(tokio::spawn(give_up(cluster.clone(), name))));
            }
        } else if let Some(name) = state.resharding.keys().next().cloned() {
            let driver = Driver { cluster: cluster.clone(), scratch: self.arguments.scratch.clone(), name };
            self.running = Some(Running(tokio::spawn(driver.run())));
        } else if self.arguments.limits.split_bytes > 0 && Instant::now() >= self.sizes_at {
            self.sizes_at = Instant::now() + SIZES_EVERY;
            let sizes = split_a_large_one(cluster.clone(), self.arguments.limits.split_bytes);
            self.running = Some(Running(tokio::spawn(sizes)));
        }
    }
}

/// Gives up what a node of an earlier build has begun: its shards may be frozen, and until all nodes are upgraded
/// the replicas of the new ones would not come to the same state everywhere.
async fn give_up(cluster: Cluster, name: String) {
    match cluster.abort_reshard(&name, Instant::now() + STEP_TIMEOUT).await {
        Ok(()) => tracing::warn!(
            collection = name,
            "the change of its shards was given up: it can be ordered again when all nodes are upgraded"
        ),
        Err(error) => {
            tracing::warn!(collection = name, %error, "the change of its shards goes on being given up")
        }
    }
}

/// Orders that the largest shard be split that can be, if it is larger than a shard should be.
async fn split_a_large_one(cluster: Cluster, limit: u64) {
    let state = cluster.state();
    if state.is_placement_paused {
        return;
    }
    let mut options = ReadOptions::linearizable(Instant::now() + STEP_TIMEOUT);
    options.level = Consistency::Eventual;
    let mut large: Vec<(u64, ShardId)> = Vec::new();
    let collections = state.usable_collections().filter(|(name, _)| *name != FILES_COLLECTION);
    for shard in collections.flat_map(|(_, collection)| &collection.shards) {
        match cluster.read(*shard, Read::Stats, &options).await {
            Ok((Answer::Stats(stats), _)) if stats.disk_bytes > limit => {
                large.push((stats.disk_bytes, *shard))
            }
            _ => {}
        }
    }
    large.sort_unstable_by(|a, b| b.cmp(a));
    for (bytes, shard) in large {
        match cluster.split(shard, 2, Instant::now() + STEP_TIMEOUT).await {
            Ok(()) => {
                tracing::info!(shard = shard.0, bytes, limit, "a shard is too large and is split");
                return;
            }
            Err(error) => {
                tracing::warn!(shard = shard.0, %error, "a shard that is too large cannot be split")
            }
        }
    }
}

impl Cluster {
    /// Orders that a shard be split into so many, of equal ranges.
    ///
    /// # Errors
    /// Not found; invalid argument for a number below 2; conflict when the collection's shards are being
    /// changed already, or would be too many, or not all nodes are upgraded.
    pub async fn split(&self, shard: ShardId, into: u32, deadline: Instant) -> Result<(), Error> {
        let state = self.fresh_state(deadline).await?;
        let known = in_use(&state, shard)?;
        let (first, last) = (u64::from(known.first.0), u64::from(known.last.0) + 1);
        if !(2..=MAX_SHARDS).contains(&into) || u64::from(into) > last - first {
            return Err(Error::invalid("into", format!("a shard cannot be split into {into}")));
        }
        let bound = |at: u32| Route((first + (last - first) * u64::from(at) / u64::from(into)) as u32);
        let firsts = (0..into).map(bound).collect();
        self.begin_reshard(&known.collection, vec![shard], firsts, deadline).await
    }

    /// Orders that two neighbouring shards become one.
    ///
    /// # Errors
    /// Not found; conflict when they are no neighbours, the collection's shards are being changed already, or not
    /// all nodes are upgraded.
    pub async fn merge(&self, one: ShardId, other: ShardId, deadline: Instant) -> Result<(), Error> {
        let state = self.fresh_state(deadline).await?;
        let (one_known, other_known) = (in_use(&state, one)?, in_use(&state, other)?);
        let (parents, first) = match one_known.first < other_known.first {
            true => (vec![one, other], one_known.first),
            false => (vec![other, one], other_known.first),
        };
        self.begin_reshard(&one_known.collection, parents, vec![first], deadline).await
    }

    async fn begin_reshard(
        &self,
        name: &str,
        parents: Vec<ShardId>,
        firsts: Vec<Route>,
        deadline: Instant,
    ) -> Result<(), Error> {
        self.require(Level::PARTIAL_ANSWERS).await?;
        if name == FILES_COLLECTION {
            let message = "the collection of files keeps the shards that it was made with: the bytes of files lie by them";
            return Err(Error::new(ErrorCode::Conflict, message));
        }
        let reshard = RequestId(uuid::Uuid::new_v4().into_bytes());
        let (name, instead_of) = (name.to_owned(), None);
        let begin = cluster::Command::BeginReshard { reshard, instead_of, name, parents, firsts };
        self.control(begin, deadline).await.map(drop)
    }

    /// Gives up a change of a collection's shards: those that are there stay.
    ///
    /// # Errors
    /// Not found when nothing is being changed.
    pub async fn abort_reshard(&self, name: &str, deadline: Instant) -> Result<(), Error> {
        loop {
            let state = self.fresh_state(deadline).await?;
            let name = state.collection(name)?.0;
            let none = || Error::not_found(format!("the shards of `{name}` are not being changed"));
            let reshard = state.resharding.get(name).ok_or_else(none)?.id;
            let abort = cluster::Command::AbortReshard { reshard };
            // An attempt that took this one's place meanwhile is to be given up as well.
            if self.control(abort, deadline).await? != cluster::Response::Absent {
                return Ok(());
            }
        }
    }

    /// Commands that a shard has applied after an index, from a replica that has them, and the last index that
    /// it has applied.
    async fn tail(&self, shard: ShardId, after: u64) -> Result<(Vec<(u64, Option<Bytes>)>, u64), Error> {
        let deadline = Instant::now() + STEP_TIMEOUT;
        loop {
            let mut reason = String::from("no replica answers");
            for node in self.holders(shard) {
                let call = Call::Tail { group: shard.into(), after, limit_bytes: TAIL_BYTES };
                match self.call(node, call, Duration::from_secs(5)).await {
                    Reply::Tail(commands, applied) => return Ok((commands, applied)),
                    Reply::Failed(error) => reason = format!("node {node}: {}", error.message),
                    _ => {}
                }
            }
            if Instant::now() > deadline {
                return Err(Error::unavailable(format!(
                    "the log of shard {shard} is not to be had: {reason}"
                )));
            }
            tokio::time::sleep(BUSY_PAUSE).await;
        }
    }

    /// The nodes that hold a shard, its leader first.
    fn holders(&self, shard: ShardId) -> Vec<NodeId> {
        let state = self.state();
        let leader = self.groups().get(shard.into()).ok().and_then(|group| group.leader());
        let replicas = state.shards.get(&shard).map(|shard| shard.replicas.clone()).unwrap_or_default();
        let mut nodes: Vec<NodeId> = replicas.into_iter().collect();
        nodes.sort_by_key(|node| (Some(*node) != leader, *node != self.node()));
        nodes
    }
}

fn in_use(state: &ClusterState, shard: ShardId) -> Result<&cluster::Shard, Error> {
    let known = state.shards.get(&shard).filter(|_| state.is_in_use(shard));
    known.ok_or_else(|| Error::not_found(format!("shard {shard} does not exist")))
}

/// Lets a shard that this node leads take writes again, when the change of shards that has frozen it was
/// given up. Only the control group itself may say so: a state that is behind may not know of the change yet.
pub(crate) async fn thaw_if_given_up(cluster: &Cluster, id: ShardId, local: &LocalShard) {
    let Some(by) = local.shard.frozen_by().filter(|_| local.group.is_leader()) else { return };
    let goes_on = |state: &ClusterState| state.resharding.values().any(|reshard| reshard.id == by);
    if goes_on(&cluster.state()) {
        return;
    }
    match cluster.fresh_state(Instant::now() + THAW_TIMEOUT).await {
        Ok(state) if !goes_on(&state) && state.shards.contains_key(&id) => {
            tracing::warn!(shard = id.0, "a change of shards was given up: the shard takes writes again");
            drop(cluster.write(id, None, &Command::Thaw { by }, Instant::now() + THAW_TIMEOUT).await);
        }
        Ok(_) => {}
        Err(error) => tracing::debug!(shard = id.0, %error, "whether it stays frozen will be asked again"),
    }
}

/// Drives one collection's change to its end.
struct Driver {
    cluster: Cluster,
    scratch: PathBuf,
    name: String,
}

impl Driver {
    async fn run(self) {
        let began = Instant::now();
        let mut pause = Duration::ZERO;
        for _ in 0..MAX_ATTEMPTS {
            match self.attempt(pause).await {
                Ok(true) => {
                    metrics::counter!("shoal_reshards_total", "result" => "ok").increment(1);
                    let seconds = began.elapsed().as_secs_f64();
                    tracing::info!(collection = self.name, seconds, "its shards were changed");
                    return;
                }
                Ok(false) => return,
                Err(error) => {
                    metrics::counter!("shoal_reshards_total", "result" => "failed").increment(1);
                    tracing::warn!(collection = self.name, %error, "its shards will be changed in a new attempt");
                }
            }
            pause = (2 * pause).clamp(RETRY_PAUSES.0, RETRY_PAUSES.1);
        }
        match self.cluster.abort_reshard(&self.name, Instant::now() + STEP_TIMEOUT).await {
            Ok(()) => tracing::error!(
                collection = self.name,
                "its shards stay as they are: no attempt has succeeded"
            ),
            Err(error) => {
                tracing::warn!(collection = self.name, %error, "the change of its shards is not given up yet")
            }
        }
    }

    /// One attempt. False when there is nothing to do any more. The pause comes when what an attempt before has
    /// frozen may thaw already.
    async fn attempt(&self, pause: Duration) -> Result<bool, Error> {
        let state = self.cluster.fresh_state(Instant::now() + STEP_TIMEOUT).await?;
        let Some(known) = state.resharding.get(&self.name) else { return Ok(false) };
        // What another attempt has made may be half of something.
        let id = RequestId(uuid::Uuid::new_v4().into_bytes());
        let firsts = known.children.iter().map(|child| state.shards[child].first).collect();
        let begin = cluster::Command::BeginReshard {
            reshard: id,
            instead_of: Some(known.id),
            name: self.name.clone(),
            parents: known.parents.clone(),
            firsts,
        };
        self.cluster.control(begin, Instant::now() + STEP_TIMEOUT).await?;
        tokio::time::sleep(pause).await;
        let begun =
            |state: &Arc<ClusterState>| state.resharding.get(&self.name).is_some_and(|now| now.id == id);
        let state = self.cluster.wait_state(Instant::now() + STEP_TIMEOUT, begun).await?;
        let copy = Copying::new(self, &state, &state.resharding[&self.name])?;
        copy.run().await?;
        Ok(true)
    }
}

/// One attempt's work.
struct Copying<'a> {
    cluster: &'a Cluster,
    scratch: &'a Path,
    by: RequestId,
    config: CollectionConfig,
    /// The old shards with their ranges.
    parents: Vec<(ShardId, (Route, Route))>,
    /// The new shards with theirs.
    children: Vec<(ShardId, (Route, Route))>,
}

/// An old shard, as far as it was copied.
struct Source {
    shard: ShardId,
    /// What its log indexes are counted from.
    base: u64,
    /// The last index that the new shards have.
    done: u64,
    /// What is in its log and was refused.
    refusals: Refusals,
    spool: Spool,
}

impl<'a> Copying<'a> {
    fn new(driver: &'a Driver, state: &ClusterState, reshard: &Reshard) -> Result<Copying<'a>, Error> {
        let config = state.collection(&driver.name)?.1.config.clone();
        let with_range = |id: &ShardId| (*id, (state.shards[id].first, state.shards[id].last));
        Ok(Copying {
            cluster: &driver.cluster,
            scratch: &driver.scratch,
            by: reshard.id,
            config,
            parents: reshard.parents.iter().map(with_range).collect(),
            children: reshard.children.iter().map(with_range).collect(),
        })
    }

    async fn run(&self) -> Result<(), Error> {
        let mut sources = Vec::new();
        for (parent, _) in &self.parents {
            sources.push(self.seed(*parent).await?);
        }
        // In turn: while one catches up the other falls behind.
        let mut is_far = true;
        while is_far {
            is_far = false;
            for source in &mut sources {
                if source.spool.behind(source.done)? > LITTLE {
                    self.replay_some(source).await?;
                    is_far = true;
                }
            }
        }
        let frozen = Instant::now();
        let passed_on = tokio::time::timeout(FREEZE_LIMIT, self.pass_on(&mut sources)).await;
        metrics::histogram!("shoal_reshard_frozen_seconds").record(frozen.elapsed().as_secs_f64());
        passed_on
            .map_err(|_| Error::unavailable(format!("it was not done within {FREEZE_LIMIT:?} of freezing")))?
    }

    /// Freezes the old shards and lets the new ones take their place.
    async fn pass_on(&self, sources: &mut [Source]) -> Result<(), Error> {
        for source in sources {
            let last = self.freeze(source.shard).await?;
            while source.done < last {
                self.replay_some(source).await?;
            }
        }
        let mut begins = BTreeMap::new();
        for (child, _) in &self.children {
            begins.insert(*child, self.write(*child, &Command::EndAdoption { by: self.by }).await?);
        }
        let end = cluster::Command::EndReshard { reshard: self.by, begins };
        if let Err(error) = self.cluster.control(end, Instant::now() + STEP_TIMEOUT).await {
            // An answer that was lost, and the repetition refused?
            let state = self.cluster.fresh_state(Instant::now() + STEP_TIMEOUT).await?;
            if !self.children.iter().all(|(child, _)| state.is_in_use(*child)) {
                return Err(error);
            }
        }
        Ok(())
    }

    /// Freezes an old shard; one that is still frozen for an attempt that was given up thaws first.
    async fn freeze(&self, shard: ShardId) -> Result<u64, Error> {
        loop {
            match self.write(shard, &Command::Freeze { by: self.by }).await {
                Err(error) if error.code == ErrorCode::Conflict => tokio::time::sleep(BUSY_PAUSE).await,
                frozen => return frozen,
            }
        }
    }

    /// Brings what an old shard holds at one moment into the new ones.
    async fn seed(&self, parent: ShardId) -> Result<Source, Error> {
        // From now on its log is kept as it grows: it may be purged before the copy is through. After what it has
        // applied there is nothing, and how far that is comes with it.
        let (_, begin) = self.cluster.tail(parent, u64::MAX - 1).await?;
        let path = self.scratch.join(format!("{}.tail", uuid::Uuid::new_v4()));
        let spool = Spool::begin(self.cluster.clone(), parent, begin, path)?;
        let (index, archive) = self.copy(parent, begin).await?;
        let (base, frozen) = {
            let archive = archive.clone();
            blocking(move || Ok((archive.archive.base()?, archive.archive.frozen_by()?))).await?
        };
        let seed_of = |child: ShardId| Seed {
            by: self.by,
            from: parent,
            parents: self.parts_of(child),
            version: base + index,
            points: Vec::new(),
            documents: Vec::new(),
            staged: Vec::new(),
            answers: Vec::new(),
            indexes: None,
        };
        let (source, wanted) = (archive.clone(), self.config.payload_indexes.clone());
        let (indexes, (answers, partial)) =
            blocking(move || Ok((source.archive.indexes()?.unwrap_or(wanted), source.archive.answers()?)))
                .await?;
        for (child, _) in &self.children {
            let indexes =
                self.parents.first().is_some_and(|(first, _)| *first == parent).then(|| indexes.clone());
            self.write_seed(*child, Seed { indexes, ..seed_of(*child) }).await?;
            // In their order: the oldest are forgotten first.
            for answers in answers.chunks(ANSWERS_AT_ONCE) {
                self.write_seed(*child, Seed { answers: answers.to_vec(), ..seed_of(*child) }).await?;
            }
            for answers in partial.chunks(ANSWERS_AT_ONCE) {
                let seed = SeedPartial { by: self.by, from: parent, answers: answers.to_vec() };
                self.write(*child, &Command::SeedPartial(Box::new(seed))).await?;
            }
        }
        let mut after = None;
        loop {
            let config = self.config.clone();
            let (points, next) =
                next_batch(&archive, after, move |archive, after| archive.points(&config, after, READ_BYTES))
                    .await?;
            after = next;
            if points.is_empty() {
                break;
            }
            let seeds = self.by_child(points, |point: &Point| point.id.route()).into_iter();
            let seeds = seeds
                .flat_map(|(child, points)| entries(points).into_iter().map(move |points| (child, points)));
            let seeds = seeds.map(|(child, points)| (child, Seed { points, ..seed_of(child) }));
            self.write_seeds(seeds.collect()).await?;
        }
        let mut after = None;
        loop {
            let (documents, next) =
                next_batch(&archive, after, |archive, after| archive.documents(after, READ_BYTES)).await?;
            after = next;
            if documents.is_empty() {
                break;
            }
            let seeds = self.by_child(documents, |document: &Document| document.id.route()).into_iter();
            let seeds = seeds.flat_map(|(child, documents)| {
                let parts = bounded(documents, DOCUMENTS_AT_ONCE, document_bytes).into_iter();
                parts.map(move |documents| (child, documents))
            });
            let seeds = seeds.map(|(child, documents)| (child, Seed { documents, ..seed_of(child) }));
            self.write_seeds(seeds.collect()).await?;
        }
        let mut after = None;
        loop {
            let (staged, next) =
                next_batch(&archive, after, |archive, after| archive.staged(after, MAX_ENTRY_BYTES)).await?;
            after = next;
            if staged.is_empty() {
                break;
            }
            let staged = self.by_child(staged, |chunk: &StagedChunk| chunk.document.route());
            let seeds = staged.into_iter().map(|(child, staged)| (child, Seed { staged, ..seed_of(child) }));
            self.write_seeds(seeds.collect()).await?;
        }
        let refusals = Refusals::after(frozen);
        Ok(Source { shard: parent, base, done: index, refusals, spool })
    }

    /// A copy of an old shard in files of this node, and the last index that it has: `least` or a later one,
    /// since what comes after is in the log.
    async fn copy(&self, parent: ShardId, least: u64) -> Result<(u64, Arc<ScratchCopy>), Error> {
        let mut reason = String::from("it has no replicas");
        for node in self.cluster.holders(parent) {
            let fetch = self.cluster.groups().fetch_state(parent.into(), node);
            let (index, file) = match tokio::time::timeout(FETCH_TIMEOUT, fetch).await {
                Ok(Ok((_, index, _))) if index < least => {
                    reason = format!("node {node} is at {index} of {least}");
                    continue;
                }
                Ok(Ok((_, index, file))) => (index, file),
                Ok(Err(error)) => {
                    reason = format!("node {node}: {error}");
                    continue;
                }
                Err(_) => {
                    reason = format!("node {node} took too long");
                    continue;
                }
            };
            let bytes = std::fs::metadata(&file.0).map_err(Error::internal)?.len();
            self.check_room(2 * bytes).await?;
            let dir = Scratch(self.scratch.join(uuid::Uuid::new_v4().to_string()));
            let copied = blocking(move || {
                let mut archive = Archive::create(&dir.0)?;
                archive.take_file(&file.0)?;
                Ok(ScratchCopy { archive, _dir: dir })
            })
            .await;
            match copied {
                Ok(copy) => return Ok((index, Arc::new(copy))),
                Err(error) => reason = format!("node {node}: {error}"),
            }
        }
        Err(Error::unavailable(format!("no replica of shard {parent} gives its state: {reason}")))
    }

    /// Whether this node has room for a copy, and the nodes of the new shards for what they are to hold.
    async fn check_room(&self, bytes: u64) -> Result<(), Error> {
        let state = self.cluster.state();
        let reports = self.cluster.reports().await;
        let mut nodes: BTreeSet<NodeId> = BTreeSet::from([self.cluster.node()]);
        for (child, _) in &self.children {
            nodes.extend(state.shards.get(child).into_iter().flat_map(|shard| &shard.replicas));
        }
        let is_short = |node: &NodeId| {
            reports.get(node).is_some_and(|report| !report.is_writable || report.disk_free_bytes < bytes)
        };
        match nodes.iter().find(|node| is_short(node)) {
            Some(node) => {
                let message = format!("the disk of node {node} has no room for it: {bytes} bytes are needed");
                Err(Error::new(ErrorCode::DiskFull, message))
            }
            None => Ok(()),
        }
    }

    fn range_of(&self, child: ShardId) -> (Route, Route) {
        let known = self.children.iter().find(|(id, _)| *id == child);
        known.expect("what is seeded is one of the new shards").1
    }

    /// The old shards, with the first and the last route of what comes from each to a new one.
    fn parts_of(&self, child: ShardId) -> Vec<(ShardId, Route, Route)> {
        let (first, last) = self.range_of(child);
        let parts =
            self.parents.iter().map(|(parent, (from, to))| (*parent, first.max(*from), last.min(*to)));
        parts.filter(|(_, from, to)| from <= to).collect()
    }

    fn child_of(&self, route: Route) -> ShardId {
        let owner = self.children.iter().find(|(_, (first, last))| (*first..=*last).contains(&route));
        owner.expect("the new shards cover what the old ones do").0
    }

    fn by_child<T>(&self, all: Vec<T>, route: impl Fn(&T) -> Route) -> BTreeMap<ShardId, Vec<T>> {
        by_shard(all, |one| self.child_of(route(one)))
    }

    async fn write_seeds(&self, seeds: Vec<(ShardId, Seed)>) -> Result<(), Error> {
        let writes: Vec<_> = seeds.into_iter().map(|(child, seed)| self.write_seed(child, seed)).collect();
        futures::stream::iter(writes).buffer_unordered(WRITES_AT_ONCE).try_collect().await
    }

    async fn write_seed(&self, child: ShardId, seed: Seed) -> Result<(), Error> {
        self.write(child, &Command::Seed(Box::new(seed))).await.map(drop)
    }

    /// Puts a command through a shard, also when that is busy for a while, and returns its log index.
    async fn write(&self, shard: ShardId, command: &Command) -> Result<u64, Error> {
        let deadline = Instant::now() + STEP_TIMEOUT;
        let (_, index) = self.cluster.write_when_free(shard, None, command, deadline).await?;
        Ok(index)
    }

    /// Brings the next entries of an old shard's log into the new ones.
    async fn replay_some(&self, source: &mut Source) -> Result<(), Error> {
        let Some(commands) = source.spool.next().await? else {
            tokio::time::sleep(TAIL_PAUSE).await;
            return Ok(());
        };
        let Some((last, _)) = commands.last() else { return Ok(()) };
        let last = *last;
        let mut parts: BTreeMap<ShardId, Vec<Numbered>> = BTreeMap::new();
        for (index, command) in commands {
            let Some(command) = command.filter(|_| index > source.done) else { continue };
            let envelope: Envelope = codec::decode(&command)?;
            if source.refusals.has_refused(&envelope.command) || was_refused(&self.config, &envelope.command)
            {
                continue;
            }
            for (child, (first, last)) in &self.children {
                let Some(part) = envelope.command.clone().within(*first, *last) else { continue };
                let part = Envelope { command: part, ..envelope.clone() };
                parts.entry(*child).or_default().push((command.len(), (source.base + index, part)));
            }
        }
        let from = source.shard;
        let writes = parts.into_iter().map(|(child, commands)| async move {
            for commands in bounded(commands, usize::MAX, |(bytes, _)| *bytes) {
                let commands = commands.into_iter().map(|(_, command)| command).collect();
                let replay = Replay { by: self.by, from, commands };
                self.write(child, &Command::Replay(Box::new(replay))).await?;
            }
            Ok::<_, Error>(())
        });
        futures::future::try_join_all(writes.collect::<Vec<_>>()).await?;
        source.done = source.done.max(last);
        Ok(())
    }
}

/// A command with the number that it had, and its size in bytes.
type Numbered = (usize, (u64, Envelope));

/// Whether the old shard has refused a command of which the new ones would see a part each, and might take it.
fn was_refused(config: &CollectionConfig, command: &Command) -> bool {
    match command {
        Command::Upsert(points) | Command::StageChunks { points, .. } => {
            points.iter().any(|point| check_point(config, point).is_err())
        }
        _ => false,
    }
}

fn document_bytes(document: &Document) -> usize {
    let error = document.error.as_ref().map_or(0, String::len);
    DOCUMENT_BYTES + document.filename.len() + document.attributes.len() + error
}

/// The next records of a copy, and where the reading has come to with them.
async fn next_batch<T: Send + 'static, C: Send + 'static>(
    copy: &Arc<ScratchCopy>,
    after: C,
    read: impl FnOnce(&Archive, &mut C) -> shoal_engine::Result<Vec<T>> + Send + 'static,
) -> Result<(Vec<T>, C), Error> {
    let copy = copy.clone();
    blocking(move || {
        let mut after = after;
        read(&copy.archive, &mut after).map(|batch| (batch, after))
    })
    .await
}

async fn blocking<T: Send + 'static>(
    work: impl FnOnce() -> shoal_engine::Result<T> + Send + 'static,
) -> Result<T, Error> {
    Ok(tokio::task::spawn_blocking(work).await.map_err(Error::internal)??)
}
