//! The state machine of every simulated group: a history of writes to registers, or the control
//! group's own state. Between checkpoints it is in memory only.

use std::collections::BTreeMap;
use std::fs::File;
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
use crate::snapshot::frames::Frame;

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

/// Bytes in one piece of a snapshot: few, so that there are many.
const PIECE_BYTES: usize = 200;

/// A copy, and how much of it was read.
struct Copied {
    bytes: Vec<u8>,
    read: Mutex<usize>,
}

impl Export for Copied {
    fn next_piece(&self) -> io::Result<Option<Vec<u8>>> {
        let mut read = self.read.lock();
        let rest = &self.bytes[*read..];
        let piece = &rest[..rest.len().min(PIECE_BYTES)];
        *read += piece.len();
        Ok((!piece.is_empty()).then(|| piece.to_vec()))
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
        Ok((held.tag.clone(), Box::new(Copied { bytes: codec::encode(&*held), read: Mutex::new(0) })))
    }

    fn install(&self, tag: Vec<u8>, file: &Path) -> io::Result<()> {
        self.alive()?;
        self.truth.count("snapshots");
        let (mut file, mut body) = (File::open(file)?, Vec::new());
        while let Frame::Piece(piece) = Frame::read(&mut file)? {
            body.extend(piece);
        }
        let mut fresh: Held = codec::decode(&body).map_err(io::Error::other)?;
        fresh.tag = Some(tag);
        self.disk.keep_state(self.group.0, codec::encode(&fresh));
        *self.held.lock() = fresh;
        Ok(())
    }
}
