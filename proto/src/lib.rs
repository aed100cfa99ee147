//! What Shoal says: ids, error codes, stored and sent shapes, the byte codec.
//!
//! This crate holds no sockets, tasks, clocks or decisions. Everything that two other crates
//! must agree about is here, and nothing else:
//!
//! | module | what |
//! |---|---|
//! | [`ids`] | newtypes for nodes, groups, shards, points and documents |
//! | [`error`] | [`ErrorCode`] and [`Error`]: one list of failures for every surface |
//! | [`codec`] | versioned binary encoding; the only place that names bincode |
//! | [`collection`] | schema of a collection: vectors, text fields, payload indexes, embedder |
//! | [`filter`] | payload filters: parsed from JSON with limits, evaluated by the engine |
//! | [`level`] | what nodes of different builds may write and say to each other |
//! | [`position`] | shard positions and the token that carries them |
//! | [`peer`], [`parser`] | code generated from `proto/*.proto` |

pub mod codec;
pub mod collection;
pub mod error;
pub mod filter;
pub mod ids;
pub mod level;
pub mod planted;
pub mod position;

/// Messages between the nodes of a cluster, generated from `proto/peer.proto`.
#[allow(missing_docs, clippy::all)]
pub mod peer {
    tonic::include_proto!("shoal.peer.v1");
}

/// The parser service for clients, generated from `proto/parser.proto`.
#[allow(missing_docs, clippy::all)]
pub mod parser {
    tonic::include_proto!("shoal.parser.v1");
}

pub use collection::{
    ChunkerConfig, CollectionConfig, Distance, EmbedderConfig, FieldType, GraphType, VectorParams,
};
pub use error::{Error, ErrorCode, Result};
pub use filter::Filter;
pub use ids::{BlobHash, DocumentId, GroupId, NodeId, PointId, RequestId, Route, ShardId};
pub use level::Level;
pub use position::Position;
