//! `/v1/vector_stores`: a store is a collection with an embedder; search over it is hybrid.

use axum::Json;
use axum::body::Bytes;
use axum::extract::{Path, Query, State};
use axum::response::{IntoResponse, Response};
use serde::Deserialize;
use serde_json::{Map, Value, json};
use shoal_actors::embed::TextKind;
use shoal_actors::search::{self, RRF_K};
use shoal_engine::command::{Answer, Hit, Leg, Read, Search, Select, Stats};
use shoal_proto::{
    ChunkerConfig, CollectionConfig, Distance, EmbedderConfig, Error, FieldType, VectorParams,
};
use shoal_raft::cluster::{Command, Response as ControlResponse};
use utoipa::ToSchema;
use uuid::Uuid;

use super::embeddings::embed_in_time;
use super::filters;
use super::page::{PageQuery, page};
use super::store_files;
use crate::app::App;
use crate::http::context::{Context, json as read_json, position_header};
use crate::http::error::OpenAiError;
use crate::http::openapi::OpenAiAnswers;
use crate::http::points::{Found, ask_all};
use crate::http::qdrant::create_and_wait;
use crate::http::unique;

/// The prefix of a store's id.
pub const PREFIX: &str = "vs_";
/// The most pairs of metadata or attributes.
pub const MAX_PAIRS: usize = 16;
/// The most results of one search.
const MAX_RESULTS: u64 = 50;
/// Candidates of each list before they are fused.
const CANDIDATES: usize = 100;

#[derive(Default, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
struct CreateStore {
    name: Option<String>,
    description: Option<String>,
    file_ids: Option<Vec<String>>,
    #[serde(default, deserialize_with = "unique::object")]
    #[schema(value_type = Option<Object>)]
    metadata: Option<Map<String, Value>>,
    expires_after: Option<ExpiresAfter>,
    #[serde(default, deserialize_with = "unique::value")]
    chunking_strategy: Option<Value>,
    /// The embedding model: an extension.
    embedding_model: Option<String>,
    /// Shards: an extension.
    shard_number: Option<u32>,
    /// Replicas of each shard: an extension.
    replication_factor: Option<u32>,
}

#[derive(Clone, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
struct ExpiresAfter {
    anchor: String,
    days: u64,
}

/// What a client gave a store, as it is kept with the collection.
#[derive(Clone, Debug, Default, Deserialize, serde::Serialize)]
#[serde(default)]
struct Attributes {
    name: String,
    description: Option<String>,
    metadata: Option<Map<String, Value>>,
    expires_after: Option<Value>,
}

fn attributes(config: &CollectionConfig) -> Attributes {
    serde_json::from_str(&config.attributes_json).unwrap_or_default()
}

/// A store by its id.
pub(super) async fn find(app: &App, store: &str) -> Result<Found, Error> {
    let missing = || Error::not_found(format!("no such vector store: {store}"));
    let found = Found::find_if_any(&app.running()?.cluster, store).await?;
    found.filter(|found| found.config.embedder.is_some()).ok_or_else(missing)
}

/// Creates a vector store.
#[utoipa::path(
    post, path = "/v1/vector_stores", operation_id = "create_vector_store", tag = "documents",
    params(Context),
    request_body = CreateStore,
    responses(OpenAiAnswers),
)]
pub(super) async fn create(
    State(app): State<App>,
    context: Context,
    body: Bytes,
) -> Result<Response, OpenAiError> {
    let request: CreateStore = if body.is_empty() { CreateStore::default() } else { read_json(&body)? };
    let running = app.running()?;
    let embedders = running.work.embedders();
    let embedder = embedders.config(request.embedding_model.as_deref())?;
    let most_tokens = embedders.max_tokens(&embedder.model)?;
    let chunker = store_files::chunker(request.chunking_strategy.as_ref(), most_tokens)?.unwrap_or_default();
    let kept = Attributes {
        name: request.name.unwrap_or_default(),
        description: request.description,
        metadata: checked_metadata(request.metadata)?,
        expires_after: expires_after(request.expires_after)?,
    };
    let mut config = CollectionConfig {
        text_fields: vec!["text".into(), "heading".into()],
        chunker: Some(chunker),
        attributes_json: json!(kept).to_string(),
        ..CollectionConfig::default()
    };
    config.vectors.insert(String::new(), VectorParams::new(embedder.dimension, Distance::Cosine));
    config.payload_indexes.insert("document_id".into(), FieldType::Keyword);
    config.embedder = Some(embedder);
    let store = format!("{PREFIX}{}", Uuid::from_bytes(context.part_id("store").0).simple());
    let command = Command::CreateCollection {
        request_id: context.request_id,
        name: store.clone(),
        config,
        shard_count: request.shard_number,
        replication_factor: request.replication_factor,
        created_at: shoal_actors::cluster::unix_now(),
    };
    create_and_wait(&running.cluster, command, &store, &context).await?;
    let found = find(&app, &store).await?;
    for file in request.file_ids.unwrap_or_default() {
        store_files::attach(&app, &found, &file, None, chunker, &context).await?;
    }
    Ok(Json(shape(&app, &found, &context).await?).into_response())
}

