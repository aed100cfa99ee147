//! The actor mesh: small work between actors of different nodes, over `ractor_cluster`.
//!
//! ```text
//!  Mesh ── supervises ─▶ NodeServer (listens, authenticates by the cluster secret)
//!   └── dials every member with a higher id, again and again, until a session stands and carries
//!  Server (one a node) ── joins ─▶ group `node-<id>`, visible on every node
//!  Pools (crate::pool) ── join ─▶ groups `parsers` and `embedders`
//! ```
//!
//! The library does not redial, does not notice a silent partition, and kills a session at an
//! oversized frame. So: sessions are dialled from a tick; remote references are looked up by
//! group for every call and never kept; every call has a time-out, and a node that did not keep it
//! is asked over gRPC alone for a while ([`DOUBT`]); every session is probed, and ended when it carries
//! nothing ([`probes`]); and nothing over [`limits::MAX_MESH_BYTES`] is sent. Its listener takes one
//! handshake at a time, so that one silent stranger would close it to everybody: connections are accepted
//! here ([`crate::tls`]), and the library's own listener sits on a loopback port that nobody is told of.

mod probes;

use std::collections::{BTreeMap, BTreeSet};
use std::net::{Ipv4Addr, SocketAddr};
use std::sync::Arc;
use std::time::{Duration, Instant};

use futures::StreamExt;
use futures::future::join_all;
use futures::stream::FuturesUnordered;
use parking_lot::Mutex;
use ractor::rpc::CallResult;
use ractor::{Actor, ActorCell, ActorId, ActorProcessingErr, ActorRef, RpcReplyPort, SupervisionEvent, pg};
use ractor_cluster::node::NodeConnectionMode;
use ractor_cluster::{
    IncomingEncryptionMode, NetworkStream, NodeServer, NodeServerMessage, RactorClusterMessage, RactorMessage,
};
use serde::Serialize;
use serde::de::DeserializeOwned;
use shoal_proto::{Error, ErrorCode, GroupId, NodeId, codec};
use tokio::net::TcpListener;
use tokio::sync::Semaphore;
use tokio::task::JoinHandle;

use crate::call::{Call, Reply};
use crate::cluster::Cluster;
use crate::limits;
use crate::mesh::probes::Probes;
use crate::pool::{Kind, PoolMessage};
use crate::tls::{Incoming, PeerTls};

/// The scope of all process groups of Shoal.
pub(crate) const SCOPE: &str = "shoal";
/// How often missing sessions are dialled.
const DIAL_TICK: Duration = Duration::from_millis(500);
/// How long one dial may take.
const DIAL_TIMEOUT: Duration = Duration::from_secs(2);
/// How long a node may take to answer a probe.
const PROBE_TIMEOUT: Duration = Duration::from_secs(2);
/// How long a node is asked over gRPC alone after it did not answer over the mesh, unless it answers a probe.
const DOUBT: Duration = Duration::from_secs(10);
/// How long a node may take to say whether it has room.
const ROOM_TIMEOUT: Duration = Duration::from_millis(100);
/// How often it is looked whether somebody still waits for the answer to a call.
const CLOSED_TICK: Duration = Duration::from_millis(250);
/// Calls that one node serves over the mesh at once; beyond them it says that it is busy.
const MAX_CALLS: usize = 256;

/// A value on its way between nodes. Decoding never panics: what does not decode arrives as an
/// error, because a panic here would end the session with its peer.
pub(crate) struct Wire<T>(pub(crate) Result<T, String>);

impl<T: Serialize + DeserializeOwned> ractor::BytesConvertable for Wire<T> {
    fn into_bytes(self) -> Vec<u8> {
        self.0.map(|value| codec::encode(&value)).unwrap_or_default()
    }

    fn from_bytes(bytes: Vec<u8>) -> Self {
        Wire(codec::decode(&bytes).map_err(|error| error.to_string()))
    }
}

/// What may be asked of a node over the mesh.
#[derive(RactorClusterMessage)]
pub(crate) enum ServerMessage {
    /// Serve a call.
    #[rpc]
    Serve(Wire<Call>, RpcReplyPort<Wire<Reply>>),
}

/// The actor that serves other nodes' calls. It is serial, so it only starts the work.
pub(crate) struct Server;

pub(crate) struct ServerState {
    cluster: Cluster,
    calls: Arc<Semaphore>,
}

impl Actor for Server {
    type Msg = ServerMessage;
    type State = ServerState;
    type Arguments = Cluster;

    async fn pre_start(
        &self,
        myself: ActorRef<ServerMessage>,
        cluster: Cluster,
    ) -> Result<ServerState, ActorProcessingErr> {
        pg::join_scoped(SCOPE.to_owned(), node_group(cluster.node()), vec![myself.get_cell()]);
        Ok(ServerState { cluster, calls: Arc::new(Semaphore::new(MAX_CALLS)) })
    }

