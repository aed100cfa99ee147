//! The shipped StatefulSet under load: pods start together, are updated one by one, die, lose a volume, become
//! more and fewer, as Kubernetes would do it by the numbers of `k8s/base`. Nothing is lost, nothing is there
//! twice, nothing fails for a client that tries again, and every process that is asked to stop ends by itself in
//! its grace period.

use std::collections::BTreeMap;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use serde_json::{Value, json};
use shoal_tests::manifest::{Retention, paced};
use shoal_tests::view::View;
use shoal_tests::writers::verify_at;
use shoal_tests::{
    Component, PodManagement, Points, Request, Searcher, StatefulSet, Stopped, Writers, Written, cli, point,
    say, wait_until,
};

/// The collection that is written and searched.
const COLLECTION: &str = "c";
/// Its shards.
const SHARDS: u32 = 4;
/// Replicas of each.
const REPLICAS: u32 = 3;
/// Writers of single points.
const WRITERS: u64 = 4;
/// Points that are searched for.
const NEEDLES: u64 = 20;
/// Ids of those, beyond what the writers write.
const FIRST_NEEDLE: u64 = 1 << 40;
/// The longest time in which nothing may be acknowledged while pods are stopped as planned: they hand their
/// leadership over first.
const PLANNED_GAP_LIMIT: Duration = Duration::from_millis(500);
/// The same while a process is killed: the others must find out and elect.
const KILLED_GAP_LIMIT: Duration = Duration::from_secs(2);
/// The parts of the load that those are about.
const ROLLING_UPDATE: &str = "rolling update";
const PROCESS_DIES: &str = "a process dies";
/// How long the cluster may take to notice a change and act on it.
const CHANGE_DEADLINE: Duration = Duration::from_secs(60);
/// How long the CLI may take to drain a node, in seconds.
const DRAIN_SECONDS: &str = "120";
/// How long any command of the CLI may take: longer than a drain.
const COMMAND_TIMEOUT: Duration = Duration::from_secs(150);

/// Writers and a searcher at the service, and what was done meanwhile.
struct Load {
    writers: Writers,
    searcher: Searcher,
    steps: Vec<(&'static str, Instant)>,
}

impl Load {
    async fn start(set: &StatefulSet) -> Result<Load> {
        let client = set.client();
        let points = Points::of(&client, COLLECTION);
        points.create(SHARDS, REPLICAS).await?;
        points.upsert(&needles().map(|(id, payload)| point(id, payload)).collect::<Vec<Value>>()).await?;
        let writers = Writers::through(&client, COLLECTION, WRITERS);
        let searcher = Searcher::start(&client, COLLECTION, needles().map(|(id, _)| id).collect());
        writers.progress(100).await?;
        Ok(Load { writers, searcher, steps: Vec::new() })
    }

    fn step(&mut self, name: &'static str) {
        self.steps.push((name, Instant::now()));
    }

