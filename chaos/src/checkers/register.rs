//! Linearizability of single points: of reads, of writes, and of deletes, which are writes of absence.
//!
//! [`search`] looks for an order that explains what was seen, as Wing and Gong do, with Lowe's
//! memory of configurations that led nowhere ("Testing for linearizability", 2017). It trusts
//! nothing that the server says, and is exponential in the number of concurrent operations, so
//! keys are short-lived and the search has a budget.
//!
//! [`versions`] takes the log index that readers are told of as a witness and checks in
//! O(n log n) that reads and real time agree with it. The index in the answer to a write is no
//! witness: a write that was proposed twice takes effect at the first and is answered at the
//! second. A server that lies about its indexes is caught by the first checker. Absence has no
//! index: it is judged by real time, and whoever has seen it after a value must not see that value
//! or an older one again.

use std::collections::{BTreeMap, HashMap, HashSet};
use std::slice::from_ref;

use super::order::{self, Known};
use super::{Verdict, describe};
use crate::history::{Answer, Call, Level, Operation};

/// Configurations that the search may look at for all keys together.
pub const BUDGET: u64 = 20_000_000;

/// What an operation does to a register. Zero is absence.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum Step {
    Write(u32),
    Read(u32),
}

/// Looks for a linear order of each key's operations.
pub fn search(operations: &[Operation], budget: u64) -> Verdict {
    let mut verdict = Verdict::new("register-search");
    let mut keys: BTreeMap<u64, Vec<(&Operation, Step)>> = BTreeMap::new();
    let mut numbers: HashMap<&str, u32> = HashMap::new();
    for operation in operations {
        let fresh = numbers.len() as u32 + 1;
        let (of, step) = match (&operation.call, &operation.answer) {
            (Call::Write { key, uid }, _) if operation.may_have_happened() => {
                (from_ref(key), Step::Write(*numbers.entry(uid).or_insert(fresh)))
            }
            // Of each point by itself: that they change together is another promise.
            (Call::Batch { keys, uid }, _) if operation.may_have_happened() => {
                (keys.as_slice(), Step::Write(*numbers.entry(uid).or_insert(fresh)))
            }
            (Call::Delete { key }, _) if operation.may_have_happened() => (from_ref(key), Step::Write(0)),
            (Call::Read { key, level: Level::Linearizable }, Some(Answer::Value { uid, .. }))
                if operation.is_ok() =>
            {
                let value = uid.as_deref().map_or(0, |uid| *numbers.entry(uid).or_insert(fresh));
                (from_ref(key), Step::Read(value))
            }
            _ => continue,
        };
        for key in of {
            keys.entry(*key).or_default().push((operation, step));
        }
    }
    let mut left = budget;
    verdict.figure("keys", keys.len() as f64);
    verdict.figure("operations", keys.values().map(Vec::len).sum::<usize>() as f64);
    for (key, steps) in &keys {
        match linearize(steps, &mut left) {
            Some(true) => {}
            Some(false) => {
                verdict.violation(
                    "not_linearizable",
                    format!("key {key}: no order explains its {} operations", steps.len()),
                );
                verdict.show(steps.iter().map(|(operation, _)| *operation));
            }
            None => {
                verdict.cannot_tell(format!("key {key}: the budget of {budget} configurations is used up"))
            }
        }
    }
    verdict.figure("configurations", (budget - left) as f64);
    verdict
}

/// Whether there is a linear order; none when the budget does not suffice.
fn linearize(steps: &[(&Operation, Step)], budget: &mut u64) -> Option<bool> {
    let mut list = List::new(steps);
    let mut seen: HashSet<(Vec<u64>, u32)> = HashSet::new();
    let mut done = vec![0u64; steps.len().div_ceil(64)];
    let mut state = 0u32;
    let mut stack: Vec<(usize, u32)> = Vec::new();
    let mut entry = list.first();
    while let Some(at) = entry {
        *budget = budget.checked_sub(1)?;
        let of = list.operation(at);
        if !list.is_end(at) {
            let next = match steps[of].1 {
                Step::Write(value) => Some(value),
                Step::Read(value) => (value == state).then_some(value),
            };
            if let Some(next) = next {
                done[of / 64] |= 1 << (of % 64);
                if seen.insert((done.clone(), next)) {
                    stack.push((at, state));
                    state = next;
                    list.lift(at);
                    entry = list.first();
                    continue;
                }
                done[of / 64] &= !(1 << (of % 64));
            }
            entry = list.after(at);
        } else {
            // An operation has ended and was not put anywhere: the last choice was wrong.
            let Some((choice, before)) = stack.pop() else { return Some(false) };
            let of = list.operation(choice);
            done[of / 64] &= !(1 << (of % 64));
            state = before;
            list.unlift(choice);
            entry = list.after(choice);
        }
    }
    Some(true)
}

