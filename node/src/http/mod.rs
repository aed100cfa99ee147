//! The HTTP edge: three surfaces over the same data behind one set of limits.
//!
//! ```text
//!  request ─▶ id, log, metrics ─▶ concurrency ─▶ key ─▶ body limit, time-out ─▶ whole body ─▶ handler
//! ```

/// Handlers with their descriptions, in a function of its own: the optimizer would put all of them
/// into one and take minutes over it.
macro_rules! described {
    ($($handlers:tt)+) => {{
        #[inline(never)]
        fn described() -> utoipa_axum::router::UtoipaMethodRouter<crate::app::App> {
            utoipa_axum::routes!($($handlers)+)
        }
        described()
    }};
}

mod admin;
mod backups;
pub mod context;
pub mod error;
mod middleware;
pub(crate) use middleware::same_key;
mod openai;
mod openapi;
mod operate;
pub mod points;
mod qdrant;
#[cfg(test)]
mod tests;
mod unique;

use std::time::Duration;

use axum::Router;
use axum::extract::DefaultBodyLimit;
use axum::http::StatusCode;
use axum::middleware::{from_fn, from_fn_with_state};
use tower_http::catch_panic::CatchPanicLayer;
use tower_http::decompression::RequestDecompressionLayer;
use tower_http::timeout::{RequestBodyTimeoutLayer, TimeoutLayer};
use utoipa_axum::router::OpenApiRouter;

use crate::app::App;

/// The longest that any request may take, uploads included, in seconds.
const MAX_REQUEST_SECONDS: u64 = 600;

/// What a form may have besides the file in it, in bytes.
const FORM_BYTES: usize = 1 << 20;

/// All routes.
pub fn router(app: App) -> Router {
    let limits = &app.config().limits;
    let routes = OpenApiRouter::with_openapi(openapi::base())
        .merge(qdrant::routes(limits.snapshot_bytes.saturating_add(FORM_BYTES)))
        .merge(openai::routes(limits.upload_bytes.saturating_add(FORM_BYTES)))
        .merge(admin::routes())
        .merge(operate::routes())
        .merge(backups::routes());
    openapi::serve(routes)
        .fallback(middleware::not_found)
        .method_not_allowed_fallback(middleware::method_not_allowed)
        .layer(from_fn(middleware::read_body))
        .layer(DefaultBodyLimit::max(limits.body_bytes))
        // A client that sends nothing keeps nothing waiting.
        .layer(RequestBodyTimeoutLayer::new(Duration::from_secs(limits.body_pause_seconds)))
        // Limits hold for what a body inflates to.
        .layer(RequestDecompressionLayer::new())
        .layer(TimeoutLayer::with_status_code(
            StatusCode::GATEWAY_TIMEOUT,
            Duration::from_secs(MAX_REQUEST_SECONDS),
        ))
        .layer(from_fn(middleware::own_errors))
        .layer(from_fn_with_state(app.clone(), middleware::check_key))
        .layer(from_fn_with_state(app.clone(), middleware::limit_concurrency))
        .layer(CatchPanicLayer::custom(middleware::panicked))
        .layer(from_fn(middleware::observe))
        .with_state(app)
}
