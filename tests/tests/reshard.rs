//! Shards that are split and merged while they are used: nothing is lost, nothing is there twice, nothing
//! fails for a client that tries again, and a request that is repeated afterwards is recognised.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use serde_json::{Value, json};
use shoal_tests::documents::upload;
use shoal_tests::{
    Client, Cluster, Freshness, Points, Request, Searcher, Store, Writers, cli, models, point, say, skip,
    wait_until,
};

/// How long a change of shards may take.
const RESHARD_DEADLINE: Duration = Duration::from_secs(120);
/// How long documents may take.
const DOCUMENTS_DEADLINE: Duration = Duration::from_secs(240);
/// Points that are there before anything is split: enough for graphs.
const POINTS: u64 = 6_000;
/// Points in one request.
const BATCH: u64 = 500;
/// Their ids, beyond what the writers write.
const FIRST: u64 = 1 << 40;
/// Points that are searched for.
const NEEDLES: u64 = 20;
/// The longest time in which no writer has an acknowledgement while shards are changed.
const GAP_LIMIT: Duration = Duration::from_secs(2);

/// A shard whose store is larger is split by itself, and how often that is looked up, in seconds.
const SPLIT_BYTES: &str = "8388608";
const SIZES_SECONDS: &str = "1";
/// Points that together take more than that, and how many of them go into one request.
const LARGE: u64 = 3_000;
const LARGE_AT_ONCE: usize = 100;
/// Bytes of the payload of each.
const LARGE_BYTES: usize = 4096;
/// How long a paused placement is watched: several looks at the sizes.
const HELD_BACK: Duration = Duration::from_secs(8);

/// How long a read may take that shows an old token, or a wrong one.
const TOKEN_LIMIT: Duration = Duration::from_secs(5);

/// The ranges of a collection's shards, as first routes.
async fn firsts(cluster: &Cluster, collection: &str) -> Result<Vec<u64>> {
    let report = cluster.any().json(&Request::get("/admin/cluster/report")).await?;
    let shards = report["shards"].as_array().context("no shards")?.iter();
    let of =
        shards.filter(|shard| shard["collection"] == json!(collection) && shard["is_in_use"] == json!(true));
    let mut firsts: Vec<u64> = of.filter_map(|shard| shard["first"].as_u64()).collect();
    firsts.sort_unstable();
    Ok(firsts)
}

/// Waits until no shards are being changed and the collection has so many.
async fn changed(cluster: &Cluster, client: &Client, collection: &str, count: usize) -> Result<Vec<u64>> {
    wait_until(RESHARD_DEADLINE, "the shards to be changed", || async {
        let report = client.json(&Request::get("/admin/cluster/report")).await?;
        let under_way = report["resharding"].as_array().context("no resharding")?;
        ensure!(under_way.is_empty(), "{under_way:?}");
        Ok(Some(()))
    })
    .await?;
    let shards = cluster.shards(collection).await?;
    ensure!(shards.len() == count, "{collection} has the shards {shards:?}, not {count}");
    Ok(shards)
}

/// Runs `shoal cluster …` against a node until it ends well.
async fn order(cluster: &Cluster, arguments: &[&str]) -> Result<String> {
    cli::run_at(&cluster.node(0).url(), &[&["cluster"], arguments].concat(), RESHARD_DEADLINE).await
}

/// Writes the same points again and again, all in one request, until it is told to stop: every write must be
/// there as a whole. Returns the number of the last one.
async fn write_together(client: Client, stop: Arc<AtomicBool>) -> Result<u64> {
    let client = client.with_limits(RESHARD_DEADLINE, Duration::from_secs(3));
    for turn in 1.. {
        let points: Vec<Value> = together().map(|id| point(id, json!({"turn": turn}))).collect();
        Points::of(&client, "c").upsert(&points).await?;
        if turn % 10 == 0 {
            let found = Points::of(&client, "c").get(&together().collect::<Vec<_>>()).await?;
            for (id, payload) in &found {
                ensure!(payload["turn"] == json!(turn), "point {id} is at {payload} after turn {turn}");
            }
        }
        if stop.load(Ordering::Acquire) {
            return Ok(turn);
        }
    }
    Ok(0)
}

