//! Full-text search of one shard: tantivy for what is committed, a scan of the tail.
//!
//! Derived, like the graphs. A document is searchable the moment its write is applied: what
//! tantivy has not committed yet is kept as term counts and scored with the same BM25 formula
//! (k1 = 1.2, b = 0.75, as tantivy's) and the statistics of both together.

use std::collections::{BTreeMap, HashMap};
use std::path::Path;
use std::sync::{Arc, LazyLock};

use jieba_rs::Jieba;
use parking_lot::{Mutex, RwLock};
use rust_stemmers::{Algorithm, Stemmer};
use shoal_proto::Distance;
use tantivy::collector::{FilterCollector, TopDocs};
use tantivy::directory::MmapDirectory;
use tantivy::query::{BooleanQuery, Occur, Query, TermQuery};
use tantivy::schema::{FAST, Field, INDEXED, IndexRecordOption, Schema, TextFieldIndexing, TextOptions};
use tantivy::tokenizer::{TextAnalyzer, Token, TokenStream, Tokenizer};
use tantivy::{Directory, Index, IndexReader, IndexWriter, ReloadPolicy, TantivyDocument, Term};

use crate::error::Result;
use crate::vectors::{Scored, Top};

/// Uncommitted documents at which a commit is due.
pub const COMMIT_DOCUMENTS: usize = 512;
/// Memory that tantivy's writer may use per shard, in bytes.
const WRITER_BYTES: usize = 32 << 20;
/// Words longer than this, in bytes, are not indexed.
const MAX_TOKEN_BYTES: usize = 128;
const K1: f32 = 1.2;
const B: f32 = 0.75;

static JIEBA: LazyLock<Jieba> = LazyLock::new(Jieba::new);

/// Cuts text into terms: runs of Latin letters and digits in lower case, stemmed as English;
/// runs of Han characters by jieba's dictionary, in its search mode.
pub fn analyze(text: &str) -> Vec<String> {
    let stemmer = Stemmer::create(Algorithm::English);
    let mut terms = Vec::new();
    for word in text.split(|c: char| !c.is_alphanumeric()).filter(|word| !word.is_empty()) {
        if word.chars().any(is_han) {
            let cut = JIEBA.cut_for_search(word, true);
            terms.extend(cut.into_iter().map(|token| token.word.to_lowercase()));
        } else {
            let lower = word.to_lowercase();
            terms.push(if lower.is_ascii() { stemmer.stem(&lower).into_owned() } else { lower });
        }
    }
    terms.retain(|term| term.len() <= MAX_TOKEN_BYTES);
    terms
}

fn is_han(c: char) -> bool {
    matches!(c, '\u{3040}'..='\u{30ff}' | '\u{3400}'..='\u{4dbf}' | '\u{4e00}'..='\u{9fff}' | '\u{f900}'..='\u{faff}' | '\u{20000}'..='\u{2fa1f}')
}

#[derive(Clone)]
struct Analyzer;

struct Stream {
    tokens: Vec<Token>,
    next: usize,
}

impl Tokenizer for Analyzer {
    type TokenStream<'a> = Stream;

    fn token_stream<'a>(&'a mut self, text: &'a str) -> Stream {
        let tokens = analyze(text)
            .into_iter()
            .enumerate()
            .map(|(position, text)| Token { position, text, position_length: 1, ..Token::default() })
            .collect();
        Stream { tokens, next: 0 }
    }
}

impl TokenStream for Stream {
    fn advance(&mut self) -> bool {
        self.next += 1;
        self.next <= self.tokens.len()
    }

    fn token(&self) -> &Token {
        &self.tokens[self.next - 1]
    }

    fn token_mut(&mut self) -> &mut Token {
        &mut self.tokens[self.next - 1]
    }
}

struct TailDocument {
    counts: HashMap<String, u32>,
    length: u32,
}

impl TailDocument {
    fn new(text: &str) -> TailDocument {
        let terms = analyze(text);
        let length = terms.len() as u32;
        let mut counts = HashMap::new();
        for term in terms {
            *counts.entry(term).or_default() += 1;
        }
        TailDocument { counts, length }
    }
}

/// The text index of one shard.
pub struct TextIndex {
    index: Index,
    writer: Mutex<IndexWriter>,
    reader: IndexReader,
    slot: Field,
    body: Field,
    /// Documents that tantivy has not committed, by slot.
    tail: RwLock<BTreeMap<u32, Arc<TailDocument>>>,
}

