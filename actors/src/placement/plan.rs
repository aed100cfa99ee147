//! What placement does next: a pure function of the cluster's state and of what was seen of it.
//!
//! The state says where replicas should be, the load where they are. Each step changes what should be
//! by one shard's replica set, and the shard's leader carries it out: a learner, caught up, a vote,
//! and only then does whoever is not wanted any more leave. So nothing that is planned takes a replica
//! away before there is another one, and a step that was begun goes on whoever leads the control group.
//!
//! In this order:
//!
//! 1. *repair*: a node that has been silent for longer than `repair_after` is replaced;
//! 2. *growth*: a shard that has fewer replicas than it wants gets more as nodes arrive;
//! 3. *drain*: leaders leave a node that is drained at once, then its replicas do;
//! 4. *shrink*: a shard that has more replicas than it wants loses some;
//! 5. *spread*: replicas that share a zone part when another zone has room;
//! 6. *balance*: no node holds two replicas more than another one;
//! 7. *leaders*: when all has been calm for a while, no node leads two shards more than another one.
//!
//! A node takes part in one move at a time, and a shard whose last change is not done, or of which
//! nobody has a majority, is left alone.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt;
use std::time::Duration;

use serde::{Deserialize, Serialize};
use shoal_proto::{NodeId, ShardId};
use shoal_raft::cluster::{ClusterState, Drain};

/// What bounds placement.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct PlacementLimits {
    /// After so long without a word a node's replicas are made anew on others.
    pub repair_after: Duration,
    /// Leaders are balanced when nothing else has happened for so long.
    pub calm_before_leaders: Duration,
    /// A shard whose store is larger is split in two, in bytes; never when 0.
    pub split_bytes: u64,
    /// How often it is looked whether a shard is larger.
    pub sizes_every: Duration,
}

impl Default for PlacementLimits {
    fn default() -> Self {
        PlacementLimits {
            repair_after: Duration::from_secs(300),
            calm_before_leaders: Duration::from_secs(60),
            split_bytes: 8 << 30,
            sizes_every: Duration::from_secs(60),
        }
    }
}

/// What was seen of the cluster.
#[derive(Clone, Debug, Default)]
pub(crate) struct Load {
    /// For how long each node has not answered; the others have, just now.
    pub(crate) silent: BTreeMap<NodeId, Duration>,
    /// The groups of the shards, each by the word of its leader.
    pub(crate) shards: BTreeMap<ShardId, Seen>,
    /// The groups that nobody leads, by the words of those who have a replica.
    pub(crate) unled: BTreeMap<ShardId, Unled>,
    /// For how long nothing has moved and nobody was silent.
    pub(crate) calm_for: Duration,
}

/// A shard's group without a leader, as its members that answer see it.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) struct Unled {
    /// Who has a replica open.
    pub(crate) holders: BTreeSet<NodeId>,
    /// Who votes, by the word of any of them; nobody before the group has started.
    pub(crate) voters: BTreeSet<NodeId>,
    /// Who follows without a vote, by the word of any of them.
    pub(crate) learners: BTreeSet<NodeId>,
}

impl Unled {
    fn knows(&self, node: NodeId) -> bool {
        [&self.holders, &self.voters, &self.learners].iter().any(|nodes| nodes.contains(&node))
    }
}

/// A shard's group, as its leader sees it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Seen {
    pub(crate) leader: NodeId,
    pub(crate) voters: BTreeSet<NodeId>,
    pub(crate) learners: BTreeSet<NodeId>,
    /// Whether the group is in the middle of a change of its voters.
    pub(crate) is_joint: bool,
}

impl Seen {
    fn members(&self) -> BTreeSet<NodeId> {
        self.voters.union(&self.learners).copied().collect()
    }

    /// Whether these vote, all of them and nobody else, and no change is under way.
    pub(crate) fn is_settled(&self, replicas: &BTreeSet<NodeId>) -> bool {
        !self.is_joint && self.learners.is_empty() && self.voters == *replicas
    }
}

