//! `/v1/files`: original bytes and their records, in the built-in collection of files.

use axum::Json;
use axum::body::Body;
use axum::extract::multipart::Field;
use axum::extract::{Multipart, Path, Query, State};
use axum::http::header;
use axum::response::{IntoResponse, Response};
use serde_json::{Value, json};
use shoal_actors::blobs::{self, Upload};
use shoal_actors::{Cluster, FILES_COLLECTION};
use shoal_engine::command::{Answer, Command, FileRecord, Outcome, Read};
use shoal_proto::{CollectionConfig, DocumentId, Error, ErrorCode, ShardId};
use shoal_raft::cluster;

use super::page::{PageQuery, page};
use crate::app::App;
use crate::http::context::{Context, bad_form, position_header};
use crate::http::error::OpenAiError;
use crate::http::openapi::{OpenAiAnswers, UploadForm};
use crate::http::points::{Found, ask_all};

const PURPOSES: [&str; 8] = [
    "assistants",
    "assistants_output",
    "batch",
    "batch_output",
    "fine-tune",
    "fine-tune-results",
    "vision",
    "user_data",
];
/// The longest file name, in bytes.
const MAX_FILENAME_BYTES: usize = 512;
/// The most fields of a form.
const MAX_FIELDS: usize = 16;

/// The files collection, made when it is needed first.
pub(super) async fn files(cluster: &Cluster, context: &Context) -> Result<Found, Error> {
    if let Some(found) = Found::find_if_any(cluster, FILES_COLLECTION).await? {
        return Ok(found);
    }
    let command = cluster::Command::CreateCollection {
        request_id: context.part_id("files"),
        name: FILES_COLLECTION.to_owned(),
        config: CollectionConfig::default(),
        shard_count: None,
        replication_factor: None,
        created_at: shoal_actors::cluster::unix_now(),
    };
    match cluster.control(command, context.deadline).await {
        Err(error) if error.code != ErrorCode::Conflict => return Err(error),
        // Another request made it first: the same collection.
        Ok(_) | Err(_) => {}
    }
    let state = cluster
        .wait_state(context.deadline, |state| state.collections.contains_key(FILES_COLLECTION))
        .await?;
    if state.restoring.contains_key(FILES_COLLECTION) {
        return Err(Error::unavailable("the files are being restored from a backup; try again later"));
    }
    Found::find(cluster, FILES_COLLECTION).await
}

fn shard_of(found: &Found, id: DocumentId) -> ShardId {
    found.state.shard_of(&found.state.collections[&found.name], id.route())
}

/// A file id in a path. Anything else is not found, as it would be with OpenAI.
pub(super) fn file_id(text: &str) -> Result<DocumentId, Error> {
    text.parse().map_err(|_| Error::not_found(format!("no such file: {text}")))
}

/// A file's record.
pub(super) async fn find(cluster: &Cluster, id: DocumentId, context: &Context) -> Result<FileRecord, Error> {
    let missing = || Error::not_found(format!("no such file: {id}"));
    let found = Found::find_if_any(cluster, FILES_COLLECTION).await?.ok_or_else(missing)?;
    let options = context.read_options();
    let (answer, ..) = cluster.read_at(&found.name, id.route(), &Read::GetFile(id), &options).await?;
    match answer {
        Answer::Files(files) => files.into_iter().next().ok_or_else(missing),
        _ => Err(Error::internal("a shard did not answer with files")),
    }
}

struct Form {
    upload: Upload,
    filename: String,
    purpose: String,
    id: Option<DocumentId>,
}

