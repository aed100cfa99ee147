//! One replica: opens engine and group, then tends them on a tick.

use std::collections::BTreeSet;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, Instant};

use futures::future::join_all;
use ractor::{Actor, ActorProcessingErr, ActorRef};
use ractor_cluster::RactorMessage;
use shoal_proto::{BlobHash, CollectionConfig, NodeId, ShardId};
use tokio::sync::Semaphore;

use super::rebuild;
use crate::blobs::{self, BlobStore};
use crate::call::{Call, Reply};
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
/// How often the membership is led on while it is not as it should be.
const STEER_EVERY: Duration = Duration::from_millis(200);
/// How long a replica may take to name the blobs that it lacks.
const BLOBS_TIMEOUT: Duration = Duration::from_secs(2);
/// The most blobs fetched in one go.
const BLOBS_AT_ONCE: usize = 16;
/// How often everything that is stored is read again. The first time is right after the start.
const SCRUB_EVERY: Duration = Duration::from_secs(24 * 3600);
/// Pieces of about a MiB that are read in one tick.
const SCRUB_PIECES: usize = 8;
/// How a panic of the store is told.
const PANICKED: &str = "the store panicked";
/// How many replicas are read from the disk at the same time.
const OPENED_AT_ONCE: usize = 2;
/// How many replicas are made anew at the same time. Each takes as much disk as it has.
const REBUILT_AT_ONCE: usize = 1;
/// How often the state is compared with the other replicas', when it has changed.
const COMPARE_EVERY: Duration = Duration::from_secs(10);

pub(super) struct Shard;

pub(super) struct ShardArguments {
    pub(super) id: ShardId,
    pub(super) config: CollectionConfig,
    pub(super) dir: PathBuf,
    pub(super) cluster: Cluster,
    pub(super) blobs: BlobStore,
    pub(super) gates: Arc<Gates>,
}

/// How much is done at the same time for the replicas of a node.
pub(super) struct Gates {
    /// Passed by whoever reads a replica from the disk.
    opens: Semaphore,
    /// Passed by whoever makes one anew from another node.
    rebuilds: Semaphore,
}

impl Default for Gates {
    fn default() -> Self {
        Gates { opens: Semaphore::new(OPENED_AT_ONCE), rebuilds: Semaphore::new(REBUILT_AT_ONCE) }
    }
}

#[derive(RactorMessage)]
pub(crate) enum ShardMessage {
    /// Look after the replica.
    Tick,
}