fn checked_metadata(metadata: Option<Map<String, Value>>) -> Result<Option<Map<String, Value>>, Error> {
    if metadata.as_ref().is_some_and(|map| map.len() > MAX_PAIRS) {
        return Err(Error::invalid("metadata", format!("at most {MAX_PAIRS} pairs")));
    }
    if let Some((key, _)) = metadata.iter().flatten().find(|(_, value)| !value.is_string()) {
        return Err(Error::invalid(format!("metadata.{key}"), "expected a string"));
    }
    Ok(metadata)
}

fn expires_after(given: Option<ExpiresAfter>) -> Result<Option<Value>, Error> {
    let Some(given) = given else { return Ok(None) };
    if given.anchor != "last_active_at" || !(1..=365).contains(&given.days) {
        return Err(Error::invalid("expires_after", "expected anchor last_active_at and 1 to 365 days"));
    }
    Err(Error::invalid("expires_after", "is not supported: stores do not expire"))
}

async fn shape(app: &App, found: &Found, context: &Context) -> Result<Value, Error> {
    let gathered = ask_all(&app.running()?.cluster, found, &Read::Stats, context).await?;
    let mut sum = Stats::default();
    for answer in &gathered.answers {
        if let Answer::Stats(stats) = answer {
            sum.document_bytes += stats.document_bytes;
            sum.documents.iter_mut().zip(stats.documents).for_each(|(sum, count)| *sum += count);
        }
    }
    let [in_progress, completed, failed, cancelled] = sum.documents;
    let kept = attributes(&found.config);
    let created_at = found.state.collections.get(&found.name).map_or(0, |collection| collection.created_at);
    Ok(json!({
        "id": found.name, "object": "vector_store", "created_at": created_at, "name": kept.name,
        "description": kept.description, "usage_bytes": sum.document_bytes,
        "file_counts": {
            "in_progress": in_progress, "completed": completed, "failed": failed, "cancelled": cancelled,
            "total": in_progress + completed + failed + cancelled,
        },
        "status": if in_progress > 0 { "in_progress" } else { "completed" },
        "expires_after": kept.expires_after, "expires_at": null, "last_active_at": created_at,
        "metadata": kept.metadata,
        "embedding_model": found.config.embedder.as_ref().map(|embedder| &embedder.model),
    }))
}

/// The vector stores.
#[utoipa::path(
    get,
    path = "/v1/vector_stores",
    operation_id = "list_vector_stores",
    tag = "documents",
    params(PageQuery, Context),
    responses(OpenAiAnswers)
)]
pub(super) async fn list(
    State(app): State<App>,
    Query(query): Query<PageQuery>,
    context: Context,
) -> Result<Json<Value>, OpenAiError> {
    let state = app.running()?.cluster.state();
    let stores: Vec<(u64, String)> = state
        .usable_collections()
        .filter(|(_, collection)| collection.config.embedder.is_some())
        .map(|(name, collection)| (collection.created_at, name.clone()))
        .collect();
    // The page is cut first: only its stores are asked for their counts.
    let items = stores.into_iter().map(|(at, name)| (at, name.clone(), json!({"id": name}))).collect();
    let mut cut = page(items, &query, 100, 20)?;
    if let Some(data) = cut["data"].as_array_mut() {
        for item in data {
            let found = find(&app, item["id"].as_str().unwrap_or_default()).await?;
            *item = shape(&app, &found, &context).await?;
        }
    }
    Ok(Json(cut))
}

