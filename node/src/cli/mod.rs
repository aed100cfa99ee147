//! The commands.

mod backup;
mod client;
mod cluster;
mod ingest;
mod model;
mod search;
mod status;
mod table;

use anyhow::Result;
use clap::{Parser, Subcommand};

use crate::config::{Config, ServeArgs};
use crate::serve;

/// A document retrieval cluster in one binary.
#[derive(Parser)]
#[command(name = "shoal", version)]
pub struct Cli {
    #[command(subcommand)]
    command: Command,
}

#[derive(Subcommand)]
enum Command {
    /// Run a node.
    Serve(Box<ServeArgs>),
    /// Work with settings.
    Config {
        #[command(subcommand)]
        command: ConfigCommand,
    },
    /// Show the cluster as one node knows it.
    Status(client::ClientArgs),
    /// Look after the cluster: status, drain, remove, move.
    Cluster {
        #[command(subcommand)]
        command: cluster::ClusterCommand,
    },
    /// Make backups, look after them, put them back.
    Backup {
        #[command(subcommand)]
        command: backup::BackupCommand,
    },
    /// Look after embedding models.
    Model {
        #[command(subcommand)]
        command: model::ModelCommand,
    },
    /// Exit with 0 when a node lives (or is ready).
    Health {
        #[command(flatten)]
        client: client::ClientArgs,
        /// Ask whether the node can serve, not only whether it lives.
        #[arg(long)]
        ready: bool,
    },
    /// Upload a folder and make it searchable; run it again to go on where it stopped, or after changes.
    Ingest(ingest::IngestArgs),
    /// Search a vector store.
    Search(search::SearchArgs),
    /// List the points at which this build can be told to die.
    #[cfg(feature = "planted-bugs")]
    CrashPoints,
}

#[derive(Subcommand)]
enum ConfigCommand {
    /// Check the settings and print the effective ones.
    Check(Box<ServeArgs>),
}

/// The exit code when a backup was made or verified that lacks the bytes of files.
const EXIT_INCOMPLETE: u8 = 3;

/// The exit code of a command that has ended with an error.
pub fn exit_code(error: &anyhow::Error) -> u8 {
    if error.is::<backup::Incomplete>() { EXIT_INCOMPLETE } else { 1 }
}

/// Runs a command.
///
/// # Errors
/// For the person who typed it.
pub fn run(cli: Cli) -> Result<()> {
    let runtime = || tokio::runtime::Builder::new_multi_thread().enable_all().build();
    match cli.command {
        Command::Serve(args) => {
            let config = Config::load(&args)?;
            shoal_proto::planted::set_up();
            runtime()?.block_on(serve::run(config))
        }
        Command::Config { command: ConfigCommand::Check(args) } => {
            print!("{}", toml::to_string(&Config::load(&args)?.masked())?);
            Ok(())
        }
        Command::Status(client) => runtime()?.block_on(status::run(client)),
        Command::Cluster { command } => runtime()?.block_on(cluster::run(command)),
        Command::Backup { command } => runtime()?.block_on(backup::run(command)),
        Command::Model { command } => model::run(command),
        Command::Health { client, ready } => runtime()?.block_on(status::health(client, ready)),
        Command::Ingest(args) => runtime()?.block_on(ingest::run(args)),
        Command::Search(args) => runtime()?.block_on(search::run(args)),
        #[cfg(feature = "planted-bugs")]
        Command::CrashPoints => {
            shoal_proto::planted::CRASH_POINTS.iter().for_each(|(name, _)| println!("{name}"));
            Ok(())
        }
    }
}
