//! The nodes, what happens to them, and the clients.

use std::collections::{BTreeMap, BTreeSet};
use std::future::Future;
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::Duration;

use bytes::Bytes;
use openraft::type_config::TypeConfigExt;
use parking_lot::Mutex;
use rand::rngs::StdRng;
use rand::{RngExt, SeedableRng};
use shoal_proto::{CollectionConfig, Distance, GroupId, NodeId, RequestId, VectorParams, codec};
use tempfile::TempDir;
use tokio::time::{Instant, sleep};

use super::disk::{self, Disk, SimulatedRecords};
use super::ledger::{Ledger, Write};
use super::net::{self, End, Life, Net, Running, Weather};
use super::truth::{Outcome, Truth};
use crate::cluster::{Addresses, ClusterState, Command, Response};
use crate::error::Error;
use crate::groups::{Group, Groups, RaftConfig};
use crate::log::LogStore;
use crate::network::Peers;
use crate::types::TypeConfig;

/// How long things go wrong.
const FAULTS: Duration = Duration::from_secs(12);
/// How long the cluster may take to be whole again after that.
const PATIENCE: Duration = Duration::from_secs(30);
/// How often a node looks after its groups.
const TICK: Duration = Duration::from_millis(100);
/// How long a node is cut off at the end, and how long it then has to do harm: some elections' time.
const ALONE: Duration = Duration::from_secs(3);
/// How long a client waits.
const DEADLINE: Duration = Duration::from_secs(2);
const CLIENTS: u64 = 6;
const KEYS: u8 = 3;
const SHARDS: u32 = 2;

/// What all the seeds together must have brought about.
pub const MUST_HAPPEN: [&str; 19] = [
    "acknowledged",
    "read",
    "refused",
    "crashes",
    "power cuts",
    "cuts",
    "storms",
    "slow disks",
    "transfers",
    "checkpoints",
    "snapshots",
    "snapshots broken",
    "snapshots resumed",
    "replacements",
    "moves",
    "discarded",
    "came back",
    "sleeps",
    "unknown",
];

/// A promise that is broken on purpose.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Lie {
    /// A sync that does nothing.
    Sync,
    /// A vote that is not kept.
    Vote,
    /// A leader reads without asking whether it still leads.
    Read,
    /// A node that was let go forgets that it was ever there.
    Leave,
    /// A node claims office without asking whether it would get it.
    Manners,
}

/// A place for a node: what outlives its process.
struct Seat {
    name: String,
    disk: Arc<Disk>,
    is_up: bool,
    /// Its disk is lost, and another node takes its place.
    is_gone: bool,
    ledgers: BTreeMap<GroupId, Arc<Ledger>>,
}

struct World {
    seed: u64,
    /// Of each shard.
    replicas: u32,
    coin: Mutex<StdRng>,
    lie: Option<Lie>,
    truth: Arc<Truth>,
    net: Arc<Net>,
    /// For snapshots on their way. Each run of a process has its own: what goes on after a restart is tested where
    /// the files are.
    dir: TempDir,
    seats: Mutex<BTreeMap<NodeId, Seat>>,
    boots: AtomicU64,
    uids: AtomicU64,
    quiet_until: Mutex<Instant>,
    is_over: AtomicBool,
}

/// Runs one cluster.
pub async fn run(seed: u64, lie: Option<Lie>) -> Outcome {
    let truth = Arc::new(Truth::new());
    let memory = Path::new("/dev/shm");
    let dir = if memory.is_dir() { tempfile::tempdir_in(memory) } else { tempfile::tempdir() };
    let mut coin = StdRng::seed_from_u64(seed);
    let world = Arc::new(World {
        seed,
        replicas: coin.random_range(1..8).clamp(1, 3),
        coin: Mutex::new(coin),
        lie,
        net: Net::new(seed ^ 1, truth.clone()),
        truth,
        dir: dir.expect("a temporary directory"),
        seats: Mutex::default(),
        boots: AtomicU64::new(0),
        uids: AtomicU64::new(0),
        quiet_until: Mutex::new(Instant::now()),
        is_over: AtomicBool::new(false),
    });
    let nodes = if world.happens(0.5) { 5 } else { 3 };
    world.clone().found(nodes).await;
    let clients: Vec<_> = (0..CLIENTS).map(|_| TypeConfig::spawn(world.clone().client())).collect();
    let observer = TypeConfig::spawn(world.clone().observe());
    world.clone().hurt().await;
    world.is_over.store(true, Ordering::Relaxed);
    for client in clients {
        _ = client.await;
    }
    world.clone().heal().await;
    world.check().await;
    observer.abort();
    for (_, running) in world.net.all_running() {
        running.life.end();
    }
    world.truth.outcome()
}

