//! Backups that are made one after the other, while faults strike.
//!
//! ```text
//!  ask a random node ─▶ look until it has ended ─▶ made, with where it cuts each shard's log
//!   ▲                                          └─▶ broken off: its node has died, and there is no head
//!   └──────────── pause ◀── free the target ◀─────────┘
//! ```
//!
//! Like [`super::reshard`] this is no fault: it runs beside them. One of those, `kill-backing-up`,
//! waits for the next backup and kills the node that makes it. What was made is in the history, for
//! [`crate::restore`] to put back and for [`crate::checkers::backup`] to judge; a backup that fails or is
//! refused is recorded and no mistake.
//!
//! A node that dies leaves the target locked for five minutes, in which no other backup is made. Here it is
//! known to be dead, so its lock is taken away: nobody could wait that long.

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::AtomicBool;
use std::sync::atomic::Ordering::{Acquire, Release};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use rand::rngs::StdRng;
use rand::{RngExt, SeedableRng};
use serde_json::{Value, json};
use shoal_tests::{Client, Request};
use tokio::sync::watch;
use tokio::task::JoinHandle;

use crate::cluster::{COLLECTION, Cluster};
use crate::history::{Phase, Recorder};

/// A backup that is under way.
const UNDER_WAY: &str = "backup";
/// A backup that is whole.
pub const MADE: &str = "backup-made";
/// A backup whose node has died in the middle of it: there is nothing of it.
pub const BROKEN_OFF: &str = "backup-broken-off";
/// A backup that a node did not begin, or could not make.
const FAILED: &str = "backup-failed";
/// How long a node may take to answer: it asks others, and waits for two seconds for those that are silent.
const ASK_LIMIT: Duration = Duration::from_secs(8);
/// The pause between two looks at a backup.
const LOOK_EVERY: Duration = Duration::from_millis(50);
/// So often in a row a node that answers must not know of a backup that it has begun, to be another process.
const UNKNOWN_LOOKS: u32 = 3;
/// How long a backup, and what is left of it, may take.
const END_LIMIT: Duration = Duration::from_secs(90);
/// The pause between two backups.
const PAUSE: Duration = Duration::from_secs(2);
/// How long a fault waits for the next backup.
const BEGIN_LIMIT: Duration = Duration::from_secs(60);
/// How far into a backup its node is killed at the latest, in milliseconds: small ones are over soon.
const MIDDLE_MS: u64 = 40;

/// A backup that is in the target.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Made {
    /// Its number in this run.
    pub number: u64,
    /// Its name.
    pub id: String,
}

/// The task that makes one backup after the other.
pub struct Backups {
    stop: Arc<AtomicBool>,
    driver: watch::Receiver<Option<usize>>,
    task: JoinHandle<Vec<Made>>,
}

impl Backups {
    /// Begins. `clients` are of one node each, and all nodes keep backups in the directory `target`.
    pub fn start(clients: &[Client], recorder: &Arc<Recorder>, target: &Path, seed: u64) -> Backups {
        let stop = Arc::new(AtomicBool::new(false));
        let (sender, driver) = watch::channel(None);
        let limited = |client: &Client| client.clone().with_limits(ASK_LIMIT, ASK_LIMIT);
        let maker = Maker {
            clients: clients.iter().map(limited).collect(),
            recorder: recorder.clone(),
            target: target.to_owned(),
            stop: stop.clone(),
            driver: sender,
            coin: StdRng::seed_from_u64(seed),
        };
        Backups { stop, driver, task: tokio::spawn(maker.run()) }
    }

    /// The node that makes a backup at the moment.
    pub fn driver(&self) -> watch::Receiver<Option<usize>> {
        self.driver.clone()
    }

    /// Makes no more, waits for the last one, and returns all that are whole, the oldest first.
    pub async fn finish(self) -> Vec<Made> {
        self.stop.store(true, Release);
        self.task.await.expect("whoever makes backups does not panic")
    }
}

/// The node of the next backup that begins, once that is under way for a little while.
///
/// # Errors
/// When none begins.
pub(super) async fn in_the_middle(cluster: &mut Cluster, coin: &mut StdRng) -> Result<usize> {
    let driver = cluster.backing_up.as_mut().context("no backups are made")?;
    // One that is under way already may be about to end.
    drop(driver.borrow_and_update());
    let next = async {
        loop {
            driver.changed().await.context("no backups are made any more")?;
            let begun = *driver.borrow_and_update();
            if let Some(node) = begun {
                return Ok::<_, anyhow::Error>(node);
            }
        }
    };
    let node = tokio::time::timeout(BEGIN_LIMIT, next).await.context("no backup has begun")??;
    tokio::time::sleep(Duration::from_millis(coin.random_range(0..MIDDLE_MS))).await;
    Ok(node)
}

