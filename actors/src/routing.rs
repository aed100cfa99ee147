//! Reading and writing by collection and route: what is asked goes where the shard map says, and again when
//! that was out of date.
//!
//! A write of several points is cut by the shards that the collection was made with ([`Origin`]) before it is
//! cut by those that it has: a write that is repeated after a split is then cut the same way, and each part
//! carries the request id under which the shards before may have applied it.

use std::time::{Duration, Instant};

use futures::future::try_join_all;
use shoal_engine::command::{Answer, Command, Hit, Outcome, Point, Read, Select, Target};
use shoal_proto::{Error, ErrorCode, PointId, Position, RequestId, Route, ShardId};
use shoal_raft::cluster::{ClusterState, Collection, Origin};

use crate::cluster::{Cluster, ReadOptions};
use crate::entries::{by_shard, entries};

/// How long a newer shard map is waited for before the present one is tried again: a shard may be frozen
/// for a moment, and then go on.
const STALE_PAUSE: Duration = Duration::from_millis(50);
/// The pause before a shard that is busy is written to again.
const BUSY_PAUSE: Duration = Duration::from_millis(50);

/// A range of routes, both ends included.
pub type Range = (Route, Route);

/// A part of a write: what is to be done in a range, and how it is known when it is repeated.
#[derive(Clone, Debug, PartialEq)]
pub struct Part {
    /// Its request id.
    pub id: RequestId,
    /// The range.
    pub range: Range,
    /// What is to be done there.
    pub command: Command,
}

/// The ranges that a collection was made with.
fn origins(collection: &Collection) -> impl Iterator<Item = (ShardId, Range)> {
    let ends = collection.origins.iter().skip(1).map(|next| Route(next.first.0 - 1)).chain([Route(u32::MAX)]);
    collection.origins.iter().zip(ends).map(|(Origin { shard, first }, last)| (*shard, (*first, last)))
}

fn is_in(range: Range, route: Route) -> bool {
    (range.0..=range.1).contains(&route)
}

/// Cuts an upsert into parts. `part_id` names one by the shard that the collection was made with and its number.
pub fn cut_points(
    collection: &Collection,
    points: Vec<Point>,
    part_id: impl Fn(&str) -> RequestId,
) -> Vec<Part> {
    let mut left = points;
    let mut parts = Vec::new();
    for (origin, range) in origins(collection) {
        let (here, others) = left.into_iter().partition(|point: &Point| is_in(range, point.id.route()));
        left = others;
        for (number, entry) in entries(here).into_iter().enumerate() {
            let id = part_id(&format!("{origin}/{number}"));
            parts.push(Part { id, range, command: Command::Upsert(entry) });
        }
    }
    parts
}

/// Cuts a command about a target into parts.
pub fn cut_target(
    collection: &Collection,
    target: &Target,
    command: impl Fn(Target) -> Command,
    part_id: impl Fn(&str) -> RequestId,
) -> Vec<Part> {
    let part = |(origin, range): (ShardId, Range)| {
        let target = match target {
            Target::Ids(ids) => {
                let here: Vec<PointId> = ids.iter().copied().filter(|id| is_in(range, id.route())).collect();
                (!here.is_empty()).then_some(Target::Ids(here))?
            }
            by_filter => by_filter.clone(),
        };
        Some(Part { id: part_id(&origin.to_string()), range, command: command(target) })
    };
    origins(collection).filter_map(part).collect()
}

/// A command for every shard, in parts.
pub fn for_all(collection: &Collection, command: &Command, part_id: impl Fn(&str) -> RequestId) -> Vec<Part> {
    let part = |(origin, range): (ShardId, Range)| Part {
        id: part_id(&origin.to_string()),
        range,
        command: command.clone(),
    };
    origins(collection).map(part).collect()
}

/// The shards of a collection that own some of a range, each with what it owns of it.
fn owners(state: &ClusterState, collection: &Collection, range: Range) -> Vec<(ShardId, Range)> {
    let owned = collection.shards.iter().filter_map(|id| {
        let shard = state.shards.get(id)?;
        let (first, last) = (shard.first.max(range.0), shard.last.min(range.1));
        (first <= last).then_some((*id, (first, last)))
    });
    owned.collect()
}

