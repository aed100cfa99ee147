//! How points are split over shards and cut into log entries: what the edge, ingest and a restore share.

use std::collections::BTreeMap;

use shoal_engine::command::Point;
use shoal_proto::ShardId;

use crate::limits::{MAX_ENTRY_BYTES, MAX_POINTS_PER_ENTRY};

/// What a point takes in an entry besides its payload and vectors, in bytes, about.
const POINT_BYTES: usize = 64;

/// What goes to each shard, in its order.
pub(crate) fn by_shard<T>(items: Vec<T>, shard_of: impl Fn(&T) -> ShardId) -> BTreeMap<ShardId, Vec<T>> {
    let mut split: BTreeMap<ShardId, Vec<T>> = BTreeMap::new();
    for item in items {
        split.entry(shard_of(&item)).or_default().push(item);
    }
    split
}

/// Cuts points into entries of at most [`MAX_POINTS_PER_ENTRY`] points and about [`MAX_ENTRY_BYTES`].
pub(crate) fn entries(points: Vec<Point>) -> Vec<Vec<Point>> {
    bounded(points, MAX_POINTS_PER_ENTRY, |point| {
        let vectors = point.vectors.iter().map(|(_, vector)| vector.len() * 4);
        POINT_BYTES + point.payload.len() + vectors.sum::<usize>()
    })
}

/// Cuts items into entries of at most so many, and about [`MAX_ENTRY_BYTES`]. One that is larger goes alone.
pub(crate) fn bounded<T>(items: Vec<T>, most: usize, bytes_of: impl Fn(&T) -> usize) -> Vec<Vec<T>> {
    let mut entries: Vec<Vec<T>> = Vec::new();
    let mut bytes = 0;
    for item in items {
        let size = bytes_of(&item);
        match entries.last_mut() {
            Some(entry) if entry.len() < most && bytes + size <= MAX_ENTRY_BYTES => {
                bytes += size;
                entry.push(item);
            }
            _ => {
                bytes = size;
                entries.push(vec![item]);
            }
        }
    }
    entries
}

#[cfg(test)]
mod tests {
    use shoal_proto::PointId;

    use super::*;

    fn point(number: u64, bytes: usize) -> Point {
        Point { id: PointId::Num(number), vectors: Vec::new(), payload: "x".repeat(bytes) }
    }

    #[test]
    fn entries_hold_every_point_in_order_and_are_bounded() {
        let points: Vec<Point> =
            (0..1300).map(|number| point(number, if number % 100 == 0 { 600_000 } else { 100 })).collect();
        let cut = entries(points.clone());
        assert_eq!(cut.concat(), points);
        for entry in &cut {
            let bytes: usize = entry.iter().map(|point| point.payload.len() + POINT_BYTES).sum();
            assert!((1..=MAX_POINTS_PER_ENTRY).contains(&entry.len()) && bytes <= MAX_ENTRY_BYTES);
        }
        // One that is too large for any entry goes alone.
        assert_eq!(entries(vec![point(1, 2 << 20), point(2, 1)]).len(), 2);
        assert!(entries(Vec::new()).is_empty());
    }
}
