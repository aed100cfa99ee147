//! One node: points come and go, bad requests store nothing, keys are asked for, a restart keeps
//! everything, and the node does not open itself to the network without protection.

use std::process::Stdio;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use serde_json::{Value, json};
use shoal_tests::binary::shoal;
use shoal_tests::documents::{upload, upload_request};
use shoal_tests::ports::Ports;
use shoal_tests::{Client, Cluster, Points, Request, point, vector, wait_until};

#[tokio::test]
async fn points_are_written_read_searched_and_deleted() -> Result<()> {
    let cluster = Cluster::of(1).start().await?;
    let points = Points::of(cluster.client(0), "c");
    points.create(2, 1).await?;
    let parity = |id: u64| if id.is_multiple_of(2) { "even" } else { "odd" };
    let all: Vec<Value> = (1..=20).map(|id| point(id, json!({"n": id, "parity": parity(id)}))).collect();
    points.upsert(&all).await?;
    assert_eq!(points.count(None).await?, 20);

    // Searchable as soon as acknowledged, with and without a filter.
    let hits = points.search(&vector(7), 3, None).await?;
    assert_eq!(hits.len(), 3);
    assert_eq!((&hits[0]["id"], &hits[0]["payload"]["n"]), (&json!(7), &json!(7)));
    assert!(hits[0]["score"].as_f64().is_some_and(|score| score > 0.999), "{}", hits[0]);
    let even = json!({"must": [{"key": "parity", "match": {"value": "even"}}]});
    assert_eq!(points.count(Some(even.clone())).await?, 10);
    let hits = points.search(&vector(7), 20, Some(even)).await?;
    assert_eq!(hits.len(), 10);
    assert!(hits.iter().all(|hit| hit["payload"]["parity"] == "even"));

    // A UUID is an id, a vector comes back as it was given up to its length, and a second write
    // replaces the whole point.
    let uuid = json!("550e8400-e29b-41d4-a716-446655440000");
    points.upsert(&[json!({"id": uuid, "vector": [3.0, 0.0, 4.0, 0.0], "payload": {"a": 1}})]).await?;
    points.upsert(&[json!({"id": uuid, "vector": [0.0, 3.0, 0.0, 4.0], "payload": {"b": 2}})]).await?;
    let found = points.get_whole(std::slice::from_ref(&uuid)).await?;
    assert_eq!((found.len(), &found[0]["id"], &found[0]["payload"]), (1, &uuid, &json!({"b": 2})));
    let coordinates: Vec<f64> =
        serde_json::from_value(found[0]["vector"].clone()).with_context(|| found[0].to_string())?;
    let length = coordinates.iter().map(|x| x * x).sum::<f64>().sqrt();
    let mut directions = coordinates.iter().zip([0.0, 0.6, 0.0, 0.8]);
    assert!(directions.all(|(is, should)| (is / length - should).abs() < 1e-3), "{coordinates:?}");

    points.delete(&[7, 8]).await?;
    assert!(points.get(&[7, 8]).await?.is_empty());
    assert!(points.search(&vector(7), 20, None).await?.iter().all(|hit| hit["id"] != 7));
    assert_eq!(points.count(None).await?, 19);
    cluster.finish()
}

