//! Collections, aliases and payload indexes.

use std::collections::BTreeMap;
use std::time::Instant;

use axum::body::Bytes;
use axum::extract::{Path, State};
use axum::response::Response;
use serde::Deserialize;
use serde_json::{Value, json};
use shoal_actors::Cluster;
use shoal_engine::command::{self, Answer, Read, Stats};
use shoal_proto::{CollectionConfig, Distance, Error, FieldType, GraphType, Position, VectorParams};
use shoal_raft::cluster::{ClusterState, Command, Response as ControlResponse};
use utoipa::ToSchema;

use super::shapes::envelope;
use crate::app::App;
use crate::http::context::{Context, json};
use crate::http::error::QdrantError;
use crate::http::openapi::QdrantAnswers;
use crate::http::points::{Found, ask_all, write_all};
use crate::http::unique;

#[derive(Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
struct CreateCollection {
    #[serde(default, deserialize_with = "unique::value")]
    vectors: Option<Value>,
    shard_number: Option<u32>,
    replication_factor: Option<u32>,
    hnsw_config: Option<HnswConfig>,
    quantization_config: Option<Value>,
    /// Payload fields with full-text search: an extension.
    text_fields: Option<Vec<String>>,
    // Accepted because clients send them; storage and write quorum are not up to a collection
    // here: payloads are on disk, and a write always needs a majority.
    #[serde(rename = "on_disk_payload")]
    _on_disk_payload: Option<bool>,
    #[serde(rename = "write_consistency_factor")]
    _write_consistency_factor: Option<u32>,
    #[serde(rename = "optimizers_config")]
    _optimizers_config: Option<Value>,
    #[serde(rename = "wal_config")]
    _wal_config: Option<Value>,
    sparse_vectors: Option<Value>,
    sharding_method: Option<Value>,
    init_from: Option<Value>,
    strict_mode_config: Option<Value>,
    #[serde(default, deserialize_with = "unique::value")]
    metadata: Option<Value>,
}

#[derive(Clone, Copy, Default, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
struct HnswConfig {
    m: Option<usize>,
    ef_construct: Option<usize>,
    #[serde(rename = "full_scan_threshold")]
    _full_scan_threshold: Option<u64>,
    #[serde(rename = "max_indexing_threads")]
    _max_indexing_threads: Option<u64>,
    #[serde(rename = "on_disk")]
    _on_disk: Option<bool>,
    #[serde(rename = "payload_m")]
    _payload_m: Option<u64>,
}

#[derive(Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
struct VectorShape {
    size: usize,
    #[schema(value_type = String)]
    distance: Distance,
    datatype: Option<Datatype>,
    hnsw_config: Option<HnswConfig>,
    quantization_config: Option<Value>,
    #[serde(rename = "on_disk")]
    _on_disk: Option<bool>,
    multivector_config: Option<Value>,
}

#[derive(Clone, Copy, Deserialize, ToSchema)]
#[serde(rename_all = "lowercase")]
enum Datatype {
    Float32,
    Float16,
}

/// Creates a collection and waits until its shards answer.
#[utoipa::path(
    put, path = "/collections/{collection}", operation_id = "create_collection", tag = "points",
    params(("collection" = String, Path, description = "Name or alias"), Context),
    request_body = CreateCollection,
    responses(QdrantAnswers),
)]
pub(super) async fn create(
    State(app): State<App>,
    Path(name): Path<String>,
    context: Context,
    body: Bytes,
) -> Result<Response, QdrantError> {
    let started = Instant::now();
    let request: CreateCollection = json(&body)?;
    refuse_internal(&name)?;
    let (shard_count, replication_factor) = (request.shard_number, request.replication_factor);
    let config = schema(request)?;
    config.validate()?;
    let command = Command::CreateCollection {
        request_id: context.request_id,
        name: name.clone(),
        config,
        shard_count,
        replication_factor,
        created_at: shoal_actors::cluster::unix_now(),
    };
    let cluster = &app.running()?.cluster;
    create_and_wait(cluster, command, &name, &context).await?;
    Ok(envelope(true, started, &Position::default()))
}

/// Puts the command through and waits until the collection's shards answer, so that the next
/// request finds them.
///
/// # Errors
/// Conflict when the name is taken; unavailable when the shards do not come up in time.
pub(in crate::http) async fn create_and_wait(
    cluster: &Cluster,
    command: Command,
    name: &str,
    context: &Context,
) -> Result<(), Error> {
    cluster.control(command, context.deadline).await.map_err(|mut error| {
        if error.message.ends_with("already exists") {
            error.message = format!("Wrong input: Collection `{name}` already exists!");
        }
        error
    })?;
    cluster.wait_state(context.deadline, |state| state.collections.contains_key(name)).await?;
    let found = Found::find(cluster, name).await?;
    ask_all(cluster, &found, &Read::Stats, context).await.map(drop)
}

