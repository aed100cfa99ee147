//! What every request passes through.

use std::any::Any;
use std::time::Instant;

use axum::body::{Body, Bytes, HttpBody};
use axum::extract::{FromRequest, MatchedPath, Request, State};
use axum::http::{HeaderMap, HeaderName, HeaderValue, Method, StatusCode, Uri, header};
use axum::middleware::Next;
use axum::response::{IntoResponse, Response};
use metrics::{counter, gauge, histogram};
use sha2::{Digest, Sha256};
use shoal_actors::cluster::Staleness;
use shoal_proto::{Error, ErrorCode};
use subtle::ConstantTimeEq;
use tracing::{Instrument, Span};
use uuid::Uuid;

use crate::app::App;
use crate::http::context::STALENESS;
use crate::http::error::{Surface, render};

/// The id of a request: the client's or a fresh one; in the answer and in every log line.
const REQUEST_ID: HeaderName = HeaderName::from_static("x-request-id");
/// The longest request id that is taken from a client, in bytes.
const MAX_REQUEST_ID_BYTES: usize = 128;
/// What is noted as the status of a request that nobody waited for: nobody gets it. nginx has the same number.
const CLIENT_GONE: u16 = 499;
/// How the content type of a form begins.
const FORM: &[u8] = b"multipart/";
/// Paths that need no key: they tell only whether the node lives.
const OPEN: [&str; 5] = ["/health/live", "/health/ready", "/healthz", "/livez", "/readyz"];

/// One log line and one measurement per request, also of one whose client goes away before it is answered. What
/// comes every few seconds from probes and from Prometheus is logged at `debug` only, unless it fails.
pub(super) async fn observe(mut request: Request, next: Next) -> Response {
    let id = request_id(request.headers());
    let staleness = Staleness::default();
    request.extensions_mut().insert(staleness.clone());
    // A span of the highest level: whatever is logged within has the id, at every level of the log.
    let span = tracing::error_span!("request", request_id = id);
    let mut observed = Observed::begin(&request, span.clone());
    let mut response = next.run(request).instrument(span).await;
    observed.status = response.status().as_u16();
    if let Ok(value) = HeaderValue::from_str(&id) {
        response.headers_mut().insert(REQUEST_ID, value);
    }
    if let Some(age) = staleness.get() {
        let age = age.map_or(HeaderValue::from_static("unknown"), HeaderValue::from);
        response.headers_mut().insert(STALENESS, age);
    }
    response
}

/// A request while it is here. When it is dropped, it was answered, or its client has gone.
struct Observed {
    started: Instant,
    method: Method,
    path: String,
    route: String,
    status: u16,
    span: Span,
}

impl Observed {
    fn begin(request: &Request, span: Span) -> Observed {
        gauge!("shoal_http_in_flight").increment(1.0);
        // The route, not the path: labels take few values.
        let route = request.extensions().get::<MatchedPath>().map_or("none", MatchedPath::as_str);
        Observed {
            started: Instant::now(),
            method: request.method().clone(),
            path: request.uri().path().to_owned(),
            route: route.to_owned(),
            status: CLIENT_GONE,
            span,
        }
    }
}

impl Drop for Observed {
    fn drop(&mut self) {
        gauge!("shoal_http_in_flight").decrement(1.0);
        let Observed { started, method, path, route, status, span } = &*self;
        let (elapsed, status) = (started.elapsed(), *status);
        let milliseconds = elapsed.as_secs_f64() * 1e3;
        span.in_scope(|| match status {
            500.. => tracing::warn!(%method, path, route, status, milliseconds, "request"),
            _ if is_probe(path) => tracing::debug!(%method, path, route, status, milliseconds, "request"),
            _ => tracing::info!(%method, path, route, status, milliseconds, "request"),
        });
        let labels =
            [("method", method.to_string()), ("path", route.clone()), ("status", status.to_string())];
        counter!("http_requests_total", &labels).increment(1);
        histogram!("http_request_duration_seconds", &labels).record(elapsed);
    }
}

/// Whether machines ask for a path again and again, to know how this node is.
fn is_probe(path: &str) -> bool {
    OPEN.contains(&path) || matches!(path, "/health" | "/health/detailed" | "/metrics")
}

fn request_id(headers: &HeaderMap) -> String {
    let given = headers.get(REQUEST_ID).and_then(|value| value.to_str().ok());
    let is_good = |id: &&str| {
        !id.is_empty()
            && id.len() <= MAX_REQUEST_ID_BYTES
            && id.chars().all(|c| c.is_ascii_alphanumeric() || "-_.:".contains(c))
    };
    given.filter(is_good).map_or_else(|| Uuid::new_v4().to_string(), str::to_owned)
}

/// Refuses what is beyond the number of requests that may be here at once, and what waits in line
/// for too long. Health is answered always, so that a busy node is not taken for a dead one.
pub(super) async fn limit_concurrency(State(app): State<App>, request: Request, next: Next) -> Response {
    if OPEN.contains(&request.uri().path()) {
        return next.run(request).await;
    }
    let surface = Surface::of(request.uri().path());
    let Ok(_permit) = app.requests().try_acquire() else {
        return render(&Error::new(ErrorCode::Busy, "too many requests at once; try again"), surface);
    };
    if !must_queue(request.method(), request.uri().path()) {
        return next.run(request).await;
    }
    app.admission().run(next.run(request)).await.unwrap_or_else(|| {
        let reason = "this node has more to do than it can; try again, or another node";
        render(&Error::new(ErrorCode::Busy, reason), surface)
    })
}

