//! The byte codec: everything that is stored or sent in binary starts with a version byte.
//!
//! This file is the only one that names bincode (1.3.3: fixed-width integers would waste space,
//! so variable-length ones are used; trailing bytes are refused). A shape that changes gets a
//! new version number and keeps a way to read the old one.

use bincode::Options;
use serde::Serialize;
use serde::de::DeserializeOwned;

/// The largest encoded value that is accepted, in bytes. Larger things travel as streams.
pub const MAX_ENCODED_BYTES: u64 = 64 << 20;

/// The version that [`encode`] writes.
pub const VERSION: u8 = 1;

/// Why bytes could not be read.
#[derive(Debug, thiserror::Error)]
pub enum CodecError {
    /// There was no version byte.
    #[error("no bytes to decode")]
    Empty,
    /// The bytes were written by a version that this one does not know.
    #[error("unknown format version {0}; this build reads version {VERSION}")]
    UnknownVersion(u8),
    /// The bytes do not decode to the expected shape.
    #[error("bytes do not decode: {0}")]
    Malformed(#[from] bincode::Error),
}

fn options() -> impl Options {
    bincode::options().with_limit(MAX_ENCODED_BYTES)
}

/// Encodes a value behind the version byte.
///
/// # Panics
/// When the value is larger than [`MAX_ENCODED_BYTES`] or does not support a binary format:
/// both are programming errors, since limits are enforced where values are made.
pub fn encode<T: Serialize>(value: &T) -> Vec<u8> {
    let mut bytes = vec![VERSION];
    options().serialize_into(&mut bytes, value).expect("values are bounded where they are made");
    bytes
}

/// How many bytes [`encode`] would write, without writing them.
///
/// # Panics
/// As [`encode`].
pub fn encoded_len<T: Serialize>(value: &T) -> usize {
    let body = options().serialized_size(value).expect("values are bounded where they are made");
    body as usize + 1
}

/// Decodes what [`encode`] wrote. Bytes may come from a peer or a damaged disk: nothing in
/// them is trusted, and no more than [`MAX_ENCODED_BYTES`] is ever allocated.
pub fn decode<T: DeserializeOwned>(bytes: &[u8]) -> Result<T, CodecError> {
    match bytes.split_first() {
        None => Err(CodecError::Empty),
        Some((&VERSION, body)) => Ok(options().deserialize(body)?),
        Some((&version, _)) => Err(CodecError::UnknownVersion(version)),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn round_trip_and_refusals() {
        let bytes = encode(&(7u64, "seven".to_owned()));
        assert_eq!(encoded_len(&(7u64, "seven".to_owned())), bytes.len());
        assert_eq!(bytes, [1, 7, 5, b's', b'e', b'v', b'e', b'n'], "the saved format of version 1");
        assert_eq!(decode::<(u64, String)>(&bytes).expect("decodes"), (7, "seven".to_owned()));
        assert!(matches!(decode::<u64>(&[]), Err(CodecError::Empty)));
        assert!(matches!(decode::<u64>(&[9, 1]), Err(CodecError::UnknownVersion(9))));
        assert!(matches!(decode::<u64>(&bytes), Err(CodecError::Malformed(_))), "trailing bytes");
        let huge_length = [1, 253, 255, 255, 255, 255, 255, 255, 255, 127];
        assert!(matches!(decode::<Vec<u64>>(&huge_length), Err(CodecError::Malformed(_))));
    }
}
