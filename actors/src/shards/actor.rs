//! One replica: opens engine and group, then tends them on a tick.

use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use ractor::{Actor, ActorProcessingErr, ActorRef};
use ractor_cluster::RactorMessage;
use shoal_engine::command::{Answer, Read};
use shoal_proto::{CollectionConfig, ShardId};

use crate::blobs::{self, BlobStore};
use crate::cluster::{Cluster, LocalShard};
use crate::limits;
use crate::replica::Replica;

/// How often a replica is tended when it has nothing to do.
const TICK: Duration = Duration::from_millis(200);
/// The pause between two slices of background work, so that searches get the graphs' locks.
const BUSY_TICK: Duration = Duration::from_millis(1);
/// Every so many ticks a replica looks for blobs that it should hold and does not.
const BLOB_TICKS: u64 = 50;
/// The most blobs fetched in one go.
const BLOBS_AT_ONCE: usize = 16;
/// Every so many ticks the leader looks after the group's membership.
const STEER_TICKS: u64 = 3;

pub(super) struct Shard;

pub(super) struct ShardArguments {
    pub(super) id: ShardId,
    pub(super) config: CollectionConfig,
    pub(super) dir: PathBuf,
    pub(super) cluster: Cluster,
    pub(super) blobs: BlobStore,
}

#[derive(RactorMessage)]
pub(super) enum ShardMessage {
    /// Look after the replica.
    Tick,
}

pub(super) struct ShardState {
    id: ShardId,
    cluster: Cluster,
    blobs: BlobStore,
    local: LocalShard,
    ticks: u64,
}

impl Actor for Shard {
    type Msg = ShardMessage;
    type State = ShardState;
    type Arguments = ShardArguments;

    async fn pre_start(
        &self,
        myself: ActorRef<ShardMessage>,
        arguments: ShardArguments,
    ) -> Result<ShardState, ActorProcessingErr> {
        let ShardArguments { id, config, dir, cluster, blobs } = arguments;
        let shard = tokio::task::spawn_blocking(move || shoal_engine::Shard::open(&dir, config)).await??;
        let shard = Arc::new(shard);
        let group = cluster.groups().open(id.into(), Arc::new(Replica(shard.clone()))).await?;
        let founders =
            cluster.state().shards.get(&id).map(|shard| shard.founders.clone()).unwrap_or_default();
        if founders.contains(&cluster.node()) && !group.is_initialized().await? {
            group.initialize(&founders).await?;
        } else if group.status().voters.len() == 1 {
            // Nobody else could lead: waiting for a time-out would only delay the start.
            group.elect().await?;
        }
        let local = LocalShard { shard, group };
        cluster.add_local(id, local.clone());
        myself.cast(ShardMessage::Tick)?;
        Ok(ShardState { id, cluster, blobs, local, ticks: 0 })
    }

    async fn handle(
        &self,
        myself: ActorRef<ShardMessage>,
        message: ShardMessage,
        state: &mut ShardState,
    ) -> Result<(), ActorProcessingErr> {
        match message {
            ShardMessage::Tick => state.tick(&myself).await,
        }
    }
}

impl ShardState {
    async fn tick(&mut self, myself: &ActorRef<ShardMessage>) -> Result<(), ActorProcessingErr> {
        self.ticks += 1;
        if self.local.group.status().role == "stopped" {
            return Err("its Raft group has stopped".into());
        }
        let shard = self.local.shard.clone();
        let more = tokio::task::spawn_blocking(move || shard.work()).await??;
        if self.local.group.log_bytes() > limits::CHECKPOINT_LOG_BYTES {
            self.local.group.checkpoint().await?;
        }
        if self.ticks.is_multiple_of(STEER_TICKS) && self.local.group.is_leader() {
            self.steer().await;
        }
        if self.ticks.is_multiple_of(BLOB_TICKS) {
            self.fetch_missing_blobs().await;
        }
        myself.send_after(if more { BUSY_TICK } else { TICK }, || ShardMessage::Tick);
        Ok(())
    }

    /// A replica that was added later, or took a lost disk's place, has the records of files but
    /// not their bytes: it fetches them from the others.
    async fn fetch_missing_blobs(&self) {
        let shard = self.local.shard.clone();
        let listed = tokio::task::spawn_blocking(move || shard.read(&Read::ListFiles)).await;
        let Ok(Ok(Answer::Files(files))) = listed else { return };
        let missing = files.into_iter().filter(|file| !self.blobs.contains(self.id, file.blob));
        for file in missing.take(BLOBS_AT_ONCE) {
            if let Err(error) = blobs::fetch(&self.cluster, &self.blobs, self.id, file.blob).await {
                tracing::warn!(shard = self.id.0, %error, "a missing blob will be fetched later");
            }
        }
    }

    /// Leads the group's membership one step towards what the control group wants.
    async fn steer(&self) {
        let state = self.cluster.state();
        let Some(shard) = state.shards.get(&self.id) else { return };
        if let Err(error) = self.local.group.steer_members(&shard.replicas, &shard.replicas).await {
            tracing::debug!(shard = self.id.0, %error, "the membership will be led on later");
        }
    }
}
