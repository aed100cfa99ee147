//! Operators: health, metrics, the state of the cluster, the log level.

use axum::Json;
use axum::Router;
use axum::body::Bytes;
use axum::extract::State;
use axum::http::StatusCode;
use axum::response::{IntoResponse, Response};
use axum::routing::{get, post};
use serde::Deserialize;
use serde_json::{Value, json};
use shoal_actors::Cluster;
use shoal_proto::{Error, GroupId};
use shoal_raft::{Group, GroupStatus};

use crate::app::App;
use crate::http::context::json as read_json;
use crate::http::error::Problem;

/// The level of Qdrant's REST API that is served: its clients compare it with their own.
const QDRANT_API_VERSION: &str = "1.20.0";

pub(super) fn routes() -> Router<App> {
    Router::new()
        .route("/", get(root))
        .route("/health", get(ready))
        .route("/health/live", get(live))
        .route("/health/ready", get(ready))
        .route("/health/detailed", get(detailed))
        .route("/healthz", get(live))
        .route("/livez", get(live))
        .route("/readyz", get(ready))
        .route("/metrics", get(metrics))
        .route("/admin/cluster", get(cluster))
        .route("/admin/log-level", post(set_log_level))
}

async fn root() -> Json<Value> {
    Json(json!({
        "title": "shoal - a document retrieval cluster", "version": QDRANT_API_VERSION,
        "shoal": env!("CARGO_PKG_VERSION"),
    }))
}

/// The process answers; nothing else is looked at.
async fn live() -> Json<Value> {
    Json(json!({"status": "live"}))
}

/// Whether this node can serve: it belongs to a cluster, the control group has a leader, and
/// its shards do.
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
    let leaderless = |group: &Group| group.leader().is_none();
    match cluster.groups().get(GroupId::CONTROL) {
        Ok(control) if !leaderless(&control) => {}
        _ => reasons.push("the control group has no leader".to_owned()),
    }
    let mine = state.shards.iter().filter(|(_, shard)| shard.replicas.contains(&cluster.node()));
    for (id, _) in mine {
        match cluster.local_shard(*id) {
            None => reasons.push(format!("shard {id} is not open yet")),
            Some(local) if leaderless(&local.group) => reasons.push(format!("shard {id} has no leader")),
            Some(_) => {}
        }
    }
    reasons
}

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

async fn metrics(State(app): State<App>) -> Response {
    ([("content-type", "text/plain; version=0.0.4")], app.render_metrics()).into_response()
}

/// What this node knows: members, placement, and the groups that it has replicas of.
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
            })
        })
        .collect();
    let collections: Vec<Value> = state
        .collections
        .iter()
        .map(|(name, collection)| {
            json!({"name": name, "shards": collection.shards, "replication_factor": collection.replication_factor})
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
    let groups: Vec<Value> = cluster.groups().all().iter().map(Group::status).map(group_shape).collect();
    let name = state.nodes.get(&cluster.node()).map(|node| node.name.clone());
    Ok(Json(json!({
        "node": {"id": cluster.node(), "name": name}, "cluster_id": state.cluster_id, "version": state.version,
        "nodes": nodes, "collections": collections, "shards": shards, "groups": groups,
    })))
}

fn group_shape(status: GroupStatus) -> Value {
    json!({
        "group": status.id, "role": status.role, "leader": status.leader, "term": status.term,
        "last_index": status.last_index, "applied": status.applied, "checkpoint": status.checkpoint,
        "purged": status.purged, "voters": status.voters, "learners": status.learners, "matched": status.matched,
    })
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct SetLogLevel {
    level: String,
}

async fn set_log_level(State(app): State<App>, body: Bytes) -> Result<Json<Value>, Problem> {
    let request: SetLogLevel = read_json(&body)?;
    app.log_level().set(&request.level).map_err(|error| Error::invalid("level", error))?;
    tracing::warn!(level = request.level, "the log level was changed");
    Ok(Json(json!({"level": request.level})))
}
