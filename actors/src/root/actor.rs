//! The root actor: spawns the children and brings back the ones that fail, after a pause that grows.
//!
//! | fails again and again | then |
//! |---|---|
//! | `Server`, `Shards` | the process ends, so that whoever runs the node sees it and may put it elsewhere |
//! | `Placement`, `Reshards` | the control group is handed over, on whose leader alone they act |
//! | all others | nothing: without them the node does less, and it goes on trying |

use std::collections::BTreeMap;
use std::time::{Duration, Instant};

use ractor::{Actor, ActorCell, ActorProcessingErr, ActorRef, SupervisionEvent};
use ractor_cluster::RactorMessage;
use shoal_proto::GroupId;

use super::start::heir_of;
use crate::cluster::Cluster;
use crate::ingest::{Ingests, IngestsArguments};
use crate::mesh::{Mesh, MeshArguments, Server};
use crate::placement::{Placement, PlacementArguments, PlacementLimits};
use crate::pool::{Kind, Pool, PoolArguments};
use crate::reshard::{Reshards, ReshardsArguments};
use crate::restarts::Restarts;
use crate::shards::{Shards, ShardsArguments};
use crate::work::Work;

/// After so many failures in a row, which takes more than three minutes, a part is given up.
const MAX_FAILURES: u32 = 12;

pub(super) struct Root;

#[derive(Clone)]
pub(super) struct RootArguments {
    pub(super) cluster: Cluster,
    pub(super) shards: ShardsArguments,
    pub(super) mesh: MeshArguments,
    pub(super) work: Work,
    pub(super) placement: PlacementLimits,
    pub(super) reshards: ReshardsArguments,
}

#[derive(RactorMessage)]
pub(super) enum RootMessage {
    /// Start a child (again).
    Start(Child),
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(super) enum Child {
    Mesh,
    Server,
    Pool(Kind),
    Shards,
    Ingests,
    Placement,
    Reshards,
}

/// What is done about a part that fails again and again, besides trying on.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Consequence {
    /// The node ends: it is of no use without the part, and others can take its place.
    End,
    /// Another node leads the control group: where it is led, the part does its work.
    HandOver,
    /// None.
    Nothing,
}

impl Child {
    fn consequence(self) -> Consequence {
        match self {
            Child::Server | Child::Shards => Consequence::End,
            Child::Placement | Child::Reshards => Consequence::HandOver,
            Child::Mesh | Child::Pool(_) | Child::Ingests => Consequence::Nothing,
        }
    }
}

/// In the order in which they are started.
const ALL: [Child; 8] = [
    Child::Server,
    Child::Pool(Kind::Parsers),
    Child::Pool(Kind::Embedders),
    Child::Mesh,
    Child::Shards,
    Child::Ingests,
    Child::Placement,
    Child::Reshards,
];

pub(super) struct RootState {
    arguments: RootArguments,
    children: Vec<(Child, ActorCell)>,
    failures: BTreeMap<Child, Restarts>,
}

impl Actor for Root {
    type Msg = RootMessage;
    type State = RootState;
    type Arguments = RootArguments;

    async fn pre_start(
        &self,
        myself: ActorRef<RootMessage>,
        arguments: RootArguments,
    ) -> Result<RootState, ActorProcessingErr> {
        let mut state = RootState { arguments, children: Vec::new(), failures: BTreeMap::new() };
        for child in ALL {
            let cell = state.spawn(child, myself.get_cell()).await?;
            state.children.push((child, cell));
        }
        Ok(state)
    }

    async fn handle(
        &self,
        myself: ActorRef<RootMessage>,
        message: RootMessage,
        state: &mut RootState,
    ) -> Result<(), ActorProcessingErr> {
        match message {
            RootMessage::Start(child) => match state.spawn(child, myself.get_cell()).await {
                Ok(cell) => state.children.push((child, cell)),
                Err(error) => {
                    tracing::error!(?child, %error, "a part of the node does not start; will try again");
                    state.start_later(child, &myself);
                }
            },
        }
        Ok(())
    }

