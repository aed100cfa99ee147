//! What it takes to grow, to shrink, to replace a lost node, to back up and to restore, with real
//! vectors in three nodes and searches all the time.

use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use serde_json::{Value, json};

use super::Pace;
use super::data::Vectors;
use super::load::words;
use super::loaded::{fill, search_requests};
use super::report::{Report, Row};
use crate::client::{Client, Request};
use crate::cluster::Cluster;
use crate::searcher::Searched;
use crate::wait::wait_until;

const COLLECTION: &str = "elastic";
const NODES: usize = 3;
const SHARDS: u32 = 6;
const REPLICAS: u32 = 2;
/// How long any of it may take.
const DEADLINE: Duration = Duration::from_secs(240);
/// Searches before anything moves.
const CALM: Duration = Duration::from_secs(5);
/// The pause of the searcher after each search.
const PAUSE: Duration = Duration::from_millis(10);

/// Measures all of it in one cluster.
///
/// # Errors
/// When a step does not end in time.
pub(super) async fn run(vectors: &Vectors, pace: &Pace, report: &mut Report) -> Result<()> {
    let backups = tempfile::tempdir()?;
    let mut cluster = Cluster::of(NODES)
        .env("SHOAL_REPAIR_AFTER", "5")
        .env("SHOAL_BACKUP_TARGET", &backups.path().display().to_string())
        .start()
        .await?;
    // Known to the clients from the beginning, as the names behind a service are.
    let added = cluster.place_node()?;
    let any = cluster.any();
    let body = json!({
        "vectors": {"size": vectors.dimension(), "distance": "Cosine"},
        "shard_number": SHARDS, "replication_factor": REPLICAS,
    });
    any.succeed(&Request::put(format!("/collections/{COLLECTION}"), &body)).await?;
    cluster.rested(|_| true).await?;
    let count = vectors.len().min(pace.moved);
    fill(&any, COLLECTION, vectors, count).await?;

    let stop = Arc::new(AtomicBool::new(false));
    let requests = search_requests(COLLECTION, vectors, None)?;
    let searcher = tokio::spawn(search(any.clone(), requests, stop.clone()));
    let calm = Instant::now();
    tokio::time::sleep(CALM).await;
    let started = Instant::now();
    cluster.restart(added).await?;
    cluster.rested(|spread| spread.len() == NODES + 1 && spread.iter().all(|held| *held > 1)).await?;
    let joined = Instant::now();
    let bytes = bytes_below(&cluster.node(added).data_dir())?;

    let name = cluster.node(added).name().to_owned();
    any.succeed(&Request::post(format!("/admin/nodes/{name}/drain"), &json!({}))).await?;
    wait_until(DEADLINE, "the node to be drained", || async {
        let status = any.json(&Request::get(format!("/admin/nodes/{name}/drain"))).await?;
        Ok((status["is_done"] == json!(true)).then_some(()))
    })
    .await?;
    let drained = Instant::now();
    stop.store(true, Ordering::Release);
    let searched = searcher.await??;
    any.succeed(&Request::delete(format!("/admin/nodes/{name}"))).await?;
    cluster.node_mut(added).exited(DEADLINE).await?;

    let before = searched.times(calm, started).context("nothing was searched")?;
    let spans = [
        (format!("a node is added to three with {count} points: start to its full share"), started, joined),
        (String::from("the same node is drained"), joined, drained),
    ];
    for (what, from, to) in spans {
        let [p50, p99, _] = searched.times(from, to).context("nothing was searched")?;
        let note = format!(
            "searches meanwhile p50 {}, p99 {}; before {}, {}; files of its share {}",
            words(p50),
            words(p99),
            words(before[0]),
            words(before[1]),
            mib(bytes as f64)
        );
        let ratio = p99.as_secs_f64() / before[1].as_secs_f64().max(1e-9);
        let took = to.duration_since(from);
        report.row(Row::new(&what, words(took)).goal("p99 of searches ≤ 2 × calm").ratio(ratio).note(note));
        let p99_ms = json!({"calm": ms(before[1]), "moving": ms(p99)});
        report.raw(
            "elastic",
            &what,
            json!({"seconds": took.as_secs_f64(), "bytes": bytes, "search_p99_ms": p99_ms}),
        );
    }

    let backup = job(&any, Request::post("/admin/backups", &json!({}))).await?;
    let id = backup.id.clone();
    rate_row("backup to a directory", &backup, report);
    any.succeed(&Request::delete(format!("/collections/{COLLECTION}"))).await?;
    let order = Request::post(format!("/admin/backups/{id}/restore"), &json!({"collections": [COLLECTION]}));
    let restored = job(&any, order).await?;
    rate_row("restore of it", &restored, report);

    let lost = NODES - 1;
    cluster.node_mut(lost).kill()?;
    std::fs::remove_dir_all(cluster.node(lost).data_dir())?;
    let replaced = Instant::now();
    cluster.restart(lost).await?;
    cluster.rested(|spread| spread.len() == NODES && spread.iter().all(|held| *held > 2)).await?;
    let took = replaced.elapsed();
    let bytes = bytes_below(&cluster.node(lost).data_dir())?;
    let what = "a node whose disk was lost comes back empty: start to its full share";
    report.row(
        Row::new(what, words(took)).goal("≤ 60 s (1 GB)").note(format!("{} of files", mib(bytes as f64))),
    );
    report.raw("elastic", "replace", json!({"seconds": took.as_secs_f64(), "bytes": bytes}));
    cluster.finish()
}

