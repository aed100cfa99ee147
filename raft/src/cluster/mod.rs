//! The control group's state: who is in the cluster, and who holds what.
//!
//! [`ClusterState`] is a plain value with a pure [`ClusterState::apply`]: no clock, no
//! randomness, no hash order. It holds no data-plane events and stays small. Every node keeps
//! it in memory, as a voter or a learner of group 0, so routing never asks anybody.

mod abandon;
mod command;
mod placement;
mod reshard;
mod saved;
mod state;
#[cfg(test)]
mod tests;

pub use command::{Addresses, Command, Response};
pub use saved::{read, write};
pub use state::{
    Alias, ClusterState, Collection, Drain, MAX_SHARDS, Node, Origin, Reshard, Restore, Shard, too_old,
};
