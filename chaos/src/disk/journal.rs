//! What a power cut would take back.
//!
//! Every change goes to the file below at once, and how to undo it is noted here. A sync forgets
//! the notes that it makes durable; a power cut undoes what is left, newest first:
//!
//! ```text
//!  write ─▶ file below, old bytes noted        fsync(file) ─▶ its notes and those about names go
//!  create, rename, remove ─▶ noted             power cut   ─▶ notes undone, newest first
//! ```
//!
//! Names follow ext4, where the journal commits in order: a sync of any file makes all earlier
//! changes of names durable, while the bytes of other files stay at risk. A write that is still
//! at risk may be lost as a whole, or page by page, or be torn within a page.

use std::collections::HashMap;
use std::fs::{File, OpenOptions};
use std::io;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};

use rand::rngs::StdRng;
use rand::{RngExt, SeedableRng};

/// What survives of writes that no sync has covered.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Survivors {
    /// Nothing.
    None,
    /// Each page of 4 KiB by the throw of a coin, as a kernel writes back in any order.
    Pages,
    /// Each page by the throw of a coin, and some only up to one of its sectors of 512 bytes.
    Torn,
}

/// The size of a page, in bytes.
const PAGE: u64 = 4096;
/// The size of a sector, in bytes: what a disk writes wholly or not at all.
const SECTOR: u64 = 512;

/// How to undo one change.
#[derive(Debug)]
enum Note {
    /// Bytes of a file, and its length before.
    Bytes { file: u64, offset: u64, old: Vec<u8>, length_before: u64, written: u64 },
    /// A file or folder that was not there before.
    Created { path: PathBuf },
    /// A file that was there before; `kept` is another name for it.
    Removed { path: PathBuf, kept: PathBuf },
    /// A folder that was there before.
    RemovedFolder { path: PathBuf },
    /// Another name; `kept` is what it replaced.
    Renamed { from: PathBuf, to: PathBuf, kept: Option<PathBuf> },
}

/// The notes of one disk.
#[derive(Debug)]
pub struct Journal {
    notes: Vec<Note>,
    /// Where removed files are kept until their removal is durable.
    attic: PathBuf,
    next_kept: u64,
    /// Where the bytes of each file are: files keep their number when they are renamed.
    paths: HashMap<u64, PathBuf>,
}

impl Journal {
    /// An empty journal that keeps removed files in a folder of its own.
    ///
    /// # Errors
    /// When the folder cannot be made.
    pub fn new(attic: &Path) -> io::Result<Journal> {
        std::fs::create_dir_all(attic)?;
        Ok(Journal { notes: Vec::new(), attic: attic.to_owned(), next_kept: 0, paths: HashMap::new() })
    }

    /// Notes what a write is about to change. `path` is where the file is now.
    ///
    /// # Errors
    /// When the old bytes cannot be read.
    pub fn before_write(
        &mut self,
        file: u64,
        path: &Path,
        below: &File,
        offset: u64,
        length: u64,
    ) -> io::Result<()> {
        let length_before = below.metadata()?.len();
        let mut old = vec![0; length.min(length_before.saturating_sub(offset)) as usize];
        below.read_exact_at(&mut old, offset)?;
        self.paths.insert(file, path.to_owned());
        self.notes.push(Note::Bytes { file, offset, old, length_before, written: length });
        Ok(())
    }

    /// Notes what a change of length is about to cut off.
    ///
    /// # Errors
    /// When the old bytes cannot be read.
    pub fn before_resize(&mut self, file: u64, path: &Path, below: &File, length: u64) -> io::Result<()> {
        let before = below.metadata()?.len();
        self.before_write(file, path, below, length.min(before), before.saturating_sub(length))?;
        // A change of length is undone as a whole.
        if let Some(Note::Bytes { written, .. }) = self.notes.last_mut() {
            *written = 0;
        }
        Ok(())
    }

