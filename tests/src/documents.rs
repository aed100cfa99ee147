//! Documents over the OpenAI surface: files, vector stores, search.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use serde_json::{Value, json};
use uuid::Uuid;

use crate::client::{Client, Request};
use crate::points::{Freshness, Points};
use crate::wait::wait_until;

/// The models that nodes are started with, if there are any: `SHOAL_MODELS`, or `models` in the
/// workspace. A model is a directory with a `tokenizer.json`.
pub fn models() -> Option<PathBuf> {
    let dir = match std::env::var_os("SHOAL_MODELS") {
        Some(dir) => PathBuf::from(dir),
        None => Path::new(env!("CARGO_MANIFEST_DIR")).parent()?.join("models"),
    };
    let entries = std::fs::read_dir(&dir).ok()?.filter_map(Result::ok);
    let mut places = entries.map(|entry| entry.path()).chain([dir.clone()]);
    places.any(|place| place.join("tokenizer.json").is_file()).then_some(dir)
}

/// Uploads a file and returns its id. With `id`, the file takes the place of the one that has
/// that id: the extra form field `id` of `POST /v1/files`.
///
/// # Errors
/// When the upload is refused, or not acknowledged in time.
pub async fn upload(client: &Client, filename: &str, bytes: &[u8], id: Option<&str>) -> Result<String> {
    let answer = client.json(&upload_request(filename, bytes, id)).await?;
    Ok(answer["id"].as_str().with_context(|| format!("a file without id: {answer}"))?.to_owned())
}

/// The files of all blobs in a node's data directory, which are at `blobs/SHARD/HA/HASH`.
///
/// # Errors
/// When the directory cannot be read.
pub fn blob_files(data: &Path) -> Result<Vec<PathBuf>> {
    let mut files = Vec::new();
    for shard in std::fs::read_dir(data.join("blobs"))? {
        let shard = shard?;
        if shard.file_name() == "spool" {
            continue;
        }
        for folder in std::fs::read_dir(shard.path())? {
            for blob in std::fs::read_dir(folder?.path())? {
                files.push(blob?.path());
            }
        }
    }
    Ok(files)
}

/// The request behind [`upload`], for a test that sends it in its own way.
pub fn upload_request(filename: &str, bytes: &[u8], id: Option<&str>) -> Request {
    let boundary = Uuid::new_v4().simple().to_string();
    let mut body = Vec::new();
    for (name, value) in [("purpose", "assistants")].into_iter().chain(id.map(|id| ("id", id))) {
        let part =
            format!("--{boundary}\r\ncontent-disposition: form-data; name=\"{name}\"\r\n\r\n{value}\r\n");
        body.extend_from_slice(part.as_bytes());
    }
    let head = format!(
        "--{boundary}\r\ncontent-disposition: form-data; name=\"file\"; filename=\"{filename}\"\r\n\
         content-type: application/octet-stream\r\n\r\n"
    );
    body.extend_from_slice(head.as_bytes());
    body.extend_from_slice(bytes);
    body.extend_from_slice(format!("\r\n--{boundary}--\r\n").as_bytes());
    Request::raw("POST", "/v1/files", &format!("multipart/form-data; boundary={boundary}"), body)
}

/// A chunk of a document, as its point's payload has it.
#[derive(Clone, Debug)]
pub struct Chunk {
    /// Its place in the document, from 0.
    pub index: u64,
    /// Its text.
    pub text: String,
    /// The whole payload.
    pub payload: Value,
}

/// A vector store. It is also the collection of the same name.
#[derive(Clone, Debug)]
pub struct Store {
    /// Its id.
    pub id: String,
}

impl Store {
    /// Creates a vector store.
    ///
    /// # Errors
    /// When it is refused, or not acknowledged in time.
    pub async fn create(client: &Client, name: &str) -> Result<Store> {
        let answer = client.json(&Request::post("/v1/vector_stores", &json!({"name": name}))).await?;
        let id = answer["id"].as_str().with_context(|| format!("a store without id: {answer}"))?;
        Ok(Store { id: id.to_owned() })
    }

    fn path(&self, rest: &str) -> String {
        format!("/v1/vector_stores/{}{rest}", self.id)
    }

    /// Attaches a file. `extra` has further fields: `attributes`, `chunking_strategy`.
    ///
    /// # Errors
    /// When it is refused, or not acknowledged in time.
    pub async fn attach(&self, client: &Client, file: &str, extra: Value) -> Result<Value> {
        let mut body = extra;
        body["file_id"] = json!(file);
        client.json(&Request::post(self.path("/files"), &body)).await
    }

    /// Uploads a file and attaches it, and returns its id.
    ///
    /// # Errors
    /// When either is refused, or not acknowledged in time.
    pub async fn add(&self, client: &Client, filename: &str, text: &str, extra: Value) -> Result<String> {
        let file = upload(client, filename, text.as_bytes(), None).await?;
        self.attach(client, &file, extra).await?;
        Ok(file)
    }

