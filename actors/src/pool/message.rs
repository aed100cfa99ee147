//! What a pool and its workers are told.

use ractor::{ActorRef, BytesConvertable, RpcReplyPort};
use ractor_cluster::{RactorClusterMessage, RactorMessage};
use tokio::sync::oneshot;

use crate::call::{Call, Reply};

/// What the workers of a pool do.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) enum Kind {
    /// Parse files, each in a child process.
    Parsers,
    /// Embed texts.
    Embedders,
}

impl Kind {
    /// The process group of all such pools in the cluster.
    pub(crate) fn group(self) -> &'static str {
        match self {
            Kind::Parsers => "parsers",
            Kind::Embedders => "embedders",
        }
    }

    /// Who does what a call asks for; none when it is not a piece of work.
    pub(crate) fn of(call: &Call) -> Option<Kind> {
        match call {
            Call::Parse { .. } => Some(Kind::Parsers),
            Call::Embed { .. } => Some(Kind::Embedders),
            _ => None,
        }
    }
}

/// A piece of work. Its asker hears nothing when the worker fails: the sender is then dropped.
pub(crate) struct Job {
    /// What is to be done.
    pub(crate) call: Call,
    /// Whether it waits in line when nobody is free.
    pub(crate) may_wait: bool,
    /// What came of it; nothing when nobody was free and there was no place in line. It is not an
    /// `RpcReplyPort`: a worker waits for its closing, to break off what nobody waits for.
    pub(crate) reply: oneshot::Sender<Option<Reply>>,
}

/// What stays on its node. It becomes no bytes, and bytes do not become it.
pub(crate) struct Local<T>(pub(crate) Option<T>);

impl<T> BytesConvertable for Local<T> {
    fn into_bytes(self) -> Vec<u8> {
        Vec::new()
    }

    fn from_bytes(_: Vec<u8>) -> Self {
        Local(None)
    }
}

/// What a pool is told. Only `GetRoom` is of any effect when it comes from another node.
#[derive(RactorClusterMessage)]
pub(crate) enum PoolMessage {
    /// Do a piece of work.
    Do(Local<Job>),
    /// The worker has done its piece of work.
    Freed(Local<ActorRef<WorkerMessage>>),
    /// Start a worker in the place of one that has failed.
    Replace(Local<()>),
    /// The node's id if a worker is free, zero otherwise.
    #[rpc]
    GetRoom(RpcReplyPort<u64>),
}

/// What a worker is told.
#[derive(RactorMessage)]
pub(crate) enum WorkerMessage {
    /// Do a piece of work.
    Do(Job),
}
