//! Ingest: drives every accepted document of the shards that this node leads to its end.
//!
//! ```text
//!  in_progress ─▶ parse ─▶ chunk ─▶ embed in batches, stage each ─▶ publish ─▶ completed
//!                   │ unprocessable                                │
//!                   ▼                                              ▼ transient trouble
//!                 failed                                    stays in progress, tried again
//! ```
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
/// The pause before a document is tried again after transient trouble.
const RETRY_PAUSE: Duration = Duration::from_secs(2);
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
    resting: HashMap<Key, Instant>,
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
            if !task.await.unwrap_or(false) {
                self.resting.insert(key, now + RETRY_PAUSE);
            }
        }
        self.resting.retain(|_, until| *until > now);
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
                if self.active.len() >= MAX_DOCUMENTS
                    || self.active.contains_key(&key)
                    || self.resting.contains_key(&key)
                {
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
            Err(error) if error.code == ErrorCode::Unprocessable => {
                operation("failed");
                tracing::info!(document = %self.document.id, reason = error.message, "a document cannot be processed");
                let end = Command::EndDocument {
                    id: self.document.id,
                    version: self.document.version,
                    state: DocumentState::Failed,
                    reason: error.message,
                };
                self.propose(end).await.is_ok()
            }
            // It was replaced, deleted or cancelled, or is somebody else's by now.
            Err(error) if matches!(error.code, ErrorCode::Conflict | ErrorCode::NotFound) => true,
            Err(error) => {
                operation("retried");
                tracing::warn!(document = %self.document.id, %error, "a document will be tried again");
                false
            }
        }
    }

    async fn propose(&self, command: Command) -> Result<Outcome, Error> {
        let deadline = Instant::now() + PROPOSE_TIMEOUT;
        let (outcome, _) = self.cluster.write(self.shard, None, &command, deadline).await?;
        match outcome {
            Outcome::Absent => Err(Error::not_found("the document was deleted")),
            outcome => Ok(outcome),
        }
    }

    async fn note(&self, stage: Stage, total_chunks: u32, new_attempt: bool) -> Result<Outcome, Error> {
        let (id, version) = (self.document.id, self.document.version);
        self.propose(Command::NoteProgress { id, version, stage, total_chunks, new_attempt }).await
    }

    async fn drive(&self) -> Result<(), Error> {
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

    async fn chunks(&self) -> Result<Vec<Chunk>, Error> {
        if self.document.attempts >= MAX_PARSER_CRASHES && self.document.stage == Stage::Parsing {
            let reason = format!(
                "its parser was killed or crashed {MAX_PARSER_CRASHES} times; the file is likely damaged or too complex"
            );
            return Err(Error::new(ErrorCode::Unprocessable, reason));
        }
        let Document { id, blob, .. } = self.document;
        let bytes = blobs::fetch_original(&self.cluster, self.work.blobs(), id, blob).await?;
        self.note(Stage::Parsing, 0, true).await?;
        let parsed = self.work.parse(&self.document.filename, bytes).await?;
        let (model, chunker) = (self.embedder.model.clone(), self.document.chunker);
        let embedders = self.work.embedders().clone();
        let most_tokens = embedders.max_tokens(&model)?;
        let cut = move || chunk(&parsed, &chunker, most_tokens, |text| embedders.count_tokens(&model, text));
        let chunks =
            tokio::task::spawn_blocking(cut).await.map_err(|_| Error::internal("chunking panicked"))?;
        chunks.map_err(|reason| Error::new(ErrorCode::Unprocessable, reason))
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
