//! A cluster that goes from one build to the next, node by node: one step each time the fault strikes. First all
//! nodes but the last are upgraded and put back again, the other way round; then all are upgraded, from where on
//! there is no way back.

use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use shoal_tests::Request;
use shoal_tests::binary::binary;

use super::{Injected, STOP_DEADLINE, Wrong};
use crate::cluster::Cluster;

/// How long the level of the new build may take to come into force.
const LEVEL_LIMIT: Duration = Duration::from_secs(30);
/// The pause between two looks at it.
const LEVEL_PAUSE: Duration = Duration::from_millis(200);

/// How far an upgrade has come.
pub struct Upgrade {
    old: PathBuf,
    new: PathBuf,
    steps: usize,
}

impl Upgrade {
    /// One that has not begun, from this binary to the one under test.
    ///
    /// # Errors
    /// When there is no such file.
    pub fn from(old: &Path) -> Result<Upgrade> {
        ensure!(old.is_file(), "--old-bin: {} does not exist", old.display());
        Ok(Upgrade { old: old.canonicalize()?, new: binary()?, steps: 0 })
    }

    /// What the nodes run to begin with.
    pub fn old(&self) -> &Path {
        &self.old
    }
}

/// The node whose build is exchanged in a step, and whether it is upgraded. Further steps exchange nothing.
fn step(number: usize, count: usize) -> (usize, bool) {
    let most = count - 1;
    match number {
        forth if forth < most => (forth, true),
        back if back < 2 * most => (2 * most - 1 - back, false),
        forth => ((forth - 2 * most) % count, true),
    }
}

/// The number of the step that upgrades the last node.
fn last_step(count: usize) -> usize {
    2 * (count - 1) + count - 1
}

/// Stops one node politely and starts it with the build that is its next one.
pub(super) async fn next(cluster: &mut Cluster) -> Result<Injected> {
    let count = cluster.len();
    let upgrade = cluster.upgrade.as_mut().context("no earlier build is given")?;
    let number = upgrade.steps;
    upgrade.steps += 1;
    let (at, is_new) = step(number, count);
    let binary = if is_new { upgrade.new.clone() } else { upgrade.old.clone() };
    let code = cluster.members[at].node.terminate(STOP_DEADLINE).await;
    cluster.members[at].node.set_binary(&binary);
    cluster.start(at)?;
    cluster.members[at].node.ready().await?;
    let detail = format!("n{} {}", at + 1, if is_new { "forth" } else { "back" });
    let wrong = match code {
        Ok(Some(0)) if number == last_step(count) => check_level(cluster).await,
        Ok(Some(0)) => None,
        code => Some(Wrong { name: "wrong_exit", detail: format!("n{} after SIGTERM: {code:?}", at + 1) }),
    };
    Ok(Injected { detail, wrong })
}

/// Whether the level of the new build comes into force.
async fn check_level(cluster: &Cluster) -> Option<Wrong> {
    let end = Instant::now() + LEVEL_LIMIT;
    loop {
        let error = match has_risen(cluster).await {
            Ok(()) => return None,
            Err(error) => error,
        };
        if Instant::now() > end {
            return Some(Wrong { name: "level_not_raised", detail: format!("{error:#}") });
        }
        tokio::time::sleep(LEVEL_PAUSE).await;
    }
}

async fn has_risen(cluster: &Cluster) -> Result<()> {
    let told = cluster.members[0].node.client().json(&Request::get("/admin/cluster")).await?;
    let (now, newest) = (&told["level"], &told["build"]["level"]);
    ensure!(now.is_u64() && now == newest, "level {now} is in force and the build knows {newest}");
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn all_are_upgraded_at_last_and_one_stays_old_until_then() {
        let steps: Vec<_> = (0..=last_step(3)).map(|number| step(number, 3)).collect();
        let expected = [(0, true), (1, true), (1, false), (0, false), (0, true), (1, true), (2, true)];
        assert_eq!(steps, expected);
        assert_eq!(step(last_step(3) + 1, 3), (0, true));
    }
}
