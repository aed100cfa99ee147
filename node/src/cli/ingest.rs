//! `shoal ingest DIR`: uploads what is not there yet, then waits until all of it is searchable.
//!
//! Resumable without a state file: a document's id is made of its store and its path, and the
//! stored file knows the hash of its bytes. A second run uploads what the first one did not, and
//! what has changed since: the new version takes the old one's place. The path is the whole one,
//! so that files of two folders that are called the same do not replace each other; a folder that
//! was moved is therefore a new one, unless it is given a name that stands for its path. What was
//! deleted on this side stays in the store.
//!
//! Builds up to 2026-11-22 made the id of the path in the folder and of the bytes. A document of such an id is
//! taken out of the store when the one that has its place is searchable.

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
    /// A name that the store knows the folder by, instead of its whole path: for a folder that moves, or whose path
    /// is also that of another one on another machine.
    #[arg(long)]
    name: Option<String>,
}

/// What goes into which store.
struct Ingest {
    client: Client,
    store: String,
    /// The folder or the file, as it was given, and by its whole path.
    given: PathBuf,
    root: PathBuf,
    name: Option<String>,
    /// What the store had before, by id.
    known: HashMap<String, Value>,
}

/// What became of a file.
struct Uploaded {
    id: String,
    /// Whether there was anything to do.
    has_worked: bool,
    /// The id of a document of the same file that an earlier build has made.
    former: Option<String>,
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
    let IngestArgs { path: given, name, .. } = args;
    let ingest = Ingest { client, store, given, root, name, known };
    let bar = ProgressBar::new(files.len() as u64).with_style(style("uploading"));
    let uploads = futures::stream::iter(files.iter().map(|file| ingest.upload(file)));
    let (mut skipped, mut replaced) = (0, Vec::new());
    let mut uploads = uploads.buffer_unordered(UPLOADS);
    while let Some(uploaded) = uploads.next().await {
        let Uploaded { id, has_worked, former } = uploaded?;
        skipped += u64::from(!has_worked);
        replaced.extend(former.map(|former| (former, id)));
        bar.inc(1);
    }
    bar.finish_and_clear();
    if skipped > 0 {
        println!("{skipped} files were there already");
    }
    let mut counts = ingest.wait().await?;
    if !replaced.is_empty() {
        ingest.take_out(replaced).await?;
        counts = ingest.counts().await?;
    }
    println!("{} documents searchable, {} failed", counts["completed"], counts["failed"]);
    if counts["failed"].as_u64().unwrap_or(0) > 0 {
        report_failed(&ingest.client, &ingest.store).await?;
    }
    Ok(())
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

/// The path of a file in a folder; of a file that is ingested by itself, its name.
fn relative<'a>(root: &Path, path: &'a Path) -> &'a Path {
    let relative = path.strip_prefix(root).ok().filter(|relative| !relative.as_os_str().is_empty());
    relative.or_else(|| path.file_name().map(Path::new)).unwrap_or(path)
}

/// The id of a file's document in a store: of its whole path, or of the name of its folder and the path in there.
/// No path begins with a zero, so that none of the one kind is of the other.
fn document_id(store: &str, folder: Option<&str>, path: &Path) -> String {
    let mut hasher = blake3::Hasher::new();
    hasher.update(store.as_bytes()).update(&[0]);
    if let Some(folder) = folder {
        hasher.update(&[0]).update(folder.as_bytes()).update(&[0]);
    }
    hasher.update(path.as_os_str().as_encoded_bytes());
    format!("file-{}", &hasher.finalize().to_hex()[..32])
}

/// The id that builds up to 2026-11-22 made.
fn former_id(relative: &str, bytes: &[u8]) -> String {
    let mut hasher = blake3::Hasher::new();
    hasher.update(relative.as_bytes()).update(&[0]).update(bytes);
    format!("file-{}", &hasher.finalize().to_hex()[..32])
}

