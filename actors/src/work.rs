//! Work that any node can do: parse a file, embed texts. Done here while there is room, on
//! another node's pool when this one is busy and that one is idle.
//!
//! ```text
//!  a worker of this node is free? ──yes─▶ it does it
//!       └─no─▶ a pool of that kind on another node says it has room? ──yes─▶ that one does it
//!                     └─no, or it has none after all─▶ in line here
//! ```
//!
//! The pools are actors (`pool`) that join the cluster-wide groups `parsers` and
//! `embedders`; here is how work comes to them.

use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use parking_lot::RwLock;
use ractor::ActorRef;
use shoal_proto::{Error, ErrorCode, NodeId};
use tokio::sync::oneshot;

use crate::blobs::BlobStore;
use crate::call::{Call, Reply};
use crate::cluster::Cluster;
use crate::embed::{Embedders, TextKind};
use crate::mesh;
use crate::parse::{ParseLimits, Parsed};
use crate::pool::{Job, Kind, Local, PoolMessage};

/// How long another node may take for a piece of work.
const REMOTE_TIMEOUT: Duration = Duration::from_secs(150);

/// What the pools of a node are made of.
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

/// The pools of this node, which say themselves where they are: after a restart there are new ones.
/// Clones share them.
#[derive(Clone, Default)]
pub(crate) struct Pools(Arc<RwLock<[Option<ActorRef<PoolMessage>>; 2]>>);

impl Pools {
    /// Takes the place of the pool of that kind before.
    pub(crate) fn register(&self, kind: Kind, pool: ActorRef<PoolMessage>) {
        self.0.write()[kind as usize] = Some(pool);
    }

    /// Gives a pool a piece of work. Returns nothing when nobody was free and there was no place in
    /// line, or it may not wait there.
    ///
    /// # Errors
    /// Unavailable when there is no such pool at the moment; internal when its worker failed.
    pub(crate) async fn perform(
        &self,
        kind: Kind,
        call: Call,
        may_wait: bool,
    ) -> Result<Option<Reply>, Error> {
        let absent = || Error::unavailable(format!("the {} of this node are not there", kind.group()));
        let pool = self.0.read()[kind as usize].clone().ok_or_else(absent)?;
        let (reply, done) = oneshot::channel();
        let job = Job { call, may_wait, reply };
        pool.cast(PoolMessage::Do(Local(Some(job)))).map_err(|_| absent())?;
        done.await.map_err(|_| Error::internal(format!("one of the {} failed", kind.group())))
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
    pools: Pools,
}

impl Work {
    pub(crate) fn new(config: WorkConfig, cluster: Cluster, blobs: BlobStore) -> Work {
        let inner = Inner { config, cluster: cluster.clone(), blobs, pools: Pools::default() };
        let work = Work { inner: Arc::new(inner) };
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

    pub(crate) fn config(&self) -> &WorkConfig {
        &self.inner.config
    }

    pub(crate) fn pools(&self) -> &Pools {
        &self.inner.pools
    }

    /// Parses a file, here or on an idle node.
    ///
    /// # Errors
    /// Unprocessable when the file is at fault; internal when its parser was killed; busy when too many
    /// wait.
    pub async fn parse(&self, filename: &str, bytes: impl Into<Bytes>) -> Result<Parsed, Error> {
        let call = Call::Parse { filename: filename.to_owned(), bytes: bytes.into() };
        match self.perform(Kind::Parsers, call).await? {
            Reply::Parsed(parsed) => Ok(parsed),
            _ => Err(Error::internal("a parser did not answer with a document")),
        }
    }

    /// Embeds texts, here or on an idle node that has the model.
    ///
    /// # Errors
    /// As the model; busy when too many wait.
    pub async fn embed(&self, model: &str, kind: TextKind, texts: &[String]) -> Result<Vec<Vec<f32>>, Error> {
        // A question that somebody waits for does not queue behind passages.
        if kind == TextKind::Query {
            return self.inner.config.embedders.embed(model, kind, texts).await;
        }
        let call = Call::Embed { model: model.to_owned(), kind, texts: texts.to_vec() };
        match self.perform(Kind::Embedders, call).await? {
            Reply::Embedded(vectors) => Ok(vectors),
            _ => Err(Error::internal("an embedder did not answer with vectors")),
        }
    }

    async fn perform(&self, kind: Kind, call: Call) -> Result<Reply, Error> {
        let Inner { cluster, pools, .. } = &*self.inner;
        let mut reply = pools.perform(kind, call.clone(), false).await?;
        if reply.is_none() {
            reply = elsewhere(cluster, kind, &call).await;
        }
        if reply.is_none() {
            reply = pools.perform(kind, call, true).await?;
        }
        match reply {
            Some(Reply::Failed(error)) => Err(error),
            Some(reply) => Ok(reply),
            None => Err(busy(kind)),
        }
    }

    /// Serves a call from another node, if a worker is free.
    pub(crate) async fn serve(&self, call: Call) -> Reply {
        let Some(kind) = Kind::of(&call) else {
            return Reply::Failed(Error::internal("not a piece of work"));
        };
        match self.inner.pools.perform(kind, call, false).await {
            Ok(Some(reply)) => reply,
            Ok(None) => Reply::Failed(busy(kind)),
            Err(error) => Reply::Failed(error),
        }
    }
}

/// Has another node do a piece of work. None when nobody has room, or it did not come to anything.
async fn elsewhere(cluster: &Cluster, kind: Kind, call: &Call) -> Option<Reply> {
    let node: NodeId = mesh::idle_pool(kind, cluster.node()).await?;
    let reply = cluster.call(node, call.clone(), REMOTE_TIMEOUT).await;
    let is_done = match &reply {
        Reply::Parsed(_) | Reply::Embedded(_) => true,
        // A file that cannot be parsed there cannot be parsed here either.
        Reply::Failed(error) => kind == Kind::Parsers && error.code == ErrorCode::Unprocessable,
        _ => false,
    };
    if is_done {
        metrics::counter!("shoal_remote_work_total", "kind" => call.kind()).increment(1);
    }
    is_done.then_some(reply)
}

fn busy(kind: Kind) -> Error {
    Error::new(ErrorCode::Busy, format!("the {} of this node have too much to do; try again", kind.group()))
}
