//! What can go wrong inside a shard.

use shoal_proto::ErrorCode;

/// A failure of this crate. A bad command is not one: it gets a rejection as its outcome.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// The store could not be read or written.
    #[error("the shard's store failed: {0}")]
    Store(#[from] sled::Error),
    /// A file could not be read or written.
    #[error("a file of the shard failed: {0}")]
    Io(#[from] std::io::Error),
    /// A stored value fails its checksum or does not decode. It is never served; the replica
    /// has to be rebuilt from another one.
    #[error("stored value {key} is damaged: {reason}")]
    Damaged {
        /// The key, readable.
        key: String,
        /// What is wrong.
        reason: String,
    },
    /// A value passes its checksum and is not understood: it was written by another version. Every
    /// replica would say the same, so nothing is to be rebuilt.
    #[error("{key} is not understood by this version: {reason}")]
    Unreadable {
        /// The key, readable, or the log entry.
        key: String,
        /// What is wrong.
        reason: String,
    },
    /// The vector graph refused.
    #[error("the vector graph failed: {0}")]
    Graph(String),
    /// The text index refused.
    #[error("the text index failed: {0}")]
    Text(#[from] tantivy::TantivyError),
    /// A read asked for something that cannot be.
    #[error(transparent)]
    Refused(#[from] shoal_proto::Error),
}

impl Error {
    /// Whether what is stored here can not be trusted any more.
    pub fn is_damage(&self) -> bool {
        use sled::Error as Sled;
        match self {
            Error::Damaged { .. } => true,
            // Without a number from the system it is sled's own word on what it has read.
            Error::Store(Sled::Io(error)) => {
                let kinds = [std::io::ErrorKind::UnexpectedEof, std::io::ErrorKind::InvalidData];
                error.raw_os_error().is_none() && kinds.contains(&error.kind())
            }
            Error::Store(_) => true,
            Error::Io(_)
            | Error::Unreadable { .. }
            | Error::Graph(_)
            | Error::Text(_)
            | Error::Refused(_) => false,
        }
    }
}

impl From<Error> for shoal_proto::Error {
    fn from(error: Error) -> Self {
        match error {
            Error::Refused(refused) => refused,
            // Another replica can answer, and this one will be made anew.
            error if error.is_damage() => {
                shoal_proto::Error::unavailable(format!("a replica is damaged: {error}"))
            }
            Error::Io(error) | Error::Store(sled::Error::Io(error))
                if error.kind() == std::io::ErrorKind::StorageFull =>
            {
                shoal_proto::Error::new(ErrorCode::DiskFull, "the disk is full")
            }
            error => shoal_proto::Error::new(ErrorCode::Internal, error),
        }
    }
}

impl From<Error> for std::io::Error {
    fn from(error: Error) -> Self {
        match error {
            Error::Io(error) | Error::Store(sled::Error::Io(error)) => error,
            other => std::io::Error::other(other),
        }
    }
}

/// A result with [`Error`].
pub type Result<T, E = Error> = std::result::Result<T, E>;
