//! Answering questions: search with its planner, point reads, scroll, count, documents.

use std::cell::RefCell;
use std::collections::HashMap;
use std::sync::Arc;

use roaring::RoaringBitmap;
use serde_json::{Map, Value};
use shoal_proto::{Distance, Error, Filter, PointId};

use crate::command::{Answer, Document, DocumentState, Hit, Leg, Read, Search, Select, Stats};
use crate::distance::{is_nearer, normalize, score};
use crate::error::Result;
use crate::keys;
use crate::payload::estimate;
use crate::state::{State, check_vector, decode, read_point, read_vector};
use crate::vectors::{GRAPH_MIN_VECTORS, Scored};

/// The most points of a filter's that are scored one by one, of so many in all; a filter that
/// keeps more goes through the graph as a mask. A graph search costs about as much as scoring
/// 1,300 points, and with a mask the more the less it keeps, so both cost the same near the square
/// root of 1,300 times all (measured at 100,000 points of 384 dimensions).
pub fn score_all_points(all: u64) -> u64 {
    (all / 8).min((all * 1300).isqrt()).max(GRAPH_MIN_VECTORS as u64)
}

/// The most hits of a question that counts as cheap.
const CHEAP_HITS: usize = 100;
/// The most numbers that a cheap question scans: about 200 microseconds of work.
const CHEAP_SCAN: u64 = 1 << 20;
/// The most candidates in a graph that a cheap question asks for.
const CHEAP_EF: usize = 256;

/// The points that a filter may keep.
pub(crate) struct Candidates {
    /// Live slots: a superset of those that match.
    pub(crate) slots: RoaringBitmap,
    /// Whether each of them matches, so that payloads need not be read.
    pub(crate) is_exact: bool,
}

impl State {
    pub(crate) fn candidates(&self, filter: &Filter) -> Candidates {
        let estimate = estimate(filter, &self.indexes);
        match estimate.slots {
            Some(slots) => Candidates { slots: slots & &self.live, is_exact: estimate.is_exact },
            None => {
                let is_exact = *filter == Filter::default();
                Candidates { slots: self.live.clone(), is_exact }
            }
        }
    }

    pub(crate) fn read(&self, question: &Read) -> Result<Answer> {
        match question {
            Read::Search(search) => self.search(search),
            Read::Get { ids, payload, vectors } => {
                let mut hits = Vec::new();
                for id in ids {
                    if let Some(slot) = self.slot_of(*id)? {
                        hits.extend(self.hit(slot, 0.0, payload, vectors)?);
                    }
                }
                Ok(Answer::Points(hits))
            }
            Read::Scroll { from, filter, limit, payload, vectors } => {
                self.scroll(*from, filter.as_deref(), *limit, payload, vectors)
            }
            Read::Count { filter } => self.count(filter.as_deref()),
            Read::GetFile(id) => Ok(Answer::Files(self.file(*id)?.into_iter().collect())),
            Read::ListFiles => {
                let files = self
                    .store
                    .scan(&[keys::FILE])
                    .map(|item| item.and_then(|(key, value)| decode(&key, &value)));
                Ok(Answer::Files(files.collect::<Result<_>>()?))
            }
            Read::GetDocument(id) => Ok(Answer::Documents(self.document(*id)?.into_iter().collect())),
            Read::ListDocuments(Some(DocumentState::InProgress)) => {
                let documents = self.in_progress.iter().map(|id| self.document(*id).map(Option::into_iter));
                Ok(Answer::Documents(documents.collect::<Result<Vec<_>>>()?.into_iter().flatten().collect()))
            }
            Read::ListDocuments(state) => {
                let mut documents = self.all_documents()?;
                documents.retain(|document| state.is_none_or(|state| document.state == state));
                Ok(Answer::Documents(documents))
            }
            Read::GetChunks(id) => self.chunks(*id),
            Read::Stats => self.stats(),
        }
    }

