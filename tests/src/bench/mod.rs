//! The benchmarks behind `make bench`: real nodes on loopback, measured from outside, next to the
//! same work done without a node in the same run.
//!
//! ```text
//!  Bench ─▶ engine (a shard in this process)
//!        ─▶ search, memory, restart ─▶ Loaded (one node with all vectors, kept between the three)
//!        ─▶ upsert, cluster, failover, recovery, elastic, ingest, idle ─▶ a fresh Cluster each
//!        ─▶ Report: a row of a Markdown table per measurement, all raw numbers as JSON
//! ```
//!
//! Nothing is asserted about the numbers. A section that fails leaves its error in the table and
//! the next one runs; the exit code says so at the end. Every section has a time limit, and so
//! has the whole run. The load generator runs on the machine that it measures.

mod data;
mod elastic;
mod engine;
mod failover;
mod graph;
mod idle;
mod ingest;
mod load;
mod loaded;
pub mod machine;
mod memory;
mod npy;
mod process;
mod recovery;
mod report;
mod restart;
mod search;
mod three_nodes;
mod upsert;

use std::path::PathBuf;
use std::time::{Duration, Instant};

use anyhow::{Result, bail, ensure};
use clap::{Parser, ValueEnum};
use tokio::task::block_in_place;

use crate::wait::say;
use data::Vectors;
use loaded::Loaded;
use report::Report;

/// How long the whole run may take.
const TOTAL_LIMIT: Duration = Duration::from_secs(30 * 60);

/// Measures Shoal on this machine and prints a Markdown table.
#[derive(Clone, Debug, Parser)]
#[command(name = "bench")]
pub struct Args {
    /// Write all raw numbers to this file, as JSON.
    #[arg(long, value_name = "FILE")]
    json: Option<PathBuf>,
    /// Points to search in: 100000 unless told, 10000 with --quick, or as many as there are.
    #[arg(long, value_name = "N")]
    points: Option<usize>,
    /// Fewer points and fewer repetitions.
    #[arg(long)]
    quick: bool,
    /// Run these sections only, comma separated.
    #[arg(long, value_enum, value_delimiter = ',', value_name = "SECTION")]
    only: Vec<Section>,
}

/// A part of the run that can be asked for by name.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
enum Section {
    /// The engine of a shard in this process.
    Engine,
    /// Search over HTTP next to the same graph in process.
    Search,
    /// Memory of a node for each point.
    Memory,
    /// From the start of a process to ready and to the first search.
    Restart,
    /// Durable upserts on one node.
    Upsert,
    /// Three nodes under load, of which one is killed now and then.
    Cluster,
    /// From the kill of a leader to the next acknowledged write.
    Failover,
    /// Silent leaders, restarts, an outage of everything, the death of a node that leads a hundred groups.
    Recovery,
    /// A node that is added, drained, replaced; backup and restore.
    Elastic,
    /// Documents through a node next to the bare model.
    Ingest,
    /// What collections cost that nobody uses.
    Idle,
}

impl Section {
    /// In the order they run: search, memory and restart share a node.
    const ALL: [Section; 11] = [
        Section::Engine,
        Section::Search,
        Section::Memory,
        Section::Restart,
        Section::Upsert,
        Section::Cluster,
        Section::Failover,
        Section::Recovery,
        Section::Elastic,
        Section::Ingest,
        Section::Idle,
    ];

    /// Its name, and how long it may take.
    fn plan(self) -> (&'static str, Duration) {
        let (name, seconds) = match self {
            Section::Engine => ("engine", 240),
            Section::Search => ("search", 420),
            Section::Memory => ("memory", 300),
            Section::Restart => ("restart", 300),
            Section::Upsert => ("upsert", 90),
            Section::Cluster => ("cluster", 180),
            Section::Failover => ("failover", 600),
            Section::Recovery => ("recovery", 300),
            Section::Elastic => ("elastic", 420),
            Section::Ingest => ("ingest", 240),
            Section::Idle => ("idle", 150),
        };
        (name, Duration::from_secs(seconds))
    }

    fn uses_loaded(self) -> bool {
        matches!(self, Section::Search | Section::Memory | Section::Restart)
    }
}

/// How long and how often things are measured.
struct Pace {
    search: Duration,
    filtered: Duration,
    in_process: Duration,
    upsert: Duration,
    write: Duration,
    kills_under_load: usize,
    failovers: usize,
    recoveries: usize,
    moved: usize,
    documents: usize,
    idle: Duration,
}