    /// Notes a new file or folder.
    pub fn created(&mut self, path: &Path) {
        self.notes.push(Note::Created { path: path.to_owned() });
    }

    /// Removes a file, keeping it until that is durable.
    ///
    /// # Errors
    /// When it cannot be removed.
    pub fn remove(&mut self, path: &Path) -> io::Result<()> {
        let kept = self.keep(path)?;
        self.notes.push(Note::Removed { path: path.to_owned(), kept });
        Ok(())
    }

    /// Removes an empty folder.
    ///
    /// # Errors
    /// When it cannot be removed.
    pub fn remove_folder(&mut self, path: &Path) -> io::Result<()> {
        std::fs::remove_dir(path)?;
        self.notes.push(Note::RemovedFolder { path: path.to_owned() });
        Ok(())
    }

    /// Renames a file or folder, keeping what it replaces.
    ///
    /// # Errors
    /// When it cannot be renamed.
    pub fn rename(&mut self, from: &Path, to: &Path) -> io::Result<()> {
        let kept = if to.is_file() { Some(self.keep(to)?) } else { None };
        std::fs::rename(from, to)?;
        for path in self.paths.values_mut() {
            if let Ok(rest) = path.strip_prefix(from) {
                *path = if rest.as_os_str().is_empty() { to.to_owned() } else { to.join(rest) };
            }
        }
        self.notes.push(Note::Renamed { from: from.to_owned(), to: to.to_owned(), kept });
        Ok(())
    }

    fn keep(&mut self, path: &Path) -> io::Result<PathBuf> {
        let kept = self.attic.join(self.next_kept.to_string());
        self.next_kept += 1;
        std::fs::rename(path, &kept)?;
        for known in self.paths.values_mut().filter(|known| *known == path) {
            known.clone_from(&kept);
        }
        Ok(kept)
    }

    /// A sync of this file, or of a folder when there is none: its bytes and all names so far
    /// are safe.
    pub fn synced(&mut self, file: Option<u64>) {
        for note in std::mem::take(&mut self.notes) {
            match note {
                Note::Bytes { file: of, .. } if Some(of) != file => self.notes.push(note),
                Note::Removed { kept, .. } | Note::Renamed { kept: Some(kept), .. } => {
                    // A file without a name and without bytes at risk is gone for good.
                    drop(std::fs::remove_file(&kept));
                    self.paths.retain(|_, path| *path != kept);
                }
                _ => {}
            }
        }
        let paths = &self.paths;
        self.notes.retain(|note| !matches!(note, Note::Bytes { file, .. } if !paths.contains_key(file)));
    }

    /// The power fails: what is at risk is undone, but for what happens to survive. Bytes come
    /// first and names last, so that a file whose name survives has lost what was not synced.
    ///
    /// # Errors
    /// When the files below cannot be changed.
    pub fn cut(&mut self, survivors: Survivors, seed: u64) -> io::Result<Damage> {
        let mut coin = StdRng::seed_from_u64(seed);
        let mut damage = Damage::default();
        let (bytes, names): (Vec<Note>, Vec<Note>) =
            std::mem::take(&mut self.notes).into_iter().partition(|note| matches!(note, Note::Bytes { .. }));
        // Of each file the length before its oldest note, and the end of the last byte that survived.
        let mut lengths: HashMap<u64, (u64, u64)> = HashMap::new();
        for note in bytes.into_iter().rev() {
            let Note::Bytes { file, offset, old, length_before, written } = note else { continue };
            let Some(path) = self.paths.get(&file).filter(|path| path.is_file()) else { continue };
            let below = OpenOptions::new().read(true).write(true).open(path)?;
            damage.writes += 1;
            let survived_to = undo_bytes(&below, (offset, &old, written), survivors, &mut coin)?;
            let length = lengths.entry(file).or_default();
            *length = (length_before, length.1.max(survived_to));
        }
        for (file, (before, survived_to)) in lengths {
            if let Some(path) = self.paths.get(&file) {
                OpenOptions::new().write(true).open(path)?.set_len(before.max(survived_to))?;
            }
        }
        for note in names.into_iter().rev() {
            damage.names += 1;
            match note {
                Note::Created { path } if path.is_dir() => std::fs::remove_dir_all(path)?,
                Note::Created { path } => drop(std::fs::remove_file(path)),
                Note::Removed { path, kept } => std::fs::rename(kept, path)?,
                Note::RemovedFolder { path } => std::fs::create_dir(path)?,
                Note::Renamed { from, to, kept } => {
                    std::fs::rename(&to, from)?;
                    if let Some(kept) = kept {
                        std::fs::rename(kept, to)?;
                    }
                }
                Note::Bytes { .. } => {}
            }
        }
        self.paths.clear();
        Ok(damage)
    }
}

