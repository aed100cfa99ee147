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
use shoal_proto::{GroupId, ShardId};
use shoal_raft::cluster::ClusterState;
use tokio::task::JoinHandle;

use self::driver::Driver;
use crate::FILES_COLLECTION;
use crate::call::Consistency;
use crate::cluster::{Cluster, LocalShard, ReadOptions};
use crate::placement::PlacementLimits;

/// How often it is looked whether something is to be done.
const TICK: Duration = Duration::from_millis(500);
/// How often the sizes of shards are looked up.
const SIZES_EVERY: Duration = Duration::from_secs(60);
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
        if let Some(name) = state.resharding.keys().next().cloned() {
            let driver = Driver { cluster: cluster.clone(), scratch: self.arguments.scratch.clone(), name };
            self.running = Some(Running(tokio::spawn(async move {
                driver.run().await;
            })));
        } else if self.arguments.limits.split_bytes > 0 && Instant::now() >= self.sizes_at {
            self.sizes_at = Instant::now() + SIZES_EVERY;
            let sizes = split_a_large_one(cluster.clone(), self.arguments.limits.split_bytes);
            self.running = Some(Running(tokio::spawn(sizes)));
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
