//! The shard's truth on disk: a checked key-value store over one sled instance.
//!
//! - Every value carries a version byte and a CRC-32 over key and value; what fails it is an
//!   error, never an answer.
//! - Values over [`PART_BYTES`] are stored in parts, because sled moves large ones to files
//!   that it never syncs.
//! - sled's own `flush` does not reach the disk for certain (it ends in `sync_file_range`), so
//!   only [`Store::checkpoint`], which adds our own fsyncs, makes anything durable.
//! - What is committed waits in memory until it is worth a batch of its own: sled writes its
//!   buffer out before and after each batch, which costs more than a small batch itself. Nothing
//!   is durable before the next checkpoint in either place.
//! - A sum over all records is kept with them ([`Store::sum`]). Replicas that have applied the
//!   same entries have the same sum; and a record that has vanished, which sled would not notice,
//!   is missing in a sum that is made anew ([`Store::begin_scrub`]).
//! - An [`ExportCursor`] is a consistent copy that is read while writes go on: before a write
//!   changes a key that the cursor has not reached yet, the old value is set aside for it.

use std::collections::BTreeMap;
use std::fs::File;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Weak};
use std::time::Duration;

use parking_lot::{Mutex, RwLock};
use shoal_proto::codec::MAX_ENCODED_BYTES;
use shoal_proto::planted::{Bug, crash_point, is_planted};

use crate::error::{Error, Result};
use crate::files::{sync_dir, wait_until_unlocked};
use crate::keys;

/// Larger values are stored in parts of this many bytes. A sled page holds up to 16 values and
/// must stay well under a quarter of a segment.
pub const PART_BYTES: usize = 12 << 10;
/// The most bytes of a value: it comes out of one log entry.
const MAX_VALUE_BYTES: usize = MAX_ENCODED_BYTES as usize;
/// sled's segment size, in bytes: a quarter of it bounds a page.
const SEGMENT_BYTES: usize = 1 << 20;
/// Bytes that sled may cache per shard.
const CACHE_BYTES: u64 = 64 << 20;
/// How often sled's own thread syncs its file and collects garbage, in milliseconds. Nothing
/// relies on it for durability, and its fsync competes with the Raft log's.
const FLUSH_EVERY_MS: u64 = 10_000;
/// How long an instance on the same files that was just dropped may take to let them go: sled's
/// threads end after it.
const CLOSING_LIMIT: Duration = Duration::from_secs(10);
/// Bytes that wait in memory before they go to sled as one batch. sled lets no read through while
/// it applies a batch, so this bounds a pause of about a millisecond.
const BUFFER_BYTES: usize = 256 << 10;
/// Keys read at a time by an export.
const EXPORT_STEP: usize = 256;
/// Old values that writes set aside for a reading of everything, in bytes. More, and the reading
/// goes on over what is there now.
const SCRUB_ASIDE_BYTES: usize = 64 << 20;
/// Bytes after which an export's piece is handed out.
const EXPORT_PIECE_BYTES: usize = 1 << 20;

/// The key that the sum over all records is stored under; not part of it.
pub(crate) const SUM: &[u8] = b"Msum";
const PLAIN: u8 = 1;
const PARTED: u8 = 2;
/// Keys of parts start with this byte; no other key does.
const PART_PREFIX: u8 = 0xFF;

/// One atomic change.
#[derive(Default)]
pub struct Batch {
    puts: BTreeMap<Vec<u8>, Option<Vec<u8>>>,
}

impl Batch {
    /// Sets a key.
    pub fn put(&mut self, key: Vec<u8>, value: Vec<u8>) {
        self.puts.insert(key, Some(value));
    }

    /// Removes a key.
    pub fn remove(&mut self, key: Vec<u8>) {
        self.puts.insert(key, None);
    }

    /// What this batch does to a key, if anything.
    pub fn get(&self, key: &[u8]) -> Option<Option<&[u8]>> {
        self.puts.get(key).map(|value| value.as_deref())
    }
}