/// Beginnings and ends in the order of time, from which an operation can be taken out and put
/// back. Entry `2 n` is the beginning of operation `n` and entry `2 n + 1` its end. The end of
/// an unknown write is left out: it may never take effect.
struct List {
    next: Vec<usize>,
    previous: Vec<usize>,
    has_end: Vec<bool>,
}

impl List {
    fn new(steps: &[(&Operation, Step)]) -> List {
        let count = 2 * steps.len();
        let head = count;
        let mut entries: Vec<(u64, usize)> = Vec::with_capacity(count);
        for (n, (operation, _)) in steps.iter().enumerate() {
            entries.push((operation.began, 2 * n));
            if operation.ended != u64::MAX {
                entries.push((operation.ended, 2 * n + 1));
            }
        }
        entries.sort_unstable();
        let mut list = List {
            next: vec![head; count + 1],
            previous: vec![head; count + 1],
            has_end: steps.iter().map(|(operation, _)| operation.ended != u64::MAX).collect(),
        };
        let mut last = head;
        for (_, entry) in entries {
            list.next[last] = entry;
            list.previous[entry] = last;
            last = entry;
        }
        list.next[last] = head;
        list.previous[head] = last;
        list
    }

    fn head(&self) -> usize {
        self.next.len() - 1
    }

    fn first(&self) -> Option<usize> {
        self.after(self.head())
    }

    fn after(&self, entry: usize) -> Option<usize> {
        let next = self.next[entry];
        // Only unknown writes are left when no end is: they need no place.
        (next != self.head()).then_some(next)
    }

    fn operation(&self, entry: usize) -> usize {
        entry / 2
    }

    fn is_end(&self, entry: usize) -> bool {
        entry % 2 == 1
    }

    fn lift(&mut self, begin: usize) {
        self.unlink(begin);
        if self.has_end[begin / 2] {
            self.unlink(begin + 1);
        }
    }

    fn unlift(&mut self, begin: usize) {
        if self.has_end[begin / 2] {
            self.link(begin + 1);
        }
        self.link(begin);
    }

    fn unlink(&mut self, entry: usize) {
        let (previous, next) = (self.previous[entry], self.next[entry]);
        self.next[previous] = next;
        self.previous[next] = previous;
    }

    /// Puts an entry back that was taken out last: its neighbours are still right.
    fn link(&mut self, entry: usize) {
        let (previous, next) = (self.previous[entry], self.next[entry]);
        self.next[previous] = entry;
        self.previous[next] = entry;
    }
}

