//! A shard's state: the store, and what is derived from it in memory and in files.
//!
//! A command becomes one store batch, and the derived parts follow it before the next command
//! is looked at. Everything here is deterministic: slots are given out in log order, so every
//! replica's store holds the same bytes at the same position.

use std::collections::{BTreeMap, BTreeSet, HashMap, VecDeque};
use std::path::Path;
use std::sync::Arc;

use roaring::RoaringBitmap;
use serde::{Deserialize, Serialize};
use serde_json::{Map, Value};
use shoal_proto::planted::{Bug, is_planted};
use shoal_proto::{
    CollectionConfig, Distance, DocumentId, Error, FieldType, Filter, PointId, RequestId, codec,
};

use crate::command::{Command, Document, DocumentState, Envelope, Outcome, PayloadMode, Point, Target};
use crate::distance::normalize;
use crate::error::{self, Result};
use crate::keys;
use crate::payload::FieldIndex;
use crate::reshard::{Adoption, Range};
use crate::store::{Batch, Store};
use crate::text::TextIndex;
use crate::vectors::Vectors;

/// The sum over the state is taken at every index that this divides, so that replicas can be
/// compared.
const SUM_EVERY: u64 = 256;
/// How many of the latest sums are kept.
const KEPT_SUMS: usize = 32;
/// How many answered requests a shard remembers.
pub const REMEMBERED_REQUESTS: usize = 10_000;

/// What is stored of a point besides its vectors.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub(crate) struct PointRecord {
    pub(crate) id: PointId,
    /// The log index that wrote the point last.
    pub(crate) version: u64,
    /// One JSON object, or empty.
    pub(crate) payload: String,
}

impl PointRecord {
    pub(crate) fn payload_map(&self) -> Map<String, Value> {
        parse_payload(&self.payload)
    }
}

/// A stored payload was checked when it was proposed; anything else reads as empty.
pub(crate) fn parse_payload(text: &str) -> Map<String, Value> {
    serde_json::from_str(text).unwrap_or_default()
}

pub(crate) struct State {
    pub(crate) config: CollectionConfig,
    pub(crate) store: Arc<Store>,
    pub(crate) live: RoaringBitmap,
    pub(crate) next_slot: u32,
    pub(crate) indexes: BTreeMap<String, FieldIndex>,
    pub(crate) vectors: BTreeMap<String, Arc<Vectors>>,
    pub(crate) text: Option<Arc<TextIndex>>,
    answered: HashMap<RequestId, u64>,
    order: VecDeque<(u64, RequestId)>,
    /// Documents in progress, so that finding them does not scan all.
    pub(crate) in_progress: BTreeSet<DocumentId>,
    pub(crate) applied: u64,
    /// What is numbered by log index counts from here.
    pub(crate) base: u64,
    /// The change of shards that has frozen this one.
    pub(crate) frozen: Option<RequestId>,
    /// What it takes over, or has taken over, from other shards.
    pub(crate) adoption: Option<Adoption>,
    /// Requests that were not done everywhere, with the ranges in which they were.
    pub(crate) partial: HashMap<RequestId, Vec<Range>>,
    /// Indexes that were applied here, with the sum over the state then, oldest first.
    pub(crate) sums: VecDeque<(u64, u64)>,
}

impl State {
    /// Opens a shard's state and brings everything derived up to date with the store.
    pub(crate) fn open(dir: &Path, config: CollectionConfig) -> Result<State> {
        State::with_store(Store::open(&dir.join("store"))?, dir, config)
    }

