//! Log lines: JSON or text, with a level that can be changed while the node runs.

use std::sync::Arc;

use anyhow::Result;
use tracing_subscriber::layer::SubscriberExt;
use tracing_subscriber::util::SubscriberInitExt;
use tracing_subscriber::{EnvFilter, fmt, reload};

use crate::config::LogFormat;

/// Libraries that would write every frame or row at `debug`.
const QUIET: &str = "ractor=warn,ractor_cluster=warn,openraft=error,sled=warn,tantivy=warn,h2=warn,hyper=warn,raft_engine=warn";

type Setter = dyn Fn(EnvFilter) -> Result<(), reload::Error> + Send + Sync;

/// A handle to the level.
#[derive(Clone)]
pub struct LogLevel(Arc<Setter>);

impl LogLevel {
    /// A handle to no log at all.
    #[cfg(test)]
    pub fn of_nothing() -> LogLevel {
        LogLevel(Arc::new(|_| Ok(())))
    }

    /// Changes the level. Takes a level or `tracing` directives.
    ///
    /// # Errors
    /// When the text is neither.
    pub fn set(&self, level: &str) -> Result<()> {
        Ok((self.0)(filter(level)?)?)
    }
}

fn filter(level: &str) -> Result<EnvFilter> {
    Ok(EnvFilter::try_new(format!("{QUIET},{level}"))?)
}

/// Starts logging to standard error.
///
/// # Errors
/// When the level cannot be read, or logging was started before.
pub fn init(format: LogFormat, level: &str) -> Result<LogLevel> {
    let (layer, handle) = reload::Layer::new(filter(level)?);
    let registry = tracing_subscriber::registry().with(layer);
    match format {
        LogFormat::Json => {
            let lines = fmt::layer().json().flatten_event(true).with_writer(std::io::stderr);
            registry.with(lines).try_init()?;
        }
        LogFormat::Text => registry.with(fmt::layer().with_writer(std::io::stderr)).try_init()?,
    }
    Ok(LogLevel(Arc::new(move |filter| handle.reload(filter))))
}
