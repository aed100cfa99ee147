//! Shards of the workload's collection that are split and merged all the time, while other faults strike.
//!
//! ```text
//!  look ─▶ order a split or a merge ─▶ look until nothing is being changed ─▶ completed, or given up
//!   ▲                                                                                │
//!   └───────────────────────────────── pause ◀──────────────────────────────────────┘
//! ```
//!
//! This is no [`Fault`](super::Fault): nothing is broken that could be healed. The cluster carries a change
//! out by itself, for as long as that takes and through whatever strikes meanwhile, so it runs beside the
//! faults. What is ordered next is chosen by a seed and by what was completed less often. What has come of a
//! change is read from the cluster's own report, since an order whose answer was lost may be carried out all
//! the same. A change that the cluster gives up is recorded and no mistake; that nothing was ever completed
//! is one, of coverage.
//!
//! What was merged rests for as long as a client may repeat a write: after a merge and a further change a
//! repeated write may be done again, which README states as a limit, so it would be no finding.

use std::cmp::Ordering;
use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;
use std::sync::atomic::AtomicBool;
use std::sync::atomic::Ordering::{Acquire, Release};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use rand::rngs::StdRng;
use rand::{RngExt, SeedableRng};
use serde_json::{Value, json};
use shoal_tests::{Client, Reply, Request};
use tokio::task::JoinHandle;

use crate::caller::LONGEST_RETRY;
use crate::cluster::COLLECTION;
use crate::history::{Phase, Recorder};

/// A change that is under way.
const UNDER_WAY: &str = "reshard";
/// A completed split.
pub const SPLIT: &str = "shard-split";
/// A completed merge.
pub const MERGED: &str = "shards-merged";
/// A change that the cluster has given up, or that an order was never taken for.
const GIVEN_UP: &str = "reshard-given-up";
/// How long a node may take to answer before another one is asked: a report waits for two seconds, perhaps
/// twice, for nodes that do not answer.
const ASK_LIMIT: Duration = Duration::from_secs(8);
/// The pause between two looks at a change.
const LOOK_EVERY: Duration = Duration::from_millis(300);
/// The pause between two changes: what is new is used for a while.
const PAUSE: Duration = Duration::from_secs(2);
/// How long an order without an answer may still take to become a change.
const ORDER_LIMIT: Duration = Duration::from_secs(5);
/// How long a change may take after the last fault has healed. A failed attempt waits up to a minute for
/// the next one.
const END_LIMIT: Duration = Duration::from_secs(120);
/// The most parts that a shard is split into.
const MOST_PARTS: u32 = 4;
/// From so many shards on they are merged: each costs its nodes a store and a group.
const MANY_SHARDS: usize = 8;

/// The task that orders one change after the other.
pub struct Resharding {
    stop: Arc<AtomicBool>,
    task: JoinHandle<()>,
}

impl Resharding {
    /// Begins. `clients` are of one node each.
    pub fn start(clients: &[Client], recorder: &Arc<Recorder>, seed: u64) -> Resharding {
        let stop = Arc::new(AtomicBool::new(false));
        let limited = |client: &Client| client.clone().with_limits(ASK_LIMIT, ASK_LIMIT);
        let resharder = Resharder {
            clients: clients.iter().map(limited).collect(),
            recorder: recorder.clone(),
            stop: stop.clone(),
            coin: StdRng::seed_from_u64(seed),
            done: Done::default(),
            known: BTreeSet::new(),
            merged_at: BTreeMap::new(),
        };
        Resharding { stop, task: tokio::spawn(resharder.run()) }
    }

    /// Orders nothing more and waits until the last change has ended. One that does not end in time is
    /// recorded as wrong.
    pub async fn finish(self) {
        self.stop.store(true, Release);
        self.task.await.expect("whoever orders changes does not panic");
    }
}

/// How often each kind was completed.
#[derive(Clone, Copy, Debug, Default)]
struct Done {
    splits: u64,
    merges: u64,
}

/// What is ordered.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Change {
    Split { shard: u64, into: u32 },
    Merge { one: u64, other: u64 },
}

impl Change {
    fn request(self) -> Request {
        match self {
            Change::Split { shard, into } => {
                Request::post(format!("/admin/shards/{shard}/split"), &json!({"into": into}))
            }
            Change::Merge { one, other } => {
                Request::post(format!("/admin/shards/{one}/merge"), &json!({"with": other}))
            }
        }
    }

    /// The shards that give way.
    fn parents(self) -> Vec<u64> {
        match self {
            Change::Split { shard, .. } => vec![shard],
            Change::Merge { one, other } => vec![one, other],
        }
    }

    fn describe(self) -> String {
        match self {
            Change::Split { shard, into } => format!("shard {shard} into {into}"),
            Change::Merge { one, other } => format!("shards {one} and {other} into one"),
        }
    }
}

