//! What can be ordered: to split a shard, to merge two, and to give up what is under way.

use std::time::Instant;

use shoal_proto::{Error, ErrorCode, Level, RequestId, Route, ShardId};
use shoal_raft::cluster::{self, ClusterState, MAX_SHARDS};

use crate::FILES_COLLECTION;
use crate::cluster::Cluster;

impl Cluster {
    /// Orders that a shard be split into so many, of equal ranges.
    ///
    /// # Errors
    /// Not found; invalid argument for a number below 2; conflict when the collection's shards are being
    /// changed already, or would be too many, or not all nodes are upgraded.
    pub async fn split(&self, shard: ShardId, into: u32, deadline: Instant) -> Result<(), Error> {
        let state = self.fresh_state(deadline).await?;
        let known = in_use(&state, shard)?;
        let (first, last) = (u64::from(known.first.0), u64::from(known.last.0) + 1);
        if !(2..=MAX_SHARDS).contains(&into) || u64::from(into) > last - first {
            return Err(Error::invalid("into", format!("a shard cannot be split into {into}")));
        }
        let bound = |at: u32| Route((first + (last - first) * u64::from(at) / u64::from(into)) as u32);
        let firsts = (0..into).map(bound).collect();
        self.begin_reshard(&known.collection, vec![shard], firsts, deadline).await
    }

    /// Orders that two neighbouring shards become one.
    ///
    /// # Errors
    /// Not found; conflict when they are no neighbours, the collection's shards are being changed already, or not
    /// all nodes are upgraded.
    pub async fn merge(&self, one: ShardId, other: ShardId, deadline: Instant) -> Result<(), Error> {
        let state = self.fresh_state(deadline).await?;
        let (one_known, other_known) = (in_use(&state, one)?, in_use(&state, other)?);
        let (parents, first) = match one_known.first < other_known.first {
            true => (vec![one, other], one_known.first),
            false => (vec![other, one], other_known.first),
        };
        self.begin_reshard(&one_known.collection, parents, vec![first], deadline).await
    }

    async fn begin_reshard(
        &self,
        name: &str,
        parents: Vec<ShardId>,
        firsts: Vec<Route>,
        deadline: Instant,
    ) -> Result<(), Error> {
        self.require(Level::PARTIAL_ANSWERS).await?;
        if name == FILES_COLLECTION {
            let message = "the collection of files keeps the shards that it was made with: \
                           the bytes of files lie by them";
            return Err(Error::new(ErrorCode::Conflict, message));
        }
        let reshard = RequestId(uuid::Uuid::new_v4().into_bytes());
        let (name, instead_of) = (name.to_owned(), None);
        let begin = cluster::Command::BeginReshard { reshard, instead_of, name, parents, firsts };
        self.control(begin, deadline).await.map(drop)
    }

    /// Gives up a change of a collection's shards: those that are there stay.
    ///
    /// # Errors
    /// Not found when nothing is being changed.
    pub async fn abort_reshard(&self, name: &str, deadline: Instant) -> Result<(), Error> {
        loop {
            let state = self.fresh_state(deadline).await?;
            let name = state.collection(name)?.0;
            let none = || Error::not_found(format!("the shards of `{name}` are not being changed"));
            let reshard = state.resharding.get(name).ok_or_else(none)?.id;
            let abort = cluster::Command::AbortReshard { reshard };
            // An attempt that took this one's place meanwhile is to be given up as well.
            if self.control(abort, deadline).await? != cluster::Response::Absent {
                return Ok(());
            }
        }
    }
}

fn in_use(state: &ClusterState, shard: ShardId) -> Result<&cluster::Shard, Error> {
    let known = state.shards.get(&shard).filter(|_| state.is_in_use(shard));
    known.ok_or_else(|| Error::not_found(format!("shard {shard} does not exist")))
}
