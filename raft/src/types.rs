//! The one openraft type configuration, shared by all groups.

use std::fmt;

use bytes::Bytes;
use serde::{Deserialize, Serialize};
use shoal_proto::NodeId;

/// A command as the log sees it: opaque bytes that one state machine understands.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Payload(pub Bytes);

impl fmt::Display for Payload {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} bytes", self.0.len())
    }
}

/// What a state machine answered to a command: opaque bytes.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Reply(pub Bytes);

openraft::declare_raft_types!(
    /// One configuration for every group: a command and its answer are opaque bytes, and
    /// addresses are not part of a membership (they may change at every restart).
    pub TypeConfig:
        D = Payload,
        R = Reply,
        NodeId = NodeId,
        Node = openraft::EmptyNode,
        Term = u64,
        LeaderId = openraft::impls::leader_id_std::LeaderId<u64, NodeId>,
        AsyncRuntime = crate::runtime::Runtime,
);

pub(crate) use openraft::type_config::alias::{
    EntryOf, LogIdOf, SnapshotMetaOf, SnapshotOf, StoredMembershipOf, VoteOf,
};
