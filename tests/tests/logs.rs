//! The log of a node: one JSON object a line, one line for each request, the id of the request in all that is
//! said about it and in its answer, and a level that is changed while the node runs.

use anyhow::{Context, Result, ensure};
use serde_json::{Value, json};
use shoal_tests::{Client, Cluster, Node, Points, Request, point};

const ID: &str = "x-request-id";

/// All lines of a node's log. A node writes its line before it answers, so what was answered is there.
fn lines(node: &Node) -> Result<Vec<Value>> {
    let parse = |line: &str| serde_json::from_str(line).with_context(|| format!("not JSON: {line:?}"));
    node.log().lines().map(parse).collect()
}

/// The lines about one request.
fn lines_about(node: &Node, id: &str) -> Result<Vec<Value>> {
    let lines = lines(node)?;
    Ok(lines.into_iter().filter(|line| line["span"]["request_id"] == id).collect())
}

async fn set_level(client: &Client, level: &str, id: &str) -> Result<()> {
    let request = Request::post("/admin/log-level", &json!({"level": level})).header(ID, id);
    let reply = client.succeed(&request).await?;
    ensure!(reply.json()?["level"] == level, "{}", reply.text());
    Ok(())
}

#[tokio::test]
async fn every_request_has_a_line_with_its_id() -> Result<()> {
    let cluster = Cluster::of(1).env("SHOAL_LOG_FORMAT", "json").start().await?;
    let (node, client) = (cluster.node(0), cluster.client(0));
    let points = Points::of(client, "fish");
    points.create(1, 1).await?;

    let upsert = points.upsert_request(&[point(1, json!({}))]).header(ID, "client-1:a");
    let reply = client.succeed(&upsert).await?;
    ensure!(reply.header(ID) == Some("client-1:a"), "the answer has the id {:?}", reply.header(ID));
    let about = lines_about(node, "client-1:a")?;
    let of_request: Vec<&Value> = about.iter().filter(|line| line["message"] == "request").collect();
    let [line] = of_request.as_slice() else { anyhow::bail!("not one line: {about:?}") };
    let wanted = json!({
        "level": "INFO", "message": "request", "method": "PUT", "path": "/collections/fish/points",
        "route": "/collections/{collection}/points", "status": 200,
    });
    for (field, value) in wanted.as_object().context("an object")? {
        ensure!(line[field.as_str()] == *value, "{field} is not {value}: {line}");
    }
    ensure!(line["milliseconds"].as_f64().is_some_and(|time| time > 0.0), "no duration: {line}");
    ensure!(line["timestamp"].is_string() && line["target"].is_string(), "{line}");

    // Whoever gives none, or one that would spoil the log, is given one.
    for given in [None, Some(""), Some("two words"), Some("{\"a\":1}")] {
        let request = Request::get("/collections/missing");
        let request = given.into_iter().fold(request, |request, id| request.header(ID, id));
        let reply = client.once(&request).await?;
        let id = reply.header(ID).context("an answer without an id")?;
        ensure!(id.len() == 36 && Some(id) != given, "{given:?} became {id:?}");
        let about = lines_about(node, id)?;
        let has_status = about.iter().any(|line| line["status"] == 404 && line["level"] == "INFO");
        ensure!(has_status, "no line of the refusal: {about:?}");
    }

    // Probes come every few seconds, for ever.
    for path in ["/health/live", "/health/ready", "/health", "/healthz", "/metrics"] {
        client.succeed(&Request::get(path).header(ID, "probe")).await?;
    }
    let about = lines_about(node, "probe")?;
    ensure!(about.is_empty(), "{about:?}");
    cluster.finish()
}

#[tokio::test]
async fn the_level_is_changed_while_the_node_runs() -> Result<()> {
    let cluster = Cluster::of(1).env("SHOAL_LOG_FORMAT", "json").env("SHOAL_LOG_LEVEL", "warn");
    let cluster = cluster.start().await?;
    let (node, client) = (cluster.node(0), cluster.client(0));
    let ask = async |id: &str| client.succeed(&Request::get("/collections").header(ID, id)).await.map(drop);

    ask("at-warn").await?;
    ensure!(lines_about(node, "at-warn")?.is_empty(), "a line at info although the level is warn");

    // The change itself is said at `warn`, by a request that began under the old level: the id is there.
    set_level(client, "info", "to-info").await?;
    let about = lines_about(node, "to-info")?;
    let has_warned = |line: &Value| line["level"] == "WARN" && line["message"] == "the log level was changed";
    ensure!(about.iter().any(has_warned), "a warning without the id of its request: {:?}", lines(node)?);
    ask("at-info").await?;
    ensure!(!lines_about(node, "at-info")?.is_empty(), "no line at info");

    set_level(client, "warn,shoal=debug", "to-debug").await?;
    client.succeed(&Request::get("/health/live").header(ID, "probe")).await?;
    let about = lines_about(node, "probe")?;
    ensure!(about.iter().any(|line| line["level"] == "DEBUG"), "no line of a probe at debug: {about:?}");

    set_level(client, "error", "to-error").await?;
    ask("at-error").await?;
    ensure!(lines_about(node, "at-error")?.is_empty(), "a line at info although the level is error");

    for (body, field) in [(json!({"level": "shoal=loud"}), "level"), (json!({"lvl": "info"}), "lvl")] {
        let reply = client.once(&Request::post("/admin/log-level", &body)).await?;
        ensure!(reply.status == 400 && reply.text().contains(field), "{} {}", reply.status, reply.text());
    }
    cluster.finish()
}
