//! What `GET /admin/cluster` says, from the point of view of the node that answers.

use std::collections::BTreeSet;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use serde::Deserialize;

use crate::client::{Client, Request};

/// How long `/admin/cluster` may take.
const VIEW_TIMEOUT: Duration = Duration::from_secs(3);

/// How the cluster looks from the node of a client.
///
/// # Errors
/// When it does not answer.
pub async fn of(client: &Client) -> Result<View> {
    let client = client.clone().with_limits(VIEW_TIMEOUT, VIEW_TIMEOUT);
    let reply = client.once(&Request::get("/admin/cluster")).await?;
    ensure!(reply.is_success(), "/admin/cluster: {} {}", reply.status, reply.text());
    serde_json::from_slice(&reply.body).with_context(|| format!("/admin/cluster: {}", reply.text()))
}

/// The whole answer.
#[derive(Clone, Debug, Deserialize)]
pub struct View {
    /// The node that answers.
    pub node: NamedNode,
    /// The cluster.
    pub cluster_id: String,
    /// The version of the cluster's state that this node knows.
    pub version: u64,
    /// The level that is in force; zero from builds that know no levels.
    #[serde(default)]
    pub level: u64,
    /// All nodes of the cluster.
    pub nodes: Vec<NodeView>,
    /// All collections.
    pub collections: Vec<CollectionView>,
    /// All shards.
    pub shards: Vec<ShardView>,
    /// The groups that the answering node is a member of.
    pub groups: Vec<GroupView>,
}

/// A node's id and name.
#[derive(Clone, Debug, Deserialize)]
pub struct NamedNode {
    /// Given by the cluster.
    pub id: u64,
    /// Given by `--name`.
    pub name: String,
}

/// A node as the cluster knows it.
#[derive(Clone, Debug, Deserialize)]
pub struct NodeView {
    /// Given by the cluster.
    pub id: u64,
    /// Given by `--name`.
    pub name: String,
    /// Where it serves clients.
    pub http: String,
    /// Where it serves peers.
    pub grpc: String,
}

/// A collection.
#[derive(Clone, Debug, Deserialize)]
pub struct CollectionView {
    /// Its name.
    pub name: String,
    /// The ids of its shards.
    pub shards: Vec<u64>,
    /// How many replicas each shard wants.
    pub replication_factor: usize,
    /// Whether it is being put back from a backup: then nobody sees it but here.
    pub is_restoring: bool,
}

/// A shard.
#[derive(Clone, Debug, Deserialize)]
pub struct ShardView {
    /// Its id, which is also that of its group.
    pub id: u64,
    /// Its collection.
    pub collection: String,
    /// The nodes that hold it or are to hold it.
    pub replicas: BTreeSet<u64>,
}

/// A group as the answering node sees it.
#[derive(Clone, Debug, Deserialize)]
pub struct GroupView {
    /// Its id; 0 is the control group.
    pub group: u64,
    /// `leader`, `follower`, `learner`, `candidate` or `stopped`.
    pub role: String,
    /// The node that leads it, as far as this node knows.
    pub leader: Option<u64>,
    /// The term.
    pub term: u64,
    /// The last index in the log here.
    pub last_index: u64,
    /// The last index applied here.
    pub applied: u64,
    /// The index up to which the state here is durable by itself.
    pub checkpoint: u64,
    /// The index up to which the log here was dropped.
    pub purged: u64,
    /// A sum over the state of a shard after some index; replicas have the same at the same index.
    pub state_sum: Option<StateSum>,
    /// The members that vote.
    pub voters: BTreeSet<u64>,
    /// The members that only follow.
    pub learners: BTreeSet<u64>,
}

/// A sum over everything that a replica has stored.
#[derive(Clone, Debug, Deserialize, PartialEq, Eq)]
pub struct StateSum {
    /// The log index after which it was taken.
    pub index: u64,
    /// The sum, in hexadecimal digits.
    pub sum: String,
}

impl GroupView {
    /// Whether the answering node leads it.
    pub fn is_leader(&self) -> bool {
        self.role == "leader"
    }
}

impl View {
    /// A group, when the answering node is a member.
    pub fn group(&self, id: u64) -> Option<&GroupView> {
        self.groups.iter().find(|group| group.group == id)
    }

    /// A collection.
    pub fn collection(&self, name: &str) -> Option<&CollectionView> {
        self.collections.iter().find(|collection| collection.name == name)
    }
}
