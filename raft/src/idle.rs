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
//! an acknowledged write. Whatever goes wrong with this bookkeeping, a leader asks again every
//! [`LEADER_NAP`], and a follower that was not asked again wakes after [`FOLLOWER_NAP`].
//!
//! The leases that keep a living leader from being deposed run out while a group sleeps. In their
//! place a sleeping replica refuses pre-votes while its leader's node lives, and a leader that was
//! asleep refuses them for as long as its heartbeats need to renew the leases ([`REGAIN`]).

use std::collections::{BTreeMap, BTreeSet};
use std::time::Duration;

use futures::future::join_all;
use openraft::ServerState;
use openraft::async_runtime::WatchReceiver;
use parking_lot::Mutex;
use serde::{Deserialize, Serialize};
use shoal_proto::{GroupId, NodeId};
use tokio::time::Instant;

use crate::groups::{Group, Groups};
use crate::network::Peers;

/// How often a node asks each other node whether it lives.
pub const BEAT: Duration = Duration::from_millis(100);
/// How long an answer may take.
const BEAT_TIMEOUT: Duration = Duration::from_millis(200);
/// So many beats without an answer, one after the other, and the groups that the node led wake.
const MISSED_BEATS: u32 = 3;
/// How long "sleep" may take to be answered.
const SLEEP_TIMEOUT: Duration = Duration::from_millis(500);
/// After so long a leader asks the others again whether they sleep, and wakes if one does not.
const LEADER_NAP: Duration = Duration::from_secs(10);
/// The longest that a follower sleeps without being asked again.
const FOLLOWER_NAP: Duration = Duration::from_secs(30);
/// How long a leader refuses pre-votes after it woke. Its leases are renewed by the answers to its
/// first heartbeats; without this, a member that started again just then could take its office.
const REGAIN: Duration = Duration::from_millis(500);

/// So soon after a follower has agreed to sleep a heartbeat was sent before it was asked. It wakes nobody: with all
/// followers awake and a leader that sleeps, they would depose it.
const LATE_HEARTBEAT: Duration = Duration::from_millis(200);

/// The longest that a replica waits before it wakes because its leader's node is gone, in
/// milliseconds.
const STAGGER_MS: u64 = 150;

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
    /// When it last woke as the leader.
    regaining: Option<Instant>,
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
    at: Option<Instant>,
}

impl Beats {
    /// Whether a node's process answered lately and is still the same one.
    fn is_up(&self, node: NodeId, boot: u64) -> bool {
        self.0.lock().get(&node).is_some_and(|heard| heard.boot == boot && heard.missed == 0)
    }

    /// Whether a node's process is still the same one, and was not silent for so long that the groups
    /// it leads wake. A single beat that was late on a busy machine must not cost a leader its office.
    fn is_not_gone(&self, node: NodeId, boot: u64) -> bool {
        self.0.lock().get(&node).is_some_and(|heard| heard.boot == boot && heard.missed < MISSED_BEATS)
    }

    /// Whether a node has been silent for so long that the groups it leads wake. Nobody is before the
    /// first beats.
    fn is_silent(&self, node: NodeId) -> bool {
        self.0.lock().get(&node).is_some_and(|heard| heard.missed >= MISSED_BEATS)
    }

    /// When a node was last heard.
    pub(crate) fn heard_at(&self, node: NodeId) -> Option<Instant> {
        self.0.lock().get(&node)?.at
    }

    /// Whether a node answered its last beat.
    fn answers(&self, node: NodeId) -> bool {
        self.0.lock().get(&node).is_some_and(|heard| heard.boot != 0 && heard.missed == 0)
    }

    /// Notes a beat's answer, or that there was none. Returns the run of the process that is
    /// known to be alive, or nothing once it has been silent for too long.
    fn note(&self, node: NodeId, answered: Option<u64>) -> Option<u64> {
        let mut all = self.0.lock();
        let heard = all.entry(node).or_default();
        *heard = match answered {
            Some(boot) => Heard { boot, missed: 0, at: Some(Instant::now()) },
            None => Heard { missed: heard.missed.saturating_add(1), ..*heard },
        };
        (heard.missed < MISSED_BEATS).then_some(heard.boot)
    }
}