/// Uploads a file; its bytes are on disk on a majority when answered.
#[utoipa::path(
    post, path = "/v1/files", operation_id = "create_file", tag = "documents",
    params(Context),
    request_body(content = UploadForm, content_type = "multipart/form-data"),
    responses(OpenAiAnswers),
)]
pub(super) async fn create(
    State(app): State<App>,
    mut context: Context,
    multipart: Multipart,
) -> Result<Response, OpenAiError> {
    let running = app.running()?;
    let cluster = &running.cluster;
    if !cluster.is_writable() {
        return Err(Error::new(ErrorCode::DiskFull, "the disk's reserve is reached on this node").into());
    }
    let form = read_form(multipart, &running.blobs, app.config().limits.upload_bytes as u64).await?;
    // The form took as long as its sender did.
    context.begin_now();
    let found = files(cluster, &context).await?;
    let id = form.id.unwrap_or_else(|| DocumentId(context.part_id("file").0));
    let shard = shard_of(&found, id);
    let bytes = form.upload.bytes();
    // The bytes are durable on a majority before the log names them.
    let blob = blobs::replicate(cluster, &running.blobs, shard, form.upload).await?;
    // And the bytes as long as the network between the nodes.
    context.begin_now();
    let created_at = shoal_actors::cluster::unix_now();
    let record =
        FileRecord { id, filename: form.filename, blob: blob.hash, bytes, purpose: form.purpose, created_at };
    let request_id = Some(context.part_id("record"));
    let (_, index) =
        cluster.write(shard, request_id, &Command::PutFile(record.clone()), context.deadline).await?;
    blob.settle(cluster, &running.blobs, context.deadline).await?;
    metrics::counter!("document_operations_total", "operation" => "upload", "status" => "ok").increment(1);
    let mut position = context.position.clone();
    position.advance(shard.into(), index);
    Ok((position_header(&position), Json(shape(&record))).into_response())
}

async fn read_form(mut multipart: Multipart, blobs: &blobs::BlobStore, most: u64) -> Result<Form, Error> {
    let (mut upload, mut purpose, mut id) = (None, None, None);
    let mut fields = 0;
    while let Some(field) = multipart.next_field().await.map_err(|error| bad_form(&error))? {
        fields += 1;
        if fields > MAX_FIELDS {
            return Err(Error::invalid("form", format!("at most {MAX_FIELDS} fields")));
        }
        match field.name().unwrap_or_default() {
            "file" => upload = Some(read_file(field, blobs, most).await?),
            "purpose" => purpose = Some(field.text().await.map_err(|error| bad_form(&error))?),
            "id" => {
                let text = field.text().await.map_err(|error| bad_form(&error))?;
                id = Some(text.parse().map_err(|reason| Error::invalid("id", reason))?);
            }
            "expires_after[anchor]" | "expires_after[seconds]" => {
                return Err(Error::invalid("expires_after", "is not supported"));
            }
            other => return Err(Error::invalid(other, "unknown field; expected file and purpose")),
        }
    }
    let (upload, filename) = upload.ok_or_else(|| Error::invalid("file", "is missing"))?;
    let purpose = purpose.ok_or_else(|| Error::invalid("purpose", "is missing"))?;
    if !PURPOSES.contains(&purpose.as_str()) {
        return Err(Error::invalid("purpose", format!("{purpose:?} is not one of {}", PURPOSES.join(", "))));
    }
    Ok(Form { upload, filename, purpose, id })
}

async fn read_file(
    mut field: Field<'_>,
    blobs: &blobs::BlobStore,
    most: u64,
) -> Result<(Upload, String), Error> {
    let given = field.file_name().unwrap_or_default();
    // Only the last part of a path, and nothing that could break a line of a log.
    let name: String =
        given.rsplit(['/', '\\']).next().unwrap_or_default().chars().filter(|c| !c.is_control()).collect();
    if name.is_empty() || name.len() > MAX_FILENAME_BYTES {
        return Err(Error::invalid("file", format!("needs a file name of 1 to {MAX_FILENAME_BYTES} bytes")));
    }
    let spool = |error: std::io::Error| match error.kind() {
        std::io::ErrorKind::StorageFull => Error::new(ErrorCode::DiskFull, "the disk of this node is full"),
        _ => Error::internal(format!("the upload could not be stored: {error}")),
    };
    let mut upload = blobs.begin().await.map_err(spool)?;
    while let Some(bytes) = field.chunk().await.map_err(|error| bad_form(&error))? {
        upload.write(&bytes).await.map_err(spool)?;
        if upload.bytes() > most {
            return Err(Error::new(ErrorCode::TooLarge, format!("a file has at most {most} bytes")));
        }
    }
    match upload.bytes() {
        0 => Err(Error::invalid("file", "is empty")),
        _ => Ok((upload, name)),
    }
}

