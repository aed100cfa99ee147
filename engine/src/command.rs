//! What can be asked of a shard: commands, which go through its log, and reads.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};
use shoal_proto::{
    BlobHash, ChunkerConfig, DocumentId, Error, FieldType, Level, PointId, RequestId, Route, ShardId, codec,
};

/// A command with the id that makes a retry of it harmless.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Envelope {
    /// The client's idempotency key or one made at the edge; none for work that is idempotent
    /// by itself.
    pub request_id: Option<RequestId>,
    /// Seconds since the Unix epoch at the proposer. The state never reads a clock.
    pub now: u64,
    /// The command.
    pub command: Command,
}

impl Envelope {
    /// The bytes of an envelope around a command, which stays where it is.
    pub fn bytes(request_id: Option<RequestId>, now: u64, command: &Command) -> Vec<u8> {
        codec::encode(&(request_id, now, command))
    }
}

/// A point with its vectors by name, and its payload as a JSON object.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Point {
    /// The id.
    pub id: PointId,
    /// Dense vectors by name; the unnamed one has the empty name.
    pub vectors: Vec<(String, Vec<f32>)>,
    /// One JSON object, or empty for none.
    pub payload: String,
}

/// Which points a command is about.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub enum Target {
    /// These, where they exist.
    Ids(Vec<PointId>),
    /// All that a filter (JSON) keeps at the moment of applying.
    Filter(String),
    /// The same, of the points in a range of routes.
    FilterWithin {
        /// The filter, as JSON.
        filter: String,
        /// The first route.
        first: Route,
        /// The last one.
        last: Route,
    },
}

/// How a payload is changed.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum PayloadMode {
    /// Keys given replace keys there; others stay.
    Merge,
    /// The whole payload is replaced.
    Overwrite,
}

/// A change of a shard's state. Deterministic: everything that is not (times, embeddings) was
/// computed before it was proposed.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub enum Command {
    /// Inserts points, or replaces them wholly.
    Upsert(Vec<Point>),
    /// Deletes points.
    Delete(Target),
    /// Sets payload keys of points.
    SetPayload {
        /// Which points.
        target: Target,
        /// One JSON object.
        payload: String,
        /// Merge or overwrite.
        mode: PayloadMode,
    },
    /// Removes payload keys of points; all of them when `keys` is absent.
    DeletePayload {
        /// Which points.
        target: Target,
        /// Which keys.
        keys: Option<Vec<String>>,
    },
    /// Builds a payload index, or drops it.
    SetPayloadIndex {
        /// The payload path.
        field: String,
        /// The kind, or none to drop it.
        index: Option<FieldType>,
    },
    /// Notes a file of the built-in files collection.
    PutFile(FileRecord),
    /// Forgets a file.
    DeleteFile(DocumentId),
    /// Accepts a document: from here on it cannot be lost.
    AcceptDocument {
        /// Its id, that of its file.
        id: DocumentId,
        /// The file's name.
        filename: String,
        /// The original bytes.
        blob: BlobHash,
        /// Their number.
        bytes: u64,
        /// The user's attributes: one JSON object.
        attributes: String,
        /// How it is cut.
        chunker: ChunkerConfig,
    },
    /// A document's processing has reached a stage, or starts over.
    NoteProgress {
        /// The document.
        id: DocumentId,
        /// The version this is about; news of an older one is ignored.
        version: u64,
        /// The stage reached.
        stage: Stage,
        /// Chunks expected in all, once known.
        total_chunks: u32,
        /// Whether this begins a new attempt.
        new_attempt: bool,
    },
    /// Some chunks of a version that is not visible yet.
    StageChunks {
        /// The document.
        id: DocumentId,
        /// The version.
        version: u64,
        /// The index of the first chunk.
        first: u32,
        /// The chunks, as points.
        points: Vec<Point>,
    },
    /// The version becomes visible and the one before goes, in one step.
    PublishDocument {
        /// The document.
        id: DocumentId,
        /// The version.
        version: u64,
        /// How many chunks must have been staged.
        chunks: u32,
    },
    /// Processing has failed for good, or was cancelled.
    EndDocument {
        /// The document.
        id: DocumentId,
        /// The version.
        version: u64,
        /// `Failed` or `Cancelled`.
        state: DocumentState,
        /// The reason, for the user.
        reason: String,
    },
    /// Replaces the user's attributes of a document and of its chunks.
    SetAttributes {
        /// The document.
        id: DocumentId,
        /// One JSON object.
        attributes: String,
    },
    /// Deletes a document with its chunks.
    DeleteDocument(DocumentId),
    /// Puts a document's record back as a backup has it; its chunks are put back as points. One that
    /// was in progress begins anew.
    RestoreDocument(Box<Document>),
    /// Puts a file's record back, unless there is one.
    RestoreFile(FileRecord),
    /// Takes in what another shard held at one moment. Only before the shard is used.
    Seed(Box<Seed>),
    /// Applies commands of another shard's log. Only before the shard is used.
    Replay(Box<Replay>),
    /// Nothing more is taken over: the shard is on its own.
    EndAdoption {
        /// The change of shards.
        by: RequestId,
    },
    /// Refuses what is written from here on: the range is about to be others'.
    Freeze {
        /// The change of shards.
        by: RequestId,
    },
    /// Takes writes again, if that change of shards has frozen it.
    Thaw {
        /// The change of shards.
        by: RequestId,
    },
    /// Takes in the answers of another shard to requests that were not done in all of it. After its first
    /// seed.
    SeedPartial(Box<SeedPartial>),
    /// A document's processing has met trouble and will be tried again: for whoever asks why it takes long.
    NoteTrouble {
        /// The document.
        id: DocumentId,
        /// The version.
        version: u64,
        /// What it was, for the user.
        reason: String,
    },
}

