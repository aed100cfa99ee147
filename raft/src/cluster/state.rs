//! The value itself and its transitions.

use std::collections::{BTreeMap, BTreeSet, VecDeque};

use serde::{Deserialize, Serialize};
use shoal_proto::collection::validate_name;
use shoal_proto::{
    CollectionConfig, Error, ErrorCode, FieldType, GroupId, Level, NodeId, PointId, Position, RequestId,
    Route, ShardId,
};

use super::placement;
use super::{Addresses, Command, Response};

/// The most shards in one collection.
pub const MAX_SHARDS: u32 = 256;
/// The most replicas of one shard.
pub const MAX_REPLICATION: u32 = 7;
/// Replicas of a shard when neither the collection nor the number of nodes says otherwise.
pub const DEFAULT_REPLICATION: u32 = 3;
/// How many answered requests are remembered, so that a retry gets the first answer.
pub const REMEMBERED_REQUESTS: usize = 256;

/// A member of the cluster.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Node {
    /// Host name or ordinal.
    pub name: String,
    /// A UUID made once per data directory.
    pub incarnation: String,
    /// Where it listens.
    pub addresses: Addresses,
    /// Failure domain; empty when unknown.
    pub zone: String,
    /// Whether everything is to leave it.
    pub drain: Drain,
}

/// Whether placement takes everything off a node.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub enum Drain {
    /// The node is used.
    #[default]
    No,
    /// It is drained, until its process starts again: what a node asks for itself when it stops.
    UntilRestart,
    /// It is drained, until somebody says otherwise.
    Yes,
}

/// A named set of points with one schema.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Collection {
    /// The schema.
    pub config: CollectionConfig,
    /// Its shards, in the order of their ranges.
    pub shards: Vec<ShardId>,
    /// Replicas wanted of each shard. Fewer nodes mean fewer replicas until nodes arrive.
    pub replication_factor: u32,
    /// Seconds since the Unix epoch.
    pub created_at: u64,
    /// The shards that it was made with, in the order of their ranges. Writes of several points are cut by
    /// these first, so that a write that is repeated is cut the same way whatever has become of the shards:
    /// only then is it recognised.
    pub origins: Vec<Origin>,
}

impl Collection {
    /// One that has no shards yet.
    fn new(config: CollectionConfig, replication_factor: u32, created_at: u64) -> Collection {
        Collection { config, shards: Vec::new(), replication_factor, created_at, origins: Vec::new() }
    }
}

/// A shard that a collection was made with.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Origin {
    /// Its id.
    pub shard: ShardId,
    /// The first route of its range, which ends where the next one begins.
    pub first: Route,
}

/// A change of the shards of a collection that is under way.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Reshard {
    /// Made once per attempt.
    pub id: RequestId,
    /// The shards that are to go, in the order of their ranges.
    pub parents: Vec<ShardId>,
    /// The shards that are to come, in the order of their ranges. Nobody sees them yet.
    pub children: Vec<ShardId>,
}

/// One hash range of one collection.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Shard {
    /// The collection's name.
    pub collection: String,
    /// First route of the range.
    pub first: Route,
    /// Last route of the range, included.
    pub last: Route,
    /// Nodes that should hold a replica.
    pub replicas: BTreeSet<NodeId>,
    /// The nodes that the group was started with: only these may initialise it.
    pub founders: BTreeSet<NodeId>,
    /// The payload indexes that every replica begins with, whenever it begins; what has changed
    /// since then is in the group's log.
    pub first_indexes: BTreeMap<String, FieldType>,
    /// The log index from which it has everything that the shards before it had; nothing is read from a
    /// replica that has not come so far.
    pub begins_at: u64,
}

/// Who puts a collection back from a backup.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Restore {
    /// Made once per restore.
    pub id: RequestId,
    /// The node that does it.
    pub node: NodeId,
}

/// Another name for a collection.
pub type Alias = String;

