//! What a backup keeps of a shard is all of it; what is not whole is found out; and of a shard in which
//! little has changed most pieces are the same as before.

mod common;

use std::collections::BTreeSet;
use std::path::Path;

use common::write_frames;
use shoal_engine::backup::{Archive, Contents, Inspection, cut};
use shoal_engine::command::{
    Answer, Command, Document, DocumentState, Envelope, FileRecord, Point, Read, Stage,
};
use shoal_engine::{Entry, Shard};
use shoal_proto::{
    BlobHash, ChunkerConfig, CollectionConfig, Distance, DocumentId, PointId, VectorParams, codec,
};

const POINTS: u64 = 4000;

fn config() -> CollectionConfig {
    let mut config = CollectionConfig::default();
    config.vectors.insert(String::new(), VectorParams::new(8, Distance::Dot));
    config
}

fn apply(shard: &Shard, index: u64, command: Command) {
    let envelope = Envelope { request_id: None, now: 7, command };
    let entry = Entry { index, tag: vec![1], command: Some(codec::encode(&envelope)) };
    shard.apply(vec![entry]).expect("applied");
}

fn point(id: u64) -> Point {
    // Some are stored in parts.
    let text = "x".repeat(if id.is_multiple_of(500) { 30_000 } else { 900 });
    Point {
        id: PointId::Num(id),
        vectors: vec![(String::new(), vec![id as f32; 8])],
        payload: format!("{{\"n\":{id},\"text\":\"{text}\"}}"),
    }
}

fn file(blob: u8) -> FileRecord {
    FileRecord {
        id: DocumentId([1; 16]),
        filename: "a.txt".into(),
        blob: BlobHash([blob; 32]),
        bytes: 5,
        purpose: "assistants".into(),
        created_at: 1,
    }
}

fn pieces(shard: &Shard, dir: &Path) -> (Vec<Vec<u8>>, Contents) {
    let file = dir.join("frames");
    let (_, cursor) = shard.export().expect("exported");
    write_frames(&cursor, &file);
    let mut pieces = Vec::new();
    let contents = cut(&file, |piece| {
        pieces.push(piece);
        Ok(())
    });
    (pieces, contents.expect("whole"))
}

#[test]
fn a_copy_is_the_shard_and_little_changes_from_one_to_the_next() {
    let dir = tempfile::tempdir().expect("a directory");
    let shard = Shard::open(&dir.path().join("shard"), config()).expect("opened");
    for id in 0..POINTS {
        apply(&shard, id + 1, Command::Upsert(vec![point(id)]));
    }
    let file = FileRecord { filename: "long".repeat(5000), ..file(2) };
    apply(&shard, POINTS + 1, Command::PutFile(file.clone()));
    let accept = Command::AcceptDocument {
        id: DocumentId([3; 16]),
        filename: "a.txt".into(),
        blob: BlobHash([4; 32]),
        bytes: 6,
        attributes: "{}".into(),
        chunker: ChunkerConfig::default(),
    };
    apply(&shard, POINTS + 2, accept);

    let (first, contents) = pieces(&shard, dir.path());
    assert_eq!((contents.points, contents.documents, contents.files), (POINTS, 1, 1));
    let blobs = [(file.id, file.blob, 5), (DocumentId([3; 16]), BlobHash([4; 32]), 6)];
    assert_eq!(contents.blobs, BTreeSet::from(blobs), "also of a record that is stored in parts");
    assert!(first.len() > 8, "{} pieces", first.len());

    let mut copy = Archive::create(&dir.path().join("copy")).expect("made");
    first.iter().for_each(|piece| copy.take(piece).expect("whole"));
    copy.check().expect("all of it");
    let (mut after, mut found) = (None, Vec::new());
    loop {
        let points = copy.points(&config(), &mut after, 100_000).expect("readable");
        if points.is_empty() {
            break;
        }
        found.extend(points);
    }
    assert!(found == (0..POINTS).map(point).collect::<Vec<_>>());
    assert_eq!(copy.files().expect("readable"), [file]);
    let mut after = None;
    assert_eq!(copy.documents(&mut after, 1).expect("readable")[0].filename, "a.txt");
    assert!(copy.documents(&mut after, 1).expect("readable").is_empty(), "there is only one");

    apply(&shard, POINTS + 3, Command::Upsert(vec![point(POINTS), point(17)]));
    let (second, _) = pieces(&shard, dir.path());
    let known: BTreeSet<&Vec<u8>> = first.iter().collect();
    let new = second.iter().filter(|piece| !known.contains(piece)).count();
    assert!(new * 2 < second.len(), "{new} of {} pieces are new", second.len());
}

