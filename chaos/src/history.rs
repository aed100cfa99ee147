//! The record of a run: every operation with what came of it, and every fault.
//!
//! One process writes it, against one monotonic clock. An event is written *before* a request
//! leaves and *after* its whole answer has arrived, so the order of events is an order that an
//! outside observer could have seen. The file is JSON lines under zstd: a header, then events. It is
//! made durable at the end of each phase of a run, and after each fault has struck and was healed
//! ([`Recorder::sync`]), so that what was recorded by then is not lost when the machine goes down
//! afterwards. Such a file has no end and is not judged, but `zstd -dc` shows what it holds.
//!
//! An operation ends in one of three ways (Jepsen's classification):
//!
//! | outcome | when |
//! |---|---|
//! | ok | a whole 2xx answer |
//! | fail | an answer that proves that nothing was proposed: 4xx, 429, 507, connection refused |
//! | unknown | everything else: it may have happened, may happen later, or never |
//!
//! A batch fails by 400 alone, and by a refused connection: of several shards one may refuse what another
//! one has done.
//!
//! A logical process has one operation in flight. After an unknown outcome it ends, and its
//! client goes on under a new process number, because the operation may still be under way.

use std::collections::BTreeMap;
use std::fs::File;
use std::io::{BufRead, BufReader, Write};
use std::path::Path;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Instant;

use anyhow::{Context, Result, ensure};
use parking_lot::Mutex;
use serde::{Deserialize, Serialize};

/// The format of history files that this build writes and reads.
const FORMAT: u32 = 1;

/// What a run was.
#[derive(Clone, Debug, Default, Serialize, Deserialize)]
pub struct Header {
    /// Of the file.
    pub format: u32,
    /// The scenario's name.
    pub scenario: String,
    /// What the schedule was made from.
    pub seed: u64,
    /// The version of the nodes.
    pub version: String,
    /// When it began, in seconds since 1970.
    pub began_at: u64,
    /// How many nodes.
    pub nodes: usize,
    /// The checkers that judge it.
    pub checkers: Vec<String>,
    /// Figures of coverage with the least that they must be for the run to mean anything: that
    /// faults have struck, and that what they were to provoke was seen.
    pub required: BTreeMap<String, u64>,
    /// The least number of operations that must have succeeded.
    pub least_ok: u64,
    /// The longest time without an acknowledged write that is allowed, in milliseconds.
    pub longest_gap_ms: Option<u64>,
    /// How many leaders may be elected after the first of each group, of all groups together.
    #[serde(default)]
    pub most_elections: Option<u64>,
    /// How much the memory of a node may grow in an hour, in percent of its mean.
    #[serde(default)]
    pub most_growth_percent_per_hour: Option<f64>,
    /// The points at which the nodes' build can die, where nodes die at them; none in older histories.
    #[serde(default)]
    pub crash_points: Vec<String>,
    /// Seconds that a node's process must have run for its memory and files to be judged.
    #[serde(default)]
    pub usage_window_seconds: Option<u64>,
}

/// How fresh a read was to be.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Level {
    /// Sees every write acknowledged before it began.
    Linearizable,
    /// Sees what its own client has seen.
    Session,
    /// Sees whatever the replica has.
    Eventual,
}

impl Level {
    /// The value of `X-Shoal-Consistency`.
    pub fn name(self) -> &'static str {
        match self {
            Level::Linearizable => "linearizable",
            Level::Session => "session",
            Level::Eventual => "eventual",
        }
    }
}

/// By which way a document is looked for.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Way {
    /// By its id.
    Id,
    /// By its own vector, compared with every vector.
    Exact,
    /// By its own vector, through the graph.
    Graph,
    /// By its uid in a filter.
    Filter,
}

