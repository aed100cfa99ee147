//! Writing and reading points over the shards of a collection: what both surfaces share.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::{Duration, Instant};

use futures::future::try_join_all;
use shoal_actors::Cluster;
use shoal_actors::entries::{by_shard, entries};
use shoal_actors::search::{Gathered, gather};
use shoal_engine::command::{Answer, Command, Outcome, Point, Read, Target};
use shoal_proto::{CollectionConfig, Error, PointId, Position, ShardId};
use shoal_raft::cluster::ClusterState;

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

    /// The shard that owns a point.
    pub fn shard_of(&self, id: PointId) -> ShardId {
        self.state.shard_of_point(&self.state.collections[&self.name], id)
    }

    /// Splits ids by shard.
    pub fn by_shard(&self, ids: &[PointId]) -> BTreeMap<ShardId, Vec<PointId>> {
        let mut split: BTreeMap<ShardId, Vec<PointId>> = BTreeMap::new();
        for id in ids {
            split.entry(self.shard_of(*id)).or_default().push(*id);
        }
        split
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
    let writes = by_shard(points, |id| found.shard_of(id)).into_iter().map(|(shard, points)| async move {
        let mut index = 0;
        for (number, entry) in entries(points).into_iter().enumerate() {
            let id = context.part_id(&format!("{shard}/{number}"));
            index = cluster.write(shard, Some(id), Command::Upsert(entry), context.deadline).await?.1;
        }
        Ok::<_, Error>((shard, index))
    });
    let mut position = Position::default();
    for (shard, index) in try_join_all(writes).await? {
        position.advance(shard.into(), index);
    }
    Ok(position)
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
    let parts: Vec<(ShardId, Command)> = match target {
        Target::Ids(ids) => {
            found.by_shard(&ids).into_iter().map(|(shard, ids)| (shard, command(Target::Ids(ids)))).collect()
        }
        Target::Filter(filter) => {
            found.shards.iter().map(|shard| (*shard, command(Target::Filter(filter.clone())))).collect()
        }
    };
    write_parts(cluster, parts, context).await
}

/// Puts one command per shard through.
///
/// # Errors
/// The first that any shard gives.
pub async fn write_parts(
    cluster: &Cluster,
    parts: Vec<(ShardId, Command)>,
    context: &Context,
) -> Result<(u64, Position), Error> {
    let writes = parts.into_iter().map(|(shard, command)| async move {
        let id = context.part_id(&shard.to_string());
        let (outcome, index) = cluster.write(shard, Some(id), command, context.deadline).await?;
        Ok::<_, Error>((shard, index, outcome))
    });
    let (mut touched, mut position) = (0, Position::default());
    for (shard, index, outcome) in try_join_all(writes).await? {
        position.advance(shard.into(), index);
        if let Outcome::Done(count) = outcome {
            touched += count;
        }
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
    gather(cluster, &found.shards, question, &context.read_options(), context.allow_partial).await
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
