//! The vectors of one name in one shard: graphs over most of them, an exact scan of the rest.
//!
//! ```text
//!  apply ─▶ pending blocks (f32, scanned exactly) ─▶ indexer ─▶ growing graph ─▶ sealed graphs
//!           searchable at once                                  (in memory)      (files, mmap)
//! ```
//!
//! The graphs are derived and never the authority: a vector is searchable the moment its write
//! is applied, because what no graph has taken in yet is scanned. A small shard never gets a
//! graph and is always searched exactly. Keys in the graphs are slots: a point that is written
//! again gets a new slot, so a graph never changes a vector, and dead slots are masked until a
//! graph of which most is dead is built anew ([`compact`]).
//!
//! usearch 2.26 must not search while it adds (its base layer is read without locks), so each
//! graph sits behind a lock that the indexer takes for a few adds at a time.

mod compact;

use std::collections::VecDeque;
use std::fs::File;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Instant;

use compact::{Compaction, number_and_round, remove_graph};
use half::slice::{HalfBitsSliceExt, HalfFloatSliceExt};
use parking_lot::{Mutex, RwLock};
use roaring::RoaringBitmap;
use shoal_proto::planted::crash_point;
use shoal_proto::{Distance, GraphType, VectorParams};
use usearch::{Index, IndexOptions, MetricKind, ScalarKind};

use crate::distance::{is_nearer, score};
use crate::error::{Error, Result};
use crate::files::sync_dir;
use crate::rows::Rows;

/// Below this many vectors a shard has no graph.
pub const GRAPH_MIN_VECTORS: usize = 2_000;
/// Vectors in one pending block: the unit that the indexer takes.
const BLOCK_VECTORS: usize = 256;
/// Adds done under one hold of a graph's lock.
const ADDS_PER_LOCK: usize = 4;
/// A growing graph is sealed at this many vectors.
pub const SEAL_VECTORS: usize = 262_144;
/// The growing graph is saved when it has grown by this part since it was saved last.
const SAVE_GROWTH: f64 = 0.25;
/// Searches that may run in one graph at once.
const SEARCH_THREADS: usize = 64;
/// Candidates while searching, when a request does not say.
const DEFAULT_EF: usize = 100;

/// A slot and its score.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Scored {
    /// The slot.
    pub slot: u32,
    /// The score as clients see it.
    pub score: f32,
}

struct Block {
    slots: Vec<u32>,
    data: Vec<f32>,
}

struct Graph {
    index: RwLock<Index>,
    slots: RwLock<RoaringBitmap>,
    file: PathBuf,
    saved_len: AtomicU64,
}

/// All vectors of one name in one shard.
pub struct Vectors {
    params: VectorParams,
    dir: PathBuf,
    rows: Rows,
    pending: RwLock<VecDeque<Arc<RwLock<Block>>>>,
    graphs: RwLock<Vec<Arc<Graph>>>,
    compaction: Mutex<Option<Compaction>>,
    /// When a compaction may be tried again after a failure.
    compact_after: Mutex<Option<Instant>>,
}

impl Vectors {
    /// Opens the graphs that were saved in a directory. A file that does not read is set aside:
    /// its slots are missing from [`Vectors::covered`] and are taken in again.
    pub fn open(dir: &Path, params: VectorParams) -> Result<Vectors> {
        std::fs::create_dir_all(dir)?;
        let mut graphs = Vec::new();
        let mut names: Vec<PathBuf> =
            std::fs::read_dir(dir)?.map(|entry| entry.map(|entry| entry.path())).collect::<Result<_, _>>()?;
        names.retain(|path| path.extension().is_some_and(|end| end == "graph"));
        names.sort_by_key(|path| number_and_round(path));
        // A crash while a graph was built anew may have left both.
        for pair in names.windows(2) {
            if number_and_round(&pair[0]).0 == number_and_round(&pair[1]).0 && note_path(&pair[1]).exists() {
                remove_graph(&pair[0])?;
            }
        }
        names.retain(|path| path.exists());
        for file in &names {
            match Graph::load(file, &params) {
                Ok(graph) => graphs.push(Arc::new(graph)),
                Err(error) => {
                    tracing::warn!(%error, file = %file.display(), "a saved graph is unusable and will be rebuilt");
                    std::fs::remove_file(file)?;
                }
            }
        }
        let rows = Rows::open(&dir.join("rows"), params.size)?;
        let (pending, graphs) = (RwLock::default(), RwLock::new(graphs));
        let (compaction, compact_after) = (Mutex::new(None), Mutex::new(None));
        Ok(Vectors { params, dir: dir.to_owned(), rows, pending, graphs, compaction, compact_after })
    }

