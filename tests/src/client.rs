//! The client: requests with a deadline, repeated while that is safe.

use std::fmt;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use anyhow::{Result, anyhow, bail, ensure};
use serde_json::Value;
use uuid::Uuid;

use crate::http::{Connection, Reply};

/// How long a request may take with all its repetitions, unless the client says otherwise.
const DEADLINE: Duration = Duration::from_secs(30);
/// How long one attempt may take, unless the client says otherwise. Longer than the node's own
/// deadline of 10 s, so that its 503 or 504 is seen.
const ATTEMPT_TIMEOUT: Duration = Duration::from_secs(15);
/// The pause before a request is repeated. `Retry-After` counts whole seconds and would hide how
/// long a gap really was.
const RETRY_PAUSE: Duration = Duration::from_millis(20);

/// Pieces of a request that is sent slowly.
const TRICKLE_PIECES: usize = 20;

/// One request.
#[derive(Clone, Debug)]
pub struct Request {
    method: &'static str,
    path: String,
    headers: Vec<(String, String)>,
    body: Option<(String, Vec<u8>)>,
    is_write: bool,
}

impl Request {
    /// A GET.
    pub fn get(path: impl Into<String>) -> Request {
        Request { method: "GET", path: path.into(), headers: Vec::new(), body: None, is_write: false }
    }

    /// A POST that only asks: a search, a scroll, a count.
    pub fn ask(path: impl Into<String>, body: &Value) -> Request {
        Request { is_write: false, ..Request::post(path, body) }
    }

    /// A POST that changes something.
    pub fn post(path: impl Into<String>, body: &Value) -> Request {
        Request::raw("POST", path, "application/json", body.to_string().into_bytes())
    }

    /// A PUT.
    pub fn put(path: impl Into<String>, body: &Value) -> Request {
        Request::raw("PUT", path, "application/json", body.to_string().into_bytes())
    }

    /// A DELETE.
    pub fn delete(path: impl Into<String>) -> Request {
        Request { method: "DELETE", is_write: true, ..Request::get(path) }
    }

    /// A request that changes something, with any body.
    pub fn raw(method: &'static str, path: impl Into<String>, content_type: &str, body: Vec<u8>) -> Request {
        let body = Some((content_type.to_owned(), body));
        Request { method, path: path.into(), headers: Vec::new(), body, is_write: true }
    }

    /// The same request with one more header.
    pub fn header(mut self, name: &str, value: &str) -> Request {
        self.headers.push((name.to_owned(), value.to_owned()));
        self
    }

    fn to_bytes(&self, address: &str, api_key: Option<&str>, idempotency_key: Option<&str>) -> Vec<u8> {
        let mut head = format!("{} {} HTTP/1.1\r\nhost: {address}\r\n", self.method, self.path);
        let mut add = |name: &str, value: &str| head.push_str(&format!("{name}: {value}\r\n"));
        self.headers.iter().for_each(|(name, value)| add(name, value));
        api_key.into_iter().for_each(|key| add("api-key", key));
        idempotency_key.into_iter().for_each(|key| add("idempotency-key", key));
        if let Some((content_type, body)) = &self.body {
            add("content-type", content_type);
            add("content-length", &body.len().to_string());
        }
        head.push_str("\r\n");
        let mut bytes = head.into_bytes();
        if let Some((_, body)) = &self.body {
            bytes.extend_from_slice(body);
        }
        bytes
    }
}

/// Method and path; in the alternate form also the beginning of the body.
impl fmt::Display for Request {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} {}", self.method, self.path)?;
        match &self.body {
            Some((_, body)) if f.alternate() => {
                let text: String = String::from_utf8_lossy(body).chars().take(200).collect();
                write!(f, " {text}")
            }
            _ => Ok(()),
        }
    }
}

/// A client of one node, or of several that it goes through in turn when one does not answer.
/// Clones share connections and turn.
#[derive(Clone)]
pub struct Client {
    addresses: Vec<String>,
    api_key: Option<String>,
    deadline: Duration,
    attempt_timeout: Duration,
    shared: Arc<Shared>,
}

#[derive(Default)]
struct Shared {
    turn: AtomicUsize,
    idle: Mutex<Vec<(usize, Connection)>>,
}

impl Client {
    /// A client of the nodes at these addresses (`host:port`).
    pub fn new(addresses: Vec<String>, api_key: Option<&str>) -> Client {
        assert!(!addresses.is_empty(), "a client needs an address");
        Client {
            addresses,
            api_key: api_key.map(str::to_owned),
            deadline: DEADLINE,
            attempt_timeout: ATTEMPT_TIMEOUT,
            shared: Arc::default(),
        }
    }

    /// A client of the same nodes that shares nothing with this one and begins at another node.
    pub fn starting_at(&self, turn: usize) -> Client {
        let shared = Shared { turn: AtomicUsize::new(turn), idle: Mutex::default() };
        Client { shared: Arc::new(shared), ..self.clone() }
    }

    /// The same client with other limits: for all attempts together, and for one.
    pub fn with_limits(self, deadline: Duration, attempt_timeout: Duration) -> Client {
        Client { deadline, attempt_timeout, ..self }
    }

    /// The same client with another API key.
    pub fn with_key(&self, api_key: Option<&str>) -> Client {
        Client { api_key: api_key.map(str::to_owned), ..self.clone() }
    }

