//! Shards whose data are lost: new ones, which are empty, take their places in one step.
//!
//! A shard whose disks are gone would wait for ever, and with it whatever waits for the shard. Its id is not
//! used again: should one of its replicas come back it is thrown away, and can not vote for what others have
//! forgotten. Whether a shard is lost nobody knows here; that was found out before, and somebody has named
//! it.

use std::collections::{BTreeMap, BTreeSet};

use shoal_proto::{Error, NodeId, ShardId};

use super::state::{Shard, conflict};
use super::{ClusterState, Response, placement};

impl ClusterState {
    pub(super) fn abandon_shards(
        &mut self,
        shards: &BTreeMap<ShardId, BTreeSet<NodeId>>,
        among: &BTreeSet<NodeId>,
    ) -> Result<Response, Error> {
        if !among.iter().any(|node| self.nodes.contains_key(node)) {
            return Err(Error::unavailable("no member is left to hold the new shards"));
        }
        // One that is there no more has been abandoned already, and the answer was lost.
        let shards = shards.iter().filter(|(id, _)| !self.was_deleted(**id));
        let shards: BTreeMap<ShardId, BTreeSet<NodeId>> =
            shards.map(|(id, replicas)| (*id, replicas.clone())).collect();
        for (id, expected) in &shards {
            let shard =
                self.shards.get(id).ok_or_else(|| Error::not_found(format!("shard {id} does not exist")))?;
            if shard.replicas != *expected {
                return Err(conflict(format!(
                    "the replicas of shard {id} have changed since it was found lost"
                )));
            }
            if !self.is_in_use(*id) {
                return Err(conflict(format!(
                    "shard {id} is not in use yet: give up the restore or the change of shards that has made \
                     it"
                )));
            }
        }
        shards.keys().for_each(|id| self.begin_anew(*id, among));
        Ok(Response::Done)
    }

    fn begin_anew(&mut self, id: ShardId, among: &BTreeSet<NodeId>) {
        let old = self.shards.remove(&id).expect("it was looked up before anything was changed");
        // A change of shards would wait for what is gone.
        self.drop_reshard(&old.collection);
        let collection = &self.collections[&old.collection];
        let first_indexes = collection.config.payload_indexes.clone();
        let wanted = collection.replication_factor as usize;
        let replicas = placement::pick(self, wanted, |node| among.contains(&node));
        self.last_shard += 1;
        let new = ShardId(self.last_shard);
        let collection = self.collections.get_mut(&old.collection).expect("a shard's collection is there");
        for place in collection.shards.iter_mut().filter(|place| **place == id) {
            *place = new;
        }
        let founders = replicas.clone();
        self.shards.insert(new, Shard { replicas, founders, first_indexes, begins_at: 0, ..old });
    }
}