/// What was asked.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(tag = "op", rename_all = "snake_case")]
pub enum Call {
    /// Sets the value of a key.
    Write {
        /// The point.
        key: u64,
        /// The value; no two writes have the same.
        uid: String,
    },
    /// Removes a key.
    Delete {
        /// The point.
        key: u64,
    },
    /// Reads the value of a key.
    Read {
        /// The point.
        key: u64,
        /// How fresh.
        level: Level,
    },
    /// Looks for a written value.
    Find {
        /// The point.
        key: u64,
        /// The value whose vector, filter or id is asked for.
        uid: String,
        /// How it is looked for.
        way: Way,
        /// How fresh.
        level: Level,
    },
    /// Writes several keys of one shard at once.
    Batch {
        /// The points.
        keys: Vec<u64>,
        /// The one value that all of them get.
        uid: String,
    },
    /// Reads everything.
    List {
        /// How fresh.
        level: Level,
    },
}

impl Call {
    /// Whether it changes anything.
    pub fn is_write(&self) -> bool {
        matches!(self, Call::Write { .. } | Call::Delete { .. } | Call::Batch { .. })
    }
}

/// What was answered.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(tag = "answer", rename_all = "snake_case")]
pub enum Answer {
    /// A write took effect.
    Done,
    /// A write took effect at this attempt or at an earlier one: the positions are not before it.
    Repeated,
    /// A key's value, absent when it has none, and the index of the write that set it, when the
    /// answer tells.
    Value {
        /// The value.
        uid: Option<String>,
        /// The log index of the write.
        version: Option<u64>,
    },
    /// Everything that is there, in the order it came: key and value.
    Listing {
        /// Keys with their values.
        points: Vec<(u64, String)>,
    },
}

/// How an operation ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Outcome {
    /// It happened.
    Ok,
    /// It did not and will not happen.
    Fail,
    /// Nobody knows.
    Unknown,
}

/// A line of the file.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(tag = "kind", rename_all = "snake_case")]
pub enum Event {
    /// An operation began.
    Invoke {
        /// Where this event stands among all.
        seq: u64,
        /// Nanoseconds since the run began.
        ns: u64,
        /// The logical process.
        process: u64,
        /// The node that was asked.
        node: usize,
        /// What was asked.
        call: Call,
    },
    /// An operation ended.
    Complete {
        /// Where this event stands among all.
        seq: u64,
        /// Nanoseconds since the run began.
        ns: u64,
        /// The logical process.
        process: u64,
        /// How.
        outcome: Outcome,
        /// The HTTP status, when there was one.
        status: Option<u16>,
        /// What was answered, when that was whole.
        answer: Option<Answer>,
        /// The log positions that the answer names: shards with their indexes.
        positions: Vec<(u64, u64)>,
        /// What went wrong.
        error: Option<String>,
    },
    /// A fault began or ended, or something else happened to the cluster.
    Fault {
        /// Where this event stands among all.
        seq: u64,
        /// Nanoseconds since the run began.
        ns: u64,
        /// The fault's name.
        name: String,
        /// Whether it begins, ends, or is a moment.
        phase: Phase,
        /// What it was done to.
        detail: String,
    },
    /// What a node said of one of its groups.
    Probe {
        /// Where this event stands among all.
        seq: u64,
        /// Nanoseconds since the run began.
        ns: u64,
        /// What it said.
        sample: Sample,
    },
    /// A backup is about to be asked for.
    BackupBegan {
        /// Where this event stands among all.
        seq: u64,
        /// Nanoseconds since the run began.
        ns: u64,
        /// Its number in this run.
        backup: u64,
    },
    /// A backup is whole.
    BackupMade {
        /// Where this event stands among all.
        seq: u64,
        /// Nanoseconds since the run began.
        ns: u64,
        /// Its number in this run.
        backup: u64,
        /// Its name in the target.
        id: String,
        /// The shards that it holds, each with the last entry of its log that is in it.
        cuts: Vec<(u64, u64)>,
    },
    /// What a node of a new cluster showed while a backup was put back into that, or afterwards.
    Restored {
        /// Where this event stands among all.
        seq: u64,
        /// Nanoseconds since the run began.
        ns: u64,
        /// The backup's number in this run.
        backup: u64,
        /// The node of the new cluster, from 0.
        node: usize,
        /// Everything that it showed: keys with their values.
        points: Vec<(u64, String)>,
    },
    /// What a node's process held of the machine.
    Usage {
        /// Where this event stands among all.
        seq: u64,
        /// Nanoseconds since the run began.
        ns: u64,
        /// The node, from 0.
        node: usize,
        /// Counts the starts of its process; 0 in older histories, which do not tell.
        #[serde(default)]
        run: u64,
        /// Its resident memory.
        rss_bytes: u64,
        /// Its open files and connections.
        files: u32,
    },
}

