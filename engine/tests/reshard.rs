//! A shard that is split while it is written to, and shards that are merged, hold what one shard would hold
//! that nothing of it was done to: points, documents with their versions, work in progress, and the answers
//! to requests that are repeated. Copies of entries that come twice or late, and crashes, change nothing.

mod common;

use std::collections::BTreeMap;

use common::write_frames;
use rand::rngs::StdRng;
use rand::{RngExt, SeedableRng};
use serde_json::json;
use shoal_engine::backup::Archive;
use shoal_engine::command::{
    Answer, Command, Document, DocumentState, Envelope, Outcome, PayloadMode, Point, Read, Replay, Seed,
    SeedPartial, Select, Stage, Target,
};
use shoal_engine::reshard::Refusals;
use shoal_engine::{Entry, Shard};
use shoal_proto::{
    BlobHash, ChunkerConfig, CollectionConfig, Distance, DocumentId, ErrorCode, FieldType, PointId,
    RequestId, Route, ShardId, VectorParams, codec,
};

const DIMENSIONS: usize = 4;
const LIMIT: usize = 10_000;
const IDS: u64 = 60;
const DOCUMENTS: u8 = 6;
/// An index at which replicas sum up their states.
const SUMMED: u64 = 256;
const BY: RequestId = RequestId([9; 16]);
const OTHER: RequestId = RequestId([8; 16]);

type Range = (Route, Route);
const ALL: Range = (Route(0), Route(u32::MAX));
const LOW: Range = (Route(0), Route(0x7fff_ffff));
const HIGH: Range = (Route(0x8000_0000), Route(u32::MAX));

fn config() -> CollectionConfig {
    let mut config = CollectionConfig::default();
    config.vectors.insert(String::new(), VectorParams::new(DIMENSIONS, Distance::Dot));
    config.text_fields.push("text".into());
    config
}

/// The payload and the vectors of a point.
type Held = (Option<String>, Option<Vec<(String, Vec<f32>)>>);

/// A shard with its log.
struct Rig {
    id: ShardId,
    dir: tempfile::TempDir,
    shard: Option<Shard>,
    log: Vec<Vec<u8>>,
    /// The entries that are in the last checkpoint.
    durable: usize,
}

impl Rig {
    fn new(id: u64) -> Rig {
        let dir = tempfile::tempdir().expect("a directory");
        let shard = Some(Shard::open(&dir.path().join("shard"), config()).expect("opens"));
        Rig { id: ShardId(id), dir, shard, log: Vec::new(), durable: 0 }
    }

    fn shard(&self) -> &Shard {
        self.shard.as_ref().expect("open")
    }

    fn put(&mut self, envelope: &Envelope) -> Outcome {
        self.log.push(codec::encode(envelope));
        self.play(self.log.len() - 1)
    }

    fn play(&self, at: usize) -> Outcome {
        let tag = (at as u64 + 1).to_be_bytes().to_vec();
        let entry = Entry { index: at as u64 + 1, tag, command: Some(self.log[at].clone()) };
        let outcomes = self.shard().apply(vec![entry]).expect("applies");
        codec::decode(&outcomes[0]).expect("an outcome")
    }

    fn command(&mut self, command: Command) -> Outcome {
        self.put(&Envelope { request_id: None, now: 7, command })
    }

    fn index(&self) -> u64 {
        self.log.len() as u64
    }

    fn checkpoint(&mut self) {
        let tag = self.shard().checkpoint().expect("durable");
        self.durable = tag.map_or(0, |tag| u64::from_be_bytes(tag.try_into().expect("eight bytes")) as usize);
    }

    /// Closes and opens it, and plays the log again from the last checkpoint, as after a crash.
    fn restart(&mut self) {
        drop(self.shard.take());
        let shard = Shard::open(&self.dir.path().join("shard"), config()).expect("opens again");
        let tag = shard.applied_tag().expect("readable");
        let applied = tag.map_or(0, |tag| u64::from_be_bytes(tag.try_into().expect("eight bytes")) as usize);
        assert!(applied >= self.durable, "it went back behind its checkpoint");
        self.shard = Some(shard);
        for at in applied..self.log.len() {
            self.play(at);
        }
    }

