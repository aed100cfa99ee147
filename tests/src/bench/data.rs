//! The vectors that are searched: real embeddings from `../shared/data`, or generated ones where
//! that folder is absent, with the exact answers to every query.

use std::path::Path;
use std::thread;

use anyhow::{Context, Result, ensure};
use rand::rngs::StdRng;
use rand::{RngExt, SeedableRng};

use super::npy::Array;
use crate::shared;

/// Points of a run, and of a quick one.
const POINTS: usize = 100_000;
const QUICK_POINTS: usize = 10_000;
/// With fewer points a shard has no graph, and there is nothing to compare.
const MIN_POINTS: usize = 4096;
/// The most points that are generated where there are no real ones.
const GENERATED_POINTS: usize = 20_000;
/// Shape of what is generated.
const GENERATED_QUERIES: usize = 500;
const GENERATED_DIMENSION: usize = 384;
const GENERATED_CLUSTERS: usize = 200;
/// How far a generated vector lies from the centre of its cluster, in each coordinate.
const SPREAD: f32 = 0.7;
/// Answers to a query: recall is measured at this many.
pub(super) const TOP: usize = 10;
/// Sums that are kept apart in a scalar product, so that the compiler may use wide registers.
const LANES: usize = 16;

/// Normalised vectors, queries, and the ids of the nearest vectors to each query. A vector's id is
/// its place.
pub(super) struct Vectors {
    dimension: usize,
    base: Vec<f32>,
    queries: Vec<f32>,
    truth: Vec<Vec<u64>>,
    source: String,
}

impl Vectors {
    /// Reads or generates so many vectors, or fewer when there are not that many.
    ///
    /// # Errors
    /// When the files are there but are not what they should be.
    pub(super) fn load(points: Option<usize>, quick: bool) -> Result<Vectors> {
        let wanted = points.unwrap_or(if quick { QUICK_POINTS } else { POINTS });
        ensure!(wanted >= MIN_POINTS, "--points must be at least {MIN_POINTS}");
        let folder = shared::data().join("vectors");
        match folder.join("base_f16.npy").is_file() {
            true => Vectors::read(&folder, wanted).context("the shared vectors"),
            false => Ok(Vectors::generate(wanted.min(GENERATED_POINTS))),
        }
    }

    fn read(folder: &Path, wanted: usize) -> Result<Vectors> {
        let array = Array::read(&folder.join("base_f16.npy"))?;
        let (rows, dimension) = array.table()?;
        let mut base = array.floats()?;
        let kept = rows.min(wanted);
        base.truncate(kept * dimension);
        let array = Array::read(&folder.join("query_f32.npy"))?;
        let (query_count, query_dimension) = array.table()?;
        ensure!(query_dimension == dimension, "queries of {query_dimension} dimensions, not {dimension}");
        let queries = array.floats()?;
        let source = format!("{kept} of {rows} real sentence embeddings, {dimension} dimensions");
        let mut vectors = Vectors { dimension, base, queries, truth: Vec::new(), source };
        // The answers in the folder are those among all vectors.
        vectors.truth = if kept == rows {
            let array = Array::read(&folder.join("top10_cosine.npy"))?;
            ensure!(array.table()? == (query_count, TOP), "answers of another shape than the queries");
            array.integers()?.as_chunks::<TOP>().0.iter().map(|ids| ids.to_vec()).collect()
        } else {
            vectors.nearest(query_count, &|_| true)
        };
        Ok(vectors)
    }

    fn generate(count: usize) -> Vectors {
        let mut random = StdRng::seed_from_u64(2026);
        let centres: Vec<Vec<f32>> = (0..GENERATED_CLUSTERS)
            .map(|_| (0..GENERATED_DIMENSION).map(|_| random.random_range(-1.0..1.0)).collect())
            .collect();
        let mut some = |count: usize| {
            let mut all: Vec<f32> = Vec::with_capacity(count * GENERATED_DIMENSION);
            for _ in 0..count {
                let centre = &centres[random.random_range(0..GENERATED_CLUSTERS)];
                let near = centre.iter().map(|value| value + random.random_range(-SPREAD..SPREAD));
                let vector: Vec<f32> = near.collect();
                let norm = dot(&vector, &vector).sqrt();
                all.extend(vector.iter().map(|value| value / norm));
            }
            all
        };
        let (base, queries) = (some(count), some(GENERATED_QUERIES));
        let source = format!(
            "{count} generated vectors in {GENERATED_CLUSTERS} clusters, {GENERATED_DIMENSION} dimensions: \
             NOT real embeddings, because {} is absent",
            shared::data().display()
        );
        let mut vectors =
            Vectors { dimension: GENERATED_DIMENSION, base, queries, truth: Vec::new(), source };
        vectors.truth = vectors.nearest(GENERATED_QUERIES, &|_| true);
        vectors
    }

