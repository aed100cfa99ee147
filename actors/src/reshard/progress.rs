//! Whether new shards will ever have what old ones take in meanwhile. A pure value: time is an argument.
//!
//! Replaying is faster than writing, or it is for nothing: then each entry that is replayed costs the old shard
//! time, and the end does not come nearer. What is left must become less by a tenth again and again, so that
//! from a million entries on there are at most 81 times [`PATIENCE`].

use std::time::{Duration, Instant};

/// For so long what is left may stay as it is.
pub(super) const PATIENCE: Duration = Duration::from_secs(300);

/// How catching up goes.
#[derive(Debug)]
pub(super) struct Progress {
    /// The fewest entries that were left when it was looked, to a tenth.
    least: u64,
    since: Instant,
}

impl Progress {
    pub(super) fn begin(now: Instant) -> Progress {
        Progress { least: u64::MAX, since: now }
    }

    /// Notes how many entries are left. False when there is no end to be seen.
    pub(super) fn goes_on(&mut self, left: u64, now: Instant) -> bool {
        if left < self.least - self.least / 10 {
            (self.least, self.since) = (left, now);
        }
        now.duration_since(self.since) < PATIENCE
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Looks every second while so many entries a second are written and replayed.
    fn catch_up(mut left: u64, written: u64, replayed: u64) -> Option<u64> {
        let begin = Instant::now();
        let mut progress = Progress::begin(begin);
        for second in 0.. {
            if left == 0 {
                return Some(second);
            }
            if !progress.goes_on(left, begin + Duration::from_secs(second)) {
                return None;
            }
            left = (left + written).saturating_sub(replayed);
        }
        None
    }

    #[test]
    fn catching_up_ends_when_it_comes_nearer_and_when_it_does_not() {
        assert_eq!(catch_up(1_000_000, 0, 1000), Some(1000));
        assert_eq!(catch_up(1_000_000, 1000, 2000), Some(1000));
        assert_eq!(catch_up(100_000, 1990, 2000), None, "a tenth in a thousand seconds");
        assert_eq!(catch_up(100_000, 2000, 2000), None);
        assert_eq!(catch_up(300, 3000, 2000), None);
    }
}
