//! Documents, in the shapes of OpenAI's API: files, vector stores, embeddings, models. The
//! `openai` package works unchanged. Our extras are extra fields; no meaning is changed.

mod embeddings;
mod files;
mod filters;
mod page;
mod store_files;
mod stores;

use axum::extract::DefaultBodyLimit;
use utoipa_axum::router::{OpenApiRouter, UtoipaMethodRouterExt};

use crate::app::App;

/// The routes. Uploads have a limit of their own.
pub fn routes(upload_bytes: usize) -> OpenApiRouter<App> {
    OpenApiRouter::new()
        .routes(described!(files::create, files::list).layer(DefaultBodyLimit::max(upload_bytes)))
        .routes(described!(files::get, files::delete))
        .routes(described!(files::content))
        .routes(described!(stores::create, stores::list))
        .routes(described!(stores::get, stores::update, stores::delete))
        .routes(described!(stores::search))
        .routes(described!(store_files::create, store_files::list))
        .routes(described!(store_files::get, store_files::update, store_files::delete))
        .routes(described!(store_files::content))
        .routes(described!(embeddings::create))
        .routes(described!(embeddings::list_models))
        .routes(described!(embeddings::get_model))
}
