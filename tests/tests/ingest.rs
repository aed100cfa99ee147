//! Documents: an accepted one is never lost and never there twice, even when a node dies while it
//! is parsed and embedded; a new version takes the old one's place; a broken one, or one that kills its
//! parser, fails alone; pages and headings are kept.

use std::collections::BTreeSet;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use futures::{StreamExt, TryStreamExt, stream};
use serde_json::{Value, json};
use shoal_tests::documents::{Chunk, upload};
use shoal_tests::provider::{DIMENSIONS, Provider};
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

/// A page without end: each of the closing tags is looked for among all that are open. It takes a parser
/// minutes, and hardly any memory.
fn endless() -> String {
    "<span>".repeat(40_000) + &"</u>".repeat(200_000)
}

/// A small page of very many parts, which takes a parser hundreds of times as much memory.
fn greedy() -> String {
    "<p>x".repeat(1 << 20)
}

/// Documents that kill their parsers, each by another limit, are given up after three attempts with the
/// reason, and the one after them is none the worse for it.
#[tokio::test]
async fn a_document_that_kills_its_parser_is_given_up_and_blocks_nobody() -> Result<()> {
    let provider = Provider::start().await?;
    let settings = tempfile::NamedTempFile::new()?;
    let limited = |mebibytes: u64, cpu_seconds: u64, wall_seconds: u64| {
        let limits = format!(
            "[parse]\nmemory_bytes = {}\ncpu_seconds = {cpu_seconds}\nwall_seconds = {wall_seconds}\n",
            mebibytes << 20
        );
        std::fs::write(settings.path(), provider.settings(DIMENSIONS) + &limits)
    };
    limited(192, 2, 60)?;
    let mut cluster = Cluster::of(1).env("SHOAL_CONFIG", &settings.path().to_string_lossy()).start().await?;
    let client = cluster.client(0).clone();
    let store = Store::create(&client, "deadly").await?;
    let memory = store.add(&client, "greedy.html", &greedy(), json!({})).await?;
    let cpu = store.add(&client, "endless.html", &endless(), json!({})).await?;
    let mut good = vec![store.add(&client, &name(1), &text(1), json!({})).await?];
    store.completed(&client, &good, FEW_DEADLINE).await?;
    is_given_up(&client, &store, &memory, "SIGABRT").await?;
    is_given_up(&client, &store, &cpu, "SIGKILL").await?;

    limited(1024, 60, 1)?;
    cluster.node_mut(0).terminate(FEW_DEADLINE).await?;
    cluster.restart(0).await?;
    let wall = store.add(&client, "endless.html", &endless(), json!({})).await?;
    good.push(store.add(&client, &name(2), &text(2), json!({})).await?);
    store.completed(&client, &good, FEW_DEADLINE).await?;
    is_given_up(&client, &store, &wall, "longer than 1 s").await?;

    let documents = store.chunks(&client, Freshness::Linearizable).await?;
    let expected: BTreeSet<&String> = good.iter().collect();
    ensure!(documents.keys().collect::<BTreeSet<_>>() == expected, "chunks of {:?}", documents.keys());
    cluster.finish()
}

async fn is_given_up(client: &Client, store: &Store, file: &str, words: &str) -> Result<()> {
    let ended = store.ended(client, &[file.to_owned()], FEW_DEADLINE).await?;
    let ended = &ended[file];
    ensure!(ended["status"] == "failed", "{ended}");
    ensure!(ended["progress"]["attempts"] == 3, "{ended}");
    let reason = ended["last_error"]["message"].as_str().unwrap_or_default();
    ensure!(reason.contains("killed or crashed 3 times") && reason.contains(words), "no {words:?}: {reason}");
    Ok(())
}

