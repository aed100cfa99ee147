//! The commands of the binary, run as a person runs them, and their tables, read as a person reads them.

use std::process::Stdio;
use std::time::Duration;

use anyhow::{Context, Result, bail, ensure};
use tokio::io::{AsyncBufReadExt, BufReader};

use crate::binary::shoal;
use crate::node::KEY;

/// Runs `shoal ARGUMENTS…` until it ends well, and returns what it printed.
///
/// # Errors
/// What it said on standard error when it failed, or that it did not end in time.
pub async fn run(arguments: &[&str], deadline: Duration) -> Result<String> {
    let (subcommand, rest) = arguments.split_first().context("a command has a name")?;
    let mut command = shoal(subcommand)?;
    command.args(rest).stdin(Stdio::null());
    let running = tokio::process::Command::from(command).kill_on_drop(true).output();
    let output = tokio::time::timeout(deadline, running).await;
    let output = output.with_context(|| format!("shoal {arguments:?} does not end in {deadline:?}"))??;
    let complaint = String::from_utf8_lossy(&output.stderr);
    ensure!(output.status.success(), "shoal {arguments:?}: {}: {complaint}", output.status);
    Ok(String::from_utf8_lossy(&output.stdout).trim_end().to_owned())
}

/// The same against a node or a service at a URL, with the key of the tests.
///
/// # Errors
/// As [`run`].
pub async fn run_at(url: &str, arguments: &[&str], deadline: Duration) -> Result<String> {
    run(&[arguments, &["--url", url, "--api-key", KEY]].concat(), deadline).await
}

/// Runs a command against a node that draws the same thing again and again, until it has drawn it so often,
/// and ends it. Each drawing begins with a line that begins with `head`. Returns the drawings.
///
/// # Errors
/// That it ended by itself, or has not drawn so often in time.
pub async fn watch_at(
    url: &str,
    arguments: &[&str],
    (head, count): (&str, usize),
    deadline: Duration,
) -> Result<Vec<String>> {
    let (subcommand, rest) = arguments.split_first().context("a command has a name")?;
    let mut command = shoal(subcommand)?;
    command.args(rest).args(["--url", url, "--api-key", KEY]);
    command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::null());
    let mut running = tokio::process::Command::from(command).kill_on_drop(true).spawn()?;
    let mut lines = BufReader::new(running.stdout.take().context("it prints into a pipe")?).lines();
    let drawing = async {
        let mut drawn: Vec<String> = Vec::new();
        while let Some(line) = lines.next_line().await? {
            match line.starts_with(head) {
                // The next one has begun, so the last one is whole.
                true if drawn.len() == count => return Ok(drawn),
                true => drawn.push(line),
                false => drawn
                    .last_mut()
                    .context("it does not begin at the beginning")?
                    .push_str(&format!("\n{line}")),
            }
        }
        bail!("shoal {arguments:?} ended by itself")
    };
    let drawn = tokio::time::timeout(deadline, drawing).await;
    let drawn =
        drawn.with_context(|| format!("shoal {arguments:?} draws less often than {count} times"))??;
    running.kill().await?;
    Ok(drawn)
}

/// What stands under a heading of a printed table, in the row that has `key` under another heading; the table
/// is the first that has both headings.
///
/// # Errors
/// That there is no such table, or no such row.
pub fn cell(printed: &str, (key_heading, key): (&str, &str), heading: &str) -> Result<String> {
    let lines: Vec<&str> = printed.lines().collect();
    let columns = |line: &str| Some((column(line, key_heading)?, column(line, heading)?));
    let found = lines.iter().enumerate().find_map(|(at, line)| Some((at, columns(line)?)));
    let (at, (of_key, of_cell)) =
        found.with_context(|| format!("no {key_heading} and {heading}: {printed}"))?;
    let mut rows = lines[at + 1..].iter().take_while(|line| !line.is_empty());
    let row = rows.find(|row| word_at(row, of_key) == key);
    let row = row.with_context(|| format!("no {key_heading} {key}: {printed}"))?;
    Ok(word_at(row, of_cell).to_owned())
}

/// Where a column begins, by the line of headings.
fn column(headings: &str, heading: &str) -> Option<usize> {
    let is_whole = |at: &usize| {
        let (before, after) = (&headings[..*at], &headings[at + heading.len()..]);
        (before.is_empty() || before.ends_with(' ')) && (after.is_empty() || after.starts_with(' '))
    };
    headings.match_indices(heading).map(|(at, _)| at).find(is_whole)
}

/// The word that begins at a place of a line; none when there is nothing.
fn word_at(line: &str, at: usize) -> &str {
    line.get(at..).and_then(|rest| rest.split(' ').next()).unwrap_or_default()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn cells_are_found_by_their_headings() {
        let nodes = "NODE  NAME  ZONE  LEADS\n1     n1          2\n12    n2    west  0\n";
        let printed = format!("cluster 1\n\n{nodes}\nSHARD  LEADER\n1      12");
        let cell = |key, heading| cell(&printed, key, heading).ok();
        assert_eq!(cell(("NAME", "n2"), "NODE").as_deref(), Some("12"));
        assert_eq!(cell(("NAME", "n1"), "ZONE").as_deref(), Some(""));
        assert_eq!(cell(("NODE", "12"), "LEADS").as_deref(), Some("0"));
        assert_eq!(cell(("SHARD", "1"), "LEADER").as_deref(), Some("12"));
        assert_eq!(cell(("NAME", "n3"), "NODE"), None);
        assert_eq!(cell(("NAME", "n1"), "LEADER"), None);
    }
}
