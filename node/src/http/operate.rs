//! What operators order: draining, removing and repairing nodes, moving replicas and leaders, and the
//! view of the whole cluster that they decide by.

use std::collections::BTreeMap;

use axum::Json;
use axum::body::Bytes;
use axum::extract::{Path, Query, State};
use axum::http::StatusCode;
use serde::Deserialize;
use serde_json::{Value, json};
use shoal_actors::Cluster;
use shoal_actors::levels::Build;
use shoal_actors::placement::{GroupReport, Moving, NodeReport, Plan, find_node, leaving, led, out_of_reach};
use shoal_actors::progress::{Attempt, Progress};
use shoal_proto::{GroupId, NodeId, ShardId};
use shoal_raft::cluster::{ClusterState, Drain, Reshard};
use utoipa::{IntoParams, ToSchema};
use utoipa_axum::router::OpenApiRouter;

use crate::app::App;
use crate::http::context::{Context, json as read_json};
use crate::http::error::Problem;
use crate::http::openapi::OperatorAnswers;

pub(super) fn routes() -> OpenApiRouter<App> {
    OpenApiRouter::new()
        .routes(described!(report))
        .routes(described!(placement))
        .routes(described!(pause))
        .routes(described!(resume))
        .routes(described!(drain, drain_status, undrain))
        .routes(described!(remove))
        .routes(described!(move_replica))
        .routes(described!(move_leader))
        .routes(described!(abandon))
        .routes(described!(set_replication))
        .routes(described!(split))
        .routes(described!(merge))
        .routes(described!(abort_reshard))
}

/// The whole cluster: every node's own word, who holds and leads what, and what placement does.
#[utoipa::path(
    get,
    path = "/admin/cluster/report",
    operation_id = "cluster_report",
    tag = "operators",
    params(Context),
    responses(OperatorAnswers)
)]
async fn report(State(app): State<App>, context: Context) -> Result<Json<Value>, Problem> {
    let cluster = &app.running()?.cluster;
    let state = cluster.fresh_state(context.deadline).await?;
    let (reports, builds) = tokio::join!(cluster.reports(), cluster.builds());
    let led = led(&reports);
    let (plan, progress) = tokio::join!(cluster.plan(), cluster.progress());
    let placement = plan.ok().map(|plan| plan_shape(&plan, &progress, &led));
    let resharding = state.resharding.iter();
    let resharding: Vec<Value> =
        resharding.map(|(name, change)| reshard_shape(name, change, progress.reshards.get(name))).collect();
    let nodes: Vec<Value> =
        state.nodes.keys().map(|id| node_shape(&state, &reports, builds.get(id), *id)).collect();
    let out_of_reach = out_of_reach(&state, &reports);
    let shards = state.shards.keys().map(|id| shard_shape(&state, &led, *id, out_of_reach.contains(id)));
    let shards: Vec<Value> = shards.collect();
    Ok(Json(json!({
        "cluster_id": state.cluster_id, "version": state.version, "level": state.level, "nodes": nodes,
        "control": group_shape(&led, GroupId::CONTROL), "shards": shards,
        "placement": placement, "resharding": resharding,
    })))
}

/// Groups by the words of their leaders.
type Led<'a> = BTreeMap<GroupId, (NodeId, &'a GroupReport)>;

fn node_shape(
    state: &ClusterState,
    reports: &BTreeMap<NodeId, NodeReport>,
    build: Option<&Build>,
    id: NodeId,
) -> Value {
    let (node, report) = (&state.nodes[&id], reports.get(&id));
    let is_drained = node.drain != Drain::No && leaving(state, reports, id).is_done();
    let leads = report.map(|report| report.groups.iter().filter(|group| group.is_leader).count());
    json!({
        "id": id, "name": node.name, "zone": node.zone, "http": node.addresses.http, "grpc": node.addresses.grpc,
        "answers": report.is_some(), "drain": drain_name(node.drain), "is_drained": is_drained,
        "version": build.map(|build| build.version.as_str()), "level": build.map(|build| build.level),
        "disk_free_bytes": report.map(|report| report.disk_free_bytes),
        "disk_writable": report.map(|report| report.is_writable),
        "replicas": state.shards.values().filter(|shard| shard.replicas.contains(&id)).count(), "leads": leads,
    })
}

pub(super) fn drain_name(drain: Drain) -> &'static str {
    match drain {
        Drain::No => "no",
        Drain::UntilRestart => "until_restart",
        Drain::Yes => "yes",
    }
}

