//! Documents in a shard, driven as ingest drives them: late news of an older version, attributes
//! that change in the middle of the work, and a new version that takes the old one's place.

use std::ops::Range;
use std::sync::Arc;
use std::thread;

use serde_json::{Value, json};
use shoal_engine::command::{
    Answer, Command, Document, DocumentState, Envelope, Hit, Leg, Outcome, Point, Read, Search, Select,
};
use shoal_engine::{Entry, Shard};
use shoal_proto::{
    BlobHash, ChunkerConfig, CollectionConfig, Distance, DocumentId, ErrorCode, VectorParams, codec,
};

const DIMENSIONS: usize = 4;
/// More points than a test ever has.
const LIMIT: usize = 100;
/// Versions that follow one another while a reader looks on.
const VERSIONS: u8 = 40;
const DOCUMENT: DocumentId = DocumentId([7; 16]);

struct Rig {
    shard: Arc<Shard>,
    /// The index of the last entry.
    index: u64,
    _dir: tempfile::TempDir,
}

impl Rig {
    fn new() -> Rig {
        let dir = tempfile::tempdir().expect("a directory");
        let mut config = CollectionConfig::default();
        config.vectors.insert(String::new(), VectorParams::new(DIMENSIONS, Distance::Cosine));
        config.text_fields.push("text".into());
        let shard = Arc::new(Shard::open(&dir.path().join("live"), config).expect("opens"));
        Rig { shard, index: 0, _dir: dir }
    }

    fn apply(&mut self, command: Command) -> Outcome {
        self.index += 1;
        let command = codec::encode(&Envelope { request_id: None, now: 7, command });
        let entry = Entry { index: self.index, tag: vec![1], command: Some(command) };
        let outcomes = self.shard.apply(vec![entry]).expect("applies");
        codec::decode(&outcomes[0]).expect("decodes")
    }

    /// Applies a command that is in time and returns the document as it is then.
    fn take(&mut self, command: Command) -> Document {
        match self.apply(command) {
            Outcome::Document(document) => *document,
            other => panic!("it was to be taken: {other:?}"),
        }
    }

    /// Applies a command that comes too late.
    fn refuse(&mut self, command: Command) {
        match self.apply(command) {
            Outcome::Rejected(error) => assert_eq!(error.code, ErrorCode::Conflict, "{error}"),
            other => panic!("it was to be refused: {other:?}"),
        }
    }

    /// The only document in progress, as ingest finds it.
    fn in_progress(&self) -> Document {
        let question = Read::ListDocuments(Some(DocumentState::InProgress));
        match self.shard.read(&question).expect("answers").1 {
            Answer::Documents(documents) if documents.len() == 1 => documents[0].clone(),
            other => panic!("not one document: {other:?}"),
        }
    }

    /// Checks that exactly these chunks of a version are visible, whichever way one asks.
    fn check(&self, document: &Document, chunks: u32) {
        let expected: Vec<Value> = (0..chunks).map(|index| payload(document, index)).collect();
        for seen in seen(&self.shard) {
            assert_eq!(seen, expected);
        }
    }
}

/// What each kind of question shows: the document's chunks, all points, the nearest vectors, the
/// best matches of a word. Payloads, in the order of their texts.
fn seen(shard: &Shard) -> Vec<Vec<Value>> {
    let read = |question: Read| shard.read(&question).expect("answers").1;
    let Answer::Chunks(chunks) = read(Read::GetChunks(DOCUMENT)) else { panic!("not chunks") };
    let (payload, vectors) = (Select::All, Select::Nothing);
    let scroll = Read::Scroll { from: None, filter: None, limit: LIMIT, payload, vectors };
    let Answer::Points(points) = read(scroll) else { panic!("not points") };
    let legs = vec![
        Leg::Dense { using: String::new(), vector: vec![1.0; DIMENSIONS], exact: false, ef: None },
        Leg::Text { query: "chunk".into() },
    ];
    let (payload, vectors) = (Select::All, Select::Nothing);
    let search = Search { legs, filter: None, limit: LIMIT, score_threshold: None, payload, vectors };
    let Answer::Lists(lists) = read(Read::Search(search)) else { panic!("not lists") };
    let payloads = |hits: Vec<Hit>| -> Vec<String> {
        hits.into_iter().map(|hit| hit.payload.expect("asked for")).collect()
    };
    let mut all = vec![chunks, payloads(points)];
    all.extend(lists.into_iter().map(payloads));
    all.iter().map(|payloads| in_order(payloads)).collect()
}

fn in_order(payloads: &[String]) -> Vec<Value> {
    let mut payloads: Vec<Value> =
        payloads.iter().map(|payload| serde_json::from_str(payload).expect("JSON")).collect();
    payloads.sort_by(|a, b| a["text"].as_str().cmp(&b["text"].as_str()));
    payloads
}

/// The payload of a chunk as ingest makes it: the document's attributes and the chunk's own keys.
fn payload(document: &Document, index: u32) -> Value {
    let mut payload: Value = serde_json::from_str(&document.attributes).expect("JSON");
    payload["text"] = json!(format!("version {} chunk {index}", document.version));
    payload["version"] = json!(document.version);
    payload
}

/// Accepts the document with the bytes that a number stands for.
fn accept(bytes: u8, attributes: Value) -> Command {
    Command::AcceptDocument {
        id: DOCUMENT,
        filename: "manual.txt".into(),
        blob: BlobHash([bytes; 32]),
        bytes: 100,
        attributes: attributes.to_string(),
        chunker: ChunkerConfig::default(),
    }
}

