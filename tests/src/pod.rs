//! One pod of a StatefulSet: a name and a volume that stay, and a process whose address is new at every start.
//!
//! A pod that does not exist has its next address already. What the others are told then is what DNS would
//! tell them by the time the pod runs: a real node asks DNS again and again, a simulated one hears only once, at
//! its start.

use std::sync::Arc;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use tokio::sync::Mutex;

use crate::client::Client;
use crate::kubelet::{Kubelet, Status, stop};
use crate::manifest::{Manifest, paced};
use crate::node::Node;
use crate::service::Service;
use crate::view::{self, View};

/// A pod, whether it exists now or not.
pub struct Pod {
    name: String,
    manifest: Arc<Manifest>,
    service: Service,
    node: Arc<Mutex<Node>>,
    kubelet: Option<Kubelet>,
}

/// How the process of a pod ended that was deleted.
#[derive(Clone, Debug)]
pub struct Stopped {
    /// The pod's name.
    pub pod: String,
    /// The exit code; `None` when the grace period was too short and SIGKILL ended it.
    pub code: Option<i32>,
    /// From SIGTERM to its end.
    pub took: Duration,
}

impl Pod {
    /// A pod that does not exist yet, with an empty volume.
    pub(crate) fn new(node: Node, manifest: Arc<Manifest>, service: Service) -> Pod {
        let name = node.name().to_owned();
        Pod { name, manifest, service, node: Arc::new(Mutex::new(node)), kubelet: None }
    }

    /// Its name, which is also its node's.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// Whether it exists. Its process may be starting, or be started again.
    pub fn exists(&self) -> bool {
        self.kubelet.is_some()
    }

    /// What its probes have found.
    ///
    /// # Errors
    /// When it does not exist.
    pub fn status(&self) -> Result<Status> {
        let kubelet = self.kubelet.as_ref().with_context(|| format!("{} does not exist", self.name))?;
        Ok(kubelet.status())
    }

    /// A client of this pod alone, past the service. It is of no use after the pod's end.
    pub async fn client(&self) -> Client {
        self.node.lock().await.client().clone()
    }

    /// Where clients reach it, or will.
    pub async fn http_address(&self) -> String {
        self.node.lock().await.http_address()
    }

    /// Where peers reach it, or will.
    pub(crate) async fn grpc_address(&self) -> String {
        self.node.lock().await.grpc_address()
    }

    /// How the cluster looks from here.
    ///
    /// # Errors
    /// When it does not answer.
    pub async fn view(&self) -> Result<View> {
        view::of(&self.client().await).await
    }

    /// Creates it; it looks for its peers at these addresses.
    ///
    /// # Errors
    /// When it exists, or its process cannot be started.
    pub(crate) async fn create(&mut self, join: Vec<String>) -> Result<()> {
        ensure!(!self.exists(), "{} exists", self.name);
        self.node.lock().await.introduce(join, self.manifest.expect);
        let kubelet = Kubelet::start(self.node.clone(), self.manifest.clone(), self.service.clone()).await?;
        self.kubelet = Some(kubelet);
        Ok(())
    }

    /// Deletes it: preStop, SIGTERM, and SIGKILL at the end of the grace period. The service hears of it in the
    /// middle of the preStop pause, because load balancers hear of it late.
    ///
    /// # Errors
    /// When it does not exist or cannot be stopped.
    pub async fn delete(&mut self) -> Result<Stopped> {
        self.leave().await?;
        let half = paced(self.manifest.pre_stop) / 2;
        tokio::time::sleep(half).await;
        self.service.remove(&self.name);
        tokio::time::sleep(half).await;
        let mut node = self.node.lock().await;
        let began = Instant::now();
        let code = stop(&mut node, self.manifest.grace.saturating_sub(self.manifest.pre_stop)).await?;
        let took = began.elapsed();
        node.readdress()?;
        Ok(Stopped { pod: self.name.clone(), code, took })
    }

    /// Deletes it at once (SIGKILL), as when its machine is lost.
    ///
    /// # Errors
    /// When it does not exist or cannot be killed.
    pub async fn delete_by_force(&mut self) -> Result<()> {
        self.leave().await?;
        let mut node = self.node.lock().await;
        node.kill()?;
        self.service.remove(&self.name);
        node.readdress()
    }

    /// Ends its process (SIGKILL), which is then started again in the same pod, at the same address.
    ///
    /// # Errors
    /// When it has no process.
    pub async fn crash(&self) -> Result<()> {
        self.node.lock().await.strike()
    }

    /// Takes its volume away, with everything on it.
    ///
    /// # Errors
    /// When the pod exists, or the volume cannot be deleted.
    pub async fn lose_volume(&self) -> Result<()> {
        ensure!(!self.exists(), "{} exists and uses its volume", self.name);
        let data = self.node.lock().await.data_dir();
        if data.exists() {
            std::fs::remove_dir_all(&data).with_context(|| data.display().to_string())?;
        }
        Ok(())
    }

    /// Ends a test that has passed: kills the process, which must never have panicked.
    pub(crate) async fn finish(&mut self) -> Result<()> {
        if self.exists() {
            self.leave().await?;
        }
        let mut node = self.node.lock().await;
        node.kill()?;
        node.check_panics()
    }

    /// The last lines of its log; nothing while the process is being stopped.
    pub(crate) fn log_tail(&self, count: usize) -> String {
        self.node.try_lock().map(|node| node.log_tail(count)).unwrap_or_default()
    }

    /// From now on it does not exist, and nobody starts its process again.
    async fn leave(&mut self) -> Result<()> {
        let mut kubelet = self.kubelet.take().with_context(|| format!("{} does not exist", self.name))?;
        kubelet.leave().await;
        Ok(())
    }
}
