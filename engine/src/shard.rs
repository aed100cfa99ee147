//! One shard replica: a directory with generations, a state behind a lock, background work.
//!
//! ```text
//!  <dir>/CURRENT           names the generation that counts; replaced atomically
//!  <dir>/gen-000007/store  sled: the truth          gen-000007/graphs, gen-000007/text: derived
//! ```
//!
//! The durability order, which every change here must keep:
//!
//! ```text
//!  log entry durable ─▶ apply (store, volatile) ─▶ checkpoint durable ─▶ log purged below it
//!  on a majority         readers see it             flush + our fsyncs     never before
//! ```
//!
//! After a crash the store is at some position at or after its last checkpoint, and the log
//! holds everything after that checkpoint; applying it again brings back the rest.

use std::fs::File;
use std::io::Write as _;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use parking_lot::{Mutex, RwLock};
use shoal_proto::planted::crash_point;
use shoal_proto::{CollectionConfig, RequestId};

use crate::command::{Answer, Read};
use crate::error::{Error, Result};
use crate::files::{self, sync_dir};
use crate::frames::Frames;
use crate::keys;
use crate::state::{State, read_point, text_of};
use crate::store::{ExportCursor, Scrub, Store};
use crate::text::{COMMIT_DOCUMENTS, TextIndex};
use crate::vectors::Vectors;

/// One entry of the log on its way into the shard.
pub struct Entry {
    /// Its index.
    pub index: u64,
    /// Opaque bytes, stored in the same step as the entry's effect.
    pub tag: Vec<u8>,
    /// An encoded [`crate::command::Envelope`]; none for entries that are Raft's own.
    pub command: Option<Vec<u8>>,
}

/// One shard replica. Reads run in parallel; applies are serial and short.
pub struct Shard {
    dir: PathBuf,
    config: CollectionConfig,
    state: RwLock<State>,
    /// That of the state, for those who must not wait until an entry is applied.
    frozen: Mutex<Option<RequestId>>,
    generation: Mutex<u64>,
    /// Held by whoever does background work, so that there is only one.
    background: Mutex<()>,
    is_damaged: AtomicBool,
    scrub: Mutex<Option<Scrub>>,
}

/// The file that says that a replica is damaged and must be made anew from another one.
const DAMAGED: &str = "DAMAGED";

impl Shard {
    /// Opens or creates a shard replica in a directory of its own.
    pub fn open(dir: &Path, config: CollectionConfig) -> Result<Shard> {
        std::fs::create_dir_all(dir)?;
        if dir.join(DAMAGED).try_exists()? {
            let reason = std::fs::read(dir.join(DAMAGED)).unwrap_or_default();
            let reason = String::from_utf8_lossy(&reason).into_owned();
            return Err(Error::Damaged { key: DAMAGED.into(), reason });
        }
        let generation = read_current(dir)?.unwrap_or(0);
        let state = State::open(&generation_dir(dir, generation), config.clone())?;
        // The names of the directories must be as durable as what will be in them.
        sync_dir(&generation_dir(dir, generation))?;
        if let Some(parent) = dir.parent() {
            sync_dir(parent)?;
        }
        if generation == 0 {
            set_current(dir, 0)?;
        }
        drop_other_generations(dir, generation)?;
        Ok(Shard {
            dir: dir.to_owned(),
            config,
            frozen: Mutex::new(state.frozen),
            state: RwLock::new(state),
            generation: Mutex::new(generation),
            background: Mutex::new(()),
            is_damaged: AtomicBool::new(false),
            scrub: Mutex::new(None),
        })
    }

    /// Whether something stored here was found to be damaged. Nothing of it was served; the
    /// replica has to be made anew from another one.
    pub fn is_damaged(&self) -> bool {
        self.is_damaged.load(Ordering::Relaxed)
    }

    /// Notes durably that the replica is damaged: the next [`Shard::open`] refuses it too.
    pub fn mark_damaged(&self, reason: &str) {
        if self.is_damaged.swap(true, Ordering::Relaxed) {
            return;
        }
        if let Err(error) = mark_damaged(&self.dir, reason) {
            tracing::error!(%error, "that a replica is damaged could not be noted");
        }
    }

