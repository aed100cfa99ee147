//! How far the log is known to have been good, so that damage is told from a torn end.
//!
//! raft-engine cuts off whatever follows the first unreadable record of its newest files: right
//! for a write that a crash has torn, which nobody was told of; wrong for a flipped bit in a
//! record that was acknowledged. Two files beside its own make the difference:
//!
//! - `synced`: the number of the last batch that was synced. Each batch carries its number, so a
//!   log that ends before it has lost something. It is written after each batch and synced at
//!   most every [`SYNC_EVERY`]: the end of a process loses nothing of it, a power cut that much.
//! - `rewritten`: length and checksum of the files into which raft-engine has moved old entries.

use std::collections::{BTreeMap, BTreeSet};
use std::fs::{File, OpenOptions};
use std::io;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant, SystemTime};

use serde::{Deserialize, Serialize};
use shoal_proto::codec;

/// The longest time that a number stands in `synced` without being synced itself.
pub(super) const SYNC_EVERY: Duration = Duration::from_secs(1);

/// Bytes of one of the two places in `synced`: a number and its checksum.
const SLOT_BYTES: usize = 12;

/// What a file of moved entries must begin with.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
struct Prefix {
    bytes: u64,
    crc: u32,
}

pub(super) struct Mark {
    dir: PathBuf,
    file: File,
    sequence: u64,
    synced_at: Instant,
    is_dirty: bool,
    rewritten: BTreeMap<String, Prefix>,
    /// When the files of moved entries were written last, as of the last look.
    looked_at: BTreeMap<PathBuf, SystemTime>,
}

impl Mark {
    /// Reads the marks of a log directory and checks the files of moved entries against theirs.
    ///
    /// # Errors
    /// When a mark is unreadable, or a file does not begin as it should.
    pub(super) fn open(dir: &Path) -> io::Result<Mark> {
        let path = dir.join("synced");
        let file = OpenOptions::new().read(true).write(true).create(true).truncate(false).open(path)?;
        let mut bytes = [0; 2 * SLOT_BYTES];
        let sequence = match file.metadata()?.len() {
            0 => 0,
            length => {
                // A power cut may have kept the first of the two only.
                let length = (length as usize).min(bytes.len());
                file.read_exact_at(&mut bytes[..length], 0)?;
                let numbers = bytes.chunks(SLOT_BYTES).filter_map(read_slot);
                match numbers.max() {
                    Some(number) => number,
                    // Its size reached the disk before the first number did.
                    None if bytes == [0; 2 * SLOT_BYTES] => 0,
                    None => return Err(damaged("the mark of the last synced batch is unreadable")),
                }
            }
        };
        let rewritten: BTreeMap<String, Prefix> = match std::fs::read(dir.join("rewritten")) {
            Ok(bytes) => {
                let (sum, body) = bytes.split_at_checked(4).unwrap_or_default();
                if sum != crc32fast::hash(body).to_le_bytes() {
                    return Err(damaged("the marks of moved entries are unreadable"));
                }
                codec::decode(body).map_err(|error| damaged(&error.to_string()))?
            }
            Err(error) if error.kind() == io::ErrorKind::NotFound => BTreeMap::new(),
            Err(error) => return Err(error),
        };
        check_numbers(dir)?;
        let mut has_seen_one = false;
        for (name, wanted) in &rewritten {
            match std::fs::read(dir.join(name)) {
                Ok(bytes) => {
                    has_seen_one = true;
                    let prefix = usize::try_from(wanted.bytes).ok().and_then(|length| bytes.get(..length));
                    if prefix.map(crc32fast::hash) != Some(wanted.crc) {
                        return Err(damaged(&format!("{name} is not what it was")));
                    }
                }
                // Files are dropped oldest first, perhaps after the marks were written.
                Err(error) if error.kind() == io::ErrorKind::NotFound && !has_seen_one => {}
                Err(error) if error.kind() == io::ErrorKind::NotFound => {
                    return Err(damaged(&format!("{name} is missing")));
                }
                Err(error) => return Err(error),
            }
        }
        Ok(Mark {
            dir: dir.to_owned(),
            file,
            sequence,
            synced_at: Instant::now(),
            is_dirty: false,
            rewritten,
            looked_at: BTreeMap::new(),
        })
    }

    /// The number of the last batch that is known to have been synced.
    pub(super) fn sequence(&self) -> u64 {
        self.sequence
    }

    /// Whether the last number is not durable yet.
    pub(super) fn is_dirty(&self) -> bool {
        self.is_dirty
    }

    /// Makes the last number durable if it has waited for long enough.
    pub(super) fn sync_if_due(&mut self) -> io::Result<()> {
        if self.synced_at.elapsed() >= SYNC_EVERY { self.sync() } else { Ok(()) }
    }

    /// Notes that a batch was synced.
    pub(super) fn note(&mut self, sequence: u64) -> io::Result<()> {
        let number = sequence.to_le_bytes();
        let mut slot = number.to_vec();
        slot.extend_from_slice(&crc32fast::hash(&number).to_le_bytes());
        self.file.write_all_at(&slot, (sequence % 2) * SLOT_BYTES as u64)?;
        self.sequence = sequence;
        self.is_dirty = true;
        Ok(())
    }

    /// Makes the last number durable.
    pub(super) fn sync(&mut self) -> io::Result<()> {
        if std::mem::take(&mut self.is_dirty) {
            self.file.sync_data()?;
            self.synced_at = Instant::now();
        }
        Ok(())
    }

