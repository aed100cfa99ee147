//! A cluster of real nodes in one temporary directory, and what can be asked about it as a whole.

use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use serde_json::json;
use tempfile::TempDir;
use tokio::sync::{Mutex, MutexGuard};

use crate::client::{Client, Request};
use crate::documents;
use crate::node::{KEY, Node};
use crate::settled::{check_converged, check_settled};
use crate::view::View;
use crate::wait::{say, wait_until};

/// How long the cluster may take to do what it does by itself: elect, replicate, catch up.
const SETTLE_DEADLINE: Duration = Duration::from_secs(90);

/// How long placement may take to come to rest.
const REST_DEADLINE: Duration = Duration::from_secs(180);

/// One cluster at a time in a test process: they share two cores and one disk.
pub(crate) static ALONE: Mutex<()> = Mutex::const_new(());

/// A cluster to be started.
pub struct Builder {
    count: usize,
    env: Vec<(String, String)>,
    binary: Option<PathBuf>,
}

/// A running cluster. A test ends with [`Cluster::finish`]; when the cluster is dropped before,
/// the test has failed, and the data and the logs stay.
pub struct Cluster {
    nodes: Vec<Node>,
    env: Vec<(String, String)>,
    models: PathBuf,
    dir: TempDir,
    is_finished: bool,
    _alone: MutexGuard<'static, ()>,
}

impl Builder {
    /// Sets an environment variable of every node.
    pub fn env(mut self, name: &str, value: &str) -> Builder {
        self.env.push((name.to_owned(), value.to_owned()));
        self
    }

    /// Starts the nodes with another binary than the one under test.
    pub fn binary(mut self, binary: &Path) -> Builder {
        self.binary = Some(binary.to_owned());
        self
    }

    /// Starts the nodes together and waits until they are one settled cluster.
    ///
    /// # Errors
    /// When that does not happen in time.
    pub async fn start(self) -> Result<Cluster> {
        let alone = ALONE.lock().await;
        let dir = tempfile::Builder::new().prefix("shoal-test-").tempdir()?;
        // Without models a node serves points; the tests of documents say that they are skipped.
        let models = documents::models().unwrap_or_else(|| dir.path().join("no-models"));
        std::fs::create_dir_all(&models)?;
        let (env, nodes) = (self.env, Vec::new());
        let mut cluster = Cluster { nodes, env, models, dir, is_finished: false, _alone: alone };
        for _ in 0..self.count {
            cluster.push_node()?;
        }
        if let Some(binary) = &self.binary {
            cluster.nodes.iter_mut().for_each(|node| node.set_binary(binary));
        }
        cluster.introduce();
        cluster.start_all().await?;
        cluster.settled().await?;
        Ok(cluster)
    }
}

impl Cluster {
    /// A cluster of so many nodes.
    pub fn of(count: usize) -> Builder {
        Builder { count, env: Vec::new(), binary: None }
    }

    /// How many nodes it has, running or not.
    pub fn len(&self) -> usize {
        self.nodes.len()
    }

    /// Whether it has no node at all, which no test wants.
    pub fn is_empty(&self) -> bool {
        self.nodes.is_empty()
    }

    /// A node by its place, from 0.
    pub fn node(&self, at: usize) -> &Node {
        &self.nodes[at]
    }

    /// A node by its place, from 0.
    pub fn node_mut(&mut self, at: usize) -> &mut Node {
        &mut self.nodes[at]
    }

    /// A client of one node alone.
    pub fn client(&self, at: usize) -> &Client {
        self.nodes[at].client()
    }

    /// A client of all nodes but these: it goes on to the next when one does not answer.
    pub fn any_but(&self, without: &[usize]) -> Client {
        let nodes = self.nodes.iter().enumerate().filter(|(at, _)| !without.contains(at));
        Client::new(nodes.map(|(_, node)| node.http_address()).collect(), Some(KEY))
    }

    /// A client of all nodes: it goes on to the next when one does not answer.
    pub fn any(&self) -> Client {
        self.any_but(&[])
    }

    fn push_node(&mut self) -> Result<()> {
        let name = format!("n{}", self.nodes.len() + 1);
        let node = Node::new(&name, &self.dir.path().join(&name), &self.models, &self.env)?;
        self.nodes.push(node);
        Ok(())
    }

    /// Tells every node the present addresses of the others, for its next start.
    pub fn introduce(&mut self) {
        let addresses: Vec<String> = self.nodes.iter().map(Node::grpc_address).collect();
        for (at, node) in self.nodes.iter_mut().enumerate() {
            let others = addresses.iter().enumerate().filter(|(other, _)| *other != at);
            node.introduce(others.map(|(_, address)| address.clone()).collect(), addresses.len());
        }
    }

    /// Starts one more node, which joins the others, and returns its place when it is ready.
    ///
    /// # Errors
    /// When it does not become ready in time.
    pub async fn add_node(&mut self) -> Result<usize> {
        let at = self.place_node()?;
        self.restart(at).await?;
        Ok(at)
    }

    /// Makes one more node, which knows the others, and does not start it.
    ///
    /// # Errors
    /// When no port is free.
    pub fn place_node(&mut self) -> Result<usize> {
        self.push_node()?;
        self.introduce();
        Ok(self.nodes.len() - 1)
    }

    /// Starts a node that does not run and waits until it is ready.
    ///
    /// # Errors
    /// When it does not become ready in time.
    pub async fn restart(&mut self, at: usize) -> Result<()> {
        self.nodes[at].start()?;
        self.nodes[at].ready().await
    }