/// What a power cut took.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Damage {
    /// Writes that were undone, wholly or in part.
    pub writes: u64,
    /// Changes of names that were undone.
    pub names: u64,
}

/// Undoes a write page by page, but for the pages that survive; returns the end of the last byte
/// that did. A change of length, which has written nothing, is undone as a whole.
fn undo_bytes(
    below: &File,
    (offset, old, written): (u64, &[u8], u64),
    survivors: Survivors,
    coin: &mut StdRng,
) -> io::Result<u64> {
    if written == 0 {
        below.write_all_at(old, offset)?;
        return Ok(0);
    }
    let end = offset + written;
    let covered = offset + old.len() as u64;
    let mut survived_to = 0;
    let mut at = offset;
    while at < end {
        let page_end = ((at / PAGE + 1) * PAGE).min(end);
        let lost_from = match survivors {
            Survivors::None => at,
            Survivors::Pages if coin.random_bool(0.5) => page_end,
            Survivors::Torn if coin.random_bool(0.4) => page_end,
            // Up to the beginning of one of the page's sectors.
            Survivors::Torn if coin.random_bool(0.5) => {
                let sector = coin.random_range(0..PAGE / SECTOR) * SECTOR;
                (at / PAGE * PAGE + sector).clamp(at, page_end)
            }
            Survivors::Pages | Survivors::Torn => at,
        };
        if lost_from > at {
            survived_to = lost_from;
        }
        if lost_from < covered.min(page_end) {
            let range = (lost_from - offset) as usize..(page_end.min(covered) - offset) as usize;
            below.write_all_at(&old[range], lost_from)?;
        }
        let from = lost_from.max(covered);
        if from < page_end {
            // Beyond the old end there was nothing: what is left of it reads as zeros.
            below.write_all_at(&vec![0; (page_end - from) as usize], from)?;
        }
        at = page_end;
    }
    Ok(survived_to)
}

#[cfg(test)]
mod tests {
    use std::io::Write;

    use super::*;

    struct Disk {
        dir: tempfile::TempDir,
        journal: Journal,
    }

    impl Disk {
        fn new() -> Disk {
            let dir = tempfile::tempdir().expect("a directory");
            let journal = Journal::new(&dir.path().join("attic")).expect("a journal");
            Disk { dir, journal }
        }

        fn path(&self, name: &str) -> PathBuf {
            self.dir.path().join(name)
        }

        fn create(&mut self, name: &str) {
            File::create(self.path(name)).expect("created");
            let path = self.path(name);
            self.journal.created(&path);
        }

        fn write(&mut self, number: u64, name: &str, offset: u64, bytes: &[u8]) {
            let path = self.path(name);
            let below = OpenOptions::new().read(true).write(true).open(&path).expect("opened");
            self.journal.before_write(number, &path, &below, offset, bytes.len() as u64).expect("noted");
            below.write_all_at(bytes, offset).expect("written");
        }

        fn content(&self, name: &str) -> Option<String> {
            std::fs::read_to_string(self.path(name)).ok()
        }
    }

