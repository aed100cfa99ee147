//! A steady load of single points, and the check that all of it is there.
//!
//! Each writer has one write in flight and goes on only when it is acknowledged, repeating it
//! with the same `Idempotency-Key` until then. So in the end the collection must hold exactly
//! what the writers have written: nothing lost, nothing twice, nothing else.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use serde_json::{Value, json};
use tokio::task::JoinHandle;

use crate::client::Client;
use crate::cluster::Cluster;
use crate::points::{Freshness, Points, point};
use crate::wait::{say, wait_until};

/// How long one write may take with all its repetitions: as long as a cluster may be down.
const WRITE_DEADLINE: Duration = Duration::from_secs(90);
/// How long one attempt may take before the writer turns to the next node.
const ATTEMPT_TIMEOUT: Duration = Duration::from_secs(3);
/// How far apart the ids of two writers are.
const STRIDE: u64 = 1_000_000;

/// Writers at work.
pub struct Writers {
    stop: Arc<AtomicBool>,
    acknowledged: Arc<AtomicU64>,
    tasks: Vec<JoinHandle<Result<Log>>>,
}

/// What one writer did: the payload of each id, and when each write was acknowledged.
#[derive(Default)]
struct Log {
    points: BTreeMap<u64, Value>,
    times: Vec<Instant>,
}

/// What all writers did.
#[derive(Clone, Debug)]
pub struct Written {
    /// The payload of each acknowledged point.
    pub points: BTreeMap<u64, Value>,
    /// When each write was acknowledged, in order.
    pub times: Vec<Instant>,
    /// From the first acknowledgement to the last.
    pub span: Duration,
    /// The longest time in which no writer had an acknowledgement.
    pub gap_of_all: Duration,
    /// The longest time in which one of the writers had no acknowledgement.
    pub gap_of_one: Duration,
}

impl Writers {
    /// Starts so many writers of one collection, each at another node to begin with.
    pub fn start(cluster: &Cluster, collection: &str, count: u64) -> Writers {
        Writers::through(&cluster.any(), collection, count)
    }

    /// Starts so many writers of one collection, each with connections of its own to the addresses of a
    /// client, and at another of them to begin with.
    pub fn through(client: &Client, collection: &str, count: u64) -> Writers {
        let stop = Arc::new(AtomicBool::new(false));
        let acknowledged = Arc::new(AtomicU64::new(0));
        let start = |writer: u64| {
            let client =
                client.clone().with_limits(WRITE_DEADLINE, ATTEMPT_TIMEOUT).starting_at(writer as usize);
            let (stop, acknowledged) = (stop.clone(), acknowledged.clone());
            let collection = collection.to_owned();
            tokio::spawn(async move {
                let written = write(writer, &client, &collection, &stop, &acknowledged).await;
                if let Err(error) = &written {
                    say(format!("writer {writer} stopped: {error:#}"));
                }
                written
            })
        };
        let tasks = (0..count).map(start).collect();
        Writers { stop, acknowledged, tasks }
    }

    /// Writes acknowledged so far.
    pub fn acknowledged(&self) -> u64 {
        self.acknowledged.load(Ordering::Acquire)
    }

    /// Waits until so many more writes are acknowledged.
    ///
    /// # Errors
    /// When that does not happen in time.
    pub async fn progress(&self, more: u64) -> Result<()> {
        let wanted = self.acknowledged() + more;
        let what = format!("{more} more acknowledged writes");
        wait_until(WRITE_DEADLINE, &what, || async {
            ensure!(!self.tasks.iter().any(JoinHandle::is_finished), "a writer has stopped");
            Ok((self.acknowledged() >= wanted).then_some(()))
        })
        .await
    }

    /// Lets every writer finish its write, and says what was written.
    ///
    /// # Errors
    /// When a writer has given up.
    pub async fn stop(self) -> Result<Written> {
        self.stop.store(true, Ordering::Release);
        let mut points = BTreeMap::new();
        let mut times = Vec::new();
        let mut gap_of_one = Duration::ZERO;
        for task in self.tasks {
            let log = task.await??;
            points.extend(log.points);
            gap_of_one = gap_of_one.max(longest_gap(&log.times));
            times.extend(log.times);
        }
        times.sort_unstable();
        let first = times.first().context("nothing was written")?;
        let span = times.last().map_or(Duration::ZERO, |last| last.duration_since(*first));
        Ok(Written { points, span, gap_of_all: longest_gap(&times), gap_of_one, times })
    }
}

