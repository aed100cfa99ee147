//! The engine of a shard called in this process: what a search costs without HTTP, JSON and Raft.

use std::time::Instant;

use anyhow::{Result, bail};
use serde_json::json;
use shoal_engine::command::{Answer, Command, Envelope, Leg, Point, Read, Search, Select};
use shoal_engine::{Entry, Shard};
use shoal_proto::{CollectionConfig, Distance, PointId, VectorParams, codec};

use super::Pace;
use super::data::{TOP, Vectors, recall};
use super::graph::rate;
use super::report::{Report, Row};

/// Points in one log entry.
const BATCH: usize = 256;

/// Builds a shard of all vectors and searches it, with one thread and with two.
///
/// # Errors
/// When the engine refuses.
pub(super) fn run(vectors: &Vectors, pace: &Pace, report: &mut Report) -> Result<()> {
    let dir = tempfile::tempdir()?;
    let mut config = CollectionConfig::default();
    config.vectors.insert(String::new(), VectorParams::new(vectors.dimension(), Distance::Cosine));
    let shard = Shard::open(dir.path(), config)?;
    let started = Instant::now();
    for (number, first) in (0..vectors.len()).step_by(BATCH).enumerate() {
        let end = (first + BATCH).min(vectors.len());
        let point = |at: usize| Point {
            id: PointId::Num(at as u64),
            vectors: vec![(String::new(), vectors.vector(at).to_vec())],
            payload: String::new(),
        };
        let command = Command::Upsert((first..end).map(point).collect());
        let command = codec::encode(&Envelope { request_id: None, now: 0, command });
        shard.apply(vec![Entry { index: number as u64 + 1, tag: vec![1], command: Some(command) }])?;
    }
    let applied = started.elapsed();
    while shard.work()? {}
    let indexed = started.elapsed() - applied;
    let search = |at: usize| search(&shard, vectors, at);
    let found = (0..vectors.query_count()).map(search).collect::<Result<Vec<_>>>()?;
    let recall = recall(&found, vectors.truth());
    let (one, two) = (rate(vectors, 1, pace.in_process, search)?, rate(vectors, 2, pace.in_process, search)?);
    let note = format!(
        "recall@10 {recall:.3}; applied in {:.1} s, in the graph {:.1} s later",
        applied.as_secs_f64(),
        indexed.as_secs_f64()
    );
    report.row(Row::new("engine in process: search, 1 thread", format!("{one:.0} queries/s")).note(note));
    report.row(Row::new("engine in process: search, 2 threads", format!("{two:.0} queries/s")));
    let numbers = json!({
        "recall": recall,
        "apply_seconds": applied.as_secs_f64(),
        "index_seconds": indexed.as_secs_f64(),
        "queries_per_second_1_thread": one,
        "queries_per_second_2_threads": two,
    });
    report.raw("engine", "search", numbers);
    Ok(())
}

fn search(shard: &Shard, vectors: &Vectors, at: usize) -> Result<Vec<u64>> {
    let vector = vectors.query(at).to_vec();
    let legs = vec![Leg::Dense { using: String::new(), vector, exact: false, ef: None }];
    let (payload, wanted) = (Select::Nothing, Select::Nothing);
    let search = Search { legs, filter: None, limit: TOP, score_threshold: None, payload, vectors: wanted };
    let (_, Answer::Lists(lists)) = shard.read(&Read::Search(search))? else { bail!("not lists") };
    let id = |id: PointId| if let PointId::Num(id) = id { id } else { u64::MAX };
    Ok(lists.into_iter().flatten().map(|hit| id(hit.id)).collect())
}