#[tokio::test]
async fn the_older_form_of_a_search_finds_the_same() -> Result<()> {
    let cluster = Cluster::of(1).start().await?;
    let client = cluster.client(0);
    let points = Points::of(client, "c");
    points.create(2, 1).await?;
    let parity = |id: u64| if id.is_multiple_of(2) { "even" } else { "odd" };
    let all: Vec<Value> = (1..=20).map(|id| point(id, json!({"n": id, "parity": parity(id)}))).collect();
    points.upsert(&all).await?;
    let ask = async |path: &str, body: &Value| -> Result<Value> {
        let path = format!("/collections/c/points/{path}");
        Ok(client.json(&Request::ask(path, body)).await?["result"].take())
    };

    // Hits are an array of their own here, and a field of the result in the newer form.
    let filter = json!({"must": [{"key": "parity", "match": {"value": "even"}}]});
    let mut search = json!({
        "vector": vector(7), "limit": 3, "offset": 1, "filter": filter, "score_threshold": -2.0,
        "params": {"exact": true}, "with_payload": ["n"], "with_vector": true,
    });
    let found = ask("search", &search).await?;
    let mut query = search.clone();
    let near = query.as_object_mut().and_then(|query| query.remove("vector")).context("a vector")?;
    query["query"] = near;
    let by_query = ask("query", &query).await?;
    ensure!(found == by_query["points"], "{found} is not {by_query}");
    let hits = found.as_array().context("hits")?;
    assert_eq!(hits.len(), 3);
    for hit in hits {
        let n = hit["payload"]["n"].as_u64().with_context(|| format!("no payload: {hit}"))?;
        ensure!(hit["id"] == n && n.is_multiple_of(2), "{hit}");
        ensure!(hit["payload"].get("parity").is_none(), "more of the payload than was asked for: {hit}");
        ensure!(hit["vector"].as_array().is_some_and(|vector| vector.len() == 4), "no vector: {hit}");
        ensure!(hit["score"].is_number() && hit["version"].is_number(), "{hit}");
    }

    // Without more, the payload stays where it is, and what scores too low is left out.
    let best = ask("search", &json!({"vector": vector(7), "limit": 20, "score_threshold": 0.999})).await?;
    let best = best.as_array().context("hits")?;
    ensure!(best.first().is_some_and(|hit| hit["id"] == 7 && hit["payload"].is_null()), "{best:?}");
    ensure!(best.iter().all(|hit| hit["score"].as_f64().is_some_and(|score| score >= 0.999)), "{best:?}");

    search["offset"] = json!(0);
    let batch = json!({"searches": [search, {"vector": vector(8), "limit": 1}]});
    let found = ask("search/batch", &batch).await?;
    let [first, second] = found.as_array().map(Vec::as_slice).unwrap_or_default() else {
        anyhow::bail!("not two lists: {found}")
    };
    let first = first.as_array().context("hits")?;
    assert_eq!((first.len(), &first[1..]), (3, &hits[..2]), "it is not the page one before");
    assert_eq!((second.as_array().map(Vec::len), &second[0]["id"]), (Some(1), &json!(8)));

    // A vector by its name, and what cannot be searched.
    let vectors = json!({"title": {"size": 4, "distance": "Dot"}});
    client.succeed(&Request::put("/collections/named", &json!({"vectors": vectors}))).await?;
    let named = json!({"points": [{"id": 1, "vector": {"title": vector(1)}}]});
    client.succeed(&Request::put("/collections/named/points?wait=true", &named)).await?;
    let search = json!({"vector": {"name": "title", "vector": vector(1)}, "limit": 1});
    let answer = client.json(&Request::ask("/collections/named/points/search", &search)).await?;
    assert_eq!(answer["result"][0]["id"], 1, "{answer}");
    let too_many = vec![json!({"vector": vector(1), "limit": 1}); 101];
    let refusals = [
        ("search", json!({"vector": [1, 2, 3], "limit": 1}), "dimension"),
        ("search", json!({"vector": {"name": "cover", "vector": vector(1)}, "limit": 1}), "cover"),
        ("search", json!({"limit": 1}), "vector"),
        ("search", json!({"query": vector(1), "limit": 1}), "query"),
        ("search/batch", json!({"searches": [{"vector": vector(1), "limit": 0}]}), "limit"),
        ("search/batch", json!({"searches": too_many}), "searches"),
    ];
    for (path, body, word) in refusals {
        let reply = client.once(&Request::ask(format!("/collections/c/points/{path}"), &body)).await?;
        ensure!(reply.status == 400 && reply.text().contains(word), "{path} {word}: {}", reply.text());
    }
    cluster.finish()
}

#[tokio::test]
async fn a_repeated_write_is_applied_once() -> Result<()> {
    let cluster = Cluster::of(1).start().await?;
    let points = Points::of(cluster.client(0), "c");
    points.create(1, 1).await?;
    let first = points.upsert_request(&[point(1, json!({"v": "first"}))]).header("idempotency-key", "one");
    ensure!(cluster.client(0).once(&first).await?.is_success(), "the first write failed");
    points.upsert(&[point(1, json!({"v": "second"}))]).await?;
    // Not a new write but the first one's retry, which was late.
    let repeated = cluster.client(0).once(&first).await?;
    ensure!(repeated.is_success(), "{} {}", repeated.status, repeated.text());
    assert_eq!(points.get(&[1]).await?[&1], json!({"v": "second"}));
    cluster.finish()
}

