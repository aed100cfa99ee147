//! HTML: visible text, cut at headings.

use scraper::{ElementRef, Html, Node};

use super::{Parsed, Section};

/// The deepest nesting that is followed.
const MAX_DEPTH: usize = 256;
const SKIPPED: [&str; 9] =
    ["script", "style", "noscript", "template", "svg", "head", "nav", "iframe", "canvas"];
const BLOCKS: [&str; 22] = [
    "p",
    "div",
    "section",
    "article",
    "main",
    "ul",
    "ol",
    "li",
    "table",
    "tr",
    "blockquote",
    "pre",
    "figure",
    "dl",
    "dt",
    "dd",
    "header",
    "footer",
    "aside",
    "form",
    "br",
    "hr",
];

pub(super) fn parse(bytes: &[u8]) -> Parsed {
    let document = Html::parse_document(&super::text::decode(bytes));
    let mut sections = vec![Section::default()];
    walk(document.root_element(), &mut sections, 0, false);
    for section in &mut sections {
        let lines: Vec<&str> = section.text.lines().map(str::trim).filter(|line| !line.is_empty()).collect();
        section.text = lines.join("\n");
    }
    Parsed { sections, page_count: 0 }
}

fn walk(element: ElementRef<'_>, sections: &mut Vec<Section>, depth: usize, is_pre: bool) {
    if depth > MAX_DEPTH {
        return;
    }
    for child in element.children() {
        match child.value() {
            Node::Text(text) => {
                if let Some(section) = sections.last_mut() {
                    push_text(&mut section.text, text, is_pre);
                }
            }
            Node::Element(node) if SKIPPED.contains(&node.name()) => {}
            Node::Element(node) => {
                let Some(child) = ElementRef::wrap(child) else { continue };
                let name = node.name();
                if matches!(name, "h1" | "h2" | "h3" | "h4" | "h5" | "h6") {
                    let heading =
                        child.text().collect::<String>().split_whitespace().collect::<Vec<_>>().join(" ");
                    sections.push(Section {
                        heading: Some(heading).filter(|text| !text.is_empty()),
                        ..Section::default()
                    });
                    continue;
                }
                let is_block = BLOCKS.contains(&name);
                let break_line = |sections: &mut Vec<Section>, with: char| {
                    if let Some(section) = sections.last_mut() {
                        section.text.push(with);
                    }
                };
                if is_block {
                    break_line(sections, '\n');
                } else if matches!(name, "td" | "th") {
                    break_line(sections, ' ');
                }
                walk(child, sections, depth + 1, is_pre || name == "pre");
                if is_block {
                    break_line(sections, '\n');
                }
            }
            _ => {}
        }
    }
}

fn push_text(into: &mut String, text: &str, is_pre: bool) {
    if is_pre {
        into.push_str(text);
        return;
    }
    if text.starts_with(char::is_whitespace) && !into.ends_with(char::is_whitespace) {
        into.push(' ');
    }
    into.push_str(&text.split_whitespace().collect::<Vec<_>>().join(" "));
    if text.ends_with(char::is_whitespace) && !into.ends_with(char::is_whitespace) {
        into.push(' ');
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn visible_text_comes_in_sections() {
        let html = b"<html><head><title>t</title><style>x{}</style></head><body><p>Hello <b>big</b>\n world</p>
            <script>no()</script><h2>Part <i>two</i></h2><ul><li>one</li><li>two</li></ul><table><tr><td>a</td><td>b</td></tr></table></body>";
        let parsed = parse(html);
        let sections: Vec<_> =
            parsed.sections.iter().map(|s| (s.heading.as_deref(), s.text.as_str())).collect();
        assert_eq!(sections, [(None, "Hello big world"), (Some("Part two"), "one\ntwo\na b")]);
    }
}
