//! Plain text and Markdown.

use super::{Parsed, Section};

/// Text in whatever encoding it most likely is: UTF-8, by its byte-order mark, or guessed.
pub(super) fn decode(bytes: &[u8]) -> String {
    if let Some((encoding, skip)) = encoding_rs::Encoding::for_bom(bytes) {
        return encoding.decode_without_bom_handling(&bytes[skip..]).0.into_owned();
    }
    match std::str::from_utf8(bytes) {
        Ok(text) => text.to_owned(),
        Err(_) => {
            let mut detector = chardetng::EncodingDetector::new(chardetng::Iso2022JpDetection::Deny);
            detector.feed(bytes, true);
            let encoding = detector.guess(None, chardetng::Utf8Detection::Allow);
            encoding.decode_without_bom_handling(bytes).0.into_owned()
        }
    }
}

pub(super) fn parse_text(bytes: &[u8]) -> Parsed {
    let section = Section { text: decode(bytes), ..Section::default() };
    Parsed { sections: vec![section], page_count: 0 }
}

/// Cuts at headings (`# …`) outside code fences.
pub(super) fn parse_markdown(bytes: &[u8]) -> Parsed {
    let text = decode(bytes);
    let mut sections = vec![Section::default()];
    let mut is_code = false;
    for line in text.lines() {
        if line.trim_start().starts_with("```") || line.trim_start().starts_with("~~~") {
            is_code = !is_code;
        }
        let hashes = line.chars().take_while(|c| *c == '#').count();
        let title = line[hashes..].trim().trim_end_matches('#').trim();
        if !is_code && (1..=6).contains(&hashes) && line[hashes..].starts_with(' ') && !title.is_empty() {
            sections.push(Section { heading: Some(title.to_owned()), ..Section::default() });
            continue;
        }
        if let Some(section) = sections.last_mut() {
            section.text.push_str(line);
            section.text.push('\n');
        }
    }
    Parsed { sections, page_count: 0 }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn markdown_is_cut_at_headings_and_not_in_code() {
        let parsed =
            parse_markdown(b"intro\n# One #\nfirst\n```\n# not a heading\n```\n## Two\nsecond\n#hashtag\n");
        let headings: Vec<_> = parsed.sections.iter().map(|section| section.heading.as_deref()).collect();
        assert_eq!(headings, [None, Some("One"), Some("Two")]);
        assert!(parsed.sections[1].text.contains("# not a heading"));
        assert!(parsed.sections[2].text.contains("#hashtag"));
    }

    #[test]
    fn old_encodings_are_read() {
        assert_eq!(decode("文档".as_bytes()), "文档");
        assert_eq!(decode(b"\xff\xfeh\0i\0"), "hi");
        let gbk = encoding_rs::GBK.encode("数据库系统概论是一本关于数据库的书").0.into_owned();
        assert_eq!(decode(&gbk), "数据库系统概论是一本关于数据库的书");
    }
}