    fn replay(&mut self, replay: &Replay) -> Outcome {
        self.command(Command::Replay(Box::new(replay.clone())))
    }

    /// Crashes while the next entry, a replay, is being applied. Each of its commands is a step of its own in the
    /// store, and the entry's tag comes with the last one: what a crash after some of them leaves is what an
    /// entry of these alone makes, with the tag of the entry before.
    fn crash_within(&mut self, replay: &Replay, done: usize) {
        let tag = self.shard().applied_tag().expect("readable");
        let tag = tag.unwrap_or_else(|| 0u64.to_be_bytes().to_vec());
        let some = Replay { commands: replay.commands[..done].to_vec(), ..replay.clone() };
        let command = Command::Replay(Box::new(some));
        let command = Some(codec::encode(&Envelope { request_id: None, now: 7, command }));
        self.shard().apply(vec![Entry { index: self.index() + 1, tag, command }]).expect("applies");
        self.restart();
    }

    /// The sum over the state that replicas compare, as if the log had grown to where they do.
    fn sum(&self) -> u64 {
        assert!(self.index() < SUMMED, "it is summed up at an index that is still to come");
        let tag = SUMMED.to_be_bytes().to_vec();
        self.shard().apply(vec![Entry { index: SUMMED, tag, command: None }]).expect("applies");
        let sums = self.shard().state_sums();
        sums.last().expect("it is summed up there").1
    }

    fn points(&self) -> BTreeMap<PointId, Held> {
        let question = Read::Scroll {
            from: None,
            filter: None,
            limit: LIMIT,
            payload: Select::All,
            vectors: Select::All,
        };
        match self.shard().read(&question).expect("answers").1 {
            Answer::Points(points) => {
                points.into_iter().map(|hit| (hit.id, (hit.payload, hit.vectors))).collect()
            }
            other => panic!("not points: {other:?}"),
        }
    }

    fn documents(&self) -> BTreeMap<DocumentId, Document> {
        match self.shard().read(&Read::ListDocuments(None)).expect("answers").1 {
            Answer::Documents(documents) => {
                documents.into_iter().map(|document| (document.id, document)).collect()
            }
            other => panic!("not documents: {other:?}"),
        }
    }

    fn count(&self, filter: serde_json::Value) -> u64 {
        let question = Read::Count { filter: Some(filter.to_string()) };
        match self.shard().read(&question).expect("answers").1 {
            Answer::Count(count) => count,
            other => panic!("not a count: {other:?}"),
        }
    }
}

fn point(id: PointId, coin: &mut StdRng) -> Point {
    let vector = (0..DIMENSIONS).map(|_| coin.random_range(-9..9) as f32).collect();
    let payload = json!({"n": coin.random_range(0..5), "text": format!("word{}", coin.random_range(0..5))});
    Point { id, vectors: vec![(String::new(), vector)], payload: payload.to_string() }
}

fn document_id(number: u8) -> DocumentId {
    DocumentId([number; 16])
}

