//! What a backup keeps of a shard, and how it is read again.
//!
//! An export is cut by size, so that one new record would shift every piece behind it. [`cut`] cuts
//! it anew where the keys say so (content-defined chunking, as in LBFS, Muthitacharoen et al. 2001,
//! but over keys): from one backup to the next only those pieces differ in which a record does.
//! [`Archive`] is a shard that is read from such pieces, for whoever puts its records into other shards.
//!
//! Pieces may come from anybody, with checksums that are right: what no shard would have written is found out, or
//! does no harm, and bounded parts of them are in memory at once.

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
/// A piece ends at the latest after this many bytes, and the record that they end in.
const MAX_PIECE_BYTES: usize = 4 << 20;
/// What has more bytes is no piece: besides its records it has only their lengths, which take less.
pub const PIECE_LIMIT_BYTES: u64 = 2 * MAX_PIECE_BYTES as u64;
/// The most bytes of parts of records that are kept until the other parts have come. In an export they come one
/// after the other.
const MAX_HELD_BYTES: usize = 64 << 20;
/// About what it costs to keep a part, besides its bytes.
const HELD_PART_BYTES: usize = 64;
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
    /// Records whose values come in parts, of which some have not come yet, by their keys.
    parted: BTreeMap<Vec<u8>, Parted>,
    /// What those take, about.
    held_bytes: usize,
}

/// A record whose value comes in parts.
#[derive(Default)]
struct Parted {
    /// How many there are, once that is known.
    count: Option<u32>,
    parts: BTreeMap<u32, Vec<u8>>,
    /// What is counted for it in `held_bytes`.
    held_bytes: usize,
}

impl Parted {
    fn is_whole(&self) -> bool {
        let after_last = self.parts.last_key_value().map_or(0, |(last, _)| u64::from(*last) + 1);
        // All from the first one on.
        self.parts.len() as u64 == after_last && self.count.map(u64::from) == Some(after_last)
    }
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
            return self.hold(of, None, Some((index, value.value()?)));
        }
        match key.first() {
            Some(&keys::POINT) => self.contents.points += 1,
            _ if is_record(key) => match value {
                Stored::Whole(value) => self.note_record(key, &value)?,
                Stored::Parts(count) => self.hold(key, Some(count), None)?,
            },
            _ => {}
        }
        Ok(())
    }

    /// Keeps what is known of a record that comes in parts, until all of them have come.
    fn hold(&mut self, key: &[u8], count: Option<u32>, part: Option<(u32, Vec<u8>)>) -> Result<()> {
        let bytes = HELD_PART_BYTES + key.len() + part.as_ref().map_or(0, |(_, part)| part.len());
        if self.held_bytes + bytes > MAX_HELD_BYTES {
            return Err(damaged(key, "too many parts have come without the others of their records"));
        }
        self.held_bytes += bytes;
        let parted = self.parted.entry(key.to_vec()).or_default();
        parted.held_bytes += bytes;
        parted.count = count.or(parted.count);
        parted.parts.extend(part);
        if !parted.is_whole() {
            return Ok(());
        }
        let whole = self.parted.remove(key).unwrap_or_default();
        self.held_bytes -= whole.held_bytes;
        self.note_record(key, &whole.parts.into_values().collect::<Vec<_>>().concat())
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

    /// What is in the pieces that came by so far.
    pub fn contents(&self) -> &Contents {
        &self.contents
    }

    /// To be called when every piece came by.
    ///
    /// # Errors
    /// Damaged, when records are missing.
    pub fn finish(self) -> Result<Contents> {
        if self.claimed != Some(self.sum) {
            return Err(missing());
        }
        match self.parted.keys().next() {
            Some(key) => Err(damaged(key, "a part is missing")),
            None => Ok(self.contents),
        }
    }
}

