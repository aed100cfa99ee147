//! A closed loop of clients: each sends its next request when the last one is answered.

use std::sync::Arc;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use serde_json::{Value, json};

use crate::client::{Client, Request};

/// The pause of a client after an error, so that a node that refuses is not hammered.
const PAUSE_AFTER_ERROR: Duration = Duration::from_millis(20);

/// What the clients have seen.
#[derive(Default)]
pub(super) struct Load {
    seconds: f64,
    /// Of the requests that succeeded, in order of length.
    latencies: Vec<Duration>,
    errors: usize,
    first_error: Option<String>,
}

/// Lets so many clients work until the time is up. `work` gets a client's number and its turn.
///
/// # Errors
/// When no request has succeeded; the message has the first error.
pub(super) async fn run<F, Fut>(clients: usize, time: Duration, work: F) -> Result<Load>
where
    F: Fn(usize, usize) -> Fut + Clone + Send + Sync + 'static,
    Fut: Future<Output = Result<()>> + Send + 'static,
{
    let started = Instant::now();
    let end = started + time;
    let tasks: Vec<_> = (0..clients).map(|client| tokio::spawn(drive(client, end, work.clone()))).collect();
    let mut load = Load::default();
    for task in tasks {
        let one = task.await.context("a client has panicked")?;
        load.latencies.extend(one.latencies);
        load.errors += one.errors;
        load.first_error = load.first_error.take().or(one.first_error);
    }
    load.seconds = started.elapsed().as_secs_f64();
    load.latencies.sort_unstable();
    let first_error = load.first_error.as_deref().unwrap_or("there was no time for one");
    ensure!(!load.latencies.is_empty(), "no request has succeeded: {first_error}");
    Ok(load)
}

async fn drive<F, Fut>(client: usize, end: Instant, work: F) -> Load
where
    F: Fn(usize, usize) -> Fut,
    Fut: Future<Output = Result<()>>,
{
    let mut load = Load::default();
    for turn in 0.. {
        let started = Instant::now();
        if started >= end {
            break;
        }
        match work(client, turn).await {
            Ok(()) => load.latencies.push(started.elapsed()),
            Err(error) => {
                load.errors += 1;
                if load.first_error.is_none() {
                    load.first_error = Some(format!("{error:#}"));
                }
                tokio::time::sleep(PAUSE_AFTER_ERROR).await;
            }
        }
    }
    load
}

/// Clients of the same node that share no connection.
pub(super) fn clients(client: &Client, count: usize) -> Arc<Vec<Client>> {
    Arc::new((0..count).map(|_| client.starting_at(0)).collect())
}

/// Sends a request once and takes nothing but success.
///
/// # Errors
/// When the answer is not 2xx, or none came.
pub(super) async fn succeed(client: &Client, request: &Request) -> Result<()> {
    let reply = client.once(request).await?;
    ensure!(reply.is_success(), "{request}: {} {}", reply.status, reply.text());
    Ok(())
}

impl Load {
    /// Requests that succeeded.
    pub(super) fn count(&self) -> usize {
        self.latencies.len()
    }

    /// Requests that succeeded, each second.
    pub(super) fn rate(&self) -> f64 {
        self.count() as f64 / self.seconds.max(0.001)
    }

    /// The latencies in words.
    pub(super) fn latency(&self) -> String {
        latency(&self.latencies)
    }

    /// The errors in words; nothing when there were none.
    pub(super) fn trouble(&self) -> String {
        match &self.first_error {
            Some(error) => format!("; {} errors, the first: {error}", self.errors),
            None => String::new(),
        }
    }

    /// All numbers.
    pub(super) fn to_json(&self) -> Value {
        json!({
            "seconds": self.seconds,
            "requests": self.count(),
            "requests_per_second": self.rate(),
            "latency_ms": latency_json(&self.latencies),
            "errors": self.errors,
            "first_error": self.first_error,
        })
    }
}

/// The value below which a part of the times lies, by nearest rank; the times are in order.
pub(super) fn percentile(times: &[Duration], part: f64) -> Duration {
    crate::percentile(times, part).unwrap_or_default()
}

/// Median and 99th percentile in words; the times are in order.
pub(super) fn latency(times: &[Duration]) -> String {
    format!("p50 {}, p99 {}", words(percentile(times, 0.5)), words(percentile(times, 0.99)))
}

/// The percentiles in milliseconds; the times are in order.
pub(super) fn latency_json(times: &[Duration]) -> Value {
    let at = |part: f64| percentile(times, part).as_secs_f64() * 1000.0;
    json!({"min": at(0.0), "p50": at(0.5), "p90": at(0.9), "p99": at(0.99), "max": at(1.0)})
}

/// A time with about three digits.
pub(super) fn words(time: Duration) -> String {
    let milliseconds = time.as_secs_f64() * 1000.0;
    if milliseconds < 10.0 {
        format!("{milliseconds:.2} ms")
    } else if milliseconds < 1000.0 {
        format!("{milliseconds:.0} ms")
    } else {
        format!("{:.2} s", time.as_secs_f64())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn percentiles_are_of_nearest_rank() {
        let times: Vec<Duration> = (1..=100).map(Duration::from_millis).collect();
        assert_eq!(percentile(&times, 0.0), Duration::from_millis(1));
        assert_eq!(percentile(&times, 0.5), Duration::from_millis(50));
        assert_eq!(percentile(&times, 0.99), Duration::from_millis(99));
        assert_eq!(percentile(&times, 1.0), Duration::from_millis(100));
        assert_eq!(percentile(&times[..20], 0.99), Duration::from_millis(20));
        assert_eq!(percentile(&[], 0.5), Duration::ZERO);
    }

    #[test]
    fn times_have_three_digits() {
        assert_eq!(words(Duration::from_micros(1234)), "1.23 ms");
        assert_eq!(words(Duration::from_millis(250)), "250 ms");
        assert_eq!(words(Duration::from_millis(1500)), "1.50 s");
    }
}