/// One thing to do.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Step {
    /// Other nodes are to hold a shard.
    SetReplicas {
        /// The shard.
        shard: ShardId,
        /// Who is to hold it as the planner saw it.
        from: BTreeSet<NodeId>,
        /// Who is to hold it from now on.
        to: BTreeSet<NodeId>,
    },
    /// Another node is to lead a shard.
    MoveLeader {
        /// The shard.
        shard: ShardId,
        /// Who leads it.
        from: NodeId,
        /// Who is to lead it.
        to: NodeId,
    },
}

/// A step and why it is taken.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Planned {
    /// What is to be done.
    pub step: Step,
    /// Why, for people.
    pub reason: String,
}

/// A change that was ordered and is being carried out.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Moving {
    /// The shard.
    pub shard: ShardId,
    /// Nodes that are to hold it and do not yet with a vote.
    pub arriving: BTreeSet<NodeId>,
    /// Nodes that are to leave it and have not.
    pub leaving: BTreeSet<NodeId>,
}

/// What placement would do now, and what it is at.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Plan {
    /// The version of the state that it was made from.
    pub version: u64,
    /// Whether placement is paused: then nothing of this is done.
    pub is_paused: bool,
    /// What comes next; independent of each other.
    pub steps: Vec<Planned>,
    /// What is under way.
    pub moving: Vec<Moving>,
    /// What should be done and cannot be now, and why.
    pub waiting: Vec<String>,
}

impl fmt::Display for Step {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Step::SetReplicas { shard, from, to } => {
                write!(f, "shard {shard}: {} to {}", list(from), list(to))
            }
            Step::MoveLeader { shard, from, to } => write!(f, "shard {shard}: led by {to} instead of {from}"),
        }
    }
}

fn list(nodes: &BTreeSet<NodeId>) -> String {
    let nodes: Vec<String> = nodes.iter().map(NodeId::to_string).collect();
    format!("[{}]", nodes.join(", "))
}

fn without(nodes: &BTreeSet<NodeId>, gone: NodeId) -> BTreeSet<NodeId> {
    nodes.iter().copied().filter(|node| *node != gone).collect()
}

/// Plans what comes next.
pub(crate) fn plan(state: &ClusterState, load: &Load, limits: &PlacementLimits) -> Plan {
    let mut planner = Planner {
        state,
        load,
        limits,
        wanted: state.shards.iter().map(|(id, shard)| (*id, shard.replicas.clone())).collect(),
        is_free: BTreeSet::new(),
        busy: BTreeMap::new(),
        plan: Plan { version: state.version, is_paused: state.is_placement_paused, ..Plan::default() },
    };
    planner.look();
    planner.leave_leadership();
    for id in state.shards.keys().copied() {
        planner.repair(id);
    }
    for id in state.shards.keys().copied() {
        planner.grow(id);
    }
    for id in state.shards.keys().copied() {
        planner.drain(id);
    }
    for id in state.shards.keys().copied() {
        planner.shrink(id);
        planner.spread(id);
    }
    planner.balance();
    planner.balance_leaders();
    planner.plan
}

/// What keeps a node from leaving without a loss; nothing when it can go.
pub(crate) fn keeps_from_leaving(state: &ClusterState, load: &Load, node: NodeId) -> Vec<String> {
    let mut reasons = Vec::new();
    for (id, shard) in &state.shards {
        let seen = load.shards.get(id);
        if shard.replicas.contains(&node) {
            reasons.push(format!("shard {id} is placed here"));
        } else if seen.is_some_and(|seen| seen.members().contains(&node)) {
            reasons.push(format!("shard {id} has not let it go yet"));
        } else if seen.is_none() && may_hold(load, *id, node) {
            reasons.push(format!("shard {id} has no leader that could let it go"));
        }
    }
    reasons
}

/// Whether a node is to hold a shard, or does so still, by what is known.
pub(crate) fn is_member(state: &ClusterState, load: &Load, id: ShardId, node: NodeId) -> bool {
    state.shards.get(&id).is_some_and(|shard| shard.replicas.contains(&node))
        || load.shards.get(&id).is_some_and(|seen| seen.members().contains(&node))
        || load.unled.get(&id).is_some_and(|unled| unled.knows(node))
}

/// Whether a node may have to vote for a leader of a shard that has none: it has a replica, or another one
/// knows it as a member. Of one that does not answer nobody knows.
fn may_hold(load: &Load, id: ShardId, node: NodeId) -> bool {
    load.silent.contains_key(&node) || load.unled.get(&id).is_some_and(|unled| unled.knows(node))
}

