//! The commands that people type, against a real node: a folder is ingested, searched, edited and ingested
//! again; the cluster is looked at; what goes wrong is said in words.

use std::path::Path;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use serde_json::{Value, json};
use shoal_tests::{Client, Cluster, Freshness, Points, Request, Store, cli, models, skip};

/// How long a command may take.
const DEADLINE: Duration = Duration::from_secs(120);

const HERON: &str = "The heron of Lisbon guards the ledger in the old harbour office.";
const BADGER: &str = "The badger of Oslo keeps the keys of the observatory.";
const WALRUS: &str = "The walrus of Nairobi repairs clocks on Sundays.";

/// Ingests a folder into the store `notes` and returns what the command printed.
async fn ingest(cluster: &Cluster, folder: &Path) -> Result<String> {
    let folder = folder.to_str().context("a path of the tests is text")?;
    cli::run_at(&cluster.node(0).url(), &["ingest", folder, "--store", "notes"], DEADLINE).await
}

async fn search(cluster: &Cluster, question: &str) -> Result<String> {
    cli::run_at(&cluster.node(0).url(), &["search", question, "--store", "notes"], DEADLINE).await
}

/// The only store.
async fn only_store(client: &Client) -> Result<Store> {
    let stores = client.json(&Request::get("/v1/vector_stores")).await?;
    match stores["data"].as_array().map(Vec::as_slice) {
        Some([store]) => Ok(Store { id: store["id"].as_str().context("an id")?.to_owned() }),
        _ => anyhow::bail!("not one store: {stores}"),
    }
}

/// All texts that can be found, with the ids of their documents.
async fn texts(client: &Client, store: &Store) -> Result<Vec<(String, String)>> {
    let documents = store.chunks(client, Freshness::Linearizable).await?;
    let texts = documents.into_iter().flat_map(|(id, chunks)| {
        chunks.into_iter().map(move |chunk| (id.clone(), chunk.text)).collect::<Vec<_>>()
    });
    Ok(texts.collect())
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_edited_file_takes_the_place_of_its_old_version() -> Result<()> {
    if models().is_none() {
        skip("an_edited_file_takes_the_place_of_its_old_version", "there are no models");
        return Ok(());
    }
    let cluster = Cluster::of(1).start().await?;
    let client = cluster.client(0);
    let folders = tempfile::tempdir()?;
    let (notes, others) = (folders.path().join("notes"), folders.path().join("others"));
    std::fs::create_dir_all(notes.join("deep"))?;
    std::fs::create_dir(&others)?;
    std::fs::write(notes.join("a.md"), HERON)?;
    std::fs::write(notes.join("deep/b.txt"), BADGER)?;
    std::fs::write(notes.join("c.bin"), "no document by its name")?;

    let said = ingest(&cluster, &notes).await?;
    ensure!(said.contains("2 files into store notes"), "{said}");
    ensure!(said.contains("2 documents searchable, 0 failed"), "{said}");
    let found = search(&cluster, "who guards the ledger?").await?;
    let first = found.lines().find(|line| line.starts_with("1. ")).context("no first hit")?;
    ensure!(first.starts_with("1. a.md") && found.contains("heron of Lisbon"), "{found}");

    // Again, and the other way in: nothing is done.
    let store = only_store(client).await?;
    let before = (texts(client, &store).await?, client.json(&Request::get("/v1/files")).await?);
    for path in [&notes, &notes.join("deep/../../notes")] {
        let said = ingest(&cluster, path).await?;
        ensure!(said.contains("2 files were there already"), "{said}");
        ensure!(said.contains("2 documents searchable, 0 failed"), "{said}");
    }
    let after = (texts(client, &store).await?, client.json(&Request::get("/v1/files")).await?);
    ensure!(before == after, "{before:?} has become {after:?}");

    // What a person has said of a file stays, and only the edited one is uploaded.
    let heron = before.0.iter().find(|(_, text)| text.contains(HERON)).context("the heron")?.0.clone();
    let path = format!("/v1/vector_stores/{}/files/{heron}", store.id);
    let attributes = json!({"attributes": {"path": "a.md", "read": true}});
    client.succeed(&Request::post(path.clone(), &attributes)).await?;
    std::fs::write(notes.join("a.md"), WALRUS)?;
    let said = ingest(&cluster, &notes).await?;
    ensure!(said.contains("1 files were there already"), "{said}");
    ensure!(said.contains("2 documents searchable, 0 failed"), "{said}");
    let now = texts(client, &store).await?;
    let of_file: Vec<&String> = now.iter().filter(|(id, _)| *id == heron).map(|(_, text)| text).collect();
    ensure!(matches!(of_file.as_slice(), [text] if text.contains(WALRUS)) && now.len() == 2, "{now:?}");
    let found = search(&cluster, "who guards the ledger?").await?;
    ensure!(!found.contains("heron of Lisbon"), "the old version is still found: {found}");
    let kept = client.json(&Request::get(path)).await?;
    ensure!(kept["attributes"] == attributes["attributes"], "{kept}");

    // A file of another folder that is called the same is another one.
    std::fs::write(others.join("a.md"), HERON)?;
    let said = ingest(&cluster, &others).await?;
    ensure!(said.contains("3 documents searchable, 0 failed"), "{said}");
    cluster.finish()
}

/// A run that ends between the upload of a new version and its attachment leaves a stored file that is newer
/// than what is searched.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_run_that_ended_in_between_is_taken_up_again() -> Result<()> {
    if models().is_none() {
        skip("a_run_that_ended_in_between_is_taken_up_again", "there are no models");
        return Ok(());
    }
    let cluster = Cluster::of(1).start().await?;
    let client = cluster.client(0);
    let folder = tempfile::tempdir()?;
    std::fs::write(folder.path().join("a.md"), HERON)?;
    ingest(&cluster, folder.path()).await?;
    let store = only_store(client).await?;
    let id = texts(client, &store).await?.first().context("a text")?.0.clone();

    shoal_tests::documents::upload(client, "a.md", WALRUS.as_bytes(), Some(&id)).await?;
    std::fs::write(folder.path().join("a.md"), WALRUS)?;
    ingest(&cluster, folder.path()).await?;
    let now = texts(client, &store).await?;
    ensure!(now.len() == 1 && now[0].0 == id && now[0].1.contains(WALRUS), "{now:?}");
    cluster.finish()
}

