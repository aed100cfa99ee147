//! The replicas of this node: one [`actor::Shard`] actor each, under the [`Shards`] supervisor.
//!
//! The supervisor follows the cluster's state: it opens what this node should hold, and drops
//! what it should not hold any more. A replica that fails is reopened after a pause that grows;
//! the rest of the node goes on. Requests do not pass through these actors: they use the handle
//! that an open replica registers with [`crate::cluster::Cluster`].

mod actor;
mod rebuild;
mod supervisor;

pub(crate) use supervisor::{Shards, ShardsArguments};
