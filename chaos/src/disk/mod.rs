//! A disk that can be broken: a file system of our own (FUSE) over a plain folder.
//!
//! | fault | what happens |
//! |---|---|
//! | power cut | changes that no sync has covered are gone, wholly or in part |
//! | failing sync | the next fsync answers EIO, and so do all after it until it is healed |
//! | slow sync | every fsync takes so long |
//! | lying sync | fsync answers and makes nothing durable |
//!
//! Flipped bits need no file system: [`flip`] changes the folder below while its node is down.

pub mod flip;
mod fs;
pub mod journal;

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::Duration;

use anyhow::{Context, Result};
use fuser::{BackgroundSession, MountOption};
use parking_lot::Mutex;

use journal::{Damage, Journal, Survivors};

/// What can be asked of a mounted disk at any time.
#[derive(Default, Debug)]
pub struct Faults {
    /// Every fsync answers EIO.
    pub sync_fails: AtomicBool,
    /// Every fsync takes so many milliseconds.
    pub sync_delay_ms: AtomicU64,
    /// Fsync answers and makes nothing durable.
    pub sync_lies: AtomicBool,
}

/// A mounted disk.
pub struct Disk {
    below: PathBuf,
    mount: PathBuf,
    faults: Arc<Faults>,
    journal: Arc<Mutex<Journal>>,
    session: Option<BackgroundSession>,
}

impl Disk {
    /// Mounts a fresh disk at `mount`. The bytes are in a folder beside it.
    ///
    /// # Errors
    /// When FUSE is not there or not allowed.
    pub fn mount(mount: &Path) -> Result<Disk> {
        let beside = |what: &str| mount.with_extension(what);
        let below = beside("below");
        std::fs::create_dir_all(&below)?;
        std::fs::create_dir_all(mount)?;
        let journal = Arc::new(Mutex::new(Journal::new(&beside("attic"))?));
        let mut disk =
            Disk { below, mount: mount.to_owned(), faults: Arc::default(), journal, session: None };
        disk.attach()?;
        Ok(disk)
    }

    fn attach(&mut self) -> Result<()> {
        let system = fs::Passthrough::new(&self.below, self.faults.clone(), self.journal.clone());
        let options = [MountOption::FSName("shoal-chaos".into()), MountOption::NoAtime];
        let session = fuser::spawn_mount2(system, &self.mount, &options);
        self.session = Some(session.with_context(|| format!("mount {}", self.mount.display()))?);
        Ok(())
    }

    /// Its faults.
    pub fn faults(&self) -> &Faults {
        &self.faults
    }

    /// The folder that holds the bytes.
    pub fn below(&self) -> &Path {
        &self.below
    }

    /// The power fails. The node must be dead already; afterwards the disk is mounted again,
    /// with nothing in the kernel's caches.
    ///
    /// # Errors
    /// When the files below cannot be changed or the disk cannot be mounted again.
    pub fn cut_power(&mut self, survivors: Survivors, seed: u64) -> Result<Damage> {
        // Unmounting waits for whatever is under way.
        self.session.take();
        let damage = self.journal.lock().cut(survivors, seed).context("undo what was not synced")?;
        self.attach()?;
        Ok(damage)
    }

    /// All faults end.
    pub fn heal(&self) {
        self.faults.sync_fails.store(false, Ordering::Relaxed);
        self.faults.sync_lies.store(false, Ordering::Relaxed);
        self.faults.sync_delay_ms.store(0, Ordering::Relaxed);
    }
}

impl Faults {
    fn delay(&self) -> Duration {
        Duration::from_millis(self.sync_delay_ms.load(Ordering::Relaxed))
    }
}

#[cfg(test)]
mod tests {
    use std::fs::{File, OpenOptions};
    use std::io::{Read, Seek, SeekFrom, Write};

    use super::*;

    /// Mounts, or says that it cannot and why.
    fn disk() -> Option<(tempfile::TempDir, Disk, PathBuf)> {
        let dir = tempfile::tempdir().expect("a directory");
        let mount = dir.path().join("disk");
        match Disk::mount(&mount) {
            Ok(disk) => Some((dir, disk, mount)),
            Err(error) => {
                eprintln!("skipped: {error:#}");
                None
            }
        }
    }

    #[test]
    fn it_is_a_file_system() {
        let Some((_dir, _disk, mount)) = disk() else { return };
        std::fs::create_dir(mount.join("d")).expect("a folder");
        let path = mount.join("d/f");
        let mut file = OpenOptions::new()
            .create(true)
            .truncate(true)
            .read(true)
            .write(true)
            .open(&path)
            .expect("a file");
        file.write_all(b"hello world").expect("written");
        file.seek(SeekFrom::Start(6)).expect("moved");
        file.write_all(b"there").expect("written");
        file.sync_all().expect("synced");
        let mut text = String::new();
        file.rewind().expect("moved");
        file.read_to_string(&mut text).expect("read");
        assert_eq!(text, "hello there");
        assert!(file.try_lock().is_ok());
        std::fs::rename(&path, mount.join("g")).expect("renamed");
        file.set_len(5).expect("cut");
        assert_eq!(std::fs::read_to_string(mount.join("g")).expect("read"), "hello");
        let names: Vec<_> = std::fs::read_dir(&mount)
            .expect("listed")
            .map(|entry| entry.expect("entry").file_name())
            .collect();
        assert_eq!(names.len(), 2, "{names:?}");
        std::fs::remove_file(mount.join("g")).expect("removed");
        std::fs::remove_dir(mount.join("d")).expect("removed");
        assert_eq!(std::fs::read_dir(&mount).expect("listed").count(), 0);
    }

    #[test]
    fn a_power_cut_takes_what_was_not_synced() {
        let Some((_dir, mut disk, mount)) = disk() else { return };
        let mut file = File::create(mount.join("log")).expect("a file");
        file.write_all(b"one").expect("written");
        file.sync_data().expect("synced");
        file.write_all(b"two").expect("written");
        std::fs::write(mount.join("other"), "unsynced").expect("written");
        drop(file);
        disk.cut_power(Survivors::None, 1).expect("cut");
        assert_eq!(std::fs::read_to_string(mount.join("log")).expect("read"), "one");
        assert!(!mount.join("other").exists());
    }

    #[test]
    fn syncs_fail_and_lie_on_demand() {
        let Some((_dir, mut disk, mount)) = disk() else { return };
        let mut file = File::create(mount.join("log")).expect("a file");
        file.write_all(b"one").expect("written");
        disk.faults().sync_fails.store(true, Ordering::Relaxed);
        assert_eq!(file.sync_data().expect_err("it fails").raw_os_error(), Some(libc::EIO));
        disk.heal();
        file.sync_data().expect("synced");
        disk.faults().sync_lies.store(true, Ordering::Relaxed);
        file.write_all(b"two").expect("written");
        file.sync_data().expect("so it says");
        drop(file);
        disk.cut_power(Survivors::None, 1).expect("cut");
        assert_eq!(std::fs::read_to_string(mount.join("log")).expect("read"), "one");
    }
}
