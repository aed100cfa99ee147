//! Who does the work: the supervision tree of a node, and its handle on the cluster.
//!
//! ```text
//! Root
//! ├─ Mesh        sessions to every member over ractor_cluster
//! ├─ Server      serves other nodes' calls; member of the group `node-<id>`
//! ├─ Pool        of parsers; member of the group `parsers`
//! │   └─ Worker    one parse, in a child process
//! ├─ Pool        of embedders; member of the group `embedders`
//! │   └─ Worker    one batch
//! ├─ Shards      one Shard actor per replica: opens engine and group, tends them
//! ├─ Ingests     drives the documents of the shards that this node leads
//! ├─ Placement   acts only where the control group's leader is
//! └─ Reshards    splits and merges shards, there too
//! ```
//!
//! Requests do not pass through mailboxes: [`Cluster`] routes, writes and reads with handles
//! that the actors register, bounded by the numbers in [`limits`]. Actors hold what has state
//! of its own and may fail by itself.
//!
//! | module | what |
//! |---|---|
//! | [`cluster`] | routing, writing, reading |
//! | [`search`] | fan-out, merge, fusion |
//! | [`bootstrap`] | how a node comes to belong to a cluster |
//! | [`blobs`] | original bytes, content-addressed and replicated beside the log |
//! | [`parse`], [`embed`], [`work`] | files to text, text to vectors, here or on an idle node |
//! | [`placement`] | who holds what: planned, carried out, ordered by hand |
//! | [`progress`] | why something moves, and how far it is |
//! | [`backup`] | everything to a directory or to S3, and back; collections as single files |
//! | [`routing`] | writes and reads that follow the shard map |
//! | [`reshard`] | splitting and merging shards while they are used |
//! | [`levels`] | nodes of different builds in one cluster, and what waits until they are the same |
//! | [`tls`] | encryption between nodes |
//! | [`root`] | start and stop |
//!
//! **2026-11, one Ingests actor a node.** The design names one ingest actor per led shard. The
//! work itself is one task per document, bounded per node; a second level of actors would only
//! have held a timer each. One actor looks at all led shards.
//!
//! **2026-11, snapshots of collections are backups.** Qdrant's API wants one file a snapshot. It is packed from
//! the target's objects whenever it is downloaded, instead of being kept as a file: so snapshots share what
//! they have in common with backups and with each other, need no room on the node that makes them, and what a
//! crash leaves is swept as with backups. The cost is a second reading when one is made, for its checksum,
//! and an archive whose bytes may never change for the same objects. Without a target there are none: one
//! node alone could keep them in its data directory, but the next node that joins would list others.

pub mod backup;
pub mod blobs;
pub mod bootstrap;
mod call;
pub mod cluster;
mod control;
pub mod embed;
mod entries;
mod ingest;
mod latencies;
pub mod levels;
pub mod limits;
mod mesh;
mod namesake;
pub mod parse;
pub mod placement;
mod pool;
pub mod progress;
mod replica;
pub mod reshard;
mod restarts;
pub mod root;
pub mod routing;
mod scratch;
pub mod search;
pub mod service;
mod shards;
mod sweep;
pub mod tls;
mod turns;
pub mod work;

pub use call::Consistency;
pub use cluster::{Cluster, LocalShard, ReadOptions};
pub use root::{NodeConfig, Running, start};

/// The built-in collection of `/v1/files`.
pub const FILES_COLLECTION: &str = "_files";
/// The exit code of a node of which a part failed again and again without which it is of no use.
pub const EXIT_PART_FAILED: i32 = 70;
/// The exit code of a node that was removed from its cluster.
pub const EXIT_REMOVED: i32 = 76;
/// The exit code of a node whose build does not know the level that is in force, as of any that cannot start.
pub const EXIT_TOO_OLD: i32 = 1;
