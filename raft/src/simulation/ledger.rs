//! The state machine of every simulated group: a history of writes to registers, or the control
//! group's own state. Between checkpoints it is in memory only.

use std::collections::BTreeMap;
use std::io;
use std::path::Path;
use std::sync::Arc;

use bytes::Bytes;
use parking_lot::Mutex;
use serde::{Deserialize, Serialize};
use shoal_proto::{GroupId, NodeId, codec};

use super::disk::Disk;
use super::net::Life;
use super::truth::Truth;
use crate::cluster::{ClusterState, Command};
use crate::machine::{Committed, Export, Exported, StateMachine};

/// A write to a register.
#[derive(Clone, Copy, Debug, Serialize, Deserialize)]
pub struct Write {
    pub key: u8,
    pub uid: u64,
}

#[derive(Clone, Default, Serialize, Deserialize)]
struct Held {
    tag: Option<Vec<u8>>,
    last: u64,
    /// By index, which write.
    history: BTreeMap<u64, u64>,
    /// By key, the index of its last write.
    versions: BTreeMap<u8, u64>,
    cluster: ClusterState,
}

/// The state of one group at one run of one node.
pub struct Ledger {
    pub group: GroupId,
    pub node: NodeId,
    pub disk: Arc<Disk>,
    pub life: Arc<Life>,
    pub truth: Arc<Truth>,
    held: Mutex<Held>,
}

impl Ledger {
    pub fn open(
        group: GroupId,
        node: NodeId,
        disk: Arc<Disk>,
        life: Arc<Life>,
        truth: Arc<Truth>,
    ) -> Arc<Ledger> {
        let state = disk.state(group.0);
        let held = state.map(|state| codec::decode(&state).expect("a state that was kept can be read"));
        let held = Mutex::new(held.unwrap_or_default());
        Arc::new(Ledger { group, node, disk, life, truth, held })
    }

    /// The last index that was applied.
    pub fn last(&self) -> u64 {
        self.held.lock().last
    }

    /// Takes over the state of another replica, durably.
    pub fn become_like(&self, other: &Ledger) -> io::Result<()> {
        self.alive()?;
        let state = other.held.lock().clone();
        self.disk.keep_state(self.group.0, codec::encode(&state));
        *self.held.lock() = state;
        Ok(())
    }

    /// The index of a key's last write.
    pub fn version(&self, key: u8) -> u64 {
        self.held.lock().versions.get(&key).copied().unwrap_or_default()
    }

    /// All writes by index.
    pub fn history(&self) -> BTreeMap<u64, u64> {
        self.held.lock().history.clone()
    }

    /// What the control group has agreed.
    pub fn cluster(&self) -> ClusterState {
        self.held.lock().cluster.clone()
    }

    fn alive(&self) -> io::Result<()> {
        if self.life.is_alive() { Ok(()) } else { Err(io::Error::other("this process is dead")) }
    }
}

struct Once(Mutex<Option<Vec<u8>>>);

impl Export for Once {
    fn next_piece(&self) -> io::Result<Option<Vec<u8>>> {
        Ok(self.0.lock().take())
    }
}

impl StateMachine for Ledger {
    fn applied_tag(&self) -> io::Result<Option<Vec<u8>>> {
        Ok(self.held.lock().tag.clone())
    }

    fn apply(&self, entries: Vec<Committed>) -> io::Result<Vec<Bytes>> {
        self.alive()?;
        let mut held = self.held.lock();
        let mut replies = Vec::new();
        for Committed { index, tag, command } in entries {
            self.truth.applied(self.group, index, &tag, command.as_deref(), self.node);
            if index != held.last + 1 && held.last != 0 {
                self.truth.violation(format!("group {}: {index} is applied after {}", self.group, held.last));
            }
            let mut reply = Bytes::new();
            if let Some(command) = command {
                if self.group == GroupId::CONTROL {
                    let command: Command = codec::decode(&command).expect("a command");
                    reply = codec::encode(&held.cluster.apply(command)).into();
                } else {
                    let Write { key, uid } = codec::decode(&command).expect("a write");
                    held.history.insert(index, uid);
                    held.versions.insert(key, index);
                }
            }
            held.tag = Some(tag);
            held.last = index;
            replies.push(reply);
        }
        Ok(replies)
    }

    fn checkpoint(&self) -> io::Result<Option<Vec<u8>>> {
        self.alive()?;
        self.truth.count("checkpoints");
        let held = self.held.lock();
        self.disk.keep_state(self.group.0, codec::encode(&*held));
        Ok(held.tag.clone())
    }

    fn export(&self) -> io::Result<Exported> {
        let held = self.held.lock();
        Ok((held.tag.clone(), Box::new(Once(Mutex::new(Some(codec::encode(&*held)))))))
    }

    fn install(&self, tag: Vec<u8>, file: &Path) -> io::Result<()> {
        self.alive()?;
        self.truth.count("snapshots");
        let bytes = std::fs::read(file)?;
        // One frame: length, checksum, piece; then the frame that ends the file.
        let body = bytes.get(8..bytes.len().saturating_sub(8)).unwrap_or_default();
        let mut fresh: Held = codec::decode(body).map_err(io::Error::other)?;
        fresh.tag = Some(tag);
        self.disk.keep_state(self.group.0, codec::encode(&fresh));
        *self.held.lock() = fresh;
        Ok(())
    }
}