    /// A file of the store with its status.
    ///
    /// # Errors
    /// When the store does not have it.
    pub async fn file(&self, client: &Client, file: &str) -> Result<Value> {
        client.json(&Request::get(self.path(&format!("/files/{file}")))).await
    }

    /// How many files of the store have a status, counted page by page.
    ///
    /// # Errors
    /// When a page is refused, or not answered in time.
    pub async fn count(&self, client: &Client, status: &str) -> Result<usize> {
        let mut count = 0;
        let mut after = String::new();
        loop {
            let path = self.path(&format!("/files?limit=100{after}"));
            let page = client.json(&Request::get(path)).await?;
            let files = page["data"].as_array().with_context(|| format!("no list: {page}"))?;
            count += files.iter().filter(|file| file["status"] == status).count();
            match (page["has_more"].as_bool(), files.last().and_then(|file| file["id"].as_str())) {
                (Some(true), Some(last)) => after = format!("&after={last}"),
                _ => return Ok(count),
            }
        }
    }

    /// Waits until none of the files is in progress any more and returns how each ended.
    ///
    /// # Errors
    /// When the deadline has passed.
    pub async fn ended(
        &self,
        client: &Client,
        files: &[String],
        deadline: Duration,
    ) -> Result<BTreeMap<String, Value>> {
        let end = Instant::now() + deadline;
        let mut ended = BTreeMap::new();
        for file in files {
            let left = end.saturating_duration_since(Instant::now()).max(Duration::from_secs(1));
            let found = wait_until(left, &format!("{file} to end"), || async {
                let found = self.file(client, file).await?;
                Ok((found["status"] != "in_progress").then_some(found))
            })
            .await?;
            ended.insert(file.clone(), found);
        }
        Ok(ended)
    }

    /// Waits until all of the files are completed.
    ///
    /// # Errors
    /// When one ends in another way, or the deadline has passed.
    pub async fn completed(&self, client: &Client, files: &[String], deadline: Duration) -> Result<()> {
        for (file, ended) in self.ended(client, files, deadline).await? {
            ensure!(ended["status"] == "completed", "{file} is not completed: {ended}");
        }
        Ok(())
    }

    /// The ids of the files that a search finds, best first, each once.
    ///
    /// # Errors
    /// When the search is refused, or not answered in time.
    pub async fn search(&self, client: &Client, query: &str, limit: usize) -> Result<Vec<String>> {
        let body = json!({"query": query, "max_num_results": limit});
        let answer = client.json(&Request::ask(self.path("/search"), &body)).await?;
        let hits = answer["data"].as_array().with_context(|| format!("no hits: {answer}"))?;
        ensure!(hits.len() <= limit, "{} hits, but {limit} were asked for", hits.len());
        let mut found = Vec::new();
        for hit in hits {
            let file = hit["file_id"].as_str().with_context(|| format!("a hit without file: {hit}"))?;
            let text = hit["content"][0]["text"].as_str().unwrap_or_default();
            ensure!(!text.is_empty(), "a hit without text: {hit}");
            if !found.iter().any(|known| known == file) {
                found.push(file.to_owned());
            }
        }
        Ok(found)
    }

    /// All visible chunks by document, each document's in order, and checks that every document
    /// is there once and whole: its chunks are numbered from 0 without hole or double.
    ///
    /// # Errors
    /// When the points cannot be read, or a document has a chunk twice or lacks one.
    pub async fn chunks(
        &self,
        client: &Client,
        freshness: Freshness,
    ) -> Result<BTreeMap<String, Vec<Chunk>>> {
        let mut documents: BTreeMap<String, Vec<Chunk>> = BTreeMap::new();
        for mut point in Points::of(client, &self.id).at(freshness).scroll().await? {
            let payload = point["payload"].take();
            let missing = |field: &str| format!("a chunk without {field}: {payload}");
            let document =
                payload["document_id"].as_str().with_context(|| missing("document_id"))?.to_owned();
            let index = payload["chunk_index"].as_u64().with_context(|| missing("chunk_index"))?;
            let text = payload["text"].as_str().with_context(|| missing("text"))?.to_owned();
            documents.entry(document).or_default().push(Chunk { index, text, payload });
        }
        for (document, chunks) in &mut documents {
            chunks.sort_by_key(|chunk| chunk.index);
            let indexes: Vec<u64> = chunks.iter().map(|chunk| chunk.index).collect();
            let expected: Vec<u64> = (0..chunks.len() as u64).collect();
            ensure!(indexes == expected, "the chunks of {document} are numbered {indexes:?}");
        }
        Ok(documents)
    }
}
