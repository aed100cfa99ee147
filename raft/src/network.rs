//! How Raft messages reach other nodes: one gRPC channel per peer for all groups, and a second
//! one for snapshots and blobs, so that something large never delays a heartbeat.

use std::collections::HashMap;
use std::future::Future;
use std::sync::Arc;
use std::time::Duration;

use futures::future::BoxFuture;
use futures::stream::BoxStream;
use openraft::errors::{NetworkError, RPCError, ReplicationClosed, StreamingError, Unreachable};
use openraft::network::{RPCOption, RaftNetworkFactory, v2::RaftNetworkV2};
use openraft::raft::{
    AppendEntriesRequest, AppendEntriesResponse, SnapshotResponse, TransferLeaderRequest,
    TransferLeaderResponse, VoteRequest, VoteResponse,
};
use openraft::{EmptyNode, OptionalSend};
use parking_lot::RwLock;
use serde::Serialize;
use serde::de::DeserializeOwned;
use shoal_proto::peer::peer_client::PeerClient;
use shoal_proto::peer::{BeatRequest, Piece, RaftKind, RaftMessage, RaftReply};
use shoal_proto::{GroupId, NodeId, codec};
use tonic::Status;
use tonic::transport::{Channel, ClientTlsConfig, Endpoint};

use crate::idle::{Beats, Sleep};
use crate::machine::SnapshotData;
use crate::snapshot::Snapshots;
use crate::types::{SnapshotOf, TypeConfig, VoteOf};

/// The largest gRPC message between peers, in bytes.
pub const MAX_PEER_MESSAGE_BYTES: usize = 72 << 20;
/// How long a message that carries entries may take; a heartbeat has openraft's own limit.
const APPEND_TIMEOUT: Duration = Duration::from_secs(5);
/// How long a node that is to get a snapshot may take to say that it lives.
const BEAT_TIMEOUT: Duration = Duration::from_secs(2);

/// A gRPC client to a peer.
pub type Client = PeerClient<Channel>;

/// Which channel a call goes through.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Lane {
    /// Small and urgent: Raft, proposals, reads.
    Fast,
    /// Large: snapshots, blobs.
    Bulk,
}

/// Whatever carries the messages of Raft itself to another node.
pub(crate) trait Wire: Send + Sync + 'static {
    /// A message of one group, and what the node answers.
    fn raft(&self, to: NodeId, message: RaftMessage) -> BoxFuture<'_, Result<RaftReply, Status>>;

    /// A snapshot in pieces, of which the first has a header.
    fn snapshot(
        &self,
        to: NodeId,
        pieces: BoxStream<'static, Piece>,
    ) -> BoxFuture<'_, Result<RaftReply, Status>>;

    /// Whether the node lives: the number of its process's run.
    fn beat(&self, to: NodeId) -> BoxFuture<'_, Result<u64, Status>>;
}

/// gRPC channels by node. Addresses follow the cluster's state.
struct Channels {
    tls: ClientTlsConfig,
    addresses: RwLock<HashMap<NodeId, String>>,
    channels: RwLock<HashMap<(NodeId, Lane), (String, Channel)>>,
}

/// The way to all peers.
#[derive(Clone)]
pub struct Peers {
    /// Another number after every start of the process.
    boot: u64,
    channels: Arc<Channels>,
    wire: Arc<dyn Wire>,
    beats: Arc<Beats>,
}

impl Peers {
    /// No peers yet. Every channel is encrypted, and both sides check certificates as `tls` says.
    pub fn new(tls: ClientTlsConfig) -> Peers {
        let channels = Arc::new(Channels::new(tls));
        let boot = uuid::Uuid::new_v4().as_u64_pair().0;
        Peers { boot, wire: channels.clone(), channels, beats: Arc::default() }
    }

    /// Peers that are reached some other way.
    #[cfg(test)]
    pub(crate) fn over(wire: Arc<dyn Wire>, boot: u64) -> Peers {
        let channels = Arc::new(Channels::new(ClientTlsConfig::new()));
        Peers { boot, channels, wire, beats: Arc::default() }
    }

    /// The number of this run of the process.
    pub fn boot(&self) -> u64 {
        self.boot
    }

    pub(crate) fn beats(&self) -> &Beats {
        &self.beats
    }

    pub(crate) fn wire(&self) -> &dyn Wire {
        &*self.wire
    }

    /// The nodes whose addresses are known.
    pub(crate) fn nodes(&self) -> Vec<NodeId> {
        self.channels.addresses.read().keys().copied().collect()
    }

    /// Asks a member to stop a group's timers. Returns whether it has.
    pub(crate) async fn sleep(&self, group: GroupId, to: NodeId, sleep: &Sleep, timeout: Duration) -> bool {
        let link = Link { group, target: to, peers: self.clone() };
        link.call(RaftKind::Sleep, sleep, timeout).await.unwrap_or(false)
    }