/// What was committed and is not in sled yet.
#[derive(Default)]
struct Buffer {
    batch: Batch,
    bytes: usize,
}

/// Marks the store as broken when a write ends by an error or a panic.
struct Outcome<'a> {
    is_broken: &'a AtomicBool,
    is_good: bool,
}

impl Drop for Outcome<'_> {
    fn drop(&mut self) {
        if !self.is_good {
            self.is_broken.store(true, Ordering::Release);
        }
    }
}

/// A checked key-value store in one directory.
pub struct Store {
    db: sled::Db,
    buffer: RwLock<Buffer>,
    /// The sum over all records in sled; changes only under the buffer's lock.
    sum: AtomicU64,
    /// Set when what was committed may not have reached sled: nothing is answered any more.
    is_broken: AtomicBool,
    dir: PathBuf,
    exports: Arc<Mutex<Vec<Weak<Mutex<ExportState>>>>>,
}

impl Store {
    /// Opens or creates the store.
    pub fn open(dir: &Path) -> Result<Store> {
        std::fs::create_dir_all(dir)?;
        set_half_made_snapshots_aside(dir)?;
        let is_new = !dir.join("db").exists();
        wait_until_unlocked(&dir.join("db"), CLOSING_LIMIT)?;
        let db = sled::Config::new()
            .path(dir)
            .cache_capacity(CACHE_BYTES)
            .segment_size(SEGMENT_BYTES)
            .mode(sled::Mode::HighThroughput)
            .flush_every_ms(Some(FLUSH_EVERY_MS))
            .open()?;
        let sum = match db.get(SUM)? {
            Some(stored) => sum_of(unseal(SUM, &stored)?.1)?,
            None if db.is_empty() => 0,
            None => return Err(damaged(SUM, "it is missing")),
        };
        let store = Store {
            db,
            buffer: RwLock::default(),
            sum: AtomicU64::new(sum),
            is_broken: AtomicBool::new(false),
            dir: dir.to_owned(),
            exports: Arc::default(),
        };
        if is_new {
            // sled cannot open what a power cut has left of files that were never synced.
            store.checkpoint()?;
        }
        Ok(store)
    }

    /// The value of a key.
    pub fn get(&self, key: &[u8]) -> Result<Option<Vec<u8>>> {
        let buffer = self.buffer.read();
        self.check()?;
        if let Some(waiting) = buffer.batch.get(key) {
            return Ok(waiting.map(<[u8]>::to_vec));
        }
        match self.db.get(key)? {
            Some(stored) => self.open_value(key, &stored).map(Some),
            None => Ok(None),
        }
    }

