//! Taking dead vectors out: a graph of which most is dead is built anew from what lives.
//!
//! usearch masks what is deleted and keeps its space, and a point that is written again gets a new
//! slot, so a shard whose points change often would grow without end. The new graph is built
//! beside the old one, a few vectors at a time, and takes its place in one step; until then
//! searches use the old one. A crash in between leaves the old one, or both: then the newer
//! counts.

use std::collections::VecDeque;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, Instant};

use parking_lot::RwLock;
use roaring::RoaringBitmap;
use shoal_proto::Distance;

use super::{BLOCK_VECTORS, Block, Graph, Row, SEARCH_THREADS, Vectors, graph_error, note_path};
use crate::error::{Error, Result};

/// A graph with fewer vectors is not worth the work.
const COMPACT_MIN_VECTORS: u64 = 4_096;
/// Free bytes that a graph that is built anew must leave.
const FREE_BYTES: u64 = 1 << 30;
/// The pause after a failure.
const RETRY_PAUSE: Duration = Duration::from_secs(600);
/// Vectors moved in one step.
const STEP_VECTORS: usize = 256;

/// A graph on its way into a smaller one.
pub(super) struct Compaction {
    source: Arc<Graph>,
    target: Arc<Graph>,
}

impl Vectors {
    /// Whether [`Vectors::compact_some`] would find something to do.
    pub fn wants_compaction(&self, live: &RoaringBitmap) -> bool {
        self.compaction.lock().is_some() || self.mostly_dead(live).is_some() || self.pending_is_dead(live)
    }

    /// Does one step. Returns whether there is more to do. Only the thread that also indexes calls
    /// this. A failure (a full disk, say) leaves the old graph and is tried again later.
    pub fn compact_some(&self, live: &RoaringBitmap) -> bool {
        if self.pending_is_dead(live) {
            self.drop_dead_pending(live);
            return true;
        }
        let mut compaction = self.compaction.lock();
        match self.step(&mut compaction, live) {
            Ok(more) => more,
            Err(error) => {
                tracing::warn!(%error, "a graph could not be built anew without its dead; it stays as it is");
                if let Some(Compaction { target, .. }) = compaction.take() {
                    drop(remove_graph(&target.file));
                }
                *self.compact_after.lock() = Some(Instant::now() + RETRY_PAUSE);
                false
            }
        }
    }

    fn step(&self, compaction: &mut Option<Compaction>, live: &RoaringBitmap) -> Result<bool> {
        if compaction.is_none() {
            let Some(source) = self.mostly_dead(live) else { return Ok(false) };
            let bytes = source.slots.read().intersection_len(live) * self.params.size as u64 * 4;
            let free = nix::sys::statvfs::statvfs(&self.dir).map_err(std::io::Error::from)?;
            if free.blocks_available() * free.fragment_size() < bytes + FREE_BYTES {
                return Err(Error::Graph("too little disk space".into()));
            }
            let target = Arc::new(Graph::create(&next_round(&source.file), &self.params)?);
            *compaction = Some(Compaction { source, target });
        }
        let Some(Compaction { source, target }) = compaction.as_ref() else { return Ok(false) };
        let rest = (&*source.slots.read() & live) - &*target.slots.read();
        if rest.is_empty() {
            self.finish(source, target)?;
            self.rows.free_dead(live);
            *compaction = None;
        } else {
            self.move_vectors(source, target, rest.iter().take(STEP_VECTORS))?;
        }
        Ok(true)
    }

    fn mostly_dead(&self, live: &RoaringBitmap) -> Option<Arc<Graph>> {
        if self.compact_after.lock().is_some_and(|after| Instant::now() < after) {
            return None;
        }
        let is_mostly_dead = |graph: &&Arc<Graph>| {
            let slots = graph.slots.read();
            let alive = slots.intersection_len(live);
            let is_large = slots.len() >= COMPACT_MIN_VECTORS;
            !slots.is_empty() && (alive == 0 || (is_large && alive < slots.len() / 2))
        };
        self.graphs.read().iter().find(is_mostly_dead).cloned()
    }

