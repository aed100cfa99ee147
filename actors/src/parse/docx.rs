//! DOCX: paragraphs and table cells of the main document, cut at headings.

use std::io::{Cursor, Read};

use quick_xml::Reader;
use quick_xml::events::{BytesStart, Event};

use super::{Parsed, Section};

/// The most entries in the archive.
const MAX_ENTRIES: usize = 10_000;
/// The most bytes that the main document may inflate to, counted while inflating.
const MAX_XML_BYTES: u64 = 256 << 20;
/// How many times larger than the file the main document may be.
const MAX_RATIO: u64 = 200;
/// The deepest nesting of elements.
const MAX_DEPTH: usize = 256;

pub(super) fn parse(bytes: &[u8]) -> Result<Parsed, String> {
    let mut archive =
        zip::ZipArchive::new(Cursor::new(bytes)).map_err(|error| format!("the DOCX is damaged: {error}"))?;
    if archive.len() > MAX_ENTRIES {
        return Err(format!("archive_limits: more than {MAX_ENTRIES} entries"));
    }
    let main =
        archive.by_name("word/document.xml").map_err(|_| "the DOCX has no main document".to_owned())?;
    let most = MAX_XML_BYTES.min((bytes.len() as u64).saturating_mul(MAX_RATIO));
    let mut xml = Vec::new();
    main.take(most + 1).read_to_end(&mut xml).map_err(|error| format!("the DOCX is damaged: {error}"))?;
    if xml.len() as u64 > most {
        return Err("archive_limits: the main document inflates to too much".into());
    }
    parse_xml(&xml)
}

fn parse_xml(xml: &[u8]) -> Result<Parsed, String> {
    let mut reader = Reader::from_reader(xml);
    let mut sections = vec![Section::default()];
    let mut paragraph = String::new();
    let (mut is_heading, mut is_text, mut is_deleted, mut depth) = (false, false, false, 0usize);
    loop {
        match reader.read_event().map_err(|error| format!("the DOCX is damaged: {error}"))? {
            Event::DocType(_) => return Err("the DOCX declares a document type, which is refused".into()),
            Event::Start(element) => {
                depth += 1;
                if depth > MAX_DEPTH {
                    return Err(format!("the DOCX nests deeper than {MAX_DEPTH}"));
                }
                match element.local_name().as_ref() {
                    b"p" => is_heading = false,
                    b"t" => is_text = true,
                    b"del" => is_deleted = true,
                    b"pStyle" => is_heading |= is_heading_style(&element),
                    _ => {}
                }
            }
            Event::Empty(element) => match element.local_name().as_ref() {
                b"tab" => paragraph.push('\t'),
                b"br" | b"cr" => paragraph.push('\n'),
                b"pStyle" => is_heading |= is_heading_style(&element),
                _ => {}
            },
            Event::Text(text) if is_text && !is_deleted => {
                paragraph.push_str(&text.decode().map_err(|error| format!("the DOCX is damaged: {error}"))?);
            }
            Event::GeneralRef(entity) if is_text && !is_deleted => push_entity(&mut paragraph, &entity),
            Event::End(element) => {
                depth = depth.saturating_sub(1);
                match element.local_name().as_ref() {
                    b"t" => is_text = false,
                    b"del" => is_deleted = false,
                    b"tc" => paragraph.push(' '),
                    b"p" => end_paragraph(&mut sections, &mut paragraph, is_heading),
                    _ => {}
                }
            }
            Event::Eof => break,
            _ => {}
        }
    }
    Ok(Parsed { sections, page_count: 0 })
}

fn end_paragraph(sections: &mut Vec<Section>, paragraph: &mut String, is_heading: bool) {
    let text = std::mem::take(paragraph);
    if is_heading && !text.trim().is_empty() {
        sections.push(Section { heading: Some(text.trim().to_owned()), ..Section::default() });
    } else if let Some(section) = sections.last_mut() {
        section.text.push_str(&text);
        section.text.push('\n');
    }
}

fn is_heading_style(element: &BytesStart<'_>) -> bool {
    let style =
        element.attributes().flatten().find(|attribute| attribute.key.local_name().as_ref() == b"val");
    style.is_some_and(|style| {
        let name = String::from_utf8_lossy(&style.value).to_lowercase();
        name.starts_with("heading") || name == "title"
    })
}

fn push_entity(into: &mut String, entity: &quick_xml::events::BytesRef<'_>) {
    if let Ok(Some(c)) = entity.resolve_char_ref() {
        into.push(c);
        return;
    }
    let name: &[u8] = entity.as_ref();
    into.push_str(match name {
        b"amp" => "&",
        b"lt" => "<",
        b"gt" => ">",
        b"quot" => "\"",
        b"apos" => "'",
        _ => "",
    });
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn paragraphs_headings_and_entities() {
        let xml = br#"<w:document><w:body><w:p><w:r><w:t>Intro &amp; more</w:t></w:r></w:p>
            <w:p><w:pPr><w:pStyle w:val="Heading1"/></w:pPr><w:r><w:t>Part</w:t></w:r></w:p>
            <w:p><w:r><w:t>a</w:t><w:tab/><w:t>b</w:t></w:r><w:del><w:r><w:t>gone</w:t></w:r></w:del></w:p></w:body></w:document>"#;
        let parsed = parse_xml(xml).expect("parses");
        let sections: Vec<_> =
            parsed.sections.iter().map(|s| (s.heading.as_deref(), s.text.trim())).collect();
        assert_eq!(sections, [(None, "Intro & more"), (Some("Part"), "a\tb")]);
        assert!(parse_xml(b"<!DOCTYPE x [<!ENTITY a 'b'>]><x/>").is_err());
    }
}
