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
//!
//! A disk that is dropped is not mounted any more, even when somebody still holds a file of it or nobody
//! answers for it, and whoever drops it does not wait for long. Only a process that is killed leaves its
//! mounts behind; the next run in that folder takes them off.

pub mod flip;
mod fs;
pub mod journal;

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::mpsc;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use fuser::{BackgroundSession, MountOption};
use nix::mount::{MntFlags, umount, umount2};
use parking_lot::Mutex;

use journal::{Damage, Journal, Survivors};

/// How long what is under way on a disk may take to end, after its node has.
const UNMOUNT_LIMIT: Duration = Duration::from_secs(10);
/// The pause between two attempts to take it off.
const UNMOUNT_PAUSE: Duration = Duration::from_millis(50);

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
        // As the kernel names it in its list of mounts.
        let mount = mount.canonicalize()?;
        let mut disk = Disk { below, mount, faults: Arc::default(), journal, session: None };
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

    /// Takes it off once whatever is under way has ended.
    fn detach(&mut self) -> Result<()> {
        self.session.take();
        let end = Instant::now() + UNMOUNT_LIMIT;
        while connection(&self.mount)?.is_some() {
            ensure!(Instant::now() < end, "{} is still in use", self.mount.display());
            std::thread::sleep(UNMOUNT_PAUSE);
            // Refused as long as it is in use.
            let _ = umount(&self.mount);
        }
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
        self.detach()?;
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

impl Drop for Disk {
    fn drop(&mut self) {
        // Syncs end at once from now on.
        self.heal();
        if let Ok(Some(connection)) = connection(&self.mount) {
            let (mount, (done, is_off)) = (self.mount.clone(), mpsc::channel());
            // Off the tree at once, and for good when its last file is closed. What the kernel has still to
            // write it writes now, which takes for ever when nobody answers for the disk any more.
            std::thread::spawn(move || done.send(umount2(&mount, MntFlags::MNT_DETACH)));
            if is_off.recv_timeout(UNMOUNT_LIMIT).is_err() {
                drop(std::fs::write(format!("/sys/fs/fuse/connections/{connection}/abort"), "1"));
            }
        }
        self.session.take();
    }
}

/// The kernel's number for what is mounted at a path, by which FUSE names the connection; none when nothing
/// is. Nothing is asked of the file system itself, which might not answer.
fn connection(mount: &Path) -> Result<Option<u64>> {
    Ok(connection_in(&std::fs::read_to_string("/proc/self/mountinfo")?, mount))
}

/// The same in the kernel's list, where a line is `ID PARENT MAJOR:MINOR ROOT PATH …`.
fn connection_in(mounts: &str, mount: &Path) -> Option<u64> {
    let mut found = mounts.lines().filter_map(|line| {
        let mut fields = line.split(' ').skip(2);
        let device = fields.next()?;
        let path = fields.nth(1)?.replace("\\040", " ");
        (Path::new(&path) == mount).then(|| device.split_once(':')?.1.parse().ok()).flatten()
    });
    // Of several the one on top.
    found.next_back()
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
    fn a_mount_is_found_in_the_list() {
        let list = "22 1 8:1 / / rw - ext4 /dev/sda1 rw\n\
                    30 22 0:51 / /tmp/a\\040b/disk rw - fuse shoal-chaos rw\n\
                    31 22 0:52 / /tmp/disk rw - fuse shoal-chaos rw\n\
                    32 31 0:53 / /tmp/disk rw - fuse shoal-chaos rw\n";
        let found = |path: &str| connection_in(list, Path::new(path));
        assert_eq!(found("/tmp/a b/disk"), Some(51));
        assert_eq!(found("/tmp/disk"), Some(53), "the one on top");
        assert_eq!(found("/tmp"), None);
    }

    #[test]
    fn a_disk_that_is_in_use_is_off_when_it_is_dropped() {
        let Some((_dir, disk, mount)) = disk() else { return };
        let mut file = File::create(mount.join("log")).expect("a file");
        file.write_all(b"one").expect("written");
        let mount = mount.canonicalize().expect("there");
        assert!(connection(&mount).expect("listed").is_some());
        disk.faults().sync_delay_ms.store(60_000, Ordering::Relaxed);
        drop(disk);
        assert_eq!(connection(&mount).expect("listed"), None);
        // Its file goes on until it is closed.
        file.write_all(b"two").expect("written");
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
