//! How many bytes a second a node sends for moves: one bucket for all groups, snapshots and blobs.
//!
//! Raft's own messages never come here, so a bucket that is empty delays no entry and no heartbeat.

use std::sync::Arc;
use std::time::Duration;

use parking_lot::Mutex;
use tokio::time::Instant;

/// What may be sent at once after a pause, as time at the full pace.
const BURST: Duration = Duration::from_millis(100);

/// A token bucket without a clock. Whoever comes is told how long to wait, in the order in which they come; a piece
/// that is larger than the bucket waits for nothing but those before it, and those after it wait longer.
#[derive(Clone, Debug, PartialEq, Eq)]
struct Bucket {
    bytes_per_second: u64,
    /// When everything that was let through so far will have been paid for.
    paid_at: Duration,
}

impl Bucket {
    /// A full bucket. The pace must not be zero.
    fn new(bytes_per_second: u64) -> Bucket {
        Bucket { bytes_per_second, paid_at: Duration::ZERO }
    }

    /// Takes so many bytes at a point in time. Returns how long to wait before they are sent.
    fn take(&mut self, now: Duration, bytes: u64) -> Duration {
        let owed = self.paid_at.saturating_sub(now);
        // What was not used of the past counts for a burst only.
        let paid_at = self.paid_at.max(now.saturating_sub(BURST));
        self.paid_at = paid_at.saturating_add(self.time_for(bytes));
        owed
    }

    fn time_for(&self, bytes: u64) -> Duration {
        let pace = u128::from(self.bytes_per_second);
        let nanos = u128::from(bytes % self.bytes_per_second) * 1_000_000_000 / pace;
        Duration::new(bytes / self.bytes_per_second, nanos as u32)
    }
}

/// The pace of this node. Clones share it.
#[derive(Clone)]
pub struct Throttle(Option<Arc<Shared>>);

struct Shared {
    bucket: Mutex<Bucket>,
    began: Instant,
}

impl Throttle {
    /// So many bytes a second; no limit when zero.
    pub fn new(bytes_per_second: u64) -> Throttle {
        let shared =
            || Arc::new(Shared { bucket: Mutex::new(Bucket::new(bytes_per_second)), began: Instant::now() });
        Throttle((bytes_per_second > 0).then(shared))
    }

    /// Waits until so many bytes may be sent.
    pub async fn pass(&self, bytes: usize) {
        let Some(shared) = &self.0 else { return };
        let wait = shared.bucket.lock().take(shared.began.elapsed(), bytes as u64);
        if !wait.is_zero() {
            tokio::time::sleep(wait).await;
        }
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    const SECOND: Duration = Duration::from_secs(1);

    #[test]
    fn those_who_come_together_wait_one_after_the_other() {
        let mut bucket = Bucket::new(1000);
        let now = 10 * SECOND;
        // After a pause a burst of a tenth of a second is free.
        assert_eq!(bucket.take(now, 100), Duration::ZERO);
        assert_eq!(bucket.take(now, 1000), Duration::ZERO);
        assert_eq!(bucket.take(now, 500), SECOND);
        assert_eq!(bucket.take(now, 500), Duration::from_millis(1500));
        // Nobody is kept for what was paid meanwhile.
        assert_eq!(bucket.take(now + 2 * SECOND, 1), Duration::ZERO);
    }

    #[test]
    fn a_piece_larger_than_the_bucket_is_not_kept_for_ever() {
        let mut bucket = Bucket::new(10);
        assert_eq!(bucket.take(SECOND, 1_000_000), Duration::ZERO);
        assert!(bucket.take(SECOND, 1) > 99_000 * SECOND);
        let mut fastest = Bucket::new(u64::MAX);
        assert_eq!(fastest.take(SECOND, u64::MAX), Duration::ZERO);
        let mut slowest = Bucket::new(1);
        slowest.take(SECOND, 1 << 40);
        assert!(slowest.take(SECOND, 1) > Duration::from_secs((1 << 40) - 2), "no overflow");
    }

    proptest! {
        /// Over any time no more is sent than the pace allows, a burst, and the last piece.
        #[test]
        fn the_pace_is_kept(
            pace in 1_000u64..1_000_000,
            sends in prop::collection::vec((0u64..2_000, 1u64..100_000), 1..200),
        ) {
            let (mut bucket, mut now) = (Bucket::new(pace), 10 * SECOND);
            let (began, mut before_last) = (now, 0u64);
            let mut sent = 0u64;
            for (pause, bytes) in sends {
                now += Duration::from_millis(pause);
                // One sender, which waits as it is told.
                now += bucket.take(now, bytes);
                before_last = sent;
                sent += bytes;
            }
            let allowed = ((now - began) + BURST).as_secs_f64() * pace as f64 + 1.0;
            prop_assert!(before_last as f64 <= allowed + 200.0, "{before_last} of {allowed}");
        }
    }

    #[tokio::test(start_paused = true)]
    async fn all_clones_share_one_pace() {
        let throttle = Throttle::new(1 << 20);
        let began = Instant::now();
        let sends = (0..4).map(|_| {
            let throttle = throttle.clone();
            async move {
                for _ in 0..5 {
                    throttle.pass(1 << 20).await;
                }
            }
        });
        futures::future::join_all(sends).await;
        let took = began.elapsed();
        assert!(took > 18 * SECOND && took <= 20 * SECOND, "twenty pieces of a second each took {took:?}");
    }

    #[tokio::test(start_paused = true)]
    async fn no_limit_is_no_wait() {
        let began = Instant::now();
        Throttle::new(0).pass(usize::MAX).await;
        assert_eq!(began.elapsed(), Duration::ZERO);
    }
}