    #[test]
    fn what_was_not_synced_is_taken_back() {
        let mut disk = Disk::new();
        disk.create("a");
        disk.write(1, "a", 0, b"first");
        disk.journal.synced(Some(1));
        disk.write(1, "a", 2, b"REST-AND-MORE");
        disk.create("b");
        disk.write(2, "b", 0, b"never synced");
        let damage = disk.journal.cut(Survivors::None, 1).expect("cut");
        assert_eq!((disk.content("a").as_deref(), disk.content("b")), (Some("first"), None));
        assert_eq!(damage, Damage { writes: 2, names: 1 });
    }

    #[test]
    fn a_sync_saves_names_but_not_the_bytes_of_other_files() {
        let mut disk = Disk::new();
        disk.create("a");
        disk.write(1, "a", 0, b"lost");
        disk.create("b");
        disk.write(2, "b", 0, b"kept");
        disk.journal.synced(Some(2));
        disk.journal.cut(Survivors::None, 1).expect("cut");
        assert_eq!((disk.content("a").as_deref(), disk.content("b").as_deref()), (Some(""), Some("kept")));
    }

    #[test]
    fn names_go_back_in_order() {
        let mut disk = Disk::new();
        disk.create("current");
        disk.write(1, "current", 0, b"old");
        disk.journal.synced(Some(1));
        disk.create("fresh");
        disk.write(2, "fresh", 0, b"new");
        let (fresh, current) = (disk.path("fresh"), disk.path("current"));
        disk.journal.rename(&fresh, &current).expect("renamed");
        assert_eq!(disk.content("current").as_deref(), Some("new"));
        disk.journal.remove(&current).expect("removed");
        disk.journal.cut(Survivors::None, 1).expect("cut");
        assert_eq!((disk.content("current").as_deref(), disk.content("fresh")), (Some("old"), None));
    }

    #[test]
    fn a_file_that_was_cut_short_grows_back() {
        let mut disk = Disk::new();
        disk.create("a");
        disk.write(1, "a", 0, b"long content");
        disk.journal.synced(Some(1));
        let path = disk.path("a");
        let mut below = OpenOptions::new().read(true).write(true).open(&path).expect("opened");
        disk.journal.before_resize(1, &path, &below, 0).expect("noted");
        below.set_len(0).expect("cut");
        below.write_all(b"x").expect("written");
        disk.journal.cut(Survivors::None, 1).expect("cut");
        assert_eq!(disk.content("a").as_deref(), Some("long content"));
    }

    #[test]
    fn some_pages_survive_and_the_seed_says_which() {
        let survivors = |kind, seed| {
            let mut disk = Disk::new();
            disk.create("a");
            disk.write(1, "a", 0, &[b'o'; 64 << 10]);
            disk.journal.synced(Some(1));
            disk.write(1, "a", 0, &[b'n'; 64 << 10]);
            disk.journal.cut(kind, seed).expect("cut");
            disk.content("a").expect("there")
        };
        let text = survivors(Survivors::Pages, 7);
        let news = text.bytes().filter(|byte| *byte == b'n').count();
        assert!(news > 0 && news < text.len() && news.is_multiple_of(4096), "{news}");
        assert_eq!(text, survivors(Survivors::Pages, 7));
        // Of a file that grows, later pages may survive without earlier ones.
        let grown = |seed| {
            let mut disk = Disk::new();
            disk.create("a");
            disk.journal.synced(Some(1));
            disk.write(1, "a", 0, &[b'n'; 100]);
            disk.write(1, "a", 100, &[b'm'; 8000]);
            disk.journal.cut(Survivors::Pages, seed).expect("cut");
            disk.content("a").expect("there").len()
        };
        let lengths: std::collections::BTreeSet<usize> = (0..40).map(grown).collect();
        assert!(lengths.contains(&0) && lengths.contains(&8100), "{lengths:?}");
        let torn = survivors(Survivors::Torn, 7).bytes().filter(|byte| *byte == b'n').count();
        assert!(torn.is_multiple_of(512), "{torn}");
    }
}