/// All that the control group has agreed about.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct ClusterState {
    /// How many commands changed the state: the version of the shard map.
    pub version: u64,
    /// A UUID as text; empty until the cluster is created.
    pub cluster_id: String,
    /// What the members may write and say to each other. Never lowered.
    pub level: Level,
    /// Members by id.
    pub nodes: BTreeMap<NodeId, Node>,
    /// Ids that were members once. They never come back.
    pub removed: BTreeSet<NodeId>,
    /// The incarnations of those: a data directory that belongs to none of the members any more.
    pub gone: BTreeMap<String, NodeId>,
    /// Whether placement is kept from moving anything by itself.
    pub is_placement_paused: bool,
    /// Collections by name.
    pub collections: BTreeMap<String, Collection>,
    /// Collection names by alias.
    pub aliases: BTreeMap<Alias, String>,
    /// Collections that are being put back from a backup, by name, and by whom: nobody sees them.
    pub restoring: BTreeMap<String, Restore>,
    /// Changes of shards, by collection.
    pub resharding: BTreeMap<String, Reshard>,
    /// Shards by id.
    pub shards: BTreeMap<ShardId, Shard>,
    pub(super) last_node: u64,
    pub(super) last_shard: u64,
    pub(super) answered: VecDeque<(RequestId, Response)>,
}

impl ClusterState {
    /// Applies one command. A bad command is rejected the same way on every node.
    pub fn apply(&mut self, command: Command) -> Response {
        let request_id = match &command {
            Command::CreateCollection { request_id, .. } | Command::DeleteCollection { request_id, .. } => {
                Some(*request_id)
            }
            Command::EndRestoreAs { restore, .. } => Some(*restore),
            _ => None,
        };
        let answered = self.answered.iter().find(|(id, _)| Some(*id) == request_id);
        if let Some((_, response)) = answered {
            return response.clone();
        }
        let response = self.transition(command).unwrap_or_else(Response::Rejected);
        if !matches!(response, Response::Rejected(_)) {
            self.version += 1;
        }
        if let Some(request_id) = request_id {
            self.answered.push_back((request_id, response.clone()));
            while self.answered.len() > REMEMBERED_REQUESTS {
                self.answered.pop_front();
            }
        }
        self.assert_invariants();
        response
    }

    fn transition(&mut self, command: Command) -> Result<Response, Error> {
        let needed = command.level();
        if needed > self.level {
            return Err(conflict(format!(
                "the cluster works at level {}, and this needs {needed}",
                self.level
            )));
        }
        match command {
            Command::CreateCluster { cluster_id } => self.create_cluster(cluster_id),
            Command::AddNode { name, incarnation, addresses, zone } => {
                let node = Node { name, incarnation, addresses, zone, drain: Drain::No };
                self.add_node(node, Level::FIRST, |_| true)
            }
            Command::AdmitNode { name, incarnation, addresses, zone, level, instead_of } => {
                let node = Node { name, incarnation, addresses, zone, drain: Drain::No };
                self.add_node(node, level, |namesake| instead_of == Some(namesake))
            }
            Command::RaiseLevel { level, nodes } => self.raise_level(level, &nodes),
            Command::UpdateNode { node, addresses } => {
                let known = self.nodes.get_mut(&node).ok_or_else(|| unknown_node(node))?;
                known.addresses = addresses;
                Ok(Response::Done)
            }
            Command::SetZone { node, zone } => {
                self.nodes.get_mut(&node).ok_or_else(|| unknown_node(node))?.zone = zone;
                Ok(Response::Done)
            }
            Command::RemoveNode { node } => self.remove_node(node),
            Command::CreateCollection {
                name, config, shard_count, replication_factor, created_at, ..
            } => {
                let replication_factor = replication_factor.unwrap_or(DEFAULT_REPLICATION);
                let collection = Collection::new(config, replication_factor, created_at);
                self.create_collection(name, collection, shard_count)
            }
            Command::DeleteCollection { name, .. } if self.restoring.contains_key(&name) => {
                Ok(Response::Absent)
            }
            Command::DeleteCollection { name, .. } => Ok(self.delete_collection(&name)),
            Command::SetPayloadIndex { name, field, index } => {
                let config = &mut self.usable_mut(&name)?.config;
                let mut changed = config.clone();
                match index {
                    Some(index) => changed.payload_indexes.insert(field, index),
                    None => changed.payload_indexes.remove(&field),
                };
                changed.validate()?;
                *config = changed;
                Ok(Response::Done)
            }
            Command::SetAttributes { name, attributes_json } => {
                self.usable_mut(&name)?.config.attributes_json = attributes_json;
                Ok(Response::Done)
            }
            Command::SetAlias { alias, collection } => self.set_alias(alias, collection),
            Command::SetReplicas { shard, expected, replicas } => {
                self.set_replicas(shard, &expected, replicas)
            }
            Command::SetDrain { node, drain } => self.set_drain(node, drain),
            Command::PausePlacement { is_paused } => {
                self.is_placement_paused = is_paused;
                Ok(Response::Done)
            }
            Command::SetReplicationFactor { name, replication_factor } => {
                check_count("replication_factor", replication_factor, MAX_REPLICATION)?;
                self.usable_mut(&name)?.replication_factor = replication_factor;
                Ok(Response::Done)
            }
            Command::BeginRestore {
                restore,
                node,
                name,
                config,
                shard_count,
                replication_factor,
                created_at,
            } => {
                let collection = Collection::new(config, replication_factor, created_at);
                self.begin_restore(Restore { id: restore, node }, name, collection, shard_count)
            }
            Command::EndRestore { restore, collections, aliases } => {
                self.end_restore(restore, &collections, aliases)
            }
            Command::EndRestoreAs { restore, collections, hidden, name, only_if_free } => {
                self.end_restore_as(restore, &collections, &hidden, name, only_if_free)
            }
            Command::AbortRestore { restore } => {
                self.abort_restores(|by| by.id == restore);
                Ok(Response::Done)
            }
            Command::BeginReshard { reshard, instead_of, name, parents, firsts } => {
                self.begin_reshard((reshard, instead_of), &name, parents, &firsts)
            }
            Command::EndReshard { reshard, begins } => self.end_reshard(reshard, &begins),
            Command::AbandonShards { shards, among } => self.abandon_shards(&shards, &among),
            Command::AbortReshard { reshard } => {
                let name = self.resharding.iter().find(|(_, known)| known.id == reshard);
                let Some(name) = name.map(|(name, _)| name.clone()) else { return Ok(Response::Absent) };
                self.drop_reshard(&name);
                Ok(Response::Done)
            }
        }
    }