async fn write(
    writer: u64,
    client: &Client,
    collection: &str,
    stop: &AtomicBool,
    acknowledged: &AtomicU64,
) -> Result<Log> {
    let points = Points::of(client, collection);
    let mut log = Log::default();
    for sequence in 0.. {
        if stop.load(Ordering::Acquire) {
            break;
        }
        let id = writer * STRIDE + sequence;
        let payload = json!({"writer": writer, "sequence": sequence});
        points.upsert(&[point(id, payload.clone())]).await?;
        log.points.insert(id, payload);
        log.times.push(Instant::now());
        acknowledged.fetch_add(1, Ordering::AcqRel);
    }
    Ok(log)
}

/// The longest time between two neighbours; the times are in order.
fn longest_gap(times: &[Instant]) -> Duration {
    let gaps = times.windows(2).map(|pair| pair[1].duration_since(pair[0]));
    gaps.max().unwrap_or(Duration::ZERO)
}

impl Written {
    /// The longest time in which no writer had an acknowledgement, of the gaps that begin in a span.
    pub fn gap_within(&self, from: Instant, to: Instant) -> Duration {
        let first = self.times.partition_point(|at| *at < from);
        let last = self.times.partition_point(|at| *at < to);
        longest_gap(&self.times[first..(last + 1).min(self.times.len()).max(first)])
    }

    /// Prints how it went.
    pub fn report(&self, name: &str) {
        let count = self.points.len();
        let rate = count as f64 / self.span.as_secs_f64().max(0.001);
        say(format!(
            "{name}: {count} acknowledged writes, {rate:.0}/s; \
             longest gap {} ms of all writers, {} ms of one",
            self.gap_of_all.as_millis(),
            self.gap_of_one.as_millis(),
        ));
    }

    /// Checks that a collection holds exactly what was acknowledged, each point once.
    ///
    /// # Errors
    /// When it does not; the message says what is lost, changed, there twice, or unknown.
    pub async fn verify(&self, client: &Client, collection: &str, freshness: Freshness) -> Result<()> {
        verify(&self.points, &Points::of(client, collection).at(freshness)).await
    }
}

/// Checks that a collection holds exactly these payloads, each point once.
///
/// # Errors
/// When it does not; the message says what is lost, changed, there twice, or unknown.
pub async fn verify(expected: &BTreeMap<u64, Value>, points: &Points<'_>) -> Result<()> {
    let mut found = BTreeMap::new();
    for point in points.scroll().await? {
        let id = point["id"].as_u64().with_context(|| format!("no number as id: {point}"))?;
        ensure!(found.insert(id, point["payload"].clone()).is_none(), "point {id} came twice");
    }
    let lost: Vec<u64> = expected.keys().filter(|id| !found.contains_key(*id)).copied().collect();
    let unknown: Vec<u64> = found.keys().filter(|id| !expected.contains_key(*id)).copied().collect();
    let changed = found.iter().find(|(id, payload)| expected.get(*id).is_some_and(|known| known != *payload));
    ensure!(lost.is_empty(), "{} acknowledged points are lost: {:?} …", lost.len(), first(&lost));
    ensure!(unknown.is_empty(), "{} points were never written: {:?} …", unknown.len(), first(&unknown));
    ensure!(changed.is_none(), "a point has another payload than was written: {changed:?}");
    let count = points.count(None).await?;
    ensure!(count == expected.len() as u64, "the count is {count}, but {} were written", expected.len());
    Ok(())
}

/// Checks at one node that a collection holds exactly these payloads, each point once: for everybody, and in its own
/// replicas as far as they have come.
///
/// # Errors
/// As [`verify`].
pub async fn verify_at(client: &Client, collection: &str, expected: &BTreeMap<u64, Value>) -> Result<()> {
    for freshness in [Freshness::Linearizable, Freshness::Eventual] {
        verify(expected, &Points::of(client, collection).at(freshness)).await?;
    }
    Ok(())
}

fn first(ids: &[u64]) -> &[u64] {
    &ids[..ids.len().min(10)]
}
