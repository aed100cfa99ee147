//! Backups: made while everything goes on, put back into clusters of other sizes, to a directory and to
//! an S3 server. What was acknowledged before the backup began is in it; what is put back is what was
//! there, to the last byte, and nothing of it is seen before all of it is there.

use std::collections::BTreeMap;
use std::net::TcpListener;
use std::path::{Path, PathBuf};
use std::process::{Child, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use serde_json::{Value, json};
use shoal_tests::python::environment;
use shoal_tests::{
    Client, Cluster, Points, Request, Store, Writers, cli, documents, models, point, say, skip, wait_until,
};

/// How long a command of the CLI may take.
const COMMAND_TIMEOUT: Duration = Duration::from_secs(180);
/// How long a document may take to be processed.
const DOCUMENT_DEADLINE: Duration = Duration::from_secs(90);
/// Points that are there before any backup: enough for many pieces.
const POINTS: u64 = 12_000;
/// Points in one request.
const BATCH: usize = 1000;
/// Points beyond what the writers write.
const FIRST: u64 = 1 << 40;
/// Uploaded files.
const FILES: u32 = 12;

/// Runs `shoal backup …` against a node and returns what it printed.
async fn backup(cluster: &Cluster, arguments: &[&str]) -> Result<String> {
    cli::run_at(&cluster.node(0).url(), &[&["backup"], arguments].concat(), COMMAND_TIMEOUT).await
}

/// Makes a backup and returns its id and the bytes that were new in it.
async fn create(cluster: &Cluster, arguments: &[&str]) -> Result<(String, u64)> {
    let said = backup(cluster, &[&["create"], arguments].concat()).await?;
    say(&said);
    let id = said.split_whitespace().nth(1).context("no id")?.to_owned();
    let head = cluster.any().json(&Request::get(format!("/admin/backups/{id}"))).await?;
    let new = head["new_bytes"].as_u64().with_context(|| format!("no size: {head}"))?;
    Ok((id, new))
}

/// What there was, to be compared with what there is.
struct Known {
    points: BTreeMap<u64, Value>,
    files: BTreeMap<String, Vec<u8>>,
    store: Option<Store>,
    chunks: BTreeMap<String, Vec<String>>,
}

fn file_bytes(number: u32) -> Vec<u8> {
    blake3::hash(&number.to_be_bytes()).to_hex().repeat(3000).into_bytes()
}

async fn whole_points(client: &Client, ids: &[u64]) -> Result<BTreeMap<u64, Value>> {
    let mut found = BTreeMap::new();
    for ids in ids.chunks(BATCH) {
        let ids: Vec<Value> = ids.iter().map(|id| json!(id)).collect();
        for point in Points::of(client, "c").get_whole(&ids).await? {
            found.insert(point["id"].as_u64().context("an id")?, point);
        }
    }
    Ok(found)
}

async fn chunks(client: &Client, store: &Store) -> Result<BTreeMap<String, Vec<String>>> {
    let chunks = store.chunks(client, Default::default()).await?;
    let text =
        |chunks: Vec<documents::Chunk>| chunks.into_iter().map(|chunk| chunk.payload.to_string()).collect();
    Ok(chunks.into_iter().map(|(id, chunks)| (id, text(chunks))).collect())
}

/// Fills a cluster with everything that a backup has to keep.
async fn fill(client: &Client) -> Result<Known> {
    let points = Points::of(client, "c");
    points.create(3, 2).await?;
    client
        .succeed(&Request::put(
            "/collections/c/index",
            &json!({"field_name": "n", "field_schema": "integer"}),
        ))
        .await?;
    let alias = json!({"actions": [{"create_alias": {"collection_name": "c", "alias_name": "other"}}]});
    client.succeed(&Request::post("/collections/aliases", &alias)).await?;
    let ids: Vec<u64> = (FIRST..FIRST + POINTS).collect();
    for batch in ids.chunks(BATCH) {
        // A few payloads are stored in parts.
        let payload = |id: &u64| {
            let text = blake3::hash(&id.to_be_bytes()).to_hex().repeat(if id.is_multiple_of(1000) {
                400
            } else {
                12
            });
            point(*id, json!({"n": id - FIRST, "text": text}))
        };
        points.upsert(&batch.iter().map(payload).collect::<Vec<_>>()).await?;
    }
    points.delete(&[FIRST + 7]).await?;
    let mut files = BTreeMap::new();
    for number in 0..FILES {
        let bytes = file_bytes(number);
        files.insert(documents::upload(client, &format!("{number}.bin"), &bytes, None).await?, bytes);
    }
    let mut known =
        Known { points: whole_points(client, &ids).await?, files, store: None, chunks: BTreeMap::new() };
    ensure!(known.points.len() as u64 == POINTS - 1, "{} points", known.points.len());
    if models().is_some() {
        let store = Store::create(client, "notes").await?;
        let mut ids = Vec::new();
        for (name, text) in [
            ("a.txt", "Herring swim in shoals of many thousands."),
            ("b.md", "# Bread\n\nRye needs a long time."),
        ] {
            let id = store.add(client, name, text, json!({"attributes": {"kind": name}})).await?;
            known.files.insert(id.clone(), text.as_bytes().to_vec());
            ids.push(id);
        }
        store.completed(client, &ids, DOCUMENT_DEADLINE).await?;
        known.chunks = chunks(client, &store).await?;
        known.store = Some(store);
    }
    Ok(known)
}

/// Checks that everything is there again.
async fn verify(
    cluster: &Cluster,
    backup_id: &str,
    known: &Known,
    written: &BTreeMap<u64, Value>,
) -> Result<()> {
    for at in 0..cluster.len() {
        let client = cluster.client(at);
        let ids: Vec<u64> = known.points.keys().copied().collect();
        let found = whole_points(client, &ids).await?;
        let differs = known.points.iter().find(|(id, point)| found.get(id) != Some(point));
        ensure!(differs.is_none(), "{differs:?} is now {:?}", differs.and_then(|(id, _)| found.get(id)));
        for (id, bytes) in &known.files {
            let reply = client.succeed(&Request::get(format!("/v1/files/{id}/content"))).await?;
            ensure!(reply.body == *bytes, "file {id} has {} other bytes", reply.body.len());
        }
    }
    let client = &cluster.any();
    let points = Points::of(client, "other");
    ensure!(points.get(&[FIRST + 7]).await?.is_empty(), "a deleted point is back");
    let there = points.get(&written.keys().copied().collect::<Vec<_>>()).await?;
    let lost: Vec<_> =
        written.iter().filter(|(id, payload)| there.get(id) != Some(payload)).take(3).collect();
    ensure!(lost.is_empty(), "acknowledged before the backup and not in it: {lost:?}");
    let hits = points.search(&shoal_tests::vector(FIRST + 11), 1, None).await?;
    ensure!(hits[0]["id"] == json!(FIRST + 11), "{hits:?}");
    let info = client.json(&Request::get("/collections/c")).await?;
    ensure!(info["result"]["payload_schema"]["n"]["data_type"] == "integer", "{info}");
    let filter = json!({"must": [{"key": "n", "range": {"lt": 10}}]});
    ensure!(points.count(Some(filter)).await? == 9, "a filter does not find what it should");
    if let Some(store) = &known.store {
        ensure!(chunks(client, store).await? == known.chunks, "the chunks are not what they were");
        let found = store.search(client, "which fish swim together?", 1).await?;
        let file = client.json(&Request::get(format!("/v1/files/{}", found[0]))).await?;
        ensure!(file["filename"] == "a.txt", "{file}");
        // A document that is uploaded again replaces the restored one, and a restore of the files does not
        // bring the old one back, only what is not there.
        let id = documents::upload(client, "a.txt", b"Nothing about any fish.", Some(&found[0])).await?;
        store.attach(client, &id, json!({})).await?;
        store.completed(client, std::slice::from_ref(&id), DOCUMENT_DEADLINE).await?;
        let chunks = chunks(client, store).await?;
        ensure!(chunks[&id].len() == 1 && chunks[&id][0].contains("Nothing about"), "{chunks:?}");
        let lost = known.files.keys().find(|file| **file != id).context("another file")?;
        client.succeed(&Request::delete(format!("/v1/files/{lost}"))).await?;
        backup(cluster, &["restore", backup_id, "--collection", "_files"]).await?;
        let content = |file: &str| Request::get(format!("/v1/files/{file}/content"));
        ensure!(client.succeed(&content(lost)).await?.body == known.files[lost], "{lost} is not what it was");
        ensure!(client.succeed(&content(&id)).await?.body == b"Nothing about any fish.", "{id} was replaced");
    }
    Ok(())
}

/// Restores while looking: the collection is not there, or it is there whole.
async fn restore_watched(cluster: &Cluster, id: &str, arguments: &[&str], count: u64) -> Result<()> {
    let client = cluster.any();
    let watch = async {
        loop {
            let reply = client.send(&Request::get("/collections")).await?;
            let listed = reply.text().contains("\"c\"");
            if listed {
                let found = Points::of(&client, "c").count(None).await?;
                ensure!(found == count, "a half-restored collection of {found} points of {count} is shown");
            }
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
    };
    let started = Instant::now();
    let arguments = [&["restore", id], arguments].concat();
    tokio::select! {
        watched = watch => watched,
        restored = backup(cluster, &arguments) => {
            say(format!("{} in {:.1} s", restored?, started.elapsed().as_secs_f64()));
            Ok(())
        }
    }
}

async fn points_in(client: &Client, backup: &str) -> Result<u64> {
    let head = client.json(&Request::get(format!("/admin/backups/{backup}"))).await?;
    let collections = head["collections"].as_array().context("no collections")?;
    let found = collections.iter().find(|collection| collection["name"] == "c").context("no c")?;
    found["points"].as_u64().context("no number")
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn from_three_nodes_to_one_and_to_five() -> Result<()> {
    let kept = tempfile::tempdir()?;
    let target = kept.path().to_str().context("text")?;
    let source =
        Cluster::of(3).env("SHOAL_BACKUP_TARGET", target).env("SHOAL_BACKUP_KEEP", "2").start().await?;
    let any = source.any();
    let known = fill(&any).await?;
    let (first, all) = create(&source, &[]).await?;

    let writers = Writers::start(&source, "c", 4);
    writers.progress(200).await?;
    let before = Points::of(&any, "c").scroll().await?;
    let (id, new) = create(&source, &[]).await?;
    writers.progress(50).await?;
    writers.stop().await?.report("during a backup");
    let written: BTreeMap<u64, Value> = before
        .into_iter()
        .filter_map(|point| Some((point["id"].as_u64()?, point["payload"].clone())))
        .filter(|(id, _)| *id < FIRST)
        .collect();
    ensure!(written.len() >= 200, "{} points were written before the backup", written.len());
    ensure!(new * 2 < all, "{new} of {all} bytes are new in a backup of which little has changed");
    backup(&source, &["verify", &id]).await?;

    // A third takes the place of the first; one that is not full takes nobody's.
    let (third, _) = create(&source, &[]).await?;
    let (part, _) = create(&source, &["--collection", "other"]).await?;
    let listed = backup(&source, &["list"]).await?;
    say(&listed);
    ensure!(
        !listed.contains(&first) && listed.contains(&id) && listed.contains(&third) && listed.contains(&part),
        "{listed}"
    );
    backup(&source, &["verify", &id]).await?;
    let refused = backup(&source, &["restore", &id]).await.expect_err("everything is there");
    ensure!(format!("{refused:#}").contains("exists already"), "{refused:#}");
    let count = points_in(&any, &id).await?;
    source.finish()?;

    for (nodes, arguments) in [(1, &[][..]), (5, &["--shards", "5"][..])] {
        let cluster = Cluster::of(nodes).env("SHOAL_BACKUP_TARGET", target).start().await?;
        restore_watched(&cluster, &id, arguments, count).await?;
        if nodes > 1 {
            cluster.settled().await?;
        }
        verify(&cluster, &id, &known, &written).await.with_context(|| format!("on {nodes} nodes"))?;
        if let Some(store) = &known.store {
            // One collection alone, while the others are there.
            cluster.any().succeed(&Request::delete(format!("/v1/vector_stores/{}", store.id))).await?;
            backup(&cluster, &["restore", &id, "--collection", &store.id]).await?;
            ensure!(chunks(&cluster.any(), store).await? == known.chunks, "the store is not what it was");
        }
        cluster.finish()?;
    }
    Ok(())
}

/// The largest object of a target.
fn largest(target: &Path) -> Result<PathBuf> {
    let mut largest = (0, PathBuf::new());
    for folder in std::fs::read_dir(target.join("objects"))? {
        for entry in std::fs::read_dir(folder?.path())? {
            let entry = entry?;
            largest = largest.max((entry.metadata()?.len(), entry.path()));
        }
    }
    Ok(largest.1)
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_damaged_backup_is_found_out_and_nothing_of_it_is_shown() -> Result<()> {
    let kept = tempfile::tempdir()?;
    let target = kept.path().to_str().context("text")?;
    let cluster = Cluster::of(1).env("SHOAL_BACKUP_TARGET", target).start().await?;
    let any = cluster.any();
    let points = Points::of(&any, "c");
    points.create(2, 1).await?;
    points.upsert(&(0..500).map(|id| point(id, json!({"n": id}))).collect::<Vec<_>>()).await?;
    let (id, _) = create(&cluster, &[]).await?;
    any.succeed(&Request::delete("/collections/c")).await?;

    let object = largest(kept.path())?;
    let whole = std::fs::read(&object)?;
    let mut flipped = whole.clone();
    flipped[whole.len() / 2] ^= 1;
    std::fs::write(&object, flipped)?;
    for what in ["verify", "restore"] {
        let failed = backup(&cluster, &[what, &id]).await.expect_err("damaged");
        ensure!(format!("{failed:#}").contains("is damaged"), "{failed:#}");
    }
    std::fs::remove_file(&object)?;
    let failed = backup(&cluster, &["restore", &id]).await.expect_err("missing");
    ensure!(format!("{failed:#}").contains("is missing"), "{failed:#}");
    let exists = any.json(&Request::get("/collections/c/exists")).await?;
    ensure!(exists["result"]["exists"] == json!(false), "{exists}");
    wait_until(Duration::from_secs(20), "what was begun to be gone", || async {
        let view = cluster.node(0).view().await?;
        Ok(view.collection("c").is_none().then_some(()))
    })
    .await?;

    // Put right again, it is as good as before.
    std::fs::write(&object, whole)?;
    backup(&cluster, &["restore", &id]).await?;
    ensure!(points.count(None).await? == 500, "points are missing");
    backup(&cluster, &["delete", &id]).await?;
    ensure!(largest(kept.path())? == PathBuf::new(), "objects are left of a deleted backup");
    let absent = backup(&cluster, &["verify", &id]).await.expect_err("deleted");
    ensure!(format!("{absent:#}").contains("no backup"), "{absent:#}");
    cluster.finish()
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_file_without_bytes_is_named_and_all_the_rest_is_kept() -> Result<()> {
    let kept = tempfile::tempdir()?;
    let target = kept.path().to_str().context("text")?;
    let mut source = Cluster::of(1).env("SHOAL_BACKUP_TARGET", target).start().await?;
    let any = source.any();
    let points = Points::of(&any, "c");
    points.create(2, 1).await?;
    points.upsert(&(0..500).map(|id| point(id, json!({"n": id}))).collect::<Vec<_>>()).await?;
    let mut files = Vec::new();
    for number in 0..3 {
        files.push(documents::upload(&any, &format!("{number}.bin"), &file_bytes(number), None).await?);
    }
    let (whole, _) = create(&source, &[]).await?;
    let age = any.metric("shoal_backup_last_success_timestamp_seconds").await?;
    ensure!(age > 0.0, "nobody knows of the backup that was just made");

    // The bytes of one file are gone, also from the target, where an earlier backup had brought them.
    let lost = &files[1];
    let hash = blake3::hash(&file_bytes(1)).to_hex();
    backup(&source, &["delete", &whole]).await?;
    let blobs = documents::blob_files(&source.node(0).data_dir())?;
    let blob = blobs.iter().find(|path| path.ends_with(hash.as_str())).context("no bytes of the file")?;
    std::fs::remove_file(blob)?;

    let said = backup(&source, &["create"]).await.expect_err("a file is not in it");
    let said = format!("{said:#}");
    ensure!(said.contains("exit status: 3") && said.contains(lost), "{said}");
    let listed = backup(&source, &["list"]).await?;
    ensure!(listed.contains("everything but 1 files"), "{listed}");
    let heads = any.json(&Request::get("/admin/backups")).await?;
    let head = &heads["backups"][0];
    ensure!(head["missing_files"] == 1 && head["missing"][0]["document"] == json!(lost), "{head}");
    let id = head["id"].as_str().context("no id")?.to_owned();
    let verified = backup(&source, &["verify", &id]).await.expect_err("a file is not in it");
    ensure!(format!("{verified:#}").contains("exit status: 3"), "{verified:#}");
    ensure!(any.metric("shoal_backup_missing_files").await? == 1.0, "the metric does not tell");
    // A node that starts again knows it from the target.
    source.node_mut(0).kill()?;
    source.restart(0).await?;
    wait_until(Duration::from_secs(20), "the age of the backup to be known again", || async {
        let client = source.client(0);
        let age = client.metric("shoal_backup_last_success_timestamp_seconds").await?;
        Ok((age > 0.0 && client.metric("shoal_backup_missing_files").await? == 1.0).then_some(()))
    })
    .await?;
    source.finish()?;

    let cluster = Cluster::of(1).env("SHOAL_BACKUP_TARGET", target).start().await?;
    let restored = backup(&cluster, &["restore", &id]).await?;
    ensure!(restored.contains(lost), "{restored}");
    let any = cluster.any();
    ensure!(Points::of(&any, "c").count(None).await? == 500, "points are missing");
    for (number, file) in (0..).zip(&files) {
        let reply = any.send(&Request::get(format!("/v1/files/{file}/content"))).await?;
        if file == lost {
            ensure!(reply.status == 404, "{} {}", reply.status, reply.text());
        } else {
            ensure!(reply.body == file_bytes(number), "file {file} is not what it was");
        }
    }
    cluster.finish()
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_node_that_dies_in_a_restore_leaves_nothing() -> Result<()> {
    let kept = tempfile::tempdir()?;
    let target = kept.path().to_str().context("text")?;
    let mut cluster = Cluster::of(3).env("SHOAL_BACKUP_TARGET", target).start().await?;
    let any = cluster.any();
    let known = fill(&any).await?;
    let (id, _) = create(&cluster, &[]).await?;
    any.succeed(&Request::delete("/collections/c")).await?;
    if let Some(store) = &known.store {
        any.succeed(&Request::delete(format!("/v1/vector_stores/{}", store.id))).await?;
    }

    cluster.client(0).succeed(&Request::post(format!("/admin/backups/{id}/restore"), &json!({}))).await?;
    // Not the one that was deleted: this node may not know of that yet.
    wait_until(Duration::from_secs(20), "the restore to begin", || async {
        let view = cluster.node(1).view().await?;
        Ok(view.collection("c").filter(|collection| collection.is_restoring).map(drop))
    })
    .await?;
    cluster.node_mut(0).kill()?;
    let others = cluster.any_but(&[0]);
    let exists = others.json(&Request::get("/collections/c/exists")).await?;
    ensure!(exists["result"]["exists"] == json!(false), "a half-restored collection is shown: {exists}");
    let refused = others.send(&Points::of(&others, "c").upsert_request(&[point(1, json!({}))])).await?;
    ensure!(refused.status == 404, "{} {}", refused.status, refused.text());
    let deleted = others.json(&Request::delete("/collections/c")).await?;
    ensure!(deleted["result"] == json!(false), "{deleted}");
    let taken = Points::of(&others, "c").create(1, 1).await.expect_err("it is being restored");
    ensure!(format!("{taken:#}").contains("being restored"), "{taken:#}");

    cluster.restart(0).await?;
    wait_until(Duration::from_secs(30), "what the dead node was at to be ended", || async {
        Ok(cluster.node(1).view().await?.collection("c").is_none().then_some(()))
    })
    .await?;
    // The files were never gone, and are not put back twice.
    backup(&cluster, &["restore", &id]).await?;
    verify(&cluster, &id, &known, &BTreeMap::new()).await?;
    cluster.finish()
}

/// An S3 server of this machine.
struct S3 {
    process: Child,
    address: String,
}

impl S3 {
    async fn start(python: &Path) -> Result<S3> {
        let port = TcpListener::bind("127.0.0.1:0")?.local_addr()?.port();
        let server = python.with_file_name("moto_server");
        let mut command = std::process::Command::new(server);
        command.args(["-H", "127.0.0.1", "-p", &port.to_string()]);
        let process = command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::null()).spawn()?;
        let s3 = S3 { process, address: format!("127.0.0.1:{port}") };
        // A bucket is made by a PUT of its name.
        let client = Client::new(vec![s3.address.clone()], None);
        client.succeed(&Request::raw("PUT", "/backups", "text/plain", Vec::new())).await?;
        Ok(s3)
    }
}

impl Drop for S3 {
    fn drop(&mut self) {
        drop(self.process.kill());
        drop(self.process.wait());
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn s3_keeps_backups_as_a_directory_does() -> Result<()> {
    let python = match environment("s3.txt").await {
        Ok(python) => python,
        Err(reason) => {
            skip("s3_keeps_backups_as_a_directory_does", &format!("{reason:#}"));
            return Ok(());
        }
    };
    let s3 = S3::start(&python).await?;
    let started = |nodes| {
        Cluster::of(nodes)
            .env("SHOAL_BACKUP_TARGET", "s3://backups/some/where")
            .env("AWS_ENDPOINT_URL", &format!("http://{}", s3.address))
            .env("AWS_ALLOW_HTTP", "true")
            .env("AWS_ACCESS_KEY_ID", "key")
            .env("AWS_SECRET_ACCESS_KEY", "secret")
            .env("AWS_REGION", "eu-central-1")
            .start()
    };
    let source = started(1).await?;
    let known = fill(&source.any()).await?;
    let (id, _) = create(&source, &[]).await?;
    let (second, new) = create(&source, &[]).await?;
    ensure!(new < 1 << 20, "{new} bytes are new although nothing has changed");
    backup(&source, &["delete", &id]).await?;
    backup(&source, &["verify", &second]).await?;
    let count = points_in(&source.any(), &second).await?;
    source.finish()?;

    let cluster = started(3).await?;
    restore_watched(&cluster, &second, &["--replicas", "3"], count).await?;
    verify(&cluster, &second, &known, &BTreeMap::new()).await?;
    cluster.finish()
}
