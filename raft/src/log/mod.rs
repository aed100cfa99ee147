//! One durable log for all groups of a node.
//!
//! ```text
//!  group 0 ── append ─┐                                   ┌─▶ callbacks of every append
//!  group 7 ── append ─┼─▶ queue ─▶ writer thread ─▶ write ┤   in the batch, in order
//!  group 9 ── vote ───┘           one batch, one fdatasync└─▶ waiters of votes, truncations
//! ```
//!
//! - **Group commit**: whatever arrives while an fsync runs goes out with the next one.
//! - **One order**: votes, appends, truncations and purges of all groups go through one queue
//!   to one thread, so a later record is never durable before an earlier one. openraft needs
//!   that for votes: once a vote is saved, everything appended before it counts as durable.
//! - **Fail closed**: a failed write or fsync is never retried and nothing after it is
//!   acknowledged: the process stops with exit code [`EXIT_LOG_FAILED`].
//!
//! - **Damage is not a torn end**: a batch carries its number, and a log that ends before the
//!   last one that was synced (see `mark`) is refused: a node that has lost what it acknowledged
//!   must not vote.
//!
//! The records are in `raft-engine` (TiKV's log for many groups). Three facts about 0.4.2 shape
//! this module: an fsync error inside a write *group* is reported as success to its followers,
//! so there is only ever one writer; its block cache is per thread and does not know which
//! engine it serves, so one thread does all reads as well; and it cannot cut off a log's tail,
//! so a truncation is a durable `tail` record that the next append removes.

mod files;
mod group;
mod mark;
#[cfg(test)]
mod model;
pub(crate) mod record;
#[cfg(test)]
mod tests;
pub(crate) mod writer;

pub use files::{EXIT_LOG_FAILED, LogConfig};
pub use group::GroupLog;
pub use writer::LogStore;
