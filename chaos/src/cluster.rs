//! A cluster of real nodes: processes or containers on hosts of their own, with disks that can be
//! broken.

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, AtomicU64, Ordering};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use nix::mount::{MntFlags, umount2};
use serde::Deserialize;
use serde_json::json;
use shoal_tests::settled::{check_converged, check_settled};
use shoal_tests::view::View;
use shoal_tests::{Client, Node, Request};
use tokio::sync::watch;

use crate::backend::Backend;
use crate::disk::Disk;
use crate::faults::clock::Clock;
use crate::faults::limits::Limits;
use crate::faults::upgrade::Upgrade;
use crate::shell;
use crate::workloads::Crowd;

/// The collection that all workloads use.
pub const COLLECTION: &str = "chaos";
/// Numbers in the vector of a point.
pub const DIMENSIONS: usize = 32;

/// How long it may take until some node leads, and the pause between two looks.
const LEADER_LIMIT: Duration = Duration::from_secs(10);
const LEADER_PAUSE: Duration = Duration::from_millis(100);
/// How long a node may take to say how it sees the cluster.
const VIEW_LIMIT: Duration = Duration::from_secs(2);
/// The pause between two looks whether the cluster is settled.
const SETTLED_PAUSE: Duration = Duration::from_millis(200);

/// What a node's data is on.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum DiskKind {
    /// The machine's own file system.
    #[default]
    Plain,
    /// A disk that can lose what was not synced, and more ([`crate::disk`]).
    Breakable,
    /// A file system in memory of [`SMALL_MIB`], which can be filled up.
    Small,
}

/// The size of a small disk, in MiB.
pub const SMALL_MIB: u64 = 512;

/// What can be broken in a node, apart from its process and its network.
#[derive(Clone, Copy, Debug, Default)]
pub struct Kit {
    /// What its data is on.
    pub disk: DiskKind,
    /// Whether its wall clock can be set.
    pub has_clocks: bool,
    /// Whether its memory and processor time are limited.
    pub has_limits: bool,
}

/// A node with its disk.
pub struct Member {
    /// The process.
    pub node: Node,
    /// Its disk, when that is breakable.
    pub disk: Option<Disk>,
    /// Its wall clock, when that can be set.
    pub clock: Option<Clock>,
    /// How often it was started.
    pub runs: Arc<AtomicU64>,
    /// The process that was started last.
    pub pid: Arc<AtomicU32>,
    /// How often all that it had stored was lost.
    pub lost_disks: Arc<AtomicU64>,
    small: Option<PathBuf>,
    /// Dropped after the process has ended.
    _limits: Option<Limits>,
}

impl Member {
    /// The folder that holds the bytes of its data, below any file system of ours.
    pub fn data_below(&self) -> PathBuf {
        match &self.disk {
            Some(disk) => disk.below().to_owned(),
            None => self.node.data_dir(),
        }
    }
}

/// All nodes, and what they run on.
pub struct Cluster {
    /// The nodes.
    pub members: Vec<Member>,
    /// The nodes' hosts and the network between them.
    pub backend: Backend,
    /// How many crash points were used.
    pub crash_points: usize,
    /// More clients than usual, once there are any.
    pub crowd: Option<Crowd>,
    /// An upgrade from an earlier build, where there is one.
    pub upgrade: Option<Upgrade>,
    /// The node that makes a backup at the moment, where backups are made.
    pub backing_up: Option<watch::Receiver<Option<usize>>>,
}

impl Cluster {
    /// Makes the nodes and does not start them.
    ///
    /// # Errors
    /// When a disk cannot be made.
    pub fn create(
        dir: &Path,
        count: usize,
        backend: Backend,
        kit: Kit,
        env: &[(String, String)],
    ) -> Result<Cluster> {
        let members = Cluster::make(dir, count, &backend, kit, env)?;
        Ok(Cluster { members, backend, crash_points: 0, crowd: None, upgrade: None, backing_up: None })
    }

    /// Ends all nodes for good and makes others in their place, on the same hosts, with nothing stored and on
    /// plain disks. They are not started.
    ///
    /// # Errors
    /// When that cannot be done, or there are fewer hosts.
    pub fn begin_anew(&mut self, dir: &Path, count: usize, env: &[(String, String)]) -> Result<()> {
        ensure!(count <= self.len(), "there are hosts for {} nodes", self.len());
        self.end();
        std::fs::create_dir_all(dir)?;
        self.members = Cluster::make(dir, count, &self.backend, Kit::default(), env)?;
        Ok(())
    }