fn shard_shape(state: &ClusterState, led: &Led, id: ShardId, is_out_of_reach: bool) -> Value {
    let shard = &state.shards[&id];
    json!({
        "id": id, "collection": shard.collection, "first": shard.first, "last": shard.last,
        "is_in_use": state.is_in_use(id), "replicas": shard.replicas, "group": group_shape(led, id.into()),
        "is_out_of_reach": is_out_of_reach,
    })
}

/// A group by the word of its leader; null when nobody who answers leads it.
fn group_shape(led: &Led, id: GroupId) -> Value {
    match led.get(&id) {
        None => Value::Null,
        Some((leader, group)) => json!({
            "leader": leader, "term": group.term, "applied": group.applied, "last_index": group.last_index,
            "voters": group.voters, "learners": group.learners, "behind": group.behind,
        }),
    }
}

fn reshard_shape(name: &str, change: &Reshard, attempt: Option<&Attempt>) -> Value {
    json!({
        "collection": name, "shards": change.parents, "into": change.children,
        "attempt": attempt.map(|attempt| attempt.number), "attempts": attempt.map(|attempt| attempt.of),
        "last_error": attempt.map(|attempt| &attempt.last_error).filter(|error| !error.is_empty()),
    })
}

/// How many entries those are behind that are to hold a shard, by the word of its leader.
fn arriving_behind(moving: &Moving, led: &Led) -> BTreeMap<NodeId, u64> {
    let behind = led.get(&GroupId::from(moving.shard)).map(|(_, group)| &group.behind);
    let of = |node: &NodeId| Some((*node, *behind?.get(node)?));
    moving.arriving.iter().filter_map(of).collect()
}

fn plan_shape(plan: &Plan, progress: &Progress, led: &Led) -> Value {
    let steps: Vec<Value> = plan
        .steps
        .iter()
        .map(|planned| json!({"step": planned.step.to_string(), "reason": planned.reason}))
        .collect();
    let moving: Vec<Value> = plan
        .moving
        .iter()
        .map(|moving| {
            json!({
                "shard": moving.shard, "arriving": moving.arriving, "leaving": moving.leaving,
                "reason": progress.moves.get(&moving.shard), "behind": arriving_behind(moving, led),
            })
        })
        .collect();
    json!({
        "version": plan.version, "is_paused": plan.is_paused, "steps": steps, "moving": moving,
        "waiting": plan.waiting,
    })
}

/// What placement would do next, what it is at, and what it waits for.
#[utoipa::path(
    get,
    path = "/admin/placement",
    operation_id = "placement",
    tag = "operators",
    responses(OperatorAnswers)
)]
async fn placement(State(app): State<App>) -> Result<Json<Value>, Problem> {
    let cluster = &app.running()?.cluster;
    let (plan, progress, reports) = tokio::join!(cluster.plan(), cluster.progress(), cluster.reports());
    Ok(Json(plan_shape(&plan?, &progress, &led(&reports))))
}

/// Placement moves nothing any more by itself. What is under way ends.
#[utoipa::path(
    post,
    path = "/admin/placement/pause",
    operation_id = "pause_placement",
    tag = "operators",
    params(Context),
    responses(OperatorAnswers)
)]
async fn pause(State(app): State<App>, context: Context) -> Result<Json<Value>, Problem> {
    set_paused(&app, true, &context).await
}

async fn set_paused(app: &App, is_paused: bool, context: &Context) -> Result<Json<Value>, Problem> {
    app.running()?.cluster.pause_placement(is_paused, context.deadline).await?;
    Ok(Json(json!({"is_paused": is_paused})))
}

/// Placement goes on.
#[utoipa::path(
    post,
    path = "/admin/placement/resume",
    operation_id = "resume_placement",
    tag = "operators",
    params(Context),
    responses(OperatorAnswers)
)]
async fn resume(State(app): State<App>, context: Context) -> Result<Json<Value>, Problem> {
    set_paused(&app, false, &context).await
}

/// The node of a name or an id, among those that are members now.
async fn member(cluster: &Cluster, name_or_id: &str, context: &Context) -> Result<NodeId, Problem> {
    let state = cluster.fresh_state(context.deadline).await?;
    Ok(find_node(&state, name_or_id)?)
}

/// Changes whether a node is drained, if that is wanted, and says how it stands.
async fn drained(
    app: &App,
    name_or_id: &str,
    change: Option<Drain>,
    context: &Context,
) -> Result<Json<Value>, Problem> {
    let cluster = &app.running()?.cluster;
    let node = member(cluster, name_or_id, context).await?;
    if let Some(drain) = change {
        cluster.set_drain(node, drain, context.deadline).await?;
    }
    let leaving = cluster.leaving(node, context.deadline).await?;
    let drain = cluster.state().nodes.get(&node).map_or(Drain::No, |node| node.drain);
    let is_done = drain != Drain::No && leaving.is_done();
    Ok(Json(json!({
        "node": node, "drain": drain_name(drain), "is_done": is_done, "waits_for": leaving.reasons,
    })))
}