    /// As [`State::open`], with a store that is open already: sled lets go of a store's lock only
    /// some time after it was dropped.
    pub(crate) fn with_store(store: Store, dir: &Path, config: CollectionConfig) -> Result<State> {
        let store = Arc::new(store);
        let next_slot = read_meta(&store, keys::NEXT_SLOT)?.unwrap_or(0);
        let base = read_meta(&store, keys::BASE)?.unwrap_or(0);
        let frozen = read_meta(&store, keys::FROZEN)?;
        let adoption = read_meta::<Option<Adoption>>(&store, keys::ADOPTION)?.flatten();
        let kinds: BTreeMap<String, FieldType> =
            read_meta(&store, keys::INDEXES)?.unwrap_or_else(|| config.payload_indexes.clone());
        let mut vectors = BTreeMap::new();
        for (name, params) in &config.vectors {
            let folder = if name.is_empty() { "default".to_owned() } else { format!("named-{}", hex(name)) };
            let opened = Vectors::open(&dir.join("graphs").join(folder), params.clone())?;
            vectors.insert(name.clone(), Arc::new(opened));
        }
        let text = match config.text_fields.is_empty() {
            true => None,
            false => Some(Arc::new(TextIndex::open(&dir.join("text"))?)),
        };
        let indexes = kinds.into_iter().map(|(path, kind)| (path, FieldIndex::new(kind))).collect();
        let mut state = State {
            config,
            store,
            live: RoaringBitmap::new(),
            next_slot,
            indexes,
            vectors,
            text,
            answered: HashMap::new(),
            order: VecDeque::new(),
            in_progress: BTreeSet::new(),
            applied: 0,
            base,
            frozen,
            adoption,
            partial: HashMap::new(),
            sums: VecDeque::new(),
        };
        state.recover()?;
        Ok(state)
    }

    /// The live slots, and every slot that will be given out in the next while: background work
    /// that goes by a copy must not take for dead what was written after the copy was made.
    pub(crate) fn live_and_newer(&self) -> RoaringBitmap {
        const NEWER_SLOTS: u32 = 1 << 20;
        let mut live = self.live.clone();
        live.insert_range(self.next_slot..self.next_slot.saturating_add(NEWER_SLOTS));
        live
    }

    fn recover(&mut self) -> Result<()> {
        for item in self.store.scan(&[keys::REQUEST]) {
            let (key, value) = item?;
            let sequence = u64::from_be_bytes(key[1..].try_into().expect("a request key has nine bytes"));
            let (id, _): (RequestId, Outcome) = decode(&key, &value)?;
            self.answered.insert(id, sequence);
            self.order.push_back((sequence, id));
        }
        self.recover_partial()?;
        for item in self.store.scan(&[keys::DOCUMENT]) {
            let (key, value) = item?;
            let document: Document = decode(&key, &value)?;
            if document.state == DocumentState::InProgress {
                self.in_progress.insert(document.id);
            }
        }
        let committed = match &self.text {
            Some(text) => text.committed()?,
            None => 0,
        };
        let needs_payload = !self.indexes.is_empty() || self.text.is_some();
        let mut newest = 0;
        for item in self.store.scan(&[keys::POINT]) {
            let (key, value) = item?;
            let slot = u32::from_be_bytes(key[1..].try_into().expect("a point key has five bytes"));
            let record: PointRecord = decode(&key, &value)?;
            newest = newest.max(record.version);
            self.live.insert(slot);
            if !needs_payload {
                continue;
            }
            let payload = record.payload_map();
            for (path, index) in &mut self.indexes {
                index.insert(slot, path, &payload);
            }
            if let Some(text) = self.text.as_ref().filter(|_| record.version > committed) {
                text.put(slot, &text_of(&self.config, &payload));
            }
        }
        // Versions count from the base, which may have been raised since.
        self.applied = newest.saturating_sub(self.base);
        for (name, vectors) in &self.vectors {
            let covered = vectors.covered();
            for slot in &self.live - &covered {
                if let Some(vector) = read_vector(&self.store, slot, name)? {
                    vectors.add(slot, &vector);
                }
            }
        }
        Ok(())
    }

    /// Applies one entry. `command` is absent for entries that are Raft's own.
    pub(crate) fn apply(&mut self, index: u64, tag: Vec<u8>, command: Option<&[u8]>) -> Result<Vec<u8>> {
        // Another replica may know how to read it: going on without it would diverge.
        let unreadable = |error: codec::CodecError| error::Error::Unreadable {
            key: format!("log entry {index}"),
            reason: error.to_string(),
        };
        let envelope = command.map(codec::decode::<Envelope>).transpose().map_err(unreadable)?;
        let outcome = match envelope {
            Some(Envelope { command: Command::Replay(replay), .. }) => self.replay(index, tag, *replay)?,
            envelope => self.apply_one(index, tag, envelope)?,
        };
        self.applied = index;
        if index.is_multiple_of(SUM_EVERY) {
            self.sums.push_back((index, self.store.sum()?));
            if self.sums.len() > KEPT_SUMS {
                self.sums.pop_front();
            }
        }
        Ok(codec::encode(&outcome))
    }