    /// The schema.
    pub fn params(&self) -> &VectorParams {
        &self.params
    }

    /// The slots that the saved graphs hold.
    pub fn covered(&self) -> RoaringBitmap {
        let mut covered = RoaringBitmap::new();
        for graph in self.graphs.read().iter() {
            covered |= &*graph.slots.read();
        }
        covered
    }

    /// The stored vector of a slot, if it can be had without the store.
    pub(crate) fn row(&self, slot: u32) -> Option<Vec<f32>> {
        self.rows.get(slot)
    }

    /// Keeps a vector that had to be read from the store.
    pub(crate) fn keep_row(&self, slot: u32, vector: &[f32]) {
        self.rows.put(slot, vector);
    }

    /// Takes in a vector; it is searchable when this returns.
    pub fn add(&self, slot: u32, vector: &[f32]) {
        self.rows.put(slot, vector);
        let mut pending = self.pending.write();
        let open = pending.back().filter(|block| block.read().slots.len() < BLOCK_VECTORS).cloned();
        let block = open.unwrap_or_else(|| {
            let block = Arc::new(RwLock::new(Block { slots: Vec::new(), data: Vec::new() }));
            pending.push_back(block.clone());
            block
        });
        let mut block = block.write();
        block.slots.push(slot);
        block.data.extend_from_slice(vector);
    }

    /// Vectors in graphs, and vectors that wait for one.
    pub fn sizes(&self) -> (u64, u64) {
        let indexed = self.graphs.read().iter().map(|graph| graph.slots.read().len()).sum();
        let pending = self.pending.read().iter().map(|block| block.read().slots.len() as u64).sum();
        (indexed, pending)
    }

    /// Graphs, for statistics.
    pub fn segments(&self) -> usize {
        self.graphs.read().len()
    }

    /// Whether [`Vectors::index_some`] would find something to do.
    pub fn has_work(&self) -> bool {
        let waiting = self.pending.read().len();
        let enough = !self.graphs.read().is_empty() || waiting * BLOCK_VECTORS > GRAPH_MIN_VECTORS;
        self.params.distance != Distance::Manhattan && waiting > 1 && enough
    }

    /// Moves one block into a graph. Returns whether there may be more to do. Only one thread
    /// calls this at a time.
    pub fn index_some(&self, live: &dyn Fn(u32) -> bool) -> Result<bool> {
        if !self.has_work() {
            return Ok(false);
        }
        // The last block may still be growing; it is left to the exact scan.
        let Some(block) = self.pending.read().front().cloned() else { return Ok(false) };
        let graph = self.growing_graph()?;
        let (slots, data) = {
            let block = block.read();
            (block.slots.clone(), block.data.clone())
        };
        let size = self.params.size;
        for (slots, data) in slots.chunks(ADDS_PER_LOCK).zip(data.chunks(ADDS_PER_LOCK * size)) {
            let index = graph.index.write();
            for (slot, vector) in slots.iter().zip(data.chunks(size)) {
                // A graph from before a crash may hold the slot already.
                if live(*slot) && !index.contains(u64::from(*slot)) {
                    if index.size() == index.capacity() {
                        let capacity = (index.capacity() * 2).max(4096);
                        index.reserve_capacity_and_threads(capacity, SEARCH_THREADS).map_err(graph_error)?;
                    }
                    index.add(u64::from(*slot), vector).map_err(graph_error)?;
                }
                graph.slots.write().insert(*slot);
            }
        }
        self.pending.write().pop_front();
        Ok(true)
    }

    fn growing_graph(&self) -> Result<Arc<Graph>> {
        let last = self.graphs.read().last().cloned();
        if let Some(graph) = last.filter(|graph| (graph.slots.read().len() as usize) < SEAL_VECTORS) {
            return Ok(graph);
        }
        self.save(true)?;
        if let Some(full) = self.graphs.read().last() {
            full.seal(&self.params)?;
        }
        let numbers = self.graphs.read().iter().map(|graph| number_and_round(&graph.file).0 + 1).max();
        let number = numbers.unwrap_or(0);
        let graph = Arc::new(Graph::create(&self.dir.join(format!("{number:06}.graph")), &self.params)?);
        self.graphs.write().push(graph.clone());
        Ok(graph)
    }