/// Some clusters checkpoint often and send snapshots, others keep everything in their logs; some send
/// slowly.
fn config(seed: u64) -> RaftConfig {
    let checkpoint_entries = if seed.is_multiple_of(4) { 5000 } else { 25 };
    let move_bytes_per_second = if seed.is_multiple_of(3) { 20_000 } else { 0 };
    RaftConfig { checkpoint_entries, keep_entries: 5, move_bytes_per_second, ..RaftConfig::default() }
}

fn control_voters(state: &ClusterState) -> BTreeSet<NodeId> {
    let count = if state.nodes.len() < 3 { 1 } else { 3 };
    state.nodes.keys().take(count).copied().collect()
}

impl World {
    fn happens(&self, probability: f64) -> bool {
        self.coin.lock().random_bool(probability)
    }

    fn pick(&self, from: u64, to: u64) -> u64 {
        self.coin.lock().random_range(from..to)
    }

    fn millis(&self, from: u64, to: u64) -> Duration {
        Duration::from_millis(self.pick(from, to))
    }

    fn one_of<T: Clone>(&self, all: &[T]) -> Option<T> {
        if all.is_empty() { None } else { Some(all[self.pick(0, all.len() as u64) as usize].clone()) }
    }

    fn sit(&self, node: NodeId, name: &str) {
        let disk = Arc::new(Disk::default());
        disk.set_pace(Duration::from_millis(2));
        let seat =
            Seat { name: name.to_owned(), disk, is_up: false, is_gone: false, ledgers: BTreeMap::new() };
        self.seats.lock().insert(node, seat);
    }

    /// Starts a node's process, if it does not run.
    async fn start(self: Arc<Self>, node: NodeId) {
        let disk = {
            let mut seats = self.seats.lock();
            let Some(seat) = seats.get_mut(&node).filter(|seat| !seat.is_up && !seat.is_gone) else { return };
            seat.is_up = true;
            seat.ledgers.clear();
            seat.disk.clone()
        };
        self.truth.tell("starts", node);
        let life = Life::new(self.pick(0, u64::MAX));
        let boot = self.boots.fetch_add(1, Ordering::Relaxed) + 1;
        let records = SimulatedRecords {
            disk: disk.clone(),
            life: life.clone(),
            sync_is_a_lie: self.lie == Some(Lie::Sync),
            votes_are_a_lie: self.lie == Some(Lie::Vote),
        };
        let log = LogStore::behind(disk::queue(records));
        let asks_first = self.lie != Some(Lie::Manners);
        let end = End { node, life: life.clone(), net: self.net.clone(), asks_first };
        let peers = Peers::over(Arc::new(end), boot);
        let dir = self.dir.path().join(boot.to_string());
        let groups = Groups::new(node, log, peers, &config(self.seed), &dir, 0).expect("a directory");
        groups.set_snapshot_offers(true);
        self.net.start(node, Running { life: life.clone(), boot, groups: groups.clone() });
        let watch = groups.clone();
        TypeConfig::spawn(life.clone().live(async move { watch.keep_watch().await }));
        let Some(control) = self.open(node, GroupId::CONTROL, &groups, &life).await else { return };
        TypeConfig::spawn(life.clone().live(self.supervise(node, groups, control, life)));
    }

