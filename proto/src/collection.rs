//! The schema of a collection. Names, defaults and limits follow Qdrant's REST model.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};

use crate::{Error, Result};

/// The most bytes in a collection's name.
pub const MAX_NAME_BYTES: usize = 255;
/// The largest dense vector, in dimensions.
pub const MAX_VECTOR_DIMENSIONS: usize = 65_536;
/// The most named vectors in one collection.
pub const MAX_NAMED_VECTORS: usize = 16;
/// The most payload indexes in one collection.
pub const MAX_PAYLOAD_INDEXES: usize = 100;

/// How near two vectors are.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Distance {
    /// Cosine similarity: vectors are normalised on the way in. Higher is nearer.
    Cosine,
    /// Inner product. Higher is nearer.
    Dot,
    /// Euclidean distance. Lower is nearer.
    Euclid,
    /// Manhattan distance. Lower is nearer. Always searched exactly: there is no graph for it.
    Manhattan,
}

impl Distance {
    /// Whether a larger score means nearer.
    pub fn higher_is_nearer(self) -> bool {
        matches!(self, Distance::Cosine | Distance::Dot)
    }
}

/// The number format of the vectors inside the graph. The stored vectors are always f32.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub enum GraphType {
    /// Four bytes a dimension.
    F32,
    /// Two bytes a dimension with the same recall on normalised embeddings; the default.
    #[default]
    F16,
    /// One byte a dimension; results are fetched in surplus and rescored from the stored f32.
    I8,
}

/// One named dense vector.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct VectorParams {
    /// Dimensions, 1 to [`MAX_VECTOR_DIMENSIONS`].
    pub size: usize,
    /// How near two vectors are.
    pub distance: Distance,
    /// Number format inside the graph.
    pub graph: GraphType,
    /// HNSW links per node, 4 to 128.
    pub m: usize,
    /// HNSW candidates while building, 8 to 4096.
    pub ef_construct: usize,
}

impl VectorParams {
    /// Parameters with the default graph: f16, m 16, ef_construct 100.
    pub fn new(size: usize, distance: Distance) -> Self {
        VectorParams { size, distance, graph: GraphType::default(), m: 16, ef_construct: 100 }
    }
}

/// What a payload index holds.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum FieldType {
    /// Exact strings.
    Keyword,
    /// Signed integers, also for ranges.
    Integer,
    /// Floating-point numbers, for ranges.
    Float,
    /// Booleans.
    Bool,
}

/// Which model makes a collection's vectors; a node with another model of that name refuses.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct EmbedderConfig {
    /// The model's name as `/v1/models` lists it.
    pub model: String,
    /// Dimensions of its vectors.
    pub dimension: usize,
    /// SHA-256 of its weights, or empty for a remote model.
    pub checksum: String,
}

/// How documents are cut. OpenAI's `static` chunking strategy has the same two numbers.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct ChunkerConfig {
    /// The most tokens of the collection's model in one chunk, 16 to 4096, and no more than the model sees.
    pub max_tokens: usize,
    /// Tokens repeated from the chunk before, at most half of `max_tokens`.
    pub overlap_tokens: usize,
}

impl Default for ChunkerConfig {
    fn default() -> Self {
        ChunkerConfig { max_tokens: 256, overlap_tokens: 32 }
    }
}

/// Everything that makes one collection different from another.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct CollectionConfig {
    /// Vectors by name; the unnamed vector has the empty name.
    pub vectors: BTreeMap<String, VectorParams>,
    /// Payload fields with full-text search (BM25).
    pub text_fields: Vec<String>,
    /// Payload indexes by path.
    pub payload_indexes: BTreeMap<String, FieldType>,
    /// Present when the collection is a vector store.
    pub embedder: Option<EmbedderConfig>,
    /// Present when the collection is a vector store.
    pub chunker: Option<ChunkerConfig>,
    /// What a client gave a vector store: its name, metadata and expiry, as one JSON object.
    pub attributes_json: String,
}

impl CollectionConfig {
    /// Checks every limit. The message names the field.
    pub fn validate(&self) -> Result<()> {
        if self.vectors.len() > MAX_NAMED_VECTORS {
            return Err(Error::invalid("vectors", format!("at most {MAX_NAMED_VECTORS} are allowed")));
        }
        if self.payload_indexes.len() > MAX_PAYLOAD_INDEXES {
            let message = format!("at most {MAX_PAYLOAD_INDEXES} payload indexes are allowed");
            return Err(Error::invalid("field_name", message));
        }
        for (name, params) in &self.vectors {
            let field = |part: &str| match name.as_str() {
                "" => format!("vectors.{part}"),
                name => format!("vectors.{name}.{part}"),
            };
            check_range(field("size"), params.size, 1, MAX_VECTOR_DIMENSIONS)?;
            check_range(field("hnsw_config.m"), params.m, 4, 128)?;
            check_range(field("hnsw_config.ef_construct"), params.ef_construct, 8, 4096)?;
        }
        if let Some(chunker) = &self.chunker {
            check_range("chunking_strategy.static.max_chunk_size_tokens", chunker.max_tokens, 16, 4096)?;
            let most = chunker.max_tokens / 2;
            check_range("chunking_strategy.static.chunk_overlap_tokens", chunker.overlap_tokens, 0, most)?;
        }
        Ok(())
    }
}

fn check_range(field: impl std::fmt::Display, value: usize, least: usize, most: usize) -> Result<()> {
    if (least..=most).contains(&value) {
        return Ok(());
    }
    Err(Error::invalid(field, format!("{value} is not between {least} and {most}")))
}

/// Checks the name of a collection or an alias: 1 to [`MAX_NAME_BYTES`] bytes of letters,
/// digits, `_`, `-` and `.`, and not a path.
pub fn validate_name(field: &str, name: &str) -> Result<()> {
    let allowed = |c: char| c.is_alphanumeric() || matches!(c, '_' | '-' | '.');
    if name.is_empty() || name.len() > MAX_NAME_BYTES {
        return Err(Error::invalid(field, format!("a name has 1 to {MAX_NAME_BYTES} bytes")));
    }
    if !name.chars().all(allowed) || name.starts_with('.') {
        let rule = "a name has letters, digits, '_', '-' and '.', and does not start with '.'";
        return Err(Error::invalid(field, rule));
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_and_limits_are_checked() {
        for good in ["a", "docs-2024_v1.2", "文档"] {
            assert!(validate_name("collection", good).is_ok(), "{good}");
        }
        for bad in ["", "..", "a/b", "a b", "x\n", &"a".repeat(256)] {
            assert!(validate_name("collection", bad).is_err(), "{bad:?}");
        }
        let mut config = CollectionConfig::default();
        config.vectors.insert("title".into(), VectorParams::new(65_537, Distance::Dot));
        let error = config.validate().expect_err("too many dimensions");
        assert_eq!(error.field.as_deref(), Some("vectors.title.size"));
    }
}