impl Cluster {
    /// As [`Cluster::write`], and again while the shard has too much to do.
    ///
    /// # Errors
    /// As [`Cluster::write`]; busy when that does not end before the deadline.
    pub(crate) async fn write_when_free(
        &self,
        shard: ShardId,
        request_id: Option<RequestId>,
        command: &Command,
        deadline: Instant,
    ) -> Result<(Outcome, u64), Error> {
        loop {
            match self.write(shard, request_id, command, deadline).await {
                Err(error) if error.code == ErrorCode::Busy && Instant::now() < deadline => {
                    tokio::time::sleep(BUSY_PAUSE).await;
                }
                written => return written,
            }
        }
    }

    /// Waits a moment for a newer shard map than that of a version. False once the deadline has passed.
    pub async fn wait_newer(&self, version: u64, deadline: Instant) -> bool {
        let until = deadline.min(Instant::now() + STALE_PAUSE);
        // That there is none yet is no error: what was frozen may go on.
        drop(self.wait_state(until, |state| state.version > version).await);
        Instant::now() < deadline
    }

    /// Puts a command about one document or file where it lives. Returns the outcome, and where and at which
    /// log index it was applied.
    ///
    /// # Errors
    /// As [`Cluster::write`]; not found when there is no such collection.
    pub async fn write_at(
        &self,
        collection: &str,
        route: Route,
        request_id: Option<RequestId>,
        command: Command,
        deadline: Instant,
    ) -> Result<(Outcome, ShardId, u64), Error> {
        loop {
            let state = self.state();
            let shard = state.shard_of(state.collection(collection)?.1, route);
            match self.write(shard, request_id, &command, deadline).await {
                Ok((outcome, index)) => return Ok((outcome, shard, index)),
                Err(error) if error.code != ErrorCode::Stale => return Err(error),
                Err(error) if !self.wait_newer(state.version, deadline).await => return Err(error),
                Err(_) => {}
            }
        }
    }

    /// Asks a question about one document or file where it lives. Returns the answer, and of which shard at
    /// which log index.
    ///
    /// # Errors
    /// As [`Cluster::read`]; not found when there is no such collection.
    pub async fn read_at(
        &self,
        collection: &str,
        route: Route,
        question: &Read,
        options: &ReadOptions,
    ) -> Result<(Answer, ShardId, u64), Error> {
        loop {
            let state = self.map_for(options).await?;
            let shard = state.shard_of(state.collection(collection)?.1, route);
            match self.read_hedged(shard, question.clone(), options).await {
                Ok((answer, applied)) => return Ok((answer, shard, applied)),
                Err(error) if error.code != ErrorCode::Stale => return Err(error),
                Err(error) if !self.wait_newer(state.version, options.deadline).await => return Err(error),
                Err(_) => {}
            }
        }
    }

    /// Reads points by their ids, wherever they live, in no order, and says how far each shard was.
    ///
    /// # Errors
    /// As [`Cluster::read`]; not found when there is no such collection.
    pub async fn read_points(
        &self,
        collection: &str,
        ids: &[PointId],
        (payload, vectors): (&Select, &Select),
        options: &ReadOptions,
    ) -> Result<(Vec<Hit>, Position), Error> {
        loop {
            let state = self.map_for(options).await?;
            let known = state.collection(collection)?.1;
            let split = by_shard(ids.to_vec(), |id| state.shard_of_point(known, *id));
            let reads = split.into_iter().map(|(shard, ids)| async move {
                let question = Read::Get { ids, payload: payload.clone(), vectors: vectors.clone() };
                let (answer, applied) = self.read_hedged(shard, question, options).await?;
                Ok::<_, Error>((shard, answer, applied))
            });
            match try_join_all(reads).await {
                Ok(answers) => {
                    let (mut hits, mut position) = (Vec::new(), Position::default());
                    for (shard, answer, applied) in answers {
                        position.advance(shard.into(), applied);
                        if let Answer::Points(found) = answer {
                            hits.extend(found);
                        }
                    }
                    return Ok((hits, position));
                }
                Err(error) if error.code != ErrorCode::Stale => return Err(error),
                Err(error) if !self.wait_newer(state.version, options.deadline).await => return Err(error),
                Err(_) => {}
            }
        }
    }

