//! What can be asked of the control group, and what it answers.

use std::collections::{BTreeMap, BTreeSet};

use serde::{Deserialize, Serialize};
use shoal_proto::{CollectionConfig, Error, FieldType, Level, NodeId, RequestId, Route, ShardId};

use super::Drain;

/// Where a node listens, as other nodes and clients reach it.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Addresses {
    /// HTTP, for clients.
    pub http: String,
    /// gRPC, for peers and clients.
    pub grpc: String,
    /// The actor mesh, for peers.
    pub mesh: String,
}

/// An order to the control group. Whatever is not deterministic (ids, times) was made before.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub enum Command {
    /// Names the cluster; the first command of all.
    CreateCluster {
        /// A UUID, as text.
        cluster_id: String,
    },
    /// Allocates a node id. The same incarnation gets the same id again; a known name with
    /// another incarnation is a new node that takes the old one's place.
    AddNode {
        /// Host name or ordinal: only a name.
        name: String,
        /// A UUID made once per data directory.
        incarnation: String,
        /// Where it listens.
        addresses: Addresses,
        /// Failure domain; empty when unknown.
        zone: String,
    },
    /// A node came back under other addresses.
    UpdateNode {
        /// The node.
        node: NodeId,
        /// Where it listens now.
        addresses: Addresses,
    },
    /// Takes a node out of the cluster for good; its id is never used again.
    RemoveNode {
        /// The node.
        node: NodeId,
    },
    /// Makes a collection and places its shards.
    CreateCollection {
        /// Makes a retry of this command harmless.
        request_id: RequestId,
        /// The name.
        name: String,
        /// Its schema, checked before and again here.
        config: CollectionConfig,
        /// Shards; one per node when absent.
        shard_count: Option<u32>,
        /// Replicas of each shard; the cluster's default when absent.
        replication_factor: Option<u32>,
        /// Seconds since the Unix epoch, read by the proposer.
        created_at: u64,
    },
    /// Deletes a collection and all that it holds.
    DeleteCollection {
        /// Makes a retry of this command harmless.
        request_id: RequestId,
        /// The name.
        name: String,
    },
    /// Adds a payload index to the schema, or takes it out.
    SetPayloadIndex {
        /// The collection.
        name: String,
        /// The payload path.
        field: String,
        /// The kind of index, or none to drop it.
        index: Option<FieldType>,
    },
    /// Replaces what a client gave a vector store.
    SetAttributes {
        /// The collection.
        name: String,
        /// One JSON object.
        attributes_json: String,
    },
    /// Creates or repoints an alias, or removes it.
    SetAlias {
        /// The alias.
        alias: String,
        /// The collection, or none to remove the alias.
        collection: Option<String>,
    },
    /// Changes which nodes should hold a shard. The shard's leader carries it out.
    SetReplicas {
        /// The shard.
        shard: ShardId,
        /// What the planner saw; another value means that the plan is out of date.
        expected: BTreeSet<NodeId>,
        /// What should be.
        replicas: BTreeSet<NodeId>,
    },
    /// Asks placement to take everything off a node, or to use it again.
    SetDrain {
        /// The node.
        node: NodeId,
        /// What is asked.
        drain: Drain,
    },
    /// Keeps placement from moving anything by itself, or lets it go on.
    PausePlacement {
        /// Whether it is to pause.
        is_paused: bool,
    },
    /// Changes how many replicas a collection wants of each shard. Placement carries it out.
    SetReplicationFactor {
        /// The collection.
        name: String,
        /// The number, from 1.
        replication_factor: u32,
    },
    /// Makes a collection that nobody sees until its restore is ended. Refused while another restore has
    /// one of that name.
    BeginRestore {
        /// The restore: the same one gets the same collection again.
        restore: RequestId,
        /// The node that does it: should it be taken out of the cluster, the collection goes too.
        node: NodeId,
        /// The name.
        name: String,
        /// Its schema.
        config: CollectionConfig,
        /// Shards; one per node when absent.
        shard_count: Option<u32>,
        /// Replicas of each shard.
        replication_factor: u32,
        /// Seconds since the Unix epoch at which it was first made.
        created_at: u64,
    },
    /// Shows all collections of a restore, in one step, or none.
    EndRestore {
        /// The restore.
        restore: RequestId,
        /// All that it has put back.
        collections: BTreeSet<String>,
        /// Collections by alias; a name that is taken stays what it is.
        aliases: BTreeMap<String, String>,
    },
    /// Deletes what a restore has made and has not shown.
    AbortRestore {
        /// The restore.
        restore: RequestId,
    },
    /// Makes new shards, that nobody sees yet, for the ranges of some neighbours of one collection.
    BeginReshard {
        /// Made once per attempt.
        reshard: RequestId,
        /// The attempt that it takes the place of, whose new shards go; refused when another one, or none, is
        /// under way.
        instead_of: Option<RequestId>,
        /// The collection.
        name: String,
        /// The shards that are to go, in the order of their ranges.
        parents: Vec<ShardId>,
        /// Where the range of each new shard begins; the first one where the parents' do.
        firsts: Vec<Route>,
    },
    /// Puts the new shards in the place of the old ones, in one step.
    EndReshard {
        /// The attempt.
        reshard: RequestId,
        /// The log index from which each new shard has everything.
        begins: BTreeMap<ShardId, u64>,
    },
    /// Gives the new shards up; the old ones stay.
    AbortReshard {
        /// The attempt.
        reshard: RequestId,
    },
    /// As [`Command::AddNode`], which is refused to new nodes once levels are in force.
    AdmitNode {
        /// Host name or ordinal: only a name.
        name: String,
        /// A UUID made once per data directory.
        incarnation: String,
        /// Where it listens.
        addresses: Addresses,
        /// Failure domain; empty when unknown.
        zone: String,
        /// The highest level that its build knows.
        level: Level,
        /// The member of that name that was found to be gone, whose place it takes: refused when another one
        /// has the name by now.
        instead_of: Option<NodeId>,
    },
    /// Brings a level into force.
    RaiseLevel {
        /// The level.
        level: Level,
        /// The nodes that have promised to keep to it: refused when the members are others.
        nodes: BTreeSet<NodeId>,
    },
    /// As [`Command::EndRestore`], but one of the collections is shown under another name, in the place of
    /// the one that has it: what that one held goes, its aliases stay.
    EndRestoreAs {
        /// The restore. A retry of this command is harmless.
        restore: RequestId,
        /// All that it has put back.
        collections: BTreeSet<String>,
        /// The one of them that gets the name.
        hidden: String,
        /// The name, which may be free as well.
        name: String,
        /// Whether it must be free.
        only_if_free: bool,
    },
    /// Begins shards anew, empty, in the place of those whose data are lost.
    AbandonShards {
        /// Who was to hold each of them when it was found lost; another value means that this is out of date.
        shards: BTreeMap<ShardId, BTreeSet<NodeId>>,
        /// The nodes that may hold the new ones: those that live.
        among: BTreeSet<NodeId>,
    },
    /// A node came back in another failure domain.
    SetZone {
        /// The node.
        node: NodeId,
        /// Where it is now; empty when unknown.
        zone: String,
    },
}

