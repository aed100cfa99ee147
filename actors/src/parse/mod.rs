//! Parsing: bytes of a file in, text in sections out.
//!
//! Files are not trusted. [`child`] is the code of a child process of the same binary that
//! limits itself (memory, CPU seconds, core size) before it looks at a byte; [`run_in_child`]
//! is the parent's side, with a time limit of its own. A crash or a bomb fails one document.

pub mod child;
pub mod chunk;
mod docx;
mod html;
mod pdf;
mod text;

use std::process::Stdio;
use std::time::Duration;

use serde::{Deserialize, Serialize};
use shoal_proto::{Error, ErrorCode};
use tokio::io::{AsyncReadExt, AsyncWriteExt};

/// The hidden subcommand of the binary that runs [`child::main`].
pub const CHILD_COMMAND: &str = "parse-child";
/// The most bytes that a child may answer with.
const MAX_OUTPUT_BYTES: u64 = 48 << 20;

/// Limits of one parse.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct ParseLimits {
    /// Address space of the child, in bytes.
    pub memory_bytes: u64,
    /// CPU time of the child, in seconds.
    pub cpu_seconds: u64,
    /// Wall time, in seconds.
    pub wall_seconds: u64,
}

impl Default for ParseLimits {
    fn default() -> Self {
        ParseLimits { memory_bytes: 1 << 30, cpu_seconds: 60, wall_seconds: 120 }
    }
}

/// A part of a document under one heading, on one page.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Section {
    /// The page, from 1, where the format has pages.
    pub page: Option<u32>,
    /// The nearest heading above.
    pub heading: Option<String>,
    /// The text, without the heading.
    pub text: String,
}

/// What a parser made of a file.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Parsed {
    /// The sections, in order.
    pub sections: Vec<Section>,
    /// Pages, where the format has pages.
    pub page_count: u32,
}

impl Parsed {
    /// All text, headings included.
    pub fn content(&self) -> String {
        let mut content = String::new();
        let mut heading = None;
        for section in &self.sections {
            if section.heading.is_some() && section.heading != heading {
                heading = section.heading.clone();
                content.push_str(heading.as_deref().unwrap_or_default());
                content.push_str("\n\n");
            }
            content.push_str(section.text.trim());
            content.push_str("\n\n");
        }
        content.truncate(content.trim_end().len());
        content
    }
}

/// The formats that are parsed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Format {
    Text,
    Markdown,
    Html,
    Pdf,
    Docx,
}

impl Format {
    /// The format of a file, by its name and then by its first bytes.
    pub(crate) fn of(filename: &str, bytes: &[u8]) -> Result<Format, String> {
        let extension = filename.rsplit_once('.').map(|(_, end)| end.to_lowercase()).unwrap_or_default();
        match extension.as_str() {
            "md" | "markdown" => return Ok(Format::Markdown),
            "html" | "htm" | "xhtml" => return Ok(Format::Html),
            "pdf" => return Ok(Format::Pdf),
            "docx" => return Ok(Format::Docx),
            "txt" | "text" | "log" | "rst" | "csv" | "tsv" | "json" | "xml" | "yaml" | "yml" | "toml" => {
                return Ok(Format::Text);
            }
            _ => {}
        }
        if bytes.starts_with(b"%PDF-") {
            return Ok(Format::Pdf);
        }
        if bytes.starts_with(b"PK\x03\x04") {
            return Err(format!("{filename:?} is an archive of a kind that is not supported"));
        }
        match bytes.iter().take(8192).any(|byte| *byte == 0) {
            true => {
                Err(format!("{filename:?} is of a kind that is not supported (txt, md, html, pdf, docx are)"))
            }
            false => Ok(Format::Text),
        }
    }
}

/// Parses in this process. Only [`child`] and tests call it: input is not trusted.
pub(crate) fn parse(filename: &str, bytes: &[u8]) -> Result<Parsed, String> {
    let mut parsed = match Format::of(filename, bytes)? {
        Format::Text => text::parse_text(bytes),
        Format::Markdown => text::parse_markdown(bytes),
        Format::Html => html::parse(bytes),
        Format::Pdf => pdf::parse(bytes)?,
        Format::Docx => docx::parse(bytes)?,
    };
    parsed.sections.retain(|section| section.text.chars().any(|c| !c.is_whitespace()));
    Ok(parsed)
}

