//! The StatefulSet of `k8s/base`, simulated: real `shoal serve` processes that are started, probed, stopped and
//! started again as Kubernetes would, by the numbers in the manifest.
//!
//! ```text
//!  StatefulSet ─▶ Pod ─▶ Kubelet ─▶ Node     which pods there are, one pod, its probes, its process
//!                  └────────┴─▶ Service ◀── clients
//! ```
//!
//! It promises what a StatefulSet promises: stable names and volumes, new addresses, the order of starts, stops
//! and updates, and volumes kept or deleted as the manifest says. It is not Kubernetes: pauses are [`PACE`]
//! times shorter, nothing is scheduled or evicted, and a node hears of its peers' addresses only at its start.
//!
//! [`PACE`]: crate::manifest::PACE

use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use anyhow::{Context, Result};
use futures::future::try_join_all;
use tempfile::TempDir;
use tokio::sync::MutexGuard;

use crate::client::Client;
use crate::cluster::ALONE;
use crate::component::Component;
use crate::manifest::{Manifest, PodManagement, Retention, paced};
use crate::node::Node;
use crate::pod::{Pod, Stopped};
use crate::service::Service;
use crate::settled::{check_converged, check_settled};
use crate::view::View;
use crate::wait::{say, wait_until};

/// How long a pod may take from its creation to available.
const AVAILABLE_DEADLINE: Duration = Duration::from_secs(90);
/// How long the cluster may take to do what it does by itself: elect, replicate, catch up.
const SETTLE_DEADLINE: Duration = Duration::from_secs(90);

/// The set. A test ends with [`StatefulSet::finish`]; when the set is dropped before, the test has failed, and
/// the data and the logs stay.
pub struct StatefulSet {
    manifest: Arc<Manifest>,
    pod_management: PodManagement,
    replicas: usize,
    /// By ordinal: also those that do not exist any more, because their volumes may.
    pods: Vec<Pod>,
    service: Service,
    /// What every node is told besides.
    env: Vec<(String, String)>,
    models: PathBuf,
    dir: TempDir,
    is_finished: bool,
    _alone: MutexGuard<'static, ()>,
}

impl StatefulSet {
    /// The set of the manifest before it is applied: no pod exists.
    ///
    /// # Errors
    /// When the manifest cannot be read, or no port is free.
    pub async fn new() -> Result<StatefulSet> {
        StatefulSet::with(&Component::default()).await
    }

    /// The set of the manifest with a component, before it is applied.
    ///
    /// # Errors
    /// When the manifest cannot be read, or no port is free.
    pub async fn with(component: &Component) -> Result<StatefulSet> {
        let alone = ALONE.lock().await;
        let manifest = Arc::new(component.change(Manifest::read()?));
        let dir = tempfile::Builder::new().prefix("shoal-test-").tempdir()?;
        let models = dir.path().join("no-models");
        std::fs::create_dir_all(&models)?;
        Ok(StatefulSet {
            pod_management: manifest.pod_management,
            manifest,
            replicas: 0,
            pods: Vec::new(),
            service: Service::open().await?,
            env: component.settings.clone(),
            models,
            dir,
            is_finished: false,
            _alone: alone,
        })
    }

    /// What it is made by.
    pub fn manifest(&self) -> &Manifest {
        &self.manifest
    }

    /// How many pods it is to have.
    pub fn replicas(&self) -> usize {
        self.replicas
    }

    /// A pod by its ordinal, of those that there have ever been.
    pub fn pod(&self, ordinal: usize) -> &Pod {
        &self.pods[ordinal]
    }

    /// A pod by its ordinal, of those that there have ever been.
    pub fn pod_mut(&mut self, ordinal: usize) -> &mut Pod {
        &mut self.pods[ordinal]
    }

    /// A client of the service.
    pub fn client(&self) -> Client {
        self.service.client()
    }

    /// The URL of the service.
    pub fn url(&self) -> String {
        format!("http://{}", self.service.address())
    }

    /// Creates the set with as many pods as the manifest says, and waits until all are available. How pods are
    /// managed is told here because it cannot be changed later: such a set must be deleted and created anew.
    ///
    /// # Errors
    /// When a pod does not become available in time; with `OrderedReady` the later ones do not exist then.
    pub async fn apply(&mut self, pod_management: PodManagement) -> Result<()> {
        self.pod_management = pod_management;
        self.scale(self.manifest.replicas).await?;
        Ok(())
    }

    /// Gives the set another number of pods and waits until it has them. Returns how those ended that it has no
    /// longer.
    ///
    /// # Errors
    /// When a pod does not become available in time, or cannot be stopped.
    pub async fn scale(&mut self, replicas: usize) -> Result<Vec<Stopped>> {
        self.replicas = replicas;
        let stopped = self.stop_from(replicas, self.manifest.when_scaled).await?;
        while self.pods.len() < replicas {
            let name = format!("{}-{}", self.manifest.name, self.pods.len());
            // The simulated machines have no zone, of which Kubernetes makes an empty value.
            let zone = self.manifest.zone_settings.iter().map(|setting| (setting.clone(), String::new()));
            let env: Vec<(String, String)> = self.env.iter().cloned().chain(zone).collect();
            let node = Node::new(&name, &self.dir.path().join(&name), &self.models, &env)?;
            self.pods.push(Pod::new(node, self.manifest.clone(), self.service.clone()));
        }
        for ordinal in 0..replicas {
            if !self.pods[ordinal].exists() {
                self.create(ordinal).await?;
            }
            if self.pod_management == PodManagement::OrderedReady {
                self.available(ordinal).await?;
            }
        }
        for ordinal in 0..replicas {
            self.available(ordinal).await?;
        }
        Ok(stopped)
    }