/// A backup or a restore that is done.
struct Done {
    id: String,
    bytes: u64,
    took: Duration,
}

/// Begins a job and waits for its end.
async fn job(client: &Client, order: Request) -> Result<Done> {
    let began = Instant::now();
    let begun = client.json(&order).await?;
    let is_same =
        |job: &Value| ["kind", "node", "started_at"].iter().all(|field| job[*field] == begun[*field]);
    wait_until(DEADLINE, &format!("{order} to be done"), || async {
        let all = client.json(&Request::get("/admin/backup-jobs")).await?;
        let jobs = all["jobs"].as_array().context("no jobs")?;
        let job = jobs.iter().find(|job| is_same(job)).with_context(|| format!("no such job: {all}"))?;
        ensure!(job["state"] != json!("failed"), "{job}");
        if job["state"] != json!("done") {
            return Ok(None);
        }
        let id = job["backup"].as_str().context("no id")?.to_owned();
        let bytes = job["bytes_done"].as_u64().context("no size")?;
        Ok(Some(Done { id, bytes, took: began.elapsed() }))
    })
    .await
}

fn rate_row(what: &str, done: &Done, report: &mut Report) {
    let rate = done.bytes as f64 / done.took.as_secs_f64().max(0.001);
    let note = format!("{} in {}", mib(done.bytes as f64), words(done.took));
    report.row(Row::new(what, format!("{}/s", mib(rate))).goal("1 GB ≤ 5 min").note(note));
    report.raw("elastic", what, json!({"bytes": done.bytes, "seconds": done.took.as_secs_f64()}));
}

fn mib(bytes: f64) -> String {
    format!("{:.1} MiB", bytes / (1 << 20) as f64)
}

fn ms(time: Duration) -> f64 {
    time.as_secs_f64() * 1000.0
}

/// The bytes of all files below a folder. What vanishes meanwhile counts nothing.
fn bytes_below(dir: &Path) -> Result<u64> {
    let mut bytes = 0;
    for entry in std::fs::read_dir(dir)? {
        let Ok(entry) = entry else { continue };
        let Ok(kind) = entry.metadata() else { continue };
        bytes += match kind.is_dir() {
            true => bytes_below(&entry.path()).unwrap_or_default(),
            false => kind.len(),
        };
    }
    Ok(bytes)
}

/// Searches one after the other until it is told to stop.
async fn search(client: Client, requests: Vec<Request>, stop: Arc<AtomicBool>) -> Result<Searched> {
    let mut searches = Vec::new();
    for turn in 0.. {
        if stop.load(Ordering::Acquire) {
            break;
        }
        let began = Instant::now();
        client.starting_at(turn).succeed(&requests[turn % requests.len()]).await?;
        searches.push((began, began.elapsed()));
        tokio::time::sleep(PAUSE).await;
    }
    Ok(Searched { searches })
}