/// Checks reads and real time against the log indexes of the writes.
pub fn versions(operations: &[Operation]) -> Verdict {
    let mut verdict = Verdict::new("register-versions");
    let writes = order::writes_by_key(operations);
    // What an index was seen to have set: by its writer and by readers.
    let mut set_by: HashMap<(u64, u64), &str> = HashMap::new();
    let mut version_of: HashMap<&str, u64> = HashMap::new();
    let mut of_group: BTreeMap<u64, u64> = BTreeMap::new();
    for operation in operations {
        if let (Call::Write { key, .. }, Some(group), 1) =
            (&operation.call, operation.positions.keys().next(), operation.positions.len())
        {
            of_group.insert(*key, *group);
        }
    }
    for operation in operations.iter().filter(|operation| operation.is_ok()) {
        let (key, uid, version) = match (&operation.call, &operation.answer) {
            (Call::Read { key, .. }, Some(Answer::Value { uid: Some(uid), version })) => {
                (key, uid.as_str(), *version)
            }
            _ => continue,
        };
        let Some(version) = version else { continue };
        let Some(group) = of_group.get(key).copied() else { continue };
        let other = set_by.insert((group, version), uid).filter(|other| *other != uid);
        if let Some(other) = other {
            verdict.violation("reused", format!("index {version} of shard {group} set {other} and {uid}"));
        }
        let other = version_of.insert(uid, version).filter(|other| *other != version);
        if let Some(other) = other {
            verdict.violation("moved", format!("{uid} was set at index {other} and at {version}"));
        }
    }
    let mut floors: BTreeMap<u64, (Floor, Known)> = BTreeMap::new();
    let mut at_begin: HashMap<u64, (Floor, Known)> = HashMap::new();
    let mut checked = 0u64;
    for (_, is_end, operation) in order::moments(operations) {
        let (key, is_read) = match &operation.call {
            Call::Write { key, .. } | Call::Delete { key } => (*key, false),
            Call::Read { key, level: Level::Linearizable } => (*key, true),
            _ => continue,
        };
        if !is_end {
            at_begin.insert(operation.began, floors.get(&key).copied().unwrap_or_default());
            continue;
        }
        let (floor, known) = at_begin.remove(&operation.began).unwrap_or_default();
        if !operation.is_ok() {
            continue;
        }
        checked += 1;
        let uid = match (&operation.call, &operation.answer) {
            (Call::Write { uid, .. }, _) => Some(uid.as_str()),
            (Call::Delete { .. }, _) => None,
            (_, Some(Answer::Value { uid, .. })) => uid.as_deref(),
            _ => continue,
        };
        let version = uid.and_then(|uid| version_of.get(uid).copied());
        if is_read
            && let Some(Err(anomaly)) =
                writes.get(&key).map(|writes| writes.judge(uid, known, operation.ended))
        {
            verdict.violation(anomaly.name(), format!("{} read: {}", anomaly.name(), describe(operation)));
            verdict.show(history_of(operations, key, operation));
        }
        if let Some(version) = version.filter(|version| !floor.allows(*version, is_read)) {
            let finding = format!("index {version} after {}: {}", floor.version, describe(operation));
            verdict.violation("inversion", finding);
            verdict.show(history_of(operations, key, operation));
        }
        let entry = floors.entry(key).or_default();
        match (uid, version) {
            (Some(_), Some(version)) => entry.0.rise(version),
            (Some(_), None) => {}
            (None, _) => entry.0.pass(floor),
        }
        match uid {
            Some(uid) => {
                if let Some(write) = writes.get(&key).and_then(|writes| writes.of(uid)) {
                    entry.1.learn(write);
                }
            }
            None if !is_read => entry.1.learn(operation),
            None => {}
        }
    }
    verdict.figure("operations", checked as f64);
    verdict
}

/// What operations on a key that have ended leave to those that begin later.
#[derive(Clone, Copy, Debug, Default)]
struct Floor {
    /// The highest version that was shown.
    version: u64,
    /// Whether that was gone afterwards, by a delete or by a read that found nothing.
    is_gone: bool,
}

impl Floor {
    /// Whether a version may be read, or be that of a write, by an operation that began here.
    fn allows(self, version: u64, is_read: bool) -> bool {
        version > self.version || (version == self.version && is_read && !self.is_gone)
    }

    /// A version was shown.
    fn rise(&mut self, version: u64) {
        if version > self.version {
            *self = Floor { version, is_gone: false };
        }
    }

    /// Absence was shown by an operation that began at a floor. Versions that were shown since may
    /// be newer than that absence.
    fn pass(&mut self, begun: Floor) {
        self.is_gone |= self.version == begun.version;
    }
}

/// The last operations of a key before the end of one of them.
fn history_of<'a>(
    operations: &'a [Operation],
    key: u64,
    until: &'a Operation,
) -> impl Iterator<Item = &'a Operation> {
    let of_key = move |operation: &&Operation| {
        let is_key = match &operation.call {
            Call::Write { key: of, .. } | Call::Delete { key: of } | Call::Read { key: of, .. } => *of == key,
            _ => false,
        };
        is_key && operation.began <= until.ended
    };
    let all: Vec<&Operation> = operations.iter().filter(of_key).collect();
    let skipped = all.len().saturating_sub(20);
    all.into_iter().skip(skipped)
}

