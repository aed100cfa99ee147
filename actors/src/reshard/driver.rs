//! One collection's change of shards, driven to its end: attempt after attempt, each with new shards.

use std::path::PathBuf;
use std::sync::Arc;
use std::time::{Duration, Instant};

use shoal_proto::{Error, ErrorCode, RequestId, ShardId};
use shoal_raft::cluster::{self, ClusterState};

use super::STEP_TIMEOUT;
use super::copying::Copying;
use crate::cluster::Cluster;
use crate::progress::Attempt;

/// The pause before a failed change is begun anew; it doubles up to the second.
const RETRY_PAUSES: (Duration, Duration) = (Duration::from_secs(1), Duration::from_secs(60));
/// Attempts after which a change is given up.
const MAX_ATTEMPTS: u32 = 8;

/// Drives one collection's change to its end.
pub(super) struct Driver {
    pub(super) cluster: Cluster,
    pub(super) scratch: PathBuf,
    pub(super) name: String,
}

/// Whether a change that has failed may have more luck in another attempt. Where a disk is full, or as much is
/// written as can be replayed, it would only do the same work again, and more harm.
fn is_worth_repeating(error: &Error) -> bool {
    !matches!(error.code, ErrorCode::DiskFull | ErrorCode::Busy)
}

impl Driver {
    /// Returns whether the shards were changed; otherwise that was given up, here or by somebody's order.
    pub(super) async fn run(self) -> bool {
        let is_done = self.drive().await;
        self.cluster.note_attempt(None);
        is_done
    }

    async fn drive(&self) -> bool {
        let began = Instant::now();
        let mut pause = Duration::ZERO;
        let mut reason = String::new();
        let mut children = Vec::new();
        for number in 1..=MAX_ATTEMPTS {
            let attempt = Attempt { number, of: MAX_ATTEMPTS, last_error: reason.clone() };
            self.cluster.note_attempt(Some((self.name.clone(), attempt)));
            match self.attempt(pause, &mut children).await {
                Ok(is_done) => {
                    if is_done {
                        self.note_success(began);
                    }
                    return is_done;
                }
                Err(error) => {
                    metrics::counter!("shoal_reshards_total", "result" => "failed").increment(1);
                    let is_last = !is_worth_repeating(&error);
                    reason = error.message;
                    if is_last {
                        break;
                    }
                    tracing::warn!(
                        collection = self.name,
                        reason,
                        "its shards will be changed in a new attempt"
                    );
                }
            }
            pause = (2 * pause).clamp(RETRY_PAUSES.0, RETRY_PAUSES.1);
        }
        if self.are_in_use(&children).await {
            self.note_success(began);
            return true;
        }
        // What was copied goes with it, which matters where a disk is full.
        match self.cluster.abort_reshard(&self.name, Instant::now() + STEP_TIMEOUT).await {
            Ok(()) => {
                tracing::error!(
                    collection = self.name,
                    reason,
                    "the change of its shards is given up: they stay as they are"
                )
            }
            Err(error) => {
                tracing::warn!(collection = self.name, %error, "the change of its shards is not given up yet")
            }
        }
        false
    }

    fn note_success(&self, began: Instant) {
        metrics::counter!("shoal_reshards_total", "result" => "ok").increment(1);
        let seconds = began.elapsed().as_secs_f64();
        tracing::info!(collection = self.name, seconds, "its shards were changed");
    }

    /// Whether the new shards of an attempt have taken their place: its end may have been agreed upon although
    /// nobody has said so in time.
    async fn are_in_use(&self, children: &[ShardId]) -> bool {
        let state = self.cluster.fresh_state(Instant::now() + STEP_TIMEOUT).await;
        state.is_ok_and(|state| all_in_use(&state, children))
    }

    /// One attempt, with new shards, which are noted. Otherwise there is nothing to do any more, because the attempt
    /// before has succeeded (true), or it was given up. The pause comes when what an attempt before has frozen may
    /// thaw already.
    async fn attempt(&self, pause: Duration, children: &mut Vec<ShardId>) -> Result<bool, Error> {
        let state = self.cluster.fresh_state(Instant::now() + STEP_TIMEOUT).await?;
        let Some(known) = state.resharding.get(&self.name) else {
            return Ok(all_in_use(&state, children));
        };
        // What another attempt has made may be half of something.
        let id = RequestId(uuid::Uuid::new_v4().into_bytes());
        let firsts = known.children.iter().map(|child| state.shards[child].first).collect();
        let begin = cluster::Command::BeginReshard {
            reshard: id,
            instead_of: Some(known.id),
            name: self.name.clone(),
            parents: known.parents.clone(),
            firsts,
        };
        self.cluster.control(begin, Instant::now() + STEP_TIMEOUT).await?;
        tokio::time::sleep(pause).await;
        let begun =
            |state: &Arc<ClusterState>| state.resharding.get(&self.name).is_some_and(|now| now.id == id);
        let state = self.cluster.wait_state(Instant::now() + STEP_TIMEOUT, begun).await?;
        let begun = &state.resharding[&self.name];
        children.clone_from(&begun.children);
        Copying::new(self, &state, begun)?.run().await?;
        Ok(true)
    }
}

/// Whether shards that an attempt has made are in use; without any attempt nothing is.
fn all_in_use(state: &ClusterState, children: &[ShardId]) -> bool {
    !children.is_empty() && children.iter().all(|child| state.is_in_use(*child))
}
