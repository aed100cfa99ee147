//! What clients do while the cluster is hurt.
//!
//! | workload | operations |
//! |---|---|
//! | register | reads, writes and deletes of a few points by everybody; new points every while |
//! | set | each client inserts, replaces and deletes points of its own and reads anybody's |
//! | visibility | writes, replaces, deletes, and looks for the same thing by every way on every node |
//! | session | writes, and reads on another node each time, sending its position along |
//! | retries | like register, each write repeated under one idempotency key until it is known |
//! | batch | writes five points at once to a collection of one shard |
//! | mixed | each client one of these, over points that it uses again; batches are repeated as in retries |
//!
//! The registers have no compare-and-set, which others put to such a test, because the product has
//! none: a point is written, deleted and read. A delete is a write of absence.
//!
//! A batch is atomic in its shard. The mix has several shards, so there its parts are judged one by one: what
//! was acknowledged must be there, all of it.

use std::ops::Range;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use rand::RngExt;
use serde::Deserialize;
use shoal_tests::Client;
use tokio::task::JoinHandle;

use crate::caller::Caller;
use crate::history::{Call, Level, Recorder, Way};

/// Points that everybody reads and writes.
const HOT_KEYS: u64 = 50;
/// How long they are used: the search for an order grows with the operations on one key.
const KEY_LIFE: Duration = Duration::from_secs(10);
/// How far apart the points of two clients are.
const STRIDE: u64 = 1_000_000;
/// What the clients of a mix do, in turn.
const MIX: [Workload; 6] = [
    Workload::Register,
    Workload::Set,
    Workload::Visibility,
    Workload::Session,
    Workload::Retries,
    Workload::Batch,
];
/// Points that a client of a mix uses, so that what is stored stops growing: whole batches of them.
const MIXED_KEYS: u64 = 500;
/// Points in one batch.
const BATCH: u64 = 5;

/// A workload by name.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Workload {
    /// Hot points.
    Register,
    /// Points of one's own.
    Set,
    /// Search.
    Visibility,
    /// Positions.
    Session,
    /// Hot points, with retries.
    Retries,
    /// Several points at once.
    Batch,
    /// All of these, each by some clients.
    Mixed,
}

impl Workload {
    /// How many shards its collection has.
    pub fn shards(self) -> u32 {
        match self {
            Workload::Batch => 1,
            _ => 3,
        }
    }
}

/// What all clients that were started together share.
struct Shared {
    /// Set when they are to stop.
    stop: AtomicBool,
    /// When the run began.
    started: Instant,
    /// How many clients there are.
    clients: u64,
    /// The pause of one client between two operations.
    pause: Duration,
}

/// Runs one client until it is told to stop.
async fn client(workload: Workload, number: u64, mut caller: Caller, shared: Arc<Shared>) {
    let is_mixed = workload == Workload::Mixed;
    let (workload, most) = match is_mixed {
        true => (MIX[number as usize % MIX.len()], MIXED_KEYS),
        false => (workload, u64::MAX),
    };
    if workload == Workload::Retries || (is_mixed && workload == Workload::Batch) {
        caller = caller.with_retries();
    }
    // Every other client stays with one node, so that each node has some of its own.
    if number % 2 == 1 {
        let home = (number / 2) as usize % caller.nodes();
        caller = caller.staying_at(home);
    }
    let mut own = Own { first: (number + 1) * STRIDE, count: 0, next: 0, most };
    while !shared.stop.load(Ordering::Relaxed) {
        let began = Instant::now();
        match workload {
            Workload::Register | Workload::Retries => register(&mut caller, &shared).await,
            Workload::Set => set(&mut caller, &mut own, &shared).await,
            Workload::Visibility => visibility(&mut caller, &mut own).await,
            Workload::Session => session(&mut caller, &mut own).await,
            Workload::Batch => batch(&mut caller, &mut own).await,
            Workload::Mixed => unreachable!("each client has one of the mix"),
        }
        tokio::time::sleep(shared.pause.saturating_sub(began.elapsed())).await;
    }
}

/// Clients that run until they are told to stop.
pub struct Clients {
    shared: Arc<Shared>,
    tasks: Vec<JoinHandle<()>>,
}

/// What all clients of a run are made from.
#[derive(Clone)]
pub struct Source {
    /// One for each node.
    pub clients: Vec<Client>,
    /// Where everything that they do is recorded.
    pub recorder: Arc<Recorder>,
    /// The seed of the run.
    pub seed: u64,
}

impl Clients {
    /// Starts a client for each number; each has points of its own.
    pub fn start(source: &Source, workload: Workload, numbers: Range<u64>, pause: Duration) -> Clients {
        let shared = Arc::new(Shared {
            stop: AtomicBool::new(false),
            started: Instant::now(),
            clients: numbers.end - numbers.start,
            pause,
        });
        let start = |number: u64| {
            let caller = Caller::new(&source.clients, source.recorder.clone(), source.seed ^ (number + 1));
            tokio::spawn(client(workload, number, caller, shared.clone()))
        };
        let tasks = numbers.map(start).collect();
        Clients { shared, tasks }
    }

    /// They go, each when its operation has ended.
    pub fn stop(&self) {
        self.shared.stop.store(true, Ordering::Relaxed);
    }

    /// Waits until the last one has gone.
    pub async fn join(self) {
        self.stop();
        for task in self.tasks {
            task.await.expect("a client does not panic");
        }
    }
}

