//! One run: set up, calm, faults, heal, converge, read everything on every node, put backups back into new
//! clusters where some were made, judge.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use anyhow::{Context, Result};
use rand::rngs::StdRng;
use rand::seq::SliceRandom;
use rand::{RngExt, SeedableRng};
use shoal_proto::planted::CRASH_POINTS;
use shoal_tests::Client;
use tokio::task::JoinHandle;

use crate::backend::Backend;
use crate::caller::Caller;
use crate::checkers::{self, Judgement, Verdict};
use crate::cluster::{Cluster, Kit};
use crate::faults::backup::Backups;
use crate::faults::clock::seconds_since_1970;
use crate::faults::reshard::Resharding;
use crate::faults::upgrade::Upgrade;
use crate::faults::{self, Fault, Need};
use crate::history::{Call, Header, History, Level, Origin, Phase, Recorder, Sample};
use crate::restore::Restoring;
use crate::scenario::{Scenario, Size};
use crate::shrink::{self, Shrunk, has_parts};
use crate::workloads::{Clients, Crowd, Source};

/// How long the cluster may take to settle at first.
const SETUP_LIMIT: Duration = Duration::from_secs(60);
/// How long a node may take to be whole again after a bit has flipped.
const REPAIR_LIMIT: Duration = Duration::from_secs(60);
/// How often nodes are asked about their groups.
const PROBE_EVERY: Duration = Duration::from_millis(200);
/// How often a final read is tried.
const FINAL_ATTEMPTS: u32 = 5;
/// The pause between two attempts.
const FINAL_PAUSE: Duration = Duration::from_secs(1);

/// A run that was judged.
#[derive(Debug)]
pub struct Judged {
    /// What happened.
    pub history: History,
    /// What the checkers say.
    pub verdicts: Vec<Verdict>,
    /// Where the history is.
    pub file: PathBuf,
}

/// Runs a scenario in a folder of its own and judges it. The nodes' logs and data stay there.
///
/// # Errors
/// When the run itself cannot be done; a broken promise is a verdict, not an error.
pub async fn run(
    scenario: &Scenario,
    size: &Size,
    seed: u64,
    backend: Backend,
    dir: &Path,
) -> Result<Judged> {
    std::fs::create_dir_all(dir)?;
    let target = dir.join("backups");
    let env = environment(scenario, size, &target)?;
    let kit = Kit {
        disk: scenario.disk,
        has_clocks: scenario.needs(Need::Clock),
        has_limits: scenario.needs(Need::Limits),
    };
    let mut cluster = Cluster::create(dir, size.nodes, backend, kit, &env)?;
    if let Some(old) = &scenario.old_bin {
        cluster.begin_with(Upgrade::from(old)?);
    }
    for at in 0..cluster.len() {
        cluster.start(at)?;
    }
    cluster.settled(SETUP_LIMIT).await.context("the cluster does not come up")?;
    let replicas = scenario.replicas.unwrap_or(size.nodes);
    cluster.create_collection(scenario.shards.unwrap_or(scenario.workload.shards()), replicas).await?;
    cluster.settled(SETUP_LIMIT).await.context("the collection does not come up")?;

    let header = Header {
        scenario: scenario.name.clone(),
        seed,
        version: cluster.version().await?,
        began_at: seconds_since_1970(),
        nodes: size.nodes,
        checkers: scenario.checkers.clone(),
        required: scenario.required(size),
        least_ok: size.least_ok,
        longest_gap_ms: scenario.longest_gap_ms,
        most_elections: scenario.most_elections,
        most_growth_percent_per_hour: size.most_growth_percent_per_hour,
        usage_window_seconds: size.usage_window,
        crash_points: match scenario.needs(Need::CrashPoints) {
            true => CRASH_POINTS.iter().map(|(point, _)| (*point).to_owned()).collect(),
            false => Vec::new(),
        },
        ..Header::default()
    };
    let file = dir.join("history.jsonl.zst");
    let recorder = Arc::new(Recorder::create(&file, &header)?);
    recorder.sync()?;
    let watchers = [monitor(&cluster, &recorder), count(&cluster, &recorder), measure(&cluster, &recorder)];
    let pause = Duration::from_secs_f64(size.clients as f64 / size.rate as f64);
    let source = Source { clients: cluster.clients(), recorder: recorder.clone(), seed };
    let usual = Clients::start(&source, scenario.workload, 0..size.clients, pause);
    let alongside = scenario.alongside.iter().zip(size.clients..);
    let alongside =
        alongside.map(|(workload, number)| Clients::start(&source, *workload, number..number + 1, pause));
    let clients: Vec<Clients> = std::iter::once(usual).chain(alongside).collect();
    cluster.crowd = Some(Crowd::new(source, size.clients));

    tokio::time::sleep(Duration::from_secs(size.calm)).await;
    recorder.sync()?;
    let resharding = size.reshards.then(|| Resharding::start(&cluster.clients(), &recorder, seed));
    let backups = (size.backups > 0).then(|| Backups::start(&cluster.clients(), &recorder, &target, seed));
    cluster.backing_up = backups.as_ref().map(Backups::driver);
    strike(scenario, size, seed, &mut cluster, &recorder).await?;
    if let Some(resharding) = resharding {
        resharding.finish().await;
    }
    let made = match backups {
        Some(backups) => backups.finish().await,
        None => Vec::new(),
    };
    tokio::time::sleep(Duration::from_secs(size.tail)).await;
    recorder.sync()?;
    let patience = Duration::from_secs(size.patience);
    if let Err(error) = cluster.settled_under_load(patience).await {
        recorder.fault("not_settled", Phase::Wrong, &format!("after {patience:?}: {error:#}"));
    }
    clients.iter().for_each(Clients::stop);
    for clients in clients {
        clients.join().await;
    }
    if let Some(crowd) = cluster.crowd.take() {
        crowd.join().await;
    }
    if let Err(error) = cluster.settled(patience).await {
        recorder.fault("not_converged", Phase::Wrong, &format!("after {patience:?}: {error:#}"));
    }
    recorder.sync()?;
    read_everything(&cluster.clients(), &recorder, seed).await;
    recorder.sync()?;
    tokio::time::sleep(2 * PROBE_EVERY).await;
    watchers.iter().for_each(JoinHandle::abort);
    for panic in cluster.panics() {
        let is_expected = scenario.expected_panics.as_ref().is_some_and(|place| panic.contains(place));
        let phase = if is_expected { Phase::Moment } else { Phase::Wrong };
        recorder.fault("panic", phase, &panic);
    }
    recorder.sync()?;
    let restoring = Restoring { dir, env: &env, most: size.backups, recorder: &recorder };
    if let Err(error) = restoring.run(&mut cluster, &made).await {
        recorder.fault("not_restored", Phase::Wrong, &format!("{error:#}"));
    }
    recorder.finish()?;
    drop(cluster);
    judge(&file)
}

