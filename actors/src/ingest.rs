//! Ingest: drives every accepted document of the shards that this node leads to its end.
//!
//! ```text
//!  in_progress ─▶ parse ─▶ chunk ─▶ embed in batches, stage each ─▶ publish ─▶ completed
//!                   │ unprocessable                                │
//!                   ▼                                              ▼ no model, no provider, no leader …
//!                 failed                                    stays in progress with the reason, tried again
//! ```
//!
//! Trouble is logged and told as the document's last error; the pauses between attempts grow up to half a
//! minute. In this way a node waits for the collection's model if it does not have it, or until a node that
//! has it leads the shard.
//!
//! The queue is the shard itself: nothing here has to survive. A node that becomes leader finds
//! the documents in progress and goes on after the last staged chunk; one that stops leading
//! finds out because its next proposal is refused. A document whose parser was killed
//! [`MAX_PARSER_CRASHES`] times is failed with the reason and blocks nobody.

use std::collections::HashMap;
use std::time::{Duration, Instant};

use ractor::{Actor, ActorProcessingErr, ActorRef};
use ractor_cluster::RactorMessage;
use serde_json::{Map, Value, json};
use shoal_engine::command::{Answer, Command, Document, DocumentState, Outcome, Point, Read, Stage};
use shoal_proto::{CollectionConfig, EmbedderConfig, Error, ErrorCode, ShardId};
use tokio::task::JoinHandle;

use crate::blobs;
use crate::cluster::Cluster;
use crate::embed::TextKind;
use crate::entries::entries;
use crate::parse::chunk::{Chunk, chunk};
use crate::work::Work;

/// How often new documents are looked for.
const TICK: Duration = Duration::from_millis(100);
/// Documents in work at once on one node.
const MAX_DOCUMENTS: usize = 12;
/// Attempts after which a document whose parser keeps being killed is failed.
pub const MAX_PARSER_CRASHES: u32 = 3;
/// Texts in one embedding batch, and chunks in one staged entry.
const BATCH: usize = 32;
/// The pause before a document is tried again after trouble; it doubles up to the second value.
const RETRY_PAUSE: (Duration, Duration) = (Duration::from_secs(2), Duration::from_secs(30));
/// The most characters of a reason that is told.
const MAX_REASON_CHARS: usize = 1000;
/// How long one proposal may take.
const PROPOSE_TIMEOUT: Duration = Duration::from_secs(15);

type Key = (ShardId, shoal_proto::DocumentId, u64);

pub(crate) struct Ingests;

#[derive(Clone)]
pub(crate) struct IngestsArguments {
    pub(crate) cluster: Cluster,
    pub(crate) work: Work,
}

#[derive(RactorMessage)]
pub(crate) enum IngestsMessage {
    /// Look for documents in progress.
    Tick,
}

pub(crate) struct IngestsState {
    arguments: IngestsArguments,
    active: HashMap<Key, JoinHandle<bool>>,
    resting: HashMap<Key, Rest>,
}

/// How long a document rests after trouble.
struct Rest {
    until: Instant,
    pause: Duration,
}

impl Rest {
    /// The rest that follows one that is not long over, or the first one.
    fn after(before: Option<&Rest>, now: Instant) -> Rest {
        let pause = before.map_or(RETRY_PAUSE.0, |before| (before.pause * 2).min(RETRY_PAUSE.1));
        Rest { until: now + pause, pause }
    }

    /// Whether it is over for so long that the next trouble is news.
    fn is_forgotten(&self, now: Instant) -> bool {
        now >= self.until + RETRY_PAUSE.1
    }
}

/// Why a document has not come to its end here and now.
enum Stop {
    /// It was replaced, deleted or cancelled, or is somebody else's by now.
    Gone,
    /// It can never be processed, for this reason.
    Hopeless(String),
    /// It is tried again.
    Trouble(Error),
}

impl From<Error> for Stop {
    fn from(error: Error) -> Stop {
        match error.code {
            ErrorCode::Unprocessable => Stop::Hopeless(error.message),
            _ => Stop::Trouble(error),
        }
    }
}

impl Actor for Ingests {
    type Msg = IngestsMessage;
    type State = IngestsState;
    type Arguments = IngestsArguments;

    async fn pre_start(
        &self,
        myself: ActorRef<IngestsMessage>,
        arguments: IngestsArguments,
    ) -> Result<IngestsState, ActorProcessingErr> {
        myself.send_interval(TICK, || IngestsMessage::Tick);
        Ok(IngestsState { arguments, active: HashMap::new(), resting: HashMap::new() })
    }

