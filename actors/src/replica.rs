//! Joins the engine and Raft: a shard replica as the state machine of its group.

use std::io;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::Path;
use std::sync::Arc;
use std::time::Instant;

use bytes::Bytes;
use shoal_engine::store::ExportCursor;
use shoal_engine::{Entry, Shard};
use shoal_raft::machine::Exported;
use shoal_raft::{Committed, Export, StateMachine};

/// A shard as its group's state machine. A panic inside the store (sled panics on some kinds
/// of damage) stops the group on this node instead of leaving it half applied.
pub(crate) struct Replica(pub(crate) Arc<Shard>);

struct Cursor(ExportCursor);

impl Export for Cursor {
    fn next_piece(&self) -> io::Result<Option<Vec<u8>>> {
        guarded(|| self.0.next_piece())
    }

    fn about_bytes(&self) -> u64 {
        self.0.store_bytes()
    }
}

impl StateMachine for Replica {
    fn applied_tag(&self) -> io::Result<Option<Vec<u8>>> {
        guarded(|| self.0.applied_tag())
    }

    fn apply(&self, entries: Vec<Committed>) -> io::Result<Vec<Bytes>> {
        let entries = entries
            .into_iter()
            .map(|entry| Entry {
                index: entry.index,
                tag: entry.tag,
                command: entry.command.map(|bytes| bytes.to_vec()),
            })
            .collect();
        let started = Instant::now();
        let outcomes = guarded(|| self.0.apply(entries))?;
        metrics::histogram!("shoal_apply_seconds").record(started.elapsed());
        Ok(outcomes.into_iter().map(Bytes::from).collect())
    }

    fn checkpoint(&self) -> io::Result<Option<Vec<u8>>> {
        fatal_on_io(guarded(|| self.0.checkpoint()))
    }

    fn export(&self) -> io::Result<Exported> {
        let (tag, cursor) = guarded(|| self.0.export())?;
        Ok((tag, Box::new(Cursor(cursor))))
    }

    fn install(&self, tag: Vec<u8>, file: &Path) -> io::Result<()> {
        fatal_on_io(guarded(|| self.0.install(&tag, file)))
    }
}

/// A failed fsync is not tried again: the kernel may have dropped the pages, and a second one
/// that "succeeds" proves nothing. The process ends before anything is purged on its word.
fn fatal_on_io<T>(result: io::Result<T>) -> io::Result<T> {
    let is_fatal = |error: &&io::Error| {
        let other = [io::ErrorKind::Other, io::ErrorKind::InvalidData, io::ErrorKind::StorageFull];
        error.raw_os_error().is_some_and(|_| error.kind() != io::ErrorKind::StorageFull)
            || !other.contains(&error.kind())
    };
    if let Some(error) = result.as_ref().err().filter(is_fatal) {
        tracing::error!(%error, "a checkpoint could not be made durable: this node stops");
        eprintln!("shoal: a checkpoint could not be made durable ({error}); stopping");
        std::process::exit(shoal_raft::log::EXIT_LOG_FAILED);
    }
    result
}

fn guarded<T>(work: impl FnOnce() -> shoal_engine::Result<T>) -> io::Result<T> {
    match catch_unwind(AssertUnwindSafe(work)) {
        Ok(result) => result.map_err(|error| {
            tracing::error!(%error, "a shard replica failed and stops serving");
            error.into()
        }),
        Err(_) => Err(io::Error::other("the shard's store panicked: its files are damaged")),
    }
}