/// Environment of the nodes: the scenario's, and where backups are kept, when some are made.
fn environment(scenario: &Scenario, size: &Size, target: &Path) -> Result<Vec<(String, String)>> {
    let mut env: Vec<(String, String)> = scenario.env.clone().into_iter().collect();
    if size.backups > 0 {
        std::fs::create_dir_all(target)?;
        let target = target.canonicalize()?;
        let target = target.to_str().context("the run's folder has a name that is no text")?;
        env.push(("SHOAL_BACKUP_TARGET".to_owned(), target.to_owned()));
    }
    Ok(env)
}

impl Judged {
    /// Puts a minimal counterexample in place of the evidence of each broken promise that has one.
    /// Where none can be made, what is there stays, and the reason is put to it.
    pub fn minimize(&mut self) {
        let is_broken =
            |verdict: &&mut Verdict| verdict.judgement == Judgement::Invalid && has_parts(&verdict.checker);
        for verdict in self.verdicts.iter_mut().filter(is_broken) {
            match shrink_by(&self.history, &verdict.checker) {
                Ok(shrunk) => verdict.evidence = shrunk.evidence(),
                Err(error) => verdict.evidence.push(format!("not made smaller: {error:#}")),
            }
        }
    }
}

/// The smallest part of a history that the first checker to call it invalid still calls invalid, or
/// the checker of that name.
///
/// # Errors
/// When no checker that can judge a part calls the history invalid.
pub fn shrink(judged: &Judged, checker: Option<&str>) -> Result<Shrunk> {
    let is_broken =
        |verdict: &&Verdict| verdict.judgement == Judgement::Invalid && has_parts(&verdict.checker);
    let first = judged.verdicts.iter().find(is_broken).map(|verdict| verdict.checker.as_str());
    let checker = checker.or(first).with_context(|| {
        let said: Vec<String> = judged
            .verdicts
            .iter()
            .map(|verdict| format!("{} {:?}", verdict.checker, verdict.judgement).to_lowercase())
            .collect();
        format!("no checker that can judge a part calls it invalid: {}", said.join(", "))
    })?;
    shrink_by(&judged.history, checker)
}