    /// Starts all nodes, which do not run, and waits until all are ready.
    ///
    /// # Errors
    /// When they do not become ready in time.
    pub async fn start_all(&mut self) -> Result<()> {
        self.nodes.iter_mut().try_for_each(Node::start)?;
        for node in &mut self.nodes {
            node.ready().await?;
        }
        Ok(())
    }

    /// Kills all nodes at once (SIGKILL).
    ///
    /// # Errors
    /// When one does not run.
    pub fn kill_all(&mut self) -> Result<()> {
        self.nodes.iter().try_for_each(Node::strike)?;
        self.nodes.iter_mut().try_for_each(Node::kill)
    }

    /// The shards of a collection, by the order of their ranges.
    ///
    /// # Errors
    /// When no node knows the collection.
    pub async fn shards(&self, collection: &str) -> Result<Vec<u64>> {
        wait_until(SETTLE_DEADLINE, &format!("collection {collection}"), || async {
            let views = self.views().await?;
            Ok(views.iter().find_map(|(_, view)| Some(view.collection(collection)?.shards.clone())))
        })
        .await
    }

    /// The place of the node that leads a group (0: the control group). Of two that think so,
    /// the one with the higher term does.
    ///
    /// # Errors
    /// When nobody leads it in time.
    pub async fn leader(&self, group: u64) -> Result<usize> {
        wait_until(SETTLE_DEADLINE, &format!("a leader of group {group}"), || async {
            let views = self.views().await?;
            let seen = views.iter().filter_map(|(at, view)| Some((*at, view.group(group)?)));
            let leads = seen.filter(|(_, seen)| seen.is_leader());
            Ok(leads.max_by_key(|(_, seen)| seen.term).map(|(at, _)| at))
        })
        .await
    }

    /// Waits until nothing is left to be done about membership: every shard has all replicas
    /// that it wants as voters, the control group has its voters, and everybody knows every
    /// leader.
    ///
    /// # Errors
    /// When that does not happen in time; the message says what is missing.
    pub async fn settled(&self) -> Result<()> {
        wait_until(SETTLE_DEADLINE, "the cluster to settle", || async {
            check_settled(&self.views().await?, self.nodes.len())?;
            Ok(Some(()))
        })
        .await
    }

    /// Waits until placement has nothing to do and the nodes in use hold as many replicas each as is right.
    ///
    /// # Errors
    /// When that does not happen in time; the message says what is left to do.
    pub async fn rested(&self, is_right: impl Fn(&[usize]) -> bool) -> Result<()> {
        wait_until(REST_DEADLINE, "placement to come to rest", || async {
            let report = self.any().json(&Request::get("/admin/cluster/report")).await?;
            let plan = &report["placement"];
            for part in ["steps", "moving", "waiting"] {
                let left = plan[part].as_array().with_context(|| format!("no plan: {plan}"))?;
                ensure!(left.is_empty(), "{part}: {left:?}");
            }
            let nodes = report["nodes"].as_array().context("no nodes")?.iter();
            let used = nodes.filter(|node| node["answers"] == json!(true) && node["drain"] == json!("no"));
            let spread: Vec<usize> =
                used.filter_map(|node| Some(node["replicas"].as_u64()? as usize)).collect();
            // The plan may be that of a moment ago.
            ensure!(is_right(&spread), "the nodes hold {spread:?} replicas");
            Ok(Some(()))
        })
        .await
    }

    /// Waits until every running replica of every group has applied the whole log.
    ///
    /// # Errors
    /// When that does not happen in time; the message says which group lags.
    pub async fn converged(&self) -> Result<()> {
        wait_until(SETTLE_DEADLINE, "the replicas to converge", || async {
            check_converged(&self.views().await?)?;
            Ok(Some(()))
        })
        .await
    }

    /// What every running node says of the cluster, with its place.
    async fn views(&self) -> Result<Vec<(usize, View)>> {
        let mut views = Vec::new();
        for (at, node) in self.nodes.iter().enumerate().filter(|(_, node)| node.is_running()) {
            views.push((at, node.view().await?));
        }
        Ok(views)
    }

    /// Ends a test that has passed: no node may have panicked.
    ///
    /// # Errors
    /// When a log has a panic.
    pub fn finish(self) -> Result<()> {
        self.nodes.iter().try_for_each(Node::check_panics)?;
        self.finish_despite_panics()
    }

    /// Ends a test that has passed and in which a panic is part of the plan.
    ///
    /// # Errors
    /// When a node cannot be killed.
    pub fn finish_despite_panics(mut self) -> Result<()> {
        self.nodes.iter_mut().try_for_each(Node::kill)?;
        self.is_finished = true;
        Ok(())
    }
}

impl Drop for Cluster {
    fn drop(&mut self) {
        // A failed kill is met again, and ignored, when the node is dropped.
        drop(self.nodes.iter_mut().try_for_each(Node::kill));
        if self.is_finished && std::env::var_os("SHOAL_TEST_KEEP").is_none() {
            return;
        }
        self.dir.disable_cleanup(true);
        say(format!("the data and the logs stay in {}", self.dir.path().display()));
        if !self.is_finished {
            let tail =
                |node: &Node| say(format!("--- the log of {} ends:\n{}", node.name(), node.log_tail(15)));
            self.nodes.iter().for_each(tail);
        }
    }
}
