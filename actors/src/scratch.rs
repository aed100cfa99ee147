//! Copies of shards in files of this node, for as long as somebody reads them.

use std::io;
use std::path::{Path, PathBuf};

use shoal_engine::backup::Archive;
use tokio::runtime::Handle;

/// A file or a directory that is deleted when nobody needs it any more: in the background, since a shard's copy may
/// take a while. What a process does not come to delete its successor does.
pub(crate) struct Scratch(pub(crate) PathBuf);

impl Drop for Scratch {
    fn drop(&mut self) {
        let path = std::mem::take(&mut self.0);
        match Handle::try_current() {
            // Nobody has to wait for it.
            Ok(runtime) => drop(runtime.spawn_blocking(move || delete(&path))),
            Err(_) => delete(&path),
        }
    }
}

fn delete(path: &Path) {
    let removed = match path.is_dir() {
        true => std::fs::remove_dir_all(path),
        false => std::fs::remove_file(path),
    };
    match removed {
        Err(error) if error.kind() != io::ErrorKind::NotFound => {
            tracing::warn!(%error, path = %path.display(), "a copy of a shard could not be deleted");
        }
        // Whoever deletes what is around it may have been first.
        Ok(()) | Err(_) => {}
    }
}

/// A shard's copy and the directory that it lies in.
pub(crate) struct ScratchCopy {
    pub(crate) archive: Archive,
    // After the archive: files are deleted when nothing has them open.
    pub(crate) _dir: Scratch,
}

#[cfg(test)]
mod tests {
    use std::time::{Duration, Instant};

    use super::*;

    #[tokio::test]
    async fn what_nobody_needs_is_deleted_with_and_without_a_runtime() {
        let dir = tempfile::tempdir().expect("a directory");
        let (one, other) = (dir.path().join("one"), dir.path().join("other"));
        std::fs::create_dir_all(one.join("deep")).expect("made");
        std::fs::write(&other, b"x").expect("written");
        drop(Scratch(one.clone()));
        let deadline = Instant::now() + Duration::from_secs(10);
        while one.exists() {
            assert!(Instant::now() < deadline, "it is still there");
            tokio::time::sleep(Duration::from_millis(1)).await;
        }
        let scratch = Scratch(other.clone());
        std::thread::spawn(move || drop(scratch)).join().expect("no panic");
        assert!(!other.exists());
    }
}
