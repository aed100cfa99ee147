//! What a run says: a Markdown table on stdout, row by row as things are measured, and a JSON file
//! with every raw number.

use std::path::PathBuf;

use anyhow::{Context, Result};
use serde_json::{Map, Value, json};

/// One measurement.
pub(super) struct Row {
    what: String,
    goal: String,
    measured: String,
    ratio: Option<f64>,
    note: String,
}

impl Row {
    /// A measurement without goal or other side.
    pub(super) fn new(what: impl Into<String>, measured: impl Into<String>) -> Row {
        let (what, measured) = (what.into(), measured.into());
        Row { what, goal: String::new(), measured, ratio: None, note: String::new() }
    }

    /// With what is to be reached.
    pub(super) fn goal(self, goal: &str) -> Row {
        Row { goal: goal.to_owned(), ..self }
    }

    /// With what was measured divided by the other side.
    pub(super) fn ratio(self, ratio: f64) -> Row {
        Row { ratio: Some(ratio), ..self }
    }

    /// With how to read it.
    pub(super) fn note(self, note: impl Into<String>) -> Row {
        Row { note: note.into(), ..self }
    }

    fn to_markdown(&self) -> String {
        let ratio = self.ratio.map(|ratio| format!("{ratio:.2}")).unwrap_or_default();
        let cells = [&self.what, &self.goal, &self.measured, &ratio, &self.note];
        // A cell is one line without the character that ends it.
        let cells = cells.map(|cell| cell.replace('\n', " ").replace('|', "/"));
        format!("| {} |", cells.join(" | "))
    }

    fn to_json(&self) -> Value {
        json!({
            "what": self.what,
            "goal": self.goal,
            "measured": self.measured,
            "ratio": self.ratio,
            "note": self.note,
        })
    }
}

/// The report of a run.
pub(super) struct Report {
    file: Option<PathBuf>,
    head: Vec<(&'static str, String)>,
    rows: Vec<Value>,
    raw: Map<String, Value>,
    failures: usize,
}

impl Report {
    /// Prints the facts about the run and the head of the table.
    pub(super) fn begin(file: Option<PathBuf>, head: Vec<(&'static str, String)>) -> Report {
        println!("# Shoal benchmarks\n");
        head.iter().for_each(|(name, fact)| println!("- {name}: {fact}"));
        println!("\n| What | Goal | Measured | Ratio | Note |\n|---|---|---|---|---|");
        Report { file, head, rows: Vec::new(), raw: Map::new(), failures: 0 }
    }

    /// Prints and keeps a row.
    pub(super) fn row(&mut self, row: Row) {
        println!("{}", row.to_markdown());
        self.rows.push(row.to_json());
    }

    /// Keeps the numbers behind the rows.
    pub(super) fn raw(&mut self, section: &str, name: &str, numbers: Value) {
        self.raw.entry(section).or_insert_with(|| json!({}))[name] = numbers;
    }

    /// A section that could not be measured.
    pub(super) fn failed(&mut self, section: &str, error: &str) {
        self.failures += 1;
        self.row(Row::new(section, "error").note(error));
        self.raw(section, "error", json!(error));
    }

    /// Sections that could not be measured.
    pub(super) fn failures(&self) -> usize {
        self.failures
    }

    /// Writes the JSON file, if there is to be one, with all that is known so far.
    ///
    /// # Errors
    /// When it cannot be written.
    pub(super) fn save(&self) -> Result<()> {
        let Some(file) = &self.file else { return Ok(()) };
        let head: Map<String, Value> =
            self.head.iter().map(|(name, fact)| ((*name).to_owned(), json!(fact))).collect();
        let whole = json!({"run": head, "rows": self.rows, "raw": self.raw});
        let text = serde_json::to_vec_pretty(&whole)?;
        std::fs::write(file, text).with_context(|| format!("write {}", file.display()))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_row_stays_one_row() {
        let row = Row::new("a|b", "1 ms").goal("≤ 2 ms").ratio(0.5).note("two\nlines");
        assert_eq!(row.to_markdown(), "| a/b | ≤ 2 ms | 1 ms | 0.50 | two lines |");
    }
}
