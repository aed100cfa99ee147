//! Connections that say in time what they speak.
//!
//! The HTTP library tells HTTP/1 from HTTP/2 by a connection's first bytes and waits for them for ever; its
//! limit on the time for headers begins only when it knows. Whoever connects and says nothing, or no more
//! than the beginning of HTTP/2's preface, would keep a socket for good. Such a connection ends here.

use std::io;
use std::pin::Pin;
use std::task::{Context, Poll};
use std::time::Duration;

use axum_server::accept::Accept;
use futures::future::BoxFuture;
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio::net::TcpStream;
use tokio::time::Sleep;

/// What a connection with HTTP/2 begins with (RFC 9113, section 3.4).
const PREFACE: &[u8] = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n";

/// Accepts as another acceptor does, connections that are prompt.
#[derive(Clone)]
pub struct PromptAcceptor<A> {
    inner: A,
    patience: Duration,
}

impl<A> PromptAcceptor<A> {
    /// Ends a connection that has not said within this time what it speaks.
    pub fn new(inner: A, patience: Duration) -> PromptAcceptor<A> {
        PromptAcceptor { inner, patience }
    }
}

impl<A, S> Accept<TcpStream, S> for PromptAcceptor<A>
where
    A: Accept<TcpStream, S> + 'static,
    A::Stream: 'static,
    A::Service: 'static,
    A::Future: Send + 'static,
    S: 'static,
{
    type Stream = Prompt<A::Stream>;
    type Service = A::Service;
    type Future = BoxFuture<'static, io::Result<(Self::Stream, Self::Service)>>;

    fn accept(&self, stream: TcpStream, service: S) -> Self::Future {
        let (accepting, patience) = (self.inner.accept(stream, service), self.patience);
        Box::pin(async move {
            let (stream, service) = accepting.await?;
            Ok((Prompt::new(stream, patience), service))
        })
    }
}

/// A stream whose reads fail when it is not known in time what it speaks.
pub struct Prompt<S> {
    inner: S,
    /// Until it is known.
    waiting: Option<Waiting>,
}

struct Waiting {
    deadline: Pin<Box<Sleep>>,
    /// Bytes of the preface that have come.
    matched: usize,
}

impl<S> Prompt<S> {
    fn new(inner: S, patience: Duration) -> Prompt<S> {
        let deadline = Box::pin(tokio::time::sleep(patience));
        Prompt { inner, waiting: Some(Waiting { deadline, matched: 0 }) }
    }
}

impl Waiting {
    /// Whether it is known with these further bytes: they are the rest of the preface, or not of it. An
    /// end (no bytes) needs no patience either.
    fn is_over(&mut self, bytes: &[u8]) -> bool {
        let rest = &PREFACE[self.matched..];
        let same = bytes.iter().zip(rest).take_while(|(is, wanted)| is == wanted).count();
        self.matched += same;
        bytes.is_empty() || same < bytes.len() || self.matched == PREFACE.len()
    }
}

impl<S: AsyncRead + Unpin> AsyncRead for Prompt<S> {
    fn poll_read(
        self: Pin<&mut Self>,
        context: &mut Context<'_>,
        buffer: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        let this = self.get_mut();
        let before = buffer.filled().len();
        let read = Pin::new(&mut this.inner).poll_read(context, buffer);
        let Some(waiting) = &mut this.waiting else { return read };
        match read {
            Poll::Pending => {
                waiting.deadline.as_mut().poll(context).map(|()| Err(io::ErrorKind::TimedOut.into()))
            }
            Poll::Ready(read) => {
                if waiting.is_over(&buffer.filled()[before..]) {
                    this.waiting = None;
                }
                Poll::Ready(read)
            }
        }
    }
}

impl<S: AsyncWrite + Unpin> AsyncWrite for Prompt<S> {
    fn poll_write(self: Pin<&mut Self>, context: &mut Context<'_>, bytes: &[u8]) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.get_mut().inner).poll_write(context, bytes)
    }

    fn poll_flush(self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.get_mut().inner).poll_flush(context)
    }

    fn poll_shutdown(self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.get_mut().inner).poll_shutdown(context)
    }

    fn poll_write_vectored(
        self: Pin<&mut Self>,
        context: &mut Context<'_>,
        slices: &[io::IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.get_mut().inner).poll_write_vectored(context, slices)
    }

    fn is_write_vectored(&self) -> bool {
        self.inner.is_write_vectored()
    }
}

#[cfg(test)]
mod tests {
    use tokio::io::{AsyncReadExt, AsyncWriteExt};

    use super::*;

    const PATIENCE: Duration = Duration::from_secs(10);

    /// What becomes of a connection on which only this is said, within a minute.
    async fn said(bytes: &[u8]) -> Option<io::ErrorKind> {
        let (mut client, server) = tokio::io::duplex(64);
        let mut server = Prompt::new(server, PATIENCE);
        client.write_all(bytes).await.expect("there is room");
        let mut read = Vec::new();
        let ended = tokio::time::timeout(6 * PATIENCE, server.read_to_end(&mut read)).await;
        assert_eq!(read, bytes);
        ended.ok().map(|ended| ended.expect_err("the other side is there").kind())
    }

    #[tokio::test(start_paused = true)]
    async fn who_does_not_say_what_it_speaks_is_not_waited_for() {
        for bytes in [&b""[..], b"P", b"PRI * HTTP/2.0\r\n"] {
            assert_eq!(said(bytes).await, Some(io::ErrorKind::TimedOut), "{bytes:?}");
        }
        // From here on it is the library's patience that counts.
        for bytes in [&b"G"[..], b"PRI / HTTP/1.1", PREFACE, b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\nmore"] {
            assert_eq!(said(bytes).await, None, "{bytes:?}");
        }
    }

    #[tokio::test(start_paused = true)]
    async fn a_preface_in_parts_is_one() {
        let (mut client, server) = tokio::io::duplex(64);
        let mut server = Prompt::new(server, PATIENCE);
        let mut byte = [0];
        for wanted in PREFACE {
            client.write_all(&[*wanted]).await.expect("there is room");
            server.read_exact(&mut byte).await.expect("it is in time");
        }
        assert!(tokio::time::timeout(6 * PATIENCE, server.read_exact(&mut byte)).await.is_err());
    }
}
