//! A model behind an OpenAI-compatible `/embeddings` endpoint (OpenAI, DashScope, Ollama, vLLM,
//! TEI …): batches, bounded concurrency, time-outs, retries with back-off and jitter that
//! honour `Retry-After`, and a circuit breaker so that a dead provider is asked rarely.

use std::time::{Duration, Instant};

use parking_lot::Mutex;
use rand::RngExt;
use serde::{Deserialize, Serialize};
use shoal_proto::{Error, ErrorCode};
use tokio::sync::Semaphore;

/// Attempts at one batch before it fails.
const MAX_ATTEMPTS: u32 = 5;
/// The first pause between attempts; it doubles up to the second value.
const BACKOFF: (Duration, Duration) = (Duration::from_millis(200), Duration::from_secs(10));
/// Failures in a row that open the circuit.
const BREAK_AFTER: u32 = 5;
/// How long an open circuit refuses at once.
const BREAK_FOR: Duration = Duration::from_secs(15);
/// The longest `Retry-After` that is waited for.
const MAX_RETRY_AFTER: Duration = Duration::from_secs(60);

/// One remote model.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct HttpModelConfig {
    /// The name by which collections know it, also sent to the provider.
    pub name: String,
    /// Up to and without `/embeddings`, for example `https://api.openai.com/v1`.
    pub base_url: String,
    /// Sent as a bearer token when not empty.
    #[serde(default)]
    pub api_key: String,
    /// Dimensions of its vectors.
    pub dimension: usize,
    /// Texts in one request.
    #[serde(default = "default_batch")]
    pub batch: usize,
    /// Requests at once.
    #[serde(default = "default_concurrency")]
    pub concurrency: usize,
    /// Seconds that one request may take.
    #[serde(default = "default_timeout")]
    pub timeout_seconds: u64,
}

fn default_batch() -> usize {
    32
}

fn default_concurrency() -> usize {
    4
}

fn default_timeout() -> u64 {
    30
}

#[derive(Default)]
struct Breaker {
    failures: u32,
    open_until: Option<Instant>,
}

/// The client to a remote model.
pub struct HttpModel {
    config: HttpModelConfig,
    client: reqwest::Client,
    slots: Semaphore,
    breaker: Mutex<Breaker>,
}

#[derive(Deserialize)]
struct EmbeddingsReply {
    data: Vec<EmbeddingItem>,
}

#[derive(Deserialize)]
struct EmbeddingItem {
    index: usize,
    embedding: Vec<f32>,
}

enum Failure {
    /// Worth another attempt, after this pause when the provider named one.
    Passing(String, Option<Duration>),
    /// The provider will not take this input.
    Final(String),
}

impl HttpModel {
    /// A client; nothing is sent yet.
    ///
    /// # Errors
    /// When the HTTP client cannot be built.
    pub fn new(config: HttpModelConfig) -> Result<HttpModel, Error> {
        let client = reqwest::Client::builder()
            .timeout(Duration::from_secs(config.timeout_seconds))
            .redirect(reqwest::redirect::Policy::none())
            .build()
            .map_err(Error::internal)?;
        let slots = Semaphore::new(config.concurrency.max(1));
        Ok(HttpModel { config, client, slots, breaker: Mutex::default() })
    }

    /// Dimensions of its vectors.
    pub fn dimension(&self) -> usize {
        self.config.dimension
    }

    /// Embeds texts, in order.
    ///
    /// # Errors
    /// Unavailable when the provider did not answer; unprocessable when it refuses the input.
    pub async fn embed(&self, texts: &[String]) -> Result<Vec<Vec<f32>>, Error> {
        let batches = texts.chunks(self.config.batch.max(1)).map(|batch| self.batch(batch));
        Ok(futures::future::try_join_all(batches).await?.concat())
    }

    async fn batch(&self, texts: &[String]) -> Result<Vec<Vec<f32>>, Error> {
        let _slot = self.slots.acquire().await.map_err(Error::internal)?;
        let mut pause = BACKOFF.0;
        let mut attempt = 1;
        loop {
            self.check_circuit()?;
            let (reason, wanted_pause) = match self.request(texts).await {
                Ok(vectors) => {
                    *self.breaker.lock() = Breaker::default();
                    return Ok(vectors);
                }
                Err(Failure::Final(reason)) => return Err(Error::new(ErrorCode::Unprocessable, reason)),
                Err(Failure::Passing(reason, pause)) => (reason, pause),
            };
            self.note_failure();
            if attempt == MAX_ATTEMPTS {
                return Err(Error::unavailable(format!("model `{}`: {reason}", self.config.name)));
            }
            attempt += 1;
            let jitter = rand::rng().random_range(0.5..1.5);
            tokio::time::sleep(wanted_pause.unwrap_or(pause.mul_f64(jitter)).min(MAX_RETRY_AFTER)).await;
            pause = (pause * 2).min(BACKOFF.1);
        }
    }

    fn check_circuit(&self) -> Result<(), Error> {
        let mut breaker = self.breaker.lock();
        match breaker.open_until {
            Some(until) if Instant::now() < until => {
                let message = format!(
                    "model `{}` has failed {} times in a row and is not asked for a while",
                    self.config.name, breaker.failures
                );
                Err(Error::unavailable(message))
            }
            // Half open: the next request decides.
            _ => {
                breaker.open_until = None;
                Ok(())
            }
        }
    }