    /// Asks a node whether the group that it leads has let `gone` go; none when it does not know.
    pub(crate) async fn has_let_go(
        &self,
        group: GroupId,
        to: NodeId,
        gone: NodeId,
        timeout: Duration,
    ) -> Option<bool> {
        let link = Link { group, target: to, peers: self.clone() };
        link.call(RaftKind::Membership, &gone, timeout).await.ok()
    }

    /// Notes where a node listens for gRPC.
    pub fn set_address(&self, node: NodeId, address: &str) {
        self.channels.addresses.write().insert(node, address.to_owned());
    }

    /// Where a node listens, if that is known.
    pub fn address(&self, node: NodeId) -> Option<String> {
        self.channels.address(node)
    }

    /// A client to a node, over a shared channel that connects when first used.
    ///
    /// # Errors
    /// A sentence, when the node's address is unknown or malformed.
    pub fn client(&self, node: NodeId, lane: Lane) -> Result<Client, String> {
        self.channels.client(node, lane)
    }

    /// A client to an address, for nodes that have no id yet.
    ///
    /// # Errors
    /// A sentence, when the address is malformed.
    pub fn client_at(&self, address: &str) -> Result<Client, String> {
        Ok(wrap(self.channels.connect(address)?))
    }
}

fn wrap(channel: Channel) -> Client {
    PeerClient::new(channel)
        .max_decoding_message_size(MAX_PEER_MESSAGE_BYTES)
        .max_encoding_message_size(MAX_PEER_MESSAGE_BYTES)
}

impl Channels {
    fn new(tls: ClientTlsConfig) -> Channels {
        Channels { tls, addresses: RwLock::default(), channels: RwLock::default() }
    }

    fn address(&self, node: NodeId) -> Option<String> {
        self.addresses.read().get(&node).cloned()
    }

    fn client(&self, node: NodeId, lane: Lane) -> Result<Client, String> {
        let address = self.address(node).ok_or_else(|| format!("the address of node {node} is not known"))?;
        let known = self.channels.read().get(&(node, lane)).cloned();
        let channel = match known {
            Some((known, channel)) if known == address => channel,
            _ => {
                let channel = self.connect(&address)?;
                self.channels.write().insert((node, lane), (address, channel.clone()));
                channel
            }
        };
        Ok(wrap(channel))
    }

    fn connect(&self, address: &str) -> Result<Channel, String> {
        let endpoint = Endpoint::from_shared(format!("https://{address}"))
            .map_err(|error| format!("peer address {address:?}: {error}"))?
            .connect_timeout(Duration::from_secs(2))
            .tcp_nodelay(true)
            .http2_keep_alive_interval(Duration::from_secs(5))
            .keep_alive_timeout(Duration::from_secs(5))
            .initial_stream_window_size(4 << 20)
            .initial_connection_window_size(16 << 20)
            .tls_config(self.tls.clone())
            .map_err(|error| format!("peer TLS: {error}"))?;
        Ok(endpoint.connect_lazy())
    }
}

impl Wire for Channels {
    fn raft(&self, to: NodeId, message: RaftMessage) -> BoxFuture<'_, Result<RaftReply, Status>> {
        Box::pin(async move {
            let mut client = self.client(to, Lane::Fast).map_err(Status::unavailable)?;
            Ok(client.raft(message).await?.into_inner())
        })
    }

    fn snapshot(
        &self,
        to: NodeId,
        pieces: BoxStream<'static, Piece>,
    ) -> BoxFuture<'_, Result<RaftReply, Status>> {
        let client = self.client(to, Lane::Bulk).map_err(Status::unavailable);
        Box::pin(async move {
            let mut client = client?;
            let sent: BoxFuture<'_, _> = Box::pin(client.install_snapshot(pieces));
            Ok(sent.await?.into_inner())
        })
    }

    fn beat(&self, to: NodeId) -> BoxFuture<'_, Result<u64, Status>> {
        Box::pin(async move {
            let mut client = self.client(to, Lane::Fast).map_err(Status::unavailable)?;
            Ok(client.beat(BeatRequest { target: to.0 }).await?.into_inner().boot)
        })
    }
}

/// Makes one [`Member`] per group and target.
#[derive(Clone)]
pub(crate) struct Network {
    pub(crate) group: GroupId,
    pub(crate) peers: Peers,
    pub(crate) snapshots: Snapshots,
}

impl RaftNetworkFactory<TypeConfig> for Network {
    type Network = Member;

    async fn new_client(&mut self, target: NodeId, _: &EmptyNode) -> Member {
        let link = Link { group: self.group, target, peers: self.peers.clone() };
        Member { link, snapshots: self.snapshots.clone() }
    }
}

/// One member of one group, as openraft reaches it.
pub(crate) struct Member {
    link: Link,
    snapshots: Snapshots,
}

