//! Work that any node can do: parse a file, embed texts. Done here while there is room, on
//! another node's pool when this one is busy and that one is idle.
//!
//! A node's mesh server joins the cluster-wide group `workers`; a busy node asks the members
//! who has room. Small calls then go over the actor mesh, large ones over gRPC.

use std::sync::Arc;
use std::time::Duration;

use shoal_proto::{Error, ErrorCode, NodeId};
use tokio::sync::Semaphore;

use crate::blobs::BlobStore;
use crate::call::{Call, Reply};
use crate::cluster::Cluster;
use crate::embed::{Embedders, TextKind};
use crate::parse::{self, ParseLimits, Parsed};

/// How long another node may take for a piece of work.
const REMOTE_TIMEOUT: Duration = Duration::from_secs(150);
/// How long a piece of work may wait for its turn on a node that it was sent to.
const REMOTE_QUEUE: Duration = Duration::from_millis(50);

/// What the pool of a node is made of.
#[derive(Clone)]
pub struct WorkConfig {
    /// The models.
    pub embedders: Embedders,
    /// Limits of one parse.
    pub parse_limits: ParseLimits,
    /// Parser children at once.
    pub parsers: usize,
    /// Batches that embed at once.
    pub embedding: usize,
}

impl std::fmt::Debug for WorkConfig {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{} parsers, {} embedders", self.parsers, self.embedding)
    }
}

/// The handle to parsers and embedders. Cheap to clone.
#[derive(Clone)]
pub struct Work {
    inner: Arc<Inner>,
}

struct Inner {
    config: WorkConfig,
    cluster: Cluster,
    blobs: BlobStore,
    parsers: Semaphore,
    embedding: Semaphore,
}

impl Work {
    pub(crate) fn new(config: WorkConfig, cluster: Cluster, blobs: BlobStore) -> Work {
        let (parsers, embedding) = (Semaphore::new(config.parsers), Semaphore::new(config.embedding));
        let work =
            Work { inner: Arc::new(Inner { config, cluster: cluster.clone(), blobs, parsers, embedding }) };
        cluster.set_work(work.clone());
        work
    }

    /// The models of this node.
    pub fn embedders(&self) -> &Embedders {
        &self.inner.config.embedders
    }

    /// The blobs on this node.
    pub fn blobs(&self) -> &BlobStore {
        &self.inner.blobs
    }

    /// Parses a file, here or on an idle node.
    ///
    /// # Errors
    /// Unprocessable when the file is at fault; internal when its parser was killed.
    pub async fn parse(&self, filename: &str, bytes: Vec<u8>) -> Result<Parsed, Error> {
        if self.inner.parsers.available_permits() == 0
            && let Some(node) = self.idle_node().await
        {
            let call = Call::Parse { filename: filename.to_owned(), bytes: bytes.clone().into() };
            match self.inner.cluster.call(node, call, REMOTE_TIMEOUT).await {
                Reply::Parsed(parsed) => return Ok(parsed),
                Reply::Failed(error) if error.code == ErrorCode::Unprocessable => return Err(error),
                _ => {}
            }
        }
        let _turn = self.inner.parsers.acquire().await.map_err(Error::internal)?;
        parse::run_in_child(self.inner.config.parse_limits, filename, &bytes).await
    }

    /// Embeds texts, here or on an idle node that has the model.
    ///
    /// # Errors
    /// As the model.
    pub async fn embed(&self, model: &str, kind: TextKind, texts: &[String]) -> Result<Vec<Vec<f32>>, Error> {
        if self.inner.embedding.available_permits() == 0
            && kind == TextKind::Passage
            && let Some(node) = self.idle_node().await
        {
            let call = Call::Embed { model: model.to_owned(), kind, texts: texts.to_vec() };
            if let Reply::Embedded(vectors) = self.inner.cluster.call(node, call, REMOTE_TIMEOUT).await {
                return Ok(vectors);
            }
        }
        // A question that somebody waits for does not queue behind passages.
        let _turn = match kind {
            TextKind::Query => None,
            TextKind::Passage => Some(self.inner.embedding.acquire().await.map_err(Error::internal)?),
        };
        self.inner.config.embedders.embed(model, kind, texts).await
    }

    /// Serves a call from another node, if there is room soon.
    pub(crate) async fn serve(&self, call: Call) -> Reply {
        let busy = || Reply::Failed(Error::new(ErrorCode::Busy, "this node's workers are busy"));
        match call {
            Call::Parse { filename, bytes } => {
                let Ok(Ok(_turn)) = tokio::time::timeout(REMOTE_QUEUE, self.inner.parsers.acquire()).await
                else {
                    return busy();
                };
                match parse::run_in_child(self.inner.config.parse_limits, &filename, &bytes).await {
                    Ok(parsed) => Reply::Parsed(parsed),
                    Err(error) => Reply::Failed(error),
                }
            }
            Call::Embed { model, kind, texts } => {
                let Ok(Ok(_turn)) = tokio::time::timeout(REMOTE_QUEUE, self.inner.embedding.acquire()).await
                else {
                    return busy();
                };
                match self.inner.config.embedders.embed(&model, kind, &texts).await {
                    Ok(vectors) => Reply::Embedded(vectors),
                    Err(error) => Reply::Failed(error),
                }
            }
            _ => Reply::Failed(Error::internal("not a piece of work")),
        }
    }

    /// Another node that says it has room, found through the group `workers`.
    async fn idle_node(&self) -> Option<NodeId> {
        crate::mesh::idle_worker(self.inner.cluster.node()).await
    }

    pub(crate) fn has_room(&self) -> bool {
        self.inner.parsers.available_permits() > 0 && self.inner.embedding.available_permits() > 0
    }
}