    /// Nothing is answered from a damaged state, and nothing more is put into it.
    fn check(&self) -> Result<()> {
        match self.is_damaged() {
            true => Err(Error::Damaged { key: DAMAGED.into(), reason: "it waits to be made anew".into() }),
            false => Ok(()),
        }
    }

    /// Looks at a result for signs of damage on its way out.
    fn heed<T>(&self, result: Result<T>) -> Result<T> {
        if let Err(error) = &result
            && error.is_damage()
        {
            self.mark_damaged(&error.to_string());
        }
        result
    }

    /// The latest indexes at which the sum over the state was taken, with the sums. Replicas take
    /// them at the same indexes.
    pub fn state_sums(&self) -> Vec<(u64, u64)> {
        match self.is_damaged() {
            true => Vec::new(),
            false => self.state.read().sums.iter().copied().collect(),
        }
    }

    /// Reads on in a reading of everything that is stored, or begins one. Returns true when it is
    /// through.
    ///
    /// # Errors
    /// Damaged, when something is not what was written.
    pub fn scrub(&self) -> Result<bool> {
        let mut scrub = self.scrub.lock();
        if scrub.is_none() {
            // No write runs while the cut is made.
            *scrub = Some(self.heed(self.state.write().store.begin_scrub())?);
        }
        let Some(running) = scrub.as_mut() else { return Ok(false) };
        let step = running.step();
        if !matches!(step, Ok(false)) {
            *scrub = None;
        }
        self.heed(step)
    }

    /// The change of shards that has frozen this one, if one has: then it is no place for reads that must
    /// see the latest any more.
    pub fn frozen_by(&self) -> Option<RequestId> {
        *self.frozen.lock()
    }

    /// The schema that the shard was opened with.
    pub fn config(&self) -> &CollectionConfig {
        &self.config
    }

    /// Applies entries in order; answers each with an encoded [`crate::command::Outcome`].
    ///
    /// # Errors
    /// Only when the replica itself is broken; a bad command is answered with a rejection.
    pub fn apply(&self, entries: Vec<Entry>) -> Result<Vec<Vec<u8>>> {
        self.check()?;
        let mut outcomes = Vec::with_capacity(entries.len());
        for entry in entries {
            // The lock is taken per entry, so that searches get their turn in a long batch.
            let mut state = self.state.write();
            outcomes.push(self.heed(state.apply(entry.index, entry.tag, entry.command.as_deref()))?);
            *self.frozen.lock() = state.frozen;
            crash_point("entry-applied");
        }
        Ok(outcomes)
    }

    /// Answers a question from what is applied, with the index of the last entry that the answer
    /// reflects (zero when nothing was applied since the start).
    pub fn read(&self, question: &Read) -> Result<(u64, Answer)> {
        self.check()?;
        let state = self.state.read();
        Ok((state.applied, self.heed(state.read(question))?))
    }

    /// Answers a cheap question at once, with the index of the last entry that it reflects.
    /// None when the answer may take longer than a few hundred microseconds, or when an entry is
    /// being applied: then [`Shard::read`] is to be called where blocking is allowed.
    pub fn try_read(&self, question: &Read) -> Option<Result<(u64, Answer)>> {
        if let Err(error) = self.check() {
            return Some(Err(error));
        }
        let state = self.state.try_read()?;
        state.is_cheap(question).then(|| Ok((state.applied, self.heed(state.read(question))?)))
    }

    /// The tag of the last applied entry.
    pub fn applied_tag(&self) -> Result<Option<Vec<u8>>> {
        self.heed(self.state.read().store.get(keys::TAG))
    }

