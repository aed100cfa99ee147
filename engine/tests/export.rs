//! A shard is written to while it is copied for another node: no write waits for the copy, however slowly
//! that is read.

use std::time::{Duration, Instant};

use shoal_engine::command::{Command, Envelope, Point};
use shoal_engine::{Entry, Shard};
use shoal_proto::{CollectionConfig, Distance, PointId, VectorParams, codec};

/// Points of the shard that is copied, and how many of them are written at once at first.
const POINTS: u64 = 100_000;
const AT_ONCE: u64 = 1_000;
/// The reader's pause after each piece, of which there are some dozens.
const PIECE_PAUSE: Duration = Duration::from_millis(50);
/// The longest time that a write may take meanwhile. Fixing the copy keeps writes waiting, too.
const LONGEST_STALL: Duration = Duration::from_millis(100);
/// A prime: multiples of it come to all points in no order.
const STRIDE: u64 = 7919;

fn entry(index: u64, points: Vec<Point>) -> Entry {
    let envelope = Envelope { request_id: None, now: 7, command: Command::Upsert(points) };
    Entry { index, tag: index.to_be_bytes().to_vec(), command: Some(codec::encode(&envelope)) }
}

fn point(id: u64, version: u64) -> Point {
    Point {
        id: PointId::Num(id),
        vectors: vec![(String::new(), vec![id as f32; 8])],
        payload: format!("{{\"n\":{id},\"version\":{version}}}"),
    }
}

#[test]
fn no_write_waits_for_a_copy_that_is_read_slowly() {
    let dir = tempfile::tempdir().expect("a directory");
    let mut config = CollectionConfig::default();
    config.vectors.insert(String::new(), VectorParams::new(8, Distance::Dot));
    let shard = Shard::open(dir.path(), config).expect("opened");
    let mut index = 0;
    for first in (0..POINTS).step_by(AT_ONCE as usize) {
        index += 1;
        let points = (first..first + AT_ONCE).map(|id| point(id, index)).collect();
        shard.apply(vec![entry(index, points)]).expect("applied");
    }

    let began = Instant::now();
    let (_, cursor) = shard.export().expect("exported");
    let fixed = began.elapsed();
    let (mut longest, mut writes) = (Duration::ZERO, 0u64);
    let bytes: usize = std::thread::scope(|scope| {
        let reader = scope.spawn(|| {
            let mut bytes = 0;
            while let Some(piece) = cursor.next_piece().expect("a piece") {
                bytes += piece.len();
                std::thread::sleep(PIECE_PAUSE);
            }
            bytes
        });
        while !reader.is_finished() {
            index += 1;
            // Points that the copy has handed out, and such as it has still to hand out as they were.
            let entry = entry(index, vec![point(index * STRIDE % POINTS, index)]);
            let began = Instant::now();
            shard.apply(vec![entry]).expect("applied");
            longest = longest.max(began.elapsed());
            writes += 1;
        }
        reader.join().expect("the copy is read")
    });
    eprintln!(
        "a copy of {bytes} bytes was fixed in {fixed:?}; {writes} writes meanwhile, the longest {longest:?}"
    );
    assert!(bytes as u64 > 20 * POINTS, "the copy has only {bytes} bytes");
    assert!(writes > 100, "only {writes} writes meanwhile");
    assert!(fixed <= LONGEST_STALL, "writes waited {fixed:?} until the copy was fixed");
    assert!(longest <= LONGEST_STALL, "a write took {longest:?}");
}