fn shrink_by(history: &History, checker: &str) -> Result<Shrunk> {
    let began = Instant::now();
    shrink::shrink(history, checker, shrink::BUDGET, &|| began.elapsed())
}

/// Judges a history file.
///
/// # Errors
/// When it cannot be read.
pub fn judge(file: &Path) -> Result<Judged> {
    let history = History::read(file)?;
    let verdicts = checkers::judge(&history)?;
    Ok(Judged { history, verdicts, file: file.to_owned() })
}

/// The faults, one after the other: each kind once in a shuffled round, then the next round.
async fn strike(
    scenario: &Scenario,
    size: &Size,
    seed: u64,
    cluster: &mut Cluster,
    recorder: &Recorder,
) -> Result<()> {
    let mut coin = StdRng::seed_from_u64(seed);
    let lasts = Duration::from_secs(size.seconds);
    if scenario.faults.is_empty() {
        tokio::time::sleep(lasts).await;
        return Ok(());
    }
    let end = Instant::now() + lasts;
    let mut round: Vec<Fault> = Vec::new();
    let between = |(from, to): (u64, u64), coin: &mut StdRng| {
        Duration::from_millis(coin.random_range(1000 * from..=1000 * to))
    };
    while Instant::now() < end {
        if round.is_empty() {
            round.clone_from(&scenario.faults);
            round.shuffle(&mut coin);
        }
        let Some(fault) = round.pop() else { break };
        let name = fault.name();
        for crash in cluster.crashed()? {
            recorder.fault("crashed", Phase::Wrong, &crash);
        }
        if fault.takes_a_replica()
            && let Err(error) = cluster.settled_under_load(REPAIR_LIMIT).await
        {
            recorder.fault("not_repaired", Phase::Wrong, &format!("after {REPAIR_LIMIT:?}: {error:#}"));
        }
        match fault.inject(cluster, &mut coin).await {
            Ok(injected) => {
                recorder.fault(&name, Phase::Begin, &injected.detail);
                if let Some(wrong) = injected.wrong {
                    recorder.fault(wrong.name, Phase::Wrong, &wrong.detail);
                }
            }
            Err(error) => recorder.fault("cannot_inject", Phase::Wrong, &format!("{name}: {error:#}")),
        }
        // A fault may take this machine down with it: what led to it is to be known.
        recorder.sync()?;
        tokio::time::sleep(between(size.hold, &mut coin)).await;
        if !fault.ends_processes() {
            for crash in cluster.crashed()? {
                recorder.fault("crashed", Phase::Wrong, &format!("during {name}: {crash}"));
            }
        }
        let suffered = faults::heal(cluster).with_context(|| format!("heal {name}"))?;
        recorder.fault(&name, Phase::End, "");
        for (what, count) in suffered.into_iter().flatten().filter(|(_, count)| *count > 0) {
            recorder.fault(what, Phase::Moment, &format!("{count} during {name}"));
        }
        recorder.sync()?;
        tokio::time::sleep(between(size.pause, &mut coin)).await;
    }
    Ok(())
}

/// What is there in the end: on every node from its own replicas, and once by agreement.
async fn read_everything(clients: &[Client], recorder: &Arc<Recorder>, seed: u64) {
    for node in 0..clients.len() {
        for level in [Level::Eventual, Level::Linearizable] {
            let mut is_read = false;
            for _ in 0..FINAL_ATTEMPTS {
                let mut caller = Caller::new(clients, recorder.clone(), seed);
                is_read = caller.call(node, Call::List { level }).await.is_some();
                if is_read {
                    break;
                }
                tokio::time::sleep(FINAL_PAUSE).await;
            }
            if !is_read {
                let detail = format!("n{} does not list what it has at {level:?}", node + 1);
                recorder.fault("no_final_read", Phase::Wrong, &detail);
            }
        }
    }
}

/// What nodes count that a scenario may have to provoke, and the name of it in a history.
const COUNTED: [(&str, &str); 3] = [
    ("shoal_raft_snapshots_installed_total", "snapshot-installed"),
    ("shoal_shard_rebuilds_total", "replica-rebuilt"),
    ("shoal_node_rejoins_total", "node-rejoined"),
];
/// How often nodes are asked for what they count.
const COUNT_EVERY: Duration = Duration::from_secs(1);