#[tokio::test]
async fn bad_requests_name_the_field_and_store_nothing() -> Result<()> {
    let cluster = Cluster::of(1).start().await?;
    let client = cluster.client(0);
    let points = Points::of(client, "c");
    points.create(1, 1).await?;
    let raw =
        |path: &str, body: &str| Request::raw("PUT", path, "application/json", body.as_bytes().to_vec());
    let put = |body: Value| Request::put("/collections/c/points?wait=true", &body);
    let vector_of = |vector: Value| put(json!({"points": [{"id": 1, "vector": vector}]}));
    let id = |id: Value| put(json!({"points": [{"id": id, "vector": [1, 2, 3, 4]}]}));
    let query = |body: Value| Request::ask("/collections/c/points/query", &body);
    let scroll = |body: Value| Request::ask("/collections/c/points/scroll", &body);
    let create = |body: Value| Request::put("/collections/d", &body);
    const ID: &str = "].id|point id|unsigned|uuid";
    let good = json!([1, 2, 3, 4]);
    let deep = (0..1000).fold(json!({"must": []}), |inner, _| json!({"must": [inner]}));
    // The answer must contain one of the words: the field, where there is one to name.
    let cases = [
        (vector_of(json!([1, 2, 3])), "vector"),
        (vector_of(json!([])), "vector"),
        (vector_of(json!("abc")), "vector"),
        (vector_of(json!([1, 2, 3, null])), "vector"),
        (vector_of(json!([0, 0, 0, 0])), "vector"),
        (vector_of(json!([1e39, 0, 0, 0])), "vector"),
        (vector_of(json!({"title": [1, 2, 3, 4]})), "vector|title"),
        // serde_json itself refuses what is no f64, and knows the place but not the field.
        (raw("/collections/c/points", r#"{"points":[{"id":1,"vector":[1e400,0,0,0]}]}"#), "vector|number"),
        (raw("/collections/c/points", r#"{"points":[{"id":1,"vector":[NaN,0,0,0]}]}"#), "vector|expected"),
        (raw("/collections/c/points", r#"{"points":[{"id":1,"vec"#), "eof|json"),
        (raw("/collections/c/points", ""), "eof|json|body"),
        (id(json!(-1)), ID),
        (id(json!(1.5)), ID),
        (id(json!("not-a-uuid")), ID),
        (id(Value::Null), ID),
        (raw("/collections/c/points", r#"{"points":[{"id":18446744073709551616,"vector":[1,2,3,4]}]}"#), ID),
        (put(json!({"points": [{"id": 1, "vector": good, "payload": [1]}]})), "payload"),
        (put(json!({"points": [{"id": 1, "vector": good, "colour": 1}]})), "colour"),
        (
            raw(
                "/collections/c/points",
                r#"{"points":[{"id":1,"vector":[1,2,3,4],"payload":{"n":1,"n":2}}]}"#,
            ),
            "twice",
        ),
        (raw("/collections/c/points", r#"{"points":[{"id":1,"id":2,"vector":[1,2,3,4]}]}"#), "duplicate"),
        (put(json!({"pionts": []})), "pionts|points"),
        // One bad point among good ones: none of them is stored.
        (put(json!({"points": [{"id": 1, "vector": good}, {"id": 2, "vector": [1]}]})), "vector"),
        (query(json!({"query": [1, 2, 3], "limit": 1})), "query|vector"),
        (query(json!({"query": good, "limit": u64::MAX / 2 + 1})), "limit"),
        (query(json!({"query": good, "limit": 1_000_000_000})), "limit"),
        (query(json!({"query": good, "limit": -1})), "limit"),
        (query(json!({"query": good, "limit": 1, "filter": {"mus": []}})), "mus"),
        (query(json!({"query": good, "limit": 1, "filter": deep})), "filter|recursion"),
        (scroll(json!({"limit": 1_000_000_000})), "limit"),
        (scroll(json!({"offset": -1})), "offset"),
        (create(json!({"vectors": {"size": 0, "distance": "Cosine"}})), "size"),
        (create(json!({"vectors": {"size": 65_537, "distance": "Cosine"}})), "size"),
        (create(json!({"vectors": {"size": 4, "distance": "Near"}})), "distance"),
        (create(json!({"vectors": {"size": 4, "distance": "Dot", "colour": 1}})), "colour"),
        (create(json!({"vectors": {"size": 4, "distance": "Dot"}, "shard_number": 0})), "shard_number"),
        (Request::put("/collections/..%2Fd", &json!({"vectors": {"size": 4, "distance": "Dot"}})), "name"),
        (scroll(json!({})).header("x-shoal-consistency", "strong"), "consistency"),
        (scroll(json!({})).header("x-shoal-position", "no token"), "position"),
        (
            Request::put("/collections/missing/points", &json!({"points": [{"id": 1, "vector": good}]})),
            "missing",
        ),
    ];
    for (request, words) in cases {
        let reply = client.once(&request).await.with_context(|| format!("{request:#}"))?;
        let text = reply.text().to_lowercase();
        ensure!((400..500).contains(&reply.status), "{request:#} was answered {} {text}", reply.status);
        ensure!(words.split('|').any(|word| text.contains(word)), "{request:#}: {text:?} lacks {words}");
    }
    assert_eq!(points.count(None).await?, 0, "a refused request has stored something");
    assert_eq!(client.once(&Request::get("/collections/d")).await?.status, 404);
    // The node is none the worse for it.
    points.upsert(&[point(1, json!({}))]).await?;
    assert_eq!(points.count(None).await?, 1);
    cluster.finish()
}

/// A file or a body that is longer under way than a request may take is taken all the same: the time for a
/// request is the node's time, from the last byte on.
#[tokio::test]
async fn a_slow_sender_does_not_use_up_the_time_of_its_request() -> Result<()> {
    let settings = tempfile::NamedTempFile::new()?;
    std::fs::write(settings.path(), "[limits]\nrequest_seconds = 2\n")?;
    let cluster = Cluster::of(1).env("SHOAL_CONFIG", &settings.path().to_string_lossy()).start().await?;
    let client = cluster.client(0);
    // The collection of files is made with the first one.
    upload(client, "first.txt", b"first", None).await?;
    let points = Points::of(client, "c");
    points.create(1, 1).await?;

    let over = Duration::from_secs(5);
    let bytes = vec![b'x'; 200_000];
    let slowly = upload_request("slow.txt", &bytes, None);
    let text = "x".repeat(50_000);
    let upsert = points.upsert_request(&[point(1, json!({"text": text}))]);
    let (uploaded, upserted) = tokio::join!(client.trickle(&slowly, over), client.trickle(&upsert, over));
    for (what, reply) in [("upload", uploaded?), ("upsert", upserted?)] {
        ensure!(reply.is_success(), "a slow {what} was answered {} {}", reply.status, reply.text());
        if what == "upload" {
            let path = format!("/v1/files/{}/content", reply.json()?["id"].as_str().context("no id")?);
            ensure!(client.succeed(&Request::get(path)).await?.body == bytes, "other bytes came back");
        }
    }
    assert_eq!(points.get(&[1]).await?[&1]["text"], text);
    cluster.finish()
}

#[tokio::test]
async fn a_key_is_asked_for() -> Result<()> {
    let cluster = Cluster::of(1).start().await?;
    let right = cluster.client(0);
    let points = Points::of(right, "c");
    points.create(1, 1).await?;
    let wrong = [right.with_key(None), right.with_key(Some("")), right.with_key(Some("key-of-the-test"))];
    let requests = [
        points.upsert_request(&[point(1, json!({}))]),
        Request::get("/collections/c"),
        Request::ask("/collections/c/points/count", &json!({"exact": true})),
        Request::post("/v1/vector_stores", &json!({"name": "kb"})),
        Request::get("/v1/files"),
        Request::get("/admin/cluster"),
    ];
    for client in &wrong {
        for request in &requests {
            let status = client.once(request).await?.status;
            ensure!(status == 401, "{request} was answered {status} without the right key");
        }
        // A probe has no key.
        assert_eq!(client.once(&Request::get("/health/live")).await?.status, 200);
    }
    let bearer = |key: &str| Request::get("/collections/c").header("authorization", &format!("Bearer {key}"));
    let keyless = right.with_key(None);
    assert_eq!(keyless.once(&bearer(shoal_tests::KEY)).await?.status, 200);
    assert_eq!(keyless.once(&bearer("wrong")).await?.status, 401);
    assert_eq!(points.count(None).await?, 0);
    cluster.finish()
}

#[tokio::test]
async fn a_restart_keeps_everything() -> Result<()> {
    let mut cluster = Cluster::of(1).start().await?;
    let client = cluster.client(0).clone();
    let points = Points::of(&client, "c");
    points.create(3, 1).await?;
    for id in 1..=50 {
        points.upsert(&[point(id, json!({"n": id}))]).await?;
    }
    points.delete(&[1, 2]).await?;
    let before = cluster.node(0).view().await?;

    let code = cluster.node_mut(0).terminate(Duration::from_secs(30)).await?;
    assert_eq!(code, Some(0), "a clean stop has exit code 0");
    cluster.restart(0).await?;
    check_kept(&points, 50).await?;

    points.upsert(&[point(51, json!({"n": 51}))]).await?;
    cluster.node_mut(0).kill()?;
    cluster.restart(0).await?;
    check_kept(&points, 51).await?;
    let after = cluster.node(0).view().await?;
    assert_eq!((after.cluster_id, after.node.id), (before.cluster_id, before.node.id));
    cluster.finish()
}

async fn check_kept(points: &Points<'_>, last: u64) -> Result<()> {
    let ids: Vec<u64> = (1..=last).collect();
    let found = points.get(&ids).await?;
    ensure!(found.keys().copied().eq(3..=last), "points {:?} are there", found.keys());
    ensure!(found.iter().all(|(id, payload)| payload["n"] == *id), "a payload has changed");
    for id in [3, last] {
        let hits = points.search(&vector(id), 1, None).await?;
        ensure!(hits.first().is_some_and(|hit| hit["id"] == id), "a search for {id} finds {hits:?}");
    }
    Ok(())
}

#[tokio::test]
async fn an_open_address_needs_a_key_and_tls() -> Result<()> {
    let too_little: [&[&str]; 2] = [&[], &["--api-key", "k"]];
    for protection in too_little {
        let (_dir, _, mut command) = open_node(protection)?;
        let output = tokio::time::timeout(Duration::from_secs(20), command.output());
        let output = output.await.with_context(|| format!("it serves 0.0.0.0 with {protection:?}"))??;
        let said = [output.stdout, output.stderr].concat();
        let said = String::from_utf8_lossy(&said).to_lowercase();
        ensure!(!output.status.success(), "it stopped with success: {said}");
        ensure!(said.contains("insecure") && said.contains("tls"), "it does not say why: {said}");
    }
    let (_dir, address, mut command) = open_node(&["--insecure"])?;
    let _child = command.stdout(Stdio::null()).stderr(Stdio::null()).spawn()?;
    let client = Client::new(vec![address], None);
    wait_until(Duration::from_secs(30), "an insecure node", || async {
        Ok((client.once(&Request::get("/health/live")).await?.status == 200).then_some(()))
    })
    .await
}

/// A node on all addresses with its directory and the address at which this machine reaches it.
/// It dies with its handle.
fn open_node(protection: &[&str]) -> Result<(tempfile::TempDir, String, tokio::process::Command)> {
    let (dir, ports) = (tempfile::tempdir()?, Ports::reserve()?);
    let mut command = tokio::process::Command::from(shoal("serve")?);
    command.args(["--name", "open"]).arg("--data").arg(dir.path());
    command.args(["--http", &format!("0.0.0.0:{}", ports.http)]);
    command.args(["--grpc", &format!("127.0.0.1:{}", ports.grpc)]);
    command.args(["--mesh", &format!("127.0.0.1:{}", ports.mesh)]);
    command.arg("--models").arg(dir.path()).args(protection).kill_on_drop(true);
    Ok((dir, format!("127.0.0.1:{}", ports.http), command))
}
