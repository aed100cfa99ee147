//! Points over the Qdrant surface, in the few shapes that the tests need.

use std::collections::BTreeMap;

use anyhow::{Context, Result};
use serde_json::{Value, json};

use crate::client::{Client, Request};
use crate::http::Reply;

/// Dimensions of the vectors of [`point`].
pub const DIMENSIONS: usize = 4;

/// Points that one page of a scroll brings.
const PAGE: u64 = 1000;

/// How fresh a read must be.
#[derive(Clone, Debug, Default)]
pub enum Freshness {
    /// Whatever the node's default is: linearizable.
    #[default]
    Default,
    /// Sees every write acknowledged before it.
    Linearizable,
    /// Sees what this position has seen.
    Session(String),
    /// Whatever the replica has.
    Eventual,
}

impl Freshness {
    /// Adds its headers to a request.
    pub fn of(&self, request: Request) -> Request {
        match self {
            Freshness::Default => request,
            Freshness::Linearizable => request.header("x-shoal-consistency", "linearizable"),
            Freshness::Eventual => request.header("x-shoal-consistency", "eventual"),
            Freshness::Session(position) => {
                request.header("x-shoal-consistency", "session").header("x-shoal-position", position)
            }
        }
    }
}

/// A vector that only this id has: its direction is a hash of the id. Every coordinate is exact
/// in f32.
pub fn vector(id: u64) -> Vec<f64> {
    let hash = blake3::hash(&id.to_be_bytes());
    let coordinate =
        |bytes: &[u8]| (f64::from(u16::from_be_bytes([bytes[0], bytes[1]])) - 32_767.5) / 32_768.0;
    hash.as_bytes().chunks_exact(2).take(DIMENSIONS).map(coordinate).collect()
}

/// A point with the vector of its id.
pub fn point(id: u64, payload: Value) -> Value {
    json!({"id": id, "vector": vector(id), "payload": payload})
}

/// The points of one collection, through one client.
#[derive(Clone)]
pub struct Points<'a> {
    client: &'a Client,
    collection: &'a str,
    freshness: Freshness,
}

impl<'a> Points<'a> {
    /// The points of a collection.
    pub fn of(client: &'a Client, collection: &'a str) -> Points<'a> {
        Points { client, collection, freshness: Freshness::Default }
    }

    /// The same with reads that are this fresh.
    pub fn at(self, freshness: Freshness) -> Points<'a> {
        Points { freshness, ..self }
    }

    fn path(&self, rest: &str) -> String {
        format!("/collections/{}{rest}", self.collection)
    }

    async fn ask(&self, rest: &str, body: &Value) -> Result<Value> {
        let request = self.freshness.of(Request::ask(self.path(rest), body));
        let mut answer = self.client.json(&request).await?;
        Ok(answer["result"].take())
    }

    /// Creates the collection.
    ///
    /// # Errors
    /// When it is refused.
    pub async fn create(&self, shards: u32, replicas: u32) -> Result<Reply> {
        let vectors = json!({"size": DIMENSIONS, "distance": "Cosine"});
        let body = json!({"vectors": vectors, "shard_number": shards, "replication_factor": replicas});
        self.client.succeed(&Request::put(self.path(""), &body)).await
    }

    /// The request that writes points, for a test that sends it in its own way.
    pub fn upsert_request(&self, points: &[Value]) -> Request {
        Request::put(self.path("/points?wait=true"), &json!({"points": points}))
    }

    /// Writes points.
    ///
    /// # Errors
    /// When they are refused, or not acknowledged in time.
    pub async fn upsert(&self, points: &[Value]) -> Result<Reply> {
        self.client.succeed(&self.upsert_request(points)).await
    }

    /// Deletes points.
    ///
    /// # Errors
    /// When that is refused, or not acknowledged in time.
    pub async fn delete(&self, ids: &[u64]) -> Result<Reply> {
        let path = self.path("/points/delete?wait=true");
        self.client.succeed(&Request::post(path, &json!({"points": ids}))).await
    }

    /// The payloads of those points that exist.
    ///
    /// # Errors
    /// When the read is refused, or not answered in time.
    pub async fn get(&self, ids: &[u64]) -> Result<BTreeMap<u64, Value>> {
        let body = json!({"ids": ids, "with_payload": true, "with_vector": false});
        let found = self.ask("/points", &body).await?;
        let found = found.as_array().context("the points are not an array")?;
        let entry = |point: &Value| Some((point["id"].as_u64()?, point["payload"].clone()));
        found.iter().map(|point| entry(point).with_context(|| format!("no number as id: {point}"))).collect()
    }

    /// The points by id with their vectors, as the answer has them.
    ///
    /// # Errors
    /// When the read is refused, or not answered in time.
    pub async fn get_whole(&self, ids: &[Value]) -> Result<Vec<Value>> {
        let body = json!({"ids": ids, "with_payload": true, "with_vector": true});
        let found = self.ask("/points", &body).await?;
        Ok(found.as_array().context("the points are not an array")?.clone())
    }

    /// All points with their payloads, in the order they come, page after page.
    ///
    /// # Errors
    /// When a page is refused, or not answered in time.
    pub async fn scroll(&self) -> Result<Vec<Value>> {
        let mut all = Vec::new();
        let mut body = json!({"limit": PAGE, "with_payload": true, "with_vector": false});
        loop {
            let mut page = self.ask("/points/scroll", &body).await?;
            let points = page["points"].as_array_mut().context("a page has no points")?;
            all.append(points);
            match page["next_page_offset"].take() {
                Value::Null => return Ok(all),
                next => body["offset"] = next,
            }
        }
    }

    /// How many points a filter keeps; all without one.
    ///
    /// # Errors
    /// When the read is refused, or not answered in time.
    pub async fn count(&self, filter: Option<Value>) -> Result<u64> {
        let mut body = json!({"exact": true});
        if let Some(filter) = filter {
            body["filter"] = filter;
        }
        let answer = self.ask("/points/count", &body).await?;
        answer["count"].as_u64().with_context(|| format!("no count: {answer}"))
    }

    /// The nearest points to a vector, best first, with payload and score.
    ///
    /// # Errors
    /// When the search is refused, or not answered in time.
    pub async fn search(&self, query: &[f64], limit: u64, filter: Option<Value>) -> Result<Vec<Value>> {
        let mut body = json!({"query": query, "limit": limit, "with_payload": true});
        if let Some(filter) = filter {
            body["filter"] = filter;
        }
        let answer = self.ask("/points/query", &body).await?;
        Ok(answer["points"].as_array().with_context(|| format!("no points: {answer}"))?.clone())
    }
}
