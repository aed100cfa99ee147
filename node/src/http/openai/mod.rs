//! Documents, in the shapes of OpenAI's API: files, vector stores, embeddings, models. The
//! `openai` package works unchanged. Our extras are extra fields; no meaning is changed.

mod embeddings;
mod files;
mod filters;
mod page;
mod store_files;
mod stores;

use axum::Router;
use axum::extract::DefaultBodyLimit;
use axum::routing::{get, post};

use crate::app::App;

/// The routes. Uploads have a limit of their own.
pub fn routes(upload_bytes: usize) -> Router<App> {
    Router::new()
        .route("/v1/files", post(files::create).get(files::list).layer(DefaultBodyLimit::max(upload_bytes)))
        .route("/v1/files/{file}", get(files::get).delete(files::delete))
        .route("/v1/files/{file}/content", get(files::content))
        .route("/v1/vector_stores", post(stores::create).get(stores::list))
        .route("/v1/vector_stores/{store}", get(stores::get).post(stores::update).delete(stores::delete))
        .route("/v1/vector_stores/{store}/search", post(stores::search))
        .route("/v1/vector_stores/{store}/files", post(store_files::create).get(store_files::list))
        .route(
            "/v1/vector_stores/{store}/files/{file}",
            get(store_files::get).post(store_files::update).delete(store_files::delete),
        )
        .route("/v1/vector_stores/{store}/files/{file}/content", get(store_files::content))
        .route("/v1/embeddings", post(embeddings::create))
        .route("/v1/models", get(embeddings::list_models))
        .route("/v1/models/{model}", get(embeddings::get_model))
}