#[test]
fn what_is_put_back_begins_anew_and_replaces_nothing() {
    let dir = tempfile::tempdir().expect("a directory");
    let shard = Shard::open(dir.path(), config()).expect("opened");
    apply(&shard, 1, Command::RestoreFile(file(1)));
    apply(&shard, 2, Command::RestoreFile(file(2)));
    let found = shard.read(&Read::GetFile(DocumentId([1; 16]))).expect("readable").1;
    assert_eq!(found, Answer::Files(vec![file(1)]), "the one that is there stays");

    let document = |state, stage| Document {
        id: DocumentId([3; 16]),
        filename: "a.txt".into(),
        blob: BlobHash([4; 32]),
        bytes: 6,
        attributes: "{}".into(),
        chunker: ChunkerConfig::default(),
        version: 77,
        state,
        stage,
        attempts: 2,
        error: None,
        staged_chunks: 9,
        total_chunks: 12,
        published: Some((55, 3)),
        created_at: 1,
        updated_at: 2,
    };
    let restored = |index: u64, document: Document| {
        apply(&shard, index, Command::RestoreDocument(Box::new(document)));
        match shard.read(&Read::GetDocument(DocumentId([3; 16]))).expect("readable").1 {
            Answer::Documents(found) => found[0].clone(),
            other => panic!("{other:?}"),
        }
    };
    let unfinished = restored(3, document(DocumentState::InProgress, Stage::Embedding));
    let expected = Document {
        version: 3,
        staged_chunks: 0,
        attempts: 0,
        ..document(DocumentState::InProgress, Stage::Queued)
    };
    assert_eq!(unfinished, expected, "nothing of what was staged is there");
    let finished = restored(4, document(DocumentState::Completed, Stage::Published));
    let expected = Document { staged_chunks: 0, ..document(DocumentState::Completed, Stage::Published) };
    assert_eq!(finished, expected, "its chunks are found under its old version");
}

#[test]
fn what_is_not_whole_is_found_out() {
    let dir = tempfile::tempdir().expect("a directory");
    let shard = Shard::open(&dir.path().join("shard"), config()).expect("opened");
    for id in 0..POINTS {
        apply(&shard, id + 1, Command::Upsert(vec![point(id)]));
    }
    let (pieces, contents) = pieces(&shard, dir.path());
    let inspect = |pieces: &[Vec<u8>]| {
        let mut inspection = Inspection::default();
        pieces.iter().try_for_each(|piece| inspection.take(piece))?;
        inspection.finish()
    };
    assert_eq!(inspect(&pieces).expect("whole"), contents);
    for lost in 0..pieces.len() {
        let mut rest = pieces.clone();
        rest.remove(lost);
        assert!(inspect(&rest).expect_err("a piece is missing").is_damage());
        let mut copy = Archive::create(&dir.path().join(format!("copy-{lost}"))).expect("made");
        rest.iter().for_each(|piece| copy.take(piece).expect("whole"));
        assert!(copy.check().expect_err("a piece is missing").is_damage());
    }
    // Every byte of a piece counts: keys and values have checksums, and the rest is their lengths.
    let piece = &pieces[pieces.len() / 2];
    for at in (0..piece.len()).step_by(piece.len() / 50) {
        let mut flipped = pieces.clone();
        flipped[pieces.len() / 2][at] ^= 0x10;
        assert!(inspect(&flipped).is_err(), "the bit at {at} was not missed");
    }
}