    /// Ends it, prints how it went, and returns what the collection must hold.
    async fn stop(mut self) -> Result<BTreeMap<u64, Value>> {
        self.step("end");
        self.writers.progress(100).await?;
        let written = self.writers.stop().await?;
        let searched = self.searcher.stop().await?;
        written.report("pods come and go");
        for pair in self.steps.windows(2) {
            let [(name, from), (_, to)] = pair else { continue };
            let times = searched.times(*from, *to).map(|times| times.map(|time| time.as_millis()));
            say(format!(
                "{name}: {:.1} s, longest write gap {} ms, searches p50, p99, max in ms: {times:?}",
                to.duration_since(*from).as_secs_f64(),
                written.gap_within(*from, *to).as_millis(),
            ));
        }
        check_gaps(&written, &self.steps)?;
        Ok(written.points.into_iter().chain(needles()).collect())
    }
}

fn needles() -> impl Iterator<Item = (u64, Value)> {
    (FIRST_NEEDLE..FIRST_NEEDLE + NEEDLES).map(|id| (id, json!({"needle": id})))
}

fn check_gaps(written: &Written, steps: &[(&str, Instant)]) -> Result<()> {
    for (step, limit) in [(ROLLING_UPDATE, PLANNED_GAP_LIMIT), (PROCESS_DIES, KILLED_GAP_LIMIT)] {
        let at = steps.iter().position(|(name, _)| *name == step).with_context(|| format!("no {step}"))?;
        let gap = written.gap_within(steps[at].1, steps[at + 1].1);
        ensure!(gap <= limit, "{step}: nothing was acknowledged for {gap:?}");
    }
    Ok(())
}

/// The nodes' ids by name, when the first pod knows every pod at its present address and no name twice.
async fn members(set: &StatefulSet) -> Result<BTreeMap<String, u64>> {
    wait_until(CHANGE_DEADLINE, "the pods to be known at their addresses", || async {
        let view = set.pod(0).view().await?;
        for ordinal in 0..set.replicas() {
            let (pod, address) = (set.pod(ordinal), set.pod(ordinal).http_address().await);
            let is_known = view.nodes.iter().any(|node| node.name == pod.name() && node.http == address);
            ensure!(is_known, "{} at {address} is not among {:?}", pod.name(), view.nodes);
        }
        let members: BTreeMap<String, u64> =
            view.nodes.iter().map(|node| (node.name.clone(), node.id)).collect();
        ensure!(members.len() == view.nodes.len(), "a name is there twice: {:?}", view.nodes);
        Ok(Some(members))
    })
    .await
}

fn replicas_of(view: &View, node: u64) -> usize {
    view.shards.iter().filter(|shard| shard.replicas.contains(&node)).count()
}

/// Waits until every node is to hold some replicas.
async fn all_hold_something(set: &StatefulSet, members: &BTreeMap<String, u64>) -> Result<()> {
    wait_until(CHANGE_DEADLINE, "every pod to have its share", || async {
        let view = set.pod(0).view().await?;
        let idle: Vec<&String> =
            members.iter().filter(|(_, id)| replicas_of(&view, **id) == 0).map(|(name, _)| name).collect();
        ensure!(idle.is_empty(), "{idle:?} hold nothing");
        Ok(Some(()))
    })
    .await
}

/// Checks that so many pods were stopped, and that each had ended by itself before it would have been killed.
fn check_stops(stopped: &[Stopped], count: usize) -> Result<()> {
    ensure!(stopped.len() == count, "{count} pods were to stop: {stopped:?}");
    let failed = stopped.iter().find(|stopped| stopped.code != Some(0));
    ensure!(failed.is_none(), "a clean stop has exit code 0: {failed:?}");
    let slowest = stopped.iter().map(|stopped| stopped.took).max().unwrap_or_default();
    say(format!("{count} pods have stopped, the slowest after {:.1} s", slowest.as_secs_f64()));
    Ok(())
}

/// Checks that no pod's process was started again: none has ended, and none was found dead by its probes.
fn check_restarts(set: &StatefulSet) -> Result<()> {
    for ordinal in 0..set.replicas() {
        let (pod, status) = (set.pod(ordinal), set.pod(ordinal).status()?);
        ensure!(status.restarts == 0, "{} was started again: {status:?}", pod.name());
    }
    Ok(())
}

/// Checks on every pod that the collection holds this and nothing else.
async fn check_everywhere(set: &StatefulSet, expected: &BTreeMap<u64, Value>) -> Result<()> {
    set.settled().await?;
    set.converged().await?;
    for ordinal in 0..set.replicas() {
        let client = set.pod(ordinal).client().await;
        verify_at(&client, COLLECTION, expected).await?;
    }
    Ok(())
}

/// Runs `shoal cluster ORDER POD` against the service, as the manifest's comment tells an operator to.
async fn operate(set: &StatefulSet, order: &[&str]) -> Result<()> {
    cli::run_at(&set.url(), &[&["cluster"], order].concat(), COMMAND_TIMEOUT).await.map(drop)
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn pods_come_and_go_under_load() -> Result<()> {
    let mut set = StatefulSet::new().await?;
    set.apply(set.manifest().pod_management).await?;
    set.settled().await?;
    check_restarts(&set)?;
    let first = members(&set).await?;
    let names: Vec<&str> = first.keys().map(String::as_str).collect();
    ensure!(names == ["shoal-0", "shoal-1", "shoal-2"], "the first pods are {names:?}");

    let mut load = Load::start(&set).await?;
    update(&mut set, &mut load).await?;
    lose_processes(&mut set, &mut load).await?;
    lose_a_volume(&mut set, &mut load).await?;
    grow_and_shrink(&mut set, &mut load).await?;
    let expected = load.stop().await?;
    check_everywhere(&set, &expected).await?;
    set.finish().await
}

/// A rolling update: every pod is replaced and has a new address, no node becomes another one.
async fn update(set: &mut StatefulSet, load: &mut Load) -> Result<()> {
    let before = members(set).await?;
    load.step(ROLLING_UPDATE);
    let stopped = set.roll_out().await?;
    load.step("after the update");
    check_stops(&stopped, set.replicas())?;
    let order: Vec<&str> = stopped.iter().map(|stopped| stopped.pod.as_str()).collect();
    ensure!(order == ["shoal-2", "shoal-1", "shoal-0"], "the pods were replaced in the order {order:?}");
    check_restarts(set)?;
    let after = members(set).await?;
    ensure!(after == before, "the nodes were {before:?} and are {after:?}");
    load.writers.progress(50).await
}

/// A process dies and is started again in its pod; then a pod is gone at once and comes back elsewhere.
async fn lose_processes(set: &mut StatefulSet, load: &mut Load) -> Result<()> {
    let before = members(set).await?;
    load.step(PROCESS_DIES);
    let pod = set.pod(1);
    pod.crash().await?;
    wait_until(CHANGE_DEADLINE, "the process to be started again", || async {
        let status = pod.status()?;
        ensure!(status.restarts == 1, "{status:?}");
        Ok(Some(()))
    })
    .await?;
    set.available(1).await?;
    ensure!(set.pod(1).status()?.restarts == 1, "it was started more often than it died");

    load.step("a pod is deleted by force");
    let address = set.pod(2).http_address().await;
    set.pod_mut(2).delete_by_force().await?;
    load.writers.progress(50).await?;
    set.replace(2).await?;
    ensure!(set.pod(2).http_address().await != address, "the pod is back under its old address");
    let after = members(set).await?;
    ensure!(after == before, "the nodes were {before:?} and are {after:?}");
    load.writers.progress(50).await
}

/// The first pod, which once created the cluster, loses its volume: it joins that cluster as a new node, which
/// holds what the old one held.
async fn lose_a_volume(set: &mut StatefulSet, load: &mut Load) -> Result<()> {
    set.settled().await?;
    let (before, old_view) = (members(set).await?, set.pod(0).view().await?);
    let old = before["shoal-0"];
    load.step("a volume is lost");
    set.pod_mut(0).delete_by_force().await?;
    set.pod(0).lose_volume().await?;
    load.writers.progress(50).await?;
    set.replace(0).await?;
    set.settled().await?;
    ensure!(set.pod(0).status()?.restarts == 0, "shoal-0 was started again on its empty volume");

    let (mut after, view) = (members(set).await?, set.pod(0).view().await?);
    ensure!(view.cluster_id == old_view.cluster_id, "shoal-0 has made a cluster of its own");
    let new = after["shoal-0"];
    let newest = before.values().max().copied().unwrap_or_default();
    ensure!(new > newest, "shoal-0 has the id {new} after {newest} was given out");
    let (held, holds) = (replicas_of(&old_view, old), replicas_of(&view, new));
    ensure!(held > 0 && holds == held, "{old} held {held} replicas, {new} is to hold {holds}");
    ensure!(replicas_of(&view, old) == 0, "a node that is gone is to hold replicas");
    after.insert("shoal-0".to_owned(), old);
    ensure!(after == before, "of the nodes {before:?} not only shoal-0 has changed: {after:?}");
    load.writers.progress(50).await
}

/// Two pods more; then they are drained, taken away and forgotten, in the order that the manifest's comment
/// gives.
async fn grow_and_shrink(set: &mut StatefulSet, load: &mut Load) -> Result<()> {
    let before = members(set).await?;
    let few = set.replicas();
    load.step("two pods more");
    set.scale(few + 2).await?;
    let more = members(set).await?;
    let newest = before.values().max().copied().unwrap_or_default();
    let leaving = ["shoal-4", "shoal-3"];
    for name in leaving {
        ensure!(more[name] > newest, "{name} has the id {} after {newest} was given out", more[name]);
    }
    all_hold_something(set, &more).await?;
    set.settled().await?;

    for name in leaving {
        load.step("a pod is drained");
        operate(set, &["drain", name, "--timeout", DRAIN_SECONDS]).await?;
        let held = replicas_of(&set.pod(0).view().await?, more[name]);
        ensure!(held == 0, "{name} is drained and is to hold {held} replicas");
    }
    load.step("two pods fewer");
    check_stops(&set.scale(few).await?, leaving.len())?;
    for name in leaving {
        operate(set, &["remove", name]).await?;
    }
    set.settled().await?;
    let after = members(set).await?;
    ensure!(after == before, "the nodes were {before:?} and are {after:?}");
    load.writers.progress(50).await
}

/// With volumes that know a cluster of three, the first pod alone is no majority and is never ready. Pods that
/// start one after the other would wait for it for ever, which is why the manifest starts them together.
/// Meanwhile the probes must let it wait: a node that is killed for want of peers never finds them.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_stopped_set_comes_back_only_together() -> Result<()> {
    let mut set = StatefulSet::new().await?;
    let shipped = set.manifest().pod_management;
    ensure!(shipped == PodManagement::Parallel, "the manifest starts pods as {shipped:?}");
    ensure!(set.manifest().when_deleted == Retention::Retain, "the manifest deletes volumes with the set");
    set.apply(shipped).await?;
    let client = set.client();
    Points::of(&client, COLLECTION).create(SHARDS, REPLICAS).await?;
    set.settled().await?;
    let before = members(&set).await?;
    let writers = Writers::through(&client, COLLECTION, WRITERS);
    writers.progress(200).await?;
    check_stops(&set.delete().await?, before.len())?;

    let liveness = &set.manifest().liveness;
    // Long enough for a liveness probe that fails from the beginning.
    let patience = paced(liveness.period) * (liveness.failure_threshold + 2);
    let applied = tokio::time::timeout(patience, set.apply(PodManagement::OrderedReady)).await;
    ensure!(applied.is_err(), "pods that start in order do not wait for ever: {applied:?}");
    let alone = set.pod(0).status()?;
    ensure!(alone.is_started && alone.restarts == 0, "the probes do not let the first pod wait: {alone:?}");
    ensure!(alone.ready_since.is_none(), "the first pod is ready without a majority");
    ensure!(!set.pod(1).exists() && !set.pod(2).exists(), "a pod was started before the first was ready");
    let liveness_path = set.manifest().liveness.path.as_str();
    let live = set.pod(0).client().await.once(&Request::get(liveness_path)).await?;
    ensure!(live.is_success(), "the first pod is not live: {} {}", live.status, live.text());
    let id = set.pod(0).view().await?.node.id;
    ensure!(id == before["shoal-0"], "shoal-0 was {} and is {id}", before["shoal-0"]);
    // Whoever waits can be stopped.
    check_stops(&set.delete().await?, 1)?;

    set.apply(shipped).await?;
    let after = members(&set).await?;
    ensure!(after == before, "the nodes were {before:?} and are {after:?}");
    writers.progress(100).await?;
    check_restarts(&set)?;
    let written = writers.stop().await?;
    written.report("all pods stopped at once and came back");
    check_everywhere(&set, &written.points).await?;
    set.finish().await
}

/// With the component `drain-on-stop` the set is made smaller by its number alone: both pods that go move all
/// that they have to the others, at the same time and in their grace period. They come back as who they were.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_set_whose_pods_drain_is_scaled_by_its_number_alone() -> Result<()> {
    let mut set = StatefulSet::with(&Component::read("drain-on-stop")?).await?;
    set.apply(set.manifest().pod_management).await?;
    let few = set.replicas();
    let client = set.client();
    Points::of(&client, COLLECTION).create(SHARDS, REPLICAS).await?;
    set.settled().await?;
    let writers = Writers::through(&client, COLLECTION, WRITERS);
    writers.progress(100).await?;
    set.scale(few + 2).await?;
    let more = members(&set).await?;
    all_hold_something(&set, &more).await?;
    set.settled().await?;

    check_stops(&set.scale(few).await?, 2)?;
    let view = set.pod(0).view().await?;
    for name in ["shoal-3", "shoal-4"] {
        let held = replicas_of(&view, more[name]);
        ensure!(held == 0, "{name} has gone and is to hold {held} replicas");
    }
    writers.progress(100).await?;
    set.scale(few + 2).await?;
    let after = members(&set).await?;
    ensure!(after == more, "the nodes were {more:?} and are {after:?}");
    all_hold_something(&set, &after).await?;
    writers.progress(100).await?;
    let written = writers.stop().await?;
    written.report("scaled to five, to three and to five");
    check_everywhere(&set, &written.points).await?;
    set.finish().await
}