    async fn handle(
        &self,
        _: ActorRef<ServerMessage>,
        message: ServerMessage,
        state: &mut ServerState,
    ) -> Result<(), ActorProcessingErr> {
        match message {
            ServerMessage::Serve(call, port) => state.serve(call, port),
        }
        Ok(())
    }
}

impl ServerState {
    fn serve(&self, call: Wire<Call>, port: RpcReplyPort<Wire<Reply>>) {
        let refuse = |code, reason: String| Reply::Failed(Error::new(code, reason));
        let permit = self.calls.clone().try_acquire_owned();
        let cluster = self.cluster.clone();
        tokio::spawn(async move {
            let reply = match (call.0, permit) {
                (Err(reason), _) => refuse(ErrorCode::InvalidArgument, reason),
                (_, Err(_)) => refuse(ErrorCode::Busy, "this node serves too many calls".into()),
                (Ok(call), Ok(_permit)) => tokio::select! {
                    biased;
                    reply = cluster.serve(call) => reply,
                    () = closed(&port) => return,
                },
            };
            let reply = match codec::encoded_len(&reply) > limits::MAX_MESH_BYTES {
                true => Reply::UseGrpc,
                false => reply,
            };
            drop(port.send(Wire(Ok(reply))));
        });
    }
}

/// Ends some time after nobody waits for an answer any more. Writes do not come over the mesh: none is broken
/// off.
async fn closed(port: &RpcReplyPort<Wire<Reply>>) {
    while !port.is_closed() {
        tokio::time::sleep(CLOSED_TICK).await;
    }
}

/// Why there is no answer over the mesh.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum NoAnswer {
    /// It did not come in all the time there was: there is no point in asking in another way.
    TimedOut,
    /// Ask over gRPC: the call or its answer is too large for the mesh.
    TooLarge,
    /// Ask over gRPC: there is no session, or it has ended, or it has carried nothing of late.
    Unreachable,
}

/// Asks nodes over the mesh, and remembers where that is of no use.
#[derive(Default)]
pub(crate) struct Caller {
    /// When a node did not answer in time.
    timed_out: Mutex<BTreeMap<NodeId, Instant>>,
}

impl Caller {
    /// Asks a node, for as long as `timeout`.
    ///
    /// # Errors
    /// Why it is to be asked in another way, or not any more.
    pub(crate) async fn ask(&self, node: NodeId, call: &Call, timeout: Duration) -> Result<Reply, NoAnswer> {
        let asked = match self.is_doubted(node, Instant::now()) {
            true => Err(NoAnswer::Unreachable),
            false => ask(node, call, timeout).await,
        };
        let outcome = match &asked {
            Ok(_) => "answered",
            Err(NoAnswer::TimedOut) => "timed_out",
            Err(NoAnswer::TooLarge) => "too_large",
            Err(NoAnswer::Unreachable) => "unreachable",
        };
        metrics::counter!("shoal_mesh_calls_total", "kind" => call.kind(), "outcome" => outcome).increment(1);
        if matches!(asked, Err(NoAnswer::TimedOut)) {
            self.note_late(node, call);
        }
        asked
    }

    /// Asks a node something that costs it nothing. Returns whether the session to it carries anything; none
    /// when there is none.
    async fn probe(&self, node: NodeId) -> Option<bool> {
        // Refused at once, by builds of any age: the control group has no replica of a shard.
        let question = Call::StateSums { group: GroupId::CONTROL };
        match ask(node, &question, PROBE_TIMEOUT).await {
            Ok(_) | Err(NoAnswer::TooLarge) => {
                self.timed_out.lock().remove(&node);
                Some(true)
            }
            Err(NoAnswer::TimedOut) => {
                self.timed_out.lock().insert(node, Instant::now());
                Some(false)
            }
            Err(NoAnswer::Unreachable) => None,
        }
    }

    /// A call was not answered in time. What may take long says nothing of the way to the node.
    fn note_late(&self, node: NodeId, call: &Call) {
        if !call.may_take_long() {
            self.timed_out.lock().insert(node, Instant::now());
        }
    }

    fn is_doubted(&self, node: NodeId, now: Instant) -> bool {
        let mut timed_out = self.timed_out.lock();
        timed_out.retain(|_, at| now.duration_since(*at) < DOUBT);
        timed_out.contains_key(&node)
    }
}