/// Some of what another shard held.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Seed {
    /// The change of shards.
    pub by: RequestId,
    /// The other shard.
    pub from: ShardId,
    /// All shards that something comes from, with the first and the last route of what does: together they
    /// are the range of the shard that takes it in.
    pub parents: Vec<(ShardId, Route, Route)>,
    /// No version of anything in the other shard was higher then.
    pub version: u64,
    /// Points.
    pub points: Vec<Point>,
    /// Documents as they are.
    pub documents: Vec<Document>,
    /// Chunks that are not visible yet.
    pub staged: Vec<StagedChunk>,
    /// Answers to requests that were done in all of the other shard, oldest first.
    pub answers: Vec<(RequestId, Outcome)>,
    /// The payload indexes, if this part of the seed has them: those of one of the shards, since the logs of
    /// all of them end with the same.
    pub indexes: Option<BTreeMap<String, FieldType>>,
}

/// Answers of another shard to requests that were done in a part of it.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct SeedPartial {
    /// The change of shards.
    pub by: RequestId,
    /// The other shard.
    pub from: ShardId,
    /// The answers, oldest first.
    pub answers: Vec<PartialAnswer>,
}

/// The answer to a request that was done in a part of a shard.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct PartialAnswer {
    /// The request.
    pub id: RequestId,
    /// Its answer.
    pub outcome: Outcome,
    /// The first and the last route of each range in which it was done.
    pub ranges: Vec<(Route, Route)>,
}

/// A chunk of a version that is not visible yet.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct StagedChunk {
    /// The document.
    pub document: DocumentId,
    /// Its version.
    pub version: u64,
    /// The index of the chunk.
    pub chunk: u32,
    /// The chunk, as a point.
    pub point: Point,
}

/// Some of another shard's log.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Replay {
    /// The change of shards.
    pub by: RequestId,
    /// The other shard.
    pub from: ShardId,
    /// Commands in their order, as far as they concern this shard's range, each with the number that it had
    /// there.
    pub commands: Vec<(u64, Envelope)>,
}

impl Command {
    /// The level that must be in force in the cluster before it is proposed.
    pub fn level(&self) -> Level {
        match self {
            Command::SeedPartial(_) => Level::PARTIAL_ANSWERS,
            Command::NoteTrouble { .. } => Level::TROUBLE_IS_TOLD,
            Command::Upsert(_)
            | Command::Delete(_)
            | Command::SetPayload { .. }
            | Command::DeletePayload { .. }
            | Command::SetPayloadIndex { .. }
            | Command::PutFile(_)
            | Command::DeleteFile(_)
            | Command::AcceptDocument { .. }
            | Command::NoteProgress { .. }
            | Command::StageChunks { .. }
            | Command::PublishDocument { .. }
            | Command::EndDocument { .. }
            | Command::SetAttributes { .. }
            | Command::DeleteDocument(_)
            | Command::RestoreDocument(_)
            | Command::RestoreFile(_)
            | Command::Seed(_)
            | Command::Replay(_)
            | Command::EndAdoption { .. }
            | Command::Freeze { .. }
            | Command::Thaw { .. } => Level::FIRST,
        }
    }