/// Whether the data of a shard are out of reach, and will be until somebody brings disks back: of those who
/// vote not even half answer, but for `without`, if that node is to go.
pub(crate) fn is_out_of_reach(
    state: &ClusterState,
    load: &Load,
    id: ShardId,
    without: Option<NodeId>,
) -> bool {
    let Some(shard) = state.shards.get(&id) else { return false };
    let (seen, unled) = (load.shards.get(&id), load.unled.get(&id));
    let voters = match (seen, unled) {
        (Some(seen), _) => &seen.voters,
        (None, Some(unled)) if !unled.voters.is_empty() => &unled.voters,
        // Nobody who has it knows of a group, and only a founder may start one.
        (None, Some(unled)) => return unled.holders.is_disjoint(&shard.founders),
        (None, None) => &shard.replicas,
    };
    let answers = |node: &NodeId| {
        Some(*node) != without && state.nodes.contains_key(node) && !load.silent.contains_key(node)
    };
    2 * voters.iter().filter(|node| answers(node)).count() <= voters.len()
}

/// Why a shard moves, for a leader of the control group that has not ordered it.
pub(crate) fn likely_reason(
    state: &ClusterState,
    load: &Load,
    limits: &PlacementLimits,
    moving: &Moving,
) -> String {
    for node in &moving.leaving {
        let silent = load.silent.get(node).copied().unwrap_or_default();
        match state.nodes.get(node) {
            None => return format!("node {node} is no member any more"),
            Some(_) if silent >= limits.repair_after => {
                return format!("node {node} has been silent for {} s", silent.as_secs());
            }
            Some(known) if known.drain != Drain::No => return format!("node {node} is drained"),
            Some(_) => {}
        }
    }
    let reason = match (moving.arriving.is_empty(), moving.leaving.is_empty()) {
        (false, true) => "it had too few replicas",
        (true, false) => "it had too many replicas",
        _ => "ordered by hand, or by who led the control group before",
    };
    reason.to_owned()
}

/// How many shards nobody leads, or only somebody who has lost the others.
pub(crate) fn without_leader(state: &ClusterState, load: &Load) -> usize {
    let is_led = |id: &ShardId| load.shards.contains_key(id) && !is_out_of_reach(state, load, *id, None);
    state.shards.keys().filter(|id| !is_led(id)).count()
}

/// A shard whose group could not go on without a node, or of which nobody knows.
pub(crate) fn needs(state: &ClusterState, load: &Load, node: NodeId) -> Option<ShardId> {
    let can_do_without = |id: &ShardId, replicas: &BTreeSet<NodeId>| {
        let Some(seen) = load.shards.get(id) else {
            return !replicas.contains(&node) && !load.unled.get(id).is_some_and(|unled| unled.knows(node));
        };
        let answering = |nodes: &BTreeSet<NodeId>| {
            nodes.iter().filter(|other| **other != node && !load.silent.contains_key(other)).count()
        };
        let rest = without(replicas, node);
        !seen.members().contains(&node)
            || (seen.leader != node
                && 2 * answering(&seen.voters) > seen.voters.len()
                && 2 * answering(&rest) > rest.len())
    };
    state.shards.iter().find(|(id, shard)| !can_do_without(id, &shard.replicas)).map(|(id, _)| *id)
}

struct Planner<'a> {
    state: &'a ClusterState,
    load: &'a Load,
    limits: &'a PlacementLimits,
    /// Who is to hold each shard, with the steps of this plan taken.
    wanted: BTreeMap<ShardId, BTreeSet<NodeId>>,
    /// Shards that may be changed.
    is_free: BTreeSet<ShardId>,
    /// Nodes that take part in a move, and of which shard.
    busy: BTreeMap<NodeId, ShardId>,
    plan: Plan,
}