/// A command as it might come, about documents as they are.
fn random_command(rig: &Rig, coin: &mut StdRng) -> Command {
    let ids = |coin: &mut StdRng| -> Vec<PointId> {
        (0..coin.random_range(1..6)).map(|_| PointId::Num(coin.random_range(0..IDS))).collect()
    };
    let filter = |coin: &mut StdRng| {
        Target::Filter(
            json!({"must": [{"key": "n", "match": {"value": coin.random_range(0..5)}}]}).to_string(),
        )
    };
    let documents = rig.documents();
    let id = document_id(coin.random_range(0..DOCUMENTS));
    let version = documents.get(&id).map_or(0, |document| document.version);
    let staged = documents.get(&id).map_or(0, |document| document.staged_chunks);
    match coin.random_range(0..16) {
        0..=4 => Command::Upsert(ids(coin).into_iter().map(|id| point(id, coin)).collect()),
        5 => Command::Delete(Target::Ids(ids(coin))),
        6 => Command::Delete(filter(coin)),
        7 => Command::SetPayload {
            target: if coin.random() { Target::Ids(ids(coin)) } else { filter(coin) },
            payload: json!({"n": coin.random_range(0..5), "set": true}).to_string(),
            mode: if coin.random() { PayloadMode::Merge } else { PayloadMode::Overwrite },
        },
        8 => Command::SetPayloadIndex {
            field: "n".into(),
            index: coin.random::<bool>().then_some(FieldType::Integer),
        },
        9 | 10 => Command::AcceptDocument {
            id,
            filename: "a.txt".into(),
            blob: BlobHash([coin.random_range(0..3); 32]),
            bytes: 5,
            attributes: json!({"a": coin.random_range(0..3)}).to_string(),
            chunker: ChunkerConfig { max_tokens: 100, overlap_tokens: 10 },
        },
        11 | 12 => Command::StageChunks {
            id,
            version,
            first: staged,
            points: (0..2).map(|at| point(id.chunk_point(version, staged + at), coin)).collect(),
        },
        13 => Command::PublishDocument { id, version, chunks: staged },
        14 => {
            Command::NoteProgress { id, version, stage: Stage::Parsing, total_chunks: 0, new_attempt: true }
        }
        _ => Command::DeleteDocument(id),
    }
}

/// Writes to a shard that owns a range, and sometimes repeats what it has written.
fn write(rig: &mut Rig, range: Range, requests: &mut Vec<Envelope>, coin: &mut StdRng) {
    if !requests.is_empty() && coin.random_ratio(1, 10) {
        let again = requests[coin.random_range(0..requests.len())].clone();
        rig.put(&again);
        return;
    }
    let Some(command) = random_command(rig, coin).within(range.0, range.1) else { return };
    let request_id = coin.random::<bool>().then(|| RequestId(coin.random()));
    let envelope = Envelope { request_id, now: 7, command };
    let outcome = rig.put(&envelope);
    let was_frozen = matches!(&outcome, Outcome::Rejected(error) if error.code == ErrorCode::Stale);
    if request_id.is_some() && !was_frozen {
        requests.push(envelope);
    }
}

/// What an old shard holds now, as seeds for new ones with their ranges, and what its versions count from.
fn seeds(
    parent: &Rig,
    parents: &[(ShardId, Range)],
    children: &[Range],
) -> (Vec<(usize, Command)>, u64, Refusals) {
    let dir = tempfile::tempdir().expect("a directory");
    let (_, cursor) = parent.shard().export().expect("exported");
    write_frames(&cursor, &dir.path().join("frames"));
    let mut archive = Archive::create(&dir.path().join("archive")).expect("made");
    archive.take_file(&dir.path().join("frames")).expect("whole");
    let base = archive.base().expect("readable");
    let empty = Seed {
        by: BY,
        from: parent.id,
        parents: Vec::new(),
        version: base + parent.index(),
        points: Vec::new(),
        documents: Vec::new(),
        staged: Vec::new(),
        answers: Vec::new(),
        indexes: None,
    };
    let seed = |at: usize, seed: Seed| (at, Command::Seed(Box::new(seed)));
    let mut seeds = Vec::new();
    for (at, range) in children.iter().enumerate() {
        let is_in = |route: Route| (range.0..=range.1).contains(&route);
        let parts =
            parents.iter().map(|(parent, (first, last))| (*parent, range.0.max(*first), range.1.min(*last)));
        let empty =
            Seed { parents: parts.filter(|(_, first, last)| first <= last).collect(), ..empty.clone() };
        let indexes = archive.indexes().expect("readable").unwrap_or_default();
        let indexes = (parents[0].0 == parent.id).then_some(indexes);
        seeds.push(seed(at, Seed { indexes, ..empty.clone() }));
        let answers = archive.answers().expect("readable");
        for some in answers.whole.chunks(7) {
            seeds.push(seed(at, Seed { answers: some.to_vec(), ..empty.clone() }));
        }
        for some in answers.partial.chunks(7) {
            let seed = SeedPartial { by: BY, from: parent.id, answers: some.to_vec() };
            seeds.push((at, Command::SeedPartial(Box::new(seed))));
        }
        let mut after = None;
        loop {
            let mut points = archive.points(&config(), &mut after, 500).expect("readable");
            if points.is_empty() {
                break;
            }
            points.retain(|point| is_in(point.id.route()));
            seeds.push(seed(at, Seed { points, ..empty.clone() }));
        }
        let mut after = None;
        loop {
            let mut documents = archive.documents(&mut after, 300).expect("readable");
            if documents.is_empty() {
                break;
            }
            documents.retain(|document| is_in(document.id.route()));
            seeds.push(seed(at, Seed { documents, ..empty.clone() }));
        }
        let mut after = None;
        loop {
            let mut staged = archive.staged(&mut after, 300).expect("readable");
            if staged.is_empty() {
                break;
            }
            staged.retain(|chunk| is_in(chunk.document.route()));
            seeds.push(seed(at, Seed { staged, ..empty.clone() }));
        }
    }
    (seeds, base, Refusals::after(archive.frozen_by().expect("readable")))
}

