//! Points, in the shapes of Qdrant's REST API: envelopes, codes, defaults. The `qdrant-client`
//! package works against it for the operations that are served.

mod cluster;
mod collections;
pub(in crate::http) use collections::create_and_wait;
mod location;
mod points;
mod query;
mod shapes;
mod snapshots;

use axum::extract::DefaultBodyLimit;
use utoipa_axum::router::{OpenApiRouter, UtoipaMethodRouterExt};

use crate::app::App;

/// The routes. Uploads have a limit of their own.
pub fn routes(upload_bytes: usize) -> OpenApiRouter<App> {
    let uploads = described!(snapshots::upload, snapshots::upload_by_put);
    OpenApiRouter::new()
        .routes(described!(cluster::status))
        .routes(described!(cluster::collection))
        .routes(described!(collections::list))
        .routes(described!(collections::get, collections::create, collections::delete))
        .routes(described!(collections::exists))
        .routes(described!(collections::change_aliases))
        .routes(described!(collections::list_aliases))
        .routes(described!(collections::collection_aliases))
        .routes(described!(collections::create_index))
        .routes(described!(collections::delete_index))
        .routes(described!(points::upsert, points::retrieve))
        .routes(described!(points::retrieve_one))
        .routes(described!(points::delete))
        .routes(described!(points::set_payload, points::overwrite_payload))
        .routes(described!(points::delete_payload))
        .routes(described!(points::clear_payload))
        .routes(described!(points::scroll))
        .routes(described!(points::count))
        .routes(described!(query::search))
        .routes(described!(query::search_batch))
        .routes(described!(query::query))
        .routes(described!(query::query_batch))
        .routes(described!(snapshots::list, snapshots::create))
        .routes(described!(snapshots::recover))
        .routes(uploads.layer(DefaultBodyLimit::max(upload_bytes)))
        .routes(described!(snapshots::download, snapshots::delete))
}
