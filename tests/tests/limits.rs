//! What a node takes from its clients, and for how long it waits for them: bodies that are too large, clients
//! that say nothing, begin and do not go on, and more requests at once than there may be.

use std::path::PathBuf;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use serde_json::{Value, json};
use shoal_tests::documents::upload_request;
use shoal_tests::{Cluster, KEY, Points, Reply, Request, point, wait_until};
use tempfile::TempDir;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;

/// The largest JSON body in these tests, in bytes.
const BODY_BYTES: usize = 4000;
/// The largest file in these tests, in bytes.
const UPLOAD_BYTES: usize = 8000;
/// For how long a node waits for a client in these tests.
const PATIENCE: Duration = Duration::from_secs(2);
/// Less than what a node waits for without these settings.
const DEADLINE: Duration = Duration::from_secs(8);
/// For how long a node keeps a connection on which nothing comes, in these tests.
const IDLE: Duration = Duration::from_secs(6);
/// What a connection with HTTP/2 begins with.
const PREFACE: &[u8] = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n";
/// The length of `HTTP/1.1 200`.
const STATUS_BYTES: u64 = 12;
/// 150 bytes that are an array of no points with 100,000 spaces in it, by gzip.
const INFLATES: [u8; 150] = [
    31, 139, 8, 0, 0, 0, 0, 0, 2, 3, 237, 193, 177, 13, 0, 16, 16, 0, 192, 85, 228, 199, 176, 138, 24, 64,
    131, 132, 78, 236, 110, 13, 197, 221, 157, 152, 163, 245, 189, 34, 151, 4, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0,
    0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0,
    0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0,
    0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 124, 171, 222, 7, 180, 67, 153, 14, 173, 134, 1, 0,
];

/// One node with these limits, and the folder with its settings.
async fn limited(limits: &str) -> Result<(TempDir, Cluster)> {
    let dir = tempfile::tempdir()?;
    let file: PathBuf = dir.path().join("shoal.toml");
    std::fs::write(&file, format!("[limits]\n{limits}\n"))?;
    let file = file.to_str().context("a path of the tests is text")?;
    let cluster = Cluster::of(1).env("SHOAL_CONFIG", file).start().await?;
    Ok((dir, cluster))
}

/// The first line and the headers of a request with a body.
fn head(cluster: &Cluster, of_body: &str) -> String {
    let address = cluster.node(0).http_address();
    format!(
        "PUT /collections/c/points?wait=true HTTP/1.1\r\nhost: {address}\r\napi-key: {KEY}\r\n\
         content-type: application/json\r\n{of_body}\r\n\r\n"
    )
}

async fn connected(cluster: &Cluster, bytes: &[u8]) -> Result<TcpStream> {
    let mut stream = TcpStream::connect(cluster.node(0).http_address()).await?;
    stream.write_all(bytes).await?;
    Ok(stream)
}

fn check_too_large(reply: &Reply, code: &str) -> Result<()> {
    let said = reply.json()?;
    ensure!(reply.status == 413, "{} {said}", reply.status);
    ensure!(said.pointer(code) == Some(&json!("too_large")), "not in the shape of its surface: {said}");
    Ok(())
}

#[tokio::test]
async fn a_body_that_is_too_large_is_refused() -> Result<()> {
    let limits = format!("body_bytes = {BODY_BYTES}\nupload_bytes = {UPLOAD_BYTES}");
    let (_dir, cluster) = limited(&limits).await?;
    let client = cluster.client(0);
    let points = Points::of(client, "c");
    points.create(1, 1).await?;

    let of_size = |bytes: usize| points.upsert_request(&[point(1, json!({"text": "x".repeat(bytes)}))]);
    check_too_large(&client.once(&of_size(BODY_BYTES)).await?, "/status/code")?;
    let packed = Request::raw("PUT", "/collections/c/points", "application/json", INFLATES.to_vec());
    let packed = packed.header("content-encoding", "gzip");
    check_too_large(&client.once(&packed).await?, "/status/code")?;
    let chunk = format!("{:x}\r\n{}\r\n0\r\n\r\n", BODY_BYTES + 1, " ".repeat(BODY_BYTES + 1));
    let request = head(&cluster, "connection: close\r\ntransfer-encoding: chunked") + &chunk;
    let mut answer = vec![0; STATUS_BYTES as usize];
    connected(&cluster, request.as_bytes()).await?.read_exact(&mut answer).await?;
    ensure!(answer == b"HTTP/1.1 413", "{}", String::from_utf8_lossy(&answer));
    ensure!(points.count(None).await? == 0, "a refused request has stored something");
    client.succeed(&of_size(BODY_BYTES / 2)).await?;
    ensure!(points.count(None).await? == 1, "a body within the limit is taken");

    let file = |bytes: usize| upload_request("a.txt", &vec![b'x'; bytes], None);
    check_too_large(&client.once(&file(UPLOAD_BYTES + 1)).await?, "/error/code")?;
    client.succeed(&file(UPLOAD_BYTES)).await?;
    let files = client.json(&Request::get("/v1/files")).await?;
    ensure!(files["data"].as_array().map(Vec::len) == Some(1), "{files}");
    cluster.finish()
}

/// Sends this and nothing more, and returns the first words of the answer, or none when the node ends the
/// connection, and the time that it took.
async fn answer_to(cluster: &Cluster, bytes: &[u8]) -> Result<(Duration, String)> {
    let stream = connected(cluster, bytes).await?;
    let (started, mut answer) = (Instant::now(), Vec::new());
    let answered = tokio::time::timeout(DEADLINE, stream.take(STATUS_BYTES).read_to_end(&mut answer)).await;
    // A reset is an end as well.
    drop(answered.with_context(|| format!("the node still waits after {bytes:?}"))?);
    Ok((started.elapsed(), String::from_utf8_lossy(&answer).into_owned()))
}

