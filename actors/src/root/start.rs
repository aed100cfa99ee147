//! Start and stop of a node's working parts.

use std::collections::{BTreeMap, BTreeSet};
use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, Instant};

use ractor::{Actor, ActorRef};
use shoal_proto::{Error, ErrorCode, GroupId, Level, NodeId};
use shoal_raft::cluster::{Addresses, Command, Drain, Node, Response, too_old};
use shoal_raft::{GroupStatus, Groups, LogConfig, LogStore, Peers, RaftConfig};

use super::actor::{Root, RootArguments, RootMessage};
use crate::backup::{BackupConfig, Backups};
use crate::blobs::BlobStore;
use crate::bootstrap::{self, Discovery, Found, NodeFile, Unwelcome};
use crate::cluster::Cluster;
use crate::control::Control;
use crate::levels::{self, Promise};
use crate::mesh::MeshArguments;
use crate::placement::PlacementLimits;
use crate::reshard::ReshardsArguments;
use crate::service::{Identity, PeerService};
use crate::shards::ShardsArguments;
use crate::sweep;
use crate::tls::PeerTls;
use crate::work::{Work, WorkConfig};

/// How often addresses are learned while nobody leads the control group.
const LEARN_TICK: Duration = Duration::from_millis(500);
/// So many times that, others are greeted although somebody leads.
const GREET_EVERY: u32 = 20;
/// How often free disk space is looked at.
const DISK_TICK: Duration = Duration::from_secs(1);
/// How long a stop may take to hand leadership over.
const HANDOVER_TIMEOUT: Duration = Duration::from_secs(3);
/// How often a node that waits for the cluster says so.
const STILL_WAITING_EVERY: Duration = Duration::from_secs(10);

/// Everything that a node's working parts need to know.
#[derive(Clone)]
pub struct NodeConfig {
    /// The data directory.
    pub data: PathBuf,
    /// Name, addresses, and how to find the others.
    pub discovery: Discovery,
    /// Timers and limits of Raft.
    pub raft: RaftConfig,
    /// Sizes of the log.
    pub log: LogConfig,
    /// What peers prove to each other.
    pub secret: String,
    /// Encryption between nodes, made from the secret.
    pub tls: PeerTls,
    /// Where the actor mesh listens.
    pub mesh: SocketAddr,
    /// Free bytes on the data directory's file system below which writes are refused.
    pub disk_reserve_bytes: u64,
    /// How long a blob that no file names is kept.
    pub blob_grace: Duration,
    /// Parsers and embedders.
    pub work: WorkConfig,
    /// When what is moved.
    pub placement: PlacementLimits,
    /// Where backups go.
    pub backup: BackupConfig,
}

/// A running node.
pub struct Running {
    /// The handle that the edges use.
    pub cluster: Cluster,
    /// The blobs on this node.
    pub blobs: BlobStore,
    /// Parsers and embedders, here and on other nodes.
    pub work: Work,
    /// Makes backups and puts them back.
    pub backups: Backups,
    root: ActorRef<RootMessage>,
}

/// What a node has on its disk besides its shards. Any of it being damaged means that the node
/// cannot know what it has promised.
struct Disk {
    file: NodeFile,
    log: LogStore,
    control: Control,
}

impl Disk {
    /// Opens what is there. A member that has lost its log must not go on without it, unless it
    /// has just become one.
    fn open(config: &NodeConfig, must_have_log: bool) -> std::io::Result<Disk> {
        let file = NodeFile::open(&config.data)?;
        if must_have_log && file.is_member() && !config.data.join("log").join("synced").exists() {
            let reason = "the Raft log of this node is missing";
            return Err(std::io::Error::new(std::io::ErrorKind::InvalidData, reason));
        }
        let log = LogStore::open(&config.data.join("log"), &config.log)?;
        let control = Control::open(&config.data.join("control"))?;
        Ok(Disk { file, log, control })
    }
}

