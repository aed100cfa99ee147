//! Cutting parsed text into chunks of the model's tokens, with overlap; pure.

use shoal_proto::ChunkerConfig;
use text_splitter::{ChunkConfig, ChunkSizer, TextSplitter};

use super::Parsed;

/// The most chunks of one document.
pub const MAX_CHUNKS: usize = 100_000;

/// One chunk.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Chunk {
    /// The text.
    pub text: String,
    /// The page, from 1.
    pub page: Option<u32>,
    /// The nearest heading above.
    pub heading: Option<String>,
    /// First and last (excluded) character in the document's whole text.
    pub char_range: (usize, usize),
}

impl Chunk {
    /// What is embedded: the heading gives a chunk its context.
    pub fn embedded_text(&self) -> String {
        match &self.heading {
            Some(heading) => format!("{heading}\n{}", self.text),
            None => self.text.clone(),
        }
    }
}

struct Sizer<F>(F);

impl<F: Fn(&str) -> usize> ChunkSizer for Sizer<F> {
    fn size(&self, chunk: &str) -> usize {
        (self.0)(chunk)
    }
}

/// Cuts a document. The same input gives the same chunks, so that a new leader can go on where
/// the old one stopped.
///
/// # Errors
/// A sentence for the user, when there are too many chunks or none.
pub fn chunk(
    parsed: &Parsed,
    config: &ChunkerConfig,
    count_tokens: impl Fn(&str) -> usize,
) -> Result<Vec<Chunk>, String> {
    let chunk_config = ChunkConfig::new(config.max_tokens)
        .with_sizer(Sizer(count_tokens))
        .with_overlap(config.overlap_tokens)
        .map_err(|error| format!("chunking: {error}"))?;
    let splitter = TextSplitter::new(chunk_config);
    let mut chunks = Vec::new();
    let mut offset = 0;
    for section in &parsed.sections {
        for (byte, text) in splitter.chunk_indices(&section.text) {
            let start = offset + section.text[..byte].chars().count();
            chunks.push(Chunk {
                text: text.to_owned(),
                page: section.page,
                heading: section.heading.clone(),
                char_range: (start, start + text.chars().count()),
            });
            if chunks.len() > MAX_CHUNKS {
                return Err(format!("the document has more than {MAX_CHUNKS} chunks"));
            }
        }
        offset += section.text.chars().count();
    }
    match chunks.is_empty() {
        true => Err("the document has no text".into()),
        false => Ok(chunks),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::parse::Section;

    #[test]
    fn chunks_keep_their_place_and_their_size() {
        let words =
            |from: usize, to: usize| (from..to).map(|n| format!("word{n}")).collect::<Vec<_>>().join(" ");
        let section =
            |heading: &str, text: String| Section { page: Some(1), heading: Some(heading.into()), text };
        let parsed = Parsed {
            sections: vec![section("A", words(0, 100)), section("B", words(100, 130))],
            page_count: 1,
        };
        let config = ChunkerConfig { max_tokens: 20, overlap_tokens: 4 };
        let count = |text: &str| text.split_whitespace().count();
        let chunks = chunk(&parsed, &config, count).expect("chunks");
        let whole: String = parsed.sections.iter().map(|section| section.text.as_str()).collect();
        for chunk in &chunks {
            assert!(count(&chunk.text) <= 20);
            let (start, end) = chunk.char_range;
            assert_eq!(whole.chars().skip(start).take(end - start).collect::<String>(), chunk.text);
        }
        for number in 0..130 {
            let word = format!("word{number}");
            assert!(chunks.iter().any(|chunk| chunk.text.split_whitespace().any(|w| w == word)), "{word}");
        }
        assert!(chunk(&Parsed::default(), &config, count).is_err());
    }
}
