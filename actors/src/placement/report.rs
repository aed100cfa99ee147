//! What every node tells of itself, and what becomes of all their reports.

use std::collections::{BTreeMap, BTreeSet};
use std::time::Duration;

use futures::future::join_all;
use serde::{Deserialize, Serialize};
use shoal_proto::{GroupId, NodeId, ShardId};
use shoal_raft::cluster::ClusterState;

use super::plan::{Load, Seen, Unled};
use crate::backup::Job;
use crate::call::{Call, Reply};
use crate::cluster::Cluster;

/// How long a node may take to report.
const REPORT_TIMEOUT: Duration = Duration::from_secs(2);

/// What a node says of itself.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct NodeReport {
    /// The node.
    pub node: NodeId,
    /// The version of its build.
    pub version: String,
    /// Free bytes for its data directory.
    pub disk_free_bytes: u64,
    /// Whether its disk's reserve is kept.
    pub is_writable: bool,
    /// The groups that it has an open replica of.
    pub groups: Vec<GroupReport>,
    /// What it does with a backup, or did last.
    pub job: Option<Job>,
}

/// A group, as one of its members sees it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct GroupReport {
    /// The group.
    pub group: GroupId,
    /// Whether this node leads it, as far as it knows.
    pub is_leader: bool,
    /// The term.
    pub term: u64,
    /// The last applied index.
    pub applied: u64,
    /// The last index of the log.
    pub last_index: u64,
    /// Members that vote; before and after it, in the middle of a change.
    pub voters: BTreeSet<NodeId>,
    /// Members that do not vote (yet).
    pub learners: BTreeSet<NodeId>,
    /// Whether the voters are being changed.
    pub is_joint: bool,
    /// On the leader: how many entries each member is behind.
    pub behind: BTreeMap<NodeId, u64>,
}

impl Cluster {
    /// What this node says of itself.
    pub(crate) fn report(&self) -> NodeReport {
        let groups = self.groups().all().into_iter().map(|group| {
            let status = group.status();
            let behind = status
                .matched
                .iter()
                .map(|(node, matched)| (*node, status.last_index.saturating_sub(*matched)));
            GroupReport {
                group: status.id,
                is_leader: status.role == "leader",
                term: status.term,
                applied: status.applied,
                last_index: status.last_index,
                behind: behind.collect(),
                voters: status.voters,
                learners: status.learners,
                is_joint: status.is_joint,
            }
        });
        NodeReport {
            node: self.node(),
            version: env!("CARGO_PKG_VERSION").to_owned(),
            disk_free_bytes: self.disk_free_bytes(),
            is_writable: self.is_writable(),
            groups: groups.collect(),
            job: self.backup_job(),
        }
    }

    /// The reports of all nodes that answer.
    pub async fn reports(&self) -> BTreeMap<NodeId, NodeReport> {
        let state = self.state();
        let asked = state.nodes.keys().map(|node| async move {
            let call = tokio::time::timeout(REPORT_TIMEOUT, self.call(*node, Call::Report, REPORT_TIMEOUT));
            match call.await {
                Ok(Reply::Reported(report)) => Some((*node, report)),
                _ => None,
            }
        });
        join_all(asked).await.into_iter().flatten().collect()
    }
}

/// The groups by the words of their leaders, with who that is: of two that think so, the one with the
/// higher term.
pub fn led(reports: &BTreeMap<NodeId, NodeReport>) -> BTreeMap<GroupId, (NodeId, &GroupReport)> {
    let mut led: BTreeMap<GroupId, (NodeId, &GroupReport)> = BTreeMap::new();
    for report in reports.values() {
        for group in report.groups.iter().filter(|group| group.is_leader) {
            if led.get(&group.group).is_none_or(|(_, known)| known.term < group.term) {
                led.insert(group.group, (report.node, group));
            }
        }
    }
    led
}

/// What the planner sees in reports, when it is known for how long the others were silent.
pub(crate) fn load(
    state: &ClusterState,
    reports: &BTreeMap<NodeId, NodeReport>,
    silent_for: impl Fn(NodeId) -> Duration,
) -> Load {
    let silent = state.nodes.keys().filter(|node| !reports.contains_key(node));
    let seen = |(id, (leader, group)): (GroupId, (NodeId, &GroupReport))| {
        let (voters, learners) = (group.voters.clone(), group.learners.clone());
        (ShardId(id.0), Seen { leader, voters, learners, is_joint: group.is_joint })
    };
    let led = led(reports);
    let mut unled: BTreeMap<ShardId, Unled> = BTreeMap::new();
    for report in reports.values() {
        for group in report.groups.iter().filter(|group| !led.contains_key(&group.group)) {
            let unled = unled.entry(ShardId(group.group.0)).or_default();
            unled.holders.insert(report.node);
            unled.voters.extend(&group.voters);
            unled.learners.extend(&group.learners);
        }
    }
    Load {
        silent: silent.map(|node| (*node, silent_for(*node))).collect(),
        unled,
        shards: led.into_iter().filter(|(id, _)| *id != GroupId::CONTROL).map(seen).collect(),
        calm_for: Duration::ZERO,
    }
}
