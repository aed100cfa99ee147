//! A client that records what it asks and what comes of it.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use rand::rngs::StdRng;
use rand::{RngExt, SeedableRng};
use serde_json::{Value, json};
use shoal_proto::Position;
use shoal_tests::{Client, NotConnected, Reply, Request};
use uuid::Uuid;

use crate::cluster::{COLLECTION, DIMENSIONS};
use crate::history::{Answer, Call, Ending, Level, Outcome, Recorder, Way};

/// How long one attempt may take. The node is told to give up a little earlier.
const ATTEMPT_TIMEOUT: Duration = Duration::from_secs(3);
/// Seconds after which the node gives up.
const NODE_TIMEOUT_SECONDS: u64 = 2;
/// How long a client stays away from a node that has not answered well. Otherwise all clients
/// would wait on one node that is cut off, and nobody would see whether the others serve.
const AVOID: Duration = Duration::from_secs(3);
/// How often a client with retries tries.
const MAX_ATTEMPTS: u32 = 20;
/// The pause between two of its attempts.
const RETRY_PAUSE: Duration = Duration::from_millis(100);
/// How long one write may be repeated.
pub const LONGEST_RETRY: Duration = ATTEMPT_TIMEOUT.saturating_add(RETRY_PAUSE).saturating_mul(MAX_ATTEMPTS);
/// The status of what is refused before any shard has heard of it.
const BAD_REQUEST: u16 = 400;
/// Points in one page of a listing.
const PAGE: usize = 1000;

/// A logical process: it has one operation in flight.
pub struct Caller {
    clients: Vec<Client>,
    recorder: Arc<Recorder>,
    process: u64,
    /// What this process has seen, as nodes have told it.
    position: Position,
    /// Whether writes are repeated, with one idempotency key, until their outcome is known.
    retries: bool,
    coin: StdRng,
    written: u64,
    /// Until when each node is avoided.
    avoided: Vec<Instant>,
    /// The one node that this client asks, whatever comes of it.
    home: Option<usize>,
}

impl Caller {
    /// A client of these nodes.
    pub fn new(clients: &[Client], recorder: Arc<Recorder>, seed: u64) -> Caller {
        let limited = |client: &Client| client.clone().with_limits(ATTEMPT_TIMEOUT, ATTEMPT_TIMEOUT);
        Caller {
            avoided: vec![Instant::now(); clients.len()],
            home: None,
            clients: clients.iter().map(limited).collect(),
            process: recorder.new_process(),
            recorder,
            position: Position::default(),
            retries: false,
            coin: StdRng::seed_from_u64(seed),
            written: 0,
        }
    }

    /// The same client, which stays with one node: whoever is cut off or paused must be asked, or
    /// nobody would see that it answers what it must not.
    pub fn staying_at(mut self, node: usize) -> Caller {
        self.home = Some(node);
        self
    }

    /// The same client, which repeats writes until their outcome is known.
    pub fn with_retries(mut self) -> Caller {
        self.retries = true;
        self
    }

    /// Randomness of this client.
    pub fn coin(&mut self) -> &mut StdRng {
        &mut self.coin
    }

    /// How many nodes there are.
    pub fn nodes(&self) -> usize {
        self.clients.len()
    }

    /// A random node that answers, as far as this client knows.
    pub fn any_node(&mut self) -> usize {
        if let Some(home) = self.home {
            return home;
        }
        let now = Instant::now();
        let good: Vec<usize> = (0..self.nodes()).filter(|node| self.avoided[*node] <= now).collect();
        match good.len() {
            0 => self.coin.random_range(0..self.nodes()),
            count => good[self.coin.random_range(0..count)],
        }
    }

    /// A value that nobody has written before.
    pub fn new_uid(&mut self) -> String {
        self.written += 1;
        format!("{}-{}", self.process, self.written)
    }

    /// Asks a node and records it. None when the outcome is not ok.
    pub async fn call(&mut self, node: usize, call: Call) -> Option<Answer> {
        self.recorder.invoke(self.process, node, &call);
        let ending = match self.retries && call.is_write() {
            true => self.insist(node, &call).await,
            false => self.attempt(node, &call, None).await,
        };
        let (outcome, answer) = (ending.outcome, ending.answer.clone());
        if outcome == Outcome::Ok {
            for (shard, index) in &ending.positions {
                self.position.advance(shoal_proto::GroupId(*shard), *index);
            }
        }
        if ending.status.is_none_or(|status| status >= 500) {
            self.avoided[node] = Instant::now() + AVOID;
        }
        self.recorder.complete(self.process, ending);
        if outcome == Outcome::Unknown {
            // It may still be under way: whoever goes on is somebody else.
            self.process = self.recorder.new_process();
            self.position = Position::default();
        }
        answer.filter(|_| outcome == Outcome::Ok)
    }

