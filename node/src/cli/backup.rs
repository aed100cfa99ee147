//! `shoal backup …`: makes backups, looks after them, puts them back.
//!
//! A backup that could not have the bytes of some files, because no replica had them any more, is made all
//! the same and names them. For whoever only looks at exit codes that is neither success nor failure:
//! [`Incomplete`], with the code that restic has for it.

use std::fmt;
use std::io::IsTerminal;
use std::time::Duration;

use anyhow::{Result, bail};
use clap::Subcommand;
use indicatif::HumanBytes;
use reqwest::Method;
use serde_json::{Value, json};

use super::client::{Client, ClientArgs};
use super::table::{Table, list, text};

/// How often it is asked how far something is.
const TICK: Duration = Duration::from_millis(500);
/// So many times in a row nobody may know of it: the node that was at it is gone.
const MAX_SILENCE: u32 = 60;

/// What can be done with backups.
#[derive(Subcommand)]
pub enum BackupCommand {
    /// Make a backup, online; returns when it is complete.
    Create {
        /// Only this collection; may be given more than once.
        #[arg(long = "collection")]
        collections: Vec<String>,
        #[command(flatten)]
        client: ClientArgs,
    },
    /// List the backups that are there.
    List {
        #[command(flatten)]
        client: ClientArgs,
    },
    /// Read a whole backup and compare it with its hashes.
    Verify {
        /// The backup.
        id: String,
        #[command(flatten)]
        client: ClientArgs,
    },
    /// Put a backup back, into a cluster of any size; nothing of it is seen before all of it is there.
    Restore {
        /// The backup.
        id: String,
        /// Only this collection; may be given more than once.
        #[arg(long = "collection")]
        collections: Vec<String>,
        /// Shards of each collection; as many as it had when absent.
        #[arg(long)]
        shards: Option<u32>,
        /// Replicas of each shard; as many as it had when absent.
        #[arg(long)]
        replicas: Option<u32>,
        #[command(flatten)]
        client: ClientArgs,
    },
    /// Delete a backup, and what no other one needs.
    Delete {
        /// The backup.
        id: String,
        #[command(flatten)]
        client: ClientArgs,
    },
}

/// A backup is there, and files whose bytes were nowhere are not in it. Says which.
#[derive(Debug)]
pub struct Incomplete(String);

