//! The pool: hands work to its workers, and brings back the ones that fail.

use std::time::Instant;

use ractor::{Actor, ActorCell, ActorProcessingErr, ActorRef, RpcReplyPort, SpawnErr, SupervisionEvent, pg};
use shoal_proto::NodeId;

use super::line::{Line, Placed};
use super::message::{Job, Kind, Local, PoolMessage, WorkerMessage};
use super::worker::{Worker, WorkerArguments};
use crate::limits;
use crate::mesh::SCOPE;
use crate::restarts::Restarts;
use crate::work::{Pools, WorkConfig};

pub(crate) struct Pool;

#[derive(Clone)]
pub(crate) struct PoolArguments {
    pub(crate) kind: Kind,
    pub(crate) node: NodeId,
    pub(crate) config: WorkConfig,
    /// Where those look who have work.
    pub(crate) pools: Pools,
}

pub(crate) struct PoolState {
    arguments: PoolArguments,
    line: Line<ActorRef<WorkerMessage>, Job>,
    failures: Restarts,
}

impl Actor for Pool {
    type Msg = PoolMessage;
    type State = PoolState;
    type Arguments = PoolArguments;

    async fn pre_start(
        &self,
        myself: ActorRef<PoolMessage>,
        arguments: PoolArguments,
    ) -> Result<PoolState, ActorProcessingErr> {
        let (kind, pools) = (arguments.kind, arguments.pools.clone());
        let count = match kind {
            Kind::Parsers => arguments.config.parsers,
            Kind::Embedders => arguments.config.embedding,
        };
        let line = Line::new(limits::MAX_WORK_WAITING);
        let mut state = PoolState { arguments, line, failures: Restarts::default() };
        for _ in 0..count {
            state.hire(&myself).await?;
        }
        pools.register(kind, myself.clone());
        pg::join_scoped(SCOPE.to_owned(), kind.group().to_owned(), vec![myself.get_cell()]);
        Ok(state)
    }

    async fn handle(
        &self,
        myself: ActorRef<PoolMessage>,
        message: PoolMessage,
        state: &mut PoolState,
    ) -> Result<(), ActorProcessingErr> {
        match message {
            PoolMessage::Do(Local(Some(job))) => state.add(job),
            PoolMessage::Freed(Local(Some(worker))) => state.freed(worker),
            PoolMessage::Replace(Local(Some(()))) => state.replace(&myself).await,
            // Another node's, of no effect.
            PoolMessage::Do(Local(None))
            | PoolMessage::Freed(Local(None))
            | PoolMessage::Replace(Local(None)) => {}
            PoolMessage::GetRoom(port) => state.tell_room(port),
        }
        Ok(())
    }

    async fn handle_supervisor_evt(
        &self,
        myself: ActorRef<PoolMessage>,
        event: SupervisionEvent,
        state: &mut PoolState,
    ) -> Result<(), ActorProcessingErr> {
        match event {
            SupervisionEvent::ActorFailed(worker, error) => {
                state.replace_later(&worker, &error.to_string(), &myself);
            }
            SupervisionEvent::ActorTerminated(worker, _, reason) => {
                state.replace_later(&worker, &reason.unwrap_or_default(), &myself);
            }
            _ => {}
        }
        Ok(())
    }
}

impl PoolState {
    /// Starts a worker and gives it what waits.
    async fn hire(&mut self, myself: &ActorRef<PoolMessage>) -> Result<(), SpawnErr> {
        let arguments = WorkerArguments { config: self.arguments.config.clone(), pool: myself.clone() };
        let (worker, _) = Actor::spawn_linked(None, Worker, arguments, myself.get_cell()).await?;
        self.freed(worker);
        Ok(())
    }

    fn add(&mut self, job: Job) {
        let may_wait = job.may_wait;
        match self.line.add(job, may_wait, is_abandoned) {
            Placed::Begins(worker, job) => begin(&worker, job),
            Placed::Waits => {}
            // Whoever asked may have gone.
            Placed::Refused(job) => drop(job.reply.send(None)),
        }
    }

    fn freed(&mut self, worker: ActorRef<WorkerMessage>) {
        if let Some((worker, job)) = self.line.freed(worker, is_abandoned) {
            begin(&worker, job);
        }
    }

    fn tell_room(&self, port: RpcReplyPort<u64>) {
        // A caller that has gone away needs no answer.
        drop(port.send(if self.line.has_room() { self.arguments.node.0 } else { 0 }));
    }

    /// A worker has failed. It was at work, so it is in no list. However often that happens it stays
    /// a matter of this pool: the reason is the piece of work, and other pieces wait behind it.
    fn replace_later(&mut self, worker: &ActorCell, reason: &str, myself: &ActorRef<PoolMessage>) {
        let (kind, id) = (self.arguments.kind, worker.get_id());
        tracing::error!(?kind, %id, reason, "a worker failed and is started again");
        metrics::counter!("shoal_actor_restarts_total").increment(1);
        let pause = self.failures.note(Instant::now());
        myself.send_after(pause, || PoolMessage::Replace(Local(Some(()))));
    }

    async fn replace(&mut self, myself: &ActorRef<PoolMessage>) {
        if let Err(error) = self.hire(myself).await {
            tracing::error!(kind = ?self.arguments.kind, %error, "a worker does not start; will try again");
            let pause = self.failures.note(Instant::now());
            myself.send_after(pause, || PoolMessage::Replace(Local(Some(()))));
        }
    }
}

fn is_abandoned(job: &Job) -> bool {
    job.reply.is_closed()
}

fn begin(worker: &ActorRef<WorkerMessage>, job: Job) {
    // A worker that has ended meanwhile drops the job, and with it its asker's hope.
    drop(worker.cast(WorkerMessage::Do(job)));
}
