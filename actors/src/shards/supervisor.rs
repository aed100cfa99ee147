//! Opens and closes replicas as the cluster's state says.

use std::collections::{BTreeMap, BTreeSet};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, Instant};

use ractor::{Actor, ActorProcessingErr, ActorRef, ActorStatus, SupervisionEvent};
use ractor_cluster::RactorMessage;
use shoal_proto::{CollectionConfig, NodeId, ShardId};
use shoal_raft::cluster::ClusterState;

use super::actor::{Gates, Shard, ShardArguments, ShardMessage};
use crate::blobs::BlobStore;
use crate::cluster::{Cluster, LocalShard};

/// The pause before a failed replica is opened again; it doubles up to the second value.
const REOPEN_PAUSE: (Duration, Duration) = (Duration::from_millis(500), Duration::from_secs(30));

/// How often it is looked for replicas that should be here and are not, or the other way round.
const RECONCILE_EVERY: Duration = Duration::from_secs(5);
/// The ending of a replica's directory that is being deleted.
const DOOMED: &str = "discarded";
/// How often it is looked whether a closed replica is still used.
const UNUSED_TICK: Duration = Duration::from_millis(50);

pub(crate) struct Shards;

#[derive(Clone)]
pub(crate) struct ShardsArguments {
    pub(crate) cluster: Cluster,
    pub(crate) blobs: BlobStore,
    pub(crate) dir: PathBuf,
}

#[derive(RactorMessage)]
pub(crate) enum ShardsMessage {
    /// The cluster's state has changed, a failed replica is due again, or some time has passed.
    Reconcile,
    /// Whether a replica's group has let this node go.
    Asked(ShardId, bool),
    /// A replica is closed and gone or, after all, needed.
    Left,
    /// A replica is open, or why not.
    Opened(ShardId, Result<ActorRef<ShardMessage>, String>),
}

pub(crate) struct ShardsState {
    arguments: ShardsArguments,
    open: BTreeMap<ShardId, ActorRef<ShardMessage>>,
    gates: Arc<Gates>,
    /// Replicas that are being opened, each by a task of its own: one that must first be made anew
    /// from another node takes minutes.
    opening: BTreeSet<ShardId>,
    failures: BTreeMap<ShardId, Failed>,
    /// Replicas that are to go, while their groups are asked.
    asking: BTreeSet<ShardId>,
}

