//! PDF: the text of each page.

use super::{Parsed, Section};

pub(super) fn parse(bytes: &[u8]) -> Result<Parsed, String> {
    let document =
        lopdf::Document::load_mem(bytes).map_err(|error| format!("the PDF is damaged: {error}"))?;
    if document.is_encrypted() {
        return Err("the PDF is encrypted".into());
    }
    let pages = pdf_extract::extract_text_from_mem_by_pages(bytes)
        .map_err(|error| format!("the PDF's text cannot be read: {error}"))?;
    let page_count = pages.len() as u32;
    let sections: Vec<Section> = (1..)
        .zip(pages)
        .map(|(page, text)| Section { page: Some(page), heading: None, text: tidy(&text) })
        .collect();
    if sections.iter().all(|section| section.text.trim().is_empty()) {
        return Err("the PDF has no text (a scan?); text recognition is not supported".into());
    }
    Ok(Parsed { sections, page_count })
}

/// Extraction leaves a blank line between most lines: those are no paragraphs.
fn tidy(text: &str) -> String {
    let lines: Vec<&str> = text.lines().map(str::trim).filter(|line| !line.is_empty()).collect();
    lines.join("\n")
}
