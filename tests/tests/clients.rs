//! The official Python clients work against a node as they do against the originals.
//!
//! The scripts are in `tests/python`; what they need is installed once by pip into a virtual
//! environment in Cargo's target directory. Where that is not possible the tests are skipped.

use std::collections::BTreeSet;
use std::ffi::OsStr;
use std::path::{Path, PathBuf};
use std::process::{Output, Stdio};
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use shoal_tests::binary::target_dir;
use shoal_tests::{Cluster, KEY, Request, models, say, skip};
use tokio::process::Command;
use tokio::sync::Mutex;

/// How long pip may take.
const INSTALL_TIMEOUT: Duration = Duration::from_secs(300);
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
    let scripts = Path::new(env!("CARGO_MANIFEST_DIR")).join("python");
    ensure!(scripts.join(script).is_file(), "{} is missing", scripts.join(script).display());
    let python = match environment(&scripts.join("requirements.txt")).await {
        Ok(python) => python,
        Err(reason) => {
            skip(name, &format!("{reason:#}"));
            return Ok(());
        }
    };
    let cluster = Cluster::of(1).start().await?;
    let address = format!("http://{}", cluster.node(0).http_address());
    let arguments = [scripts.join(script).into_os_string(), address.into(), KEY.into()];
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

/// The Python of an environment that has what the scripts need. It is made anew when the
/// requirements have changed, and only once however many tests ask.
async fn environment(requirements: &Path) -> Result<PathBuf> {
    static ONE_AT_A_TIME: Mutex<()> = Mutex::const_new(());
    let _alone = ONE_AT_A_TIME.lock().await;
    let wanted = std::fs::read(requirements).with_context(|| requirements.display().to_string())?;
    let hash = blake3::hash(&wanted).to_hex();
    let dir = target_dir()?.join(format!("python-{}", &hash.as_str()[..16]));
    let (python, done) = (dir.join("bin/python"), dir.join("complete"));
    if done.is_file() {
        return Ok(python);
    }
    succeed(
        Path::new("python3"),
        ["-m", "venv", "--clear"].map(OsStr::new).into_iter().chain([dir.as_os_str()]),
    )
    .await?;
    let install = ["-m", "pip", "install", "--quiet", "--disable-pip-version-check", "-r"].map(OsStr::new);
    succeed(&python, install.into_iter().chain([requirements.as_os_str()])).await?;
    std::fs::write(done, "")?;
    Ok(python)
}

async fn succeed(program: &Path, arguments: impl IntoIterator<Item: AsRef<OsStr>>) -> Result<()> {
    let output = output(program, arguments, INSTALL_TIMEOUT).await?;
    let said = String::from_utf8_lossy(&output.stderr);
    let reason = said.lines().last().unwrap_or("no reason given");
    ensure!(output.status.success(), "{} failed: {reason}", program.display());
    Ok(())
}

async fn output(
    program: &Path,
    arguments: impl IntoIterator<Item: AsRef<OsStr>>,
    timeout: Duration,
) -> Result<Output> {
    let mut command = Command::new(program);
    command.args(arguments).stdin(Stdio::null()).kill_on_drop(true);
    let output = tokio::time::timeout(timeout, command.output()).await;
    let output = output.with_context(|| format!("{} took longer than {timeout:?}", program.display()))?;
    output.with_context(|| format!("{} does not run", program.display()))
}