fn stage(document: &Document, chunks: Range<u32>) -> Command {
    let first = chunks.start;
    let point = |index: u32| Point {
        id: DOCUMENT.chunk_point(document.version, index),
        vectors: vec![(String::new(), vec![1.0, index as f32, 0.5, -0.5])],
        payload: payload(document, index).to_string(),
    };
    Command::StageChunks {
        id: DOCUMENT,
        version: document.version,
        first,
        points: chunks.map(point).collect(),
    }
}

fn publish(document: &Document, chunks: u32) -> Command {
    Command::PublishDocument { id: DOCUMENT, version: document.version, chunks }
}

fn end(document: &Document, state: DocumentState) -> Command {
    Command::EndDocument { id: DOCUMENT, version: document.version, state, reason: "late".into() }
}

fn set_attributes(attributes: &Value) -> Command {
    Command::SetAttributes { id: DOCUMENT, attributes: attributes.to_string() }
}

/// The end of an older version, however it ended, leaves what a newer one has staged alone: the
/// newer one goes on from where it was and is published whole.
#[test]
fn the_late_end_of_an_older_version_drops_nothing_of_a_newer_one() {
    for state in [DocumentState::Failed, DocumentState::Cancelled] {
        let mut rig = Rig::new();
        let old = rig.take(accept(1, json!({})));
        rig.take(stage(&old, 0..3));
        let new = rig.take(accept(2, json!({})));
        let staged = rig.take(stage(&new, 0..2));
        rig.refuse(end(&old, state));
        assert_eq!(rig.in_progress(), staged, "the record has changed");
        rig.take(stage(&new, 2..4));
        let published = rig.take(publish(&new, 4));
        assert_eq!(published.state, DocumentState::Completed);
        rig.check(&new, 4);
        // News may be later still.
        rig.refuse(end(&old, state));
        rig.check(&new, 4);
    }
}

/// Trouble is told while a document waits to be tried again: it costs nothing that is staged, is forgotten
/// when the document is published, and comes too late afterwards.
#[test]
fn trouble_is_told_until_the_document_is_published() {
    let mut rig = Rig::new();
    let document = rig.take(accept(1, json!({})));
    let trouble = |reason: &str| Command::NoteTrouble {
        id: DOCUMENT,
        version: document.version,
        reason: reason.into(),
    };
    rig.take(stage(&document, 0..2));
    rig.take(trouble("no model"));
    let told = rig.take(trouble("no provider"));
    assert_eq!((told.error.as_deref(), told.staged_chunks), (Some("no provider"), 2));
    assert_eq!(rig.in_progress(), told);
    rig.take(stage(&document, 2..3));
    assert_eq!(rig.take(publish(&document, 3)).error, None);
    rig.refuse(trouble("late"));
    rig.check(&document, 3);
}

/// Attributes set while a version is being worked on: nothing that carries the old ones becomes
/// visible any more, and the work that starts over is published with the new ones.
#[test]
fn attributes_set_in_the_middle_of_the_work_are_on_the_published_chunks() {
    let (blue, green) = (json!({"team": "blue", "draft": true}), json!({"team": "green", "level": 5}));
    let mut rig = Rig::new();
    let outdated = rig.take(accept(1, json!({"team": "red"})));
    rig.take(stage(&outdated, 0..2));
    rig.take(set_attributes(&blue));
    rig.refuse(stage(&outdated, 2..3));
    rig.refuse(publish(&outdated, 2));
    rig.check(&outdated, 0);
    let first = rig.in_progress();
    assert_eq!(first.attributes, blue.to_string());
    rig.take(stage(&first, 0..3));
    rig.take(publish(&first, 3));
    rig.check(&first, 3);

    // While a version is visible and the next one is in the works, both get them.
    let outdated = rig.take(accept(2, blue));
    rig.take(stage(&outdated, 0..1));
    rig.take(set_attributes(&green));
    rig.check(&Document { attributes: green.to_string(), ..first }, 3);
    rig.refuse(publish(&outdated, 1));
    let second = rig.in_progress();
    assert_eq!(second.attributes, green.to_string());
    rig.take(stage(&second, 0..2));
    rig.take(publish(&second, 2));
    rig.check(&second, 2);
}

/// Until a new version is published the old one is visible whole; from that entry on exactly the
/// new one is. A reader that never stops asking sees nothing in between.
#[test]
fn a_new_version_takes_the_old_ones_place_in_one_step() {
    // How many chunks a version has can be told from its number.
    let count = |version: u64| 2 + (version % 5) as u32;
    let mut rig = Rig::new();
    let mut visible = rig.take(accept(0, json!({})));
    rig.take(stage(&visible, 0..count(visible.version)));
    rig.take(publish(&visible, count(visible.version)));
    let shard = rig.shard.clone();
    thread::scope(|scope| {
        let writer = scope.spawn(|| {
            for bytes in 1..=VERSIONS {
                let next = rig.take(accept(bytes, json!({})));
                rig.check(&visible, count(visible.version));
                rig.take(stage(&next, 0..1));
                rig.take(stage(&next, 1..count(next.version)));
                rig.check(&visible, count(visible.version));
                rig.take(publish(&next, count(next.version)));
                rig.check(&next, count(next.version));
                visible = next;
            }
        });
        while !writer.is_finished() {
            for seen in seen(&shard) {
                let version = seen.first().and_then(|payload| payload["version"].as_u64());
                let version = version.expect("a version is always visible");
                assert!(seen.iter().all(|payload| payload["version"] == version), "{seen:?}");
                assert_eq!(seen.len(), count(version) as usize, "{seen:?}");
            }
        }
    });
}
