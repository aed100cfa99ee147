//! A backup that was made while clients wrote is a real cut: of every point it holds a value that was current
//! at some moment between its beginning and its end, so everything that was acknowledged before it began,
//! and nothing that nobody had written.
//!
//! A restored backup is therefore judged like a listing that began and ended with the backup, by real time.
//! It says itself up to which entry of each shard's log it goes, which makes it sharper:
//!
//! | what is known | what follows |
//! |---|---|
//! | a write was answered with a position up to the cut | it is in the backup: it took effect no later |
//! | a reader was told that a value's write has an index beyond the cut | it is not in the backup |
//! | readers were told of two values' indexes up to the cut | the older one is not in the backup |
//!
//! Where a shard is cut is the backup's own word, but what it is compared with is not. Shards that are split
//! or merged count anew, so there is no such scenario.
//!
//! Whatever a new cluster has shown while a backup was put back is judged in the same way: half of it would
//! have lost something.

use std::collections::{BTreeMap, BTreeSet, HashMap};

use super::Verdict;
use super::order::{self, Known, Writes};
use super::set::touches;
use crate::history::{Answer, Call, Event, History, Operation};

/// A backup that is whole.
struct Backup {
    /// When it was asked for, and when it was known to be there: places among the events.
    began: u64,
    made: u64,
    /// The last entry of each shard's log that it holds.
    cuts: BTreeMap<u64, u64>,
}

/// What clients have learned about the logs.
#[derive(Default)]
struct Witnesses<'a> {
    /// The shard of each key.
    shards: BTreeMap<u64, u64>,
    /// The indexes of the writes of each key's values, as readers were told.
    versions: BTreeMap<u64, HashMap<&'a str, u64>>,
}

/// Judges everything that was restored.
pub fn check(history: &History, operations: &[Operation]) -> Verdict {
    let mut verdict = Verdict::new("backup");
    let backups = backups_of(history);
    let writes = order::writes_by_key(operations);
    let witnesses = witnesses_of(operations);
    let mut floors: BTreeMap<u64, BTreeMap<u64, Known>> = BTreeMap::new();
    let mut restored: BTreeSet<u64> = BTreeSet::new();
    let mut listings = 0u64;
    for event in &history.events {
        let Event::Restored { backup: number, node, points, .. } = event else { continue };
        let Some(backup) = backups.get(number) else {
            verdict.cannot_tell(format!("backup {number} was restored, and nobody knows when it was made"));
            continue;
        };
        listings += 1;
        restored.insert(*number);
        let floor = floors.entry(*number).or_insert_with(|| floor_of(backup, &writes, operations));
        let judging = Judging { number: *number, node: *node, backup, writes: &writes, operations };
        judging.listing(&mut verdict, points, floor);
        judging.versions(&mut verdict, points, &witnesses);
    }
    verdict.figure("backups", backups.len() as f64);
    verdict.figure("backups_restored", restored.len() as f64);
    verdict.figure("listings", listings as f64);
    if listings == 0 {
        verdict.cannot_tell("no backup was restored".to_owned());
    }
    verdict
}

fn backups_of(history: &History) -> BTreeMap<u64, Backup> {
    let mut began: BTreeMap<u64, u64> = BTreeMap::new();
    let mut backups = BTreeMap::new();
    for event in &history.events {
        match event {
            Event::BackupBegan { seq, backup, .. } => {
                began.insert(*backup, *seq);
            }
            Event::BackupMade { seq, backup, cuts, .. } => {
                if let Some(began) = began.get(backup) {
                    let cuts = cuts.iter().copied().collect();
                    backups.insert(*backup, Backup { began: *began, made: *seq, cuts });
                }
            }
            _ => {}
        }
    }
    backups
}

fn witnesses_of(operations: &[Operation]) -> Witnesses<'_> {
    let mut witnesses = Witnesses::default();
    for operation in operations.iter().filter(|operation| operation.is_ok()) {
        match (&operation.call, &operation.answer) {
            (Call::Write { key, .. } | Call::Delete { key }, _) => {
                if let (Some(shard), 1) = (operation.positions.keys().next(), operation.positions.len()) {
                    witnesses.shards.insert(*key, *shard);
                }
            }
            // Not what was looked for otherwise: that may be another point's.
            (Call::Read { key, .. }, Some(Answer::Value { uid: Some(uid), version: Some(version) })) => {
                witnesses.versions.entry(*key).or_default().insert(uid, *version);
            }
            _ => {}
        }
    }
    witnesses
}

/// What has taken effect by the time that a backup cuts the logs, as far as anybody knows.
fn floor_of(
    backup: &Backup,
    writes: &BTreeMap<u64, Writes<'_>>,
    operations: &[Operation],
) -> BTreeMap<u64, Known> {
    let mut floor: BTreeMap<u64, Known> = BTreeMap::new();
    for operation in operations.iter().filter(|operation| operation.is_ok()) {
        match &operation.call {
            Call::Write { key, .. } | Call::Delete { key } if is_within(backup, operation) => {
                floor.entry(*key).or_default().learn(operation);
            }
            Call::Batch { keys, .. } if is_within(backup, operation) => {
                for key in keys {
                    floor.entry(*key).or_default().learn(operation);
                }
            }
            Call::Read { key, .. } if operation.ended < backup.began => {
                // Once seen, it has taken effect.
                let Some(Answer::Value { uid: Some(uid), .. }) = &operation.answer else { continue };
                if let Some(write) = writes.get(key).and_then(|writes| writes.of(uid)) {
                    floor.entry(*key).or_default().learn(write);
                }
            }
            _ => {}
        }
    }
    floor
}

