//! `/v1/vector_stores/{id}/files`: documents, which are files made searchable in one store.

use axum::Json;
use axum::body::Bytes;
use axum::extract::{Path, Query, State};
use axum::response::{IntoResponse, Response};
use serde::Deserialize;
use serde_json::{Map, Value, json};
use shoal_engine::command::{Answer, Command, Document, DocumentState, Outcome, Read, Stage};
use shoal_proto::{ChunkerConfig, DocumentId, Error, Position};
use utoipa::ToSchema;

use super::files;
use super::page::{PageQuery, page};
use super::stores::{self, MAX_PAIRS};
use crate::app::App;
use crate::http::context::{Context, json as read_json, position_header};
use crate::http::error::OpenAiError;
use crate::http::openapi::OpenAiAnswers;
use crate::http::points::{Found, ask_all};
use crate::http::unique;

/// The longest attribute key, in bytes.
const MAX_KEY_BYTES: usize = 64;
/// The longest attribute string, in characters.
const MAX_VALUE_CHARS: usize = 512;
/// What a polling client is told to wait, in milliseconds.
const POLL_MS: &str = "250";

#[derive(Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
struct CreateStoreFile {
    file_id: String,
    #[serde(default, deserialize_with = "unique::object")]
    #[schema(value_type = Option<Object>)]
    attributes: Option<Map<String, Value>>,
    #[serde(default, deserialize_with = "unique::value")]
    chunking_strategy: Option<Value>,
}

/// Attaches a file: it is parsed, chunked, embedded and published in the background.
#[utoipa::path(
    post, path = "/v1/vector_stores/{store}/files", operation_id = "create_vector_store_file", tag = "documents",
    params(("store" = String, Path, description = "Id of the vector store"), Context),
    request_body = CreateStoreFile,
    responses(OpenAiAnswers),
)]
pub(super) async fn create(
    State(app): State<App>,
    Path(store): Path<String>,
    context: Context,
    body: Bytes,
) -> Result<Response, OpenAiError> {
    let request: CreateStoreFile = read_json(&body)?;
    let found = stores::find(&app, &store).await?;
    let embedders = app.running()?.work.embedders();
    let embedder = stores::embedder(&found)?;
    embedders.check(embedder)?;
    let most_tokens = embedders.max_tokens(&embedder.model)?;
    let chunker = chunker(request.chunking_strategy.as_ref(), most_tokens)?
        .unwrap_or_else(|| stores::store_chunker(&found.config));
    let (document, position) =
        attach(&app, &found, &request.file_id, request.attributes, chunker, &context).await?;
    Ok((position_header(&position), Json(shape(&document, &store))).into_response())
}

/// Accepts a document: from the answer on it cannot be lost.
pub(super) async fn attach(
    app: &App,
    found: &Found,
    file: &str,
    attributes: Option<Map<String, Value>>,
    chunker: ChunkerConfig,
    context: &Context,
) -> Result<(Document, Position), Error> {
    let attributes = checked_attributes(attributes)?;
    // What this node cannot embed might stay in progress for as long.
    app.running()?.work.embedders().check(stores::embedder(found)?)?;
    let cluster = &app.running()?.cluster;
    let file = files::find(cluster, files::file_id(file)?, context).await?;
    let route = file.id.route();
    let command = Command::AcceptDocument {
        id: file.id,
        filename: file.filename,
        blob: file.blob,
        bytes: file.bytes,
        attributes,
        chunker,
    };
    let request_id = Some(context.part_id(&format!("accept/{}", file.id)));
    let (outcome, shard, index) =
        cluster.write_at(&found.name, route, request_id, command, context.deadline).await?;
    let mut position = context.position.clone();
    position.advance(shard.into(), index);
    Ok((document(outcome)?, position))
}

fn document(outcome: Outcome) -> Result<Document, Error> {
    match outcome {
        Outcome::Document(document) => Ok(*document),
        Outcome::Absent => Err(Error::not_found("no such file in this vector store")),
        _ => Err(Error::internal("a shard did not answer with a document")),
    }
}

fn checked_attributes(attributes: Option<Map<String, Value>>) -> Result<String, Error> {
    let attributes = attributes.unwrap_or_default();
    if attributes.len() > MAX_PAIRS {
        return Err(Error::invalid("attributes", format!("at most {MAX_PAIRS} pairs")));
    }
    for (key, value) in &attributes {
        let field = format!("attributes.{key}");
        if key.is_empty() || key.len() > MAX_KEY_BYTES || stores::is_own_key(key) {
            return Err(Error::invalid(
                field,
                format!("a key has 1 to {MAX_KEY_BYTES} bytes and is not one of Shoal's own"),
            ));
        }
        let good = match value {
            Value::String(text) => text.chars().count() <= MAX_VALUE_CHARS,
            Value::Number(_) | Value::Bool(_) => true,
            _ => false,
        };
        if !good {
            return Err(Error::invalid(
                field,
                format!("expected a number, a boolean, or a string of at most {MAX_VALUE_CHARS} characters"),
            ));
        }
    }
    Ok(Value::Object(attributes).to_string())
}