/// Some of a log, cut for a range.
fn replay(
    parent: &Rig,
    base: u64,
    (from, to): (usize, usize),
    mut refusals: Refusals,
    range: Range,
) -> Replay {
    let commands = (from..to).filter_map(|at| {
        let envelope: Envelope = codec::decode(&parent.log[at]).expect("an envelope");
        if refusals.has_refused(&envelope.command) {
            return None;
        }
        let command = envelope.command.within(range.0, range.1)?;
        Some((base + at as u64 + 1, Envelope { command, ..envelope }))
    });
    Replay { by: BY, from: parent.id, commands: commands.collect() }
}

/// Takes over what `parents` hold, while they are written to.
fn take_over(
    parents: &mut [Rig],
    owned: &[Range],
    ranges: &[Range],
    first_id: u64,
    requests: &mut [Vec<Envelope>],
    coin: &mut StdRng,
) -> Vec<Rig> {
    let mut children: Vec<Rig> = (first_id..).take(ranges.len()).map(Rig::new).collect();
    let known: Vec<(ShardId, Range)> =
        parents.iter().zip(owned).map(|(parent, own)| (parent.id, *own)).collect();
    for ((parent, own), requests) in parents.iter_mut().zip(owned).zip(requests.iter_mut()) {
        // An attempt before this one has frozen it, and was given up: what was refused then did not happen.
        let is_frozen = coin.random_ratio(1, 3);
        if is_frozen {
            parent.command(Command::Freeze { by: OTHER });
            (0..3).for_each(|_| write(parent, *own, requests, coin));
        }
        let (seeds, base, mut refusals) = seeds(parent, &known, ranges);
        let mut done = parent.log.len();
        if is_frozen {
            (0..3).for_each(|_| write(parent, *own, requests, coin));
            parent.command(Command::Thaw { by: OTHER });
        }
        for (number, (at, seed)) in seeds.iter().enumerate() {
            children[*at].command(seed.clone());
            if coin.random_ratio(1, 8) {
                // An answer was lost.
                children[*at].command(seed.clone());
            }
            if number % 5 == 0 {
                write(parent, *own, requests, coin);
            }
            trouble(&mut children[*at], coin);
        }
        for round in 0..8 {
            let is_last = round == 7;
            for _ in 0..coin.random_range(0..6) {
                write(parent, *own, requests, coin);
            }
            let mut upto = parent.log.len();
            if is_last {
                assert_eq!(parent.command(Command::Freeze { by: BY }), Outcome::Done(0));
                assert_eq!(parent.shard().frozen_by(), Some(BY));
                let late = parent.command(Command::Upsert(vec![point(PointId::Num(1), coin)]));
                assert!(matches!(late, Outcome::Rejected(error) if error.code == ErrorCode::Stale));
                upto = parent.log.len() - 2;
            }
            for (child, range) in children.iter_mut().zip(ranges) {
                let part = replay(parent, base, (done, upto), refusals, *range);
                if coin.random_ratio(1, 4) {
                    child.crash_within(&part, coin.random_range(0..=part.commands.len()));
                }
                child.replay(&part);
                if coin.random_ratio(1, 4) {
                    child.replay(&part);
                }
                // A seed that was on its way since then must not bring anything back.
                if let Some((_, late)) = seeds.get(coin.random_range(0..seeds.len())).filter(|_| upto > done)
                {
                    child.command(late.clone());
                }
                trouble(child, coin);
            }
            for at in done..upto {
                let envelope: Envelope = codec::decode(&parent.log[at]).expect("an envelope");
                refusals.has_refused(&envelope.command);
            }
            done = upto;
        }
    }
    for child in &mut children {
        assert_eq!(child.command(Command::EndAdoption { by: BY }), Outcome::Done(0));
        let late = child.command(Command::Replay(Box::new(Replay {
            by: BY,
            from: parents[0].id,
            commands: vec![(
                u64::from(u32::MAX),
                Envelope { request_id: None, now: 7, command: Command::Delete(Target::Filter("{}".into())) },
            )],
        })));
        assert!(matches!(late, Outcome::Rejected(error) if error.code == ErrorCode::Conflict));
    }
    children
}

