//! Opens and closes replicas as the cluster's state says.

use std::collections::{BTreeMap, BTreeSet};
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use ractor::{Actor, ActorProcessingErr, ActorRef, ActorStatus, SupervisionEvent};
use ractor_cluster::RactorMessage;
use shoal_proto::{CollectionConfig, ShardId};
use shoal_raft::cluster::ClusterState;
use tokio::sync::Semaphore;

use super::actor::{Shard, ShardArguments, ShardMessage};
use crate::blobs::BlobStore;
use crate::cluster::Cluster;

/// The pause before a failed replica is opened again; it doubles up to the second value.
const REOPEN_PAUSE: (Duration, Duration) = (Duration::from_millis(500), Duration::from_secs(30));

/// How many replicas are read from the disk at the same time.
const OPENED_AT_ONCE: usize = 2;

pub(crate) struct Shards;

pub(crate) struct ShardsArguments {
    pub(crate) cluster: Cluster,
    pub(crate) blobs: BlobStore,
    pub(crate) dir: PathBuf,
}

#[derive(RactorMessage)]
pub(crate) enum ShardsMessage {
    /// The cluster's state has changed, or a failed replica is due again.
    Reconcile,
    /// A replica is open, or why not.
    Opened(ShardId, Result<ActorRef<ShardMessage>, String>),
}

pub(crate) struct ShardsState {
    arguments: ShardsArguments,
    open: BTreeMap<ShardId, ActorRef<ShardMessage>>,
    gate: Arc<Semaphore>,
    /// Replicas that are being opened, each by a task of its own: one that must first be made anew
    /// from another node takes minutes.
    opening: BTreeSet<ShardId>,
    failures: BTreeMap<ShardId, u32>,
}

impl Actor for Shards {
    type Msg = ShardsMessage;
    type State = ShardsState;
    type Arguments = ShardsArguments;

    async fn pre_start(
        &self,
        myself: ActorRef<ShardsMessage>,
        arguments: ShardsArguments,
    ) -> Result<ShardsState, ActorProcessingErr> {
        std::fs::create_dir_all(&arguments.dir)?;
        // What a supervisor before this one has left: its actors have ended with it.
        for id in arguments.cluster.local_shards().into_keys() {
            arguments.cluster.drop_local(id);
            arguments.cluster.groups().close(id.into()).await;
        }
        let mut watch = arguments.cluster.watch();
        let me = myself.clone();
        tokio::spawn(async move {
            while watch.changed().await.is_ok() && me.cast(ShardsMessage::Reconcile).is_ok() {}
        });
        myself.cast(ShardsMessage::Reconcile)?;
        Ok(ShardsState {
            arguments,
            gate: Arc::new(Semaphore::new(OPENED_AT_ONCE)),
            open: BTreeMap::new(),
            opening: BTreeSet::new(),
            failures: BTreeMap::new(),
        })
    }

    async fn handle(
        &self,
        myself: ActorRef<ShardsMessage>,
        message: ShardsMessage,
        state: &mut ShardsState,
    ) -> Result<(), ActorProcessingErr> {
        match message {
            ShardsMessage::Reconcile => state.reconcile(&myself).await,
            ShardsMessage::Opened(id, result) => state.opened(id, result, &myself).await,
        }
        Ok(())
    }

    async fn handle_supervisor_evt(
        &self,
        myself: ActorRef<ShardsMessage>,
        event: SupervisionEvent,
        state: &mut ShardsState,
    ) -> Result<(), ActorProcessingErr> {
        let (cell, reason) = match event {
            SupervisionEvent::ActorFailed(cell, error) => (cell, error.to_string()),
            SupervisionEvent::ActorTerminated(cell, _, reason) => (cell, reason.unwrap_or_default()),
            _ => return Ok(()),
        };
        let lost = state.open.iter().find(|(_, actor)| actor.get_id() == cell.get_id()).map(|(id, _)| *id);
        if let Some(id) = lost {
            state.open.remove(&id);
            state.close(id).await;
            tracing::error!(shard = id.0, reason, "a replica's actor failed; it will be opened again");
            state.retry_later(id, &myself);
        }
        Ok(())
    }
}

impl ShardsState {
    async fn reconcile(&mut self, myself: &ActorRef<ShardsMessage>) {
        let cluster = self.arguments.cluster.clone();
        let wanted = cluster.state();
        let node = cluster.node();
        for (&id, shard) in &wanted.shards {
            let is_here = self.open.contains_key(&id) || self.opening.contains(&id);
            if shard.replicas.contains(&node) && !is_here {
                self.open(id, &wanted, myself);
            }
        }
        self.discard_surplus().await;
    }

