//! A model behind an OpenAI-compatible `/embeddings` endpoint (OpenAI, DashScope, Ollama, vLLM,
//! TEI …): batches, bounded concurrency, time-outs, retries with back-off and jitter that
//! honour `Retry-After`, and a circuit breaker so that a dead provider is asked rarely.
//!
//! ```text
//!  closed ── BREAK_AFTER failures in a row ──▶ open: nobody is asked
//!    ▲                                            │       ▲
//!    │                                    BREAK_FOR passes │ it fails
//!    │                                            ▼       │
//!    └───────────── it is answered ───────────── half open: one request goes, as a trial
//! ```
//!
//! Only what a provider says of the input itself (400, 413, 422) is the input's fault, and final. A wrong
//! key, an unknown model or vectors of another length are somebody's to mend: what is to be embedded waits.

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
    /// Tokens of one text that the model sees. They are estimated here: one for four Latin characters, or for
    /// one of others.
    #[serde(default = "default_max_tokens")]
    pub max_tokens: usize,
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

fn default_max_tokens() -> usize {
    8191
}

/// Whether a provider is asked at all; pure, see the module.
#[derive(Debug, Default)]
struct Breaker {
    failures: u32,
    open_until: Option<Instant>,
}

impl Breaker {
    /// Whether a request may be sent now. When the circuit was open for long enough one may, as a trial; the
    /// others wait until it has ended, or until it must have, because whoever sent it may have gone away.
    fn admits(&mut self, now: Instant, trial: Duration) -> bool {
        match self.open_until {
            None => true,
            Some(until) if now < until => false,
            Some(_) => {
                self.open_until = Some(now + trial);
                true
            }
        }
    }

    /// Notes a failure. Returns whether it has opened the circuit, which was closed before.
    fn note_failure(&mut self, now: Instant, pause: Duration) -> bool {
        let was_closed = self.open_until.is_none();
        self.failures = self.failures.saturating_add(1);
        if self.failures >= BREAK_AFTER {
            self.open_until = Some(now + pause);
        }
        was_closed && self.open_until.is_some()
    }

    /// Notes an answer. Returns whether it has closed the circuit, which was open before.
    fn note_answer(&mut self) -> bool {
        std::mem::take(self).open_until.is_some()
    }
}

