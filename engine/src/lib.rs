//! What a shard holds: points, payloads, vectors, text and documents, with search over them.
//!
//! A synchronous library: no tasks, sockets, clocks, Raft or actors. It is driven by log
//! entries ([`Shard::apply`]) and questions ([`Shard::read`]); both carry plain values.
//!
//! ```text
//!            apply(entry)                     read(question)
//!                 │                                 │
//!        ┌────────▼─────────┐              ┌────────▼─────────┐
//!        │ state (write)    │              │ state (read)     │
//!        └────────┬─────────┘              └─┬──────┬──────┬──┘
//!   one batch     │     then at once         │      │      │
//!        ┌────────▼──┐  ┌───────────┐  ┌─────▼──┐ ┌─▼────┐ ┌▼────────┐
//!        │ store     │  │ derived ──┼─▶│vectors │ │ text │ │ payload │
//!        │ (truth)   │  └───────────┘  └────────┘ └──────┘ └─────────┘
//!        └───────────┘
//! ```
//!
//! | module | what |
//! |---|---|
//! | [`shard`] | the replica: generations, apply, checkpoint, export, install |
//! | [`command`] | commands, questions and answers |
//! | [`store`] | checked values on sled, durable checkpoints, consistent exports |
//! | [`vectors`] | usearch graphs and the exact scan of what they have not taken in |
//! | [`text`] | tantivy, jieba and the scan of the tail |
//! | [`payload`] | payload indexes |
//! | [`files`] | files that are replaced durably |
//! | [`backup`] | what is kept of a shard elsewhere, and how it is read again |
//! | [`read`] | the planner and everything that answers |
//! | [`reshard`] | what a shard takes over from others |
//! | [`state`], [`documents`] | transitions |

pub mod backup;
pub mod command;
pub mod distance;
mod documents;
mod error;
pub mod files;
mod frames;
mod keys;
pub mod payload;
pub mod read;
pub mod reshard;
mod rows;
pub mod shard;
pub mod state;
pub mod store;
pub mod text;
pub mod vectors;

pub use error::{Error, Result};
pub use shard::{Entry, Shard};
pub use state::{check_point, check_vector};
