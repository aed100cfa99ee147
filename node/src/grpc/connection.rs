//! A connection of the gRPC port, encrypted or not, as the server wants it.

use std::io;
use std::pin::Pin;
use std::task::{Context, Poll};

use shoal_actors::tls::Incoming;
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tonic::transport::server::Connected;

/// Who is at the other end; an extension of every request.
#[derive(Clone, Copy, Debug)]
pub(super) struct Origin {
    /// Whether the other side has proven that it knows the cluster secret.
    pub is_peer: bool,
}

trait Stream: AsyncRead + AsyncWrite + Send + Unpin {}
impl<T: AsyncRead + AsyncWrite + Send + Unpin> Stream for T {}

/// The bytes of a connection, and its origin.
pub(super) struct Connection {
    stream: Box<dyn Stream>,
    origin: Origin,
}

impl Connection {
    pub(super) fn new(incoming: Incoming) -> Connection {
        let origin = Origin { is_peer: incoming.is_peer() };
        let stream: Box<dyn Stream> = match incoming {
            Incoming::Tls(stream) => stream,
            Incoming::Plain(stream) => Box::new(stream),
        };
        Connection { stream, origin }
    }
}

impl Connected for Connection {
    type ConnectInfo = Origin;

    fn connect_info(&self) -> Origin {
        self.origin
    }
}

impl AsyncRead for Connection {
    fn poll_read(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
        buffer: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_read(context, buffer)
    }
}

impl AsyncWrite for Connection {
    fn poll_write(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
        bytes: &[u8],
    ) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.stream).poll_write(context, bytes)
    }

    fn poll_write_vectored(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
        slices: &[io::IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.stream).poll_write_vectored(context, slices)
    }

    fn is_write_vectored(&self) -> bool {
        self.stream.is_write_vectored()
    }

    fn poll_flush(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_flush(context)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_shutdown(context)
    }
}