/// Parses in a child process under limits.
///
/// # Errors
/// Unprocessable when the file cannot be parsed and trying again would not help; internal when
/// the child was killed or crashed, which may be the file's fault or the machine's.
pub async fn run_in_child(limits: ParseLimits, filename: &str, bytes: &[u8]) -> Result<Parsed, Error> {
    let started = std::time::Instant::now();
    let result =
        tokio::time::timeout(Duration::from_secs(limits.wall_seconds), talk(limits, filename, bytes)).await;
    metrics::histogram!("shoal_parse_seconds").record(started.elapsed());
    let result = result.unwrap_or_else(|_| {
        Err(Error::internal(format!("the parser took longer than {} s and was stopped", limits.wall_seconds)))
    });
    if result.is_err() {
        metrics::counter!("shoal_parse_failures_total").increment(1);
    }
    result
}

async fn talk(limits: ParseLimits, filename: &str, bytes: &[u8]) -> Result<Parsed, Error> {
    let failed = |what: &str| Error::internal(format!("the parser {what}"));
    let program = std::env::current_exe().map_err(Error::internal)?;
    let mut child = tokio::process::Command::new(program)
        .arg(CHILD_COMMAND)
        .env_clear()
        // The allocator would take a gigabyte of address space before the child can limit itself: a lower
        // limit would not count then, and at that limit not even a thread could be started.
        .env("MIMALLOC_ARENA_RESERVE", "0")
        // The threads of the PDF parser take address space as well, one for each core.
        .env("RAYON_NUM_THREADS", "1")
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::null())
        .kill_on_drop(true)
        .spawn()
        .map_err(|error| failed(&format!("did not start: {error}")))?;
    let mut stdin = child.stdin.take().ok_or_else(|| failed("has no input"))?;
    let mut stdout = child.stdout.take().ok_or_else(|| failed("has no output"))?.take(MAX_OUTPUT_BYTES + 1);
    let header = serde_json::to_vec(&(limits, filename)).map_err(Error::internal)?;
    let feed = async {
        // A child that dies early closes the pipe; its exit says more than the write's error.
        let fed = async {
            stdin.write_all(&(header.len() as u32).to_le_bytes()).await?;
            stdin.write_all(&header).await?;
            stdin.write_all(bytes).await
        };
        drop(fed.await);
        drop(stdin);
    };
    let mut output = Vec::new();
    let (_, read) = tokio::join!(feed, stdout.read_to_end(&mut output));
    read.map_err(|error| failed(&format!("could not be read: {error}")))?;
    if output.len() as u64 > MAX_OUTPUT_BYTES {
        return Err(Error::new(ErrorCode::Unprocessable, "the file holds more text than a document may"));
    }
    let status = child.wait().await.map_err(Error::internal)?;
    if !status.success() {
        return Err(failed(&format!("crashed or ran out of its limits ({status})")));
    }
    let answer: Result<Parsed, String> =
        serde_json::from_slice(&output).map_err(|_| failed("gave no answer"))?;
    answer.map_err(|reason| Error::new(ErrorCode::Unprocessable, reason))
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::path::Path;

    /// Real files of every supported kind, some of them damaged on purpose: each gives text or a
    /// reason, and most give text.
    #[test]
    fn real_files_give_text_or_a_reason() {
        let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../shared/data/office");
        let Ok(entries) = std::fs::read_dir(&folder) else {
            eprintln!("skipped: real_files_give_text_or_a_reason: {} is not there", folder.display());
            return;
        };
        let (mut parsed, mut refused) = (0, Vec::new());
        for path in entries.map(|entry| entry.expect("an entry").path()) {
            let name = path.file_name().expect("a name").to_string_lossy().into_owned();
            if !["pdf", "docx", "html", "md", "txt", "csv"].iter().any(|end| name.ends_with(end)) {
                continue;
            }
            let bytes = std::fs::read(&path).expect("readable");
            let answer =
                std::panic::catch_unwind(|| parse(&name, &bytes)).unwrap_or_else(|_| Err("panicked".into()));
            match answer {
                Ok(found) if !found.sections.is_empty() => parsed += 1,
                Ok(_) => refused.push(format!("{name}: empty")),
                Err(reason) => refused.push(format!("{name}: {reason}")),
            }
        }
        assert!(parsed > refused.len() * 2, "{parsed} parsed, refused: {refused:#?}");
    }

    #[test]
    fn formats_are_told_by_name_and_then_by_content() {
        assert_eq!(Format::of("a.PDF", b""), Ok(Format::Pdf));
        assert_eq!(Format::of("noname", b"%PDF-1.7"), Ok(Format::Pdf));
        assert_eq!(Format::of("notes", b"plain words"), Ok(Format::Text));
        assert!(Format::of("a.exe", b"MZ\0\0").is_err());
        assert!(Format::of("a.xlsx", b"PK\x03\x04").is_err());
    }
}