    async fn open(
        self: &Arc<Self>,
        node: NodeId,
        id: GroupId,
        groups: &Groups,
        life: &Arc<Life>,
    ) -> Option<Arc<Ledger>> {
        let disk = self.seats.lock().get(&node)?.disk.clone();
        let ledger = Ledger::open(id, node, disk, life.clone(), self.truth.clone());
        let begins_after = groups.purged(id).await.ok()?;
        if ledger.last() < begins_after && !self.rebuild(&ledger, begins_after).await {
            return None;
        }
        let group = match groups.open(id, ledger.clone()).await {
            Ok(group) => group,
            Err(error) => {
                if life.is_alive() {
                    self.truth.violation(format!("node {node} cannot open group {id}: {error}"));
                }
                return None;
            }
        };
        if !life.is_alive() {
            return None;
        }
        self.seats.lock().get_mut(&node)?.ledgers.insert(id, ledger.clone());
        if group.has_come_back() {
            self.truth.tell("came back", format_args!("group {id} at node {node}"));
        }
        let work = self.clone().tend(node, group);
        TypeConfig::spawn(life.clone().live(work));
        Some(ledger)
    }

    /// Gives a replica whose state ends before its log begins the state of another one. Returns
    /// whether there was one; otherwise it is tried again later.
    async fn rebuild(&self, ledger: &Ledger, least: u64) -> bool {
        let id = ledger.group;
        for (from, _) in self.net.all_running() {
            let asked = self.ask(from, id, async |_| Ok(())).await;
            let other = self.seats.lock().get(&from).and_then(|seat| seat.ledgers.get(&id).cloned());
            if let (Some(Ok(())), Some(other)) = (asked, other)
                && other.last() >= least
                && ledger.become_like(&other).is_ok()
            {
                self.truth.tell("rebuilt", format_args!("group {id} at node {}", ledger.node));
                return true;
            }
        }
        false
    }

    /// Opens the replicas that a node should have, and discards those that were let go.
    async fn supervise(self: Arc<Self>, node: NodeId, groups: Groups, control: Arc<Ledger>, life: Arc<Life>) {
        loop {
            let state = control.cluster();
            for peer in state.nodes.keys() {
                groups.peers().set_address(*peer, "simulated");
            }
            for (id, shard) in &state.shards {
                let id = GroupId::from(*id);
                if shard.replicas.contains(&node) && groups.get(id).is_err() {
                    self.open(node, id, &groups, &life).await;
                }
                if let Ok(group) = groups.get(id)
                    && shard.founders.contains(&node)
                    && group.is_initialized().await.is_ok_and(|has_started| !has_started)
                {
                    // Refused on a node that is dying.
                    drop(group.initialize(&shard.founders).await);
                }
            }
            for id in groups.held().await.unwrap_or_default() {
                let placed = state.shards.iter().find(|(shard, _)| GroupId::from(**shard) == id);
                let Some((_, shard)) = placed.filter(|(_, shard)| !shard.replicas.contains(&node)) else {
                    continue;
                };
                // Asked before it is opened: its state may be gone already.
                if !groups.was_let_go(id, &shard.replicas).await {
                    if groups.get(id).is_err() {
                        // It may still vote, and others may wait for it.
                        self.open(node, id, &groups, &life).await;
                    }
                    continue;
                }
                let (world, alive) = (self.clone(), life.clone());
                let set_aside = move || world.forget_state(node, id, &alive);
                if groups.leave_if_let_go(id, &shard.replicas, set_aside).await.unwrap_or(false) {
                    if self.lie == Some(Lie::Leave) {
                        // A node that is dying forgets nothing.
                        drop(groups.forget(id).await);
                    }
                    self.truth.tell("discarded", format_args!("group {id} at node {node}"));
                }
            }
            sleep(TICK).await;
        }
    }

    fn forget_state(&self, node: NodeId, id: GroupId, life: &Life) -> std::io::Result<()> {
        let mut seats = self.seats.lock();
        let seat = seats.get_mut(&node).filter(|_| life.is_alive());
        let seat = seat.ok_or_else(|| std::io::Error::other("this process is dead"))?;
        seat.ledgers.remove(&id);
        seat.disk.forget_state(id.0);
        Ok(())
    }