    fn create_cluster(&mut self, cluster_id: String) -> Result<Response, Error> {
        if !self.cluster_id.is_empty() && self.cluster_id != cluster_id {
            return Err(conflict(format!("this is cluster {} already", self.cluster_id)));
        }
        self.cluster_id = cluster_id;
        Ok(Response::Done)
    }

    fn raise_level(&mut self, level: Level, nodes: &BTreeSet<NodeId>) -> Result<Response, Error> {
        if level <= self.level {
            return Ok(Response::Done);
        }
        if !self.nodes.keys().eq(nodes) {
            return Err(conflict(format!(
                "other nodes are members now than promised to keep to level {level}"
            )));
        }
        self.level = level;
        Ok(Response::Done)
    }

    /// Adds a node, in the place of the one that has its name if that one may go.
    fn add_node(
        &mut self,
        node: Node,
        level: Level,
        may_go: impl Fn(NodeId) -> bool,
    ) -> Result<Response, Error> {
        if let Some(id) = self.gone.get(&node.incarnation) {
            return Err(conflict(format!(
                "this data directory is that of node {id}, which was removed from the cluster: with an empty one it \
                 joins as a new node"
            )));
        }
        let known = self.nodes.iter_mut().find(|(_, known)| known.incarnation == node.incarnation);
        if let Some((id, known)) = known {
            known.addresses = node.addresses;
            return Ok(Response::NodeAdded(*id));
        }
        if level < self.level {
            return Err(too_old(level, self.level));
        }
        let replaced = self.nodes.iter().find(|(_, known)| known.name == node.name).map(|(id, _)| *id);
        if let Some(namesake) = replaced.filter(|namesake| !may_go(*namesake)) {
            return Err(conflict(format!(
                "node {namesake} is called `{}`, and nobody has found it gone",
                node.name
            )));
        }
        self.last_node += 1;
        let id = NodeId(self.last_node);
        self.nodes.insert(id, node);
        if let Some(replaced) = replaced {
            // The old disk is gone: the new node takes its place in every replica set, and the
            // leaders of those shards bring it up to date before the old id leaves.
            self.bury(replaced);
            for shard in self.shards.values_mut() {
                if shard.replicas.remove(&replaced) {
                    shard.replicas.insert(id);
                }
            }
        }
        Ok(Response::NodeAdded(id))
    }

    fn set_drain(&mut self, node: NodeId, drain: Drain) -> Result<Response, Error> {
        let is_last = self.nodes.iter().all(|(id, other)| *id == node || other.drain != Drain::No);
        let known = self.nodes.get_mut(&node).ok_or_else(|| unknown_node(node))?;
        if drain != Drain::No && is_last {
            return Err(conflict("no other node is left to take what this one holds"));
        }
        // What an operator has ordered outlives a stop of the process.
        if (known.drain, drain) != (Drain::Yes, Drain::UntilRestart) {
            known.drain = drain;
        }
        Ok(Response::Done)
    }