fn trouble(rig: &mut Rig, coin: &mut StdRng) {
    match coin.random_range(0..12) {
        0 => rig.checkpoint(),
        1 => rig.restart(),
        _ => {}
    }
}

/// Checks that some shards together hold what others held together.
fn check_same(before: &[Rig], after: &[Rig], ranges: &[Range]) {
    let points = |rigs: &[Rig]| rigs.iter().flat_map(Rig::points).collect::<BTreeMap<_, _>>();
    assert_eq!(points(before), points(after));
    let documents = |rigs: &[Rig]| rigs.iter().flat_map(Rig::documents).collect::<BTreeMap<_, _>>();
    assert_eq!(documents(before), documents(after));
    for (rig, range) in after.iter().zip(ranges) {
        let is_in = |route: Route| (range.0..=range.1).contains(&route);
        assert!(rig.points().keys().all(|id| is_in(id.route())), "a point is where it does not belong");
        assert!(rig.documents().keys().all(|id| is_in(id.route())));
    }
    for n in 0..5 {
        let filter = || json!({"must": [{"key": "n", "match": {"value": n}}]});
        let count = |rigs: &[Rig]| rigs.iter().map(|rig| rig.count(filter())).sum::<u64>();
        assert_eq!(count(before), count(after), "n = {n}");
    }
}

/// Repeats everything that was ever asked for: nothing of it may be done again.
fn check_repetitions(rigs: &mut [Rig], ranges: &[Range], requests: &[Vec<Envelope>]) {
    let before: Vec<_> = rigs.iter().map(|rig| (rig.points(), rig.documents())).collect();
    for envelope in requests.iter().flatten() {
        for (rig, range) in rigs.iter_mut().zip(ranges) {
            if let Some(command) = envelope.command.clone().within(range.0, range.1) {
                rig.put(&Envelope { command, ..envelope.clone() });
            }
        }
    }
    let after: Vec<_> = rigs.iter().map(|rig| (rig.points(), rig.documents())).collect();
    assert_eq!(before, after, "a repeated request was done again");
}