    /// Whether a question takes at most a few hundred microseconds: a few points by id, or a
    /// search of the graphs without a filter while little waits to be taken in by them.
    pub(crate) fn is_cheap(&self, question: &Read) -> bool {
        match question {
            Read::Get { ids, .. } => ids.len() <= CHEAP_HITS,
            Read::ListDocuments(Some(DocumentState::InProgress)) => self.in_progress.len() <= CHEAP_HITS,
            Read::Count { filter: None } | Read::GetFile(_) | Read::GetDocument(_) => true,
            Read::Search(Search { legs, filter: None, limit, .. }) => {
                legs.len() == 1 && *limit <= CHEAP_HITS && legs.iter().all(|leg| self.is_cheap_leg(leg))
            }
            _ => false,
        }
    }

    fn is_cheap_leg(&self, leg: &Leg) -> bool {
        let (using, exact, ef) = match leg {
            Leg::Dense { using, exact, ef, .. } => (using, *exact, *ef),
            Leg::Text { .. } => return false,
        };
        let Some(index) = self.vectors.get(using) else { return true };
        let (indexed, pending) = index.sizes();
        let scanned = pending + if exact { indexed } else { 0 };
        scanned * index.params().size as u64 <= CHEAP_SCAN && ef.is_none_or(|ef| ef <= CHEAP_EF)
    }

    fn slot_of(&self, id: PointId) -> Result<Option<u32>> {
        self.slot_in(&crate::store::Batch::default(), id)
    }

    fn search(&self, search: &Search) -> Result<Answer> {
        let filter = parse_filter(search.filter.as_deref())?;
        let candidates = filter.as_ref().map(|filter| self.candidates(filter));
        let mask = Mask {
            state: self,
            filter: filter.as_ref(),
            candidates: candidates.as_ref(),
            known: RefCell::default(),
        };
        let lists = search.legs.iter().map(|leg| {
            let (distance, scored) = match leg {
                Leg::Dense { using, vector, exact, ef } => {
                    self.dense(using, vector, search.limit, *exact, *ef, &mask)?
                }
                Leg::Text { query } => (Distance::Dot, self.words(query, search.limit, &mask)?),
            };
            let passes =
                |score: f32| search.score_threshold.is_none_or(|worst| !is_nearer(distance, worst, score));
            let mut hits = Vec::with_capacity(scored.len());
            for Scored { slot, score } in scored.into_iter().filter(|scored| passes(scored.score)) {
                hits.extend(self.hit(slot, score, &search.payload, &search.vectors)?);
            }
            Ok(hits)
        });
        Ok(Answer::Lists(lists.collect::<Result<_>>()?))
    }

    fn dense(
        &self,
        using: &str,
        vector: &[f32],
        limit: usize,
        exact: bool,
        ef: Option<usize>,
        mask: &Mask<'_>,
    ) -> Result<(Distance, Vec<Scored>)> {
        check_vector(&self.config, using, vector, "query")?;
        let index = self.vectors.get(using).ok_or_else(|| Error::invalid("using", "no such vector"))?;
        let distance = index.params().distance;
        let mut query = vector.to_vec();
        if distance == Distance::Cosine {
            normalize(&mut query);
        }
        let few = mask.candidates.map_or(self.live.len(), |candidates| candidates.slots.len());
        let found = if exact
            || few <= GRAPH_MIN_VECTORS as u64
            || (mask.filter.is_some() && few <= score_all_points(self.live.len()))
        {
            let all = mask.matching_all()?;
            index.search_exact(&query, limit, &all)?
        } else {
            // Nothing is dead in the graphs when every slot that they hold is live.
            let (indexed, pending) = index.sizes();
            let has_one_vector = self.config.vectors.len() == 1 && using.is_empty();
            let all_live = has_one_vector && mask.filter.is_none() && indexed + pending == self.live.len();
            index.search(&query, limit, ef, &|slot| mask.keeps(slot), all_live)?
        };
        let mut scored = Vec::with_capacity(found.len());
        for candidate in found.into_iter().filter(|candidate| self.live.contains(candidate.slot)) {
            // Graph scores carry the error of the graph's number format: the stored vector
            // gives the score that every replica gives.
            if let Some(stored) = self.vector(candidate.slot, using)? {
                scored.push(Scored { slot: candidate.slot, score: score(distance, &query, &stored) });
            }
        }
        scored.sort_by(|a, b| {
            let order = b.score.total_cmp(&a.score);
            let order = if distance.higher_is_nearer() { order } else { order.reverse() };
            order.then(a.slot.cmp(&b.slot))
        });
        scored.truncate(limit);
        Ok((distance, scored))
    }