/// Asks every node for what it counts, again and again, and records what was added.
fn count(cluster: &Cluster, recorder: &Arc<Recorder>) -> JoinHandle<()> {
    let clients = cluster.clients();
    let recorder = recorder.clone();
    tokio::spawn(async move {
        let mut known: BTreeMap<(usize, &str), f64> = BTreeMap::new();
        loop {
            for (at, client) in clients.iter().enumerate() {
                for (metric, name) in COUNTED {
                    let asked = tokio::time::timeout(COUNT_EVERY, client.metric(metric)).await;
                    let Ok(Ok(count)) = asked else { continue };
                    let before = known.insert((at, name), count).unwrap_or_default();
                    // Less than before: the node began anew.
                    let added = if count < before { count } else { count - before };
                    for _ in 0..added as u64 {
                        recorder.fault(name, Phase::Moment, &format!("n{}", at + 1));
                    }
                }
            }
            tokio::time::sleep(COUNT_EVERY).await;
        }
    })
}

/// How often it is looked up what processes hold.
const MEASURE_EVERY: Duration = Duration::from_secs(2);

/// Looks up what every node's process holds of the machine, again and again.
fn measure(cluster: &Cluster, recorder: &Arc<Recorder>) -> JoinHandle<()> {
    let starts = cluster.members.iter().map(|member| (member.runs.clone(), member.pid.clone()));
    let starts: Vec<_> = starts.collect();
    let recorder = recorder.clone();
    tokio::spawn(async move {
        loop {
            for (node, (runs, pid)) in starts.iter().enumerate() {
                let run = runs.load(Ordering::Acquire);
                // A process that has ended holds nothing, and one that was started meanwhile is of
                // another run.
                if let Some((rss_bytes, files)) = usage_of(pid.load(Ordering::Acquire))
                    && runs.load(Ordering::Acquire) == run
                {
                    recorder.usage(node, run, rss_bytes, files);
                }
            }
            tokio::time::sleep(MEASURE_EVERY).await;
        }
    })
}

/// Resident bytes and open files of a process, as far as the kernel tells.
fn usage_of(pid: u32) -> Option<(u64, u32)> {
    let status = std::fs::read_to_string(format!("/proc/{pid}/status")).ok()?;
    let line = status.lines().find_map(|line| line.strip_prefix("VmRSS:"))?;
    let kib: u64 = line.split_whitespace().next()?.parse().ok()?;
    let files = std::fs::read_dir(format!("/proc/{pid}/fd")).ok()?.count();
    Some((kib << 10, files as u32))
}

/// Asks every node about its groups, again and again.
fn monitor(cluster: &Cluster, recorder: &Arc<Recorder>) -> JoinHandle<()> {
    let clients = cluster.clients();
    let lives = cluster.members.iter().map(|member| (member.runs.clone(), member.lost_disks.clone()));
    let lives: Vec<_> = lives.collect();
    let recorder = recorder.clone();
    tokio::spawn(async move {
        let mut latest: BTreeMap<(u64, u64), Sample> = BTreeMap::new();
        loop {
            let ask = clients.iter().zip(&lives).map(|(client, (runs, lost_disks))| async move {
                // Counted before the question, so that an answer is never put to a later run.
                let (run, disk) = (runs.load(Ordering::Relaxed), lost_disks.load(Ordering::Acquire));
                let view = tokio::time::timeout(Duration::from_secs(1), shoal_tests::view::of(client)).await;
                // Of one that lost its disk meanwhile nobody knows which one it spoke of.
                let disk = Some(disk).filter(|disk| lost_disks.load(Ordering::Acquire) == *disk);
                Some((run, disk, view.ok()?.ok()?))
            });
            for (run, disk, view) in futures::future::join_all(ask).await.into_iter().flatten() {
                let of = disk.map(|disk| Origin { name: view.node.name, disk });
                for group in view.groups {
                    let sample = Sample {
                        node: view.node.id,
                        run,
                        group: group.group,
                        is_leader: group.is_leader(),
                        members: match group.is_leader() {
                            true => group.voters.union(&group.learners).copied().collect(),
                            false => Vec::new(),
                        },
                        term: group.term,
                        purged: group.purged,
                        checkpoint: group.checkpoint,
                        applied: group.applied,
                        last: group.last_index,
                        hash: group.state_sum.map(|sum| (sum.index, sum.sum)),
                        of: of.clone(),
                    };
                    let key = (sample.node, sample.group);
                    if latest.get(&key) != Some(&sample) {
                        latest.insert(key, sample.clone());
                        recorder.probe(sample);
                    }
                }
            }
            tokio::time::sleep(PROBE_EVERY).await;
        }
    })
}
