//! A BERT-family sentence encoder in this process (candle), read from the usual directory:
//! `config.json`, `tokenizer.json`, `model.safetensors`, and `SHA256SUMS` to check them by.
//!
//! Mean pooling over all tokens, then normalised, as multilingual-e5 and MiniLM want it. The
//! vocabulary table is four fifths of e5's weights: it stays in the mapped file and single
//! rows are gathered from it, so a node does not carry it in its own memory.
//!
//! Texts of all callers wait in one queue and go through the model a step at a time: queries
//! before passages, so that a search never waits for a long document, and short documents of
//! several callers together, because a step of one text uses the cores badly.
//!
//! **2026-11, candle and not onnxruntime.** With the functions of [`super::ops`] and one thread
//! for candle's own loops, candle embeds 54 chunks of 128 tokens a second and 25 of 256 on two
//! AVX-512 cores in steps of 32; onnxruntime 1.28 with fused f32 graphs 31 and 15. Its int8 graphs reach
//! 55 and 24, but a vector then depends on its neighbours in the step (cosine 0.996), and a fresh
//! machine would need its library as well.

use std::collections::{BTreeSet, VecDeque};
use std::path::Path;
use std::sync::Arc;

use candle_core::{DType, Device, Result as CandleResult, Tensor};
use candle_nn::{LayerNorm, Linear, Module};
use half::f16;
use memmap2::Mmap;
use parking_lot::Mutex;
use safetensors::{Dtype, SafeTensors};
use serde::Deserialize;
use sha2::{Digest, Sha256};
use shoal_proto::{Error, ErrorCode};
use tokenizers::Tokenizer;
use tokio::sync::oneshot::error::TryRecvError;
use tokio::sync::{Semaphore, oneshot};

use super::TextKind;
use super::ops::{Gelu, Softmax};

/// The most tokens of one text that the model sees.
const MAX_TOKENS: usize = 512;
/// About how many tokens go through the model in one step.
const STEP_TOKENS: usize = 1024;
/// After so many steps of queries one of passages is done, so that searches cannot stop ingest.
const QUERY_STEPS: usize = 4;
/// How far behind the oldest text others are looked for that go into the same step.
const WINDOW: usize = 64;

#[derive(Deserialize)]
struct Config {
    hidden_size: usize,
    num_hidden_layers: usize,
    num_attention_heads: usize,
    #[serde(default = "default_eps")]
    layer_norm_eps: f64,
}

fn default_eps() -> f64 {
    1e-12
}

/// The encoder.
pub struct LocalModel {
    tokenizer: Tokenizer,
    weights: Weights,
    checksum: String,
    prefixes: Option<(&'static str, &'static str)>,
    queue: Mutex<Queue>,
    /// One step at a time: candle uses all cores for it.
    turn: Arc<Semaphore>,
}

/// Texts that wait, as tokens.
#[derive(Default)]
struct Queue {
    queries: VecDeque<Waiting>,
    passages: VecDeque<Waiting>,
    /// Steps of queries since the last one of passages.
    query_steps: usize,
}

struct Waiting {
    ids: Vec<u32>,
    answer: oneshot::Sender<Result<Vec<f32>, Error>>,
}

struct Weights {
    map: Mmap,
    words: (usize, Dtype),
    hidden: usize,
    heads: usize,
    positions: Tensor,
    first_type: Tensor,
    norm: LayerNorm,
    layers: Vec<Layer>,
}

struct Layer {
    query: Linear,
    key: Linear,
    value: Linear,
    attended: Linear,
    attended_norm: LayerNorm,
    up: Linear,
    down: Linear,
    norm: LayerNorm,
}

