//! What nodes ask of each other about a group, besides Raft itself. One enum, versioned by the
//! codec; the same bytes travel over the actor mesh (small) and over gRPC (any size). A node of an earlier build
//! refuses what it does not know, and fails to read what has grown: what is new is a new variant, asked only when
//! its level is in force ([`shoal_proto::level`]).

use bytes::Bytes;
use serde::{Deserialize, Serialize};
use shoal_engine::command::{Answer, Read};
use shoal_proto::{BlobHash, Error, GroupId, Level, NodeId};

use crate::embed::TextKind;
use crate::parse::Parsed;
use crate::placement::{NodeReport, Plan};

/// How fresh a read must be.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub enum Consistency {
    /// Sees every write that was acknowledged before the read began.
    #[default]
    Linearizable,
    /// Sees what the client's position token has seen.
    Session,
    /// Whatever the replica has.
    Eventual,
}

/// A question or an order to another node.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub(crate) enum Call {
    /// Propose a command, if you lead the group.
    Propose {
        /// The group.
        group: GroupId,
        /// The command.
        command: Bytes,
        /// Whether it takes more disk space: refused where the disk's reserve is reached.
        grows: bool,
        /// How long the caller waits, in milliseconds.
        timeout_ms: u64,
    },
    /// Tell the read index, if you lead the group.
    ReadIndex {
        /// The group.
        group: GroupId,
    },
    /// Answer a question from your replica.
    Read {
        /// The shard's group.
        group: GroupId,
        /// How fresh.
        level: Consistency,
        /// The index that must be applied in any case.
        floor: u64,
        /// How long the caller waits, in milliseconds.
        timeout_ms: u64,
        /// The question.
        question: Read,
    },
    /// Tell the latest sums over the state of your replica.
    StateSums {
        /// The shard's group.
        group: GroupId,
    },
    /// Parse a file, if you have room.
    Parse {
        /// Its name, which tells the format.
        filename: String,
        /// Its bytes.
        bytes: Bytes,
    },
    /// Embed texts, if you have room and the model.
    Embed {
        /// The model's name.
        model: String,
        /// What the texts are.
        kind: TextKind,
        /// The texts.
        texts: Vec<String>,
    },
    /// Say what there is on your node.
    Report,
    /// Say what placement would do, if your node leads the control group.
    Plan,
    /// Hand a group that you lead over to another of its members.
    TransferLeader {
        /// The group.
        group: GroupId,
        /// Who is to lead it.
        to: NodeId,
    },
    /// Name the blobs that your replica names and does not have.
    MissingBlobs {
        /// The shard's group.
        group: GroupId,
        /// The index that must be applied.
        least: u64,
    },
    /// Tell the commands that your replica has applied after an index.
    Tail {
        /// The shard's group.
        group: GroupId,
        /// The index.
        after: u64,
        /// About how many bytes, at most.
        limit_bytes: u64,
    },
    /// Promise that only builds that know a level will open your data directory. Asked of nodes that know it.
    PromiseLevel {
        /// The level.
        level: Level,
    },
}

/// What came back.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub(crate) enum Reply {
    /// Applied at this index, with this outcome.
    Proposed(u64, Bytes),
    /// The read index.
    Index(u64),
    /// The answer, the index that was applied when it was made, and for an eventual read about how
    /// many milliseconds old it may be, if that is known.
    Answered(u64, Answer, Option<u64>),
    /// Log indexes, each with the sum over the state after it.
    StateSums(Vec<(u64, u64)>),
    /// What the parser made of the file.
    Parsed(Parsed),
    /// One vector per text.
    Embedded(Vec<Vec<f32>>),
    /// What there is.
    Reported(NodeReport),
    /// What placement would do.
    Planned(Plan),
    /// These, and none else.
    Missing(Vec<BlobHash>),
    /// Done, nothing to tell.
    Done,
    /// Nothing was done: somebody else leads.
    NotLeader(Option<NodeId>),
    /// The answer is too large for the mesh; ask again over gRPC.
    UseGrpc,
    /// It failed.
    Failed(Error),
    /// Commands in their order, with their log indexes, and the last index that was applied; none for
    /// entries that are Raft's own.
    Tail(Vec<(u64, Option<Bytes>)>, u64),
}
