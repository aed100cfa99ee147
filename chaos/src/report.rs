//! What people read: a line for each checker, JSON for machines, and one page of HTML with a
//! timeline, the faults as bars, and the evidence.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};

use crate::checkers::{Judgement, Verdict};
use crate::history::{History, Outcome, Phase};
use crate::run::Judged;

/// Columns of a timeline.
const COLUMNS: usize = 240;

/// What came of a scenario.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Entry {
    /// The row of the matrix.
    pub row: u32,
    /// The scenario.
    pub scenario: String,
    /// What was promised.
    pub promise: String,
    /// The seed of the schedule.
    pub seed: u64,
    /// Passed, failed, or skipped and why.
    pub result: RunResult,
    /// What each checker says.
    pub verdicts: Vec<Verdict>,
    /// Seconds that the run took.
    pub seconds: f64,
    /// The command that runs it again.
    pub command: String,
    /// Bars and counts over time, for the page.
    pub timeline: Timeline,
}

/// How a scenario ended.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum RunResult {
    /// Every checker says valid.
    Passed,
    /// Some checker says invalid, or cannot tell.
    Failed,
    /// It could not be run.
    Skipped(String),
}

/// What happened when.
#[derive(Clone, Debug, Default, Serialize, Deserialize)]
pub struct Timeline {
    /// Seconds from start to end.
    pub seconds: f64,
    /// Acknowledged operations in each column.
    pub ok: Vec<u32>,
    /// Operations that failed or whose outcome is unknown in each column.
    pub not_ok: Vec<u32>,
    /// The slowest acknowledged operation in each column, in milliseconds.
    pub slowest_ms: Vec<f32>,
    /// Faults: name, detail, first and last second.
    pub faults: Vec<(String, String, f64, f64)>,
}

impl Timeline {
    /// The timeline of a history.
    pub fn of(history: &History) -> Timeline {
        let operations = history.operations();
        let last = operations.iter().map(|operation| operation.ended_ns).max().unwrap_or(1).max(1);
        let column =
            |ns: u64| ((ns as u128 * COLUMNS as u128 / (last as u128 + 1)) as usize).min(COLUMNS - 1);
        let mut timeline = Timeline {
            seconds: last as f64 / 1e9,
            ok: vec![0; COLUMNS],
            not_ok: vec![0; COLUMNS],
            slowest_ms: vec![0.0; COLUMNS],
            faults: Vec::new(),
        };
        for operation in &operations {
            let at = column(operation.ended_ns);
            match operation.outcome {
                Outcome::Ok => {
                    timeline.ok[at] += 1;
                    let ms = (operation.ended_ns - operation.began_ns) as f32 / 1e6;
                    timeline.slowest_ms[at] = timeline.slowest_ms[at].max(ms);
                }
                Outcome::Fail | Outcome::Unknown => timeline.not_ok[at] += 1,
            }
        }
        let mut open: BTreeMap<String, (u64, String)> = BTreeMap::new();
        for (ns, name, phase, detail) in history.faults() {
            let seconds = |ns: u64| ns as f64 / 1e9;
            match phase {
                Phase::Begin => drop(open.insert(name.to_owned(), (ns, detail.to_owned()))),
                Phase::End => {
                    if let Some((from, detail)) = open.remove(name) {
                        timeline.faults.push((name.to_owned(), detail, seconds(from), seconds(ns)));
                    }
                }
                Phase::Moment | Phase::Wrong => {
                    timeline.faults.push((name.to_owned(), detail.to_owned(), seconds(ns), seconds(ns)));
                }
            }
        }
        timeline
    }
}

/// Whether every verdict is valid.
pub fn passed(verdicts: &[Verdict]) -> bool {
    verdicts.iter().all(|verdict| verdict.judgement == Judgement::Valid)
}

/// A judged run in lines for a terminal, with the operations that show what is wrong or without.
pub fn text(judged: &Judged, with_evidence: bool) -> String {
    let mut text = String::new();
    for verdict in &judged.verdicts {
        let figures: Vec<String> =
            verdict.figures.iter().map(|(name, value)| format!("{name} {}", round(*value))).collect();
        let judgement = format!("{:?}", verdict.judgement).to_lowercase();
        let line = format!("  {judgement:8} {:18} {}", verdict.checker, figures.join(", "));
        text.push_str(line.trim_end());
        text.push('\n');
        for finding in &verdict.findings {
            text.push_str(&format!("           - {finding}\n"));
        }
        if with_evidence && verdict.judgement == Judgement::Invalid {
            for operation in &verdict.evidence {
                text.push_str(&format!("             {operation}\n"));
            }
        }
    }
    text
}

