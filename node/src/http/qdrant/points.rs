//! Points: upsert, read, delete, payload, scroll, count.

use std::time::Instant;

use axum::body::Bytes;
use axum::extract::{Path, State};
use axum::response::Response;
use serde::Deserialize;
use serde_json::{Map, Value, json};
use shoal_engine::command::{Answer, Command, Hit, PayloadMode, Point, Read, Select, Target};
use shoal_proto::{Error, PointId, Position};
use utoipa::ToSchema;

use super::shapes::{self, envelope};
use crate::app::App;
use crate::http::context::{Context, json};
use crate::http::error::QdrantError;
use crate::http::openapi::{PointIdShape, QdrantAnswers};
use crate::http::points::{self, Found, ask_all, write_target};
use crate::http::unique;

/// The most points in one upsert.
const MAX_POINTS: usize = 10_000;

#[derive(Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
struct Upsert {
    points: Option<Vec<PointShape>>,
    batch: Option<Batch>,
    shard_key: Option<Value>,
    update_filter: Option<Value>,
}

#[derive(Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
struct PointShape {
    #[schema(value_type = PointIdShape)]
    id: PointId,
    #[serde(deserialize_with = "unique::required_value")]
    vector: Value,
    #[serde(default, deserialize_with = "unique::object")]
    #[schema(value_type = Option<Object>)]
    payload: Option<Map<String, Value>>,
}

#[derive(Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
struct Batch {
    #[schema(value_type = Vec<PointIdShape>)]
    ids: Vec<PointId>,
    #[serde(deserialize_with = "unique::required_value")]
    vectors: Value,
    #[serde(default, deserialize_with = "unique::objects")]
    #[schema(value_type = Option<Vec<Object>>)]
    payloads: Option<Vec<Option<Map<String, Value>>>>,
}

/// Inserts points or replaces those with the same ids; on disk on a majority when answered.
#[utoipa::path(
    put, path = "/collections/{collection}/points", operation_id = "upsert_points", tag = "points",
    params(("collection" = String, Path, description = "Name or alias"), Context),
    request_body = Upsert,
    responses(QdrantAnswers),
)]
pub(super) async fn upsert(
    State(app): State<App>,
    Path(name): Path<String>,
    context: Context,
    body: Bytes,
) -> Result<Response, QdrantError> {
    let started = Instant::now();
    let request: Upsert = json(&body)?;
    if request.shard_key.is_some_and(|key| !key.is_null())
        || request.update_filter.is_some_and(|f| !f.is_null())
    {
        return Err(Error::invalid("shard_key", "shard_key and update_filter are not supported").into());
    }
    let given = match (request.points, request.batch) {
        (Some(given), None) => given,
        (None, Some(batch)) => unbatch(batch)?,
        _ => return Err(Error::invalid("points", "exactly one of points and batch is needed").into()),
    };
    if given.len() > MAX_POINTS {
        return Err(Error::invalid("points", format!("at most {MAX_POINTS} points in one request")).into());
    }
    let mut upserted = Vec::with_capacity(given.len());
    for (index, point) in given.into_iter().enumerate() {
        let vectors = shapes::vectors(&point.vector, &format!("points[{index}].vector"))?;
        let payload = point.payload.map_or(String::new(), |payload| Value::Object(payload).to_string());
        upserted.push(Point { id: point.id, vectors, payload });
    }
    let cluster = &app.running()?.cluster;
    let found = Found::find(cluster, &name).await?;
    let position = points::upsert(cluster, &found, upserted, &context).await?;
    Ok(updated(started, &position))
}

fn unbatch(batch: Batch) -> Result<Vec<PointShape>, Error> {
    let count = batch.ids.len();
    let mut payloads = batch.payloads.unwrap_or_default();
    payloads.resize(count, None);
    let columns: Vec<Value> = match batch.vectors {
        Value::Array(rows) => rows,
        Value::Object(named) => (0..count)
            .map(|row| {
                Value::Object(
                    named
                        .iter()
                        .filter_map(|(name, rows)| Some((name.clone(), rows.get(row)?.clone())))
                        .collect(),
                )
            })
            .collect(),
        _ => return Err(Error::invalid("batch.vectors", "expected an array, or arrays by name")),
    };
    if columns.len() != count {
        return Err(Error::invalid("batch.vectors", format!("{} vectors for {count} ids", columns.len())));
    }
    let rows = batch.ids.into_iter().zip(columns).zip(payloads);
    Ok(rows.map(|((id, vector), payload)| PointShape { id, vector, payload }).collect())
}