    /// The same write again and again, under one key, until it is known what became of it.
    async fn insist(&mut self, node: usize, call: &Call) -> Ending {
        let key = Uuid::from_u128(self.coin.random()).to_string();
        let mut is_unknown = false;
        for attempt in 0..MAX_ATTEMPTS {
            let at = (node + attempt as usize) % self.clients.len();
            let mut ending = self.attempt(at, call, Some(&key)).await;
            match ending.outcome {
                Outcome::Ok => {
                    if is_unknown {
                        ending.answer = Some(Answer::Repeated);
                    }
                    return ending;
                }
                // An earlier attempt may have gone through.
                Outcome::Fail if !matches!(ending.status, None | Some(429 | 507)) => {
                    if is_unknown {
                        ending.outcome = Outcome::Unknown;
                    }
                    return ending;
                }
                Outcome::Fail => {}
                Outcome::Unknown => is_unknown = true,
            }
            tokio::time::sleep(RETRY_PAUSE).await;
        }
        let outcome = if is_unknown { Outcome::Unknown } else { Outcome::Fail };
        ending(outcome, None, "gave up")
    }

    async fn attempt(&mut self, node: usize, call: &Call, key: Option<&str>) -> Ending {
        if let Call::List { level } = call {
            return self.list(node, *level).await;
        }
        let mut request = self.request(call);
        if let Some(key) = key {
            request = request.header("idempotency-key", key);
        }
        match self.clients[node].once(&request).await {
            Ok(reply) => conclude(call, &reply),
            Err(error) => of_read(call, classify_error(&error)),
        }
    }

    /// Every point, page by page. Nothing else may be under way for it to be one moment.
    async fn list(&mut self, node: usize, level: Level) -> Ending {
        let mut points = Vec::new();
        let mut positions = BTreeMap::new();
        let mut offset = Value::Null;
        loop {
            let request = self.at_level(page_at(&offset), level);
            let reply = match self.clients[node].once(&request).await {
                Ok(reply) if reply.is_success() => reply,
                Ok(reply) => return ending(Outcome::Fail, Some(reply.status), &reply.text()),
                Err(error) => return ending(Outcome::Fail, None, &format!("{error:#}")),
            };
            let page = match read_page(&reply) {
                Ok(page) => page,
                Err(error) => return ending(Outcome::Unknown, Some(reply.status), &format!("{error:#}")),
            };
            points.extend(page.0);
            offset = page.1;
            positions.extend(positions_of(&reply));
            if offset.is_null() {
                let answer = Some(Answer::Listing { points });
                return Ending { outcome: Outcome::Ok, status: Some(200), answer, positions, error: None };
            }
        }
    }

    fn request(&mut self, call: &Call) -> Request {
        match call {
            Call::Write { key, uid } => {
                Request::put(path("/points?wait=true"), &json!({"points": [point(*key, uid)]}))
            }
            Call::Batch { keys, uid } => {
                let points: Vec<Value> = keys.iter().map(|key| point(*key, uid)).collect();
                Request::put(path("/points?wait=true"), &json!({"points": points}))
            }
            Call::Delete { key } => {
                Request::post(path("/points/delete?wait=true"), &json!({"points": [key]}))
            }
            // By id in two ways: one of them tells the version.
            Call::Read { key, level } if self.coin.random_bool(0.5) => {
                self.at_level(Request::ask(path("/points"), &json!({"ids": [key]})), *level)
            }
            Call::Read { key, level } => {
                let body = json!({"filter": {"must": [{"has_id": [key]}]}, "limit": 1, "with_payload": true});
                self.at_level(Request::ask(path("/points/query"), &body), *level)
            }
            Call::Find { key, uid, way, level } => {
                let (path, body) = match way {
                    Way::Id => (path("/points"), json!({"ids": [key]})),
                    Way::Exact | Way::Graph => {
                        let exact = *way == Way::Exact;
                        let params = json!({"exact": exact});
                        let query =
                            json!({"query": vector(uid), "limit": 1, "with_payload": true, "params": params});
                        (path("/points/query"), query)
                    }
                    Way::Filter => {
                        let filter = json!({"must": [{"key": "uid", "match": {"value": uid}}]});
                        (path("/points/scroll"), json!({"filter": filter, "limit": 2}))
                    }
                };
                self.at_level(Request::ask(path, &body), *level)
            }
            Call::List { .. } => unreachable!("listings have pages"),
        }
    }

    fn at_level(&self, request: Request, level: Level) -> Request {
        let request = request.header("x-shoal-consistency", level.name());
        match level {
            Level::Session if !self.position.is_empty() => {
                request.header("x-shoal-position", &self.position.to_string())
            }
            _ => request,
        }
    }
}

fn path(of: &str) -> String {
    let separator = if of.contains('?') { '&' } else { '?' };
    format!("/collections/{COLLECTION}{of}{separator}timeout={NODE_TIMEOUT_SECONDS}")
}

fn point(key: u64, uid: &str) -> Value {
    json!({"id": key, "vector": vector(uid), "payload": {"uid": uid}})
}

/// A direction that only this value has: its nearest neighbour is itself.
pub fn vector(uid: &str) -> Vec<f32> {
    let mut coin = StdRng::from_seed(*blake3::hash(uid.as_bytes()).as_bytes());
    (0..DIMENSIONS).map(|_| coin.random_range(-1.0f32..1.0)).collect()
}