/// The results as a Markdown table, for a README.
pub fn markdown(entries: &[Entry]) -> String {
    let mut table = "| Row | Scenario | Result | Acknowledged or answered | Longest write gap |\n".to_owned();
    table.push_str("|---|---|---|---|---|\n");
    for entry in entries {
        let figure = |checker: &str, name: &str| {
            let verdict = entry.verdicts.iter().find(|verdict| verdict.checker == checker);
            verdict.and_then(|verdict| verdict.figures.get(name).copied())
        };
        let result = match &entry.result {
            RunResult::Passed => "passed".to_owned(),
            RunResult::Failed => "**failed**".to_owned(),
            RunResult::Skipped(reason) => format!("skipped: {reason}"),
        };
        let ok = figure("coverage", "ok").map_or_else(String::new, |ok| format!("{ok}"));
        let gap = figure("availability", "longest_write_gap_ms");
        let gap = gap.map_or_else(String::new, |gap| format!("{:.1} s", gap / 1000.0));
        table.push_str(&format!("| {} | {} | {result} | {ok} | {gap} |\n", entry.row, entry.scenario));
    }
    table
}

fn round(value: f64) -> String {
    match value.fract() == 0.0 {
        true => format!("{value}"),
        false => format!("{value:.3}"),
    }
}

fn escape(text: &str) -> String {
    text.replace('&', "&amp;").replace('<', "&lt;").replace('>', "&gt;").replace('"', "&quot;")
}

/// All entries on one page that needs nothing else.
pub fn html(entries: &[Entry], machine: &str, date: &str) -> String {
    let mut page = String::from(
        "<!doctype html><html lang=\"en\"><meta charset=\"utf-8\"><title>Shoal: chaos</title><style>\
         body{font:14px/1.45 system-ui,sans-serif;margin:2rem auto;max-width:70rem;padding:0 1rem;color:#222}\
         table{border-collapse:collapse;width:100%}td,th{padding:.25rem .5rem;border-bottom:1px solid #ddd;\
         text-align:left;vertical-align:top}.passed{color:#0a7a2f}.failed{color:#b00020;font-weight:600}\
         .skipped{color:#777}pre{background:#f6f6f6;padding:.6rem;overflow:auto;font-size:12px}\
         svg{width:100%;height:auto;background:#fafafa;border:1px solid #ddd}code{background:#f2f2f2}</style>",
    );
    let count = |wanted: fn(&RunResult) -> bool| entries.iter().filter(|entry| wanted(&entry.result)).count();
    let passed = count(|result| *result == RunResult::Passed);
    let failed = count(|result| *result == RunResult::Failed);
    let skipped = count(|result| matches!(result, RunResult::Skipped(_)));
    page.push_str(&format!(
        "<h1>Shoal: chaos</h1><p>{passed} passed, {failed} failed, {skipped} skipped. {} &middot; {}</p>\
         <table><tr><th>row<th>scenario<th>promise<th>result<th>operations<th>longest write gap",
        escape(machine),
        escape(date)
    ));
    for entry in entries {
        let figure = |checker: &str, name: &str| {
            let verdict = entry.verdicts.iter().find(|verdict| verdict.checker == checker);
            verdict.and_then(|verdict| verdict.figures.get(name)).map_or(String::new(), |value| round(*value))
        };
        let (class, word) = result_words(&entry.result);
        page.push_str(&format!(
            "<tr><td>{}<td><a href=\"#{name}\">{name}</a><td>{}<td class={class}>{}<td>{}<td>{} ms",
            entry.row,
            escape(&entry.promise),
            escape(&word),
            figure("coverage", "ok"),
            figure("availability", "longest_write_gap_ms"),
            name = escape(&entry.scenario),
        ));
    }
    page.push_str("</table>");
    for entry in entries {
        html_entry(&mut page, entry);
    }
    page.push_str("</html>\n");
    page
}

