//! The only place that knows HTTP errors: one [`ErrorCode`], rendered in the shape that each
//! surface's clients expect.

use axum::Json;
use axum::http::{HeaderValue, StatusCode, header};
use axum::response::{IntoResponse, Response};
use serde_json::json;
use shoal_proto::{Error, ErrorCode};

/// Whose clients read the answer.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Surface {
    /// `{"status":{"error":…},"time":…}`.
    Qdrant,
    /// `{"error":{"message":…,"type":…,"param":…,"code":…}}`.
    OpenAi,
    /// RFC 9457 problem details.
    Operator,
}

impl Surface {
    /// The surface that a path belongs to.
    pub fn of(path: &str) -> Surface {
        let starts = |prefixes: &[&str]| prefixes.iter().any(|prefix| path.starts_with(prefix));
        match () {
            () if starts(&["/v1/"]) => Surface::OpenAi,
            () if starts(&["/collections", "/aliases", "/cluster"]) => Surface::Qdrant,
            () => Surface::Operator,
        }
    }
}

/// The status of a code.
pub fn status(code: ErrorCode) -> StatusCode {
    match code {
        ErrorCode::InvalidArgument => StatusCode::BAD_REQUEST,
        ErrorCode::Unauthenticated => StatusCode::UNAUTHORIZED,
        ErrorCode::NotFound => StatusCode::NOT_FOUND,
        ErrorCode::Conflict => StatusCode::CONFLICT,
        ErrorCode::TooLarge => StatusCode::PAYLOAD_TOO_LARGE,
        ErrorCode::Unprocessable => StatusCode::UNPROCESSABLE_ENTITY,
        ErrorCode::Busy => StatusCode::TOO_MANY_REQUESTS,
        ErrorCode::Unavailable | ErrorCode::Stale => StatusCode::SERVICE_UNAVAILABLE,
        ErrorCode::Unknown => StatusCode::GATEWAY_TIMEOUT,
        ErrorCode::DiskFull => StatusCode::INSUFFICIENT_STORAGE,
        ErrorCode::Internal => StatusCode::INTERNAL_SERVER_ERROR,
        // The enum may grow; what this build does not know is ours to fix.
        _ => StatusCode::INTERNAL_SERVER_ERROR,
    }
}

/// Renders a failure for a surface.
pub fn render(error: &Error, surface: Surface) -> Response {
    let status = status(error.code);
    // What is inside an internal error is for the log, not for the caller.
    let message = match error.code {
        ErrorCode::Internal => {
            tracing::error!(error = error.message, "internal error");
            "internal error; the log of the node has the details under this request's id".to_owned()
        }
        _ => error.message.clone(),
    };
    let body = match surface {
        Surface::Qdrant => json!({"status": {"error": message, "code": error.code.name()}, "time": 0.0}),
        Surface::OpenAi => {
            let kind = match status.is_server_error() {
                true => "server_error",
                false if status == StatusCode::TOO_MANY_REQUESTS => "rate_limit_error",
                false => "invalid_request_error",
            };
            json!({"error": {"message": message, "type": kind, "param": error.field, "code": error.code.name()}})
        }
        Surface::Operator => json!({
            "type": "about:blank",
            "title": status.canonical_reason(),
            "status": status.as_u16(),
            "detail": message,
            "code": error.code.name(),
            "field": error.field,
        }),
    };
    let mut response = (status, Json(body)).into_response();
    if surface == Surface::Operator {
        response
            .headers_mut()
            .insert(header::CONTENT_TYPE, HeaderValue::from_static("application/problem+json"));
    }
    if matches!(status, StatusCode::TOO_MANY_REQUESTS | StatusCode::SERVICE_UNAVAILABLE) {
        response.headers_mut().insert(header::RETRY_AFTER, HeaderValue::from_static("1"));
    }
    response
}

/// A failure on the Qdrant surface.
#[derive(Debug)]
pub struct QdrantError(pub Error);

/// A failure on the OpenAI surface.
#[derive(Debug)]
pub struct OpenAiError(pub Error);

/// A failure on the operators' surface.
#[derive(Debug)]
pub struct Problem(pub Error);

macro_rules! surface_error {
    ($name:ident, $surface:expr) => {
        impl IntoResponse for $name {
            fn into_response(self) -> Response {
                render(&self.0, $surface)
            }
        }

        impl<E: Into<Error>> From<E> for $name {
            fn from(error: E) -> Self {
                $name(error.into())
            }
        }
    };
}

surface_error!(QdrantError, Surface::Qdrant);
surface_error!(OpenAiError, Surface::OpenAi);
surface_error!(Problem, Surface::Operator);