/// The fixtures are made by `tests/fixtures/make.py`. Each of their lines is a sentence, and one of them fits
/// into the overlap.
#[tokio::test]
async fn pages_and_headings_are_kept_with_the_chunks() -> Result<()> {
    let provider = Provider::start().await?;
    let settings = tempfile::NamedTempFile::new()?;
    std::fs::write(settings.path(), provider.settings(DIMENSIONS))?;
    let cluster = Cluster::of(1).env("SHOAL_CONFIG", &settings.path().to_string_lossy()).start().await?;
    let client = cluster.client(0);
    let store = Store::create(client, "formats").await?;
    let sizes = json!({"max_chunk_size_tokens": 40, "chunk_overlap_tokens": 12});
    let strategy = json!({"chunking_strategy": {"type": "static", "static": sizes}});
    let pdf = upload(client, "two-pages.pdf", include_bytes!("../fixtures/two-pages.pdf"), None).await?;
    let docx = upload(client, "headings.docx", include_bytes!("../fixtures/headings.docx"), None).await?;
    for file in [&pdf, &docx] {
        store.attach(client, file, strategy.clone()).await?;
    }
    store.completed(client, &[pdf.clone(), docx.clone()], FEW_DEADLINE).await?;

    let documents = store.chunks(client, Freshness::Linearizable).await?;
    let pages = [(json!(1), "The second tower has been lit"), (json!(2), "goats and one black parrot")];
    check_parts(&documents[&pdf], "page", &pages)?;
    let headings = [
        (Value::Null, "They were agreed upon"),
        (json!("Ropes and knots"), "Gloves are worn by everybody"),
        (json!("Night shifts"), "At dawn the diary is signed"),
    ];
    check_parts(&documents[&docx], "heading", &headings)?;
    ensure!(documents[&pdf].iter().all(|chunk| chunk.payload["heading"].is_null()), "a PDF has no headings");

    let found = [
        ("Which animal screamed twice for fog?", &pdf, json!(2), Value::Null),
        ("When was the first tower of the lighthouse finished?", &pdf, json!(1), Value::Null),
        ("Who scrubs the gangway?", &docx, Value::Null, json!("Night shifts")),
    ];
    for (question, file, page, heading) in found {
        let path = format!("/v1/vector_stores/{}/search", store.id);
        let answer = client.json(&Request::ask(path, &json!({"query": question}))).await?;
        let best = &answer["data"][0];
        ensure!(best["file_id"] == file.as_str(), "{question}: {best}");
        ensure!(best["page"] == page && best["heading"] == heading, "{question}: {best}");
    }
    cluster.finish()
}

/// Checks that the parts of a document come in order, each with its sentence, which no other part has, and
/// that the chunks of a part overlap.
fn check_parts(chunks: &[Chunk], field: &str, parts: &[(Value, &str)]) -> Result<()> {
    let mut seen: Vec<&Value> = chunks.iter().map(|chunk| &chunk.payload[field]).collect();
    seen.dedup();
    ensure!(seen.iter().copied().eq(parts.iter().map(|(part, _)| part)), "{field}: {seen:?}");
    for (part, sentence) in parts {
        let own: Vec<&Chunk> = chunks.iter().filter(|chunk| chunk.payload[field] == *part).collect();
        ensure!(own.iter().any(|chunk| chunk.text.contains(*sentence)), "{part} lacks {sentence:?}: {own:?}");
        let mut others = chunks.iter().filter(|chunk| chunk.payload[field] != *part);
        ensure!(others.all(|chunk| !chunk.text.contains(*sentence)), "{sentence:?} is not only in {part}");
        for pair in own.windows(2) {
            let (before, after) = (pair[0], pair[1]);
            let last = before.text.lines().next_back().unwrap_or_default();
            ensure!(after.text.starts_with(last), "{:?} does not overlap {:?}", after.text, before.text);
            let (start, end) = (&after.payload["char_range"][0], &before.payload["char_range"][1]);
            ensure!(start.as_u64() < end.as_u64(), "{start} is not before {end}");
        }
    }
    Ok(())
}
