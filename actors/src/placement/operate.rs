//! What an operator can order: draining, removing, moving, pausing.
//!
//! Every order is a command in the control group's log, checked against what the nodes report; the
//! control group checks again what it can check.

use std::collections::{BTreeMap, BTreeSet};
use std::time::{Duration, Instant};

use shoal_proto::{Error, ErrorCode, GroupId, NodeId, RequestId, ShardId};
use shoal_raft::cluster::{ClusterState, Command, Drain, Response, Restore};

use super::plan::{Load, Plan, is_member, is_out_of_reach, keeps_from_leaving, needs};
use super::report::{self, NodeReport};
use crate::call::{Call, Reply};
use crate::cluster::Cluster;

/// How long the leader of a group may take to answer an order.
pub(crate) const ORDER_TIMEOUT: Duration = Duration::from_secs(5);
/// How often it is looked whether a node is drained.
const DRAIN_TICK: Duration = Duration::from_millis(500);

/// So many times the nodes are asked whether a shard is out of reach: one that is only slow answers in time
/// once.
const LOOKS: u32 = 3;
/// The pause between two of them.
const LOOK_PAUSE: Duration = Duration::from_millis(500);

/// What a node that is drained still waits for.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Leaving {
    /// Why it cannot go yet; when there is nothing, its leaving loses nothing.
    pub reasons: Vec<String>,
}

impl Leaving {
    /// Whether the node can go.
    pub fn is_done(&self) -> bool {
        self.reasons.is_empty()
    }
}

/// The node of a name or an id.
///
/// # Errors
/// Not found.
pub fn find_node(state: &ClusterState, name_or_id: &str) -> Result<NodeId, Error> {
    let by_name = state.nodes.iter().find(|(_, node)| node.name == name_or_id).map(|(id, _)| *id);
    let by_id = || name_or_id.parse().ok().map(NodeId).filter(|id| state.nodes.contains_key(id));
    by_name
        .or_else(by_id)
        .ok_or_else(|| Error::not_found(format!("no member has the name or id `{name_or_id}`")))
}

impl Cluster {
    /// What placement would do now, by the word of the control group's leader.
    ///
    /// # Errors
    /// Unavailable when nobody leads it, or the leader has only just begun.
    pub async fn plan(&self) -> Result<Plan, Error> {
        let leader = self.groups().get(GroupId::CONTROL)?.leader();
        let leader = leader.ok_or_else(|| Error::unavailable("the control group has no leader"))?;
        match self.call(leader, Call::Plan, ORDER_TIMEOUT).await {
            Reply::Planned(plan) => Ok(plan),
            Reply::Failed(error) => Err(error),
            _ => Err(Error::internal("the control group's leader did not answer with a plan")),
        }
    }

    /// Begins to drain a node, or ends it.
    ///
    /// # Errors
    /// Not found; conflict when there would be no node left.
    pub async fn set_drain(&self, node: NodeId, drain: Drain, deadline: Instant) -> Result<(), Error> {
        self.control(Command::SetDrain { node, drain }, deadline).await.map(drop)
    }

    /// What a node that is drained still waits for.
    ///
    /// # Errors
    /// Unavailable when the control group does not answer in time.
    pub async fn leaving(&self, node: NodeId, deadline: Instant) -> Result<Leaving, Error> {
        let state = self.fresh_state(deadline).await?;
        Ok(leaving(&state, &self.reports().await, node))
    }

    /// Waits until a node that is drained can leave.
    ///
    /// # Errors
    /// Unavailable at the deadline, with what is left to be done.
    pub async fn wait_drained(&self, node: NodeId, deadline: Instant) -> Result<(), Error> {
        let mut last = Leaving::default();
        loop {
            match self.leaving(node, deadline).await {
                Ok(leaving) if leaving.is_done() => return Ok(()),
                Ok(leaving) => last = leaving,
                Err(error) if !error.code.is_retryable() => return Err(error),
                Err(_) => {}
            }
            if Instant::now() + DRAIN_TICK >= deadline {
                let left = last.reasons.join("; ");
                return Err(Error::unavailable(format!("node {node} is not drained yet: {left}")));
            }
            tokio::time::sleep(DRAIN_TICK).await;
        }
    }

