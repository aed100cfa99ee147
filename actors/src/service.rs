//! The peers' gRPC service: Raft, calls, snapshots, blobs, greetings and joining.

use std::pin::Pin;
use std::sync::Arc;
use std::time::{Duration, Instant};

use futures::Stream;
use shoal_engine::command::{Read, Select};
use shoal_proto::peer::peer_server::Peer;
use shoal_proto::peer::{
    BeatReply, BeatRequest, CallReply, CallRequest, FetchStateRequest, GetBlobRequest, HelloReply,
    HelloRequest, JoinReply, JoinRequest, Piece, PutBlobReply, RaftMessage, RaftReply,
};
use shoal_proto::{BlobHash, ErrorCode, GroupId, Level, NodeId, ShardId, codec};
use shoal_raft::Throttle;
use shoal_raft::cluster::{Addresses, Command, Response, too_old};
use tokio_stream::StreamExt;
use tonic::{Request, Status, Streaming};

use crate::blobs::BlobStore;
use crate::call::{Call, Reply};
use crate::cluster::{Cluster, ReadOptions};
use crate::namesake;

/// How long a shard may take to show that it can do without a node.
const GIVE_UP_TIMEOUT: Duration = Duration::from_secs(5);

/// What a node says of itself before it is part of a cluster, and after.
#[derive(Clone, Debug, Default)]
pub struct Identity {
    /// Host name or ordinal.
    pub name: String,
    /// Zero before the node has joined.
    pub node: NodeId,
    /// Empty before the node has joined.
    pub cluster_id: String,
    /// That of the data directory; empty before it was read.
    pub incarnation: String,
}

/// The service. It is up before the node has joined, when it can only greet.
#[derive(Clone)]
pub struct PeerService {
    pub(crate) identity: Arc<parking_lot::RwLock<Identity>>,
    pub(crate) node: Arc<std::sync::OnceLock<(Cluster, BlobStore)>>,
}

impl PeerService {
    /// A service for a node of that name.
    pub fn new(name: &str) -> PeerService {
        let identity = Identity { name: name.to_owned(), ..Identity::default() };
        PeerService { identity: Arc::new(parking_lot::RwLock::new(identity)), node: Arc::default() }
    }

    fn cluster(&self) -> Result<&Cluster, Status> {
        self.node
            .get()
            .map(|(cluster, _)| cluster)
            .ok_or_else(|| Status::unavailable("this node is still starting"))
    }

    fn blobs(&self) -> Result<&BlobStore, Status> {
        self.node
            .get()
            .map(|(_, blobs)| blobs)
            .ok_or_else(|| Status::unavailable("this node is still starting"))
    }
}

type PieceStream = Pin<Box<dyn Stream<Item = Result<Piece, Status>> + Send>>;

#[tonic::async_trait]
impl Peer for PeerService {
    async fn hello(&self, request: Request<HelloRequest>) -> Result<tonic::Response<HelloReply>, Status> {
        let identity = self.identity.read().clone();
        let HelloRequest { node_id, cluster_id, .. } = request.into_inner();
        let state = self.node.get().map(|(cluster, _)| cluster.state());
        let is_removed = cluster_id == identity.cluster_id
            && state.as_ref().is_some_and(|state| state.removed.contains(&NodeId(node_id)));
        Ok(tonic::Response::new(HelloReply {
            name: identity.name,
            node_id: identity.node.0,
            cluster_id: identity.cluster_id,
            version: env!("CARGO_PKG_VERSION").to_owned(),
            is_removed,
            level: Level::LATEST.0,
            cluster_level: state.map_or(0, |state| state.level.0),
            incarnation: identity.incarnation,
        }))
    }

    async fn join(&self, request: Request<JoinRequest>) -> Result<tonic::Response<JoinReply>, Status> {
        let cluster = self.cluster()?;
        // The node that creates the cluster must be its first member: nobody joins through a
        // node that is not one itself.
        if !cluster.state().nodes.contains_key(&cluster.node()) {
            return Err(Status::unavailable("this node is not a member yet"));
        }
        let request = request.into_inner();
        if request.gives_up {
            can_do_without(cluster, &request.name).await?;
        }
        let (level, in_force) = (Level::from_wire(request.level), cluster.state().level);
        if level < in_force {
            return Err(Status::failed_precondition(too_old(level, in_force).message));
        }
        let instead_of = namesake::found_gone(cluster, &request.name, &request.incarnation).await;
        let instead_of = instead_of.map_err(|error| match error.code {
            ErrorCode::Conflict => Status::already_exists(error.message),
            _ => Status::unavailable(error.message),
        })?;
        let deadline = Instant::now() + Duration::from_secs(10);
        match cluster.control(admission(request, level, in_force, instead_of), deadline).await {
            Ok(Response::NodeAdded(node)) => {
                let state = cluster.state();
                let (cluster_id, level) = (state.cluster_id.clone(), state.level.0);
                Ok(tonic::Response::new(JoinReply { node_id: node.0, cluster_id, level }))
            }
            Ok(other) => Err(Status::internal(format!("unexpected answer to a join: {other:?}"))),
            Err(error) => Err(Status::unavailable(error.message)),
        }
    }

    async fn raft(&self, request: Request<RaftMessage>) -> Result<tonic::Response<RaftReply>, Status> {
        let reply = self.cluster()?.groups().handle(request.into_inner()).await;
        reply.map(tonic::Response::new).map_err(|error| Status::unavailable(error.to_string()))
    }

