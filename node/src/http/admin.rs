//! Operators: health, metrics, the state of the cluster, the log level.

use std::time::Duration;

use axum::Json;
use axum::body::Bytes;
use axum::extract::State;
use axum::http::StatusCode;
use axum::response::{IntoResponse, Response};
use serde::Deserialize;
use serde_json::{Value, json};
use shoal_actors::Cluster;
use shoal_proto::{Error, GroupId, Level, ShardId};
use shoal_raft::{Group, GroupStatus};
use utoipa::ToSchema;
use utoipa_axum::router::OpenApiRouter;

use crate::app::App;
use crate::http::context::json as read_json;
use crate::http::error::Problem;
use crate::http::openapi::OperatorAnswers;
use crate::http::operate::drain_name;

/// The level of Qdrant's REST API that is served: its clients compare it with their own.
const QDRANT_API_VERSION: &str = "1.20.0";
/// A replica that has heard its leader within this time, or a leader a majority, can serve.
const MAX_SILENCE: Duration = Duration::from_secs(10);

pub(super) fn routes() -> OpenApiRouter<App> {
    OpenApiRouter::new()
        .routes(described!(root))
        .routes(described!(health))
        .routes(described!(live))
        .routes(described!(ready))
        .routes(described!(detailed))
        .routes(described!(healthz))
        .routes(described!(livez))
        .routes(described!(readyz))
        .routes(described!(metrics))
        .routes(described!(cluster))
        .routes(described!(set_log_level))
}

/// What is served here, and its version.
#[utoipa::path(get, path = "/", operation_id = "root", tag = "operators", responses(OperatorAnswers))]
async fn root() -> Json<Value> {
    Json(json!({
        "title": "shoal - a document retrieval cluster", "version": QDRANT_API_VERSION,
        "shoal": env!("CARGO_PKG_VERSION"),
    }))
}

/// The process answers; nothing else is looked at.
#[utoipa::path(
    get,
    path = "/health/live",
    operation_id = "health_live",
    tag = "operators",
    responses(OperatorAnswers)
)]
async fn live() -> Json<Value> {
    Json(json!({"status": "live"}))
}

/// Whether this node can serve: it belongs to a cluster, the control group has a leader, and
/// its shards do.
#[utoipa::path(
    get,
    path = "/health/ready",
    operation_id = "health_ready",
    tag = "operators",
    responses(OperatorAnswers)
)]
async fn ready(State(app): State<App>) -> Response {
    let reasons = match app.running() {
        Err(error) => vec![error.message],
        Ok(running) => reasons(&running.cluster),
    };
    let (status, word) = match reasons.is_empty() {
        true => (StatusCode::OK, "ready"),
        false => (StatusCode::SERVICE_UNAVAILABLE, "starting"),
    };
    (status, Json(json!({"status": word, "reasons": reasons}))).into_response()
}

fn reasons(cluster: &Cluster) -> Vec<String> {
    let mut reasons = Vec::new();
    let state = cluster.state();
    if !state.nodes.contains_key(&cluster.node()) {
        reasons.push("the cluster's state has not reached this node".to_owned());
    }
    // After a start a replica knows who led it before, and not whether that node is there.
    let is_heard = |group: &Group| group.silence().is_some_and(|silence| silence < MAX_SILENCE);
    let leaderless = |group: &Group| group.leader().is_none() || !is_heard(group);
    match cluster.groups().get(GroupId::CONTROL) {
        Ok(control) if !leaderless(&control) => {}
        _ => reasons.push("the control group has no leader that is heard".to_owned()),
    }
    let mine = state.shards.iter().filter(|(_, shard)| shard.replicas.contains(&cluster.node()));
    for (id, _) in mine.filter(|(id, _)| state.is_in_use(**id)) {
        match cluster.local_shard(*id) {
            None => reasons.push(format!("shard {id} is not open yet")),
            Some(local) if leaderless(&local.group) => {
                reasons.push(format!("shard {id} has no leader that is heard"))
            }
            Some(_) => {}
        }
    }
    reasons
}

/// Reasons for not being ready, models, groups, disk.
#[utoipa::path(
    get,
    path = "/health/detailed",
    operation_id = "health_detailed",
    tag = "operators",
    responses(OperatorAnswers)
)]
async fn detailed(State(app): State<App>) -> Result<Json<Value>, Problem> {
    let running = app.running()?;
    let embedders: Vec<String> =
        running.work.embedders().list().into_iter().map(|model| model.model).collect();
    Ok(Json(json!({
        "version": env!("CARGO_PKG_VERSION"), "node": running.cluster.node(),
        "reasons": reasons(&running.cluster), "disk_writable": running.cluster.is_writable(), "models": embedders,
        "groups": running.cluster.groups().all().len(), "nodes": running.cluster.state().nodes.len(),
    })))
}

