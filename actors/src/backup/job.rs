//! What a node is at, as everybody can ask for it.

use serde::{Deserialize, Serialize};
use shoal_proto::{Error, NodeId};
use tokio::sync::oneshot;

use crate::cluster::unix_now;

/// What is done with a backup.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum JobKind {
    /// It is made.
    Create,
    /// It is read and compared with its hashes.
    Verify,
    /// It is put back.
    Restore,
    /// It is deleted.
    Delete,
    /// A snapshot of one collection is made; only from [`SNAPSHOTS`](shoal_proto::Level::SNAPSHOTS) on: builds
    /// of the level before could not read the report of a node that was ever at one.
    Snapshot,
}

impl JobKind {
    /// Its name for people and metrics.
    pub fn name(self) -> &'static str {
        match self {
            JobKind::Create => "create",
            JobKind::Verify => "verify",
            JobKind::Restore => "restore",
            JobKind::Delete => "delete",
            JobKind::Snapshot => "snapshot",
        }
    }
}

/// How it stands.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum JobState {
    /// It goes on.
    Running,
    /// It is done.
    Done,
    /// It has failed, with the reason.
    Failed(String),
}

/// Something that takes a while.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Job {
    /// What is done.
    pub kind: JobKind,
    /// With which backup.
    pub backup: String,
    /// The node that does it.
    pub node: NodeId,
    /// How it stands.
    pub state: JobState,
    /// What it is at, for people.
    pub at: String,
    /// Bytes that were read or written so far.
    pub bytes_done: u64,
    /// Bytes in all; zero while that is not known.
    pub bytes_total: u64,
    /// Of the bytes done, those that the target did not have yet.
    pub bytes_new: u64,
    /// Seconds since the Unix epoch.
    pub started_at: u64,
    /// Seconds since the Unix epoch, once it is over.
    pub ended_at: Option<u64>,
}

/// A job that was begun, for somebody who waits for its end. It goes on when nobody does.
pub struct Begun {
    /// As it began.
    pub job: Job,
    pub(super) ended: oneshot::Receiver<Result<(), Error>>,
}

impl Begun {
    /// Waits for its end.
    ///
    /// # Errors
    /// What it failed with.
    pub async fn wait(self) -> Result<(), Error> {
        self.ended.await.unwrap_or_else(|_| Err(Error::internal("the job was given up")))
    }
}

impl Job {
    pub(super) fn begin(kind: JobKind, backup: &str, node: NodeId) -> Job {
        Job {
            kind,
            backup: backup.to_owned(),
            node,
            state: JobState::Running,
            at: String::new(),
            bytes_done: 0,
            bytes_total: 0,
            bytes_new: 0,
            started_at: unix_now(),
            ended_at: None,
        }
    }

    pub(super) fn end(&mut self, ended: &Result<(), Error>) {
        self.ended_at = Some(unix_now());
        self.state = match ended {
            Ok(()) => JobState::Done,
            Err(error) => JobState::Failed(error.message.clone()),
        };
    }
}
