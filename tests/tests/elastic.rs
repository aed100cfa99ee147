//! A cluster that grows and shrinks under load, by itself: nodes that start join and take their share,
//! nodes that stop hand everything over first. Nothing is lost, nothing is there twice, nothing fails
//! for a client that tries again.

use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use serde_json::{Value, json};
use shoal_tests::view::View;
use shoal_tests::{
    Client, Cluster, Freshness, Points, Request, Searcher, Writers, cli, documents, point, say, wait_until,
};

/// How long a node may take to hand everything over and stop.
const DRAIN_DEADLINE: Duration = Duration::from_secs(120);
/// How long placement may take to come to rest.
const REST_DEADLINE: Duration = Duration::from_secs(120);
/// Shards of the collection.
const SHARDS: u32 = 4;
/// Uploaded files. They are in a shard of their own, which goes where the others go.
const FILES: u32 = 20;
/// Points that are searched for.
const NEEDLES: u64 = 20;
/// Ids of those, beyond what the writers write.
const FIRST_NEEDLE: u64 = 1 << 40;

fn file_bytes(number: u32) -> Vec<u8> {
    blake3::hash(&number.to_be_bytes()).to_hex().repeat(2000).into_bytes()
}

/// Checks that a node serves the bytes of every file.
async fn verify_files(client: &Client, files: &[(String, Vec<u8>)]) -> Result<()> {
    for (id, bytes) in files {
        let reply = client.succeed(&Request::get(format!("/v1/files/{id}/content"))).await?;
        ensure!(reply.body == *bytes, "file {id} has {} other bytes", reply.body.len());
    }
    Ok(())
}

