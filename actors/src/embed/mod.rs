//! Embedding: text in, vectors out, by a model in this process or one behind HTTP.
//!
//! [`Embedders`] knows the models of this node by name. Whatever the model, a text is embedded
//! once: a bounded cache keyed by model and text answers repeats.

mod cache;
mod http;
mod local;
mod ops;

use std::collections::BTreeMap;
use std::sync::Arc;

use serde::{Deserialize, Serialize};
use shoal_proto::{EmbedderConfig, Error, ErrorCode};

use cache::Cache;
pub use http::{HttpModel, HttpModelConfig};
pub use local::LocalModel;

/// Keeps candle's own loops on one thread: its second one spins beside the matrix products, which
/// have threads of their own, and makes a step on two cores half as slow again.
///
/// # Safety
/// To be called before the process has a second thread: it sets an environment variable, which
/// is the only way to tell candle.
#[expect(unsafe_code, reason = "setting an environment variable is unsafe where threads may read it")]
pub unsafe fn use_one_candle_thread() {
    if std::env::var_os("CANDLE_NUM_THREADS").is_none() {
        // SAFETY: the caller says that there is no other thread.
        unsafe { std::env::set_var("CANDLE_NUM_THREADS", "1") };
    }
}

/// What a text is: models such as E5 embed questions and passages differently.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub enum TextKind {
    /// A question.
    Query,
    /// Something to be found.
    Passage,
}

/// One model.
#[derive(Clone)]
pub enum Model {
    /// Weights in this process.
    Local(Arc<LocalModel>),
    /// An OpenAI-compatible endpoint.
    Http(Arc<HttpModel>),
}

/// The models of this node. Cheap to clone.
#[derive(Clone)]
pub struct Embedders {
    models: Arc<BTreeMap<String, Model>>,
    default: Option<String>,
    cache: Arc<Cache>,
    /// Why there is no default model, for whoever asks for it.
    missing: Arc<str>,
}

impl Embedders {
    /// The models, the default one's name, and why there is none if there is none.
    pub fn new(
        models: BTreeMap<String, Model>,
        default: Option<String>,
        cache_bytes: usize,
        missing: &str,
    ) -> Embedders {
        let cache = Arc::new(Cache::new(cache_bytes));
        Embedders { models: Arc::new(models), default, cache, missing: missing.into() }
    }

    /// Names with dimension and checksum.
    pub fn list(&self) -> Vec<EmbedderConfig> {
        self.models.iter().map(|(name, model)| model.config(name)).collect()
    }

    /// The configuration of a model, or of the default one.
    ///
    /// # Errors
    /// Names the model and says what to do.
    pub fn config(&self, name: Option<&str>) -> Result<EmbedderConfig, Error> {
        let (name, model) = self.model(name)?;
        Ok(model.config(name))
    }