    /// Leads a group's membership while this node leads it, and lets it sleep when it is quiet.
    async fn tend(self: Arc<Self>, node: NodeId, group: Group) {
        let id = group.id();
        let (mut seen, mut was_asleep) = (0, false);
        while !group.is_stopped() {
            let state = {
                let seats = self.seats.lock();
                seats
                    .get(&node)
                    .and_then(|seat| seat.ledgers.get(&GroupId::CONTROL))
                    .map(|control| control.cluster())
            };
            let mut is_steering = false;
            if let Some(state) = state.filter(|state| !state.nodes.is_empty() && group.is_leader()) {
                let (wanted, voters) = if id == GroupId::CONTROL {
                    (state.nodes.keys().copied().collect(), control_voters(&state))
                } else {
                    let placed = state.shards.iter().find(|(shard, _)| GroupId::from(**shard) == id);
                    let replicas: BTreeSet<NodeId> =
                        placed.map(|(_, shard)| shard.replicas.clone()).unwrap_or_default();
                    (replicas.clone(), replicas)
                };
                if !wanted.is_empty() {
                    is_steering = !group.steer_members(&wanted, &voters, |_| true).await.unwrap_or(false);
                }
            }
            let applied = group.applied();
            if applied == seen && !is_steering {
                group.rest().await;
            }
            seen = applied;
            if group.is_asleep() && !was_asleep {
                self.truth.tell("sleeps", format_args!("group {id} at node {node}"));
            }
            was_asleep = group.is_asleep();
            sleep(TICK).await;
        }
    }

    /// A process dies, and what it had not synced is lost.
    fn crash(&self, node: NodeId) {
        let Some(running) = self.net.stop(node) else { return };
        running.life.end();
        let mut seats = self.seats.lock();
        if let Some(seat) = seats.get_mut(&node) {
            seat.is_up = false;
            seat.disk.crash(&mut self.coin.lock());
        }
    }

    fn restart_later(self: &Arc<Self>, node: NodeId, after: Duration) {
        let world = self.clone();
        TypeConfig::spawn(async move {
            sleep(after).await;
            world.start(node).await;
        });
    }

    /// Makes a cluster with its shards.
    async fn found(self: Arc<Self>, nodes: u64) {
        for number in 1..=nodes {
            self.sit(NodeId(number), &format!("n{number}"));
            self.clone().start(NodeId(number)).await;
        }
        let first = self.net.running(NodeId(1)).expect("it runs");
        let control = first.groups.get(GroupId::CONTROL).expect("it is open");
        control.initialize(&BTreeSet::from([NodeId(1)])).await.expect("a new group");
        control.wait_leader(DEADLINE).await.expect("it elects itself");
        self.order(Command::CreateCluster { cluster_id: "simulated".into() }).await;
        for number in 1..=nodes {
            let added = self.order(add_node(&format!("n{number}"), "first")).await;
            assert_eq!(added, Response::NodeAdded(NodeId(number)));
        }
        let dense = VectorParams::new(4, Distance::Dot);
        let made = self
            .order(Command::CreateCollection {
                request_id: RequestId([1; 16]),
                name: "c".into(),
                config: CollectionConfig {
                    vectors: BTreeMap::from([(String::new(), dense)]),
                    ..CollectionConfig::default()
                },
                shard_count: Some(SHARDS),
                replication_factor: Some(self.replicas),
                created_at: 0,
            })
            .await;
        assert_eq!(made, Response::Done);
    }

    /// An order to the control group, tried until it is answered.
    async fn order(&self, command: Command) -> Response {
        let command = Bytes::from(codec::encode(&command));
        loop {
            for (_, running) in self.net.all_running() {
                let Ok(group) = running.groups.get(GroupId::CONTROL) else { continue };
                if let Ok((_, answer)) = group.propose(command.clone(), DEADLINE).await {
                    return codec::decode(&answer).expect("a response");
                }
            }
            sleep(TICK).await;
        }
    }

    /// A client that writes and reads registers at any node.
    async fn client(self: Arc<Self>) {
        while !self.is_over.load(Ordering::Relaxed) {
            let wait = self.quiet_until.lock().saturating_duration_since(Instant::now());
            sleep(wait + self.millis(1, 60)).await;
            let (group, key) =
                (GroupId(self.pick(1, u64::from(SHARDS) + 1)), self.pick(0, u64::from(KEYS)) as u8);
            if self.happens(0.5) {
                self.write(group, key).await;
            } else {
                self.read(group, key).await;
            }
        }
    }