/// Brings a node up. `service` is being served already, so that other nodes can greet this one
/// while it looks for its cluster. Returns when the node belongs to a cluster and its parts run.
///
/// # Errors
/// When something on this node's disk or in its configuration is wrong, or its build does not know the
/// level of the cluster.
pub async fn start(config: NodeConfig, peers: Peers, service: PeerService) -> Result<Running, Error> {
    // Others may ask at any time whether this is still the node that they know.
    if let Ok(file) = NodeFile::open(&config.data) {
        service.identity.write().incarnation = file.incarnation;
    }
    let disk = match Disk::open(&config, true) {
        Err(error)
            if error.kind() == std::io::ErrorKind::InvalidData && !config.discovery.join.is_empty() =>
        {
            let fresh = NodeFile::fresh();
            service.identity.write().incarnation.clone_from(&fresh.incarnation);
            bootstrap::rejoin(&peers, &config.discovery, &config.data, fresh, &error).await?;
            Disk::open(&config, false)
        }
        opened => opened,
    };
    let Disk { mut file, log, control } = disk.map_err(|error| on_disk(&config.data, &error))?;
    if !file.is_member() {
        let found = bootstrap::find_cluster(&peers, &config.discovery, &file).await?;
        let (node, cluster_id, level) = match found {
            Found::Create => (NodeId(1), uuid::Uuid::new_v4().to_string(), Level::LATEST),
            Found::Joined { node, cluster_id, level } => (node, cluster_id, level),
        };
        (file.node, file.cluster_id) = (node, cluster_id);
        file.promise(level);
        // Durable before it is used: an id that was given out is never asked for again.
        file.save(&config.data).map_err(|error| on_disk(&config.data, &error))?;
    }
    let node = file.node;
    tracing::info!(node = node.0, cluster = file.cluster_id, "this node belongs to a cluster");

    let groups = Groups::new(node, log, peers.clone(), &config.raft, &config.data, config.disk_reserve_bytes)
        .map_err(|error| on_disk(&config.data, &error))?;
    let control = Arc::new(control);
    let watch = control.watch();
    let mut noted = BTreeMap::new();
    note_addresses(&peers, &watch.borrow(), node, &mut noted);
    match bootstrap::learn_addresses(&peers, &config.discovery, &file).await {
        Ok(()) => {}
        Err(Unwelcome::Removed) => exit_removed(node),
        Err(Unwelcome::TooOld(in_force)) => return Err(too_old(Level::LATEST, in_force)),
    }

    let cluster = Cluster::new(groups.clone(), watch);
    cluster.set_promise(Arc::new(Promise::new(&config.data, file.clone())));
    let blobs = BlobStore::open(&config.data.join("blobs")).map_err(|error| on_disk(&config.data, &error))?;
    *service.identity.write() = Identity {
        name: config.discovery.name.clone(),
        node,
        cluster_id: file.cluster_id.clone(),
        incarnation: file.incarnation.clone(),
    };
    // Peers are served before the control group opens: it may need them to get anywhere.
    let served = service.node.set((cluster.clone(), blobs.clone()));
    if served.is_err() {
        return Err(Error::internal("a node was started twice on one peer service"));
    }
    keep_learning(&cluster, &peers, &config, &file);
    open_control(&cluster, control, &config, &file).await?;
    follow_state(&cluster, &peers, &config, noted);
    levels::keep_promising(cluster.clone());
    levels::keep_raising(cluster.clone());
    let watched = cluster.groups().clone();
    tokio::spawn(async move {
        loop {
            let groups = watched.clone();
            let ended = tokio::spawn(async move { groups.keep_watch().await }).await;
            tracing::error!(?ended, "the watch over the other nodes has ended and is started again");
        }
    });
    watch_disk(cluster.clone(), config.data.clone(), config.disk_reserve_bytes);

    sweep::keep_sweeping(cluster.clone(), blobs.clone(), config.blob_grace);
    let backups = Backups::open(config.backup.clone(), cluster.clone(), blobs.clone(), &config.data)
        .map_err(|error| on_disk(&config.data, &error))?;
    cluster.set_backups(backups.clone());
    let work = Work::new(config.work.clone(), cluster.clone(), blobs.clone());
    let arguments = RootArguments {
        cluster: cluster.clone(),
        shards: ShardsArguments {
            cluster: cluster.clone(),
            blobs: blobs.clone(),
            dir: config.data.join("shards"),
        },
        mesh: MeshArguments {
            cluster: cluster.clone(),
            listen: config.mesh,
            secret: config.secret.clone(),
            tls: config.tls.clone(),
        },
        work: work.clone(),
        placement: config.placement,
        reshards: ReshardsArguments {
            cluster: cluster.clone(),
            limits: config.placement,
            scratch: config.data.join("reshard"),
        },
    };
    let (root, _) = Actor::spawn(None, Root, arguments)
        .await
        .map_err(|error| Error::internal(format!("the supervision tree does not start: {error}")))?;
    // Before it has heard of itself a node has heard of nothing that it would be asked for.
    let mut state = cluster.watch();
    loop {
        let heard = state.wait_for(|state| state.nodes.contains_key(&node) || state.removed.contains(&node));
        match tokio::time::timeout(STILL_WAITING_EVERY, heard).await {
            Ok(heard) => break drop(heard.map_err(Error::internal)?),
            Err(_) => tracing::warn!(
                "this node waits until it hears of the cluster's state: a majority of the control group must run"
            ),
        }
    }
    end_own_drain(&cluster);
    backups.end_leftovers();
    backups.keep_telling_age();
    Ok(Running { cluster, blobs, work, backups, root })
}