fn together() -> impl Iterator<Item = u64> {
    FIRST + 2 * POINTS..FIRST + 2 * POINTS + 40
}

fn known(ids: impl Iterator<Item = u64>) -> Vec<(u64, Value)> {
    ids.map(|id| (id, json!({"known": id}))).collect()
}

async fn fill(points: &Points<'_>, known: &[(u64, Value)]) -> Result<()> {
    for some in known.chunks(BATCH as usize) {
        let some: Vec<Value> = some.iter().map(|(id, payload)| point(*id, payload.clone())).collect();
        points.upsert(&some).await?;
    }
    Ok(())
}

/// Writes a point again and again, at one node after the other, and shows the token of each write to every
/// node, until it is told to stop. Returns the number of the last write.
async fn read_own_writes(nodes: Vec<Client>, id: u64, stop: Arc<AtomicBool>) -> Result<u64> {
    for turn in 1u64.. {
        let writer = Points::of(&nodes[turn as usize % nodes.len()], "c");
        let token = writer.upsert(&[point(id, json!({"turn": turn}))]).await?.position()?;
        for (at, reader) in nodes.iter().enumerate() {
            let found = Points::of(reader, "c").at(Freshness::Session(token.clone())).get(&[id]).await?;
            let seen = found.get(&id).and_then(|payload| payload["turn"].as_u64());
            ensure!(seen == Some(turn), "node {at} shows turn {seen:?} after turn {turn} and {token}");
        }
        if stop.load(Ordering::Acquire) {
            return Ok(turn);
        }
    }
    Ok(0)
}

