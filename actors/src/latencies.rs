//! When a slow read is worth asking of a second replica ("hedging": Dean and Barroso, The Tail at
//! Scale, 2013): once it takes much longer than most reads of late.

use std::collections::VecDeque;
use std::time::Duration;

use parking_lot::Mutex;

use crate::limits;

/// How many reads are remembered.
const KEPT: usize = 128;

/// The latencies of recent reads, for the moment at which a second replica is asked.
#[derive(Default)]
pub(crate) struct Latencies(Mutex<VecDeque<Duration>>);

impl Latencies {
    pub(crate) fn note(&self, latency: Duration) {
        let mut recent = self.0.lock();
        if recent.len() == KEPT {
            recent.pop_front();
        }
        recent.push_back(latency);
    }

    pub(crate) fn hedge_after(&self) -> Duration {
        let mut recent: Vec<Duration> = self.0.lock().iter().copied().collect();
        recent.sort_unstable();
        let p95 = recent.get(recent.len() * 95 / 100).copied().unwrap_or_default();
        (p95 * 2).max(limits::HEDGE_FLOOR)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_hedge_waits_for_twice_the_95th_percentile_and_not_less_than_the_floor() {
        let latencies = Latencies::default();
        assert_eq!(latencies.hedge_after(), limits::HEDGE_FLOOR);
        (1..=100).for_each(|ms| latencies.note(Duration::from_millis(ms)));
        assert_eq!(latencies.hedge_after(), Duration::from_millis(192));
        (0..KEPT).for_each(|_| latencies.note(Duration::from_millis(1)));
        assert_eq!(latencies.hedge_after(), limits::HEDGE_FLOOR);
    }
}
