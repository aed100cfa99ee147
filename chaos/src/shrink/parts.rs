//! Which parts of the operations of a history may be judged instead of the whole: those in which no
//! mistake appears that is none in the whole. Operations that explain others stay as long as those:
//!
//! | what stays | stays only with |
//! |---|---|
//! | whoever read a value, or listed it | its write: else the value would be a phantom |
//! | whoever found a key absent | each delete before it, or a write that was acknowledged after that delete and before the question, so that the delete explains nothing: else the value would be lost |
//! | a probe of a search | the last certain write or delete of its key, and all that may have followed: else it would be judged by another |
//! | a probe that the graph missed | all that it found: else the share of misses would grow |
//! | a batch | all batches that share a key with it: else those keys would be its alone |
//! | a listing before the last write | that write: else it would be compared with the last listings |
//!
//! Of two sets of operations that are closed under these, a checker cannot call the smaller one
//! invalid and the larger one valid: a search that orders the larger set orders the smaller one too,
//! when what was left out is taken out of the order, and every other rule compares what is known to
//! have happened with what was read, and less is known. Batches with common keys are one key.

use std::collections::{BTreeMap, BTreeSet, HashMap};

use crate::checkers::visibility;
use crate::history::{Answer, Call, Level, Operation, Way};

/// Operations, and which of them stay only with which.
pub(super) struct Parts {
    pub(super) operations: Vec<Operation>,
    rules: Vec<Rule>,
}

impl Parts {
    pub(super) fn of(operations: Vec<Operation>) -> Parts {
        let rules = rules(&operations);
        Parts { operations, rules }
    }

    /// The largest closed part of some operations and keys.
    pub(super) fn close(&self, operations: &[usize], keys: &BTreeSet<u64>) -> Vec<usize> {
        let mut is_left = vec![false; self.operations.len()];
        for at in operations {
            is_left[*at] = named(&self.operations[*at].call).iter().all(|key| keys.contains(key));
        }
        loop {
            let mut has_changed = false;
            for rule in &self.rules {
                has_changed |= rule.apply(&mut is_left, keys);
            }
            if !has_changed {
                return operations.iter().copied().filter(|at| is_left[*at]).collect();
            }
        }
    }

    /// Copies of some operations; listings say nothing of other keys.
    pub(super) fn select(&self, operations: &[usize], keys: &BTreeSet<u64>) -> Vec<Operation> {
        let mut selected: Vec<Operation> = operations.iter().map(|at| self.operations[*at].clone()).collect();
        selected.iter_mut().for_each(|operation| project(&mut operation.answer, keys));
        selected
    }
}

/// Leaves of a listing only what it says of some keys.
pub(super) fn project(answer: &mut Option<Answer>, keys: &BTreeSet<u64>) {
    if let Some(Answer::Listing { points }) = answer {
        points.retain(|(key, _)| keys.contains(key));
    }
}

/// The keys that an operation names. A listing names none: it is of all.
fn named(call: &Call) -> &[u64] {
    match call {
        Call::Write { key, .. } | Call::Delete { key } | Call::Read { key, .. } | Call::Find { key, .. } => {
            std::slice::from_ref(key)
        }
        Call::Batch { keys, .. } => keys,
        Call::List { .. } => &[],
    }
}

/// What is listed, when the operation is a listing that was answered.
fn listed(operation: &Operation) -> Option<&[(u64, String)]> {
    match (&operation.call, &operation.answer) {
        (Call::List { .. }, Some(Answer::Listing { points })) if operation.is_ok() => Some(points),
        _ => None,
    }
}