impl LocalModel {
    /// Opens a model and checks every file against `SHA256SUMS`.
    ///
    /// # Errors
    /// Says which file is missing or damaged and how to get it again.
    pub fn open(dir: &Path) -> Result<LocalModel, Error> {
        let checksum = verify(dir)?;
        let broken = |what: &dyn std::fmt::Display| {
            Error::new(
                ErrorCode::Unavailable,
                format!("model in {}: {what}; run `make model` to get it again", dir.display()),
            )
        };
        let config = std::fs::read(dir.join("config.json")).map_err(|error| broken(&error))?;
        let config: Config = serde_json::from_slice(&config).map_err(|error| broken(&error))?;
        // Neither padded nor truncated: both are done here, so that one tokenizer (its vocabulary
        // takes hundreds of megabytes) serves counting and embedding.
        let mut tokenizer =
            Tokenizer::from_file(dir.join("tokenizer.json")).map_err(|error| broken(&error))?;
        tokenizer.with_padding(None);
        tokenizer.with_truncation(None).map_err(|error| broken(&error))?;
        let weights =
            Weights::open(&dir.join("model.safetensors"), &config).map_err(|error| broken(&error))?;
        let name = dir.file_name().map(|name| name.to_string_lossy().into_owned()).unwrap_or_default();
        let prefixes = name.contains("e5").then_some(("query: ", "passage: "));
        let (queue, turn) = (Mutex::default(), Arc::new(Semaphore::new(1)));
        Ok(LocalModel { tokenizer, weights, checksum, prefixes, queue, turn })
    }

    /// Dimensions of its vectors.
    pub fn dimension(&self) -> usize {
        self.weights.hidden
    }

    /// SHA-256 of its weights.
    pub fn checksum(&self) -> &str {
        &self.checksum
    }

    /// Tokens in a text, without special ones.
    pub fn count_tokens(&self, text: &str) -> usize {
        self.tokenizer.encode_fast(text, false).map_or(text.len(), |encoding| encoding.len())
    }

    /// Tokens of a passage, as [`LocalModel::count_tokens`] counts them, that the model sees besides its
    /// prefix and the special ones.
    pub fn max_tokens(&self) -> usize {
        let prefix = self.prefix(TextKind::Passage);
        let taken = self.tokenizer.encode_fast(prefix, true).map_or(0, |encoding| encoding.len());
        MAX_TOKENS.saturating_sub(taken)
    }

    fn prefix(&self, kind: TextKind) -> &'static str {
        self.prefixes.map_or("", |(query, passage)| match kind {
            TextKind::Query => query,
            TextKind::Passage => passage,
        })
    }

    /// Embeds texts, in order, on the blocking pool.
    ///
    /// # Errors
    /// Internal, when tokenizer or model refuse.
    pub async fn embed(self: Arc<Self>, kind: TextKind, texts: Vec<String>) -> Result<Vec<Vec<f32>>, Error> {
        let panicked = |_| Error::internal("the model panicked");
        let model = self.clone();
        let encoded =
            tokio::task::spawn_blocking(move || model.encode(kind, &texts)).await.map_err(panicked)??;
        let answers = self
            .enqueue(kind, encoded)
            .into_iter()
            .map(async |answer| answer.await.unwrap_or_else(|_| Err(Error::internal("the model panicked"))));
        let mut answers = std::pin::pin!(futures::future::try_join_all(answers));
        // Whoever has the turn does the next step, be it for itself or for others.
        loop {
            tokio::select! {
                biased;
                answered = &mut answers => return answered,
                turn = self.turn.clone().acquire_owned() => {
                    let (model, turn) = (self.clone(), turn.map_err(Error::internal)?);
                    let step = tokio::task::spawn_blocking(move || {
                        model.step();
                        drop(turn);
                    });
                    // Whose texts were in a step that panicked learns it from its own answers.
                    drop(step.await);
                }
            }
        }
    }

    /// Embeds texts, in order, on this thread.
    ///
    /// # Errors
    /// Internal, when tokenizer or model refuse.
    pub fn embed_blocking(&self, kind: TextKind, texts: &[String]) -> Result<Vec<Vec<f32>>, Error> {
        let answers = self.enqueue(kind, self.encode(kind, texts)?);
        let embed = |mut answer: oneshot::Receiver<_>| loop {
            match answer.try_recv() {
                Ok(vector) => return vector,
                Err(TryRecvError::Empty) => self.step(),
                Err(TryRecvError::Closed) => return Err(Error::internal("the model panicked")),
            }
        };
        answers.into_iter().map(embed).collect()
    }

    /// Puts texts into the queue, for whoever does the next steps.
    fn enqueue(
        &self,
        kind: TextKind,
        encoded: Vec<Vec<u32>>,
    ) -> Vec<oneshot::Receiver<Result<Vec<f32>, Error>>> {
        let mut queue = self.queue.lock();
        let enqueue = |ids| {
            let (answer, answered) = oneshot::channel();
            queue.of(kind).push_back(Waiting { ids, answer });
            answered
        };
        encoded.into_iter().map(enqueue).collect()
    }

    fn encode(&self, kind: TextKind, texts: &[String]) -> Result<Vec<Vec<u32>>, Error> {
        let prefix = self.prefix(kind);
        let encode = |text: &String| {
            let input = format!("{prefix}{}", text.trim());
            let encoding = self.tokenizer.encode_fast(input, true).map_err(Error::internal)?;
            Ok(truncated(encoding.get_ids()))
        };
        texts.iter().map(encode).collect()
    }

    /// Embeds the texts whose turn it is and answers who waits for them.
    fn step(&self) {
        let step = self.queue.lock().take_step();
        if step.is_empty() {
            return;
        }
        let ids: Vec<&[u32]> = step.iter().map(|waiting| waiting.ids.as_slice()).collect();
        let found: Vec<Result<Vec<f32>, Error>> = match self.weights.forward(&ids) {
            Ok(vectors) => vectors.into_iter().map(Ok).collect(),
            Err(error) => step.iter().map(|_| Err(Error::internal(&error))).collect(),
        };
        for (waiting, vector) in step.into_iter().zip(found) {
            // Who does not wait any more needs no answer.
            drop(waiting.answer.send(vector));
        }
    }
}