/// Where an event stands in its fault.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Phase {
    /// The fault begins.
    Begin,
    /// The fault ends.
    End,
    /// It is over at once.
    Moment,
    /// Not a fault: something that must never happen was seen.
    Wrong,
}

/// A node's word on one of its groups.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Sample {
    /// The node's id in the cluster.
    pub node: u64,
    /// Counts the starts of the process.
    pub run: u64,
    /// The group.
    pub group: u64,
    /// Whether it leads.
    pub is_leader: bool,
    /// Of a leader: who is in the group.
    #[serde(default)]
    pub members: Vec<u64>,
    /// The term.
    pub term: u64,
    /// Dropped up to here.
    pub purged: u64,
    /// Durable in the state machine up to here.
    pub checkpoint: u64,
    /// Applied up to here.
    pub applied: u64,
    /// In the log up to here.
    pub last: u64,
    /// The latest agreed index at which the state was hashed, and the hash.
    pub hash: Option<(u64, String)>,
    /// Which node it was and on which disk; older histories do not tell.
    #[serde(default)]
    pub of: Option<Origin>,
}

/// A node and its disk, whatever id it has.
#[derive(Clone, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
pub struct Origin {
    /// The node's name.
    pub name: String,
    /// How many disks it had lost before.
    pub disk: u64,
}

/// What a node's process held of the machine at a moment.
#[derive(Clone, Copy, Debug)]
pub struct Usage {
    /// Nanoseconds since the run began.
    pub ns: u64,
    /// The node, from 0.
    pub node: usize,
    /// Counts the starts of its process; 0 in older histories, which do not tell.
    pub run: u64,
    /// Its resident memory.
    pub rss_bytes: u64,
    /// Its open files and connections.
    pub files: u32,
}

/// An operation, put together from its events.
#[derive(Clone, Debug, PartialEq)]
pub struct Operation {
    /// The logical process.
    pub process: u64,
    /// The node that was asked.
    pub node: usize,
    /// What was asked.
    pub call: Call,
    /// When it began: place among the events.
    pub began: u64,
    /// When its answer was there; the end of time for an unknown outcome.
    pub ended: u64,
    /// When it began, in nanoseconds.
    pub began_ns: u64,
    /// When it ended or was given up, in nanoseconds.
    pub ended_ns: u64,
    /// How it ended.
    pub outcome: Outcome,
    /// The HTTP status, when there was one.
    pub status: Option<u16>,
    /// What was answered.
    pub answer: Option<Answer>,
    /// The log positions that the answer names.
    pub positions: BTreeMap<u64, u64>,
}

impl Operation {
    /// Whether it is known to have happened.
    pub fn is_ok(&self) -> bool {
        self.outcome == Outcome::Ok
    }

    /// Whether it may have happened.
    pub fn may_have_happened(&self) -> bool {
        self.outcome != Outcome::Fail
    }
}

/// A whole history.
#[derive(Clone, Debug, Default)]
pub struct History {
    /// What the run was.
    pub header: Header,
    /// Everything that was recorded, in order.
    pub events: Vec<Event>,
}

