//! A network that delays, drops, repeats and cuts. What arrives is what was sent: cables that corrupt are for
//! `chaos`. Streams end in the middle now and then.

use std::collections::{BTreeMap, BTreeSet};
use std::future::Future;
use std::ops::Range;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use futures::StreamExt;
use futures::future::BoxFuture;
use futures::stream::BoxStream;
use openraft::raft::{VoteRequest, VoteResponse};
use parking_lot::Mutex;
use rand::rngs::StdRng;
use rand::{RngExt, SeedableRng};
use shoal_proto::peer::{Piece, RaftKind, RaftMessage, RaftReply};
use shoal_proto::{NodeId, codec};
use tokio::sync::Notify;
use tokio::task::JoinHandle;
use tonic::Status;

use super::runtime::Seeded;
use super::truth::Truth;
use crate::error::Error;
use crate::groups::Groups;
use crate::network::Wire;
use crate::types::TypeConfig;

/// The part of all snapshots that break off.
const BROKEN_STREAMS: f64 = 0.3;
/// The most pieces that come before that.
const PIECES_BEFORE_BREAK: usize = 6;
/// After so long the transport finds that a connection is gone.
const CONNECTION_LOST: Duration = Duration::from_secs(5);

/// One run of a node's process. What a dead one does reaches nobody.
pub struct Life {
    is_alive: AtomicBool,
    ended: Notify,
    coin: Mutex<StdRng>,
}

impl Life {
    pub fn new(seed: u64) -> Arc<Life> {
        Arc::new(Life {
            is_alive: AtomicBool::new(true),
            ended: Notify::new(),
            coin: Mutex::new(StdRng::seed_from_u64(seed)),
        })
    }

    pub fn is_alive(&self) -> bool {
        self.is_alive.load(Ordering::Relaxed)
    }

    pub fn end(&self) {
        self.is_alive.store(false, Ordering::Relaxed);
        self.ended.notify_waiters();
    }

    /// Does something until this life ends.
    pub async fn live(self: Arc<Self>, work: impl Future<Output = ()>) {
        let ended = self.ended.notified();
        if self.is_alive() {
            tokio::select! {
                biased;
                () = ended => {}
                () = work => {}
            }
        }
    }

    pub fn chance(&self, range: Range<f64>) -> f64 {
        self.coin.lock().random_range(range)
    }
}

/// A node that runs.
#[derive(Clone)]
pub struct Running {
    pub life: Arc<Life>,
    pub boot: u64,
    pub groups: Groups,
}

/// What the network does to messages at the moment.
#[derive(Clone, Debug, Default)]
pub struct Weather {
    /// From whom to whom nothing passes.
    pub cut: BTreeSet<(NodeId, NodeId)>,
    /// The part of all messages that is lost.
    pub loss: f64,
    /// The part of all messages that arrives twice.
    pub repeats: f64,
    /// The longest time that a message is under way.
    pub delay: Duration,
}

struct State {
    coin: StdRng,
    weather: Weather,
    running: BTreeMap<NodeId, Running>,
}

/// The network.
pub struct Net {
    state: Mutex<State>,
    truth: Arc<Truth>,
}

enum Fate {
    Lost,
    Arrives(Duration),
}

impl Net {
    pub fn new(seed: u64, truth: Arc<Truth>) -> Arc<Net> {
        let state = State { coin: StdRng::seed_from_u64(seed), weather: calm(), running: BTreeMap::new() };
        Arc::new(Net { state: Mutex::new(state), truth })
    }

    pub fn set_weather(&self, weather: Weather) {
        self.state.lock().weather = weather;
    }

    pub fn weather(&self) -> Weather {
        self.state.lock().weather.clone()
    }

    pub fn start(&self, node: NodeId, running: Running) {
        self.state.lock().running.insert(node, running);
    }

    pub fn stop(&self, node: NodeId) -> Option<Running> {
        self.state.lock().running.remove(&node)
    }

    pub fn running(&self, node: NodeId) -> Option<Running> {
        self.state.lock().running.get(&node).cloned()
    }

    pub fn all_running(&self) -> Vec<(NodeId, Running)> {
        self.state.lock().running.iter().map(|(node, running)| (*node, running.clone())).collect()
    }

    fn fate(&self, from: NodeId, to: NodeId) -> Fate {
        let mut state = self.state.lock();
        let State { coin, weather, .. } = &mut *state;
        if weather.cut.contains(&(from, to)) || coin.random_bool(weather.loss) {
            return Fate::Lost;
        }
        Fate::Arrives(weather.delay.mul_f64(coin.random_range(0.05..1.0)))
    }

    /// After how many pieces a stream breaks off, if it does.
    fn breaks_after(&self) -> Option<usize> {
        let mut state = self.state.lock();
        let breaks = state.coin.random_bool(BROKEN_STREAMS);
        breaks.then(|| state.coin.random_range(1..=PIECES_BEFORE_BREAK))
    }

    fn is_repeated(&self) -> bool {
        let mut state = self.state.lock();
        let repeats = state.weather.repeats;
        state.coin.random_bool(repeats)
    }