pub(super) struct ShardState {
    id: ShardId,
    cluster: Cluster,
    local: LocalShard,
    /// The last index that was applied when the replica was tended last.
    seen: u64,
    /// When it is looked for missing blobs again.
    blobs_at: Instant,
    blobs_tried: usize,
    /// Who is to hold the shard, and the last index when that was first seen here.
    wish: (BTreeSet<NodeId>, u64),
    steered_at: Instant,
    /// When everything that is stored is to be read again.
    scrub_at: Instant,
    scrubbed_at: Instant,
    compared_at: Instant,
    /// The last index at which the state was compared with other replicas.
    compared: u64,
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
        let ShardArguments { id, config, dir, cluster, blobs, gates } = arguments;
        let shard = Arc::new(open(&cluster, id, &dir, &config, &gates).await?);
        let group = cluster.groups().open(id.into(), Arc::new(Replica(shard.clone()))).await?;
        let founders =
            cluster.state().shards.get(&id).map(|shard| shard.founders.clone()).unwrap_or_default();
        if founders.contains(&cluster.node()) && !group.is_initialized().await? {
            group.initialize(&founders).await?;
        } else if group.status().voters.len() == 1 {
            // Nobody else could lead: waiting for a time-out would only delay the start.
            group.elect().await?;
        }
        let local = LocalShard { shard, group, blobs };
        cluster.add_local(id, local.clone());
        myself.cast(ShardMessage::Tick)?;
        let now = Instant::now();
        Ok(ShardState {
            id,
            cluster,
            local,
            seen: 0,
            blobs_at: now,
            blobs_tried: 0,
            wish: (BTreeSet::new(), 0),
            steered_at: now,
            scrub_at: now,
            scrubbed_at: now,
            compared_at: now,
            compared: 0,
        })
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

/// Opens the engine. What is damaged is made anew from another replica first.
async fn open(
    cluster: &Cluster,
    id: ShardId,
    dir: &Path,
    config: &CollectionConfig,
    gates: &Gates,
) -> Result<shoal_engine::Shard, ActorProcessingErr> {
    let attempt = async || {
        let _permit = gates.opens.acquire().await;
        let (dir, config) = (dir.to_owned(), config.clone());
        tokio::task::spawn_blocking(move || shoal_engine::Shard::open(&dir, config)).await
    };
    let purged = cluster.groups().purged(id.into()).await?;
    let reason = match attempt().await {
        Ok(Ok(shard)) => {
            let applied = shard.applied_tag()?.map_or(Ok(0), |tag| shoal_raft::machine::index_of(&tag))?;
            if applied >= purged {
                return Ok(shard);
            }
            format!("its state ends at {applied}, and the log begins after {purged}")
        }
        Ok(Err(error)) if error.is_damage() => error.to_string(),
        Ok(Err(error)) => return Err(error.into()),
        // sled panics on some kinds of damage. So might a bug of ours, on every replica alike:
        // nothing is marked, and what is there is only replaced by what another one could open.
        Err(error) if error.is_panic() => format!("{PANICKED} when it was opened"),
        Err(error) => return Err(error.into()),
    };
    tracing::error!(shard = id.0, reason, "a replica is damaged");
    if purged == 0 {
        // Nothing was dropped from the log yet: it makes the whole state again.
        rebuild::set_aside(dir)?;
    } else {
        let _permit = gates.rebuilds.acquire().await;
        if let Err(error) = rebuild::from_another(cluster, id, dir, config, purged).await {
            // A panic may have been a bug of ours, on every replica alike: then nobody could begin.
            if reason.contains(PANICKED) {
                shoal_engine::shard::clear_damaged(dir)?;
            }
            return Err(error.into());
        }
    }
    // Whatever was wrong with the state is in its copy as well.
    cluster.groups().drop_copy(id.into()).await;
    Ok(attempt().await??)
}

impl ShardState {
    async fn tick(&mut self, myself: &ActorRef<ShardMessage>) -> Result<(), ActorProcessingErr> {
        if self.local.shard.is_damaged() {
            return Err("its state is damaged".into());
        }
        if self.local.group.is_stopped() {
            return Err("its Raft group has stopped".into());
        }
        let shard = self.local.shard.clone();
        let more = shard.has_work() && tokio::task::spawn_blocking(move || shard.work()).await??;
        if self.local.group.log_bytes() > limits::CHECKPOINT_LOG_BYTES {
            self.local.group.checkpoint().await?;
        }
        let is_steering = self.local.group.is_leader() && self.steer().await;
        if !self.local.group.is_leader() {
            // What was seen as a leader is not what the next one will see.
            self.wish = (BTreeSet::new(), 0);
        }
        if Instant::now() >= self.blobs_at {
            let has_more = !self.fetch_missing_blobs().await;
            // Somebody waits for a learner to have them all.
            let is_learner = self.local.group.status().role == "learner";
            self.blobs_at = Instant::now() + if has_more || is_learner { TICK } else { BLOBS_EVERY };
        }
        crate::reshard::thaw_if_given_up(&self.cluster, self.id, &self.local).await;
        let is_scrubbing = self.scrub().await?;
        if self.compared_at.elapsed() >= COMPARE_EVERY {
            self.compare().await;
            self.compared_at = Instant::now();
        }
        let applied = self.local.group.applied();
        let is_quiet = applied == self.seen && !is_steering && !is_scrubbing;
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

    /// Reads on in what is stored, when that is due. Returns whether there is more to read.
    async fn scrub(&mut self) -> Result<bool, ActorProcessingErr> {
        if Instant::now() < self.scrub_at {
            return Ok(false);
        }
        if self.scrubbed_at.elapsed() < TICK {
            return Ok(true);
        }
        self.scrubbed_at = Instant::now();
        let shard = self.local.shard.clone();
        let read = move || -> shoal_engine::Result<bool> {
            for _ in 0..SCRUB_PIECES {
                if shard.scrub()? {
                    return Ok(true);
                }
            }
            Ok(false)
        };
        let is_through = match tokio::task::spawn_blocking(read).await {
            Ok(read) => read?,
            Err(error) => {
                self.local.shard.mark_damaged(&format!("{PANICKED} when it was read through"));
                return Err(error.into());
            }
        };
        if is_through {
            metrics::counter!("shoal_scrubs_total").increment(1);
            self.scrub_at = Instant::now() + SCRUB_EVERY;
        }
        Ok(!is_through)
    }

    /// Asks the other replicas whether they have come to the same state.
    async fn compare(&mut self) {
        let sums = self.local.shard.state_sums();
        let Some((newest, _)) = sums.last().filter(|(newest, _)| *newest != self.compared) else { return };
        self.compared = *newest;
        if let Some(reason) = rebuild::diverged(&self.cluster, self.id, &sums).await {
            tracing::error!(shard = self.id.0, reason, "this replica has diverged and stops serving");
            self.local.shard.mark_damaged(&reason);
        }
    }

    /// A replica that was added later, or took a lost disk's place, has the records of files but
    /// not their bytes: it fetches them from the others. Returns whether there is nothing to be gained
    /// by going on at once.
    async fn fetch_missing_blobs(&mut self) -> bool {
        let Ok(mut missing) = self.cluster.missing_blobs(&self.local).await else { return true };
        let is_last = missing.len() <= BLOBS_AT_ONCE;
        let mut has_failed = false;
        // Begins elsewhere each time, so that some that nobody has do not keep the others back.
        self.blobs_tried = self.blobs_tried.wrapping_add(BLOBS_AT_ONCE);
        let start = self.blobs_tried.checked_rem(missing.len()).unwrap_or_default();
        missing.rotate_left(start);
        for file in missing.into_iter().take(BLOBS_AT_ONCE) {
            if let Err(error) = blobs::copy_here(&self.cluster, &self.local.blobs, self.id, file.blob).await {
                tracing::warn!(shard = self.id.0, %error, "a missing blob will be fetched later");
                has_failed = true;
            }
        }
        is_last || has_failed
    }

    /// Which of some nodes have all the bytes that the shard's files need, but for those that nobody has.
    async fn whole(&self, members: &BTreeSet<NodeId>, least: u64) -> BTreeSet<NodeId> {
        let asked = members.iter().map(|node| async move {
            let call = Call::MissingBlobs { group: self.id.into(), least };
            match self.cluster.call(*node, call, BLOBS_TIMEOUT).await {
                Reply::Missing(missing) => Some((*node, missing.into_iter().collect::<BTreeSet<BlobHash>>())),
                _ => None,
            }
        });
        let answers: Vec<(NodeId, BTreeSet<BlobHash>)> =
            join_all(asked).await.into_iter().flatten().collect();
        let nowhere =
            answers.iter().map(|(_, missing)| missing.clone()).reduce(|all, missing| &all & &missing);
        let nowhere = nowhere.unwrap_or_default();
        answers.into_iter().filter(|(_, missing)| missing.is_subset(&nowhere)).map(|(node, _)| node).collect()
    }

    /// Leads the group's membership one step towards what the control group wants. Returns
    /// whether there is more to do.
    async fn steer(&mut self) -> bool {
        let state = self.cluster.state();
        let Some(shard) = state.shards.get(&self.id) else { return false };
        let status = self.local.group.status();
        let members = status.members();
        if self.wish.0 != shard.replicas {
            self.wish = (shard.replicas.clone(), status.last_index);
        }
        let mut voters = shard.replicas.clone();
        let mut wanted = shard.replicas.clone();
        let mut whole = BTreeSet::new();
        if status.is_joint || members != wanted || status.voters != voters {
            if self.steered_at.elapsed() < STEER_EVERY {
                return true;
            }
            self.steered_at = Instant::now();
            // From now on a file's bytes go to the replicas that are to be; those of earlier ones must have
            // arrived at each of them before anybody who has them leaves.
            whole = self.whole(&members.union(&wanted).copied().collect(), self.wish.1).await;
            if !shard.replicas.is_subset(&whole) && !status.is_joint {
                wanted.extend(members);
                voters = status.voters;
            }
        }
        match self.local.group.steer_members(&wanted, &voters, |node| whole.contains(&node)).await {
            Ok(is_done) => !is_done,
            Err(error) => {
                tracing::debug!(shard = self.id.0, %error, "the membership will be led on later");
                true
            }
        }
    }
}
