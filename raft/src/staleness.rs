//! How far behind a replica may be that answers without asking its leader.
//!
//! A follower that has applied everything that its leader had committed when it was last heard is
//! at most as old as that moment. While a group sleeps nothing is written, and its leader's node is
//! heard instead. A leader is as old as its last word from a quorum.

use std::collections::VecDeque;
use std::time::Duration;

use openraft::async_runtime::WatchReceiver;
use openraft::type_config::TypeConfigExt;
use parking_lot::Mutex;
use tokio::time::Instant;

use crate::groups::Group;
use crate::types::TypeConfig;

/// The most words of a leader that are remembered until they are applied.
const REMEMBERED: usize = 64;

/// What a leader had committed when it was heard, for what is not applied yet and the last that
/// is.
#[derive(Default)]
pub(crate) struct Heard(Mutex<VecDeque<(Instant, u64)>>);

impl Heard {
    /// Notes that a leader was heard that had committed so much.
    pub(crate) fn note(&self, commit: u64) {
        let mut heard = self.0.lock();
        match heard.back_mut() {
            Some((at, last)) if *last == commit => *at = Instant::now(),
            _ => heard.push_back((Instant::now(), commit)),
        }
        if heard.len() > REMEMBERED {
            heard.pop_front();
        }
    }

    /// When the leader was last heard.
    fn last_at(&self) -> Option<Instant> {
        self.0.lock().back().map(|(at, _)| *at)
    }

    /// When the leader was last heard with nothing committed that is not applied here.
    fn fresh_at(&self, applied: u64) -> Option<Instant> {
        let mut heard = self.0.lock();
        while heard.get(1).is_some_and(|(_, commit)| *commit <= applied) {
            heard.pop_front();
        }
        heard.front().filter(|(_, commit)| *commit <= applied).map(|(at, _)| *at)
    }
}

impl Group {
    /// How long ago a follower has heard its leader, or a leader a majority, however far behind it is; none
    /// when that was not since the start.
    pub fn silence(&self) -> Option<Duration> {
        if self.is_leader() {
            return self.staleness();
        }
        let by_word = self.heard().last_at().map(|at| at.elapsed());
        newest(self.leaders_beat(), by_word)
    }

    /// While the group sleeps: how long ago the node that leads it was heard.
    fn leaders_beat(&self) -> Option<Duration> {
        let leader = self.leader().filter(|_| self.is_asleep())?;
        self.peers().beats().heard_at(leader).map(|at| at.elapsed())
    }

    /// How long ago everything was here that had been acknowledged then, about; none when that is
    /// not known.
    pub fn staleness(&self) -> Option<Duration> {
        let status = self.status();
        let acked = {
            let watch = self.raft().metrics();
            let metrics = watch.borrow_watched();
            metrics.last_quorum_acked.as_ref().map(|at| TypeConfig::now() - **at)
        };
        if status.role == "leader" {
            // The other voters that a leader needs besides itself.
            let needed = status.voters.len() / 2;
            if needed == 0 {
                return Some(Duration::ZERO);
            }
            let others = status.voters.iter().filter(|voter| **voter != self.node());
            let mut heard: Vec<Duration> = others
                .filter_map(|voter| self.peers().beats().heard_at(*voter))
                .map(|at| at.elapsed())
                .collect();
            heard.sort_unstable();
            let by_beat = if self.is_asleep() { heard.get(needed - 1).copied() } else { None };
            return newest(by_beat, acked);
        }
        let by_word = self.heard().fresh_at(status.applied).map(|at| at.elapsed());
        newest(self.leaders_beat(), by_word)
    }
}

fn newest(a: Option<Duration>, b: Option<Duration>) -> Option<Duration> {
    a.into_iter().chain(b).min()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_replica_is_as_old_as_the_last_word_that_it_has_applied() {
        let heard = Heard::default();
        assert_eq!(heard.fresh_at(100), None, "never heard");
        heard.note(5);
        let first = heard.fresh_at(5).expect("fresh then");
        assert_eq!(heard.fresh_at(4), None, "what was committed then is not here yet");
        std::thread::sleep(Duration::from_millis(2));
        heard.note(8);
        assert_eq!(heard.fresh_at(7), Some(first), "8 is not applied yet");
        let second = heard.fresh_at(8).expect("fresh now");
        assert!(second > first);
        std::thread::sleep(Duration::from_millis(2));
        heard.note(8);
        assert!(heard.fresh_at(8).expect("heard again") > second);
    }
}