/// Whether a write that has happened must be in a backup: it had ended before, or its answer says so.
fn is_within(backup: &Backup, operation: &Operation) -> bool {
    let is_up_to_cut = |(shard, index): (&u64, &u64)| backup.cuts.get(shard).is_some_and(|cut| index <= cut);
    operation.ended < backup.began
        || (!operation.positions.is_empty() && operation.positions.iter().all(is_up_to_cut))
}

/// One listing of one restored backup.
struct Judging<'a> {
    number: u64,
    node: usize,
    backup: &'a Backup,
    writes: &'a BTreeMap<u64, Writes<'a>>,
    operations: &'a [Operation],
}

impl Judging<'_> {
    fn listing(&self, verdict: &mut Verdict, points: &[(u64, String)], floor: &BTreeMap<u64, Known>) {
        let mut listed: BTreeSet<u64> = BTreeSet::new();
        for (key, uid) in points {
            if !listed.insert(*key) {
                self.found(verdict, "duplicate", *key, "stands twice".to_owned());
            }
            self.value(verdict, *key, Some(uid), floor);
        }
        for key in self.writes.keys().filter(|key| !listed.contains(key)) {
            self.value(verdict, *key, None, floor);
        }
    }

    fn value(&self, verdict: &mut Verdict, key: u64, uid: Option<&str>, floor: &BTreeMap<u64, Known>) {
        let none = Writes::default();
        let of_key = self.writes.get(&key).unwrap_or(&none);
        let known = floor.get(&key).copied().unwrap_or_default();
        if let Err(anomaly) = of_key.judge(uid, known, self.backup.made) {
            self.found(verdict, anomaly.name(), key, format!("is {} ({uid:?})", anomaly.name()));
        }
    }

    /// Compares the cut with what readers were told.
    fn versions(&self, verdict: &mut Verdict, points: &[(u64, String)], witnesses: &Witnesses<'_>) {
        for (key, uid) in points {
            let cut = witnesses.shards.get(key).and_then(|shard| self.backup.cuts.get(shard));
            let (Some(cut), Some(versions)) = (cut, witnesses.versions.get(key)) else { continue };
            let Some(version) = versions.get(uid.as_str()) else { continue };
            if version > cut {
                let what = format!("has {uid:?} of entry {version}, and the cut is at {cut}");
                self.found(verdict, "beyond_the_cut", *key, what);
            }
            let newer = versions.iter().filter(|(_, other)| *other > version && *other <= cut);
            if let Some((newest, index)) = newer.max_by_key(|(_, index)| **index) {
                let what = format!(
                    "has {uid:?} of entry {version}; {newest:?} of {index} is before the cut at {cut}"
                );
                self.found(verdict, "behind_the_cut", *key, what);
            }
        }
    }

    fn found(&self, verdict: &mut Verdict, kind: &str, key: u64, what: String) {
        let (number, node) = (self.number, self.node);
        verdict.violation(kind, format!("key {key} {what} in backup {number}, restored, at node {node}"));
        let until = self.backup.made;
        let about = self.operations.iter().filter(|other| touches(other, key) && other.began <= until);
        verdict.show(about);
    }
}

#[cfg(test)]
mod tests {
    use super::super::Judgement;
    use super::super::testing::{at, delete, failed, read, write};
    use super::*;

    /// The cut of shard 1, where one is known.
    type Cut = Option<u64>;

    /// A history in which a backup was made from 10 to 20, and what was restored of it.
    fn history(cut: Cut, restored: &[(u64, &str)]) -> History {
        let points = restored.iter().map(|(key, uid)| (*key, (*uid).to_owned())).collect();
        let cuts = cut.map(|index| (1, index)).into_iter().collect();
        let events = vec![
            Event::BackupBegan { seq: 10, ns: 10, backup: 1 },
            Event::BackupMade { seq: 20, ns: 20, backup: 1, id: "x".into(), cuts },
            Event::Restored { seq: 90, ns: 90, backup: 1, node: 0, points },
        ];
        History { events, ..History::default() }
    }

    fn judged(operations: &[Operation], cut: Cut, restored: &[(u64, &str)]) -> (Judgement, Vec<String>) {
        let verdict = check(&history(cut, restored), operations);
        let kinds = ["lost", "stale", "phantom", "duplicate", "resurrected", "future"];
        let kinds = kinds.iter().chain(&["beyond_the_cut", "behind_the_cut"]);
        let found = kinds.filter(|kind| verdict.figures.contains_key(**kind));
        (verdict.judgement, found.map(|kind| (*kind).to_owned()).collect())
    }

