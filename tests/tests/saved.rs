//! What earlier builds have stored is opened by this one: a node's whole data directory, and the target of a
//! backup. Each `tests/testdata/saved-*.tar.gz` was packed by one of them; `make fixture NAME=2026-11-22`
//! packs one with the present build, to be committed when a format has changed.
//!
//! ```text
//! known.json   what there was: points with their payloads, files with their text, the backup's id
//! data/        the data directory of a node that was stopped, started, and killed
//! target/      where its backup is
//! ```

use std::collections::BTreeMap;
use std::ffi::OsStr;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use serde_json::{Map, Value, json};
use shoal_tests::writers::verify;
use shoal_tests::{Client, Cluster, Points, Request, cli, documents, point, say, skip};

/// How long a command of the CLI may take.
const COMMAND_TIMEOUT: Duration = Duration::from_secs(60);
/// How long a node may take to stop.
const STOP_DEADLINE: Duration = Duration::from_secs(30);
/// The collection, and another name of it.
const COLLECTION: &str = "kept";
const ALIAS: &str = "other";
/// Points that are written before the node is stopped, and after that.
const POINTS: u64 = 400;
/// Every so many points there is one with a payload that is stored in parts.
const LARGE_EVERY: u64 = 100;
/// Uploaded files.
const FILES: u64 = 3;

fn testdata() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("testdata")
}

/// The fixtures by name, oldest first.
fn fixtures() -> Result<Vec<PathBuf>> {
    let Ok(entries) = std::fs::read_dir(testdata()) else { return Ok(Vec::new()) };
    let mut found = Vec::new();
    for entry in entries {
        let path = entry?.path();
        let name = path.file_name().unwrap_or_default().to_string_lossy().into_owned();
        if name.starts_with("saved-") && name.ends_with(".tar.gz") {
            found.push(path);
        }
    }
    found.sort();
    Ok(found)
}

fn tar(arguments: &[&OsStr]) -> Result<()> {
    let done = Command::new("tar").args(arguments).output().context("tar is needed")?;
    ensure!(done.status.success(), "tar {arguments:?}: {}", String::from_utf8_lossy(&done.stderr));
    Ok(())
}

fn payload(id: u64) -> Value {
    let text = blake3::hash(&id.to_be_bytes()).to_hex();
    json!({"n": id, "text": text.repeat(if id.is_multiple_of(LARGE_EVERY) { 400 } else { 2 })})
}

async fn write(client: &Client, known: &mut BTreeMap<u64, Value>, ids: std::ops::Range<u64>) -> Result<()> {
    let points: Vec<Value> = ids.clone().map(|id| point(id, payload(id))).collect();
    Points::of(client, COLLECTION).upsert(&points).await?;
    known.extend(ids.map(|id| (id, payload(id))));
    Ok(())
}

/// Checks that everything that is known is there, under both names, and nothing else.
async fn check(client: &Client, known: &Value) -> Result<()> {
    let points = known["points"].as_object().context("no points are known")?;
    let number =
        |(id, payload): (&String, &Value)| -> Result<(u64, Value)> { Ok((id.parse()?, payload.clone())) };
    let expected: BTreeMap<u64, Value> = points.iter().map(number).collect::<Result<_>>()?;
    for name in [COLLECTION, ALIAS] {
        verify(&expected, &Points::of(client, name)).await?;
    }
    let id = *expected.keys().next().context("some are known")?;
    let found = Points::of(client, COLLECTION).search(&shoal_tests::vector(id), 1, None).await?;
    ensure!(found.first().is_some_and(|hit| hit["id"] == json!(id)), "point {id} is not found: {found:?}");
    for (id, text) in known["files"].as_object().context("no files are known")? {
        let reply = client.succeed(&Request::get(format!("/v1/files/{id}/content"))).await?;
        ensure!(Some(reply.text().as_str()) == text.as_str(), "file {id} has other bytes");
    }
    Ok(())
}

/// Starts a node on a data directory of an earlier build.
async fn open(data: &Path, known: &Value) -> Result<()> {
    let mut cluster = Cluster::of(1).start().await?;
    cluster.node_mut(0).kill()?;
    let own = cluster.node(0).data_dir();
    std::fs::remove_dir_all(&own)?;
    std::fs::rename(data, &own)?;
    cluster.restart(0).await?;
    check(cluster.client(0), known).await?;
    // It can be written to, and is read again.
    Points::of(cluster.client(0), COLLECTION).upsert(&[point(POINTS * 10, json!({}))]).await?;
    Points::of(cluster.client(0), COLLECTION).delete(&[POINTS * 10]).await?;
    cluster.node_mut(0).kill()?;
    cluster.restart(0).await?;
    check(cluster.client(0), known).await?;
    cluster.finish()
}