#[cfg(test)]
mod tests {
    use super::super::Judgement;
    use super::super::testing::{at, by, delete, failed, operation, read, write};
    use super::*;

    fn both(operations: &[Operation]) -> (Judgement, Judgement) {
        (search(operations, BUDGET).judgement, versions(operations).judgement)
    }

    #[test]
    fn good_histories_pass() {
        let concurrent = [
            at(write(1, "a", 1, 4), 10),
            by(at(write(1, "b", 2, 5), 11), 2),
            // Overlaps both: may see either.
            by(at(read(1, "a", 3, 6), 10), 3),
            at(read(1, "b", 7, 8), 11),
        ];
        assert_eq!(both(&concurrent), (Judgement::Valid, Judgement::Valid));
        // An unknown write is seen later, or never.
        let unknown =
            [at(write(1, "a", 1, 2), 5), write(1, "b", 3, 0), read(1, "a", 4, 5), read(1, "b", 6, 7)];
        assert_eq!(both(&unknown), (Judgement::Valid, Judgement::Valid));
        assert_eq!(both(&[write(1, "b", 3, 0), read(1, "", 4, 5)]), (Judgement::Valid, Judgement::Valid));
        assert_eq!(both(&[]), (Judgement::Valid, Judgement::Valid));
    }

    #[test]
    fn a_stale_read_is_caught() {
        let stale =
            [at(write(1, "a", 1, 2), 5), at(write(1, "b", 3, 4), 6), by(at(read(1, "a", 5, 6), 5), 2)];
        assert_eq!(both(&stale), (Judgement::Invalid, Judgement::Invalid));
    }

    #[test]
    fn a_value_that_comes_back_is_caught() {
        let flip = [
            at(write(1, "a", 1, 2), 5),
            write(1, "b", 3, 0),
            by(read(1, "b", 4, 5), 2),
            by(read(1, "a", 6, 7), 2),
        ];
        assert_eq!(both(&flip), (Judgement::Invalid, Judgement::Invalid));
    }

    #[test]
    fn a_deleted_key_reads_as_absent() {
        let seen =
            [at(write(1, "a", 1, 2), 5), at(read(1, "a", 3, 4), 5), delete(1, 5, 6), read(1, "", 7, 8)];
        assert_eq!(both(&seen), (Judgement::Valid, Judgement::Valid));
        let mut again = seen.to_vec();
        again.extend([at(write(1, "b", 9, 10), 9), read(1, "b", 11, 12), at(read(1, "b", 13, 14), 9)]);
        assert_eq!(both(&again), (Judgement::Valid, Judgement::Valid));
        // A delete that nobody needed, and one that overlaps a write.
        assert_eq!(both(&[delete(1, 1, 2), read(1, "", 3, 4)]), (Judgement::Valid, Judgement::Valid));
        for last in ["a", ""] {
            let overlap = [write(1, "a", 1, 4), by(delete(1, 2, 5), 2), read(1, last, 6, 7)];
            assert_eq!(both(&overlap), (Judgement::Valid, Judgement::Valid));
        }
    }

    #[test]
    fn a_resurrected_delete_is_caught() {
        let back = [write(1, "a", 1, 2), delete(1, 3, 4), read(1, "a", 5, 6)];
        assert_eq!(both(&back), (Judgement::Invalid, Judgement::Invalid));
        assert_eq!(versions(&back).figures["resurrected"], 1.0);
        // Gone by a delete of unknown outcome, and there again.
        let twice = [
            at(write(1, "a", 1, 2), 5),
            at(read(1, "a", 3, 4), 5),
            by(delete(1, 5, 0), 2),
            read(1, "", 6, 7),
            at(read(1, "a", 8, 9), 5),
        ];
        assert_eq!(both(&twice), (Judgement::Invalid, Judgement::Invalid));
        assert_eq!(versions(&twice).figures["inversion"], 1.0);
        // Absence that was seen before the newer value was says nothing about it.
        let newer = [
            at(write(1, "a", 1, 2), 5),
            by(delete(1, 3, 4), 2),
            by(read(1, "", 5, 12), 3),
            at(write(1, "b", 6, 7), 9),
            at(read(1, "b", 8, 9), 9),
            at(read(1, "b", 13, 14), 9),
        ];
        assert_eq!(both(&newer), (Judgement::Valid, Judgement::Valid));
    }