    fn words(&self, query: &str, limit: usize, mask: &Mask<'_>) -> Result<Vec<Scored>> {
        let text =
            self.text.as_ref().ok_or_else(|| Error::invalid("query", "the collection has no text fields"))?;
        let allowed = Arc::new(match mask.filter {
            None => self.live.clone(),
            Some(_) => mask.matching_all()?,
        });
        text.search(query, limit, Arc::new(move |slot| allowed.contains(slot)))
    }

    fn scroll(
        &self,
        from: Option<PointId>,
        filter: Option<&str>,
        limit: usize,
        payload: &Select,
        vectors: &Select,
    ) -> Result<Answer> {
        let filter = parse_filter(filter)?;
        let candidates = filter.as_ref().map(|filter| self.candidates(filter));
        let start = from.map_or(vec![keys::ID], keys::id);
        let mut hits = Vec::new();
        for item in self.store.scan_from(&[keys::ID], start) {
            if hits.len() == limit {
                break;
            }
            let slot = u32::from_be_bytes(item?.1.try_into().unwrap_or_default());
            if let (Some(filter), Some(candidates)) = (&filter, &candidates)
                && (!candidates.slots.contains(slot)
                    || (!candidates.is_exact && !self.matches(slot, filter)?))
            {
                continue;
            }
            hits.extend(self.hit(slot, 0.0, payload, vectors)?);
        }
        Ok(Answer::Points(hits))
    }

    fn count(&self, filter: Option<&str>) -> Result<Answer> {
        let Some(filter) = parse_filter(filter)? else { return Ok(Answer::Count(self.live.len())) };
        let candidates = self.candidates(&filter);
        if candidates.is_exact {
            return Ok(Answer::Count(candidates.slots.len()));
        }
        let mut count = 0;
        for slot in candidates.slots {
            count += u64::from(self.matches(slot, &filter)?);
        }
        Ok(Answer::Count(count))
    }

    fn matches(&self, slot: u32, filter: &Filter) -> Result<bool> {
        let record = read_point(&self.store, slot)?;
        Ok(record.is_some_and(|record| filter.matches(record.id, &record.payload_map())))
    }

    /// A stored vector: its row in the flat file, or else what the store has.
    fn vector(&self, slot: u32, name: &str) -> Result<Option<Vec<f32>>> {
        let Some(index) = self.vectors.get(name) else { return Ok(None) };
        if let Some(row) = index.row(slot) {
            return Ok(Some(row));
        }
        let stored = read_vector(&self.store, slot, name)?;
        if let Some(vector) = &stored {
            index.keep_row(slot, vector);
        }
        Ok(stored)
    }

    fn hit(&self, slot: u32, score: f32, payload: &Select, vectors: &Select) -> Result<Option<Hit>> {
        let Some(record) = read_point(&self.store, slot)? else { return Ok(None) };
        let vectors = match vectors {
            Select::Nothing => None,
            wanted => {
                let mut found = Vec::new();
                for name in self.config.vectors.keys().filter(|name| selects(wanted, name)) {
                    found.extend(self.vector(slot, name)?.map(|vector| (name.clone(), vector)));
                }
                Some(found)
            }
        };
        let payload = select_payload(record.payload, payload);
        Ok(Some(Hit { id: record.id, score, version: record.version, payload, vectors }))
    }

    fn chunks(&self, id: shoal_proto::DocumentId) -> Result<Answer> {
        let mut texts = Vec::new();
        if let Some((version, chunks)) = self.document(id)?.and_then(|document| document.published) {
            for index in 0..chunks {
                if let Some(slot) = self.slot_of(id.chunk_point(version, index))? {
                    texts.extend(read_point(&self.store, slot)?.map(|record| record.payload));
                }
            }
        }
        Ok(Answer::Chunks(texts))
    }

    fn all_documents(&self) -> Result<Vec<Document>> {
        self.store
            .scan(&[keys::DOCUMENT])
            .map(|item| item.and_then(|(key, value)| decode(&key, &value)))
            .collect()
    }

