//! For whom a leader keeps a group's log as it is: a member that gets a snapshot goes on from there by the
//! log, and would need another snapshot if that began later by then.
//!
//! ```text
//!  export fixed ─▶ copied ─▶ offered, sent ─▶ installed ─▶ the member has nearly all, or CATCH_UP is over
//!  └─ Hold: as long as the export ─┘└─ the spool is in use ─┘└─ behind ─┘
//! ```

use std::collections::BTreeMap;
use std::io;
use std::sync::Arc;
use std::time::Duration;

use parking_lot::Mutex;
use shoal_proto::{GroupId, NodeId};
use tokio::time::Instant;

use crate::machine::Export;

/// How long the log is kept for a member that has got a snapshot, at most.
const CATCH_UP: Duration = Duration::from_secs(60);

/// Which groups' logs are kept. Clones share it.
#[derive(Clone, Default)]
pub(crate) struct Holds(Arc<Mutex<BTreeMap<GroupId, Needs>>>);

#[derive(Default)]
struct Needs {
    /// Exports that are being read.
    exports: usize,
    /// Members that have got a snapshot and have not caught up, and until when they are waited for.
    behind: BTreeMap<NodeId, Instant>,
}

impl Needs {
    fn expire(&mut self) {
        self.behind.retain(|_, until| *until > Instant::now());
    }

    fn is_over(&self) -> bool {
        self.exports == 0 && self.behind.is_empty()
    }
}

impl Holds {
    /// Keeps a group's log from now on, until what is returned is dropped.
    pub(crate) fn begin(&self, group: GroupId) -> Hold {
        self.0.lock().entry(group).or_default().exports += 1;
        Hold { holds: self.clone(), group }
    }

    /// A member has got a snapshot, and goes on by the log.
    pub(crate) fn delivered(&self, group: GroupId, to: NodeId) {
        self.0.lock().entry(group).or_default().behind.insert(to, Instant::now() + CATCH_UP);
    }

    /// Who goes on by the log after a snapshot.
    pub(crate) fn behind(&self) -> Vec<(GroupId, NodeId)> {
        let mut all = self.0.lock();
        all.values_mut().for_each(Needs::expire);
        all.retain(|_, needs| !needs.is_over());
        let members =
            all.iter().flat_map(|(group, needs)| needs.behind.keys().map(move |node| (*group, *node)));
        members.collect()
    }

    /// A member does not need the log any more.
    pub(crate) fn release(&self, group: GroupId, member: NodeId) {
        if let Some(needs) = self.0.lock().get_mut(&group) {
            needs.behind.remove(&member);
        }
    }

    /// Whether anybody needs a group's log as it is.
    pub(crate) fn is_held(&self, group: GroupId) -> bool {
        self.0.lock().get_mut(&group).is_some_and(|needs| {
            needs.expire();
            !needs.is_over()
        })
    }
}

/// Keeps a group's log as it is.
pub(crate) struct Hold {
    holds: Holds,
    group: GroupId,
}

impl Drop for Hold {
    fn drop(&mut self) {
        if let Some(needs) = self.holds.0.lock().get_mut(&self.group) {
            needs.exports -= 1;
        }
    }
}

/// An export whose group's log is kept for as long as anybody may read it.
pub(crate) struct Kept {
    pub(crate) export: Box<dyn Export>,
    pub(crate) _hold: Hold,
}

impl Export for Kept {
    fn next_piece(&self) -> io::Result<Option<Vec<u8>>> {
        self.export.next_piece()
    }

    fn about_bytes(&self) -> u64 {
        self.export.about_bytes()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const GROUP: GroupId = GroupId(5);
    const MEMBER: NodeId = NodeId(2);

    #[tokio::test(start_paused = true)]
    async fn a_log_is_kept_from_the_export_until_the_member_has_caught_up() {
        let holds = Holds::default();
        assert!(!holds.is_held(GROUP));
        let (first, second) = (holds.begin(GROUP), holds.begin(GROUP));
        drop(first);
        assert!(holds.is_held(GROUP) && !holds.is_held(GroupId(6)));
        holds.delivered(GROUP, MEMBER);
        drop(second);
        assert!(holds.is_held(GROUP));
        assert_eq!(holds.behind(), [(GROUP, MEMBER)]);
        holds.release(GROUP, MEMBER);
        assert!(!holds.is_held(GROUP) && holds.behind().is_empty());
        assert!(holds.0.lock().is_empty());
    }

    #[tokio::test(start_paused = true)]
    async fn a_member_that_does_not_catch_up_is_not_waited_for_any_longer() {
        let holds = Holds::default();
        holds.delivered(GROUP, MEMBER);
        tokio::time::advance(CATCH_UP - Duration::from_secs(1)).await;
        assert!(holds.is_held(GROUP));
        tokio::time::advance(Duration::from_secs(2)).await;
        assert!(!holds.is_held(GROUP) && holds.behind().is_empty());
    }
}