/// Earlier builds made the id of a document of its path in the folder and its bytes.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_document_of_an_earlier_build_is_not_there_twice() -> Result<()> {
    if models().is_none() {
        skip("a_document_of_an_earlier_build_is_not_there_twice", "there are no models");
        return Ok(());
    }
    let cluster = Cluster::of(1).start().await?;
    let client = cluster.client(0);
    let folder = tempfile::tempdir()?;
    std::fs::write(folder.path().join("a.md"), HERON)?;
    let store = Store::create(client, "notes").await?;
    let hash = blake3::hash(format!("a.md\0{HERON}").as_bytes()).to_hex();
    let former = format!("file-{}", &hash[..32]);
    shoal_tests::documents::upload(client, "a.md", HERON.as_bytes(), Some(&former)).await?;
    let attributes = json!({"path": "a.md", "read": true});
    store.attach(client, &former, json!({"attributes": attributes})).await?;

    let said = ingest(&cluster, folder.path()).await?;
    ensure!(said.contains("1 documents searchable, 0 failed"), "{said}");
    let now = texts(client, &store).await?;
    ensure!(now.len() == 1 && now[0].0 != former && now[0].1.contains(HERON), "{now:?}");
    let kept = store.file(client, &now[0].0).await?;
    ensure!(kept["attributes"] == attributes, "what was said of it is lost: {kept}");

    // By the name of its folder it is another one, wherever the folder lies.
    let moved = tempfile::tempdir()?;
    std::fs::copy(folder.path().join("a.md"), moved.path().join("a.md"))?;
    for (folder, known) in [(&folder, false), (&moved, true)] {
        let folder = folder.path().to_str().context("a path of the tests is text")?;
        let command = ["ingest", folder, "--store", "notes", "--name", "laptop"];
        let said = cli::run_at(&cluster.node(0).url(), &command, DEADLINE).await?;
        ensure!(said.contains("were there already") == known, "{said}");
        ensure!(said.contains("2 documents searchable, 0 failed"), "{said}");
    }
    cluster.finish()
}

#[tokio::test]
async fn a_model_is_checked() -> Result<()> {
    let empty = tempfile::tempdir()?;
    let nothing = empty.path().to_str().context("text")?;
    let missing = cli::run(&["model", "check", "--models", nothing], DEADLINE).await.expect_err("no model");
    ensure!(format!("{missing:#}").contains("run `make model`"), "{missing:#}");
    let Some(models) = models() else {
        skip("a_model_is_checked", "there are no models");
        return Ok(());
    };
    let models = models.to_str().context("text")?;
    let said = cli::run(&["model", "check", "--models", models], DEADLINE).await?;
    ensure!(said.starts_with("multilingual-e5-small in ") && said.contains(" 384 dimensions"), "{said}");
    Ok(())
}

#[tokio::test]
async fn what_the_cluster_is_and_what_goes_wrong_is_said() -> Result<()> {
    let cluster = Cluster::of(1).start().await?;
    let url = cluster.node(0).url();
    Points::of(cluster.client(0), "fish").create(2, 1).await?;

    let said = cli::run_at(&url, &["status"], DEADLINE).await?;
    let is_there = |words: &[&str]| said.lines().any(|line| words.iter().all(|word| line.contains(word)));
    ensure!(is_there(&["n1", &cluster.node(0).http_address()]), "no node: {said}");
    let shards = said.lines().filter(|line| line.contains("fish")).count();
    ensure!(shards == 2, "{shards} shards: {said}");
    ensure!(is_there(&["leader"]), "no group is led: {said}");
    cli::run_at(&url, &["health", "--ready"], DEADLINE).await?;

    let refused = cli::run(&["status", "--url", &url], DEADLINE).await.expect_err("no key");
    ensure!(format!("{refused:#}").contains("a valid API key is needed"), "{refused:#}");
    let nobody = cli::run_at("http://127.0.0.1:1", &["status"], DEADLINE).await.expect_err("nobody is there");
    ensure!(format!("{nobody:#}").contains("no answer from http://127.0.0.1:1"), "{nobody:#}");
    let unknown = cli::run_at(&url, &["search", "x", "--store", "cats"], DEADLINE).await;
    let unknown = unknown.expect_err("no store");
    ensure!(format!("{unknown:#}").contains("no vector store is called cats"), "{unknown:#}");
    let empty = tempfile::tempdir()?;
    let empty = empty.path().to_str().context("text")?;
    let nothing = cli::run_at(&url, &["ingest", empty], DEADLINE).await.expect_err("an empty folder");
    ensure!(format!("{nothing:#}").contains("no files ending in"), "{nothing:#}");
    let stores: Value = cluster.client(0).json(&Request::get("/v1/vector_stores")).await?;
    ensure!(stores["data"] == json!([]), "a command that failed has made a store: {stores}");
    cluster.finish()
}
