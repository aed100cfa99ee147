//! Placement: acts only where the control group's leader is. It observes the state, takes the
//! next step of a pure plan, and sees to the control group's own membership.
//!
//! Today's plan has one kind of step, [`ClusterState::next_growth`]: a shard with fewer
//! replicas than it wants gets one more. The shard's leader carries a changed replica set out
//! (learner, caught up, voter), so a step survives a change of the control leader.
//!
//! [`ClusterState::next_growth`]: shoal_raft::cluster::ClusterState::next_growth

use std::collections::BTreeSet;
use std::time::{Duration, Instant};

use ractor::{Actor, ActorProcessingErr, ActorRef};
use ractor_cluster::RactorMessage;
use shoal_proto::{GroupId, NodeId};
use shoal_raft::cluster::{ClusterState, Command};

use crate::cluster::Cluster;

/// How often placement looks.
const TICK: Duration = Duration::from_millis(500);
/// The most voters of the control group.
const MAX_CONTROL_VOTERS: usize = 5;

pub(crate) struct Placement;

#[derive(RactorMessage)]
pub(crate) enum PlacementMessage {
    /// Look whether something is to be done.
    Tick,
}

impl Actor for Placement {
    type Msg = PlacementMessage;
    type State = Cluster;
    type Arguments = Cluster;

    async fn pre_start(
        &self,
        myself: ActorRef<PlacementMessage>,
        cluster: Cluster,
    ) -> Result<Cluster, ActorProcessingErr> {
        myself.send_interval(TICK, || PlacementMessage::Tick);
        Ok(cluster)
    }

    async fn handle(
        &self,
        _: ActorRef<PlacementMessage>,
        message: PlacementMessage,
        cluster: &mut Cluster,
    ) -> Result<(), ActorProcessingErr> {
        match message {
            PlacementMessage::Tick => tick(cluster).await,
        }
        Ok(())
    }
}

async fn tick(cluster: &Cluster) {
    let Ok(control) = cluster.groups().get(GroupId::CONTROL) else { return };
    if !control.is_leader() {
        return;
    }
    let state = cluster.state();
    let members: BTreeSet<NodeId> = state.nodes.keys().copied().collect();
    let voters = control_voters(&state);
    if let Err(error) = control.steer_members(&members, &voters).await {
        tracing::debug!(%error, "the control group's membership will be led on later");
    }
    if let Some((shard, replicas)) = state.next_growth() {
        let expected = state.shards.get(&shard).map(|shard| shard.replicas.clone()).unwrap_or_default();
        tracing::info!(shard = shard.0, ?replicas, "a shard gets one more replica");
        let command = Command::SetReplicas { shard, expected, replicas };
        if let Err(error) = cluster.control(command, Instant::now() + Duration::from_secs(5)).await {
            tracing::warn!(%error, "a placement step was refused and will be planned anew");
        }
    }
}

/// An odd number of voters, spread over zones: nodes of zones not yet chosen come first.
fn control_voters(state: &ClusterState) -> BTreeSet<NodeId> {
    let count = match state.nodes.len().min(MAX_CONTROL_VOTERS) {
        0..=2 => 1,
        3 | 4 => 3,
        _ => 5,
    };
    let mut voters = BTreeSet::new();
    let mut zones = BTreeSet::new();
    while voters.len() < count {
        let rest = || state.nodes.iter().filter(|(id, _)| !voters.contains(*id));
        let next = rest().find(|(_, node)| !zones.contains(node.zone.as_str())).or_else(|| rest().next());
        let Some((id, node)) = next else { break };
        voters.insert(*id);
        zones.insert(node.zone.as_str());
    }
    voters
}

#[cfg(test)]
mod tests {
    use super::*;
    use shoal_raft::cluster::Addresses;

    #[test]
    fn control_voters_are_odd_and_spread() {
        let mut state = ClusterState::default();
        let mut sizes = Vec::new();
        for (number, zone) in ["a", "a", "a", "b", "c", "c"].iter().enumerate() {
            state.apply(Command::AddNode {
                name: format!("n{number}"),
                incarnation: format!("i{number}"),
                addresses: Addresses::default(),
                zone: (*zone).to_owned(),
            });
            sizes.push(control_voters(&state).len());
        }
        assert_eq!(sizes, [1, 1, 3, 3, 5, 5]);
        let chosen = control_voters(&state);
        assert!([1, 4, 5].iter().all(|id| chosen.contains(&NodeId(*id))), "one of each zone: {chosen:?}");
    }
}
