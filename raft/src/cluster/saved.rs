//! How the control group's state is stored and sent, and how what earlier versions wrote is read.
//!
//! The first byte is the format's number. Each format that is not written any more is a value of its
//! own that turns into the next one; a test reads bytes that each of them has written. As long as the first
//! level is in force, there may be nodes that know no format but the fourth, and it is what is written.

use serde::de::DeserializeOwned;
use shoal_proto::Level;
use shoal_proto::codec::{self, CodecError};

use super::ClusterState;

/// The format that [`write()`] writes. The first one had no number: its bytes begin with the codec's
/// own, which was 1.
const FORMAT: u8 = 5;
/// The format of the first level.
const FORMAT_OF_FIRST_LEVEL: u8 = 4;

/// The bytes of a state, with where in the log it was taken. Every build that knows the state's level can read
/// them.
pub fn write(tag: &Option<Vec<u8>>, state: &ClusterState) -> Vec<u8> {
    let (format, bytes) = match state.level {
        Level::FIRST => (FORMAT_OF_FIRST_LEVEL, codec::encode(&(tag, v4::ClusterState::from(state)))),
        _ => (FORMAT, codec::encode(&(tag, state))),
    };
    [&[format][..], &bytes].concat()
}

/// Reads what [`write()`] wrote, now or in an earlier version.
///
/// # Errors
/// When the bytes are of a later version, or damaged.
pub fn read(bytes: &[u8]) -> Result<(Option<Vec<u8>>, ClusterState), CodecError> {
    match bytes.split_first() {
        None => Err(CodecError::Empty),
        Some((1, _)) => decode::<v1::ClusterState>(bytes),
        Some((2, body)) => decode::<v2::ClusterState>(body),
        Some((3, body)) => decode::<v3::ClusterState>(body),
        Some((&FORMAT_OF_FIRST_LEVEL, body)) => decode::<v4::ClusterState>(body),
        Some((&FORMAT, body)) => decode::<ClusterState>(body),
        Some((other, _)) => Err(CodecError::UnknownVersion(*other)),
    }
}

fn decode<T: DeserializeOwned + Into<ClusterState>>(
    bytes: &[u8],
) -> Result<(Option<Vec<u8>>, ClusterState), CodecError> {
    let (tag, state): (Option<Vec<u8>>, T) = codec::decode(bytes)?;
    Ok((tag, state.into()))
}

/// The first format: nodes could not be drained, and nobody remembered the incarnations of those that
/// were gone.
mod v1 {
    use std::collections::{BTreeMap, BTreeSet, VecDeque};

    use serde::Deserialize;
    use shoal_proto::{NodeId, RequestId, ShardId};

    use super::super::{Addresses, Alias, Drain, Response};
    use super::v3::{Collection, Shard};

    #[derive(Deserialize)]
    pub(super) struct Node {
        name: String,
        incarnation: String,
        addresses: Addresses,
        zone: String,
    }

    #[derive(Deserialize)]
    pub(super) struct ClusterState {
        version: u64,
        cluster_id: String,
        nodes: BTreeMap<NodeId, Node>,
        removed: BTreeSet<NodeId>,
        collections: BTreeMap<String, Collection>,
        aliases: BTreeMap<Alias, String>,
        shards: BTreeMap<ShardId, Shard>,
        last_node: u64,
        last_shard: u64,
        answered: VecDeque<(RequestId, Response)>,
    }

    impl From<Node> for super::super::Node {
        fn from(old: Node) -> Self {
            let Node { name, incarnation, addresses, zone } = old;
            super::super::Node { name, incarnation, addresses, zone, drain: Drain::No }
        }
    }

    impl From<ClusterState> for super::super::ClusterState {
        fn from(old: ClusterState) -> Self {
            let next = super::v2::ClusterState {
                version: old.version,
                cluster_id: old.cluster_id,
                nodes: old.nodes.into_iter().map(|(id, node)| (id, node.into())).collect(),
                removed: old.removed,
                gone: BTreeMap::new(),
                is_placement_paused: false,
                collections: old.collections,
                aliases: old.aliases,
                shards: old.shards,
                last_node: old.last_node,
                last_shard: old.last_shard,
                answered: old.answered,
            };
            next.into()
        }
    }
}

/// The second format: nothing could be restored.
mod v2 {
    use std::collections::{BTreeMap, BTreeSet, VecDeque};

    use serde::Deserialize;
    use shoal_proto::{NodeId, RequestId, ShardId};

    use super::super::{Alias, Node, Response};
    use super::v3::{Collection, Shard};

    #[derive(Deserialize)]
    pub(super) struct ClusterState {
        pub(super) version: u64,
        pub(super) cluster_id: String,
        pub(super) nodes: BTreeMap<NodeId, Node>,
        pub(super) removed: BTreeSet<NodeId>,
        pub(super) gone: BTreeMap<String, NodeId>,
        pub(super) is_placement_paused: bool,
        pub(super) collections: BTreeMap<String, Collection>,
        pub(super) aliases: BTreeMap<Alias, String>,
        pub(super) shards: BTreeMap<ShardId, Shard>,
        pub(super) last_node: u64,
        pub(super) last_shard: u64,
        pub(super) answered: VecDeque<(RequestId, Response)>,
    }

