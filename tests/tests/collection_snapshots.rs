//! Snapshots of one collection over Qdrant's API: made on one node, downloaded from another, put back on a
//! third, whole or not at all; the official client goes through them in `clients.rs`.

use std::collections::BTreeMap;
use std::path::Path;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use serde_json::{Value, json};
use shoal_tests::{Client, Cluster, KEY, Points, Reply, Request, point, say, wait_until};

/// How long one request may take: each waits until everything is done.
const REQUEST_TIMEOUT: Duration = Duration::from_secs(120);
/// Points in the collection: enough for several pieces.
const POINTS: u64 = 3000;
/// Points in one request.
const BATCH: usize = 1000;

/// A client of one node that waits long.
fn patient(cluster: &Cluster, at: usize) -> Client {
    cluster.client(at).clone().with_limits(REQUEST_TIMEOUT, REQUEST_TIMEOUT)
}

async fn fill(client: &Client, count: u64) -> Result<()> {
    let all: Vec<Value> = (0..count)
        .map(|id| point(id, json!({"n": id, "text": blake3::hash(&id.to_be_bytes()).to_hex().repeat(8)})))
        .collect();
    for batch in all.chunks(BATCH) {
        Points::of(client, "c").upsert(batch).await?;
    }
    Ok(())
}

/// All points of a collection with vectors and payloads, as a node gives them.
async fn whole(client: &Client, collection: &str) -> Result<BTreeMap<u64, Value>> {
    let points = Points::of(client, collection);
    let ids: Vec<Value> = points.scroll().await?.into_iter().map(|mut point| point["id"].take()).collect();
    let mut found = BTreeMap::new();
    for ids in ids.chunks(BATCH) {
        for point in points.get_whole(ids).await? {
            found.insert(point["id"].as_u64().context("an id")?, point);
        }
    }
    Ok(found)
}

/// Every node has exactly these points at once.
async fn check_everywhere(cluster: &Cluster, collection: &str, known: &BTreeMap<u64, Value>) -> Result<()> {
    for at in 0..cluster.len() {
        let found = whole(cluster.client(at), collection).await?;
        ensure!(found.len() == known.len(), "node {at} has {} points of {collection}", found.len());
        let differs = known.iter().find(|(id, point)| found.get(id) != Some(point));
        ensure!(differs.is_none(), "node {at} has other points of {collection}: {differs:?}");
    }
    Ok(())
}

async fn create(client: &Client, collection: &str) -> Result<Value> {
    let path = format!("/collections/{collection}/snapshots");
    Ok(client.json(&Request::post(path, &json!({}))).await?["result"].take())
}

async fn list(client: &Client, collection: &str) -> Result<Vec<Value>> {
    let answer = client.json(&Request::get(format!("/collections/{collection}/snapshots"))).await?;
    Ok(answer["result"].as_array().context("no list")?.clone())
}

async fn download(client: &Client, collection: &str, name: &str) -> Result<Reply> {
    client.succeed(&Request::get(format!("/collections/{collection}/snapshots/{name}"))).await
}

fn upload(method: &'static str, collection: &str, query: &str, field: &str, archive: &[u8]) -> Request {
    let head = format!(
        "--edge\r\ncontent-disposition: form-data; name=\"{field}\"; filename=\"c.snapshot\"\r\n\
         content-type: application/octet-stream\r\n\r\n"
    );
    let body = [head.as_bytes(), archive, b"\r\n--edge--\r\n"].concat();
    let path = format!("/collections/{collection}/snapshots/upload?{query}");
    Request::raw(method, path, "multipart/form-data; boundary=edge", body)
}

