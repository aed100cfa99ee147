//! Models: a node without the right one says what to do and loses nothing, and a provider behind HTTP serves
//! as the embedded model does, whatever its mood.

use std::collections::BTreeSet;
use std::path::Path;
use std::time::{Duration, Instant};

use anyhow::{Result, ensure};
use serde_json::{Value, json};
use shoal_tests::documents::upload;
use shoal_tests::provider::{DIMENSIONS, MODEL};
use shoal_tests::{Client, Cluster, Freshness, Mood, Points, Provider, Reply, Request, Store};
use shoal_tests::{point, wait_until};

/// How long a few documents may take.
const DEADLINE: Duration = Duration::from_secs(60);
/// How long a node may take to stop.
const STOP_DEADLINE: Duration = Duration::from_secs(30);

const TEXTS: [(&str, &str); 3] = [
    ("heron.txt", "The heron of Lisbon guards the ledger in the harbour office."),
    ("camel.txt", "A camel in Cairo carries coffee from the station to the market."),
    ("otter.txt", "Two otters near Oslo have learnt to open the lock of the canal."),
];

async fn node(settings: &Path) -> Result<Cluster> {
    Cluster::of(1).env("SHOAL_CONFIG", &settings.to_string_lossy()).start().await
}

/// Starts the node anew, with what its settings are by now.
async fn restart(cluster: &mut Cluster) -> Result<()> {
    cluster.node_mut(0).terminate(STOP_DEADLINE).await?;
    cluster.restart(0).await
}

async fn ask(client: &Client, path: &str, body: &Value) -> Result<Reply> {
    client.once(&Request::ask(path, body)).await
}

#[tokio::test]
async fn a_vector_store_works_on_a_remote_model() -> Result<()> {
    let provider = Provider::start().await?;
    let settings = tempfile::NamedTempFile::new()?;
    std::fs::write(settings.path(), provider.settings(DIMENSIONS))?;
    let cluster = node(settings.path()).await?;
    let client = cluster.client(0);
    let store = Store::create(client, "remote").await?;
    let mut files = Vec::new();
    for (name, text) in TEXTS {
        files.push(store.add(client, name, text, json!({})).await?);
    }
    store.completed(client, &files, DEADLINE).await?;
    for (file, (_, text)) in files.iter().zip(TEXTS) {
        let found = store.search(client, text, 3).await?;
        ensure!(found.first() == Some(file), "{text:?} finds {found:?} and not {file} first");
    }
    // What was embedded once is not asked for again.
    let before = provider.requests();
    store.search(client, TEXTS[1].1, 3).await?;
    ensure!(provider.requests() == before, "a question was embedded twice");

    let models = client.json(&Request::get("/v1/models")).await?;
    ensure!(models["data"][0]["id"] == MODEL && models["data"][0]["dimension"] == DIMENSIONS, "{models}");
    let input = json!({"model": MODEL, "input": ["one word", "two words"]});
    let embedded = client.json(&Request::ask("/v1/embeddings", &input)).await?;
    let vectors = embedded["data"].as_array().map(Vec::as_slice).unwrap_or_default();
    ensure!(vectors.len() == 2, "{embedded}");
    ensure!(vectors.iter().all(|item| item["embedding"].as_array().is_some_and(|x| x.len() == DIMENSIONS)));
    cluster.finish()
}

