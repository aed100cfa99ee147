//! Durable upserts on one node: every answer waits until the write is on disk.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use anyhow::Result;
use serde_json::json;
use tokio::task::block_in_place;

use super::data::Vectors;
use super::load::{self, Load};
use super::loaded::{create, point_text, upsert_request};
use super::report::{Report, Row};
use super::{Pace, machine};
use crate::client::Client;
use crate::cluster::Cluster;

const COLLECTION: &str = "upserts";
/// Clients at once.
const CLIENTS: [usize; 3] = [1, 8, 32];
/// Points in one request.
const BATCHES: [usize; 2] = [1, 100];
/// Vectors that the points go through in turn.
const VECTORS: usize = 1000;
/// How often the disk alone is measured.
const SYNC_ROUNDS: usize = 200;

/// How the points come.
#[derive(Clone, Copy)]
struct Shape {
    /// Points in a request.
    batch: usize,
    /// Requests in flight.
    clients: usize,
}

/// Measures upserts of single points and of batches.
///
/// # Errors
/// When the node fails.
pub(super) async fn run(vectors: &Vectors, pace: &Pace, report: &mut Report) -> Result<()> {
    let syncs = block_in_place(|| machine::sync_times(SYNC_ROUNDS))?;
    report.row(Row::new("disk: fdatasync of 4 KiB, one at a time", load::latency(&syncs)));
    report.raw("upsert", "fdatasync_latency_ms", load::latency_json(&syncs));

    let cluster = Cluster::of(1).start().await?;
    let client = cluster.client(0).clone();
    create(&client, COLLECTION, vectors.dimension()).await?;
    let texts = (0..vectors.len().min(VECTORS)).map(|at| serde_json::to_string(vectors.vector(at)));
    let texts = Arc::new(texts.collect::<Result<Vec<String>, _>>()?);
    let next_id = Arc::new(AtomicU64::new(0));
    for batch in BATCHES {
        for clients in CLIENTS {
            let shape = Shape { batch, clients };
            let load = measure(&client, &texts, &next_id, shape, pace.upsert).await?;
            let rate = load.rate() * batch as f64;
            let what = format!("durable upsert, {batch} points a request, {clients} clients");
            let measured = format!("{rate:.0} points/s, {}", load.latency());
            let note =
                format!("{} dimensions; Qdrant is not run here{}", vectors.dimension(), load.trouble());
            report.row(Row::new(what, measured).goal("≥ 1 × Qdrant `wait=true`").note(note));
            let mut numbers = load.to_json();
            numbers["points_per_second"] = json!(rate);
            report.raw("upsert", &format!("batch_{batch}_clients_{clients}"), numbers);
        }
    }
    cluster.finish()
}

/// Lets clients write new points, so many in each request.
async fn measure(
    client: &Client,
    texts: &Arc<Vec<String>>,
    next_id: &Arc<AtomicU64>,
    Shape { batch, clients }: Shape,
    time: Duration,
) -> Result<Load> {
    let http = load::clients(client, clients);
    let (texts, next_id) = (texts.clone(), next_id.clone());
    load::run(clients, time, move |client, _| {
        let first = next_id.fetch_add(batch as u64, Ordering::Relaxed);
        let text = |id: u64| &texts[id as usize % texts.len()];
        let points: Vec<String> = (first..first + batch as u64).map(|id| point_text(id, text(id))).collect();
        let (http, request) = (http.clone(), upsert_request(COLLECTION, &points));
        async move { load::succeed(&http[client], &request).await }
    })
    .await
}
