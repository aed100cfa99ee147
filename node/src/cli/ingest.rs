//! `shoal ingest DIR`: uploads what is not there yet, then waits until all of it is searchable.
//!
//! Resumable without a state file: a document's id is made of its path and bytes, so a second
//! run finds what the first one uploaded and does no work for it.

use std::collections::HashSet;
use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::{Context, Result, bail};
use clap::Args;
use futures::StreamExt;
use indicatif::{ProgressBar, ProgressStyle};
use reqwest::Method;
use reqwest::multipart::{Form, Part};
use serde_json::{Value, json};

use super::client::{Client, ClientArgs};
use super::search::find_store;

/// Uploads at once.
const UPLOADS: usize = 8;
/// Attempts at one file.
const ATTEMPTS: u32 = 20;
/// How often progress is asked for.
const POLL: Duration = Duration::from_millis(500);

/// What to ingest, and where to.
#[derive(Args, Debug)]
pub struct IngestArgs {
    #[command(flatten)]
    client: ClientArgs,
    /// A folder or a file.
    path: PathBuf,
    /// The store's name; made when it does not exist.
    #[arg(long, default_value = "documents")]
    store: String,
    /// Files with these endings.
    #[arg(long, value_delimiter = ',', default_value = "txt,md,markdown,html,htm,pdf,docx")]
    ext: Vec<String>,
    /// At most so many files, in the order of their paths.
    #[arg(long)]
    limit: Option<usize>,
}

/// Runs the command.
pub async fn run(args: IngestArgs) -> Result<()> {
    let client = Client::new(args.client.clone())?;
    let mut files = Vec::new();
    collect(&args.path, &args.ext, &mut files)?;
    files.sort();
    files.truncate(args.limit.unwrap_or(usize::MAX));
    if files.is_empty() {
        bail!("no files ending in {} under {}", args.ext.join(", "), args.path.display());
    }
    let store = match find_store(&client, Some(&args.store)).await? {
        Some(store) => store,
        None => {
            let made = client.post("/v1/vector_stores", &json!({"name": args.store})).await?;
            made["id"].as_str().context("a store has an id")?.to_owned()
        }
    };
    println!("{} files into store {} ({store})", files.len(), args.store);
    let known = known_files(&client, &store).await?;
    let bar = ProgressBar::new(files.len() as u64).with_style(style("uploading"));
    let root = if args.path.is_dir() { args.path.clone() } else { PathBuf::new() };
    let uploads =
        futures::stream::iter(files.iter().map(|file| upload(&client, &store, &root, file, &known)));
    let mut skipped = 0;
    let mut uploads = uploads.buffer_unordered(UPLOADS);
    while let Some(uploaded) = uploads.next().await {
        skipped += u64::from(!uploaded?);
        bar.inc(1);
    }
    bar.finish_and_clear();
    if skipped > 0 {
        println!("{skipped} files were there already");
    }
    wait(&client, &store).await
}

fn style(what: &str) -> ProgressStyle {
    let template = format!("{what:<10} [{{bar:40}}] {{pos}}/{{len}} {{elapsed}} {{msg}}");
    ProgressStyle::with_template(&template).expect("the template is well formed").progress_chars("=> ")
}

fn collect(path: &Path, endings: &[String], files: &mut Vec<PathBuf>) -> Result<()> {
    if path.is_file() {
        files.push(path.to_owned());
        return Ok(());
    }
    for entry in std::fs::read_dir(path).with_context(|| format!("folder {}", path.display()))? {
        let path = entry?.path();
        let ending = path.extension().map(|end| end.to_string_lossy().to_lowercase()).unwrap_or_default();
        if path.is_dir() {
            collect(&path, endings, files)?;
        } else if endings.contains(&ending) && path.metadata()?.len() > 0 {
            files.push(path);
        }
    }
    Ok(())
}

async fn known_files(client: &Client, store: &str) -> Result<HashSet<String>> {
    let mut known = HashSet::new();
    let mut after = String::new();
    loop {
        let page = client.get(&format!("/v1/vector_stores/{store}/files?limit=100&order=asc{after}")).await?;
        for file in page["data"].as_array().into_iter().flatten() {
            let is_alive = matches!(file["status"].as_str(), Some("completed" | "in_progress"));
            known.extend(file["id"].as_str().filter(|_| is_alive).map(str::to_owned));
        }
        match (page["has_more"].as_bool(), page["last_id"].as_str()) {
            (Some(true), Some(last)) => after = format!("&after={last}"),
            _ => return Ok(known),
        }
    }
}

/// Uploads one file and attaches it. Returns whether there was anything to do.
async fn upload(
    client: &Client,
    store: &str,
    root: &Path,
    path: &Path,
    known: &HashSet<String>,
) -> Result<bool> {
    let bytes = tokio::fs::read(path).await.with_context(|| format!("file {}", path.display()))?;
    let relative = path.strip_prefix(root).unwrap_or(path).to_string_lossy().into_owned();
    let mut hasher = blake3::Hasher::new();
    hasher.update(relative.as_bytes()).update(&[0]).update(&bytes);
    let id = format!("file-{}", &hasher.finalize().to_hex()[..32]);
    if known.contains(&id) {
        return Ok(false);
    }
    let name = path.file_name().map(|name| name.to_string_lossy().into_owned()).unwrap_or_default();
    let mut attempt = 1;
    loop {
        let sent = async {
            let part = Part::bytes(bytes.clone()).file_name(name.clone());
            let form = Form::new().text("purpose", "assistants").text("id", id.clone()).part("file", part);
            client.send(client.request(Method::POST, "/v1/files").multipart(form)).await?;
            let body = json!({"file_id": id, "attributes": {"path": relative.chars().take(500).collect::<String>()}});
            client.post(&format!("/v1/vector_stores/{store}/files"), &body).await
        };
        match sent.await {
            Ok(_) => return Ok(true),
            Err(error) if attempt == ATTEMPTS => {
                return Err(error.context(format!("file {}", path.display())));
            }
            // The id makes a retry harmless.
            Err(_) => tokio::time::sleep(POLL * attempt.min(4)).await,
        }
        attempt += 1;
    }
}

async fn wait(client: &Client, store: &str) -> Result<()> {
    let bar = ProgressBar::new(1).with_style(style("indexing"));
    let mut failures = 0;
    let counts = loop {
        match client.get(&format!("/v1/vector_stores/{store}")).await {
            Ok(shape) => {
                failures = 0;
                let counts = shape["file_counts"].clone();
                let count = |name: &str| counts[name].as_u64().unwrap_or(0);
                bar.set_length(count("total"));
                bar.set_position(count("total") - count("in_progress"));
                if count("in_progress") == 0 {
                    break counts;
                }
            }
            Err(error) if failures == ATTEMPTS => return Err(error),
            Err(_) => failures += 1,
        }
        tokio::time::sleep(POLL).await;
    };
    bar.finish_and_clear();
    println!("{} documents searchable, {} failed", counts["completed"], counts["failed"]);
    if counts["failed"].as_u64().unwrap_or(0) > 0 {
        report_failed(client, store).await?;
    }
    Ok(())
}

async fn report_failed(client: &Client, store: &str) -> Result<()> {
    let page: Value = client.get(&format!("/v1/vector_stores/{store}/files?filter=failed&limit=20")).await?;
    for file in page["data"].as_array().into_iter().flatten() {
        let (name, reason) = (&file["filename"], &file["last_error"]["message"]);
        println!("  {}: {}", name.as_str().unwrap_or("?"), reason.as_str().unwrap_or("?"));
    }
    Ok(())
}