fn recover(collection: &str, body: &Value) -> Request {
    Request::put(format!("/collections/{collection}/snapshots/recover"), body)
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn every_node_has_the_same_and_puts_it_back() -> Result<()> {
    let kept = tempfile::tempdir()?;
    let target = kept.path().to_str().context("text")?;
    let cluster = Cluster::of(3).env("SHOAL_BACKUP_TARGET", target).start().await?;
    let (first, second, third) = (patient(&cluster, 0), patient(&cluster, 1), patient(&cluster, 2));
    Points::of(&first, "c").create(3, 2).await?;
    fill(&first, POINTS).await?;
    let alias = json!({"actions": [{"create_alias": {"collection_name": "c", "alias_name": "other"}}]});
    first.succeed(&Request::post("/collections/aliases", &alias)).await?;
    let known = whole(&first, "c").await?;
    ensure!(known.len() as u64 == POINTS, "{} points", known.len());

    let made = create(&first, "other").await?;
    say(format!("snapshot: {made}"));
    let name = made["name"].as_str().context("no name")?.to_owned();
    let checksum = made["checksum"].as_str().context("no checksum")?.to_owned();
    ensure!(name.starts_with("c-") && name.ends_with(".snapshot"), "{made}");
    ensure!(made["creation_time"].as_str().is_some_and(|time| time.len() == 19), "{made}");
    for client in [&first, &second, &third] {
        ensure!(list(client, "c").await? == [made.clone()], "the nodes list different snapshots");
    }
    let archive = download(&second, "c", &name).await?;
    let disposition = archive.header("content-disposition").unwrap_or_default();
    ensure!(disposition.contains(&name), "{disposition}");
    let archive = archive.body;
    ensure!(made["size"] == json!(archive.len()), "{} bytes of {made}", archive.len());
    ensure!(download(&third, "c", &name).await?.body == archive, "two nodes give different bytes");
    let file = kept.path().join("downloaded.snapshot");
    std::fs::write(&file, &archive)?;
    check_tar(&file, &name)?;

    // Lost: a snapshot outlives its collection.
    first.succeed(&Request::delete("/collections/c")).await?;
    ensure!(list(&second, "c").await? == [made.clone()], "the snapshot went with its collection");
    let query = format!("wait=true&priority=snapshot&checksum={}", checksum.to_uppercase());
    let answer = third.json(&upload("POST", "c", &query, "snapshot", &archive)).await?;
    ensure!(answer["result"] == json!(true) && answer["status"] == "ok", "{answer}");
    check_everywhere(&cluster, "c", &known).await?;

    // Spoilt: what it has now goes, its alias stays, and nobody sees both or neither.
    first.succeed(&Request::post("/collections/aliases", &alias)).await?;
    Points::of(&first, "c").upsert(&[point(1, json!({"n": "spoilt"})), point(POINTS + 1, json!({}))]).await?;
    Points::of(&first, "c").delete(&[2, 3]).await?;
    let spoilt = Points::of(&first, "c").count(None).await?;
    watched(&third, &[spoilt, POINTS], second.succeed(&recover("other", &json!({"location": name})))).await?;
    check_everywhere(&cluster, "other", &known).await?;

    // Under other names: from a file in the target's directory, from a node, by PUT.
    let from_file = json!({"location": format!("file://{}", file.display()), "checksum": checksum});
    second.succeed(&recover("from_file", &from_file)).await?;
    let server = cluster.node(2).http_address();
    let url = format!("http://{server}/collections/c/snapshots/{name}");
    first
        .succeed(&recover("from_node", &json!({"location": url, "api_key": KEY, "priority": "replica"})))
        .await?;
    third.succeed(&upload("PUT", "by_put", "", "snapshot", &archive)).await?;
    for collection in ["from_file", "from_node", "by_put"] {
        check_everywhere(&cluster, collection, &known).await?;
        third.succeed(&Request::delete(format!("/collections/{collection}"))).await?;
    }

    // Nobody has to wait; and what one snapshot has in common with another stays when it is deleted.
    let begun = second.send(&Request::post("/collections/c/snapshots?wait=false", &json!({}))).await?;
    ensure!(begun.status == 202 && begun.json()?["status"] == "accepted", "{}", begun.text());
    let later = wait_until(REQUEST_TIMEOUT, "the second snapshot", || async {
        let listed = list(&first, "c").await?;
        Ok(listed.into_iter().nth(1).and_then(|snapshot| Some(snapshot["name"].as_str()?.to_owned())))
    })
    .await?;
    let one = format!("/collections/c/snapshots/{name}");
    // The lock of the target is given back a moment after the snapshot is listed.
    wait_until(REQUEST_TIMEOUT, "the first snapshot to be deleted", || async {
        let reply = third.send(&Request::delete(one.as_str())).await?;
        Ok((reply.json()?["result"] == json!(true)).then_some(()))
    })
    .await?;
    ensure!(first.send(&Request::get(one.as_str())).await?.status == 404, "a deleted snapshot is there");
    ensure!(second.send(&Request::delete(one.as_str())).await?.status == 404, "it is deleted twice");
    ensure!(list(&first, "c").await?.len() == 1, "the other one is gone as well");
    third.succeed(&recover("c", &json!({"location": later}))).await?;
    check_everywhere(&cluster, "c", &known).await?;
    cluster.finish()
}

/// Counts while something goes on: the collection has one of these numbers of points all the time.
async fn watched(
    client: &Client,
    allowed: &[u64],
    going_on: impl Future<Output = Result<Reply>>,
) -> Result<Reply> {
    let watch = async {
        loop {
            let found = Points::of(client, "c").count(None).await?;
            ensure!(allowed.contains(&found), "{found} points are seen, and not one of {allowed:?}");
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
    };
    tokio::select! {
        watched = watch => watched,
        done = going_on => done,
    }
}

/// Other programs can read it.
fn check_tar(file: &Path, name: &str) -> Result<()> {
    let output = match std::process::Command::new("tar").arg("-tf").arg(file).output() {
        Ok(output) => output,
        Err(error) => {
            say(format!("the archive was not looked at with tar: {error}"));
            return Ok(());
        }
    };
    let (listed, said) = (String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr));
    ensure!(output.status.success() && said.is_empty(), "tar: {said}");
    let id = name.trim_start_matches("c-").trim_end_matches(".snapshot");
    ensure!(listed.lines().next() == Some(&format!("backups/{id}.json")), "{listed}");
    ensure!(listed.lines().skip(1).all(|line| line.starts_with("objects/")), "{listed}");
    Ok(())
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_is_wrong_is_refused_and_leaves_nothing() -> Result<()> {
    let kept = tempfile::tempdir()?;
    let target = kept.path().to_str().context("text")?;
    let mut cluster = Cluster::of(1).env("SHOAL_BACKUP_TARGET", target).start().await?;
    let client = patient(&cluster, 0);
    Points::of(&client, "c").create(2, 1).await?;
    fill(&client, POINTS).await?;
    let name = create(&client, "c").await?["name"].as_str().context("no name")?.to_owned();
    let archive = download(&client, "c", &name).await?.body;
    Points::of(&client, "c").delete(&[5]).await?;

    let mut changed = archive.clone();
    changed[archive.len() / 3] ^= 1;
    let wrong = "0".repeat(64);
    // What is refused before it is read is small: whoever sends more may not see the answer.
    let small = b"no archive";
    let uploads = [
        (upload("POST", "c", "", "snapshot", &changed), "snapshot"),
        (upload("PUT", "new", "", "snapshot", &changed), "snapshot"),
        (upload("POST", "c", "", "snapshot", &archive[..archive.len() / 2]), "snapshot"),
        (upload("POST", "c", "", "snapshot", small), "snapshot"),
        (upload("POST", "c", "", "snapshot", b""), "snapshot"),
        (upload("POST", "c", "", "file", small), "file"),
        (upload("POST", "c", &format!("checksum={wrong}"), "snapshot", &archive), "checksum"),
        (upload("POST", "c", "checksum=12", "snapshot", small), "checksum"),
        (upload("POST", "c", "priority=replica", "snapshot", small), "priority"),
        (upload("POST", "c", "priority=mine", "snapshot", small), "priority"),
        (upload("POST", "c", "wait=perhaps", "snapshot", small), "wait"),
        (upload("POST", "_files", "", "snapshot", small), "collection_name"),
        (upload("POST", "a%20b", "", "snapshot", small), "collection_name"),
    ];
    let file = kept.path().join("changed.snapshot");
    std::fs::write(&file, &changed)?;
    let locations = [
        "",
        "ftp://127.0.0.1/x",
        "file:///etc/passwd",
        "file://elsewhere/x",
        "http://127.0.0.1:1/x",
        "http://a:b@127.0.0.1/x",
    ];
    let mut recoveries: Vec<(Request, &str)> = locations
        .into_iter()
        .map(|location| (recover("c", &json!({"location": location})), "location"))
        .collect();
    let damaged = json!({"location": format!("file://{}", file.display())});
    recoveries.push((recover("c", &damaged), "snapshot"));
    recoveries.push((recover("c", &json!({"location": name, "checksum": wrong})), "checksum"));
    recoveries.push((recover("c", &json!({"location": name, "priority": "replica"})), "priority"));
    recoveries.push((recover("c", &json!({"location": 7})), "location"));
    recoveries.push((recover("c", &json!({"location": name, "more": 1})), "more"));
    for (request, field) in uploads.into_iter().chain(recoveries) {
        let reply = client.send(&request).await.with_context(|| request.to_string())?;
        let said = reply.json()?["status"]["error"].as_str().unwrap_or_default().to_owned();
        ensure!(reply.status == 400 && said.contains(field), "{request}: {} {}", reply.status, reply.text());
    }
    for (request, status) in [
        (recover("c", &json!({"location": "c-20260101T000000Z-00000000.snapshot"})), 404),
        (recover("c", &json!({"location": "../backups/x"})), 404),
        (Request::get("/collections/c/snapshots/no.snapshot"), 404),
        (Request::get(format!("/collections/d/snapshots/{name}")), 404),
        (Request::delete("/collections/c/snapshots/no.snapshot"), 404),
        (Request::get("/collections/d/snapshots"), 404),
        (Request::post("/collections/d/snapshots", &json!({})), 404),
    ] {
        let reply = client.send(&request).await?;
        ensure!(reply.status == status, "{request}: {} {}", reply.status, reply.text());
    }

    // The target's own object rots: that is found out before anything is touched.
    let object = largest(&kept.path().join("objects"))?;
    let whole = std::fs::read(&object)?;
    let mut rotten = whole.clone();
    rotten[whole.len() / 2] ^= 1;
    std::fs::write(&object, rotten)?;
    let reply = client.send(&recover("c", &json!({"location": name}))).await?;
    ensure!(reply.status == 400 && reply.text().contains("is damaged"), "{} {}", reply.status, reply.text());
    std::fs::write(&object, whole)?;

    ensure!(
        Points::of(&client, "c").count(None).await? == POINTS - 1,
        "what was refused has changed something"
    );
    let view = cluster.node(0).view().await?;
    ensure!(view.collections.len() == 1, "something is left: {:?}", view.collections);
    let received = cluster.node(0).data_dir().join("received");
    wait_until(Duration::from_secs(10), "files of refused uploads to be gone", || async {
        Ok(std::fs::read_dir(&received)?.next().is_none().then_some(()))
    })
    .await?;

    // What a crash has left goes at the next start.
    cluster.node_mut(0).kill()?;
    std::fs::create_dir_all(received.join("left"))?;
    cluster.restart(0).await?;
    ensure!(!received.exists(), "what a crash has left is still there");
    client.succeed(&recover("c", &json!({"location": name}))).await?;
    ensure!(Points::of(&client, "c").count(None).await? == POINTS, "the snapshot is not what was there");
    cluster.finish()?;

    without_target(&archive).await
}

/// Without a target there is no place for snapshots, but one that is brought can be recovered.
async fn without_target(archive: &[u8]) -> Result<()> {
    let cluster = Cluster::of(1).start().await?;
    let client = patient(&cluster, 0);
    client.succeed(&upload("POST", "c", "priority=snapshot", "snapshot", archive)).await?;
    ensure!(Points::of(&client, "c").count(None).await? == POINTS, "points are missing");
    for request in [
        Request::post("/collections/c/snapshots", &json!({})),
        Request::get("/collections/c/snapshots"),
        recover("c", &json!({"location": "c-20260101T000000Z-00000000.snapshot"})),
    ] {
        let reply = client.send(&request).await?;
        let is_clear = reply.status == 400 && reply.text().contains("backup.target");
        ensure!(is_clear, "{request}: {} {}", reply.status, reply.text());
    }
    cluster.finish()
}

/// The largest file in folders of a folder.
fn largest(objects: &Path) -> Result<std::path::PathBuf> {
    let mut largest = (0, std::path::PathBuf::new());
    for folder in std::fs::read_dir(objects)? {
        for entry in std::fs::read_dir(folder?.path())? {
            let entry = entry?;
            largest = largest.max((entry.metadata()?.len(), entry.path()));
        }
    }
    Ok(largest.1)
}