    /// What of a command concerns a range of routes; none when nothing does.
    pub fn within(self, first: Route, last: Route) -> Option<Command> {
        let is_in = |route: Route| (first..=last).contains(&route);
        let narrowed = |target: Target| match target {
            Target::Ids(mut ids) => {
                ids.retain(|id| is_in(id.route()));
                (!ids.is_empty()).then_some(Target::Ids(ids))
            }
            Target::Filter(filter) => Some(Target::FilterWithin { filter, first, last }),
            Target::FilterWithin { filter, first: from, last: to } => {
                let (first, last) = (first.max(from), last.min(to));
                (first <= last).then_some(Target::FilterWithin { filter, first, last })
            }
        };
        match self {
            Command::Upsert(mut points) => {
                points.retain(|point| is_in(point.id.route()));
                (!points.is_empty()).then_some(Command::Upsert(points))
            }
            Command::Delete(target) => narrowed(target).map(Command::Delete),
            Command::SetPayload { target, payload, mode } => {
                narrowed(target).map(|target| Command::SetPayload { target, payload, mode })
            }
            Command::DeletePayload { target, keys } => {
                narrowed(target).map(|target| Command::DeletePayload { target, keys })
            }
            index @ Command::SetPayloadIndex { .. } => Some(index),
            Command::Seed(_)
            | Command::SeedPartial(_)
            | Command::Replay(_)
            | Command::EndAdoption { .. }
            | Command::Freeze { .. }
            | Command::Thaw { .. } => None,
            of_one => of_one.route().is_some_and(is_in).then_some(of_one),
        }
    }

    /// Where the document or the file lives that a command is about; none for commands about other things.
    pub fn route(&self) -> Option<Route> {
        let id = match self {
            Command::PutFile(file) | Command::RestoreFile(file) => file.id,
            Command::DeleteFile(id) | Command::DeleteDocument(id) => *id,
            Command::RestoreDocument(document) => document.id,
            Command::AcceptDocument { id, .. }
            | Command::NoteProgress { id, .. }
            | Command::StageChunks { id, .. }
            | Command::PublishDocument { id, .. }
            | Command::EndDocument { id, .. }
            | Command::NoteTrouble { id, .. }
            | Command::SetAttributes { id, .. } => *id,
            _ => return None,
        };
        Some(id.route())
    }
}

/// A file of the built-in files collection: a name for a blob.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct FileRecord {
    /// The id.
    pub id: DocumentId,
    /// The file's name.
    pub filename: String,
    /// The original bytes.
    pub blob: BlobHash,
    /// Their number.
    pub bytes: u64,
    /// What it is for, in OpenAI's words (`assistants`, `user_data`, …).
    pub purpose: String,
    /// Seconds since the Unix epoch.
    pub created_at: u64,
}

/// Where a document's processing is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Stage {
    /// Accepted; nobody works on it yet.
    Queued,
    /// A parser has it.
    Parsing,
    /// Chunks are being embedded and staged.
    Embedding,
    /// Visible.
    Published,
}

/// What has become of a document.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum DocumentState {
    /// Waiting or being processed.
    InProgress,
    /// Searchable.
    Completed,
    /// Given up, with a reason.
    Failed,
    /// Stopped by the user.
    Cancelled,
}

/// A document's record.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Document {
    /// The id.
    pub id: DocumentId,
    /// The file's name.
    pub filename: String,
    /// The original bytes.
    pub blob: BlobHash,
    /// Their number.
    pub bytes: u64,
    /// The user's attributes: one JSON object.
    pub attributes: String,
    /// How it is cut.
    pub chunker: ChunkerConfig,
    /// The log index at which this version was accepted.
    pub version: u64,
    /// What has become of it.
    pub state: DocumentState,
    /// Where its processing is.
    pub stage: Stage,
    /// Attempts begun.
    pub attempts: u32,
    /// The last error, for the user, until the document is published.
    pub error: Option<String>,
    /// Chunks staged so far: a new leader goes on from here.
    pub staged_chunks: u32,
    /// Chunks expected in all, zero until known.
    pub total_chunks: u32,
    /// The visible version and its number of chunks, if one is visible.
    pub published: Option<(u64, u32)>,
    /// Seconds since the Unix epoch.
    pub created_at: u64,
    /// Seconds since the Unix epoch.
    pub updated_at: u64,
}

