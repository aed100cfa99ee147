//! What real time alone says about the values of a key.
//!
//! A write takes effect between its beginning and its end; an unknown one any time after its
//! beginning, or never. So a value `w` cannot be current any more once another write `v` that
//! began after `w` had ended is known to have taken effect. A write of unknown outcome has taken
//! effect at the latest when its value was read. That is a sound test for any number of writers:
//! whatever it refuses has no explanation.

use std::collections::{BTreeMap, HashMap};

use crate::history::{Answer, Call, Operation};

/// The writes of one key.
#[derive(Default)]
pub(crate) struct Writes<'a> {
    /// By value.
    by_uid: HashMap<&'a str, &'a Operation>,
    /// When a value was first known to have been read: its write has taken effect by then.
    seen: HashMap<&'a str, u64>,
    /// Deletes that may have happened.
    deletes: Vec<&'a Operation>,
}

/// Why a value cannot be what a read says.
#[derive(Debug, PartialEq, Eq)]
pub(crate) enum Anomaly {
    /// Nobody has ever tried to write it, or it was refused.
    Phantom,
    /// It was read before its write began.
    Future,
    /// A write or delete after it had already taken effect.
    Stale,
    /// Absent, though a write after every delete had taken effect.
    Lost,
    /// Present, though a delete after it had taken effect.
    Resurrected,
}

impl Anomaly {
    pub(crate) fn name(&self) -> &'static str {
        match self {
            Anomaly::Phantom => "phantom",
            Anomaly::Future => "future",
            Anomaly::Stale => "stale",
            Anomaly::Lost => "lost",
            Anomaly::Resurrected => "resurrected",
        }
    }
}

/// The writes of every key.
pub(crate) fn writes_by_key(operations: &[Operation]) -> BTreeMap<u64, Writes<'_>> {
    let mut keys: BTreeMap<u64, Writes> = BTreeMap::new();
    for operation in operations {
        match &operation.call {
            Call::Write { key, uid } => {
                keys.entry(*key).or_default().by_uid.insert(uid, operation);
            }
            Call::Batch { keys: of, uid } => {
                for key in of {
                    keys.entry(*key).or_default().by_uid.insert(uid, operation);
                }
            }
            Call::Delete { key } if operation.may_have_happened() => {
                keys.entry(*key).or_default().deletes.push(operation);
            }
            _ => {}
        }
    }
    for operation in operations.iter().filter(|operation| operation.is_ok()) {
        match (&operation.call, &operation.answer) {
            (Call::Read { key, .. }, Some(Answer::Value { uid: Some(uid), .. })) => {
                if let Some(writes) = keys.get_mut(key) {
                    writes.see(uid, operation.ended);
                }
            }
            (Call::List { .. }, Some(Answer::Listing { points })) => {
                for (key, uid) in points {
                    if let Some(writes) = keys.get_mut(key) {
                        writes.see(uid, operation.ended);
                    }
                }
            }
            _ => {}
        }
    }
    keys
}

/// What is known to have taken effect at some moment: the latest beginning of such a write or
/// delete, and whether that one was a delete.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct Known {
    began: u64,
    is_delete: bool,
}

impl Known {
    /// Takes in that an operation has taken effect.
    pub(crate) fn learn(&mut self, operation: &Operation) {
        if operation.began >= self.began {
            *self =
                Known { began: operation.began, is_delete: matches!(operation.call, Call::Delete { .. }) };
        }
    }
}

impl<'a> Writes<'a> {
    fn see(&mut self, uid: &'a str, ended: u64) {
        let seen = self.seen.entry(uid).or_insert(ended);
        *seen = (*seen).min(ended);
    }

    /// When a write has taken effect at the latest, as far as anybody knows.
    fn settled(&self, write: &Operation, uid: &str) -> u64 {
        write.ended.min(self.seen.get(uid).copied().unwrap_or(u64::MAX))
    }

    /// The write of a value.
    pub(crate) fn of(&self, uid: &str) -> Option<&'a Operation> {
        self.by_uid.get(uid).copied()
    }

    /// Judges a value, or absence, read by an operation that ended at `read_ended`, when all of
    /// `known` had taken effect before it began.
    pub(crate) fn judge(&self, uid: Option<&str>, known: Known, read_ended: u64) -> Result<(), Anomaly> {
        let Some(uid) = uid else {
            let may_be_absent = known.began == 0
                || self
                    .deletes
                    .iter()
                    .any(|delete| delete.ended >= known.began && delete.began <= read_ended);
            return if may_be_absent { Ok(()) } else { Err(Anomaly::Lost) };
        };
        match self.of(uid) {
            None => Err(Anomaly::Phantom),
            Some(write) if !write.may_have_happened() => Err(Anomaly::Phantom),
            Some(write) if write.began > read_ended => Err(Anomaly::Future),
            Some(write) if self.settled(write, uid) < known.began => match known.is_delete {
                true => Err(Anomaly::Resurrected),
                false => Err(Anomaly::Stale),
            },
            Some(_) => Ok(()),
        }
    }
}

/// Goes through the moments at which operations begin and end, in order.
pub(crate) fn moments(operations: &[Operation]) -> Vec<(u64, bool, &Operation)> {
    let mut moments: Vec<(u64, bool, &Operation)> = Vec::with_capacity(2 * operations.len());
    for operation in operations {
        moments.push((operation.began, false, operation));
        if operation.ended != u64::MAX {
            moments.push((operation.ended, true, operation));
        }
    }
    moments.sort_by_key(|(at, ..)| *at);
    moments
}