    fn make(
        dir: &Path,
        count: usize,
        backend: &Backend,
        kit: Kit,
        env: &[(String, String)],
    ) -> Result<Vec<Member>> {
        let mut members = Vec::new();
        let models = dir.join("no-models");
        std::fs::create_dir_all(&models)?;
        for number in 0..count {
            let name = format!("n{}", number + 1);
            let (mut host, ports) = backend.host(number)?;
            let clock = match kit.has_clocks {
                true => Some(Clock::create(&dir.join(format!("{name}.clock")))?),
                false => None,
            };
            host.launcher.extend(clock.iter().flat_map(Clock::launcher));
            let limits = match kit.has_limits {
                true => Some(Limits::create(&name)?),
                false => None,
            };
            // Before the network namespace is entered: in there the cgroups are not to be seen.
            host.launcher.splice(0..0, limits.iter().flat_map(Limits::launcher));
            let mut node = Node::on(host, ports, &name, &dir.join(&name), &models, env)?;
            // Its address is not loopback, but nobody else is on that network.
            node.set_env("SHOAL_INSECURE", "true");
            let (mut disk, mut small) = (None, None);
            match kit.disk {
                DiskKind::Plain => {}
                DiskKind::Breakable => disk = Some(Disk::mount(&node.data_dir())?),
                DiskKind::Small => {
                    std::fs::create_dir_all(node.data_dir())?;
                    let path = node.data_dir();
                    shell::run(&format!(
                        "mount -t tmpfs -o size={SMALL_MIB}m shoal-chaos {}",
                        path.display()
                    ))?;
                    small = Some(path);
                }
            }
            members.push(Member {
                node,
                disk,
                clock,
                runs: Arc::default(),
                pid: Arc::default(),
                lost_disks: Arc::default(),
                small,
                _limits: limits,
            });
        }
        let addresses: Vec<String> = members.iter().map(|member| member.node.grpc_address()).collect();
        for (at, member) in members.iter_mut().enumerate() {
            let others = addresses.iter().enumerate().filter(|(other, _)| *other != at);
            member.node.introduce(others.map(|(_, address)| address.clone()).collect(), count);
        }
        Ok(members)
    }

    /// Lets all nodes run an earlier build from their next start on, which upgrades begin with.
    pub fn begin_with(&mut self, upgrade: Upgrade) {
        for member in &mut self.members {
            member.node.set_binary(upgrade.old());
        }
        self.upgrade = Some(upgrade);
    }

    /// How many nodes there are, running or not.
    pub fn len(&self) -> usize {
        self.members.len()
    }

    /// Whether there is none.
    pub fn is_empty(&self) -> bool {
        self.members.is_empty()
    }

    /// Starts a node that does not run.
    ///
    /// # Errors
    /// When it runs, or cannot be started.
    pub fn start(&mut self, at: usize) -> Result<()> {
        let member = &mut self.members[at];
        member.runs.fetch_add(1, Ordering::Release);
        member.node.start()?;
        // After the count: whoever sees the new process sees that it is of another run.
        member.pid.store(member.node.pid().unwrap_or_default(), Ordering::Release);
        Ok(())
    }

    /// Starts every node that does not run, and lets those go on that are paused.
    ///
    /// # Errors
    /// When one cannot be started.
    pub fn start_missing(&mut self) -> Result<()> {
        for at in 0..self.len() {
            let node = &mut self.members[at].node;
            if node.has_exited()? {
                self.start(at)?;
            } else if !node.is_running() {
                node.resume()?;
            }
        }
        Ok(())
    }

    /// One client for each node.
    pub fn clients(&self) -> Vec<Client> {
        self.members.iter().map(|member| member.node.client().clone()).collect()
    }

    /// How the nodes that answer see the cluster.
    pub async fn views(&self) -> Vec<(usize, View)> {
        let ask = self.members.iter().enumerate().map(|(at, member)| async move {
            let view = tokio::time::timeout(VIEW_LIMIT, member.node.view()).await;
            Some((at, view.ok()?.ok()?))
        });
        futures::future::join_all(ask).await.into_iter().flatten().collect()
    }

    /// The node that leads most shards.
    ///
    /// # Errors
    /// When nobody leads any.
    pub async fn leader(&self) -> Result<usize> {
        self.leader_of_most(|group| group != 0).await.context("nobody leads any shard")
    }

    /// The node that leads the control group: whatever takes long is driven there.
    ///
    /// # Errors
    /// When nobody leads it.
    pub async fn control_leader(&self) -> Result<usize> {
        self.leader_of_most(|group| group == 0).await.context("nobody leads the control group")
    }

