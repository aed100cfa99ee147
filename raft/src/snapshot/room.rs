//! Whether the disk has room for snapshots: as the node says now and then, and as the file system says before
//! more is written.

use std::io;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

/// The room above the disk's reserve. Clones share it.
#[derive(Clone)]
pub(crate) struct Room(Arc<Inner>);

struct Inner {
    dir: PathBuf,
    reserve_bytes: u64,
    is_there: AtomicBool,
}

impl Room {
    /// On the file system of `dir`, of which `reserve_bytes` stay free. There is room until somebody says
    /// otherwise.
    pub(crate) fn above(dir: &Path, reserve_bytes: u64) -> Room {
        let is_there = AtomicBool::new(true);
        Room(Arc::new(Inner { dir: dir.to_owned(), reserve_bytes, is_there }))
    }

    /// Whether there was room when the node looked last.
    pub(crate) fn is_there(&self) -> bool {
        self.0.is_there.load(Ordering::Relaxed)
    }

    pub(crate) fn set(&self, is_there: bool) {
        self.0.is_there.store(is_there, Ordering::Relaxed);
    }

    /// Asks the file system whether so many bytes more leave the reserve free. Blocks.
    ///
    /// # Errors
    /// Storage full, when they do not.
    pub(crate) fn check(&self, more_bytes: u64) -> io::Result<()> {
        self.require()?;
        let needed = self.0.reserve_bytes.saturating_add(more_bytes);
        if free_bytes(&self.0.dir)? < needed { Err(full()) } else { Ok(()) }
    }

    /// The same without asking the file system.
    ///
    /// # Errors
    /// Storage full, when there was no room when the node looked last.
    pub(crate) fn require(&self) -> io::Result<()> {
        if self.is_there() { Ok(()) } else { Err(full()) }
    }
}

fn full() -> io::Error {
    io::Error::new(io::ErrorKind::StorageFull, "the disk's reserve leaves no room for the snapshot")
}

fn free_bytes(dir: &Path) -> io::Result<u64> {
    let stat = nix::sys::statvfs::statvfs(dir)?;
    Ok(stat.blocks_available() * stat.fragment_size())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn neither_the_node_nor_the_file_system_may_say_no() {
        let dir = tempfile::tempdir().expect("a directory");
        let is_full =
            |checked: io::Result<()>| checked.is_err_and(|error| error.kind() == io::ErrorKind::StorageFull);
        let room = Room::above(dir.path(), 0);
        room.check(0).expect("room");
        assert!(is_full(room.check(u64::MAX)));
        room.set(false);
        assert!(is_full(room.check(0)) && is_full(room.require()));
        assert!(is_full(Room::above(dir.path(), u64::MAX).check(0)));
    }
}
