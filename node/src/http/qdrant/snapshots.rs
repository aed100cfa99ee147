//! Snapshots of one collection, in the shapes of Qdrant's API, but of all its shards, and the same on every
//! node: they are kept in the backup target.
//!
//! A recovery takes the place of what the collection held, in one step, and makes it when there is none. Until
//! then nobody sees any of it, and when it fails nothing has changed.

use std::time::Instant;

use axum::Json;
use axum::body::{Body, Bytes};
use axum::extract::multipart::Field;
use axum::extract::{Multipart, Path, Query, State};
use axum::http::{StatusCode, header};
use axum::response::{IntoResponse, Response};
use serde::Deserialize;
use serde_json::{Value, json};
use shoal_actors::backup::{Begun, Receipt, ReceiveLimits, Received, Recovery, Snapshot, Target};
use shoal_proto::{Error, Position};
use tracing::Instrument;
use utoipa::{IntoParams, ToSchema};

use super::collections::refuse_internal;
use super::location::{self, Location};
use super::shapes::envelope;
use crate::app::App;
use crate::http::context::{bad_form, json as read_json};
use crate::http::error::QdrantError;
use crate::http::openapi::{QdrantAnswers, SnapshotForm};
use crate::http::points::Found;

/// The most fields of a form.
const MAX_FIELDS: usize = 16;
/// Bytes of a refused upload that are read and thrown away.
const DRAINED_BYTES: usize = 16 << 20;
/// A file in a snapshot may have as many bytes as an upload, and as many as this in any case: where it comes from
/// other limits may hold.
const LEAST_OBJECT_BYTES: u64 = 256 << 20;

#[derive(Deserialize, IntoParams)]
#[into_params(parameter_in = Query)]
pub(super) struct Wait {
    /// Whether the answer waits for the end; true when absent. When false it is 202, and the end is in the log.
    wait: Option<bool>,
}

#[derive(Deserialize, IntoParams)]
#[into_params(parameter_in = Query)]
pub(super) struct Upload {
    /// Whether the answer waits for the end; true when absent. When false it is 202, and the end is in the log.
    wait: Option<bool>,
    /// `snapshot` or `no_sync`: the snapshot takes the place of what is there, as when it is absent; `replica`:
    /// only when nothing is.
    priority: Option<String>,
    /// The SHA-256 that the file must have, in hexadecimal digits.
    checksum: Option<String>,
}

#[derive(Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
struct Recover {
    /// The name of a snapshot, or where a file of one is: `http://…`, `https://…`, or `file:///…` in the
    /// directory of the backup target.
    location: String,
    /// As with an upload.
    priority: Option<String>,
    /// The SHA-256 that the file must have, in hexadecimal digits.
    checksum: Option<String>,
    /// The key that the server is sent that has the file.
    api_key: Option<String>,
}

fn shape(snapshot: &Snapshot) -> Value {
    let created = jiff::Timestamp::from_second(snapshot.created_at as i64).unwrap_or_default();
    json!({
        "name": snapshot.name(), "creation_time": created.strftime("%Y-%m-%dT%H:%M:%S").to_string(),
        "size": snapshot.bytes, "checksum": snapshot.checksum,
    })
}

fn accepted(started: Instant) -> Response {
    let body = json!({"status": "accepted", "time": started.elapsed().as_secs_f64()});
    (StatusCode::ACCEPTED, Json(body)).into_response()
}

fn done(result: impl serde::Serialize, started: Instant) -> Response {
    envelope(result, started, &Position::default())
}

async fn end(begun: Begun, wait: Option<bool>, started: Instant) -> Result<Response, QdrantError> {
    if wait == Some(false) {
        return Ok(accepted(started));
    }
    begun.wait().await?;
    Ok(done(true, started))
}