/// A chunking strategy: `auto` (none) or `static` with its two numbers, for a model that sees so many tokens.
///
/// # Errors
/// Invalid argument that names the field.
pub(super) fn chunker(strategy: Option<&Value>, most_tokens: usize) -> Result<Option<ChunkerConfig>, Error> {
    let Some(strategy) = strategy.filter(|value| !value.is_null()) else { return Ok(None) };
    match strategy.get("type").and_then(Value::as_str) {
        Some("auto") => Ok(None),
        Some("static") => {
            let number = |name: &str| {
                let field = format!("chunking_strategy.static.{name}");
                let value = strategy.pointer(&format!("/static/{name}")).and_then(Value::as_u64);
                value.map(|value| value as usize).ok_or_else(|| Error::invalid(field, "expected a number"))
            };
            let max_tokens = number("max_chunk_size_tokens")?;
            let overlap_tokens = number("chunk_overlap_tokens")?;
            let chunker = ChunkerConfig { max_tokens, overlap_tokens };
            let config = shoal_proto::CollectionConfig { chunker: Some(chunker), ..Default::default() };
            config.validate()?;
            if max_tokens > most_tokens {
                let message = format!(
                    "{max_tokens} is more than the {most_tokens} tokens of a text that the store's model sees"
                );
                return Err(Error::invalid("chunking_strategy.static.max_chunk_size_tokens", message));
            }
            Ok(Some(chunker))
        }
        _ => Err(Error::invalid("chunking_strategy.type", "expected auto or static")),
    }
}

fn status(state: DocumentState) -> &'static str {
    match state {
        DocumentState::InProgress => "in_progress",
        DocumentState::Completed => "completed",
        DocumentState::Failed => "failed",
        DocumentState::Cancelled => "cancelled",
    }
}

pub(super) fn shape(document: &Document, store: &str) -> Value {
    let attributes: Value = serde_json::from_str(&document.attributes).unwrap_or_default();
    let last_error = match (document.state, &document.error) {
        (DocumentState::Failed, reason) => json!({"code": "invalid_file", "message": reason}),
        // It is tried again and again.
        (DocumentState::InProgress, Some(reason)) => json!({"code": "server_error", "message": reason}),
        _ => Value::Null,
    };
    json!({
        "id": document.id.to_string(), "object": "vector_store.file", "created_at": document.created_at,
        "vector_store_id": store, "status": status(document.state), "last_error": last_error,
        "usage_bytes": if document.published.is_some() { document.bytes } else { 0 },
        "attributes": attributes,
        "chunking_strategy": {"type": "static", "static": {
            "max_chunk_size_tokens": document.chunker.max_tokens,
            "chunk_overlap_tokens": document.chunker.overlap_tokens,
        }},
        "filename": document.filename,
        "progress": {
            "stage": match document.stage {
                Stage::Queued => "queued",
                Stage::Parsing => "parsing",
                Stage::Embedding => "embedding",
                Stage::Published => "published",
            },
            "chunks_done": document.staged_chunks, "chunks_total": document.total_chunks,
            "attempts": document.attempts,
        },
    })
}

async fn find(
    app: &App,
    found: &Found,
    id: DocumentId,
    context: &Context,
) -> Result<(Document, Position), Error> {
    let cluster = &app.running()?.cluster;
    let options = context.read_options();
    let (answer, shard, applied) =
        cluster.read_at(&found.name, id.route(), &Read::GetDocument(id), &options).await?;
    let mut position = context.position.clone();
    position.advance(shard.into(), applied);
    match answer {
        Answer::Documents(documents) => match documents.into_iter().next() {
            Some(document) => Ok((document, position)),
            None => Err(Error::not_found(format!("no such file in this vector store: {id}"))),
        },
        _ => Err(Error::internal("a shard did not answer with documents")),
    }
}

/// State and attributes of an attached file.
#[utoipa::path(
    get, path = "/v1/vector_stores/{store}/files/{file}", operation_id = "get_vector_store_file", tag = "documents",
    params(("store" = String, Path, description = "Id of the vector store"), ("file" = String, Path, description = "Id of the file"), Context),
    responses(OpenAiAnswers),
)]
pub(super) async fn get(
    State(app): State<App>,
    Path((store, file)): Path<(String, String)>,
    context: Context,
) -> Result<Response, OpenAiError> {
    let found = stores::find(&app, &store).await?;
    let (document, position) = find(&app, &found, files::file_id(&file)?, &context).await?;
    let headers = [("openai-poll-after-ms", POLL_MS)];
    Ok((position_header(&position), headers, Json(shape(&document, &store))).into_response())
}