    fn stats(&self) -> Result<Answer> {
        let mut stats =
            Stats { points: self.live.len(), disk_bytes: self.store.disk_bytes(), ..Stats::default() };
        for vectors in self.vectors.values() {
            let (indexed, pending) = vectors.sizes();
            stats.indexed_vectors += indexed;
            stats.pending_vectors += pending;
            stats.segments += vectors.segments() as u64;
        }
        for document in self.all_documents()? {
            stats.documents[document.state as usize] += 1;
            if document.published.is_some() {
                stats.document_bytes += document.bytes;
            }
        }
        Ok(Answer::Stats(stats))
    }
}

/// What a search may return: live slots that the filter keeps. Payloads that have to be read
/// for that are read once per search.
struct Mask<'a> {
    state: &'a State,
    filter: Option<&'a Filter>,
    candidates: Option<&'a Candidates>,
    known: RefCell<HashMap<u32, bool>>,
}

impl Mask<'_> {
    fn keeps(&self, slot: u32) -> bool {
        let (Some(filter), Some(candidates)) = (self.filter, self.candidates) else {
            return self.state.live.contains(slot);
        };
        if !candidates.slots.contains(slot) {
            return false;
        }
        if candidates.is_exact {
            return true;
        }
        // A value that does not read is left out of the answer here and reported by whoever
        // reads it directly; a search must not fail for a point that it may not even return.
        *self
            .known
            .borrow_mut()
            .entry(slot)
            .or_insert_with(|| self.state.matches(slot, filter).unwrap_or(false))
    }

    fn matching_all(&self) -> Result<RoaringBitmap> {
        match (self.filter, self.candidates) {
            (Some(_), Some(candidates)) if candidates.is_exact => Ok(candidates.slots.clone()),
            (Some(_), Some(candidates)) => {
                Ok(candidates.slots.iter().filter(|slot| self.keeps(*slot)).collect())
            }
            _ => Ok(self.state.live.clone()),
        }
    }
}

fn parse_filter(filter: Option<&str>) -> Result<Option<Filter>> {
    let Some(text) = filter else { return Ok(None) };
    let value: Value = serde_json::from_str(text).map_err(|error| Error::invalid("filter", error))?;
    let filter = Filter::parse(&value, "filter")?;
    Ok((filter != Filter::default()).then_some(filter))
}

fn selects(select: &Select, name: &str) -> bool {
    match select {
        Select::Nothing => false,
        Select::All => true,
        Select::Include(names) => names.iter().any(|wanted| wanted == name),
        Select::Exclude(names) => names.iter().all(|refused| refused != name),
    }
}

fn select_payload(payload: String, select: &Select) -> Option<String> {
    match select {
        Select::Nothing => None,
        Select::All => Some(payload),
        Select::Include(paths) => {
            let map = crate::state::parse_payload(&payload);
            let mut kept = Map::new();
            paths.iter().for_each(|path| include(&map, path, &mut kept));
            Some(Value::Object(kept).to_string())
        }
        Select::Exclude(paths) => {
            let mut map = crate::state::parse_payload(&payload);
            paths.iter().for_each(|path| exclude(&mut map, path));
            Some(Value::Object(map).to_string())
        }
    }
}

/// Copies what is at a path, with the objects that lead there.
fn include(from: &Map<String, Value>, path: &str, into: &mut Map<String, Value>) {
    if let Some(value) = from.get(path) {
        into.insert(path.to_owned(), value.clone());
        return;
    }
    let Some((head, rest)) = path.split_once('.') else { return };
    let Some(inner) = from.get(head).and_then(Value::as_object) else { return };
    let target = into.entry(head).or_insert_with(|| Value::Object(Map::new()));
    if let Some(target) = target.as_object_mut() {
        include(inner, rest, target);
    }
}

fn exclude(from: &mut Map<String, Value>, path: &str) {
    if from.shift_remove(path).is_some() {
        return;
    }
    if let Some((head, rest)) = path.split_once('.')
        && let Some(inner) = from.get_mut(head).and_then(Value::as_object_mut)
    {
        exclude(inner, rest);
    }
}
