//! What the dashboard and the alert rules ask for is what a real node exports.

use std::path::Path;
use std::process::Command;
use std::time::Duration;

use anyhow::{Result, ensure};
use serde_json::json;
use shoal_tests::{Cluster, KEY, Store, models, skip};

#[tokio::test(flavor = "multi_thread")]
async fn every_metric_that_is_asked_for_is_exported() -> Result<()> {
    if models().is_none() {
        skip("every_metric_that_is_asked_for_is_exported", "no models; run `make model`");
        return Ok(());
    }
    let cluster = Cluster::of(1).start().await?;
    // Histograms are exported once they have seen something: one document passes every part.
    let store = Store::create(cluster.client(0), "metrics").await?;
    let file = store.add(cluster.client(0), "one.txt", "one document is enough", json!({})).await?;
    store.completed(cluster.client(0), &[file], Duration::from_secs(60)).await?;
    let script = Path::new(env!("CARGO_MANIFEST_DIR")).join("deploy/check_metrics.py");
    let url = format!("http://{}/metrics", cluster.node(0).http_address());
    let output = Command::new("python3").arg(script).arg(url).args(["--api-key", KEY]).output()?;
    ensure!(
        output.status.success(),
        "{}{}",
        String::from_utf8_lossy(&output.stdout),
        String::from_utf8_lossy(&output.stderr)
    );
    cluster.finish()
}
