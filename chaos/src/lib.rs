//! Does it hold: a real cluster, hurt on purpose, and a judgement of what it promised.
//!
//! ```text
//!  scenario ─▶ run: cluster ◀── faults        history ─▶ checkers ─▶ verdicts ─▶ report
//!                      ▲  └─ monitor ──────────▶ ▲
//!                      └──── workload ───────────┘
//! ```
//!
//! | module | what |
//! |---|---|
//! | [`scenario`] | what to run: a row of the matrix, in a small and a large size |
//! | [`cluster`], [`faults`], [`disk`] | real nodes, and what can be done to them |
//! | [`faults::reshard`] | shards that are split and merged meanwhile |
//! | [`faults::backup`], [`restore`] | backups that are made meanwhile, and what is put back of them |
//! | [`backend`] | what nodes run as: processes, or containers of a Docker Engine |
//! | [`workloads`], [`caller`] | clients, and how an answer is classified |
//! | [`history`] | the record of a run |
//! | [`checkers`] | pure functions from a history to a verdict |
//! | [`shrink`](mod@shrink) | the smallest part of a history that is still invalid |
//! | [`run`](mod@run), [`report`] | one run from start to verdict; what people read |
//! | [`doctor`] | which faults this machine can do |
//!
//! A run touches only what it has made itself: processes, namespaces, mounts, containers and folders.
//! A scenario whose faults this machine or the backend cannot do is reported as skipped, with the
//! reason, and never as passed. A seed repeats the schedule of faults and what clients ask, not the
//! timing of threads; the history is the record.

pub mod backend;
pub mod caller;
pub mod checkers;
pub mod cluster;
pub mod disk;
pub mod doctor;
pub mod faults;
pub mod history;
pub mod report;
pub mod restore;
pub mod run;
pub mod scenario;
mod shell;
pub mod shrink;
pub mod workloads;