fn updated(started: Instant, position: &Position) -> Response {
    envelope(json!({"operation_id": 0, "status": "completed"}), started, position)
}

#[derive(Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
struct Retrieve {
    #[schema(value_type = Vec<PointIdShape>)]
    ids: Vec<PointId>,
    with_payload: Option<Value>,
    with_vector: Option<Value>,
    #[serde(rename = "shard_key")]
    _shard_key: Option<Value>,
}

/// Points by their ids.
#[utoipa::path(
    post, path = "/collections/{collection}/points", operation_id = "get_points", tag = "points",
    params(("collection" = String, Path, description = "Name or alias"), Context),
    request_body = Retrieve,
    responses(QdrantAnswers),
)]
pub(super) async fn retrieve(
    State(app): State<App>,
    Path(name): Path<String>,
    context: Context,
    body: Bytes,
) -> Result<Response, QdrantError> {
    let started = Instant::now();
    let request: Retrieve = json(&body)?;
    if request.ids.len() > shapes::MAX_IDS {
        return Err(Error::invalid("ids", format!("at most {} ids", shapes::MAX_IDS)).into());
    }
    let payload = shapes::select(request.with_payload.as_ref(), "with_payload", Select::All)?;
    let vectors = shapes::select(request.with_vector.as_ref(), "with_vector", Select::Nothing)?;
    let (hits, position) = get(&app, &name, &request.ids, payload, vectors, &context).await?;
    let records: Vec<Value> = hits.into_iter().map(|hit| shapes::record(hit, false)).collect();
    Ok(envelope(records, started, &position))
}

/// One point.
#[utoipa::path(
    get, path = "/collections/{collection}/points/{id}", operation_id = "get_point", tag = "points",
    params(("collection" = String, Path, description = "Name or alias"), ("id" = String, Path, description = "Unsigned integer or UUID"), Context),
    responses(QdrantAnswers),
)]
pub(super) async fn retrieve_one(
    State(app): State<App>,
    Path((name, id)): Path<(String, String)>,
    context: Context,
) -> Result<Response, QdrantError> {
    let started = Instant::now();
    let id: PointId = id.parse().map_err(|reason| Error::invalid("id", reason))?;
    let (hits, position) = get(&app, &name, &[id], Select::All, Select::All, &context).await?;
    match hits.into_iter().next() {
        Some(hit) => Ok(envelope(shapes::record(hit, false), started, &position)),
        None => Err(Error::not_found(format!("Not found: Point with id {id} does not exists!")).into()),
    }
}

async fn get(
    app: &App,
    name: &str,
    ids: &[PointId],
    payload: Select,
    vectors: Select,
    context: &Context,
) -> Result<(Vec<Hit>, Position), Error> {
    let cluster = &app.running()?.cluster;
    let found = Found::find(cluster, name).await?;
    let options = context.read_options();
    let (mut hits, position) = cluster.read_points(&found.name, ids, (&payload, &vectors), &options).await?;
    // In the order that was asked for.
    let order: std::collections::HashMap<PointId, usize> =
        ids.iter().enumerate().map(|(at, id)| (*id, at)).collect();
    hits.sort_by_key(|hit| order.get(&hit.id).copied());
    Ok((hits, position))
}

#[derive(Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
struct Selector {
    #[schema(value_type = Option<Vec<PointIdShape>>)]
    points: Option<Vec<PointId>>,
    #[serde(default, deserialize_with = "unique::value")]
    filter: Option<Value>,
    #[serde(rename = "shard_key")]
    _shard_key: Option<Value>,
}