    fn apply_one(&mut self, index: u64, tag: Vec<u8>, envelope: Option<Envelope>) -> Result<Outcome> {
        let mut batch = Batch::default();
        batch.put(keys::TAG.to_vec(), tag);
        let mut effects = Vec::new();
        let outcome = match envelope {
            None => Outcome::Done(0),
            Some(envelope) => {
                let remembered = self.answered(envelope.request_id)?;
                let left = match (envelope.request_id, &remembered) {
                    (Some(id), Some(_)) => self.left_of(id, &envelope.command),
                    _ => vec![envelope.command],
                };
                // Not remembered: a shard that thaws answers otherwise.
                let refusal = left.first().and_then(|command| self.refuses(command));
                match (refusal, remembered) {
                    (Some(refusal), _) => refusal,
                    (None, Some(outcome)) if left.is_empty() => outcome,
                    (None, remembered) => {
                        let number = self.base + index;
                        let mut change = Change {
                            index: number,
                            version: number,
                            now: envelope.now,
                            batch: &mut batch,
                            effects: Vec::new(),
                        };
                        let mut outcome = Outcome::Done(0);
                        for command in left {
                            outcome = match command {
                                Command::Seed(seed) => self.seed(&mut change, index, *seed)?,
                                Command::SeedPartial(seed) => self.seed_partial(&mut change, index, *seed),
                                command => self.transition(&mut change, command)?,
                            };
                        }
                        effects = change.effects;
                        match (envelope.request_id, remembered) {
                            (Some(id), Some(_)) => self.note_whole(&mut batch, id),
                            (Some(id), None) => self.remember(&mut batch, number, id, &outcome),
                            (None, _) => {}
                        }
                        batch.put(keys::NEXT_SLOT.to_vec(), codec::encode(&self.next_slot));
                        outcome
                    }
                }
            }
        };
        self.store.commit(batch)?;
        for effect in effects {
            self.follow(effect)?;
        }
        Ok(outcome)
    }

    pub(crate) fn has_answered(&self, id: RequestId) -> bool {
        self.answered.contains_key(&id)
    }

    /// What a request was answered, if it is remembered.
    pub(crate) fn answered(&self, id: Option<RequestId>) -> Result<Option<Outcome>> {
        if is_planted(Bug::RetryAppliedTwice) {
            return Ok(None);
        }
        let Some(sequence) = id.and_then(|id| self.answered.get(&id)) else { return Ok(None) };
        let key = keys::request(*sequence);
        let stored = self.store.get(&key)?.unwrap_or_default();
        let (_, outcome): (RequestId, Outcome) = decode(&key, &stored)?;
        Ok(Some(outcome))
    }

    pub(crate) fn remember(&mut self, batch: &mut Batch, index: u64, id: RequestId, outcome: &Outcome) {
        batch.put(keys::request(index), codec::encode(&(id, outcome)));
        self.answered.insert(id, index);
        self.order.push_back((index, id));
        // Two at a time: a shard that has taken over others has more than it is to keep.
        for _ in 0..2 {
            if self.order.len() <= self.most_remembered() {
                break;
            }
            let Some((sequence, id)) = self.order.pop_front() else { break };
            batch.remove(keys::request(sequence));
            self.answered.remove(&id);
            self.note_whole(batch, id);
        }
    }

    pub(crate) fn transition(&mut self, change: &mut Change<'_>, command: Command) -> Result<Outcome> {
        match command {
            Command::Upsert(points) => self.upsert(change, points),
            Command::Delete(target) => {
                let slots = match self.resolve(change.batch, &target) {
                    Ok(slots) => slots?,
                    Err(refused) => return Ok(Outcome::Rejected(refused)),
                };
                for (id, slot) in &slots {
                    self.remove_point(change, *id, *slot);
                }
                Ok(Outcome::Done(slots.len() as u64))
            }
            Command::SetPayload { target, payload, mode } => {
                let given = parse_payload(&payload);
                self.edit_payloads(change, &target, |payload| match mode {
                    PayloadMode::Overwrite => *payload = given.clone(),
                    PayloadMode::Merge => payload.extend(given.clone()),
                })
            }
            Command::DeletePayload { target, keys } => {
                self.edit_payloads(change, &target, |payload| match &keys {
                    None => payload.clear(),
                    Some(keys) => keys.iter().for_each(|key| drop(payload.shift_remove(key))),
                })
            }
            Command::SetPayloadIndex { field, index } => self.set_index(change, field, index),
            Command::EndAdoption { by } => Ok(self.end_adoption(change.batch, by)),
            Command::Freeze { by } => Ok(self.freeze(change.batch, by)),
            Command::Thaw { by } => Ok(self.thaw(change.batch, by)),
            document => self.transition_document(change, document),
        }
    }