    /// Sends a request once, to one node.
    ///
    /// # Errors
    /// When no whole answer came. The request may have been carried out.
    pub async fn once(&self, request: &Request) -> Result<Reply> {
        self.attempt(request, None, self.attempt_timeout).await
    }

    /// Sends a request once, to one node, evenly over so long a time, as from behind a slow line.
    ///
    /// # Errors
    /// When no whole answer came. The request may have been carried out.
    pub async fn trickle(&self, request: &Request, over: Duration) -> Result<Reply> {
        let address = &self.addresses[self.shared.turn.load(Ordering::Relaxed) % self.addresses.len()];
        let bytes = request.to_bytes(address, self.api_key.as_deref(), None);
        let mut connection = Connection::open(address).await?;
        let sent = connection.trickle(&bytes, TRICKLE_PIECES, over / TRICKLE_PIECES as u32);
        tokio::time::timeout(over + self.attempt_timeout, sent).await?
    }

    /// Sends a request until there is an answer other than 429, 503 and 504. A request that
    /// changes something carries one `Idempotency-Key` through all its attempts, which is what
    /// makes repeating it safe.
    ///
    /// # Errors
    /// When the deadline has passed. The request may have been carried out.
    pub async fn send(&self, request: &Request) -> Result<Reply> {
        let key = request.is_write.then(|| Uuid::new_v4().to_string());
        let end = Instant::now() + self.deadline;
        loop {
            let left = end.saturating_duration_since(Instant::now());
            let limit = self.attempt_timeout.min(left);
            let reason = match self.attempt(request, key.as_deref(), limit).await {
                Ok(reply) if !matches!(reply.status, 429 | 503 | 504) => return Ok(reply),
                Ok(reply) => anyhow!("{request}: {} {}", reply.status, reply.text()),
                Err(error) => error,
            };
            if Instant::now() + RETRY_PAUSE >= end {
                return Err(reason.context(format!("gave up after {:?}", self.deadline)));
            }
            self.shared.turn.fetch_add(1, Ordering::Relaxed);
            tokio::time::sleep(RETRY_PAUSE).await;
        }
    }

    /// Sends as [`Client::send`] does and takes nothing but success.
    ///
    /// # Errors
    /// When the answer is not 2xx, or none came.
    pub async fn succeed(&self, request: &Request) -> Result<Reply> {
        let reply = self.send(request).await?;
        ensure!(reply.is_success(), "{request}: {} {}", reply.status, reply.text());
        Ok(reply)
    }

    /// Sends as [`Client::succeed`] does and reads the answer as JSON.
    ///
    /// # Errors
    /// When the answer is not 2xx, is not JSON, or none came.
    pub async fn json(&self, request: &Request) -> Result<Value> {
        self.succeed(request).await?.json()
    }

    /// The sum of a metric over all its labels; zero when it is not there yet.
    ///
    /// # Errors
    /// When `/metrics` does not answer.
    pub async fn metric(&self, name: &str) -> Result<f64> {
        self.metric_with(name, "").await
    }

    /// The sum of a metric over its samples with one label, as in `outcome="ok"`; zero when there are none.
    ///
    /// # Errors
    /// When `/metrics` does not answer.
    pub async fn metric_with(&self, name: &str, label: &str) -> Result<f64> {
        let page = self.succeed(&Request::get("/metrics")).await?.text();
        Ok(page.lines().filter(|line| line.contains(label)).filter_map(|line| sample(line, name)).sum())
    }

    async fn attempt(&self, request: &Request, key: Option<&str>, limit: Duration) -> Result<Reply> {
        let turn = self.shared.turn.load(Ordering::Relaxed) % self.addresses.len();
        let address = &self.addresses[turn];
        match tokio::time::timeout(limit, self.exchange(turn, request, key)).await {
            Ok(Ok(reply)) => Ok(reply),
            Ok(Err(error)) => Err(error.context(format!("{request} at {address}"))),
            Err(_) => bail!("{request} at {address}: no answer within {limit:?}"),
        }
    }

    async fn exchange(&self, turn: usize, request: &Request, key: Option<&str>) -> Result<Reply> {
        let address = &self.addresses[turn];
        let mut connection = match self.take_idle(turn) {
            Some(connection) => connection,
            None => Connection::open(address).await?,
        };
        let bytes = request.to_bytes(address, self.api_key.as_deref(), key);
        let (reply, reusable) = connection.exchange(&bytes).await?;
        if reusable {
            self.shared.idle.lock().expect("nothing panics while it holds the lock").push((turn, connection));
        }
        Ok(reply)
    }

    fn take_idle(&self, turn: usize) -> Option<Connection> {
        let mut idle = self.shared.idle.lock().expect("nothing panics while it holds the lock");
        loop {
            let found = idle.iter().position(|(of, _)| *of == turn)?;
            let (_, connection) = idle.swap_remove(found);
            if connection.is_idle() {
                return Some(connection);
            }
        }
    }
}

/// The value of a line of the metrics page, when it is of that metric.
fn sample(line: &str, name: &str) -> Option<f64> {
    let rest = line.strip_prefix(name).filter(|rest| rest.starts_with(['{', ' ']))?;
    rest.rsplit(' ').next()?.parse().ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_metric_is_read_with_and_without_labels() {
        assert_eq!(sample("a_total 3", "a_total"), Some(3.0));
        assert_eq!(sample("a_total{group=\"1\"} 2.5", "a_total"), Some(2.5));
        assert_eq!(sample("a_total_more 3", "a_total"), None);
        assert_eq!(sample("# HELP a_total words", "a_total"), None);
    }
}
