//! The cluster, for reading, in the shapes of Qdrant's API: its clients and dashboards ask for them.
//!
//! A peer is a node. Shard ids are those of the whole cluster rather than of the collection, and changes
//! are ordered through `/admin`.

use std::time::Instant;

use axum::extract::{Path, State};
use axum::response::Response;
use serde_json::{Map, Value, json};
use shoal_actors::placement::{Plan, led};
use shoal_engine::command::{Answer, Read};
use shoal_proto::{Error, GroupId, Position, ShardId};

use super::shapes::envelope;
use crate::app::App;
use crate::http::context::Context;
use crate::http::error::QdrantError;
use crate::http::openapi::QdrantAnswers;

/// The members and their agreement about the cluster, as this node sees it.
#[utoipa::path(
    get,
    path = "/cluster",
    operation_id = "cluster_status",
    tag = "points",
    responses(QdrantAnswers)
)]
pub(super) async fn status(State(app): State<App>) -> Result<Response, QdrantError> {
    let started = Instant::now();
    let cluster = &app.running()?.cluster;
    let state = cluster.state();
    let control = cluster.groups().get(GroupId::CONTROL)?.status();
    let peers: Map<String, Value> = state
        .nodes
        .iter()
        .map(|(id, node)| (id.to_string(), json!({"uri": format!("http://{}", node.addresses.grpc)})))
        .collect();
    let role = match control.role {
        "leader" => "Leader",
        "candidate" => "Candidate",
        _ => "Follower",
    };
    let now = jiff::Timestamp::from_second(shoal_actors::cluster::unix_now() as i64);
    let now = now.map_err(|error| Error::internal(error.to_string()))?;
    let result = json!({
        "status": "enabled", "peer_id": cluster.node(), "peers": peers,
        "raft_info": {
            "term": control.term, "commit": control.applied,
            "pending_operations": control.last_index.saturating_sub(control.applied),
            "leader": control.leader, "role": role, "is_voter": control.voters.contains(&cluster.node()),
        },
        "consensus_thread_status": {"consensus_thread_status": "working", "last_update": now.to_string()},
        "message_send_failures": {},
    });
    Ok(envelope(result, started, &Position::default()))
}

/// Where a collection's shards are, seen from this node.
#[utoipa::path(
    get, path = "/collections/{collection}/cluster", operation_id = "collection_cluster", tag = "points",
    params(("collection" = String, Path, description = "Name or alias"), Context),
    responses(QdrantAnswers),
)]
pub(super) async fn collection(
    State(app): State<App>,
    Path(name): Path<String>,
    context: Context,
) -> Result<Response, QdrantError> {
    let started = Instant::now();
    let cluster = &app.running()?.cluster;
    let state = cluster.fresh_state(context.deadline).await?;
    let (_, collection) = state.collection(&name)?;
    let reports = cluster.reports().await;
    let led = led(&reports);
    let plan = cluster.plan().await.unwrap_or_default();
    let (mut local, mut remote) = (Vec::new(), Vec::new());
    for id in &collection.shards {
        for node in &state.shards[id].replicas {
            // `Active` votes, `Partial` is being filled, `Dead` does not answer.
            let state = match (reports.contains_key(node), led.get(&(*id).into())) {
                (false, _) | (_, None) => "Dead",
                (true, Some((_, group))) if group.voters.contains(node) => "Active",
                (true, Some(_)) => "Partial",
            };
            match cluster.local_shard(*id).filter(|_| *node == cluster.node()) {
                None => remote.push(json!({"shard_id": id, "peer_id": node, "state": state})),
                Some(here) => {
                    let stats = tokio::task::spawn_blocking(move || here.shard.read(&Read::Stats)).await;
                    let Ok((_, Answer::Stats(stats))) = stats.map_err(Error::internal)? else {
                        return Err(Error::unavailable(format!("shard {id} cannot be counted now")).into());
                    };
                    local.push(json!({"shard_id": id, "points_count": stats.points, "state": state}));
                }
            }
        }
    }
    let result = json!({
        "peer_id": cluster.node(), "shard_count": collection.shards.len(), "local_shards": local,
        "remote_shards": remote, "shard_transfers": transfers(&plan, &collection.shards),
    });
    Ok(envelope(result, started, &Position::default()))
}

fn transfers(plan: &Plan, shards: &[ShardId]) -> Vec<Value> {
    let moving = plan.moving.iter().filter(|moving| shards.contains(&moving.shard));
    let pairs = moving.flat_map(|moving| {
        let from = moving.leaving.first().copied();
        moving.arriving.iter().map(move |to| (moving.shard, from, *to))
    });
    pairs
        .map(|(shard, from, to)| {
            json!({"shard_id": shard, "from": from.unwrap_or(to), "to": to, "sync": from.is_none(), "method": "snapshot"})
        })
        .collect()
}