    fn model<'a>(&'a self, name: Option<&'a str>) -> Result<(&'a str, &'a Model), Error> {
        let name = match name.or(self.default.as_deref()) {
            Some(name) => name,
            None => return Err(Error::new(ErrorCode::Unavailable, &self.missing)),
        };
        match self.models.get_key_value(name) {
            Some((name, model)) => Ok((name, model)),
            None => {
                let known: Vec<&str> = self.models.keys().map(String::as_str).collect();
                let known = if known.is_empty() { "none".to_owned() } else { known.join(", ") };
                let mut message = format!(
                    "model `{name}` is not on this node, which has {known}: name it in http_models, or set \
                     it as default_model and put it into the folder of models"
                );
                if !self.missing.is_empty() {
                    message = format!("{message} ({})", self.missing);
                }
                Err(Error::new(ErrorCode::NotFound, message))
            }
        }
    }

    /// Checks that this node has the very model that a collection was made with.
    ///
    /// # Errors
    /// Unavailable when it has none of that name; conflict when the dimension or the weights differ.
    pub fn check(&self, wanted: &EmbedderConfig) -> Result<(), Error> {
        // The collection is there, and another node may have its model.
        let here = self.config(Some(&wanted.model)).map_err(|error| Error::unavailable(error.message))?;
        if here == *wanted {
            return Ok(());
        }
        let message = format!(
            "the collection was made with model `{}` ({} dimensions, weights {}), and this node's has {} \
             dimensions and weights {}: put the collection's model onto this node, or make a new collection",
            wanted.model,
            wanted.dimension,
            short(&wanted.checksum),
            here.dimension,
            short(&here.checksum)
        );
        Err(Error::new(ErrorCode::Conflict, message))
    }

    /// How many tokens a model sees in a text, for chunking. Remote models do not tell: then a
    /// token is counted for every four Latin characters and for every other character.
    pub fn count_tokens(&self, name: &str, text: &str) -> usize {
        match self.models.get(name) {
            Some(Model::Local(model)) => model.count_tokens(text),
            _ => text.chars().map(|c| if c.is_ascii() { 1 } else { 4 }).sum::<usize>().div_ceil(4),
        }
    }

    /// Tokens of a passage that a model sees. What a text has beyond them would not be found by its meaning.
    ///
    /// # Errors
    /// Names the model and says what to do.
    pub fn max_tokens(&self, name: &str) -> Result<usize, Error> {
        Ok(match self.model(Some(name))?.1 {
            Model::Local(model) => model.max_tokens(),
            Model::Http(model) => model.max_tokens(),
        })
    }

    /// Embeds texts, in order.
    ///
    /// # Errors
    /// Unavailable or busy when the provider is; invalid when it refuses the input.
    pub async fn embed(&self, name: &str, kind: TextKind, texts: &[String]) -> Result<Vec<Vec<f32>>, Error> {
        let (name, model) = self.model(Some(name))?;
        let mut vectors: Vec<Option<Vec<f32>>> =
            texts.iter().map(|text| self.cache.get(name, kind, text)).collect();
        let missing: Vec<usize> = (0..texts.len()).filter(|index| vectors[*index].is_none()).collect();
        metrics::counter!("shoal_embedding_cache_requests_total", "result" => "hit")
            .increment((texts.len() - missing.len()) as u64);
        metrics::counter!("shoal_embedding_cache_requests_total", "result" => "miss")
            .increment(missing.len() as u64);
        if !missing.is_empty() {
            let wanted: Vec<String> = missing.iter().map(|index| texts[*index].clone()).collect();
            let started = std::time::Instant::now();
            let fresh = match model {
                Model::Local(model) => model.clone().embed(kind, wanted).await?,
                Model::Http(model) => model.embed(&wanted).await?,
            };
            metrics::histogram!("shoal_embed_seconds").record(started.elapsed());
            metrics::counter!("shoal_embedded_texts_total").increment(missing.len() as u64);
            for (index, vector) in missing.into_iter().zip(fresh) {
                self.cache.put(name, kind, &texts[index], &vector);
                vectors[index] = Some(vector);
            }
        }
        vectors
            .into_iter()
            .map(|vector| vector.ok_or_else(|| Error::internal("a model returned too few vectors")))
            .collect()
    }
}

impl Model {
    fn config(&self, name: &str) -> EmbedderConfig {
        let (dimension, checksum) = match self {
            Model::Local(model) => (model.dimension(), model.checksum().to_owned()),
            Model::Http(model) => (model.dimension(), String::new()),
        };
        EmbedderConfig { model: name.to_owned(), dimension, checksum }
    }
}

fn short(checksum: &str) -> &str {
    if checksum.is_empty() { "remote" } else { &checksum[..12.min(checksum.len())] }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn another_model_of_the_same_name_is_refused_and_a_missing_one_waited_for() {
        // The binary does this first thing in main; another test may have been here before.
        drop(rustls::crypto::ring::default_provider().install_default());
        let settings = json!({"name": "m", "base_url": "http://127.0.0.1:1", "dimension": 2});
        let model = HttpModel::new(serde_json::from_value(settings).expect("well formed")).expect("builds");
        let models = [("m".to_owned(), Model::Http(Arc::new(model)))].into();
        let embedders = Embedders::new(models, None, 0, "run `make model`");
        let wanted = |model: &str, dimension, checksum: &str| EmbedderConfig {
            model: model.to_owned(),
            dimension,
            checksum: checksum.to_owned(),
        };
        assert!(embedders.check(&wanted("m", 2, "")).is_ok());
        for other in [wanted("m", 3, ""), wanted("m", 2, &"7e".repeat(32))] {
            let refused = embedders.check(&other).expect_err("another model");
            assert_eq!(refused.code, ErrorCode::Conflict);
            assert!(refused.message.contains("put the collection's model onto this node"), "{refused}");
        }
        let missing = embedders.check(&wanted("n", 2, "")).expect_err("no such model");
        assert_eq!(missing.code, ErrorCode::Unavailable);
        assert!(missing.message.contains("`n` is not on this node, which has m: name it"), "{missing}");
        assert!(missing.message.contains("make model"), "{missing}");
    }
}
