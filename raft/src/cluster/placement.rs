//! Which nodes get a new shard's replicas: pure arithmetic over the state.

use std::collections::{BTreeMap, BTreeSet};

use shoal_proto::NodeId;

use super::ClusterState;

/// Picks up to `count` nodes for one more shard: other zones first, then fewest replicas, then
/// the lowest id. Never picks a node twice. `taken` already hold a replica of the shard.
pub(super) fn pick(state: &ClusterState, taken: &BTreeSet<NodeId>, count: usize) -> BTreeSet<NodeId> {
    let mut load: BTreeMap<NodeId, usize> = state.nodes.keys().map(|&node| (node, 0)).collect();
    for shard in state.shards.values() {
        for node in &shard.replicas {
            load.entry(*node).and_modify(|replicas| *replicas += 1);
        }
    }
    let zone_of = |node: &NodeId| state.nodes.get(node).map(|node| node.zone.as_str()).unwrap_or_default();
    let mut chosen = BTreeSet::new();
    while chosen.len() < count {
        let used_zones: BTreeSet<&str> = taken.iter().chain(&chosen).map(zone_of).collect();
        let next = load
            .iter()
            .filter(|(node, _)| !taken.contains(node) && !chosen.contains(*node))
            .min_by_key(|(node, replicas)| (used_zones.contains(zone_of(node)), **replicas, **node));
        match next {
            Some((node, _)) => chosen.insert(*node),
            None => break,
        };
    }
    chosen
}