/// A node that was drained because it stopped takes things again now that it is back.
fn end_own_drain(cluster: &Cluster) {
    let (cluster, node) = (cluster.clone(), cluster.node());
    let is_drained = move |cluster: &Cluster| {
        cluster.state().nodes.get(&node).is_some_and(|known| known.drain == Drain::UntilRestart)
    };
    if !is_drained(&cluster) {
        return;
    }
    tokio::spawn(async move {
        while is_drained(&cluster) {
            let command = Command::SetDrain { node, drain: Drain::No };
            if let Err(error) = cluster.control(command, Instant::now() + Duration::from_secs(10)).await {
                tracing::warn!(%error, "this node is still drained; will try again");
                tokio::time::sleep(Duration::from_secs(1)).await;
            }
        }
    });
}

async fn open_control(
    cluster: &Cluster,
    control: Arc<Control>,
    config: &NodeConfig,
    file: &NodeFile,
) -> Result<(), Error> {
    let group = cluster.groups().open(GroupId::CONTROL, control).await?;
    let is_first = file.node == NodeId(1);
    if is_first && !group.is_initialized().await? {
        group.initialize(&BTreeSet::from([file.node])).await?;
    } else if group.status().voters == BTreeSet::from([file.node]) {
        group.elect().await?;
    }
    if is_first && !cluster.state().nodes.contains_key(&file.node) {
        // The first node, perhaps after a crash in the middle of this: both are idempotent.
        let deadline = Instant::now() + Duration::from_secs(30);
        cluster.control(Command::CreateCluster { cluster_id: file.cluster_id.clone() }, deadline).await?;
        let add = Command::AddNode {
            name: config.discovery.name.clone(),
            incarnation: file.incarnation.clone(),
            addresses: config.discovery.addresses.clone(),
            zone: config.discovery.zone.clone(),
        };
        match cluster.control(add, deadline).await? {
            Response::NodeAdded(node) if node == file.node => {}
            other => {
                return Err(Error::internal(format!("the first node was not added as node 1: {other:?}")));
            }
        }
        // It has promised that when it stored its identity. Nodes of earlier builds join no new cluster, unless they
        // have just done so.
        let raise = Command::RaiseLevel { level: file.promised(), nodes: BTreeSet::from([file.node]) };
        if let Err(error) = cluster.control(raise, deadline).await {
            tracing::debug!(%error, "the level of the new cluster will be raised later");
        }
    }
    Ok(())
}

/// Ends a process whose node belongs to the cluster no longer: nothing on its disk counts any more.
fn exit_removed(node: NodeId) -> ! {
    tracing::error!(
        node = node.0,
        "this node was removed from its cluster and stops; with an empty data directory it joins as a new node"
    );
    std::process::exit(crate::EXIT_REMOVED);
}

