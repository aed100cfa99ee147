//! What a backup consists of, as it is written down: JSON, so that a person can read it.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};
use shoal_proto::{BlobHash, CollectionConfig, DocumentId, ShardId};

/// The format that is written. What this build does not know it refuses to restore.
pub const FORMAT: u32 = 1;
/// So many files without bytes a head names; a manifest names all.
const NAMED_IN_HEAD: usize = 100;

/// The head of a backup: small, and written last, so that a backup is whole or is not there.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Head {
    /// [`FORMAT`] of the build that wrote it.
    pub format: u32,
    /// Its name: the time in UTC, and a few digits that make it unique. They sort by age.
    pub id: String,
    /// Seconds since the Unix epoch.
    pub created_at: u64,
    /// The cluster that it was made of.
    pub cluster_id: String,
    /// Whether it holds everything that there was, and not only some collections.
    pub is_full: bool,
    /// The version of the node that made it.
    pub version: String,
    /// The object that holds the [`Manifest`].
    pub manifest: Object,
    /// What it holds.
    pub collections: Vec<Summary>,
    /// Bytes of all objects that it consists of.
    pub bytes: u64,
    /// Bytes of those that no earlier backup had brought.
    pub new_bytes: u64,
    /// How many files it lacks the bytes of, because no replica had them.
    #[serde(default)]
    pub missing_files: u64,
    /// The first hundred of those.
    #[serde(default)]
    pub missing: Vec<Blob>,
}

/// What a backup holds of a collection.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Summary {
    /// The collection's name.
    pub name: String,
    /// Points, chunks of documents among them.
    pub points: u64,
    /// Documents.
    pub documents: u64,
    /// Records of files.
    pub files: u64,
}

/// All that is needed to put everything back.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Manifest {
    /// The collections.
    pub collections: Vec<CollectionCopy>,
    /// Collections by alias.
    pub aliases: BTreeMap<String, String>,
}

/// A collection.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct CollectionCopy {
    /// Its name.
    pub name: String,
    /// Its schema.
    pub config: CollectionConfig,
    /// Replicas wanted of each shard.
    pub replication_factor: u32,
    /// Seconds since the Unix epoch.
    pub created_at: u64,
    /// Its shards.
    pub shards: Vec<ShardCopy>,
}

/// A shard, as it was at one index of its log.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct ShardCopy {
    /// Its id.
    pub shard: ShardId,
    /// The last entry of its log that is in here.
    pub index: u64,
    /// Points, chunks of documents among them.
    pub points: u64,
    /// Documents.
    pub documents: u64,
    /// Records of files.
    pub files: u64,
    /// The pieces of its state, in order.
    pub pieces: Vec<Object>,
    /// The original bytes of its files and of its unfinished documents.
    pub blobs: Vec<Blob>,
    /// Those that no replica had any more: what names them is in the pieces. A build that does not know this
    /// field refuses to restore such a shard, because it finds the bytes of a file missing.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub missing: Vec<Blob>,
}

/// Bytes in the target, under their own hash.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
pub struct Object {
    /// BLAKE3 of the bytes.
    #[serde(with = "text")]
    pub hash: BlobHash,
    /// Their number.
    pub bytes: u64,
}

/// The bytes of a file.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
pub struct Blob {
    /// The file.
    #[serde(with = "text")]
    pub document: DocumentId,
    /// Its bytes.
    #[serde(flatten)]
    pub object: Object,
}

impl Manifest {
    /// Every object that it names.
    pub fn objects(&self) -> impl Iterator<Item = Object> {
        let shards = self.collections.iter().flat_map(|collection| &collection.shards);
        shards
            .flat_map(|shard| shard.pieces.iter().copied().chain(shard.blobs.iter().map(|blob| blob.object)))
    }

    /// The largest piece of a shard, in bytes.
    pub(super) fn largest_piece(&self) -> u64 {
        let shards = self.collections.iter().flat_map(|collection| &collection.shards);
        shards.flat_map(|shard| &shard.pieces).map(|piece| piece.bytes).max().unwrap_or(0)
    }

    /// The files whose bytes it lacks: how many, and the first of them.
    pub(super) fn missing(&self) -> (u64, Vec<Blob>) {
        let shards = self.collections.iter().flat_map(|collection| &collection.shards);
        let first = shards.flat_map(|shard| shard.missing.iter().copied()).take(NAMED_IN_HEAD);
        (self.collections.iter().map(CollectionCopy::missing_files).sum(), first.collect())
    }

    /// What it holds.
    pub fn summaries(&self) -> Vec<Summary> {
        self.collections.iter().map(CollectionCopy::summary).collect()
    }
}

impl CollectionCopy {
    /// How many of its files, or of its unfinished documents, it lacks the bytes of.
    pub(super) fn missing_files(&self) -> u64 {
        self.shards.iter().map(|shard| shard.missing.len() as u64).sum()
    }

    /// What there is in it.
    pub fn summary(&self) -> Summary {
        Summary {
            name: self.name.clone(),
            points: self.shards.iter().map(|shard| shard.points).sum(),
            documents: self.shards.iter().map(|shard| shard.documents).sum(),
            files: self.shards.iter().map(|shard| shard.files).sum(),
        }
    }
}

/// Hashes and ids as the text that they are shown as.
mod text {
    use std::fmt::Display;
    use std::str::FromStr;

    use serde::de::Error as _;
    use serde::{Deserialize, Deserializer, Serializer};

