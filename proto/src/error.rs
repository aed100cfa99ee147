//! One list of failures for every surface: who can act, what is wrong, what to do.

use std::fmt;

use serde::{Deserialize, Serialize};

/// What kind of failure this is. Each surface renders a code in the shape its clients expect;
/// a new code cannot ship without a rendering because those matches are exhaustive.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[non_exhaustive]
pub enum ErrorCode {
    /// The caller sent something that cannot be understood or is out of range.
    InvalidArgument,
    /// The caller gave no key, or a wrong one.
    Unauthenticated,
    /// The thing named does not exist.
    NotFound,
    /// The thing to be made exists already, or the state forbids the change.
    Conflict,
    /// The body is larger than the limit.
    TooLarge,
    /// Well formed, but its content cannot be processed (a broken PDF, say).
    Unprocessable,
    /// Too much is in flight; try again after a pause.
    Busy,
    /// No leader, no replica, not ready: nothing was done, try again.
    Unavailable,
    /// The request went out of date on its way (an old shard map): refresh and retry.
    Stale,
    /// A write was proposed but its outcome is not known. Retry with the same request id.
    Unknown,
    /// The disk's reserve is reached; reads and deletes still work.
    DiskFull,
    /// Ours to fix.
    Internal,
}

impl ErrorCode {
    /// The stable name that clients may match on.
    pub fn name(self) -> &'static str {
        match self {
            ErrorCode::InvalidArgument => "invalid_argument",
            ErrorCode::Unauthenticated => "unauthenticated",
            ErrorCode::NotFound => "not_found",
            ErrorCode::Conflict => "conflict",
            ErrorCode::TooLarge => "too_large",
            ErrorCode::Unprocessable => "unprocessable",
            ErrorCode::Busy => "busy",
            ErrorCode::Unavailable => "unavailable",
            ErrorCode::Stale => "stale",
            ErrorCode::Unknown => "outcome_unknown",
            ErrorCode::DiskFull => "disk_full",
            ErrorCode::Internal => "internal",
        }
    }

    /// Whether the failure proves that nothing was done, so that the edge itself may try again.
    pub fn is_retryable(self) -> bool {
        matches!(self, ErrorCode::Unavailable | ErrorCode::Stale)
    }
}

/// A failure as it travels between crates and nodes.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Error {
    /// What kind of failure.
    pub code: ErrorCode,
    /// Lowercase sentence that names the thing.
    pub message: String,
    /// The request field at fault, as a path (`points[3].vector`), when there is one.
    pub field: Option<String>,
}

/// A result with [`Error`].
pub type Result<T, E = Error> = std::result::Result<T, E>;

impl Error {
    /// A failure with a code and a message.
    pub fn new(code: ErrorCode, message: impl fmt::Display) -> Self {
        Error { code, message: message.to_string(), field: None }
    }

    /// An [`ErrorCode::InvalidArgument`] that names the field.
    pub fn invalid(field: impl fmt::Display, message: impl fmt::Display) -> Self {
        let mut error = Error::new(ErrorCode::InvalidArgument, format!("{field}: {message}"));
        error.field = Some(field.to_string());
        error
    }

    /// An [`ErrorCode::NotFound`].
    pub fn not_found(message: impl fmt::Display) -> Self {
        Error::new(ErrorCode::NotFound, message)
    }

    /// An [`ErrorCode::Unavailable`].
    pub fn unavailable(message: impl fmt::Display) -> Self {
        Error::new(ErrorCode::Unavailable, message)
    }

    /// An [`ErrorCode::Internal`].
    pub fn internal(message: impl fmt::Display) -> Self {
        Error::new(ErrorCode::Internal, message)
    }
}

impl fmt::Display for Error {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.message)
    }
}

impl std::error::Error for Error {}

impl From<crate::codec::CodecError> for Error {
    fn from(error: crate::codec::CodecError) -> Self {
        Error::internal(error)
    }
}
