//! Documents in a shard: accepted, staged, published, replaced. The life cycle is DESIGN's:
//!
//! ```text
//!  AcceptDocument ─▶ in_progress ── StageChunks* ─▶ PublishDocument ─▶ completed
//!                        │  ▲ NoteProgress                               │ AcceptDocument with other bytes:
//!                        ▼  │ NoteTrouble                                ▼ in_progress again; the published
//!                     failed / cancelled                                   version stays visible until then
//! ```
//!
//! Staged chunks are not points: nobody sees them. Publishing turns them into points and drops
//! the version before, in one entry and so in one step.

use serde_json::Value;
use shoal_proto::{DocumentId, Error, ErrorCode, codec};

use crate::command::{Command, Document, DocumentState, FileRecord, Outcome, Point, Stage};
use crate::error::Result;
use crate::keys;
use crate::state::{Change, State, check_point, decode};

impl State {
    pub(crate) fn transition_document(
        &mut self,
        change: &mut Change<'_>,
        command: Command,
    ) -> Result<Outcome> {
        match command {
            Command::PutFile(file) => {
                change.batch.put(keys::file(file.id), codec::encode(&file));
                Ok(Outcome::Done(1))
            }
            Command::DeleteFile(id) => Ok(match self.file(id)? {
                None => Outcome::Absent,
                Some(_) => {
                    change.batch.remove(keys::file(id));
                    Outcome::Done(1)
                }
            }),
            Command::AcceptDocument { id, filename, blob, bytes, attributes, chunker } => {
                let fresh = Document {
                    id,
                    filename,
                    blob,
                    bytes,
                    attributes,
                    chunker,
                    version: change.version,
                    state: DocumentState::InProgress,
                    stage: Stage::Queued,
                    attempts: 0,
                    error: None,
                    staged_chunks: 0,
                    total_chunks: 0,
                    published: None,
                    created_at: change.now,
                    updated_at: change.now,
                };
                self.accept(change, fresh)
            }
            Command::NoteProgress { id, version, stage, total_chunks, new_attempt } => {
                self.edit(change, id, version, |document| {
                    document.stage = stage;
                    document.total_chunks = total_chunks;
                    // Attempts count parses: one that came through starts the count anew.
                    document.attempts = match stage {
                        Stage::Embedding => 0,
                        _ => document.attempts + u32::from(new_attempt),
                    };
                    Ok(())
                })
            }
            Command::StageChunks { id, version, first, points } => {
                self.stage(change, id, version, first, &points)
            }
            Command::PublishDocument { id, version, chunks } => self.publish(change, id, version, chunks),
            Command::EndDocument { id, version, state, reason } => {
                let outcome = self.edit(change, id, version, |document| {
                    document.state = state;
                    document.error = Some(reason);
                    document.staged_chunks = 0;
                    Ok(())
                })?;
                // News of an older version must not touch what a newer one has staged.
                if matches!(outcome, Outcome::Document(_)) {
                    self.drop_staged(change, id)?;
                }
                Ok(outcome)
            }
            Command::NoteTrouble { id, version, reason } => self.edit(change, id, version, |document| {
                document.error = Some(reason);
                Ok(())
            }),
            Command::SetAttributes { id, attributes } => self.set_attributes(change, id, attributes),
            Command::DeleteDocument(id) => {
                let Some(document) = self.document(id)? else { return Ok(Outcome::Absent) };
                self.drop_published(change, &document)?;
                self.drop_staged(change, id)?;
                change.batch.remove(keys::document(id));
                change.effects.push(crate::state::Effect::Document { id, is_in_progress: false });
                Ok(Outcome::Document(Box::new(document)))
            }
            Command::RestoreFile(file) => match self.file(file.id)? {
                Some(_) => Ok(Outcome::Done(0)),
                None => {
                    change.batch.put(keys::file(file.id), codec::encode(&file));
                    Ok(Outcome::Done(1))
                }
            },
            Command::RestoreDocument(document) => self.restore(change, *document),
            points => {
                let message = format!("not a command about documents: {:?}", std::mem::discriminant(&points));
                Ok(Outcome::Rejected(Error::internal(message)))
            }
        }
    }

    fn restore(&mut self, change: &mut Change<'_>, mut document: Document) -> Result<Outcome> {
        self.drop_staged(change, document.id)?;
        document.staged_chunks = 0;
        if document.state == DocumentState::InProgress {
            document.version = change.version;
            document.stage = Stage::Queued;
            document.attempts = 0;
        }
        change.put_document(&document);
        Ok(Outcome::Document(Box::new(document)))
    }

    fn accept(&mut self, change: &mut Change<'_>, mut fresh: Document) -> Result<Outcome> {
        if let Some(known) = self.document(fresh.id)? {
            let same = known.blob == fresh.blob && known.chunker == fresh.chunker;
            let alive = matches!(known.state, DocumentState::InProgress | DocumentState::Completed);
            if same && alive {
                // The same bytes again are no work; new attributes are.
                if known.attributes == fresh.attributes && known.filename == fresh.filename {
                    return Ok(Outcome::Document(Box::new(known)));
                }
                if known.state == DocumentState::Completed && known.filename == fresh.filename {
                    return self.set_attributes(change, fresh.id, fresh.attributes);
                }
            }
            fresh.created_at = known.created_at;
            fresh.published = known.published;
            self.drop_staged(change, fresh.id)?;
        }
        change.put_document(&fresh);
        Ok(Outcome::Document(Box::new(fresh)))
    }

