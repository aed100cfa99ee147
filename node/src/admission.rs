//! How many requests are in work at once: as many as the node can do without falling behind.
//!
//! ```text
//!            a turn of the run queue takes long        it does not, and requests wait
//!  limit  ◀──── × 0.8 of what is in work ────   ────▶  + 1/8, up to the most
//!
//!  request ─▶ a place? ──yes─▶ in work
//!                 └──no──▶ in line, first come first served ──its patience ends──▶ 429
//! ```
//!
//! A node that takes in more than its processors can do is late with everything, heartbeats
//! included, and in the end does less than it could. What is late shows in how long a task that is
//! ready waits for its turn: that is measured, and the number of requests in work follows it by
//! additive increase and multiplicative decrease (Chiu and Jain, 1989). The least of several
//! measurements counts, as in CoDel (RFC 8289): a queue that empties now and then is no overload.
//!
//! A request that waits for a disk, a peer or an election costs no turns and lowers no limit.

use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use tokio::sync::{Semaphore, SemaphorePermit};

/// How often a turn of the run queue is measured.
const PROBE_EVERY: Duration = Duration::from_millis(25);
/// Measurements after which the limit is set anew; the least of them counts.
const PROBES: u32 = 8;
/// A turn that takes longer says that the node has more to do than it can.
const LONG_TURN: Duration = Duration::from_millis(20);
/// The fewest requests that are let in at once, however busy the node is.
const LEAST: usize = 8;

/// How many requests may be in work, and why: the pure part.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Limit {
    now: usize,
    most: usize,
}

impl Limit {
    /// What the limit is to be after a while in which the shortest turn took `turn`, with so many
    /// requests in work and in line.
    fn next(self, turn: Duration, in_work: usize, in_line: usize) -> Limit {
        let now = if turn > LONG_TURN {
            // What is in work may be far below a limit that nobody has reached yet.
            (self.now.min(in_work) * 4 / 5).max(LEAST)
        } else if in_line > 0 || in_work >= self.now {
            self.now + (self.now / 8).max(1)
        } else {
            self.now
        };
        Limit { now: now.min(self.most), most: self.most }
    }
}

/// Lets requests in. Cheap to clone.
#[derive(Clone)]
pub struct Admission {
    inner: Arc<Inner>,
}

struct Inner {
    places: Semaphore,
    /// Places that are to go as soon as they are given back.
    surplus: AtomicUsize,
    in_work: AtomicUsize,
    in_line: AtomicUsize,
    most: usize,
    patience: Duration,
}

/// A place among the requests in work, given back when it is dropped.
pub struct Place<'a> {
    inner: &'a Inner,
    permit: Option<SemaphorePermit<'a>>,
}

impl Drop for Place<'_> {
    fn drop(&mut self) {
        self.inner.in_work.fetch_sub(1, Ordering::AcqRel);
        let is_surplus = self
            .inner
            .surplus
            .fetch_update(Ordering::AcqRel, Ordering::Acquire, |surplus| surplus.checked_sub(1));
        if is_surplus.is_ok()
            && let Some(permit) = self.permit.take()
        {
            permit.forget();
        }
    }
}

/// Counts a request in line for as long as it lives.
struct InLine<'a>(&'a AtomicUsize);

impl Drop for InLine<'_> {
    fn drop(&mut self) {
        self.0.fetch_sub(1, Ordering::AcqRel);
    }
}

impl Admission {
    /// At most so many requests in work, each of which waits so long for its turn.
    pub fn new(most: usize, patience: Duration) -> Admission {
        let inner = Inner {
            places: Semaphore::new(most),
            surplus: AtomicUsize::new(0),
            in_work: AtomicUsize::new(0),
            in_line: AtomicUsize::new(0),
            most,
            patience,
        };
        Admission { inner: Arc::new(inner) }
    }

    /// Waits for a place; none when it takes too long.
    pub async fn enter(&self) -> Option<Place<'_>> {
        let inner = &*self.inner;
        let permit = match inner.places.try_acquire() {
            Ok(permit) => permit,
            Err(_) => {
                inner.in_line.fetch_add(1, Ordering::AcqRel);
                let _in_line = InLine(&inner.in_line);
                tokio::time::timeout(inner.patience, inner.places.acquire()).await.ok()?.ok()?
            }
        };
        inner.in_work.fetch_add(1, Ordering::AcqRel);
        Some(Place { inner, permit: Some(permit) })
    }

    /// Measures how busy the node is and sets the limit by it, for as long as the node runs.
    pub async fn adapt(self) {
        let mut limit = Limit { now: self.inner.most, most: self.inner.most };
        loop {
            let mut turn = Duration::MAX;
            for _ in 0..PROBES {
                tokio::time::sleep(PROBE_EVERY).await;
                // Goes to the end of the run queue: what is ready now has its turn first.
                let ready = Instant::now();
                tokio::task::yield_now().await;
                turn = turn.min(ready.elapsed());
            }
            let (in_work, in_line) =
                (self.inner.in_work.load(Ordering::Acquire), self.inner.in_line.load(Ordering::Acquire));
            let next = limit.next(turn, in_work, in_line);
            self.resize(limit.now, next.now);
            limit = next;
            metrics::gauge!("shoal_admission_limit").set(limit.now as f64);
            metrics::gauge!("shoal_admission_waiting").set(in_line as f64);
            metrics::gauge!("shoal_run_queue_seconds").set(turn.as_secs_f64());
        }
    }

    fn resize(&self, from: usize, to: usize) {
        let inner = &*self.inner;
        if to < from {
            let taken = inner.places.forget_permits(from - to);
            inner.surplus.fetch_add(from - to - taken, Ordering::AcqRel);
            return;
        }
        let mut more = to - from;
        while more > 0
            && inner
                .surplus
                .fetch_update(Ordering::AcqRel, Ordering::Acquire, |surplus| surplus.checked_sub(1))
                .is_ok()
        {
            more -= 1;
        }
        inner.places.add_permits(more);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const SHORT: Duration = Duration::from_millis(1);
    const LONG: Duration = Duration::from_millis(100);

    #[test]
    fn the_limit_falls_when_turns_are_long_and_rises_when_requests_wait() {
        let at = |now| Limit { now, most: 1000 };
        assert_eq!(at(1000).next(LONG, 100, 0), at(80), "what is in work counts, not what might be");
        assert_eq!(at(80).next(LONG, 80, 300), at(64));
        assert_eq!(at(9).next(LONG, 9, 300), at(LEAST));
        assert_eq!(at(64).next(SHORT, 64, 10), at(72));
        assert_eq!(at(64).next(SHORT, 10, 0), at(64), "nobody asks for more");
        assert_eq!(at(990).next(SHORT, 990, 10), at(1000));
    }

    #[tokio::test(start_paused = true)]
    async fn who_finds_no_place_waits_and_is_then_refused() {
        let admission = Admission::new(2, Duration::from_secs(1));
        let first = admission.enter().await.expect("a place");
        let second = admission.enter().await.expect("a place");
        assert!(admission.enter().await.is_none());
        admission.resize(2, 1);
        drop(first);
        assert!(admission.enter().await.is_none(), "that place is gone");
        drop(second);
        let only = admission.enter().await.expect("the last place");
        admission.resize(1, 2);
        let another = admission.enter().await.expect("a new place");
        // Shrunk and grown again before anybody has left.
        admission.resize(2, 1);
        admission.resize(1, 2);
        drop((only, another));
        assert_eq!(admission.inner.places.available_permits(), 2);
        assert_eq!(admission.inner.in_line.load(Ordering::Acquire), 0);
    }
}