    /// Writes graphs that have grown enough (or at all, with `all`) to their files, durably.
    pub fn save(&self, all: bool) -> Result<()> {
        let graphs = self.graphs.read().clone();
        let last = graphs.len().saturating_sub(1);
        for (number, graph) in graphs.iter().enumerate() {
            let (len, saved) = (graph.slots.read().len(), graph.saved_len.load(Ordering::Acquire));
            let grown = (len - saved.min(len)) as f64 > saved as f64 * SAVE_GROWTH;
            if len > saved && (all || grown || number != last) {
                graph.save(len)?;
            }
        }
        Ok(())
    }

    /// The nearest `limit` slots of those that `allowed` keeps (none: all of `live`).
    pub fn search(
        &self,
        query: &[f32],
        limit: usize,
        ef: Option<usize>,
        allowed: &dyn Fn(u32) -> bool,
        all_live: bool,
    ) -> Result<Vec<Scored>> {
        let mut top = Top::new(self.params.distance, limit);
        self.scan_pending(query, allowed, &mut top);
        // Quantised scores only choose candidates; a surplus makes up for their error.
        let wanted = if self.params.graph == GraphType::I8 { limit * 3 } else { limit };
        for graph in self.graphs.read().iter() {
            let index = graph.index.read();
            index.change_expansion_search(ef.unwrap_or(DEFAULT_EF).max(wanted));
            let found = if all_live {
                index.search(query, wanted).map_err(graph_error)?
            } else {
                index
                    .filtered_search(query, wanted, |key| u32::try_from(key).is_ok_and(allowed))
                    .map_err(graph_error)?
            };
            for (key, distance) in found.keys.into_iter().zip(found.distances) {
                if let Ok(slot) = u32::try_from(key) {
                    top.offer(slot, self.graph_score(distance));
                }
            }
        }
        Ok(top.into_sorted())
    }

    /// Scores every slot of a set exactly (up to the graph's number format).
    pub fn search_exact(&self, query: &[f32], limit: usize, allowed: &RoaringBitmap) -> Result<Vec<Scored>> {
        // Scores from a graph are as exact as its number format: a surplus is kept, which the
        // caller scores again from the stored vectors.
        let kept = if self.params.graph == GraphType::F32 { limit } else { limit * 3 + 16 };
        let mut top = Top::new(self.params.distance, kept);
        // What waits comes first: a block leaves it only after a graph has taken it in.
        self.scan_pending(query, &|slot| allowed.contains(slot), &mut top);
        let mut row = Row::new(&self.params);
        for graph in self.graphs.read().iter() {
            let here = &*graph.slots.read() & allowed;
            let index = graph.index.read();
            for slot in here {
                if let Some(vector) = row.read(&index, slot)? {
                    top.offer(slot, score(self.params.distance, query, vector));
                }
            }
        }
        Ok(top.into_sorted())
    }

    fn scan_pending(&self, query: &[f32], allowed: &dyn Fn(u32) -> bool, top: &mut Top) {
        for block in self.pending.read().iter() {
            let block = block.read();
            for (slot, vector) in block.slots.iter().zip(block.data.chunks(self.params.size)) {
                if allowed(*slot) {
                    top.offer(*slot, score(self.params.distance, query, vector));
                }
            }
        }
    }

    fn graph_score(&self, distance: f32) -> f32 {
        match self.params.distance {
            Distance::Cosine | Distance::Dot => 1.0 - distance,
            Distance::Euclid => distance.max(0.0).sqrt(),
            Distance::Manhattan => distance,
        }
    }
}

/// One vector at a time out of a graph. Half floats are taken as they are and widened here:
/// usearch widens them one by one in software, which costs ten times the scoring.
struct Row {
    is_half: bool,
    raw: Vec<i16>,
    bits: Vec<u16>,
    vector: Vec<f32>,
}

impl Row {
    fn new(params: &VectorParams) -> Row {
        let is_half = params.graph == GraphType::F16;
        let halves = if is_half { params.size } else { 0 };
        Row { is_half, raw: vec![0; halves], bits: vec![0; halves], vector: vec![0.0; params.size] }
    }

