//! Copies of shards in files of this node, for as long as somebody reads them.

use std::path::PathBuf;

use shoal_engine::backup::Archive;

/// A file or a directory that is deleted when nobody needs it any more.
pub(crate) struct Scratch(pub(crate) PathBuf);

impl Drop for Scratch {
    fn drop(&mut self) {
        let removed = match self.0.is_dir() {
            true => std::fs::remove_dir_all(&self.0),
            false => std::fs::remove_file(&self.0),
        };
        if let Err(error) = removed {
            tracing::warn!(%error, path = %self.0.display(), "a copy of a shard could not be deleted");
        }
    }
}

/// A shard's copy and the directory that it lies in.
pub(crate) struct ScratchCopy {
    pub(crate) archive: Archive,
    // After the archive: files are deleted when nothing has them open.
    pub(crate) _dir: Scratch,
}
