//! How Raft messages reach other nodes: one gRPC channel per peer for all groups, and a second
//! one for snapshots and blobs, so that something large never delays a heartbeat.

use std::collections::HashMap;
use std::future::Future;
use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
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
use shoal_proto::peer::{Piece, RaftKind, RaftMessage};
use shoal_proto::{GroupId, NodeId, codec};
use tonic::transport::{Channel, ClientTlsConfig, Endpoint};

use crate::idle::{Beats, Sleep};
use crate::machine::{Export, SnapshotData};
use crate::types::{SnapshotOf, TypeConfig, VoteOf};

/// The largest gRPC message between peers, in bytes.
pub const MAX_PEER_MESSAGE_BYTES: usize = 72 << 20;
/// How long a message that carries entries may take; a heartbeat has openraft's own limit.
const APPEND_TIMEOUT: Duration = Duration::from_secs(5);
/// How long one piece of a snapshot may take to be taken in.
const SNAPSHOT_TIMEOUT: Duration = Duration::from_secs(600);

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

/// Channels to all peers, by node. Addresses follow the cluster's state.
#[derive(Clone)]
pub struct Peers {
    inner: Arc<Inner>,
}

struct Inner {
    tls: ClientTlsConfig,
    /// Another number after every start of the process.
    boot: u64,
    beats: Beats,
    addresses: RwLock<HashMap<NodeId, String>>,
    channels: RwLock<HashMap<(NodeId, Lane), (String, Channel)>>,
}

impl Peers {
    /// No peers yet. Every channel is encrypted, and both sides check certificates as `tls` says.
    pub fn new(tls: ClientTlsConfig) -> Peers {
        let inner = Inner {
            tls,
            boot: uuid::Uuid::new_v4().as_u64_pair().0,
            beats: Beats::default(),
            addresses: RwLock::default(),
            channels: RwLock::default(),
        };
        Peers { inner: Arc::new(inner) }
    }

    /// The number of this run of the process.
    pub fn boot(&self) -> u64 {
        self.inner.boot
    }

    pub(crate) fn beats(&self) -> &Beats {
        &self.inner.beats
    }

    /// The nodes whose addresses are known.
    pub(crate) fn nodes(&self) -> Vec<NodeId> {
        self.inner.addresses.read().keys().copied().collect()
    }

    /// Asks a member to stop a group's timers. Returns whether it has.
    pub(crate) async fn sleep(&self, group: GroupId, to: NodeId, sleep: &Sleep, timeout: Duration) -> bool {
        let link = Link { group, target: to, peers: self.clone() };
        link.call(RaftKind::Sleep, sleep, timeout).await.unwrap_or(false)
    }

    /// Notes where a node listens for gRPC.
    pub fn set_address(&self, node: NodeId, address: &str) {
        self.inner.addresses.write().insert(node, address.to_owned());
    }

    /// Where a node listens, if that is known.
    pub fn address(&self, node: NodeId) -> Option<String> {
        self.inner.addresses.read().get(&node).cloned()
    }

    /// A client to a node, over a shared channel that connects when first used.
    ///
    /// # Errors
    /// A sentence, when the node's address is unknown or malformed.
    pub fn client(&self, node: NodeId, lane: Lane) -> Result<Client, String> {
        let address = self.address(node).ok_or_else(|| format!("the address of node {node} is not known"))?;
        let known = self.inner.channels.read().get(&(node, lane)).cloned();
        let channel = match known {
            Some((known, channel)) if known == address => channel,
            _ => {
                let channel = self.connect(&address)?;
                self.inner.channels.write().insert((node, lane), (address, channel.clone()));
                channel
            }
        };
        Ok(self.wrap(channel))
    }

    /// A client to an address, for nodes that have no id yet.
    ///
    /// # Errors
    /// A sentence, when the address is malformed.
    pub fn client_at(&self, address: &str) -> Result<Client, String> {
        Ok(self.wrap(self.connect(address)?))
    }

    fn wrap(&self, channel: Channel) -> Client {
        PeerClient::new(channel)
            .max_decoding_message_size(MAX_PEER_MESSAGE_BYTES)
            .max_encoding_message_size(MAX_PEER_MESSAGE_BYTES)
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
            .tls_config(self.inner.tls.clone())
            .map_err(|error| format!("peer TLS: {error}"))?;
        Ok(endpoint.connect_lazy())
    }
}

/// Makes one [`Link`] per group and target.
#[derive(Clone)]
pub(crate) struct Network {
    pub(crate) group: GroupId,
    pub(crate) peers: Peers,
}

impl RaftNetworkFactory<TypeConfig> for Network {
    type Network = Link;

    async fn new_client(&mut self, target: NodeId, _: &EmptyNode) -> Link {
        Link { group: self.group, target, peers: self.peers.clone() }
    }
}

