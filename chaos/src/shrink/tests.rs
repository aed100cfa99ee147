use rand::rngs::StdRng;
use rand::{RngExt, SeedableRng};

use super::*;
use crate::checkers::testing::{at, by, delete, find, list, operation, read, write};
use crate::history::{Answer, Call, Level, Outcome, Sample, Way};

/// The history of these operations, for one checker.
fn history(checker: &str, operations: &[Operation]) -> History {
    let mut events: Vec<(u64, Event)> = Vec::new();
    for operation in operations.iter().cloned() {
        let Operation { process, node, call, began, ended, began_ns, ended_ns, outcome, status, .. } =
            operation;
        events.push((began, Event::Invoke { seq: began, ns: began_ns, process, node, call }));
        if ended != u64::MAX {
            let (answer, positions) = (operation.answer, operation.positions.into_iter().collect());
            let (seq, ns, error) = (ended, ended_ns, None);
            let end = Event::Complete { seq, ns, process, outcome, status, answer, positions, error };
            events.push((ended, end));
        }
    }
    events.sort_by_key(|(seq, _)| *seq);
    let mut history = History::default();
    history.header.checkers = vec![checker.to_owned()];
    history.header.least_ok = 1_000_000;
    history.events = events.into_iter().map(|(_, event)| event).collect();
    history
}

fn shrunk(checker: &str, operations: &[Operation]) -> Shrunk {
    let history = history(checker, operations);
    let shrunk = shrink(&history, checker, BUDGET, &|| Duration::ZERO).expect("it is invalid");
    assert!(shrunk.is_minimal, "{checker}: {} judgements", shrunk.judgements);
    shrunk
}

fn refusal(checker: &str, history: &History) -> String {
    shrink(history, checker, BUDGET, &|| Duration::ZERO).expect_err("refused").to_string()
}

/// What is left.
fn left(checker: &str, operations: &[Operation]) -> Vec<Operation> {
    shrunk(checker, operations).history.operations()
}

/// Two thousand good operations on fifty keys, and some on key 1 of which one reads what is gone.
fn stale_among_thousands() -> Vec<Operation> {
    let mut operations = vec![write(1, "x", 1, 2), read(1, "x", 3, 4), delete(1, 5, 6), read(1, "", 7, 8)];
    operations.extend((0..1000).flat_map(|n| {
        let (key, uid, at) = (100 + n % 50, format!("w{n}"), 10 + 4 * n);
        [write(key, &uid, at, at + 1), read(key, &uid, at + 2, at + 3)]
    }));
    operations.extend([write(1, "a", 5001, 5002), write(1, "b", 5003, 5004), read(1, "a", 5005, 5006)]);
    operations
}

#[test]
fn a_stale_read_among_thousands_of_operations_is_found() {
    let operations = stale_among_thousands();
    for checker in ["register-search", "register-versions", "set"] {
        let left = left(checker, &operations);
        assert_eq!(left, operations[operations.len() - 3..], "{checker}");
    }
}

#[test]
fn what_is_left_is_invalid_by_the_same_checker_and_always_the_same() {
    let operations = stale_among_thousands();
    let first = shrunk("register-versions", &operations);
    assert_eq!(first.lines, shrunk("register-versions", &operations).lines);
    let dir = tempfile::tempdir().expect("a directory");
    let path = dir.path().join("minimal.jsonl.zst");
    first.history.write(&path).expect("written");
    let again = History::read(&path).expect("read");
    for verdict in checkers::judge(&again).expect("judged") {
        let is_the_one = verdict.checker == "register-versions";
        assert_eq!(verdict.judgement == Judgement::Invalid, is_the_one, "{verdict:?}");
    }
    let twice = shrink(&again, "register-versions", BUDGET, &|| Duration::ZERO).expect("still invalid");
    assert_eq!(twice.lines, first.lines);
}

#[test]
fn what_is_not_invalid_is_refused() {
    let good = [write(1, "a", 1, 2), read(1, "a", 3, 4)];
    assert!(refusal("register-search", &history("register-search", &good)).contains("history valid"));
    assert!(refusal("set", &history("set", &good)).contains("history unknown"));
    assert!(refusal("spelling", &history("set", &good)).contains("no checker spelling"));
    let mut slow = history("availability", &[write(1, "a", 1, 2), write(1, "b", 3, 9000)]);
    slow.header.longest_gap_ms = Some(1);
    assert!(refusal("availability", &slow).contains("as a whole"));
}

#[test]
fn a_delete_that_explains_absence_stays_until_a_write_after_it_does() {
    // A is gone by a delete, which is no mistake; that B is gone is one.
    let lost = [write(1, "a", 1, 2), delete(1, 3, 4), write(1, "b", 5, 6), list(&[], 7, 8)];
    assert_eq!(left("set", &lost), lost[2..]);
    let lost = [write(1, "a", 1, 2), delete(1, 3, 4), write(1, "b", 5, 6), read(1, "", 7, 8)];
    for checker in ["register-search", "register-versions"] {
        assert_eq!(left(checker, &lost), lost[2..], "{checker}");
    }
    let back =
        [write(1, "a", 1, 2), read(1, "a", 3, 4), delete(1, 5, 6), read(1, "", 7, 8), read(1, "a", 9, 10)];
    for checker in ["register-search", "register-versions"] {
        let calls: Vec<Call> = left(checker, &back).into_iter().map(|operation| operation.call).collect();
        let read = Call::Read { key: 1, level: Level::Linearizable };
        assert_eq!(calls, [back[0].call.clone(), back[2].call.clone(), read], "{checker}");
    }
}