    pub(crate) fn upsert(&mut self, change: &mut Change<'_>, points: Vec<Point>) -> Result<Outcome> {
        if let Some(refused) = points.iter().find_map(|point| check_point(&self.config, point).err()) {
            return Ok(Outcome::Rejected(refused));
        }
        let count = points.len() as u64;
        for point in points {
            self.put_point(change, point)?;
        }
        Ok(Outcome::Done(count))
    }

    /// Writes a point that was checked. The newest slot wins, also within one batch.
    pub(crate) fn put_point(&mut self, change: &mut Change<'_>, mut point: Point) -> Result<()> {
        for (name, vector) in &mut point.vectors {
            if self.config.vectors.get(name).is_some_and(|params| params.distance == Distance::Cosine) {
                normalize(vector);
            }
        }
        self.put_normal_point(change, point)
    }

    /// Writes a point whose vectors are as they are to be stored.
    pub(crate) fn put_normal_point(&mut self, change: &mut Change<'_>, point: Point) -> Result<()> {
        if let Some(old) = self.slot_in(change.batch, point.id)? {
            self.remove_point(change, point.id, old);
        }
        let slot = self.next_slot;
        self.next_slot = self.next_slot.checked_add(1).ok_or_else(|| {
            error::Error::Refused(Error::internal("the shard has used up its slots and must be rebuilt"))
        })?;
        for (name, vector) in &point.vectors {
            change.batch.put(keys::vector(slot, name), bytemuck::cast_slice(vector).to_vec());
        }
        let record = PointRecord { id: point.id, version: change.index, payload: point.payload };
        change.batch.put(keys::id(point.id), slot.to_be_bytes().to_vec());
        change.batch.put(keys::point(slot), codec::encode(&record));
        change.effects.push(Effect::Added { slot, vectors: point.vectors, payload: record.payload });
        Ok(())
    }

    pub(crate) fn remove_point(&self, change: &mut Change<'_>, id: PointId, slot: u32) {
        change.batch.remove(keys::id(id));
        change.batch.remove(keys::point(slot));
        for name in self.config.vectors.keys() {
            change.batch.remove(keys::vector(slot, name));
        }
        change.effects.push(Effect::Removed { slot });
    }

    /// The slot of a point, as the batch would leave it.
    pub(crate) fn slot_in(&self, batch: &Batch, id: PointId) -> Result<Option<u32>> {
        let key = keys::id(id);
        let slot = match batch.get(&key) {
            Some(value) => value.map(<[u8]>::to_vec),
            None => self.store.get(&key)?,
        };
        Ok(slot.map(|bytes| u32::from_be_bytes(bytes.try_into().unwrap_or_default())))
    }

    /// The points of a target. The outer error is the caller's, the inner one is ours.
    fn resolve(&self, batch: &Batch, target: &Target) -> Result<Result<Vec<(PointId, u32)>>, Error> {
        match target {
            Target::Ids(ids) => {
                let mut ids = ids.clone();
                ids.sort_unstable();
                ids.dedup();
                let found = ids.into_iter().filter_map(|id| {
                    self.slot_in(batch, id).map(|slot| slot.map(|slot| (id, slot))).transpose()
                });
                Ok(found.collect())
            }
            Target::Filter(filter) => Ok(self.matching(&read_filter(filter)?)),
            Target::FilterWithin { filter, first, last } => {
                let mut found = self.matching(&read_filter(filter)?);
                if let Ok(found) = &mut found {
                    found.retain(|(id, _)| (first..=last).contains(&&id.route()));
                }
                Ok(found)
            }
        }
    }