pub(super) fn refuse_internal(name: &str) -> Result<(), Error> {
    match name.starts_with('_') {
        true => Err(Error::invalid("collection_name", "names that start with '_' are Shoal's own")),
        false => Ok(()),
    }
}

fn schema(request: CreateCollection) -> Result<CollectionConfig, Error> {
    let unsupported = [
        ("sparse_vectors", &request.sparse_vectors),
        ("sharding_method", &request.sharding_method),
        ("init_from", &request.init_from),
        ("strict_mode_config", &request.strict_mode_config),
    ];
    for (field, value) in unsupported {
        if value.as_ref().is_some_and(|value| !value.is_null() && value != &json!({})) {
            return Err(Error::invalid(field, "is not supported"));
        }
    }
    let hnsw = request.hnsw_config.unwrap_or_default();
    let quantization = request.quantization_config.as_ref();
    let mut config =
        CollectionConfig { text_fields: request.text_fields.unwrap_or_default(), ..Default::default() };
    if let Some(metadata) = request.metadata.filter(|value| !value.is_null()) {
        config.attributes_json = metadata.to_string();
    }
    let shape = |value: &Value, field: &str| -> Result<VectorParams, Error> {
        let shape: VectorShape = serde_path_to_error::deserialize(value)
            .map_err(|error| Error::invalid(format!("{field}.{}", error.path()), error.inner()))?;
        vector_params(shape, hnsw, quantization, field)
    };
    match &request.vectors {
        None | Some(Value::Null) => {}
        Some(value) if value.get("size").is_some() => {
            config.vectors.insert(String::new(), shape(value, "vectors")?);
        }
        Some(Value::Object(map)) => {
            for (name, value) in map {
                shoal_proto::collection::validate_name("vectors", name)?;
                config.vectors.insert(name.clone(), shape(value, &format!("vectors.{name}"))?);
            }
        }
        Some(_) => return Err(Error::invalid("vectors", "expected an object")),
    }
    Ok(config)
}

fn vector_params(
    shape: VectorShape,
    outer: HnswConfig,
    outer_quantization: Option<&Value>,
    field: &str,
) -> Result<VectorParams, Error> {
    if shape.multivector_config.is_some_and(|value| !value.is_null()) {
        return Err(Error::invalid(format!("{field}.multivector_config"), "is not supported"));
    }
    let mut params = VectorParams::new(shape.size, shape.distance);
    let inner = shape.hnsw_config.unwrap_or_default();
    params.m = inner.m.or(outer.m).unwrap_or(params.m);
    params.ef_construct = inner.ef_construct.or(outer.ef_construct).unwrap_or(params.ef_construct);
    if let Some(datatype) = shape.datatype {
        params.graph = match datatype {
            Datatype::Float32 => GraphType::F32,
            Datatype::Float16 => GraphType::F16,
        };
    }
    let quantization =
        shape.quantization_config.as_ref().or(outer_quantization).filter(|value| !value.is_null());
    if let Some(quantization) = quantization {
        let is_int8 = quantization.pointer("/scalar/type").and_then(Value::as_str) == Some("int8");
        if !is_int8 || shape.distance != Distance::Cosine {
            let message = "only scalar int8 with cosine distance is supported";
            return Err(Error::invalid(format!("{field}.quantization_config"), message));
        }
        params.graph = GraphType::I8;
    }
    Ok(params)
}

/// Names of all collections.
#[utoipa::path(
    get,
    path = "/collections",
    operation_id = "list_collections",
    tag = "points",
    responses(QdrantAnswers)
)]
pub(super) async fn list(State(app): State<App>) -> Result<Response, QdrantError> {
    let started = Instant::now();
    let state = app.running()?.cluster.state();
    let names: Vec<Value> = state
        .usable_collections()
        .filter(|(name, _)| !name.starts_with('_'))
        .map(|(name, _)| json!({"name": name}))
        .collect();
    Ok(envelope(json!({"collections": names}), started, &Position::default()))
}

/// Whether a collection exists.
#[utoipa::path(
    get, path = "/collections/{collection}/exists", operation_id = "collection_exists", tag = "points",
    params(("collection" = String, Path, description = "Name or alias")),
    responses(QdrantAnswers),
)]
pub(super) async fn exists(
    State(app): State<App>,
    Path(name): Path<String>,
) -> Result<Response, QdrantError> {
    let exists = Found::find_if_any(&app.running()?.cluster, &name).await?.is_some();
    Ok(envelope(json!({"exists": exists}), Instant::now(), &Position::default()))
}