/// A vector store and the counts of its files.
#[utoipa::path(
    get, path = "/v1/vector_stores/{store}", operation_id = "get_vector_store", tag = "documents",
    params(("store" = String, Path, description = "Id of the vector store"), Context),
    responses(OpenAiAnswers),
)]
pub(super) async fn get(
    State(app): State<App>,
    Path(store): Path<String>,
    context: Context,
) -> Result<Json<Value>, OpenAiError> {
    let found = find(&app, &store).await?;
    Ok(Json(shape(&app, &found, &context).await?))
}

#[derive(Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
struct UpdateStore {
    name: Option<String>,
    #[serde(default, deserialize_with = "unique::object")]
    #[schema(value_type = Option<Object>)]
    metadata: Option<Map<String, Value>>,
    expires_after: Option<ExpiresAfter>,
}

/// Changes name and metadata of a store.
#[utoipa::path(
    post, path = "/v1/vector_stores/{store}", operation_id = "modify_vector_store", tag = "documents",
    params(("store" = String, Path, description = "Id of the vector store"), Context),
    request_body = UpdateStore,
    responses(OpenAiAnswers),
)]
pub(super) async fn update(
    State(app): State<App>,
    Path(store): Path<String>,
    context: Context,
    body: Bytes,
) -> Result<Json<Value>, OpenAiError> {
    let request: UpdateStore = read_json(&body)?;
    let found = find(&app, &store).await?;
    let mut kept = attributes(&found.config);
    if let Some(name) = request.name {
        kept.name = name;
    }
    if let Some(metadata) = checked_metadata(request.metadata)? {
        kept.metadata = Some(metadata);
    }
    if request.expires_after.is_some() {
        kept.expires_after = expires_after(request.expires_after)?;
    }
    let attributes_json = json!(kept).to_string();
    let cluster = &app.running()?.cluster;
    let command =
        Command::SetAttributes { name: found.name.clone(), attributes_json: attributes_json.clone() };
    cluster.control(command, context.deadline).await?;
    let is_there = |state: &std::sync::Arc<shoal_raft::cluster::ClusterState>| {
        state
            .collections
            .get(&found.name)
            .is_none_or(|collection| collection.config.attributes_json == attributes_json)
    };
    cluster.wait_state(context.deadline, is_there).await?;
    let found = find(&app, &store).await?;
    Ok(Json(shape(&app, &found, &context).await?))
}

/// Deletes a store with its documents. The files stay.
#[utoipa::path(
    delete, path = "/v1/vector_stores/{store}", operation_id = "delete_vector_store", tag = "documents",
    params(("store" = String, Path, description = "Id of the vector store"), Context),
    responses(OpenAiAnswers),
)]
pub(super) async fn delete(
    State(app): State<App>,
    Path(store): Path<String>,
    context: Context,
) -> Result<Json<Value>, OpenAiError> {
    let found = find(&app, &store).await?;
    let cluster = &app.running()?.cluster;
    let command = Command::DeleteCollection { request_id: context.request_id, name: found.name.clone() };
    let response = cluster.control(command, context.deadline).await?;
    cluster.wait_state(context.deadline, |state| !state.collections.contains_key(&found.name)).await?;
    let deleted = response != ControlResponse::Absent;
    Ok(Json(json!({"id": store, "object": "vector_store.deleted", "deleted": deleted})))
}

#[derive(Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
struct SearchStore {
    query: Value,
    #[serde(default, deserialize_with = "unique::value")]
    filters: Option<Value>,
    max_num_results: Option<u64>,
    ranking_options: Option<RankingOptions>,
    /// Accepted: no rewriting is done.
    #[serde(rename = "rewrite_query")]
    _rewrite_query: Option<bool>,
}

#[derive(Default, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
struct RankingOptions {
    ranker: Option<String>,
    score_threshold: Option<f32>,
}

