//! What every request brings along besides its body, and how JSON bodies and forms are read.

use std::time::{Duration, Instant};

use axum::body::Bytes;
use axum::extract::FromRequestParts;
use axum::extract::multipart::MultipartError;
use axum::http::request::Parts;
use axum::http::{HeaderMap, HeaderName, HeaderValue, StatusCode};
use serde::de::DeserializeOwned;
use shoal_actors::cluster::Staleness;
use shoal_actors::{Consistency, ReadOptions};
use shoal_proto::{Error, ErrorCode, Position, RequestId};
use uuid::Uuid;

use crate::app::App;
use crate::http::MAX_REQUEST_SECONDS;
use crate::http::error::{Surface, render};

/// How far the client has seen.
pub const POSITION: HeaderName = HeaderName::from_static("x-shoal-position");
/// How fresh a read must be.
pub const CONSISTENCY: HeaderName = HeaderName::from_static("x-shoal-consistency");
/// About how many milliseconds old the answer to an eventual read may be, or `unknown`.
pub const STALENESS: HeaderName = HeaderName::from_static("x-shoal-staleness-ms");
/// Names a write for safe retries.
pub const IDEMPOTENCY_KEY: HeaderName = HeaderName::from_static("idempotency-key");
/// Whether an answer without some shards is better than none.
pub const PARTIAL: HeaderName = HeaderName::from_static("x-shoal-partial");
/// The longest time that a client may ask for, in seconds.
const MAX_TIMEOUT_SECONDS: u64 = 300;
/// The longest idempotency key, in bytes.
const MAX_KEY_BYTES: usize = 255;

/// What a request wants of reads and writes.
#[derive(Clone, Debug)]
pub struct Context {
    /// When the client gives up.
    pub deadline: Instant,
    /// When its handler was called.
    began: Instant,
    /// How long the work on it may take, by the client or by the settings.
    patience: Duration,
    /// How fresh reads must be.
    pub level: Consistency,
    /// What the client has seen.
    pub position: Position,
    /// The id of this write, the client's or a fresh one.
    pub request_id: RequestId,
    /// Whether partial answers are wanted.
    pub allow_partial: bool,
    /// How old the answers to its eventual reads may be.
    pub staleness: Staleness,
}

impl Context {
    /// How reads are to be done.
    pub fn read_options(&self) -> ReadOptions {
        let (position, staleness) = (self.position.clone(), self.staleness.clone());
        ReadOptions { level: self.level, position, deadline: self.deadline, staleness }
    }

    /// Lets the time for the work begin now, for a handler that has first waited for its client or sent the
    /// client's bytes on. All of the request still ends when every request does.
    pub fn begin_now(&mut self) {
        let end = self.began + Duration::from_secs(MAX_REQUEST_SECONDS);
        self.deadline = end.min(Instant::now() + self.patience);
    }

    /// The id of a part of this write.
    pub fn part_id(&self, part: &str) -> RequestId {
        RequestId::from_key(part, &Uuid::from_bytes(self.request_id.0).to_string())
    }
}

impl FromRequestParts<App> for Context {
    type Rejection = axum::response::Response;

    async fn from_request_parts(parts: &mut Parts, app: &App) -> Result<Self, Self::Rejection> {
        let surface = Surface::of(parts.uri.path());
        read(parts, app).map_err(|error| render(&error, surface))
    }
}

fn read(parts: &Parts, app: &App) -> Result<Context, Error> {
    let headers = &parts.headers;
    let position: Position = match text(headers, &POSITION)? {
        Some(token) => token.parse()?,
        None => Position::default(),
    };
    let level = match text(headers, &CONSISTENCY)? {
        Some("linearizable") => Consistency::Linearizable,
        Some("session") => Consistency::Session,
        Some("eventual") => Consistency::Eventual,
        Some(_) => return Err(Error::invalid(CONSISTENCY, "expected linearizable, session or eventual")),
        // A client that sends its position wants to go on from there.
        None if !position.is_empty() => Consistency::Session,
        None => app.config().limits.default_consistency.into(),
    };
    let request_id = match text(headers, &IDEMPOTENCY_KEY)? {
        Some(key) if key.is_empty() || key.len() > MAX_KEY_BYTES => {
            return Err(Error::invalid(IDEMPOTENCY_KEY, format!("a key has 1 to {MAX_KEY_BYTES} bytes")));
        }
        Some(key) => RequestId::from_key(&format!("{} {}", parts.method, parts.uri.path()), key),
        None => RequestId(*Uuid::new_v4().as_bytes()),
    };
    let seconds = timeout_seconds(parts.uri.query().unwrap_or_default())?
        .unwrap_or(app.config().limits.request_seconds);
    let allow_partial = text(headers, &PARTIAL)? == Some("true");
    let (began, patience) = (Instant::now(), Duration::from_secs(seconds));
    Ok(Context {
        deadline: began + patience,
        began,
        patience,
        level,
        position,
        request_id,
        allow_partial,
        staleness: parts.extensions.get().cloned().unwrap_or_default(),
    })
}

/// The `timeout` query parameter, as Qdrant's clients send it.
fn timeout_seconds(query: &str) -> Result<Option<u64>, Error> {
    let Some(value) = query.split('&').find_map(|pair| pair.strip_prefix("timeout=")) else {
        return Ok(None);
    };
    match value.parse() {
        Ok(seconds) if (1..=MAX_TIMEOUT_SECONDS).contains(&seconds) => Ok(Some(seconds)),
        _ => Err(Error::invalid("timeout", format!("expected 1 to {MAX_TIMEOUT_SECONDS} seconds"))),
    }
}

fn text<'a>(headers: &'a HeaderMap, name: &HeaderName) -> Result<Option<&'a str>, Error> {
    match headers.get(name).map(HeaderValue::to_str) {
        None => Ok(None),
        Some(Ok(value)) => Ok(Some(value)),
        Some(Err(_)) => Err(Error::invalid(name, "expected visible ASCII")),
    }
}

/// Reads a JSON body. The refusal names the field.
///
/// # Errors
/// Invalid argument.
pub fn json<T: DeserializeOwned>(body: &Bytes) -> Result<T, Error> {
    // Keeping the path costs as much as reading: it is looked for only when something is wrong.
    if let Ok(value) = serde_json::from_slice(body) {
        return Ok(value);
    }
    let mut reader = serde_json::Deserializer::from_slice(body);
    let value = serde_path_to_error::deserialize(&mut reader).map_err(|error| {
        let path = error.path().to_string();
        let field = if path == "." { "body".to_owned() } else { path };
        Error::invalid(field, error.into_inner())
    })?;
    reader.end().map_err(|error| Error::invalid("body", error))?;
    Ok(value)
}

/// What is wrong with a form.
pub fn bad_form(error: &MultipartError) -> Error {
    match error.status() {
        StatusCode::PAYLOAD_TOO_LARGE => Error::new(ErrorCode::TooLarge, error.body_text()),
        _ => Error::invalid("form", error.body_text()),
    }
}

/// The header that carries a position back to the client.
pub fn position_header(position: &Position) -> [(HeaderName, String); 1] {
    [(POSITION, position.to_string())]
}