    #[test]
    fn an_unknown_delete_may_have_happened_or_not() {
        for last in ["a", ""] {
            let either = [write(1, "a", 1, 2), delete(1, 3, 0), by(read(1, last, 4, 5), 2)];
            assert_eq!(both(&either), (Judgement::Valid, Judgement::Valid));
        }
        let refused = [write(1, "a", 1, 2), failed(delete(1, 3, 4)), read(1, "", 5, 6)];
        assert_eq!(both(&refused), (Judgement::Invalid, Judgement::Invalid));
        // A write after every delete is not explained away by an older one.
        let lost = [write(1, "a", 1, 2), delete(1, 3, 4), write(1, "b", 5, 6), read(1, "", 7, 8)];
        assert_eq!(both(&lost), (Judgement::Invalid, Judgement::Invalid));
        assert_eq!(versions(&lost).figures["lost"], 1.0);
    }

    #[test]
    fn lost_phantom_and_future_values_are_caught() {
        let lost = [at(write(1, "a", 1, 2), 5), read(1, "", 3, 4)];
        assert_eq!(both(&lost), (Judgement::Invalid, Judgement::Invalid));
        let phantom = [at(write(1, "a", 1, 2), 5), read(1, "z", 3, 4)];
        assert_eq!(both(&phantom), (Judgement::Invalid, Judgement::Invalid));
        let refused = [failed(write(1, "a", 1, 2)), read(1, "a", 3, 4)];
        assert_eq!(both(&refused), (Judgement::Invalid, Judgement::Invalid));
        let future = [read(1, "a", 1, 2), at(write(1, "a", 3, 4), 5)];
        assert_eq!(both(&future), (Judgement::Invalid, Judgement::Invalid));
    }

    #[test]
    fn an_index_that_sets_two_values_is_caught() {
        let reused = [
            at(write(1, "a", 1, 2), 5),
            at(write(2, "b", 3, 4), 6),
            at(read(1, "a", 5, 6), 5),
            at(read(2, "b", 7, 8), 5),
        ];
        assert_eq!(versions(&reused).figures["reused"], 1.0);
        // The answer to a write that was proposed twice names the second index.
        let twice = [at(write(1, "a", 1, 2), 9), at(read(1, "a", 3, 4), 5)];
        assert_eq!(versions(&twice).judgement, Judgement::Valid);
        let back = [
            at(write(1, "a", 1, 9), 6),
            by(at(write(1, "b", 2, 8), 7), 2),
            by(at(read(1, "b", 3, 4), 7), 3),
            by(at(read(1, "a", 5, 6), 6), 3),
        ];
        assert_eq!(versions(&back).figures["inversion"], 1.0);
    }

    #[test]
    fn a_batch_writes_each_of_its_keys() {
        let batch = |ended| {
            operation(Call::Batch { keys: vec![1, 2], uid: "a".into() }, 1, ended, Some(Answer::Done))
        };
        let good = [batch(2), read(1, "a", 3, 4), read(2, "a", 5, 6)];
        assert_eq!(both(&good), (Judgement::Valid, Judgement::Valid));
        assert_eq!(search(&[batch(2), read(2, "", 3, 4)], BUDGET).judgement, Judgement::Invalid);
        // Of unknown outcome: one shard may have taken it and another one not.
        let half = [batch(0), read(1, "a", 3, 4), read(2, "", 5, 6)];
        assert_eq!(both(&half), (Judgement::Valid, Judgement::Valid));
    }

    #[test]
    fn a_search_without_budget_does_not_pass() {
        let many: Vec<Operation> = (0..40).map(|n| by(write(1, &format!("w{n}"), n, 100 + n), n)).collect();
        assert_eq!(search(&many, 10).judgement, Judgement::Unknown);
    }
}
