//! Commands of the system that faults need: `ip`, `nft`, `mount`, `docker`.

use std::ffi::OsStr;
use std::io::Write;
use std::process::{Command, Stdio};

use anyhow::{Context, Result, ensure};

/// Runs a command given as words; its complaint is the error.
///
/// # Errors
/// When it does not exist or fails.
pub fn run(words: &str) -> Result<String> {
    let words: Vec<&OsStr> = words.split_whitespace().map(OsStr::new).collect();
    run_words(&words)
}

/// The same, word by word, for words that may hold spaces, as paths do.
///
/// # Errors
/// When it does not exist or fails.
pub fn run_words(words: &[&OsStr]) -> Result<String> {
    let (program, arguments) = words.split_first().context("no command")?;
    let output = Command::new(program).args(arguments).stdin(Stdio::null()).output();
    let output = output.with_context(|| format!("{} does not run", program.display()))?;
    let complaint = String::from_utf8_lossy(&output.stderr);
    ensure!(output.status.success(), "{}: {}", words.join(OsStr::new(" ")).display(), complaint.trim());
    Ok(String::from_utf8_lossy(&output.stdout).into_owned())
}

/// Runs a command with text on its standard input.
///
/// # Errors
/// When it does not exist or fails.
pub fn feed(words: &str, text: &str) -> Result<()> {
    let words: Vec<&str> = words.split_whitespace().collect();
    let (program, arguments) = words.split_first().context("no command")?;
    let mut command = Command::new(program);
    command.args(arguments).stdin(Stdio::piped()).stdout(Stdio::null()).stderr(Stdio::piped());
    let mut child = command.spawn().with_context(|| format!("{program} does not run"))?;
    child.stdin.take().context("a pipe was asked for")?.write_all(text.as_bytes())?;
    let output = child.wait_with_output()?;
    let complaint = String::from_utf8_lossy(&output.stderr);
    ensure!(output.status.success(), "{}: {}", words.join(" "), complaint.trim());
    Ok(())
}