#[test]
fn a_listing_says_what_it_said_of_the_keys_that_are_left() {
    let mut operations: Vec<Operation> =
        (0..300).map(|n| write(n, &format!("w{n}"), 2 * n + 1, 2 * n + 2)).collect();
    operations.push(write(7, "new", 701, 702));
    let uids: Vec<String> = (0..300).map(|n| format!("w{n}")).collect();
    let points: Vec<(u64, &str)> = (0..300).zip(uids.iter().map(String::as_str)).collect();
    operations.push(list(&points, 703, 704));
    let left = left("set", &operations);
    assert_eq!(left[..2], [operations[7].clone(), operations[300].clone()]);
    assert_eq!(left[2..], [list(&[(7, "w7")], 703, 704)]);
}

#[test]
fn a_share_of_misses_does_not_grow() {
    // One of two thousand may be missed by the graph.
    let mut operations: Vec<Operation> = (0..2000)
        .flat_map(|n| {
            let (uid, at) = (format!("w{n}"), 1 + 4 * n);
            let found = if n == 3 { "" } else { uid.as_str() };
            [write(n, &uid, at, at + 1), find(n, &uid, Way::Graph, found, at + 2, at + 3)]
        })
        .collect();
    assert!(refusal("visibility", &history("visibility", &operations)).contains("history valid"));
    let missed = [write(5000, "z", 9001, 9002), find(5000, "z", Way::Exact, "", 9003, 9004)];
    operations.extend(missed.clone());
    assert_eq!(left("visibility", &operations), missed);
    // One of ten is too much, and less than all ten does not show it.
    assert_eq!(left("visibility", &operations[..20]), operations[..20]);
}

#[test]
fn batches_that_share_a_key_stay_together() {
    let batch = |keys: &[u64], uid: &str, began, ended| {
        operation(Call::Batch { keys: keys.to_vec(), uid: uid.into() }, began, ended, Some(Answer::Done))
    };
    let points = [(1, "a"), (2, "b"), (3, "b"), (7, "c")];
    let operations = [
        batch(&[1, 2], "a", 1, 2),
        batch(&[2, 3], "b", 3, 4),
        batch(&[7, 8], "c", 5, 6),
        list(&points, 7, 8),
    ];
    let left = left("batch", &operations);
    assert_eq!(left, [operations[2].clone(), list(&[(7, "c")], 7, 8)]);
}

#[test]
fn an_inversion_of_versions_stays_with_its_writes() {
    // The writes overlap, so that only the indexes tell which one was the later.
    let inversion = [
        at(write(1, "a", 1, 9), 6),
        by(at(write(1, "b", 2, 8), 7), 2),
        by(at(read(1, "b", 3, 4), 7), 3),
        by(at(read(1, "a", 5, 6), 6), 3),
    ];
    let mut operations = inversion.to_vec();
    operations.extend((0..200).flat_map(|n| {
        let (key, uid, from) = (100 + n % 20, format!("w{n}"), 10 + 4 * n);
        [at(write(key, &uid, from, from + 1), 10 + n), at(read(key, &uid, from + 2, from + 3), 10 + n)]
    }));
    assert_eq!(left("register-versions", &operations), inversion);
}

#[test]
fn samples_are_left_out_as_long_as_the_same_is_found() {
    let sample = |node, term, applied| Sample {
        node,
        run: 1,
        group: 1,
        term,
        applied,
        last: applied,
        ..Sample::default()
    };
    let leader = |node, term, members: &[u64]| Sample {
        is_leader: true,
        members: members.to_vec(),
        ..sample(node, term, 60)
    };
    let mut samples = vec![Sample { checkpoint: 9, ..sample(1, 1, 9) }];
    // Node 1 is let go and comes back with less: no mistake, as long as the leader's word is there.
    samples.extend([leader(2, 1, &[2, 3]), Sample { run: 2, ..sample(1, 1, 3) }]);
    samples.extend((10..50).map(|applied| sample(3, 1, applied)));
    samples.extend((10..50).map(|applied| Sample { group: 2, ..sample(3, 1, applied) }));
    samples.extend([leader(1, 5, &[]), leader(3, 5, &[])]);
    let events = samples.iter().enumerate().map(|(at, sample)| {
        let (seq, ns) = (at as u64, at as u64);
        Event::Probe { seq, ns, sample: sample.clone() }
    });
    let mut history = history("raft", &[write(1, "a", 1, 2)]);
    history.events.extend(events);
    let shrunk = shrink(&history, "raft", BUDGET, &|| Duration::ZERO).expect("two leaders");
    let left: Vec<&Sample> = shrunk.history.samples().collect();
    assert_eq!(left, [&leader(1, 5, &[]), &leader(3, 5, &[])]);
    assert_eq!((shrunk.lines.len(), shrunk.history.events.len()), (2, 2));
}