/// The files of a store.
#[utoipa::path(
    get, path = "/v1/vector_stores/{store}/files", operation_id = "list_vector_store_files", tag = "documents",
    params(("store" = String, Path, description = "Id of the vector store"), PageQuery, Context),
    responses(OpenAiAnswers),
)]
pub(super) async fn list(
    State(app): State<App>,
    Path(store): Path<String>,
    Query(query): Query<PageQuery>,
    context: Context,
) -> Result<Json<Value>, OpenAiError> {
    let found = stores::find(&app, &store).await?;
    let state = match query.filter.as_deref() {
        None => None,
        Some("in_progress") => Some(DocumentState::InProgress),
        Some("completed") => Some(DocumentState::Completed),
        Some("failed") => Some(DocumentState::Failed),
        Some("cancelled") => Some(DocumentState::Cancelled),
        Some(_) => {
            return Err(
                Error::invalid("filter", "expected in_progress, completed, failed or cancelled").into()
            );
        }
    };
    let gathered = ask_all(&app.running()?.cluster, &found, &Read::ListDocuments(state), &context).await?;
    let mut items = Vec::new();
    for answer in gathered.answers {
        if let Answer::Documents(documents) = answer {
            items.extend(
                documents
                    .iter()
                    .map(|document| (document.created_at, document.id.to_string(), shape(document, &store))),
            );
        }
    }
    Ok(Json(page(items, &query, 100, 20)?))
}

#[derive(Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
struct UpdateStoreFile {
    #[serde(default, deserialize_with = "unique::object")]
    #[schema(value_type = Option<Object>)]
    attributes: Option<Map<String, Value>>,
}

/// Replaces the attributes of an attached file.
#[utoipa::path(
    post, path = "/v1/vector_stores/{store}/files/{file}", operation_id = "update_vector_store_file_attributes", tag = "documents",
    params(("store" = String, Path, description = "Id of the vector store"), ("file" = String, Path, description = "Id of the file"), Context),
    request_body = UpdateStoreFile,
    responses(OpenAiAnswers),
)]
pub(super) async fn update(
    State(app): State<App>,
    Path((store, file)): Path<(String, String)>,
    context: Context,
    body: Bytes,
) -> Result<Json<Value>, OpenAiError> {
    let request: UpdateStoreFile = read_json(&body)?;
    let found = stores::find(&app, &store).await?;
    let id = files::file_id(&file)?;
    let attributes = checked_attributes(request.attributes)?;
    let command = Command::SetAttributes { id, attributes };
    let cluster = &app.running()?.cluster;
    let request_id = Some(context.request_id);
    let (outcome, ..) =
        cluster.write_at(&found.name, id.route(), request_id, command, context.deadline).await?;
    Ok(Json(shape(&document(outcome)?, &store)))
}

/// Detaches a file: its chunks go, the file stays.
#[utoipa::path(
    delete, path = "/v1/vector_stores/{store}/files/{file}", operation_id = "delete_vector_store_file", tag = "documents",
    params(("store" = String, Path, description = "Id of the vector store"), ("file" = String, Path, description = "Id of the file"), Context),
    responses(OpenAiAnswers),
)]
pub(super) async fn delete(
    State(app): State<App>,
    Path((store, file)): Path<(String, String)>,
    context: Context,
) -> Result<Json<Value>, OpenAiError> {
    let found = stores::find(&app, &store).await?;
    let id = files::file_id(&file)?;
    let cluster = &app.running()?.cluster;
    let (request_id, command) = (Some(context.request_id), Command::DeleteDocument(id));
    let (outcome, ..) =
        cluster.write_at(&found.name, id.route(), request_id, command, context.deadline).await?;
    document(outcome)?;
    Ok(Json(json!({"id": file, "object": "vector_store.file.deleted", "deleted": true})))
}

/// The parsed text of an attached file.
#[utoipa::path(
    get, path = "/v1/vector_stores/{store}/files/{file}/content", operation_id = "retrieve_vector_store_file_content", tag = "documents",
    params(("store" = String, Path, description = "Id of the vector store"), ("file" = String, Path, description = "Id of the file"), Context),
    responses(OpenAiAnswers),
)]
pub(super) async fn content(
    State(app): State<App>,
    Path((store, file)): Path<(String, String)>,
    context: Context,
) -> Result<Json<Value>, OpenAiError> {
    let found = stores::find(&app, &store).await?;
    let id = files::file_id(&file)?;
    find(&app, &found, id, &context).await?;
    let cluster = &app.running()?.cluster;
    let options = context.read_options();
    let (answer, ..) = cluster.read_at(&found.name, id.route(), &Read::GetChunks(id), &options).await?;
    let Answer::Chunks(payloads) = answer else {
        return Err(Error::internal("a shard did not answer with chunks").into());
    };
    // A heading stands before the first chunk under it, as it does in the file.
    let mut heading = Value::Null;
    let mut data = Vec::with_capacity(payloads.len());
    for payload in &payloads {
        let payload: Value = serde_json::from_str(payload).map_err(Error::internal)?;
        let text = payload["text"].as_str().unwrap_or_default();
        let text = match payload["heading"].as_str() {
            Some(title) if payload["heading"] != heading => format!("{title}\n\n{text}"),
            _ => text.to_owned(),
        };
        heading = payload["heading"].clone();
        data.push(json!({"type": "text", "text": text}));
    }
    Ok(Json(
        json!({"object": "vector_store.file_content.page", "data": data, "has_more": false, "next_page": null}),
    ))
}