    fn bury(&mut self, node: NodeId) {
        if let Some(known) = self.nodes.remove(&node) {
            self.gone.insert(known.incarnation, node);
        }
        self.abort_restores(|by| by.node == node);
        self.removed.insert(node);
    }

    /// Whether that shard was there once and is no more; ids never come back.
    pub fn was_deleted(&self, id: ShardId) -> bool {
        id.0 <= self.last_shard && !self.shards.contains_key(&id)
    }

    /// The shards that the node of that name holds or is to hold.
    pub fn shards_of(&self, name: &str) -> Vec<ShardId> {
        let Some((node, _)) = self.nodes.iter().find(|(_, known)| known.name == name) else {
            return Vec::new();
        };
        self.shards.iter().filter(|(_, shard)| shard.replicas.contains(node)).map(|(id, _)| *id).collect()
    }

    fn remove_node(&mut self, node: NodeId) -> Result<Response, Error> {
        if !self.nodes.contains_key(&node) {
            return Ok(Response::Absent);
        }
        if self.nodes.len() == 1 {
            return Err(conflict("the last node cannot be removed"));
        }
        let sole = self
            .shards
            .iter()
            .filter(|(_, shard)| shard.replicas.len() == 1 && shard.replicas.contains(&node));
        let sole: Vec<String> =
            sole.map(|(id, shard)| format!("shard {id} of `{}`", shard.collection)).collect();
        if !sole.is_empty() {
            let sole = sole.join(", ");
            return Err(conflict(format!("node {node} holds the only replica of {sole}")));
        }
        self.bury(node);
        for shard in self.shards.values_mut() {
            shard.replicas.remove(&node);
        }
        Ok(Response::Done)
    }

    fn create_collection(
        &mut self,
        name: String,
        mut collection: Collection,
        shard_count: Option<u32>,
    ) -> Result<Response, Error> {
        validate_name("collection_name", &name)?;
        collection.config.validate()?;
        if let Some(by) = self.restoring.get(&name) {
            return Err(conflict(format!(
                "collection `{name}` is being restored from a backup by node {}; when that is given up, the node ends \
                 it at its next start",
                by.node
            )));
        }
        if self.collections.contains_key(&name) || self.aliases.contains_key(&name) {
            return Err(conflict(format!("collection `{name}` already exists")));
        }
        if self.nodes.is_empty() {
            return Err(Error::unavailable("the cluster has no nodes"));
        }
        let shard_count = shard_count.unwrap_or((self.nodes.len() as u32).min(MAX_SHARDS));
        check_count("shard_number", shard_count, MAX_SHARDS)?;
        check_count("replication_factor", collection.replication_factor, MAX_REPLICATION)?;
        for index in 0..shard_count {
            self.last_shard += 1;
            let id = ShardId(self.last_shard);
            let replicas = placement::pick(self, collection.replication_factor as usize, |_| true);
            let (first, last) = nth_range(index, shard_count);
            let shard = Shard {
                collection: name.clone(),
                first,
                last,
                founders: replicas.clone(),
                replicas,
                first_indexes: collection.config.payload_indexes.clone(),
                begins_at: 0,
            };
            self.shards.insert(id, shard);
            collection.shards.push(id);
            collection.origins.push(Origin { shard: id, first });
        }
        self.collections.insert(name, collection);
        Ok(Response::Done)
    }

    fn begin_restore(
        &mut self,
        restore: Restore,
        name: String,
        collection: Collection,
        shard_count: Option<u32>,
    ) -> Result<Response, Error> {
        if self.restoring.get(&name).is_some_and(|by| by.id == restore.id) {
            return Ok(Response::Done);
        }
        if !self.nodes.contains_key(&restore.node) {
            return Err(unknown_node(restore.node));
        }
        let response = self.create_collection(name.clone(), collection, shard_count)?;
        self.restoring.insert(name, restore);
        Ok(response)
    }

