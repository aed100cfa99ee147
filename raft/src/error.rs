//! What can go wrong between a proposal and its answer.

use shoal_proto::{ErrorCode, GroupId, NodeId};

/// A failure of this crate.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// This node has no replica of the group.
    #[error("group {0} has no replica on this node")]
    UnknownGroup(GroupId),
    /// Nothing was proposed: another node leads, or none does at the moment.
    #[error("this node does not lead group {group}")]
    NotLeader {
        /// The group.
        group: GroupId,
        /// Who leads, when that is known.
        leader: Option<NodeId>,
    },
    /// The proposal may be applied now, later or never.
    #[error("the outcome of a write to group {0} is not known; retry it with the same request id")]
    OutcomeUnknown(GroupId),
    /// No quorum answered, or the replica did not get there in time. Nothing was proposed.
    #[error("group {group} did not answer in time: {reason}")]
    Timeout {
        /// The group.
        group: GroupId,
        /// What was waited for.
        reason: String,
    },
    /// The group has stopped on this node: its storage failed, or it is shutting down.
    #[error("group {group} has stopped on this node: {reason}")]
    Stopped {
        /// The group.
        group: GroupId,
        /// Why.
        reason: String,
    },
    /// A peer sent something that is not a Raft message.
    #[error("a peer's message could not be read: {0}")]
    BadMessage(String),
    /// A change of membership was refused.
    #[error("the membership of group {group} cannot be changed now: {reason}")]
    Membership {
        /// The group.
        group: GroupId,
        /// Why.
        reason: String,
    },
}

impl Error {
    /// The kind of failure, for the edges.
    pub fn code(&self) -> ErrorCode {
        match self {
            Error::NotLeader { .. }
            | Error::Timeout { .. }
            | Error::UnknownGroup(_)
            | Error::Stopped { .. } => ErrorCode::Unavailable,
            Error::OutcomeUnknown(_) => ErrorCode::Unknown,
            Error::BadMessage(_) => ErrorCode::InvalidArgument,
            Error::Membership { .. } => ErrorCode::Conflict,
        }
    }
}

impl From<Error> for shoal_proto::Error {
    fn from(error: Error) -> Self {
        shoal_proto::Error::new(error.code(), error)
    }
}