    /// Deletes the set and its pods. Returns how they ended.
    ///
    /// # Errors
    /// When one cannot be stopped.
    pub async fn delete(&mut self) -> Result<Vec<Stopped>> {
        self.replicas = 0;
        self.stop_from(0, self.manifest.when_deleted).await
    }

    /// Replaces every pod, as after `kubectl rollout restart`: from the highest ordinal down, the next when the
    /// last is available. Returns how the old ones ended.
    ///
    /// # Errors
    /// When a pod cannot be stopped, or its successor does not become available in time.
    pub async fn roll_out(&mut self) -> Result<Vec<Stopped>> {
        let mut stopped = Vec::new();
        for ordinal in (0..self.replicas).rev() {
            stopped.push(self.pods[ordinal].delete().await?);
            self.replace(ordinal).await?;
        }
        Ok(stopped)
    }

    /// Creates a pod that was deleted anew, and waits until it is available.
    ///
    /// # Errors
    /// When it exists, or does not become available in time.
    pub async fn replace(&mut self, ordinal: usize) -> Result<()> {
        self.create(ordinal).await?;
        self.available(ordinal).await
    }

    /// Waits until a pod has been ready for as long as the manifest wants it, without a break.
    ///
    /// # Errors
    /// When that does not happen in time.
    pub async fn available(&self, ordinal: usize) -> Result<()> {
        let (pod, min_ready) = (&self.pods[ordinal], paced(self.manifest.min_ready));
        let what = format!("{} to be available", pod.name());
        wait_until(AVAILABLE_DEADLINE, &what, || async {
            let since = pod.status()?.ready_since.context("it is not ready")?;
            Ok((since.elapsed() >= min_ready).then_some(()))
        })
        .await
    }

    /// Waits until the pods are one cluster of as many nodes, and nothing is left to be done about membership.
    ///
    /// # Errors
    /// When that does not happen in time; the message says what is missing.
    pub async fn settled(&self) -> Result<()> {
        wait_until(SETTLE_DEADLINE, "the pods to settle", || async {
            check_settled(&self.views().await?, self.replicas)?;
            Ok(Some(()))
        })
        .await
    }

    /// Waits until every replica of every group has applied the whole log.
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

    /// Ends a test that has passed: no node may have panicked.
    ///
    /// # Errors
    /// When a log has a panic, or a process cannot be killed.
    pub async fn finish(mut self) -> Result<()> {
        for pod in &mut self.pods {
            pod.finish().await?;
        }
        self.is_finished = true;
        Ok(())
    }

    /// What every pod that exists says of the cluster, with its ordinal.
    async fn views(&self) -> Result<Vec<(usize, View)>> {
        let mut views = Vec::new();
        for (ordinal, pod) in self.pods.iter().enumerate().filter(|(_, pod)| pod.exists()) {
            views.push((ordinal, pod.view().await?));
        }
        Ok(views)
    }

    async fn create(&mut self, ordinal: usize) -> Result<()> {
        let mut join = Vec::new();
        for peer in &self.manifest.join {
            let peer = self.pods.get(*peer).context("SHOAL_JOIN names a pod that has never been")?;
            join.push(peer.grpc_address().await);
        }
        self.pods[ordinal].create(join).await
    }

    /// Deletes the pods from an ordinal on, in the order of the set's policy, and their volumes when so told.
    async fn stop_from(&mut self, first: usize, volumes: Retention) -> Result<Vec<Stopped>> {
        let leaving = self.pods.iter_mut().skip(first).rev().filter(|pod| pod.exists());
        let stopped = match self.pod_management {
            PodManagement::Parallel => try_join_all(leaving.map(Pod::delete)).await?,
            PodManagement::OrderedReady => {
                let mut stopped = Vec::new();
                for pod in leaving {
                    stopped.push(pod.delete().await?);
                }
                stopped
            }
        };
        if volumes == Retention::Delete {
            for pod in self.pods.iter().skip(first) {
                pod.lose_volume().await?;
            }
        }
        Ok(stopped)
    }
}

impl Drop for StatefulSet {
    fn drop(&mut self) {
        if self.is_finished && std::env::var_os("SHOAL_TEST_KEEP").is_none() {
            return;
        }
        self.dir.disable_cleanup(true);
        say(format!("the data and the logs stay in {}", self.dir.path().display()));
        if !self.is_finished {
            let tail = |pod: &Pod| say(format!("--- the log of {} ends:\n{}", pod.name(), pod.log_tail(15)));
            self.pods.iter().for_each(tail);
        }
    }
}
