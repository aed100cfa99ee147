//! Checkers: pure functions from a history to a verdict. None of them sees the cluster, so an
//! old history can be judged again (`chaos check FILE`) when a checker has improved.
//!
//! | checker | promise |
//! |---|---|
//! | [`register`] | linearizable reads and writes of single points, by search and by versions |
//! | [`set`] | nothing lost, stale, phantom, duplicate or resurrected |
//! | [`visibility`] | what was acknowledged is found, what was deleted is not |
//! | [`session`] | a client never goes back behind what it has seen |
//! | [`backup`] | what a backup holds was there at one moment while it was made |
//! | [`batch`] | the parts of one request in one shard appear together |
//! | [`raft`] | one leader a term, positions in order, replicas with equal state |
//! | [`identity`] | an id belongs to one node and its one disk for ever |
//! | [`overload`] | more than can be done does not keep from doing what can |
//! | [`usage`] | memory and open files do not grow |
//! | [`availability`] | how long writes stood still |
//! | [`coverage`] | the faults really struck, and enough succeeded to mean something |

pub mod availability;
pub mod backup;
pub mod batch;
pub mod coverage;
pub mod identity;
mod order;
pub mod overload;
pub mod raft;
pub mod register;
pub mod session;
pub mod set;
pub mod usage;
pub mod visibility;

use std::collections::BTreeMap;

use anyhow::{Result, bail};
use serde::{Deserialize, Serialize};

use crate::history::{History, Operation};

/// The most findings that a verdict lists; all are counted.
const MAX_FINDINGS: usize = 20;
/// The most operations that a verdict shows as its evidence.
pub(crate) const MAX_EVIDENCE: usize = 60;

/// What a checker came to.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Judgement {
    /// The promise was kept.
    Valid,
    /// The promise was broken.
    Invalid,
    /// The checker cannot tell. That is not a pass.
    Unknown,
}

/// A checker's verdict on a history.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Verdict {
    /// Its name.
    pub checker: String,
    /// What it came to.
    pub judgement: Judgement,
    /// What was counted or measured, with the unit in the name.
    pub figures: BTreeMap<String, f64>,
    /// What is wrong, the first of it.
    pub findings: Vec<String>,
    /// The operations that show it, for people: what the checker came across, or a minimal
    /// counterexample ([`crate::shrink`]) in its place.
    pub evidence: Vec<String>,
}

impl Verdict {
    pub(crate) fn new(checker: &str) -> Verdict {
        Verdict {
            checker: checker.to_owned(),
            judgement: Judgement::Valid,
            figures: BTreeMap::new(),
            findings: Vec::new(),
            evidence: Vec::new(),
        }
    }

    /// Notes a violation of the kind `what`.
    pub(crate) fn violation(&mut self, what: &str, finding: String) {
        self.judgement = Judgement::Invalid;
        self.count(what, 1.0);
        self.note(finding);
    }

    /// Notes that the checker cannot tell.
    pub(crate) fn cannot_tell(&mut self, reason: String) {
        if self.judgement == Judgement::Valid {
            self.judgement = Judgement::Unknown;
        }
        self.note(reason);
    }

    pub(crate) fn note(&mut self, finding: String) {
        if self.findings.len() < MAX_FINDINGS {
            self.findings.push(finding);
        }
    }

    pub(crate) fn count(&mut self, what: &str, more: f64) {
        *self.figures.entry(what.to_owned()).or_default() += more;
    }

    pub(crate) fn figure(&mut self, what: &str, value: f64) {
        self.figures.insert(what.to_owned(), value);
    }

    /// Shows operations, the first time something is found.
    pub(crate) fn show<'a>(&mut self, operations: impl IntoIterator<Item = &'a Operation>) {
        if self.evidence.is_empty() {
            self.evidence = operations.into_iter().take(MAX_EVIDENCE).map(describe).collect();
        }
    }
}

/// An operation in one line.
pub(crate) fn describe(operation: &Operation) -> String {
    let ms = |ns: u64| ns as f64 / 1e6;
    format!(
        "{:>10.1} ms .. {:>10.1} ms  process {} at node {}: {:?} {:?} {:?} {:?}",
        ms(operation.began_ns),
        ms(operation.ended_ns),
        operation.process,
        operation.node,
        operation.outcome,
        operation.call,
        operation.answer,
        operation.positions,
    )
}

