//! Newtypes for everything that has an identity, and the hash that routes points to shards.

use std::fmt;
use std::str::FromStr;

use serde::{Deserialize, Deserializer, Serialize, Serializer, de};
use uuid::Uuid;

macro_rules! number_id {
    ($(#[$doc:meta])* $name:ident) => {
        $(#[$doc])*
        #[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
        #[serde(transparent)]
        pub struct $name(pub u64);

        impl fmt::Display for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                self.0.fmt(f)
            }
        }

        impl From<u64> for $name {
            fn from(id: u64) -> Self {
                $name(id)
            }
        }
    };
}

number_id! {
    /// A node: allocated by the control group at the first join, stored on the node's disk,
    /// never used again for another disk.
    NodeId
}
number_id! {
    /// A Raft group. Group 0 is the control group, every shard is one more.
    GroupId
}
number_id! {
    /// A shard: a hash range of one collection. Its group has the same number.
    ShardId
}

impl GroupId {
    /// The group that holds the cluster's own state.
    pub const CONTROL: GroupId = GroupId(0);
}

impl From<ShardId> for GroupId {
    fn from(shard: ShardId) -> Self {
        GroupId(shard.0)
    }
}

/// Where a point or a document lives: a 32-bit hash. Each shard owns one contiguous range.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub struct Route(pub u32);

impl Route {
    fn of_bytes(bytes: &[u8]) -> Self {
        let hash = blake3::hash(bytes);
        let head: [u8; 4] = hash.as_bytes()[..4].try_into().expect("a hash has 32 bytes");
        Route(u32::from_be_bytes(head))
    }
}

/// A point's id: an unsigned number or a UUID, as in Qdrant's REST model.
///
/// In JSON it is a number or a string; in the binary codec it is a tagged value.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum PointId {
    /// An unsigned 64-bit number.
    Num(u64),
    /// A UUID of any version.
    Uuid(Uuid),
}

impl PointId {
    /// The point's route. A UUIDv8 carries its route in its first 32 bits, which is how the
    /// chunks of one document stay in one shard; every other id is hashed.
    pub fn route(&self) -> Route {
        match self {
            PointId::Num(number) => Route::of_bytes(&number.to_be_bytes()),
            PointId::Uuid(uuid) if uuid.get_version_num() == 8 => {
                let head: [u8; 4] = uuid.as_bytes()[..4].try_into().expect("a UUID has 16 bytes");
                Route(u32::from_be_bytes(head))
            }
            PointId::Uuid(uuid) => Route::of_bytes(uuid.as_bytes()),
        }
    }

    /// 17 bytes that sort as ids do: numbers first, then UUIDs.
    pub fn to_key(&self) -> [u8; 17] {
        let mut key = [0u8; 17];
        match self {
            PointId::Num(number) => key[9..].copy_from_slice(&number.to_be_bytes()),
            PointId::Uuid(uuid) => {
                key[0] = 1;
                key[1..].copy_from_slice(uuid.as_bytes());
            }
        }
        key
    }

    /// The inverse of [`PointId::to_key`]. `None` when the bytes are not such a key.
    pub fn from_key(key: &[u8]) -> Option<Self> {
        let key: &[u8; 17] = key.try_into().ok()?;
        match key[0] {
            0 => Some(PointId::Num(u64::from_be_bytes(key[9..].try_into().ok()?))),
            1 => Some(PointId::Uuid(Uuid::from_slice(&key[1..]).ok()?)),
            _ => None,
        }
    }
}

impl fmt::Display for PointId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            PointId::Num(number) => number.fmt(f),
            PointId::Uuid(uuid) => uuid.fmt(f),
        }
    }
}

impl FromStr for PointId {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        if let Ok(number) = text.parse() {
            return Ok(PointId::Num(number));
        }
        Uuid::parse_str(text)
            .map(PointId::Uuid)
            .map_err(|_| format!("{text:?} is neither an unsigned number nor a UUID"))
    }
}

#[derive(Serialize, Deserialize)]
enum BinaryPointId {
    Num(u64),
    Uuid([u8; 16]),
}

impl Serialize for PointId {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        if serializer.is_human_readable() {
            return match self {
                PointId::Num(number) => serializer.serialize_u64(*number),
                PointId::Uuid(uuid) => serializer.collect_str(uuid),
            };
        }
        match self {
            PointId::Num(number) => BinaryPointId::Num(*number),
            PointId::Uuid(uuid) => BinaryPointId::Uuid(*uuid.as_bytes()),
        }
        .serialize(serializer)
    }
}