/// Deletes points by ids or by a filter.
#[utoipa::path(
    post, path = "/collections/{collection}/points/delete", operation_id = "delete_points", tag = "points",
    params(("collection" = String, Path, description = "Name or alias"), Context),
    request_body = Selector,
    responses(QdrantAnswers),
)]
pub(super) async fn delete(
    State(app): State<App>,
    Path(name): Path<String>,
    context: Context,
    body: Bytes,
) -> Result<Response, QdrantError> {
    let request: Selector = json(&body)?;
    let target = shapes::target(request.points, request.filter.as_ref())?;
    change(&app, &name, target, &context, Command::Delete).await
}

/// Empties the payload of points.
#[utoipa::path(
    post, path = "/collections/{collection}/points/payload/clear", operation_id = "clear_payload", tag = "points",
    params(("collection" = String, Path, description = "Name or alias"), Context),
    request_body = Selector,
    responses(QdrantAnswers),
)]
pub(super) async fn clear_payload(
    State(app): State<App>,
    Path(name): Path<String>,
    context: Context,
    body: Bytes,
) -> Result<Response, QdrantError> {
    let request: Selector = json(&body)?;
    let target = shapes::target(request.points, request.filter.as_ref())?;
    change(&app, &name, target, &context, |target| Command::DeletePayload { target, keys: None }).await
}

#[derive(Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
struct SetPayload {
    #[serde(deserialize_with = "unique::required_object")]
    #[schema(value_type = Object)]
    payload: Map<String, Value>,
    #[schema(value_type = Option<Vec<PointIdShape>>)]
    points: Option<Vec<PointId>>,
    #[serde(default, deserialize_with = "unique::value")]
    filter: Option<Value>,
    key: Option<String>,
    #[serde(rename = "shard_key")]
    _shard_key: Option<Value>,
}

/// Sets the given keys of the payload of points.
#[utoipa::path(
    post, path = "/collections/{collection}/points/payload", operation_id = "set_payload", tag = "points",
    params(("collection" = String, Path, description = "Name or alias"), Context),
    request_body = SetPayload,
    responses(QdrantAnswers),
)]
pub(super) async fn set_payload(
    state: State<App>,
    path: Path<String>,
    context: Context,
    body: Bytes,
) -> Result<Response, QdrantError> {
    write_payload(state, path, context, body, PayloadMode::Merge).await
}

/// Replaces the payload of points.
#[utoipa::path(
    put, path = "/collections/{collection}/points/payload", operation_id = "overwrite_payload", tag = "points",
    params(("collection" = String, Path, description = "Name or alias"), Context),
    request_body = SetPayload,
    responses(QdrantAnswers),
)]
pub(super) async fn overwrite_payload(
    state: State<App>,
    path: Path<String>,
    context: Context,
    body: Bytes,
) -> Result<Response, QdrantError> {
    write_payload(state, path, context, body, PayloadMode::Overwrite).await
}

async fn write_payload(
    State(app): State<App>,
    Path(name): Path<String>,
    context: Context,
    body: Bytes,
    mode: PayloadMode,
) -> Result<Response, QdrantError> {
    let request: SetPayload = json(&body)?;
    if request.key.is_some() {
        return Err(Error::invalid("key", "setting a nested key is not supported").into());
    }
    let target = shapes::target(request.points, request.filter.as_ref())?;
    let payload = Value::Object(request.payload).to_string();
    change(&app, &name, target, &context, |target| Command::SetPayload {
        target,
        payload: payload.clone(),
        mode,
    })
    .await
}

#[derive(Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
struct DeletePayload {
    keys: Vec<String>,
    #[schema(value_type = Option<Vec<PointIdShape>>)]
    points: Option<Vec<PointId>>,
    #[serde(default, deserialize_with = "unique::value")]
    filter: Option<Value>,
    #[serde(rename = "shard_key")]
    _shard_key: Option<Value>,
}

/// Removes keys from the payload of points.
#[utoipa::path(
    post, path = "/collections/{collection}/points/payload/delete", operation_id = "delete_payload", tag = "points",
    params(("collection" = String, Path, description = "Name or alias"), Context),
    request_body = DeletePayload,
    responses(QdrantAnswers),
)]
pub(super) async fn delete_payload(
    State(app): State<App>,
    Path(name): Path<String>,
    context: Context,
    body: Bytes,
) -> Result<Response, QdrantError> {
    let request: DeletePayload = json(&body)?;
    let target = shapes::target(request.points, request.filter.as_ref())?;
    let keys = request.keys;
    change(&app, &name, target, &context, |target| Command::DeletePayload {
        target,
        keys: Some(keys.clone()),
    })
    .await
}