    /// Puts a part of a write where its range lives. Returns how many points it touched, and where it was
    /// applied.
    ///
    /// # Errors
    /// As [`Cluster::write`]; not found when there is no such collection.
    pub async fn write_part(
        &self,
        collection: &str,
        part: Part,
        deadline: Instant,
    ) -> Result<(u64, Position), Error> {
        loop {
            let state = self.state();
            match self.try_part(&state, collection, &part, deadline).await {
                Err(error) if error.code != ErrorCode::Stale => return Err(error),
                Err(error) if !self.wait_newer(state.version, deadline).await => return Err(error),
                // From the beginning: a shard knows a request by its id, and must see all that is its own of it.
                Err(_) => {}
                done => return done,
            }
        }
    }

    /// The same by one shard map.
    async fn try_part(
        &self,
        state: &ClusterState,
        collection: &str,
        part: &Part,
        deadline: Instant,
    ) -> Result<(u64, Position), Error> {
        let (mut touched, mut position) = (0, Position::default());
        for (shard, (first, last)) in owners(state, state.collection(collection)?.1, part.range) {
            let owned = &state.shards[&shard];
            let is_whole = (owned.first, owned.last) == part.range;
            let piece = if is_whole { None } else { Some(part.command.clone().within(first, last)) };
            let command = match &piece {
                None => &part.command,
                Some(Some(piece)) => piece,
                Some(None) => continue,
            };
            let (outcome, index) = self.write(shard, Some(part.id), command, deadline).await?;
            position.advance(shard.into(), index);
            touched += if let Outcome::Done(count) = outcome { count } else { 0 };
        }
        Ok((touched, position))
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use super::*;

    fn collection(origins: &[(u64, u32)]) -> Collection {
        Collection {
            config: Default::default(),
            shards: Vec::new(),
            replication_factor: 1,
            created_at: 0,
            origins: origins
                .iter()
                .map(|(shard, first)| Origin { shard: ShardId(*shard), first: Route(*first) })
                .collect(),
        }
    }

    fn id(part: &str) -> RequestId {
        RequestId::from_key(part, "a request")
    }

    #[test]
    fn an_upsert_is_cut_by_what_the_collection_was_made_with() {
        let known = collection(&[(1, 0), (2, 1 << 31)]);
        let points: Vec<Point> = (0..3000)
            .map(|number| Point { id: PointId::Num(number), vectors: Vec::new(), payload: String::new() })
            .collect();
        let parts = cut_points(&known, points, id);
        assert!(parts.len() >= 6, "entries are bounded");
        let names: BTreeSet<RequestId> = parts.iter().map(|part| part.id).collect();
        assert_eq!(names.len(), parts.len());
        assert!(names.contains(&id("1/0")) && names.contains(&id("2/0")));
        let mut seen = 0;
        for part in &parts {
            let Command::Upsert(points) = &part.command else { panic!("an upsert") };
            assert!(points.iter().all(|point| is_in(part.range, point.id.route())));
            seen += points.len();
        }
        assert_eq!(seen, 3000);
    }

    #[test]
    fn a_target_is_cut_where_it_names_points() {
        let known = collection(&[(1, 0), (2, 1 << 31)]);
        let one = cut_target(&known, &Target::Ids(vec![PointId::Num(1)]), Command::Delete, id);
        assert_eq!(one.len(), 1);
        let all = cut_target(&known, &Target::Filter("{}".into()), Command::Delete, id);
        assert_eq!(all.iter().map(|part| part.id).collect::<Vec<_>>(), [id("1"), id("2")]);
        assert_eq!(all[1].range, (Route(1 << 31), Route(u32::MAX)));
    }
}
