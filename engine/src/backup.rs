//! What a backup keeps of a shard, and how it is read again.
//!
//! An export is cut by size, so that one new record would shift every piece behind it. [`cut`] cuts
//! it anew where the keys say so (content-defined chunking, as in LBFS, Muthitacharoen et al. 2001,
//! but over keys): from one backup to the next only those pieces differ in which a record does.
//! [`Archive`] is a shard that is read from such pieces, for whoever puts its records into other shards.

use std::collections::{BTreeMap, BTreeSet};
use std::path::Path;

use shoal_proto::{BlobHash, CollectionConfig, DocumentId, FieldType, RequestId, codec};

use crate::command::{Document, DocumentState, FileRecord, Outcome, PartialAnswer, Point, StagedChunk};
use crate::error::{Error, Result};
use crate::frames::Frames;
use crate::keys;
use crate::reshard::{Adoption, done_in};
use crate::state::{PointRecord, decode, read_meta, read_vector};
use crate::store::{SUM, Store, Stored, part_of, sum_of, unparted, weight};

/// A piece has at least this many bytes, unless it is the last one.
const MIN_PIECE_BYTES: usize = 256 << 10;
/// A piece ends at the latest after this many bytes.
const MAX_PIECE_BYTES: usize = 4 << 20;
/// Of so many keys one ends a piece that is large enough.
const CUT_EVERY: u32 = 128;

/// What there is in an export.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Contents {
    /// Points, chunks of documents among them.
    pub points: u64,
    /// Documents.
    pub documents: u64,
    /// Records of files.
    pub files: u64,
    /// The bytes that its files and its unfinished documents name: where they are, their hash, and
    /// how many.
    pub blobs: BTreeSet<(DocumentId, BlobHash, u64)>,
}

/// Cuts an export in a file of frames into pieces, hands out each, and tells what is in them.
///
/// # Errors
/// Damaged, when a record is not what was written or records are missing: what was handed out is then
/// worth nothing; and what `hand_out` says.
pub fn cut(frames: &Path, mut hand_out: impl FnMut(Vec<u8>) -> Result<()>) -> Result<Contents> {
    let mut frames = Frames::open(frames)?;
    let mut reading = Inspection::default();
    let mut piece: Vec<(Vec<u8>, Vec<u8>)> = Vec::new();
    let mut bytes = 0;
    while let Some(frame) = frames.next_piece()? {
        for (key, stored) in pairs(&frame)? {
            reading.note(&key, &stored)?;
            bytes += key.len() + stored.len();
            let ends = crc32fast::hash(&key).is_multiple_of(CUT_EVERY);
            piece.push((key, stored));
            if bytes >= MAX_PIECE_BYTES || (ends && bytes >= MIN_PIECE_BYTES) {
                hand_out(codec::encode(&std::mem::take(&mut piece)))?;
                bytes = 0;
            }
        }
    }
    if !piece.is_empty() {
        hand_out(codec::encode(&piece))?;
    }
    reading.finish()
}

fn pairs(piece: &[u8]) -> Result<Vec<(Vec<u8>, Vec<u8>)>> {
    codec::decode(piece).map_err(|error| Error::Damaged { key: "piece".into(), reason: error.to_string() })
}

/// A look at every record of a shard as its pieces come by, in any order: whether each is what was
/// written, whether all are there, and what is in them.
#[derive(Default)]
pub struct Inspection {
    contents: Contents,
    /// The sum over the records that came by, and the one that was kept with them.
    sum: u64,
    claimed: Option<u64>,
    /// Keys of records whose values come in so many parts, and the parts that have come.
    parted: BTreeMap<Vec<u8>, u32>,
    parts: BTreeMap<(Vec<u8>, u32), Vec<u8>>,
}

impl Inspection {
    /// Looks at a piece.
    ///
    /// # Errors
    /// Damaged, when a record is not what was written.
    pub fn take(&mut self, piece: &[u8]) -> Result<()> {
        pairs(piece)?.iter().try_for_each(|(key, stored)| self.note(key, stored))
    }