/// Metrics in Prometheus' text format.
#[utoipa::path(
    get,
    path = "/metrics",
    operation_id = "metrics",
    tag = "operators",
    responses(OperatorAnswers)
)]
async fn metrics(State(app): State<App>) -> Response {
    ([("content-type", "text/plain; version=0.0.4")], app.render_metrics()).into_response()
}

/// The same as `/health/ready`.
#[utoipa::path(get, path = "/health", operation_id = "health", tag = "operators", responses(OperatorAnswers))]
async fn health(app: State<App>) -> Response {
    ready(app).await
}

/// The same as `/health/live`, under Qdrant's name.
#[utoipa::path(
    get,
    path = "/healthz",
    operation_id = "healthz",
    tag = "operators",
    responses(OperatorAnswers)
)]
async fn healthz() -> Json<Value> {
    live().await
}

/// The same as `/health/live`, under Qdrant's name.
#[utoipa::path(get, path = "/livez", operation_id = "livez", tag = "operators", responses(OperatorAnswers))]
async fn livez() -> Json<Value> {
    live().await
}

/// The same as `/health/ready`, under Qdrant's name.
#[utoipa::path(get, path = "/readyz", operation_id = "readyz", tag = "operators", responses(OperatorAnswers))]
async fn readyz(app: State<App>) -> Response {
    ready(app).await
}

/// What this node knows: members, placement, and the groups that it has replicas of.
#[utoipa::path(
    get,
    path = "/admin/cluster",
    operation_id = "cluster",
    tag = "operators",
    responses(OperatorAnswers)
)]
async fn cluster(State(app): State<App>) -> Result<Json<Value>, Problem> {
    let cluster = &app.running()?.cluster;
    let state = cluster.state();
    let nodes: Vec<Value> = state
        .nodes
        .iter()
        .map(|(id, node)| {
            let addresses = &node.addresses;
            json!({
                "id": id, "name": node.name, "zone": node.zone,
                "http": addresses.http, "grpc": addresses.grpc, "mesh": addresses.mesh,
                "drain": drain_name(node.drain),
            })
        })
        .collect();
    let collections: Vec<Value> = state
        .collections
        .iter()
        .map(|(name, collection)| {
            json!({
                "name": name, "shards": collection.shards, "replication_factor": collection.replication_factor,
                "is_restoring": state.restoring.contains_key(name),
            })
        })
        .collect();
    let shards: Vec<Value> = state
        .shards
        .iter()
        .map(|(id, shard)| {
            json!({
                "id": id, "collection": shard.collection, "first": shard.first, "last": shard.last,
                "replicas": shard.replicas,
            })
        })
        .collect();
    let groups: Vec<Value> =
        cluster.groups().all().iter().map(|group| group_shape(cluster, group.status())).collect();
    let name = state.nodes.get(&cluster.node()).map(|node| node.name.clone());
    Ok(Json(json!({
        "node": {"id": cluster.node(), "name": name}, "cluster_id": state.cluster_id, "version": state.version,
        // What is in force in the cluster, and the highest that this node's build knows.
        "level": state.level, "build": {"version": env!("CARGO_PKG_VERSION"), "level": Level::LATEST},
        "nodes": nodes, "collections": collections, "shards": shards, "groups": groups,
    })))
}

fn group_shape(cluster: &Cluster, status: GroupStatus) -> Value {
    let shard = cluster.local_shard(ShardId(status.id.0)).filter(|_| status.id != GroupId::CONTROL);
    let sum = shard.and_then(|local| local.shard.state_sums().last().copied());
    let sum = sum.map(|(index, sum)| json!({"index": index, "sum": format!("{sum:016x}")}));
    json!({
        // Replicas take it at the same indexes: at one index all must have the same.
        "state_sum": sum,
        "group": status.id, "role": status.role, "leader": status.leader, "term": status.term,
        "last_index": status.last_index, "applied": status.applied, "checkpoint": status.checkpoint,
        "purged": status.purged, "voters": status.voters, "learners": status.learners, "matched": status.matched,
    })
}

#[derive(Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
struct SetLogLevel {
    level: String,
}

/// Changes the log level until the next start.
#[utoipa::path(
    post, path = "/admin/log-level", operation_id = "set_log_level", tag = "operators",
    request_body = SetLogLevel,
    responses(OperatorAnswers),
)]
async fn set_log_level(State(app): State<App>, body: Bytes) -> Result<Json<Value>, Problem> {
    let request: SetLogLevel = read_json(&body)?;
    app.log_level().set(&request.level).map_err(|error| Error::invalid("level", error))?;
    tracing::warn!(filter = request.level, "the log level was changed");
    Ok(Json(json!({"level": request.level})))
}
