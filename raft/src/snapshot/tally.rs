//! What tells one snapshot from another: a digest over where it ends and all its pieces.

use serde::{Deserialize, Serialize};
use shoal_proto::GroupId;

/// Which snapshot it is. Two that are equal end at the same entry and consist of the same pieces.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct SnapshotId {
    /// BLAKE3 over the position and the pieces.
    pub(crate) digest: [u8; 32],
    /// How many pieces it has.
    pub(crate) pieces: u64,
    /// Bytes of all pieces together.
    pub(crate) bytes: u64,
}

impl SnapshotId {
    /// The beginning of the names of all files of a group.
    pub(crate) fn prefix(group: GroupId) -> String {
        format!("{:016x}-", group.0)
    }

    /// The name of a file that belongs to this snapshot alone, without an ending.
    pub(crate) fn name(&self, group: GroupId) -> String {
        format!("{}{}", SnapshotId::prefix(group), blake3::Hash::from(self.digest).to_hex())
    }
}

/// What was seen of a snapshot so far.
#[derive(Clone)]
pub(crate) struct Tally {
    hasher: blake3::Hasher,
    pieces: u64,
    bytes: u64,
}

impl Tally {
    /// Nothing yet of a snapshot that ends there.
    pub(crate) fn of(position: &[u8]) -> Tally {
        let mut tally = Tally { hasher: blake3::Hasher::new(), pieces: 0, bytes: 0 };
        tally.hash(position);
        tally
    }

    fn hash(&mut self, part: &[u8]) {
        self.hasher.update(&(part.len() as u64).to_le_bytes());
        self.hasher.update(part);
    }

    /// Adds the next piece.
    pub(crate) fn take(&mut self, piece: &[u8]) {
        self.hash(piece);
        self.pieces += 1;
        self.bytes += piece.len() as u64;
    }

    /// Whether a snapshot that was promised can go on with this piece.
    pub(crate) fn may_take(&self, piece: &[u8], promised: &SnapshotId) -> bool {
        self.pieces < promised.pieces && self.bytes + piece.len() as u64 <= promised.bytes
    }

    /// How many pieces were seen.
    pub(crate) fn pieces(&self) -> u64 {
        self.pieces
    }

    /// Bytes of the pieces that were seen.
    pub(crate) fn bytes(&self) -> u64 {
        self.bytes
    }

    /// The snapshot that consists of what was seen.
    pub(crate) fn id(&self) -> SnapshotId {
        let digest = *self.hasher.finalize().as_bytes();
        SnapshotId { digest, pieces: self.pieces, bytes: self.bytes }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn id_of(position: &[u8], pieces: &[&[u8]]) -> SnapshotId {
        let mut tally = Tally::of(position);
        pieces.iter().for_each(|piece| tally.take(piece));
        tally.id()
    }

    #[test]
    fn position_order_and_bounds_of_pieces_count() {
        let whole = id_of(b"at 7", &[b"ab", b"c"]);
        assert_eq!(whole, id_of(b"at 7", &[b"ab", b"c"]));
        assert_eq!((whole.pieces, whole.bytes), (2, 3));
        for other in [
            id_of(b"at 8", &[b"ab", b"c"]),
            id_of(b"at 7", &[b"c", b"ab"]),
            id_of(b"at 7", &[b"a", b"bc"]),
            id_of(b"at 7", &[b"abc"]),
            id_of(b"at 7", &[]),
        ] {
            assert_ne!(whole.digest, other.digest);
        }
    }

    #[test]
    fn no_more_is_taken_than_was_promised() {
        let promised = id_of(b"", &[b"ab", b"c"]);
        let mut tally = Tally::of(b"");
        assert!(tally.may_take(b"ab", &promised) && !tally.may_take(b"abcd", &promised));
        tally.take(b"ab");
        assert!(tally.may_take(b"c", &promised));
        tally.take(b"c");
        assert!(!tally.may_take(b"", &promised));
    }
}