    fn note(&mut self, key: &[u8], stored: &[u8]) -> Result<()> {
        let value = unparted(key, stored)?;
        if key == SUM {
            self.claimed = Some(sum_of(&value.value()?)?);
            return Ok(());
        }
        self.sum = self.sum.wrapping_add(weight(key, stored));
        let is_record = |key: &[u8]| matches!(key.first(), Some(&keys::DOCUMENT | &keys::FILE));
        if let Some((of, index)) = part_of(key).filter(|(of, _)| is_record(of)) {
            self.parts.insert((of.to_vec(), index), value.value()?);
            return Ok(());
        }
        match key.first() {
            Some(&keys::POINT) => self.contents.points += 1,
            _ if is_record(key) => match value {
                Stored::Whole(value) => self.note_record(key, &value)?,
                Stored::Parts(count) => drop(self.parted.insert(key.to_vec(), count)),
            },
            _ => {}
        }
        Ok(())
    }

    fn note_record(&mut self, key: &[u8], value: &[u8]) -> Result<()> {
        if key.first() == Some(&keys::FILE) {
            let file: FileRecord = decode(key, value)?;
            self.contents.files += 1;
            self.contents.blobs.insert((file.id, file.blob, file.bytes));
            return Ok(());
        }
        let document: Document = decode(key, value)?;
        self.contents.documents += 1;
        if document.state == DocumentState::InProgress {
            self.contents.blobs.insert((document.id, document.blob, document.bytes));
        }
        Ok(())
    }

    /// To be called when every piece came by.
    ///
    /// # Errors
    /// Damaged, when records are missing.
    pub fn finish(mut self) -> Result<Contents> {
        if self.claimed != Some(self.sum) {
            return Err(missing());
        }
        for (key, count) in std::mem::take(&mut self.parted) {
            let mut value = Vec::new();
            for index in 0..count {
                let part = self.parts.get(&(key.clone(), index));
                value.extend_from_slice(part.ok_or_else(|| Error::Damaged {
                    key: String::from_utf8_lossy(&key).escape_debug().to_string(),
                    reason: "a part is missing".into(),
                })?);
            }
            self.note_record(&key, &value)?;
        }
        Ok(self.contents)
    }
}

fn missing() -> Error {
    Error::Damaged { key: "shard".into(), reason: "records are missing, or are not what was written".into() }
}

/// A shard as it was when it was exported.
pub struct Archive {
    store: Store,
    claimed: Option<u64>,
}

/// Answers to requests, oldest first.
#[derive(Debug, Default)]
pub struct Answers {
    /// To those that were done in all of the shard.
    pub whole: Vec<(RequestId, Outcome)>,
    /// To those that were not.
    pub partial: Vec<PartialAnswer>,
}

/// Where a reading of records in batches has come to: the key of the last one, none at the beginning.
pub type RecordCursor = Option<Vec<u8>>;

impl Archive {
    /// An empty one, in a directory of its own.
    ///
    /// # Errors
    /// When that cannot be made.
    pub fn create(dir: &Path) -> Result<Archive> {
        Ok(Archive { store: Store::open(dir)?, claimed: None })
    }

    /// Takes in a piece that [`cut`] has handed out.
    ///
    /// # Errors
    /// Damaged, when a record is not what was written.
    pub fn take(&mut self, piece: &[u8]) -> Result<()> {
        self.claimed = self.store.import(piece)?.or(self.claimed);
        Ok(())
    }

    /// Takes in a whole export in a file of frames.
    ///
    /// # Errors
    /// Damaged, when something in it is not what was written.
    pub fn take_file(&mut self, frames: &Path) -> Result<()> {
        let mut frames = Frames::open(frames)?;
        while let Some(piece) = frames.next_piece()? {
            self.take(&piece)?;
        }
        self.check()
    }

    /// To be called when every piece was taken in.
    ///
    /// # Errors
    /// Damaged, when records are missing.
    pub fn check(&self) -> Result<()> {
        match self.claimed == Some(self.store.sum()?) {
            true => Ok(()),
            false => Err(missing()),
        }
    }

    /// Points in batches of about `bytes`: the next ones after `after`, which is moved on.
    ///
    /// # Errors
    /// Damaged, when a record is.
    pub fn points(
        &self,
        config: &CollectionConfig,
        after: &mut Option<u32>,
        bytes: usize,
    ) -> Result<Vec<Point>> {
        let mut points = Vec::new();
        let mut taken = 0;
        let start = keys::point(after.map_or(0, |slot| slot.saturating_add(1)));
        for item in self.store.scan_from(&[keys::POINT], start) {
            let (key, value) = item?;
            let slot = u32::from_be_bytes(key[1..].try_into().expect("a point key has five bytes"));
            *after = Some(slot);
            let record: PointRecord = decode(&key, &value)?;
            let mut vectors = Vec::new();
            for name in config.vectors.keys() {
                if let Some(vector) = read_vector(&self.store, slot, name)? {
                    taken += vector.len() * 4;
                    vectors.push((name.clone(), vector));
                }
            }
            taken += value.len();
            points.push(Point { id: record.id, vectors, payload: record.payload });
            if taken >= bytes {
                break;
            }
        }
        Ok(points)
    }

