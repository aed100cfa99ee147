//! Whole-system tests: real `shoal` processes on loopback, driven from outside over HTTP.
//!
//! ```text
//!  tests/*.rs ─▶ Cluster ─▶ Node (one process, its directory, its ports, its log)
//!      │            └─ views of /admin/cluster: leaders, settled, converged
//!      ├─▶ Provider: embeddings for a node, without a model
//!      ├─▶ Points, Store, Writers ─▶ Client (deadline, retry with one Idempotency-Key) ─▶ Http
//!      ├─▶ cli: the binary's other commands, against a node
//!      └─▶ StatefulSet ─▶ Pod ─▶ Kubelet, Node: as Kubernetes would, by the numbers of k8s/base
//!              └─ Service: one address for clients, and the pods that are ready behind it
//! ```
//!
//! The binary is the one beside the tests: `target/release/shoal` for tests in
//! `target/release/deps`, unless `SHOAL_BIN` names another. Tests of one file run one after
//! another, because each wants the machine. Every wait is for a condition and has a deadline.
//! A test that fails leaves its directory, with data and logs, and says where; so does one that
//! passes when `SHOAL_TEST_KEEP` is set. A test that cannot run prints `skipped: NAME: reason`.
//!
//! 2026: the client speaks HTTP/1.1 by itself. `reqwest` with `rustls-no-provider` panics when a
//! client is built before a TLS provider is installed, even for plain HTTP; installing one for
//! loopback was the alternative. The gain is that "one attempt" is one attempt: no library below
//! repeats a request.

pub mod bench;
pub mod binary;
pub mod cli;
pub mod client;
pub mod cluster;
pub mod component;
pub mod container;
pub mod documents;
pub mod http;
pub mod kubelet;
pub mod manifest;
pub mod node;
pub mod pod;
pub mod points;
pub mod ports;
pub mod provider;
pub mod python;
pub mod searcher;
pub mod service;
pub mod settled;
pub mod shared;
pub mod stateful_set;
pub mod view;
pub mod wait;
pub mod writers;

pub use client::{Client, Request};
pub use cluster::Cluster;
pub use component::Component;
pub use container::Container;
pub use documents::{Store, models};
pub use http::{NotConnected, Reply};
pub use manifest::PodManagement;
pub use node::{Host, KEY, Node};
pub use pod::Stopped;
pub use points::{Freshness, Points, point, vector};
pub use ports::Ports;
pub use provider::{Mood, Provider};
pub use searcher::{Searched, Searcher};
pub use stateful_set::StatefulSet;
pub use wait::{say, skip, wait_until};
pub use writers::{Writers, Written};

/// The value below which a part of the values lies, by nearest rank; the values are in order.
pub fn percentile<T: Copy>(values: &[T], part: f64) -> Option<T> {
    let rank = (values.len() as f64 * part).ceil() as usize;
    values.get(rank.max(1) - 1).or(values.last()).copied()
}
