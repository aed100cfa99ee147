//! The other side of the search numbers: the same usearch graph that a shard has, called in this
//! process, without node, HTTP or JSON.

use std::sync::atomic::{AtomicUsize, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Result, anyhow};
use usearch::{Index, IndexOptions, MetricKind, ScalarKind};

use super::data::{TOP, Vectors, recall};

/// The parameters of the graph: those that a collection has unless it is told otherwise.
const CONNECTIVITY: usize = 16;
const EXPANSION: usize = 100;
/// The most threads that build and search.
const THREADS: usize = 2;

/// What the graph does in process.
pub(super) struct InProcess {
    /// Time to build it with two threads.
    pub(super) build: Duration,
    /// Recall at 10.
    pub(super) recall: f64,
    /// Searches each second of one thread.
    pub(super) one_thread: f64,
    /// Searches each second of two threads together.
    pub(super) two_threads: f64,
}

/// Builds the graph and searches it, each number of threads for so long.
///
/// # Errors
/// When usearch refuses.
pub(super) fn measure(vectors: &Vectors, time: Duration) -> Result<InProcess> {
    let started = Instant::now();
    let index = build(vectors)?;
    let build = started.elapsed();
    let search = |at: usize| anyhow::Ok(index.search(vectors.query(at), TOP)?.keys);
    let found = (0..vectors.query_count()).map(search).collect::<Result<Vec<Vec<u64>>>>()?;
    Ok(InProcess {
        build,
        recall: recall(&found, vectors.truth()),
        one_thread: rate(vectors, 1, time, search)?,
        two_threads: rate(vectors, THREADS, time, search)?,
    })
}

fn build(vectors: &Vectors) -> Result<Index> {
    let index = Index::new(&IndexOptions {
        dimensions: vectors.dimension(),
        metric: MetricKind::IP,
        quantization: ScalarKind::F16,
        connectivity: CONNECTIVITY,
        expansion_add: EXPANSION,
        expansion_search: EXPANSION,
        multi: false,
    })?;
    index.reserve_capacity_and_threads(vectors.len(), THREADS)?;
    let next = AtomicUsize::new(0);
    in_threads(THREADS, || {
        loop {
            let at = next.fetch_add(1, Ordering::Relaxed);
            if at >= vectors.len() {
                return Ok(());
            }
            index.add(at as u64, vectors.vector(at))?;
        }
    })?;
    Ok(index)
}

/// Searches each second of so many threads together.
pub(super) fn rate<T>(
    vectors: &Vectors,
    threads: usize,
    time: Duration,
    search: impl Fn(usize) -> Result<T> + Sync,
) -> Result<f64> {
    let (started, next) = (Instant::now(), AtomicUsize::new(0));
    in_threads(threads, || {
        while started.elapsed() < time {
            search(next.fetch_add(1, Ordering::Relaxed) % vectors.query_count())?;
        }
        Ok(())
    })?;
    Ok(next.load(Ordering::Relaxed) as f64 / started.elapsed().as_secs_f64())
}

/// Runs the same work in so many threads.
fn in_threads(count: usize, work: impl Fn() -> Result<()> + Sync) -> Result<()> {
    thread::scope(|scope| {
        let threads: Vec<_> = (0..count).map(|_| scope.spawn(&work)).collect();
        for thread in threads {
            thread.join().map_err(|_| anyhow!("a thread has panicked"))??;
        }
        Ok(())
    })
}