/// Begins to move everything off a node, and says what is left to be done. It is done when the same
/// path, asked again, says `is_done`: then the node can be stopped, and nothing is lost with it.
#[utoipa::path(
    post, path = "/admin/nodes/{node}/drain", operation_id = "drain_node", tag = "operators",
    params(("node" = String, Path, description = "Name or id"), Context),
    responses(OperatorAnswers),
)]
async fn drain(
    State(app): State<App>,
    Path(node): Path<String>,
    context: Context,
) -> Result<Json<Value>, Problem> {
    drained(&app, &node, Some(Drain::Yes), &context).await
}

/// Whether a node is drained, and what is left to be done.
#[utoipa::path(
    get, path = "/admin/nodes/{node}/drain", operation_id = "drain_status", tag = "operators",
    params(("node" = String, Path, description = "Name or id"), Context),
    responses(OperatorAnswers),
)]
async fn drain_status(
    State(app): State<App>,
    Path(node): Path<String>,
    context: Context,
) -> Result<Json<Value>, Problem> {
    drained(&app, &node, None, &context).await
}

/// Uses a node again.
#[utoipa::path(
    delete, path = "/admin/nodes/{node}/drain", operation_id = "undrain_node", tag = "operators",
    params(("node" = String, Path, description = "Name or id"), Context),
    responses(OperatorAnswers),
)]
async fn undrain(
    State(app): State<App>,
    Path(node): Path<String>,
    context: Context,
) -> Result<Json<Value>, Problem> {
    drained(&app, &node, Some(Drain::No), &context).await
}

#[derive(Deserialize, IntoParams)]
#[serde(deny_unknown_fields)]
#[into_params(parameter_in = Query)]
struct Removal {
    /// Remove it although it lives and is not drained, or a shard waits for it. What would be lost with it is
    /// not removed in any case.
    #[serde(default)]
    force: bool,
    /// Seconds after which the client gives up; read by everybody.
    #[serde(default, rename = "timeout")]
    _timeout: Option<u64>,
}

/// Takes a node out of the cluster for good: one that is drained, or gone. Its id is never used again.
#[utoipa::path(
    delete, path = "/admin/nodes/{node}", operation_id = "remove_node", tag = "operators",
    params(("node" = String, Path, description = "Name or id"), Removal),
    responses(OperatorAnswers),
)]
async fn remove(
    State(app): State<App>,
    Path(node): Path<String>,
    Query(removal): Query<Removal>,
    context: Context,
) -> Result<Json<Value>, Problem> {
    let cluster = &app.running()?.cluster;
    let node = member(cluster, &node, &context).await?;
    cluster.remove_node(node, removal.force, context.deadline).await?;
    Ok(Json(json!({"removed": node})))
}

#[derive(Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
struct MoveReplica {
    /// The node that holds the replica: name or id.
    from: String,
    /// The node that is to hold it: name or id.
    to: String,
}

/// Moves a shard's replica from one node to another. Placement may move it back, unless it is paused.
#[utoipa::path(
    post, path = "/admin/shards/{shard}/move", operation_id = "move_replica", tag = "operators",
    params(("shard" = u64, Path, description = "Id"), Context),
    request_body = MoveReplica,
    responses(OperatorAnswers),
)]
async fn move_replica(
    State(app): State<App>,
    Path(shard): Path<u64>,
    context: Context,
    body: Bytes,
) -> Result<Json<Value>, Problem> {
    let request: MoveReplica = read_json(&body)?;
    let cluster = &app.running()?.cluster;
    let state = cluster.fresh_state(context.deadline).await?;
    let (from, to) = (find_node(&state, &request.from)?, find_node(&state, &request.to)?);
    cluster.move_replica(ShardId(shard), (from, to), context.deadline).await?;
    Ok(Json(json!({"shard": shard, "from": from, "to": to})))
}

#[derive(Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
struct MoveLeader {
    /// The node that is to lead: name or id.
    to: String,
}

/// Lets another of its replicas lead a shard.
#[utoipa::path(
    post, path = "/admin/shards/{shard}/leader", operation_id = "move_leader", tag = "operators",
    params(("shard" = u64, Path, description = "Id"), Context),
    request_body = MoveLeader,
    responses(OperatorAnswers),
)]
async fn move_leader(
    State(app): State<App>,
    Path(shard): Path<u64>,
    context: Context,
    body: Bytes,
) -> Result<Json<Value>, Problem> {
    let request: MoveLeader = read_json(&body)?;
    let cluster = &app.running()?.cluster;
    let to = member(cluster, &request.to, &context).await?;
    cluster.move_leader(ShardId(shard), to).await?;
    Ok(Json(json!({"shard": shard, "leader": to})))
}