/// A store's documents wait for as long as the node cannot embed them, tell why, and are done when it can. A
/// file that it could not embed is not attached at all.
#[tokio::test]
async fn a_document_waits_for_its_model_and_says_so() -> Result<()> {
    let provider = Provider::start().await?;
    let settings = tempfile::NamedTempFile::new()?;
    std::fs::write(settings.path(), provider.settings(DIMENSIONS))?;
    let mut cluster = node(settings.path()).await?;
    let client = cluster.client(0).clone();
    let store = Store::create(&client, "waiting").await?;
    let attach = format!("/v1/vector_stores/{}/files", store.id);
    let search = format!("/v1/vector_stores/{}/search", store.id);

    // That the key is wrong is no fault of the document.
    provider.feel(Mood::Refuses(401));
    let file = store.add(&client, TEXTS[0].0, TEXTS[0].1, json!({})).await?;
    waits(&client, &store, &file, "401").await?;
    let other = upload(&client, TEXTS[1].0, TEXTS[1].1.as_bytes(), None).await?;
    let other = json!({"file_id": other});

    // No such model.
    std::fs::write(settings.path(), "default_model = \"none-such\"\n")?;
    restart(&mut cluster).await?;
    waits(&client, &store, &file, "model `bag` is not on this node").await?;
    for (path, body) in [(&attach, &other), (&search, &json!({"query": "ledger"}))] {
        let refused = ask(&client, path, body).await?;
        ensure!(refused.status == 503, "{path}: {} {}", refused.status, refused.text());
        ensure!(refused.text().contains("name it in http_models"), "{path}: {}", refused.text());
    }
    ensure!(cluster.node(0).log().contains("a document will be tried again"), "the log does not tell");

    // Another model of that name.
    std::fs::write(settings.path(), provider.settings(DIMENSIONS / 2))?;
    restart(&mut cluster).await?;
    waits(&client, &store, &file, "put the collection's model onto this node").await?;
    let refused = ask(&client, &attach, &other).await?;
    ensure!(refused.status == 409, "{} {}", refused.status, refused.text());

    // The right one, in a good mood.
    provider.feel(Mood::Answers);
    std::fs::write(settings.path(), provider.settings(DIMENSIONS))?;
    restart(&mut cluster).await?;
    store.completed(&client, std::slice::from_ref(&file), DEADLINE).await?;
    let found = store.file(&client, &file).await?;
    ensure!(found["last_error"].is_null(), "it is over: {found}");
    ensure!(store.search(&client, TEXTS[0].1, 1).await? == [file], "the document is not found");
    cluster.finish()
}

/// Waits until a document that is in progress tells of its trouble in these words.
async fn waits(client: &Client, store: &Store, file: &str, words: &str) -> Result<()> {
    wait_until(DEADLINE, &format!("trouble with {words:?}"), || async {
        let found = store.file(client, file).await?;
        ensure!(found["status"] == "in_progress", "it has ended: {found}");
        let reason = found["last_error"]["message"].as_str().unwrap_or_default();
        ensure!(reason.contains(words), "it tells of {reason:?}");
        ensure!(found["last_error"]["code"] == "server_error", "{found}");
        Ok(Some(()))
    })
    .await
}

#[tokio::test]
async fn nobody_waits_longer_for_a_provider_than_he_wants() -> Result<()> {
    let provider = Provider::start().await?;
    let settings = tempfile::NamedTempFile::new()?;
    std::fs::write(settings.path(), provider.settings(DIMENSIONS))?;
    let cluster = node(settings.path()).await?;
    let client = cluster.client(0);
    let store = Store::create(client, "patience").await?;
    provider.feel(Mood::Hangs);
    let search = format!("/v1/vector_stores/{}/search", store.id);
    let questions = [
        (search.as_str(), json!({"query": "where is the ledger?"})),
        ("/v1/embeddings", json!({"model": MODEL, "input": "where is the ledger?"})),
    ];
    for (path, body) in &questions {
        let started = Instant::now();
        let reply = ask(client, &format!("{path}?timeout=1"), body).await?;
        let took = started.elapsed();
        ensure!(reply.status == 503, "{path}: {} {}", reply.status, reply.text());
        ensure!(reply.text().contains("in time"), "{path}: {}", reply.text());
        ensure!((Duration::from_secs(1)..Duration::from_secs(8)).contains(&took), "{path} took {took:?}");
    }
    provider.feel(Mood::Answers);
    for (path, body) in &questions {
        client.succeed(&Request::ask(*path, body)).await?;
    }
    cluster.finish()
}

