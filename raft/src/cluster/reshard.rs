//! Splitting and merging, as the control group sees it: shards that are to come are made unseen, and take the
//! place of those that are to go in one step.

use std::collections::BTreeMap;

use shoal_proto::{Error, RequestId, Route, ShardId};

use super::state::{MAX_SHARDS, Reshard, Shard, conflict};
use super::{ClusterState, Response};

impl ClusterState {
    pub(super) fn begin_reshard(
        &mut self,
        (id, instead_of): (RequestId, Option<RequestId>),
        name: &str,
        parents: Vec<ShardId>,
        firsts: &[Route],
    ) -> Result<Response, Error> {
        let under_way = self.resharding.get(name).map(|known| known.id);
        if under_way == Some(id) {
            return Ok(Response::Done);
        }
        if under_way != instead_of {
            return Err(conflict(match under_way {
                Some(_) => format!("the shards of `{name}` are being changed already"),
                None => format!("the change of the shards of `{name}` was given up, or has ended"),
            }));
        }
        let (_, collection) = self.collection(name)?;
        let (Some(front), Some(back)) = (parents.first(), parents.last()) else {
            return Err(Error::invalid("shards", "no shard is named"));
        };
        let at = collection.shards.iter().position(|shard| shard == front).unwrap_or(usize::MAX);
        let neighbours = collection.shards.iter().skip(at).take(parents.len());
        if !neighbours.eq(parents.iter()) {
            return Err(conflict(format!(
                "the shards of `{name}` have changed, or these are not neighbours"
            )));
        }
        let (front, back) = (&self.shards[front], &self.shards[back]);
        let ascend = firsts.windows(2).all(|pair| pair[0] < pair[1]);
        if firsts.first() != Some(&front.first)
            || !ascend
            || firsts.last().is_some_and(|last| *last > back.last)
        {
            return Err(Error::invalid("ranges", "they do not cover what the shards cover"));
        }
        let count = collection.shards.len() - parents.len() + firsts.len();
        if count > MAX_SHARDS as usize {
            return Err(conflict(format!(
                "`{name}` would have {count} shards, and {MAX_SHARDS} is the most"
            )));
        }
        // Where the data is, little has to travel; placement spreads the new shards afterwards.
        let replicas = self.shards[&parents[0]].replicas.clone();
        let (end, first_indexes) = (back.last, collection.config.payload_indexes.clone());
        self.drop_reshard(name);
        let ends = firsts.iter().skip(1).map(|next| Route(next.0 - 1)).chain([end]);
        let mut children = Vec::new();
        for (first, last) in firsts.iter().zip(ends) {
            self.last_shard += 1;
            let child = ShardId(self.last_shard);
            let shard = Shard {
                collection: name.to_owned(),
                first: *first,
                last,
                replicas: replicas.clone(),
                founders: replicas.clone(),
                first_indexes: first_indexes.clone(),
                begins_at: 0,
            };
            self.shards.insert(child, shard);
            children.push(child);
        }
        self.resharding.insert(name.to_owned(), Reshard { id, parents, children });
        Ok(Response::Done)
    }

    pub(super) fn end_reshard(
        &mut self,
        id: RequestId,
        begins: &BTreeMap<ShardId, u64>,
    ) -> Result<Response, Error> {
        let known = self.resharding.iter().find(|(_, known)| known.id == id);
        let Some((name, reshard)) = known.map(|(name, reshard)| (name.clone(), reshard.clone())) else {
            return Err(conflict("this change of shards was given up, or has ended"));
        };
        if let Some(child) = reshard.children.iter().find(|child| !begins.contains_key(child)) {
            return Err(Error::invalid("begins", format!("shard {child} has no beginning")));
        }
        self.resharding.remove(&name);
        for child in &reshard.children {
            if let Some(shard) = self.shards.get_mut(child) {
                shard.begins_at = begins[child];
            }
        }
        for parent in &reshard.parents {
            self.shards.remove(parent);
        }
        if let Some(collection) = self.collections.get_mut(&name) {
            let at = collection.shards.iter().position(|shard| *shard == reshard.parents[0]).unwrap_or(0);
            collection.shards.splice(at..at + reshard.parents.len(), reshard.children);
        }
        Ok(Response::Done)
    }

    /// Gives up a change of shards, if there is one: what it has made goes.
    pub(super) fn drop_reshard(&mut self, name: &str) {
        for child in self.resharding.remove(name).map(|reshard| reshard.children).unwrap_or_default() {
            self.shards.remove(&child);
        }
    }
}
