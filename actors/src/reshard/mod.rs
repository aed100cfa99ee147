//! Splitting and merging shards while they are read and written.
//!
//! ```text
//!  BeginReshard ─▶ new shards, unseen ─▶ seeded from an export ─▶ the log since then, replayed until little is left
//!                                                                        │
//!  EndReshard ◀─ new shards are on their own ◀─ what is left, replayed ◀─ old shards frozen
//! ```
//!
//! Both ways are one: neighbours of one collection give way to others that cover the same range. Where the
//! control group is led, one task drives one change, the only one in the cluster; others that were ordered wait.
//! It keeps nothing: whoever leads next begins anew, with new shards. From the freezing on the old shards refuse
//! writes, and reads that must see the latest; edges that have the old map ask again with the new one, unseen by
//! clients. Who has frozen a shard and is gone is found out by the shard's leader ([`thaw_if_given_up`]).
//!
//! An attempt that fails is repeated a few times, unless nothing speaks for more luck: no disk is filled twice,
//! and no log chased that grows as fast as it is replayed. A shard that is too large is split by itself when
//! placement has nothing to do, and left alone for a while when that was given up.

mod backoff;
mod copying;
mod driver;
mod order;
mod progress;
mod spool;

use std::path::PathBuf;
use std::time::{Duration, Instant};

use ractor::{Actor, ActorProcessingErr, ActorRef};
use ractor_cluster::RactorMessage;
use shoal_engine::command::{Answer, Command, Read};
use shoal_proto::{GroupId, Level, ShardId};
use shoal_raft::cluster::ClusterState;
use tokio::task::JoinHandle;

use self::backoff::Backoff;
use self::driver::Driver;
use crate::FILES_COLLECTION;
use crate::call::Consistency;
use crate::cluster::{Cluster, LocalShard, ReadOptions};
use crate::placement::PlacementLimits;

/// How often it is looked whether something is to be done.
const TICK: Duration = Duration::from_millis(500);
/// How long one step may take: long enough for an election.
const STEP_TIMEOUT: Duration = Duration::from_secs(60);
/// The pause before a log is looked at again in which there was nothing new.
const TAIL_PAUSE: Duration = Duration::from_millis(20);
/// The pause before something that is not to be had yet is tried again.
const BUSY_PAUSE: Duration = Duration::from_millis(50);
/// How long asking whether a shard may thaw, and thawing it, may take each.
const THAW_TIMEOUT: Duration = Duration::from_secs(3);

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
    /// A change of this shard was given up, or could not be ordered.
    GaveUp(ShardId),
}

pub(crate) struct ReshardsState {
    arguments: ReshardsArguments,
    running: Option<Running>,
    sizes_at: Instant,
    /// The shards that are not split by themselves for a while.
    backoff: Backoff,
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
        let sizes_at = Instant::now() + arguments.limits.sizes_every;
        Ok(ReshardsState { arguments, running: None, sizes_at, backoff: Backoff::default() })
    }

    async fn handle(
        &self,
        myself: ActorRef<ReshardsMessage>,
        message: ReshardsMessage,
        state: &mut ReshardsState,
    ) -> Result<(), ActorProcessingErr> {
        match message {
            ReshardsMessage::Tick => state.tick(&myself),
            ReshardsMessage::GaveUp(shard) => state.backoff.note(shard, Instant::now()),
        }
        Ok(())
    }
}

impl ReshardsState {
    fn tick(&mut self, myself: &ActorRef<ReshardsMessage>) {
        let cluster = &self.arguments.cluster;
        let leads = cluster.groups().get(GroupId::CONTROL).is_ok_and(|control| control.is_leader());
        if !leads {
            if self.running.take().is_some() {
                cluster.note_attempt(None);
            }
            return;
        }
        if self.running.as_ref().is_some_and(|running| !running.0.is_finished()) {
            return;
        }
        let (cluster, myself, now) = (cluster.clone(), myself.clone(), Instant::now());
        let state = cluster.state();
        let under_way = state.resharding.iter().next();
        if let Some((name, _)) = under_way.filter(|_| state.level < Level::PARTIAL_ANSWERS) {
            self.running = Some(Running(tokio::spawn(give_up(cluster, name.clone()))));
        } else if let Some((name, reshard)) = under_way {
            let (name, parents) = (name.clone(), reshard.parents.clone());
            let driver = Driver { cluster, scratch: self.arguments.scratch.clone(), name };
            self.running = Some(Running(tokio::spawn(async move {
                if !driver.run().await {
                    parents.into_iter().for_each(|parent| gave_up(&myself, parent));
                }
            })));
        } else if self.arguments.limits.split_bytes > 0 && now >= self.sizes_at {
            self.sizes_at = now + self.arguments.limits.sizes_every;
            self.backoff.retain(|shard| state.shards.contains_key(&shard));
            let collections = state.usable_collections().filter(|(name, _)| *name != FILES_COLLECTION);
            let shards = collections.flat_map(|(_, collection)| collection.shards.iter().copied());
            let shards = shards.filter(|shard| !self.backoff.rests(*shard, now)).collect();
            let split = split_a_large_one(cluster, shards, self.arguments.limits.split_bytes, myself);
            self.running = Some(Running(tokio::spawn(split)));
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

fn gave_up(myself: &ActorRef<ReshardsMessage>, shard: ShardId) {
    // An actor that has ended knows nothing of it, as one that is new does not.
    drop(myself.cast(ReshardsMessage::GaveUp(shard)));
}

/// Orders that the largest of some shards be split that can be, if it is larger than a shard should be.
async fn split_a_large_one(
    cluster: Cluster,
    shards: Vec<ShardId>,
    limit: u64,
    myself: ActorRef<ReshardsMessage>,
) {
    // One thing at a time: what is made of a shard moves to other nodes first.
    match cluster.plan().await {
        Ok(plan) if !plan.is_paused && plan.steps.is_empty() && plan.moving.is_empty() => {}
        _ => return,
    }
    let mut options = ReadOptions::linearizable(Instant::now() + STEP_TIMEOUT);
    options.level = Consistency::Eventual;
    let mut large: Vec<(u64, ShardId)> = Vec::new();
    for shard in shards {
        match cluster.read(shard, Read::Stats, &options).await {
            Ok((Answer::Stats(stats), _)) if stats.disk_bytes > limit => {
                large.push((stats.disk_bytes, shard))
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
                tracing::warn!(shard = shard.0, %error, "a shard that is too large cannot be split");
                gave_up(&myself, shard);
            }
        }
    }
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
