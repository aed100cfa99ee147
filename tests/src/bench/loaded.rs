//! One node with all vectors in one collection, and the requests that it is measured with.

use std::ops::Range;
use std::time::{Duration, Instant};

use anyhow::{Context, Result};
use futures::{StreamExt, TryStreamExt, future, stream};
use serde_json::{Value, json};

use super::data::{TOP, Vectors};
use super::process;
use crate::client::{Client, Request};
use crate::cluster::Cluster;
use crate::node::Node;
use crate::wait::wait_until;

/// The collection with the vectors.
pub(super) const COLLECTION: &str = "bench";
/// Points in one upsert while loading, and upserts in flight.
const BATCH: usize = 256;
const CONCURRENCY: usize = 4;
/// The values of `bucket` lie below this, evenly, so that `bucket < n` keeps n % of the points.
pub(super) const BUCKETS: usize = 100;
/// With fewer vectors than this outside the graph, a search is a search of the graph.
const MAX_PENDING: u64 = 512;
/// How long the graph may take after the last upsert.
const INDEX_DEADLINE: Duration = Duration::from_secs(240);

/// The node.
pub(super) struct Loaded {
    cluster: Cluster,
    /// Resident memory before the first point, in bytes.
    baseline_bytes: u64,
    load_time: Duration,
    index_time: Duration,
    pending: u64,
}

impl Loaded {
    /// Starts a node, writes all vectors and waits until its graph has them.
    ///
    /// # Errors
    /// When a write fails or the graph is not done in time.
    pub(super) async fn start(vectors: &Vectors) -> Result<Loaded> {
        let cluster = Cluster::of(1).start().await?;
        let client = cluster.client(0);
        create(client, COLLECTION, vectors.dimension()).await?;
        let index = json!({"field_name": "bucket", "field_schema": "integer"});
        client.succeed(&Request::put(format!("/collections/{COLLECTION}/index?wait=true"), &index)).await?;
        let baseline_bytes = process::memory_bytes(cluster.node(0), "VmRSS")?;

        let started = Instant::now();
        fill(client, COLLECTION, vectors, vectors.len()).await?;
        let load_time = started.elapsed();

        let started = Instant::now();
        let pending = wait_until(INDEX_DEADLINE, "the graph to have all vectors", || async {
            let answer = client.json(&Request::get(format!("/collections/{COLLECTION}"))).await?;
            let pending = &answer["result"]["shoal"]["pending_vectors"];
            let pending = pending.as_u64().with_context(|| format!("no pending_vectors: {answer}"))?;
            Ok((pending < MAX_PENDING).then_some(pending))
        })
        .await?;
        Ok(Loaded { cluster, baseline_bytes, load_time, index_time: started.elapsed(), pending })
    }

    /// The node.
    pub(super) fn node(&self) -> &Node {
        self.cluster.node(0)
    }

    /// The node, to be stopped and started.
    pub(super) fn node_mut(&mut self) -> &mut Node {
        self.cluster.node_mut(0)
    }

    /// A client of the node.
    pub(super) fn client(&self) -> &Client {
        self.cluster.client(0)
    }

    /// Resident memory before the first point, in bytes.
    pub(super) fn baseline_bytes(&self) -> u64 {
        self.baseline_bytes
    }

    /// How long writing took, and how much longer the graph took.
    pub(super) fn times(&self) -> (Duration, Duration) {
        (self.load_time, self.index_time)
    }

    /// Vectors that were outside the graph when the wait for it ended.
    pub(super) fn pending(&self) -> u64 {
        self.pending
    }

    /// Ends the node.
    ///
    /// # Errors
    /// When it has panicked.
    pub(super) fn finish(self) -> Result<()> {
        self.cluster.finish()
    }
}

/// Creates a collection with one shard and one replica.
///
/// # Errors
/// When it is refused.
pub(super) async fn create(client: &Client, collection: &str, dimension: usize) -> Result<()> {
    let vectors = json!({"size": dimension, "distance": "Cosine"});
    let body = json!({"vectors": vectors, "shard_number": 1, "replication_factor": 1});
    client.succeed(&Request::put(format!("/collections/{collection}"), &body)).await?;
    Ok(())
}

/// A point as JSON. Numbers keep the shortest form that is exact in f32, as clients send them.
pub(super) fn point_text(id: u64, vector: &str) -> String {
    let (bucket, word) = (id % BUCKETS as u64, id % 7);
    format!(r#"{{"id":{id},"vector":{vector},"payload":{{"bucket":{bucket},"word":"word-{word}"}}}}"#)
}

/// The request that writes points durably.
pub(super) fn upsert_request(collection: &str, points: &[String]) -> Request {
    let body = format!(r#"{{"points":[{}]}}"#, points.join(","));
    let path = format!("/collections/{collection}/points?wait=true");
    Request::raw("PUT", path, "application/json", body.into_bytes())
}

/// Writes the first `count` vectors.
///
/// # Errors
/// When a write fails.
pub(super) async fn fill(client: &Client, collection: &str, vectors: &Vectors, count: usize) -> Result<()> {
    let upsert = |first: usize| async move {
        let end = (first + BATCH).min(count);
        client.succeed(&batch(collection, vectors, first..end)?).await
    };
    stream::iter((0..count).step_by(BATCH))
        .map(upsert)
        .buffer_unordered(CONCURRENCY)
        .try_for_each(|_| future::ready(Ok(())))
        .await
}

fn batch(collection: &str, vectors: &Vectors, ids: Range<usize>) -> Result<Request> {
    let point = |at: usize| {
        let vector = serde_json::to_string(vectors.vector(at))?;
        anyhow::Ok(point_text(at as u64, &vector))
    };
    let points = ids.map(point).collect::<Result<Vec<String>>>()?;
    Ok(upsert_request(collection, &points))
}

/// A search for each query, with a filter or without.
///
/// # Errors
/// When a vector has no JSON form.
pub(super) fn search_requests(
    collection: &str,
    vectors: &Vectors,
    filter: Option<&Value>,
) -> Result<Vec<Request>> {
    let filter = filter.map(|filter| format!(r#","filter":{filter}"#)).unwrap_or_default();
    let request = |at: usize| {
        let query = serde_json::to_string(vectors.query(at))?;
        let body = format!(r#"{{"query":{query},"limit":{TOP}{filter}}}"#);
        let path = format!("/collections/{collection}/points/query");
        anyhow::Ok(Request::raw("POST", path, "application/json", body.into_bytes()))
    };
    (0..vectors.query_count()).map(request).collect()
}

/// The ids in the answer to a search, best first.
///
/// # Errors
/// When it is no such answer.
pub(super) fn found_ids(answer: &Value) -> Result<Vec<u64>> {
    let points = answer["result"]["points"].as_array();
    let points = points.with_context(|| format!("no points: {answer}"))?;
    let id = |point: &Value| point["id"].as_u64().with_context(|| format!("no number as id: {point}"));
    points.iter().map(id).collect()
}