    /// Runs something by itself, wherever it comes from: not everybody who calls has a seed.
    fn spawn<T: Send + 'static>(&self, work: impl Future<Output = T> + Send + 'static) -> JoinHandle<T> {
        let seed = self.state.lock().coin.random();
        tokio::spawn(Seeded::scope(seed, work))
    }

    /// One way of a message; an error once the transport has noticed that it did not arrive.
    pub async fn pass(&self, from: NodeId, to: NodeId) -> Result<(), Status> {
        self.truth.note_message(from, to);
        match self.fate(from, to) {
            Fate::Arrives(delay) => tokio::time::sleep(delay).await,
            Fate::Lost => {
                tokio::time::sleep(CONNECTION_LOST).await;
                return Err(Status::unavailable("the connection is gone"));
            }
        }
        Ok(())
    }

    /// A node that can be reached now.
    fn reached(&self, node: NodeId) -> Result<Running, Status> {
        self.running(node).ok_or_else(|| Status::unavailable("connection refused"))
    }
}

/// No faults.
pub fn calm() -> Weather {
    Weather { delay: Duration::from_millis(2), ..Weather::default() }
}

/// The end of the network at one run of one node.
pub struct End {
    pub node: NodeId,
    pub life: Arc<Life>,
    pub net: Arc<Net>,
    /// Whether it asks others for a pre-vote, or takes it for granted.
    pub asks_first: bool,
}

impl End {
    /// A question to a node and its answer, which a crash of either side prevents.
    async fn exchange<T: Send + 'static, F: Future<Output = Result<T, Status>> + Send + 'static>(
        &self,
        to: NodeId,
        ask: impl FnOnce(Running) -> F,
    ) -> Result<T, Status> {
        if !self.life.is_alive() {
            return std::future::pending().await;
        }
        self.net.pass(self.node, to).await?;
        let target = self.net.reached(to)?;
        // A task of its own: what has arrived takes effect, however long the sender waits.
        let answer = self.net.spawn(ask(target.clone())).await;
        let answer = answer.unwrap_or_else(|error| Err(Status::internal(error.to_string())));
        if !target.life.is_alive() {
            return Err(Status::unavailable("connection reset"));
        }
        self.net.pass(to, self.node).await?;
        if !self.life.is_alive() {
            return std::future::pending().await;
        }
        answer
    }
}

fn status_of(error: Error) -> Status {
    match error {
        Error::UnknownGroup(_) => Status::not_found(error.to_string()),
        error => Status::internal(error.to_string()),
    }
}

impl Wire for End {
    fn raft(&self, to: NodeId, message: RaftMessage) -> BoxFuture<'_, Result<RaftReply, Status>> {
        if matches!(message.kind(), RaftKind::Vote | RaftKind::PreVote) {
            let (kind, group, from) = (message.kind(), message.group, self.node);
            self.net
                .truth
                .tell("elections", format_args!("{kind:?} of group {group} from node {from} to node {to}"));
        }
        if !self.asks_first && message.kind == i32::from(RaftKind::PreVote) {
            let granted = codec::decode::<VoteRequest<TypeConfig>>(&message.body)
                .map(|request| VoteResponse::<TypeConfig>::new(request.vote, request.last_log_id, true))
                .map(|granted| RaftReply { body: codec::encode(&granted).into() })
                .map_err(|error| Status::internal(error.to_string()));
            return Box::pin(std::future::ready(granted));
        }
        if self.net.is_repeated() {
            let (net, from, message) = (self.net.clone(), self.node, message.clone());
            self.net.spawn(async move {
                if net.pass(from, to).await.is_ok()
                    && let Ok(target) = net.reached(to)
                {
                    // Nobody waits for what a repeated message is answered.
                    drop(target.groups.handle(message).await);
                }
            });
        }
        let is_offer = message.kind() == RaftKind::SnapshotOffer;
        Box::pin(async move {
            let handle =
                |target: Running| async move { target.groups.handle(message).await.map_err(status_of) };
            let reply = self.exchange(to, handle).await?;
            if is_offer && codec::decode::<u64>(&reply.body).is_ok_and(|held| held > 0) {
                self.net.truth.count("snapshots resumed");
            }
            Ok(reply)
        })
    }

    fn snapshot(
        &self,
        to: NodeId,
        pieces: BoxStream<'static, Piece>,
    ) -> BoxFuture<'_, Result<RaftReply, Status>> {
        let limit = self.net.breaks_after();
        if limit.is_some() {
            self.net.truth.count("snapshots broken");
        }
        let pieces = pieces.take(limit.unwrap_or(usize::MAX)).map(Ok);
        Box::pin(self.exchange(to, |target| async move {
            target.groups.handle_snapshot(pieces).await.map_err(status_of)
        }))
    }

    fn beat(&self, to: NodeId) -> BoxFuture<'_, Result<u64, Status>> {
        Box::pin(self.exchange(to, |target| async move { Ok(target.boot) }))
    }
}