fn replicas_of(view: &View, node: u64) -> usize {
    view.shards.iter().filter(|shard| shard.replicas.contains(&node)).count()
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn one_three_five_three_one_under_load() -> Result<()> {
    let mut cluster = Cluster::of(1).env("SHOAL_DRAIN_ON_STOP", "true").start().await?;
    // Known to the clients from the beginning, as the names behind a service are.
    for _ in 1..5 {
        cluster.place_node()?;
    }
    let any = cluster.any();
    let points = Points::of(&any, "c");
    points.create(SHARDS, 3).await?;
    let needles: Vec<u64> = (FIRST_NEEDLE..FIRST_NEEDLE + NEEDLES).collect();
    points
        .upsert(&needles.iter().map(|id| point(*id, json!({"needle": id}))).collect::<Vec<Value>>())
        .await?;
    let mut files = Vec::new();
    for number in 0..FILES {
        let bytes = file_bytes(number);
        files.push((documents::upload(&any, &format!("{number}.txt"), &bytes, None).await?, bytes));
    }
    let writers = Writers::start(&cluster, "c", 4);
    let searcher = Searcher::start(&any, "c", needles.clone());
    writers.progress(100).await?;

    let mut steps = vec![(String::from("calm"), Instant::now())];
    writers.progress(1000).await?;
    let mut step = |name: &str| steps.push((name.to_owned(), Instant::now()));
    step("1 to 3");
    for at in 1..3 {
        cluster.restart(at).await?;
    }
    cluster.rested(|spread| spread == [5, 5, 5]).await?;
    step("3 to 5");
    for at in 3..5 {
        cluster.restart(at).await?;
    }
    cluster.rested(|spread| spread == [3; 5]).await?;
    for (at, left) in [(1, 4), (3, 3), (4, 2), (2, 1)] {
        writers.progress(50).await?;
        step(&format!("{} to {left}", left + 1));
        let code = cluster.node_mut(at).terminate(DRAIN_DEADLINE).await?;
        ensure!(code == Some(0), "a clean stop of n{} has exit code {code:?}", at + 1);
        let view = cluster.node(0).view().await?;
        let id =
            view.nodes.iter().find(|node| node.name == format!("n{}", at + 1)).context("it is known")?.id;
        let held = replicas_of(&view, id);
        ensure!(held == 0, "n{} has stopped and is to hold {held} replicas", at + 1);
        cluster.rested(|spread| spread.iter().sum::<usize>() == 5 * left.min(3)).await?;
    }
    step("end");
    writers.progress(100).await?;
    let written = writers.stop().await?;
    let searched = searcher.stop().await?;
    written.report("1 to 3 to 5 to 3 to 1");
    for pair in steps.windows(2) {
        let [(name, from), (_, to)] = pair else { continue };
        let times = searched.times(*from, *to).map(|times| times.map(|time| time.as_millis()));
        say(format!(
            "{name}: {:.1} s, longest write gap {} ms, searches p50, p99, max in ms: {times:?}",
            to.duration_since(*from).as_secs_f64(),
            written.gap_within(*from, *to).as_millis(),
        ));
    }
    // What is left on the one node is everything.
    let mut expected = written.points.clone();
    expected.extend(needles.iter().map(|id| (*id, json!({"needle": id}))));
    shoal_tests::writers::verify_at(cluster.client(0), "c", &expected).await?;
    verify_files(cluster.client(0), &files).await?;
    // And the others come back as who they were.
    for at in 1..3 {
        cluster.restart(at).await?;
    }
    cluster.rested(|spread| spread == [5, 5, 5]).await?;
    cluster.converged().await?;
    for at in 0..3 {
        verify_files(cluster.client(at), &files).await?;
        let points = Points::of(cluster.client(at), "c").at(Freshness::Eventual);
        shoal_tests::writers::verify(&expected, &points).await?;
    }
    cluster.finish()
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn operators_drain_move_repair_and_remove() -> Result<()> {
    let mut cluster = Cluster::of(5).env("SHOAL_REPAIR_AFTER", "10").start().await?;
    let any = cluster.any();
    Points::of(&any, "c").create(SHARDS, 3).await?;
    cluster.rested(|spread| spread.iter().sum::<usize>() == 12).await?;
    let writers = Writers::start(&cluster, "c", 2);
    writers.progress(50).await?;
    let client = cluster.client(0).clone();
    let order = |request: Request| {
        let client = client.clone();
        async move { client.json(&request).await }
    };

    // A node that is drained keeps nothing, and is not removed before it is.
    let refused = client.send(&Request::delete("/admin/nodes/n2")).await?;
    ensure!(refused.status == 409, "a node that lives and is not drained was removed: {}", refused.text());
    order(Request::post("/admin/nodes/n2/drain", &json!({}))).await?;
    wait_until(DRAIN_DEADLINE, "n2 to be drained", || async {
        let status = order(Request::get("/admin/nodes/n2/drain")).await?;
        ensure!(status["is_done"] == json!(true), "{status}");
        Ok(Some(()))
    })
    .await?;
    let view = cluster.node(1).view().await?;
    ensure!(replicas_of(&view, view.node.id) == 0, "a drained node is to hold replicas");
    let report = order(Request::get("/admin/cluster/report")).await?;
    for node in report["nodes"].as_array().context("no nodes")? {
        ensure!(node["is_drained"] == json!(node["name"] == json!("n2")), "n2 alone is drained: {node}");
    }
    wait_until(REST_DEADLINE, "n2 to throw away what it held", || async {
        let view = cluster.node(1).view().await?;
        ensure!(view.groups.iter().all(|group| group.group == 0), "n2 has replicas open");
        Ok(Some(()))
    })
    .await?;
    order(Request::delete("/admin/nodes/n2")).await?;
    let code = cluster.node_mut(1).exited(Duration::from_secs(30)).await?;
    ensure!(code == Some(76), "a removed node ends with 76, not {code:?}");
    // It comes back from its old directory, and is told again.
    cluster.node_mut(1).start()?;
    let code = cluster.node_mut(1).exited(Duration::from_secs(30)).await?;
    ensure!(code == Some(76), "a removed node that comes back ends with 76, not {code:?}");
    ensure!(cluster.node(1).log().contains("was removed from its cluster"), "and says why");

    // A node that dies for good is replaced from its peers, by itself.
    let lost = cluster.node(2).view().await?.node.id;
    cluster.node_mut(2).kill()?;
    wait_until(REST_DEADLINE, "the lost node to be replaced", || async {
        let view = cluster.node(0).view().await?;
        let held = replicas_of(&view, lost);
        ensure!(held == 0, "{held} shards are still to be held by the lost node");
        Ok(Some(()))
    })
    .await?;
    rest_without(&cluster, lost).await?;
    order(Request::delete("/admin/nodes/n3")).await?;

    // Leaders and replicas move by hand while placement is paused.
    order(Request::post("/admin/placement/pause", &json!({}))).await?;
    order(Request::put("/admin/collections/c/replication", &json!({"replication_factor": 1}))).await?;
    wait_until(REST_DEADLINE, "placement to pause", || async {
        let plan = order(Request::get("/admin/placement")).await?;
        ensure!(plan["is_paused"] == json!(true), "{plan}");
        Ok(Some(()))
    })
    .await?;
    let shard = cluster.shards("c").await?[0];
    let leader = cluster.leader(shard).await?;
    let other = if leader == 0 { "n4" } else { "n1" };
    wait_until(REST_DEADLINE, "the leader to move", || async {
        order(Request::post(format!("/admin/shards/{shard}/leader"), &json!({"to": other}))).await?;
        let now = cluster.leader(shard).await?;
        ensure!(cluster.node(now).name() == other, "{} leads", cluster.node(now).name());
        Ok(Some(()))
    })
    .await?;
    let known = client
        .send(&Request::post(format!("/admin/shards/{shard}/move"), &json!({"from": "n1", "to": "n4"})))
        .await?;
    ensure!(known.status == 409, "n4 holds it already: {}", known.text());
    let unknown = client.send(&Request::post("/admin/nodes/n9/drain", &json!({}))).await?;
    ensure!(unknown.status == 404, "there is no n9: {}", unknown.text());
    order(Request::post("/admin/placement/resume", &json!({}))).await?;
    cluster.rested(|spread| spread.iter().sum::<usize>() == 4 && spread.iter().all(|held| *held > 0)).await?;
    let written = writers.stop().await?;
    written.report("drained, repaired, moved");
    for at in [0, 3, 4] {
        written.verify(cluster.client(at), "c", Freshness::Linearizable).await?;
    }
    cluster.finish()
}

/// Where all nodes are in one test.
const ZONE: &str = "harbour";
/// How often a watched status is read.
const FRAMES: usize = 2;

/// Runs `shoal cluster …` against a node until it ends well.
async fn type_in(cluster: &Cluster, arguments: &[&str]) -> Result<String> {
    cli::run_at(&cluster.node(0).url(), &[&["cluster"], arguments].concat(), DRAIN_DEADLINE).await
}

/// Waits until the plan has these words, and returns it.
async fn planned(cluster: &Cluster, words: &[&str]) -> Result<String> {
    wait_until(REST_DEADLINE, &format!("a plan with {words:?}"), || async {
        let plan = type_in(cluster, &["plan"]).await?;
        ensure!(words.iter().all(|word| plan.contains(word)), "{plan}");
        Ok(Some(plan))
    })
    .await
}

/// The places of the nodes that are to hold a shard, with the leader first, and of those that are not.
async fn places(cluster: &Cluster, shard: u64) -> Result<(Vec<usize>, Vec<usize>)> {
    let leader = cluster.leader(shard).await?;
    let view = cluster.node(leader).view().await?;
    let placed = view.shards.iter().find(|known| known.id == shard).context("the leader knows it")?;
    let (mut hold, mut lack) = (vec![leader], Vec::new());
    for at in (0..cluster.len()).filter(|at| *at != leader) {
        let known = view.nodes.iter().find(|node| node.name == cluster.node(at).name());
        let id = known.context("the leader knows every node")?.id;
        if placed.replicas.contains(&id) { hold.push(at) } else { lack.push(at) }
    }
    Ok((hold, lack))
}

/// Moves a replica by what an operator types, and waits until exactly the right nodes vote.
async fn move_by_hand(cluster: &Cluster, shard: u64, (from, to): (usize, usize)) -> Result<()> {
    let (from, to) = (cluster.node(from), cluster.node(to));
    let (left, arrived) = (from.view().await?.node.id, to.view().await?.node.id);
    let began = Instant::now();
    type_in(cluster, &["move", &shard.to_string(), "--from", from.name(), "--to", to.name()]).await?;
    wait_until(REST_DEADLINE, "the replica to move", || async {
        let report = cluster.any().json(&Request::get("/admin/cluster/report")).await?;
        let shards = report["shards"].as_array().context("no shards")?;
        let group = &shards.iter().find(|known| known["id"] == json!(shard)).context("no shard")?["group"];
        let voters = group["voters"].as_array().context("no leader")?;
        let is_done = voters.contains(&json!(arrived)) && !voters.contains(&json!(left));
        ensure!(is_done && group["learners"] == json!([]), "{group}");
        Ok(Some(()))
    })
    .await?;
    say(format!(
        "shard {shard} has moved from {} to {} after {:.1} s",
        from.name(),
        to.name(),
        began.elapsed().as_secs_f64()
    ));
    Ok(())
}

/// Checks what a printed status says of every node, and of every shard of the collection.
async fn check_status(cluster: &Cluster, printed: &str, shards: &[u64]) -> Result<()> {
    for at in 0..cluster.len() {
        let node = cluster.node(at);
        let (name, id) = (node.name(), node.view().await?.node.id);
        let cell = |heading: &str| cli::cell(printed, ("NAME", name), heading);
        ensure!(cell("NODE")? == id.to_string(), "the id of {name}: {printed}");
        ensure!(cell("ZONE")? == ZONE, "the zone of {name}: {printed}");
        ensure!(cell("STATE")? == "up", "the state of {name}: {printed}");
        ensure!(cell("HTTP")? == node.http_address(), "the address of {name}: {printed}");
    }
    for shard in shards {
        let cell = |heading: &str| cli::cell(printed, ("SHARD", &shard.to_string()), heading);
        let leader = cluster.leader(*shard).await?;
        let leader = cluster.node(leader).view().await?.node.id;
        ensure!(cell("COLLECTION")? == "c", "the collection of shard {shard}: {printed}");
        ensure!(cell("LEADER")? == leader.to_string(), "{leader} leads shard {shard}: {printed}");
        let behind = cell("BEHIND")?;
        ensure!(behind.parse::<u64>().is_ok(), "shard {shard} is {behind:?} behind: {printed}");
    }
    Ok(())
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_operators_type_is_done() -> Result<()> {
    let cluster = Cluster::of(3).env("SHOAL_ZONE", ZONE).start().await?;
    Points::of(&cluster.any(), "c").create(3, 2).await?;
    cluster.rested(|spread| spread == [2; 3]).await?;
    cluster.settled().await?;
    let shards = cluster.shards("c").await?;
    let writers = Writers::start(&cluster, "c", 2);
    writers.progress(50).await?;

    let printed = type_in(&cluster, &["status"]).await?;
    check_status(&cluster, &printed, &shards).await?;
    ensure!(printed.contains("placement: nothing to do"), "{printed}");
    let watched = ["cluster", "status", "--watch"];
    let frames =
        cli::watch_at(&cluster.node(0).url(), &watched, ("cluster ", FRAMES), DRAIN_DEADLINE).await?;
    ensure!(frames.len() == FRAMES, "{frames:?}");
    for frame in &frames {
        check_status(&cluster, frame, &shards).await?;
    }

    // Nothing moves by itself from here on; what is ordered does, be it a follower or the leader.
    type_in(&cluster, &["pause"]).await?;
    planned(&cluster, &["placement (paused): nothing to do"]).await?;
    let (hold, lack) = places(&cluster, shards[0]).await?;
    move_by_hand(&cluster, shards[0], (hold[1], lack[0])).await?;
    let (hold, lack) = places(&cluster, shards[1]).await?;
    move_by_hand(&cluster, shards[1], (hold[0], lack[0])).await?;
    let (hold, _) = places(&cluster, shards[2]).await?;
    let heir = cluster.node(hold[1]).name();
    wait_until(REST_DEADLINE, "the leader to move", || async {
        type_in(&cluster, &["lead", &shards[2].to_string(), "--to", heir]).await?;
        let leader = cluster.leader(shards[2]).await?;
        ensure!(cluster.node(leader).name() == heir, "{} leads", cluster.node(leader).name());
        Ok(Some(()))
    })
    .await?;
    type_in(&cluster, &["replicate", "c", "3"]).await?;
    planned(&cluster, &["placement (paused):", "  next ", "it has 2 of 3 replicas"]).await?;
    for shard in &shards {
        let (hold, _) = places(&cluster, *shard).await?;
        ensure!(hold.len() == 2, "placement is paused, and {} hold shard {shard}", hold.len());
    }
    type_in(&cluster, &["resume"]).await?;
    cluster.rested(|spread| spread == [3; 3]).await?;
    writers.progress(50).await?;

    // A node that is drained and then used again has its share again.
    type_in(&cluster, &["drain", "n3"]).await?;
    let printed = type_in(&cluster, &["status"]).await?;
    let n3 = |heading: &str| cli::cell(&printed, ("NAME", "n3"), heading);
    ensure!(n3("STATE")? == "drained" && n3("REPLICAS")? == "0" && n3("LEADS")? == "0", "{printed}");
    type_in(&cluster, &["undrain", "n3"]).await?;
    cluster.rested(|spread| spread == [3; 3]).await?;
    cluster.settled().await?;
    check_status(&cluster, &type_in(&cluster, &["status"]).await?, &shards).await?;
    writers.progress(50).await?;
    let written = writers.stop().await?;
    written.report("paused, moved, drained, used again");
    cluster.converged().await?;
    for at in 0..3 {
        shoal_tests::writers::verify_at(cluster.client(at), "c", &written.points).await?;
    }
    cluster.finish()
}

/// Bytes a second that a node may send for moves: a replica of the large points takes seconds.
const SLOW_PACE: &str = "262144";
/// Points with a large payload, and how many of them go into one request: into an entry for each shard.
const LARGE: u64 = 1_600;
const LARGE_AT_ONCE: usize = 8;
/// Ids of those, beyond what the writers write.
const FIRST_LARGE: u64 = 1 << 41;
/// Entries that a log is without, at least, when a new replica needs a snapshot.
const PURGED: u64 = 20;

fn large(id: u64) -> Value {
    let part = |part: u64| blake3::hash(&(64 * id + part).to_be_bytes()).to_hex().to_string();
    json!({"text": (0..64).map(part).collect::<String>()})
}

/// What placement is at, by the word of whoever leads the control group.
async fn moving(client: &Client) -> Result<Vec<Value>> {
    let plan = client.json(&Request::get("/admin/placement")).await?;
    Ok(plan["moving"].as_array().with_context(|| format!("no plan: {plan}"))?.clone())
}

/// Waits until something moves, by the word of whoever leads the control group, and returns it.
async fn under_way(client: &Client) -> Result<Vec<Value>> {
    wait_until(REST_DEADLINE, "a replica to be on its way", || async {
        let moving = moving(client).await?;
        Ok((!moving.is_empty()).then_some(moving))
    })
    .await
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_move_goes_on_under_another_leader_of_the_control_group() -> Result<()> {
    let settings = Cluster::of(3)
        .env("SHOAL_RAFT_CHECKPOINT_ENTRIES", "100")
        .env("SHOAL_RAFT_KEEP_ENTRIES", "20")
        .env("SHOAL_MOVE_BYTES_PER_SECOND", SLOW_PACE);
    let mut cluster = settings.start().await?;
    let any = cluster.any();
    let points = Points::of(&any, "c");
    points.create(SHARDS, 3).await?;
    cluster.settled().await?;
    let known: Vec<(u64, Value)> = (FIRST_LARGE..FIRST_LARGE + LARGE).map(|id| (id, large(id))).collect();
    for some in known.chunks(LARGE_AT_ONCE) {
        let some: Vec<Value> = some.iter().map(|(id, payload)| point(*id, payload.clone())).collect();
        points.upsert(&some).await?;
    }
    // A new replica is made from a snapshot, which takes its time.
    for shard in cluster.shards("c").await? {
        wait_until(REST_DEADLINE, "the logs to be dropped", || async {
            let leader = cluster.leader(shard).await?;
            let view = cluster.node(leader).view().await?;
            let purged = view.group(shard).context("its leader has it")?.purged;
            ensure!(purged >= PURGED, "the log of shard {shard} begins after {purged}");
            Ok(Some(()))
        })
        .await?;
    }
    let writers = Writers::start(&cluster, "c", 2);
    writers.progress(50).await?;

    cluster.add_node().await?;
    under_way(&any).await?;
    let leader = cluster.leader(0).await?;
    let others = cluster.any_but(&[leader]);
    let before = moving(&any).await?;
    ensure!(!before.is_empty(), "the move has ended before anybody could be killed");
    cluster.node_mut(leader).kill()?;
    let killed = Instant::now();
    let after = under_way(&others).await?;
    let next = cluster.leader(0).await?;
    ensure!(next != leader, "{} was killed", cluster.node(leader).name());
    say(format!(
        "moved before the leader was killed: {before:?}; {:.1} s later, by {}: {after:?}",
        killed.elapsed().as_secs_f64(),
        cluster.node(next).name()
    ));
    writers.progress(50).await?;
    cluster.restart(leader).await?;
    cluster.rested(|spread| spread == [3; 4]).await?;
    cluster.settled().await?;
    let written = writers.stop().await?;
    written.report("another leader in the middle of a move");
    cluster.converged().await?;
    let mut expected = written.points.clone();
    expected.extend(known);
    for at in 0..4 {
        shoal_tests::writers::verify_at(cluster.client(at), "c", &expected).await?;
    }
    cluster.finish()
}

/// Waits until nothing moves although a node is gone.
async fn rest_without(cluster: &Cluster, lost: u64) -> Result<()> {
    wait_until(REST_DEADLINE, "the replicas to be whole without the lost node", || async {
        let report = cluster.client(0).json(&Request::get("/admin/cluster/report")).await?;
        for shard in report["shards"].as_array().context("no shards")? {
            let voters = shard["group"]["voters"].as_array().context("no leader")?;
            ensure!(voters.len() == 3 && !voters.contains(&json!(lost)), "{shard}");
        }
        Ok(Some(()))
    })
    .await
}