impl TextIndex {
    /// Opens or creates the index. One that does not open is made anew: it is derived.
    pub fn open(dir: &Path) -> Result<TextIndex> {
        match TextIndex::try_open(dir) {
            Ok(index) => Ok(index),
            Err(error) => {
                tracing::warn!(%error, dir = %dir.display(), "the text index is unusable and will be rebuilt");
                std::fs::remove_dir_all(dir)?;
                TextIndex::try_open(dir)
            }
        }
    }

    fn try_open(dir: &Path) -> Result<TextIndex> {
        std::fs::create_dir_all(dir)?;
        let mut schema = Schema::builder();
        let slot = schema.add_u64_field("slot", INDEXED | FAST);
        let indexing = TextFieldIndexing::default()
            .set_tokenizer("shoal")
            .set_index_option(IndexRecordOption::WithFreqs);
        let body = schema.add_text_field("body", TextOptions::default().set_indexing_options(indexing));
        let directory = MmapDirectory::open(dir).map_err(tantivy::TantivyError::from)?;
        let index = Index::open_or_create(directory, schema.build())?;
        index.tokenizers().register("shoal", TextAnalyzer::from(Analyzer));
        let writer = index.writer_with_num_threads(1, WRITER_BYTES)?;
        let reader = index.reader_builder().reload_policy(ReloadPolicy::Manual).try_into()?;
        Ok(TextIndex { index, writer: Mutex::new(writer), reader, slot, body, tail: RwLock::default() })
    }

    /// The log index that the last commit covers.
    pub fn committed(&self) -> Result<u64> {
        Ok(self.index.load_metas()?.payload.and_then(|payload| payload.parse().ok()).unwrap_or(0))
    }

    /// Takes in the text of a slot, in place of what it had; searchable when this returns.
    pub fn put(&self, slot: u32, text: &str) {
        self.tail.write().insert(slot, Arc::new(TailDocument::new(text)));
    }

    /// Documents that wait for a commit.
    pub fn waiting(&self) -> usize {
        self.tail.read().len()
    }

    /// Commits the documents that wait. `texts` gives a slot's text, none when it is gone;
    /// `applied` is an index that all writes up to here have reached.
    pub fn commit(&self, applied: u64, texts: &dyn Fn(u32) -> Result<Option<String>>) -> Result<()> {
        let batch: Vec<(u32, Arc<TailDocument>)> =
            self.tail.read().iter().map(|(slot, document)| (*slot, document.clone())).collect();
        if batch.is_empty() && self.committed()? >= applied {
            return Ok(());
        }
        let mut writer = self.writer.lock();
        for (slot, _) in &batch {
            writer.delete_term(Term::from_field_u64(self.slot, u64::from(*slot)));
            if let Some(text) = texts(*slot)? {
                let mut document = TantivyDocument::default();
                document.add_u64(self.slot, u64::from(*slot));
                document.add_text(self.body, text);
                writer.add_document(document)?;
            }
        }
        let mut prepared = writer.prepare_commit()?;
        prepared.set_payload(&applied.to_string());
        prepared.commit()?;
        // tantivy renames its meta file after it has synced the directory.
        self.index.directory().sync_directory()?;
        self.reader.reload()?;
        let mut tail = self.tail.write();
        for (slot, document) in batch {
            // A slot whose text changed meanwhile stays for the next commit.
            if tail.get(&slot).is_some_and(|now| Arc::ptr_eq(now, &document)) {
                tail.remove(&slot);
            }
        }
        Ok(())
    }

    /// The `limit` best slots by BM25 of those that are allowed.
    pub fn search(
        &self,
        query: &str,
        limit: usize,
        allowed: Arc<dyn Fn(u32) -> bool + Send + Sync>,
    ) -> Result<Vec<Scored>> {
        let mut terms = analyze(query);
        terms.sort();
        terms.dedup();
        if terms.is_empty() || limit == 0 {
            return Ok(Vec::new());
        }
        let tail: BTreeMap<u32, Arc<TailDocument>> = self.tail.read().clone();
        let tail_slots: Arc<roaring::RoaringBitmap> = Arc::new(tail.keys().copied().collect());
        let searcher = self.reader.searcher();
        let mut top = Top::new(Distance::Dot, limit);
        let clauses: Vec<(Occur, Box<dyn Query>)> = terms
            .iter()
            .map(|term| {
                let term = Term::from_field_text(self.body, term);
                let query: Box<dyn Query> = Box::new(TermQuery::new(term, IndexRecordOption::WithFreqs));
                (Occur::Should, query)
            })
            .collect();
        let keep = allowed.clone();
        let collector = FilterCollector::new(
            "slot".to_owned(),
            // A slot in the tail is scored there: what tantivy has of it is out of date.
            move |slot: u64| u32::try_from(slot).is_ok_and(|slot| keep(slot) && !tail_slots.contains(slot)),
            TopDocs::with_limit(limit).order_by_score(),
        );
        for (score, address) in searcher.search(&BooleanQuery::new(clauses), &collector)? {
            let slots = searcher.segment_reader(address.segment_ord).fast_fields().u64("slot")?;
            if let Some(slot) = slots.first(address.doc_id).and_then(|slot| u32::try_from(slot).ok()) {
                top.offer(slot, score);
            }
        }
        self.score_tail(&terms, &tail, &searcher, allowed.as_ref(), &mut top)?;
        Ok(top.into_sorted())
    }