    fn any_node(&self) -> Option<NodeId> {
        let running: Vec<NodeId> = self.net.all_running().into_iter().map(|(node, _)| node).collect();
        self.one_of(&running)
    }

    /// Asks one node something; none when there is no answer.
    async fn ask<T, F: Future<Output = Result<T, Error>>>(
        &self,
        node: NodeId,
        id: GroupId,
        question: impl FnOnce(Group) -> F,
    ) -> Option<Result<T, Error>> {
        sleep(self.millis(0, 3)).await;
        let Some(running) = self.net.running(node) else { return Some(Err(Error::UnknownGroup(id))) };
        let answer = match running.groups.get(id) {
            Ok(group) => question(group).await,
            Err(error) => Err(error),
        };
        sleep(self.millis(0, 3)).await;
        running.life.is_alive().then_some(answer)
    }

    /// Writes once. Returns whether it was acknowledged.
    async fn write(&self, id: GroupId, key: u8) -> bool {
        let uid = self.uids.fetch_add(1, Ordering::Relaxed) + 1;
        let command = Bytes::from(codec::encode(&Write { key, uid }));
        let floor = self.truth.floor((id, key));
        let mut to = self.any_node();
        let mut asked = Vec::new();
        while let Some(node) = to.filter(|_| asked.len() < 5) {
            asked.push(node);
            let command = command.clone();
            let answer =
                self.ask(node, id, |group| async move { group.propose(command, DEADLINE).await }).await;
            match answer {
                Some(Ok((index, _))) => {
                    self.truth.acknowledged((id, key), index, uid, floor);
                    return true;
                }
                // Nothing was proposed.
                Some(Err(Error::NotLeader { leader: Some(leader), .. })) => to = Some(leader),
                Some(Err(Error::NotLeader { leader: None, .. } | Error::UnknownGroup(_))) => {
                    sleep(self.millis(50, 200)).await;
                    to = self.any_node();
                }
                None => {
                    self.truth.tell("unknown", format_args!("group {id}: write {uid}: node {node} has died"));
                    return false;
                }
                Some(Err(error)) => {
                    self.truth
                        .tell("unknown", format_args!("group {id}: write {uid} at node {node}: {error}"));
                    return false;
                }
            }
        }
        self.truth.refused(id, uid, &asked);
        false
    }

    /// Reads once, at one replica, by the word of the leader that it knows of.
    async fn read(&self, id: GroupId, key: u8) {
        let floor = self.truth.floor((id, key));
        let Some(node) = self.any_node() else { return };
        let Some(Ok(leader)) = self.ask(node, id, |group| async move { Ok(group.leader()) }).await else {
            return;
        };
        let Some(leader) = leader else { return };
        let may_lie = self.lie == Some(Lie::Read);
        let index = self.ask(leader, id, |group| async move {
            if may_lie && group.is_leader() {
                return Ok(group.applied());
            }
            group.read_index(DEADLINE).await
        });
        let Some(Ok(index)) = index.await else { return };
        let waited =
            self.ask(node, id, |group| async move { group.wait_applied(index, DEADLINE).await }).await;
        let ledger = self.seats.lock().get(&node).and_then(|seat| seat.ledgers.get(&id).cloned());
        if let (Some(Ok(())), Some(ledger)) = (waited, ledger)
            && ledger.life.is_alive()
        {
            self.truth.read((id, key), ledger.version(key), floor);
        }
    }

    /// Looks at every group of every node, again and again.
    async fn observe(self: Arc<Self>) {
        loop {
            for (node, running) in self.net.all_running() {
                for group in running.groups.all() {
                    self.truth.observe(node, &group.status());
                }
            }
            sleep(Duration::from_millis(25)).await;
        }
    }

