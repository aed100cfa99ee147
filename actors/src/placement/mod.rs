//! Placement: who holds what, kept as it should be. Acts only where the control group's leader is.
//!
//! ```text
//!  every node ──report──▶ observe ──Load──▶ plan (pure, see plan.rs) ──Plan──▶ one step after the other
//!                                                                              │
//!             the shard's leader: learner ─▶ caught up ─▶ votes ─▶ surplus leaves ◀── SetReplicas, in the log
//! ```
//!
//! The plan is made anew every tick and its steps are in the control group's log before anything
//! moves, so a change of the control group's leader in the middle of a move changes nothing. Whatever
//! placement would do is told with its reason ([`Cluster::plan`]), whether it is paused or not.

mod operate;
mod plan;
mod report;
#[cfg(test)]
mod tests;

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;
use std::time::{Duration, Instant};

use ractor::{Actor, ActorProcessingErr, ActorRef};
use ractor_cluster::RactorMessage;
use shoal_proto::{GroupId, NodeId, ShardId};
use shoal_raft::cluster::{ClusterState, Command, Drain};

use crate::cluster::Cluster;
pub(crate) use operate::ORDER_TIMEOUT;
pub use operate::{Leaving, find_node, leaving, out_of_reach};
use plan::Load;
pub use plan::{Moving, PlacementLimits, Plan, Planned, Step};
pub use report::{GroupReport, NodeReport, led};

/// How often placement looks.
const TICK: Duration = Duration::from_millis(500);
/// How often it looks when nothing is to be done and the cluster's state has not changed: everybody's
/// report of every group is work for everybody.
const CALM_TICK: Duration = Duration::from_secs(2);
/// How long one step may take to be ordered.
const STEP_TIMEOUT: Duration = Duration::from_secs(5);
/// The most voters of the control group.
const MAX_CONTROL_VOTERS: usize = 5;

pub(crate) struct Placement;

#[derive(Clone)]
pub(crate) struct PlacementArguments {
    pub(crate) cluster: Cluster,
    pub(crate) limits: PlacementLimits,
}

#[derive(RactorMessage)]
pub(crate) enum PlacementMessage {
    /// Look whether something is to be done.
    Tick,
}

pub(crate) struct PlacementState {
    cluster: Cluster,
    limits: PlacementLimits,
    /// What this node has seen since it leads the control group.
    office: Option<Office>,
}

struct Office {
    since: Instant,
    /// When each node has answered last.
    heard: BTreeMap<NodeId, Instant>,
    /// Since when nothing has moved and nobody was silent.
    calm_since: Instant,
    /// What was said of the plan last, so that it is said once.
    said: BTreeSet<String>,
    /// Why each shard moves that was set moving from here.
    reasons: BTreeMap<ShardId, String>,
    /// What the last look came to.
    last: Option<Look>,
}

struct Look {
    at: Instant,
    /// The version of the state that it was of.
    version: u64,
    /// Whether something was under way or still to be done.
    is_busy: bool,
}

impl Actor for Placement {
    type Msg = PlacementMessage;
    type State = PlacementState;
    type Arguments = PlacementArguments;

    async fn pre_start(
        &self,
        myself: ActorRef<PlacementMessage>,
        arguments: PlacementArguments,
    ) -> Result<PlacementState, ActorProcessingErr> {
        myself.cast(PlacementMessage::Tick)?;
        Ok(PlacementState { cluster: arguments.cluster, limits: arguments.limits, office: None })
    }

    async fn handle(
        &self,
        myself: ActorRef<PlacementMessage>,
        message: PlacementMessage,
        state: &mut PlacementState,
    ) -> Result<(), ActorProcessingErr> {
        match message {
            PlacementMessage::Tick => {
                state.tick().await;
                // Not an interval: the ticks of a slow cluster must not pile up.
                myself.send_after(TICK, || PlacementMessage::Tick);
            }
        }
        Ok(())
    }
}

impl PlacementState {
    async fn tick(&mut self) {
        let Ok(control) = self.cluster.groups().get(GroupId::CONTROL) else { return };
        if !control.is_leader() {
            self.office = None;
            self.cluster.set_plan(None);
            self.cluster.note_moves(BTreeMap::new());
            metrics::gauge!("shoal_shards_without_leader").set(0.0);
            return;
        }
        let last = self.office.as_ref().and_then(|office| office.last.as_ref());
        let version = self.cluster.state().version;
        if last.is_some_and(|last| !last.is_busy && last.version == version && last.at.elapsed() < CALM_TICK)
        {
            return;
        }
        let reports = self.cluster.reports().await;
        let state = self.cluster.state();
        let load = self.observe(&state, &reports);
        let without_leader = plan::without_leader(&state, &load);
        metrics::gauge!("shoal_shards_without_leader").set(without_leader as f64);
        let members: BTreeSet<NodeId> = state.nodes.keys().copied().collect();
        let lost = load.silent.iter().filter(|(_, silent)| **silent >= self.limits.repair_after);
        let lost: BTreeSet<NodeId> = lost.map(|(node, _)| *node).collect();
        let silent: BTreeSet<NodeId> = load.silent.keys().copied().collect();
        let voters = control_voters(&state, &control.status().voters, &lost, &silent);
        let steered = control.steer_members(&members, &voters, |_| true).await;
        if let Err(error) = &steered {
            tracing::debug!(%error, "the control group's membership will be led on later");
        }
        let plan = plan::plan(&state, &load, &self.limits);
        self.say(&plan);
        let moves = self.reasons(&state, &load, &plan);
        self.cluster.note_moves(moves);
        if let Some(office) = &mut self.office {
            let is_busy = !matches!(steered, Ok(true)) || !plan.steps.is_empty() || !plan.moving.is_empty();
            office.last = Some(Look { at: Instant::now(), version: state.version, is_busy });
        }
        let plan = Arc::new(plan);
        self.cluster.set_plan(Some(plan.clone()));
        if plan.is_paused {
            return;
        }
        for planned in &plan.steps {
            tracing::info!(step = %planned.step, reason = planned.reason, "placement");
            self.take(planned).await;
        }
    }