    fn move_vectors(&self, source: &Graph, target: &Graph, slots: impl Iterator<Item = u32>) -> Result<()> {
        let (from, into) = (source.index.read(), target.index.write());
        let mut row = Row::new(&self.params);
        for slot in slots {
            if into.size() == into.capacity() {
                into.reserve_capacity_and_threads(into.capacity() * 2, SEARCH_THREADS)
                    .map_err(graph_error)?;
            }
            // The stored vector rather than the graph's, which may be rounded already.
            match self.row(slot) {
                Some(vector) => into.add(u64::from(slot), &vector).map_err(graph_error)?,
                None => {
                    if let Some(vector) = row.read(&from, slot)? {
                        into.add(u64::from(slot), vector).map_err(graph_error)?;
                    }
                }
            }
            target.slots.write().insert(slot);
        }
        Ok(())
    }

    /// Puts the new graph in the old one's place. Its file counts before the old one goes.
    fn finish(&self, source: &Arc<Graph>, target: &Arc<Graph>) -> Result<()> {
        let len = target.slots.read().len();
        if len > 0 {
            target.save(len)?;
        }
        {
            let mut graphs = self.graphs.write();
            let place = graphs.iter().position(|graph| Arc::ptr_eq(graph, source));
            match place {
                Some(place) if len > 0 => graphs[place] = target.clone(),
                Some(place) => drop(graphs.remove(place)),
                None => {}
            }
        }
        remove_graph(&source.file)?;
        tracing::info!(file = %target.file.display(), vectors = len, "a graph was built anew without its dead");
        Ok(())
    }

    /// What no graph will ever take in is scanned for good: there the dead are dropped in memory.
    fn pending_is_dead(&self, live: &RoaringBitmap) -> bool {
        let pending = || self.pending.read().iter().map(|block| block.read().slots.len() as u64).sum::<u64>();
        self.params.distance == Distance::Manhattan && pending() > 2 * live.len() + BLOCK_VECTORS as u64
    }

    fn drop_dead_pending(&self, live: &RoaringBitmap) {
        // The last block may still grow; the others are only read here, so that nobody waits.
        let mut old: Vec<_> = self.pending.read().iter().cloned().collect();
        old.pop();
        let mut kept = VecDeque::new();
        let mut fresh = Block { slots: Vec::new(), data: Vec::new() };
        for block in &old {
            let block = block.read();
            for (slot, vector) in block.slots.iter().zip(block.data.chunks(self.params.size)) {
                if live.contains(*slot) {
                    fresh.slots.push(*slot);
                    fresh.data.extend_from_slice(vector);
                }
                if fresh.slots.len() == BLOCK_VECTORS {
                    let full = std::mem::replace(&mut fresh, Block { slots: Vec::new(), data: Vec::new() });
                    kept.push_back(Arc::new(RwLock::new(full)));
                }
            }
        }
        if !fresh.slots.is_empty() {
            kept.push_back(Arc::new(RwLock::new(fresh)));
        }
        let mut pending = self.pending.write();
        kept.extend(pending.drain(..).skip(old.len()));
        *pending = kept;
    }
}

/// Deletes a graph's files, the note first: without it the graph does not count.
pub(super) fn remove_graph(file: &Path) -> Result<()> {
    for path in [note_path(file), file.to_owned()] {
        match std::fs::remove_file(path) {
            Err(error) if error.kind() != std::io::ErrorKind::NotFound => return Err(error.into()),
            _ => {}
        }
    }
    Ok(())
}

/// The number of a graph and how often it was built anew: `000012-003.graph`.
pub(super) fn number_and_round(file: &Path) -> (usize, usize) {
    let stem = file.file_stem().unwrap_or_default().to_string_lossy().into_owned();
    let (number, round) = stem.split_once('-').unwrap_or((&stem, "0"));
    (number.parse().unwrap_or(0), round.parse().unwrap_or(0))
}

fn next_round(file: &Path) -> PathBuf {
    let (number, round) = number_and_round(file);
    file.with_file_name(format!("{number:06}-{:03}.graph", round + 1))
}

#[cfg(test)]
mod tests {
    use super::*;
    use shoal_proto::VectorParams;

