//! Documents: an accepted one is never lost and never there twice, even when a node dies while it
//! is parsed and embedded; a new version takes the old one's place; a broken one fails alone.

use std::collections::BTreeSet;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use futures::{StreamExt, TryStreamExt, stream};
use serde_json::{Value, json};
use shoal_tests::documents::upload;
use shoal_tests::{Client, Cluster, Freshness, Request, Store, models, say, skip, wait_until};

/// Uploads in flight at once.
const CONCURRENCY: usize = 8;
/// How long a few documents may take.
const FEW_DEADLINE: Duration = Duration::from_secs(120);
/// How long 200 documents may take, one node having died.
const MANY_DEADLINE: Duration = Duration::from_secs(400);
/// Whose deeds the documents tell; with [`PLACES`] no two tell the same.
const ANIMALS: [&str; 20] = [
    "heron",
    "badger",
    "octopus",
    "lynx",
    "tortoise",
    "magpie",
    "walrus",
    "hedgehog",
    "salmon",
    "camel",
    "beaver",
    "falcon",
    "spider",
    "gorilla",
    "penguin",
    "cobra",
    "otter",
    "moose",
    "jellyfish",
    "bat",
];
/// Where the documents play.
const PLACES: [&str; 10] =
    ["Lisbon", "Oslo", "Nairobi", "Kyoto", "Lima", "Cairo", "Dublin", "Hanoi", "Quebec", "Perth"];

fn title(number: usize) -> String {
    let (animal, place) = (ANIMALS[number % ANIMALS.len()], PLACES[number / ANIMALS.len() % PLACES.len()]);
    format!("The {animal} of {place} guards ledger {number} in the old harbour office.")
}

fn text(number: usize) -> String {
    format!("{} Nobody else may open it, and on rainy days it is kept under the stairs.", title(number))
}

