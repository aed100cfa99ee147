//! `shoal ingest DIR`: uploads what is not there yet, then waits until all of it is searchable.
//!
//! Resumable without a state file: a document's id is made of its store and its path, and the
//! stored file knows the hash of its bytes. A second run uploads what the first one did not, and
//! what has changed since: the new version takes the old one's place. The path is the whole one,
//! so that files of two folders that are called the same do not replace each other; a folder that
//! was moved is therefore a new one. What was deleted on this side stays in the store.

use std::collections::HashMap;
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
/// The longest path that is kept as an attribute; of a longer one its beginning.
const MAX_PATH_CHARS: usize = 500;
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
    let root = args.path.canonicalize().with_context(|| format!("folder {}", args.path.display()))?;
    let mut files = Vec::new();
    collect(&root, &args.ext, &mut files)?;
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

/// What the store has, by id.
async fn known_files(client: &Client, store: &str) -> Result<HashMap<String, Value>> {
    let mut known = HashMap::new();
    let mut after = String::new();
    loop {
        let page = client.get(&format!("/v1/vector_stores/{store}/files?limit=100&order=asc{after}")).await?;
        for file in page["data"].as_array().into_iter().flatten() {
            known.extend(file["id"].as_str().map(|id| (id.to_owned(), file.clone())));
        }
        match (page["has_more"].as_bool(), page["last_id"].as_str()) {
            (Some(true), Some(last)) => after = format!("&after={last}"),
            _ => return Ok(known),
        }
    }
}

/// The id of a file's document in a store.
fn document_id(store: &str, path: &Path) -> String {
    let mut hasher = blake3::Hasher::new();
    hasher.update(store.as_bytes()).update(&[0]).update(path.as_os_str().as_encoded_bytes());
    format!("file-{}", &hasher.finalize().to_hex()[..32])
}

/// Uploads one file and attaches it. Returns whether there was anything to do.
async fn upload(
    client: &Client,
    store: &str,
    root: &Path,
    path: &Path,
    known: &HashMap<String, Value>,
) -> Result<bool> {
    let bytes = tokio::fs::read(path).await.with_context(|| format!("file {}", path.display()))?;
    let hash = blake3::hash(&bytes).to_hex();
    let id = document_id(store, path);
    let name = path.file_name().map(|name| name.to_string_lossy().into_owned()).unwrap_or_default();
    let relative = path.strip_prefix(root).ok().filter(|relative| !relative.as_os_str().is_empty());
    let relative = relative.map_or_else(|| name.clone(), |relative| relative.to_string_lossy().into_owned());
    let shown: String = relative.chars().take(MAX_PATH_CHARS).collect();
    let mut body = json!({"file_id": id, "attributes": {"path": shown}});
    let known = known.get(&id);
    if let Some(known) = known {
        // Whatever was changed since the first run stays as it is.
        for field in ["attributes", "chunking_strategy"] {
            body[field] = known[field].clone();
        }
    }
    let mut attempt = 1;
    loop {
        let sent = async {
            let stored = match known {
                Some(_) => client.find(&format!("/v1/files/{id}")).await?,
                None => None,
            };
            let is_stored = stored.is_some_and(|stored| stored["blake3"] == hash.as_str());
            if !is_stored {
                let part = Part::bytes(bytes.clone()).file_name(name.clone());
                let form =
                    Form::new().text("purpose", "assistants").text("id", id.clone()).part("file", part);
                client.send(client.request(Method::POST, "/v1/files").multipart(form)).await?;
            }
            // Also what is stored is attached again: a run may have ended between the two. What the store has
            // in this version already is no work for it.
            let attached = client.post(&format!("/v1/vector_stores/{store}/files"), &body).await?;
            anyhow::Ok(!is_stored || known.is_none_or(|known| attached["status"] != known["status"]))
        };
        match sent.await {
            Ok(has_worked) => return Ok(has_worked),
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
