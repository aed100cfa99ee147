//! What nodes ask of each other about a group, besides Raft itself. One enum, versioned by the
//! codec; the same bytes travel over the actor mesh (small) and over gRPC (any size). A node of an earlier build
//! refuses what it does not know, and fails to read what has grown: what is new is a new variant, asked only when
//! its level is in force ([`shoal_proto::level`]).

use bytes::Bytes;
use serde::{Deserialize, Serialize};
use shoal_engine::command::{Answer, Read};
use shoal_proto::{BlobHash, Error, GroupId, Level, NodeId};

use crate::embed::TextKind;
use crate::parse::Parsed;
use crate::placement::{NodeReport, Plan};
use crate::progress::Progress;

/// How fresh a read must be.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub enum Consistency {
    /// Sees every write that was acknowledged before the read began.
    #[default]
    Linearizable,
    /// Sees what the client's position token has seen.
    Session,
    /// Whatever the replica has.
    Eventual,
}

/// A question or an order to another node.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub(crate) enum Call {
    /// Propose a command, if you lead the group.
    Propose {
        /// The group.
        group: GroupId,
        /// The command.
        command: Bytes,
        /// Whether it takes more disk space: refused where the disk's reserve is reached.
        grows: bool,
        /// How long the caller waits, in milliseconds.
        timeout_ms: u64,
    },
    /// Tell the read index, if you lead the group.
    ReadIndex {
        /// The group.
        group: GroupId,
    },
    /// Answer a question from your replica.
    Read {
        /// The shard's group.
        group: GroupId,
        /// How fresh.
        level: Consistency,
        /// The index that must be applied in any case.
        floor: u64,
        /// How long the caller waits, in milliseconds.
        timeout_ms: u64,
        /// The question.
        question: Read,
    },
    /// Tell the latest sums over the state of your replica.
    StateSums {
        /// The shard's group.
        group: GroupId,
    },
    /// Parse a file, if you have room.
    Parse {
        /// Its name, which tells the format.
        filename: String,
        /// Its bytes.
        bytes: Bytes,
    },
    /// Embed texts, if you have room and the model.
    Embed {
        /// The model's name.
        model: String,
        /// What the texts are.
        kind: TextKind,
        /// The texts.
        texts: Vec<String>,
    },
    /// Say what there is on your node.
    Report,
    /// Say what placement would do, if your node leads the control group.
    Plan,
    /// Hand a group that you lead over to another of its members.
    TransferLeader {
        /// The group.
        group: GroupId,
        /// Who is to lead it.
        to: NodeId,
    },
    /// Name the blobs that your replica names and does not have.
    MissingBlobs {
        /// The shard's group.
        group: GroupId,
        /// The index that must be applied.
        least: u64,
    },
    /// Tell the commands that your replica has applied after an index.
    Tail {
        /// The shard's group.
        group: GroupId,
        /// The index.
        after: u64,
        /// About how many bytes, at most.
        limit_bytes: u64,
    },
    /// Promise that only builds that know a level will open your data directory. Asked of nodes that know it.
    PromiseLevel {
        /// The level.
        level: Level,
    },
    /// The same as `Propose`, also into the log of a shard that a change of shards has frozen: what freezes or
    /// thaws it, and what may be in the log already.
    ProposeFrozen {
        /// The group.
        group: GroupId,
        /// The command.
        command: Bytes,
        /// Whether it takes more disk space: refused where the disk's reserve is reached.
        grows: bool,
        /// How long the caller waits, in milliseconds.
        timeout_ms: u64,
    },
    /// Say what you know of what is under way, if your node leads the control group.
    Progress,
}

impl Call {
    /// Whether it may take so long that a late answer says nothing of the way to the node.
    pub(crate) fn may_take_long(&self) -> bool {
        matches!(self, Call::Parse { .. } | Call::Embed { .. } | Call::StateSums { .. })
    }

    /// The label `kind` of the calls that are counted.
    pub(crate) fn kind(&self) -> &'static str {
        match self {
            Call::Read { .. } => "read",
            Call::ReadIndex { .. } => "read_index",
            Call::Parse { .. } => "parse",
            Call::Embed { .. } => "embed",
            Call::Propose { .. }
            | Call::StateSums { .. }
            | Call::Report
            | Call::Plan
            | Call::TransferLeader { .. }
            | Call::MissingBlobs { .. }
            | Call::Tail { .. }
            | Call::PromiseLevel { .. }
            | Call::ProposeFrozen { .. }
            | Call::Progress => "other",
        }
    }
}

/// What came back.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub(crate) enum Reply {
    /// Applied at this index, with this outcome.
    Proposed(u64, Bytes),
    /// The read index.
    Index(u64),
    /// The answer, the index that was applied when it was made, and for an eventual read about how
    /// many milliseconds old it may be, if that is known.
    Answered(u64, Answer, Option<u64>),
    /// Log indexes, each with the sum over the state after it.
    StateSums(Vec<(u64, u64)>),
    /// What the parser made of the file.
    Parsed(Parsed),
    /// One vector per text.
    Embedded(Vec<Vec<f32>>),
    /// What there is.
    Reported(NodeReport),
    /// What placement would do.
    Planned(Plan),
    /// These, and none else.
    Missing(Vec<BlobHash>),
    /// Done, nothing to tell.
    Done,
    /// Nothing was done: somebody else leads.
    NotLeader(Option<NodeId>),
    /// The answer is too large for the mesh; ask again over gRPC.
    UseGrpc,
    /// It failed.
    Failed(Error),
    /// Commands in their order, with their log indexes, and the last index that was applied; none for
    /// entries that are Raft's own.
    Tail(Vec<(u64, Option<Bytes>)>, u64),
    /// What is known of what is under way.
    Progress(Progress),
}

