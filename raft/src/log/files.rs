//! The files of the log: raft-engine, and the marks beside it that tell how far it was good.

use std::io;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use raft_engine::{Command, Config, Engine, LogBatch, ReadableSize};
use shoal_proto::planted::{Bug, crash_point, is_planted};

use super::mark::{self, Mark};
use super::record::{self, Record};
use super::writer::{Change, Records};

/// The exit code when the log could not be written or synced: the node cannot keep its promise.
pub const EXIT_LOG_FAILED: i32 = 74;

/// About how many bytes are read at a time when the log is checked at its opening.
const VERIFY_BYTES: usize = 4 << 20;
/// How often files that hold only purged entries are looked for.
const PURGE_EVERY: Duration = Duration::from_secs(10);

/// Settings of the log.
#[derive(Clone, Debug)]
pub struct LogConfig {
    /// Size at which a log file is closed and the next one begun, in bytes.
    pub file_bytes: u64,
    /// Size of all log files beyond which old ones are rewritten or dropped, in bytes.
    pub purge_threshold_bytes: u64,
}

impl Default for LogConfig {
    fn default() -> Self {
        LogConfig { file_bytes: 32 << 20, purge_threshold_bytes: 256 << 20 }
    }
}

pub(super) struct Files {
    engine: Engine,
    mark: Mark,
    /// The number of the last batch.
    sequence: u64,
    purged_at: Instant,
}

impl Files {
    /// Opens or creates the files in a directory.
    ///
    /// A torn record at the end of the newest file (a crash in mid-write) is cut off: it was
    /// never acknowledged.
    ///
    /// # Errors
    /// When the files cannot be read, and when something is missing that was acknowledged.
    pub(super) fn open(dir: &Path, config: &LogConfig) -> io::Result<Files> {
        std::fs::create_dir_all(dir)?;
        let mark = Mark::open(dir)?;
        let engine = Engine::open(Config {
            dir: dir.to_str().ok_or_else(|| io::Error::other("the log's path is not UTF-8"))?.to_owned(),
            target_file_size: ReadableSize(config.file_bytes),
            purge_threshold: ReadableSize(config.purge_threshold_bytes.max(config.file_bytes)),
            enable_log_recycle: false,
            ..Config::default()
        })
        .map_err(|error| match error {
            raft_engine::Error::Corruption(what) => mark::damaged(&what),
            error => io::Error::other(error),
        })?;
        let sequence = match engine.get(record::BATCHES, record::SEQUENCE) {
            Some(number) => u64::from_le_bytes(number.try_into().unwrap_or_default()),
            None => 0,
        };
        if sequence < mark.sequence() {
            let what = format!("it ends at batch {sequence} of {}", mark.sequence());
            return Err(mark::damaged(&what));
        }
        verify(&engine)?;
        sync_directories(dir)?;
        Ok(Files { engine, mark, sequence, purged_at: Instant::now() })
    }

    /// Notes how far the log is good. A mark that cannot be written would let damage pass for a
    /// torn end later, so it counts as a failure of the log.
    fn marked(&mut self, note: impl FnOnce(&mut Mark) -> io::Result<()>) {
        if let Err(error) = note(&mut self.mark) {
            fail(&format!("how far it is good cannot be noted: {error}"));
        }
    }

    fn purge(&mut self) {
        self.purged_at = Instant::now();
        metrics::gauge!("shoal_raft_log_bytes").set(self.engine.get_used_size() as f64);
        // It may sync, and raft-engine panics when that fails.
        let purge = std::panic::AssertUnwindSafe(|| self.engine.purge_expired_files());
        match std::panic::catch_unwind(purge) {
            Ok(Ok(_)) => {}
            Ok(Err(error)) => fail(&format!("old files could not be purged: {error}")),
            Err(_) => fail("fdatasync failed while old files were purged"),
        }
        self.marked(Mark::note_rewritten);
    }
}

impl Records for Files {
    fn write(&mut self, changes: Vec<(u64, Change)>, sync: bool) {
        let mut batch = LogBatch::default();
        for (group, change) in changes {
            add(&mut batch, group, change);
        }
        let sync = sync && !is_planted(Bug::AckBeforeSync);
        if sync {
            self.sequence += 1;
            let number = self.sequence.to_le_bytes().to_vec();
            put(&mut batch, record::BATCHES, record::SEQUENCE, number);
        }
        crash_point("log-unwritten");
        // raft-engine panics when fdatasync fails, and reports other failures as errors: both
        // end the process, because what is on the disk is not known any more.
        let write = std::panic::AssertUnwindSafe(|| self.engine.write(&mut batch, sync));
        match std::panic::catch_unwind(write) {
            Ok(Ok(_)) => {}
            Ok(Err(error)) => fail(&error.to_string()),
            Err(_) => fail("fdatasync failed"),
        }
        crash_point("log-synced");
        if sync {
            let sequence = self.sequence;
            self.marked(|mark| mark.note(sequence));
            crash_point("log-marked");
        }
    }