/// The way from this node to one member of one group.
pub(crate) struct Link {
    pub(crate) group: GroupId,
    pub(crate) target: NodeId,
    peers: Peers,
}

impl Link {
    /// Asks the member something.
    pub(crate) async fn call<Q: Serialize, A: DeserializeOwned>(
        &self,
        kind: RaftKind,
        request: &Q,
        timeout: Duration,
    ) -> Result<A, RPCError<TypeConfig>> {
        let unreachable = |reason: String| RPCError::Unreachable(Unreachable::from_string(reason));
        let message = RaftMessage {
            group: self.group.0,
            target: self.target.0,
            kind: kind.into(),
            body: codec::encode(request).into(),
        };
        let reply = match tokio::time::timeout(timeout, self.peers.wire().raft(self.target, message)).await {
            Ok(Ok(reply)) => reply,
            Ok(Err(status)) if status.code() == tonic::Code::Unavailable => {
                return Err(unreachable(status.message().to_owned()));
            }
            Ok(Err(status)) => return Err(RPCError::Network(NetworkError::from_string(status.message()))),
            Err(_) => return Err(RPCError::Network(NetworkError::from_string("no answer in time"))),
        };
        codec::decode(&reply.body).map_err(|error| RPCError::Network(NetworkError::new(&error)))
    }

    /// Whether the member's node lives.
    pub(crate) async fn beat(&self) -> Result<(), StreamingError<TypeConfig>> {
        let unreachable = |reason: &str| StreamingError::Unreachable(Unreachable::from_string(reason));
        match tokio::time::timeout(BEAT_TIMEOUT, self.peers.wire().beat(self.target)).await {
            Ok(Ok(_)) => Ok(()),
            Ok(Err(status)) => Err(unreachable(status.message())),
            Err(_) => Err(unreachable("no answer in time")),
        }
    }

    /// Sends a snapshot and waits until it is installed, or until the attempt is `given_up`.
    pub(crate) async fn snapshot(
        &self,
        pieces: BoxStream<'static, Piece>,
        given_up: impl Future<Output = ()> + Send,
    ) -> Result<SnapshotResponse<TypeConfig>, StreamingError<TypeConfig>> {
        let broken = |reason: &str| StreamingError::Network(NetworkError::from_string(reason));
        let sent = tokio::select! {
            biased;
            sent = self.peers.wire().snapshot(self.target, pieces) => sent,
            () = given_up => return Err(broken("nothing of the snapshot was taken for too long")),
        };
        let reply = match sent {
            Ok(reply) => reply,
            Err(status) if status.code() == tonic::Code::Unavailable => {
                return Err(StreamingError::Unreachable(Unreachable::from_string(status.message())));
            }
            Err(status) => return Err(broken(status.message())),
        };
        codec::decode(&reply.body).map_err(|error| StreamingError::Network(NetworkError::new(&error)))
    }
}

impl RaftNetworkV2<TypeConfig> for Member {
    type SnapshotData = SnapshotData;

    async fn append_entries(
        &mut self,
        request: AppendEntriesRequest<TypeConfig>,
        option: RPCOption,
    ) -> Result<AppendEntriesResponse<TypeConfig>, RPCError<TypeConfig>> {
        let timeout = if request.entries.is_empty() {
            option.hard_ttl().max(Duration::from_millis(500))
        } else {
            APPEND_TIMEOUT
        };
        self.link.call(RaftKind::Append, &request, timeout).await
    }

    async fn vote(
        &mut self,
        request: VoteRequest<TypeConfig>,
        option: RPCOption,
    ) -> Result<VoteResponse<TypeConfig>, RPCError<TypeConfig>> {
        self.link.call(RaftKind::Vote, &request, option.hard_ttl()).await
    }

    async fn pre_vote(
        &mut self,
        request: VoteRequest<TypeConfig>,
        option: RPCOption,
    ) -> Result<VoteResponse<TypeConfig>, RPCError<TypeConfig>> {
        self.link.call(RaftKind::PreVote, &request, option.hard_ttl()).await
    }

    async fn transfer_leader(
        &mut self,
        request: TransferLeaderRequest<TypeConfig>,
        option: RPCOption,
    ) -> Result<TransferLeaderResponse<TypeConfig>, RPCError<TypeConfig>> {
        self.link.call(RaftKind::TransferLeader, &request, option.hard_ttl()).await
    }

    async fn full_snapshot(
        &mut self,
        vote: VoteOf<TypeConfig>,
        snapshot: SnapshotOf<TypeConfig, SnapshotData>,
        cancel: impl Future<Output = ReplicationClosed> + OptionalSend + 'static,
        _option: RPCOption,
    ) -> Result<SnapshotResponse<TypeConfig>, StreamingError<TypeConfig>> {
        let send = self.snapshots.send(&self.link, vote, snapshot);
        tokio::select! {
            biased;
            closed = cancel => Err(StreamingError::Closed(closed)),
            sent = send => sent,
        }
    }
}