    fn stage(
        &mut self,
        change: &mut Change<'_>,
        id: DocumentId,
        version: u64,
        first: u32,
        points: &[Point],
    ) -> Result<Outcome> {
        if let Some(refused) = points.iter().find_map(|point| check_point(&self.config, point).err()) {
            return Ok(Outcome::Rejected(refused));
        }
        let staged = points.len() as u32;
        let outcome = self.edit(change, id, version, |document| {
            if first != document.staged_chunks {
                let message = format!("chunks up to {} are staged, not {first}", document.staged_chunks);
                return Err(Error::new(ErrorCode::Conflict, message));
            }
            document.staged_chunks += staged;
            document.stage = Stage::Embedding;
            Ok(())
        })?;
        if matches!(outcome, Outcome::Document(_)) {
            for (index, point) in (first..).zip(points) {
                change.batch.put(keys::staged(id, Some(version), Some(index)), codec::encode(point));
            }
        }
        Ok(outcome)
    }

    fn publish(
        &mut self,
        change: &mut Change<'_>,
        id: DocumentId,
        version: u64,
        chunks: u32,
    ) -> Result<Outcome> {
        let before = self.document(id)?;
        let prefix = keys::staged(id, Some(version), None);
        let staged: Vec<(Vec<u8>, Vec<u8>)> = self.store.scan(&prefix).collect::<Result<_>>()?;
        let outcome = self.edit(change, id, version, |document| {
            if document.staged_chunks != chunks || staged.len() != chunks as usize {
                let message = format!("{} of {chunks} chunks are staged", document.staged_chunks);
                return Err(Error::new(ErrorCode::Conflict, message));
            }
            document.state = DocumentState::Completed;
            document.stage = Stage::Published;
            document.error = None;
            document.total_chunks = chunks;
            document.published = Some((version, chunks));
            Ok(())
        })?;
        let (Outcome::Document(_), Some(before)) = (&outcome, before) else { return Ok(outcome) };
        self.drop_published(change, &before)?;
        for (key, value) in staged {
            let point: Point = decode(&key, &value)?;
            self.put_point(change, point)?;
            change.batch.remove(key);
        }
        Ok(outcome)
    }

    fn set_attributes(
        &mut self,
        change: &mut Change<'_>,
        id: DocumentId,
        attributes: String,
    ) -> Result<Outcome> {
        let Some(mut document) = self.document(id)? else { return Ok(Outcome::Absent) };
        let old = crate::state::parse_payload(&document.attributes);
        let new = crate::state::parse_payload(&attributes);
        if let Some((version, chunks)) = document.published {
            for index in 0..chunks {
                let point = id.chunk_point(version, index);
                let Some(slot) = self.slot_in(change.batch, point)? else { continue };
                let Some(mut record) = crate::state::read_point(&self.store, slot)? else { continue };
                let before = record.payload_map();
                let mut after = before.clone();
                old.keys().for_each(|key| drop(after.shift_remove(key)));
                after.extend(new.clone());
                record.payload = Value::Object(after).to_string();
                record.version = change.index;
                change.batch.put(keys::point(slot), codec::encode(&record));
                change.effects.push(crate::state::Effect::Edited { slot, before, payload: record.payload });
            }
        }
        document.attributes = attributes;
        document.updated_at = change.now;
        if document.state == DocumentState::InProgress {
            // What is staged carries the old attributes: the work starts over as a new version.
            self.drop_staged(change, id)?;
            document.version = change.version;
            document.staged_chunks = 0;
            document.stage = Stage::Queued;
        }
        change.put_document(&document);
        Ok(Outcome::Document(Box::new(document)))
    }

    /// Edits the record of a document in progress. News about another version, or about a
    /// document that has ended, is too late and refused.
    fn edit(
        &mut self,
        change: &mut Change<'_>,
        id: DocumentId,
        version: u64,
        edit: impl FnOnce(&mut Document) -> std::result::Result<(), Error>,
    ) -> Result<Outcome> {
        let Some(mut document) = self.document(id)? else { return Ok(Outcome::Absent) };
        if document.version != version || document.state != DocumentState::InProgress {
            let message =
                format!("{id} is at version {} and no longer in progress at {version}", document.version);
            return Ok(Outcome::Rejected(Error::new(ErrorCode::Conflict, message)));
        }
        if let Err(refused) = edit(&mut document) {
            return Ok(Outcome::Rejected(refused));
        }
        document.updated_at = change.now;
        change.put_document(&document);
        Ok(Outcome::Document(Box::new(document)))
    }

    fn drop_published(&self, change: &mut Change<'_>, document: &Document) -> Result<()> {
        let Some((version, chunks)) = document.published else { return Ok(()) };
        for index in 0..chunks {
            let point = document.id.chunk_point(version, index);
            if let Some(slot) = self.slot_in(change.batch, point)? {
                self.remove_point(change, point, slot);
            }
        }
        Ok(())
    }

    fn drop_staged(&self, change: &mut Change<'_>, id: DocumentId) -> Result<()> {
        for item in self.store.scan(&keys::staged(id, None, None)) {
            change.batch.remove(item?.0);
        }
        Ok(())
    }

    pub(crate) fn document(&self, id: DocumentId) -> Result<Option<Document>> {
        let key = keys::document(id);
        self.store.get(&key)?.map(|value| decode(&key, &value)).transpose()
    }

    pub(crate) fn file(&self, id: DocumentId) -> Result<Option<FileRecord>> {
        let key = keys::file(id);
        self.store.get(&key)?.map(|value| decode(&key, &value)).transpose()
    }
}