impl History {
    /// Reads a history file.
    ///
    /// # Errors
    /// When it is not one, or of another format.
    pub fn read(path: &Path) -> Result<History> {
        let file = File::open(path).with_context(|| path.display().to_string())?;
        let mut lines = BufReader::new(zstd::Decoder::new(file)?).lines();
        let header = lines.next().context("an empty history")??;
        let header: Header = serde_json::from_str(&header).context("the header")?;
        ensure!(header.format == FORMAT, "format {} is not known to this build", header.format);
        let mut events = Vec::new();
        for line in lines {
            events.push(serde_json::from_str(&line?).context("an event")?);
        }
        Ok(History { header, events })
    }

    /// Writes a history file durably.
    ///
    /// # Errors
    /// When it cannot be written.
    pub fn write(&self, path: &Path) -> Result<()> {
        let file = File::create(path).with_context(|| path.display().to_string())?;
        let mut file = zstd::Encoder::new(file, 3)?;
        let header = Header { format: FORMAT, ..self.header.clone() };
        writeln!(file, "{}", serde_json::to_string(&header)?)?;
        for event in &self.events {
            writeln!(file, "{}", serde_json::to_string(event)?)?;
        }
        Ok(file.finish()?.sync_all()?)
    }

    /// The operations in the order in which they began. One without an end is unknown.
    pub fn operations(&self) -> Vec<Operation> {
        let mut operations: Vec<Operation> = Vec::new();
        let mut open: BTreeMap<u64, usize> = BTreeMap::new();
        let last_ns = self.events.last().map_or(0, Event::ns);
        for event in &self.events {
            match event {
                Event::Invoke { seq, ns, process, node, call } => {
                    open.insert(*process, operations.len());
                    operations.push(Operation {
                        process: *process,
                        node: *node,
                        call: call.clone(),
                        began: *seq,
                        ended: u64::MAX,
                        began_ns: *ns,
                        ended_ns: last_ns,
                        outcome: Outcome::Unknown,
                        status: None,
                        answer: None,
                        positions: BTreeMap::new(),
                    });
                }
                Event::Complete { seq, ns, process, outcome, status, answer, positions, .. } => {
                    let Some(at) = open.remove(process) else { continue };
                    let operation = &mut operations[at];
                    operation.outcome = *outcome;
                    operation.status = *status;
                    operation.answer.clone_from(answer);
                    operation.positions = positions.iter().copied().collect();
                    operation.ended_ns = *ns;
                    if *outcome != Outcome::Unknown {
                        operation.ended = *seq;
                    }
                }
                Event::Fault { .. }
                | Event::Probe { .. }
                | Event::BackupBegan { .. }
                | Event::BackupMade { .. }
                | Event::Restored { .. }
                | Event::Usage { .. } => {}
            }
        }
        operations
    }

    /// Fault events: time, name, phase, detail.
    pub fn faults(&self) -> impl Iterator<Item = (u64, &str, Phase, &str)> {
        self.events.iter().filter_map(|event| match event {
            Event::Fault { ns, name, phase, detail, .. } => {
                Some((*ns, name.as_str(), *phase, detail.as_str()))
            }
            _ => None,
        })
    }

    /// What nodes said of their groups, in order.
    pub fn samples(&self) -> impl Iterator<Item = &Sample> {
        self.events.iter().filter_map(|event| match event {
            Event::Probe { sample, .. } => Some(sample),
            _ => None,
        })
    }

    /// What processes held of the machine, in order.
    pub fn usage(&self) -> impl Iterator<Item = Usage> {
        self.events.iter().filter_map(|event| match event {
            Event::Usage { ns, node, run, rss_bytes, files, .. } => {
                Some(Usage { ns: *ns, node: *node, run: *run, rss_bytes: *rss_bytes, files: *files })
            }
            _ => None,
        })
    }
}

impl Event {
    /// Nanoseconds since the run began.
    pub fn ns(&self) -> u64 {
        match self {
            Event::Invoke { ns, .. }
            | Event::Complete { ns, .. }
            | Event::Fault { ns, .. }
            | Event::Probe { ns, .. }
            | Event::BackupBegan { ns, .. }
            | Event::BackupMade { ns, .. }
            | Event::Restored { ns, .. }
            | Event::Usage { ns, .. } => *ns,
        }
    }
}