/// The snapshots of a collection, oldest first. They outlive it.
#[utoipa::path(
    get, path = "/collections/{collection}/snapshots", operation_id = "list_snapshots", tag = "points",
    params(("collection" = String, Path, description = "Name or alias")),
    responses(QdrantAnswers),
)]
pub(super) async fn list(State(app): State<App>, Path(name): Path<String>) -> Result<Response, QdrantError> {
    let started = Instant::now();
    let running = app.running()?;
    let found = Found::find_if_any(&running.cluster, &name).await?;
    let name = found.as_ref().map_or(name, |found| found.name.clone());
    let snapshots = running.backups.target().await?.snapshots().await?;
    let shapes: Vec<Value> =
        snapshots.iter().filter(|snapshot| snapshot.collection == name).map(shape).collect();
    if shapes.is_empty() && found.is_none() {
        return Err(Error::not_found(format!("Not found: Collection `{name}` doesn't exist!")).into());
    }
    Ok(done(shapes, started))
}

/// Makes a snapshot of a collection.
#[utoipa::path(
    post, path = "/collections/{collection}/snapshots", operation_id = "create_snapshot", tag = "points",
    params(("collection" = String, Path, description = "Name or alias"), Wait),
    responses(QdrantAnswers),
)]
pub(super) async fn create(
    State(app): State<App>,
    Path(name): Path<String>,
    Query(query): Query<Wait>,
) -> Result<Response, QdrantError> {
    let started = Instant::now();
    let running = app.running()?;
    refuse_internal(&name)?;
    let found = Found::find(&running.cluster, &name).await?;
    let (snapshot, begun) = running.backups.create_snapshot(&found.name).await?;
    if query.wait == Some(false) {
        return Ok(accepted(started));
    }
    begun.wait().await?;
    let made = running.backups.target().await?.snapshot(&snapshot).await?;
    Ok(done(shape(&made), started))
}

/// A snapshot of that collection.
async fn find(app: &App, collection: &str, name: &str) -> Result<(Target, Snapshot), Error> {
    let running = app.running()?;
    let target = running.backups.target().await?;
    let snapshot = target.snapshot(name).await?;
    let found = Found::find_if_any(&running.cluster, collection).await?;
    match found.as_ref().map_or(collection, |found| found.name.as_str()) == snapshot.collection {
        true => Ok((target, snapshot)),
        false => Err(Error::not_found(format!("no snapshot `{name}` of collection `{collection}`"))),
    }
}

/// A snapshot as one file: a tar archive.
#[utoipa::path(
    get, path = "/collections/{collection}/snapshots/{snapshot}", operation_id = "get_snapshot", tag = "points",
    params(
        ("collection" = String, Path, description = "Name or alias"),
        ("snapshot" = String, Path, description = "Name of the snapshot"),
    ),
    responses(QdrantAnswers),
)]
pub(super) async fn download(
    State(app): State<App>,
    Path((collection, name)): Path<(String, String)>,
) -> Result<Response, QdrantError> {
    let (target, snapshot) = find(&app, &collection, &name).await?;
    let archive = app.running()?.backups.download(&target, &snapshot).await?;
    // A header is ASCII.
    let file = if name.is_ascii() { name } else { format!("{}.snapshot", snapshot.id) };
    let headers = [
        (header::CONTENT_TYPE, "application/octet-stream".to_owned()),
        (header::CONTENT_LENGTH, snapshot.bytes.to_string()),
        (header::CONTENT_DISPOSITION, format!("attachment; filename=\"{file}\"")),
    ];
    Ok((headers, Body::from_stream(archive)).into_response())
}

/// Deletes a snapshot.
#[utoipa::path(
    delete, path = "/collections/{collection}/snapshots/{snapshot}", operation_id = "delete_snapshot", tag = "points",
    params(
        ("collection" = String, Path, description = "Name or alias"),
        ("snapshot" = String, Path, description = "Name of the snapshot"),
        Wait,
    ),
    responses(QdrantAnswers),
)]
pub(super) async fn delete(
    State(app): State<App>,
    Path((collection, name)): Path<(String, String)>,
    Query(query): Query<Wait>,
) -> Result<Response, QdrantError> {
    let started = Instant::now();
    let (_, snapshot) = find(&app, &collection, &name).await?;
    let begun = app.running()?.backups.delete_snapshot(&snapshot).await?;
    end(begun, query.wait, started).await
}