    async fn handle(
        &self,
        _: ActorRef<IngestsMessage>,
        message: IngestsMessage,
        state: &mut IngestsState,
    ) -> Result<(), ActorProcessingErr> {
        match message {
            IngestsMessage::Tick => state.tick().await,
        }
        Ok(())
    }

    async fn post_stop(
        &self,
        _: ActorRef<IngestsMessage>,
        state: &mut IngestsState,
    ) -> Result<(), ActorProcessingErr> {
        state.active.values().for_each(JoinHandle::abort);
        Ok(())
    }
}

impl IngestsState {
    async fn tick(&mut self) {
        let now = Instant::now();
        let finished: Vec<Key> =
            self.active.iter().filter(|(_, task)| task.is_finished()).map(|(key, _)| *key).collect();
        for key in finished {
            let Some(task) = self.active.remove(&key) else { continue };
            // A task that panicked rests as well: whatever it met, others come first.
            if task.await.unwrap_or(false) {
                self.resting.remove(&key);
            } else {
                self.resting.insert(key, Rest::after(self.resting.get(&key), now));
            }
        }
        self.resting.retain(|key, rest| self.active.contains_key(key) || !rest.is_forgotten(now));
        let state = self.arguments.cluster.state();
        for (shard, local) in self.arguments.cluster.local_shards() {
            // What is being restored has not all of its files yet, and a shard that is to come is not it yet.
            if !state.is_in_use(shard) {
                continue;
            }
            let Some(embedder) = local.shard.config().embedder.clone() else { continue };
            if !local.group.is_leader() || self.active.len() >= MAX_DOCUMENTS {
                continue;
            }
            let question = Read::ListDocuments(Some(DocumentState::InProgress));
            let answer = self.arguments.cluster.run_read(local.shard.clone(), question).await;
            let Ok((_, Answer::Documents(documents))) = answer else { continue };
            for document in documents {
                let key = (shard, document.id, document.version);
                let is_resting = self.resting.get(&key).is_some_and(|rest| rest.until > now);
                if self.active.len() >= MAX_DOCUMENTS || self.active.contains_key(&key) || is_resting {
                    continue;
                }
                let job = Job {
                    cluster: self.arguments.cluster.clone(),
                    work: self.arguments.work.clone(),
                    shard,
                    config: local.shard.config().clone(),
                    embedder: embedder.clone(),
                    document,
                };
                self.active.insert(key, tokio::spawn(job.run()));
            }
        }
    }
}

struct Job {
    cluster: Cluster,
    work: Work,
    shard: ShardId,
    config: CollectionConfig,
    embedder: EmbedderConfig,
    document: Document,
}

