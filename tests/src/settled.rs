//! When a cluster is settled and when it has converged, judged from what its nodes say of it.

use std::collections::BTreeSet;

use anyhow::{Context, Result, ensure};

use crate::view::View;

/// How many voters the control group has in a cluster of so many nodes.
fn control_voters(nodes: usize) -> usize {
    match nodes {
        0..=2 => 1,
        3 | 4 => 3,
        _ => 5,
    }
}

/// Checks that nothing is left to be done about membership.
///
/// # Errors
/// Says what is missing.
pub fn check_settled(views: &[(usize, View)], node_count: usize) -> Result<()> {
    let newest =
        views.iter().map(|(_, view)| view).max_by_key(|view| view.version).context("no node runs")?;
    for (_, view) in views {
        let (name, nodes) = (&view.node.name, view.nodes.len());
        ensure!(view.cluster_id == newest.cluster_id, "{name} is in another cluster");
        ensure!(view.version == newest.version, "{name} knows version {}", view.version);
        ensure!(nodes == node_count, "{name} knows {nodes} nodes, not {node_count}");
    }
    let voters = check_leader(views, 0, None)?.len();
    let wanted = control_voters(node_count);
    ensure!(voters == wanted, "the control group has {voters} voters, not {wanted}");
    for shard in &newest.shards {
        if let Some(collection) = newest.collection(&shard.collection) {
            let wanted = collection.replication_factor.min(node_count);
            let have = shard.replicas.len();
            ensure!(have == wanted, "shard {} is to have {have} replicas, not {wanted}", shard.id);
        }
        let voters = check_leader(views, shard.id, Some(&shard.replicas))?;
        ensure!(voters == shard.replicas, "shard {}: {voters:?} vote, not {:?}", shard.id, shard.replicas);
    }
    Ok(())
}

/// Checks that every member agrees on who leads a group, and returns the leader's voters.
fn check_leader(views: &[(usize, View)], id: u64, members: Option<&BTreeSet<u64>>) -> Result<BTreeSet<u64>> {
    let leaders = views.iter().filter(|(_, view)| view.group(id).is_some_and(|group| group.is_leader()));
    let leader = leaders.max_by_key(|(_, view)| view.group(id).map(|group| group.term));
    let (_, leader) = leader.with_context(|| format!("group {id} has no leader"))?;
    for (_, view) in views {
        if members.is_some_and(|members| !members.contains(&view.node.id)) {
            continue;
        }
        let name = &view.node.name;
        let group = view.group(id).with_context(|| format!("{name} has not opened group {id}"))?;
        ensure!(group.leader == Some(leader.node.id), "{name}: group {id} is led by {:?}", group.leader);
    }
    let group = leader.group(id).context("the leader was found by its group")?;
    ensure!(id == 0 || group.learners.is_empty(), "group {id} has learners {:?}", group.learners);
    Ok(group.voters.clone())
}

/// Checks that every replica has applied the whole log.
///
/// # Errors
/// Says which has not.
pub fn check_converged(views: &[(usize, View)]) -> Result<()> {
    let groups: BTreeSet<u64> =
        views.iter().flat_map(|(_, view)| view.groups.iter().map(|group| group.group)).collect();
    for id in groups {
        let seen = views.iter().filter_map(|(_, view)| Some((&view.node.name, view.group(id)?)));
        let seen: Vec<_> = seen.collect();
        let last = seen.iter().map(|(_, group)| group.last_index).max().unwrap_or(0);
        for (name, group) in seen {
            let applied = group.applied;
            ensure!(applied == last, "{name}: group {id} has applied {applied} of {last}");
        }
    }
    Ok(())
}
