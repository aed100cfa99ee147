//! The gRPC edge: the peers' service for who has proven the cluster secret in the handshake, and
//! the parser service for clients behind the API key. Both are checked before any body is decoded.

mod connection;
mod limited;

use std::net::SocketAddr;
use std::time::Duration;

use anyhow::{Context, Result};
use futures::StreamExt;
use shoal_actors::service::PeerService;
use shoal_actors::tls::PeerTls;
use shoal_proto::ErrorCode;
use shoal_proto::parser::document_parser_server::{DocumentParser, DocumentParserServer};
use shoal_proto::parser::{HealthCheckReply, HealthCheckRequest, ParseReply, ParseRequest};
use shoal_proto::peer::peer_server::PeerServer;
use shoal_raft::network::MAX_PEER_MESSAGE_BYTES;
use tokio::net::TcpListener;
use tokio_stream::wrappers::ReceiverStream;
use tonic::service::interceptor::InterceptedService;
use tonic::transport::Server;
use tonic::{Request, Response, Status, Streaming};

use crate::app::App;
use crate::http::same_key;
use connection::{Connection, Origin};
use limited::Limited;

/// The largest file that the parser service takes, in bytes, whole or in pieces.
const MAX_PARSE_BYTES: usize = 100 << 20;
/// Files that the parser service takes at once, in work or in line.
const MAX_PARSES: usize = 16;
/// How long one file may take, from its first byte to the answer.
const PARSE_TIMEOUT: Duration = Duration::from_secs(300);
/// Connections that were accepted and not yet taken up.
const MAX_WAITING: usize = 64;
/// Streams that one peer may have open on a connection.
const MAX_STREAMS: u32 = 1024;
/// Streams that a peer may have reset before they were looked at: Raft gives up on a late message
/// and a busy node would otherwise end the connection for it.
const MAX_RESETS: usize = 512;

/// Serves gRPC until the process ends. Returns once the address is bound.
///
/// # Errors
/// When the address cannot be bound.
pub async fn serve(app: App, peers: PeerService, tls: PeerTls) -> Result<()> {
    let config = app.config().clone();
    let address: SocketAddr = config.grpc;
    let listener = TcpListener::bind(address).await.with_context(|| format!("gRPC address {address}"))?;
    let check_peer = |request: Request<()>| match request.extensions().get::<Origin>() {
        Some(origin) if origin.is_peer => Ok(request),
        _ => Err(Status::unauthenticated("this service is for nodes with the cluster's certificate")),
    };
    let key = config.api_key.clone();
    let check_key = move |request: Request<()>| {
        let header = |name: &str| request.metadata().get(name).and_then(|value| value.to_str().ok());
        let given = header("authorization")
            .and_then(|value| value.strip_prefix("Bearer "))
            .or_else(|| header("api-key"));
        match key.is_empty() || given.is_some_and(|given| same_key(given, &key)) {
            true => Ok(request),
            false => Err(Status::unauthenticated("a valid API key is needed")),
        }
    };
    let peer = PeerServer::new(peers)
        .max_decoding_message_size(MAX_PEER_MESSAGE_BYTES)
        .max_encoding_message_size(MAX_PEER_MESSAGE_BYTES);
    let parser = DocumentParserServer::new(Parser(app)).max_decoding_message_size(MAX_PARSE_BYTES);
    let parser = Limited::new(parser, MAX_PARSES, PARSE_TIMEOUT);
    // Where only this machine or those who said so can listen in, clients need no TLS.
    let allow_plain = config.insecure || address.ip().is_loopback();
    let (sender, incoming) = tokio::sync::mpsc::channel(MAX_WAITING);
    tokio::spawn(async move {
        // A full queue means that the server has fallen behind: the client tries again.
        tls.accept(listener, allow_plain, move |taken| drop(sender.try_send(Connection::new(taken)))).await;
    });
    let incoming = ReceiverStream::new(incoming).map(Ok::<_, std::io::Error>);
    let server = Server::builder()
        .max_concurrent_streams(MAX_STREAMS)
        .http2_max_pending_accept_reset_streams(Some(MAX_RESETS))
        .initial_stream_window_size(4 << 20)
        .initial_connection_window_size(16 << 20)
        .add_service(InterceptedService::new(peer, check_peer))
        .add_service(InterceptedService::new(parser, check_key))
        .serve_with_incoming(incoming);
    tokio::spawn(async move {
        if let Err(error) = server.await {
            tracing::error!(%error, "gRPC has stopped");
        }
    });
    Ok(())
}

/// `DocumentParser`, as the parser services that Shoal replaces serve it.
struct Parser(App);

impl Parser {
    async fn parse(&self, request: ParseRequest) -> Result<Response<ParseReply>, Status> {
        let running = self.0.running().map_err(|error| Status::unavailable(error.message))?;
        let name = request.file_path.rsplit(['/', '\\']).next().unwrap_or_default();
        let has_extension = name.contains('.');
        let extension = request.file_type.rsplit('/').next().unwrap_or_default();
        let filename = match has_extension || extension.is_empty() {
            true => name.to_owned(),
            false => format!("{name}.{extension}"),
        };
        let parsed = running.work.parse(&filename, request.file_data).await;
        let parsed = parsed.map_err(|error| match error.code {
            ErrorCode::Unprocessable => Status::invalid_argument(error.message),
            ErrorCode::Busy => Status::resource_exhausted(error.message),
            ErrorCode::Unavailable => Status::unavailable(error.message),
            _ => Status::internal(error.message),
        })?;
        let metadata =
            [("filename".to_owned(), filename), ("sections".to_owned(), parsed.sections.len().to_string())];
        Ok(Response::new(ParseReply {
            content: parsed.content(),
            metadata: metadata.into_iter().collect(),
            page_count: parsed.page_count,
        }))
    }
}

#[tonic::async_trait]
impl DocumentParser for Parser {
    async fn parse_document(&self, request: Request<ParseRequest>) -> Result<Response<ParseReply>, Status> {
        self.parse(request.into_inner()).await
    }

    async fn parse_stream(
        &self,
        request: Request<Streaming<ParseRequest>>,
    ) -> Result<Response<ParseReply>, Status> {
        let mut pieces = request.into_inner();
        let first = pieces.message().await?.ok_or_else(|| Status::invalid_argument("no pieces"))?;
        let ParseRequest { file_path, file_type, file_data } = first;
        let mut file_data = Vec::from(file_data);
        while let Some(piece) = pieces.message().await? {
            if file_data.len() + piece.file_data.len() > MAX_PARSE_BYTES {
                return Err(Status::out_of_range(format!("a file has at most {MAX_PARSE_BYTES} bytes")));
            }
            file_data.extend_from_slice(&piece.file_data);
        }
        self.parse(ParseRequest { file_path, file_type, file_data: file_data.into() }).await
    }

    async fn health_check(
        &self,
        _: Request<HealthCheckRequest>,
    ) -> Result<Response<HealthCheckReply>, Status> {
        let healthy = self.0.running().is_ok();
        Ok(Response::new(HealthCheckReply { healthy, version: env!("CARGO_PKG_VERSION").to_owned() }))
    }
}
