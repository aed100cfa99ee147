//! Backups: made, listed, verified, put back, deleted.
//!
//! What takes long is begun by one request and asked after by others: `/admin/backup-jobs` says what every
//! node is at, whichever node is asked.

use axum::Json;
use axum::body::Bytes;
use axum::extract::{Path, State};
use axum::http::StatusCode;
use serde::Deserialize;
use serde_json::{Value, json};
use shoal_actors::backup::{Head, Job, JobState, RestoreOptions};
use utoipa::ToSchema;
use utoipa_axum::router::OpenApiRouter;

use crate::app::App;
use crate::http::context::json as read_json;
use crate::http::error::Problem;
use crate::http::openapi::OperatorAnswers;

pub(super) fn routes() -> OpenApiRouter<App> {
    OpenApiRouter::new()
        .routes(described!(list, create))
        .routes(described!(jobs))
        .routes(described!(get, delete))
        .routes(described!(verify))
        .routes(described!(restore))
}

fn head_shape(head: &Head) -> Value {
    json!({
        "id": head.id, "created_at": head.created_at, "is_full": head.is_full, "cluster_id": head.cluster_id, "version": head.version,
        "format": head.format, "bytes": head.bytes, "new_bytes": head.new_bytes, "collections": head.collections,
        "missing_files": head.missing_files, "missing": head.missing,
    })
}

fn job_shape(job: &Job) -> Value {
    let (state, error) = match &job.state {
        JobState::Running => ("running", None),
        JobState::Done => ("done", None),
        JobState::Failed(reason) => ("failed", Some(reason)),
    };
    json!({
        "kind": job.kind.name(), "backup": job.backup, "node": job.node, "state": state, "error": error,
        "at": job.at, "bytes_done": job.bytes_done, "bytes_total": job.bytes_total, "bytes_new": job.bytes_new,
        "started_at": job.started_at, "ended_at": job.ended_at,
    })
}

fn begun(job: &Job) -> (StatusCode, Json<Value>) {
    (StatusCode::ACCEPTED, Json(job_shape(job)))
}

/// The backups that are there, oldest first.
#[utoipa::path(
    get,
    path = "/admin/backups",
    operation_id = "list_backups",
    tag = "operators",
    responses(OperatorAnswers)
)]
async fn list(State(app): State<App>) -> Result<Json<Value>, Problem> {
    let target = app.running()?.backups.target().await?;
    let heads: Vec<Value> = target.heads().await?.iter().map(head_shape).collect();
    Ok(Json(json!({"target": target.name(), "backups": heads})))
}

/// What each node does with a backup, or did last.
#[utoipa::path(
    get,
    path = "/admin/backup-jobs",
    operation_id = "list_backup_jobs",
    tag = "operators",
    responses(OperatorAnswers)
)]
async fn jobs(State(app): State<App>) -> Result<Json<Value>, Problem> {
    let reports = app.running()?.cluster.reports().await;
    let jobs: Vec<Value> = reports.values().filter_map(|report| report.job.as_ref()).map(job_shape).collect();
    Ok(Json(json!({"jobs": jobs})))
}

#[derive(Default, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
struct CreateBackup {
    /// Names or aliases of collections; everything when absent.
    collections: Option<Vec<String>>,
}

/// Begins a backup of the cluster, or of some collections.
#[utoipa::path(
    post, path = "/admin/backups", operation_id = "create_backup", tag = "operators",
    request_body = CreateBackup,
    responses(OperatorAnswers),
)]
async fn create(State(app): State<App>, body: Bytes) -> Result<(StatusCode, Json<Value>), Problem> {
    let request: CreateBackup = if body.is_empty() { CreateBackup::default() } else { read_json(&body)? };
    Ok(begun(&app.running()?.backups.create(request.collections).await?))
}

/// One backup, with all that it consists of.
#[utoipa::path(
    get, path = "/admin/backups/{backup}", operation_id = "get_backup", tag = "operators",
    params(("backup" = String, Path, description = "Id")),
    responses(OperatorAnswers),
)]
async fn get(State(app): State<App>, Path(id): Path<String>) -> Result<Json<Value>, Problem> {
    let target = app.running()?.backups.target().await?;
    let head = target.head(&id).await?;
    let mut shape = head_shape(&head);
    shape["manifest"] = json!(target.manifest(&head).await?);
    Ok(Json(shape))
}

/// Begins to delete a backup, and what no other one needs.
#[utoipa::path(
    delete, path = "/admin/backups/{backup}", operation_id = "delete_backup", tag = "operators",
    params(("backup" = String, Path, description = "Id")),
    responses(OperatorAnswers),
)]
async fn delete(
    State(app): State<App>,
    Path(id): Path<String>,
) -> Result<(StatusCode, Json<Value>), Problem> {
    Ok(begun(&app.running()?.backups.delete(&id).await?))
}

/// Begins to read a whole backup and to compare it with its hashes.
#[utoipa::path(
    post, path = "/admin/backups/{backup}/verify", operation_id = "verify_backup", tag = "operators",
    params(("backup" = String, Path, description = "Id")),
    responses(OperatorAnswers),
)]
async fn verify(
    State(app): State<App>,
    Path(id): Path<String>,
) -> Result<(StatusCode, Json<Value>), Problem> {
    Ok(begun(&app.running()?.backups.verify(&id).await?))
}

#[derive(Default, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
struct RestoreBackup {
    /// Names or aliases of collections in the backup; everything when absent.
    collections: Option<Vec<String>>,
    /// Shards of each collection; as many as it had when absent.
    shard_number: Option<u32>,
    /// Replicas of each shard; as many as it had when absent.
    replication_factor: Option<u32>,
}

/// Begins to put a backup back. Nothing of it is seen before all of it is there.
#[utoipa::path(
    post, path = "/admin/backups/{backup}/restore", operation_id = "restore_backup", tag = "operators",
    params(("backup" = String, Path, description = "Id")),
    request_body = RestoreBackup,
    responses(OperatorAnswers),
)]
async fn restore(
    State(app): State<App>,
    Path(id): Path<String>,
    body: Bytes,
) -> Result<(StatusCode, Json<Value>), Problem> {
    let request: RestoreBackup = if body.is_empty() { RestoreBackup::default() } else { read_json(&body)? };
    let options = RestoreOptions {
        collections: request.collections,
        shard_count: request.shard_number,
        replication_factor: request.replication_factor,
    };
    Ok(begun(&app.running()?.backups.restore(&id, options).await?))
}