/// Schema, size and state of a collection.
#[utoipa::path(
    get, path = "/collections/{collection}", operation_id = "get_collection", tag = "points",
    params(("collection" = String, Path, description = "Name or alias"), Context),
    responses(QdrantAnswers),
)]
pub(super) async fn get(
    State(app): State<App>,
    Path(name): Path<String>,
    context: Context,
) -> Result<Response, QdrantError> {
    let started = Instant::now();
    let cluster = &app.running()?.cluster;
    let found = Found::find(cluster, &name).await?;
    let gathered = ask_all(cluster, &found, &Read::Stats, &context).await?;
    let mut sum = Stats::default();
    for answer in &gathered.answers {
        if let Answer::Stats(stats) = answer {
            sum.points += stats.points;
            sum.indexed_vectors += stats.indexed_vectors;
            sum.pending_vectors += stats.pending_vectors;
            sum.segments += stats.segments;
        }
    }
    let collection = found.state.collections.get(&found.name);
    let replication = collection.map_or(1, |collection| collection.replication_factor);
    let schema: BTreeMap<&String, Value> = found
        .config
        .payload_indexes
        .iter()
        .map(|(field, kind)| (field, json!({"data_type": field_type_name(*kind), "points": sum.points})))
        .collect();
    let result = json!({
        "status": "green",
        "optimizer_status": "ok",
        "indexed_vectors_count": sum.indexed_vectors,
        "points_count": sum.points,
        "segments_count": sum.segments.max(found.shards.len() as u64),
        "config": {
            "params": {
                "vectors": vectors_shape(&found.config),
                "shard_number": found.shards.len(),
                "replication_factor": replication,
                "write_consistency_factor": replication / 2 + 1,
                "on_disk_payload": true,
            },
            "hnsw_config": {"m": 16, "ef_construct": 100, "full_scan_threshold": 10_000, "max_indexing_threads": 1, "on_disk": false},
            "optimizer_config": {
                "deleted_threshold": 0.2, "vacuum_min_vector_number": 1000, "default_segment_number": 1,
                "max_segment_size": null, "memmap_threshold": null,
                "indexing_threshold": shoal_engine::vectors::GRAPH_MIN_VECTORS, "flush_interval_sec": 5,
                "max_optimization_threads": 1,
            },
            "wal_config": {"wal_capacity_mb": 32, "wal_segments_ahead": 0},
            "quantization_config": null,
        },
        "payload_schema": schema,
        "shoal": {"pending_vectors": sum.pending_vectors, "shards": gathered.shards},
    });
    Ok(envelope(result, started, &gathered.position))
}

fn vectors_shape(config: &CollectionConfig) -> Value {
    let shape = |params: &VectorParams| json!({"size": params.size, "distance": params.distance});
    match config.vectors.get("") {
        Some(params) => shape(params),
        None => {
            Value::Object(config.vectors.iter().map(|(name, params)| (name.clone(), shape(params))).collect())
        }
    }
}

/// Deletes a collection with all its points.
#[utoipa::path(
    delete, path = "/collections/{collection}", operation_id = "delete_collection", tag = "points",
    params(("collection" = String, Path, description = "Name or alias"), Context),
    responses(QdrantAnswers),
)]
pub(super) async fn delete(
    State(app): State<App>,
    Path(name): Path<String>,
    context: Context,
) -> Result<Response, QdrantError> {
    let started = Instant::now();
    refuse_internal(&name)?;
    let command = Command::DeleteCollection { request_id: context.request_id, name: name.clone() };
    let cluster = &app.running()?.cluster;
    let response = cluster.control(command, context.deadline).await?;
    let is_gone = |state: &std::sync::Arc<ClusterState>| state.collection(&name).is_err();
    cluster.wait_state(context.deadline, is_gone).await?;
    Ok(envelope(response != ControlResponse::Absent, started, &Position::default()))
}

#[derive(Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
struct CreateIndex {
    field_name: String,
    field_schema: Value,
}

/// Creates an index on a payload field.
#[utoipa::path(
    put, path = "/collections/{collection}/index", operation_id = "create_field_index", tag = "points",
    params(("collection" = String, Path, description = "Name or alias"), Context),
    request_body = CreateIndex,
    responses(QdrantAnswers),
)]
pub(super) async fn create_index(
    State(app): State<App>,
    Path(name): Path<String>,
    context: Context,
    body: Bytes,
) -> Result<Response, QdrantError> {
    let request: CreateIndex = json(&body)?;
    let kind =
        request.field_schema.as_str().or_else(|| request.field_schema.get("type").and_then(Value::as_str));
    let index = match kind {
        Some("keyword" | "uuid") => FieldType::Keyword,
        Some("integer") => FieldType::Integer,
        Some("float") => FieldType::Float,
        Some("bool") => FieldType::Bool,
        _ => {
            return Err(
                Error::invalid("field_schema", "expected keyword, integer, float, bool or uuid").into()
            );
        }
    };
    set_index(&app, &name, request.field_name, Some(index), &context).await
}