/// What a command did.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub enum Outcome {
    /// Done; so many points were touched.
    Done(u64),
    /// The document as it is now.
    Document(Box<Document>),
    /// Nothing of that name.
    Absent,
    /// Refused: the same on every replica.
    Rejected(Error),
}

/// Which payload keys come with an answer.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Select {
    /// None.
    Nothing,
    /// All.
    All,
    /// Only these.
    Include(Vec<String>),
    /// All but these.
    Exclude(Vec<String>),
}

/// One list of a search: by vector or by words.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub enum Leg {
    /// Nearest vectors.
    Dense {
        /// The vector's name.
        using: String,
        /// The query.
        vector: Vec<f32>,
        /// Search every vector instead of the graph.
        exact: bool,
        /// Candidates while searching the graph; the default grows with the limit.
        ef: Option<usize>,
    },
    /// Best matches of words (BM25) over the text fields.
    Text {
        /// The words.
        query: String,
    },
}

/// A search of one shard.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Search {
    /// The lists wanted; each is answered on its own, so that they can be fused over shards.
    pub legs: Vec<Leg>,
    /// A filter as JSON.
    pub filter: Option<String>,
    /// Hits of each list.
    pub limit: usize,
    /// The worst score that counts.
    pub score_threshold: Option<f32>,
    /// Which payload keys come along.
    pub payload: Select,
    /// Which vectors come along.
    pub vectors: Select,
}

/// One hit, or one point that was read.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Hit {
    /// The id.
    pub id: PointId,
    /// The score; zero where nothing was scored.
    pub score: f32,
    /// The log index that wrote the point last.
    pub version: u64,
    /// The selected payload as a JSON object.
    pub payload: Option<String>,
    /// The selected vectors.
    pub vectors: Option<Vec<(String, Vec<f32>)>>,
}

/// A question to a shard.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub enum Read {
    /// Search.
    Search(Search),
    /// Points by id; those that do not exist are left out.
    Get {
        /// The ids.
        ids: Vec<PointId>,
        /// Which payload keys come along.
        payload: Select,
        /// Which vectors come along.
        vectors: Select,
    },
    /// Points in the order of their ids.
    Scroll {
        /// The first id that may come.
        from: Option<PointId>,
        /// A filter as JSON.
        filter: Option<String>,
        /// How many.
        limit: usize,
        /// Which payload keys come along.
        payload: Select,
        /// Which vectors come along.
        vectors: Select,
    },
    /// How many points a filter keeps.
    Count {
        /// A filter as JSON.
        filter: Option<String>,
    },
    /// A file's record.
    GetFile(DocumentId),
    /// Files, newest first.
    ListFiles,
    /// A document's record.
    GetDocument(DocumentId),
    /// Documents, by state when one is given.
    ListDocuments(Option<DocumentState>),
    /// The text of a document's visible chunks, in order.
    GetChunks(DocumentId),
    /// Numbers about the shard.
    Stats,
}

/// Numbers about a shard.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Stats {
    /// Points that exist.
    pub points: u64,
    /// Vectors in a graph.
    pub indexed_vectors: u64,
    /// Vectors that are still searched exactly because no graph has them yet.
    pub pending_vectors: u64,
    /// Documents by state: in progress, completed, failed, cancelled.
    pub documents: [u64; 4],
    /// Bytes of the visible documents' originals.
    pub document_bytes: u64,
    /// Bytes of the store on disk.
    pub disk_bytes: u64,
    /// Graph segments.
    pub segments: u64,
}