/// Shows tokens to every node that nobody would be given now: each must be answered soon, with what it has
/// seen.
async fn show_tokens(cluster: &Cluster, tokens: &[&str], expected: &(u64, Value)) -> Result<()> {
    let (id, payload) = expected;
    for at in 0..cluster.len() {
        let client = cluster.client(at).clone().with_limits(TOKEN_LIMIT, TOKEN_LIMIT);
        for token in tokens {
            let points = Points::of(&client, "c").at(Freshness::Session((*token).to_owned()));
            let found = points.get(&[*id]).await.with_context(|| format!("{token} at node {at}"))?;
            ensure!(found.get(id) == Some(payload), "node {at} shows {found:?} with {token}");
            let hits = points.search(&shoal_tests::vector(*id), 5, None).await?;
            let is_found = hits.iter().any(|hit| hit["id"].as_u64() == Some(*id));
            ensure!(is_found, "node {at} finds {hits:?} with {token}");
        }
    }
    Ok(())
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn two_shards_become_one_and_two_again_under_load() -> Result<()> {
    let cluster = Cluster::of(3).start().await?;
    let any = cluster.any();
    let points = Points::of(&any, "c");
    points.create(2, 3).await?;
    let before = known(FIRST..FIRST + POINTS);
    fill(&points, &before).await?;
    cluster.settled().await?;
    // A token of the shards that are there now, and such of shards that nobody knows.
    let early = (FIRST + POINTS, json!({"early": true}));
    let token = points.upsert(&[point(early.0, early.1.clone())]).await?.position()?;
    let unknown = format!("{token}.ffffff-1");
    let tokens = [token.as_str(), unknown.as_str(), "p1.ffffff-1"];
    // The last one asks for nothing that a replica must have.
    cluster.converged().await?;
    show_tokens(&cluster, &tokens, &early).await?;
    // What a shard has never come to was seen in another cluster.
    let shard = cluster.shards("c").await?[0];
    let foreign = Freshness::Session(format!("p1.{shard:x}-ffffffff"));
    let count = Request::ask("/collections/c/points/count", &json!({"exact": true}));
    let refused = any.clone().with_limits(TOKEN_LIMIT, TOKEN_LIMIT).send(&foreign.of(count)).await?;
    ensure!(refused.status == 400, "{}", refused.status);
    ensure!(refused.text().contains("not a position token"), "{}", refused.text());

    let writers = Writers::start(&cluster, "c", 4);
    let searcher = Searcher::start(&any, "c", (FIRST..FIRST + NEEDLES).collect());
    let stop = Arc::new(AtomicBool::new(false));
    let own = FIRST + POINTS + 1;
    let nodes: Vec<Client> = (0..3).map(|at| cluster.client(at).clone()).collect();
    let session = tokio::spawn(read_own_writes(nodes, own, stop.clone()));
    writers.progress(200).await?;

    let shards = cluster.shards("c").await?;
    say(order(&cluster, &["merge", &shards[1].to_string(), &shards[0].to_string()]).await?);
    show_tokens(&cluster, &tokens, &early).await?;
    let shards = changed(&cluster, &any, "c", 1).await?;
    ensure!(firsts(&cluster, "c").await? == [0], "one shard has it all");
    writers.progress(200).await?;
    say(order(&cluster, &["split", &shards[0].to_string()]).await?);
    show_tokens(&cluster, &tokens, &early).await?;
    changed(&cluster, &any, "c", 2).await?;
    writers.progress(200).await?;

    stop.store(true, Ordering::Release);
    let turn = session.await??;
    let written = writers.stop().await?;
    searcher.stop().await?;
    written.report("merged and split");
    cluster.converged().await?;
    let mut expected = written.points.clone();
    expected.extend(before);
    expected.extend([early, (own, json!({"turn": turn}))]);
    for at in 0..3 {
        shoal_tests::writers::verify_at(cluster.client(at), "c", &expected).await?;
    }
    let gap = written.gap_of_all;
    ensure!(gap < GAP_LIMIT, "for {gap:?} nothing was acknowledged");
    cluster.finish()
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn shards_are_split_and_merged_under_load() -> Result<()> {
    let mut cluster = Cluster::of(3).start().await?;
    let any = cluster.any();
    let points = Points::of(&any, "c");
    points.create(1, 3).await?;
    let before = known(FIRST..FIRST + POINTS);
    fill(&points, &before).await?;
    cluster.settled().await?;
    let writers = Writers::start(&cluster, "c", 4);
    let searcher = Searcher::start(&any, "c", (FIRST..FIRST + NEEDLES).collect());
    let stop = Arc::new(AtomicBool::new(false));
    let batches = tokio::spawn(write_together(any.clone(), stop.clone()));
    writers.progress(200).await?;

    // A request whose answer was lost, and which somebody else has overwritten since.
    let lost = FIRST + POINTS;
    let request = points.upsert_request(&[point(lost, json!({"by": "the first"}))]);
    let request = request.header("Idempotency-Key", "an answer that was lost");
    any.succeed(&request).await?;
    points.upsert(&[point(lost, json!({"by": "the second"}))]).await?;

    let began = Instant::now();
    let shards = cluster.shards("c").await?;
    say(order(&cluster, &["split", &shards[0].to_string()]).await?);
    let shards = changed(&cluster, &any, "c", 2).await?;
    ensure!(firsts(&cluster, "c").await? == [0, 1 << 31], "they have halves");
    any.succeed(&request).await?;
    let found = points.get(&[lost]).await?;
    ensure!(found[&lost]["by"] == json!("the second"), "a repeated request was done again: {found:?}");

    // The node that drives it dies in the middle: another one begins it anew.
    any.succeed(&Request::post(format!("/admin/shards/{}/split", shards[1]), &json!({"into": 3}))).await?;
    let driver = cluster.leader(0).await?;
    cluster.node_mut(driver).kill()?;
    let others = cluster.any_but(&[driver]);
    wait_until(RESHARD_DEADLINE, "the split to end without its driver", || async {
        let report = others.json(&Request::get("/admin/cluster/report")).await?;
        ensure!(report["resharding"] == json!([]), "{}", report["resharding"]);
        Ok(Some(()))
    })
    .await?;
    cluster.restart(driver).await?;
    cluster.settled().await?;
    let shards = changed(&cluster, &any, "c", 4).await?;

    say(order(&cluster, &["merge", &shards[1].to_string(), &shards[2].to_string()]).await?);
    let shards = changed(&cluster, &any, "c", 3).await?;
    writers.progress(200).await?;

    // One that is given up changes nothing, and the shard that was frozen for it, if it was, goes on.
    let split = Request::post(format!("/admin/shards/{}/split", shards[0]), &json!({}));
    ensure!(any.send(&split).await?.status == 202, "it begins");
    let aborted = any.send(&Request::delete("/admin/collections/c/reshard")).await?;
    ensure!([200, 404].contains(&aborted.status), "{}", aborted.text());
    writers.progress(200).await?;
    let now = cluster.shards("c").await?.len();
    ensure!(now == if aborted.status == 200 { 3 } else { 4 }, "there are {now} shards");
    let span = began.elapsed();
    stop.store(true, Ordering::Release);
    let turn = batches.await??;
    let written = writers.stop().await?;
    let searched = searcher.stop().await?;
    written.report("split and merged");
    let times = searched.times(began, Instant::now()).map(|times| times.map(|time| time.as_millis()));
    say(format!("searches p50, p99, max in ms over {:.1} s: {times:?}", span.as_secs_f64()));

    cluster.converged().await?;
    let mut expected = written.points.clone();
    expected.extend(before);
    expected.insert(lost, json!({"by": "the second"}));
    expected.extend(together().map(|id| (id, json!({"turn": turn}))));
    for at in 0..3 {
        shoal_tests::writers::verify_at(cluster.client(at), "c", &expected).await?;
    }
    let gap = written.gap_of_all;
    ensure!(gap < GAP_LIMIT, "for {gap:?} nothing was acknowledged");
    cluster.kill_all()?;
    cluster.start_all().await?;
    shoal_tests::writers::verify(&expected, &Points::of(&cluster.any(), "c")).await?;
    refusals(&cluster).await?;
    cluster.finish()
}

/// What makes no sense is refused, and says why.
async fn refusals(cluster: &Cluster) -> Result<()> {
    let any = cluster.any();
    Points::of(&any, "d").create(3, 1).await?;
    let shards = cluster.shards("d").await?;
    let path = |shard: u64, what: &str| format!("/admin/shards/{shard}/{what}");
    for (request, status, words) in [
        (Request::post(path(9999, "split"), &json!({})), 404, "shard 9999 does not exist"),
        (Request::post(path(shards[0], "split"), &json!({"into": 1})), 400, "cannot be split into 1"),
        (Request::post(path(shards[0], "split"), &json!({"into": 256})), 409, "is the most"),
        (Request::post(path(shards[0], "merge"), &json!({"with": shards[2]})), 409, "not neighbours"),
        (Request::delete("/admin/collections/d/reshard"), 404, "not being changed"),
    ] {
        let reply = any.send(&request).await?;
        ensure!(reply.status == status, "{request}: {} {}", reply.status, reply.text());
        ensure!(reply.text().contains(words), "{request}: {}", reply.text());
    }
    Ok(())
}

/// A payload that no compression makes much smaller.
fn large(id: u64) -> Value {
    let mut bytes = [0; LARGE_BYTES / 2];
    blake3::Hasher::new().update(&id.to_be_bytes()).finalize_xof().fill(&mut bytes);
    json!({"text": bytes.iter().map(|byte| format!("{byte:02x}")).collect::<String>()})
}

/// Checks again and again that no shard is changed although one is too large, for as long as it is held back.
async fn held_back(cluster: &Cluster) -> Result<()> {
    let began = Instant::now();
    while began.elapsed() < HELD_BACK {
        let report = cluster.any().json(&Request::get("/admin/cluster/report")).await?;
        ensure!(report["resharding"] == json!([]), "placement is paused: {}", report["resharding"]);
        let shards = cluster.shards("c").await?;
        ensure!(shards.len() == 1, "placement is paused, and the shards are {shards:?}");
        tokio::time::sleep(Duration::from_millis(250)).await;
    }
    Ok(())
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_shard_that_is_too_large_is_split_by_itself_unless_placement_is_paused() -> Result<()> {
    let sizes =
        Cluster::of(3).env("SHOAL_SPLIT_BYTES", SPLIT_BYTES).env("SHOAL_SIZES_SECONDS", SIZES_SECONDS);
    let cluster = sizes.start().await?;
    let any = cluster.any();
    let points = Points::of(&any, "c");
    points.create(1, 3).await?;
    cluster.settled().await?;
    order(&cluster, &["pause"]).await?;
    wait_until(RESHARD_DEADLINE, "placement to pause", || async {
        let plan = order(&cluster, &["plan"]).await?;
        ensure!(plan.contains("(paused)"), "{plan}");
        Ok(Some(()))
    })
    .await?;
    let before: Vec<(u64, Value)> = (FIRST..FIRST + LARGE).map(|id| (id, large(id))).collect();
    for some in before.chunks(LARGE_AT_ONCE) {
        let some: Vec<Value> = some.iter().map(|(id, payload)| point(*id, payload.clone())).collect();
        points.upsert(&some).await?;
    }
    held_back(&cluster).await?;

    let writers = Writers::start(&cluster, "c", 2);
    writers.progress(50).await?;
    let resumed = Instant::now();
    order(&cluster, &["resume"]).await?;
    // It goes on until all of them are small enough: two are the least that there can be then.
    let shards = wait_until(RESHARD_DEADLINE, "the shard to be split by itself", || async {
        let report = any.json(&Request::get("/admin/cluster/report")).await?;
        ensure!(report["resharding"] == json!([]), "{}", report["resharding"]);
        let shards = cluster.shards("c").await?;
        Ok((shards.len() >= 2).then_some(shards))
    })
    .await?;
    say(format!(
        "split by itself {:.1} s after placement went on: {shards:?}",
        resumed.elapsed().as_secs_f64()
    ));
    let said = |at: usize| cluster.node(at).log().contains("a shard is too large and is split");
    ensure!((0..cluster.len()).any(said), "nobody says that it was too large");
    writers.progress(200).await?;
    let written = writers.stop().await?;
    written.report("split by itself");
    // Nothing more is split while everything is looked at.
    order(&cluster, &["pause"]).await?;
    wait_until(RESHARD_DEADLINE, "the shards to be left alone", || async {
        let report = any.json(&Request::get("/admin/cluster/report")).await?;
        let is_left = report["resharding"] == json!([]) && report["placement"]["is_paused"] == json!(true);
        ensure!(is_left, "{}, {}", report["resharding"], report["placement"]);
        Ok(Some(()))
    })
    .await?;
    cluster.settled().await?;
    cluster.converged().await?;
    let mut expected = written.points.clone();
    expected.extend(before);
    for at in 0..3 {
        shoal_tests::writers::verify_at(cluster.client(at), "c", &expected).await?;
    }
    let gap = written.gap_of_all;
    ensure!(gap < GAP_LIMIT, "for {gap:?} nothing was acknowledged");
    cluster.finish()
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn documents_go_on_while_their_shard_is_split() -> Result<()> {
    if models().is_none() {
        skip("documents_go_on_while_their_shard_is_split", "there are no models");
        return Ok(());
    }
    let cluster = Cluster::of(3).start().await?;
    let any = cluster.any();
    let store = Store::create(&any, "split").await?;
    cluster.settled().await?;
    let mut files = Vec::new();
    for number in 0..40 {
        let text = format!("The heron of Lisbon guards ledger {number}. ").repeat(30);
        let file = upload(&any, &format!("{number}.txt"), text.as_bytes(), None).await?;
        store.attach(&any, &file, json!({"attributes": {"number": number}})).await?;
        files.push(file);
    }
    // All of them at once would only be one change after the other.
    let count = cluster.shards(&store.id).await?.len();
    let shard = cluster.shards(&store.id).await?[0];
    say(order(&cluster, &["split", &shard.to_string(), "--into", "3"]).await?);
    say(format!("{} of 40 documents are completed after the split", store.count(&any, "completed").await?));
    store.completed(&any, &files, DOCUMENTS_DEADLINE).await?;
    changed(&cluster, &any, &store.id, count + 2).await?;
    cluster.settled().await?;
    let chunks = store.chunks(&any, Freshness::Linearizable).await?;
    ensure!(chunks.len() == files.len(), "{} of {} documents have chunks", chunks.len(), files.len());
    for (file, chunks) in &chunks {
        let numbers: Vec<u64> = chunks.iter().map(|chunk| chunk.index).collect();
        ensure!(numbers == (0..chunks.len() as u64).collect::<Vec<_>>(), "{file} has the chunks {numbers:?}");
    }
    let shard = cluster.shards("_files").await?[0];
    let refused = any.send(&Request::post(format!("/admin/shards/{shard}/split"), &json!({}))).await?;
    ensure!(refused.status == 409 && refused.text().contains("bytes of files"), "{}", refused.text());
    cluster.finish()
}