impl Command {
    /// The level that must be in force before it is proposed.
    pub fn level(&self) -> Level {
        match self {
            Command::AdmitNode { .. } => Level::JOINS_TELL_LEVELS,
            Command::EndRestoreAs { .. } => Level::RESTORES_REPLACE,
            Command::AbandonShards { .. } => Level::SHARDS_BEGIN_ANEW,
            Command::SetZone { .. } => Level::ZONES_CHANGE,
            // Before it is in the log, all that will read it have promised that they can.
            Command::RaiseLevel { .. } => Level::FIRST,
            Command::CreateCluster { .. }
            | Command::AddNode { .. }
            | Command::UpdateNode { .. }
            | Command::RemoveNode { .. }
            | Command::CreateCollection { .. }
            | Command::DeleteCollection { .. }
            | Command::SetPayloadIndex { .. }
            | Command::SetAttributes { .. }
            | Command::SetAlias { .. }
            | Command::SetReplicas { .. }
            | Command::SetDrain { .. }
            | Command::PausePlacement { .. }
            | Command::SetReplicationFactor { .. }
            | Command::BeginRestore { .. }
            | Command::EndRestore { .. }
            | Command::AbortRestore { .. }
            | Command::BeginReshard { .. }
            | Command::EndReshard { .. }
            | Command::AbortReshard { .. } => Level::FIRST,
        }
    }
}

