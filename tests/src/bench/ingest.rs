//! Documents from upload to searchable through one node, next to the bare model in a loop over the
//! texts of the very same chunks.

use std::path::Path;
use std::slice;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use futures::{StreamExt, TryStreamExt, stream};
use rand::rngs::StdRng;
use rand::{RngExt, SeedableRng};
use serde_json::{Value, json};
use shoal_actors::embed::{LocalModel, TextKind};
use tokio::task::block_in_place;

use super::Pace;
use super::load::words;
use super::report::{Report, Row};
use crate::client::Client;
use crate::cluster::Cluster;
use crate::documents::{Store, models};
use crate::points::Freshness;
use crate::shared;

/// The model that a node uses unless it is told otherwise.
const MODEL: &str = "multilingual-e5-small";
/// Uploads in flight.
const CONCURRENCY: usize = 8;
/// Texts that the bare model gets at once: as many as an ingest batch has at most.
const BATCH: usize = 32;
/// How long all documents may take.
const DEADLINE: Duration = Duration::from_secs(150);
/// Texts of the corpus that are shorter than this are not taken.
const MIN_TEXT_BYTES: usize = 200;
/// Words of generated texts, and sentences of one.
const WORDS: [&str; 16] = [
    "wing", "pressure", "layer", "boundary", "shock", "flow", "heat", "surface", "velocity", "mach", "plate",
    "theory", "cylinder", "solution", "number", "result",
];
const SENTENCES: usize = 12;
const SENTENCE_WORDS: usize = 12;

/// Seconds that the bare model needs.
struct Bare {
    /// With full batches, across documents.
    batched: Duration,
    /// Document by document.
    by_document: Duration,
}

/// Measures documents and chunks each second.
///
/// # Errors
/// When a document is not completed in time, or the model fails.
pub(super) async fn run(pace: &Pace, report: &mut Report) -> Result<()> {
    let Some(models) = models() else {
        report.row(Row::new("ingest", "skipped").note("there are no models: run `make model`"));
        return Ok(());
    };
    let (texts, source) = texts(pace.documents)?;
    let cluster = Cluster::of(1).start().await?;
    let (time, chunks) = through_a_node(cluster.client(0), &texts).await?;
    // The model is to have the machine to itself, as the node had.
    cluster.finish()?;
    let bare = block_in_place(|| bare(&models, &chunks))?;

    let count = chunks.iter().map(Vec::len).sum::<usize>() as f64;
    let rate = |time: Duration| count / time.as_secs_f64().max(0.001);
    let documents = texts.len() as f64 / time.as_secs_f64().max(0.001);
    let best = bare.batched.min(bare.by_document);
    let note = format!("{} documents from {source}, {count} chunks, {}", texts.len(), words(time));
    let row = Row::new("ingest: documents through one node", format!("{documents:.1} documents/s"));
    report.row(row.note(note));
    let note = format!(
        "vs the bare model on the same texts: {:.1} chunks/s in batches of {BATCH}, {:.1} document by document",
        rate(bare.batched),
        rate(bare.by_document)
    );
    let row = Row::new("ingest: chunks through one node", format!("{:.1} chunks/s", rate(time)));
    report.row(row.goal("≥ 0.9").ratio(rate(time) / rate(best)).note(note));
    let numbers = json!({
        "documents": texts.len(),
        "chunks": count,
        "seconds": time.as_secs_f64(),
        "bare_seconds_in_batches": bare.batched.as_secs_f64(),
        "bare_seconds_by_document": bare.by_document.as_secs_f64(),
    });
    report.raw("ingest", "documents", numbers);
    Ok(())
}

/// Uploads and attaches all texts, and returns how long it took until all were completed, and the
/// texts of the chunks of each.
async fn through_a_node(client: &Client, texts: &[String]) -> Result<(Duration, Vec<Vec<String>>)> {
    let store = Store::create(client, "bench").await?;
    // The first text pays for what a process does only once.
    let warm = store.add(client, "warm-up.txt", "The first document warms the model up.", json!({})).await?;
    store.completed(client, slice::from_ref(&warm), DEADLINE).await?;
    let started = Instant::now();
    let add = |(number, text): (usize, String)| {
        let store = &store;
        async move { store.add(client, &format!("{number}.txt"), &text, json!({})).await }
    };
    let files: Vec<String> =
        stream::iter(texts.iter().cloned().enumerate()).map(add).buffered(CONCURRENCY).try_collect().await?;
    store.completed(client, &files, DEADLINE).await?;
    let time = started.elapsed();
    let mut documents = store.chunks(client, Freshness::Linearizable).await?;
    documents.remove(&warm);
    ensure!(documents.len() == texts.len(), "{} documents have chunks, not {}", documents.len(), texts.len());
    let chunks = documents.into_values();
    Ok((time, chunks.map(|chunks| chunks.into_iter().map(|chunk| chunk.text).collect()).collect()))
}

fn bare(models: &Path, documents: &[Vec<String>]) -> Result<Bare> {
    let model = LocalModel::open(&models.join(MODEL))?;
    let all = documents.concat();
    ensure!(!all.is_empty(), "the documents have no chunks");
    model.embed_blocking(TextKind::Passage, &all[..1])?;
    let started = Instant::now();
    for batch in all.chunks(BATCH) {
        model.embed_blocking(TextKind::Passage, batch)?;
    }
    let batched = started.elapsed();
    let started = Instant::now();
    for document in documents {
        model.embed_blocking(TextKind::Passage, document)?;
    }
    Ok(Bare { batched, by_document: started.elapsed() })
}

/// So many texts, and where they are from.
fn texts(count: usize) -> Result<(Vec<String>, &'static str)> {
    let file = shared::data().join("cranfield/corpus.jsonl");
    if !file.is_file() {
        return Ok((generated(count), "generated text, because the Cranfield corpus is absent"));
    }
    let lines = std::fs::read_to_string(&file).with_context(|| format!("read {}", file.display()))?;
    let mut texts = Vec::new();
    for line in lines.lines() {
        let document: Value = serde_json::from_str(line).context("a line of the corpus")?;
        let text = document["text"].as_str().unwrap_or_default();
        if text.len() >= MIN_TEXT_BYTES && texts.len() < count {
            texts.push(text.to_owned());
        }
    }
    Ok((texts, "the Cranfield corpus"))
}

fn generated(count: usize) -> Vec<String> {
    let mut random = StdRng::seed_from_u64(2026);
    let mut sentence = || {
        let words: Vec<&str> =
            (0..SENTENCE_WORDS).map(|_| WORDS[random.random_range(0..WORDS.len())]).collect();
        format!("The {}.", words.join(" "))
    };
    let text = |number: usize| {
        let sentences: Vec<String> = (0..SENTENCES).map(|_| sentence()).collect();
        format!("Report {number}. {}", sentences.join(" "))
    };
    (0..count).map(text).collect()
}