/// How a backup stands, by the word of its node.
#[derive(Debug, PartialEq, Eq)]
enum Standing {
    Running,
    Done,
    Failed(String),
    Unknown,
}

/// Reads `GET /admin/backup-jobs`.
fn standing(jobs: &Value, id: &str) -> Result<Standing> {
    let jobs = jobs["jobs"].as_array().context("no jobs")?;
    let Some(job) = jobs.iter().find(|job| job["kind"] == "create" && job["backup"] == id) else {
        return Ok(Standing::Unknown);
    };
    Ok(match job["state"].as_str() {
        Some("running") => Standing::Running,
        Some("done") => Standing::Done,
        Some("failed") => Standing::Failed(job["error"].as_str().unwrap_or_default().to_owned()),
        other => bail!("a job is {other:?}"),
    })
}

/// Whether any node makes a backup.
fn is_any_running(jobs: &Value) -> Result<bool> {
    let jobs = jobs["jobs"].as_array().context("no jobs")?;
    Ok(jobs.iter().any(|job| job["kind"] == "create" && job["state"] == "running"))
}

/// Where a backup cuts the logs of the collection's shards, by `GET /admin/backups/ID`.
fn cuts(backup: &Value) -> Result<Vec<(u64, u64)>> {
    let collections = backup["manifest"]["collections"].as_array().context("no collections")?;
    let collection = collections.iter().find(|collection| collection["name"] == COLLECTION);
    let collection = collection.with_context(|| format!("no collection {COLLECTION}"))?;
    let shards = collection["shards"].as_array().context("no shards")?;
    let cut = |shard: &Value| shard["shard"].as_u64().zip(shard["index"].as_u64());
    shards.iter().map(|shard| cut(shard).context("a shard without id or index")).collect()
}

struct Maker {
    /// One for each node.
    clients: Vec<Client>,
    recorder: Arc<Recorder>,
    target: PathBuf,
    stop: Arc<AtomicBool>,
    driver: watch::Sender<Option<usize>>,
    coin: StdRng,
}

impl Maker {
    async fn run(mut self) -> Vec<Made> {
        let mut made = Vec::new();
        let mut number = 0;
        while !self.stop.load(Acquire) {
            number += 1;
            let node = self.coin.random_range(0..self.clients.len());
            self.recorder.backup_began(number);
            match self.backup(number, node).await {
                Ok(Some(id)) => made.push(Made { number, id }),
                Ok(None) => {}
                Err(error) => {
                    let detail = format!("number {number} by n{}: {error:#}", node + 1);
                    self.recorder.fault("backup_not_ended", Phase::Wrong, &detail);
                }
            }
            tokio::time::sleep(PAUSE).await;
        }
        made
    }

    /// Makes a backup. Returns its name when it is whole.
    async fn backup(&self, number: u64, node: usize) -> Result<Option<String>> {
        let by = format!("number {number} by n{}", node + 1);
        let failed = |reason: &str| self.recorder.fault(FAILED, Phase::Moment, &format!("{by}: {reason}"));
        let reply = match self.clients[node].once(&Request::post("/admin/backups", &json!({}))).await {
            Ok(reply) if reply.is_success() => reply.json()?,
            Ok(reply) => {
                failed(&format!("{} {}", reply.status, reply.text()));
                return Ok(None);
            }
            // It may have begun all the same.
            Err(error) => {
                failed(&format!("{error:#}"));
                self.wait_idle(node).await?;
                self.free()?;
                return Ok(None);
            }
        };
        let id = reply["backup"].as_str().context("a backup without a name")?.to_owned();
        self.recorder.fault(UNDER_WAY, Phase::Begin, &by);
        self.driver.send_replace(Some(node));
        let ended = self.follow(node, &id).await;
        self.driver.send_replace(None);
        self.recorder.fault(UNDER_WAY, Phase::End, "");
        match ended? {
            Standing::Failed(reason) => {
                failed(&reason);
                return Ok(None);
            }
            Standing::Unknown => self.free()?,
            Standing::Running | Standing::Done => {}
        }
        // Its head is what makes it one, whatever has become of its node.
        match self.find(&id).await? {
            Some(backup) => {
                let cuts = cuts(&backup)?;
                let detail = format!("{by}: {id}, {cuts:?}");
                self.recorder.backup_made(number, &id, cuts);
                self.recorder.fault(MADE, Phase::Moment, &detail);
                Ok(Some(id))
            }
            None => {
                self.recorder.fault(BROKEN_OFF, Phase::Moment, &by);
                Ok(None)
            }
        }
    }