/// Follows the cluster's state for as long as the node runs: addresses of peers, this node's
/// own address and zone after a restart, and word that this node was removed.
fn follow_state(cluster: &Cluster, peers: &Peers, config: &NodeConfig, mut noted: BTreeMap<NodeId, String>) {
    let node = cluster.node();
    let mut watch = cluster.watch();
    let (cluster, peers) = (cluster.clone(), peers.clone());
    let (own, zone) = (config.discovery.addresses.clone(), config.discovery.zone.clone());
    tokio::spawn(async move {
        loop {
            let state = watch.borrow_and_update().clone();
            note_addresses(&peers, &state, node, &mut noted);
            if state.removed.contains(&node) {
                exit_removed(node);
            }
            let news =
                state.nodes.get(&node).and_then(|known| news_of(node, known, &own, &zone, state.level));
            if let Some(command) = news {
                match cluster.control(command, Instant::now() + Duration::from_secs(10)).await {
                    Ok(_) => tracing::info!(zone, "this node has told the others where it is now"),
                    Err(error) => {
                        tracing::warn!(%error, "the others could not be told yet where this node is now");
                        tokio::time::sleep(Duration::from_secs(1)).await;
                        continue;
                    }
                }
            }
            if watch.changed().await.is_err() {
                return;
            }
        }
    });
}

/// What the others do not know yet of where a node is; of its zone nothing before all of them would
/// understand it.
fn news_of(node: NodeId, known: &Node, own: &Addresses, zone: &str, level: Level) -> Option<Command> {
    if known.addresses != *own {
        return Some(Command::UpdateNode { node, addresses: own.clone() });
    }
    let is_elsewhere = level >= Level::ZONES_CHANGE && known.zone != zone;
    is_elsewhere.then(|| Command::SetZone { node, zone: zone.to_owned() })
}

/// Takes over addresses that have changed in the state. What was learned from greetings stays
/// otherwise: after a restart of everything, the state's addresses may all be out of date.
fn note_addresses(
    peers: &Peers,
    state: &shoal_raft::cluster::ClusterState,
    own: NodeId,
    noted: &mut BTreeMap<NodeId, String>,
) {
    for (id, node) in state.nodes.iter().filter(|(id, _)| **id != own) {
        let address = &node.addresses.grpc;
        if noted.get(id) != Some(address) {
            peers.set_address(*id, address);
            noted.insert(*id, address.clone());
        }
    }
}

/// Greets the known addresses: often while the control group has no leader, because when all nodes
/// have come back under new addresses, greetings are the only way to find each other; and now and then
/// otherwise.
fn keep_learning(cluster: &Cluster, peers: &Peers, config: &NodeConfig, file: &NodeFile) {
    let (cluster, peers) = (cluster.clone(), peers.clone());
    let (discovery, file) = (config.discovery.clone(), file.clone());
    tokio::spawn(async move {
        let mut turn = 0;
        loop {
            tokio::time::sleep(LEARN_TICK).await;
            let has_leader =
                cluster.groups().get(GroupId::CONTROL).is_ok_and(|control| control.leader().is_some());
            turn = (turn + 1) % GREET_EVERY;
            // A node that was removed while nobody could tell it may believe in a leader for ever.
            if has_leader && turn != 0 {
                continue;
            }
            match bootstrap::learn_addresses(&peers, &discovery, &file).await {
                Ok(()) => {}
                Err(Unwelcome::Removed) => exit_removed(file.node),
                Err(Unwelcome::TooOld(in_force)) => levels::exit_too_old(in_force),
            }
        }
    });
}

/// Below the reserve nothing new is written; by itself again once there is room.
fn watch_disk(cluster: Cluster, dir: PathBuf, reserve: u64) {
    tokio::spawn(async move {
        loop {
            match free_bytes(&dir) {
                Ok(free) => {
                    metrics::gauge!("shoal_disk_free_bytes").set(free as f64);
                    cluster.note_disk(free);
                    let writable = free >= reserve;
                    if writable != cluster.is_writable() {
                        tracing::warn!(free, reserve, writable, "the disk's reserve was crossed");
                        cluster.set_writable(writable);
                        cluster.groups().set_room(writable);
                    }
                }
                Err(error) => tracing::warn!(%error, "free disk space cannot be read"),
            }
            tokio::time::sleep(DISK_TICK).await;
        }
    });
}