/// Writes a history while it happens.
pub struct Recorder {
    started: Instant,
    seq: AtomicU64,
    processes: AtomicU64,
    file: Mutex<Option<zstd::Encoder<'static, File>>>,
}

impl Recorder {
    /// Begins a history file.
    ///
    /// # Errors
    /// When it cannot be written.
    pub fn create(path: &Path, header: &Header) -> Result<Recorder> {
        let file = File::create(path).with_context(|| path.display().to_string())?;
        let mut file = zstd::Encoder::new(file, 3)?;
        let header = Header { format: FORMAT, ..header.clone() };
        writeln!(file, "{}", serde_json::to_string(&header)?)?;
        Ok(Recorder {
            started: Instant::now(),
            // Zero stands for "before everything".
            seq: AtomicU64::new(1),
            processes: AtomicU64::new(0),
            file: Mutex::new(Some(file)),
        })
    }

    /// A process number that was never used before.
    pub fn new_process(&self) -> u64 {
        self.processes.fetch_add(1, Ordering::Relaxed)
    }

    /// An operation is about to be sent.
    pub fn invoke(&self, process: u64, node: usize, call: &Call) {
        self.write(|seq, ns| Event::Invoke { seq, ns, process, node, call: call.clone() });
    }

    /// An operation has ended.
    pub fn complete(&self, process: u64, ending: Ending) {
        let Ending { outcome, status, answer, positions, error } = ending;
        let positions = positions.into_iter().collect();
        self.write(|seq, ns| Event::Complete { seq, ns, process, outcome, status, answer, positions, error });
    }

    /// Something was done to the cluster.
    pub fn fault(&self, name: &str, phase: Phase, detail: &str) {
        self.write(|seq, ns| Event::Fault { seq, ns, name: name.into(), phase, detail: detail.into() });
    }

    /// A node has spoken of a group.
    pub fn probe(&self, sample: Sample) {
        self.write(|seq, ns| Event::Probe { seq, ns, sample });
    }

    /// A backup is about to be asked for.
    pub fn backup_began(&self, backup: u64) {
        self.write(|seq, ns| Event::BackupBegan { seq, ns, backup });
    }

    /// A backup is whole: its name, and where it cuts the logs of its shards.
    pub fn backup_made(&self, backup: u64, id: &str, cuts: Vec<(u64, u64)>) {
        self.write(|seq, ns| Event::BackupMade { seq, ns, backup, id: id.into(), cuts });
    }

    /// A node of the cluster that a backup is put back into shows this.
    pub fn restored(&self, backup: u64, node: usize, points: Vec<(u64, String)>) {
        self.write(|seq, ns| Event::Restored { seq, ns, backup, node, points });
    }

    /// The process that a node was started for the `run`th time holds so much.
    pub fn usage(&self, node: usize, run: u64, rss_bytes: u64, files: u32) {
        self.write(|seq, ns| Event::Usage { seq, ns, node, run, rss_bytes, files });
    }

    /// Makes what was recorded so far durable: called at the end of a phase, and at both ends of a fault.
    ///
    /// # Errors
    /// When it cannot be written.
    pub fn sync(&self) -> Result<()> {
        let file = match self.file.lock().as_mut() {
            Some(file) => {
                file.flush()?;
                file.get_ref().try_clone()?
            }
            None => return Ok(()),
        };
        // Without the lock: whoever records does not wait for the disk.
        Ok(file.sync_all()?)
    }

    /// Ends the file durably. What is recorded later is lost.
    ///
    /// # Errors
    /// When it cannot be written.
    pub fn finish(&self) -> Result<()> {
        if let Some(file) = self.file.lock().take() {
            file.finish()?.sync_all()?;
        }
        Ok(())
    }

