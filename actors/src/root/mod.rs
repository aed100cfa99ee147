//! The root of the supervision tree, and the order in which a node comes up and goes down.
//!
//! ```text
//!  up:   identity ─▶ cluster found ─▶ log ─▶ control group ─▶ peers served ─▶ Root and its children
//!  down: leadership handed over ─▶ children stopped ─▶ groups closed, derived files saved
//! ```

mod actor;
mod start;

pub use start::{NodeConfig, Running, start};