    fn invalid(kind: &str) -> (Judgement, Vec<String>) {
        (Judgement::Invalid, vec![kind.to_owned()])
    }

    #[test]
    fn what_was_current_at_a_moment_of_the_backup_passes() {
        let valid = (Judgement::Valid, Vec::new());
        let before = [write(1, "a", 1, 2), write(2, "b", 3, 4), delete(2, 5, 6)];
        assert_eq!(judged(&before, None, &[(1, "a")]), valid);
        // Written, replaced or deleted meanwhile: either will do, but not what was never there.
        let meanwhile = [write(1, "a", 1, 2), write(1, "b", 12, 14), write(2, "c", 11, 25)];
        for restored in [&[(1, "a")][..], &[(1, "b")], &[(1, "a"), (2, "c")], &[(1, "b"), (2, "c")]] {
            assert_eq!(judged(&meanwhile, None, restored), valid, "{restored:?}");
        }
        let deleted = [write(1, "a", 1, 2), delete(1, 12, 14)];
        assert_eq!(judged(&deleted, None, &[]), valid);
        assert_eq!(judged(&deleted, None, &[(1, "a")]), valid);
        // Of unknown outcome: it may have happened, now or later, or never.
        let unknown = [write(1, "a", 1, 2), write(1, "b", 3, 0)];
        assert_eq!(judged(&unknown, None, &[(1, "a")]), valid);
        assert_eq!(judged(&unknown, None, &[(1, "b")]), valid);
        // What came later does not count.
        let later = [write(1, "a", 1, 2), write(1, "b", 22, 23), delete(1, 24, 25), write(2, "c", 26, 27)];
        assert_eq!(judged(&later, None, &[(1, "a")]), valid);
    }

    #[test]
    fn what_is_no_cut_is_caught() {
        let before = [write(1, "a", 1, 2)];
        assert_eq!(judged(&before, None, &[]), invalid("lost"), "half of a restore is shown");
        assert_eq!(judged(&before, None, &[(1, "a"), (9, "z")]), invalid("phantom"));
        assert_eq!(judged(&before, None, &[(1, "a"), (1, "a")]), invalid("duplicate"));
        let replaced = [write(1, "a", 1, 2), write(1, "b", 3, 4)];
        assert_eq!(judged(&replaced, None, &[(1, "a")]), invalid("stale"));
        let deleted = [write(1, "a", 1, 2), delete(1, 3, 4)];
        assert_eq!(judged(&deleted, None, &[(1, "a")]), invalid("resurrected"));
        let refused = [failed(write(1, "a", 1, 2))];
        assert_eq!(judged(&refused, None, &[(1, "a")]), invalid("phantom"));
        let later = [write(1, "a", 22, 23)];
        assert_eq!(judged(&later, None, &[(1, "a")]), invalid("future"));
        // An unknown write that was seen before the backup began has happened.
        let seen = [write(1, "a", 1, 2), write(1, "b", 3, 0), read(1, "b", 4, 5)];
        assert_eq!(judged(&seen, None, &[(1, "a")]), invalid("stale"));
    }

    #[test]
    fn what_is_acknowledged_within_the_cut_is_in_it() {
        let meanwhile =
            [at(write(1, "a", 1, 2), 5), at(write(1, "b", 12, 14), 7), at(write(2, "c", 12, 15), 8)];
        assert_eq!(judged(&meanwhile, Some(6), &[(1, "a")]).0, Judgement::Valid);
        assert_eq!(judged(&meanwhile, Some(8), &[(1, "b"), (2, "c")]).0, Judgement::Valid);
        assert_eq!(judged(&meanwhile, Some(7), &[(1, "a")]), invalid("stale"));
        assert_eq!(judged(&meanwhile, Some(8), &[(1, "b")]), invalid("lost"));
        // A write that was proposed twice has taken effect before the position that it was answered with.
        assert_eq!(judged(&meanwhile, Some(6), &[(1, "b")]).0, Judgement::Valid);
    }

    #[test]
    fn the_indexes_that_readers_were_told_of_count() {
        let meanwhile = [
            at(write(1, "a", 1, 2), 5),
            at(write(1, "b", 12, 14), 7),
            at(read(1, "b", 15, 16), 7),
            at(write(1, "c", 12, 17), 8),
            at(read(1, "c", 18, 19), 8),
        ];
        assert_eq!(judged(&meanwhile, Some(6), &[(1, "b")]), invalid("beyond_the_cut"));
        assert_eq!(judged(&meanwhile, Some(8), &[(1, "c")]).0, Judgement::Valid);
        assert_eq!(judged(&meanwhile, Some(8), &[(1, "b")]), invalid("behind_the_cut"));
    }

    #[test]
    fn a_history_without_a_restore_does_not_pass() {
        let mut none = history(None, &[]);
        none.events.pop();
        assert_eq!(check(&none, &[write(1, "a", 1, 2)]).judgement, Judgement::Unknown);
        let mut never_made = history(None, &[]);
        never_made.events.remove(1);
        assert_eq!(check(&never_made, &[]).judgement, Judgement::Unknown);
    }
}