    /// Takes a node out of the cluster for good: one that is drained, or gone and every shard has a leader
    /// without it. With `force` also one that lives, or that a shard waits for; never one that a shard would
    /// be lost with. Restores that it is at end with it, so that what they have made so far does not count.
    ///
    /// # Errors
    /// Not found; conflict, with what speaks against it.
    pub async fn remove_node(&self, node: NodeId, force: bool, deadline: Instant) -> Result<(), Error> {
        let conflict = |reason: String| Err(Error::new(ErrorCode::Conflict, reason));
        let state = self.fresh_state(deadline).await?;
        let Some(known) = state.nodes.get(&node) else {
            return Err(Error::not_found(format!("node {node} is not a member")));
        };
        let reports = self.reports().await;
        let load = now(&state, &reports);
        let rest = without_restores_of(&state, node);
        let is_lost =
            |id: ShardId| is_member(&rest, &load, id, node) && is_out_of_reach(&rest, &load, id, Some(node));
        let lost: Vec<ShardId> = rest.shards.keys().copied().filter(|id| is_lost(*id)).collect();
        if !lost.is_empty() {
            let is_here = reports.contains_key(&node);
            return conflict(would_lose(&state, node, is_here, &lost));
        }
        if !force {
            let is_drained = || known.drain != Drain::No && leaving(&state, &reports, node).is_done();
            if reports.contains_key(&node) && !is_drained() {
                return conflict(format!("node {node} lives and is not drained: drain it first"));
            }
            if let Some(shard) = needs(&rest, &load, node) {
                return conflict(format!(
                    "shard {shard} cannot do without node {node} now: wait, start it, or use force"
                ));
            }
        }
        // Nobody else would end them, and of what they have made the node may hold the only replica.
        let ids = restores_of(&state, node).map(|(_, restore)| restore.id);
        for restore in ids.collect::<BTreeSet<RequestId>>() {
            self.control(Command::AbortRestore { restore }, deadline).await?;
        }
        match self.control(Command::RemoveNode { node }, deadline).await? {
            Response::Absent => Err(Error::not_found(format!("node {node} is not a member"))),
            _ => Ok(()),
        }
    }

    /// Begins a shard of a collection anew, empty, when so many of its disks are gone that nobody can bring
    /// back what it held. What is left of it somewhere is thrown away.
    ///
    /// # Errors
    /// Not found; conflict when it is another collection's, or not out of reach.
    pub async fn abandon(&self, shard: ShardId, collection: &str, deadline: Instant) -> Result<(), Error> {
        let conflict = |reason: String| Err(Error::new(ErrorCode::Conflict, reason));
        let state = self.fresh_state(deadline).await?;
        let known = state.shards.get(&shard).ok_or_else(|| no_shard(shard))?;
        if known.collection != state.collection(collection)?.0 {
            return conflict(format!("shard {shard} is one of `{}`", known.collection));
        }
        let mut among = BTreeSet::new();
        for look in 0..LOOKS {
            if look > 0 {
                tokio::time::sleep(LOOK_PAUSE).await;
            }
            let reports = self.reports().await;
            if !is_out_of_reach(&state, &now(&state, &reports), shard, None) {
                return conflict(format!("shard {shard} is not lost: most of its replicas answer"));
            }
            among = reports.into_keys().collect();
        }
        tracing::warn!(shard = shard.0, collection, "a shard is out of reach and begins anew, as ordered");
        let shards = BTreeMap::from([(shard, known.replicas.clone())]);
        self.control(Command::AbandonShards { shards, among }, deadline).await.map(drop)
    }

    /// Keeps placement from moving anything by itself, or lets it go on.
    ///
    /// # Errors
    /// Unavailable when the control group does not answer in time.
    pub async fn pause_placement(&self, is_paused: bool, deadline: Instant) -> Result<(), Error> {
        self.control(Command::PausePlacement { is_paused }, deadline).await.map(drop)
    }

    /// Orders that a shard's replica moves from one node to another.
    ///
    /// # Errors
    /// Not found; conflict when it does not fit to who holds the shard.
    pub async fn move_replica(
        &self,
        shard: ShardId,
        (from, to): (NodeId, NodeId),
        deadline: Instant,
    ) -> Result<(), Error> {
        let state = self.fresh_state(deadline).await?;
        let placed = state.shards.get(&shard).ok_or_else(|| no_shard(shard))?;
        let conflict = |reason: String| Err(Error::new(ErrorCode::Conflict, reason));
        if !placed.replicas.contains(&from) {
            return conflict(format!("node {from} does not hold shard {shard}"));
        }
        if placed.replicas.contains(&to) {
            return conflict(format!("node {to} holds shard {shard} already"));
        }
        let mut replicas: BTreeSet<NodeId> = placed.replicas.clone();
        replicas.remove(&from);
        replicas.insert(to);
        let expected = placed.replicas.clone();
        self.control(Command::SetReplicas { shard, expected, replicas }, deadline).await.map(drop)
    }

    /// Orders that another node leads a shard.
    ///
    /// # Errors
    /// Not found; conflict when that node has no vote; unavailable when there is no leader now.
    pub async fn move_leader(&self, shard: ShardId, to: NodeId) -> Result<(), Error> {
        if !self.state().shards.contains_key(&shard) {
            return Err(no_shard(shard));
        }
        let reports = self.reports().await;
        let led = report::led(&reports);
        let (leader, group) = led
            .get(&shard.into())
            .ok_or_else(|| Error::unavailable(format!("shard {shard} has no leader now")))?;
        if !group.voters.contains(&to) {
            let reason = format!("node {to} has no vote in shard {shard}");
            return Err(Error::new(ErrorCode::Conflict, reason));
        }
        if *leader == to {
            return Ok(());
        }
        self.ask_to_hand_over(shard, *leader, to).await
    }