    fn matching(&self, filter: &Filter) -> Result<Vec<(PointId, u32)>> {
        let mut found = Vec::new();
        for slot in self.candidates(filter).slots {
            if let Some(record) = read_point(&self.store, slot)?
                && filter.matches(record.id, &record.payload_map())
            {
                found.push((record.id, slot));
            }
        }
        Ok(found)
    }

    fn edit_payloads(
        &mut self,
        change: &mut Change<'_>,
        target: &Target,
        edit: impl Fn(&mut Map<String, Value>),
    ) -> Result<Outcome> {
        let slots = match self.resolve(change.batch, target) {
            Ok(slots) => slots?,
            Err(refused) => return Ok(Outcome::Rejected(refused)),
        };
        for (_, slot) in &slots {
            let Some(mut record) = read_point(&self.store, *slot)? else { continue };
            let before = record.payload_map();
            let mut after = before.clone();
            edit(&mut after);
            record.payload = Value::Object(after).to_string();
            record.version = change.index;
            change.batch.put(keys::point(*slot), codec::encode(&record));
            change.effects.push(Effect::Edited { slot: *slot, before, payload: record.payload });
        }
        Ok(Outcome::Done(slots.len() as u64))
    }

    pub(crate) fn set_index(
        &mut self,
        change: &mut Change<'_>,
        field: String,
        index: Option<FieldType>,
    ) -> Result<Outcome> {
        match index {
            None => drop(self.indexes.remove(&field)),
            Some(kind) => {
                let mut built = FieldIndex::new(kind);
                for slot in &self.live {
                    if let Some(record) = read_point(&self.store, slot)? {
                        built.insert(slot, &field, &record.payload_map());
                    }
                }
                self.indexes.insert(field, built);
            }
        }
        let kinds: BTreeMap<&String, FieldType> =
            self.indexes.iter().map(|(path, index)| (path, index.kind())).collect();
        change.batch.put(keys::INDEXES.to_vec(), codec::encode(&kinds));
        Ok(Outcome::Done(0))
    }

    /// Brings what is derived up to date with what was committed.
    pub(crate) fn follow(&mut self, effect: Effect) -> Result<()> {
        match effect {
            Effect::Added { slot, vectors, payload } => {
                self.live.insert(slot);
                for (name, vector) in &vectors {
                    if let Some(index) = self.vectors.get(name) {
                        index.add(slot, vector);
                    }
                }
                if !self.indexes.is_empty() || self.text.is_some() {
                    let payload = parse_payload(&payload);
                    for (path, index) in &mut self.indexes {
                        index.insert(slot, path, &payload);
                    }
                    if let Some(text) = &self.text {
                        text.put(slot, &text_of(&self.config, &payload));
                    }
                }
            }
            Effect::Removed { slot } => {
                self.live.remove(slot);
            }
            Effect::Document { id, is_in_progress: true } => {
                self.in_progress.insert(id);
            }
            Effect::Document { id, is_in_progress: false } => {
                self.in_progress.remove(&id);
            }
            Effect::Edited { slot, before, payload } => {
                let payload = parse_payload(&payload);
                for (path, index) in &mut self.indexes {
                    index.remove(slot, path, &before);
                    index.insert(slot, path, &payload);
                }
                if let Some(text) = &self.text {
                    text.put(slot, &text_of(&self.config, &payload));
                }
            }
        }
        Ok(())
    }
}

fn read_filter(text: &str) -> Result<Filter, Error> {
    let value = serde_json::from_str(text).map_err(|error| Error::invalid("filter", error))?;
    Filter::parse(&value, "filter")
}

/// One command on its way into the store.
pub(crate) struct Change<'a> {
    /// What is written now is numbered so.
    pub(crate) index: u64,
    /// The version of a document that is accepted now: another number only where another shard's log is
    /// replayed.
    pub(crate) version: u64,
    pub(crate) now: u64,
    pub(crate) batch: &'a mut Batch,
    pub(crate) effects: Vec<Effect>,
}

