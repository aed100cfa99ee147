//! What becomes of the backups of a run: they are put back into new clusters, and what those show is recorded
//! for [`crate::checkers::backup`] to judge.
//!
//! ```text
//!  as many new nodes   the newest backup: its node is killed in the middle of the restore, the others show
//!                      nothing; it starts again, and the restore is made from the beginning
//!  one new node        the last few, one after the other
//! ```
//!
//! Whatever a node shows is recorded, also while a restore is under way: half of one would have lost
//! something. The nodes of the run itself are gone by then; the new ones have their hosts.

use std::path::Path;
use std::sync::Arc;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use serde_json::{Value, json};
use shoal_tests::{Client, Request, wait_until};

use crate::caller::{page_at, read_page};
use crate::cluster::{COLLECTION, Cluster};
use crate::faults::backup::Made;
use crate::history::{Level, Phase, Recorder};

/// A backup that was put back whole.
pub const RESTORED: &str = "backup-restored";
/// A restore whose node has died in the middle of it.
pub const BROKEN_OFF: &str = "restore-broken-off";
/// How long a new cluster may take to settle.
const SETUP_LIMIT: Duration = Duration::from_secs(60);
/// How long a restore may take, with what an earlier one has left.
const RESTORE_LIMIT: Duration = Duration::from_secs(120);
/// How long a node may take to answer.
const ASK_LIMIT: Duration = Duration::from_secs(8);
/// How long a restore may take to begin.
const BEGIN_LIMIT: Duration = Duration::from_secs(20);
/// How long it may take until what is deleted is gone everywhere.
const GONE_LIMIT: Duration = Duration::from_secs(20);
/// The pause between two looks.
const LOOK_EVERY: Duration = Duration::from_millis(20);
/// So often it is looked what the others show after a node has died in a restore.
const LOOKS: u32 = 25;
/// So often it is tried to kill a node in the middle of a restore: a small one is over soon.
const ATTEMPTS: u32 = 6;
/// The node that restores.
const DRIVER: usize = 0;

/// How backups are put back.
pub struct Restoring<'a> {
    /// Where the new nodes have their data.
    pub dir: &'a Path,
    /// Environment of the new nodes, with the backup target.
    pub env: &'a [(String, String)],
    /// So many backups are put back into one node, the last ones.
    pub most: usize,
    /// Where everything is recorded.
    pub recorder: &'a Arc<Recorder>,
}

impl Restoring<'_> {
    /// Puts backups back into new clusters in the place of this one.
    ///
    /// # Errors
    /// When a new cluster does not come up, or a backup that is whole cannot be put back.
    pub async fn run(&self, cluster: &mut Cluster, made: &[Made]) -> Result<()> {
        // That none was made is for coverage to say.
        let Some(newest) = made.last() else { return Ok(()) };
        let count = cluster.len();
        self.begin_anew(cluster, "many", count).await?;
        self.break_off(cluster, newest).await?;
        self.restore(cluster, newest).await?;
        self.note_panics(cluster);

        self.begin_anew(cluster, "one", 1).await?;
        for backup in &made[made.len().saturating_sub(self.most)..] {
            self.restore(cluster, backup).await?;
            delete(cluster).await?;
        }
        self.note_panics(cluster);
        Ok(())
    }

    async fn begin_anew(&self, cluster: &mut Cluster, name: &str, count: usize) -> Result<()> {
        cluster.begin_anew(&self.dir.join(name), count, self.env)?;
        for at in 0..count {
            cluster.start(at)?;
        }
        cluster.settled(SETUP_LIMIT).await.with_context(|| format!("the new cluster {name} does not come up"))
    }

    fn note_panics(&self, cluster: &Cluster) {
        for panic in cluster.panics() {
            self.recorder.fault("panic", Phase::Wrong, &format!("in a restore: {panic}"));
        }
    }

    /// Kills the node that restores in the middle of it, looks what the others show, and starts it again.
    async fn break_off(&self, cluster: &mut Cluster, backup: &Made) -> Result<()> {
        for _ in 0..ATTEMPTS {
            begin(&clients(cluster)[DRIVER], backup).await?;
            let is_hidden = wait_begun(cluster).await?;
            if is_hidden {
                cluster.members[DRIVER].node.kill()?;
            }
            let others: Vec<(usize, Client)> = clients(cluster).into_iter().enumerate().skip(1).collect();
            for _ in 0..LOOKS {
                self.look(&others, backup).await;
                tokio::time::sleep(LOOK_EVERY).await;
            }
            if is_hidden {
                cluster.start(DRIVER)?;
                cluster.members[DRIVER].node.ready().await?;
            }
            // It may have been at its very end.
            let witness = &others[0].1;
            let what = "another node to say what there is";
            let whole = wait_until(GONE_LIMIT, what, || async { shown(witness).await.map(Some) }).await?;
            if whole.is_none() {
                self.recorder.fault(BROKEN_OFF, Phase::Moment, &format!("backup {}", backup.number));
                return Ok(());
            }
            self.wait_ended(cluster, backup).await?;
            delete(cluster).await?;
        }
        Ok(())
    }

    /// Puts a backup back, whatever was begun before, and records what every node shows then.
    async fn restore(&self, cluster: &mut Cluster, backup: &Made) -> Result<()> {
        begin(&clients(cluster)[DRIVER], backup).await?;
        self.wait_ended(cluster, backup).await?;
        for (node, client) in clients(cluster).iter().enumerate() {
            let what = format!("n{} to show backup {}", node + 1, backup.number);
            let points = wait_until(RESTORE_LIMIT, &what, || shown(client)).await?;
            self.recorder.restored(backup.number, node, points);
        }
        let detail = format!("number {}, {}, into {} nodes", backup.number, backup.id, cluster.len());
        self.recorder.fault(RESTORED, Phase::Moment, &detail);
        Ok(())
    }

    /// Waits for the end of a restore and looks meanwhile.
    async fn wait_ended(&self, cluster: &Cluster, backup: &Made) -> Result<()> {
        let clients: Vec<(usize, Client)> = clients(cluster).into_iter().enumerate().collect();
        let end = Instant::now() + RESTORE_LIMIT;
        loop {
            let reply = clients[DRIVER].1.once(&Request::get("/admin/backup-jobs")).await;
            let jobs = reply.and_then(|reply| reply.json());
            match jobs.map(|jobs| state_of(&jobs, &backup.id)) {
                Ok(Some(Ok(true))) => return Ok(()),
                Ok(Some(Err(reason))) => bail!("backup {} cannot be restored: {reason}", backup.number),
                // Its node has died since, at the very end of it.
                Ok(None) => return Ok(()),
                Ok(Some(Ok(false))) | Err(_) => {}
            }
            ensure!(Instant::now() < end, "the restore of backup {} does not end", backup.number);
            self.look(&clients, backup).await;
            tokio::time::sleep(LOOK_EVERY).await;
        }
    }

    /// Records what nodes show, if they show anything: most of the time nothing is there to be seen.
    async fn look(&self, clients: &[(usize, Client)], backup: &Made) {
        for (node, client) in clients {
            // A node that cannot say anything now shows nothing.
            if let Ok(Some(points)) = shown(client).await {
                self.recorder.restored(backup.number, *node, points);
            }
        }
    }
}