#[tokio::test]
async fn who_does_not_go_on_is_not_waited_for() -> Result<()> {
    let seconds = PATIENCE.as_secs();
    let limits = format!("header_seconds = {seconds}\nbody_pause_seconds = {seconds}");
    let (_dir, cluster) = limited(&limits).await?;
    let points = Points::of(cluster.client(0), "c");
    points.create(1, 1).await?;
    let body = json!({"points": [point(1, json!({}))]}).to_string();
    let whole = head(&cluster, &format!("content-length: {}", body.len()));

    let half_a_head = &whole.as_bytes()[..whole.len() / 2];
    for bytes in [&b""[..], b"PRI * HTTP/2", half_a_head] {
        let (waited, said) = answer_to(&cluster, bytes).await?;
        ensure!(waited >= PATIENCE / 2, "a connection with {bytes:?} has ended after {waited:?}");
        ensure!(!said.ends_with("200"), "{bytes:?} is answered {said:?}");
    }
    let half_a_body = format!("{whole}{}", &body[..body.len() / 2]);
    let (waited, said) = answer_to(&cluster, half_a_body.as_bytes()).await?;
    ensure!(waited >= PATIENCE / 2, "half a body was answered after {waited:?}: {said}");
    ensure!(said.starts_with("HTTP/1.1 4"), "half a body is answered {said:?}");
    ensure!(points.count(None).await? == 0, "half a body has stored something");

    // Who is slow and goes on is served, however long it takes.
    let mut stream = connected(&cluster, whole.as_bytes()).await?;
    for part in body.as_bytes().chunks(body.len() / 8) {
        tokio::time::sleep(PATIENCE / 4).await;
        stream.write_all(part).await?;
    }
    let mut answer = vec![0; STATUS_BYTES as usize];
    tokio::time::timeout(DEADLINE, stream.read_exact(&mut answer)).await.context("no answer")??;
    ensure!(answer == b"HTTP/1.1 200", "{}", String::from_utf8_lossy(&answer));
    ensure!(points.count(None).await? == 1, "what was sent slowly is not there");
    cluster.finish()
}

/// Reads until the node ends the connection, within so long.
async fn ended(mut stream: TcpStream, limit: Duration) -> Result<()> {
    let ended = tokio::time::timeout(limit, stream.read_to_end(&mut Vec::new())).await;
    // A reset is an end as well.
    drop(ended.with_context(|| format!("the node still waits after {limit:?}"))?);
    Ok(())
}

#[tokio::test]
async fn a_connection_is_kept_between_requests_and_not_for_good() -> Result<()> {
    let (header, idle) = (PATIENCE.as_secs(), IDLE.as_secs());
    let (_dir, cluster) = limited(&format!("header_seconds = {header}\nidle_seconds = {idle}")).await?;
    let address = cluster.node(0).http_address();
    let request = format!("GET /health/live HTTP/1.1\r\nhost: {address}\r\n\r\n");
    let mut stream = connected(&cluster, request.as_bytes()).await?;
    let silent = connected(&cluster, PREFACE).await?;

    for _ in 0..2 {
        let mut status = [0; STATUS_BYTES as usize];
        let answered = tokio::time::timeout(DEADLINE, stream.read_exact(&mut status)).await;
        answered.context("no answer")?.context("an idle connection was cut")?;
        ensure!(&status == b"HTTP/1.1 200", "{}", String::from_utf8_lossy(&status));
        // Longer than the first headers may take.
        tokio::time::sleep(PATIENCE + PATIENCE / 2).await;
        // The rest of the answer.
        drop(stream.try_read(&mut [0; 4096]));
        stream.write_all(request.as_bytes()).await?;
    }
    // Nobody answers when it is asked whether it is there.
    ended(silent, IDLE + PATIENCE + DEADLINE).await?;
    ended(stream, IDLE + DEADLINE).await?;
    cluster.finish()
}

#[tokio::test]
async fn more_requests_than_there_may_be_are_told_to_come_again() -> Result<()> {
    const AT_ONCE: usize = 3;
    let (_dir, cluster) = limited(&format!("concurrent_requests = {AT_ONCE}")).await?;
    let client = cluster.client(0);
    let points = Points::of(client, "c");
    points.create(1, 1).await?;

    // Requests whose bodies do not come are there all the same.
    let unfinished = head(&cluster, "content-length: 1000") + "{";
    let mut waiting = Vec::new();
    for _ in 0..AT_ONCE {
        waiting.push(connected(&cluster, unfinished.as_bytes()).await?);
    }
    let refused = wait_until(DEADLINE, "the node to be full", || async {
        let reply = client.once(&Request::get("/collections")).await?;
        Ok((reply.status == 429).then_some(reply))
    })
    .await?;
    ensure!(refused.header("retry-after") == Some("1"), "{:?}", refused.headers);
    let codes = [("/collections", "/status/code"), ("/v1/files", "/error/code"), ("/admin/cluster", "/code")];
    for (path, code) in codes {
        let reply = client.once(&Request::get(path)).await?;
        let said: Value = reply.json()?;
        ensure!(reply.status == 429, "{path} is answered {} {said}", reply.status);
        ensure!(said.pointer(code) == Some(&json!("busy")), "not in the shape of its surface: {said}");
    }
    // A busy node is not a dead one.
    for path in ["/health/live", "/health/ready", "/readyz"] {
        let reply = client.once(&Request::get(path)).await?;
        ensure!(reply.status == 200, "{path} is answered {} {}", reply.status, reply.text());
    }
    drop(waiting);
    // The client comes again until it is let in.
    points.upsert(&[point(1, json!({}))]).await?;
    cluster.finish()
}