#[test]
fn a_budget_that_is_used_up_is_said() {
    let operations = stale_among_thousands();
    let history = history("set", &operations);
    for (judgements, time) in [(0, 60), (5, 60), (2_000, 0)] {
        let budget = Budget { judgements, time: Duration::from_secs(time) };
        let shrunk = shrink(&history, "set", budget, &|| Duration::ZERO).expect("still invalid");
        assert!(!shrunk.is_minimal && shrunk.judgements <= judgements);
        assert_eq!(shrunk.verdict.judgement, Judgement::Invalid);
        assert!(shrunk.evidence().last().is_some_and(|line| line.contains("perhaps not minimal")));
    }
}

/// A few operations of three clients on two keys, with whatever answers.
fn random_operations(coin: &mut StdRng) -> Vec<Operation> {
    let mut operations: Vec<Operation> = Vec::new();
    let mut clients: [(u64, Option<usize>); 3] = [(1, None), (2, None), (3, None)];
    for seq in 1..=18 {
        let client = &mut clients[coin.random_range(0..3)];
        let Some(at) = client.1.take() else {
            client.1 = Some(operations.len());
            let call = random_call(coin, operations.len());
            operations.push(Operation { process: client.0, ..operation(call, seq, 0, None) });
            continue;
        };
        let answer = random_answer(coin, &operations[at].call, at);
        let ending = &mut operations[at];
        match coin.random_range(0..10) {
            0 => client.0 += 10,
            1 => (ending.outcome, ending.ended) = (Outcome::Fail, seq),
            _ => {
                (ending.outcome, ending.ended, ending.answer) = (Outcome::Ok, seq, Some(answer));
                ending.positions.insert(1, coin.random_range(1..9));
            }
        }
    }
    operations
}

fn random_call(coin: &mut StdRng, number: usize) -> Call {
    let key = coin.random_range(0..2);
    let level = [Level::Linearizable, Level::Session][coin.random_range(0..2)];
    match coin.random_range(0..12) {
        0..4 => Call::Write { key, uid: format!("u{number}") },
        4..6 => Call::Delete { key },
        6 => Call::Batch { keys: vec![key, key + 1], uid: format!("u{number}") },
        7 => Call::List { level },
        8 => {
            let way = [Way::Id, Way::Graph][coin.random_range(0..2)];
            Call::Find { key, uid: format!("u{}", coin.random_range(0..=number)), way, level }
        }
        _ => Call::Read { key, level },
    }
}

fn random_answer(coin: &mut StdRng, call: &Call, number: usize) -> Answer {
    let mut value = || match coin.random_range(0..3) {
        0 => None,
        _ => Some(coin.random_range(0..=number)),
    };
    match call {
        Call::List { .. } => {
            let points = (0..3).filter_map(|key| Some((key, format!("u{}", value()?)))).collect();
            Answer::Listing { points }
        }
        Call::Read { .. } | Call::Find { .. } => {
            let value = value();
            let version = value.and_then(|value| random_version(coin, value));
            Answer::Value { uid: value.map(|value| format!("u{value}")), version }
        }
        Call::Write { .. } | Call::Delete { .. } | Call::Batch { .. } => Answer::Done,
    }
}

/// The index that a reader is told of a value: mostly always the same one, so that some histories are good;
/// sometimes another or none.
fn random_version(coin: &mut StdRng, value: usize) -> Option<u64> {
    match coin.random_range(0..8) {
        0 => None,
        1 => Some(coin.random_range(1..9)),
        _ => Some(1 + value as u64),
    }
}

#[test]
fn less_of_a_history_is_never_worse_than_more_of_it() {
    let mut by_versions = 0;
    for seed in 0..5_000 {
        let mut coin = StdRng::seed_from_u64(seed);
        let parts = Parts::of(random_operations(&mut coin));
        let mut some = |all: &[usize], share: f64| -> Vec<usize> {
            all.iter().copied().filter(|_| coin.random_bool(share)).collect()
        };
        let all: Vec<usize> = (0..parts.operations.len()).collect();
        let keys: BTreeSet<u64> = (0..3).collect();
        assert_eq!(parts.close(&all, &keys), all, "seed {seed}: the whole is closed");
        let more = parts.close(&some(&all, 0.7), &keys);
        let less = parts.close(&some(&more, 0.7), &keys);
        let is_invalid = |checker: &str, part: &[usize]| {
            let operations = parts.select(part, &keys);
            let verdict = checkers::run(checker, &History::default(), &operations).expect("a checker");
            verdict.judgement == Judgement::Invalid
        };
        for checker in OF_OPERATIONS {
            let is_created = is_invalid(checker, &less) && !is_invalid(checker, &more);
            assert!(!is_created, "seed {seed}: {checker} accepts {more:?} and refuses {less:?}");
        }
        by_versions +=
            usize::from(is_invalid("register-versions", &less) && !is_invalid("register-search", &less));
    }
    assert!(by_versions > 0, "no version was ever what is wrong");
}