async fn change(
    app: &App,
    name: &str,
    target: Target,
    context: &Context,
    command: impl Fn(Target) -> Command,
) -> Result<Response, QdrantError> {
    let started = Instant::now();
    let cluster = &app.running()?.cluster;
    let found = Found::find(cluster, name).await?;
    let (_, position) = write_target(cluster, &found, target, context, command).await?;
    Ok(updated(started, &position))
}

#[derive(Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
struct Scroll {
    #[schema(value_type = Option<PointIdShape>)]
    offset: Option<PointId>,
    limit: Option<u64>,
    #[serde(default, deserialize_with = "unique::value")]
    filter: Option<Value>,
    with_payload: Option<Value>,
    with_vector: Option<Value>,
    order_by: Option<Value>,
    #[serde(rename = "shard_key")]
    _shard_key: Option<Value>,
}

/// Points in the order of their ids, page by page.
#[utoipa::path(
    post, path = "/collections/{collection}/points/scroll", operation_id = "scroll_points", tag = "points",
    params(("collection" = String, Path, description = "Name or alias"), Context),
    request_body = Scroll,
    responses(QdrantAnswers),
)]
pub(super) async fn scroll(
    State(app): State<App>,
    Path(name): Path<String>,
    context: Context,
    body: Bytes,
) -> Result<Response, QdrantError> {
    let started = Instant::now();
    let request: Scroll = json(&body)?;
    if request.order_by.is_some_and(|order| !order.is_null()) {
        return Err(
            Error::invalid("order_by", "is not supported; points come in the order of their ids").into()
        );
    }
    let limit = shapes::limit(request.limit, "limit", 10)?;
    let question = Read::Scroll {
        from: request.offset,
        filter: shapes::filter(request.filter.as_ref(), "filter")?,
        // One more tells where the next page begins.
        limit: limit + 1,
        payload: shapes::select(request.with_payload.as_ref(), "with_payload", Select::All)?,
        vectors: shapes::select(request.with_vector.as_ref(), "with_vector", Select::Nothing)?,
    };
    let cluster = &app.running()?.cluster;
    let found = Found::find(cluster, &name).await?;
    let gathered = ask_all(cluster, &found, &question, &context).await?;
    let mut hits: Vec<Hit> = Vec::new();
    for answer in gathered.answers {
        if let Answer::Points(found) = answer {
            hits.extend(found);
        }
    }
    hits.sort_by_key(|hit| hit.id);
    let next = hits.get(limit).map(|hit| hit.id);
    hits.truncate(limit);
    let records: Vec<Value> = hits.into_iter().map(|hit| shapes::record(hit, false)).collect();
    Ok(envelope(json!({"points": records, "next_page_offset": next}), started, &gathered.position))
}

#[derive(Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
struct Count {
    #[serde(default, deserialize_with = "unique::value")]
    filter: Option<Value>,
    /// Counts are always exact.
    #[serde(rename = "exact")]
    _exact: Option<bool>,
    #[serde(rename = "shard_key")]
    _shard_key: Option<Value>,
}

/// How many points a filter keeps.
#[utoipa::path(
    post, path = "/collections/{collection}/points/count", operation_id = "count_points", tag = "points",
    params(("collection" = String, Path, description = "Name or alias"), Context),
    request_body = Count,
    responses(QdrantAnswers),
)]
pub(super) async fn count(
    State(app): State<App>,
    Path(name): Path<String>,
    context: Context,
    body: Bytes,
) -> Result<Response, QdrantError> {
    let started = Instant::now();
    let request: Count = json(&body)?;
    let cluster = &app.running()?.cluster;
    let found = Found::find(cluster, &name).await?;
    let filter = shapes::filter(request.filter.as_ref(), "filter")?;
    let count = points::count(cluster, &found, filter, &context).await?;
    Ok(envelope(json!({"count": count}), started, &Position::default()))
}