impl fmt::Display for Incomplete {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

impl std::error::Error for Incomplete {}

/// Runs one of them.
///
/// # Errors
/// What the cluster refused, or why it failed; [`Incomplete`] when a backup that is made or verified lacks
/// the bytes of files.
pub async fn run(command: BackupCommand) -> Result<()> {
    match command {
        BackupCommand::Create { collections, client } => {
            let client = Client::new(client)?;
            let body = if collections.is_empty() { json!({}) } else { json!({"collections": collections}) };
            let job = follow(&client, client.post("/admin/backups", &body).await?).await?;
            let lacking = lacking(&client, text(&job["backup"])).await?;
            println!(
                "backup {} is {}: {}, of which {} are new",
                text(&job["backup"]),
                if lacking.is_some() { "made, but not whole" } else { "complete" },
                bytes(&job["bytes_done"]),
                bytes(&job["bytes_new"])
            );
            lacking.map_or(Ok(()), |lacking| Err(lacking.into()))
        }
        BackupCommand::List { client } => {
            print_list(&Client::new(client)?.get("/admin/backups").await?);
            Ok(())
        }
        BackupCommand::Verify { id, client } => {
            let client = Client::new(client)?;
            let job =
                client.send(client.request(Method::POST, &format!("/admin/backups/{id}/verify"))).await?;
            let job = follow(&client, job).await?;
            let lacking = lacking(&client, &id).await?;
            let found = if lacking.is_some() { "as it was made" } else { "whole" };
            println!("backup {id} is {found}: {} were read", bytes(&job["bytes_done"]));
            lacking.map_or(Ok(()), |lacking| Err(lacking.into()))
        }
        BackupCommand::Restore { id, collections, shards, replicas, client } => {
            let client = Client::new(client)?;
            let collections = (!collections.is_empty()).then_some(collections);
            let body =
                json!({"collections": collections, "shard_number": shards, "replication_factor": replicas});
            let job = client.post(&format!("/admin/backups/{id}/restore"), &body).await?;
            let job = follow(&client, job).await?;
            println!("backup {id} is restored: {} were read", bytes(&job["bytes_done"]));
            if let Some(lacking) = lacking(&client, &id).await? {
                println!("{lacking}");
            }
            Ok(())
        }
        BackupCommand::Delete { id, client } => {
            let client = Client::new(client)?;
            let job = client.send(client.request(Method::DELETE, &format!("/admin/backups/{id}"))).await?;
            follow(&client, job).await?;
            println!("backup {id} is deleted");
            Ok(())
        }
    }
}

fn bytes(value: &Value) -> HumanBytes {
    HumanBytes(value.as_u64().unwrap_or(0))
}

/// What a backup could not have; nothing as a rule.
async fn lacking(client: &Client, id: &str) -> Result<Option<Incomplete>> {
    let listed = client.get("/admin/backups").await?;
    let head = list(&listed["backups"]).iter().find(|head| text(&head["id"]) == id);
    let count = head.and_then(|head| head["missing_files"].as_u64()).unwrap_or(0);
    if count == 0 {
        return Ok(None);
    }
    let named = head.map_or(&[][..], |head| list(&head["missing"]));
    let names: Vec<&str> = named.iter().map(|file| text(&file["document"])).collect();
    let more = if count > names.len() as u64 { ", …" } else { "" };
    Ok(Some(Incomplete(format!(
        "backup {id} is without the bytes of {count} files, which no replica had: {}{more}; \
         delete them or upload them again",
        names.join(", ")
    ))))
}

fn holds(backup: &Value) -> String {
    let all = if backup["is_full"] == json!(true) { "everything" } else { "a part" };
    match backup["missing_files"].as_u64() {
        Some(count) if count > 0 => format!("{all} but {count} files"),
        _ => all.to_owned(),
    }
}

fn print_list(listed: &Value) {
    println!("{}\n", text(&listed["target"]));
    let mut table =
        Table::new(&["BACKUP", "HOLDS", "SIZE", "NEW", "COLLECTIONS", "POINTS", "DOCUMENTS", "FILES"]);
    for backup in list(&listed["backups"]) {
        let collections = list(&backup["collections"]);
        let sum = |of: &str| collections.iter().filter_map(|one| one[of].as_u64()).sum::<u64>().to_string();
        table.row([
            text(&backup["id"]).to_owned(),
            holds(backup),
            bytes(&backup["bytes"]).to_string(),
            bytes(&backup["new_bytes"]).to_string(),
            collections.len().to_string(),
            sum("points"),
            sum("documents"),
            sum("files"),
        ]);
    }
    table.print();
}

/// Waits for the end of a job, wherever it runs, saying how far it is.
async fn follow(client: &Client, mut job: Value) -> Result<Value> {
    let begun = job.clone();
    let is_it = |other: &&Value| {
        ["kind", "backup", "node", "started_at"].iter().all(|field| other[*field] == begun[*field])
    };
    let (mut said, mut silence) = (String::new(), 0);
    loop {
        match text(&job["state"]) {
            "done" => return Ok(job),
            "failed" => bail!(
                "the {} of backup {} has failed: {}",
                text(&job["kind"]),
                text(&job["backup"]),
                text(&job["error"])
            ),
            _ => {}
        }
        let total = match job["bytes_total"].as_u64() {
            Some(total) if total > 0 => format!(" of {}", HumanBytes(total)),
            _ => String::new(),
        };
        let at = format!("{}{total}  {}", bytes(&job["bytes_done"]), text(&job["at"]));
        if at != said && std::io::stderr().is_terminal() {
            // Clears the line and draws it anew.
            eprint!("\r\x1b[2K{at}");
            said = at;
        }
        tokio::time::sleep(TICK).await;
        let jobs = client.get("/admin/backup-jobs").await;
        let known = jobs.ok().and_then(|jobs| list(&jobs["jobs"]).iter().find(is_it).cloned());
        silence = if known.is_some() { 0 } else { silence + 1 };
        if silence > MAX_SILENCE {
            bail!("node {} does not say any more how far it is: begin again", job["node"]);
        }
        if let Some(known) = known {
            job = known;
        }
    }
}