impl Change<'_> {
    /// Writes a document's record.
    pub(crate) fn put_document(&mut self, document: &Document) {
        self.batch.put(keys::document(document.id), codec::encode(document));
        let is_in_progress = document.state == DocumentState::InProgress;
        self.effects.push(Effect::Document { id: document.id, is_in_progress });
    }
}

/// What the derived parts must do once the batch is in.
pub(crate) enum Effect {
    Added { slot: u32, vectors: Vec<(String, Vec<f32>)>, payload: String },
    Removed { slot: u32 },
    Edited { slot: u32, before: Map<String, Value>, payload: String },
    Document { id: DocumentId, is_in_progress: bool },
}

/// Checks a point against the schema: the same before proposing and when applying.
///
/// # Errors
/// [`shoal_proto::ErrorCode::InvalidArgument`] that names the vector.
pub fn check_point(config: &CollectionConfig, point: &Point) -> Result<(), Error> {
    for (name, vector) in &point.vectors {
        let field = if name.is_empty() { "vector".to_owned() } else { format!("vector.{name}") };
        check_vector(config, name, vector, &field)?;
    }
    let duplicate = point
        .vectors
        .iter()
        .enumerate()
        .find(|(i, (name, _))| point.vectors[..*i].iter().any(|(n, _)| n == name));
    if let Some((_, (name, _))) = duplicate {
        return Err(Error::invalid(format!("vector.{name}"), "given twice"));
    }
    let missing =
        config.vectors.keys().find(|name| name.is_empty() && point.vectors.iter().all(|(n, _)| n != *name));
    match missing {
        Some(_) => Err(Error::invalid("vector", format!("point {} has no vector", point.id))),
        None => Ok(()),
    }
}

/// Checks one vector: known name, right dimension, finite, and not zero under cosine.
///
/// # Errors
/// [`shoal_proto::ErrorCode::InvalidArgument`] that names the field.
pub fn check_vector(config: &CollectionConfig, name: &str, vector: &[f32], field: &str) -> Result<(), Error> {
    let params = config.vectors.get(name).ok_or_else(|| {
        let what = if name.is_empty() {
            "Not existing vector name error: the collection has only named vectors".to_owned()
        } else {
            format!("Not existing vector name error: {name}")
        };
        Error::invalid(field, what)
    })?;
    if vector.len() != params.size {
        let message = format!("Vector dimension error: expected dim: {}, got {}", params.size, vector.len());
        return Err(Error::invalid(field, message));
    }
    if let Some(at) = vector.iter().position(|x| !x.is_finite()) {
        return Err(Error::invalid(format!("{field}[{at}]"), "is not a finite number"));
    }
    if params.distance == Distance::Cosine && vector.iter().all(|x| *x == 0.0) {
        return Err(Error::invalid(field, "a zero vector has no direction, which cosine needs"));
    }
    Ok(())
}

/// The text of a payload that full-text search sees.
pub(crate) fn text_of(config: &CollectionConfig, payload: &Map<String, Value>) -> String {
    let mut text = String::new();
    for field in &config.text_fields {
        for value in shoal_proto::filter::values_at(payload, field) {
            if let Some(value) = value.as_str() {
                text.push_str(value);
                text.push('\n');
            }
        }
    }
    text
}

pub(crate) fn read_point(store: &Store, slot: u32) -> Result<Option<PointRecord>> {
    let key = keys::point(slot);
    store.get(&key)?.map(|value| decode(&key, &value)).transpose()
}

pub(crate) fn read_vector(store: &Store, slot: u32, name: &str) -> Result<Option<Vec<f32>>> {
    let bytes = store.get(&keys::vector(slot, name))?;
    Ok(bytes.map(|bytes| bytemuck::allocation::pod_collect_to_vec(&bytes)))
}

pub(crate) fn decode<T: serde::de::DeserializeOwned>(key: &[u8], value: &[u8]) -> Result<T> {
    codec::decode(value).map_err(|error| error::Error::Unreadable {
        key: key.escape_ascii().to_string(),
        reason: error.to_string(),
    })
}

pub(crate) fn read_meta<T: serde::de::DeserializeOwned>(store: &Store, key: &[u8]) -> Result<Option<T>> {
    store.get(key)?.map(|value| decode(key, &value)).transpose()
}

fn hex(name: &str) -> String {
    name.bytes().map(|byte| format!("{byte:02x}")).collect()
}
