//! When a part that has failed is started again: after a pause that doubles up to a cap, and from the
//! beginning once it has run for a while.

use std::time::{Duration, Instant};

/// The pause after a first failure.
const FIRST_PAUSE: Duration = Duration::from_secs(1);
/// The longest pause.
const LONGEST_PAUSE: Duration = Duration::from_secs(30);
/// A part that has not failed for so long is as good as new. Longer than the longest pause, or a part
/// that fails at every start would be.
const CALM: Duration = Duration::from_secs(120);

/// The failures of one part.
#[derive(Debug, Default)]
pub(crate) struct Restarts {
    in_a_row: u32,
    failed_at: Option<Instant>,
}

impl Restarts {
    /// Notes a failure. Returns after how long the part is to be started again.
    pub(crate) fn note(&mut self, now: Instant) -> Duration {
        let was_calm = self.failed_at.is_none_or(|at| now.duration_since(at) >= CALM);
        self.in_a_row = if was_calm { 1 } else { self.in_a_row.saturating_add(1) };
        self.failed_at = Some(now);
        let doublings = (self.in_a_row - 1).min(10);
        FIRST_PAUSE.saturating_mul(1 << doublings).min(LONGEST_PAUSE)
    }

    /// So many failures have followed each other without calm.
    pub(crate) fn in_a_row(&self) -> u32 {
        self.in_a_row
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pauses_double_up_to_a_cap_and_begin_anew_after_calm() {
        let (mut restarts, mut now) = (Restarts::default(), Instant::now());
        let mut seconds = Vec::new();
        for _ in 0..8 {
            let pause = restarts.note(now);
            seconds.push(pause.as_secs());
            now += pause;
        }
        assert_eq!(seconds, [1, 2, 4, 8, 16, 30, 30, 30]);
        assert_eq!(restarts.in_a_row(), 8);
        assert_eq!(restarts.note(now + CALM), FIRST_PAUSE);
        assert_eq!(restarts.in_a_row(), 1);
    }
}
