//! Groups that nobody uses keep still: no timers, no heartbeats, no wake-ups.
//!
//! ```text
//!  leader, quiet: "sleep" to every other member ─▶ all agree ─▶ its own timers stop as well
//!  a proposal, a read, any Raft message ─▶ the timers of that replica run again
//!  the leader's node is silent or has restarted ─▶ its groups wake here, and elect
//! ```
//!
//! Many groups and fast failover pull apart when each group has its own heartbeats. So the
//! question whether a leader's node lives is asked once per pair of nodes ([`Groups::keep_watch`]:
//! a beat every [`BEAT`]), and a group whose members all hold the same log stops its timers.
//! Raft's safety does not depend on timers: a replica that sleeps by mistake costs time, never
//! an acknowledged write. Whatever goes wrong with this bookkeeping, a leader wakes every
//! [`LEADER_NAP`] and a follower that was not woken wakes by itself after [`FOLLOWER_NAP`].

use std::collections::{BTreeMap, BTreeSet};
use std::time::{Duration, Instant};

use futures::future::join_all;
use openraft::ServerState;
use openraft::async_runtime::WatchReceiver;
use parking_lot::Mutex;
use serde::{Deserialize, Serialize};
use shoal_proto::NodeId;
use shoal_proto::peer::BeatRequest;

use crate::groups::{Group, Groups};
use crate::network::{Lane, Peers};

/// How often a node asks each other node whether it lives.
pub const BEAT: Duration = Duration::from_millis(100);
/// How long an answer may take.
const BEAT_TIMEOUT: Duration = Duration::from_millis(200);
/// So many beats without an answer, one after the other, and the groups that the node led wake.
const MISSED_BEATS: u32 = 3;
/// How long "sleep" may take to be answered.
const SLEEP_TIMEOUT: Duration = Duration::from_millis(500);
/// The longest that a leader sleeps.
const LEADER_NAP: Duration = Duration::from_secs(120);
/// The longest that a follower sleeps: it has been woken by its leader long before.
const FOLLOWER_NAP: Duration = Duration::from_secs(300);

/// What a leader asks of the other members before it stops its heartbeats.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub(crate) struct Sleep {
    leader: NodeId,
    /// The run of the leader's process: after a restart it knows nothing of groups that sleep.
    boot: u64,
    term: u64,
    /// The last index of the leader's log, which everybody has applied.
    last_index: u64,
}

/// Whether a replica sleeps.
#[derive(Default)]
pub(crate) struct Idle(Mutex<State>);

#[derive(Default)]
struct State {
    /// Counts what keeps the replica awake, so that a step that takes time notices it.
    activity: u64,
    asleep: Option<Nap>,
}

#[derive(Clone, Copy)]
struct Nap {
    leader: NodeId,
    boot: u64,
    since: Instant,
}

/// What is known about the other nodes' processes.
#[derive(Default)]
pub(crate) struct Beats(Mutex<BTreeMap<NodeId, Heard>>);

#[derive(Clone, Copy, Default)]
struct Heard {
    boot: u64,
    missed: u32,
}

impl Beats {
    /// Whether a node's process answered lately and is still the same one.
    fn is_up(&self, node: NodeId, boot: u64) -> bool {
        self.0.lock().get(&node).is_some_and(|heard| heard.boot == boot && heard.missed == 0)
    }

    /// Notes a beat's answer, or that there was none. Returns the run of the process that is
    /// known to be alive, or nothing once it has been silent for too long.
    fn note(&self, node: NodeId, answered: Option<u64>) -> Option<u64> {
        let mut all = self.0.lock();
        let heard = all.entry(node).or_default();
        *heard = match answered {
            Some(boot) => Heard { boot, missed: 0 },
            None => Heard { missed: heard.missed.saturating_add(1), ..*heard },
        };
        (heard.missed < MISSED_BEATS).then_some(heard.boot)
    }
}