    fn vector(slot: u32) -> Vec<f32> {
        let mut vector: Vec<f32> =
            (0..8u32).map(|i| ((slot.wrapping_mul(2_654_435_761) >> (i * 3)) & 255) as f32 - 127.5).collect();
        crate::distance::normalize(&mut vector);
        vector
    }

    fn work(vectors: &Vectors, live: &RoaringBitmap) {
        while vectors.index_some(&|slot| live.contains(slot)).expect("indexes") {}
        while vectors.compact_some(live) {}
    }

    #[test]
    fn a_graph_that_is_mostly_dead_is_built_anew_and_stays_so() {
        let dir = tempfile::tempdir().expect("a directory");
        let params = VectorParams::new(8, Distance::Cosine);
        let vectors = Vectors::open(dir.path(), params.clone()).expect("opens");
        (0..12_000).for_each(|slot| vectors.add(slot, &vector(slot)));
        let all: RoaringBitmap = (0..12_000).collect();
        work(&vectors, &all);
        vectors.save(true).expect("saves");
        let before = vectors.sizes();
        assert!(before.0 > 11_000 && !vectors.wants_compaction(&all));
        let live: RoaringBitmap = (0..12_000).filter(|slot| slot % 3 == 0).collect();
        assert!(vectors.wants_compaction(&live));
        work(&vectors, &live);
        let check = |vectors: &Vectors| {
            assert!(!vectors.wants_compaction(&live) && vectors.sizes().0 < 4_100, "{:?}", vectors.sizes());
            let mut hits = 0;
            for slot in (0..12_000).step_by(300) {
                let found = vectors
                    .search(&vector(slot), 5, None, &|slot| live.contains(slot), false)
                    .expect("searches");
                assert!(found.iter().all(|hit| live.contains(hit.slot)));
                hits += usize::from(found.iter().any(|hit| hit.slot == slot));
            }
            assert!(hits >= 38, "{hits} of 40 find themselves");
        };
        check(&vectors);
        let files = || {
            let names =
                std::fs::read_dir(dir.path()).expect("listed").map(|entry| entry.expect("one").path());
            names.filter(|path| path.extension().is_some_and(|end| end == "graph")).count()
        };
        assert_eq!(files(), 1, "the old graph is gone");
        drop(vectors);
        let again = Vectors::open(dir.path(), params).expect("opens again");
        (0..12_000).filter(|slot| live.contains(*slot) && !again.covered().contains(*slot)).for_each(
            |slot| {
                again.add(slot, &vector(slot));
            },
        );
        check(&again);
        work(&again, &RoaringBitmap::new());
        assert_eq!(files(), 0, "a graph of which nothing lives goes");
        assert_eq!(again.sizes().0, 0);
    }

    #[test]
    fn of_two_rounds_of_a_graph_the_newer_counts() {
        let dir = tempfile::tempdir().expect("a directory");
        let params = VectorParams::new(8, Distance::Dot);
        for (name, slots) in [("000000.graph", 0..10), ("000000-001.graph", 0..4)] {
            let graph = Graph::create(&dir.path().join(name), &params).expect("created");
            for slot in slots {
                graph.index.write().add(u64::from(slot), &vector(slot)).expect("added");
                graph.slots.write().insert(slot);
            }
            let len = graph.slots.read().len();
            graph.save(len).expect("saved");
        }
        let vectors = Vectors::open(dir.path(), params).expect("opens");
        assert_eq!(vectors.covered().len(), 4);
        assert!(!dir.path().join("000000.graph").exists());
    }

    #[test]
    fn the_dead_are_dropped_where_no_graph_takes_them_in() {
        let dir = tempfile::tempdir().expect("a directory");
        let vectors = Vectors::open(dir.path(), VectorParams::new(8, Distance::Manhattan)).expect("opens");
        (0..3_000).for_each(|slot| vectors.add(slot, &vector(slot)));
        let live: RoaringBitmap = (2_900..3_000).collect();
        work(&vectors, &live);
        // The last block may still grow and is left as it is.
        assert!(vectors.sizes().1 <= 100 + BLOCK_VECTORS as u64, "{:?}", vectors.sizes());
        let found = vectors.search(&vector(2_950), 1, None, &|_| true, false).expect("searches");
        assert_eq!(found[0].slot, 2_950);
    }
}