    /// Makes everything applied so far durable and returns its tag. Derived files are brought
    /// along first, so that a restart has little to redo.
    pub fn checkpoint(&self) -> Result<Option<Vec<u8>>> {
        self.save_derived(false)?;
        // An installed snapshot must not take the files away in the middle of this.
        let _guard = self.background.lock();
        let (tag, store) = {
            let state = self.state.read();
            (state.store.get(keys::TAG)?, state.store.clone())
        };
        crash_point("checkpoint-begun");
        // The lock is free again: what is applied meanwhile becomes durable too, no harm.
        self.heed(store.checkpoint())?;
        crash_point("checkpoint-durable");
        Ok(tag)
    }

    /// Whether [`Shard::work`] would find something to do, as far as can be seen at once.
    pub fn has_work(&self) -> bool {
        let Some(state) = self.state.try_read() else { return true };
        let text_waits = state.text.as_ref().is_some_and(|text| text.waiting() >= COMMIT_DOCUMENTS);
        let vectors_wait =
            |vectors: &Arc<Vectors>| vectors.has_work() || vectors.wants_compaction(&state.live);
        text_waits || state.vectors.values().any(vectors_wait)
    }

    /// Does one step of background work: moves vectors into graphs, commits text. Returns
    /// whether there is more to do at once.
    pub fn work(&self) -> Result<bool> {
        let Some(_guard) = self.background.try_lock() else { return Ok(false) };
        let derived = self.derived();
        for vectors in &derived.vectors {
            if !vectors.has_work() && !vectors.wants_compaction(&self.state.read().live) {
                continue;
            }
            let live = self.state.read().live_and_newer();
            if vectors.index_some(&|slot| live.contains(slot))? || vectors.compact_some(&live) {
                return Ok(true);
            }
        }
        if derived.text.as_ref().is_some_and(|text| text.waiting() >= COMMIT_DOCUMENTS) {
            derived.commit_text(&self.config)?;
        }
        Ok(false)
    }

    /// Saves graphs and text. With `all`, as for a planned stop, even where little has changed.
    pub fn save_derived(&self, all: bool) -> Result<()> {
        let _guard = self.background.lock();
        let derived = self.derived();
        for vectors in &derived.vectors {
            vectors.save(all)?;
        }
        derived.commit_text(&self.config)
    }

    /// Handles to the parts that background work touches, so that it never holds the state's
    /// lock, which `apply` needs.
    fn derived(&self) -> Derived {
        let state = self.state.read();
        Derived {
            vectors: state.vectors.values().cloned().collect(),
            text: state.text.clone(),
            store: state.store.clone(),
            numbered: state.base + state.applied,
        }
    }

    /// Fixes a consistent copy with its tag, to be read while the shard goes on.
    pub fn export(&self) -> Result<(Option<Vec<u8>>, ExportCursor)> {
        self.check()?;
        // No write runs while the cursor is made.
        let state = self.state.write();
        Ok((state.store.get(keys::TAG)?, state.store.export()?))
    }

    /// Replaces the state by an export in a file of frames (length, CRC-32, piece). A crash
    /// leaves the old state or the new one.
    pub fn install(&self, tag: &[u8], file: &Path) -> Result<()> {
        let _guard = self.background.lock();
        // A reading of the old state says nothing of the new one.
        *self.scrub.lock() = None;
        let mut current = self.generation.lock();
        let next = *current + 1;
        let dir = generation_dir(&self.dir, next);
        if dir.exists() {
            std::fs::remove_dir_all(&dir)?;
        }
        std::fs::create_dir_all(&dir)?;
        let store = Store::open(&dir.join("store"))?;
        load_frames(&store, file)?;
        let mut batch = crate::store::Batch::default();
        batch.put(keys::TAG.to_vec(), tag.to_vec());
        store.commit(batch)?;
        store.checkpoint()?;
        sync_dir(&dir)?;
        let fresh = State::with_store(store, &dir, self.config.clone())?;
        crash_point("snapshot-loaded");
        set_current(&self.dir, next)?;
        crash_point("snapshot-current");
        *self.frozen.lock() = fresh.frozen;
        let old = std::mem::replace(&mut *self.state.write(), fresh);
        *current = next;
        drop(old);
        drop_other_generations(&self.dir, next)?;
        Ok(())
    }
}

