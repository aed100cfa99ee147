//! Shard positions: how far a client has seen, in one opaque token (`X-Shoal-Position`).
//!
//! Every answer carries the applied log index of each shard it touched. A client that sends
//! the token back with a read gets read-your-writes and monotonic reads on any node.

use std::collections::BTreeMap;
use std::fmt;
use std::str::FromStr;

use serde::{Deserialize, Serialize};

use crate::{Error, GroupId};

/// The most shards that one token may name.
pub const MAX_POSITION_SHARDS: usize = 4096;

/// The highest log index seen of each group.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Position(BTreeMap<GroupId, u64>);

impl Position {
    /// Notes that `group` was seen at `index`; positions never go back.
    pub fn advance(&mut self, group: GroupId, index: u64) {
        let seen = self.0.entry(group).or_default();
        *seen = (*seen).max(index);
    }

    /// Takes in everything another position has seen.
    pub fn merge(&mut self, other: &Position) {
        for (&group, &index) in &other.0 {
            self.advance(group, index);
        }
    }

    /// The index that a replica of `group` must have applied before it may answer.
    pub fn floor(&self, group: GroupId) -> u64 {
        self.0.get(&group).copied().unwrap_or(0)
    }

    /// Every group that was seen, with its index.
    pub fn iter(&self) -> impl Iterator<Item = (GroupId, u64)> {
        self.0.iter().map(|(group, index)| (*group, *index))
    }

    /// Whether no shard was seen.
    pub fn is_empty(&self) -> bool {
        self.0.is_empty()
    }
}

impl fmt::Display for Position {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("p1")?;
        self.0.iter().try_for_each(|(group, index)| write!(f, ".{:x}-{index:x}", group.0))
    }
}

impl FromStr for Position {
    type Err = Error;

    fn from_str(text: &str) -> Result<Self, Error> {
        let refuse = || Error::invalid("X-Shoal-Position", "not a position token of this cluster");
        let mut parts = text.split('.');
        if parts.next() != Some("p1") {
            return Err(refuse());
        }
        let mut position = Position::default();
        for part in parts {
            let (group, index) = part.split_once('-').ok_or_else(refuse)?;
            let group = u64::from_str_radix(group, 16).map_err(|_| refuse())?;
            let index = u64::from_str_radix(index, 16).map_err(|_| refuse())?;
            position.advance(GroupId(group), index);
            if position.0.len() > MAX_POSITION_SHARDS {
                return Err(refuse());
            }
        }
        Ok(position)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn tokens_round_trip_and_never_go_back() {
        let mut position = Position::default();
        position.advance(GroupId(3), 17);
        position.advance(GroupId(3), 4);
        position.advance(GroupId(20), 255);
        assert_eq!(position.to_string(), "p1.3-11.14-ff");
        assert_eq!(position.to_string().parse::<Position>().expect("round trip"), position);
        assert_eq!((position.floor(GroupId(3)), position.floor(GroupId(9))), (17, 0));
        for bad in ["", "p2.1-1", "p1.x-1", "p1.1", "p1.1-"] {
            assert!(bad.parse::<Position>().is_err(), "{bad:?}");
        }
    }
}
