//! Points, in the shapes of Qdrant's REST API: envelopes, codes, defaults. The `qdrant-client`
//! package works against it for the operations that are served.

mod collections;
pub(in crate::http) use collections::create_and_wait;
mod points;
mod query;
mod shapes;

use axum::Router;
use axum::routing::{delete, get, post, put};

use crate::app::App;

/// The routes.
pub fn routes() -> Router<App> {
    Router::new()
        .route("/collections", get(collections::list))
        .route("/collections/aliases", post(collections::change_aliases))
        .route("/aliases", get(collections::list_aliases))
        .route(
            "/collections/{collection}",
            get(collections::get).put(collections::create).delete(collections::delete),
        )
        .route("/collections/{collection}/exists", get(collections::exists))
        .route("/collections/{collection}/aliases", get(collections::collection_aliases))
        .route("/collections/{collection}/index", put(collections::create_index))
        .route("/collections/{collection}/index/{field}", delete(collections::delete_index))
        .route("/collections/{collection}/points", put(points::upsert).post(points::retrieve))
        .route("/collections/{collection}/points/{id}", get(points::retrieve_one))
        .route("/collections/{collection}/points/delete", post(points::delete))
        .route(
            "/collections/{collection}/points/payload",
            post(points::set_payload).put(points::overwrite_payload),
        )
        .route("/collections/{collection}/points/payload/delete", post(points::delete_payload))
        .route("/collections/{collection}/points/payload/clear", post(points::clear_payload))
        .route("/collections/{collection}/points/scroll", post(points::scroll))
        .route("/collections/{collection}/points/count", post(points::count))
        .route("/collections/{collection}/points/search", post(query::search))
        .route("/collections/{collection}/points/search/batch", post(query::search_batch))
        .route("/collections/{collection}/points/query", post(query::query))
        .route("/collections/{collection}/points/query/batch", post(query::query_batch))
}
