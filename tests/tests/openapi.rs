//! `/openapi.json` and what is served are the same: what it lists answers, and what clients use
//! is listed (`clients.rs` compares the routes that the official clients took).

use anyhow::{Context, Result, ensure};
use serde_json::Value;
use shoal_tests::{Cluster, Request};

#[tokio::test(flavor = "multi_thread")]
async fn every_listed_operation_is_served() -> Result<()> {
    let cluster = Cluster::of(1).start().await?;
    let client = cluster.client(0);
    let document = client.json(&Request::get("/openapi.json")).await?;
    ensure!(document["openapi"].as_str().is_some_and(|version| version.starts_with("3.1")), "{document:#}");
    let paths = document["paths"].as_object().context("no paths")?;
    ensure!(paths.len() > 30, "only {} paths are listed", paths.len());
    let mut ids = std::collections::BTreeSet::new();
    for (path, operations) in paths {
        for (method, operation) in operations.as_object().context("operations by method")? {
            let id = operation["operationId"].as_str().context("an operation without an id")?;
            ensure!(ids.insert(id.to_owned()), "{id} names two operations");
            ensure!(operation["summary"].is_string(), "{id} says nothing about itself");
            check_references(&document, operation)?;
            let method = method.to_uppercase();
            let asked = path.replace(['{', '}'], "");
            let request =
                Request::raw(method_name(&method)?, asked.clone(), "application/json", b"{".to_vec());
            let reply = client.once(&request).await?;
            let said = reply.text();
            let is_unknown = said.contains("no such path") || reply.status == 405;
            ensure!(!is_unknown, "{id} is listed, but {method} {asked} is answered {} {said}", reply.status);
            ensure!(reply.status < 500, "{id}: {method} {asked} is answered {} {said}", reply.status);
        }
    }
    // What is not listed is not served.
    let reply = client.once(&Request::get("/no/such/path")).await?;
    ensure!(reply.status == 404 && reply.text().contains("no such path"), "{}", reply.text());
    cluster.finish()
}

/// Every `$ref` leads somewhere.
fn check_references(document: &Value, value: &Value) -> Result<()> {
    match value {
        Value::Object(map) => {
            if let Some(Value::String(reference)) = map.get("$ref") {
                let pointer = reference.trim_start_matches('#');
                let target =
                    document.pointer(pointer).with_context(|| format!("{reference} leads nowhere"))?;
                // Schemas do not refer to themselves.
                check_references(document, target)?;
            }
            map.values().try_for_each(|value| check_references(document, value))
        }
        Value::Array(items) => items.iter().try_for_each(|item| check_references(document, item)),
        _ => Ok(()),
    }
}

fn method_name(method: &str) -> Result<&'static str> {
    ["GET", "PUT", "POST", "DELETE"].into_iter().find(|known| *known == method).context("a known method")
}