impl Pace {
    fn of(quick: bool) -> Pace {
        let seconds = |full, short| Duration::from_secs(if quick { short } else { full });
        Pace {
            search: seconds(6, 2),
            filtered: seconds(4, 2),
            in_process: seconds(4, 2),
            upsert: seconds(4, 2),
            write: seconds(20, 8),
            kills_under_load: if quick { 1 } else { 3 },
            failovers: if quick { 5 } else { 100 },
            recoveries: if quick { 3 } else { 10 },
            moved: if quick { 10_000 } else { 100_000 },
            documents: if quick { 40 } else { 200 },
            idle: seconds(10, 4),
        }
    }
}

struct Bench {
    pace: Pace,
    vectors: Vectors,
    loaded: Option<Result<Loaded, String>>,
    report: Report,
    end: Instant,
}

/// Runs the sections and reports each as it is done.
///
/// # Errors
/// When the vectors cannot be read, a section has failed, or the JSON cannot be written.
pub async fn run(args: Args) -> Result<()> {
    let end = Instant::now() + TOTAL_LIMIT;
    let pace = Pace::of(args.quick);
    let vectors = block_in_place(|| Vectors::load(args.points, args.quick))?;
    let mut head = machine::describe();
    head.push(("data", vectors.source().to_owned()));
    let report = Report::begin(args.json, head);
    let mut bench = Bench { pace, vectors, loaded: None, report, end };
    for section in Section::ALL {
        if args.only.is_empty() || args.only.contains(&section) {
            bench.section(section).await?;
        }
    }
    bench.close();
    let failures = bench.report.failures();
    ensure!(failures == 0, "{failures} sections have failed");
    Ok(())
}

impl Bench {
    /// Runs a section; its failure is a row of the table.
    async fn section(&mut self, section: Section) -> Result<()> {
        let (name, limit) = section.plan();
        say(format!("{name} …"));
        // Clusters run one at a time, so the loaded node makes room.
        if !section.uses_loaded() {
            self.close();
        }
        let limit = limit.min(self.end.saturating_duration_since(Instant::now()));
        match tokio::time::timeout(limit, self.measure(section)).await {
            Ok(Ok(())) => {}
            Ok(Err(error)) => self.report.failed(name, &format!("{error:#}")),
            Err(_) => self.report.failed(name, &format!("not done within {} s", limit.as_secs())),
        }
        self.report.save()
    }

    async fn measure(&mut self, section: Section) -> Result<()> {
        let (pace, vectors, report) = (&self.pace, &self.vectors, &mut self.report);
        match section {
            Section::Engine => block_in_place(|| engine::run(vectors, pace, report)),
            Section::Search => {
                search::run(loaded_node(&mut self.loaded, vectors).await?, vectors, pace, report).await
            }
            Section::Memory => memory::run(loaded_node(&mut self.loaded, vectors).await?, vectors, report),
            Section::Restart => {
                restart::run(loaded_node(&mut self.loaded, vectors).await?, vectors, report).await
            }
            Section::Upsert => upsert::run(vectors, pace, report).await,
            Section::Cluster => three_nodes::run(pace, report).await,
            Section::Failover => failover::run(pace, report).await,
            Section::Recovery => recovery::run(pace, report).await,
            Section::Elastic => elastic::run(vectors, pace, report).await,
            Section::Ingest => ingest::run(pace, report).await,
            Section::Idle => idle::run(pace, report).await,
        }
    }

    /// Ends the loaded node. That it had panicked is a failure of the run.
    fn close(&mut self) {
        if let Some(Ok(loaded)) = self.loaded.take()
            && let Err(error) = loaded.finish()
        {
            self.report.failed("search", &format!("{error:#}"));
        }
    }
}

/// The loaded node, which is loaded only once, also when that fails or is cut short.
async fn loaded_node<'a>(
    place: &'a mut Option<Result<Loaded, String>>,
    vectors: &Vectors,
) -> Result<&'a mut Loaded> {
    if place.is_none() {
        let place = place.insert(Err(String::from("loading it took too long")));
        *place = Loaded::start(vectors).await.map_err(|error| format!("{error:#}"));
    }
    match place {
        Some(Ok(loaded)) => Ok(loaded),
        Some(Err(error)) => bail!("the node with the points: {error}"),
        None => bail!("the node with the points is closed"),
    }
}