    /// Waits for the end of a backup. It is unknown to a node that has died since.
    async fn follow(&self, node: usize, id: &str) -> Result<Standing> {
        let end = Instant::now() + END_LIMIT;
        let mut unknown = 0;
        loop {
            match self.jobs(node).await.and_then(|jobs| standing(&jobs, id)) {
                Ok(Standing::Unknown) if unknown + 1 < UNKNOWN_LOOKS => unknown += 1,
                Ok(ended @ (Standing::Done | Standing::Failed(_) | Standing::Unknown)) => return Ok(ended),
                Ok(Standing::Running) => unknown = 0,
                // It is dead, or about to start.
                Err(error) if Instant::now() > end => return Err(error),
                Err(_) => {}
            }
            if Instant::now() > end {
                bail!("it goes on for longer than {END_LIMIT:?}");
            }
            tokio::time::sleep(LOOK_EVERY).await;
        }
    }

    /// Waits until a node answers and nobody makes a backup.
    async fn wait_idle(&self, node: usize) -> Result<()> {
        let end = Instant::now() + END_LIMIT;
        while !self.jobs(node).await.is_ok_and(|jobs| matches!(is_any_running(&jobs), Ok(false))) {
            if Instant::now() > end {
                bail!("it does not say that nothing is under way");
            }
            tokio::time::sleep(LOOK_EVERY).await;
        }
        Ok(())
    }

    async fn jobs(&self, node: usize) -> Result<Value> {
        let reply = self.clients[node].once(&Request::get("/admin/backup-jobs")).await?;
        match reply.is_success() {
            true => reply.json(),
            false => bail!("{} {}", reply.status, reply.text()),
        }
    }

    /// A backup with all that it consists of, if there is one of that name. Any node knows.
    async fn find(&self, id: &str) -> Result<Option<Value>> {
        let request = Request::get(format!("/admin/backups/{id}"));
        let end = Instant::now() + END_LIMIT;
        let mut turn = 0;
        loop {
            let reply = self.clients[turn % self.clients.len()].once(&request).await;
            match reply {
                Ok(reply) if reply.is_success() => return reply.json().map(Some),
                Ok(reply) if reply.status == 404 => return Ok(None),
                Ok(reply) if Instant::now() > end => bail!("{} {}", reply.status, reply.text()),
                Err(error) if Instant::now() > end => return Err(error),
                _ => tokio::time::sleep(LOOK_EVERY).await,
            }
            turn += 1;
        }
    }

    /// Takes away the lock of a process that is dead.
    fn free(&self) -> Result<()> {
        let locks = self.target.join("locks");
        if !locks.is_dir() {
            return Ok(());
        }
        for lock in std::fs::read_dir(&locks)? {
            std::fs::remove_file(lock?.path())?;
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn how_a_backup_stands_is_read() {
        let jobs = json!({"jobs": [
            {"kind": "verify", "backup": "b", "state": "running", "error": null},
            {"kind": "create", "backup": "a", "state": "done", "error": null},
            {"kind": "create", "backup": "b", "state": "failed", "error": "no room"},
        ]});
        let standing = |id: &str| standing(&jobs, id).expect("jobs");
        assert_eq!(standing("a"), Standing::Done);
        assert_eq!(standing("b"), Standing::Failed("no room".to_owned()));
        assert_eq!(standing("c"), Standing::Unknown);
        assert!(!is_any_running(&jobs).expect("jobs"));
        let busy = json!({"jobs": [{"kind": "create", "backup": "c", "state": "running"}]});
        assert!(is_any_running(&busy).expect("jobs"));
        assert!(is_any_running(&json!({})).is_err());
    }

    #[test]
    fn where_a_backup_cuts_the_logs_is_read() {
        let backup = json!({"id": "x", "manifest": {"collections": [
            {"name": "other", "shards": [{"shard": 1, "index": 7}]},
            {"name": COLLECTION, "shards": [{"shard": 2, "index": 9}, {"shard": 3, "index": 12}]},
        ]}});
        assert_eq!(cuts(&backup).expect("a backup"), [(2, 9), (3, 12)]);
        assert!(cuts(&json!({"manifest": {"collections": []}})).is_err());
    }
}