/// Work that is in progress goes on where it was, and what is new is numbered above all that there is.
fn check_goes_on(rig: &mut Rig, range: Range, coin: &mut StdRng) {
    let documents = rig.documents();
    let newest = documents.values().map(|document| document.version).max().unwrap_or(0);
    for document in documents.values().filter(|document| document.state == DocumentState::InProgress) {
        let (id, version, chunks) = (document.id, document.version, document.staged_chunks);
        let published = rig.command(Command::PublishDocument { id, version, chunks });
        assert!(matches!(published, Outcome::Document(_)), "{published:?}");
        for at in 0..chunks {
            assert!(rig.points().contains_key(&id.chunk_point(version, at)), "chunk {at} of {id} is lost");
        }
    }
    let id = (100..=255).map(document_id).find(|id| (range.0..=range.1).contains(&id.route()));
    let accepted = rig.command(Command::AcceptDocument {
        id: id.expect("some id is in any half"),
        filename: "b.txt".into(),
        // Other bytes each time: the same ones would be no new version.
        blob: BlobHash(coin.random()),
        bytes: 5,
        attributes: String::new(),
        chunker: ChunkerConfig { max_tokens: 100, overlap_tokens: 10 },
    });
    let Outcome::Document(accepted) = accepted else { panic!("{accepted:?}") };
    assert!(accepted.version > newest, "{} is not newer than {newest}", accepted.version);
    let before = rig.points();
    rig.checkpoint();
    let own = (0..IDS).map(PointId::Num).find(|id| (range.0..=range.1).contains(&id.route()));
    let written = point(own.expect("some id is in any half"), coin);
    rig.command(Command::Upsert(vec![written]));
    let after = rig.points();
    rig.restart();
    assert_eq!(rig.points(), after, "a restart has changed something");
    assert!(after.len() >= before.len());
}

#[test]
fn split_and_merged_shards_hold_what_one_would() {
    for seed in 0..25 {
        let mut coin = StdRng::seed_from_u64(seed);
        let mut requests = vec![Vec::new()];
        let mut whole = [Rig::new(1)];
        for _ in 0..coin.random_range(0..120) {
            write(&mut whole[0], ALL, &mut requests[0], &mut coin);
            trouble(&mut whole[0], &mut coin);
        }
        let halves = [LOW, HIGH];
        let mut split = take_over(&mut whole, &[ALL], &halves, 2, &mut requests, &mut coin);
        check_same(&whole, &split, &halves);
        check_repetitions(&mut split, &halves, &requests);

        // And back again, from two shards whose numbers have nothing to do with each other.
        let mut more = vec![Vec::new(), Vec::new()];
        for (at, range) in halves.iter().enumerate() {
            check_goes_on(&mut split[at], *range, &mut coin);
        }
        let mut merged = take_over(&mut split, &halves, &[ALL], 4, &mut more, &mut coin);
        check_same(&split, &merged, &[ALL]);
        let mut all = [requests, more].concat();
        check_repetitions(&mut merged, &[ALL], &all);
        check_goes_on(&mut merged[0], ALL, &mut coin);

        // And once more, while everything that was ever asked for is asked for again.
        let mut again = vec![all.concat()];
        let mut merged = [merged.remove(0)];
        let mut parted = take_over(&mut merged, &[ALL], &halves, 5, &mut again, &mut coin);
        check_same(&merged, &parted, &halves);
        all.extend(again);
        check_repetitions(&mut parted, &halves, &all);
    }
}

/// A crash after any of the commands that one entry replays: then it is applied to its end, and the state has
/// the same bytes as on a replica that has not crashed.
#[test]
fn a_crash_after_any_command_of_a_replay_changes_nothing() {
    for seed in 0..4 {
        let (mut coin, mut requests) = (StdRng::seed_from_u64(seed), Vec::new());
        let mut parent = Rig::new(1);
        (0..30).for_each(|_| write(&mut parent, ALL, &mut requests, &mut coin));
        let (seeds, base, refusals) = seeds(&parent, &[(parent.id, ALL)], &[LOW]);
        let start = parent.log.len();
        (0..20).for_each(|_| write(&mut parent, ALL, &mut requests, &mut coin));
        let part = replay(&parent, base, (start, parent.log.len()), refusals, LOW);
        assert!(part.commands.len() > 3, "{} commands", part.commands.len());
        let sum_after = |crash: Option<usize>| {
            let mut child = Rig::new(2);
            for (_, seed) in &seeds {
                child.command(seed.clone());
            }
            child.checkpoint();
            if let Some(done) = crash {
                child.crash_within(&part, done);
            }
            assert_eq!(child.replay(&part), Outcome::Done(0));
            assert_eq!(child.command(Command::EndAdoption { by: BY }), Outcome::Done(0));
            child.sum()
        };
        let whole = sum_after(None);
        for done in 0..=part.commands.len() {
            assert_eq!(sum_after(Some(done)), whole, "seed {seed}, a crash after {done} commands");
        }
    }
}