    /// Its documents in batches of about `bytes`: the next ones after `after`, which is moved on.
    ///
    /// # Errors
    /// Damaged, when a record is.
    pub fn documents(&self, after: &mut RecordCursor, bytes: usize) -> Result<Vec<Document>> {
        let records = self.batch(keys::DOCUMENT, after, bytes)?;
        records.into_iter().map(|(key, value)| decode(&key, &value)).collect()
    }

    /// Its records of files.
    ///
    /// # Errors
    /// Damaged, when a record is.
    pub fn files(&self) -> Result<Vec<FileRecord>> {
        self.records(keys::FILE)
    }

    /// Chunks that are not visible yet, in batches of about `bytes`: the next ones after `after`, which is
    /// moved on.
    ///
    /// # Errors
    /// Damaged, when a record is.
    pub fn staged(&self, after: &mut RecordCursor, bytes: usize) -> Result<Vec<StagedChunk>> {
        let chunk = |(key, value): (Vec<u8>, Vec<u8>)| {
            let (document, version, chunk) = keys::staged_parts(&key).ok_or_else(|| Error::Damaged {
                key: key.escape_ascii().to_string(),
                reason: "not the key of a staged chunk".into(),
            })?;
            Ok(StagedChunk { document, version, chunk, point: decode(&key, &value)? })
        };
        self.batch(keys::STAGED, after, bytes)?.into_iter().map(chunk).collect()
    }

    /// The answers that it remembers.
    ///
    /// # Errors
    /// Damaged, when a record is.
    pub fn answers(&self) -> Result<Answers> {
        let mut answers = Answers::default();
        let adoption = read_meta::<Option<Adoption>>(&self.store, keys::ADOPTION)?.flatten();
        for (id, outcome) in self.records::<(RequestId, Outcome)>(keys::REQUEST)? {
            match done_in(&self.store, adoption.as_ref(), id)? {
                None => answers.whole.push((id, outcome)),
                Some(ranges) => answers.partial.push(PartialAnswer { id, outcome, ranges }),
            }
        }
        Ok(answers)
    }

    /// The change of shards that had frozen it.
    ///
    /// # Errors
    /// Damaged, when the record is.
    pub fn frozen_by(&self) -> Result<Option<RequestId>> {
        read_meta(&self.store, keys::FROZEN)
    }

    /// Its payload indexes, if they were ever changed.
    ///
    /// # Errors
    /// Damaged, when the record is.
    pub fn indexes(&self) -> Result<Option<BTreeMap<String, FieldType>>> {
        read_meta(&self.store, keys::INDEXES)
    }

    /// What its log indexes are counted from: a version is the base and an index.
    ///
    /// # Errors
    /// Damaged, when the record is.
    pub fn base(&self) -> Result<u64> {
        Ok(read_meta(&self.store, keys::BASE)?.unwrap_or(0))
    }

    /// Records of a kind with their keys, about `bytes` of them: the next ones after `after`, which is moved on.
    fn batch(&self, kind: u8, after: &mut RecordCursor, bytes: usize) -> Result<Vec<(Vec<u8>, Vec<u8>)>> {
        let (mut records, mut taken) = (Vec::new(), 0);
        let prefix = [kind];
        let start = after.as_ref().map_or(prefix.to_vec(), |key| [key.as_slice(), &[0]].concat());
        for item in self.store.scan_from(&prefix, start) {
            let (key, value) = item?;
            taken += value.len();
            *after = Some(key.clone());
            records.push((key, value));
            if taken >= bytes {
                break;
            }
        }
        Ok(records)
    }

    fn records<T: serde::de::DeserializeOwned>(&self, kind: u8) -> Result<Vec<T>> {
        let items = self.store.scan(&[kind]);
        items.map(|item| item.and_then(|(key, value)| decode(&key, &value))).collect()
    }
}
