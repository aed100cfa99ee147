//! A worker: does one piece of work at a time.

use ractor::{Actor, ActorProcessingErr, ActorRef};
use shoal_proto::Error;

use super::message::{Job, Local, PoolMessage, WorkerMessage};
use crate::call::{Call, Reply};
use crate::parse;
use crate::work::WorkConfig;

pub(super) struct Worker;

pub(super) struct WorkerArguments {
    pub(super) config: WorkConfig,
    pub(super) pool: ActorRef<PoolMessage>,
}

impl Actor for Worker {
    type Msg = WorkerMessage;
    type State = WorkerArguments;
    type Arguments = WorkerArguments;

    async fn pre_start(
        &self,
        _: ActorRef<WorkerMessage>,
        arguments: WorkerArguments,
    ) -> Result<WorkerArguments, ActorProcessingErr> {
        Ok(arguments)
    }

    async fn handle(
        &self,
        myself: ActorRef<WorkerMessage>,
        message: WorkerMessage,
        state: &mut WorkerArguments,
    ) -> Result<(), ActorProcessingErr> {
        match message {
            WorkerMessage::Do(job) => work(&state.config, job).await,
        }
        state.pool.cast(PoolMessage::Freed(Local(Some(myself))))?;
        Ok(())
    }
}

/// Does a piece of work for as long as somebody waits for it.
async fn work(config: &WorkConfig, job: Job) {
    let Job { call, mut reply, .. } = job;
    let done = tokio::select! {
        done = carry_out(config, call) => done,
        () = reply.closed() => return,
    };
    // Whoever asked has gone in the last moment.
    drop(reply.send(Some(done)));
}

async fn carry_out(config: &WorkConfig, call: Call) -> Reply {
    let done = match call {
        Call::Parse { filename, bytes } => {
            parse::run_in_child(config.parse_limits, &filename, &bytes).await.map(Reply::Parsed)
        }
        Call::Embed { model, kind, texts } => {
            config.embedders.embed(&model, kind, &texts).await.map(Reply::Embedded)
        }
        _ => Err(Error::internal("not a piece of work")),
    };
    done.unwrap_or_else(Reply::Failed)
}