    /// Things go wrong, one after the other and at the same time.
    async fn hurt(self: Arc<Self>) {
        let began = Instant::now();
        // With fewer replicas than three a lost disk is a lost group.
        let mut may_replace = self.replicas >= 3 && self.happens(0.4);
        // A calm start lets most shards begin before anything is lost.
        sleep(self.millis(500, 3000)).await;
        while began.elapsed() < FAULTS {
            let running: Vec<NodeId> = self.net.all_running().into_iter().map(|(node, _)| node).collect();
            match self.pick(0, 11) {
                0..=2 => {
                    if let Some(node) = self.one_of(&running) {
                        self.truth.tell("crashes", node);
                        self.crash(node);
                        self.restart_later(node, self.millis(50, 3000));
                    }
                }
                3 => {
                    self.truth.tell("power cuts", format_args!("{running:?}"));
                    for node in running {
                        self.crash(node);
                        self.restart_later(node, self.millis(50, 1500));
                    }
                }
                4 | 5 => self.cut(),
                6 => self.storm(),
                7 => self.slow_disk(),
                8 => self.shuffle().await,
                9 => self.move_replica(),
                _ if may_replace && !running.is_empty() => {
                    may_replace = false;
                    self.replace(&running);
                }
                _ => {
                    *self.quiet_until.lock() = Instant::now() + Duration::from_secs(2);
                    sleep(self.millis(500, 2500)).await;
                }
            }
            sleep(self.millis(50, 1500)).await;
        }
    }

    fn end_weather_later(self: &Arc<Self>, end: impl FnOnce(&mut Weather) + Send + 'static) {
        let (world, after) = (self.clone(), self.millis(200, 3000));
        TypeConfig::spawn(async move {
            sleep(after).await;
            let mut weather = world.net.weather();
            end(&mut weather);
            world.net.set_weather(weather);
        });
    }

    /// Some ways from node to node are cut: a part of the cluster from the rest, or at random, in
    /// one direction or both.
    fn cut(self: &Arc<Self>) {
        let nodes: Vec<NodeId> = self.seats.lock().keys().copied().collect();
        let mut cut = BTreeSet::new();
        let is_split = self.happens(0.6);
        let one_side: BTreeSet<NodeId> = nodes.iter().copied().filter(|_| self.happens(0.4)).collect();
        let is_one_way = self.happens(0.3);
        for from in &nodes {
            for to in nodes.iter().filter(|to| *to != from) {
                let (here, there) = (one_side.contains(from), one_side.contains(to));
                let is_cut =
                    if is_split { here != there && (here || !is_one_way) } else { self.happens(0.3) };
                if is_cut {
                    cut.insert((*from, *to));
                }
            }
        }
        self.truth.tell("cuts", format_args!("{cut:?}"));
        let mut weather = self.net.weather();
        weather.cut = cut;
        self.net.set_weather(weather);
        self.end_weather_later(|weather| weather.cut.clear());
    }

    /// Messages are lost, late, early and repeated.
    fn storm(self: &Arc<Self>) {
        let mut weather = self.net.weather();
        weather.loss = self.pick(0, 30) as f64 / 100.0;
        weather.repeats = self.pick(0, 30) as f64 / 100.0;
        weather.delay = if self.happens(0.2) { self.millis(500, 1500) } else { self.millis(2, 150) };
        self.truth.tell("storms", format_args!("{weather:?}"));
        self.net.set_weather(weather);
        self.end_weather_later(|weather| {
            let cut = std::mem::take(&mut weather.cut);
            *weather = Weather { cut, ..net::calm() };
        });
    }

    fn slow_disk(self: &Arc<Self>) {
        let disks: Vec<(NodeId, Arc<Disk>)> =
            self.seats.lock().iter().map(|(node, seat)| (*node, seat.disk.clone())).collect();
        let Some((node, disk)) = self.one_of(&disks) else { return };
        let pace = self.millis(20, 500);
        self.truth.tell("slow disks", format_args!("{pace:?} at node {node}"));
        disk.set_pace(pace);
        let after = self.millis(200, 2000);
        TypeConfig::spawn(async move {
            sleep(after).await;
            disk.set_pace(Duration::from_millis(2));
        });
    }

    /// Leaders hand over, and checkpoints are made.
    async fn shuffle(&self) {
        for (node, running) in self.net.all_running() {
            for group in running.groups.all() {
                if self.happens(0.3) {
                    // A node that dies meanwhile makes none.
                    drop(group.checkpoint().await);
                }
                let others: Vec<NodeId> =
                    group.status().voters.into_iter().filter(|voter| *voter != node).collect();
                if group.is_leader()
                    && self.happens(0.5)
                    && let Some(to) = self.one_of(&others)
                {
                    self.truth.tell("transfers", format_args!("group {} from {node} to {to}", group.id()));
                    drop(group.transfer_leader(to).await);
                }
            }
        }
    }