    /// All keys with a prefix, in order, with their values.
    pub fn scan<'a>(&'a self, prefix: &[u8]) -> impl Iterator<Item = Result<(Vec<u8>, Vec<u8>)>> + 'a {
        let flushed = self.flush().err().map(Err);
        flushed.into_iter().chain(self.db.scan_prefix(prefix).map(|item| self.open_item(item)))
    }

    /// All keys from `start` on that have a prefix, in order, with their values.
    pub fn scan_from<'a>(
        &'a self,
        prefix: &'a [u8],
        start: Vec<u8>,
    ) -> impl Iterator<Item = Result<(Vec<u8>, Vec<u8>)>> + 'a {
        let found = self
            .db
            .range(start..)
            .take_while(move |item| item.as_ref().map_or(true, |(key, _)| key.starts_with(prefix)))
            .map(|item| self.open_item(item));
        self.flush().err().map(Err).into_iter().chain(found)
    }

    fn open_item(&self, item: sled::Result<(sled::IVec, sled::IVec)>) -> Result<(Vec<u8>, Vec<u8>)> {
        let (key, stored) = item?;
        let value = self.open_value(&key, &stored)?;
        Ok((key.to_vec(), value))
    }

    /// Applies a batch as one atomic step. It is not durable before the next checkpoint.
    pub fn commit(&self, batch: Batch) -> Result<()> {
        let mut buffer = self.buffer.write();
        self.check()?;
        for (key, value) in batch.puts {
            buffer.bytes += key.len() + value.as_ref().map_or(0, Vec::len);
            buffer.batch.puts.insert(key, value);
        }
        if buffer.bytes >= BUFFER_BYTES { self.write_out(&mut buffer) } else { Ok(()) }
    }

    /// Hands what waits in memory to sled.
    fn flush(&self) -> Result<()> {
        self.check()?;
        if self.buffer.read().batch.puts.is_empty() {
            return Ok(());
        }
        self.write_out(&mut self.buffer.write())
    }

    fn check(&self) -> Result<()> {
        match self.is_broken.load(Ordering::Acquire) {
            // Not damage: a disk that was full, perhaps. Opening it again replays the log.
            true => {
                Err(std::io::Error::other("an earlier write has failed; the store must be opened again")
                    .into())
            }
            false => Ok(()),
        }
    }

    /// Whoever calls this may be a reader, whose error or panic ends nothing but the read: so a
    /// failure is remembered, or the next checkpoint would cover entries that are nowhere.
    fn write_out(&self, buffer: &mut Buffer) -> Result<()> {
        let mut outcome = Outcome { is_broken: &self.is_broken, is_good: false };
        self.write_batch(&buffer.batch)?;
        outcome.is_good = true;
        *buffer = Buffer::default();
        Ok(())
    }

    fn write_batch(&self, batch: &Batch) -> Result<()> {
        self.preserve(batch)?;
        let mut writes = self.summed();
        for (key, value) in &batch.puts {
            let of_point = [keys::ID, keys::POINT, keys::VECTOR].iter().any(|kind| key.first() == Some(kind));
            if is_planted(Bug::ForgottenDelete) && value.is_none() && of_point {
                continue;
            }
            if let Some(old) = self.db.get(key)? {
                // What the key held before may have had parts.
                for part in part_keys(key, &old) {
                    if let Some(old) = self.db.get(&part)? {
                        writes.remove(part, &old);
                    }
                }
                writes.remove(key.clone(), &old);
            }
            match value {
                None => {}
                Some(value) if value.len() <= PART_BYTES => {
                    writes.insert(key.clone(), seal(PLAIN, key, value));
                }
                Some(value) => {
                    for (index, part) in value.chunks(PART_BYTES).enumerate() {
                        let part_key = part_key(key, index as u32);
                        let sealed = seal(PLAIN, &part_key, part);
                        writes.insert(part_key, sealed);
                    }
                    let count = value.len().div_ceil(PART_BYTES) as u32;
                    writes.insert(key.clone(), seal(PARTED, key, &count.to_le_bytes()));
                }
            }
        }
        self.apply(writes)
    }

    /// An empty batch. Until it is applied, no other one may be begun.
    fn summed(&self) -> Summed {
        Summed { batch: sled::Batch::default(), sum: self.sum.load(Ordering::Relaxed) }
    }

    fn apply(&self, writes: Summed) -> Result<()> {
        let Summed { mut batch, sum } = writes;
        batch.insert(SUM, seal(PLAIN, SUM, &sum.to_le_bytes()));
        self.db.apply_batch(batch)?;
        self.sum.store(sum, Ordering::Relaxed);
        Ok(())
    }

    /// The sum over everything that was committed. Two stores with the same records have the
    /// same one, however they came to them.
    pub fn sum(&self) -> Result<u64> {
        self.flush()?;
        Ok(self.sum.load(Ordering::Relaxed))
    }

    /// Begins to read everything again. No write may run during this call; later ones may.
    pub fn begin_scrub(&self) -> Result<Scrub> {
        let expected = self.sum()?;
        let cursor = self.export()?;
        cursor.state.lock().aside_limit = SCRUB_ASIDE_BYTES;
        Ok(Scrub { cursor, expected, found: 0 })
    }

    fn open_value(&self, key: &[u8], stored: &[u8]) -> Result<Vec<u8>> {
        let count = match unparted(key, stored)? {
            Stored::Whole(value) => return Ok(value),
            Stored::Parts(count) => count,
        };
        let mut value = Vec::new();
        for index in 0..count {
            let part_key = part_key(key, index);
            let part = self.db.get(&part_key)?.ok_or_else(|| damaged(key, "a part is missing"))?;
            value.extend_from_slice(unseal(&part_key, &part)?.1);
            if value.len() > MAX_VALUE_BYTES {
                return Err(damaged(key, "it has more parts than a value has"));
            }
        }
        Ok(value)
    }

    /// Makes everything committed so far durable: sled's flush, then our own fsyncs of the
    /// files that it does not sync (see `sled#1452`). Blobs go before the log that names them.
    pub fn checkpoint(&self) -> Result<()> {
        self.flush()?;
        self.db.flush()?;
        crash_point("store-flushed");
        let blobs = self.dir.join("blobs");
        if blobs.is_dir() {
            for entry in std::fs::read_dir(&blobs)? {
                match File::open(entry?.path()) {
                    Ok(file) => file.sync_all()?,
                    // sled may unlink a blob at any time.
                    Err(error) if error.kind() == std::io::ErrorKind::NotFound => {}
                    Err(error) => return Err(error.into()),
                }
            }
            File::open(&blobs)?.sync_all()?;
        }
        File::open(self.dir.join("conf"))?.sync_all()?;
        File::open(self.dir.join("db"))?.sync_data()?;
        sync_dir(&self.dir)?;
        Ok(())
    }

    /// Bytes that the store takes on disk.
    pub fn disk_bytes(&self) -> u64 {
        self.db.size_on_disk().unwrap_or(0)
    }

    /// Fixes a consistent copy of everything. No write may run during this call.
    pub fn export(&self) -> Result<ExportCursor> {
        // The tag is read with what waits in memory.
        if !is_planted(Bug::SnapshotAheadOfItself) {
            self.flush()?;
        }
        let state = Arc::new(Mutex::new(ExportState::default()));
        let mut exports = self.exports.lock();
        exports.retain(|export| export.strong_count() > 0);
        exports.push(Arc::downgrade(&state));
        Ok(ExportCursor { db: self.db.clone(), state, exports: self.exports.clone() })
    }

    /// Sets old values aside for the exports that have not reached them yet.
    fn preserve(&self, batch: &Batch) -> Result<()> {
        let exports: Vec<_> = self.exports.lock().iter().filter_map(Weak::upgrade).collect();
        for export in exports {
            let mut export = export.lock();
            // The sum changes with every batch.
            let sum = SUM.to_vec();
            for key in batch.puts.keys().chain([&sum]) {
                let old = self.db.get(key)?;
                let mut keys = vec![key.clone()];
                if let Some(old) = &old {
                    keys.extend(part_keys(key, old));
                }
                if let Some(Some(value)) = batch.puts.get(key) {
                    keys.extend(
                        (0..value.len().div_ceil(PART_BYTES) as u32).map(|index| part_key(key, index)),
                    );
                }
                for key in keys {
                    if export.is_over() || key < export.next || export.aside.contains_key(&key) {
                        continue;
                    }
                    let old = self.db.get(&key)?.map(|value| value.to_vec());
                    export.set_aside(key, old);
                }
            }
        }
        Ok(())
    }

    /// Loads pieces of an export into an empty store. Returns the sum over all records that there
    /// were where the export was made, from the piece that holds it.
    pub fn import(&self, piece: &[u8]) -> Result<Option<u64>> {
        let mut claimed = None;
        let pairs: Vec<(Vec<u8>, Vec<u8>)> =
            shoal_proto::codec::decode(piece).map_err(|error| damaged(b"export", &error.to_string()))?;
        let mut writes = self.summed();
        for (key, stored) in pairs {
            let (_, body) = unseal(&key, &stored)?;
            match key == SUM {
                true => claimed = body.try_into().ok().map(u64::from_le_bytes),
                false => writes.insert(key, stored),
            }
        }
        self.apply(writes)?;
        Ok(claimed)
    }
}

