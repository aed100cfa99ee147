//! A node's disk: it outlives the node's process, but for what was not synced.

use std::collections::BTreeMap;
use std::io;
use std::sync::Arc;
use std::time::Duration;

use parking_lot::Mutex;
use rand::RngExt;
use rand::rngs::StdRng;
use tokio::sync::mpsc::{UnboundedReceiver, UnboundedSender, unbounded_channel};

use super::net::Life;
use crate::log::record;
use crate::log::writer::{Batch, Change, Op, Queue, Records, Writer, stopped};

/// One group's records, with raft-engine's rules.
#[derive(Clone, Debug, Default)]
struct Stored {
    entries: BTreeMap<u64, Vec<u8>>,
    keys: BTreeMap<&'static [u8], Vec<u8>>,
}

type Image = BTreeMap<u64, Stored>;

fn apply(image: &mut Image, group: u64, change: &Change) {
    let stored = image.entry(group).or_default();
    match change.clone() {
        Change::Append { first, bodies, clear_tail } => {
            if clear_tail {
                stored.keys.remove(record::TAIL);
            }
            if let Some((last, _)) = stored.entries.last_key_value() {
                assert!(first <= last + 1, "group {group}: a hole between {last} and {first}");
            }
            if let Some((oldest, _)) = stored.entries.first_key_value() {
                assert!(first >= *oldest, "group {group}: {first} was purged, the log begins at {oldest}");
            }
            stored.entries.split_off(&first);
            stored.entries.extend((first..).zip(bodies));
        }
        Change::Put { key, value } => drop(stored.keys.insert(key, value)),
        Change::Purge { upto, purged } => {
            stored.keys.insert(record::PURGED, purged);
            stored.entries = stored.entries.split_off(&(upto + 1));
        }
        Change::Reset { kept } => {
            *stored = Stored { keys: kept.into_iter().collect(), ..Stored::default() };
        }
    }
}

#[derive(Default)]
struct Platter {
    written: Image,
    synced: Image,
    /// What was written since the last sync.
    unsynced: Vec<Vec<(u64, Change)>>,
    /// What the state machines have made durable, by group.
    states: BTreeMap<u64, Vec<u8>>,
    /// How long a sync takes.
    pace: Duration,
}

/// A disk.
#[derive(Default)]
pub struct Disk(Mutex<Platter>);

impl Disk {
    /// The power fails. A part of what was not synced may be there all the same.
    pub fn crash(&self, coin: &mut StdRng) {
        let mut platter = self.0.lock();
        let unsynced = std::mem::take(&mut platter.unsynced);
        let survivors = coin.random_range(0..=unsynced.len());
        for (group, change) in unsynced.iter().take(survivors).flatten() {
            apply(&mut platter.synced, *group, change);
        }
        platter.written = platter.synced.clone();
    }

    /// From now on a sync takes so long.
    pub fn set_pace(&self, pace: Duration) {
        self.0.lock().pace = pace;
    }

    /// What a state machine has made durable.
    pub fn state(&self, group: u64) -> Option<Vec<u8>> {
        self.0.lock().states.get(&group).cloned()
    }

    /// Makes a state durable.
    pub fn keep_state(&self, group: u64, state: Vec<u8>) {
        self.0.lock().states.insert(group, state);
    }

    /// Forgets a group's state.
    pub fn forget_state(&self, group: u64) {
        self.0.lock().states.remove(&group);
    }
}

/// The records of one run of a node's process.
pub struct SimulatedRecords {
    pub disk: Arc<Disk>,
    pub life: Arc<Life>,
    /// Whether a sync does nothing.
    pub sync_is_a_lie: bool,
    /// Whether votes are not kept.
    pub votes_are_a_lie: bool,
}

impl Records for SimulatedRecords {
    fn write(&mut self, mut changes: Vec<(u64, Change)>, sync: bool) {
        assert!(self.life.is_alive(), "a dead process writes nothing");
        if self.votes_are_a_lie {
            changes.retain(|(_, change)| !matches!(change, Change::Put { key: record::VOTE, .. }));
        }
        let mut platter = self.disk.0.lock();
        for (group, change) in &changes {
            apply(&mut platter.written, *group, change);
        }
        platter.unsynced.push(changes);
        if sync && !self.sync_is_a_lie {
            platter.synced = platter.written.clone();
            platter.unsynced.clear();
        }
    }

    fn entries(&self, group: u64, first: u64, end: u64) -> io::Result<Vec<Vec<u8>>> {
        let platter = self.disk.0.lock();
        let stored = platter.written.get(&group);
        Ok(stored.map_or_else(Vec::new, |stored| {
            stored.entries.range(first..end.max(first)).map(|(_, body)| body.clone()).collect()
        }))
    }

    fn get(&self, group: u64, key: &[u8]) -> Option<Vec<u8>> {
        self.disk.0.lock().written.get(&group)?.keys.get(key).cloned()
    }

    fn span(&self, group: u64) -> Option<(u64, u64)> {
        let platter = self.disk.0.lock();
        let entries = &platter.written.get(&group)?.entries;
        Some((*entries.first_key_value()?.0, *entries.last_key_value()?.0))
    }

    fn groups(&self) -> Vec<u64> {
        self.disk.0.lock().written.keys().copied().collect()
    }

    fn patience(&self) -> Duration {
        Duration::MAX
    }

    fn tend(&mut self, _is_idle: bool) {}
}

struct Line(UnboundedSender<Op>);

impl Queue for Line {
    fn submit(&self, op: Op) -> io::Result<()> {
        self.0.send(op).map_err(|_| stopped())
    }
}

/// The queue of a writer that runs as a task, until its process dies.
pub fn queue(records: SimulatedRecords) -> Arc<dyn Queue> {
    let (sender, ops) = unbounded_channel();
    let (disk, life) = (records.disk.clone(), records.life.clone());
    tokio::spawn(async move { life.clone().live(drive(ops, Writer::new(records), disk, &life)).await });
    Arc::new(Line(sender))
}

async fn drive(
    mut ops: UnboundedReceiver<Op>,
    mut writer: Writer<SimulatedRecords>,
    disk: Arc<Disk>,
    life: &Life,
) {
    while let Some(op) = ops.recv().await {
        let (batch, read) = Batch::gather(op, || ops.try_recv().ok());
        if !batch.is_empty() {
            let pace = disk.0.lock().pace;
            tokio::time::sleep(pace.mul_f64(life.chance(0.5..1.5))).await;
            writer.commit(batch);
        }
        if let Some(read) = read {
            writer.read(read);
        }
    }
}