struct Derived {
    vectors: Vec<Arc<Vectors>>,
    text: Option<Arc<TextIndex>>,
    store: Arc<Store>,
    /// The number of the last entry, as versions are counted.
    numbered: u64,
}

impl Derived {
    fn commit_text(&self, config: &CollectionConfig) -> Result<()> {
        let Some(text) = &self.text else { return Ok(()) };
        text.commit(self.numbered, &|slot| {
            let record = read_point(&self.store, slot)?;
            Ok(record.map(|record| text_of(config, &record.payload_map())))
        })
    }
}

fn load_frames(store: &Store, file: &Path) -> Result<()> {
    let mut frames = Frames::open(file)?;
    let mut claimed = None;
    while let Some(piece) = frames.next_piece()? {
        claimed = store.import(&piece)?.or(claimed);
    }
    // Records that have vanished where it was made must not pass for never written.
    match claimed.is_none_or(|claimed| store.sum().is_ok_and(|sum| sum == claimed)) {
        true => Ok(()),
        false => {
            let reason = "records are missing where it was made".into();
            Err(Error::Damaged { key: "snapshot".into(), reason })
        }
    }
}

/// Notes durably that the replica in a directory is damaged.
///
/// # Errors
/// When that cannot be written.
pub fn mark_damaged(dir: &Path, reason: &str) -> Result<()> {
    // Not by replacement: on a full disk the name alone may be all that there is room for.
    let mut file = File::create(dir.join(DAMAGED))?;
    file.write_all(reason.as_bytes())?;
    file.sync_all()?;
    Ok(sync_dir(dir)?)
}

/// Takes the note back that the replica in a directory is damaged.
///
/// # Errors
/// When that cannot be done.
pub fn clear_damaged(dir: &Path) -> Result<()> {
    match std::fs::remove_file(dir.join(DAMAGED)) {
        Err(error) if error.kind() != std::io::ErrorKind::NotFound => Err(error.into()),
        _ => Ok(sync_dir(dir)?),
    }
}

fn generation_dir(dir: &Path, generation: u64) -> PathBuf {
    dir.join(format!("gen-{generation:06}"))
}

/// The generation that counts; none in a new directory.
fn read_current(dir: &Path) -> Result<Option<u64>> {
    let damaged = |reason: String| Error::Damaged { key: "CURRENT".into(), reason };
    let text = match std::fs::read(dir.join("CURRENT")) {
        Ok(bytes) => String::from_utf8_lossy(&bytes).into_owned(),
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => {
            let has_installed = std::fs::read_dir(dir)?.any(|entry| {
                entry.is_ok_and(|entry| {
                    let name = entry.file_name().to_string_lossy().into_owned();
                    name.starts_with("gen-") && name != "gen-000000"
                })
            });
            return if has_installed { Err(damaged("it is missing".to_owned())) } else { Ok(None) };
        }
        Err(error) => return Err(error.into()),
    };
    let generation = text.split_whitespace().next().and_then(|number| number.parse().ok());
    let generation = generation.filter(|generation| current_line(*generation) == text);
    let generation = generation.ok_or_else(|| damaged(text))?;
    match generation_dir(dir, generation).is_dir() {
        true => Ok(Some(generation)),
        false => Err(damaged(format!("generation {generation} is missing"))),
    }
}

/// The number and its checksum: a flipped bit must not lead to another, empty generation.
fn current_line(generation: u64) -> String {
    format!("{generation} {:08x}\n", crc32fast::hash(&generation.to_le_bytes()))
}

fn set_current(dir: &Path, generation: u64) -> Result<()> {
    Ok(files::replace(&dir.join("CURRENT"), current_line(generation).as_bytes())?)
}

fn drop_other_generations(dir: &Path, keep: u64) -> Result<()> {
    let keep = generation_dir(dir, keep);
    for entry in std::fs::read_dir(dir)? {
        let path = entry?.path();
        let is_generation = path.file_name().is_some_and(|name| name.to_string_lossy().starts_with("gen-"));
        if is_generation && path != keep {
            std::fs::remove_dir_all(&path)?;
        }
    }
    Ok(())
}
