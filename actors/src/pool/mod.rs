//! Pools: the parsers and the embedders of a node, and how idle ones help other nodes.
//!
//! ```text
//!  Root
//!  ├─ Pool of parsers   ── joins the group `parsers`
//!  │   └─ Worker × parsers     at most one child process each
//!  └─ Pool of embedders ── joins the group `embedders`
//!      └─ Worker × embedding   one batch each
//!
//!  Do ─▶ Pool ── a worker is free ─▶ Worker ── reply to who asked
//!          │                            └─ Freed ─▶ the next in line
//!          ├─ none is, and it may wait ─▶ in line, if that is not full
//!          └─ else ─▶ refused: another node's pool is tried first ([`crate::work`])
//! ```
//!
//! A pool decides who works and who waits ([`line::Line`], pure); a worker does one piece of work at a
//! time and is its failure boundary: what makes it panic costs the piece of work, and the worker is
//! started again. Whoever asked and has gone away is noticed: their work leaves the line, or is broken
//! off, and its child process is killed.
//!
//! Of the messages of a pool one may leave the node: `GetRoom`, by which a busy node finds an idle
//! one. The work itself then goes to that node as a call, over the mesh or, when it is large, over
//! gRPC; both end here.
//!
//! **2026-11, why not ractor's factory.** It keeps a queue and workers as well. But it does not drop a
//! job whose asker has gone, neither in line nor at work, and it brings failed workers back without a
//! pause. The line here is forty lines and has no clock.

mod actor;
mod line;
mod message;
mod worker;

#[cfg(test)]
mod tests;

pub(crate) use actor::{Pool, PoolArguments};
pub(crate) use message::{Job, Kind, Local, PoolMessage};
