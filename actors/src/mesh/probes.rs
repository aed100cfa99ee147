//! Which sessions stand and carry nothing: the library does not notice.

use std::collections::{BTreeMap, BTreeSet};
use std::time::{Duration, Instant};

use ractor::ActorId;

/// How often each session is asked to carry something.
const PROBE_EVERY: Duration = Duration::from_secs(2);
/// A session that has carried nothing so many times in a row is ended, and dialled anew.
const MAX_MISSES: u32 = 2;

/// What became of the probes.
#[derive(Default)]
pub(super) struct Probes {
    last: Option<Instant>,
    misses: BTreeMap<ActorId, u32>,
}

impl Probes {
    /// Whether these sessions are to be probed now. What is known of others is forgotten.
    pub(super) fn are_due(&mut self, sessions: &BTreeSet<ActorId>, now: Instant) -> bool {
        self.misses.retain(|session, _| sessions.contains(session));
        let are_due = self.last.is_none_or(|last| now.duration_since(last) >= PROBE_EVERY);
        if are_due {
            self.last = Some(now);
        }
        are_due
    }

    /// Notes whether a session has carried a probe and its answer. Returns whether it is to be ended.
    pub(super) fn note(&mut self, session: ActorId, has_carried: bool) -> bool {
        if has_carried {
            self.misses.remove(&session);
            return false;
        }
        let misses = self.misses.entry(session).or_default();
        *misses += 1;
        *misses >= MAX_MISSES
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const SESSION: ActorId = ActorId::Local(1);

    #[test]
    fn a_session_is_ended_after_misses_in_a_row() {
        let mut probes = Probes::default();
        assert!(!probes.note(SESSION, false));
        assert!(!probes.note(SESSION, true));
        assert!(!probes.note(SESSION, false) && !probes.note(ActorId::Local(2), false));
        assert!(probes.note(SESSION, false));
    }

    #[test]
    fn sessions_are_probed_now_and_then_and_forgotten_when_they_end() {
        let (mut probes, now) = (Probes::default(), Instant::now());
        let one = BTreeSet::from([SESSION]);
        assert!(probes.are_due(&one, now));
        probes.note(SESSION, false);
        assert!(!probes.are_due(&one, now + PROBE_EVERY / 2));
        assert!(probes.are_due(&one, now + PROBE_EVERY));
        assert!(!probes.are_due(&BTreeSet::new(), now + PROBE_EVERY));
        assert!(probes.misses.is_empty());
    }
}