    fn note_failure(&self) {
        let mut breaker = self.breaker.lock();
        breaker.failures += 1;
        if breaker.failures >= BREAK_AFTER {
            breaker.open_until = Some(Instant::now() + BREAK_FOR);
        }
    }

    async fn request(&self, texts: &[String]) -> Result<Vec<Vec<f32>>, Failure> {
        let url = format!("{}/embeddings", self.config.base_url.trim_end_matches('/'));
        let body = serde_json::json!({"model": self.config.name, "input": texts, "encoding_format": "float"});
        let mut request = self.client.post(url).json(&body);
        if !self.config.api_key.is_empty() {
            request = request.bearer_auth(&self.config.api_key);
        }
        let response = request.send().await.map_err(|error| Failure::Passing(error.to_string(), None))?;
        let status = response.status();
        if !status.is_success() {
            let retry_after =
                response.headers().get("retry-after").and_then(|value| value.to_str().ok()?.parse().ok());
            let text: String = response.text().await.unwrap_or_default().chars().take(300).collect();
            let reason = format!("the provider answered {status}: {text}");
            let passing = status.is_server_error() || matches!(status.as_u16(), 408 | 409 | 429);
            return Err(match passing {
                true => Failure::Passing(reason, retry_after.map(Duration::from_secs)),
                false => Failure::Final(reason),
            });
        }
        let mut reply: EmbeddingsReply =
            response.json().await.map_err(|error| Failure::Passing(error.to_string(), None))?;
        reply.data.sort_by_key(|item| item.index);
        let good = reply.data.len() == texts.len()
            && reply.data.iter().all(|item| {
                item.embedding.len() == self.config.dimension && item.embedding.iter().all(|x| x.is_finite())
            });
        if !good {
            let message = format!(
                "the provider did not answer with {} vectors of {} dimensions",
                texts.len(),
                self.config.dimension
            );
            return Err(Failure::Final(message));
        }
        Ok(reply.data.into_iter().map(|item| item.embedding).collect())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use axum::http::StatusCode;
    use axum::response::IntoResponse;
    use axum::{Json, Router, routing::post};
    use std::sync::Arc;
    use std::sync::atomic::{AtomicUsize, Ordering};

    /// A provider that answers the first requests with the given codes and then properly.
    async fn provider(codes: &'static [u16]) -> (HttpModel, Arc<AtomicUsize>) {
        // The binary does this first thing in main; another test may have been here before.
        drop(rustls::crypto::ring::default_provider().install_default());
        let asked = Arc::new(AtomicUsize::new(0));
        let count = asked.clone();
        let answer = move |Json(body): Json<serde_json::Value>| async move {
            let number = count.fetch_add(1, Ordering::SeqCst);
            if let Some(code) = codes.get(number) {
                let code = StatusCode::from_u16(*code).expect("a status");
                return (code, [("retry-after", "0")], "no").into_response();
            }
            let texts = body["input"].as_array().expect("texts");
            let data: Vec<_> = (0..texts.len())
                .rev()
                .map(|index| serde_json::json!({"index": index, "embedding": [index as f32, 1.0]}))
                .collect();
            Json(serde_json::json!({"data": data})).into_response()
        };
        let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.expect("a port");
        let base_url = format!("http://{}", listener.local_addr().expect("bound"));
        tokio::spawn(
            async move { axum::serve(listener, Router::new().route("/embeddings", post(answer))).await },
        );
        let config = HttpModelConfig {
            name: "m".into(),
            base_url,
            api_key: String::new(),
            dimension: 2,
            batch: 2,
            concurrency: 2,
            timeout_seconds: 5,
        };
        (HttpModel::new(config).expect("builds"), asked)
    }

    fn texts(count: usize) -> Vec<String> {
        (0..count).map(|number| number.to_string()).collect()
    }

    #[tokio::test]
    async fn batches_come_back_in_order_after_passing_failures() {
        let (model, asked) = provider(&[429, 503]).await;
        let vectors = model.embed(&texts(5)).await.expect("embeds");
        let firsts: Vec<f32> = vectors.iter().map(|vector| vector[0]).collect();
        assert_eq!(firsts, [0.0, 1.0, 0.0, 1.0, 0.0]);
        assert_eq!(asked.load(Ordering::SeqCst), 5);
    }

    #[tokio::test]
    async fn a_refusal_is_final_and_a_dead_provider_is_asked_rarely() {
        let (model, asked) = provider(&[400]).await;
        assert_eq!(model.embed(&texts(1)).await.expect_err("refused").code, ErrorCode::Unprocessable);
        assert_eq!(asked.load(Ordering::SeqCst), 1);
        let (model, asked) = provider(&[500; 64]).await;
        assert_eq!(model.embed(&texts(1)).await.expect_err("dead").code, ErrorCode::Unavailable);
        let before = asked.load(Ordering::SeqCst);
        assert_eq!(model.embed(&texts(1)).await.expect_err("open").code, ErrorCode::Unavailable);
        assert_eq!(asked.load(Ordering::SeqCst), before, "the open circuit asks nobody");
    }
}
