//! Search over HTTP next to the same graph in process: queries each second, latency, recall, and
//! what a query costs the node.

use std::sync::Arc;
use std::time::Duration;

use anyhow::{Result, ensure};
use serde_json::json;
use tokio::task::block_in_place;

use super::data::{Vectors, recall};
use super::graph::{self, InProcess};
use super::load::{self, Load};
use super::loaded::{BUCKETS, COLLECTION, Loaded, found_ids, search_requests};
use super::report::{Report, Row};
use super::{Pace, process};
use crate::client::{Client, Request};

/// Clients at once.
const CLIENTS: [usize; 3] = [1, 8, 32];
/// Clients of a filtered search.
const FILTERED_CLIENTS: usize = 8;
/// Percentages of the points that the filters keep.
const SHARES: [usize; 3] = [50, 10, 1];
/// Queries whose filtered answers are checked.
const CHECKED_QUERIES: usize = 100;

/// A load and what it has cost the node.
struct Measured {
    clients: usize,
    load: Load,
    cpu_ms_per_query: f64,
}

/// Measures searches, plain and filtered.
///
/// # Errors
/// When the node or usearch fails.
pub(super) async fn run(loaded: &Loaded, vectors: &Vectors, pace: &Pace, report: &mut Report) -> Result<()> {
    report_loading(loaded, vectors, report);
    let requests = Arc::new(search_requests(COLLECTION, vectors, None)?);
    let found = answers(loaded.client(), &requests).await?;
    let recall = recall(&found, vectors.truth());
    let mut all = Vec::new();
    for clients in CLIENTS {
        all.push(measure(loaded, &requests, clients, pace.search).await?);
    }
    let in_process = block_in_place(|| graph::measure(vectors, pace.in_process))?;
    report_search(recall, &all, &in_process, report);
    for share in SHARES {
        filtered(loaded, vectors, share, pace.filtered, report).await?;
    }
    Ok(())
}

fn report_loading(loaded: &Loaded, vectors: &Vectors, report: &mut Report) {
    let (load, index) = loaded.times();
    let rate = vectors.len() as f64 / load.as_secs_f64();
    let note = format!(
        "{} points in {}; the graph had them {} later, but for {}",
        vectors.len(),
        load::words(load),
        load::words(index),
        loaded.pending()
    );
    report.row(Row::new("load: upserts of 256, 4 in flight", format!("{rate:.0} points/s")).note(note));
    let numbers = json!({
        "points": vectors.len(),
        "load_seconds": load.as_secs_f64(),
        "index_seconds": index.as_secs_f64(),
        "pending_vectors": loaded.pending(),
    });
    report.raw("search", "loading", numbers);
}

async fn answers(client: &Client, requests: &[Request]) -> Result<Vec<Vec<u64>>> {
    let mut answers = Vec::with_capacity(requests.len());
    for request in requests {
        let reply = client.once(request).await?;
        ensure!(reply.is_success(), "{request}: {} {}", reply.status, reply.text());
        answers.push(found_ids(&reply.json()?)?);
    }
    Ok(answers)
}

async fn measure(
    loaded: &Loaded,
    requests: &Arc<Vec<Request>>,
    clients: usize,
    time: Duration,
) -> Result<Measured> {
    let (http, requests) = (load::clients(loaded.client(), clients), requests.clone());
    let before = process::cpu_seconds(loaded.node())?;
    let load = load::run(clients, time, move |client, turn| {
        let (http, requests) = (http.clone(), requests.clone());
        // Clients begin at different queries, so that they do not all ask the same.
        let at = (client * 31 + turn) % requests.len();
        async move { load::succeed(&http[client], &requests[at]).await }
    })
    .await?;
    let cpu = process::cpu_seconds(loaded.node())? - before;
    let cpu_ms_per_query = cpu * 1000.0 / load.count() as f64;
    Ok(Measured { clients, load, cpu_ms_per_query })
}

fn report_search(recall: f64, all: &[Measured], in_process: &InProcess, report: &mut Report) {
    let note = format!("in process: {:.3}", in_process.recall);
    report.row(Row::new("search: recall@10 over HTTP", format!("{recall:.3}")).goal("≥ 0.98").note(note));
    let build = format!("built in {} by two threads", load::words(in_process.build));
    let one = format!("{:.0} queries/s", in_process.one_thread);
    report.row(Row::new("search: usearch in process, 1 thread", one).note(build));
    let two = format!("{:.0} queries/s", in_process.two_threads);
    report.row(Row::new("search: usearch in process, 2 threads", two));
    for one in all {
        let (threads, other) = match one.clients {
            1 => (1, in_process.one_thread),
            _ => (2, in_process.two_threads),
        };
        let what = format!("search over HTTP, {} clients", one.clients);
        let measured = format!("{:.0} queries/s, {}", one.load.rate(), one.load.latency());
        let note = format!(
            "vs {threads} in-process thread(s); {:.2} ms of node CPU a query; the clients share the cores{}",
            one.cpu_ms_per_query,
            one.load.trouble()
        );
        report.row(Row::new(what, measured).goal("≥ 0.7").ratio(one.load.rate() / other).note(note));
        let name = format!("clients_{}", one.clients);
        let mut numbers = one.load.to_json();
        numbers["cpu_ms_per_query"] = json!(one.cpu_ms_per_query);
        report.raw("search", &name, numbers);
    }
    let cheapest = all.iter().map(|one| one.cpu_ms_per_query).fold(f64::INFINITY, f64::min);
    let dearest = all.iter().map(|one| one.cpu_ms_per_query).fold(0.0, f64::max);
    let row = Row::new("search: node CPU a query", format!("{cheapest:.2} to {dearest:.2} ms"));
    report.row(row.goal("≤ 0.5 ms").note("user and kernel time, over the numbers of clients"));
    let numbers = json!({
        "build_seconds": in_process.build.as_secs_f64(),
        "recall": in_process.recall,
        "queries_per_second_1_thread": in_process.one_thread,
        "queries_per_second_2_threads": in_process.two_threads,
    });
    report.raw("search", "in_process", numbers);
    report.raw("search", "recall", json!(recall));
}

/// Searches among the points that a range keeps.
async fn filtered(
    loaded: &Loaded,
    vectors: &Vectors,
    share: usize,
    time: Duration,
    report: &mut Report,
) -> Result<()> {
    let filter = json!({"must": [{"key": "bucket", "range": {"lt": share}}]});
    let requests = Arc::new(search_requests(COLLECTION, vectors, Some(&filter))?);
    let checked = CHECKED_QUERIES.min(requests.len());
    let found = answers(loaded.client(), &requests[..checked]).await?;
    let truth = block_in_place(|| vectors.nearest(checked, &|at| at % BUCKETS < share));
    let recall = recall(&found, &truth);
    let one = measure(loaded, &requests, FILTERED_CLIENTS, time).await?;
    let what = format!("search over HTTP, filter keeps {share} %, {FILTERED_CLIENTS} clients");
    let measured = format!("{:.0} queries/s, {}", one.load.rate(), one.load.latency());
    let note = format!(
        "recall@10 {recall:.3}; {:.2} ms of node CPU a query{}",
        one.cpu_ms_per_query,
        one.load.trouble()
    );
    report.row(Row::new(what, measured).note(note));
    let mut numbers = one.load.to_json();
    numbers["cpu_ms_per_query"] = json!(one.cpu_ms_per_query);
    numbers["recall"] = json!(recall);
    report.raw("search", &format!("filter_{share}_percent"), numbers);
    Ok(())
}