/// Keys that are left out together: each by itself, but those of a batch as one.
pub(super) fn units(operations: &[Operation]) -> Vec<BTreeSet<u64>> {
    let mut unit_of: BTreeMap<u64, u64> = BTreeMap::new();
    for operation in operations {
        let listed = listed(operation).unwrap_or_default();
        for key in named(&operation.call).iter().chain(listed.iter().map(|(key, _)| key)) {
            unit_of.entry(*key).or_insert(*key);
        }
    }
    for operation in operations.iter().filter(|operation| matches!(operation.call, Call::Batch { .. })) {
        let merged: BTreeSet<u64> = named(&operation.call).iter().map(|key| unit_of[key]).collect();
        let Some(first) = merged.first().copied().filter(|_| merged.len() > 1) else { continue };
        for unit in unit_of.values_mut() {
            if merged.contains(unit) {
                *unit = first;
            }
        }
    }
    let mut units: BTreeMap<u64, BTreeSet<u64>> = BTreeMap::new();
    for (key, unit) in unit_of {
        units.entry(unit).or_default().insert(key);
    }
    units.into_values().collect()
}

/// Who stays only with whom; operations by their numbers.
enum Rule {
    /// One operation, where this key is left, with one of the others.
    OneOf { operation: usize, key: u64, others: Vec<usize> },
    /// Operations with all of the others.
    AllOf { operations: Vec<usize>, others: Vec<usize> },
}

impl Rule {
    /// Takes out whoever stays without whom it must stay with, and says whether that was anybody.
    fn apply(&self, is_left: &mut [bool], keys: &BTreeSet<u64>) -> bool {
        match self {
            Rule::OneOf { operation, key, others } => {
                let has_one = !keys.contains(key) || others.iter().any(|at| is_left[*at]);
                !has_one && std::mem::take(&mut is_left[*operation])
            }
            Rule::AllOf { operations, others } => {
                let has_all = others.iter().all(|at| is_left[*at]);
                let is_broken = !has_all && operations.iter().any(|at| is_left[*at]);
                if is_broken {
                    operations.iter().for_each(|at| is_left[*at] = false);
                }
                is_broken
            }
        }
    }
}

/// What may have changed a key, by number.
#[derive(Default)]
struct OfKey<'a> {
    by_uid: HashMap<&'a str, usize>,
    /// Acknowledged writes of this key alone.
    acknowledged: Vec<usize>,
    /// Deletes that may have happened.
    deletes: Vec<usize>,
    /// Writes of this key alone and deletes that may have happened.
    touching: Vec<usize>,
    /// Batches, whatever came of them.
    batches: Vec<usize>,
}

fn by_key(operations: &[Operation]) -> BTreeMap<u64, OfKey<'_>> {
    let mut keys: BTreeMap<u64, OfKey> = BTreeMap::new();
    for (at, operation) in operations.iter().enumerate() {
        for key in named(&operation.call) {
            let of_key = keys.entry(*key).or_default();
            match &operation.call {
                Call::Write { uid, .. } => {
                    of_key.by_uid.insert(uid, at);
                    of_key.acknowledged.extend(operation.is_ok().then_some(at));
                    of_key.touching.extend(operation.may_have_happened().then_some(at));
                }
                Call::Delete { .. } if operation.may_have_happened() => {
                    of_key.deletes.push(at);
                    of_key.touching.push(at);
                }
                Call::Batch { uid, .. } => {
                    of_key.by_uid.insert(uid, at);
                    of_key.batches.push(at);
                }
                _ => {}
            }
        }
    }
    keys
}

fn rules(operations: &[Operation]) -> Vec<Rule> {
    let keys = by_key(operations);
    let mut rules = Vec::new();
    for (at, operation) in operations.iter().enumerate().filter(|(_, operation)| operation.is_ok()) {
        if let (Call::Read { key, .. }, Some(Answer::Value { uid, .. })) =
            (&operation.call, &operation.answer)
            && let Some(of_key) = keys.get(key)
        {
            explain(&mut rules, operations, at, *key, uid.as_deref(), of_key);
        }
        let Some(points) = listed(operation) else { continue };
        let present: BTreeSet<u64> = points.iter().map(|(key, _)| *key).collect();
        let absent = keys.keys().filter(|key| !present.contains(key)).map(|key| (*key, None));
        for (key, uid) in points.iter().map(|(key, uid)| (*key, Some(uid.as_str()))).chain(absent) {
            if let Some(of_key) = keys.get(&key) {
                explain(&mut rules, operations, at, key, uid, of_key);
            }
        }
    }
    keep_probes(&mut rules, operations, &keys);
    for of_key in keys.values().filter(|of_key| of_key.batches.len() > 1) {
        rules.push(Rule::AllOf { operations: of_key.batches.clone(), others: of_key.batches.clone() });
    }
    keep_last_write(&mut rules, operations);
    rules
}

