//! Why something moves, and how far it is: what the leader of the control group knows beside its plan.
//!
//! None of it is agreed upon: whoever leads next derives the reasons anew and begins to count again. It
//! travels by itself because the form of a plan is that of the first level.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};
use shoal_proto::{GroupId, Level, ShardId};

use crate::call::{Call, Reply};
use crate::cluster::Cluster;
use crate::placement::ORDER_TIMEOUT;

/// What is known of what is under way.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Progress {
    /// Why each shard moves that does, for people.
    pub moves: BTreeMap<ShardId, String>,
    /// The change of a collection's shards that is being carried out, by the collection's name.
    pub reshards: BTreeMap<String, Attempt>,
}

/// An attempt to change shards.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Attempt {
    /// Which one it is, from 1.
    pub number: u32,
    /// After so many it is given up.
    pub of: u32,
    /// Why the one before has failed; empty when there was none.
    pub last_error: String,
}

impl Cluster {
    /// What is known of what is under way, by the word of the control group's leader; nothing when it does
    /// not answer, or not all nodes are upgraded.
    pub async fn progress(&self) -> Progress {
        if self.state().level < Level::PROGRESS_IS_TOLD {
            return Progress::default();
        }
        let control = self.groups().get(GroupId::CONTROL);
        let Some(leader) = control.ok().and_then(|control| control.leader()) else {
            return Progress::default();
        };
        match self.call(leader, Call::Progress, ORDER_TIMEOUT).await {
            Reply::Progress(progress) => progress,
            _ => Progress::default(),
        }
    }
}