/// Whether a request stands in line on a busy node. Operators do not, and neither do uploads and
/// snapshots: they take long by their nature, and mostly wait for somebody else.
fn must_queue(method: &Method, path: &str) -> bool {
    let is_upload = method == Method::POST && path == "/v1/files";
    let is_snapshot = path.starts_with("/collections/") && path.split('/').nth(3) == Some("snapshots");
    !is_upload
        && !is_snapshot
        && path != "/metrics"
        && !["/admin", "/health"].iter().any(|prefix| path.starts_with(prefix))
}

/// Lets in who has the key. Keys are compared by their hashes in constant time.
pub(super) async fn check_key(State(app): State<App>, request: Request, next: Next) -> Response {
    let config = app.config();
    let path = request.uri().path();
    let is_open =
        config.api_key.is_empty() || OPEN.contains(&path) || (path == "/metrics" && config.metrics_open);
    if is_open || key_of(request.headers()).is_some_and(|key| same_key(key, &config.api_key)) {
        return next.run(request).await;
    }
    let message = "a valid API key is needed: send it as `Authorization: Bearer KEY` or `api-key: KEY`";
    render(&Error::new(ErrorCode::Unauthenticated, message), Surface::of(path))
}

fn key_of(headers: &HeaderMap) -> Option<&str> {
    let bearer =
        headers.get(header::AUTHORIZATION).and_then(|value| value.to_str().ok()?.strip_prefix("Bearer "));
    bearer.or_else(|| headers.get("api-key")?.to_str().ok())
}

/// Whether two keys are the same, in a time that does not tell where they differ.
pub(crate) fn same_key(given: &str, wanted: &str) -> bool {
    Sha256::digest(given).ct_eq(&Sha256::digest(wanted)).into()
}

/// Reads a body to its end before its handler is called, whose time begins then: a client behind a slow line
/// would use it up with sending. Forms bring files, and their handlers read them piece by piece.
pub(super) async fn read_body(request: Request, next: Next) -> Response {
    let kind = request.headers().get(header::CONTENT_TYPE).map(HeaderValue::as_bytes);
    let begins_as_form = |kind: &[u8]| Some(kind.get(..FORM.len())?.eq_ignore_ascii_case(FORM));
    let is_form = kind.and_then(begins_as_form).unwrap_or(false);
    if is_form || request.body().is_end_stream() {
        return next.run(request).await;
    }
    let (parts, body) = request.into_parts();
    match Bytes::from_request(Request::from_parts(parts.clone(), body), &()).await {
        Ok(bytes) => next.run(Request::from_parts(parts, Body::from(bytes))).await,
        Err(refused) => refused.into_response(),
    }
}

/// Refusals that the framework makes itself (a body too large, a broken path) in our shapes.
pub(super) async fn own_errors(request: Request, next: Next) -> Response {
    let surface = Surface::of(request.uri().path());
    let response = next.run(request).await;
    let status = response.status();
    let is_ours = response
        .headers()
        .get(header::CONTENT_TYPE)
        .is_some_and(|kind| kind.as_bytes().starts_with(b"application/"));
    if is_ours || !(status.is_client_error() || status == StatusCode::GATEWAY_TIMEOUT) {
        return response;
    }
    let (code, message) = match status {
        StatusCode::PAYLOAD_TOO_LARGE => (ErrorCode::TooLarge, "the body is larger than the limit"),
        StatusCode::GATEWAY_TIMEOUT => (ErrorCode::Unknown, "the request took too long"),
        StatusCode::NOT_FOUND => (ErrorCode::NotFound, "no such path"),
        _ => (ErrorCode::InvalidArgument, "the request cannot be read"),
    };
    let body = axum::body::to_bytes(response.into_body(), 4096).await.unwrap_or_default();
    let detail = String::from_utf8_lossy(&body);
    render(&Error::new(code, if detail.is_empty() { message.into() } else { detail }), surface)
}

pub(super) async fn not_found(uri: Uri) -> Response {
    render(&Error::not_found(format!("no such path: {}", uri.path())), Surface::of(uri.path()))
}

pub(super) async fn method_not_allowed(uri: Uri) -> Response {
    let error = Error::invalid("method", format!("not allowed on {}", uri.path()));
    let mut response = render(&error, Surface::of(uri.path()));
    *response.status_mut() = StatusCode::METHOD_NOT_ALLOWED;
    response
}

pub(super) fn panicked(_: Box<dyn Any + Send>) -> Response {
    render(&Error::internal("a handler panicked"), Surface::Operator).into_response()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn keys_and_request_ids() {
        assert!(same_key("secret", "secret") && !same_key("secret", "secre") && !same_key("", "secret"));
        let mut headers = HeaderMap::new();
        headers.insert("x-request-id", HeaderValue::from_static("abc-1"));
        assert_eq!(request_id(&headers), "abc-1");
        headers.insert("x-request-id", HeaderValue::from_static("evil\tline"));
        assert_ne!(request_id(&headers), "evil\tline");
    }
}