/// The way from this node to one member of one group.
pub(crate) struct Link {
    group: GroupId,
    target: NodeId,
    peers: Peers,
}

impl Link {
    async fn call<Q: Serialize, A: DeserializeOwned>(
        &self,
        kind: RaftKind,
        request: &Q,
        timeout: Duration,
    ) -> Result<A, RPCError<TypeConfig>> {
        let unreachable = |reason: String| RPCError::Unreachable(Unreachable::from_string(reason));
        let mut client = self.peers.client(self.target, Lane::Fast).map_err(unreachable)?;
        let message = RaftMessage {
            group: self.group.0,
            target: self.target.0,
            kind: kind.into(),
            body: codec::encode(request).into(),
        };
        let reply = match tokio::time::timeout(timeout, client.raft(message)).await {
            Ok(Ok(reply)) => reply.into_inner(),
            Ok(Err(status)) if status.code() == tonic::Code::Unavailable => {
                return Err(unreachable(status.message().to_owned()));
            }
            Ok(Err(status)) => return Err(RPCError::Network(NetworkError::from_string(status.message()))),
            Err(_) => return Err(RPCError::Network(NetworkError::from_string("no answer in time"))),
        };
        codec::decode(&reply.body).map_err(|error| RPCError::Network(NetworkError::new(&error)))
    }
}

impl RaftNetworkV2<TypeConfig> for Link {
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
        self.call(RaftKind::Append, &request, timeout).await
    }

    async fn vote(
        &mut self,
        request: VoteRequest<TypeConfig>,
        option: RPCOption,
    ) -> Result<VoteResponse<TypeConfig>, RPCError<TypeConfig>> {
        self.call(RaftKind::Vote, &request, option.hard_ttl()).await
    }

    async fn pre_vote(
        &mut self,
        request: VoteRequest<TypeConfig>,
        option: RPCOption,
    ) -> Result<VoteResponse<TypeConfig>, RPCError<TypeConfig>> {
        self.call(RaftKind::PreVote, &request, option.hard_ttl()).await
    }

    async fn transfer_leader(
        &mut self,
        request: TransferLeaderRequest<TypeConfig>,
        option: RPCOption,
    ) -> Result<TransferLeaderResponse<TypeConfig>, RPCError<TypeConfig>> {
        self.call(RaftKind::TransferLeader, &request, option.hard_ttl()).await
    }

    async fn full_snapshot(
        &mut self,
        vote: VoteOf<TypeConfig>,
        snapshot: SnapshotOf<TypeConfig, SnapshotData>,
        cancel: impl Future<Output = ReplicationClosed> + OptionalSend + 'static,
        _option: RPCOption,
    ) -> Result<SnapshotResponse<TypeConfig>, StreamingError<TypeConfig>> {
        let unreachable = |reason: String| StreamingError::Unreachable(Unreachable::from_string(reason));
        let SnapshotData::Export(export) = snapshot.snapshot else {
            return Err(unreachable("a received file is not sent on".to_owned()));
        };
        let mut client = self.peers.client(self.target, Lane::Bulk).map_err(unreachable)?;
        let header = codec::encode(&(self.group, self.target, vote, snapshot.meta));
        let pieces = pieces(header.into(), export);
        let send = async {
            let reply = client
                .install_snapshot(pieces)
                .await
                .map_err(|status| StreamingError::Network(NetworkError::from_string(status.message())))?;
            codec::decode(&reply.into_inner().body)
                .map_err(|error| StreamingError::Network(NetworkError::new(&error)))
        };
        tokio::select! {
            closed = cancel => Err(StreamingError::Closed(closed)),
            sent = tokio::time::timeout(SNAPSHOT_TIMEOUT, send) => {
                sent.unwrap_or_else(|_| Err(StreamingError::Network(NetworkError::from_string("the snapshot took too long"))))
            }
        }
    }
}

/// Streams an export: each piece with its checksum in front, and an empty piece at the end, so
/// that a broken stream is not taken for a whole one.
pub(crate) fn pieces(
    header: Bytes,
    export: Arc<dyn Export>,
) -> impl futures::Stream<Item = Piece> + Send + 'static {
    let (sender, receiver) = tokio::sync::mpsc::channel(2);
    tokio::task::spawn_blocking(move || {
        let mut header = header;
        loop {
            let data = match export.next_piece() {
                Ok(data) => data,
                Err(error) => {
                    tracing::warn!(%error, "a snapshot could not be read; it will be tried again");
                    return;
                }
            };
            let end = data.is_none();
            let body = data.unwrap_or_default();
            let mut framed = crc32fast::hash(&body).to_le_bytes().to_vec();
            framed.extend_from_slice(&body);
            let piece = Piece { header: std::mem::take(&mut header), data: framed.into() };
            if sender.blocking_send(piece).is_err() || end {
                return;
            }
        }
    });
    tokio_stream::wrappers::ReceiverStream::new(receiver)
}