    impl From<ClusterState> for super::super::ClusterState {
        fn from(old: ClusterState) -> Self {
            let next = super::v3::ClusterState {
                version: old.version,
                cluster_id: old.cluster_id,
                nodes: old.nodes,
                removed: old.removed,
                gone: old.gone,
                is_placement_paused: old.is_placement_paused,
                collections: old.collections,
                aliases: old.aliases,
                restoring: BTreeMap::new(),
                shards: old.shards,
                last_node: old.last_node,
                last_shard: old.last_shard,
                answered: old.answered,
            };
            next.into()
        }
    }
}

/// The third format: shards stayed what they were.
mod v3 {
    use std::collections::{BTreeMap, BTreeSet, VecDeque};

    use serde::Deserialize;
    use shoal_proto::{CollectionConfig, FieldType, NodeId, RequestId, Route, ShardId};

    use super::super::{Alias, Node, Origin, Response, Restore};

    #[derive(Deserialize)]
    pub(super) struct Collection {
        config: CollectionConfig,
        shards: Vec<ShardId>,
        replication_factor: u32,
        created_at: u64,
    }

    #[derive(Deserialize)]
    pub(super) struct Shard {
        collection: String,
        first: Route,
        last: Route,
        replicas: BTreeSet<NodeId>,
        founders: BTreeSet<NodeId>,
        first_indexes: BTreeMap<String, FieldType>,
    }

    #[derive(Deserialize)]
    pub(super) struct ClusterState {
        pub(super) version: u64,
        pub(super) cluster_id: String,
        pub(super) nodes: BTreeMap<NodeId, Node>,
        pub(super) removed: BTreeSet<NodeId>,
        pub(super) gone: BTreeMap<String, NodeId>,
        pub(super) is_placement_paused: bool,
        pub(super) collections: BTreeMap<String, Collection>,
        pub(super) aliases: BTreeMap<Alias, String>,
        pub(super) restoring: BTreeMap<String, Restore>,
        pub(super) shards: BTreeMap<ShardId, Shard>,
        pub(super) last_node: u64,
        pub(super) last_shard: u64,
        pub(super) answered: VecDeque<(RequestId, Response)>,
    }

    impl From<Shard> for super::super::Shard {
        fn from(old: Shard) -> Self {
            let Shard { collection, first, last, replicas, founders, first_indexes } = old;
            super::super::Shard { collection, first, last, replicas, founders, first_indexes, begins_at: 0 }
        }
    }

    impl From<ClusterState> for super::super::ClusterState {
        fn from(old: ClusterState) -> Self {
            let collection = |collection: Collection| {
                let Collection { config, shards, replication_factor, created_at } = collection;
                let origin = |shard: &ShardId| Origin { shard: *shard, first: old.shards[shard].first };
                let origins = shards.iter().map(origin).collect();
                super::super::Collection { config, shards, replication_factor, created_at, origins }
            };
            let collections =
                old.collections.into_iter().map(|(name, known)| (name, collection(known))).collect();
            let next = super::v4::ClusterState {
                version: old.version,
                cluster_id: old.cluster_id,
                nodes: old.nodes,
                removed: old.removed,
                gone: old.gone,
                is_placement_paused: old.is_placement_paused,
                collections,
                aliases: old.aliases,
                restoring: old.restoring,
                resharding: BTreeMap::new(),
                shards: old.shards.into_iter().map(|(id, shard)| (id, shard.into())).collect(),
                last_node: old.last_node,
                last_shard: old.last_shard,
                answered: old.answered,
            };
            next.into()
        }
    }
}

/// The fourth format: the only level was the first.
mod v4 {
    use std::collections::{BTreeMap, BTreeSet, VecDeque};

    use serde::{Deserialize, Serialize};
    use shoal_proto::{Level, NodeId, RequestId, ShardId};

    use super::super::{Alias, Collection, Node, Reshard, Response, Restore, Shard};

    #[derive(Serialize, Deserialize)]
    pub(super) struct ClusterState {
        pub(super) version: u64,
        pub(super) cluster_id: String,
        pub(super) nodes: BTreeMap<NodeId, Node>,
        pub(super) removed: BTreeSet<NodeId>,
        pub(super) gone: BTreeMap<String, NodeId>,
        pub(super) is_placement_paused: bool,
        pub(super) collections: BTreeMap<String, Collection>,
        pub(super) aliases: BTreeMap<Alias, String>,
        pub(super) restoring: BTreeMap<String, Restore>,
        pub(super) resharding: BTreeMap<String, Reshard>,
        pub(super) shards: BTreeMap<ShardId, Shard>,
        pub(super) last_node: u64,
        pub(super) last_shard: u64,
        pub(super) answered: VecDeque<(RequestId, Response)>,
    }

