//! The official Python clients work against a node as they do against the originals.
//!
//! The scripts are in `tests/python`. Where what they need cannot be installed the tests are skipped.

use std::collections::BTreeSet;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use shoal_tests::python::{environment, output, scripts};
use shoal_tests::{Cluster, KEY, Request, models, say, skip};

/// How long a script may take.
const SCRIPT_TIMEOUT: Duration = Duration::from_secs(300);

#[tokio::test]
async fn the_qdrant_client_works() -> Result<()> {
    run("the_qdrant_client_works", "test_qdrant.py").await
}

#[tokio::test]
async fn the_openai_client_works() -> Result<()> {
    if models().is_none() {
        skip("the_openai_client_works", "there are no models");
        return Ok(());
    }
    run("the_openai_client_works", "test_openai.py").await
}

async fn run(name: &str, script: &str) -> Result<()> {
    let script_file = scripts().join(script);
    ensure!(script_file.is_file(), "{} is missing", script_file.display());
    let python = match environment("requirements.txt").await {
        Ok(python) => python,
        Err(reason) => {
            skip(name, &format!("{reason:#}"));
            return Ok(());
        }
    };
    let snapshots = tempfile::tempdir()?;
    let target = snapshots.path().to_str().context("text")?;
    let cluster = Cluster::of(1).env("SHOAL_BACKUP_TARGET", target).start().await?;
    let address = format!("http://{}", cluster.node(0).http_address());
    let arguments = [script_file.into_os_string(), address.into(), KEY.into()];
    let output = output(&python, arguments, SCRIPT_TIMEOUT).await?;
    let said = [output.stdout, output.stderr].concat();
    let said = String::from_utf8_lossy(&said);
    ensure!(output.status.success(), "{script}: {}\n{said}", output.status);
    say(format!("{script}: {}", said.trim_end()));
    every_route_is_described(&cluster).await?;
    cluster.finish()
}

/// The routes that were taken, as the metrics name them, all stand in `/openapi.json`.
async fn every_route_is_described(cluster: &Cluster) -> Result<()> {
    let client = cluster.client(0);
    let document = client.json(&Request::get("/openapi.json")).await?;
    let metrics = client.succeed(&Request::get("/metrics")).await?.text();
    let routes: BTreeSet<&str> = metrics
        .split("path=\"")
        .skip(1)
        .filter_map(|rest| rest.split('"').next())
        .filter(|route| *route != "none")
        .collect();
    ensure!(routes.len() >= 8, "the client has taken few routes: {routes:?}");
    let missing: Vec<_> = routes.iter().filter(|route| document["paths"][**route].is_null()).collect();
    ensure!(missing.is_empty(), "served and not described: {missing:?}");
    Ok(())
}