impl Queue {
    fn of(&mut self, kind: TextKind) -> &mut VecDeque<Waiting> {
        match kind {
            TextKind::Query => &mut self.queries,
            TextKind::Passage => &mut self.passages,
        }
    }

    /// The next step: queries if there are any, but passages after every [`QUERY_STEPS`] of them; the oldest text, and of the next [`WINDOW`] those
    /// that are nearest to it in length.
    fn take_step(&mut self) -> Vec<Waiting> {
        self.queries.retain(|waiting| !waiting.answer.is_closed());
        self.passages.retain(|waiting| !waiting.answer.is_closed());
        let is_passages_turn = self.query_steps >= QUERY_STEPS && !self.passages.is_empty();
        let queue = if self.queries.is_empty() || is_passages_turn {
            self.query_steps = 0;
            &mut self.passages
        } else {
            self.query_steps += 1;
            &mut self.queries
        };
        let Some(oldest) = queue.pop_front() else { return Vec::new() };
        let length = oldest.ids.len();
        let mut window: Vec<Waiting> = queue.drain(..queue.len().min(WINDOW)).collect();
        let mut order: Vec<usize> = (0..window.len()).collect();
        order.sort_by_key(|index| window[*index].ids.len().abs_diff(length));
        let (mut longest, mut taken) = (length, BTreeSet::new());
        for index in order {
            let padded = longest.max(window[index].ids.len());
            if (taken.len() + 2) * padded > STEP_TOKENS {
                break;
            }
            longest = padded;
            taken.insert(index);
        }
        let mut step = vec![oldest];
        for index in (0..window.len()).rev() {
            let waiting = window.pop().expect("one for each index");
            if taken.contains(&index) {
                step.push(waiting);
            } else {
                queue.push_front(waiting);
            }
        }
        step
    }
}

/// At most [`MAX_TOKENS`] tokens: what is cut off is text, never the token that ends it.
fn truncated(ids: &[u32]) -> Vec<u32> {
    match ids {
        [text @ .., end] if ids.len() > MAX_TOKENS => [&text[..MAX_TOKENS - 1], &[*end]].concat(),
        ids => ids.to_vec(),
    }
}

/// Checks the files of a model directory and returns the checksum of the weights.
fn verify(dir: &Path) -> Result<String, Error> {
    let refuse = |what: String| {
        Error::new(ErrorCode::Unavailable, format!("{what}; run `make model` to get the model"))
    };
    let sums = std::fs::read_to_string(dir.join("SHA256SUMS"))
        .map_err(|error| refuse(format!("no model in {} (SHA256SUMS: {error})", dir.display())))?;
    let mut weights = String::new();
    for line in sums.lines().filter(|line| !line.is_empty()) {
        let (wanted, name) =
            line.split_once("  ").ok_or_else(|| refuse(format!("SHA256SUMS line {line:?} is malformed")))?;
        let mut file =
            std::fs::File::open(dir.join(name)).map_err(|error| refuse(format!("{name}: {error}")))?;
        let mut hasher = Sha256::new();
        std::io::copy(&mut file, &mut HashWriter(&mut hasher))
            .map_err(|error| refuse(format!("{name}: {error}")))?;
        let found: String = hasher.finalize().iter().map(|byte| format!("{byte:02x}")).collect();
        if found != wanted {
            return Err(refuse(format!(
                "{} is damaged: its checksum is {found}, not {wanted}",
                dir.join(name).display()
            )));
        }
        if name == "model.safetensors" {
            weights = found;
        }
    }
    if weights.is_empty() {
        return Err(refuse("SHA256SUMS does not name model.safetensors".into()));
    }
    Ok(weights)
}

