//! How entries and the small per-group records are laid out in raft-engine.

use std::io;

use protobuf::well_known_types::BytesValue;
use raft_engine::MessageExt;
use serde::Serialize;
use serde::de::DeserializeOwned;
use shoal_proto::codec;

/// The key of a group's vote.
pub(crate) const VOTE: &[u8] = b"vote";
/// The key of the log id up to which a group's log is purged.
pub(crate) const PURGED: &[u8] = b"purged";
/// The key of the last committed log id that the group wrote down.
pub(crate) const COMMITTED: &[u8] = b"committed";
/// The key of a truncation: the last index that counts, until the next append removes it.
pub(crate) const TAIL: &[u8] = b"tail";

/// The key of the last log id that this node had when the group let it go.
pub(crate) const LEFT: &[u8] = b"left";

/// The group under which the number of the last batch is kept. No group has this id.
pub(super) const BATCHES: u64 = u64::MAX;
/// The key of that number.
pub(super) const SEQUENCE: &[u8] = b"sequence";

/// An entry for raft-engine: eight bytes of index, four of checksum, then the encoded entry.
/// The checksum covers group and index too, so that a misplaced entry cannot pass for another.
#[derive(Clone)]
pub(super) struct Record;

const HEAD: usize = 12;

impl MessageExt for Record {
    type Entry = BytesValue;

    fn index(entry: &BytesValue) -> u64 {
        u64::from_le_bytes(entry.value[..8].try_into().expect("a record starts with its index"))
    }
}

pub(super) fn wrap(group: u64, index: u64, body: &[u8]) -> BytesValue {
    let mut value = Vec::with_capacity(HEAD + body.len());
    value.extend_from_slice(&index.to_le_bytes());
    value.extend_from_slice(&checksum(group, index, body).to_le_bytes());
    value.extend_from_slice(body);
    BytesValue { value, ..BytesValue::default() }
}

pub(super) fn unwrap(group: u64, entry: &BytesValue) -> io::Result<&[u8]> {
    let (head, body) = entry.value.split_at_checked(HEAD).ok_or_else(|| damaged(group, "short"))?;
    let stored = u32::from_le_bytes(head[8..].try_into().expect("four bytes"));
    if stored != checksum(group, Record::index(entry), body) {
        return Err(damaged(group, "wrong checksum"));
    }
    Ok(body)
}

fn checksum(group: u64, index: u64, body: &[u8]) -> u32 {
    let mut hasher = crc32fast::Hasher::new();
    hasher.update(&group.to_le_bytes());
    hasher.update(&index.to_le_bytes());
    hasher.update(body);
    hasher.finalize()
}

fn damaged(group: u64, what: &str) -> io::Error {
    io::Error::new(io::ErrorKind::InvalidData, format!("log entry of group {group} is damaged: {what}"))
}

pub(super) fn to_bytes<T: Serialize>(value: &T) -> Vec<u8> {
    codec::encode(value)
}

pub(super) fn from_bytes<T: DeserializeOwned>(bytes: &[u8]) -> io::Result<T> {
    codec::decode(bytes).map_err(|error| io::Error::new(io::ErrorKind::InvalidData, error))
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;
    use std::fmt::Debug;

    use bytes::Bytes;
    use openraft::{Entry, EntryPayload, Membership};
    use shoal_proto::NodeId;

    use super::*;
    use crate::types::{EntryOf, LogIdOf, Payload, TypeConfig, VoteOf};

    fn check_saved<T: Serialize + DeserializeOwned + Debug>(value: &T, bytes: &[u8]) {
        assert_eq!(to_bytes(value), bytes, "{value:?}");
        let read: T = from_bytes(bytes).expect("readable");
        assert_eq!(format!("{read:?}"), format!("{value:?}"));
    }

    /// What stands in logs must be read for ever, and openraft's types are part of it.
    #[test]
    fn what_a_log_holds_stays_as_it_is() {
        check_saved(&VoteOf::<TypeConfig>::new(3, NodeId(2)), &[1, 3, 1, 2, 0]);
        check_saved(&VoteOf::<TypeConfig>::new_committed(3, NodeId(2)), &[1, 3, 1, 2, 1]);
        // Large numbers have a mark for their length before them.
        check_saved(&LogIdOf::<TypeConfig>::new_term_index(3, 1000), &[1, 3, 251, 232, 3]);
        check_saved(&Some(LogIdOf::<TypeConfig>::new_term_index(3, 7)), &[1, 1, 3, 7]);
        check_saved(&7u64, &[1, 7]);
        let entry = |payload| -> EntryOf<TypeConfig> {
            Entry { log_id: LogIdOf::<TypeConfig>::new_term_index(3, 7), payload }
        };
        check_saved(&entry(EntryPayload::Blank), &[1, 3, 7, 0]);
        let command = Payload(Bytes::from_static(b"ab"));
        check_saved(&entry(EntryPayload::Normal(command)), &[1, 3, 7, 1, 2, b'a', b'b']);
        let set = |nodes: [u64; 3]| nodes.into_iter().map(NodeId).collect::<BTreeSet<NodeId>>();
        let change = |voters: Vec<BTreeSet<NodeId>>| {
            EntryPayload::Membership(Membership::new_with_defaults(voters, (1..=4).map(NodeId)))
        };
        let with_learner = [1, 3, 7, 2, 1, 3, 1, 2, 3, 4, 1, 2, 3, 4];
        check_saved(&entry(change(vec![set([1, 2, 3])])), &with_learner);
        let joint = [1, 3, 7, 2, 2, 3, 1, 2, 3, 3, 2, 3, 4, 4, 1, 2, 3, 4];
        check_saved(&entry(change(vec![set([1, 2, 3]), set([2, 3, 4])])), &joint);
        let keys: [&[u8]; 6] = [VOTE, PURGED, COMMITTED, TAIL, LEFT, SEQUENCE];
        let names = ["vote", "purged", "committed", "tail", "left", "sequence"];
        assert_eq!(keys, names.map(str::as_bytes));
    }

    #[test]
    fn a_record_stays_as_it_is() {
        let bytes = [5, 0, 0, 0, 0, 0, 0, 0, 119, 103, 191, 177, 1, 3, 5, 0];
        assert_eq!(wrap(7, 5, &[1, 3, 5, 0]).value, bytes);
        let stored = BytesValue { value: bytes.to_vec(), ..BytesValue::default() };
        assert_eq!((Record::index(&stored), unwrap(7, &stored).expect("whole")), (5, &bytes[12..]));
        assert!(unwrap(8, &stored).is_err(), "it is another group's");
    }
}