    /// What they are, in words.
    pub(super) fn source(&self) -> &str {
        &self.source
    }

    /// Dimensions of each.
    pub(super) fn dimension(&self) -> usize {
        self.dimension
    }

    /// How many there are.
    pub(super) fn len(&self) -> usize {
        self.base.len() / self.dimension
    }

    /// How many queries there are.
    pub(super) fn query_count(&self) -> usize {
        self.queries.len() / self.dimension
    }

    /// A vector.
    pub(super) fn vector(&self, at: usize) -> &[f32] {
        &self.base[at * self.dimension..][..self.dimension]
    }

    /// A query.
    pub(super) fn query(&self, at: usize) -> &[f32] {
        &self.queries[at * self.dimension..][..self.dimension]
    }

    /// The exact answers to all queries.
    pub(super) fn truth(&self) -> &[Vec<u64>] {
        &self.truth
    }

    /// The exact answers to the first queries among the vectors that `keep` keeps, by scoring them
    /// all.
    pub(super) fn nearest(&self, queries: usize, keep: &(dyn Fn(usize) -> bool + Sync)) -> Vec<Vec<u64>> {
        let numbers: Vec<usize> = (0..queries).collect();
        let cores = thread::available_parallelism().map_or(1, usize::from);
        let share = queries.div_ceil(cores).max(1);
        thread::scope(|scope| {
            let mut workers = Vec::new();
            for part in numbers.chunks(share) {
                let score = move || -> Vec<Vec<u64>> {
                    part.iter().map(|query| self.nearest_to(*query, keep)).collect()
                };
                workers.push(scope.spawn(score));
            }
            let mut answers = Vec::with_capacity(queries);
            for worker in workers {
                answers.extend(worker.join().expect("scoring vectors does not panic"));
            }
            answers
        })
    }

    fn nearest_to(&self, query: usize, keep: &dyn Fn(usize) -> bool) -> Vec<u64> {
        let query = self.query(query);
        let mut top: Vec<(f32, u64)> = Vec::with_capacity(TOP + 1);
        for (at, vector) in self.base.chunks_exact(self.dimension).enumerate() {
            if !keep(at) {
                continue;
            }
            let score = dot(query, vector);
            if top.len() < TOP || top.last().is_some_and(|(worst, _)| score > *worst) {
                let place = top.partition_point(|(better, _)| *better >= score);
                top.insert(place, (score, at as u64));
                top.truncate(TOP);
            }
        }
        top.into_iter().map(|(_, id)| id).collect()
    }
}

fn dot(left: &[f32], right: &[f32]) -> f32 {
    let (left, left_rest) = left.as_chunks::<LANES>();
    let (right, right_rest) = right.as_chunks::<LANES>();
    let rest: f32 = left_rest.iter().zip(right_rest).map(|(left, right)| left * right).sum();
    let mut sums = [0f32; LANES];
    for (left, right) in left.iter().zip(right) {
        for ((sum, left), right) in sums.iter_mut().zip(left).zip(right) {
            *sum += left * right;
        }
    }
    sums.iter().sum::<f32>() + rest
}

/// The part of the exact answers that was found.
pub(super) fn recall(found: &[Vec<u64>], truth: &[Vec<u64>]) -> f64 {
    let hits = |(found, truth): (&Vec<u64>, &Vec<u64>)| truth.iter().filter(|id| found.contains(id)).count();
    let wanted: usize = truth.iter().take(found.len()).map(Vec::len).sum();
    found.iter().zip(truth).map(hits).sum::<usize>() as f64 / wanted.max(1) as f64
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_nearest_vector_to_itself_is_itself() {
        let vectors = Vectors::generate(500);
        let mut same = Vectors { queries: vectors.base[..3 * GENERATED_DIMENSION].to_vec(), ..vectors };
        same.truth = same.nearest(3, &|_| true);
        let first: Vec<u64> = same.truth().iter().map(|ids| ids[0]).collect();
        assert_eq!(first, [0, 1, 2]);
        let odd = same.nearest(3, &|at| at % 2 == 1);
        assert!(odd.iter().flatten().all(|id| id % 2 == 1));
    }

    #[test]
    fn recall_is_the_part_that_was_found() {
        assert_eq!(recall(&[vec![1, 2]], &[vec![2, 3], vec![4, 5]]), 0.5);
        assert_eq!(recall(&[], &[]), 0.0);
    }
}
