//! How old the latest backup is and what it lacks, as metrics: a backup that nobody makes any more, or that
//! fails every night, is to be noticed.
//!
//! Every node that has a target tells it of the whole cluster: it looks into the target when it starts and
//! every while, so that a restart forgets nothing, and the node that made the latest one may be gone. Only
//! backups of everything count, because one that somebody has made of a collection stands for no other. What
//! cannot be looked up now is told as it was.

use std::time::Duration;

use metrics::gauge;
use shoal_proto::Error;

use super::Backups;
use super::manifest::Head;

/// How often the target is looked into: it costs a listing and, as a rule, one small object.
const LOOK_EVERY: Duration = Duration::from_secs(900);

/// Tells of the latest backup of everything.
pub(super) fn tell(head: &Head) {
    gauge!("shoal_backup_last_success_timestamp_seconds").set(head.created_at as f64);
    gauge!("shoal_backup_missing_files").set(head.missing_files as f64);
}

impl Backups {
    /// Tells of the latest backup for as long as the node runs, if backups have a place.
    pub(crate) fn keep_telling_age(&self) {
        if self.inner.config.target.is_empty() {
            return;
        }
        let this = self.clone();
        tokio::spawn(async move {
            loop {
                if let Err(error) = this.tell_age().await {
                    tracing::warn!(%error, "nobody knows how old the latest backup is");
                }
                tokio::time::sleep(LOOK_EVERY).await;
            }
        });
    }

    async fn tell_age(&self) -> Result<(), Error> {
        let cluster_id = self.inner.cluster.state().cluster_id.clone();
        if let Some(head) = self.target().await?.newest_full(&cluster_id).await? {
            tell(&head);
        }
        Ok(())
    }
}