    /// Notes what the files of moved entries hold. They are synced first: raft-engine does that for
    /// entries it has moved, but not for the header of a file that holds none yet.
    pub(super) fn note_rewritten(&mut self) -> io::Result<()> {
        let mut files = BTreeMap::new();
        for entry in std::fs::read_dir(&self.dir)? {
            let entry = entry?;
            if entry.path().extension().is_some_and(|extension| extension == "rewrite") {
                files.insert(entry.path(), entry.metadata()?.modified()?);
            }
        }
        if files == self.looked_at {
            return Ok(());
        }
        let mut found = BTreeMap::new();
        for (path, written_at) in &files {
            let name = path.file_name().unwrap_or_default().to_string_lossy().into_owned();
            let known = self.rewritten.get(&name).filter(|_| self.looked_at.get(path) == Some(written_at));
            if let Some(known) = known {
                found.insert(name, known.clone());
                continue;
            }
            File::open(path)?.sync_all()?;
            let bytes = std::fs::read(path)?;
            // The newest file is longer than what was written to it: its end is zeros.
            let written = bytes.iter().rposition(|byte| *byte != 0).map_or(0, |last| last + 1);
            found.insert(name, Prefix { bytes: written as u64, crc: crc32fast::hash(&bytes[..written]) });
        }
        self.looked_at = files;
        let body = codec::encode(&found);
        let mut bytes = crc32fast::hash(&body).to_le_bytes().to_vec();
        bytes.extend_from_slice(&body);
        let fresh = self.dir.join("rewritten.fresh");
        std::fs::write(&fresh, bytes)?;
        File::open(&fresh)?.sync_all()?;
        std::fs::rename(&fresh, self.dir.join("rewritten"))?;
        File::open(&self.dir)?.sync_all()?;
        self.rewritten = found;
        Ok(())
    }
}

/// raft-engine takes the files of each kind from the last gap in their numbers on, and says nothing
/// of those before it.
fn check_numbers(dir: &Path) -> io::Result<()> {
    for kind in ["raftlog", "rewrite"] {
        let mut numbers = BTreeSet::new();
        for entry in std::fs::read_dir(dir)? {
            let path = entry?.path();
            let stem = path.file_stem().unwrap_or_default().to_string_lossy();
            if path.extension().is_some_and(|extension| extension == kind) {
                numbers.extend(stem.parse::<u64>());
            }
        }
        let span = numbers.first().zip(numbers.last()).map_or(0, |(first, last)| last - first + 1);
        if span != numbers.len() as u64 {
            return Err(damaged(&format!("a .{kind} file is missing")));
        }
    }
    Ok(())
}

fn read_slot(slot: &[u8]) -> Option<u64> {
    let (number, sum) = slot.split_at_checked(8)?;
    (sum == crc32fast::hash(number).to_le_bytes())
        .then(|| u64::from_le_bytes(number.try_into().expect("eight bytes")))
}

/// The error that a node must not start with: what is left of the log is not what was
/// acknowledged, and a vote on its word could lose what a majority has.
pub(super) fn damaged(what: &str) -> io::Error {
    let advice = "this node must not vote with what is left of its log. If there is no other node, \
                  restore a backup";
    io::Error::new(io::ErrorKind::InvalidData, format!("the Raft log is damaged ({what}): {advice}"))
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The two places of `synced` after batches 2 and 3.
    const SYNCED: [u8; 24] =
        [2, 0, 0, 0, 0, 0, 0, 0, 20, 216, 7, 39, 3, 0, 0, 0, 0, 0, 0, 0, 138, 216, 173, 235];
    const MOVED: &str = "0000000000000001.rewrite";

    /// `rewritten` when that file of moved entries holds the word "moved" and nothing else.
    fn rewritten() -> Vec<u8> {
        let (sum, of_file) = ([209, 33, 204, 212], [245, 141, 236, 198]);
        [&sum[..], &[1, 1, 24], MOVED.as_bytes(), &[5, 252], &of_file].concat()
    }

    #[test]
    fn marks_stay_as_they_are() {
        let dir = tempfile::tempdir().expect("a directory");
        std::fs::write(dir.path().join(MOVED), b"moved").expect("written");
        let mut mark = Mark::open(dir.path()).expect("nothing is marked yet");
        for sequence in [1, 2, 3] {
            mark.note(sequence).expect("noted");
        }
        mark.note_rewritten().expect("noted");
        assert_eq!(std::fs::read(dir.path().join("synced")).expect("there"), SYNCED);
        assert_eq!(std::fs::read(dir.path().join("rewritten")).expect("there"), rewritten());
    }

    #[test]
    fn marks_of_an_earlier_build_are_read() {
        let dir = tempfile::tempdir().expect("a directory");
        let write = |name: &str, bytes: &[u8]| std::fs::write(dir.path().join(name), bytes).expect("written");
        write("synced", &SYNCED);
        write("rewritten", &rewritten());
        write(MOVED, b"moved, and more since");
        assert_eq!(Mark::open(dir.path()).expect("as it was").sequence(), 3);
        write(MOVED, b"moves, and more since");
        assert!(Mark::open(dir.path()).is_err(), "a moved entry is not what it was");
        write(MOVED, b"moved");
        write("synced", &SYNCED[..12]);
        assert_eq!(Mark::open(dir.path()).expect("the first place").sequence(), 2);
    }
}