    async fn beat(&self, request: Request<BeatRequest>) -> Result<tonic::Response<BeatReply>, Status> {
        let cluster = self.cluster()?;
        if request.get_ref().target != cluster.node().0 {
            return Err(Status::unavailable("meant for another node"));
        }
        Ok(tonic::Response::new(BeatReply { boot: cluster.groups().peers().boot() }))
    }

    async fn install_snapshot(
        &self,
        request: Request<Streaming<Piece>>,
    ) -> Result<tonic::Response<RaftReply>, Status> {
        let reply = self.cluster()?.groups().handle_snapshot(request.into_inner()).await;
        reply.map(tonic::Response::new).map_err(|error| Status::unavailable(error.to_string()))
    }

    async fn call(&self, request: Request<CallRequest>) -> Result<tonic::Response<CallReply>, Status> {
        let cluster = self.cluster()?;
        let call: Call = codec::decode(&request.get_ref().body)
            .map_err(|error| Status::invalid_argument(error.to_string()))?;
        let reply: Reply = cluster.serve(call).await;
        Ok(tonic::Response::new(CallReply { body: codec::encode(&reply).into() }))
    }

    async fn put_blob(
        &self,
        request: Request<Streaming<Piece>>,
    ) -> Result<tonic::Response<PutBlobReply>, Status> {
        let blobs = self.blobs()?;
        let mut pieces = request.into_inner();
        let mut upload = None;
        while let Some(piece) = pieces.next().await {
            let piece = piece?;
            if upload.is_none() {
                let (shard, hash): (ShardId, BlobHash) = codec::decode(&piece.header)
                    .map_err(|error| Status::invalid_argument(format!("blob header: {error}")))?;
                if !self.cluster()?.is_writable() {
                    return Err(Status::resource_exhausted("the disk's reserve is reached on this node"));
                }
                upload = Some((shard, hash, blobs.begin().await.map_err(io_status)?));
            }
            if let Some((_, _, upload)) = &mut upload {
                upload.write(&piece.data).await.map_err(io_status)?;
            }
        }
        let (shard, hash, upload) = upload.ok_or_else(|| Status::invalid_argument("no pieces"))?;
        let bytes = upload.finish_as(blobs, shard, hash).await.map_err(io_status)?;
        Ok(tonic::Response::new(PutBlobReply { bytes }))
    }

    type FetchStateStream = PieceStream;

    async fn fetch_state(
        &self,
        request: Request<FetchStateRequest>,
    ) -> Result<tonic::Response<PieceStream>, Status> {
        let group = GroupId(request.get_ref().group);
        let pieces = self.cluster()?.groups().state_pieces(group).await;
        let pieces = pieces.map_err(|error| Status::unavailable(error.to_string()))?;
        Ok(tonic::Response::new(Box::pin(pieces.map(Ok))))
    }

    type GetBlobStream = PieceStream;

    async fn get_blob(
        &self,
        request: Request<GetBlobRequest>,
    ) -> Result<tonic::Response<PieceStream>, Status> {
        let request = request.into_inner();
        let hash: BlobHash = request.hash.parse().map_err(Status::invalid_argument)?;
        let pieces = self.blobs()?.read_stream(ShardId(request.group), hash).await.map_err(io_status)?;
        // Somebody waits for the bytes of a file that is read or parsed, and nobody for a copy.
        let throttle = match request.is_move {
            true => self.cluster()?.groups().throttle().clone(),
            false => Throttle::new(0),
        };
        let pieces = pieces.then(move |piece| {
            let throttle = throttle.clone();
            async move {
                let data = piece.map_err(io_status)?;
                throttle.pass(data.len()).await;
                Ok::<_, Status>(Piece { header: bytes::Bytes::new(), data })
            }
        });
        Ok(tonic::Response::new(Box::pin(pieces)))
    }
}

/// The command that takes a node in, in a form that all members understand.
fn admission(request: JoinRequest, level: Level, in_force: Level, instead_of: Option<NodeId>) -> Command {
    let JoinRequest { name, incarnation, http_address, grpc_address, mesh_address, zone, .. } = request;
    let addresses = Addresses { http: http_address, grpc: grpc_address, mesh: mesh_address };
    match in_force < Level::JOINS_TELL_LEVELS {
        true => Command::AddNode { name, incarnation, addresses, zone },
        false => Command::AdmitNode { name, incarnation, addresses, zone, level, instead_of },
    }
}

/// Whether every shard of a node can do without it: its own groups are closed, so a linearizable
/// read proves that a majority of the voters, whoever they are now, lives elsewhere and has
/// everything that was acknowledged.
async fn can_do_without(cluster: &Cluster, name: &str) -> Result<(), Status> {
    let options = ReadOptions::linearizable(Instant::now() + GIVE_UP_TIMEOUT);
    for shard in cluster.state().shards_of(name) {
        let question = Read::Get { ids: Vec::new(), payload: Select::Nothing, vectors: Select::Nothing };
        if let Err(error) = cluster.read(shard, question, &options).await {
            let reason = format!("shard {shard} cannot do without what is there: {}", error.message);
            return Err(Status::failed_precondition(reason));
        }
    }
    Ok(())
}

fn io_status(error: std::io::Error) -> Status {
    match error.kind() {
        std::io::ErrorKind::NotFound => Status::not_found("no such blob here"),
        std::io::ErrorKind::InvalidData => Status::data_loss(error.to_string()),
        std::io::ErrorKind::StorageFull => Status::resource_exhausted("the disk is full"),
        std::io::ErrorKind::ResourceBusy => Status::unavailable(error.to_string()),
        _ => Status::internal(error.to_string()),
    }
}
