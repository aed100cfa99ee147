//! The commands of the binary, run as a person runs them.

use std::process::Stdio;
use std::time::Duration;

use anyhow::{Context, Result, ensure};

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