fn damaged(key: &[u8], reason: &str) -> Error {
    Error::Damaged { key: key.escape_ascii().to_string(), reason: reason.to_owned() }
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
        // After the last slot there is none.
        let Some(first) = after.map_or(Some(0), |slot| slot.checked_add(1)) else { return Ok(points) };
        for item in self.store.scan_from(&[keys::POINT], keys::point(first)) {
            let (key, value) = item?;
            let slot = keys::point_slot(&key).ok_or_else(|| damaged(&key, "not the key of a point"))?;
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
            let (document, version, chunk) =
                keys::staged_parts(&key).ok_or_else(|| damaged(&key, "not the key of a staged chunk"))?;
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

#[cfg(test)]
mod tests {
    use std::path::PathBuf;

    use shoal_proto::PointId;

    use super::*;
    use crate::store::Batch;

    /// The pieces of a shard with these records, made by somebody who knows how they look.
    fn pieces(dir: &Path, records: Vec<(Vec<u8>, Vec<u8>)>) -> Vec<Vec<u8>> {
        let store = Store::open(&dir.join("made")).expect("opens");
        let mut batch = Batch::default();
        records.into_iter().for_each(|(key, value)| batch.put(key, value));
        store.commit(batch).expect("commits");
        let cursor = store.export().expect("fixed");
        std::iter::from_fn(|| cursor.next_piece().expect("readable")).collect()
    }

    fn archive(dir: &Path, pieces: &[Vec<u8>]) -> Archive {
        let taken: PathBuf = dir.join("taken");
        let mut archive = Archive::create(&taken).expect("made");
        pieces.iter().for_each(|piece| archive.take(piece).expect("its checksums are right"));
        archive.check().expect("all of it");
        archive
    }

    fn record(id: u64) -> Vec<u8> {
        codec::encode(&PointRecord { id: PointId::Num(id), version: 1, payload: "{}".into() })
    }

    #[test]
    fn after_the_last_slot_there_is_no_point() {
        let dir = tempfile::tempdir().expect("a directory");
        let records = vec![(keys::point(7), record(1)), (keys::point(u32::MAX), record(2))];
        let archive = archive(dir.path(), &pieces(dir.path(), records));
        let (config, mut after) = (CollectionConfig::default(), None);
        for id in [1, 2] {
            let points = archive.points(&config, &mut after, 1).expect("readable");
            assert_eq!(points.iter().map(|point| point.id).collect::<Vec<_>>(), [PointId::Num(id)]);
        }
        assert!(archive.points(&config, &mut after, 1).expect("readable").is_empty());
    }

    #[test]
    fn a_key_that_no_shard_writes_is_damage() {
        for key in [&b"P\x01"[..], b"P\x01\x02\x03\x04\x05"] {
            let dir = tempfile::tempdir().expect("a directory");
            let archive = archive(dir.path(), &pieces(dir.path(), vec![(key.to_vec(), record(1))]));
            let refused = archive.points(&CollectionConfig::default(), &mut None, 1).map(drop);
            assert!(refused.expect_err("no point").is_damage(), "{}", key.escape_ascii());
        }
    }

    #[test]
    fn parts_are_put_together_in_any_order_and_not_all_kept() {
        let dir = tempfile::tempdir().expect("a directory");
        let file = |number: u8| FileRecord {
            id: DocumentId([number; 16]),
            filename: "long".repeat(10_000),
            blob: BlobHash([number; 32]),
            bytes: 5,
            purpose: "assistants".into(),
            created_at: 1,
        };
        let files: Vec<FileRecord> = (0..3).map(file).collect();
        let records = files.iter().map(|file| (keys::file(file.id), codec::encode(file))).collect();
        let mut all: Vec<(Vec<u8>, Vec<u8>)> = Vec::new();
        for piece in pieces(dir.path(), records) {
            all.extend(pairs(&piece).expect("readable"));
        }
        let forth = codec::encode(&all);
        all.reverse();
        let back = codec::encode(&all);
        for piece in [&forth, &back] {
            let mut inspection = Inspection::default();
            inspection.take(piece).expect("whole");
            assert_eq!((inspection.held_bytes, inspection.parted.len()), (0, 0));
            assert_eq!(inspection.finish().expect("whole").files, 3);
        }
        let mut full = Inspection { held_bytes: MAX_HELD_BYTES, ..Inspection::default() };
        assert!(full.take(&forth).expect_err("no more is kept").is_damage());
    }
}