    /// A shard is to have a replica at another node.
    fn move_replica(self: &Arc<Self>) {
        let states: Vec<ClusterState> = {
            let seats = self.seats.lock();
            seats.values().filter_map(|seat| Some(seat.ledgers.get(&GroupId::CONTROL)?.cluster())).collect()
        };
        let Some(state) = self.one_of(&states) else { return };
        let shards: Vec<_> = state.shards.iter().collect();
        let Some((id, shard)) = self.one_of(&shards) else { return };
        let spare: Vec<NodeId> =
            state.nodes.keys().copied().filter(|node| !shard.replicas.contains(node)).collect();
        let held: Vec<NodeId> = shard.replicas.iter().copied().collect();
        let (Some(to), Some(from)) = (self.one_of(&spare), self.one_of(&held)) else { return };
        self.truth.tell("moves", format_args!("group {id} from {from} to {to}"));
        let mut replicas = shard.replicas.clone();
        replicas.remove(&from);
        replicas.insert(to);
        let command = Command::SetReplicas { shard: *id, expected: shard.replicas.clone(), replicas };
        let world = self.clone();
        // Refused when somebody has changed the shard's replicas meanwhile.
        TypeConfig::spawn(async move { drop(world.order(command).await) });
    }

    /// A disk is lost for good; a new node takes its place.
    fn replace(self: &Arc<Self>, running: &[NodeId]) {
        let Some(node) = self.one_of(running) else { return };
        self.truth.tell("replacements", node);
        self.crash(node);
        let name = {
            let mut seats = self.seats.lock();
            let Some(seat) = seats.get_mut(&node) else { return };
            seat.is_gone = true;
            seat.name.clone()
        };
        let (world, after) = (self.clone(), self.millis(100, 2000));
        TypeConfig::spawn(async move {
            sleep(after).await;
            let Response::NodeAdded(new) = world.order(add_node(&name, "second")).await else {
                world.truth.violation(format!("no node could take the place of {name}"));
                return;
            };
            world.sit(new, &name);
            world.start(new).await;
        });
    }

    /// No more faults, and everybody runs.
    async fn heal(self: Arc<Self>) {
        // Longer than any fault that is still on its way.
        sleep(Duration::from_secs(4)).await;
        self.net.set_weather(net::calm());
        let nodes: Vec<NodeId> = self.seats.lock().keys().copied().collect();
        for node in nodes {
            self.clone().start(node).await;
        }
    }

    /// What keeps the cluster from being whole, if anything does.
    fn unsettled(&self) -> Option<String> {
        let running = self.net.all_running();
        let seats = self.seats.lock();
        let states: Vec<(NodeId, ClusterState)> = running
            .iter()
            .filter_map(|(node, _)| Some((*node, seats.get(node)?.ledgers.get(&GroupId::CONTROL)?.cluster())))
            .collect();
        let Some((_, state)) = states.iter().max_by_key(|(_, state)| state.version) else {
            return Some("no node runs".to_owned());
        };
        let here: BTreeSet<NodeId> = running.iter().map(|(node, _)| *node).collect();
        let members: BTreeSet<NodeId> = state.nodes.keys().copied().collect();
        if here != members {
            return Some(format!("the members are {members:?}, those that run {here:?}"));
        }
        let mut wanted = BTreeMap::from([(GroupId::CONTROL, (members, control_voters(state)))]);
        for (id, shard) in &state.shards {
            wanted.insert(GroupId::from(*id), (shard.replicas.clone(), shard.replicas.clone()));
        }
        for (id, (members, voters)) in wanted {
            let mut all = Vec::new();
            for (node, running) in &running {
                match (running.groups.get(id), members.contains(node)) {
                    (Ok(group), true) => all.push((*node, group.status())),
                    (Ok(_), false) => return Some(format!("group {id} is still open at node {node}")),
                    (Err(_), true) => return Some(format!("group {id} is not open at node {node}")),
                    (Err(_), false) => {}
                }
            }
            let Some((_, first)) = all.first() else { return Some(format!("group {id} is nowhere")) };
            for (node, status) in &all {
                let is_led = all
                    .iter()
                    .any(|(leader, leads)| status.leader == Some(*leader) && leads.role == "leader");
                let is_whole = is_led
                    && status.leader == first.leader
                    && (status.applied, status.last_index) == (first.applied, first.applied)
                    && !status.is_joint
                    && status.voters == voters
                    && status.members() == members;
                if !is_whole {
                    return Some(format!("group {id} at node {node}: {status:?}, elsewhere {first:?}"));
                }
            }
        }
        None
    }