/// Puts an uploaded snapshot in the place of a collection.
#[utoipa::path(
    post, path = "/collections/{collection}/snapshots/upload", operation_id = "recover_from_uploaded_snapshot",
    tag = "points",
    params(("collection" = String, Path, description = "Name or alias"), Upload),
    request_body(content = SnapshotForm, content_type = "multipart/form-data"),
    responses(QdrantAnswers),
)]
pub(super) async fn upload(
    State(app): State<App>,
    Path(name): Path<String>,
    Query(query): Query<Upload>,
    form: Multipart,
) -> Result<Response, QdrantError> {
    recover_upload(&app, name, query, form).await
}

/// The same, for those who PUT.
#[utoipa::path(
    put, path = "/collections/{collection}/snapshots/upload", operation_id = "put_uploaded_snapshot",
    tag = "points",
    params(("collection" = String, Path, description = "Name or alias"), Upload),
    request_body(content = SnapshotForm, content_type = "multipart/form-data"),
    responses(QdrantAnswers),
)]
pub(super) async fn upload_by_put(
    State(app): State<App>,
    Path(name): Path<String>,
    Query(query): Query<Upload>,
    form: Multipart,
) -> Result<Response, QdrantError> {
    recover_upload(&app, name, query, form).await
}

async fn recover_upload(
    app: &App,
    name: String,
    query: Upload,
    form: Multipart,
) -> Result<Response, QdrantError> {
    let started = Instant::now();
    check_checksum(query.checksum.as_deref())?;
    let recovery = recovery(app, name, query.priority.as_deref(), "snapshot").await?;
    let backups = &app.running()?.backups;
    let received = read_form(form, backups.receive(limits(app))?, query.checksum.as_deref()).await?;
    end(backups.recover_received(received, recovery).await?, query.wait, started).await
}

async fn read_form(
    mut form: Multipart,
    mut receipt: Receipt,
    checksum: Option<&str>,
) -> Result<Received, Error> {
    let (mut fields, mut has_come) = (0, false);
    while let Some(mut field) = form.next_field().await.map_err(|error| bad_form(&error))? {
        fields += 1;
        if fields > MAX_FIELDS {
            return Err(Error::invalid("form", format!("at most {MAX_FIELDS} fields")));
        }
        match field.name().unwrap_or_default() {
            "snapshot" if has_come => return Err(Error::invalid("snapshot", "is there twice")),
            "snapshot" => has_come = true,
            other => return Err(Error::invalid(other, "unknown field; expected snapshot")),
        }
        while let Some(piece) = field.chunk().await.map_err(|error| bad_form(&error))? {
            if let Err(refused) = receipt.write(piece).await {
                drain(field).await;
                return Err(refused);
            }
        }
    }
    match has_come {
        true => receipt.finish(checksum).await,
        false => Err(Error::invalid("snapshot", "is missing")),
    }
}

/// Reads on for a while: whoever still sends when the connection is closed may not see why.
async fn drain(mut field: Field<'_>) {
    let mut left = DRAINED_BYTES;
    while left > 0
        && let Ok(Some(piece)) = field.chunk().await
    {
        left = left.saturating_sub(piece.len());
    }
}