    fn read(&mut self, index: &Index, slot: u32) -> Result<Option<&[f32]>> {
        let key = u64::from(slot);
        let found = if self.is_half {
            let found = index.get(key, usearch::f16::from_mut_i16s(&mut self.raw));
            self.bits.iter_mut().zip(&self.raw).for_each(|(bits, raw)| *bits = raw.cast_unsigned());
            self.bits.reinterpret_cast::<half::f16>().convert_to_f32_slice(&mut self.vector);
            found
        } else {
            index.get(key, &mut self.vector)
        };
        Ok((found.map_err(graph_error)? == 1).then_some(self.vector.as_slice()))
    }
}

impl Graph {
    fn empty(params: &VectorParams) -> Result<Index> {
        let options = IndexOptions {
            dimensions: params.size,
            metric: match params.distance {
                Distance::Cosine | Distance::Dot => MetricKind::IP,
                Distance::Euclid | Distance::Manhattan => MetricKind::L2sq,
            },
            quantization: match params.graph {
                GraphType::F32 => ScalarKind::F32,
                GraphType::F16 => ScalarKind::F16,
                GraphType::I8 => ScalarKind::I8,
            },
            connectivity: params.m,
            expansion_add: params.ef_construct,
            expansion_search: DEFAULT_EF,
            multi: false,
        };
        Index::new(&options).map_err(graph_error)
    }

    fn create(file: &Path, params: &VectorParams) -> Result<Graph> {
        let index = Graph::empty(params)?;
        index.reserve_capacity_and_threads(4096, SEARCH_THREADS).map_err(graph_error)?;
        Ok(Graph {
            index: RwLock::new(index),
            slots: RwLock::default(),
            file: file.to_owned(),
            saved_len: AtomicU64::new(0),
        })
    }

    /// A sealed graph is viewed through mmap; the last, growing one is loaded. usearch's file
    /// has no checksum, so ours is checked before usearch sees it.
    fn load(file: &Path, params: &VectorParams) -> Result<Graph> {
        let note = std::fs::read(note_path(file))?;
        let (sum, slots) =
            note.split_at_checked(4).ok_or_else(|| Error::Graph("the note is short".into()))?;
        let slots = RoaringBitmap::deserialize_from(slots)?;
        if sum != checksum(file, &slots)?.to_le_bytes() {
            return Err(Error::Graph("wrong checksum".into()));
        }
        let len = slots.len();
        let index = if len as usize >= SEAL_VECTORS {
            Graph::view(file, params)?
        } else {
            let index = Graph::empty(params)?;
            index.load(utf8(file)?).map_err(graph_error)?;
            let capacity = (index.size() * 5 / 4).max(4096);
            index.reserve_capacity_and_threads(capacity, SEARCH_THREADS).map_err(graph_error)?;
            index
        };
        if index.dimensions() != params.size {
            return Err(Error::Graph("wrong dimensions".into()));
        }
        let (index, slots) = (RwLock::new(index), RwLock::new(slots));
        Ok(Graph { index, slots, file: file.to_owned(), saved_len: AtomicU64::new(len) })
    }

    /// A graph in a file that does not change any more.
    fn view(file: &Path, params: &VectorParams) -> Result<Index> {
        let index = Graph::empty(params)?;
        // A view keeps the number of searches at once that was reserved before.
        index.reserve_capacity_and_threads(1, SEARCH_THREADS).map_err(graph_error)?;
        index.view(utf8(file)?).map_err(graph_error)?;
        Ok(index)
    }

    /// Lets go of the memory of a graph that is saved and does not grow any more: from now on it is read from
    /// its file, which the operating system keeps in memory as far as there is room.
    fn seal(&self, params: &VectorParams) -> Result<()> {
        let viewed = Graph::view(&self.file, params)?;
        *self.index.write() = viewed;
        Ok(())
    }