    async fn settle(&self) {
        let began = Instant::now();
        while let Some(reason) = self.unsettled() {
            if began.elapsed() > PATIENCE {
                self.truth.violation(format!("not whole {PATIENCE:?} after the last fault: {reason}"));
                return;
            }
            sleep(TICK).await;
        }
    }

    /// The term and the leader of each group that has a majority without a node.
    fn offices(&self, without: NodeId, are_awake: bool) -> BTreeMap<GroupId, (u64, NodeId)> {
        let running = self.net.all_running();
        let all = running.iter().flat_map(|(_, running)| running.groups.all());
        let all = all.filter(|group| !are_awake || !group.is_asleep());
        let led = all.map(|group| group.status()).filter(|status| status.role == "leader");
        let led = led.filter(|status| {
            let others = status.voters.iter().filter(|voter| **voter != without).count();
            others > status.voters.len() / 2
        });
        led.filter_map(|status| Some((status.id, (status.term, status.leader?)))).collect()
    }

    /// A node that was cut off and comes back deposes no leader: elections that it cannot win are not held
    /// (pre-vote; Ongaro's thesis, 9.6).
    async fn come_back(&self) {
        let nodes: Vec<NodeId> = self.net.all_running().into_iter().map(|(node, _)| node).collect();
        let Some(lonely) = self.one_of(&nodes) else { return };
        // Who sleeps renews no leases, and is elected anew once in some hundred times.
        let before = self.offices(lonely, true);
        let others = nodes.iter().filter(|node| **node != lonely);
        let cut = others.flat_map(|other| [(lonely, *other), (*other, lonely)]).collect();
        self.net.set_weather(Weather { cut, ..net::calm() });
        sleep(ALONE).await;
        self.net.set_weather(net::calm());
        sleep(ALONE).await;
        self.settle().await;
        let after = self.offices(lonely, false);
        for (id, office) in before.iter().filter(|(_, (_, leader))| *leader != lonely) {
            if after.get(id) != Some(office) {
                let now = after.get(id);
                let what = format!("the term and leader of group {id} were {office:?} and are {now:?}");
                self.truth.violation(format!("{what} after node {lonely} was cut off and came back"));
            }
        }
    }

    /// Whether the cluster is whole again, works, and has kept what it promised.
    async fn check(&self) {
        self.settle().await;
        for id in (1..=u64::from(SHARDS)).map(GroupId) {
            let mut is_written = false;
            for _ in 0..10 {
                is_written = is_written || self.write(id, 0).await;
                self.read(id, 0).await;
            }
            if !is_written {
                for (node, running) in self.net.all_running() {
                    if let Ok(group) = running.groups.get(id) {
                        self.truth.tell(
                            "status",
                            format_args!("{node}: asleep {} {:?}", group.is_asleep(), group.status()),
                        );
                    }
                }
                self.truth.violation(format!("group {id} takes no writes"));
            }
        }
        self.settle().await;
        self.come_back().await;
        for (node, seat) in self.seats.lock().iter().filter(|(_, seat)| !seat.is_gone) {
            for (id, ledger) in seat.ledgers.iter().filter(|(id, _)| **id != GroupId::CONTROL) {
                self.truth.check_history(*node, *id, &ledger.history());
            }
        }
    }
}

fn add_node(name: &str, incarnation: &str) -> Command {
    Command::AddNode {
        name: name.to_owned(),
        incarnation: format!("{name}-{incarnation}"),
        addresses: Addresses::default(),
        zone: String::new(),
    }
}