#[cfg(test)]
mod tests {
    use std::collections::{BTreeMap, BTreeSet};

    use shoal_proto::{ErrorCode, codec};

    use super::*;
    use crate::backup::{Job, JobKind, JobState};
    use crate::placement::GroupReport;

    /// As long as a build of the first level may be in the cluster, none of this may look another way: what
    /// grows is a new variant at the end.
    #[test]
    fn what_nodes_of_the_first_level_ask_stays_as_it_is() {
        let (group, command) = (GroupId(7), Bytes::from_static(&[9]));
        let calls: [(Call, &[u8]); 11] = [
            (Call::Propose { group, command, grows: true, timeout_ms: 300 }, &[1, 0, 7, 1, 9, 1, 251, 44, 1]),
            (Call::ReadIndex { group }, &[1, 1, 7]),
            (
                Call::Read {
                    group,
                    level: Consistency::Session,
                    floor: 5,
                    timeout_ms: 300,
                    question: Read::Count { filter: None },
                },
                &[1, 2, 7, 1, 5, 251, 44, 1, 3, 0],
            ),
            (Call::StateSums { group }, &[1, 3, 7]),
            (
                Call::Parse { filename: "a".to_owned(), bytes: Bytes::from_static(&[9]) },
                &[1, 4, 1, b'a', 1, 9],
            ),
            (
                Call::Embed { model: "m".to_owned(), kind: TextKind::Passage, texts: vec!["t".to_owned()] },
                &[1, 5, 1, b'm', 1, 1, 1, b't'],
            ),
            (Call::Report, &[1, 6]),
            (Call::Plan, &[1, 7]),
            (Call::TransferLeader { group, to: NodeId(2) }, &[1, 8, 7, 2]),
            (Call::MissingBlobs { group, least: 5 }, &[1, 9, 7, 5]),
            (Call::Tail { group, after: 5, limit_bytes: 8 }, &[1, 10, 7, 5, 8]),
        ];
        for (call, bytes) in calls {
            assert_eq!(codec::encode(&call), bytes, "{call:?}");
        }
    }

    #[test]
    fn what_nodes_of_the_first_level_answer_stays_as_it_is() {
        let report = NodeReport {
            node: NodeId(1),
            version: "v".to_owned(),
            disk_free_bytes: 3,
            is_writable: true,
            groups: vec![GroupReport {
                group: GroupId(7),
                is_leader: true,
                term: 2,
                applied: 3,
                last_index: 4,
                voters: BTreeSet::from([NodeId(1)]),
                learners: BTreeSet::new(),
                is_joint: false,
                behind: BTreeMap::from([(NodeId(1), 0)]),
            }],
            job: None,
        };
        let replies: [(Reply, &[u8]); 12] = [
            (Reply::Proposed(5, Bytes::from_static(&[9])), &[1, 0, 5, 1, 9]),
            (Reply::Index(5), &[1, 1, 5]),
            (Reply::Answered(5, Answer::Count(4), None), &[1, 2, 5, 2, 4, 0]),
            (Reply::StateSums(vec![(5, 6)]), &[1, 3, 1, 5, 6]),
            (Reply::Embedded(vec![vec![0.0]]), &[1, 5, 1, 1, 0, 0, 0, 0]),
            (Reply::Reported(report), &[1, 6, 1, 1, b'v', 3, 1, 1, 7, 1, 2, 3, 4, 1, 1, 0, 0, 1, 1, 0, 0]),
            (Reply::Missing(Vec::new()), &[1, 8, 0]),
            (Reply::Done, &[1, 9]),
            (Reply::NotLeader(Some(NodeId(2))), &[1, 10, 1, 2]),
            (Reply::UseGrpc, &[1, 11]),
            (Reply::Failed(Error::new(ErrorCode::Busy, "x")), &[1, 12, 6, 1, b'x', 0]),
            (Reply::Tail(vec![(5, None)], 6), &[1, 13, 1, 5, 0, 6]),
        ];
        for (reply, bytes) in replies {
            assert_eq!(codec::encode(&reply), bytes, "{reply:?}");
        }
    }

    /// A node that is at something which the others cannot read of is silent to them: another kind of job belongs
    /// to a later level, as that of snapshots does, and so does another state.
    #[test]
    fn what_nodes_of_the_first_level_are_at_stays_as_it_is() {
        let kinds = [JobKind::Create, JobKind::Verify, JobKind::Restore, JobKind::Delete];
        let states: [(JobState, &[u8]); 3] = [
            (JobState::Running, &[0]),
            (JobState::Done, &[1]),
            (JobState::Failed("x".to_owned()), &[2, 1, b'x']),
        ];
        for (number, kind) in (0..).zip(kinds) {
            for (state, state_bytes) in &states {
                let job = Job {
                    kind,
                    backup: "b".to_owned(),
                    node: NodeId(1),
                    state: state.clone(),
                    at: "a".to_owned(),
                    bytes_done: 2,
                    bytes_total: 3,
                    bytes_new: 4,
                    started_at: 5,
                    ended_at: Some(6),
                };
                let report = NodeReport {
                    node: NodeId(1),
                    version: "v".to_owned(),
                    disk_free_bytes: 3,
                    is_writable: true,
                    groups: Vec::new(),
                    job: Some(job),
                };
                let head = [1, 6, 1, 1, b'v', 3, 1, 0, 1, number, 1, b'b', 1];
                let bytes = [&head[..], *state_bytes, &[1, b'a', 2, 3, 4, 5, 1, 6]].concat();
                assert_eq!(codec::encode(&Reply::Reported(report)), bytes, "{kind:?} {state:?}");
            }
        }
    }
}
