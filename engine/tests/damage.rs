//! A flipped bit in a store is found, or hits what nobody needs: nothing wrong is ever read.

mod common;

use std::fs;
use std::path::{Path, PathBuf};

use common::write_frames;
use rand::rngs::StdRng;
use rand::{RngExt, SeedableRng};
use shoal_engine::command::{Answer, Command, Envelope, Point, Read, Select};
use shoal_engine::{Entry, Shard};
use shoal_proto::{CollectionConfig, Distance, PointId, VectorParams, codec};

const POINTS: u64 = 400;
const FLIPS: u64 = 120;

fn config() -> CollectionConfig {
    let mut config = CollectionConfig::default();
    config.vectors.insert(String::new(), VectorParams::new(8, Distance::Dot));
    config
}

fn payload(id: u64) -> String {
    // Some are stored in parts.
    format!("{{\"n\":{id},\"text\":\"{}\"}}", "x".repeat(if id.is_multiple_of(50) { 30_000 } else { 100 }))
}

fn fill(dir: &Path) {
    let shard = Shard::open(dir, config()).expect("opened");
    for id in 0..POINTS {
        let vectors = vec![(String::new(), vec![id as f32; 8])];
        let point = Point { id: PointId::Num(id), vectors, payload: payload(id) };
        let envelope = Envelope { request_id: None, now: 0, command: Command::Upsert(vec![point]) };
        let entry = Entry { index: id + 1, tag: vec![1], command: Some(codec::encode(&envelope)) };
        shard.apply(vec![entry]).expect("applied");
    }
    shard.checkpoint().expect("durable");
}

/// Reads everything: whether it is all there and right; none when the shard says that it is not.
fn read(dir: &Path) -> Option<bool> {
    let attempt = std::panic::catch_unwind(|| -> shoal_engine::Result<bool> {
        let shard = Shard::open(dir, config())?;
        while !shard.scrub()? {}
        let ids: Vec<PointId> = (0..POINTS).map(PointId::Num).collect();
        let question = Read::Get { ids, payload: Select::All, vectors: Select::All };
        let Answer::Points(hits) = shard.read(&question)?.1 else { return Ok(false) };
        let is_right = |hit: &shoal_engine::command::Hit| {
            let PointId::Num(id) = hit.id else { return false };
            let vectors = Some(vec![(String::new(), vec![id as f32; 8])]);
            hit.payload.as_deref() == Some(payload(id).as_str()) && hit.vectors == vectors
        };
        Ok(hits.len() as u64 == POINTS && hits.iter().all(is_right))
    });
    // A panic of the store stops the replica as damage does; anything else would not be mended.
    match attempt {
        Ok(Err(error)) if !error.is_damage() => panic!("not taken for damage: {error}"),
        attempt => attempt.ok()?.ok(),
    }
}

fn copy(from: &Path, to: &Path) {
    fs::create_dir_all(to).expect("a folder");
    for entry in fs::read_dir(from).expect("listed") {
        let entry = entry.expect("an entry");
        let target = to.join(entry.file_name());
        match entry.file_type().expect("a type").is_dir() {
            true => copy(&entry.path(), &target),
            false => drop(fs::copy(entry.path(), target).expect("copied")),
        }
    }
}

fn files(dir: &Path, found: &mut Vec<PathBuf>) {
    for entry in fs::read_dir(dir).expect("listed") {
        let path = entry.expect("an entry").path();
        if path.is_dir() { files(&path, found) } else { found.push(path) }
    }
}

#[test]
fn a_flipped_bit_is_found_or_harmless() {
    std::panic::set_hook(Box::new(|_| {}));
    let dir = tempfile::tempdir().expect("a directory");
    let whole = dir.path().join("whole");
    fill(&whole);
    assert_eq!(read(&whole), Some(true), "what was written is read");
    let mut coin = StdRng::seed_from_u64(7);
    let (mut found, mut harmless) = (0, 0);
    for flip in 0..FLIPS {
        let hurt = dir.path().join(format!("hurt-{flip}"));
        copy(&whole, &hurt);
        let mut all = Vec::new();
        files(&hurt, &mut all);
        all.sort();
        let file = &all[coin.random_range(0..all.len())];
        let mut bytes = fs::read(file).expect("read");
        let Some(at) = (0..100)
            .map(|_| coin.random_range(0..bytes.len().max(1)))
            .find(|at| bytes.get(*at).is_some_and(|byte| *byte != 0))
        else {
            continue;
        };
        bytes[at] ^= 1 << coin.random_range(0..8);
        fs::write(file, bytes).expect("written");
        match read(&hurt) {
            None => found += 1,
            Some(true) => harmless += 1,
            Some(false) => panic!("flip {flip}: {} at {at} is served wrong", file.display()),
        }
        fs::remove_dir_all(&hurt).expect("removed");
    }
    println!("{found} found, {harmless} harmless");
    assert!(found > FLIPS / 10, "only {found} flips were found");
}

#[test]
fn what_is_marked_as_damaged_is_not_opened() {
    let dir = tempfile::tempdir().expect("a directory");
    fill(dir.path());
    let shard = Shard::open(dir.path(), config()).expect("opened");
    assert!(!shard.is_damaged());
    shard.mark_damaged("for a test");
    assert!(shard.is_damaged());
    drop(shard);
    let refused = Shard::open(dir.path(), config()).err().expect("refused");
    assert!(refused.is_damage() && refused.to_string().contains("for a test"), "{refused}");
}

#[test]
fn replicas_have_the_same_sums_however_they_came_to_their_state() {
    let dir = tempfile::tempdir().expect("a directory");
    let (one, other) = (dir.path().join("one"), dir.path().join("other"));
    fill(&one);
    fill(&other);
    let (one, other) =
        (Shard::open(&one, config()).expect("one"), Shard::open(&other, config()).expect("other"));
    let apply = |shard: &Shard, range: std::ops::Range<u64>| {
        for index in range {
            let command =
                Command::Delete(shoal_engine::command::Target::Ids(vec![PointId::Num(index % 100)]));
            let envelope = Envelope { request_id: None, now: 0, command };
            let entry = Entry { index, tag: vec![index as u8], command: Some(codec::encode(&envelope)) };
            shard.apply(vec![entry]).expect("applied");
        }
    };
    apply(&one, POINTS + 1..600);
    apply(&other, POINTS + 1..450);
    // The other one goes on from a copy of the first.
    let (tag, cursor) = one.export().expect("exported");
    let file = dir.path().join("frames");
    write_frames(&cursor, &file);
    other.install(&tag.expect("a tag"), &file).expect("installed");
    apply(&one, 600..800);
    apply(&other, 600..800);
    let last = |shard: &Shard| *shard.state_sums().last().expect("a sum");
    assert_eq!(last(&one).0, 768);
    assert_eq!(last(&one), last(&other));
}