/// How many more clients a crowd has than a run usually has.
const CROWD: u64 = 10;
/// The number of a crowd's first client: nobody else has its points.
const CROWD_FIRST: u64 = 10_000;

/// Clients that come and go during a run, each as fast as it can.
pub struct Crowd {
    source: Source,
    size: u64,
    /// Those who came, of whom the last may still be there.
    came: Vec<Clients>,
}

impl Crowd {
    /// Nobody yet; `usual` is how many clients the run has anyway.
    pub fn new(source: Source, usual: u64) -> Crowd {
        Crowd { source, size: CROWD * usual, came: Vec::new() }
    }

    /// They come. Returns how many.
    pub fn start(&mut self) -> u64 {
        let first = CROWD_FIRST + self.came.len() as u64 * self.size;
        let numbers = first..first + self.size;
        self.came.push(Clients::start(&self.source, Workload::Set, numbers, Duration::ZERO));
        self.size
    }

    /// They go, each when its operation has ended.
    pub fn stop(&self) {
        self.came.iter().for_each(Clients::stop);
    }

    /// Waits until the last one has gone.
    pub async fn join(self) {
        for clients in self.came {
            clients.join().await;
        }
    }
}

/// Points that only one client writes.
struct Own {
    first: u64,
    /// How many have been used.
    count: u64,
    next: u64,
    /// How many there are: then the first is used again.
    most: u64,
}

impl Own {
    fn fresh(&mut self) -> u64 {
        self.next = self.next % self.most + 1;
        self.count = self.count.max(self.next);
        self.first + self.next
    }

    fn any(&self, caller: &mut Caller) -> Option<u64> {
        (self.count > 0).then(|| self.first + caller.coin().random_range(1..=self.count))
    }
}

async fn register(caller: &mut Caller, shared: &Shared) {
    let age = shared.started.elapsed().as_secs() / KEY_LIFE.as_secs();
    let key = age * HOT_KEYS + caller.coin().random_range(0..HOT_KEYS);
    let node = caller.any_node();
    let call = match caller.coin().random_range(0..100) {
        ..40 => Call::Write { key, uid: caller.new_uid() },
        40..50 => Call::Delete { key },
        _ => Call::Read { key, level: Level::Linearizable },
    };
    caller.call(node, call).await;
}

async fn set(caller: &mut Caller, own: &mut Own, shared: &Shared) {
    let node = caller.any_node();
    let dice = caller.coin().random_range(0..100);
    let key = if dice < 50 { None } else { own.any(caller) };
    let call = match (key, dice) {
        (None, _) => Call::Write { key: own.fresh(), uid: caller.new_uid() },
        (Some(key), ..65) => Call::Write { key, uid: caller.new_uid() },
        (Some(key), ..80) => Call::Delete { key },
        (Some(key), _) => {
            // Somebody else's point of about the same age, or one's own where nobody else has such.
            let other = match shared.clients {
                1 => key,
                clients => caller.coin().random_range(1..=clients) * STRIDE + key % STRIDE,
            };
            Call::Read { key: other, level: Level::Linearizable }
        }
    };
    caller.call(node, call).await;
}

async fn visibility(caller: &mut Caller, own: &mut Own) {
    let key = own.fresh();
    let mut uids = vec![caller.new_uid()];
    let node = caller.any_node();
    if caller.call(node, Call::Write { key, uid: uids[0].clone() }).await.is_none() {
        return;
    }
    probe(caller, key, &uids[0], true).await;
    let then = caller.coin().random_range(0..3);
    let node = caller.any_node();
    let done = match then {
        0 => return,
        1 => caller.call(node, Call::Delete { key }).await,
        _ => {
            uids.push(caller.new_uid());
            caller.call(node, Call::Write { key, uid: uids[1].clone() }).await
        }
    };
    if done.is_some() {
        for uid in uids {
            probe(caller, key, &uid, false).await;
        }
    }
}

/// Looks for a value on every node, by one way each, or by every way on one node.
async fn probe(caller: &mut Caller, key: u64, uid: &str, thorough: bool) {
    let ways = [Way::Id, Way::Exact, Way::Graph, Way::Filter];
    let level = if caller.coin().random_bool(0.5) { Level::Linearizable } else { Level::Session };
    let shift = caller.coin().random_range(0..4);
    let count = if thorough { 4 } else { 2 };
    for at in 0..count {
        let (way, node) = (ways[(at + shift) % 4], at % caller.nodes());
        // A read at session level says nothing about a value once the position is lost.
        caller.call(node, Call::Find { key, uid: uid.to_owned(), way, level }).await;
    }
}

async fn session(caller: &mut Caller, own: &mut Own) {
    let key = match own.any(caller) {
        Some(key) if caller.coin().random_bool(0.7) => key,
        _ => own.fresh(),
    };
    let node = caller.any_node();
    let uid = caller.new_uid();
    caller.call(node, Call::Write { key, uid }).await;
    for _ in 0..2 {
        let node = caller.any_node();
        caller.call(node, Call::Read { key, level: Level::Session }).await;
    }
    if let Some(key) = own.any(caller) {
        let node = caller.any_node();
        caller.call(node, Call::Read { key, level: Level::Session }).await;
    }
}

async fn batch(caller: &mut Caller, own: &mut Own) {
    let keys: Vec<u64> = (0..BATCH).map(|_| own.fresh()).collect();
    let uid = caller.new_uid();
    let node = caller.any_node();
    caller.call(node, Call::Batch { keys, uid }).await;
}