/// Deletes the index on a payload field.
#[utoipa::path(
    delete, path = "/collections/{collection}/index/{field}", operation_id = "delete_field_index", tag = "points",
    params(("collection" = String, Path, description = "Name or alias"), ("field" = String, Path, description = "Path of the payload field"), Context),
    responses(QdrantAnswers),
)]
pub(super) async fn delete_index(
    State(app): State<App>,
    Path((name, field)): Path<(String, String)>,
    context: Context,
) -> Result<Response, QdrantError> {
    set_index(&app, &name, field, None, &context).await
}

/// The schema in the control group serves shards to come; the shards that are there get the
/// command through their own logs, in order with their writes.
async fn set_index(
    app: &App,
    name: &str,
    field: String,
    index: Option<FieldType>,
    context: &Context,
) -> Result<Response, QdrantError> {
    let started = Instant::now();
    let cluster = &app.running()?.cluster;
    let found = Found::find(cluster, name).await?;
    let command = Command::SetPayloadIndex { name: found.name.clone(), field: field.clone(), index };
    cluster.control(command, context.deadline).await?;
    let command = command::Command::SetPayloadIndex { field, index };
    let (_, position) = write_all(cluster, &found, &command, context).await?;
    Ok(envelope(json!({"operation_id": 0, "status": "completed"}), started, &position))
}

fn field_type_name(kind: FieldType) -> &'static str {
    match kind {
        FieldType::Keyword => "keyword",
        FieldType::Integer => "integer",
        FieldType::Float => "float",
        FieldType::Bool => "bool",
    }
}

#[derive(Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
struct ChangeAliases {
    actions: Vec<AliasAction>,
}

#[derive(Deserialize, ToSchema)]
enum AliasAction {
    #[serde(rename = "create_alias")]
    Create { collection_name: String, alias_name: String },
    #[serde(rename = "delete_alias")]
    Delete { alias_name: String },
    #[serde(rename = "rename_alias")]
    Rename { old_alias_name: String, new_alias_name: String },
}

/// Creates, deletes and renames aliases, all or none.
#[utoipa::path(
    post, path = "/collections/aliases", operation_id = "update_aliases", tag = "points",
    params(Context),
    request_body = ChangeAliases,
    responses(QdrantAnswers),
)]
pub(super) async fn change_aliases(
    State(app): State<App>,
    context: Context,
    body: Bytes,
) -> Result<Response, QdrantError> {
    let started = Instant::now();
    let request: ChangeAliases = json(&body)?;
    let cluster = &app.running()?.cluster;
    for action in request.actions {
        let commands = match action {
            AliasAction::Create { collection_name, alias_name } => {
                vec![Command::SetAlias { alias: alias_name, collection: Some(collection_name) }]
            }
            AliasAction::Delete { alias_name } => {
                vec![Command::SetAlias { alias: alias_name, collection: None }]
            }
            AliasAction::Rename { old_alias_name, new_alias_name } => {
                let target =
                    cluster.fresh_state(context.deadline).await?.aliases.get(&old_alias_name).cloned();
                let target = target
                    .ok_or_else(|| Error::not_found(format!("alias `{old_alias_name}` doesn't exist")))?;
                vec![
                    Command::SetAlias { alias: new_alias_name, collection: Some(target) },
                    Command::SetAlias { alias: old_alias_name, collection: None },
                ]
            }
        };
        for command in commands {
            cluster.control(command, context.deadline).await?;
        }
    }
    Ok(envelope(true, started, &Position::default()))
}

/// All aliases.
#[utoipa::path(
    get,
    path = "/aliases",
    operation_id = "get_aliases",
    tag = "points",
    responses(QdrantAnswers)
)]
pub(super) async fn list_aliases(State(app): State<App>) -> Result<Response, QdrantError> {
    aliases(&app, None)
}

/// Aliases of one collection.
#[utoipa::path(
    get, path = "/collections/{collection}/aliases", operation_id = "get_collection_aliases", tag = "points",
    params(("collection" = String, Path, description = "Name or alias")),
    responses(QdrantAnswers),
)]
pub(super) async fn collection_aliases(
    State(app): State<App>,
    Path(name): Path<String>,
) -> Result<Response, QdrantError> {
    aliases(&app, Some(&name))
}

fn aliases(app: &App, of: Option<&str>) -> Result<Response, QdrantError> {
    let state = app.running()?.cluster.state();
    let aliases: Vec<Value> = state
        .aliases
        .iter()
        .filter(|(_, collection)| of.is_none_or(|name| name == collection.as_str()))
        .map(|(alias, collection)| json!({"alias_name": alias, "collection_name": collection}))
        .collect();
    Ok(envelope(json!({"aliases": aliases}), Instant::now(), &Position::default()))
}