fn result_words(result: &RunResult) -> (&'static str, String) {
    match result {
        RunResult::Passed => ("passed", "passed".to_owned()),
        RunResult::Failed => ("failed", "failed".to_owned()),
        RunResult::Skipped(reason) => ("skipped", format!("skipped: {reason}")),
    }
}

fn html_entry(page: &mut String, entry: &Entry) {
    let (class, word) = result_words(&entry.result);
    page.push_str(&format!(
        "<h2 id=\"{name}\">{} {name} <small class={class}>{}</small></h2><p>{}</p><p><code>{}</code></p>",
        entry.row,
        escape(&word),
        escape(&entry.promise),
        escape(&entry.command),
        name = escape(&entry.scenario),
    ));
    if matches!(entry.result, RunResult::Skipped(_)) {
        return;
    }
    html_timeline(page, &entry.timeline);
    page.push_str("<table>");
    for verdict in &entry.verdicts {
        let class = if verdict.judgement == Judgement::Valid { "passed" } else { "failed" };
        let figures: Vec<String> =
            verdict.figures.iter().map(|(name, value)| format!("{name} {}", round(*value))).collect();
        page.push_str(&format!(
            "<tr><td>{}<td class={class}>{}<td>{}",
            escape(&verdict.checker),
            format!("{:?}", verdict.judgement).to_lowercase(),
            escape(&figures.join(", "))
        ));
        if !verdict.findings.is_empty() {
            page.push_str(&format!("<pre>{}</pre>", escape(&verdict.findings.join("\n"))));
        }
        if verdict.judgement == Judgement::Invalid && !verdict.evidence.is_empty() {
            page.push_str(&format!("<pre>{}</pre>", escape(&verdict.evidence.join("\n"))));
        }
    }
    page.push_str("</table>");
}

/// Faults as bars on top, latency as dots, throughput as columns below.
fn html_timeline(page: &mut String, timeline: &Timeline) {
    let (width, height) = (4.0 * COLUMNS as f64, 150.0);
    let x = |seconds: f64| seconds / timeline.seconds.max(1e-9) * width;
    page.push_str(&format!("<svg viewBox=\"0 0 {width} {height}\" role=\"img\" aria-label=\"timeline\">"));
    for (name, detail, from, to) in &timeline.faults {
        page.push_str(&format!(
            "<rect x=\"{:.1}\" y=\"0\" width=\"{:.1}\" height=\"{height}\" fill=\"#d33\" opacity=\".14\">\
             <title>{}: {} ({from:.1} s to {to:.1} s)</title></rect>",
            x(*from),
            (x(*to) - x(*from)).max(2.0),
            escape(name),
            escape(detail)
        ));
    }
    let most = timeline.ok.iter().zip(&timeline.not_ok).map(|(ok, not)| ok + not).max().unwrap_or(1).max(1);
    let slowest = timeline.slowest_ms.iter().copied().fold(1.0f32, f32::max);
    for at in 0..timeline.ok.len() {
        let left = 4.0 * at as f64;
        let ok = f64::from(timeline.ok[at]) / f64::from(most) * 70.0;
        let not_ok = f64::from(timeline.not_ok[at]) / f64::from(most) * 70.0;
        page.push_str(&format!(
            "<rect x=\"{left}\" y=\"{:.1}\" width=\"3\" height=\"{ok:.1}\" fill=\"#2a7\"/>\
             <rect x=\"{left}\" y=\"{:.1}\" width=\"3\" height=\"{not_ok:.1}\" fill=\"#b00\"/>",
            height - ok,
            height - ok - not_ok,
        ));
        if timeline.slowest_ms[at] > 0.0 {
            let y = 72.0 - f64::from((1.0 + timeline.slowest_ms[at]).ln() / (1.0 + slowest).ln()) * 68.0;
            page.push_str(&format!(
                "<circle cx=\"{:.1}\" cy=\"{y:.1}\" r=\"1.5\" fill=\"#225\"/>",
                left + 1.5
            ));
        }
    }
    page.push_str(&format!(
        "</svg><p><small>{:.0} s; red: faults (hover for what); dots: slowest answer, up to {slowest:.0} ms, \
         logarithmic; green: acknowledged, dark red: failed or unknown, up to {most} a column.</small></p>",
        timeline.seconds
    ));
}
