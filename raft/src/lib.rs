//! What Shoal has agreed: many Raft groups in one process.
//!
//! ```text
//!        propose, read index            ┌────────────┐  append, vote   ┌────────┐
//!  caller ─────────────────▶ Group ───▶ │  openraft  │ ──────────────▶ │ Peers  │ ─▶ other nodes
//!                                       │ (one core  │                 └────────┘
//!            StateMachine ◀── apply ─── │  a group)  │ ─▶ GroupLog ─▶ LogStore (one log, one fsync)
//!                                       └────────────┘
//! ```
//!
//! | module | what |
//! |---|---|
//! | [`log`] | one durable, group-committed log for all groups of a node |
//! | [`machine`] | the trait that a group's state implements |
//! | [`network`] | one channel per peer for all groups |
//! | [`groups`] | opening, finding, serving and closing groups |
//! | `snapshot` | snapshots on their way: what has come once is not sent again, and at a limited pace |
//! | [`idle`] | groups that nobody uses keep still |
//! | [`cluster`] | the control group's state: a plain value with a pure `apply` |
//!
//! Nothing here knows documents, vectors or HTTP. openraft's generics are instantiated in this
//! crate only, with one type configuration for all groups.
//!
//! **2026-11, addresses outside the membership.** openraft can carry a node's address in the
//! membership. A pod's address changes at every restart, and a membership change needs a quorum
//! that may not be reachable until addresses are right. So memberships hold ids only, and
//! [`network::Peers`] maps ids to addresses from the control group's state and from greetings.

pub mod cluster;
mod error;
pub mod groups;
pub mod idle;
pub mod log;
pub mod machine;
mod membership;
pub mod network;
mod runtime;
#[cfg(test)]
mod simulation;
mod snapshot;
mod staleness;
mod types;

pub use error::Error;
pub use groups::{Group, GroupStatus, Groups, RaftConfig};
pub use log::{LogConfig, LogStore};
pub use machine::{Committed, Export, ReceivedFile, StateMachine};
pub use network::{Client, Lane, Peers};
pub use snapshot::Throttle;