async fn ask(node: NodeId, call: &Call, timeout: Duration) -> Result<Reply, NoAnswer> {
    // The length of these bytes is known without encoding them.
    if matches!(call, Call::Parse { bytes, .. } if bytes.len() > limits::MAX_MESH_BYTES / 2) {
        return Err(NoAnswer::TooLarge);
    }
    let members = pg::get_scoped_members(&SCOPE.to_owned(), &node_group(node));
    let member = members.into_iter().next().ok_or(NoAnswer::Unreachable)?;
    if codec::encoded_len(call) > limits::MAX_MESH_BYTES {
        return Err(NoAnswer::TooLarge);
    }
    let server: ActorRef<ServerMessage> = member.into();
    let call = call.clone();
    match server.call(|port| ServerMessage::Serve(Wire(Ok(call)), port), Some(timeout)).await {
        Ok(CallResult::Success(Wire(Ok(Reply::UseGrpc)))) => Err(NoAnswer::TooLarge),
        Ok(CallResult::Success(Wire(Ok(reply)))) => Ok(reply),
        Ok(CallResult::Timeout) => Err(NoAnswer::TimedOut),
        _ => Err(NoAnswer::Unreachable),
    }
}

/// A node, not this one, whose pool of that kind says that it has room: the first to say so.
pub(crate) async fn idle_pool(kind: Kind, this: NodeId) -> Option<NodeId> {
    let members = pg::get_scoped_members(&SCOPE.to_owned(), &kind.group().to_owned());
    let elsewhere = members.into_iter().filter(|cell| !cell.get_id().is_local());
    let mut asks: FuturesUnordered<_> = elsewhere.map(has_room).collect();
    while let Some(node) = asks.next().await {
        if node.is_some_and(|node| node != this) {
            return node;
        }
    }
    None
}

async fn has_room(pool: ActorCell) -> Option<NodeId> {
    let pool: ActorRef<PoolMessage> = pool.into();
    match pool.call(PoolMessage::GetRoom, Some(ROOM_TIMEOUT)).await {
        Ok(CallResult::Success(node)) => Some(NodeId(node)).filter(|node| node.0 != 0),
        _ => None,
    }
}

fn node_group(node: NodeId) -> String {
    format!("node-{node}")
}

/// The actor that keeps sessions to all members.
pub(crate) struct Mesh;

#[derive(Clone)]
pub(crate) struct MeshArguments {
    pub(crate) cluster: Cluster,
    pub(crate) listen: SocketAddr,
    pub(crate) secret: String,
    pub(crate) tls: PeerTls,
}

#[derive(RactorMessage)]
pub(crate) enum MeshMessage {
    /// Dial the members without a session, and end the sessions that carry nothing.
    Dial,
}

pub(crate) struct MeshState {
    cluster: Cluster,
    server: ActorRef<NodeServerMessage>,
    tls: PeerTls,
    probes: Probes,
    _accepting: Accepting,
}

/// Accepts connections until it is dropped, however the actor ends: the next one needs the port.
struct Accepting(JoinHandle<()>);

impl Drop for Accepting {
    fn drop(&mut self) {
        self.0.abort();
    }
}

impl Actor for Mesh {
    type Msg = MeshMessage;
    type State = MeshState;
    type Arguments = MeshArguments;

    async fn pre_start(
        &self,
        myself: ActorRef<MeshMessage>,
        arguments: MeshArguments,
    ) -> Result<MeshState, ActorProcessingErr> {
        let MeshArguments { cluster, listen, secret, tls } = arguments;
        let listener = TcpListener::bind(listen).await?;
        let server = NodeServer::new(
            0,
            secret,
            session_name(cluster.node()),
            format!("{}-{}", listen.ip(), cluster.node()),
            Some(IncomingEncryptionMode::Tls(tls.acceptor())),
            Some(NodeConnectionMode::Isolated),
        )
        .with_listen_addr(Ipv4Addr::LOCALHOST.into())
        .with_max_inbound_frame_size(4 * limits::MAX_MESH_BYTES as u64);
        let (server, _) = Actor::spawn_linked(None, server, (), myself.get_cell()).await?;
        let (accepts, sessions) = (tls.clone(), server.clone());
        let accepting = tokio::spawn(async move {
            accepts.accept(listener, false, move |incoming| open_session(&sessions, incoming)).await;
        });
        myself.send_interval(DIAL_TICK, || MeshMessage::Dial);
        Ok(MeshState { cluster, server, tls, probes: Probes::default(), _accepting: Accepting(accepting) })
    }

    async fn handle(
        &self,
        _: ActorRef<MeshMessage>,
        message: MeshMessage,
        state: &mut MeshState,
    ) -> Result<(), ActorProcessingErr> {
        match message {
            MeshMessage::Dial => state.keep_sessions().await,
        }
        Ok(())
    }