/// What explains that an operation has seen a value, or absence, of a key.
fn explain(
    rules: &mut Vec<Rule>,
    operations: &[Operation],
    at: usize,
    key: u64,
    uid: Option<&str>,
    of_key: &OfKey,
) {
    let reader = &operations[at];
    if let Some(uid) = uid {
        rules.extend(of_key.by_uid.get(uid).map(|write| Rule::OneOf {
            operation: at,
            key,
            others: vec![*write],
        }));
        return;
    }
    // A session is owed only what its own process has done.
    let is_session = matches!(reader.call, Call::Read { level: Level::Session, .. });
    for delete in of_key.deletes.iter().filter(|delete| operations[**delete].began <= reader.ended) {
        let is_after = |write: &&usize| {
            let write = &operations[**write];
            write.began > operations[*delete].ended
                && write.ended < reader.began
                && (!is_session || write.process == reader.process)
        };
        let mut others = vec![*delete];
        others.extend(of_key.acknowledged.iter().filter(is_after));
        rules.push(Rule::OneOf { operation: at, key, others });
    }
}

/// A probe stays with what it is judged by, and one that the graph missed with all that it found.
fn keep_probes(rules: &mut Vec<Rule>, operations: &[Operation], keys: &BTreeMap<u64, OfKey>) {
    let (mut missed, mut found) = (Vec::new(), Vec::new());
    for (at, probe) in operations.iter().enumerate().filter(|(_, operation)| operation.is_ok()) {
        let (Call::Find { key, uid, way, level }, Some(Answer::Value { uid: answer, .. })) =
            (&probe.call, &probe.answer)
        else {
            continue;
        };
        let Some(of_key) = keys.get(key).filter(|_| *level != Level::Eventual) else { continue };
        let touching: Vec<&Operation> = of_key.touching.iter().map(|at| &operations[*at]).collect();
        let Some(last) = visibility::last_certain(&touching, probe) else { continue };
        let counts = |other: &&usize| {
            let other = &operations[**other];
            other.began <= probe.ended && other.ended >= last.began
        };
        let others = of_key.touching.iter().filter(counts).copied().collect();
        rules.push(Rule::AllOf { operations: vec![at], others });
        let is_current = matches!(&last.call, Call::Write { uid: current, .. } if current == uid);
        if *way == Way::Graph && is_current {
            let of = if answer.as_ref() == Some(uid) { &mut found } else { &mut missed };
            of.push(at);
        }
    }
    rules.push(Rule::AllOf { operations: missed, others: found });
}

/// Listings that are not among the last ones stay with the write that they are not after.
fn keep_last_write(rules: &mut Vec<Rule>, operations: &[Operation]) {
    let settled = |write: &Operation| if write.is_ok() { write.ended } else { write.began };
    let writes = operations.iter().enumerate().filter(|(_, operation)| operation.call.is_write());
    let Some((last, write)) = writes.max_by_key(|(_, write)| settled(write)) else { return };
    let is_before = |operation: &Operation| operation.began <= settled(write);
    let listings = operations.iter().enumerate().filter(|(_, operation)| listed(operation).is_some());
    let before = listings.filter(|(_, operation)| is_before(operation)).map(|(at, _)| at).collect();
    rules.push(Rule::AllOf { operations: before, others: vec![last] });
}