pub(super) fn shape(file: &FileRecord) -> Value {
    json!({
        "id": file.id.to_string(), "object": "file", "bytes": file.bytes, "created_at": file.created_at,
        "filename": file.filename, "purpose": file.purpose, "status": "processed",
        "expires_at": null, "status_details": null, "blake3": file.blob.to_string(),
    })
}

/// The files.
#[utoipa::path(
    get,
    path = "/v1/files",
    operation_id = "list_files",
    tag = "documents",
    params(PageQuery, Context),
    responses(OpenAiAnswers)
)]
pub(super) async fn list(
    State(app): State<App>,
    Query(query): Query<PageQuery>,
    context: Context,
) -> Result<Json<Value>, OpenAiError> {
    let cluster = &app.running()?.cluster;
    let mut items = Vec::new();
    if let Some(found) = Found::find_if_any(cluster, FILES_COLLECTION).await? {
        for answer in ask_all(cluster, &found, &Read::ListFiles, &context).await?.answers {
            if let Answer::Files(files) = answer {
                let wanted = files
                    .into_iter()
                    .filter(|file| query.purpose.as_ref().is_none_or(|purpose| *purpose == file.purpose));
                items.extend(wanted.map(|file| (file.created_at, file.id.to_string(), shape(&file))));
            }
        }
    }
    Ok(Json(page(items, &query, 10_000, 10_000)?))
}

/// The record of a file.
#[utoipa::path(
    get, path = "/v1/files/{file}", operation_id = "retrieve_file", tag = "documents",
    params(("file" = String, Path, description = "Id of the file"), Context),
    responses(OpenAiAnswers),
)]
pub(super) async fn get(
    State(app): State<App>,
    Path(file): Path<String>,
    context: Context,
) -> Result<Json<Value>, OpenAiError> {
    let file = find(&app.running()?.cluster, file_id(&file)?, &context).await?;
    Ok(Json(shape(&file)))
}

/// The bytes of a file.
#[utoipa::path(
    get, path = "/v1/files/{file}/content", operation_id = "download_file", tag = "documents",
    params(("file" = String, Path, description = "Id of the file"), Context),
    responses(OpenAiAnswers),
)]
pub(super) async fn content(
    State(app): State<App>,
    Path(file): Path<String>,
    context: Context,
) -> Result<Response, OpenAiError> {
    let running = app.running()?;
    let file = find(&running.cluster, file_id(&file)?, &context).await?;
    let found = Found::find(&running.cluster, FILES_COLLECTION).await?;
    let bytes = blobs::fetch(&running.cluster, &running.blobs, shard_of(&found, file.id), file.blob).await?;
    Ok(([(header::CONTENT_TYPE, "application/octet-stream")], Body::from(bytes)).into_response())
}

/// Deletes a file. Documents that were made from it stay.
#[utoipa::path(
    delete, path = "/v1/files/{file}", operation_id = "delete_file", tag = "documents",
    params(("file" = String, Path, description = "Id of the file"), Context),
    responses(OpenAiAnswers),
)]
pub(super) async fn delete(
    State(app): State<App>,
    Path(file): Path<String>,
    context: Context,
) -> Result<Json<Value>, OpenAiError> {
    let cluster = &app.running()?.cluster;
    let id = file_id(&file)?;
    let record = find(cluster, id, &context).await?;
    let found = Found::find(cluster, FILES_COLLECTION).await?;
    // Documents made of the file go with it, in every store.
    let state = cluster.state();
    let stores = state.usable_collections().filter(|(_, collection)| collection.config.embedder.is_some());
    for (store, _) in stores {
        let request_id = Some(context.part_id(&format!("document/{store}")));
        let command = Command::DeleteDocument(id);
        match cluster.write_at(store, id.route(), request_id, command, context.deadline).await {
            // The store went meanwhile, and what was in it.
            Err(error) if error.code == ErrorCode::NotFound => {}
            deleted => drop(deleted?),
        }
    }
    let (request_id, command) = (Some(context.part_id("record")), Command::DeleteFile(id));
    let (outcome, ..) =
        cluster.write_at(&found.name, id.route(), request_id, command, context.deadline).await?;
    let deleted = outcome != Outcome::Absent;
    Ok(Json(json!({"id": record.id.to_string(), "object": "file", "deleted": deleted})))
}