    /// Asks a shard's leader to let another node lead.
    pub(super) async fn ask_to_hand_over(
        &self,
        shard: ShardId,
        leader: NodeId,
        to: NodeId,
    ) -> Result<(), Error> {
        let call = Call::TransferLeader { group: shard.into(), to };
        match self.call(leader, call, ORDER_TIMEOUT).await {
            Reply::Failed(error) => Err(error),
            _ => Ok(()),
        }
    }

    /// Changes how many replicas a collection wants of each shard.
    ///
    /// # Errors
    /// Not found; invalid argument for a number out of range.
    pub async fn set_replication(&self, name: &str, factor: u32, deadline: Instant) -> Result<(), Error> {
        let name = self.fresh_state(deadline).await?.collection(name)?.0.to_owned();
        let command = Command::SetReplicationFactor { name, replication_factor: factor };
        self.control(command, deadline).await.map(drop)
    }
}

/// The restores that a node is at, with the collections that they have made.
fn restores_of(state: &ClusterState, node: NodeId) -> impl Iterator<Item = (&String, &Restore)> {
    state.restoring.iter().filter(move |(_, restore)| restore.node == node)
}

/// The state without what a node is restoring, which nobody sees.
fn without_restores_of(state: &ClusterState, node: NodeId) -> ClusterState {
    let mut rest = state.clone();
    let hidden = restores_of(state, node).filter_map(|(name, _)| state.collections.get(name));
    for shard in hidden.flat_map(|collection| &collection.shards) {
        rest.shards.remove(shard);
    }
    rest
}

/// What the planner sees when nobody's silence is old.
fn now(state: &ClusterState, reports: &BTreeMap<NodeId, NodeReport>) -> Load {
    report::load(state, reports, |_| Duration::ZERO)
}

/// The shards whose data are out of reach, by what was reported: of those who vote not even half answer.
pub fn out_of_reach(state: &ClusterState, reports: &BTreeMap<NodeId, NodeReport>) -> BTreeSet<ShardId> {
    let load = now(state, reports);
    state.shards.keys().copied().filter(|id| is_out_of_reach(state, &load, *id, None)).collect()
}

/// Why a node is not removed that shards would be lost with, and what can be done.
fn would_lose(state: &ClusterState, node: NodeId, is_here: bool, lost: &[ShardId]) -> String {
    let name = |id: &ShardId| format!("shard {id} of `{}`", state.shards[id].collection);
    let what = lost.iter().map(name).collect::<Vec<_>>().join(", ");
    let way_out = match is_here {
        true => "drain it first".to_owned(),
        false => {
            let collection = &state.shards[&lost[0]].collection;
            format!(
                "start it; when its disk is gone for good, delete the collection, or give up what it held \
                 with `shoal cluster abandon {} --collection {collection}`, for each of them",
                lost[0]
            )
        }
    };
    format!("with node {node} would be lost: {what}: {way_out}")
}

/// What a node still waits for, by what was reported.
pub fn leaving(state: &ClusterState, reports: &BTreeMap<NodeId, NodeReport>, node: NodeId) -> Leaving {
    let mut reasons = keeps_from_leaving(state, &now(state, reports), node);
    if state.is_placement_paused && !reasons.is_empty() {
        reasons.push("placement is paused".to_owned());
    }
    match report::led(reports).get(&GroupId::CONTROL) {
        None => reasons.push("the control group has no leader".to_owned()),
        Some((_, group)) if group.voters.contains(&node) => {
            reasons.push("it still votes in the control group".to_owned());
        }
        Some(_) => {}
    }
    Leaving { reasons }
}

fn no_shard(shard: ShardId) -> Error {
    Error::not_found(format!("shard {shard} does not exist"))
}

#[cfg(test)]
mod tests {
    use shoal_proto::{CollectionConfig, Distance, VectorParams};
    use shoal_raft::cluster::Addresses;

    use super::*;

    #[test]
    fn what_a_dead_node_was_restoring_does_not_keep_it_in_the_cluster() {
        let mut state = ClusterState::default();
        for name in ["n1", "n2"] {
            state.apply(Command::AddNode {
                name: name.to_owned(),
                incarnation: name.to_owned(),
                addresses: Addresses::default(),
                zone: String::new(),
            });
        }
        let dead = find_node(&state, "n1").expect("a member");
        let mut config = CollectionConfig::default();
        config.vectors.insert(String::new(), VectorParams::new(4, Distance::Cosine));
        let restore = RequestId([1; 16]);
        let begun = state.apply(Command::BeginRestore {
            restore,
            node: dead,
            name: "half".to_owned(),
            config,
            shard_count: Some(2),
            replication_factor: 1,
            created_at: 0,
        });
        assert!(!matches!(begun, Response::Rejected(_)), "{begun:?}");
        // Nobody has heard of any shard's leader.
        assert!(needs(&state, &Load::default(), dead).is_some());
        assert_eq!(needs(&without_restores_of(&state, dead), &Load::default(), dead), None);
        let remove = Command::RemoveNode { node: dead };
        assert!(matches!(state.apply(remove.clone()), Response::Rejected(_)), "it holds only replicas");
        assert_eq!(state.apply(Command::AbortRestore { restore }), Response::Done);
        assert_eq!(state.apply(remove), Response::Done);
    }
}