impl<'de> Deserialize<'de> for PointId {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        if !deserializer.is_human_readable() {
            return Ok(match BinaryPointId::deserialize(deserializer)? {
                BinaryPointId::Num(number) => PointId::Num(number),
                BinaryPointId::Uuid(bytes) => PointId::Uuid(Uuid::from_bytes(bytes)),
            });
        }
        struct Visitor;
        impl de::Visitor<'_> for Visitor {
            type Value = PointId;
            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("an unsigned number or a UUID")
            }
            fn visit_u64<E: de::Error>(self, value: u64) -> Result<PointId, E> {
                Ok(PointId::Num(value))
            }
            fn visit_str<E: de::Error>(self, value: &str) -> Result<PointId, E> {
                Uuid::parse_str(value)
                    .map(PointId::Uuid)
                    .map_err(|_| E::invalid_value(de::Unexpected::Str(value), &self))
            }
        }
        deserializer.deserialize_any(Visitor)
    }
}

/// A document: an uploaded file in one vector store. Its text form is `file-` and 32 hex digits,
/// because the OpenAI surface addresses a store's document by the id of its file.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub struct DocumentId(pub [u8; 16]);

impl DocumentId {
    /// The prefix of the text form.
    pub const PREFIX: &'static str = "file-";

    /// The document's route, which is also that of all its chunks.
    pub fn route(&self) -> Route {
        Route::of_bytes(&self.0)
    }

    /// The id of the chunk `index` of version `version`: a UUIDv8 with the route in front, so
    /// that every chunk lives in the document's shard.
    pub fn chunk_point(&self, version: u64, index: u32) -> PointId {
        let mut hasher = blake3::Hasher::new();
        hasher.update(&self.0).update(&version.to_be_bytes()).update(&index.to_be_bytes());
        let mut bytes = [0u8; 16];
        bytes.copy_from_slice(&hasher.finalize().as_bytes()[..16]);
        bytes[..4].copy_from_slice(&self.route().0.to_be_bytes());
        PointId::Uuid(uuid::Builder::from_custom_bytes(bytes).into_uuid())
    }
}

impl fmt::Display for DocumentId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}{}", Self::PREFIX, Uuid::from_bytes(self.0).simple())
    }
}

impl FromStr for DocumentId {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        text.strip_prefix(Self::PREFIX)
            .filter(|hex| hex.len() == 32)
            .and_then(|hex| Uuid::try_parse(hex).ok())
            .map(|uuid| DocumentId(uuid.into_bytes()))
            .ok_or_else(|| format!("{text:?} is not a file id (file- and 32 hex digits)"))
    }
}

/// BLAKE3 of a blob's bytes. Its text form is 64 hex digits.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub struct BlobHash(pub [u8; 32]);

impl fmt::Display for BlobHash {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        blake3::Hash::from_bytes(self.0).to_hex().fmt(f)
    }
}

impl FromStr for BlobHash {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        blake3::Hash::from_hex(text)
            .map(|hash| BlobHash(*hash.as_bytes()))
            .map_err(|_| format!("{text:?} is not a blob hash (64 hex digits)"))
    }
}

/// Names one write, so that a retry of it is applied once.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub struct RequestId(pub [u8; 16]);

impl RequestId {
    /// The id that a client's `Idempotency-Key` stands for, within one scope (the API key, the
    /// method, the path), so that two clients' equal keys do not meet.
    pub fn from_key(scope: &str, key: &str) -> Self {
        let mut hasher = blake3::Hasher::new();
        hasher.update(&(scope.len() as u64).to_be_bytes());
        hasher.update(scope.as_bytes()).update(key.as_bytes());
        let mut bytes = [0u8; 16];
        bytes.copy_from_slice(&hasher.finalize().as_bytes()[..16]);
        RequestId(bytes)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn point_ids_round_trip_as_json_keys_and_text() {
        let ids = [PointId::Num(0), PointId::Num(u64::MAX), PointId::Uuid(Uuid::from_u128(7))];
        for id in ids {
            let json = serde_json::to_string(&id).expect("an id is JSON");
            assert_eq!(serde_json::from_str::<PointId>(&json).expect(&json), id);
            assert_eq!(PointId::from_key(&id.to_key()), Some(id));
            assert_eq!(id.to_string().parse::<PointId>(), Ok(id));
        }
        assert!(serde_json::from_str::<PointId>("-1").is_err());
        assert!(serde_json::from_str::<PointId>("\"no\"").is_err());
        assert!(serde_json::from_str::<PointId>("1.5").is_err());
    }

    #[test]
    fn keys_sort_as_ids_do() {
        let ids = [PointId::Num(1), PointId::Num(256), PointId::Uuid(Uuid::nil())];
        assert!(ids.windows(2).all(|pair| pair[0].to_key() < pair[1].to_key()));
    }

    #[test]
    fn chunks_share_the_route_of_their_document() {
        let document = DocumentId([9; 16]);
        for index in 0..100 {
            assert_eq!(document.chunk_point(3, index).route(), document.route());
        }
        assert_ne!(document.chunk_point(3, 0), document.chunk_point(4, 0));
        assert_eq!(document.to_string().parse(), Ok(document));
    }
}