/// What is ordered next, for the shards of a collection in the order of their ranges; none of those that rest.
fn choose(shards: &[u64], resting: &BTreeSet<u64>, done: Done, coin: &mut StdRng) -> Option<Change> {
    let is_free = |shard: &u64| !resting.contains(shard);
    let free: Vec<u64> = shards.iter().copied().filter(is_free).collect();
    let pairs: Vec<&[u64]> = shards.windows(2).filter(|pair| pair.iter().all(is_free)).collect();
    let is_full = shards.len() >= MANY_SHARDS;
    let is_merge_due = match done.splits.cmp(&done.merges) {
        Ordering::Less => false,
        Ordering::Equal => coin.random_bool(0.5),
        Ordering::Greater => true,
    };
    // What cannot be done makes way for the other.
    match (is_full || is_merge_due, pairs.len(), free.len()) {
        (true, 1.., _) => {
            let pair = pairs[coin.random_range(0..pairs.len())];
            Some(Change::Merge { one: pair[0], other: pair[1] })
        }
        (_, _, 1..) if !is_full => {
            let shard = free[coin.random_range(0..free.len())];
            Some(Change::Split { shard, into: coin.random_range(2..=MOST_PARTS) })
        }
        _ => None,
    }
}

/// What the cluster says of the collection's shards.
#[derive(Debug, PartialEq, Eq)]
struct Shards {
    /// Those in use, in the order of their ranges.
    in_use: Vec<u64>,
    /// Those that are to give way, while a change is under way.
    giving_way: Option<Vec<u64>>,
}

/// Reads `GET /admin/cluster/report`.
fn read(report: &Value) -> Result<Shards> {
    let list = |name: &str| report[name].as_array().with_context(|| format!("the report has no {name}"));
    let mut in_use: Vec<(u64, u64)> = Vec::new();
    for shard in list("shards")?.iter().filter(|shard| shard["collection"] == COLLECTION) {
        if shard["is_in_use"] == true {
            let (first, id) = (shard["first"].as_u64(), shard["id"].as_u64());
            in_use.push(first.zip(id).context("a shard has no range or no id")?);
        }
    }
    in_use.sort_unstable();
    let change = list("resharding")?.iter().find(|change| change["collection"] == COLLECTION);
    let giving_way = change.map(|change| {
        let parents = change["shards"].as_array().context("a change names no shards")?;
        Ok::<_, anyhow::Error>(parents.iter().filter_map(Value::as_u64).collect())
    });
    Ok(Shards { in_use: in_use.into_iter().map(|(_, id)| id).collect(), giving_way: giving_way.transpose()? })
}

struct Resharder {
    /// One for each node.
    clients: Vec<Client>,
    recorder: Arc<Recorder>,
    stop: Arc<AtomicBool>,
    coin: StdRng,
    done: Done,
    /// The shards in use before the change that is under way.
    known: BTreeSet<u64>,
    /// When shards were seen that others had been merged into.
    merged_at: BTreeMap<u64, Instant>,
}

impl Resharder {
    async fn run(mut self) {
        while !self.stop.load(Acquire) {
            // Who cannot be asked now is asked again: that is what the faults are for.
            if let Ok(shards) = self.look().await {
                self.known = shards.in_use.iter().copied().collect();
                match shards.giving_way {
                    // An order that was taken for lost.
                    Some(parents) => {
                        self.recorder.fault(UNDER_WAY, Phase::Begin, &format!("shards {parents:?}"));
                        self.follow(&parents).await;
                    }
                    None => self.order(&shards.in_use).await,
                }
            }
            tokio::time::sleep(PAUSE).await;
        }
    }

    async fn order(&mut self, shards: &[u64]) {
        self.merged_at.retain(|_, at| at.elapsed() < LONGEST_RETRY);
        let resting = self.merged_at.keys().copied().collect();
        let Some(change) = choose(shards, &resting, self.done, &mut self.coin) else { return };
        match self.ask(&change.request()).await {
            Ok(reply) if !reply.is_success() => {
                let detail = format!("{}: {} {}", change.describe(), reply.status, reply.text());
                self.recorder.fault(GIVEN_UP, Phase::Moment, &detail);
            }
            taken => {
                let doubt = if taken.is_ok() { "" } else { ", by an order without an answer" };
                let detail = format!("{}{doubt}", change.describe());
                self.recorder.fault(UNDER_WAY, Phase::Begin, &detail);
                if taken.is_err() {
                    tokio::time::sleep(ORDER_LIMIT).await;
                }
                self.follow(&change.parents()).await;
            }
        }
    }

    /// Waits until a change has ended, and records what has come of it.
    async fn follow(&mut self, parents: &[u64]) {
        let mut end: Option<Instant> = None;
        loop {
            let shards = self.look().await;
            if let Ok(Shards { in_use, giving_way: None }) = &shards {
                self.recorder.fault(UNDER_WAY, Phase::End, "");
                self.ended(parents, in_use);
                return;
            }
            // As long as faults strike it may take what it takes.
            if self.stop.load(Acquire) {
                let end = *end.get_or_insert_with(|| Instant::now() + END_LIMIT);
                if Instant::now() > end {
                    let detail =
                        format!("{END_LIMIT:?} after the last fault, shards {parents:?}: {shards:?}");
                    self.recorder.fault("reshard_not_ended", Phase::Wrong, &detail);
                    return;
                }
            }
            tokio::time::sleep(LOOK_EVERY).await;
        }
    }