    async fn discard_surplus(&mut self) {
        let wanted = self.arguments.cluster.state();
        let surplus: Vec<ShardId> =
            self.open.keys().filter(|id| !self.is_wanted(**id, &wanted)).copied().collect();
        for id in surplus {
            self.discard(id).await;
        }
    }

    /// A replica goes when its collection is gone, or when the shard's group has let it go: a
    /// replica set that no longer names this node is first carried out by the shard's leader.
    fn is_wanted(&self, id: ShardId, wanted: &ClusterState) -> bool {
        let node = self.arguments.cluster.node();
        let Some(shard) = wanted.shards.get(&id) else { return false };
        if shard.replicas.contains(&node) {
            return true;
        }
        let status = self.arguments.cluster.local_shard(id).map(|local| local.group.status());
        status.is_some_and(|status| status.voters.contains(&node) || status.learners.contains(&node))
    }

    fn open(&mut self, id: ShardId, wanted: &Arc<ClusterState>, myself: &ActorRef<ShardsMessage>) {
        let Some(shard) = wanted.shards.get(&id) else { return };
        let Some(collection) = wanted.collections.get(&shard.collection) else { return };
        let payload_indexes = shard.first_indexes.clone();
        let arguments = ShardArguments {
            id,
            config: CollectionConfig { payload_indexes, ..collection.config.clone() },
            gate: self.gate.clone(),
            dir: self.arguments.dir.join(id.to_string()),
            cluster: self.arguments.cluster.clone(),
            blobs: self.arguments.blobs.clone(),
        };
        self.opening.insert(id);
        let myself = myself.clone();
        tokio::spawn(async move {
            let opened = Actor::spawn_linked(None, Shard, arguments, myself.get_cell()).await;
            let opened = opened.map(|(actor, _)| actor).map_err(|error| error.to_string());
            let actor = opened.as_ref().ok().cloned();
            if myself.cast(ShardsMessage::Opened(id, opened)).is_err()
                && let Some(actor) = actor
            {
                // The supervisor has ended; its successor opens the replica anew.
                actor.stop(None);
            }
        });
    }

    async fn opened(
        &mut self,
        id: ShardId,
        opened: Result<ActorRef<ShardMessage>, String>,
        myself: &ActorRef<ShardsMessage>,
    ) {
        self.opening.remove(&id);
        // An actor that has ended in the meantime was not known when that was told.
        let opened = opened.and_then(|actor| match actor.get_status() {
            status @ (ActorStatus::Stopping | ActorStatus::Stopped) => {
                Err(format!("its actor is {status:?} already"))
            }
            _ => Ok(actor),
        });
        match opened {
            Ok(actor) => {
                self.failures.remove(&id);
                self.open.insert(id, actor);
                // It may have become surplus while it was opened.
                self.discard_surplus().await;
            }
            Err(reason) => {
                tracing::error!(shard = id.0, reason, "a replica could not be opened; will try again");
                self.close(id).await;
                self.retry_later(id, myself);
            }
        }
    }

    async fn close(&self, id: ShardId) {
        self.arguments.cluster.drop_local(id);
        self.arguments.cluster.groups().close(id.into()).await;
    }

    fn retry_later(&mut self, id: ShardId, myself: &ActorRef<ShardsMessage>) {
        let failures = self.failures.entry(id).or_default();
        *failures += 1;
        let pause = REOPEN_PAUSE.0.saturating_mul(1 << (*failures).min(10)).min(REOPEN_PAUSE.1);
        myself.send_after(pause, || ShardsMessage::Reconcile);
    }

    /// Closes a replica for good: its log, its directory and its blobs go.
    async fn discard(&mut self, id: ShardId) {
        if let Some(actor) = self.open.remove(&id) {
            drop(actor.stop_and_wait(Some("discarded".into()), None).await);
        }
        let cluster = &self.arguments.cluster;
        cluster.drop_local(id);
        let dropped = async {
            cluster.groups().close(id.into()).await;
            let dir = self.arguments.dir.join(id.to_string());
            if dir.exists() {
                // Renamed before the log is forgotten, so that a crash half-way leaves nothing
                // that looks whole.
                let doomed = self.arguments.dir.join(format!("{id}.discarded"));
                std::fs::rename(&dir, &doomed)?;
                shoal_engine::files::sync_dir(&self.arguments.dir)?;
                std::fs::remove_dir_all(&doomed)?;
            }
            cluster.groups().remove(id.into()).await?;
            self.arguments.blobs.drop_shard(id)
        };
        match dropped.await {
            Ok(()) => tracing::info!(shard = id.0, "a replica was discarded"),
            Err(error) => tracing::warn!(shard = id.0, %error, "a discarded replica left files behind"),
        }
    }
}
