//! Waiting for a condition with a deadline, and saying things past the test runner's capture.

use std::future::Future;
use std::io::Write;
use std::time::{Duration, Instant};

use anyhow::{Result, bail};

/// The pause between two looks at a condition.
const PAUSE: Duration = Duration::from_millis(50);

/// Looks again and again until there is something to return. An error counts as "not yet": a
/// node that is starting refuses connections. The last one is in the message when time is up.
///
/// # Errors
/// When the deadline has passed.
pub async fn wait_until<T, F>(deadline: Duration, what: &str, mut look: impl FnMut() -> F) -> Result<T>
where
    F: Future<Output = Result<Option<T>>>,
{
    let end = Instant::now() + deadline;
    let mut reason = String::from("the condition does not hold");
    loop {
        let left = end.saturating_duration_since(Instant::now());
        match tokio::time::timeout(left, look()).await {
            Ok(Ok(Some(found))) => return Ok(found),
            Ok(Ok(None)) => {}
            Ok(Err(error)) => reason = format!("{error:#}"),
            Err(_) => {}
        }
        if Instant::now() >= end {
            bail!("waited {deadline:?} for {what}: {reason}");
        }
        tokio::time::sleep(PAUSE).await;
    }
}

/// Prints a line even when the test passes: the runner captures `println!`, and a figure or a
/// skipped test that nobody sees might as well not be there.
pub fn say(line: impl AsRef<str>) {
    // A closed stderr is no reason to fail a test.
    drop(writeln!(std::io::stderr(), "{}", line.as_ref()));
}

/// Says that a test did not run, and why.
pub fn skip(name: &str, reason: &str) {
    say(format!("skipped: {name}: {reason}"));
}