/// What the control group answered.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub enum Response {
    /// Done, nothing to tell.
    Done,
    /// The id of the node that was added, or was there already.
    NodeAdded(NodeId),
    /// Nothing to delete.
    Absent,
    /// Refused: the same on every node.
    Rejected(Error),
}

#[cfg(test)]
mod tests {
    use shoal_proto::codec;

    use super::*;

    /// As long as a build of the first level may be in the cluster, and in logs for longer, none of this may look
    /// another way: what grows is a new variant at the end.
    #[test]
    fn commands_of_the_first_level_stay_as_they_are() {
        let (id, c) = (RequestId([5; 16]), String::from("c"));
        let addresses = Addresses { http: "h".into(), grpc: "g".into(), mesh: "m".into() };
        let add = Command::AddNode {
            name: "a".into(),
            incarnation: "i".into(),
            addresses: addresses.clone(),
            zone: String::new(),
        };
        let node = NodeId(2);
        let set = |nodes: &[u64]| nodes.iter().copied().map(NodeId).collect::<BTreeSet<NodeId>>();
        let with_id = |before: &[u8], after: &[u8]| [before, &[5; 16], after].concat();
        let begin = Command::BeginReshard {
            reshard: id,
            instead_of: None,
            name: c.clone(),
            parents: vec![ShardId(7)],
            firsts: vec![Route(0)],
        };
        let end = Command::EndRestore {
            restore: id,
            collections: BTreeSet::from([c.clone()]),
            aliases: BTreeMap::new(),
        };
        let replicas =
            Command::SetReplicas { shard: ShardId(7), expected: set(&[1]), replicas: set(&[1, 2]) };
        let commands = [
            (Command::CreateCluster { cluster_id: c.clone() }, vec![1, 0, 1, b'c']),
            (add, vec![1, 1, 1, b'a', 1, b'i', 1, b'h', 1, b'g', 1, b'm', 0]),
            (Command::UpdateNode { node, addresses }, vec![1, 2, 2, 1, b'h', 1, b'g', 1, b'm']),
            (Command::RemoveNode { node }, vec![1, 3, 2]),
            (Command::DeleteCollection { request_id: id, name: c.clone() }, with_id(&[1, 5], &[1, b'c'])),
            (Command::SetAlias { alias: "a".into(), collection: None }, vec![1, 8, 1, b'a', 0]),
            (replicas, vec![1, 9, 7, 1, 1, 2, 1, 2]),
            (Command::SetDrain { node, drain: Drain::Yes }, vec![1, 10, 2, 2]),
            (Command::PausePlacement { is_paused: true }, vec![1, 11, 1]),
            (Command::SetReplicationFactor { name: c, replication_factor: 3 }, vec![1, 12, 1, b'c', 3]),
            (end, with_id(&[1, 14], &[1, 1, b'c', 0])),
            (Command::AbortRestore { restore: id }, with_id(&[1, 15], &[])),
            (begin, with_id(&[1, 16], &[0, 1, b'c', 1, 7, 1, 0])),
            (
                Command::EndReshard { reshard: id, begins: BTreeMap::from([(ShardId(8), 9)]) },
                with_id(&[1, 17], &[1, 8, 9]),
            ),
            (Command::AbortReshard { reshard: id }, with_id(&[1, 18], &[])),
        ];
        for (command, bytes) in commands {
            assert_eq!(codec::encode(&command), bytes, "{command:?}");
            assert_eq!(command.level(), Level::FIRST, "{command:?}");
        }
    }
}