/// The names of all checkers, as scenarios use them.
pub const NAMES: [&str; 13] = [
    "register-search",
    "register-versions",
    "set",
    "visibility",
    "session",
    "batch",
    "backup",
    "raft",
    "identity",
    "overload",
    "usage",
    "availability",
    "coverage",
];

/// Runs the checker of that name.
///
/// # Errors
/// When there is none.
pub fn run(name: &str, history: &History, operations: &[Operation]) -> Result<Verdict> {
    Ok(match name {
        "register-search" => register::search(operations, register::BUDGET),
        "register-versions" => register::versions(operations),
        "set" => set::check(operations),
        "visibility" => visibility::check(operations),
        "session" => session::check(operations),
        "batch" => batch::check(operations),
        "backup" => backup::check(history, operations),
        "raft" => raft::check(history),
        "identity" => identity::check(history),
        "overload" => overload::check(history, operations),
        "usage" => usage::check(history),
        "availability" => availability::check(history, operations),
        "coverage" => coverage::check(history, operations),
        other => bail!("there is no checker {other}; there are {}", NAMES.join(", ")),
    })
}

/// Everything that the history's scenario asks for. Coverage is always asked for.
///
/// # Errors
/// When it names a checker that does not exist.
pub fn judge(history: &History) -> Result<Vec<Verdict>> {
    let operations = history.operations();
    let mut names: Vec<&str> = history.header.checkers.iter().map(String::as_str).collect();
    for always in ["availability", "coverage"] {
        if !names.contains(&always) {
            names.push(always);
        }
    }
    names.into_iter().map(|name| run(name, history, &operations)).collect()
}

#[cfg(test)]
pub(crate) mod testing {
    //! Hand-made histories.

    use std::collections::BTreeMap;

    use crate::history::{Answer, Call, Level, Operation, Outcome, Way};

    /// An operation from `began` to `ended` by process 1 at node 0; `ended` of 0 is unknown.
    pub fn operation(call: Call, began: u64, ended: u64, answer: Option<Answer>) -> Operation {
        let outcome = if ended == 0 { Outcome::Unknown } else { Outcome::Ok };
        Operation {
            process: 1,
            node: 0,
            call,
            began,
            ended: if ended == 0 { u64::MAX } else { ended },
            began_ns: began * 1_000_000,
            ended_ns: if ended == 0 { began * 1_000_000 } else { ended * 1_000_000 },
            outcome,
            status: Some(200),
            answer,
            positions: BTreeMap::new(),
        }
    }

    pub fn write(key: u64, uid: &str, began: u64, ended: u64) -> Operation {
        operation(Call::Write { key, uid: uid.into() }, began, ended, Some(Answer::Done))
    }

    pub fn delete(key: u64, began: u64, ended: u64) -> Operation {
        operation(Call::Delete { key }, began, ended, Some(Answer::Done))
    }

    pub fn read(key: u64, uid: &str, began: u64, ended: u64) -> Operation {
        let uid = (!uid.is_empty()).then(|| uid.to_owned());
        let answer = Answer::Value { uid, version: None };
        operation(Call::Read { key, level: Level::Linearizable }, began, ended, Some(answer))
    }

    pub fn find(key: u64, uid: &str, way: Way, found: &str, began: u64, ended: u64) -> Operation {
        let answer = Answer::Value { uid: (!found.is_empty()).then(|| found.to_owned()), version: None };
        let call = Call::Find { key, uid: uid.into(), way, level: Level::Linearizable };
        operation(call, began, ended, Some(answer))
    }

    pub fn list(points: &[(u64, &str)], began: u64, ended: u64) -> Operation {
        let points = points.iter().map(|(key, uid)| (*key, (*uid).to_owned())).collect();
        operation(Call::List { level: Level::Linearizable }, began, ended, Some(Answer::Listing { points }))
    }

    /// The same with the log index that the write was applied at, in shard 1.
    pub fn at(mut operation: Operation, index: u64) -> Operation {
        operation.positions.insert(1, index);
        if let Some(Answer::Value { version, .. }) = &mut operation.answer {
            *version = Some(index);
        }
        operation
    }

    pub fn by(mut operation: Operation, process: u64) -> Operation {
        operation.process = process;
        operation
    }

    pub fn failed(mut operation: Operation) -> Operation {
        operation.outcome = Outcome::Fail;
        operation
    }
}