fn free_bytes(dir: &Path) -> std::io::Result<u64> {
    let stat = nix::sys::statvfs::statvfs(dir)?;
    Ok(stat.blocks_available() * stat.fragment_size())
}

fn on_disk(dir: &Path, error: &std::io::Error) -> Error {
    Error::new(ErrorCode::Internal, format!("data directory {}: {error}", dir.display()))
}

impl Running {
    /// Takes everything off this node before it stops, for as long as it takes until `deadline`.
    ///
    /// # Errors
    /// What is left to be done, or speaks against it: then other nodes have what this one holds only in
    /// part.
    pub async fn drain(&self, deadline: Instant) -> Result<(), Error> {
        let node = self.cluster.node();
        self.cluster.set_drain(node, Drain::UntilRestart, deadline).await?;
        self.cluster.wait_drained(node, deadline).await
    }

    /// Stops the node: hands leadership over, stops the actors, saves what is derived. Nothing
    /// that was acknowledged depends on this; it only makes the gap and the next start short.
    pub async fn stop(&self) {
        hand_over(&self.cluster).await;
        drop(self.root.stop_and_wait(Some("the node stops".into()), Some(Duration::from_secs(10))).await);
        for group in self.cluster.groups().all() {
            self.cluster.groups().close(group.id()).await;
        }
        for (id, local) in self.cluster.local_shards() {
            let saved = tokio::task::spawn_blocking(move || {
                local.shard.save_derived(true).and_then(|()| local.shard.checkpoint())
            })
            .await;
            if let Ok(Err(error)) = saved {
                tracing::warn!(shard = id.0, %error, "derived files were not saved; the next start rebuilds them");
            }
        }
    }
}

/// The voter that has most of a group, besides this node, which leads it.
pub(super) fn heir_of(status: &GroupStatus, node: NodeId) -> Option<NodeId> {
    let others = status.matched.iter().filter(|(id, _)| **id != node && status.voters.contains(*id));
    others.max_by_key(|(_, matched)| **matched).map(|(heir, _)| *heir)
}

/// Asks a member that is up to date to lead each group that this node leads.
async fn hand_over(cluster: &Cluster) {
    let node = cluster.node();
    for group in cluster.groups().all() {
        if let Some(heir) = heir_of(&group.status(), node).filter(|_| group.is_leader())
            && let Err(error) = group.transfer_leader(heir).await
        {
            tracing::warn!(group = group.id().0, %error, "leadership could not be handed over");
        }
    }
    let deadline = Instant::now() + HANDOVER_TIMEOUT;
    let leads =
        || cluster.groups().all().iter().any(|group| group.is_leader() && group.status().voters.len() > 1);
    while leads() && Instant::now() < deadline {
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn where_a_node_is_now_is_told_in_words_that_all_understand() {
        let here = Addresses { grpc: "here:6334".to_owned(), ..Addresses::default() };
        let known = Node {
            name: "a".to_owned(),
            incarnation: "inc-a".to_owned(),
            addresses: here.clone(),
            zone: "east".to_owned(),
            drain: Drain::No,
        };
        let news = |own: &Addresses, zone: &str, level: Level| news_of(NodeId(1), &known, own, zone, level);
        assert_eq!(news(&here, "east", Level::LATEST), None);
        assert_eq!(news(&here, "west", Level::FIRST), None);
        let moved = Command::SetZone { node: NodeId(1), zone: "west".to_owned() };
        assert_eq!(news(&here, "west", Level::ZONES_CHANGE), Some(moved));
        let elsewhere = Addresses { grpc: "there:6334".to_owned(), ..Addresses::default() };
        let update = Command::UpdateNode { node: NodeId(1), addresses: elsewhere.clone() };
        assert_eq!(news(&elsewhere, "west", Level::LATEST), Some(update), "first of all it must be found");
    }
}