/// A batch for sled, and the sum over all records that there will be after it.
struct Summed {
    batch: sled::Batch,
    sum: u64,
}

impl Summed {
    fn remove(&mut self, key: Vec<u8>, old: &[u8]) {
        self.sum = self.sum.wrapping_sub(weight(&key, old));
        self.batch.remove(key);
    }

    fn insert(&mut self, key: Vec<u8>, stored: Vec<u8>) {
        self.sum = self.sum.wrapping_add(weight(&key, &stored));
        self.batch.insert(key, stored);
    }
}

/// What a record adds to the sum. Its checksum covers key and value; it is spread over 64 bits
/// by the finalizer of SplitMix64 (Steele, Lea, Flood 2014), so that sums do not cancel out. Tags
/// are left out: they hold what Raft knows, of which two replicas may have different forms.
pub(crate) fn weight(key: &[u8], stored: &[u8]) -> u64 {
    if key == keys::TAG {
        return 0;
    }
    let sum = stored.get(1..5).map_or(0, |sum| u32::from_le_bytes([sum[0], sum[1], sum[2], sum[3]]));
    let mut x = u64::from(sum) << 32 | stored.len() as u64;
    x = (x ^ (x >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    x = (x ^ (x >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    x ^ (x >> 31)
}

/// A reading of everything, step by step, while the store goes on.
pub struct Scrub {
    cursor: ExportCursor,
    expected: u64,
    found: u64,
}

impl Scrub {
    /// Reads on for about a piece. Returns whether everything was read.
    ///
    /// # Errors
    /// Damaged, when a record fails its checksum or records are missing.
    pub fn step(&mut self) -> Result<bool> {
        let Some(pairs) = self.cursor.next_pairs()? else {
            // Without one consistent state there is no sum to compare with: the checksums are all.
            return match self.found == self.expected || self.cursor.state.lock().is_mixed {
                true => Ok(true),
                false => Err(damaged(SUM, "records are missing, or are not what was written")),
            };
        };
        for (key, stored) in &pairs {
            unseal(key, stored)?;
            if key != SUM {
                self.found = self.found.wrapping_add(weight(key, stored));
            }
        }
        Ok(false)
    }
}

struct ExportState {
    /// The first key that the cursor has not passed.
    next: Vec<u8>,
    done: bool,
    /// Old values (or absence) of keys that changed ahead of the cursor.
    aside: BTreeMap<Vec<u8>, Option<Vec<u8>>>,
    aside_bytes: usize,
    /// The most bytes set aside.
    aside_limit: usize,
    /// Whether that was too little: what is read since is no longer one state.
    is_mixed: bool,
}

impl Default for ExportState {
    /// At the beginning, and consistent at any price.
    fn default() -> Self {
        ExportState {
            next: Vec::new(),
            done: false,
            aside: BTreeMap::new(),
            aside_bytes: 0,
            aside_limit: usize::MAX,
            is_mixed: false,
        }
    }
}

impl ExportState {
    /// Whether nothing has to be set aside any more.
    fn is_over(&self) -> bool {
        self.done || self.is_mixed
    }

    fn set_aside(&mut self, key: Vec<u8>, old: Option<Vec<u8>>) {
        self.aside_bytes += size_of_pair(&key, old.as_ref());
        self.aside.insert(key, old);
        if self.aside_bytes > self.aside_limit {
            self.is_mixed = true;
            self.aside = BTreeMap::new();
        }
    }
}

fn size_of_pair(key: &[u8], value: Option<&Vec<u8>>) -> usize {
    key.len() + value.map_or(0, Vec::len)
}

/// A key and what is stored under it.
type Pair = (Vec<u8>, Vec<u8>);

/// A consistent copy of a store, read piece by piece while the store goes on.
pub struct ExportCursor {
    db: sled::Db,
    state: Arc<Mutex<ExportState>>,
    exports: Arc<Mutex<Vec<Weak<Mutex<ExportState>>>>>,
}

impl ExportCursor {
    /// Bytes that the store takes on disk, which is about what its copy takes.
    pub fn store_bytes(&self) -> u64 {
        self.db.size_on_disk().unwrap_or(0)
    }

    /// The next piece for [`Store::import`], or none at the end.
    pub fn next_piece(&self) -> Result<Option<Vec<u8>>> {
        Ok(self.next_pairs()?.map(|pairs| shoal_proto::codec::encode(&pairs)))
    }

    fn next_pairs(&self) -> Result<Option<Vec<Pair>>> {
        let mut pairs: Vec<Pair> = Vec::new();
        let mut bytes = 0;
        while bytes < EXPORT_PIECE_BYTES {
            // The lock is held for one short step, so that a write waits microseconds.
            let mut state = self.state.lock();
            if state.done {
                break;
            }
            let present: Vec<_> =
                self.db.range(state.next.clone()..).take(EXPORT_STEP).collect::<sled::Result<_>>()?;
            let end = match present.last() {
                Some((last, _)) if present.len() == EXPORT_STEP => {
                    let mut end = last.to_vec();
                    end.push(0);
                    Some(end)
                }
                _ => None,
            };
            let rest = match &end {
                Some(end) => state.aside.split_off(end),
                None => BTreeMap::new(),
            };
            let aside = std::mem::replace(&mut state.aside, rest);
            let passed: usize = aside.iter().map(|(key, old)| size_of_pair(key, old.as_ref())).sum();
            state.aside_bytes = state.aside_bytes.saturating_sub(passed);
            let mut step: BTreeMap<Vec<u8>, Vec<u8>> =
                present.into_iter().map(|(key, value)| (key.to_vec(), value.to_vec())).collect();
            for (key, old) in aside {
                match old {
                    Some(old) => step.insert(key, old),
                    None => step.remove(&key),
                };
            }
            state.done = end.is_none();
            state.next = end.unwrap_or_default();
            drop(state);
            bytes += step.iter().map(|(key, value)| key.len() + value.len()).sum::<usize>();
            pairs.extend(step);
        }
        Ok((!pairs.is_empty()).then_some(pairs))
    }
}

impl Drop for ExportCursor {
    fn drop(&mut self) {
        let ours = Arc::downgrade(&self.state);
        self.exports.lock().retain(|export| !export.ptr_eq(&ours));
    }
}

/// A crash while sled writes its start-up snapshot leaves a `.generating` file that would make
/// the next open fail. The snapshot is only a short cut: without it sled reads its whole log.
fn set_half_made_snapshots_aside(dir: &Path) -> std::io::Result<()> {
    for entry in std::fs::read_dir(dir)? {
        let path = entry?.path();
        if path.extension().is_some_and(|extension| extension == "generating") {
            tracing::warn!(file = %path.display(), "removing a half-made store snapshot");
            std::fs::remove_file(path)?;
        }
    }
    Ok(())
}

fn part_key(key: &[u8], index: u32) -> Vec<u8> {
    let mut part = Vec::with_capacity(key.len() + 5);
    part.push(PART_PREFIX);
    part.extend_from_slice(key);
    part.extend_from_slice(&index.to_be_bytes());
    part
}

fn part_keys(key: &[u8], stored: &[u8]) -> Vec<Vec<u8>> {
    match unseal(key, stored) {
        Ok((PARTED, count)) => {
            let count = count.try_into().map_or(0, u32::from_le_bytes);
            (0..count).map(|index| part_key(key, index)).collect()
        }
        _ => Vec::new(),
    }
}

/// A value as it was sealed.
pub(crate) enum Stored {
    Whole(Vec<u8>),
    /// It lies in so many parts, under keys of their own.
    Parts(u32),
}

impl Stored {
    /// The value, of a key that is itself a part.
    pub(crate) fn value(self) -> Result<Vec<u8>> {
        match self {
            Stored::Whole(value) => Ok(value),
            Stored::Parts(_) => Err(damaged(b"part", "a part has parts")),
        }
    }
}

/// Opens what is stored under a key.
pub(crate) fn unparted(key: &[u8], stored: &[u8]) -> Result<Stored> {
    match unseal(key, stored)? {
        (PLAIN, body) => Ok(Stored::Whole(body.to_vec())),
        (_, body) => {
            let count = body.try_into().map_err(|_| damaged(key, "bad part count"))?;
            Ok(Stored::Parts(u32::from_le_bytes(count)))
        }
    }
}

/// The sum over all records, from what is stored under [`SUM`].
pub(crate) fn sum_of(body: &[u8]) -> Result<u64> {
    Ok(u64::from_le_bytes(body.try_into().map_err(|_| damaged(SUM, "not eight bytes"))?))
}

/// The key that a key holds a part of, and which part.
pub(crate) fn part_of(key: &[u8]) -> Option<(&[u8], u32)> {
    let (of, index) = key.strip_prefix(&[PART_PREFIX])?.split_last_chunk::<4>()?;
    Some((of, u32::from_be_bytes(*index)))
}

fn seal(kind: u8, key: &[u8], value: &[u8]) -> Vec<u8> {
    let mut stored = Vec::with_capacity(value.len() + 5);
    stored.push(kind);
    stored.extend_from_slice(&checksum(kind, key, value).to_le_bytes());
    stored.extend_from_slice(value);
    stored
}

fn unseal<'a>(key: &[u8], stored: &'a [u8]) -> Result<(u8, &'a [u8])> {
    let (head, body) = stored.split_at_checked(5).ok_or_else(|| damaged(key, "short"))?;
    let kind = head[0];
    if kind != PLAIN && kind != PARTED {
        return Err(damaged(key, "unknown version"));
    }
    if head[1..] != checksum(kind, key, body).to_le_bytes() {
        return Err(damaged(key, "wrong checksum"));
    }
    Ok((kind, body))
}

fn checksum(kind: u8, key: &[u8], value: &[u8]) -> u32 {
    let mut hasher = crc32fast::Hasher::new();
    hasher.update(&[kind]);
    hasher.update(&(key.len() as u32).to_le_bytes());
    hasher.update(key);
    hasher.update(value);
    hasher.finalize()
}

fn damaged(key: &[u8], reason: &str) -> Error {
    Error::Damaged { key: String::from_utf8_lossy(key).escape_debug().to_string(), reason: reason.to_owned() }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn put(store: &Store, pairs: &[(&str, Option<Vec<u8>>)]) {
        let mut batch = Batch::default();
        for (key, value) in pairs {
            match value {
                Some(value) => batch.put(key.as_bytes().to_vec(), value.clone()),
                None => batch.remove(key.as_bytes().to_vec()),
            }
        }
        store.commit(batch).expect("commits");
    }

    fn all(store: &Store) -> BTreeMap<Vec<u8>, Vec<u8>> {
        store.scan(b"k").map(|item| item.expect("readable")).collect()
    }

    #[test]
    fn records_stay_as_they_are() {
        let plain = [1, 255, 80, 222, 37, b'v', b'a', b'l', b'u', b'e'];
        assert_eq!(seal(PLAIN, b"k1", b"value"), plain);
        assert_eq!(unseal(b"k1", &plain).expect("whole"), (PLAIN, &b"value"[..]));
        let parted = [2, 52, 126, 101, 99, 2, 0, 0, 0];
        assert_eq!(seal(PARTED, b"k1", &2u32.to_le_bytes()), parted);
        assert!(matches!(unparted(b"k1", &parted).expect("whole"), Stored::Parts(2)));
        let keys = [vec![255, b'k', b'1', 0, 0, 0, 0], vec![255, b'k', b'1', 0, 0, 0, 1]];
        assert_eq!(part_keys(b"k1", &parted), keys);
        assert_eq!(part_of(&keys[1]), Some((&b"k1"[..], 1)));
    }

    #[test]
    fn large_values_are_parted_and_leave_nothing_behind() {
        let dir = tempfile::tempdir().expect("a directory");
        let store = Store::open(dir.path()).expect("opens");
        let large: Vec<u8> = (0..200_000u32).map(|byte| byte as u8).collect();
        put(&store, &[("k1", Some(large.clone())), ("k2", Some(vec![1]))]);
        assert_eq!(store.get(b"k1").expect("readable"), Some(large));
        assert_eq!(all(&store).len(), 2, "parts do not show in scans");
        put(&store, &[("k1", Some(vec![9]))]);
        put(&store, &[("k2", None)]);
        assert_eq!(store.get(b"k1").expect("readable"), Some(vec![9]));
        store.flush().expect("flushes");
        assert_eq!(store.db.len(), 2, "old parts are gone; the sum stays");
    }

    #[test]
    fn a_flipped_bit_is_an_error_and_never_an_answer() {
        let dir = tempfile::tempdir().expect("a directory");
        let store = Store::open(dir.path()).expect("opens");
        put(&store, &[("k1", Some(b"value".to_vec()))]);
        store.flush().expect("flushes");
        let mut stored = store.db.get(b"k1").expect("readable").expect("there").to_vec();
        stored[7] ^= 1;
        store.db.insert(b"k1", stored).expect("writable");
        assert!(matches!(store.get(b"k1"), Err(Error::Damaged { .. })));
    }

    #[test]
    fn a_store_whose_write_has_failed_answers_nothing() {
        let dir = tempfile::tempdir().expect("a directory");
        let store = Store::open(dir.path()).expect("opens");
        put(&store, &[("k1", Some(vec![1]))]);
        // As after an error or a panic in the middle of a write.
        store.is_broken.store(true, Ordering::Release);
        assert!(store.get(b"k1").is_err() && store.scan(b"k").any(|item| item.is_err()));
        assert!(store.checkpoint().is_err() && store.export().is_err());
        let mut batch = Batch::default();
        batch.put(b"k2".to_vec(), vec![2]);
        assert!(store.commit(batch).is_err());
    }

    #[test]
    fn an_export_is_the_state_at_its_beginning() {
        let dir = tempfile::tempdir().expect("a directory");
        let store = Store::open(&dir.path().join("a")).expect("opens");
        for number in 0..3000u32 {
            put(&store, &[(&format!("k{number:05}"), Some(vec![1; 700]))]);
        }
        put(&store, &[("k00007", Some(vec![2; 60_000]))]);
        let before = all(&store);
        let export = store.export().expect("fixed");
        let mut pieces = vec![export.next_piece().expect("readable").expect("not empty")];
        for number in (0..3000u32).step_by(3) {
            put(
                &store,
                &[(&format!("k{number:05}"), None), (&format!("k{number:05}x"), Some(vec![3; 30_000]))],
            );
        }
        put(&store, &[("k00007", Some(vec![4]))]);
        while let Some(piece) = export.next_piece().expect("readable") {
            pieces.push(piece);
        }
        let copy = Store::open(&dir.path().join("b")).expect("opens");
        for piece in &pieces {
            copy.import(piece).expect("loads");
        }
        assert!(all(&copy) == before, "the copy is the state at the beginning");
        assert!(all(&store) != before, "the store itself went on");
    }

    #[test]
    fn a_scrub_sets_no_more_aside_than_it_may() {
        let dir = tempfile::tempdir().expect("a directory");
        let store = Store::open(dir.path()).expect("opens");
        for number in 0..2000u32 {
            put(&store, &[(&format!("k{number:05}"), Some(vec![1; 1000]))]);
        }
        let mut scrub = store.begin_scrub().expect("begun");
        scrub.cursor.state.lock().aside_limit = 100_000;
        for number in 0..2000u32 {
            put(&store, &[(&format!("k{number:05}"), Some(vec![2; 1000]))]);
        }
        store.flush().expect("flushes");
        let state = scrub.cursor.state.clone();
        assert!(state.lock().is_mixed && state.lock().aside.is_empty());
        while !scrub.step().expect("nothing is damaged") {}
    }
}
