//! From the start of a process on existing data to ready, and to the first answered search.

use std::time::{Duration, Instant};

use anyhow::{Result, ensure};
use serde_json::json;

use super::data::{TOP, Vectors};
use super::load::words;
use super::loaded::{COLLECTION, Loaded, found_ids, search_requests};
use super::report::{Report, Row};
use crate::client::{Client, Request};
use crate::http::Reply;

/// How long a node may take from its start to its first answer.
const DEADLINE: Duration = Duration::from_secs(90);
/// How long a clean stop may take.
const STOP_DEADLINE: Duration = Duration::from_secs(30);
/// How long one question may take before it is asked again.
const ATTEMPT_TIMEOUT: Duration = Duration::from_secs(5);
/// The pause between two questions. It is part of what is measured, so it is short.
const PAUSE: Duration = Duration::from_millis(5);

/// How a node came to be down.
#[derive(Clone, Copy)]
enum Stop {
    Clean,
    Killed,
}

/// Restarts the loaded node after a clean stop and after a kill.
///
/// # Errors
/// When it does not stop, or does not come back in time.
pub(super) async fn run(loaded: &mut Loaded, vectors: &Vectors, report: &mut Report) -> Result<()> {
    for stop in [Stop::Clean, Stop::Killed] {
        let (name, how) = match stop {
            Stop::Clean => ("after_sigterm", "after SIGTERM"),
            Stop::Killed => ("after_kill", "after kill -9"),
        };
        let (ready, searched) = restart(loaded, vectors, stop).await?;
        let what = format!("restart {how}, {} points: start to ready", vectors.len());
        let note = format!("to the first answered search: {}", words(searched));
        report.row(Row::new(what, words(ready)).goal("≤ 10 s (1 M points)").note(note));
        let numbers = json!({
            "points": vectors.len(),
            "ready_seconds": ready.as_secs_f64(),
            "first_search_seconds": searched.as_secs_f64(),
        });
        report.raw("restart", name, numbers);
    }
    Ok(())
}

async fn restart(loaded: &mut Loaded, vectors: &Vectors, stop: Stop) -> Result<(Duration, Duration)> {
    let searches = search_requests(COLLECTION, vectors, None)?;
    let node = loaded.node_mut();
    match stop {
        Stop::Clean => {
            let code = node.terminate(STOP_DEADLINE).await?;
            ensure!(code == Some(0), "a clean stop has exit code {code:?}");
        }
        Stop::Killed => node.kill()?,
    }
    let started = Instant::now();
    node.start()?;
    let client = node.client().clone().with_limits(ATTEMPT_TIMEOUT, ATTEMPT_TIMEOUT);
    let is_ready = |reply: &Reply| reply.is_success();
    let ready = ask_until(&client, &Request::get("/health/ready"), started, is_ready).await?;
    let has_answered = |reply: &Reply| {
        let found = reply.json().and_then(|answer| found_ids(&answer));
        reply.is_success() && found.is_ok_and(|found| found.len() == TOP)
    };
    let searched = ask_until(&client, &searches[0], started, has_answered).await?;
    Ok((ready, searched))
}

/// Asks until the answer is as wanted, and returns how long that was after the start.
async fn ask_until(
    client: &Client,
    request: &Request,
    started: Instant,
    is_wanted: impl Fn(&Reply) -> bool,
) -> Result<Duration> {
    loop {
        let reply = client.once(request).await;
        if reply.as_ref().is_ok_and(&is_wanted) {
            return Ok(started.elapsed());
        }
        let seen = reply.map_or_else(|error| format!("{error:#}"), |reply| reply.text());
        ensure!(started.elapsed() < DEADLINE, "{request}: no good answer within {DEADLINE:?}: {seen}");
        tokio::time::sleep(PAUSE).await;
    }
}