impl Ingest {
    /// Uploads one file and attaches it.
    async fn upload(&self, path: &Path) -> Result<Uploaded> {
        let Ingest { client, store, .. } = self;
        let bytes = tokio::fs::read(path).await.with_context(|| format!("file {}", path.display()))?;
        let hash = blake3::hash(&bytes).to_hex();
        let relative = relative(&self.root, path);
        let id = match self.name.as_deref() {
            Some(name) => document_id(store, Some(name), relative),
            None => document_id(store, None, path),
        };
        // Of a file that was ingested by itself it was made of the path as it was given.
        let was_called = if path == self.root { self.given.as_path() } else { relative };
        let former = former_id(&was_called.to_string_lossy(), &bytes);
        let former = self.known.get(&former).map(|known| (former, known));
        let name = path.file_name().map(|name| name.to_string_lossy().into_owned()).unwrap_or_default();
        let shown: String = relative.to_string_lossy().chars().take(MAX_PATH_CHARS).collect();
        let mut body = json!({"file_id": id, "attributes": {"path": shown}});
        let known = self.known.get(&id);
        // Whatever was changed since the first run stays as it is.
        if let Some(known) = known {
            body["chunking_strategy"] = known["chunking_strategy"].clone();
        }
        if let Some(before) = known.or(former.as_ref().map(|(_, known)| *known)) {
            body["attributes"] = before["attributes"].clone();
        }
        let former = former.map(|(former, _)| former);
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
                // Also what is stored is attached again: a run may have ended between the two. What the store
                // has in this version already is no work for it.
                let attached = client.post(&format!("/v1/vector_stores/{store}/files"), &body).await?;
                anyhow::Ok(!is_stored || known.is_none_or(|known| attached["status"] != known["status"]))
            };
            match sent.await {
                Ok(has_worked) => return Ok(Uploaded { id, has_worked, former }),
                Err(error) if attempt == ATTEMPTS => {
                    return Err(error.context(format!("file {}", path.display())));
                }
                // The id makes a retry harmless.
                Err(_) => tokio::time::sleep(POLL * attempt.min(4)).await,
            }
            attempt += 1;
        }
    }

    /// Waits until nothing of the store is in progress any more. Returns how many documents are in which state.
    async fn wait(&self) -> Result<Value> {
        let bar = ProgressBar::new(1).with_style(style("indexing"));
        let mut failures = 0;
        let counts = loop {
            match self.counts().await {
                Ok(counts) => {
                    failures = 0;
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
        Ok(counts)
    }

    async fn counts(&self) -> Result<Value> {
        let store = self.client.get(&format!("/v1/vector_stores/{}", self.store)).await?;
        Ok(store["file_counts"].clone())
    }

    /// Takes documents out of the store whose place others have taken: each with the one that has to be searchable
    /// before. Their files stay, since other stores may have them.
    async fn take_out(&self, replaced: Vec<(String, String)>) -> Result<()> {
        let path = |id: &str| format!("/v1/vector_stores/{}/files/{id}", self.store);
        for (former, now) in replaced {
            if self.client.get(&path(&now)).await?["status"] == "completed" {
                self.client.send(self.client.request(Method::DELETE, &path(&former))).await?;
            }
        }
        Ok(())
    }
}

async fn report_failed(client: &Client, store: &str) -> Result<()> {
    let page: Value = client.get(&format!("/v1/vector_stores/{store}/files?filter=failed&limit=20")).await?;
    for file in page["data"].as_array().into_iter().flatten() {
        let (name, reason) = (&file["filename"], &file["last_error"]["message"]);
        println!("  {}: {}", name.as_str().unwrap_or("?"), reason.as_str().unwrap_or("?"));
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_file_is_known_by_its_path_or_by_the_name_of_its_folder() {
        let (folder, file) = (Path::new("/home/a/notes"), Path::new("/home/a/notes/deep/b.txt"));
        assert_eq!(relative(folder, file), Path::new("deep/b.txt"));
        assert_eq!(relative(file, file), Path::new("b.txt"));
        let ids = [
            document_id("s", None, file),
            document_id("t", None, file),
            document_id("s", Some("notes"), relative(folder, file)),
            document_id("s", Some("laptop"), relative(folder, file)),
            document_id("s", Some(""), file),
            former_id("deep/b.txt", b"text"),
        ];
        for (at, id) in ids.iter().enumerate() {
            assert!(id.len() == 37 && !ids[..at].contains(id), "{ids:?}");
        }
        // Documents of these ids are in stores: none of it may change.
        assert_eq!(ids[0], "file-dd2352ebc4ebd4acbcb0c1312417f8cb");
        assert_eq!(ids[5], "file-5b5cad01199628e48c9b2048e536ebdb");
    }
}
