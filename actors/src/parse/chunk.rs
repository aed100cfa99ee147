//! Cutting parsed text into chunks of the model's tokens, with overlap; pure.
//!
//! A chunk is embedded with its heading. Both together never have more tokens than the model sees, whatever
//! the collection asks for: the rest would be shown, and found by its words, but not by its meaning.

use std::borrow::Cow;

use shoal_proto::ChunkerConfig;
use text_splitter::{ChunkConfig, ChunkSizer, TextSplitter};

use super::{Parsed, Section};

/// The most chunks of one document.
pub const MAX_CHUNKS: usize = 100_000;
/// A heading takes at most this part of what the model sees: a longer one is text.
const HEADING_PART: usize = 4;

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

/// Cuts a document for a model that sees `most_tokens` of a text. The same input gives the same chunks, so
/// that a new leader can go on where the old one stopped.
///
/// # Errors
/// A sentence for the user, when there are too many chunks or none.
pub fn chunk(
    parsed: &Parsed,
    config: &ChunkerConfig,
    most_tokens: usize,
    count_tokens: impl Fn(&str) -> usize,
) -> Result<Vec<Chunk>, String> {
    let mut chunks = Vec::new();
    let mut offset = 0;
    for section in &parsed.sections {
        let (heading, whole) = headed(section, most_tokens / HEADING_PART, &count_tokens);
        let heading_tokens = heading.map_or(0, |heading| tokens_of_heading(heading, &count_tokens));
        let max_tokens = config.max_tokens.min(most_tokens.saturating_sub(heading_tokens)).max(1);
        let chunk_config = ChunkConfig::new(max_tokens)
            .with_sizer(Sizer(&count_tokens))
            .with_overlap(config.overlap_tokens.min(max_tokens / 2))
            .map_err(|error| format!("chunking: {error}"))?;
        for (byte, text) in TextSplitter::new(chunk_config).chunk_indices(&whole) {
            let start = offset + whole[..byte].chars().count();
            chunks.push(Chunk {
                text: text.to_owned(),
                page: section.page,
                heading: heading.map(str::to_owned),
                char_range: (start, start + text.chars().count()),
            });
            if chunks.len() > MAX_CHUNKS {
                return Err(format!("the document has more than {MAX_CHUNKS} chunks"));
            }
        }
        offset += whole.chars().count();
    }
    match chunks.is_empty() {
        true => Err("the document has no text".into()),
        false => Ok(chunks),
    }
}

/// A section's heading and text. What is too long for a heading begins the text: there it is cut, and none of
/// it is lost.
fn headed<'a>(
    section: &'a Section,
    most_tokens: usize,
    count_tokens: impl Fn(&str) -> usize,
) -> (Option<&'a str>, Cow<'a, str>) {
    match section.heading.as_deref() {
        Some(long) if tokens_of_heading(long, &count_tokens) > most_tokens => {
            (None, Cow::Owned(format!("{long}\n{}", section.text)))
        }
        heading => (heading, Cow::Borrowed(section.text.as_str())),
    }
}

/// Tokens of a heading and of the line break behind it.
fn tokens_of_heading(heading: &str, count_tokens: impl Fn(&str) -> usize) -> usize {
    count_tokens(heading) + 1
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_embedded_is_never_more_than_the_model_sees() {
        let words = |name: &str, count: usize| (0..count).map(|n| format!("{name}{n} ")).collect::<String>();
        let section = |heading: &str, name: &str| Section {
            page: None,
            heading: (!heading.is_empty()).then(|| heading.to_owned()),
            text: words(name, 300),
        };
        let parsed = Parsed {
            sections: vec![section("", "a"), section("a heading", "b"), section(&words("long", 60), "c")],
            page_count: 0,
        };
        let count = |text: &str| text.split_whitespace().count();
        // A collection that was made before there was a limit may ask for more.
        let config = ChunkerConfig { max_tokens: 4096, overlap_tokens: 2048 };
        let chunks = chunk(&parsed, &config, 40, count).expect("chunks");
        let longest = chunks.iter().map(|chunk| count(&chunk.embedded_text())).max();
        assert!(longest.is_some_and(|longest| (35..=40).contains(&longest)), "{longest:?}");
        for word in ["a", "b", "c"].map(|name| words(name, 300)).join("").split_whitespace() {
            assert!(chunks.iter().any(|chunk| chunk.text.split_whitespace().any(|w| w == word)), "{word}");
        }
        // What is too long for a heading is text, all of it.
        for word in words("long", 60).split_whitespace() {
            assert!(chunks.iter().any(|chunk| chunk.text.contains(word)), "{word}");
        }
        let headings: Vec<&str> = chunks.iter().filter_map(|chunk| chunk.heading.as_deref()).collect();
        assert!(!headings.is_empty() && headings.iter().all(|heading| *heading == "a heading"));
    }

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
        let chunks = chunk(&parsed, &config, 100, count).expect("chunks");
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
        assert!(chunk(&Parsed::default(), &config, 100, count).is_err());
    }
}