fn ending(outcome: Outcome, status: Option<u16>, error: &str) -> Ending {
    Ending { outcome, status, answer: None, positions: BTreeMap::new(), error: Some(error.to_owned()) }
}

/// An error without an answer: nothing was sent, or nobody knows.
fn classify_error(error: &anyhow::Error) -> Ending {
    let outcome = match error.downcast_ref::<NotConnected>() {
        Some(_) => Outcome::Fail,
        None => Outcome::Unknown,
    };
    ending(outcome, None, &format!("{error:#}"))
}

/// A read without an answer has not happened: it changes nothing, now or later.
fn of_read(call: &Call, ending: Ending) -> Ending {
    match (call.is_write(), ending.outcome) {
        (false, Outcome::Unknown) => Ending { outcome: Outcome::Fail, ..ending },
        _ => ending,
    }
}

/// What an answer proves.
fn classify_status(status: u16) -> Outcome {
    match status {
        200..=299 => Outcome::Ok,
        // Refused before anything was proposed.
        400..=499 | 507 => Outcome::Fail,
        _ => Outcome::Unknown,
    }
}

fn conclude(call: &Call, reply: &Reply) -> Ending {
    let outcome = match (call, classify_status(reply.status)) {
        // One shard may have refused what another one has done.
        (Call::Batch { .. }, Outcome::Fail) if reply.status != BAD_REQUEST => Outcome::Unknown,
        (_, outcome) => outcome,
    };
    if outcome != Outcome::Ok {
        return of_read(call, ending(outcome, Some(reply.status), &reply.text()));
    }
    match read_answer(call, reply) {
        Ok(answer) => Ending {
            outcome,
            status: Some(reply.status),
            answer: Some(answer),
            positions: positions_of(reply),
            error: None,
        },
        Err(error) => ending(Outcome::Unknown, Some(reply.status), &format!("{error:#}")),
    }
}

fn read_answer(call: &Call, reply: &Reply) -> Result<Answer> {
    if call.is_write() {
        return Ok(Answer::Done);
    }
    let body = reply.json()?;
    let result = &body["result"];
    let points = [&result["points"], result].into_iter().find_map(Value::as_array).context("no points")?;
    let wanted = match call {
        Call::Find { uid, way: Way::Filter, .. } => {
            points.iter().find(|point| point["payload"]["uid"] == **uid)
        }
        _ => points.first(),
    };
    let uid = wanted.map(|point| point["payload"]["uid"].as_str().context("a point without uid"));
    let version = wanted.and_then(|point| point["version"].as_u64());
    Ok(Answer::Value { uid: uid.transpose()?.map(str::to_owned), version })
}

/// Asks for the points of a listing from an offset on.
pub(crate) fn page_at(offset: &Value) -> Request {
    let mut body = json!({"limit": PAGE, "with_payload": true});
    if !offset.is_null() {
        body["offset"] = offset.clone();
    }
    Request::ask(path("/points/scroll"), &body)
}

/// The points of a page, and the offset of the next one, which is null after the last.
pub(crate) fn read_page(reply: &Reply) -> Result<(Vec<(u64, String)>, Value)> {
    let body = reply.json()?;
    let points = body["result"]["points"].as_array().context("no points")?;
    let mut page = Vec::new();
    for point in points {
        match (point["id"].as_u64(), point["payload"]["uid"].as_str()) {
            (Some(id), Some(uid)) => page.push((id, uid.to_owned())),
            _ => bail!("a point without id or uid: {point}"),
        }
    }
    Ok((page, body["result"]["next_page_offset"].clone()))
}

fn positions_of(reply: &Reply) -> BTreeMap<u64, u64> {
    let position = reply.header("x-shoal-position").and_then(|token| token.parse::<Position>().ok());
    position.iter().flat_map(Position::iter).map(|(group, index)| (group.0, index)).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_refusals_prove_that_nothing_happened() {
        let outcomes = [200, 400, 404, 429, 507, 500, 502, 503, 504].map(classify_status);
        let (ok, fail, unknown) = (Outcome::Ok, Outcome::Fail, Outcome::Unknown);
        assert_eq!(outcomes, [ok, fail, fail, fail, fail, unknown, unknown, unknown, unknown]);
        let error = anyhow::anyhow!("reset by peer").context("PUT /points");
        assert_eq!(classify_error(&error).outcome, Outcome::Unknown);
    }

    #[test]
    fn vectors_differ() {
        let cosine = |a: &[f32], b: &[f32]| -> f32 {
            let dot = |a: &[f32], b: &[f32]| a.iter().zip(b).map(|(a, b)| a * b).sum::<f32>();
            dot(a, b) / (dot(a, a) * dot(b, b)).sqrt()
        };
        assert!(cosine(&vector("1-1"), &vector("1-1")) > 0.9999);
        assert!(cosine(&vector("1-1"), &vector("1-2")) < 0.9);
    }
}