struct HashWriter<'a>(&'a mut Sha256);

impl std::io::Write for HashWriter<'_> {
    fn write(&mut self, bytes: &[u8]) -> std::io::Result<usize> {
        self.0.update(bytes);
        Ok(bytes.len())
    }

    fn flush(&mut self) -> std::io::Result<()> {
        Ok(())
    }
}

impl Weights {
    fn open(file: &Path, config: &Config) -> Result<Weights, Box<dyn std::error::Error>> {
        let file = std::fs::File::open(file)?;
        #[expect(
            unsafe_code,
            reason = "the weights are mapped read-only; nobody writes to a model that is in use"
        )]
        // SAFETY: the file is not changed while it is mapped: `make model` replaces it by rename.
        let map = unsafe { Mmap::map(&file)? };
        let tensors = SafeTensors::deserialize(&map)?;
        let hidden = config.hidden_size;
        let words = tensors.tensor("embeddings.word_embeddings.weight")?;
        let offset = words.data().as_ptr() as usize - map.as_ptr() as usize;
        let linear = |name: &str| -> Result<Linear, Box<dyn std::error::Error>> {
            Ok(Linear::new(
                load(&tensors, &format!("{name}.weight"))?,
                Some(load(&tensors, &format!("{name}.bias"))?),
            ))
        };
        let norm = |name: &str| -> Result<LayerNorm, Box<dyn std::error::Error>> {
            let (weight, bias) =
                (load(&tensors, &format!("{name}.weight"))?, load(&tensors, &format!("{name}.bias"))?);
            Ok(LayerNorm::new(weight, bias, config.layer_norm_eps))
        };
        let layers = (0..config.num_hidden_layers).map(|number| {
            let at = |part: &str| format!("encoder.layer.{number}.{part}");
            Ok(Layer {
                query: linear(&at("attention.self.query"))?,
                key: linear(&at("attention.self.key"))?,
                value: linear(&at("attention.self.value"))?,
                attended: linear(&at("attention.output.dense"))?,
                attended_norm: norm(&at("attention.output.LayerNorm"))?,
                up: linear(&at("intermediate.dense"))?,
                down: linear(&at("output.dense"))?,
                norm: norm(&at("output.LayerNorm"))?,
            })
        });
        let layers = layers.collect::<Result<_, Box<dyn std::error::Error>>>()?;
        let positions = load(&tensors, "embeddings.position_embeddings.weight")?;
        let first_type = load(&tensors, "embeddings.token_type_embeddings.weight")?.get(0)?;
        let norm = norm("embeddings.LayerNorm")?;
        let words = (offset, words.dtype());
        Ok(Weights {
            words,
            hidden,
            heads: config.num_attention_heads,
            positions,
            first_type,
            norm,
            layers,
            map,
        })
    }

    /// The rows of the vocabulary table for some tokens, from the mapped file.
    fn gather(&self, ids: &[u32], into: &mut Vec<f32>) {
        let (offset, dtype) = self.words;
        let width = if dtype == Dtype::F16 { 2 } else { 4 };
        for id in ids {
            let at = offset + *id as usize * self.hidden * width;
            let row = &self.map[at..at + self.hidden * width];
            if dtype == Dtype::F16 {
                into.extend(row.chunks_exact(2).map(|x| f16::from_le_bytes([x[0], x[1]]).to_f32()));
            } else {
                into.extend(row.chunks_exact(4).map(|x| f32::from_le_bytes([x[0], x[1], x[2], x[3]])));
            }
        }
    }

    fn forward(&self, texts: &[&[u32]]) -> CandleResult<Vec<Vec<f32>>> {
        let device = &Device::Cpu;
        let batch = texts.len();
        let length = texts.iter().map(|ids| ids.len()).max().unwrap_or(0);
        let mut rows = Vec::with_capacity(batch * length * self.hidden);
        let mut mask = Vec::with_capacity(batch * length);
        for ids in texts {
            self.gather(ids, &mut rows);
            rows.resize(rows.len() + (length - ids.len()) * self.hidden, 0.0);
            mask.extend((0..length).map(|at| if at < ids.len() { 1f32 } else { 0.0 }));
        }
        let words = Tensor::from_vec(rows, (batch, length, self.hidden), device)?;
        let mask = Tensor::from_vec(mask, (batch, length), device)?;
        let is_padded = texts.iter().any(|ids| ids.len() < length);
        let bias = is_padded.then(|| ((&mask - 1.0)? * 1e9)?.reshape((batch, 1, 1, length))).transpose()?;
        let x =
            words.broadcast_add(&self.positions.narrow(0, 0, length)?)?.broadcast_add(&self.first_type)?;
        let mut x = self.norm.forward(&x)?;
        for layer in &self.layers {
            x = layer.forward(&x, bias.as_ref(), self.heads)?;
        }
        let weights = mask.reshape((batch, length, 1))?;
        let sum = x.broadcast_mul(&weights)?.sum(1)?;
        let mut vectors = sum.to_vec2::<f32>()?;
        // The mean differs from the sum by a factor only, which normalising takes out.
        for vector in &mut vectors {
            shoal_engine::distance::normalize(vector);
        }
        Ok(vectors)
    }
}

