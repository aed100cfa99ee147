//! A steady load of searches for points that are there, each of which must find its own.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use anyhow::{Result, ensure};
use tokio::task::JoinHandle;

use crate::client::Client;
use crate::points::{Points, vector};
use crate::wait::say;

/// How long one search may take with all its repetitions.
const SEARCH_DEADLINE: Duration = Duration::from_secs(30);
/// How long one attempt may take before the searcher turns to the next node.
const ATTEMPT_TIMEOUT: Duration = Duration::from_secs(3);
/// The pause between two searches.
const PAUSE: Duration = Duration::from_millis(10);
/// How many hits are asked for.
const LIMIT: u64 = 5;

/// A searcher at work.
pub struct Searcher {
    stop: Arc<AtomicBool>,
    task: JoinHandle<Result<Vec<(Instant, Duration)>>>,
}

/// What it has done.
#[derive(Clone, Debug)]
pub struct Searched {
    /// When each search began and how long it took, in order.
    pub searches: Vec<(Instant, Duration)>,
}

impl Searcher {
    /// Starts one that looks for these points of a collection in turn, at one node after the other.
    pub fn start(client: &Client, collection: &str, ids: Vec<u64>) -> Searcher {
        let stop = Arc::new(AtomicBool::new(false));
        let client = client.clone().with_limits(SEARCH_DEADLINE, ATTEMPT_TIMEOUT);
        let (ended, collection) = (stop.clone(), collection.to_owned());
        let task = tokio::spawn(async move {
            let searched = search(&client, &collection, &ids, &ended).await;
            if let Err(error) = &searched {
                say(format!("the searcher stopped: {error:#}"));
            }
            searched
        });
        Searcher { stop, task }
    }

    /// Lets it finish its search, and says how it went.
    ///
    /// # Errors
    /// When a search failed for good, or did not find what is there.
    pub async fn stop(self) -> Result<Searched> {
        self.stop.store(true, Ordering::Release);
        let searches = self.task.await??;
        ensure!(!searches.is_empty(), "nothing was searched");
        Ok(Searched { searches })
    }
}

async fn search(
    client: &Client,
    collection: &str,
    ids: &[u64],
    stop: &AtomicBool,
) -> Result<Vec<(Instant, Duration)>> {
    let mut searches = Vec::new();
    for turn in 0.. {
        if stop.load(Ordering::Acquire) {
            break;
        }
        let id = ids[turn % ids.len()];
        let client = client.starting_at(turn);
        let began = Instant::now();
        let found = Points::of(&client, collection).search(&vector(id), LIMIT, None).await?;
        searches.push((began, began.elapsed()));
        let is_found = found.iter().any(|hit| hit["id"].as_u64() == Some(id));
        ensure!(is_found, "point {id} is there and was not found: {found:?}");
        tokio::time::sleep(PAUSE).await;
    }
    Ok(searches)
}

impl Searched {
    /// The median, the 99th percentile and the longest time of the searches that began in a span.
    pub fn times(&self, from: Instant, to: Instant) -> Option<[Duration; 3]> {
        let within = self.searches.iter().filter(|(began, _)| (from..to).contains(began));
        let mut times: Vec<Duration> = within.map(|(_, took)| *took).collect();
        times.sort_unstable();
        let at = |part| crate::percentile(&times, part);
        Some([at(0.5)?, at(0.99)?, *times.last()?])
    }
}
