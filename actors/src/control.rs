//! The control group's state machine: [`ClusterState`] in memory, a checked file for restarts,
//! and a watch that tells this node of every change.

use std::io;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use bytes::Bytes;
use parking_lot::Mutex;
use shoal_engine::files;
use shoal_proto::{ErrorCode, Level, codec};
use shoal_raft::cluster::{self, ClusterState, Command, Response, too_old};
use shoal_raft::machine::Exported;
use shoal_raft::{Committed, Export, StateMachine};
use tokio::sync::watch;

use crate::levels;

struct Held {
    tag: Option<Vec<u8>>,
    state: ClusterState,
}

/// The control group's state on this node.
pub struct Control {
    file: PathBuf,
    held: Mutex<Held>,
    changes: watch::Sender<Arc<ClusterState>>,
}

impl Control {
    /// Opens the state that the last checkpoint left, or an empty one.
    pub fn open(dir: &Path) -> io::Result<Control> {
        std::fs::create_dir_all(dir)?;
        let file = dir.join("state");
        let held = match std::fs::read(&file) {
            Ok(bytes) => unseal(&bytes)?,
            Err(error) if error.kind() == io::ErrorKind::NotFound => {
                Held { tag: None, state: ClusterState::default() }
            }
            Err(error) => return Err(error),
        };
        let (changes, _) = watch::channel(Arc::new(held.state.clone()));
        Ok(Control { file, held: Mutex::new(held), changes })
    }

    /// The state as it is, and news of every change.
    pub fn watch(&self) -> watch::Receiver<Arc<ClusterState>> {
        self.changes.subscribe()
    }

    fn save(&self, held: &Held) -> io::Result<()> {
        files::replace(&self.file, &seal(held))
    }
}

fn seal(held: &Held) -> Vec<u8> {
    let body = cluster::write(&held.tag, &held.state);
    [&blake3::hash(&body).as_bytes()[..], &body].concat()
}

fn unseal(bytes: &[u8]) -> io::Result<Held> {
    let damaged =
        |reason: String| io::Error::new(io::ErrorKind::InvalidData, format!("cluster state: {reason}"));
    let (sum, body) = bytes.split_at_checked(32).ok_or_else(|| damaged("short".into()))?;
    if sum != blake3::hash(body).as_bytes() {
        return Err(damaged("wrong checksum".into()));
    }
    // Whole, but of another version.
    let read = cluster::read(body);
    let (tag, state) = read.map_err(|error| io::Error::other(format!("cluster state: {error}")))?;
    if state.level > Level::LATEST {
        return Err(io::Error::other(too_old(Level::LATEST, state.level)));
    }
    Ok(Held { tag, state })
}

struct Once(Mutex<Option<Vec<u8>>>);

impl Export for Once {
    fn next_piece(&self) -> io::Result<Option<Vec<u8>>> {
        Ok(self.0.lock().take())
    }
}

impl StateMachine for Control {
    fn applied_tag(&self) -> io::Result<Option<Vec<u8>>> {
        Ok(self.held.lock().tag.clone())
    }

    fn apply(&self, entries: Vec<Committed>) -> io::Result<Vec<Bytes>> {
        let mut held = self.held.lock();
        let before = held.state.version;
        let mut replies = Vec::with_capacity(entries.len());
        for entry in entries {
            let response = match entry.command.map(|command| codec::decode::<Command>(&command)) {
                None => Response::Done,
                Some(Ok(command)) => held.state.apply(command),
                Some(Err(error)) => Response::Rejected(shoal_proto::Error::new(
                    ErrorCode::Internal,
                    format!("command: {error}"),
                )),
            };
            if held.state.level > Level::LATEST {
                // What follows in the log may mean anything.
                levels::exit_too_old(held.state.level);
            }
            held.tag = Some(entry.tag);
            replies.push(codec::encode(&response).into());
        }
        if held.state.version != before {
            self.changes.send_replace(Arc::new(held.state.clone()));
        }
        Ok(replies)
    }

    fn checkpoint(&self) -> io::Result<Option<Vec<u8>>> {
        let held = self.held.lock();
        self.save(&held)?;
        Ok(held.tag.clone())
    }

    fn export(&self) -> io::Result<Exported> {
        let held = self.held.lock();
        Ok((held.tag.clone(), Box::new(Once(Mutex::new(Some(seal(&held)))))))
    }

    fn install(&self, tag: Vec<u8>, file: &Path) -> io::Result<()> {
        let bytes = std::fs::read(file)?;
        // One frame: length, checksum, piece; then the frame that ends the file.
        let body = bytes.get(8..bytes.len().saturating_sub(8)).unwrap_or_default();
        let mut fresh = unseal(body)?;
        fresh.tag = Some(tag);
        // A checkpoint writes the same file.
        let mut held = self.held.lock();
        self.save(&fresh)?;
        *held = fresh;
        self.changes.send_replace(Arc::new(held.state.clone()));
        Ok(())
    }
}