/// An answer to a question.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub enum Answer {
    /// One list of hits per leg.
    Lists(Vec<Vec<Hit>>),
    /// Points.
    Points(Vec<Hit>),
    /// A number.
    Count(u64),
    /// Files.
    Files(Vec<FileRecord>),
    /// Documents.
    Documents(Vec<Document>),
    /// Texts with their JSON payloads.
    Chunks(Vec<String>),
    /// Numbers about the shard.
    Stats(Stats),
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_envelope_is_read_from_its_parts() {
        let command = Command::Delete(Target::Ids(vec![PointId::Num(7)]));
        let id = Some(RequestId([3; 16]));
        let read: Envelope = codec::decode(&Envelope::bytes(id, 9, &command)).expect("an envelope");
        assert_eq!(read, Envelope { request_id: id, now: 9, command });
    }

    /// As long as a build of the first level may be in the cluster, and in logs for longer, none of this may look
    /// another way: what grows is a new variant at the end.
    #[test]
    fn commands_of_the_first_level_stay_as_they_are() {
        let by = RequestId([5; 16]);
        let with_id = |before: &[u8], after: &[u8]| [before, &[5; 16], after].concat();
        let point =
            Point { id: PointId::Num(7), vectors: vec![(String::new(), vec![0.0])], payload: "{}".into() };
        let seed = Seed {
            by,
            from: ShardId(7),
            parents: vec![(ShardId(7), Route(0), Route(9))],
            version: 3,
            points: Vec::new(),
            documents: Vec::new(),
            staged: Vec::new(),
            answers: vec![(by, Outcome::Done(4))],
            indexes: None,
        };
        let seed_bytes = [with_id(&[1, 16], &[7, 1, 7, 0, 9, 3, 0, 0, 0, 1]), with_id(&[], &[0, 4, 0])];
        let envelope = Envelope { request_id: None, now: 6, command: Command::Thaw { by } };
        let replay = Replay { by, from: ShardId(7), commands: vec![(3, envelope)] };
        let replay_bytes = [with_id(&[1, 17], &[7, 1, 3, 0, 6, 20]), with_id(&[], &[])];
        let commands = [
            (Command::Upsert(vec![point]), vec![1, 0, 1, 0, 7, 1, 0, 1, 0, 0, 0, 0, 2, b'{', b'}']),
            (Command::Delete(Target::Ids(vec![PointId::Num(7)])), vec![1, 1, 0, 1, 0, 7]),
            (Command::Delete(Target::Filter("{}".into())), vec![1, 1, 1, 2, b'{', b'}']),
            (Command::SetPayloadIndex { field: "f".into(), index: None }, vec![1, 4, 1, b'f', 0]),
            (Command::DeleteFile(DocumentId([5; 16])), with_id(&[1, 6], &[])),
            (Command::DeleteDocument(DocumentId([5; 16])), with_id(&[1, 13], &[])),
            (Command::Seed(Box::new(seed)), seed_bytes.concat()),
            (Command::Replay(Box::new(replay)), replay_bytes.concat()),
            (Command::EndAdoption { by }, with_id(&[1, 18], &[])),
            (Command::Freeze { by }, with_id(&[1, 19], &[])),
            (Command::Thaw { by }, with_id(&[1, 20], &[])),
        ];
        for (command, bytes) in commands {
            assert_eq!(codec::encode(&command), bytes, "{command:?}");
            assert_eq!(command.level(), Level::FIRST, "{command:?}");
        }
    }

    #[test]
    fn the_parts_of_a_command_are_the_whole() {
        let half = u32::MAX / 2;
        let (low, high) = ((Route(0), Route(half)), (Route(half + 1), Route(u32::MAX)));
        let ids: Vec<PointId> = (0..100).map(PointId::Num).collect();
        let delete = Command::Delete(Target::Ids(ids.clone()));
        let mut found = Vec::new();
        for (first, last) in [low, high] {
            let Some(Command::Delete(Target::Ids(part))) = delete.clone().within(first, last) else {
                panic!("some of a hundred ids are in each half");
            };
            assert!(part.iter().all(|id| (first..=last).contains(&id.route())));
            found.extend(part);
        }
        found.sort_unstable();
        assert_eq!(found, ids);

        let by_filter = Command::Delete(Target::Filter("{}".into()));
        let narrow =
            by_filter.within(low.0, low.1).and_then(|narrow| narrow.within(Route(9), Route(u32::MAX)));
        let expected = Target::FilterWithin { filter: "{}".into(), first: Route(9), last: Route(half) };
        assert_eq!(narrow, Some(Command::Delete(expected)));

        let document = Command::DeleteDocument(DocumentId([5; 16]));
        let is_low = DocumentId([5; 16]).route() <= low.1;
        assert_eq!(document.clone().within(low.0, low.1).is_some(), is_low);
        assert_eq!(document.within(high.0, high.1).is_some(), !is_low);
        assert_eq!(Command::Freeze { by: RequestId([1; 16]) }.within(low.0, high.1), None);
    }
}