impl Planner<'_> {
    fn answers(&self, node: NodeId) -> bool {
        self.state.nodes.contains_key(&node) && !self.load.silent.contains_key(&node)
    }

    /// Whether a node is given up.
    fn is_lost(&self, node: NodeId) -> bool {
        let silent = self.load.silent.get(&node);
        !self.state.nodes.contains_key(&node)
            || silent.is_some_and(|silent| *silent >= self.limits.repair_after)
    }

    fn is_drained(&self, node: NodeId) -> bool {
        self.state.nodes.get(&node).is_some_and(|node| node.drain != Drain::No)
    }

    /// Whether a node may be given something.
    fn is_open(&self, node: NodeId) -> bool {
        self.answers(node) && !self.is_drained(node)
    }

    /// How many replicas a shard can have: what it wants, or as many as there are nodes to hold them.
    fn goal(&self, id: ShardId) -> usize {
        let nodes = self.state.nodes.keys().filter(|node| !self.is_lost(**node) && !self.is_drained(**node));
        self.factor(id).min(nodes.count())
    }

    /// How many replicas a shard wants.
    fn factor(&self, id: ShardId) -> usize {
        let collection = self.state.collections.get(&self.state.shards[&id].collection);
        collection.map_or(1, |collection| collection.replication_factor as usize)
    }

    fn zone(&self, node: NodeId) -> &str {
        self.state.nodes.get(&node).map_or("", |node| node.zone.as_str())
    }

    fn zones(&self, nodes: &BTreeSet<NodeId>) -> usize {
        nodes.iter().map(|node| self.zone(*node)).collect::<BTreeSet<_>>().len()
    }

    fn replicas_on(&self, node: NodeId) -> usize {
        self.wanted.values().filter(|replicas| replicas.contains(&node)).count()
    }

    /// The best node for one more replica of a shard.
    fn pick(&self, replicas: &BTreeSet<NodeId>) -> Option<NodeId> {
        self.pick_beside(replicas, replicas)
    }

    /// The best node beside `rest` that is none of `replicas`.
    fn pick_beside(&self, rest: &BTreeSet<NodeId>, replicas: &BTreeSet<NodeId>) -> Option<NodeId> {
        let used: BTreeSet<&str> = rest.iter().map(|node| self.zone(*node)).collect();
        let nodes = self.state.nodes.keys().copied();
        let open = nodes.filter(|node| self.is_open(*node) && !replicas.contains(node));
        // One that is busy now is better than a worse place for long.
        open.min_by_key(|node| (used.contains(self.zone(*node)), self.replicas_on(*node), *node))
    }

    /// The best node for a replica in another one's place.
    fn pick_instead(&self, id: ShardId, old: NodeId) -> Option<NodeId> {
        let replicas = &self.wanted[&id];
        self.pick_beside(&without(replicas, old), replicas)
    }

    /// Which shards can be changed, and who is busy with the changes under way.
    fn look(&mut self) {
        for (id, shard) in &self.state.shards {
            let Some(seen) = self.load.shards.get(id) else {
                self.plan.waiting.push(format!("shard {id} has no leader that answers"));
                continue;
            };
            if seen.is_settled(&shard.replicas) {
                self.is_free.insert(*id);
                continue;
            }
            let arriving: BTreeSet<NodeId> = shard.replicas.difference(&seen.voters).copied().collect();
            let leaving: BTreeSet<NodeId> = seen.members().difference(&shard.replicas).copied().collect();
            // Whoever is lost does nothing, and keeps nobody else waiting.
            let involved = arriving.union(&leaving).copied();
            let busy: Vec<NodeId> = involved.filter(|node| !self.is_lost(*node)).collect();
            self.busy.extend(busy.into_iter().map(|node| (node, *id)));
            self.plan.moving.push(Moving { shard: *id, arriving, leaving });
        }
    }

    /// Plans another replica set, if nobody who takes part is busy.
    fn place(&mut self, id: ShardId, to: BTreeSet<NodeId>, reason: String) -> bool {
        let from = self.wanted[&id].clone();
        let involved: BTreeSet<NodeId> = from.symmetric_difference(&to).copied().collect();
        let is_busy = |node: &&NodeId| self.busy.get(*node).is_some_and(|shard| *shard != id);
        if let Some(busy) = involved.iter().find(is_busy) {
            self.plan.waiting.push(format!("shard {id}: {reason}; node {busy} takes part in another move"));
            return false;
        }
        let answering: Vec<NodeId> = involved.into_iter().filter(|node| self.answers(*node)).collect();
        self.busy.extend(answering.into_iter().map(|node| (node, id)));
        self.is_free.remove(&id);
        self.wanted.insert(id, to.clone());
        self.plan.steps.push(Planned { step: Step::SetReplicas { shard: id, from, to }, reason });
        true
    }

    fn replace(&mut self, id: ShardId, old: NodeId, new: NodeId, reason: String) -> bool {
        let mut to = without(&self.wanted[&id], old);
        to.insert(new);
        self.place(id, to, reason)
    }

    fn repair(&mut self, id: ShardId) {
        let seen = self.load.shards.get(&id).filter(|seen| !seen.is_joint);
        // In the middle of a move only whoever was to arrive can be replaced: who votes stays till it is done.
        let can_go = |node: &NodeId| {
            self.is_free.contains(&id) || seen.is_some_and(|seen| !seen.voters.contains(node))
        };
        let lost = self.wanted[&id].iter().copied().find(|node| self.is_lost(*node) && can_go(node));
        let Some(lost) = lost else { return };
        let silent = self.load.silent.get(&lost).map_or(0, Duration::as_secs);
        let reason = format!("node {lost} has been silent for {silent} s");
        match self.pick_instead(id, lost) {
            Some(new) => drop(self.replace(id, lost, new, reason)),
            None if !self.is_free.contains(&id) && self.wanted[&id].len() > 1 => {
                self.place(id, without(&self.wanted[&id], lost), reason);
            }
            None => self.plan.waiting.push(format!("shard {id}: {reason}, and no other node is left")),
        }
    }

    fn grow(&mut self, id: ShardId) {
        let (has, goal) = (self.wanted[&id].len(), self.goal(id));
        if !self.is_free.contains(&id) || has >= goal {
            return;
        }
        // All at once: on its way through an even number a group would bear no more failures than before.
        let mut to = self.wanted[&id].clone();
        while to.len() < goal
            && let Some(new) = self.pick(&to)
        {
            to.insert(new);
        }
        let reason = format!("it has {has} of {goal} replicas");
        match to.len() > has {
            true => drop(self.place(id, to, reason)),
            false => self.plan.waiting.push(format!("shard {id}: {reason}, and no other node answers")),
        }
    }

    /// A node that is drained leads nothing any more, as soon as somebody else can.
    fn leave_leadership(&mut self) {
        for (id, seen) in &self.load.shards {
            if !self.is_drained(seen.leader) || !self.state.shards.contains_key(id) {
                continue;
            }
            let heirs = seen.voters.iter().copied().filter(|node| self.is_open(*node));
            if let Some(to) = heirs.min_by_key(|node| (self.leads(*node), *node)) {
                let step = Step::MoveLeader { shard: *id, from: seen.leader, to };
                self.plan.steps.push(Planned { step, reason: format!("node {} is drained", seen.leader) });
                // Its replicas wait until it is led from where they stay.
                self.is_free.remove(id);
            }
        }
    }

    fn drain(&mut self, id: ShardId) {
        let drained =
            self.wanted[&id].iter().copied().find(|node| self.is_drained(*node) && !self.is_lost(*node));
        let Some(drained) = drained.filter(|_| self.is_free.contains(&id)) else { return };
        let reason = format!("node {drained} is drained");
        if self.wanted[&id].len() <= self.goal(id) {
            match self.pick_instead(id, drained) {
                Some(new) => drop(self.replace(id, drained, new, reason)),
                None => self.plan.waiting.push(format!("shard {id}: {reason}, and no other node is left")),
            }
            return;
        }
        self.take_away(id, drained, reason);
    }

    fn shrink(&mut self, id: ShardId) {
        let (replicas, wanted) = (&self.wanted[&id], self.factor(id));
        if !self.is_free.contains(&id) || replicas.len() <= wanted {
            return;
        }
        let leader = self.load.shards.get(&id).map(|seen| seen.leader);
        let worst = replicas.iter().copied().max_by_key(|node| {
            (
                !self.answers(*node),
                self.zones(&without(replicas, *node)),
                Some(*node) != leader,
                self.replicas_on(*node),
                *node,
            )
        });
        if let Some(worst) = worst {
            self.take_away(id, worst, format!("it has {} of {wanted} replicas", replicas.len()));
        }
    }

    /// Takes a replica away without another one in its place, if the others can do without it.
    fn take_away(&mut self, id: ShardId, node: NodeId, reason: String) {
        let rest = without(&self.wanted[&id], node);
        let answering = rest.iter().filter(|node| self.answers(**node)).count();
        if 2 * answering <= rest.len() {
            self.plan.waiting.push(format!("shard {id}: {reason}, and too few of the other replicas answer"));
            return;
        }
        self.place(id, rest, reason);
    }

    /// Whether a shard has what it wants, so that it is only a matter of taste where.
    fn is_whole(&self, id: ShardId) -> bool {
        let replicas = &self.wanted[&id];
        replicas.len() == self.goal(id)
            && replicas.iter().all(|node| !self.is_lost(*node) && !self.is_drained(*node))
    }

    fn spread(&mut self, id: ShardId) {
        let replicas = &self.wanted[&id];
        if !self.is_free.contains(&id) || !self.is_whole(id) {
            return;
        }
        let Some(new) = self.pick(replicas) else { return };
        let leader = self.load.shards.get(&id).map(|seen| seen.leader);
        let with =
            |old: NodeId| -> BTreeSet<NodeId> { without(replicas, old).into_iter().chain([new]).collect() };
        let old = replicas
            .iter()
            .copied()
            .filter(|old| self.zones(&with(*old)) > self.zones(replicas))
            .max_by_key(|old| (Some(*old) != leader, self.replicas_on(*old), *old));
        if let Some(old) = old {
            let reason =
                format!("two of its replicas are in zone `{}`, none in `{}`", self.zone(old), self.zone(new));
            self.replace(id, old, new, reason);
        }
    }

    fn balance(&mut self) {
        while let Some((id, from, to)) = self.next_balancing() {
            let (more, less) = (self.replicas_on(from), self.replicas_on(to));
            let reason = format!("node {from} holds {more} replicas and node {to} holds {less}");
            if !self.replace(id, from, to, reason) {
                return;
            }
        }
    }

    /// A replica that would be better off elsewhere: the one from the fullest node to the emptiest, of
    /// those that are not busy.
    fn next_balancing(&self) -> Option<(ShardId, NodeId, NodeId)> {
        let mut nodes: Vec<(usize, NodeId)> = self
            .state
            .nodes
            .keys()
            .filter(|node| self.is_open(**node) && !self.busy.contains_key(*node))
            .map(|node| (self.replicas_on(*node), *node))
            .collect();
        nodes.sort_unstable();
        for (more, from) in nodes.iter().rev() {
            for (_, to) in nodes.iter().take_while(|(less, _)| less + 2 <= *more) {
                let found = self.is_free.iter().copied().find(|id| {
                    let replicas = &self.wanted[id];
                    let mut after = without(replicas, *from);
                    after.insert(*to);
                    self.is_whole(*id)
                        && replicas.contains(from)
                        && !replicas.contains(to)
                        && self.zones(&after) >= self.zones(replicas)
                });
                if let Some(id) = found {
                    return Some((id, *from, *to));
                }
            }
        }
        None
    }

    fn leads(&self, node: NodeId) -> usize {
        self.load.shards.values().filter(|seen| seen.leader == node).count()
    }

    fn balance_leaders(&mut self) {
        let is_calm = self.load.calm_for >= self.limits.calm_before_leaders;
        if !is_calm || !self.plan.steps.is_empty() || !self.plan.moving.is_empty() {
            return;
        }
        let better = self.load.shards.iter().find_map(|(id, seen)| {
            let (from, leads) = (seen.leader, self.leads(seen.leader));
            let to = seen.voters.iter().copied().filter(|node| self.is_open(*node));
            let to = to.min_by_key(|node| (self.leads(*node), *node))?;
            (self.leads(to) + 2 <= leads).then_some((*id, from, to))
        });
        if let Some((shard, from, to)) = better {
            let reason = format!(
                "node {from} leads {} shards and node {to} leads {}",
                self.leads(from),
                self.leads(to)
            );
            self.plan.steps.push(Planned { step: Step::MoveLeader { shard, from, to }, reason });
        }
    }
}