#[derive(Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
struct Abandon {
    /// The collection of the shard: name or alias. Asked for, because an id is mistyped easily.
    collection: String,
}

/// Begins a shard anew, empty, whose data are out of reach for good: `is_out_of_reach` of the report. What is
/// left of it on some disk is thrown away.
#[utoipa::path(
    post, path = "/admin/shards/{shard}/abandon", operation_id = "abandon_shard", tag = "operators",
    params(("shard" = u64, Path, description = "Id"), Context),
    request_body = Abandon,
    responses(OperatorAnswers),
)]
async fn abandon(
    State(app): State<App>,
    Path(shard): Path<u64>,
    context: Context,
    body: Bytes,
) -> Result<Json<Value>, Problem> {
    let collection = read_json::<Abandon>(&body)?.collection;
    app.running()?.cluster.abandon(ShardId(shard), &collection, context.deadline).await?;
    Ok(Json(json!({"abandoned": shard, "collection": collection})))
}

#[derive(Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
struct SetReplication {
    /// Replicas of each shard, from 1 to 7. Fewer nodes mean fewer replicas until nodes arrive.
    replication_factor: u32,
}

/// Changes how many replicas a collection wants of each shard. Placement carries it out.
#[utoipa::path(
    put, path = "/admin/collections/{collection}/replication", operation_id = "set_replication",
    tag = "operators",
    params(("collection" = String, Path, description = "Name or alias"), Context),
    request_body = SetReplication,
    responses(OperatorAnswers),
)]
async fn set_replication(
    State(app): State<App>,
    Path(name): Path<String>,
    context: Context,
    body: Bytes,
) -> Result<Json<Value>, Problem> {
    let request: SetReplication = read_json(&body)?;
    let cluster = &app.running()?.cluster;
    cluster.set_replication(&name, request.replication_factor, context.deadline).await?;
    Ok(Json(json!({"collection": name, "replication_factor": request.replication_factor})))
}

#[derive(Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
struct Split {
    /// How many shards take its place, from 2; 2 when absent.
    into: Option<u32>,
}

/// Begins to split a shard, while it is read and written. `resharding` of the report says what is under way.
#[utoipa::path(
    post, path = "/admin/shards/{shard}/split", operation_id = "split_shard", tag = "operators",
    params(("shard" = u64, Path, description = "Id"), Context),
    request_body = Split,
    responses(OperatorAnswers),
)]
async fn split(
    State(app): State<App>,
    Path(shard): Path<u64>,
    context: Context,
    body: Bytes,
) -> Result<(StatusCode, Json<Value>), Problem> {
    let into = if body.is_empty() { None } else { read_json::<Split>(&body)?.into };
    let into = into.unwrap_or(2);
    app.running()?.cluster.split(ShardId(shard), into, context.deadline).await?;
    Ok((StatusCode::ACCEPTED, Json(json!({"shard": shard, "into": into}))))
}

#[derive(Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
struct Merge {
    /// The id of a neighbour: the shard whose range begins where this one's ends, or ends where it begins.
    with: u64,
}

/// Begins to make one shard of two neighbours, while they are read and written.
#[utoipa::path(
    post, path = "/admin/shards/{shard}/merge", operation_id = "merge_shards", tag = "operators",
    params(("shard" = u64, Path, description = "Id"), Context),
    request_body = Merge,
    responses(OperatorAnswers),
)]
async fn merge(
    State(app): State<App>,
    Path(shard): Path<u64>,
    context: Context,
    body: Bytes,
) -> Result<(StatusCode, Json<Value>), Problem> {
    let with = read_json::<Merge>(&body)?.with;
    app.running()?.cluster.merge(ShardId(shard), ShardId(with), context.deadline).await?;
    Ok((StatusCode::ACCEPTED, Json(json!({"shard": shard, "with": with}))))
}

/// Gives up a split or a merge: the shards stay as they are.
#[utoipa::path(
    delete, path = "/admin/collections/{collection}/reshard", operation_id = "abort_reshard", tag = "operators",
    params(("collection" = String, Path, description = "Name or alias"), Context),
    responses(OperatorAnswers),
)]
async fn abort_reshard(
    State(app): State<App>,
    Path(name): Path<String>,
    context: Context,
) -> Result<Json<Value>, Problem> {
    app.running()?.cluster.abort_reshard(&name, context.deadline).await?;
    Ok(Json(json!({"collection": name})))
}