    fn observe(&mut self, state: &ClusterState, reports: &BTreeMap<NodeId, NodeReport>) -> Load {
        let now = Instant::now();
        let office = self.office.get_or_insert_with(|| Office {
            since: now,
            heard: BTreeMap::new(),
            calm_since: now,
            said: BTreeSet::new(),
            reasons: BTreeMap::new(),
            last: None,
        });
        office.heard.extend(reports.keys().map(|node| (*node, now)));
        // Whoever was silent before this node came to lead is not known to have been.
        let silent_for = |node| now.duration_since(office.heard.get(&node).copied().unwrap_or(office.since));
        let load = report::load(state, reports, silent_for);
        let holds_something =
            |node: &NodeId| state.shards.values().any(|shard| shard.replicas.contains(node));
        let is_calm = !load.silent.keys().any(holds_something)
            && state
                .shards
                .iter()
                .all(|(id, shard)| load.shards.get(id).is_some_and(|seen| seen.is_settled(&shard.replicas)));
        if !is_calm {
            office.calm_since = now;
        }
        Load { calm_for: now.duration_since(office.calm_since), ..load }
    }

    /// Tells what cannot be done now, once.
    fn say(&mut self, plan: &Plan) {
        let Some(office) = &mut self.office else { return };
        let waiting: BTreeSet<String> = plan.waiting.iter().cloned().collect();
        for reason in waiting.difference(&office.said) {
            tracing::debug!(reason, "placement waits");
        }
        office.said = waiting;
    }

    /// Why each shard moves that does: what was ordered from here, or what is likely.
    fn reasons(&mut self, state: &ClusterState, load: &Load, plan: &Plan) -> BTreeMap<ShardId, String> {
        let Some(office) = &mut self.office else { return BTreeMap::new() };
        let reason = |moving: &Moving| match office.reasons.get(&moving.shard) {
            Some(reason) => (moving.shard, reason.clone()),
            None => (moving.shard, plan::likely_reason(state, load, &self.limits, moving)),
        };
        let moves: BTreeMap<ShardId, String> = plan.moving.iter().map(reason).collect();
        // What has arrived may be moved again, by hand.
        office.reasons.retain(|shard, _| moves.contains_key(shard));
        moves
    }

    async fn take(&mut self, planned: &Planned) {
        let step = &planned.step;
        let done = match step {
            Step::SetReplicas { shard, from, to } => {
                let command =
                    Command::SetReplicas { shard: *shard, expected: from.clone(), replicas: to.clone() };
                self.cluster.control(command, Instant::now() + STEP_TIMEOUT).await.map(drop)
            }
            Step::MoveLeader { shard, from, to } => self.cluster.ask_to_hand_over(*shard, *from, *to).await,
        };
        if let Some(office) = &mut self.office {
            office.calm_since = Instant::now();
            if let Step::SetReplicas { shard, .. } = step {
                office.reasons.insert(*shard, planned.reason.clone());
            }
        }
        if let Err(error) = done {
            tracing::warn!(%step, %error, "a placement step was refused and will be planned anew");
        }
    }
}

/// An odd number of voters, spread over zones: those that vote already come first, unless a zone has
/// none. One that is lost keeps its place only while there is nobody for it; one that is drained does
/// not.
fn control_voters(
    state: &ClusterState,
    voting: &BTreeSet<NodeId>,
    lost: &BTreeSet<NodeId>,
    silent: &BTreeSet<NodeId>,
) -> BTreeSet<NodeId> {
    let all: BTreeSet<NodeId> = state.nodes.keys().copied().collect();
    let used: BTreeSet<NodeId> =
        state.nodes.iter().filter(|(_, node)| node.drain == Drain::No).map(|(id, _)| *id).collect();
    let candidates = if used.is_empty() { &all } else { &used };
    let count = match candidates.len().min(MAX_CONTROL_VOTERS) {
        0..=2 => 1,
        3 | 4 => 3,
        _ => 5,
    };
    let zone = |node: NodeId| state.nodes.get(&node).map_or("", |node| node.zone.as_str());
    let mut voters: BTreeSet<NodeId> = BTreeSet::new();
    while voters.len() < count {
        let zones: BTreeSet<&str> = voters.iter().map(|node| zone(*node)).collect();
        let rest = candidates.iter().copied().filter(|node| !voters.contains(node));
        let next = rest.min_by_key(|node| {
            (lost.contains(node), zones.contains(zone(*node)), !voting.contains(node), *node)
        });
        let Some(next) = next else { break };
        voters.insert(next);
    }
    // Nobody hands over to a majority that is not there.
    let answering = voters.iter().filter(|node| !silent.contains(node)).count();
    if 2 * answering <= voters.len() && !voting.is_empty() { voting.clone() } else { voters }
}