    /// The node that leads most groups of some; none when nobody does for a while.
    async fn leader_of_most(&self, is_wanted: impl Fn(u64) -> bool) -> Option<usize> {
        let deadline = Instant::now() + LEADER_LIMIT;
        loop {
            let views = self.views().await;
            let led = |view: &View| {
                view.groups.iter().filter(|group| is_wanted(group.group) && group.is_leader()).count()
            };
            let best = views.iter().max_by_key(|(_, view)| led(view)).filter(|(_, view)| led(view) > 0);
            match best {
                Some((at, _)) => return Some(*at),
                None if Instant::now() > deadline => return None,
                None => tokio::time::sleep(LEADER_PAUSE).await,
            }
        }
    }

    /// The node that leads the fewest groups, the control group among them.
    ///
    /// # Errors
    /// When no node answers.
    pub async fn follower(&self) -> Result<usize> {
        let views = self.views().await;
        let led = |view: &View| view.groups.iter().filter(|group| group.is_leader()).count();
        Ok(views.iter().min_by_key(|(_, view)| led(view)).context("no node answers")?.0)
    }

    /// Waits until every node runs and all of them are one settled cluster.
    ///
    /// # Errors
    /// When that does not happen in time; says what is missing.
    pub async fn settled(&mut self, limit: Duration) -> Result<()> {
        self.wait_settled(limit, true).await
    }

    /// The same while clients write, when no replica can have applied everything.
    ///
    /// # Errors
    /// When that does not happen in time; says what is missing.
    pub async fn settled_under_load(&mut self, limit: Duration) -> Result<()> {
        self.wait_settled(limit, false).await
    }

    /// The nodes that have ended although nothing was done to them: called when every node
    /// should run. They are started again.
    ///
    /// # Errors
    /// When one cannot be started.
    pub fn crashed(&mut self) -> Result<Vec<String>> {
        let mut crashed = Vec::new();
        for at in 0..self.len() {
            if self.members[at].node.has_exited()? {
                let node = &self.members[at].node;
                crashed.push(format!("{}: {}", node.name(), node.log_tail(1)));
                self.start(at)?;
            }
        }
        Ok(crashed)
    }

    async fn wait_settled(&mut self, limit: Duration, is_quiet: bool) -> Result<()> {
        let deadline = Instant::now() + limit;
        loop {
            for member in &mut self.members {
                ensure!(
                    !member.node.has_exited()?,
                    "{} has exited:\n{}",
                    member.node.name(),
                    member.node.log_tail(5)
                );
            }
            let views = self.views().await;
            let state = match views.len() == self.len() {
                true => check_settled(&views, self.len()).and_then(|()| match is_quiet {
                    true => check_converged(&views),
                    false => Ok(()),
                }),
                false => Err(anyhow::anyhow!("{} of {} nodes answer", views.len(), self.len())),
            };
            match state {
                Ok(()) => return Ok(()),
                Err(error) if Instant::now() > deadline => return Err(error),
                Err(_) => tokio::time::sleep(SETTLED_PAUSE).await,
            }
        }
    }

    /// Creates the collection.
    ///
    /// # Errors
    /// When it is refused.
    pub async fn create_collection(&self, shards: u32, replicas: usize) -> Result<()> {
        let body = json!({
            "vectors": {"size": DIMENSIONS, "distance": "Cosine"},
            "shard_number": shards, "replication_factor": replicas,
        });
        let client = self.members[0].node.client();
        client.succeed(&Request::put(format!("/collections/{COLLECTION}"), &body)).await?;
        let index = json!({"field_name": "uid", "field_schema": "keyword"});
        client.succeed(&Request::put(format!("/collections/{COLLECTION}/index"), &index)).await?;
        Ok(())
    }

    /// Lines of the nodes' logs that tell of a panic.
    pub fn panics(&self) -> Vec<String> {
        let of = |member: &Member| -> Vec<String> {
            let log = member.node.log();
            let lines = log.lines().filter(|line| line.contains("panicked at"));
            lines.map(|line| format!("{}: {line}", member.node.name())).collect()
        };
        self.members.iter().flat_map(of).collect()
    }

    /// The version that the nodes say they have.
    ///
    /// # Errors
    /// When none answers.
    pub async fn version(&self) -> Result<String> {
        let reply = self.members[0].node.client().json(&Request::get("/health/detailed")).await?;
        Ok(reply["version"].as_str().context("no version")?.to_owned())
    }

    fn end(&mut self) {
        for member in &mut self.members {
            // The process must be gone before its disk can be unmounted.
            drop(member.node.kill());
            member.disk.take();
            if let Some(path) = &member.small {
                // Off the tree whoever holds a file of it.
                let _ = umount2(path, MntFlags::MNT_DETACH);
            }
        }
    }
}

impl Drop for Cluster {
    fn drop(&mut self) {
        self.end();
    }
}
