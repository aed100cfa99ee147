//! A provider of embeddings in this process, as an OpenAI-compatible server is one: for tests of remote
//! models, and for tests of documents that need no real one. Its vectors count words, so that texts with the
//! same words are near each other.

use std::net::SocketAddr;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};

use anyhow::{Result, anyhow};
use axum::extract::State;
use axum::http::{HeaderMap, StatusCode};
use axum::response::{IntoResponse, Response};
use axum::{Json, Router, routing::post};
use serde_json::{Value, json};
use tokio::net::TcpListener;
use tokio::task::JoinHandle;

/// Dimensions of its vectors.
pub const DIMENSIONS: usize = 512;
/// The name of its model.
pub const MODEL: &str = "bag";
/// The key that it asks for.
const KEY: &str = "key-of-the-provider";

/// What it does with requests.
#[derive(Clone, Copy, Debug)]
pub enum Mood {
    /// It answers them.
    Answers,
    /// It refuses them with this status.
    Refuses(u16),
    /// It takes them and never answers.
    Hangs,
}

/// A provider. It stops when it is dropped.
pub struct Provider {
    address: SocketAddr,
    shared: Arc<Shared>,
    serving: JoinHandle<()>,
}

struct Shared {
    mood: Mutex<Mood>,
    requests: AtomicUsize,
    /// Characters of the longest text that it was sent.
    longest: AtomicUsize,
}

impl Provider {
    /// A provider that answers.
    ///
    /// # Errors
    /// When no port is free.
    pub async fn start() -> Result<Provider> {
        let shared = Arc::new(Shared {
            mood: Mutex::new(Mood::Answers),
            requests: AtomicUsize::new(0),
            longest: AtomicUsize::new(0),
        });
        let listener = TcpListener::bind("127.0.0.1:0").await?;
        let address = listener.local_addr()?;
        let routes = Router::new().route("/v1/embeddings", post(embed)).with_state(shared.clone());
        // It serves until it is aborted.
        let serving = tokio::spawn(async move { drop(axum::serve(listener, routes).await) });
        Ok(Provider { address, shared, serving })
    }

    /// Settings of a node whose stores use its model, which that node takes to have so many dimensions. What
    /// is appended to them belongs to the model, up to the next table.
    pub fn settings(&self, dimensions: usize) -> String {
        format!(
            "default_model = \"{MODEL}\"\n[[http_models]]\nname = \"{MODEL}\"\nbase_url = \"http://{}/v1\"\n\
             api_key = \"{KEY}\"\ndimension = {dimensions}\n",
            self.address
        )
    }

    /// Changes what it does from now on.
    pub fn feel(&self, mood: Mood) {
        *self.shared.mood.lock().expect("nothing panics while it holds the lock") = mood;
    }

    /// Requests that it has had.
    pub fn requests(&self) -> usize {
        self.shared.requests.load(Ordering::SeqCst)
    }

    /// Characters of the longest text that it was sent.
    pub fn longest(&self) -> usize {
        self.shared.longest.load(Ordering::SeqCst)
    }
}

impl Drop for Provider {
    fn drop(&mut self) {
        self.serving.abort();
    }
}

async fn embed(State(shared): State<Arc<Shared>>, headers: HeaderMap, Json(body): Json<Value>) -> Response {
    shared.requests.fetch_add(1, Ordering::SeqCst);
    let mood = *shared.mood.lock().expect("nothing panics while it holds the lock");
    match mood {
        Mood::Answers => {}
        Mood::Refuses(status) => {
            let status = StatusCode::from_u16(status).unwrap_or(StatusCode::INTERNAL_SERVER_ERROR);
            return (status, "told to refuse").into_response();
        }
        Mood::Hangs => std::future::pending().await,
    }
    if headers.get("authorization").is_none_or(|key| *key != format!("Bearer {KEY}")) {
        return (StatusCode::UNAUTHORIZED, "another key").into_response();
    }
    match answer(&shared, &body) {
        Ok(answer) => Json(answer).into_response(),
        Err(error) => (StatusCode::BAD_REQUEST, error.to_string()).into_response(),
    }
}

fn answer(shared: &Shared, body: &Value) -> Result<Value> {
    let texts = body["input"].as_array().ok_or_else(|| anyhow!("no texts"))?;
    let mut data = Vec::new();
    for (index, text) in texts.iter().enumerate() {
        let text = text.as_str().ok_or_else(|| anyhow!("no text at {index}"))?;
        shared.longest.fetch_max(text.chars().count(), Ordering::SeqCst);
        data.push(json!({"object": "embedding", "index": index, "embedding": vector(text)}));
    }
    Ok(json!({"object": "list", "model": body["model"], "data": data}))
}

/// Counts words: each has one of the dimensions. None is ever zero, since a vector must have a direction.
fn vector(text: &str) -> Vec<f32> {
    let mut vector = vec![0.01; DIMENSIONS];
    for word in text.split(|c: char| !c.is_alphanumeric()).filter(|word| !word.is_empty()) {
        let hash = blake3::hash(word.to_lowercase().as_bytes());
        let [first, second, ..] = *hash.as_bytes();
        vector[usize::from(u16::from_le_bytes([first, second])) % DIMENSIONS] += 1.0;
    }
    vector
}