    fn ended(&mut self, parents: &[u64], in_use: &[u64]) {
        let detail = format!("{parents:?}; now there are {in_use:?}");
        let name = match (parents.iter().any(|parent| in_use.contains(parent)), parents.len()) {
            (true, _) => GIVEN_UP,
            (false, 1) => {
                self.done.splits += 1;
                SPLIT
            }
            (false, _) => {
                self.done.merges += 1;
                let new = in_use.iter().filter(|shard| !self.known.contains(*shard));
                self.merged_at.extend(new.map(|shard| (*shard, Instant::now())));
                MERGED
            }
        };
        self.recorder.fault(name, Phase::Moment, &detail);
    }

    async fn look(&mut self) -> Result<Shards> {
        let reply = self.ask(&Request::get("/admin/cluster/report")).await?;
        read(&reply.json()?)
    }

    /// Asks a random node, and then the others until one gives an answer that says something: a refusal
    /// does, that a node is too busy or hears no leader does not.
    ///
    /// # Errors
    /// When no node does. What was ordered may be carried out.
    async fn ask(&mut self, request: &Request) -> Result<Reply> {
        let count = self.clients.len();
        let first = self.coin.random_range(0..count);
        let mut reason = String::from("there is no node");
        for step in 0..count {
            match self.clients[(first + step) % count].once(request).await {
                Ok(reply) if reply.is_success() || matches!(reply.status, 400..=428 | 430..=499) => {
                    return Ok(reply);
                }
                Ok(reply) => reason = format!("{} {}", reply.status, reply.text()),
                Err(error) => reason = format!("{error:#}"),
            }
        }
        bail!("{request}: {reason}")
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_report_is_read() {
        let report = json!({
            "shards": [
                {"id": 9, "collection": COLLECTION, "first": 0, "is_in_use": true},
                {"id": 4, "collection": COLLECTION, "first": 70, "is_in_use": true},
                {"id": 10, "collection": COLLECTION, "first": 70, "is_in_use": false},
                {"id": 2, "collection": COLLECTION, "first": 50, "is_in_use": true},
                {"id": 5, "collection": "another", "first": 0, "is_in_use": true},
            ],
            "resharding": [
                {"collection": "another", "shards": [5], "into": [6, 7]},
                {"collection": COLLECTION, "shards": [4], "into": [10]},
            ],
        });
        let expected = Shards { in_use: vec![9, 2, 4], giving_way: Some(vec![4]) };
        assert_eq!(read(&report).expect("a report"), expected);
        let quiet = json!({"shards": [], "resharding": []});
        assert_eq!(read(&quiet).expect("a report"), Shards { in_use: Vec::new(), giving_way: None });
        assert!(read(&json!({})).is_err());
    }

    #[test]
    fn what_was_completed_less_often_comes_next() {
        let mut coin = StdRng::seed_from_u64(1);
        let (split_before, merged_before) = (Done { splits: 1, merges: 0 }, Done { splits: 0, merges: 1 });
        let nobody = BTreeSet::new();
        let mut choose = |shards: &[u64], resting: &BTreeSet<u64>, done: Done| {
            super::choose(shards, resting, done, &mut coin)
        };
        for _ in 0..100 {
            let merge = choose(&[7, 8, 9], &nobody, split_before).expect("a change");
            let is_of_neighbours = [(7, 8), (8, 9)].map(|(one, other)| Change::Merge { one, other });
            assert!(is_of_neighbours.contains(&merge), "{merge:?}");
            let split = choose(&[7, 8, 9], &nobody, merged_before).expect("a change");
            assert!(matches!(split, Change::Split { shard: 7..=9, into: 2..=4 }), "{split:?}");
            // One shard has no neighbour, and many are enough.
            let alone = choose(&[7], &nobody, split_before).expect("a change");
            assert!(matches!(alone, Change::Split { shard: 7, .. }), "{alone:?}");
            let many: Vec<u64> = (0..MANY_SHARDS as u64).collect();
            let merge = choose(&many, &nobody, merged_before).expect("a change");
            assert!(matches!(merge, Change::Merge { .. }), "{merge:?}");
            // What was merged lately stays.
            let middle = BTreeSet::from([8]);
            let split = choose(&[7, 8, 9], &middle, split_before).expect("a change");
            assert!(matches!(split, Change::Split { shard: 7 | 9, .. }), "{split:?}");
            assert_eq!(choose(&[8], &middle, split_before), None);
            assert_eq!(choose(&many, &many.iter().copied().collect(), merged_before), None);
        }
        assert_eq!(choose(&[], &nobody, Done::default()), None);
    }
}
