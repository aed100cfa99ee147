//! A graph that was sealed is viewed through its file, at once and after a restart, and takes more searches
//! at once than the machine has cores.

use std::path::Path;
use std::sync::Barrier;
use std::thread;

use roaring::RoaringBitmap;
use shoal_engine::distance::score;
use shoal_engine::vectors::{SEAL_VECTORS, Scored, Top, Vectors};
use shoal_proto::{Distance, GraphType, VectorParams};

/// Few and with few links, so that as many as a sealed graph holds are built in seconds.
const DIMENSIONS: usize = 4;
const DISTANCE: Distance = Distance::Euclid;
/// A sealed graph, the beginning of the next one, and some that wait for it.
const COUNT: u32 = SEAL_VECTORS as u32 + 1000;
const QUERIES: usize = 64;
const LIMIT: usize = 10;
/// The least and the most threads that search at once. The most is what a node runs.
const THREADS: (usize, usize) = (16, 64);
/// Enough of them that each thread loses its core in the middle of some.
const SEARCHES: usize = 1000;

/// Searches fail when usearch has no free slot for them, and a view begins with as many slots as
/// there are cores: this many threads at once find all that an exact search finds only if the
/// view was given more.
#[test]
fn a_viewed_graph_takes_more_searches_at_once_than_there_are_cores() {
    let dir = tempfile::tempdir().expect("a directory");
    let mut random = random();
    let data: Vec<f32> = (0..COUNT as usize * DIMENSIONS).map(|_| random()).collect();
    let queries: Vec<f32> = (0..QUERIES * DIMENSIONS).map(|_| random()).collect();
    let queries: Vec<&[f32]> = queries.chunks(DIMENSIONS).collect();
    build(dir.path(), &data);

    let vectors = Vectors::open(dir.path(), params()).expect("opens again");
    assert!(is_mapped(&dir.path().join("000000.graph")), "the sealed graph is viewed");
    assert!(!is_mapped(&dir.path().join("000001.graph")), "the growing graph is loaded");
    let covered = vectors.covered();
    assert!(covered.len() > SEAL_VECTORS as u64 && covered.len() < u64::from(COUNT));
    for (slot, vector) in (0..).zip(data.chunks(DIMENSIONS)).filter(|(slot, _)| !covered.contains(*slot)) {
        vectors.add(slot, vector);
    }
    let truth: Vec<Vec<u32>> = queries.iter().map(|query| nearest(&data, query)).collect();
    let mut all = RoaringBitmap::new();
    all.insert_range(0..COUNT);
    let exact = vectors.search_exact(queries[0], LIMIT, &all).expect("scores all");
    assert_eq!(slots(&exact), truth[0], "what the view holds is what was put in");

    let cores = thread::available_parallelism().map_or(1, usize::from);
    let threads = (2 * cores).clamp(THREADS.0, THREADS.1);
    let start = Barrier::new(threads);
    let search = |number: usize| -> usize {
        start.wait();
        let mut hits = 0;
        for round in 0..SEARCHES {
            let at = (number + round) % QUERIES;
            let found = vectors.search(queries[at], LIMIT, None, &|_| true, true);
            let found = slots(&found.expect("there is room for one more search"));
            hits += found.iter().filter(|slot| truth[at].contains(slot)).count();
        }
        hits
    };
    let hits: usize = thread::scope(|scope| {
        let search = &search;
        let workers: Vec<_> = (0..threads).map(|number| scope.spawn(move || search(number))).collect();
        workers.into_iter().map(|worker| worker.join().expect("all its searches succeed")).sum()
    });
    let recall = hits as f64 / (threads * SEARCHES * LIMIT) as f64;
    assert!(recall > 0.95, "recall is {recall} with {threads} threads");
}

fn params() -> VectorParams {
    let params = VectorParams::new(DIMENSIONS, DISTANCE);
    VectorParams { graph: GraphType::F32, m: 8, ef_construct: 16, ..params }
}

/// Takes in all vectors, seals the first graph, begins a second one, and saves both.
fn build(dir: &Path, data: &[f32]) {
    let vectors = Vectors::open(dir, params()).expect("opens");
    for (slot, vector) in (0..).zip(data.chunks(DIMENSIONS)) {
        vectors.add(slot, vector);
    }
    while vectors.index_some(&|_| true).expect("indexes") {}
    vectors.save(true).expect("saves");
    assert_eq!(vectors.segments(), 2, "the first graph is full");
    assert!(is_mapped(&dir.join("000000.graph")), "a graph is viewed from the moment that it is sealed");
    let found = vectors.search(&data[..DIMENSIONS], 1, None, &|_| true, true).expect("searches");
    assert_eq!(slots(&found), [0]);
}

/// The exact answer, from the vectors as they were before anything was indexed.
fn nearest(data: &[f32], query: &[f32]) -> Vec<u32> {
    let mut top = Top::new(DISTANCE, LIMIT);
    for (slot, vector) in (0..).zip(data.chunks(DIMENSIONS)) {
        top.offer(slot, score(DISTANCE, query, vector));
    }
    slots(&top.into_sorted())
}

fn slots(found: &[Scored]) -> Vec<u32> {
    found.iter().map(|scored| scored.slot).collect()
}

/// Whether this process has a file in its address space.
fn is_mapped(file: &Path) -> bool {
    let file = file.canonicalize().expect("it exists");
    let maps = std::fs::read_to_string("/proc/self/maps").expect("this is Linux");
    maps.lines().any(|line| line.ends_with(&file.display().to_string()))
}

/// Numbers from -1 to 1, the same in every run.
fn random() -> impl FnMut() -> f32 {
    let mut seed = 1u64;
    move || {
        seed = seed.wrapping_mul(6364136223846793005).wrapping_add(1442695040888963407);
        (seed >> 40) as f32 / (1 << 23) as f32 - 1.0
    }
}