impl Groups {
    /// Whether a node has missed several beats in a row: it is asked last for what others know too.
    pub fn is_silent(&self, node: NodeId) -> bool {
        self.peers().beats().is_silent(node)
    }

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
                asleep += 1;
                if is_mine && nap.since.elapsed() > LEADER_NAP {
                    tokio::spawn(async move { group.rest_again().await });
                } else if leader_is_gone || (!is_mine && nap.since.elapsed() > FOLLOWER_NAP) {
                    let pause = stagger(group.id(), self.node());
                    tokio::spawn(async move {
                        tokio::time::sleep(pause).await;
                        group.wake();
                    });
                }
            }
            metrics::gauge!("shoal_raft_groups_asleep").set(asleep);
            self.release_logs();
            self.sweep_snapshots();
            tokio::time::sleep(BEAT.saturating_sub(started.elapsed())).await;
        }
    }
}

/// When a node dies, the members of its groups do not all stand for election at once: their
/// leases have run out together.
fn stagger(group: GroupId, node: NodeId) -> Duration {
    let mixed = (group.0 ^ node.0.rotate_left(32)).wrapping_mul(0x9E37_79B9_7F4A_7C15) >> 32;
    Duration::from_millis(mixed % STAGGER_MS)
}

async fn beat(peers: &Peers, node: NodeId) -> Option<u64> {
    let answered = tokio::time::timeout(BEAT_TIMEOUT, peers.wire().beat(node)).await;
    answered.ok()?.ok()
}

impl Group {
    /// Whether the timers stand still.
    pub(crate) fn is_asleep(&self) -> bool {
        self.idle().0.lock().asleep.is_some()
    }

    /// Lets the timers run, if they do not.
    pub fn wake(&self) {
        let mut state = self.idle().0.lock();
        state.activity += 1;
        let Some(nap) = state.asleep.take() else { return };
        self.raft().runtime_config().tick(true);
        if nap.leader == self.node() {
            state.regaining = Some(Instant::now());
            let raft = self.raft().clone();
            tokio::spawn(async move { raft.trigger().heartbeat().await });
        }
    }

    /// Puts the group to sleep if this node leads it, every member has everything and nothing
    /// happens meanwhile. To be called when the group was quiet for a while.
    pub async fn rest(&self) {
        if !self.is_asleep() {
            self.put_to_sleep().await;
        }
    }

    /// Asks the other members again, while this node sleeps as the leader.
    async fn rest_again(&self) {
        if !self.put_to_sleep().await {
            self.wake();
        }
    }

    async fn put_to_sleep(&self) -> bool {
        let seen = self.idle().0.lock().activity;
        let status = self.status();
        let mut others = status.members();
        others.remove(&self.node());
        let is_settled = status.role == "leader"
            && status.applied == status.last_index
            && others.iter().all(|member| status.matched.get(member) == Some(&status.last_index));
        if !is_settled || !others.iter().all(|member| self.peers().beats().answers(*member)) {
            return false;
        }
        let sleep = Sleep {
            leader: self.node(),
            boot: self.peers().boot(),
            term: status.term,
            last_index: status.last_index,
        };
        let asked = others.iter().map(|member| self.peers().sleep(self.id(), *member, &sleep, SLEEP_TIMEOUT));
        // Who agreed although another did not is woken by the next heartbeat.
        join_all(asked).await.into_iter().all(|agreed| agreed) && self.sleep_unless_active(seen, &sleep)
    }

    /// Whether a wish to stand for election comes too early: this replica sleeps, and its leader
    /// lives as far as is known; or it leads and has only just woken. A leader that hears of it wakes
    /// and makes itself heard; a follower sleeps on, because with its own lease run out it would want
    /// to be elected too.
    pub(crate) fn refuses_pre_vote(&self) -> bool {
        let State { asleep, regaining, .. } = *self.idle().0.lock();
        match asleep {
            Some(nap) if nap.leader == self.node() => {
                self.wake();
                true
            }
            Some(nap) => self.peers().beats().is_not_gone(nap.leader, nap.boot),
            None => regaining.is_some_and(|since| since.elapsed() < REGAIN) && self.is_leader(),
        }
    }

    /// Whether a heartbeat that comes now may be from before this replica fell asleep.
    pub(crate) fn has_just_agreed_to_sleep(&self) -> bool {
        self.idle().0.lock().asleep.is_some_and(|nap| nap.since.elapsed() < LATE_HEARTBEAT)
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
        assert!(!beats.is_silent(node) && !beats.is_silent(NodeId(3)));
        assert_eq!(beats.note(node, None), None);
        assert!(beats.is_silent(node));
        assert_eq!(beats.note(node, Some(8)), Some(8), "another run of the process");
    }
}