    fn entries(&self, group: u64, first: u64, end: u64) -> io::Result<Vec<Vec<u8>>> {
        let mut found = Vec::new();
        // A log's first index need not be zero: what was never there is not asked for.
        let first = first.max(self.engine.first_index(group).unwrap_or(end));
        if first >= end {
            return Ok(Vec::new());
        }
        self.engine
            .fetch_entries_to::<Record>(group, first, end, None, &mut found)
            .map_err(|error| io::Error::other(format!("log of group {group}: {error}")))?;
        found.iter().map(|entry| record::unwrap(group, entry).map(<[u8]>::to_vec)).collect()
    }

    fn get(&self, group: u64, key: &[u8]) -> Option<Vec<u8>> {
        self.engine.get(group, key)
    }

    fn span(&self, group: u64) -> Option<(u64, u64)> {
        self.engine.first_index(group).zip(self.engine.last_index(group))
    }

    fn groups(&self) -> Vec<u64> {
        let mut groups = self.engine.raft_groups();
        groups.retain(|group| *group != record::BATCHES);
        groups
    }

    fn patience(&self) -> Duration {
        if self.mark.is_dirty() { mark::SYNC_EVERY } else { PURGE_EVERY }
    }

    fn tend(&mut self, is_idle: bool) {
        self.marked(if is_idle { Mark::sync } else { Mark::sync_if_due });
        if self.purged_at.elapsed() >= PURGE_EVERY {
            self.purge();
        }
    }
}

/// Reads every entry once: raft-engine checks the list of a batch's entries when it opens, the
/// entries themselves only when they are read.
fn verify(engine: &Engine) -> io::Result<()> {
    for group in engine.raft_groups() {
        let (Some(first), Some(last)) = (engine.first_index(group), engine.last_index(group)) else {
            continue;
        };
        let mut next = first;
        while next <= last {
            let mut found = Vec::new();
            let read =
                engine.fetch_entries_to::<Record>(group, next, last + 1, Some(VERIFY_BYTES), &mut found);
            read.map_err(|error| match error {
                raft_engine::Error::Corruption(what) => {
                    mark::damaged(&format!("an entry of group {group}: {what}"))
                }
                error => io::Error::other(error),
            })?;
            for entry in &found {
                record::unwrap(group, entry).map_err(|error| mark::damaged(&error.to_string()))?;
            }
            next += found.len().max(1) as u64;
        }
    }
    Ok(())
}

/// raft-engine syncs the directory only when it rotates files; the first file needs it too.
fn sync_directories(dir: &Path) -> io::Result<()> {
    std::fs::File::open(dir)?.sync_all()?;
    let parent = dir.parent().map(PathBuf::from).filter(|parent| !parent.as_os_str().is_empty());
    std::fs::File::open(parent.unwrap_or_else(|| PathBuf::from(".")))?.sync_all()
}

fn add(batch: &mut LogBatch, group: u64, change: Change) {
    match change {
        Change::Append { first, bodies, clear_tail } => {
            if clear_tail {
                batch.delete(group, record::TAIL.to_vec());
            }
            let wrapped: Vec<_> =
                (first..).zip(&bodies).map(|(index, body)| record::wrap(group, index, body)).collect();
            if let Err(error) = batch.add_entries::<Record>(group, &wrapped) {
                fail(&format!("a batch of {} entries does not fit: {error}", wrapped.len()));
            }
        }
        Change::Put { key, value } => put(batch, group, key, value),
        Change::Purge { upto, purged } => {
            put(batch, group, record::PURGED, purged);
            batch.add_command(group, Command::Compact { index: upto + 1 });
        }
        Change::Reset { kept } => {
            batch.add_command(group, Command::Clean);
            for (key, value) in kept {
                put(batch, group, key, value);
            }
        }
    }
}

fn put(batch: &mut LogBatch, group: u64, key: &[u8], value: Vec<u8>) {
    batch.put(group, key.to_vec(), value).expect("our keys are not raft-engine's own");
}

fn fail(reason: &str) -> ! {
    tracing::error!(reason, "the Raft log cannot be written: this node stops, nothing more is acknowledged");
    eprintln!("shoal: the Raft log cannot be written ({reason}); stopping with exit code {EXIT_LOG_FAILED}");
    std::process::exit(EXIT_LOG_FAILED)
}
