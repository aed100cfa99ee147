//! Writing and reading points over the shards of a collection: what both surfaces share.

use std::sync::Arc;
use std::time::{Duration, Instant};

use futures::future::try_join_all;
use shoal_actors::Cluster;
use shoal_actors::routing::{Part, cut_points, cut_target, for_all};
use shoal_actors::search::{Gathered, gather};
use shoal_engine::command::{Answer, Command, Point, Read, Target};
use shoal_proto::{CollectionConfig, Error, Position, ShardId};
use shoal_raft::cluster::{ClusterState, Collection};

use crate::http::context::Context;

/// How long the cluster may take to say whether there is a collection that a node does not know.
const FIND_TIMEOUT: Duration = Duration::from_secs(2);

/// A collection that was looked up.
#[derive(Clone, Debug)]
pub struct Found {
    /// Its real name.
    pub name: String,
    /// Its schema.
    pub config: CollectionConfig,
    /// Its shards.
    pub shards: Vec<ShardId>,
    /// The state that it was found in.
    pub state: Arc<ClusterState>,
}

impl Found {
    /// Finds a collection by name or alias.
    ///
    /// # Errors
    /// Not found, in the words that Qdrant's clients look for; unavailable when the cluster does
    /// not answer.
    pub async fn find(cluster: &Cluster, name: &str) -> Result<Found, Error> {
        let found = Found::find_if_any(cluster, name).await?;
        found.ok_or_else(|| Error::not_found(format!("Not found: Collection `{name}` doesn't exist!")))
    }

    /// Finds a collection by name or alias. One that this node does not know may only be news to
    /// it: the cluster is asked before anybody hears that there is none.
    ///
    /// # Errors
    /// Unavailable when the cluster does not answer.
    pub async fn find_if_any(cluster: &Cluster, name: &str) -> Result<Option<Found>, Error> {
        match Found::within(cluster.state(), name) {
            None => Ok(Found::within(cluster.fresh_state(Instant::now() + FIND_TIMEOUT).await?, name)),
            found => Ok(found),
        }
    }

    fn within(state: Arc<ClusterState>, name: &str) -> Option<Found> {
        let (name, collection) = state.collection(name).ok()?;
        let (name, config, shards) = (name.to_owned(), collection.config.clone(), collection.shards.clone());
        Some(Found { name, config, shards, state })
    }

    fn collection(&self) -> &Collection {
        &self.state.collections[&self.name]
    }
}

/// Upserts points: checked first, split by shard, each entry atomic in its shard.
///
/// # Errors
/// The first that any shard gives; the parts of other shards may have been written.
pub async fn upsert(
    cluster: &Cluster,
    found: &Found,
    points: Vec<Point>,
    context: &Context,
) -> Result<Position, Error> {
    for (index, point) in points.iter().enumerate() {
        shoal_engine::check_point(&found.config, point).map_err(|error| {
            let field = error.field.clone().unwrap_or_default();
            Error {
                field: Some(format!("points[{index}].{field}")),
                message: format!("Wrong input: points[{index}].{}", error.message),
                ..error
            }
        })?;
    }
    let parts = cut_points(found.collection(), points, |part| context.part_id(part));
    write_parts(cluster, found, parts, context).await.map(|(_, position)| position)
}

/// Puts a command about a target through the shards that it concerns.
///
/// # Errors
/// The first that any shard gives.
pub async fn write_target(
    cluster: &Cluster,
    found: &Found,
    target: Target,
    context: &Context,
    command: impl Fn(Target) -> Command,
) -> Result<(u64, Position), Error> {
    let parts = cut_target(found.collection(), &target, command, |part| context.part_id(part));
    write_parts(cluster, found, parts, context).await
}

/// Puts a command through every shard.
///
/// # Errors
/// The first that any shard gives.
pub async fn write_all(
    cluster: &Cluster,
    found: &Found,
    command: &Command,
    context: &Context,
) -> Result<(u64, Position), Error> {
    let parts = for_all(found.collection(), command, |part| context.part_id(part));
    write_parts(cluster, found, parts, context).await
}

async fn write_parts(
    cluster: &Cluster,
    found: &Found,
    parts: Vec<Part>,
    context: &Context,
) -> Result<(u64, Position), Error> {
    // Those of one range one after the other, in the order in which the request has them.
    let mut ranges: Vec<Vec<Part>> = Vec::new();
    for part in parts {
        match ranges.last_mut().filter(|parts| parts[0].range == part.range) {
            Some(parts) => parts.push(part),
            None => ranges.push(vec![part]),
        }
    }
    let writes = ranges.into_iter().map(|parts| async move {
        let (mut touched, mut position) = (0, Position::default());
        for part in parts {
            let (count, reached) = cluster.write_part(&found.name, part, context.deadline).await?;
            touched += count;
            position.merge(&reached);
        }
        Ok::<_, Error>((touched, position))
    });
    let (mut touched, mut position) = (0, Position::default());
    for (count, reached) in try_join_all(writes).await? {
        touched += count;
        position.merge(&reached);
    }
    Ok((touched, position))
}

/// Asks every shard of a collection.
///
/// # Errors
/// As [`gather`].
pub async fn ask_all(
    cluster: &Cluster,
    found: &Found,
    question: &Read,
    context: &Context,
) -> Result<Gathered, Error> {
    gather(cluster, &found.name, question, &context.read_options(), context.allow_partial).await
}

/// The number of points that a filter keeps.
///
/// # Errors
/// As [`gather`].
pub async fn count(
    cluster: &Cluster,
    found: &Found,
    filter: Option<String>,
    context: &Context,
) -> Result<u64, Error> {
    let gathered = ask_all(cluster, found, &Read::Count { filter }, context).await?;
    Ok(gathered.answers.iter().map(|answer| if let Answer::Count(count) = answer { *count } else { 0 }).sum())
}