/// Puts a backup of an earlier build back into a new cluster.
async fn restore(target: &Path, known: &Value) -> Result<()> {
    let cluster = Cluster::of(1).env("SHOAL_BACKUP_TARGET", &target.display().to_string()).start().await?;
    let (url, id) = (cluster.node(0).url(), known["backup"].as_str().context("no backup is known")?);
    for order in ["verify", "restore"] {
        say(cli::run_at(&url, &["backup", order, id], COMMAND_TIMEOUT).await?);
    }
    check(cluster.client(0), known).await?;
    cluster.finish()
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_earlier_builds_have_stored_is_opened() -> Result<()> {
    let fixtures = fixtures()?;
    if fixtures.is_empty() {
        let reason = format!("nothing is in {}: `make fixture NAME=…` packs something", testdata().display());
        skip("what_earlier_builds_have_stored_is_opened", &reason);
    }
    for fixture in fixtures {
        let dir = tempfile::tempdir()?;
        tar(&[OsStr::new("-xzf"), fixture.as_os_str(), OsStr::new("-C"), dir.path().as_os_str()])?;
        let known: Value = serde_json::from_slice(&std::fs::read(dir.path().join("known.json"))?)?;
        let name = || fixture.display().to_string();
        open(&dir.path().join("data"), &known).await.with_context(name)?;
        restore(&dir.path().join("target"), &known).await.with_context(name)?;
    }
    Ok(())
}

/// Not a test: it packs what the present build stores.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
#[ignore = "packs a fixture: make fixture NAME=2026-11-22"]
async fn pack_what_this_build_stores() -> Result<()> {
    let name = std::env::var("SHOAL_FIXTURE").ok().filter(|name| !name.is_empty());
    let name = name.context("SHOAL_FIXTURE names it: make fixture NAME=2026-11-22")?;
    let dir = tempfile::tempdir()?;
    let target = dir.path().join("target");
    std::fs::create_dir(&target)?;
    let settings = Cluster::of(1).env("SHOAL_BACKUP_TARGET", &target.display().to_string());
    let mut cluster = settings.start().await?;
    let client = cluster.client(0).clone();
    Points::of(&client, COLLECTION).create(2, 1).await?;
    let index = json!({"field_name": "n", "field_schema": "integer"});
    client.succeed(&Request::put(format!("/collections/{COLLECTION}/index"), &index)).await?;
    let alias = json!({"create_alias": {"collection_name": COLLECTION, "alias_name": ALIAS}});
    client.succeed(&Request::post("/collections/aliases", &json!({"actions": [alias]}))).await?;
    let (mut points, mut files) = (BTreeMap::new(), Map::new());
    write(&client, &mut points, 1..POINTS).await?;
    for number in 0..FILES {
        let text = payload(number).to_string();
        let id = documents::upload(&client, &format!("{number}.txt"), text.as_bytes(), None).await?;
        files.insert(id, json!(text));
    }
    let code = cluster.node_mut(0).terminate(STOP_DEADLINE).await?;
    ensure!(code == Some(0), "a clean stop has exit code {code:?}");
    cluster.restart(0).await?;
    write(&client, &mut points, POINTS..2 * POINTS).await?;
    Points::of(&client, COLLECTION).delete(&[7]).await?;
    points.remove(&7);
    let said = cli::run_at(&cluster.node(0).url(), &["backup", "create"], COMMAND_TIMEOUT).await?;
    let backup = said.split_whitespace().nth(1).with_context(|| format!("no id: {said}"))?;
    cluster.node_mut(0).kill()?;

    let points: Map<String, Value> =
        points.into_iter().map(|(id, payload)| (id.to_string(), payload)).collect();
    let known = json!({"backup": backup, "points": points, "files": files});
    std::fs::write(dir.path().join("known.json"), known.to_string())?;
    std::fs::rename(cluster.node(0).data_dir(), dir.path().join("data"))?;
    std::fs::create_dir_all(testdata())?;
    let file = testdata().join(format!("saved-{name}.tar.gz"));
    let parts = ["known.json", "data", "target"].map(OsStr::new);
    let head = [OsStr::new("-czSf"), file.as_os_str(), OsStr::new("-C"), dir.path().as_os_str()];
    tar(&[&head[..], &parts].concat())?;
    say(format!("{}: {} bytes", file.display(), std::fs::metadata(&file)?.len()));
    cluster.finish()
}