/// Puts a snapshot in the place of a collection: one that is kept, or that a server or a file has.
#[utoipa::path(
    put, path = "/collections/{collection}/snapshots/recover", operation_id = "recover_from_snapshot", tag = "points",
    params(("collection" = String, Path, description = "Name or alias"), Wait),
    request_body = Recover,
    responses(QdrantAnswers),
)]
pub(super) async fn recover(
    State(app): State<App>,
    Path(name): Path<String>,
    Query(query): Query<Wait>,
    body: Bytes,
) -> Result<Response, QdrantError> {
    let started = Instant::now();
    let request: Recover = read_json(&body)?;
    check_checksum(request.checksum.as_deref())?;
    let location = Location::parse(&request.location)?;
    let recovery = recovery(&app, name, request.priority.as_deref(), "location").await?;
    let (checksum, api_key) = (request.checksum, request.api_key);
    // A task of its own: it goes on when nobody waits for it any more.
    let recovering = async move {
        let recovered = bring_and_recover(&app, location, recovery, checksum, api_key).await;
        recovered.inspect_err(|error| tracing::warn!(%error, "a snapshot was not recovered"))
    };
    let recovering = tokio::spawn(recovering.in_current_span());
    if query.wait == Some(false) {
        return Ok(accepted(started));
    }
    recovering.await.map_err(Error::internal)??;
    Ok(done(true, started))
}

async fn bring_and_recover(
    app: &App,
    location: Location,
    recovery: Recovery,
    checksum: Option<String>,
    api_key: Option<String>,
) -> Result<(), Error> {
    let backups = &app.running()?.backups;
    let checksum = checksum.as_deref();
    let receipt = match location {
        Location::Kept(name) => {
            let snapshot = backups.target().await?.snapshot(&name).await?;
            if checksum.is_some_and(|wanted| !wanted.eq_ignore_ascii_case(&snapshot.checksum)) {
                let message = format!("the snapshot has the SHA-256 {}", snapshot.checksum);
                return Err(Error::invalid("checksum", message));
            }
            return backups.recover(snapshot, recovery).await?.wait().await;
        }
        Location::File(path) => {
            let mut receipt = backups.receive(limits(app))?;
            location::read(path, &app.config().backup.target, &mut receipt).await?;
            receipt
        }
        Location::Web(url) => {
            let mut receipt = backups.receive(limits(app))?;
            location::fetch(url, api_key, &mut receipt).await?;
            receipt
        }
    };
    let received = receipt.finish(checksum).await?;
    backups.recover_received(received, recovery).await?.wait().await
}

/// The collection that a snapshot is to become. `replica` prefers what is there: then there is nothing to do.
async fn recovery(
    app: &App,
    name: String,
    priority: Option<&str>,
    field: &'static str,
) -> Result<Recovery, Error> {
    refuse_internal(&name)?;
    shoal_proto::collection::validate_name("collection_name", &name)?;
    let running = app.running()?;
    running.backups.check_recovery().await?;
    let found = Found::find_if_any(&running.cluster, &name).await?;
    let only_if_free = priority == Some("replica");
    match priority {
        None | Some("snapshot" | "no_sync") => {}
        Some("replica") if found.is_none() => {}
        Some("replica") => {
            let message =
                format!("`replica` prefers what `{name}` holds already: say `snapshot` to replace it");
            return Err(Error::invalid("priority", message));
        }
        Some(_) => return Err(Error::invalid("priority", "expected snapshot, replica or no_sync")),
    }
    Ok(Recovery { name: found.map_or(name, |found| found.name), only_if_free, field })
}

fn check_checksum(checksum: Option<&str>) -> Result<(), Error> {
    let is_good = |text: &str| text.len() == 64 && text.bytes().all(|byte| byte.is_ascii_hexdigit());
    match checksum.is_none_or(is_good) {
        true => Ok(()),
        false => Err(Error::invalid("checksum", "expected a SHA-256 of 64 hexadecimal digits")),
    }
}

fn limits(app: &App) -> ReceiveLimits {
    let limits = &app.config().limits;
    let object_bytes = LEAST_OBJECT_BYTES.max(limits.upload_bytes as u64);
    ReceiveLimits { archive_bytes: limits.snapshot_bytes as u64, object_bytes }
}
