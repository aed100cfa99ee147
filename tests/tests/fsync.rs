//! The disk fails to sync: the node acknowledges nothing from then on, stops with exit code 74,
//! and has everything that it did acknowledge when it is back on a disk that works.
//!
//! The failing disk is a library in front of libc (`LD_PRELOAD`) whose `fsync` and `fdatasync`
//! return `EIO` once a trigger file exists.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use anyhow::{Result, ensure};
use futures::future::join_all;
use serde_json::{Value, json};
use shoal_tests::{Cluster, Freshness, Points, point, skip};

/// What a node exits with when its log could not be made durable.
const EXIT_LOG_FAILED: i32 = 74;

const SHIM: &str = r#"
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <stdlib.h>
#include <unistd.h>

static int sync_with(const char *name, int fd) {
    const char *trigger = getenv("FAILING_SYNC_TRIGGER");
    int (*real)(int);
    if (trigger && access(trigger, F_OK) == 0) {
        errno = EIO;
        return -1;
    }
    real = (int (*)(int))dlsym(RTLD_NEXT, name);
    return real(fd);
}

int fsync(int fd) { return sync_with("fsync", fd); }
int fdatasync(int fd) { return sync_with("fdatasync", fd); }
"#;

#[tokio::test]
async fn a_failed_sync_is_never_acknowledged_and_stops_the_node() -> Result<()> {
    let dir = tempfile::tempdir()?;
    let Some(shim) = compile_shim(dir.path())? else {
        skip("a_failed_sync_is_never_acknowledged_and_stops_the_node", "there is no C compiler (cc)");
        return Ok(());
    };
    let trigger = dir.path().join("trigger");
    let builder = Cluster::of(1).env("LD_PRELOAD", &shim.display().to_string());
    let mut cluster = builder.env("FAILING_SYNC_TRIGGER", &trigger.display().to_string()).start().await?;
    let client = cluster.client(0).clone();
    let points = Points::of(&client, "c");
    points.create(2, 1).await?;
    let mut acknowledged = BTreeMap::new();
    for id in 1..=100 {
        points.upsert(&[point(id, json!({"n": id}))]).await?;
        acknowledged.insert(id, json!({"n": id}));
    }

    std::fs::write(&trigger, "")?;
    let attempted: Vec<u64> = (101..=116).collect();
    let requests: Vec<_> =
        attempted.iter().map(|id| points.upsert_request(&[point(*id, json!({"n": id}))])).collect();
    for outcome in join_all(requests.iter().map(|request| client.once(request))).await {
        // No answer at all is what a client of a dying node sees.
        let Ok(reply) = outcome else { continue };
        ensure!(!reply.is_success(), "a write was acknowledged that was not synced: {}", reply.text());
        ensure!(reply.status >= 500, "the disk's failure is called {}: {}", reply.status, reply.text());
    }
    let code = cluster.node_mut(0).exited(Duration::from_secs(30)).await?;
    ensure!(code == Some(EXIT_LOG_FAILED), "it exited with {code:?}");

    std::fs::remove_file(&trigger)?;
    cluster.node_mut(0).unset_env("LD_PRELOAD");
    cluster.restart(0).await?;
    let points = points.at(Freshness::Linearizable);
    let found: BTreeMap<u64, Value> = points.get(&acknowledged.keys().copied().collect::<Vec<_>>()).await?;
    ensure!(found == acknowledged, "{} of {} acknowledged points are there", found.len(), acknowledged.len());
    // What was not acknowledged may be there or not, but only once and only what was sent.
    let maybe = points.get(&attempted).await?;
    ensure!(maybe.iter().all(|(id, payload)| payload["n"] == *id), "a point is there that was not sent");
    ensure!(points.count(None).await? == (found.len() + maybe.len()) as u64, "a point is there twice");
    points.upsert(&[point(200, json!({"n": 200}))]).await?;
    // The log's writer panics on a failed sync, which is part of the plan here.
    cluster.finish_despite_panics()
}

/// Compiles the library; `None` when there is no compiler.
fn compile_shim(dir: &Path) -> Result<Option<PathBuf>> {
    let (source, library) = (dir.join("shim.c"), dir.join("shim.so"));
    std::fs::write(&source, SHIM)?;
    let mut command = Command::new("cc");
    command.args(["-shared", "-fPIC", "-O1", "-o"]).arg(&library).arg(&source).arg("-ldl");
    let output = match command.output() {
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => return Ok(None),
        output => output?,
    };
    ensure!(
        output.status.success(),
        "the shim does not compile: {}",
        String::from_utf8_lossy(&output.stderr)
    );
    Ok(Some(library))
}
