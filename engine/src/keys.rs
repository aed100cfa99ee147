//! Where things are in a shard's store. Big-endian numbers, so that keys sort as values do.
//!
//! ```text
//! I <point id>            slot of a point          F <file id>        file record
//! P <slot>                id, version, payload     D <document id>    document record
//! V <slot> <vector name>  f32 vector               S <document id> <version> <chunk>  staged chunk
//! R <sequence>            an answered request      W <request id>     where it was done, if not everywhere
//!                                                Q <request id>     the same, by old shards that have done it
//! M <name>                tag, next slot, indexes, and what becomes of the shard ([`crate::reshard`])
//! ```

use shoal_proto::{DocumentId, PointId, RequestId};

pub(crate) const ID: u8 = b'I';
pub(crate) const POINT: u8 = b'P';
pub(crate) const VECTOR: u8 = b'V';
pub(crate) const REQUEST: u8 = b'R';
pub(crate) const FILE: u8 = b'F';
pub(crate) const DOCUMENT: u8 = b'D';
pub(crate) const STAGED: u8 = b'S';
pub(crate) const PARTIAL: u8 = b'W';
pub(crate) const PARTIAL_BY_SHARD: u8 = b'Q';

pub(crate) const TAG: &[u8] = b"Mtag";
pub(crate) const NEXT_SLOT: &[u8] = b"Mnext_slot";
pub(crate) const INDEXES: &[u8] = b"Mindexes";
pub(crate) const BASE: &[u8] = b"Mbase";
pub(crate) const FROZEN: &[u8] = b"Mfrozen";
pub(crate) const ADOPTION: &[u8] = b"Madoption";

pub(crate) fn id(id: PointId) -> Vec<u8> {
    [&[ID][..], &id.to_key()].concat()
}

pub(crate) fn point(slot: u32) -> Vec<u8> {
    [&[POINT][..], &slot.to_be_bytes()].concat()
}

/// The slot in the key of a point.
pub(crate) fn point_slot(key: &[u8]) -> Option<u32> {
    Some(u32::from_be_bytes(key.strip_prefix(&[POINT])?.try_into().ok()?))
}

pub(crate) fn vector(slot: u32, name: &str) -> Vec<u8> {
    [&[VECTOR][..], &slot.to_be_bytes(), name.as_bytes()].concat()
}

pub(crate) fn request(sequence: u64) -> Vec<u8> {
    [&[REQUEST][..], &sequence.to_be_bytes()].concat()
}

pub(crate) fn partial(id: RequestId) -> Vec<u8> {
    [&[PARTIAL][..], &id.0].concat()
}

pub(crate) fn partial_by_shard(id: RequestId) -> Vec<u8> {
    [&[PARTIAL_BY_SHARD][..], &id.0].concat()
}

pub(crate) fn file(id: DocumentId) -> Vec<u8> {
    [&[FILE][..], &id.0].concat()
}

pub(crate) fn document(id: DocumentId) -> Vec<u8> {
    [&[DOCUMENT][..], &id.0].concat()
}

/// Without a chunk: the prefix of all chunks of the version; without a version: of the document.
pub(crate) fn staged(id: DocumentId, version: Option<u64>, chunk: Option<u32>) -> Vec<u8> {
    let mut key = [&[STAGED][..], &id.0].concat();
    if let Some(version) = version {
        key.extend_from_slice(&version.to_be_bytes());
    }
    if let Some(chunk) = chunk {
        key.extend_from_slice(&chunk.to_be_bytes());
    }
    key
}

/// The document, the version and the index of the chunk in the key of a staged chunk.
pub(crate) fn staged_parts(key: &[u8]) -> Option<(DocumentId, u64, u32)> {
    let rest = key.strip_prefix(&[STAGED])?;
    let (document, rest) = rest.split_first_chunk::<16>()?;
    let (version, rest) = rest.split_first_chunk::<8>()?;
    let (chunk, rest) = rest.split_first_chunk::<4>()?;
    rest.is_empty().then(|| (DocumentId(*document), u64::from_be_bytes(*version), u32::from_be_bytes(*chunk)))
}

#[cfg(test)]
mod tests {
    use shoal_proto::codec;

    use super::*;
    use crate::command::Outcome;
    use crate::state::PointRecord;

    #[test]
    fn keys_stay_as_they_are() {
        let number = [&[b'I'][..], &[0; 9], &[0, 0, 0, 0, 0, 0, 1, 2]].concat();
        assert_eq!(id(PointId::Num(258)), number);
        let uuid: PointId = "07070707-0707-0707-0707-070707070707".parse().expect("a UUID");
        assert_eq!(id(uuid), [&[b'I', 1][..], &[7; 16]].concat());
        assert_eq!(point(258), [b'P', 0, 0, 1, 2]);
        assert_eq!(vector(258, "v"), [b'V', 0, 0, 1, 2, b'v']);
        assert_eq!(request(258), [b'R', 0, 0, 0, 0, 0, 0, 1, 2]);
        let of = |kind: u8, bytes: [u8; 16]| [&[kind][..], &bytes].concat();
        assert_eq!(partial(RequestId([3; 16])), of(b'W', [3; 16]));
        assert_eq!(partial_by_shard(RequestId([3; 16])), of(b'Q', [3; 16]));
        let of_document = DocumentId([5; 16]);
        assert_eq!(file(of_document), of(b'F', [5; 16]));
        assert_eq!(document(of_document), of(b'D', [5; 16]));
        let chunk = [&of(b'S', [5; 16])[..], &[0, 0, 0, 0, 0, 0, 0, 2], &[0, 0, 0, 9]].concat();
        assert_eq!(staged(of_document, Some(2), Some(9)), chunk);
        assert_eq!(staged_parts(&chunk), Some((of_document, 2, 9)));
        let names = ["Mtag", "Mnext_slot", "Mindexes", "Mbase", "Mfrozen", "Madoption"];
        assert_eq!([TAG, NEXT_SLOT, INDEXES, BASE, FROZEN, ADOPTION], names.map(str::as_bytes));
    }

    #[test]
    fn what_stands_under_them_stays_as_it_is() {
        let record = PointRecord { id: PointId::Num(7), version: 3, payload: "{}".into() };
        let bytes = [1, 0, 7, 3, 2, b'{', b'}'];
        assert_eq!(codec::encode(&record), bytes);
        assert_eq!(codec::decode::<PointRecord>(&bytes).expect("readable"), record);
        let answered = (RequestId([3; 16]), Outcome::Done(4));
        let bytes = [&[1][..], &[3; 16], &[0, 4]].concat();
        assert_eq!(codec::encode(&answered), bytes);
        assert_eq!(codec::decode::<(RequestId, Outcome)>(&bytes).expect("readable"), answered);
    }
}