/// The client to a remote model.
pub struct HttpModel {
    config: HttpModelConfig,
    client: reqwest::Client,
    slots: Semaphore,
    breaker: Mutex<Breaker>,
    break_for: Duration,
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
    /// The provider serves nobody like this, whatever the input: somebody has to mend the settings.
    Refusal(String),
    /// The provider will not take this input.
    Input(String),
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
        Ok(HttpModel { config, client, slots, breaker: Mutex::default(), break_for: BREAK_FOR })
    }

    /// Dimensions of its vectors.
    pub fn dimension(&self) -> usize {
        self.config.dimension
    }

    /// Tokens of one text that it sees.
    pub fn max_tokens(&self) -> usize {
        self.config.max_tokens
    }

    /// Embeds texts, in order.
    ///
    /// # Errors
    /// Unavailable when the provider did not answer, or not as it is set up here; unprocessable when it
    /// refuses the input.
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
                    self.note_answer();
                    return Ok(vectors);
                }
                Err(Failure::Input(reason)) => {
                    // The provider is well.
                    self.note_answer();
                    return Err(self.error(ErrorCode::Unprocessable, &reason));
                }
                Err(Failure::Refusal(reason)) => {
                    self.note_failure(&reason);
                    return Err(self.error(ErrorCode::Unavailable, &reason));
                }
                Err(Failure::Passing(reason, pause)) => (reason, pause),
            };
            self.note_failure(&reason);
            if attempt == MAX_ATTEMPTS {
                return Err(self.error(ErrorCode::Unavailable, &reason));
            }
            attempt += 1;
            let jitter = rand::rng().random_range(0.5..1.5);
            tokio::time::sleep(wanted_pause.unwrap_or(pause.mul_f64(jitter)).min(MAX_RETRY_AFTER)).await;
            pause = (pause * 2).min(BACKOFF.1);
        }
    }

    fn error(&self, code: ErrorCode, reason: &str) -> Error {
        Error::new(code, format!("model `{}`: {reason}", self.config.name))
    }

    fn check_circuit(&self) -> Result<(), Error> {
        let mut breaker = self.breaker.lock();
        if breaker.admits(Instant::now(), Duration::from_secs(self.config.timeout_seconds)) {
            return Ok(());
        }
        let failures = breaker.failures;
        let reason = format!("it has failed {failures} times in a row and is not asked for a while");
        Err(self.error(ErrorCode::Unavailable, &reason))
    }

    fn note_failure(&self, reason: &str) {
        if self.breaker.lock().note_failure(Instant::now(), self.break_for) {
            let model = &self.config.name;
            tracing::warn!(model, reason, "a provider of embeddings fails and is asked rarely");
        }
    }

    fn note_answer(&self) {
        if self.breaker.lock().note_answer() {
            let model = &self.config.name;
            tracing::info!(model, "a provider of embeddings answers again");
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
            let header = response.headers().get("retry-after").and_then(|value| value.to_str().ok());
            let pause = header.and_then(|value| retry_after(value, crate::cluster::unix_now()));
            let text: String = response.text().await.unwrap_or_default().chars().take(300).collect();
            let reason = format!("the provider answered {status}: {text}");
            return Err(match status.as_u16() {
                400 | 413 | 422 => Failure::Input(reason),
                408 | 409 | 425 | 429 | 500.. => Failure::Passing(reason, pause),
                _ => Failure::Refusal(reason),
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
            return Err(Failure::Refusal(message));
        }
        Ok(reply.data.into_iter().map(|item| item.embedding).collect())
    }
}

/// How long a provider wants to be left alone, by its `Retry-After`: seconds, or a date (RFC 9110, section
/// 10.2.3). `now` is in seconds since the Unix epoch.
fn retry_after(value: &str, now: u64) -> Option<Duration> {
    let value = value.trim();
    if let Ok(seconds) = value.parse() {
        return Some(Duration::from_secs(seconds));
    }
    let until = jiff::fmt::rfc2822::DateTimeParser::new().parse_timestamp(value).ok()?.as_second();
    Some(Duration::from_secs(u64::try_from(until).ok()?.saturating_sub(now)))
}

#[cfg(test)]
mod tests {
    use super::*;
    use axum::http::StatusCode;
    use axum::response::{IntoResponse, Response};
    use axum::{Json, Router, routing::post};
    use serde_json::{Value, json};
    use std::sync::Arc;
    use std::sync::atomic::{AtomicUsize, Ordering};

    use crate::embed::{Embedders, Model, TextKind};

    /// What a provider does with its first requests; those after them it answers.
    #[derive(Clone, Copy)]
    enum First {
        /// Answers them with this status, and this `Retry-After`.
        Refuses(u16, &'static str),
        /// Never answers them.
        Hangs,
    }

    /// What a provider was asked.
    #[derive(Default)]
    struct Asked {
        requests: AtomicUsize,
        at_once: AtomicUsize,
        most_at_once: AtomicUsize,
    }

    impl Asked {
        fn requests(&self) -> usize {
            self.requests.load(Ordering::SeqCst)
        }
    }

    /// A provider that takes its time for each request and answers with vectors that number the texts.
    async fn answer(asked: Arc<Asked>, first: Vec<First>, time: Duration, body: Value) -> Response {
        let number = asked.requests.fetch_add(1, Ordering::SeqCst);
        match first.get(number) {
            Some(First::Refuses(code, retry_after)) => {
                let code = StatusCode::from_u16(*code).expect("a status");
                return (code, [("retry-after", *retry_after)], "no").into_response();
            }
            Some(First::Hangs) => std::future::pending().await,
            None => {}
        }
        let at_once = asked.at_once.fetch_add(1, Ordering::SeqCst) + 1;
        asked.most_at_once.fetch_max(at_once, Ordering::SeqCst);
        tokio::time::sleep(time).await;
        asked.at_once.fetch_sub(1, Ordering::SeqCst);
        let texts = body["input"].as_array().expect("texts");
        let vector = |index: usize| json!({"index": index, "embedding": [index as f32, 1.0]});
        let data: Vec<Value> = (0..texts.len()).rev().map(vector).collect();
        Json(json!({"data": data})).into_response()
    }

    async fn provider(first: Vec<First>, time: Duration) -> (HttpModel, Arc<Asked>) {
        // The binary does this first thing in main; another test may have been here before.
        drop(rustls::crypto::ring::default_provider().install_default());
        let asked = Arc::new(Asked::default());
        let count = asked.clone();
        let serve = move |Json(body): Json<Value>| answer(count.clone(), first.clone(), time, body);
        let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.expect("a port");
        let base_url = format!("http://{}", listener.local_addr().expect("bound"));
        let routes = Router::new().route("/embeddings", post(serve));
        tokio::spawn(async move { axum::serve(listener, routes).await });
        let config = HttpModelConfig {
            name: "m".into(),
            base_url,
            api_key: String::new(),
            dimension: 2,
            batch: 2,
            concurrency: 2,
            timeout_seconds: 1,
            max_tokens: 512,
        };
        (HttpModel::new(config).expect("builds"), asked)
    }

    async fn failing(codes: &[u16]) -> (HttpModel, Arc<Asked>) {
        let first = codes.iter().map(|code| First::Refuses(*code, "0")).collect();
        provider(first, Duration::ZERO).await
    }

    fn texts(count: usize) -> Vec<String> {
        (0..count).map(|number| number.to_string()).collect()
    }

    async fn code_of(model: &HttpModel) -> ErrorCode {
        model.embed(&texts(1)).await.expect_err("it fails").code
    }

    #[tokio::test]
    async fn batches_come_back_in_order_after_passing_failures() {
        let (model, asked) = failing(&[429, 503]).await;
        let vectors = model.embed(&texts(5)).await.expect("embeds");
        let firsts: Vec<f32> = vectors.iter().map(|vector| vector[0]).collect();
        assert_eq!(firsts, [0.0, 1.0, 0.0, 1.0, 0.0]);
        assert_eq!(asked.requests(), 5);
    }

    #[tokio::test]
    async fn only_what_is_said_of_the_input_is_the_inputs_fault() {
        for code in [400, 413, 422] {
            let (model, asked) = failing(&[code]).await;
            assert_eq!(code_of(&model).await, ErrorCode::Unprocessable, "{code}");
            assert_eq!(asked.requests(), 1, "{code} is final");
        }
        for code in [301, 401, 403, 404, 405] {
            let (model, asked) = failing(&[code]).await;
            assert_eq!(code_of(&model).await, ErrorCode::Unavailable, "{code}");
            assert_eq!(asked.requests(), 1, "{code} is not asked for again at once");
            model.embed(&texts(1)).await.expect("somebody has mended it");
        }
        // So is a dimension that is not what the settings say.
        let (mut model, _) = failing(&[]).await;
        model.config.dimension = 3;
        assert_eq!(code_of(&model).await, ErrorCode::Unavailable);
    }

    #[tokio::test]
    async fn the_circuit_opens_lets_one_trial_through_and_closes_again() {
        let (mut model, asked) = failing(&[500; 6]).await;
        model.break_for = Duration::from_millis(500);
        assert_eq!(code_of(&model).await, ErrorCode::Unavailable);
        assert_eq!(asked.requests(), 5);
        assert_eq!(code_of(&model).await, ErrorCode::Unavailable);
        assert_eq!(asked.requests(), 5, "the open circuit asks nobody");
        tokio::time::sleep(model.break_for).await;
        // The trial fails: the circuit is open again after one request, not after five.
        assert_eq!(code_of(&model).await, ErrorCode::Unavailable);
        assert_eq!(asked.requests(), 6);
        tokio::time::sleep(model.break_for).await;
        model.embed(&texts(1)).await.expect("the trial is answered");
        model.embed(&texts(5)).await.expect("the circuit is closed");
        assert_eq!(asked.requests(), 10);
    }

    #[test]
    fn a_half_open_circuit_lets_one_through_at_a_time() {
        let (start, second) = (Instant::now(), Duration::from_secs(1));
        let mut breaker = Breaker::default();
        let opened = (1..=BREAK_AFTER + 1).map(|_| breaker.note_failure(start, second * 10));
        assert_eq!(opened.collect::<Vec<bool>>(), [false, false, false, false, true, false], "it opens once");
        assert!(!breaker.admits(start + second * 9, second));
        let later = start + second * 10;
        assert!(breaker.admits(later, second * 3), "a trial");
        assert!(!breaker.admits(later, second * 3) && !breaker.admits(later + second * 2, second * 3));
        assert!(breaker.admits(later + second * 3, second * 3), "whoever made the trial has gone away");
        assert!(breaker.note_answer() && !breaker.note_answer(), "it closes once");
        assert!(breaker.admits(later, second) && breaker.admits(later, second), "everybody again");
    }

    #[test]
    fn retry_after_is_seconds_or_a_date() {
        let at = 784_111_777;
        assert_eq!(retry_after(" 7 ", at), Some(Duration::from_secs(7)));
        assert_eq!(retry_after("Sun, 06 Nov 1994 08:49:37 GMT", at - 30), Some(Duration::from_secs(30)));
        assert_eq!(retry_after("Sun, 06 Nov 1994 08:49:37 GMT", at + 30), Some(Duration::ZERO));
        assert_eq!(retry_after("soon", at), None);
    }

    #[tokio::test]
    async fn the_pause_that_the_provider_asks_for_is_made() {
        let (model, asked) = provider(vec![First::Refuses(429, "1")], Duration::ZERO).await;
        let started = Instant::now();
        model.embed(&texts(1)).await.expect("embeds");
        let took = started.elapsed();
        assert!(took >= Duration::from_secs(1), "asked again after {took:?}");
        assert_eq!(asked.requests(), 2);
    }

    #[tokio::test]
    async fn a_provider_that_does_not_answer_in_time_is_asked_again() {
        let (model, asked) = provider(vec![First::Hangs], Duration::ZERO).await;
        let started = Instant::now();
        model.embed(&texts(1)).await.expect("embeds");
        assert!(started.elapsed() >= Duration::from_secs(1), "it was given its second");
        assert_eq!(asked.requests(), 2);
    }

    #[tokio::test]
    async fn no_more_requests_are_sent_at_once_than_are_allowed() {
        let (model, asked) = provider(Vec::new(), Duration::from_millis(50)).await;
        let (many, more) = (texts(12), texts(8));
        let (one, other) = tokio::join!(model.embed(&many), model.embed(&more));
        assert_eq!((one.expect("embeds").len(), other.expect("embeds").len()), (12, 8));
        assert_eq!(asked.requests(), 10);
        assert_eq!(asked.most_at_once.load(Ordering::SeqCst), 2);
    }

    #[tokio::test]
    async fn the_provider_is_asked_once_for_a_text() {
        let (model, asked) = failing(&[]).await;
        let models = [("m".to_owned(), Model::Http(Arc::new(model)))].into();
        let embedders = Embedders::new(models, None, 1 << 20, "");
        let embed =
            async |texts: &[String]| embedders.embed("m", TextKind::Passage, texts).await.expect("embeds");
        let first = embed(&texts(2)).await;
        assert_eq!((embed(&texts(2)).await, asked.requests()), (first, 1));
        // Of three texts one is new.
        embed(&texts(3)).await;
        assert_eq!(asked.requests(), 2);
    }
}
