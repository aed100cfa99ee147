//! Prometheus itself, as Debian packages it, scrapes three nodes: it accepts the rules and evaluates each
//! of them, understands every query of the dashboard, and sees a node that dies.

use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use serde_json::{Value, json};
use shoal_tests::binary::target_dir;
use shoal_tests::{Client, Cluster, KEY, Ports, Request, skip, wait_until};

/// How long Prometheus may take to see what is to be seen.
const DEADLINE: Duration = Duration::from_secs(60);

fn workspace() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("..")
}

/// The folder with `prometheus` and `promtool`. The package is fetched and unpacked, not installed: nothing
/// runs afterwards that did not run before.
fn binaries() -> Result<PathBuf> {
    let dir = target_dir()?.join("prometheus");
    let bin = dir.join("usr/bin");
    if bin.join("promtool").is_file() {
        return Ok(bin);
    }
    std::fs::create_dir_all(&dir)?;
    let fetched = Command::new("apt-get").args(["download", "-q", "prometheus"]).current_dir(&dir).output();
    let fetched = fetched.context("no apt-get")?;
    ensure!(fetched.status.success(), "{}", String::from_utf8_lossy(&fetched.stderr).trim());
    let is_package = |path: &PathBuf| path.extension().is_some_and(|extension| extension == "deb");
    let package = std::fs::read_dir(&dir)?.filter_map(|entry| Some(entry.ok()?.path())).find(is_package);
    let package = package.context("apt-get has fetched nothing")?;
    let unpacked =
        Command::new("dpkg-deb").arg("-x").arg(package).arg(&dir).status().context("no dpkg-deb")?;
    ensure!(unpacked.success(), "the package cannot be unpacked");
    Ok(bin)
}

/// A Prometheus server of its own.
struct Prometheus {
    process: Child,
    client: Client,
    _dir: tempfile::TempDir,
}

impl Prometheus {
    /// Scrapes all nodes every second, with the rules that are shipped.
    fn start(bin: &Path, cluster: &Cluster) -> Result<Prometheus> {
        let dir = tempfile::tempdir()?;
        let targets: Vec<String> = (0..cluster.len()).map(|at| cluster.node(at).http_address()).collect();
        let rules = workspace().join("deploy/prometheus/rules.yml").canonicalize()?;
        let config = json!({
            "global": {"scrape_interval": "1s", "evaluation_interval": "1s"},
            "rule_files": [rules],
            "scrape_configs": [{
                "job_name": "shoal", "authorization": {"credentials": KEY},
                "static_configs": [{"targets": targets}],
            }],
        });
        // JSON is YAML.
        std::fs::write(dir.path().join("prometheus.yml"), config.to_string())?;
        let address = format!("127.0.0.1:{}", Ports::reserve()?.http);
        let process = Command::new(bin.join("prometheus"))
            .arg(format!("--config.file={}", dir.path().join("prometheus.yml").display()))
            .arg(format!("--storage.tsdb.path={}", dir.path().join("data").display()))
            .arg(format!("--web.listen-address={address}"))
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(Stdio::null())
            .spawn()?;
        Ok(Prometheus { process, client: Client::new(vec![address], None), _dir: dir })
    }

    async fn query(&self, expression: &str) -> Result<Vec<Value>> {
        let encoded: String = expression.bytes().map(|byte| format!("%{byte:02X}")).collect();
        let answer = self.client.json(&Request::get(format!("/api/v1/query?query={encoded}"))).await?;
        let result = answer["data"]["result"].as_array();
        Ok(result.with_context(|| format!("{expression}: {answer}"))?.clone())
    }

    async fn rules(&self) -> Result<Vec<Value>> {
        let answer = self.client.json(&Request::get("/api/v1/rules")).await?;
        let groups = answer["data"]["groups"].as_array().context("no groups")?;
        Ok(groups.iter().filter_map(|group| group["rules"].as_array()).flatten().cloned().collect())
    }
}

impl Drop for Prometheus {
    fn drop(&mut self) {
        drop(self.process.kill());
        drop(self.process.wait());
    }
}

/// Every query of the dashboard, for all nodes.
fn dashboard() -> Result<Vec<String>> {
    let text = std::fs::read_to_string(workspace().join("deploy/grafana/dashboards/shoal.json"))?;
    let dashboard: Value = serde_json::from_str(&text)?;
    let panels = dashboard["panels"].as_array().context("no panels")?;
    let inner = panels.iter().filter_map(|panel| panel["panels"].as_array()).flatten();
    let targets = panels.iter().chain(inner).filter_map(|panel| panel["targets"].as_array()).flatten();
    let queries = targets.filter_map(|target| target["expr"].as_str());
    Ok(queries.map(|query| query.replace("$instance", ".*").replace("$__rate_interval", "1m")).collect())
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn prometheus_scrapes_three_nodes_and_sees_one_die() -> Result<()> {
    let bin = match binaries() {
        Ok(bin) => bin,
        Err(reason) => {
            skip("prometheus_scrapes_three_nodes_and_sees_one_die", &format!("{reason:#}"));
            return Ok(());
        }
    };
    for (what, file) in [
        (&["check", "rules"][..], "deploy/prometheus/rules.yml"),
        (&["test", "rules"], "tests/deploy/rules_test.yml"),
    ] {
        let checked =
            Command::new(bin.join("promtool")).args(what).arg(file).current_dir(workspace()).output()?;
        let said = [checked.stdout, checked.stderr].concat();
        ensure!(checked.status.success(), "{file}: {}", String::from_utf8_lossy(&said));
    }

    let mut cluster = Cluster::of(3).start().await?;
    let prometheus = Prometheus::start(&bin, &cluster)?;
    wait_until(DEADLINE, "all nodes to be scraped", || async {
        Ok((prometheus.query("up{job=\"shoal\"} == 1").await?.len() == 3).then_some(()))
    })
    .await?;
    let queries = dashboard()?;
    ensure!(queries.len() > 20, "the dashboard has {} queries", queries.len());
    for query in queries {
        prometheus.query(&query).await?;
    }
    let nodes = prometheus.query("max(shoal_nodes{job=\"shoal\"})").await?;
    ensure!(nodes[0]["value"][1] == json!("3"), "{nodes:?}");
    wait_until(DEADLINE, "every rule to be evaluated", || async {
        let rules = prometheus.rules().await?;
        ensure!(rules.len() > 10, "{} rules", rules.len());
        let bad = rules.iter().find(|rule| rule["health"] != "ok");
        ensure!(bad.is_none(), "{bad:?}");
        Ok(Some(()))
    })
    .await?;
    let down = |rules: Vec<Value>| rules.into_iter().find(|rule| rule["name"] == "ShoalNodeDown");
    let calm = down(prometheus.rules().await?).context("no rule ShoalNodeDown")?;
    ensure!(calm["state"] == "inactive", "{calm}");

    cluster.node_mut(2).kill()?;
    wait_until(DEADLINE, "the dead node to be seen", || async {
        let rule = down(prometheus.rules().await?).context("no rule ShoalNodeDown")?;
        Ok((rule["state"] != "inactive").then_some(()))
    })
    .await?;
    cluster.finish()
}
