//! Points, in the shapes of Qdrant's REST API: envelopes, codes, defaults. The `qdrant-client`
//! package works against it for the operations that are served.

mod cluster;
mod collections;
pub(in crate::http) use collections::create_and_wait;
mod points;
mod query;
mod shapes;

use utoipa_axum::router::OpenApiRouter;

use crate::app::App;

/// The routes.
pub fn routes() -> OpenApiRouter<App> {
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
}