    pub(super) fn serialize<T: Display, S: Serializer>(value: &T, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_str(value)
    }

    pub(super) fn deserialize<'de, T: FromStr<Err: Display>, D: Deserializer<'de>>(
        deserializer: D,
    ) -> Result<T, D::Error> {
        String::deserialize(deserializer)?.parse().map_err(D::Error::custom)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_manifest_is_read_as_it_was_written() {
        let object = Object { hash: BlobHash([7; 32]), bytes: 5 };
        let shard = ShardCopy {
            shard: ShardId(3),
            index: 9,
            points: 1,
            documents: 0,
            files: 1,
            pieces: vec![object],
            blobs: vec![Blob { document: DocumentId([1; 16]), object }],
            missing: Vec::new(),
        };
        let collection = CollectionCopy {
            name: "docs".into(),
            config: CollectionConfig::default(),
            replication_factor: 3,
            created_at: 1,
            shards: vec![shard],
        };
        let manifest = Manifest {
            collections: vec![collection],
            aliases: BTreeMap::from([("d".to_owned(), "docs".to_owned())]),
        };
        let text = serde_json::to_string(&manifest).expect("writable");
        assert!(text.contains(&format!("\"hash\":\"{}\"", "07".repeat(32))), "{text}");
        assert_eq!(serde_json::from_str::<Manifest>(&text).expect("readable"), manifest);
        assert_eq!(manifest.objects().count(), 2);
        assert_eq!(manifest.missing(), (0, Vec::new()));
        assert!(!text.contains("missing"), "as builds wrote it that knew no such field");
    }

    #[test]
    fn what_is_missing_is_named_and_is_no_object() {
        let object = Object { hash: BlobHash([7; 32]), bytes: 5 };
        let lost = |number: u8| Blob { document: DocumentId([number; 16]), object };
        let shard = ShardCopy {
            shard: ShardId(3),
            index: 9,
            points: 0,
            documents: 0,
            files: 120,
            pieces: Vec::new(),
            blobs: Vec::new(),
            missing: (0..120).map(lost).collect(),
        };
        let collection = CollectionCopy {
            name: "_files".into(),
            config: CollectionConfig::default(),
            replication_factor: 1,
            created_at: 1,
            shards: vec![shard],
        };
        let manifest = Manifest { collections: vec![collection], ..Manifest::default() };
        let text = serde_json::to_string(&manifest).expect("writable");
        assert_eq!(serde_json::from_str::<Manifest>(&text).expect("readable"), manifest);
        assert_eq!(manifest.objects().count(), 0);
        let (count, named) = manifest.missing();
        assert_eq!((count, named.len(), named[0]), (120, NAMED_IN_HEAD, lost(0)));
    }

    #[test]
    fn a_head_of_an_earlier_build_lacks_nothing() {
        let text = r#"{"format":1,"id":"20261121T000000Z-00000000","created_at":1,"cluster_id":"c",
            "is_full":true,"version":"0.1.0","manifest":{"hash":"HASH","bytes":5},"collections":[],
            "bytes":5,"new_bytes":5}"#;
        let head: Head = serde_json::from_str(&text.replace("HASH", &"07".repeat(32))).expect("readable");
        assert_eq!((head.missing_files, head.missing), (0, Vec::new()));
    }

    /// Backups outlive builds.
    #[test]
    fn what_a_backup_says_stays_as_it_is() {
        let manifest = r#"{
            "collections": [{
                "name": "docs",
                "config": {
                    "vectors": {}, "text_fields": [], "payload_indexes": {}, "embedder": null,
                    "chunker": null, "attributes_json": ""
                },
                "replication_factor": 3,
                "created_at": 1,
                "shards": [{
                    "shard": 3, "index": 9, "points": 1, "documents": 0, "files": 1,
                    "pieces": [{
                        "hash": "HASH", "bytes": 5
                    }],
                    "blobs": [{
                        "document": "file-01010101010101010101010101010101",
                        "hash": "HASH", "bytes": 5
                    }]
                }]
            }],
            "aliases": {"d": "docs"}
        }"#;
        let head = r#"{
            "format": 1, "id": "20261122T120000Z-0001", "created_at": 1, "cluster_id": "c", "is_full": true,
            "version": "0.1.0",
            "manifest": {
                "hash": "HASH", "bytes": 5
            },
            "collections": [{"name": "docs", "points": 1, "documents": 0, "files": 1}],
            "bytes": 10, "new_bytes": 5
        }"#;
        let of_hash = |text: &str| text.replace("HASH", &"07".repeat(32));
        let parsed = |text: &str| serde_json::from_str::<serde_json::Value>(text).expect("JSON");
        let (manifest, head) = (of_hash(manifest), of_hash(head));
        let read: Manifest = serde_json::from_str(&manifest).expect("readable");
        assert_eq!(read.objects().count(), 2);
        assert_eq!(read.collections[0].shards[0].blobs[0].document, DocumentId([1; 16]));
        assert_eq!(serde_json::to_value(&read).expect("writable"), parsed(&manifest));
        let read: Head = serde_json::from_str(&head).expect("readable");
        assert_eq!((read.format, read.manifest.hash), (FORMAT, BlobHash([7; 32])));
        let mut head = parsed(&head);
        // Since there can be backups that lack something.
        head["missing_files"] = 0.into();
        head["missing"] = Vec::<u8>::new().into();
        assert_eq!(serde_json::to_value(&read).expect("writable"), head);
    }
}