    fn write(&self, event: impl FnOnce(u64, u64) -> Event) {
        let mut file = self.file.lock();
        // Number and time are taken under the lock, so that the file is in their order.
        let seq = self.seq.fetch_add(1, Ordering::Relaxed);
        let event = event(seq, self.started.elapsed().as_nanos() as u64);
        let Some(file) = file.as_mut() else { return };
        let line = serde_json::to_string(&event).expect("an event is plain data");
        // A history that cannot be written is no proof of anything.
        writeln!(file, "{line}").expect("the history file can be written");
    }
}

/// How an operation ended, as it is recorded.
#[derive(Clone, Debug)]
pub struct Ending {
    /// How.
    pub outcome: Outcome,
    /// The HTTP status, when there was one.
    pub status: Option<u16>,
    /// What was answered.
    pub answer: Option<Answer>,
    /// The log positions that the answer names.
    pub positions: BTreeMap<u64, u64>,
    /// What went wrong.
    pub error: Option<String>,
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_synced_is_in_the_file_before_its_end() {
        let dir = tempfile::tempdir().expect("a directory");
        let path = dir.path().join("history.jsonl.zst");
        let recorder = Recorder::create(&path, &Header::default()).expect("created");
        recorder.fault("kill", Phase::Moment, "n1");
        recorder.sync().expect("synced");
        let file = File::open(&path).expect("there");
        let lines = BufReader::new(zstd::Decoder::new(file).expect("zstd")).lines();
        let whole: Vec<String> = lines.map_while(Result::ok).collect();
        assert_eq!(whole.len(), 2, "the header and an event: {whole:?}");
        assert!(History::read(&path).is_err(), "a history without an end is not judged");
        recorder.finish().expect("finished");
        recorder.sync().expect("nothing is left to sync");
        assert_eq!(History::read(&path).expect("whole").events.len(), 1);
    }

    #[test]
    fn usage_of_an_older_history_has_no_run() {
        let line = r#"{"kind":"usage","seq":1,"ns":2,"node":0,"rss_bytes":3,"files":4}"#;
        let events = vec![serde_json::from_str(line).expect("an event")];
        let history = History { events, ..History::default() };
        let usage: Vec<(u64, u64)> = history.usage().map(|usage| (usage.run, usage.rss_bytes)).collect();
        assert_eq!(usage, [(0, 3)]);
    }

    #[test]
    fn what_is_written_is_read() {
        let dir = tempfile::tempdir().expect("a directory");
        let path = dir.path().join("history.jsonl.zst");
        let header = Header { scenario: "s".into(), seed: 7, ..Header::default() };
        let recorder = Recorder::create(&path, &header).expect("created");
        let (one, two) = (recorder.new_process(), recorder.new_process());
        recorder.invoke(one, 0, &Call::Write { key: 1, uid: "a".into() });
        recorder.invoke(two, 1, &Call::Read { key: 1, level: Level::Linearizable });
        recorder.fault("kill", Phase::Moment, "n1");
        let answer = Answer::Value { uid: Some("a".into()), version: Some(3) };
        let ending = Ending {
            outcome: Outcome::Ok,
            status: Some(200),
            answer: Some(answer.clone()),
            positions: BTreeMap::from([(1, 3)]),
            error: None,
        };
        recorder.complete(two, ending);
        recorder.finish().expect("finished");

        let history = History::read(&path).expect("read");
        assert_eq!((history.header.seed, history.header.format), (7, FORMAT));
        let operations = history.operations();
        assert_eq!(operations.len(), 2);
        assert_eq!((operations[0].outcome, operations[0].ended), (Outcome::Unknown, u64::MAX));
        assert_eq!(operations[1].answer.as_ref(), Some(&answer));
        assert_eq!(operations[1].positions.values().copied().collect::<Vec<_>>(), [3]);
        assert!(operations[0].began < operations[1].began && operations[1].began < operations[1].ended);
        assert_eq!(history.faults().map(|(_, name, ..)| name).collect::<Vec<_>>(), ["kill"]);
    }
}