impl Job {
    /// Runs the document to its end. Returns whether it came to one.
    async fn run(self) -> bool {
        let operation = |status: &'static str| {
            metrics::counter!("document_operations_total", "operation" => "process", "status" => status)
                .increment(1);
        };
        match self.drive().await {
            Ok(()) => {
                operation("completed");
                true
            }
            Err(Stop::Gone) => true,
            Err(Stop::Hopeless(reason)) => {
                operation("failed");
                tracing::info!(document = %self.document.id, reason, "a document cannot be processed");
                let (id, version) = (self.document.id, self.document.version);
                let end = Command::EndDocument { id, version, state: DocumentState::Failed, reason };
                self.propose(end).await.is_ok()
            }
            Err(Stop::Trouble(error)) => {
                operation("retried");
                tracing::warn!(document = %self.document.id, %error, "a document will be tried again");
                self.tell_trouble(&error).await;
                false
            }
        }
    }

    /// Leaves word of trouble with the document, unless it says so already.
    async fn tell_trouble(&self, error: &Error) {
        let reason: String = error.message.chars().take(MAX_REASON_CHARS).collect();
        if self.document.error.as_ref() == Some(&reason) {
            return;
        }
        let (id, version) = (self.document.id, self.document.version);
        // It is tried again in any case, and it is in the log.
        drop(self.propose(Command::NoteTrouble { id, version, reason }).await);
    }

    /// Puts a command about the document through, and returns the document as it is then.
    async fn propose(&self, command: Command) -> Result<Document, Stop> {
        let deadline = Instant::now() + PROPOSE_TIMEOUT;
        match self.cluster.write(self.shard, None, &command, deadline).await {
            Ok((Outcome::Document(document), _)) => Ok(*document),
            Ok((Outcome::Absent, _)) => Err(Stop::Gone),
            Ok(_) => Err(Error::internal("a shard did not answer with a document").into()),
            // The shard refuses news of a version that is not in progress any more, or is gone itself.
            Err(error) if matches!(error.code, ErrorCode::Conflict | ErrorCode::NotFound) => Err(Stop::Gone),
            Err(error) => Err(error.into()),
        }
    }

    async fn note(&self, stage: Stage, total_chunks: u32, new_attempt: bool) -> Result<Document, Stop> {
        let (id, version) = (self.document.id, self.document.version);
        self.propose(Command::NoteProgress { id, version, stage, total_chunks, new_attempt }).await
    }

    async fn drive(&self) -> Result<(), Stop> {
        self.work.embedders().check(&self.embedder)?;
        let chunks = self.chunks().await?;
        let total = chunks.len() as u32;
        self.note(Stage::Embedding, total, false).await?;
        let attributes: Map<String, Value> =
            serde_json::from_str(&self.document.attributes).unwrap_or_default();
        let mut staged = self.document.staged_chunks;
        let rest = chunks.get(staged as usize..).unwrap_or_default();
        for batch in rest.chunks(BATCH) {
            let texts: Vec<String> = batch.iter().map(Chunk::embedded_text).collect();
            let vectors = self.work.embed(&self.embedder.model, TextKind::Passage, &texts).await?;
            let points: Vec<Point> = (staged..)
                .zip(batch.iter().zip(vectors))
                .map(|(index, (chunk, vector))| self.point(index, chunk, vector, &attributes))
                .collect();
            for slice in entries(points) {
                let count = slice.len() as u32;
                let (id, version) = (self.document.id, self.document.version);
                self.propose(Command::StageChunks { id, version, first: staged, points: slice }).await?;
                staged += count;
            }
        }
        let (id, version) = (self.document.id, self.document.version);
        self.propose(Command::PublishDocument { id, version, chunks: total }).await?;
        Ok(())
    }

    async fn chunks(&self) -> Result<Vec<Chunk>, Stop> {
        // Attempts that end together with the node are counted as well.
        if self.document.attempts >= MAX_PARSER_CRASHES && self.document.stage == Stage::Parsing {
            return Err(given_up(self.document.error.as_deref().unwrap_or("the node ended as well")));
        }
        let Document { id, blob, .. } = self.document;
        let bytes = blobs::fetch_original(&self.cluster, self.work.blobs(), id, blob).await?;
        let attempts = self.note(Stage::Parsing, 0, true).await?.attempts;
        let parsed = match self.work.parse(&self.document.filename, bytes).await {
            Err(error) if error.code == ErrorCode::Internal && attempts >= MAX_PARSER_CRASHES => {
                return Err(given_up(&error.message));
            }
            parsed => parsed?,
        };
        let (model, chunker) = (self.embedder.model.clone(), self.document.chunker);
        let embedders = self.work.embedders().clone();
        let most_tokens = embedders.max_tokens(&model)?;
        let cut = move || chunk(&parsed, &chunker, most_tokens, |text| embedders.count_tokens(&model, text));
        let chunks =
            tokio::task::spawn_blocking(cut).await.map_err(|_| Error::internal("chunking panicked"))?;
        chunks.map_err(Stop::Hopeless)
    }

    fn point(&self, index: u32, chunk: &Chunk, vector: Vec<f32>, attributes: &Map<String, Value>) -> Point {
        let mut payload = attributes.clone();
        let own = json!({
            "text": chunk.text,
            "document_id": self.document.id.to_string(),
            "filename": self.document.filename,
            "chunk_index": index,
            "page": chunk.page,
            "heading": chunk.heading,
            "char_range": [chunk.char_range.0, chunk.char_range.1],
        });
        if let Value::Object(own) = own {
            payload.extend(own);
        }
        let name = self.config.vectors.keys().next().cloned().unwrap_or_default();
        let id = self.document.id.chunk_point(self.document.version, index);
        Point { id, vectors: vec![(name, vector)], payload: Value::Object(payload).to_string() }
    }
}

/// Why a document is failed that has killed its parser too often.
fn given_up(last: &str) -> Stop {
    Stop::Hopeless(format!(
        "its parser was killed or crashed {MAX_PARSER_CRASHES} times; the file is likely damaged or too \
         complex (at last: {last})"
    ))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rests_grow_and_are_forgotten() {
        let mut now = Instant::now();
        let mut rest = Rest::after(None, now);
        let mut pauses = vec![rest.pause.as_secs()];
        for _ in 0..5 {
            // The next attempt takes a while as well.
            now = rest.until + Duration::from_secs(5);
            assert!(!rest.is_forgotten(now));
            rest = Rest::after(Some(&rest), now);
            pauses.push(rest.pause.as_secs());
        }
        assert_eq!(pauses, [2, 4, 8, 16, 30, 30]);
        assert!(rest.is_forgotten(rest.until + RETRY_PAUSE.1));
    }
}
