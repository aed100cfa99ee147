//! Every bound of this crate, with its unit.

use std::time::Duration;

/// The most bytes of proposals in flight on a node; beyond them the edge answers 429.
pub const MAX_PROPOSAL_BYTES_IN_FLIGHT: usize = 256 << 20;
/// The most proposals in flight to one shard through one node.
pub const MAX_PROPOSALS_PER_SHARD: usize = 512;
/// The most reads that run on a node at once; more wait in line.
pub const MAX_READS: usize = 64;
/// The most reads that wait in line; beyond them the edge answers 429.
pub const MAX_READS_WAITING: usize = 2048;
/// The most files that wait for a parser of a node, and the most batches that wait for an embedder.
pub const MAX_WORK_WAITING: usize = 512;
/// The most points in one log entry; a larger upsert is split.
pub const MAX_POINTS_PER_ENTRY: usize = 512;
/// About the most bytes in one log entry; a larger upsert is split.
pub const MAX_ENTRY_BYTES: usize = 1 << 20;
/// The largest message between actors of different nodes, in bytes.
pub const MAX_MESH_BYTES: usize = 256 << 10;
/// The most missing blobs that a replica names when it is asked whether it is whole.
pub const MAX_MISSING_NAMED: usize = 1000;
/// How long an edge waits before it looks for a leader again.
pub const RETRY_PAUSE: Duration = Duration::from_millis(15);
/// How long a replica waits for what a client has seen before it asks whether there is such a thing.
pub const TOKEN_PATIENCE: Duration = Duration::from_millis(500);
/// The least time after which a slow search is asked of a second replica as well.
pub const HEDGE_FLOOR: Duration = Duration::from_millis(30);
/// Bytes of log after which a shard makes a checkpoint, whatever the number of entries.
pub const CHECKPOINT_LOG_BYTES: u64 = 64 << 20;
