//! For how long a shard is not split by itself after that was given up. A pure value: time is an argument.
//!
//! It is known where the control group is led, and nowhere else: whoever leads next begins with nothing, so that
//! a change of the leader costs one attempt more.

use std::collections::BTreeMap;
use std::time::{Duration, Instant};

use shoal_proto::ShardId;

/// The pause after the first time; it doubles up to the second.
const PAUSES: (Duration, Duration) = (Duration::from_secs(600), Duration::from_secs(24 * 3600));

/// The shards that rest.
#[derive(Debug, Default)]
pub(super) struct Backoff(BTreeMap<ShardId, Rest>);

#[derive(Debug)]
struct Rest {
    until: Instant,
    pause: Duration,
}

impl Backoff {
    /// A change of a shard was given up, or could not be ordered.
    pub(super) fn note(&mut self, shard: ShardId, now: Instant) {
        let pause = self.0.get(&shard).map_or(PAUSES.0, |rest| (2 * rest.pause).min(PAUSES.1));
        self.0.insert(shard, Rest { until: now + pause, pause });
    }

    /// Whether a shard is to be left alone.
    pub(super) fn rests(&self, shard: ShardId, now: Instant) -> bool {
        self.0.get(&shard).is_some_and(|rest| now < rest.until)
    }

    /// Forgets the shards that are gone.
    pub(super) fn retain(&mut self, is_there: impl Fn(ShardId) -> bool) {
        self.0.retain(|shard, _| is_there(*shard));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_shard_rests_longer_each_time_that_its_split_is_given_up() {
        let (mut backoff, mut now) = (Backoff::default(), Instant::now());
        let minutes = |count: u64| Duration::from_secs(60 * count);
        assert!(!backoff.rests(ShardId(1), now));
        for pause in [10, 20, 40, 80, 160, 320, 640, 1280, 1440, 1440] {
            backoff.note(ShardId(1), now);
            assert!(backoff.rests(ShardId(1), now + minutes(pause) - Duration::from_secs(1)), "{pause}");
            now += minutes(pause);
            assert!(!backoff.rests(ShardId(1), now), "{pause}");
            assert!(!backoff.rests(ShardId(2), now));
        }
        backoff.note(ShardId(2), now);
        backoff.retain(|shard| shard == ShardId(1));
        assert!(!backoff.rests(ShardId(2), now));
    }
}