impl Groups {
    /// Asks the other nodes whether they live, for as long as the process runs.
    pub async fn keep_watch(&self) {
        loop {
            let started = Instant::now();
            let peers = self.peers();
            let nodes: BTreeSet<NodeId> =
                peers.nodes().into_iter().filter(|node| *node != self.node()).collect();
            let beats = nodes.iter().map(|node| beat(peers, *node));
            let alive: BTreeMap<NodeId, Option<u64>> = nodes
                .iter()
                .zip(join_all(beats).await)
                .map(|(node, answered)| (*node, peers.beats().note(*node, answered)))
                .collect();
            let mut asleep = 0u32;
            for group in self.all() {
                let Some(nap) = group.idle().0.lock().asleep else { continue };
                let is_mine = nap.leader == self.node();
                let leader_is_gone = !is_mine && alive.get(&nap.leader) != Some(&Some(nap.boot));
                let longest = if is_mine { LEADER_NAP } else { FOLLOWER_NAP };
                if leader_is_gone || nap.since.elapsed() > longest {
                    group.wake();
                } else {
                    asleep += 1;
                }
            }
            metrics::gauge!("shoal_raft_groups_asleep").set(asleep);
            tokio::time::sleep(BEAT.saturating_sub(started.elapsed())).await;
        }
    }
}

async fn beat(peers: &Peers, node: NodeId) -> Option<u64> {
    let mut client = peers.client(node, Lane::Fast).ok()?;
    let request = BeatRequest { target: node.0 };
    let answered = tokio::time::timeout(BEAT_TIMEOUT, client.beat(request)).await;
    Some(answered.ok()?.ok()?.into_inner().boot)
}

impl Group {
    /// Lets the timers run, if they do not.
    pub(crate) fn wake(&self) {
        let mut state = self.idle().0.lock();
        state.activity += 1;
        if state.asleep.take().is_some() {
            self.raft().runtime_config().tick(true);
        }
    }

    /// Puts the group to sleep if this node leads it, every member has everything and nothing
    /// happens meanwhile. To be called when the group was quiet for a while.
    pub async fn rest(&self) {
        let seen = {
            let state = self.idle().0.lock();
            if state.asleep.is_some() {
                return;
            }
            state.activity
        };
        let status = self.status();
        let is_settled = status.role == "leader"
            && status.applied == status.last_index
            && status.voters.union(&status.learners).all(|member| {
                *member == self.node() || status.matched.get(member) == Some(&status.last_index)
            });
        if !is_settled {
            return;
        }
        let sleep = Sleep {
            leader: self.node(),
            boot: self.peers().boot(),
            term: status.term,
            last_index: status.last_index,
        };
        let others = status.voters.union(&status.learners).filter(|member| **member != self.node());
        let asked = others.map(|member| self.peers().sleep(self.id(), *member, &sleep, SLEEP_TIMEOUT));
        // Who agreed although another did not is woken by the next heartbeat.
        if join_all(asked).await.into_iter().all(|agreed| agreed) {
            self.sleep_unless_active(seen, &sleep);
        }
    }

    /// A leader's wish that this replica sleeps. Returns whether it does.
    pub(crate) fn agree_to_sleep(&self, sleep: &Sleep) -> bool {
        let seen = self.idle().0.lock().activity;
        let follows = {
            let watch = self.raft().metrics();
            let metrics = watch.borrow_watched();
            matches!(metrics.state, ServerState::Follower | ServerState::Learner)
                && metrics.current_leader == Some(sleep.leader)
                && metrics.current_term == sleep.term
                && metrics.last_log_index == Some(sleep.last_index)
                && metrics.last_applied.is_some_and(|applied| applied.index == sleep.last_index)
        };
        follows
            && self.peers().beats().is_up(sleep.leader, sleep.boot)
            && self.sleep_unless_active(seen, sleep)
    }

    fn sleep_unless_active(&self, seen: u64, sleep: &Sleep) -> bool {
        let mut state = self.idle().0.lock();
        if state.activity != seen {
            return false;
        }
        state.asleep = Some(Nap { leader: sleep.leader, boot: sleep.boot, since: Instant::now() });
        self.raft().runtime_config().tick(false);
        true
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_node_counts_as_gone_after_missed_beats_in_a_row_or_a_restart() {
        let (beats, node) = (Beats::default(), NodeId(2));
        assert!(!beats.is_up(node, 7), "not heard of yet");
        assert_eq!(beats.note(node, Some(7)), Some(7));
        assert!(beats.is_up(node, 7) && !beats.is_up(node, 8));
        for _ in 1..MISSED_BEATS {
            assert_eq!(beats.note(node, None), Some(7));
        }
        assert!(!beats.is_up(node, 7), "nobody is put to sleep under a node that missed a beat");
        assert_eq!(beats.note(node, None), None);
        assert_eq!(beats.note(node, Some(8)), Some(8), "another run of the process");
    }
}