    fn score_tail(
        &self,
        terms: &[String],
        tail: &BTreeMap<u32, Arc<TailDocument>>,
        searcher: &tantivy::Searcher,
        allowed: &dyn Fn(u32) -> bool,
        top: &mut Top,
    ) -> Result<()> {
        if tail.is_empty() {
            return Ok(());
        }
        let mut tokens: u64 = tail.values().map(|document| u64::from(document.length)).sum();
        for segment in searcher.segment_readers() {
            tokens += segment.inverted_index(self.body)?.total_num_tokens();
        }
        let documents = searcher.num_docs() + tail.len() as u64;
        let mean_length = (tokens as f32 / documents as f32).max(1.0);
        let mut weights = Vec::with_capacity(terms.len());
        for term in terms {
            let committed = searcher.doc_freq(&Term::from_field_text(self.body, term))?;
            let frequency = committed
                + tail.values().filter(|document| document.counts.contains_key(term)).count() as u64;
            let rest = documents.saturating_sub(frequency) as f32;
            weights.push((1.0 + (rest + 0.5) / (frequency as f32 + 0.5)).ln());
        }
        for (slot, document) in tail {
            let norm = K1 * (1.0 - B + B * document.length as f32 / mean_length);
            let score: f32 = terms
                .iter()
                .zip(&weights)
                .filter_map(|(term, weight)| {
                    let count = *document.counts.get(term)? as f32;
                    Some(weight * count * (K1 + 1.0) / (count + norm))
                })
                .sum();
            if score > 0.0 && allowed(*slot) {
                top.offer(*slot, score);
            }
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn english_is_stemmed_and_chinese_is_cut() {
        assert_eq!(analyze("Running shards, RUN-ning!"), ["run", "shard", "run", "ning"]);
        let cut = analyze("我来到北京清华大学 v2");
        for word in ["北京", "清华", "大学", "清华大学", "v2"] {
            assert!(cut.iter().any(|term| term == word), "{word} in {cut:?}");
        }
    }

    #[test]
    fn the_tail_and_the_committed_score_alike() {
        let dir = tempfile::tempdir().expect("a directory");
        let index = TextIndex::open(dir.path()).expect("opens");
        let texts = ["the quick brown fox", "a lazy dog sleeps", "quick quick dog", "nothing here"];
        let text_of = |slot: u32| Ok(texts.get(slot as usize).map(|text| (*text).to_owned()));
        for (slot, text) in texts.iter().enumerate() {
            index.put(slot as u32, text);
        }
        let all: Arc<dyn Fn(u32) -> bool + Send + Sync> = Arc::new(|_| true);
        let before = index.search("quick dog", 10, all.clone()).expect("searches");
        index.commit(9, &text_of).expect("commits");
        assert_eq!((index.waiting(), index.committed().expect("readable")), (0, 9));
        let payload = index.index.load_metas().expect("readable").payload;
        assert_eq!(payload.as_deref(), Some("9"), "how far it has come stays written like that");
        let after = index.search("quick dog", 10, all).expect("searches");
        let slots = |hits: &[Scored]| hits.iter().map(|hit| hit.slot).collect::<Vec<_>>();
        assert_eq!(slots(&before), slots(&after));
        for (a, b) in before.iter().zip(&after) {
            assert!((a.score - b.score).abs() < 0.05, "{a:?} {b:?}");
        }
        let odd: Arc<dyn Fn(u32) -> bool + Send + Sync> = Arc::new(|slot| slot % 2 == 1);
        assert_eq!(slots(&index.search("quick dog", 10, odd).expect("searches")), [1]);
    }
}