fn clients(cluster: &Cluster) -> Vec<Client> {
    cluster.clients().into_iter().map(|client| client.with_limits(ASK_LIMIT, ASK_LIMIT)).collect()
}

/// Orders a restore. What an earlier one has left may be in its way for a while.
async fn begin(client: &Client, backup: &Made) -> Result<()> {
    let request = Request::post(format!("/admin/backups/{}/restore", backup.id), &json!({}));
    wait_until(RESTORE_LIMIT, &format!("the restore of backup {} to begin", backup.number), || async {
        let reply = client.once(&request).await?;
        ensure!(reply.is_success(), "{} {}", reply.status, reply.text());
        Ok(Some(()))
    })
    .await
}

/// Waits until a restore has made its collection. Returns whether that is still hidden.
async fn wait_begun(cluster: &Cluster) -> Result<bool> {
    let end = Instant::now() + BEGIN_LIMIT;
    loop {
        let view = cluster.members[DRIVER].node.view().await;
        let collection = view.ok().and_then(|view| Some(view.collection(COLLECTION)?.is_restoring));
        match collection {
            Some(is_hidden) => return Ok(is_hidden),
            None if Instant::now() > end => bail!("no restore begins within {BEGIN_LIMIT:?}"),
            None => tokio::time::sleep(Duration::from_millis(2)).await,
        }
    }
}

/// Whether a restore is done, or why it failed, by `GET /admin/backup-jobs`; none when nobody knows of it.
fn state_of(jobs: &Value, id: &str) -> Option<Result<bool, String>> {
    let job = jobs["jobs"].as_array()?.iter().find(|job| job["kind"] == "restore" && job["backup"] == id)?;
    Some(match job["state"].as_str() {
        Some("failed") => Err(job["error"].as_str().unwrap_or_default().to_owned()),
        state => Ok(state == Some("done")),
    })
}

/// Deletes what was restored and waits until no node shows it.
async fn delete(cluster: &Cluster) -> Result<()> {
    let clients = clients(cluster);
    clients[DRIVER].succeed(&Request::delete(format!("/collections/{COLLECTION}"))).await?;
    for client in &clients {
        wait_until(GONE_LIMIT, "the deleted collection to be gone", || async {
            Ok(shown(client).await?.is_none().then_some(()))
        })
        .await?;
    }
    Ok(())
}

/// Everything that a node shows of the collection, by agreement; none when it says that there is none.
///
/// # Errors
/// When it cannot say.
async fn shown(client: &Client) -> Result<Option<Vec<(u64, String)>>> {
    let mut points = Vec::new();
    let mut offset = Value::Null;
    loop {
        let request = page_at(&offset).header("x-shoal-consistency", Level::Linearizable.name());
        let reply = client.once(&request).await?;
        if reply.status == 404 {
            return Ok(None);
        }
        ensure!(reply.is_success(), "{} {}", reply.status, reply.text());
        let (page, next) = read_page(&reply)?;
        points.extend(page);
        if next.is_null() {
            return Ok(Some(points));
        }
        offset = next;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn how_a_restore_stands_is_read() {
        let jobs = json!({"jobs": [
            {"kind": "create", "backup": "a", "state": "done", "error": null},
            {"kind": "restore", "backup": "b", "state": "running", "error": null},
            {"kind": "restore", "backup": "c", "state": "done", "error": null},
            {"kind": "restore", "backup": "d", "state": "failed", "error": "no room"},
        ]});
        assert_eq!(state_of(&jobs, "a"), None);
        assert_eq!(state_of(&jobs, "b"), Some(Ok(false)));
        assert_eq!(state_of(&jobs, "c"), Some(Ok(true)));
        assert_eq!(state_of(&jobs, "d"), Some(Err("no room".to_owned())));
    }
}