    /// Writes beside, syncs, renames, then writes the note that makes the file count.
    fn save(&self, len: u64) -> Result<()> {
        let fresh = self.file.with_extension("fresh");
        let path = utf8(&fresh)?;
        let slots = {
            let index = self.index.read();
            let slots = self.slots.read().clone();
            index.save(path).map_err(graph_error)?;
            if std::fs::metadata(&fresh)?.len() != index.serialized_length() as u64 {
                return Err(Error::Graph("the file is short: is the disk full?".into()));
            }
            slots
        };
        File::open(&fresh)?.sync_all()?;
        let mut note = checksum(&fresh, &slots)?.to_le_bytes().to_vec();
        slots.serialize_into(&mut note)?;
        let dir = self.file.parent().expect("a graph's file has a directory");
        // The old note must not vouch for the new file, so it goes first.
        match std::fs::remove_file(note_path(&self.file)) {
            Err(error) if error.kind() != std::io::ErrorKind::NotFound => return Err(error.into()),
            _ => {}
        }
        crash_point("graph-written");
        std::fs::rename(&fresh, &self.file)?;
        std::fs::write(note_path(&self.file), note)?;
        File::open(note_path(&self.file))?.sync_all()?;
        sync_dir(dir)?;
        self.saved_len.store(len, Ordering::Release);
        Ok(())
    }
}

fn note_path(file: &Path) -> PathBuf {
    file.with_extension("note")
}

fn checksum(file: &Path, slots: &RoaringBitmap) -> Result<u32> {
    let mut hasher = crc32fast::Hasher::new();
    let mut reader = std::io::BufReader::with_capacity(1 << 20, File::open(file)?);
    loop {
        let buffer = std::io::BufRead::fill_buf(&mut reader)?;
        if buffer.is_empty() {
            break;
        }
        hasher.update(buffer);
        let len = buffer.len();
        std::io::BufRead::consume(&mut reader, len);
    }
    let mut note = Vec::new();
    slots.serialize_into(&mut note)?;
    hasher.update(&note);
    Ok(hasher.finalize())
}

fn utf8(path: &Path) -> Result<&str> {
    path.to_str().ok_or_else(|| Error::Graph("the path is not UTF-8".into()))
}

fn graph_error(error: impl std::fmt::Display) -> Error {
    Error::Graph(error.to_string())
}

/// The best few of what is offered; a slot offered twice counts once.
pub struct Top {
    distance: Distance,
    limit: usize,
    kept: Vec<Scored>,
    worst: Option<f32>,
}

impl Top {
    /// Keeps the best `limit`.
    pub fn new(distance: Distance, limit: usize) -> Top {
        Top { distance, limit, kept: Vec::with_capacity(2 * limit.min(4096)), worst: None }
    }

    /// Offers a slot.
    pub fn offer(&mut self, slot: u32, score: f32) {
        if self.worst.is_some_and(|worst| !is_nearer(self.distance, score, worst)) {
            return;
        }
        self.kept.push(Scored { slot, score });
        if self.kept.len() >= 2 * self.limit.max(1) {
            self.shrink();
        }
    }

    fn shrink(&mut self) {
        let higher = self.distance.higher_is_nearer();
        self.kept.sort_by(|a, b| {
            let order = if higher { b.score.total_cmp(&a.score) } else { a.score.total_cmp(&b.score) };
            order.then(a.slot.cmp(&b.slot))
        });
        let mut seen = RoaringBitmap::new();
        self.kept.retain(|scored| seen.insert(scored.slot));
        self.kept.truncate(self.limit);
        if self.kept.len() == self.limit {
            self.worst = self.kept.last().map(|scored| scored.score);
        }
    }

    /// The best, nearest first.
    pub fn into_sorted(mut self) -> Vec<Scored> {
        self.shrink();
        self.kept
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The note beside a graph's file: a sum over the file and the slots, and the slots. A graph whose note
    /// is not this is thrown away and made anew, which takes hours for a large one.
    #[test]
    fn the_note_of_a_graph_stays_as_it_is() {
        let slots_bytes: [u8; 22] = [58, 48, 0, 0, 1, 0, 0, 0, 0, 0, 2, 0, 16, 0, 0, 0, 0, 0, 2, 0, 5, 0];
        let slots = RoaringBitmap::from_iter([0u32, 2, 5]);
        let mut written = Vec::new();
        slots.serialize_into(&mut written).expect("written");
        assert_eq!(written, slots_bytes);
        assert_eq!(RoaringBitmap::deserialize_from(&slots_bytes[..]).expect("readable"), slots);
        let dir = tempfile::tempdir().expect("a directory");
        let file = dir.path().join("1.graph");
        std::fs::write(&file, b"graph").expect("written");
        assert_eq!(checksum(&file, &slots).expect("readable").to_le_bytes(), [54, 211, 99, 181]);
        assert_eq!(note_path(&file), dir.path().join("1.note"));
    }
}