    impl From<ClusterState> for super::super::ClusterState {
        fn from(old: ClusterState) -> Self {
            super::super::ClusterState {
                version: old.version,
                cluster_id: old.cluster_id,
                level: Level::FIRST,
                nodes: old.nodes,
                removed: old.removed,
                gone: old.gone,
                is_placement_paused: old.is_placement_paused,
                collections: old.collections,
                aliases: old.aliases,
                restoring: old.restoring,
                resharding: old.resharding,
                shards: old.shards,
                last_node: old.last_node,
                last_shard: old.last_shard,
                answered: old.answered,
            }
        }
    }

    impl From<&super::super::ClusterState> for ClusterState {
        fn from(state: &super::super::ClusterState) -> Self {
            let state = state.clone();
            ClusterState {
                version: state.version,
                cluster_id: state.cluster_id,
                nodes: state.nodes,
                removed: state.removed,
                gone: state.gone,
                is_placement_paused: state.is_placement_paused,
                collections: state.collections,
                aliases: state.aliases,
                restoring: state.restoring,
                resharding: state.resharding,
                shards: state.shards,
                last_node: state.last_node,
                last_shard: state.last_shard,
                answered: state.answered,
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use shoal_proto::NodeId;

    use super::super::{Addresses, Command, Drain};
    use super::*;

    #[test]
    fn a_state_comes_back_as_it_was_written() {
        let mut state = ClusterState::default();
        state.apply(Command::CreateCluster { cluster_id: "c".into() });
        for name in ["a", "b"] {
            state.apply(Command::AddNode {
                name: name.into(),
                incarnation: format!("inc-{name}"),
                addresses: Addresses::default(),
                zone: String::new(),
            });
        }
        state.apply(Command::SetDrain { node: NodeId(2), drain: Drain::Yes });
        for format in [FORMAT_OF_FIRST_LEVEL, FORMAT] {
            let bytes = write(&Some(vec![7]), &state);
            assert_eq!(bytes[0], format, "at level {}", state.level);
            assert_eq!(read(&bytes).expect("whole"), (Some(vec![7]), state.clone()));
            assert!(read(&bytes[..bytes.len() - 1]).is_err());
            let nodes = BTreeSet::from([NodeId(1), NodeId(2)]);
            state.apply(Command::RaiseLevel { level: Level::LATEST, nodes });
        }
        assert!(matches!(read(&[9, 9]), Err(CodecError::UnknownVersion(9))));
    }

    /// Written by the build of 2026-11-21, before nodes could be drained.
    #[test]
    fn what_the_first_format_has_written_is_read() {
        let bytes = include_bytes!("../../testdata/cluster-state-1.bin");
        let (tag, state) = read(bytes).expect("whole");
        assert_eq!(tag.map(|tag| tag.len()), Some(TAG_BYTES));
        assert_eq!(
            state.nodes.values().map(|node| node.name.as_str()).collect::<Vec<_>>(),
            ["n1", "n2", "n3"]
        );
        assert!(state.nodes.values().all(|node| node.drain == Drain::No) && state.gone.is_empty());
        assert_eq!(state.collection("kept").expect("known").1.shards.len(), 2);
    }

    /// Written by the build of 2026-11-22, before anything could be restored.
    #[test]
    fn what_the_second_format_has_written_is_read() {
        let (tag, state) = read(include_bytes!("../../testdata/cluster-state-2.bin")).expect("whole");
        assert_eq!(tag.map(|tag| tag.len()), Some(14));
        let drained: Vec<&str> = state
            .nodes
            .values()
            .filter(|node| node.drain == Drain::Yes)
            .map(|node| node.name.as_str())
            .collect();
        assert_eq!((state.nodes.len(), drained), (3, vec!["n3"]));
        assert!(state.is_placement_paused && state.restoring.is_empty());
        assert_eq!(state.collection("kept").expect("known").1.shards.len(), 2);
    }

    /// Written by the build of 2026-11-22, before shards could be split.
    #[test]
    fn what_the_third_format_has_written_is_read() {
        let (_, state) = read(include_bytes!("../../testdata/cluster-state-3.bin")).expect("whole");
        let (_, kept) = state.collection("kept").expect("known");
        let origins: Vec<_> = kept.origins.iter().map(|origin| (origin.shard, origin.first)).collect();
        let shards: Vec<_> = kept.shards.iter().map(|shard| (*shard, state.shards[shard].first)).collect();
        assert_eq!(origins, shards, "a collection was made with the shards that it had");
        assert_eq!(origins.len(), 2);
        assert!(state.resharding.is_empty());
    }

    /// As the build of 2026-11-22 wrote it that knew no levels: such nodes must be able to read what is written
    /// as long as there may be some.
    #[test]
    fn what_the_fourth_format_has_written_is_read_and_written() {
        let bytes = include_bytes!("../../testdata/cluster-state-4.bin");
        let (tag, state) = read(bytes).expect("whole");
        assert_eq!((state.level, state.nodes.len()), (Level::FIRST, 1));
        assert_eq!(state.collection("kept").expect("known").1.origins.len(), 2);
        assert_eq!(write(&tag, &state), bytes);
    }

    const TAG_BYTES: usize = 16;
}
