//! Joins the engine and Raft: a shard replica as the state machine of its group.

use std::io;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::Path;
use std::sync::Arc;

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
        let outcomes = guarded(|| self.0.apply(entries))?;
        Ok(outcomes.into_iter().map(Bytes::from).collect())
    }

    fn checkpoint(&self) -> io::Result<Option<Vec<u8>>> {
        guarded(|| self.0.checkpoint())
    }

    fn export(&self) -> io::Result<Exported> {
        let (tag, cursor) = guarded(|| self.0.export())?;
        Ok((tag, Box::new(Cursor(cursor))))
    }

    fn install(&self, tag: Vec<u8>, file: &Path) -> io::Result<()> {
        guarded(|| self.0.install(&tag, file))
    }
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
