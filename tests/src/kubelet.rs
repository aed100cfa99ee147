//! What the kubelet does for one pod: it starts the process, asks its probes, starts it again in its place when
//! it has ended or is found dead, and has the service lead to it while it is ready.
//!
//! ```text
//!  start ─▶ startup probe ── passes ─▶ liveness probe ── fails ─▶ preStop, SIGTERM, SIGKILL, start
//!               └─ fails ─▶ the same      readiness probe ─▶ in the service, or not
//! ```
//!
//! Left out is the back-off: a process that ends again and again is started again at once.

use std::sync::Arc;
use std::time::{Duration, Instant};

use anyhow::Result;
use tokio::sync::{Mutex, watch};
use tokio::task::JoinHandle;
use tokio::time::{Interval, MissedTickBehavior, interval};

use crate::client::{Client, Request};
use crate::manifest::{Manifest, Probe, paced};
use crate::node::Node;
use crate::service::Service;
use crate::wait::say;

/// How often it is looked whether the process has ended.
const EXIT_TICK: Duration = Duration::from_millis(50);

/// What the probes have found since the pod was created.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Status {
    /// Whether the startup probe has passed since the process was started.
    pub is_started: bool,
    /// Since when the readiness probe has not failed.
    pub ready_since: Option<Instant>,
    /// How often the process was started again.
    pub restarts: u32,
}

/// The kubelet's work for one pod. Dropping it ends the work, not the process.
pub(crate) struct Kubelet {
    status: watch::Receiver<Status>,
    task: JoinHandle<()>,
}

impl Kubelet {
    /// Starts the process and looks after it from then on.
    ///
    /// # Errors
    /// When the process runs already or cannot be started.
    pub(crate) async fn start(
        node: Arc<Mutex<Node>>,
        manifest: Arc<Manifest>,
        service: Service,
    ) -> Result<Kubelet> {
        let name = {
            let mut node = node.lock().await;
            node.start()?;
            node.name().to_owned()
        };
        let (sender, status) = watch::channel(Status::default());
        let keeper = Keeper { name, node, manifest, service, status: sender };
        let task = tokio::spawn(async move {
            if let Err(error) = keeper.keep().await {
                say(format!("{} is not looked after any more: {error:#}", keeper.name));
            }
        });
        Ok(Kubelet { status, task })
    }

    /// What the probes have found.
    pub(crate) fn status(&self) -> Status {
        *self.status.borrow()
    }

    /// Ends the work and waits until it has ended.
    pub(crate) async fn leave(&mut self) {
        self.task.abort();
        // It ends with the news that it was aborted.
        drop((&mut self.task).await);
    }
}

impl Drop for Kubelet {
    fn drop(&mut self) {
        self.task.abort();
    }
}

/// Stops a process as a pod's is stopped: SIGTERM, then SIGKILL when the time is up. Returns its exit code:
/// `None` when a signal ended it, or it had ended before.
///
/// # Errors
/// When it cannot be killed.
pub(crate) async fn stop(node: &mut Node, patience: Duration) -> Result<Option<i32>> {
    match node.terminate(patience).await {
        Ok(code) => Ok(code),
        Err(error) => {
            say(format!("{} is killed: {error:#}", node.name()));
            node.kill()?;
            Ok(None)
        }
    }
}

struct Keeper {
    name: String,
    node: Arc<Mutex<Node>>,
    manifest: Arc<Manifest>,
    service: Service,
    status: watch::Sender<Status>,
}

impl Keeper {
    async fn keep(&self) -> Result<()> {
        loop {
            let reason = tokio::select! {
                ended = self.ended() => ended?,
                reason = self.judge() => reason,
            };
            say(format!("{} is started again: {reason}", self.name));
            self.service.remove(&self.name);
            let mut node = self.node.lock().await;
            if !node.has_exited()? {
                tokio::time::sleep(paced(self.manifest.pre_stop)).await;
                stop(&mut node, self.manifest.grace.saturating_sub(self.manifest.pre_stop)).await?;
            }
            node.start()?;
            self.status.send_modify(|status| {
                *status = Status { restarts: status.restarts + 1, ..Status::default() };
            });
        }
    }

    /// Waits until the process has ended by itself.
    async fn ended(&self) -> Result<&'static str> {
        while !self.node.lock().await.has_exited()? {
            tokio::time::sleep(EXIT_TICK).await;
        }
        Ok("its process has ended")
    }

    /// Asks the probes until one of them says that the process must be started again.
    async fn judge(&self) -> &'static str {
        let (client, address) = {
            let node = self.node.lock().await;
            (node.client().clone(), node.http_address())
        };
        let mut startup = Prober::new(&self.manifest.startup, &client);
        loop {
            match startup.ask().await {
                Some(true) => break,
                Some(false) => return "its startup probe has failed",
                None => {}
            }
        }
        self.status.send_modify(|status| status.is_started = true);
        tokio::select! {
            () = self.judge_liveness(&client) => {}
            () = self.judge_readiness(&client, &address) => {}
        }
        "its liveness probe has failed"
    }

    /// Ends when the probe has failed.
    async fn judge_liveness(&self, client: &Client) {
        let mut liveness = Prober::new(&self.manifest.liveness, client);
        while liveness.ask().await != Some(false) {}
    }

    /// Never ends.
    async fn judge_readiness(&self, client: &Client, address: &str) {
        let mut readiness = Prober::new(&self.manifest.readiness, client);
        loop {
            match readiness.ask().await {
                Some(true) => {
                    self.service.add(&self.name, address);
                    self.status.send_modify(|status| {
                        status.ready_since.get_or_insert_with(Instant::now);
                    });
                }
                Some(false) => {
                    self.service.remove(&self.name);
                    self.status.send_modify(|status| status.ready_since = None);
                }
                None => {}
            }
        }
    }
}

/// One probe of one process.
struct Prober<'a> {
    probe: &'a Probe,
    client: Client,
    ticks: Interval,
    tally: Tally,
}

impl<'a> Prober<'a> {
    fn new(probe: &'a Probe, client: &Client) -> Prober<'a> {
        let mut ticks = interval(paced(probe.period));
        ticks.set_missed_tick_behavior(MissedTickBehavior::Delay);
        // The kubelet has no key.
        let client = client.with_key(None).with_limits(probe.timeout, probe.timeout);
        Prober { probe, client, ticks, tally: Tally { failures: 0, threshold: probe.failure_threshold } }
    }

    /// Asks once, when it is time, and says how the probe stands: `None` while it has failed, but not often
    /// enough.
    async fn ask(&mut self) -> Option<bool> {
        self.ticks.tick().await;
        // A connection of its own for each question, as the kubelet makes it.
        let reply = self.client.starting_at(0).once(&Request::get(self.probe.path.as_str())).await;
        self.tally.note(reply.is_ok_and(|reply| (200..400).contains(&reply.status)))
    }
}

/// How often a probe has failed in a row.
struct Tally {
    failures: u32,
    threshold: u32,
}

impl Tally {
    fn note(&mut self, has_passed: bool) -> Option<bool> {
        self.failures = if has_passed { 0 } else { self.failures.saturating_add(1) };
        match self.failures {
            0 => Some(true),
            failures if failures >= self.threshold => Some(false),
            _ => None,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_probe_fails_after_so_many_failures_in_a_row() {
        let mut tally = Tally { failures: 0, threshold: 2 };
        let answers = [false, true, false, false, false, true];
        let stands = answers.map(|has_passed| tally.note(has_passed));
        assert_eq!(stands, [None, Some(true), None, Some(false), Some(false), Some(true)]);
    }
}