/// Finds chunks by meaning and words: dense and BM25, fused.
#[utoipa::path(
    post, path = "/v1/vector_stores/{store}/search", operation_id = "search_vector_store", tag = "documents",
    params(("store" = String, Path, description = "Id of the vector store"), Context),
    request_body = SearchStore,
    responses(OpenAiAnswers),
)]
pub(super) async fn search(
    State(app): State<App>,
    Path(store): Path<String>,
    context: Context,
    body: Bytes,
) -> Result<Response, OpenAiError> {
    let request: SearchStore = read_json(&body)?;
    let found = find(&app, &store).await?;
    let queries = queries(&request.query)?;
    let limit = request.max_num_results.unwrap_or(10);
    if !(1..=MAX_RESULTS).contains(&limit) {
        return Err(
            Error::invalid("max_num_results", format!("{limit} is not between 1 and {MAX_RESULTS}")).into()
        );
    }
    let filter =
        request.filters.as_ref().filter(|filter| !filter.is_null()).map(filters::translate).transpose()?;
    let ranking = request.ranking_options.unwrap_or_default();
    let is_hybrid = ranking.ranker.as_deref() != Some("none");
    let running = app.running()?;
    let embedder = embedder(&found)?;
    running.work.embedders().check(embedder)?;
    let vectors = embed_in_time(&running.work, &embedder.model, TextKind::Query, &queries, &context).await?;
    let mut legs: Vec<Leg> = vectors
        .into_iter()
        .map(|vector| Leg::Dense { using: String::new(), vector, exact: false, ef: None })
        .collect();
    if is_hybrid {
        legs.extend(queries.iter().map(|query| Leg::Text { query: query.clone() }));
    }
    let higher = vec![true; legs.len()];
    let wanted = Search {
        legs,
        filter: filter.map(|filter| filter.to_string()),
        limit: CANDIDATES,
        score_threshold: None,
        payload: Select::All,
        vectors: Select::Nothing,
    };
    let options = context.read_options();
    let (lists, shards, position) =
        search::search(&running.cluster, &found.name, wanted, &higher, &options, context.allow_partial)
            .await?;
    let count = lists.len();
    let best = if count == 1 { 1.0 } else { count as f32 / (RRF_K + 1.0) };
    let mut hits = match count {
        1 => lists.into_iter().next().unwrap_or_default(),
        _ => search::fuse(lists, CANDIDATES, RRF_K),
    };
    // Scores lie between 0 and 1, as clients expect: a hit that every list puts first has 1.
    hits.iter_mut().for_each(|hit| hit.score = (hit.score / best).clamp(0.0, 1.0));
    hits.retain(|hit| ranking.score_threshold.is_none_or(|worst| hit.score >= worst));
    hits.truncate(limit as usize);
    let data: Vec<Value> = hits.into_iter().map(result).collect();
    let body = json!({
        "object": "vector_store.search_results.page", "search_query": queries, "data": data,
        "has_more": false, "next_page": null, "shards": shards,
    });
    Ok((position_header(&position), Json(body)).into_response())
}

fn queries(query: &Value) -> Result<Vec<String>, Error> {
    let queries: Option<Vec<String>> = match query {
        Value::String(text) => Some(vec![text.clone()]),
        Value::Array(items) => items.iter().map(|item| item.as_str().map(str::to_owned)).collect(),
        _ => None,
    };
    let queries =
        queries.ok_or_else(|| Error::invalid("query", "expected a string or an array of strings"))?;
    if queries.is_empty() || queries.len() > 8 || queries.iter().any(|query| query.trim().is_empty()) {
        return Err(Error::invalid("query", "expected 1 to 8 queries, none of them empty"));
    }
    Ok(queries)
}

/// The payload keys that are Shoal's own and no attributes.
const OWN_KEYS: [&str; 7] =
    ["text", "document_id", "filename", "chunk_index", "page", "heading", "char_range"];

fn result(hit: Hit) -> Value {
    let mut payload: Map<String, Value> =
        serde_json::from_str(hit.payload.as_deref().unwrap_or_default()).unwrap_or_default();
    let mut take = |key: &str| payload.shift_remove(key).unwrap_or(Value::Null);
    let [text, document, filename, index, page, heading, range] = OWN_KEYS.map(&mut take);
    json!({
        "file_id": document, "filename": filename, "score": hit.score, "attributes": payload,
        "content": [{"type": "text", "text": text}],
        "chunk_id": hit.id, "chunk_index": index, "page": page, "heading": heading, "char_range": range,
    })
}

/// The model of a store.
pub(super) fn embedder(found: &Found) -> Result<&EmbedderConfig, Error> {
    found.config.embedder.as_ref().ok_or_else(|| Error::internal("a store has an embedder"))
}

/// The chunker of a store.
pub(super) fn store_chunker(config: &CollectionConfig) -> ChunkerConfig {
    config.chunker.unwrap_or_default()
}

/// Whether a key may be an attribute's.
pub(super) fn is_own_key(key: &str) -> bool {
    OWN_KEYS.contains(&key)
}