impl Layer {
    fn forward(&self, x: &Tensor, bias: Option<&Tensor>, heads: usize) -> CandleResult<Tensor> {
        let (batch, length, hidden) = x.dims3()?;
        let width = hidden / heads;
        let split = |linear: &Linear| -> CandleResult<Tensor> {
            linear.forward(x)?.reshape((batch, length, heads, width))?.transpose(1, 2)?.contiguous()
        };
        let (query, key, value) = (split(&self.query)?, split(&self.key)?, split(&self.value)?);
        let mut weights = query.matmul(&key.transpose(2, 3)?)?;
        if let Some(bias) = bias {
            weights = weights.broadcast_add(bias)?;
        }
        weights.inplace_op1(&Softmax { scale: 1.0 / (width as f32).sqrt(), width: length })?;
        let context = weights.matmul(&value)?.transpose(1, 2)?.reshape((batch, length, hidden))?;
        let x = self.attended_norm.forward(&(self.attended.forward(&context)? + x)?)?;
        let up = self.up.forward(&x)?;
        up.inplace_op1(&Gelu)?;
        self.norm.forward(&(self.down.forward(&up)? + &x)?)
    }
}

fn load(tensors: &SafeTensors<'_>, name: &str) -> Result<Tensor, Box<dyn std::error::Error>> {
    let view = tensors.tensor(name)?;
    let dtype = match view.dtype() {
        Dtype::F32 => DType::F32,
        Dtype::F16 => DType::F16,
        other => return Err(format!("tensor {name} has the unexpected type {other:?}").into()),
    };
    Ok(Tensor::from_raw_buffer(view.data(), dtype, view.shape(), &Device::Cpu)?.to_dtype(DType::F32)?)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The first values of vectors that an independent forward pass over the same weights gave.
    const KNOWN: [(TextKind, &str, [f32; 5]); 3] = [
        (TextKind::Query, "hello world", [0.04407, 0.0208, -0.04266, -0.05242, 0.06471]),
        (TextKind::Passage, "今天天气怎么样？", [0.0577, 0.00724, -0.04333, -0.06296, 0.07392]),
        (TextKind::Query, "全角ＡＢＣ～　x", [0.05337, -0.00113, -0.0476, -0.03323, 0.07043]),
    ];

    /// The model that `make model` gets; without it the test is skipped.
    fn model_for(test: &str) -> Option<LocalModel> {
        let dir = Path::new(env!("CARGO_MANIFEST_DIR")).join("../models/multilingual-e5-small");
        if !dir.join("model.safetensors").exists() {
            eprintln!("skipped: {test}: no model; run `make model`");
            return None;
        }
        Some(LocalModel::open(&dir).expect("opens"))
    }

    #[test]
    fn a_passage_of_the_most_tokens_is_seen_whole() {
        let Some(model) = model_for("a_passage_of_the_most_tokens_is_seen_whole") else { return };
        assert!((MAX_TOKENS - 16..MAX_TOKENS).contains(&model.max_tokens()), "{}", model.max_tokens());
        for words in ["The heron of Lisbon guards ledger (twice). ", "里斯本的苍鹭看守第四十二号账本。"]
        {
            let fits = |count: &usize| model.count_tokens(&words.repeat(*count)) <= model.max_tokens();
            let text = words.repeat((1..).take_while(fits).last().expect("one fits"));
            let seen = |text: &str| model.encode(TextKind::Passage, &[text.to_owned()]).expect("encodes");
            let whole = model.tokenizer.encode_fast(format!("passage: {}", text.trim()), true);
            assert_eq!(seen(&text)[0], whole.expect("encodes").get_ids(), "nothing was cut off");
            assert_eq!(seen(&words.repeat(600))[0].len(), MAX_TOKENS);
        }
    }

    #[test]
    fn the_model_gives_known_vectors_alone_and_in_a_batch() {
        let name = "the_model_gives_known_vectors_alone_and_in_a_batch";
        let Some(model) = model_for(name) else { return };
        assert_eq!(model.dimension(), 384);
        for (kind, text, known) in KNOWN {
            let long = "a much longer text that makes the batch pad the short one ".repeat(8);
            let batch = [text.to_owned(), long];
            let alone = model.embed_blocking(kind, &batch[..1]).expect("embeds").remove(0);
            let together = model.embed_blocking(kind, &batch).expect("embeds").remove(0);
            let near = |a: &[f32], b: &[f32]| a.iter().zip(b).all(|(a, b)| (a - b).abs() < 1e-4);
            assert!(near(&alone[..5], &known), "{text}: {:?}", &alone[..5]);
            assert!(near(&alone, &together), "padding changes nothing");
        }
        assert_eq!(model.count_tokens("hello world"), 3);
    }

    #[test]
    fn a_step_takes_queries_first_and_passages_of_like_length() {
        let mut queue = Queue::default();
        let mut answers = Vec::new();
        let mut add = |queue: &mut Queue, kind: TextKind, length: usize| {
            let (answer, answered) = oneshot::channel();
            queue.of(kind).push_back(Waiting { ids: vec![0; length], answer });
            answers.push(answered);
        };
        for length in [250, 50, 245, 240, 20, 250] {
            add(&mut queue, TextKind::Passage, length);
        }
        add(&mut queue, TextKind::Query, 8);
        let lengths = |step: &[Waiting]| step.iter().map(|waiting| waiting.ids.len()).collect::<Vec<_>>();
        assert_eq!(lengths(&queue.take_step()), [8]);
        let step = lengths(&queue.take_step());
        assert!(step.len() == 4 && step.iter().all(|length| *length >= 240), "{step:?}");
        assert_eq!(queue.passages.iter().map(|waiting| waiting.ids.len()).collect::<Vec<_>>(), [50, 20]);
        answers.clear();
        assert!(queue.take_step().is_empty(), "nobody waits any more");
    }

    #[test]
    fn long_texts_lose_text_and_keep_their_end() {
        let ids: Vec<u32> = (0..600).collect();
        let cut = truncated(&ids);
        assert_eq!((cut.len(), cut[510], cut[511]), (MAX_TOKENS, 510, 599));
        assert_eq!(truncated(&ids[..512]), ids[..512]);
    }

    #[test]
    fn a_missing_or_damaged_model_is_refused_with_advice() {
        let dir = tempfile::tempdir().expect("a directory");
        let missing = LocalModel::open(dir.path()).err().expect("refused");
        assert!(missing.message.contains("make model"), "{}", missing.message);
        std::fs::write(dir.path().join("config.json"), "{}").expect("writable");
        std::fs::write(dir.path().join("SHA256SUMS"), format!("{}  config.json\n", "0".repeat(64)))
            .expect("writable");
        let damaged = LocalModel::open(dir.path()).err().expect("refused");
        assert!(damaged.message.contains("is damaged"), "{}", damaged.message);
    }
}
