//! Search over a collection: one replica of each shard is asked, the lists are merged.

use std::cmp::Ordering;

use futures::future::join_all;
use serde::Serialize;
use shoal_engine::command::{Answer, Hit, Read, Search};
use shoal_proto::{Error, ErrorCode, Position, ShardId};

use crate::cluster::{Cluster, ReadOptions};

/// The constant of reciprocal rank fusion (Cormack, Clarke and Büttcher, 2009).
pub const RRF_K: f32 = 60.0;

/// How many shards answered.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize)]
pub struct ShardCounts {
    /// Shards asked.
    pub total: usize,
    /// Shards that answered.
    pub ok: usize,
    /// Shards that did not.
    pub failed: usize,
}

/// What came of asking every shard of a collection.
#[derive(Clone, Debug)]
pub struct Gathered {
    /// The answers, in the order of the shards.
    pub answers: Vec<Answer>,
    /// How many shards answered.
    pub shards: ShardCounts,
    /// How far each shard was.
    pub position: Position,
}

/// Asks every shard of a collection the same question, and again when the shard map was out of date.
///
/// # Errors
/// The first shard's error, unless the client takes partial results and some shard answered.
pub async fn gather(
    cluster: &Cluster,
    collection: &str,
    question: &Read,
    options: &ReadOptions,
    allow_partial: bool,
) -> Result<Gathered, Error> {
    loop {
        let state = cluster.map_for(options).await?;
        let shards = &state.collection(collection)?.1.shards;
        match ask_each(cluster, shards, question, options, allow_partial).await {
            Err(error) if error.code == ErrorCode::Stale => {
                if !cluster.wait_newer(state.version, options.deadline).await {
                    return Err(error);
                }
            }
            gathered => return gathered,
        }
    }
}

async fn ask_each(
    cluster: &Cluster,
    shards: &[ShardId],
    question: &Read,
    options: &ReadOptions,
    allow_partial: bool,
) -> Result<Gathered, Error> {
    let asks = shards.iter().map(|shard| cluster.read_hedged(*shard, question.clone(), options));
    let mut gathered =
        Gathered { answers: Vec::new(), shards: ShardCounts::default(), position: Position::default() };
    let mut first_error = None;
    for (shard, answered) in shards.iter().zip(join_all(asks).await) {
        gathered.shards.total += 1;
        match answered {
            Ok((answer, applied)) => {
                gathered.shards.ok += 1;
                gathered.position.advance((*shard).into(), applied);
                gathered.answers.push(answer);
            }
            // The map is out of date: the other answers are of no use either.
            Err(error) if error.code == ErrorCode::Stale => return Err(error),
            Err(error) => {
                gathered.shards.failed += 1;
                // A caller's mistake counts before a shard's trouble: it is the same everywhere.
                if first_error.as_ref().is_none_or(|known: &Error| known.code.is_retryable()) {
                    first_error = Some(error);
                }
            }
        }
    }
    match first_error {
        Some(error) if !(allow_partial && gathered.shards.ok > 0 && error.code.is_retryable()) => Err(error),
        _ => Ok(gathered),
    }
}

/// Searches every shard of a collection and merges each leg's lists. `higher_is_nearer` tells each leg's order.
///
/// # Errors
/// As [`gather`].
pub async fn search(
    cluster: &Cluster,
    collection: &str,
    search: Search,
    higher_is_nearer: &[bool],
    options: &ReadOptions,
    allow_partial: bool,
) -> Result<(Vec<Vec<Hit>>, ShardCounts, Position), Error> {
    let limit = search.limit;
    let legs = search.legs.len();
    let gathered = gather(cluster, collection, &Read::Search(search), options, allow_partial).await?;
    let mut lists: Vec<Vec<Hit>> = vec![Vec::new(); legs];
    for answer in gathered.answers {
        let Answer::Lists(found) = answer else {
            return Err(Error::internal("a shard did not answer with lists"));
        };
        for (list, found) in lists.iter_mut().zip(found) {
            list.extend(found);
        }
    }
    for (list, higher) in lists.iter_mut().zip(higher_is_nearer) {
        list.sort_by(|a, b| nearer_first(a, b, *higher));
        list.truncate(limit);
    }
    Ok((lists, gathered.shards, gathered.position))
}

fn nearer_first(a: &Hit, b: &Hit, higher_is_nearer: bool) -> Ordering {
    let order = a.score.total_cmp(&b.score);
    let order = if higher_is_nearer { order.reverse() } else { order };
    order.then(a.id.cmp(&b.id))
}

/// Fuses ranked lists by reciprocal rank. The score is the sum of `1 / (k + rank)`, ranks from
/// one.
pub fn fuse(lists: Vec<Vec<Hit>>, limit: usize, k: f32) -> Vec<Hit> {
    let mut fused: Vec<Hit> = Vec::new();
    let mut places = std::collections::HashMap::new();
    for list in lists {
        for (rank, mut hit) in list.into_iter().enumerate() {
            let score = 1.0 / (k + rank as f32 + 1.0);
            match places.get(&hit.id) {
                Some(&place) => {
                    let known: &mut Hit = &mut fused[place];
                    known.score += score;
                }
                None => {
                    hit.score = score;
                    places.insert(hit.id, fused.len());
                    fused.push(hit);
                }
            }
        }
    }
    // Stable: of equals, the one that the first list puts first comes first.
    fused.sort_by(|a, b| b.score.total_cmp(&a.score));
    fused.truncate(limit);
    fused
}

#[cfg(test)]
mod tests {
    use super::*;
    use shoal_proto::PointId;

    fn hit(id: u64, score: f32) -> Hit {
        Hit { id: PointId::Num(id), score, version: 0, payload: None, vectors: None }
    }

    #[test]
    fn what_both_lists_like_comes_first() {
        let dense = vec![hit(1, 0.9), hit(2, 0.8), hit(3, 0.7)];
        let words = vec![hit(3, 12.0), hit(2, 5.0), hit(9, 1.0)];
        let ids: Vec<PointId> = fuse(vec![dense, words], 3, RRF_K).iter().map(|hit| hit.id).collect();
        assert_eq!(ids, [PointId::Num(3), PointId::Num(2), PointId::Num(1)]);
    }
}
