//! One replica: opens engine and group, then tends them on a tick.

use std::path::PathBuf;
use std::sync::Arc;
use std::time::{Duration, Instant};

use ractor::{Actor, ActorProcessingErr, ActorRef};
use ractor_cluster::RactorMessage;
use shoal_engine::command::{Answer, FileRecord, Read};
use shoal_proto::{CollectionConfig, ShardId};

use crate::blobs::{self, BlobStore};
use crate::cluster::{Cluster, LocalShard};
use crate::limits;
use crate::replica::Replica;

/// How often a replica is tended while something is going on in it.
const TICK: Duration = Duration::from_millis(200);
/// How often a replica is tended that nothing was written to since the last time.
const QUIET_TICK: Duration = Duration::from_secs(2);
/// The pause between two slices of background work, so that searches get the graphs' locks.
const BUSY_TICK: Duration = Duration::from_millis(1);
/// How often a replica looks for blobs that it should hold and does not.
const BLOBS_EVERY: Duration = Duration::from_secs(10);
/// The most blobs fetched in one go.
const BLOBS_AT_ONCE: usize = 16;

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
    /// The last index that was applied when the replica was tended last.
    seen: u64,
    blobs_seen: Instant,
    blobs_tried: usize,
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
        Ok(ShardState { id, cluster, blobs, local, seen: 0, blobs_seen: Instant::now(), blobs_tried: 0 })
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
        if self.local.group.is_stopped() {
            return Err("its Raft group has stopped".into());
        }
        let shard = self.local.shard.clone();
        let more = shard.has_work() && tokio::task::spawn_blocking(move || shard.work()).await??;
        if self.local.group.log_bytes() > limits::CHECKPOINT_LOG_BYTES {
            self.local.group.checkpoint().await?;
        }
        let is_steering = self.local.group.is_leader() && self.steer().await;
        if self.blobs_seen.elapsed() >= BLOBS_EVERY {
            self.fetch_missing_blobs().await;
            self.blobs_seen = Instant::now();
        }
        let applied = self.local.group.applied();
        let is_quiet = applied == self.seen && !is_steering;
        self.seen = applied;
        if is_quiet {
            self.local.group.rest().await;
        }
        let pause = if more {
            BUSY_TICK
        } else if is_quiet {
            QUIET_TICK
        } else {
            TICK
        };
        myself.send_after(pause, || ShardMessage::Tick);
        Ok(())
    }

    /// A replica that was added later, or took a lost disk's place, has the records of files but
    /// not their bytes: it fetches them from the others.
    async fn fetch_missing_blobs(&mut self) {
        let listed = self.cluster.run_read(self.local.shard.clone(), Read::ListFiles).await;
        let Ok((_, Answer::Files(files))) = listed else { return };
        let mut missing: Vec<FileRecord> =
            files.into_iter().filter(|file| !self.blobs.contains(self.id, file.blob)).collect();
        // Begins elsewhere each time, so that some that nobody has do not keep the others back.
        self.blobs_tried = self.blobs_tried.wrapping_add(BLOBS_AT_ONCE);
        let start = self.blobs_tried.checked_rem(missing.len()).unwrap_or_default();
        missing.rotate_left(start);
        for file in missing.into_iter().take(BLOBS_AT_ONCE) {
            if let Err(error) = blobs::fetch(&self.cluster, &self.blobs, self.id, file.blob).await {
                tracing::warn!(shard = self.id.0, %error, "a missing blob will be fetched later");
            }
        }
    }

    /// Leads the group's membership one step towards what the control group wants. Returns
    /// whether there is more to do.
    async fn steer(&self) -> bool {
        let state = self.cluster.state();
        let Some(shard) = state.shards.get(&self.id) else { return false };
        match self.local.group.steer_members(&shard.replicas, &shard.replicas).await {
            Ok(is_done) => !is_done,
            Err(error) => {
                tracing::debug!(shard = self.id.0, %error, "the membership will be led on later");
                true
            }
        }
    }
}
