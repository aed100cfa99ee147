//! Which nodes get a new shard's replicas: pure arithmetic over the state. Where they move later is
//! the planner's business, who also knows which nodes live.

use std::collections::{BTreeMap, BTreeSet};

use shoal_proto::NodeId;

use super::{ClusterState, Drain};

/// Picks up to `count` nodes for a new shard: other zones first, then fewest replicas, then the lowest
/// id. Never picks a node twice or one that may not be picked, and one that is drained only when there is no
/// other at all.
pub(super) fn pick(state: &ClusterState, count: usize, may: impl Fn(NodeId) -> bool) -> BTreeSet<NodeId> {
    let nodes: BTreeSet<NodeId> = state.nodes.keys().copied().filter(|node| may(*node)).collect();
    let used = nodes.iter().filter(|node| state.nodes[node].drain == Drain::No);
    let mut load: BTreeMap<NodeId, usize> = used.map(|node| (*node, 0)).collect();
    if load.is_empty() {
        load = nodes.iter().map(|node| (*node, 0)).collect();
    }
    for shard in state.shards.values() {
        for node in &shard.replicas {
            load.entry(*node).and_modify(|replicas| *replicas += 1);
        }
    }
    let zone_of = |node: &NodeId| state.nodes.get(node).map(|node| node.zone.as_str()).unwrap_or_default();
    let mut chosen = BTreeSet::new();
    while chosen.len() < count {
        let used_zones: BTreeSet<&str> = chosen.iter().map(zone_of).collect();
        let next = load
            .iter()
            .filter(|(node, _)| !chosen.contains(*node))
            .min_by_key(|(node, replicas)| (used_zones.contains(zone_of(node)), **replicas, **node));
        match next {
            Some((node, _)) => chosen.insert(*node),
            None => break,
        };
    }
    chosen
}