    fn end_restore(
        &mut self,
        restore: RequestId,
        collections: &BTreeSet<String>,
        aliases: BTreeMap<Alias, String>,
    ) -> Result<Response, Error> {
        let is_shown =
            |name: &String| self.collections.contains_key(name) && !self.restoring.contains_key(name);
        let is_ours = |name: &String| self.restoring.get(name).is_some_and(|by| by.id == restore);
        if collections.iter().all(is_shown) {
            // It was ended already, and the answer was lost.
            return Ok(Response::Done);
        }
        if let Some(name) = collections.iter().find(|name| !is_ours(name)) {
            return Err(conflict(format!("`{name}` is not what this restore has begun any more")));
        }
        self.restoring.retain(|_, by| by.id != restore);
        for (alias, collection) in aliases {
            if !self.aliases.contains_key(&alias) {
                // One that cannot be set any more must not keep the collections hidden.
                drop(self.set_alias(alias, Some(collection)));
            }
        }
        Ok(Response::Done)
    }

    /// What a restore has made under a name of its own takes the place of the collection `name`, if there is
    /// one, and whatever else it has made is shown.
    fn end_restore_as(
        &mut self,
        restore: RequestId,
        collections: &BTreeSet<String>,
        hidden: &str,
        name: String,
        only_if_free: bool,
    ) -> Result<Response, Error> {
        let is_ours = |name: &str| self.restoring.get(name).is_some_and(|by| by.id == restore);
        let mut all = collections.iter().map(String::as_str).chain([hidden]);
        if let Some(lost) = all.find(|name| !is_ours(name)) {
            return Err(conflict(format!("`{lost}` is not what this restore has begun any more")));
        }
        validate_name("collection_name", &name)?;
        if self.restoring.contains_key(&name) {
            return Err(conflict(format!("collection `{name}` is being restored from a backup")));
        }
        if self.aliases.contains_key(&name) {
            return Err(conflict(format!("`{name}` is an alias")));
        }
        if only_if_free && self.collections.contains_key(&name) {
            return Err(conflict(format!("collection `{name}` already exists")));
        }
        self.drop_reshard(&name);
        let replaced = self.collections.remove(&name).map(|replaced| replaced.shards);
        for shard in replaced.unwrap_or_default() {
            self.shards.remove(&shard);
        }
        let collection = self.collections.remove(hidden).expect("what is being restored is there");
        for shard in &collection.shards {
            let shard = self.shards.get_mut(shard).expect("a collection's shards are there");
            shard.collection.clone_from(&name);
        }
        self.collections.insert(name, collection);
        self.restoring.retain(|_, by| by.id != restore);
        Ok(Response::Done)
    }

    fn abort_restores(&mut self, which: impl Fn(&Restore) -> bool) {
        let names: Vec<String> =
            self.restoring.iter().filter(|(_, by)| which(by)).map(|(name, _)| name.clone()).collect();
        for name in names {
            self.delete_collection(&name);
        }
    }

    fn delete_collection(&mut self, name: &str) -> Response {
        let Some(collection) = self.collections.remove(name) else {
            return Response::Absent;
        };
        self.restoring.remove(name);
        self.drop_reshard(name);
        for shard in collection.shards {
            self.shards.remove(&shard);
        }
        self.aliases.retain(|_, target| target != name);
        Response::Done
    }

    fn set_alias(&mut self, alias: Alias, collection: Option<String>) -> Result<Response, Error> {
        let Some(collection) = collection else {
            return Ok(match self.aliases.remove(&alias) {
                Some(_) => Response::Done,
                None => Response::Absent,
            });
        };
        validate_name("alias_name", &alias)?;
        self.usable_mut(&collection)?;
        if self.collections.contains_key(&alias) {
            return Err(conflict(format!("`{alias}` is the name of a collection")));
        }
        self.aliases.insert(alias, collection);
        Ok(Response::Done)
    }

    fn set_replicas(
        &mut self,
        id: ShardId,
        expected: &BTreeSet<NodeId>,
        replicas: BTreeSet<NodeId>,
    ) -> Result<Response, Error> {
        let unknown = replicas.iter().find(|node| !self.nodes.contains_key(node));
        if let Some(node) = unknown {
            return Err(unknown_node(*node));
        }
        if replicas.is_empty() {
            return Err(Error::invalid("replicas", "a shard needs at least one replica"));
        }
        let shard =
            self.shards.get_mut(&id).ok_or_else(|| Error::not_found(format!("shard {id} does not exist")))?;
        if shard.replicas != *expected {
            return Err(conflict(format!("the replicas of shard {id} have changed since the plan was made")));
        }
        shard.replicas = replicas;
        Ok(Response::Done)
    }

    fn usable_mut(&mut self, name: &str) -> Result<&mut Collection, Error> {
        let collection = self.collections.get_mut(name).filter(|_| !self.restoring.contains_key(name));
        collection.ok_or_else(|| unknown_collection(name))
    }