    async fn handle_supervisor_evt(
        &self,
        myself: ActorRef<RootMessage>,
        event: SupervisionEvent,
        state: &mut RootState,
    ) -> Result<(), ActorProcessingErr> {
        let (cell, reason) = match event {
            SupervisionEvent::ActorFailed(cell, error) => (cell, error.to_string()),
            SupervisionEvent::ActorTerminated(cell, _, reason) => (cell, reason.unwrap_or_default()),
            _ => return Ok(()),
        };
        let Some(at) = state.children.iter().position(|(_, known)| known.get_id() == cell.get_id()) else {
            return Ok(());
        };
        let (child, _) = state.children.remove(at);
        tracing::error!(?child, reason, "a part of the node failed and is started again");
        metrics::counter!("shoal_actor_restarts_total").increment(1);
        state.start_later(child, &myself);
        Ok(())
    }

    async fn post_stop(
        &self,
        myself: ActorRef<RootMessage>,
        _: &mut RootState,
    ) -> Result<(), ActorProcessingErr> {
        myself.stop_children_and_wait(Some("the node stops".into()), Some(Duration::from_secs(5))).await;
        Ok(())
    }
}

impl RootState {
    /// Starts a child that has failed once its pause is over. Ends the node, or hands over, when that has
    /// been of no use.
    fn start_later(&mut self, child: Child, myself: &ActorRef<RootMessage>) {
        let failures = self.failures.entry(child).or_default();
        let pause = failures.note(Instant::now());
        if failures.in_a_row() >= MAX_FAILURES {
            let consequence = child.consequence();
            tracing::error!(?child, ?consequence, "a part of the node fails again and again");
            match consequence {
                Consequence::End => std::process::exit(crate::EXIT_PART_FAILED),
                Consequence::HandOver => hand_control_over(self.arguments.cluster.clone()),
                Consequence::Nothing => {}
            }
        }
        myself.send_after(pause, move || RootMessage::Start(child));
    }

    async fn spawn(&self, child: Child, parent: ActorCell) -> Result<ActorCell, ractor::SpawnErr> {
        let arguments = self.arguments.clone();
        let cluster = arguments.cluster.clone();
        Ok(match child {
            Child::Mesh => Actor::spawn_linked(None, Mesh, arguments.mesh, parent).await?.0.get_cell(),
            Child::Server => Actor::spawn_linked(None, Server, cluster, parent).await?.0.get_cell(),
            Child::Pool(kind) => {
                let (config, pools) = (arguments.work.config().clone(), arguments.work.pools().clone());
                let pool = PoolArguments { kind, node: cluster.node(), config, pools };
                Actor::spawn_linked(None, Pool, pool, parent).await?.0.get_cell()
            }
            Child::Shards => Actor::spawn_linked(None, Shards, arguments.shards, parent).await?.0.get_cell(),
            Child::Ingests => {
                let ingests = IngestsArguments { cluster, work: arguments.work };
                Actor::spawn_linked(None, Ingests, ingests, parent).await?.0.get_cell()
            }
            Child::Placement => {
                let placement = PlacementArguments { cluster, limits: arguments.placement };
                Actor::spawn_linked(None, Placement, placement, parent).await?.0.get_cell()
            }
            Child::Reshards => {
                Actor::spawn_linked(None, Reshards, arguments.reshards, parent).await?.0.get_cell()
            }
        })
    }
}

/// Asks another voter to lead the control group, if this node does.
fn hand_control_over(cluster: Cluster) {
    tokio::spawn(async move {
        let Ok(control) = cluster.groups().get(GroupId::CONTROL) else { return };
        let Some(heir) = heir_of(&control.status(), cluster.node()).filter(|_| control.is_leader()) else {
            return;
        };
        if let Err(error) = control.transfer_leader(heir).await {
            tracing::warn!(%error, "the control group could not be handed over");
        }
    });
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_what_a_node_is_of_no_use_without_ends_it() {
        let ends = ALL.into_iter().filter(|child| child.consequence() == Consequence::End);
        assert_eq!(ends.collect::<Vec<_>>(), [Child::Server, Child::Shards]);
    }
}
