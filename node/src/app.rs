//! What the handlers share.

use std::sync::{Arc, OnceLock};
use std::time::Duration;

use metrics_exporter_prometheus::PrometheusHandle;
use shoal_actors::Running;
use shoal_proto::Error;
use tokio::sync::Semaphore;

use crate::admission::Admission;
use crate::config::Config;
use crate::log::LogLevel;

/// The state behind every handler. Cheap to clone.
#[derive(Clone)]
pub struct App {
    inner: Arc<Inner>,
}

struct Inner {
    config: Config,
    running: OnceLock<Running>,
    metrics: PrometheusHandle,
    log_level: LogLevel,
    requests: Semaphore,
    admission: Admission,
}

impl App {
    /// An app whose node has not started yet: it can only tell its health.
    pub fn new(config: Config, metrics: PrometheusHandle, log_level: LogLevel) -> App {
        let limits = &config.limits;
        let requests = Semaphore::new(limits.concurrent_requests);
        let patience = Duration::from_millis(limits.queue_milliseconds);
        let admission = Admission::new(limits.working_requests, patience);
        let running = OnceLock::new();
        App { inner: Arc::new(Inner { config, running, metrics, log_level, requests, admission }) }
    }

    /// The node has started.
    pub fn set_running(&self, running: Running) {
        // `main` starts the node once.
        drop(self.inner.running.set(running));
    }

    /// The node.
    ///
    /// # Errors
    /// Unavailable while it is starting.
    pub fn running(&self) -> Result<&Running, Error> {
        self.inner
            .running
            .get()
            .ok_or_else(|| Error::unavailable("this node is still starting or looking for its cluster"))
    }

    /// The settings.
    pub fn config(&self) -> &Config {
        &self.inner.config
    }

    /// The metrics in Prometheus' text format.
    pub fn render_metrics(&self) -> String {
        self.inner.metrics.render()
    }

    /// The log level, changeable.
    pub fn log_level(&self) -> &LogLevel {
        &self.inner.log_level
    }

    /// Requests that may be here at once, in work or in line.
    pub fn requests(&self) -> &Semaphore {
        &self.inner.requests
    }

    /// Who of them may go to work.
    pub fn admission(&self) -> &Admission {
        &self.inner.admission
    }
}