    /// The collection of a name or an alias, with its real name.
    ///
    /// # Errors
    /// [`ErrorCode::NotFound`].
    pub fn collection(&self, name: &str) -> Result<(&str, &Collection), Error> {
        let name = self.aliases.get(name).map(String::as_str).unwrap_or(name);
        match self.collections.get_key_value(name) {
            Some((name, collection)) if !self.restoring.contains_key(name) => Ok((name, collection)),
            _ => Err(unknown_collection(name)),
        }
    }

    /// The collections that can be used: all but those that are being restored.
    pub fn usable_collections(&self) -> impl Iterator<Item = (&String, &Collection)> {
        self.collections.iter().filter(|(name, _)| !self.restoring.contains_key(*name))
    }

    /// Whether somebody has seen shards in use of which this state does not know that they are: it is behind.
    pub fn is_behind(&self, position: &Position) -> bool {
        let mut seen = position.iter().filter(|(group, _)| *group != GroupId::CONTROL);
        seen.any(|(group, _)| {
            let shard = ShardId(group.0);
            !self.is_in_use(shard) && !self.was_deleted(shard)
        })
    }

    /// Whether a shard is one of its collection's, and the collection can be used: not one that is to come.
    pub fn is_in_use(&self, id: ShardId) -> bool {
        let shard = self.shards.get(&id);
        let collection = shard.and_then(|shard| self.collection(&shard.collection).ok());
        collection.is_some_and(|(_, collection)| collection.shards.contains(&id))
    }

    /// The shard of a collection that owns a route.
    pub fn shard_of(&self, collection: &Collection, route: Route) -> ShardId {
        let owner = collection
            .shards
            .iter()
            .find(|id| self.shards.get(id).is_some_and(|shard| (shard.first..=shard.last).contains(&route)));
        *owner.expect("the ranges of a collection's shards cover every route")
    }

    /// The shard of a collection that owns a point.
    pub fn shard_of_point(&self, collection: &Collection, point: PointId) -> ShardId {
        self.shard_of(collection, point.route())
    }

    fn assert_invariants(&self) {
        for (name, collection) in &self.collections {
            let mut next = Some(0u32);
            for id in &collection.shards {
                let shard = &self.shards[id];
                assert_eq!(Some(shard.first.0), next, "the ranges of `{name}` have a hole at shard {id}");
                assert_eq!(&shard.collection, name, "shard {id} belongs to another collection");
                next = shard.last.0.checked_add(1);
            }
            assert_eq!(next, None, "the ranges of `{name}` do not reach the end");
        }
        for (name, reshard) in &self.resharding {
            let collection = &self.collections[name];
            assert!(reshard.parents.iter().all(|parent| collection.shards.contains(parent)), "of `{name}`");
            assert!(reshard.children.iter().all(|child| self.shards.contains_key(child)), "for `{name}`");
        }
        for name in self.restoring.keys() {
            assert!(self.collections.contains_key(name), "`{name}` is being restored and is not there");
        }
        for node in self.nodes.keys() {
            assert!(!self.removed.contains(node), "node {node} is a member and removed");
        }
    }
}

/// The range of shard `index` of `count`: contiguous, covering all routes, sizes equal within one.
fn nth_range(index: u32, count: u32) -> (Route, Route) {
    let bound = |index: u32| ((u64::from(index) << 32) / u64::from(count)) as u32;
    let last = if index + 1 == count { u32::MAX } else { bound(index + 1) - 1 };
    (Route(bound(index)), Route(last))
}

fn check_count(field: &str, count: u32, most: u32) -> Result<(), Error> {
    if (1..=most).contains(&count) {
        return Ok(());
    }
    Err(Error::invalid(field, format!("{count} is not between 1 and {most}")))
}

pub(super) fn conflict(message: impl std::fmt::Display) -> Error {
    Error::new(ErrorCode::Conflict, message)
}

/// Why a node of a build that knows no more than a level does not belong to a cluster of a higher one.
pub fn too_old(level: Level, in_force: Level) -> Error {
    conflict(format!(
        "the cluster works at level {in_force}, and this node's build knows no more than level {level}: run one that \
         is at least as new as those of the other nodes"
    ))
}

fn unknown_node(node: NodeId) -> Error {
    Error::not_found(format!("node {node} is not a member"))
}

fn unknown_collection(name: &str) -> Error {
    Error::not_found(format!("collection `{name}` doesn't exist"))
}
