//! Sessions: a client that sends back the position it has reached never sees less than it has
//! written or seen, whichever node it asks.

use std::collections::{BTreeMap, HashMap};

use super::order::{self, Known};
use super::{Verdict, describe};
use crate::history::{Answer, Call, Level, Operation};

/// Judges every read at session level by what its own process had done before.
pub fn check(operations: &[Operation]) -> Verdict {
    let mut verdict = Verdict::new("session");
    let writes = order::writes_by_key(operations);
    let mut floors: HashMap<u64, BTreeMap<u64, u64>> = HashMap::new();
    let mut known: HashMap<(u64, u64), Known> = HashMap::new();
    let mut judged = 0u64;
    // A process has one operation at a time, so the order of beginnings is its order.
    for operation in operations.iter().filter(|operation| operation.is_ok()) {
        let floor = floors.entry(operation.process).or_default();
        if let (Call::Read { key, level: Level::Session }, Some(Answer::Value { uid, .. })) =
            (&operation.call, &operation.answer)
        {
            judged += 1;
            for (shard, index) in &operation.positions {
                let least = floor.get(shard).copied().unwrap_or_default();
                if *index < least {
                    verdict.violation(
                        "behind",
                        format!("shard {shard} at {index}, seen before {least}: {}", describe(operation)),
                    );
                    verdict.show([operation]);
                }
            }
            let own = known.get(&(operation.process, *key)).copied().unwrap_or_default();
            let of_key = writes.get(key);
            if let Some(Err(anomaly)) =
                of_key.map(|of_key| of_key.judge(uid.as_deref(), own, operation.ended))
            {
                verdict.violation(anomaly.name(), format!("{}: {}", anomaly.name(), describe(operation)));
                verdict.show(
                    operations
                        .iter()
                        .filter(|other| other.process == operation.process && other.began <= operation.began),
                );
            }
        }
        for (shard, index) in &operation.positions {
            let seen = floor.entry(*shard).or_default();
            *seen = (*seen).max(*index);
        }
        let effect = match (&operation.call, &operation.answer) {
            (Call::Write { key, .. } | Call::Delete { key }, _) => Some((*key, operation)),
            (Call::Read { key, .. }, Some(Answer::Value { uid: Some(uid), .. })) => {
                writes.get(key).and_then(|writes| writes.of(uid)).map(|write| (*key, write))
            }
            _ => None,
        };
        if let Some((key, effect)) = effect {
            known.entry((operation.process, key)).or_default().learn(effect);
        }
    }
    verdict.figure("judged", judged as f64);
    if judged == 0 {
        verdict.cannot_tell("nobody has read at session level".to_owned());
    }
    verdict
}

#[cfg(test)]
mod tests {
    use super::super::Judgement;
    use super::super::testing::{at, by, read, write};
    use super::*;

    fn session(mut operation: Operation, index: u64) -> Operation {
        if let Call::Read { level, .. } = &mut operation.call {
            *level = Level::Session;
        }
        operation.positions.insert(1, index);
        operation
    }

    #[test]
    fn a_client_sees_what_it_wrote() {
        let good =
            [at(write(1, "a", 1, 2), 5), session(read(1, "a", 3, 4), 5), session(read(1, "a", 5, 6), 7)];
        assert_eq!(check(&good).judgement, Judgement::Valid);
        // Another client may see less.
        let other =
            [at(write(1, "a", 1, 2), 5), at(write(1, "b", 3, 4), 6), by(session(read(1, "a", 5, 6), 5), 2)];
        assert_eq!(check(&other).judgement, Judgement::Valid);
        let unread = [at(write(1, "a", 1, 2), 5), at(write(1, "b", 3, 4), 6), session(read(1, "a", 5, 6), 6)];
        assert_eq!(check(&unread).figures["stale"], 1.0);
        let behind = [at(write(2, "a", 1, 2), 5), session(read(1, "", 3, 4), 4)];
        assert_eq!(check(&behind).figures["behind"], 1.0);
    }
}
