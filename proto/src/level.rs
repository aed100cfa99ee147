//! Levels: what the nodes of a cluster may write and say to each other, so that builds of different age can
//! work in one.
//!
//! ```text
//!  every build: the highest level that it knows ── greeting ──▶ leader of the control group
//!                                                                  │ all members know a higher one,
//!                                                                  ▼ and have promised to keep to it
//!  level in force, in the control group's state ◀── RaiseLevel, in the log
//! ```
//!
//! * Level 1: everything up to the builds of 2026-11-22 that knew no levels.
//! * Level 2: nodes join with their level; the control group's state carries one (its format 5); answers to
//!   requests that were done in a part of a shard go along when it is split or merged; frozen shards refuse what
//!   is proposed to them; a restored collection can take the place of another one; snapshots are offered before
//!   they are sent; documents say why they take long; snapshots of collections are made, of which nodes report;
//!   shards whose data are lost begin anew; nodes come back in another zone; the control group's leader tells why
//!   something moves.
//!
//! What is written to a log, to a snapshot or to a disk, or is sent to a node, in a form that builds of the level
//! before cannot read, belongs to a new level: give it a line here and a name in [`Level`], raise
//! [`Level::LATEST`], and say so where commands tell their level. Until that level is in force the old form is
//! written. The level in force is never lowered.

use std::fmt;

use serde::{Deserialize, Serialize};

/// A level.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(transparent)]
pub struct Level(pub u32);

impl Level {
    /// That of the builds that knew no levels, and of every cluster of theirs.
    pub const FIRST: Level = Level(1);
    /// From here on a node joins with the highest level that it knows.
    pub const JOINS_TELL_LEVELS: Level = Level(2);
    /// From here on partial answers go along when shards are split or merged.
    pub const PARTIAL_ANSWERS: Level = Level(2);
    /// From here on what comes into a frozen shard's log is proposed in a way of its own.
    pub const PASSES_FREEZE: Level = Level(2);
    /// From here on a restored collection can take the place of another one.
    pub const RESTORES_REPLACE: Level = Level(2);
    /// From here on a snapshot is offered before it is sent.
    pub const SNAPSHOT_OFFERS: Level = Level(2);
    /// From here on snapshots of collections are made: what a node is at is part of its report.
    pub const SNAPSHOTS: Level = Level(2);
    /// From here on a document says why it takes long.
    pub const TROUBLE_IS_TOLD: Level = Level(2);
    /// From here on shards whose data are lost can begin anew.
    pub const SHARDS_BEGIN_ANEW: Level = Level(2);
    /// From here on a node can come back in another zone.
    pub const ZONES_CHANGE: Level = Level(2);
    /// From here on the control group's leader tells why something moves.
    pub const PROGRESS_IS_TOLD: Level = Level(2);
    /// The highest that this build knows.
    pub const LATEST: Level = Level(2);

    /// A level in a message between nodes, in which builds that knew no levels have left it out.
    pub fn from_wire(level: u32) -> Level {
        Level(level).max(Level::FIRST)
    }
}

impl Default for Level {
    /// [`Level::FIRST`]: higher ones are agreed upon.
    fn default() -> Level {
        Level::FIRST
    }
}

impl fmt::Display for Level {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.fmt(f)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_level_that_was_left_out_is_the_first() {
        assert_eq!(Level::from_wire(0), Level::FIRST);
        assert_eq!(Level::from_wire(7), Level(7));
        assert!(Level::FIRST < Level::LATEST);
    }
}