/// A text of many chunks that says which version it is.
fn long_text(version: &str, sentences: usize) -> String {
    let sentence = |n: usize| format!("In the {version} version, sentence {n}: {} ", title(n));
    (0..sentences).map(sentence).collect()
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn no_accepted_document_is_lost_or_doubled_when_a_node_dies() -> Result<()> {
    if models().is_none() {
        skip("no_accepted_document_is_lost_or_doubled_when_a_node_dies", "there are no models");
        return Ok(());
    }
    let mut cluster = Cluster::of(3).start().await?;
    let any = cluster.any();
    let store = Store::create(&any, "animals").await?;
    cluster.settled().await?;
    let mut files = add_all(&any, &store, 0..100).await?;
    let victim = cluster.leader(*cluster.shards(&store.id).await?.first().context("no shard")?).await?;
    say(format!("{} of 100 documents are completed when a node dies", store.count(&any, "completed").await?));
    cluster.node_mut(victim).kill()?;
    files.extend(add_all(&any, &store, 100..200).await?);
    store.completed(&any, &files, MANY_DEADLINE).await?;

    cluster.restart(victim).await?;
    cluster.settled().await?;
    cluster.converged().await?;
    let expected: BTreeSet<String> = files.iter().cloned().collect();
    assert_eq!(expected.len(), 200, "a file id was given twice");
    for at in 0..cluster.len() {
        for freshness in [Freshness::Linearizable, Freshness::Eventual] {
            let documents = store.chunks(cluster.client(at), freshness).await?;
            let found: BTreeSet<String> = documents.keys().cloned().collect();
            ensure!(found == expected, "{} documents have chunks on node {at}, not 200", found.len());
            for (number, file) in files.iter().enumerate() {
                let first = &documents[file][0];
                ensure!(first.text.contains(&title(number)), "{file} has the text {:?}", first.text);
                ensure!(first.payload["filename"] == name(number), "{file}: {}", first.payload);
                ensure!(first.payload["number"] == number, "{file} lacks its attribute: {}", first.payload);
            }
        }
    }
    for number in (0..200).step_by(13) {
        let at = number % cluster.len();
        let found = store.search(cluster.client(at), &title(number), 5).await?;
        ensure!(found.contains(&files[number]), "{:?} finds {found:?} on node {at}", title(number));
    }
    cluster.finish()
}

fn name(number: usize) -> String {
    format!("ledger-{number}.txt")
}

/// Uploads and attaches documents, several at a time, and returns their ids in order.
async fn add_all(client: &Client, store: &Store, numbers: std::ops::Range<usize>) -> Result<Vec<String>> {
    let add = |number: usize| async move {
        let extra = json!({"attributes": {"number": number}});
        store.add(client, &name(number), &text(number), extra).await
    };
    stream::iter(numbers).map(add).buffered(CONCURRENCY).try_collect().await
}

#[tokio::test]
async fn a_new_version_takes_the_old_ones_place() -> Result<()> {
    if models().is_none() {
        skip("a_new_version_takes_the_old_ones_place", "there are no models");
        return Ok(());
    }
    let cluster = Cluster::of(1).start().await?;
    let client = cluster.client(0);
    let store = Store::create(client, "versions").await?;
    let file = store.add(client, "manual.txt", &long_text("first", 60), json!({})).await?;
    let files = std::slice::from_ref(&file);
    store.completed(client, files, FEW_DEADLINE).await?;
    let first = texts(client, &store, &file).await?;
    ensure!(first.len() > 2, "the text has only {} chunks", first.len());

    // The same again is no work: the very same chunks stay.
    store.attach(client, &file, json!({})).await?;
    store.completed(client, files, FEW_DEADLINE).await?;
    ensure!(texts(client, &store, &file).await? == first, "attaching the same file again has changed it");

    // Cut in another way it is a new version, and nothing of the old one stays.
    let strategy = json!({"max_chunk_size_tokens": 100, "chunk_overlap_tokens": 0});
    let strategy = json!({"chunking_strategy": {"type": "static", "static": strategy}});
    store.attach(client, &file, strategy.clone()).await?;
    store.completed(client, files, FEW_DEADLINE).await?;
    let recut = texts(client, &store, &file).await?;
    ensure!(recut.len() > first.len(), "{} chunks became {}", first.len(), recut.len());

    // Other bytes under the same id: readers see the old version or the new one, whole, at any
    // moment, and in the end only the new one.
    let again = upload(client, "manual.txt", long_text("second", 60).as_bytes(), Some(&file)).await?;
    ensure!(again == file, "a re-upload of {file} was given the id {again}");
    store.attach(client, &file, strategy).await?;
    wait_until(FEW_DEADLINE, "the second version", || async {
        let seen = texts(client, &store, &file).await?;
        let old = seen.iter().filter(|text| text.contains("first version")).count();
        let new = seen.iter().filter(|text| text.contains("second version")).count();
        // Not an error but a panic: it is not to be looked at again, it must never happen.
        assert!((old > 0) != (new > 0), "{old} old and {new} new chunks are visible together");
        Ok((new > 0).then_some(()))
    })
    .await?;
    store.completed(client, files, FEW_DEADLINE).await?;
    ensure!(store.search(client, &title(7), 5).await? == files, "a search does not find the document");
    cluster.finish()
}

async fn texts(client: &Client, store: &Store, file: &str) -> Result<Vec<String>> {
    let documents = store.chunks(client, Freshness::Linearizable).await?;
    ensure!(documents.keys().all(|document| document == file), "documents: {:?}", documents.keys());
    let chunks = documents.into_values().flatten();
    Ok(chunks.map(|chunk| chunk.text).collect())
}

#[tokio::test]
async fn a_broken_document_fails_with_a_reason_and_blocks_nobody() -> Result<()> {
    if models().is_none() {
        skip("a_broken_document_fails_with_a_reason_and_blocks_nobody", "there are no models");
        return Ok(());
    }
    let cluster = Cluster::of(1).start().await?;
    let client = cluster.client(0);
    let store = Store::create(client, "broken").await?;
    let broken = [
        ("broken.pdf", b"%PDF-1.7\nthis is no PDF at all\n%%EOF\n".to_vec()),
        ("broken.docx", b"PK\x03\x04 and no archive behind it".to_vec()),
        ("unknown.bin", vec![0; 5000]),
    ];
    let mut files = Vec::new();
    for (filename, bytes) in &broken {
        let file = upload(client, filename, bytes, None).await?;
        store.attach(client, &file, json!({})).await?;
        files.push(file);
    }
    let good = store.add(client, "good.txt", &text(3), json!({})).await?;
    store.completed(client, std::slice::from_ref(&good), FEW_DEADLINE).await?;
    for (file, ended) in store.ended(client, &files, FEW_DEADLINE).await? {
        ensure!(ended["status"] == "failed", "{file} cannot be parsed, but is {ended}");
        let reason = ended["last_error"]["message"].as_str().unwrap_or_default();
        ensure!(!reason.is_empty(), "{file} has failed without a reason: {ended}");
        ensure!(!reason.contains("/data/"), "the reason shows a path of ours: {reason}");
    }
    let documents = store.chunks(client, Freshness::Linearizable).await?;
    ensure!(documents.keys().eq([&good]), "chunks of {:?} are visible", documents.keys());
    ensure!(store.search(client, &title(3), 5).await?.first() == Some(&good), "the good one is not found");
    // A failed document can be taken away like any other.
    let path = format!("/v1/vector_stores/{}/files/{}", store.id, files[0]);
    let deleted: Value = client.json(&Request::delete(path.clone())).await?;
    ensure!(deleted["deleted"] == true, "{deleted}");
    ensure!(client.once(&Request::get(path)).await?.status == 404, "it is still there");
    cluster.finish()
}