/// A replica that could not be opened.
struct Failed {
    /// So many times in a row.
    count: u32,
    /// Not to be tried before.
    due: Instant,
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
        drop(myself.send_interval(RECONCILE_EVERY, || ShardsMessage::Reconcile));
        Ok(ShardsState {
            arguments,
            gates: Arc::default(),
            open: BTreeMap::new(),
            opening: BTreeSet::new(),
            failures: BTreeMap::new(),
            asking: BTreeSet::new(),
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
            ShardsMessage::Asked(id, may_go) => state.asked(id, may_go, &myself),
            ShardsMessage::Left => state.reconcile(&myself).await,
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

/// What is to become of a replica that is here, by the cluster's state.
enum Fate {
    Stays,
    /// Another node is to have it instead. It goes once the group, whose leader is one of these,
    /// has let this node go; until then it may have to vote.
    GoesWhenLetGo(BTreeSet<NodeId>),
    /// Its collection was deleted.
    Goes,
}

impl ShardsState {
    fn fate(&self, id: ShardId, wanted: &ClusterState) -> Fate {
        match wanted.shards.get(&id) {
            Some(shard) if !shard.replicas.contains(&self.arguments.cluster.node()) => {
                Fate::GoesWhenLetGo(shard.replicas.clone())
            }
            None if wanted.was_deleted(id) => Fate::Goes,
            _ => Fate::Stays,
        }
    }

    /// The shards of which there is anything here: an open replica, a log or a directory.
    async fn here(&self) -> std::io::Result<BTreeSet<ShardId>> {
        let mut here: BTreeSet<ShardId> = self.open.keys().copied().collect();
        here.extend(self.arguments.cluster.groups().held().await?.into_iter().map(|group| ShardId(group.0)));
        for entry in std::fs::read_dir(&self.arguments.dir)? {
            let path = entry?.path();
            // What was set aside of it has the same name with another ending.
            here.extend(path.file_stem().and_then(|name| name.to_str()?.parse().ok()).map(ShardId));
        }
        Ok(here)
    }

    async fn reconcile(&mut self, myself: &ActorRef<ShardsMessage>) {
        let wanted = self.arguments.cluster.state();
        let node = self.arguments.cluster.node();
        for (&id, shard) in &wanted.shards {
            if shard.replicas.contains(&node) {
                self.open(id, &wanted, myself);
            }
        }
        let here = match self.here().await {
            Ok(here) => here,
            Err(error) => return tracing::warn!(%error, "the replicas on this disk could not be listed"),
        };
        for id in here {
            match self.fate(id, &wanted) {
                Fate::Stays => {}
                Fate::GoesWhenLetGo(others) => self.ask_to_go(id, others, myself),
                Fate::Goes => self.discard(id, None, myself),
            }
        }
    }

    /// Asks whether the group of a replica has let this node go, before it is perhaps opened.
    fn ask_to_go(&mut self, id: ShardId, others: BTreeSet<NodeId>, myself: &ActorRef<ShardsMessage>) {
        let is_on_its_way = self.opening.contains(&id) || self.is_leaving(id);
        if is_on_its_way || !self.asking.insert(id) {
            return;
        }
        let (groups, myself) = (self.arguments.cluster.groups().clone(), myself.clone());
        tokio::spawn(async move {
            let may_go = groups.was_let_go(id.into(), &others).await;
            // A supervisor that has ended needs no answer.
            drop(myself.cast(ShardsMessage::Asked(id, may_go)));
        });
    }

    fn asked(&mut self, id: ShardId, may_go: bool, myself: &ActorRef<ShardsMessage>) {
        self.asking.remove(&id);
        let wanted = self.arguments.cluster.state();
        match self.fate(id, &wanted) {
            Fate::GoesWhenLetGo(others) if may_go => self.discard(id, Some(others), myself),
            // It may have to vote.
            Fate::GoesWhenLetGo(_) => self.open(id, &wanted, myself),
            Fate::Stays | Fate::Goes => {}
        }
    }

    /// Opens a replica, unless it is open, on its way in or out, or failed a moment ago.
    fn open(&mut self, id: ShardId, wanted: &Arc<ClusterState>, myself: &ActorRef<ShardsMessage>) {
        let is_busy = self.open.contains_key(&id) || self.opening.contains(&id) || self.is_leaving(id);
        if is_busy || self.failures.get(&id).is_some_and(|failed| Instant::now() < failed.due) {
            return;
        }
        let Some(shard) = wanted.shards.get(&id) else { return };
        let Some(collection) = wanted.collections.get(&shard.collection) else { return };
        let payload_indexes = shard.first_indexes.clone();
        let arguments = ShardArguments {
            id,
            config: CollectionConfig { payload_indexes, ..collection.config.clone() },
            gates: self.gates.clone(),
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
                // Its collection may have been deleted while it was opened.
                if matches!(self.fate(id, &self.arguments.cluster.state()), Fate::Goes) {
                    self.discard(id, None, myself);
                }
            }
            Err(reason) => {
                tracing::error!(shard = id.0, reason, "a replica could not be opened; will try again");
                self.close(id).await;
                self.retry_later(id, myself);
            }
        }
    }

    fn is_leaving(&self, id: ShardId) -> bool {
        self.arguments.blobs.leaving().lock().contains(&id)
    }

    async fn close(&self, id: ShardId) {
        self.arguments.cluster.drop_local(id);
        self.arguments.cluster.groups().close(id.into()).await;
    }

    fn retry_later(&mut self, id: ShardId, myself: &ActorRef<ShardsMessage>) {
        let count = self.failures.get(&id).map_or(1, |failed| failed.count.saturating_add(1));
        let pause = REOPEN_PAUSE.0.saturating_mul(1 << count.min(10)).min(REOPEN_PAUSE.1);
        self.failures.insert(id, Failed { count, due: Instant::now() + pause });
        myself.send_after(pause, || ShardsMessage::Reconcile);
    }

    /// Closes a replica for good: its log, its directories and its blobs go. Where its group lives on
    /// among others, these are asked once more.
    fn discard(&mut self, id: ShardId, others: Option<BTreeSet<NodeId>>, myself: &ActorRef<ShardsMessage>) {
        // What is being opened is discarded once it is open.
        if self.opening.contains(&id) || !self.arguments.blobs.leaving().lock().insert(id) {
            return;
        }
        let actor = self.open.remove(&id);
        let cluster = self.arguments.cluster.clone();
        let ShardsArguments { dir, blobs, .. } = self.arguments.clone();
        let myself = myself.clone();
        tokio::spawn(async move {
            if let Some(actor) = actor {
                // An actor that has ended by itself is what is wanted.
                drop(actor.stop_and_wait(Some("discarded".into()), None).await);
            }
            close_and_wait(&cluster, id).await;
            let dropped = drop_replica(&cluster, id, others, &dir, &blobs).await;
            match &dropped {
                Ok(true) => tracing::info!(shard = id.0, "a replica was discarded"),
                Ok(false) => tracing::info!(shard = id.0, "a replica is needed after all"),
                Err(error) => tracing::warn!(shard = id.0, %error, "a discarded replica left files behind"),
            }
            blobs.leaving().lock().remove(&id);
            if dropped.is_ok() {
                // A supervisor that has ended needs no answer.
                drop(myself.cast(ShardsMessage::Left));
            }
        });
    }
}

/// Closes a replica and waits until nobody uses it: openraft may still apply or make a checkpoint
/// when it says that a group has stopped, and searches go on.
async fn close_and_wait(cluster: &Cluster, id: ShardId) {
    let local = cluster.drop_local(id);
    cluster.groups().close(id.into()).await;
    if let Some(LocalShard { shard, group, .. }) = local {
        drop(group);
        while Arc::strong_count(&shard) > 1 {
            tokio::time::sleep(UNUSED_TICK).await;
        }
    }
}

/// Deletes all that is here of a closed replica. Returns whether it could go.
///
/// The state is set aside first, then the log goes: a crash leaves nothing that looks whole.
async fn drop_replica(
    cluster: &Cluster,
    id: ShardId,
    others: Option<BTreeSet<NodeId>>,
    dir: &Path,
    blobs: &BlobStore,
) -> std::io::Result<bool> {
    let path = dir.join(id.to_string());
    let set_aside = {
        let (path, dir) = (path.clone(), dir.to_owned());
        move || {
            if path.exists() {
                let doomed = path.with_extension(DOOMED);
                remove(&doomed)?;
                std::fs::rename(&path, doomed)?;
                shoal_engine::files::sync_dir(&dir)?;
            }
            Ok(())
        }
    };
    let may_go = match others {
        Some(others) => cluster.groups().leave_if_let_go(id.into(), &others, set_aside).await?,
        None => {
            tokio::task::spawn_blocking(set_aside).await.map_err(std::io::Error::other)??;
            cluster.groups().forget(id.into()).await?;
            true
        }
    };
    if !may_go {
        return Ok(false);
    }
    let blobs = blobs.clone();
    let removed = tokio::task::spawn_blocking(move || {
        [DOOMED, "damaged", "fresh"].iter().try_for_each(|ending| remove(&path.with_extension(ending)))?;
        blobs.drop_shard(id)
    });
    removed.await.map_err(std::io::Error::other)??;
    Ok(true)
}

fn remove(dir: &Path) -> std::io::Result<()> {
    match std::fs::remove_dir_all(dir) {
        Err(error) if error.kind() != std::io::ErrorKind::NotFound => Err(error),
        _ => Ok(()),
    }
}