    async fn handle_supervisor_evt(
        &self,
        myself: ActorRef<MeshMessage>,
        event: SupervisionEvent,
        _: &mut MeshState,
    ) -> Result<(), ActorProcessingErr> {
        match event {
            // Without its listener the mesh is of no use: the root starts both anew.
            SupervisionEvent::ActorFailed(_, error) => {
                myself.stop(Some(format!("the node server failed: {error}")));
                Ok(())
            }
            SupervisionEvent::ActorTerminated(_, _, reason) => {
                myself.stop(Some(format!("the node server stopped: {reason:?}")));
                Ok(())
            }
            _ => Ok(()),
        }
    }
}

impl MeshState {
    async fn keep_sessions(&mut self) {
        let Ok(sessions) = ractor::call_t!(self.server, NodeServerMessage::GetSessions, 1000) else { return };
        let connected: BTreeMap<String, ActorCell> = sessions
            .into_values()
            .filter_map(|session| {
                let name = session.peer_name?.name.split('@').next()?.to_owned();
                Some((name, session.actor.get_cell()))
            })
            .collect();
        metrics::gauge!("shoal_mesh_sessions").set(connected.len() as f64);
        self.dial(&connected).await;
        self.probe(&connected).await;
    }

    /// Ends the sessions that carry nothing.
    async fn probe(&mut self, connected: &BTreeMap<String, ActorCell>) {
        let sessions: BTreeSet<ActorId> = connected.values().map(ActorCell::get_id).collect();
        if !self.probes.are_due(&sessions, Instant::now()) {
            return;
        }
        let state = self.cluster.state();
        let sessions = state.nodes.keys().filter_map(|id| Some((*id, connected.get(&session_name(*id))?)));
        let caller = self.cluster.mesh();
        let asked = sessions.map(|(id, session)| async move { (id, session, caller.probe(id).await) });
        for (id, session, has_carried) in join_all(asked).await {
            // Of a node whose server is not there just now nothing can be said.
            let Some(has_carried) = has_carried else { continue };
            if self.probes.note(session.get_id(), has_carried) {
                tracing::warn!(peer = id.0, "a session of the mesh carries nothing and is ended");
                session.stop(Some("it carries nothing".into()));
            }
        }
    }

    /// Of each pair the node with the lower id dials, so that two dials never cross.
    async fn dial(&self, connected: &BTreeMap<String, ActorCell>) {
        let state = self.cluster.state();
        let missing = state
            .nodes
            .iter()
            .filter(|(id, _)| **id > self.cluster.node() && !connected.contains_key(&session_name(**id)));
        for (id, node) in missing {
            let (connector, name) = self.tls.connector();
            let address = node.addresses.mesh.as_str();
            let dial = ractor_cluster::client_connect_enc(&self.server, address, connector, name);
            match tokio::time::timeout(DIAL_TIMEOUT, dial).await {
                Ok(Ok(())) => {}
                Ok(Err(error)) => tracing::debug!(peer = id.0, %error, "the mesh cannot reach a node yet"),
                Err(_) => tracing::debug!(peer = id.0, "the mesh cannot reach a node in time"),
            }
        }
    }
}

/// Hands a connection to the library, which asks for the secret once more.
fn open_session(sessions: &ActorRef<NodeServerMessage>, incoming: Incoming) {
    let is_peer = incoming.is_peer();
    let Incoming::Tls(stream) = incoming else { return };
    let socket = stream.get_ref().0;
    let (Ok(peer_addr), Ok(local_addr), true) = (socket.peer_addr(), socket.local_addr(), is_peer) else {
        return;
    };
    let stream = NetworkStream::TlsServer { peer_addr, local_addr, stream: *stream };
    // A node server that is gone takes its listener along.
    drop(sessions.cast(NodeServerMessage::ConnectionOpened { stream: Box::new(stream), is_server: true }));
}

fn session_name(node: NodeId) -> String {
    format!("shoal{node}")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn a_node_that_did_not_answer_over_the_mesh_is_asked_over_grpc_for_a_while() {
        let (caller, node, now) = (Caller::default(), NodeId(2), Instant::now());
        caller.timed_out.lock().insert(node, now);
        assert!(caller.is_doubted(node, now) && !caller.is_doubted(NodeId(3), now));
        let asked = caller.ask(node, &Call::Report, Duration::from_secs(1)).await;
        assert!(matches!(asked, Err(NoAnswer::Unreachable)), "{asked:?}");
        assert!(!caller.is_doubted(node, now + DOUBT));
    }

    #[test]
    fn a_call_that_may_take_long_casts_no_doubt_on_a_node() {
        let (caller, node) = (Caller::default(), NodeId(2));
        caller.note_late(node, &Call::StateSums { group: GroupId(3) });
        caller.note_late(node, &Call::Parse { filename: "a.pdf".into(), bytes: Default::default() });
        assert!(!caller.is_doubted(node, Instant::now()));
        caller.note_late(node, &Call::Report);
        assert!(caller.is_doubted(node, Instant::now()));
    }
}