#[tokio::test]
async fn a_node_without_models_says_what_to_do() -> Result<()> {
    let settings = tempfile::NamedTempFile::new()?;
    std::fs::write(settings.path(), "default_model = \"none-such\"\n")?;
    let cluster = node(settings.path()).await?;
    let client = cluster.client(0);
    let refused = ask(client, "/v1/vector_stores", &json!({"name": "notes"})).await?;
    ensure!(refused.status == 503, "{} {}", refused.status, refused.text());
    let message = refused.json()?["error"]["message"].as_str().unwrap_or_default().to_owned();
    ensure!(message.contains("none-such") && message.contains("make model"), "it does not say so: {message}");
    let named = json!({"name": "notes", "embedding_model": "bag"});
    let refused = ask(client, "/v1/vector_stores", &named).await?;
    ensure!(refused.status == 404, "{} {}", refused.status, refused.text());
    ensure!(refused.text().contains("model `bag` is not on this node"), "{}", refused.text());
    ensure!(refused.text().contains("name it in http_models"), "{}", refused.text());
    let models = client.json(&Request::get("/v1/models")).await?;
    ensure!(models["data"].as_array().is_some_and(Vec::is_empty), "{models}");
    // Points need no model.
    let points = Points::of(client, "c");
    points.create(1, 1).await?;
    points.upsert(&[point(1, json!({}))]).await?;
    cluster.finish()
}

/// No chunk is larger than what the model sees, its heading included: who asks for more is refused, and for
/// those who do not ask the chunks are cut to it.
#[tokio::test]
async fn no_chunk_is_larger_than_what_the_model_sees() -> Result<()> {
    let provider = Provider::start().await?;
    let settings = tempfile::NamedTempFile::new()?;
    std::fs::write(settings.path(), provider.settings(DIMENSIONS) + "max_tokens = 128\n")?;
    let cluster = node(settings.path()).await?;
    let client = cluster.client(0);
    let strategy = |tokens: usize| {
        let sizes = json!({"max_chunk_size_tokens": tokens, "chunk_overlap_tokens": 0});
        json!({"type": "static", "static": sizes})
    };
    let store = Store::create(client, "cut").await?;
    // More than what stands before a chunk, and more than a heading may take.
    let short = "Rules that hold on the pier, at the crane and in the office of the harbour";
    let long = (0..60).map(|n| format!("clause{n} ")).collect::<String>();
    let words = (0..900).map(|n| format!("word{n} ")).collect::<String>();
    let text = format!("{words}\n# {short}\n{words}\n# {long}\n{words}\n");
    let file = upload(client, "rules.md", text.as_bytes(), None).await?;

    let attach = format!("/v1/vector_stores/{}/files", store.id);
    let too_large = [
        ("/v1/vector_stores", json!({"chunking_strategy": strategy(129)})),
        (attach.as_str(), json!({"file_id": file, "chunking_strategy": strategy(129)})),
    ];
    for (path, body) in &too_large {
        let refused = ask(client, path, body).await?;
        ensure!(refused.status == 400, "{path}: {} {}", refused.status, refused.text());
        let error = refused.json()?["error"].take();
        ensure!(error["param"] == "chunking_strategy.static.max_chunk_size_tokens", "{path}: {error}");
        ensure!(error["message"].as_str().is_some_and(|message| message.contains("128 tokens")), "{error}");
    }
    client.succeed(&Request::post("/v1/vector_stores", &json!({"chunking_strategy": strategy(128)}))).await?;

    store.attach(client, &file, json!({})).await?;
    store.completed(client, std::slice::from_ref(&file), DEADLINE).await?;
    // A token is taken to be four characters.
    let longest = provider.longest();
    ensure!((400..=512).contains(&longest), "the longest text that was embedded has {longest} characters");
    let documents = store.chunks(client, Freshness::Linearizable).await?;
    let kept: BTreeSet<&str> =
        documents[&file].iter().flat_map(|chunk| chunk.text.split_whitespace()).collect();
    let mut wanted = long.split_whitespace().chain(words.split_whitespace());
    let lost = wanted.find(|word| !kept.contains(word));
    ensure!(lost.is_none(), "{lost:?} is lost");
    let headings = documents[&file].iter().filter_map(|chunk| chunk.payload["heading"].as_str());
    let headings: Vec<&str> = headings.collect();
    ensure!(!headings.is_empty() && headings.iter().all(|heading| *heading == short), "{headings:?}");
    cluster.finish()
}