/// A request that touches two shards, of which only one has answered it when they are merged: in what it is
/// asked for again, exactly what is missing is done.
#[test]
fn a_request_that_one_of_two_shards_has_answered_is_finished() {
    let own = |range: Range, skip: usize| {
        let mut ids = (0..).map(PointId::Num).filter(|id| (range.0..=range.1).contains(&id.route()));
        ids.nth(skip).expect("some id is in any half")
    };
    let (low, high) = (own(LOW, 0), own(HIGH, 0));
    let said = |id: PointId, text: &str| Point {
        id,
        vectors: vec![(String::new(), vec![1.0; DIMENSIONS])],
        payload: json!({"by": text}).to_string(),
    };
    // Answered before the copy, after it, by both, by nobody.
    for (in_seed, in_tail) in [(true, false), (false, true), (true, true), (false, false)] {
        let request = RequestId([1; 16]);
        let all = Command::Upsert(vec![said(low, "the request"), said(high, "the request")]);
        let clear = RequestId([2; 16]);
        let filter = json!({"must": [{"key": "by", "match": {"value": "old"}}]}).to_string();
        let delete = Command::Delete(Target::Filter(filter));
        let envelope = |id: RequestId, command: &Command, range: Range| Envelope {
            request_id: Some(id),
            now: 7,
            command: command.clone().within(range.0, range.1).expect("something of it"),
        };
        let old = [own(LOW, 1), own(HIGH, 1)];
        let mut parents = [Rig::new(1), Rig::new(2)];
        for (parent, id) in parents.iter_mut().zip(old) {
            parent.command(Command::Upsert(vec![said(id, "old")]));
        }
        let known = [(ShardId(1), LOW), (ShardId(2), HIGH)];
        let mut merged = Rig::new(3);
        let mut starts = Vec::new();
        if in_seed {
            parents[0].put(&envelope(request, &all, LOW));
            parents[0].put(&envelope(clear, &delete, LOW));
        }
        for parent in &parents {
            let (seeds, base, refusals) = seeds(parent, &known, &[ALL]);
            starts.push((parent.log.len(), base, refusals));
            for (_, seed) in seeds {
                merged.command(seed);
            }
        }
        if in_tail {
            parents[1].put(&envelope(request, &all, HIGH));
            parents[1].put(&envelope(clear, &delete, HIGH));
        }
        // Somebody else has written since.
        parents[0].command(Command::Upsert(vec![said(low, "another"), said(old[0], "old")]));
        parents[1].command(Command::Upsert(vec![said(high, "another"), said(old[1], "old")]));
        for (parent, (start, base, refusals)) in parents.iter().zip(starts) {
            merged.replay(&replay(parent, base, (start, parent.log.len()), refusals, ALL));
        }
        merged.command(Command::EndAdoption { by: BY });
        merged.restart();
        let by = |rig: &Rig, id: PointId| rig.points().get(&id).and_then(|(payload, _)| payload.clone());
        let text = |text: &str| Some(json!({"by": text}).to_string());
        for _ in 0..2 {
            merged.put(&envelope(request, &all, ALL));
            merged.put(&envelope(clear, &delete, ALL));
            let expected = |is_answered: bool| text(if is_answered { "another" } else { "the request" });
            assert_eq!(by(&merged, low), expected(in_seed), "{in_seed} {in_tail}");
            assert_eq!(by(&merged, high), expected(in_tail), "{in_seed} {in_tail}");
            assert_eq!(by(&merged, old[0]).is_some(), in_seed, "{in_seed} {in_tail}");
            assert_eq!(by(&merged, old[1]).is_some(), in_tail, "{in_seed} {in_tail}");
            merged.restart();
        }
    }
}
