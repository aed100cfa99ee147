//! Connections that say in time what they want.
//!
//! The HTTP library tells HTTP/1 from HTTP/2 by a connection's first bytes and waits for them for ever; its
//! limit on the time for headers begins only when it knows, and is one with that on the time between two requests,
//! which is much longer. Whoever connects and says nothing, no more than the beginning of HTTP/2's preface, or half
//! of its first request's headers, would keep a socket for good, or for long. Such a connection ends here.

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

/// A stream whose reads fail when its first words do not come in time.
pub struct Prompt<S> {
    inner: S,
    /// Until they have come.
    waiting: Option<Waiting>,
}

struct Waiting {
    deadline: Pin<Box<Sleep>>,
    words: FirstWords,
}

/// What a connection begins with, as far as it has come: HTTP/2's preface, or the headers of HTTP/1's first request.
struct FirstWords {
    /// Bytes of the preface that have come; none when something else has.
    of_preface: Option<usize>,
    /// Whether nothing has come since the end of a line.
    line_is_empty: bool,
}

impl<S> Prompt<S> {
    fn new(inner: S, patience: Duration) -> Prompt<S> {
        let deadline = Box::pin(tokio::time::sleep(patience));
        let words = FirstWords { of_preface: Some(0), line_is_empty: false };
        Prompt { inner, waiting: Some(Waiting { deadline, words }) }
    }
}

impl FirstWords {
    /// Whether they are whole with these further bytes. An end (no bytes) needs no patience either.
    fn are_whole(&mut self, bytes: &[u8]) -> bool {
        bytes.is_empty() || bytes.iter().any(|byte| self.end_with(*byte))
    }

    fn end_with(&mut self, byte: u8) -> bool {
        self.of_preface =
            self.of_preface.filter(|matched| PREFACE[*matched] == byte).map(|matched| matched + 1);
        if let Some(matched) = self.of_preface {
            return matched == PREFACE.len();
        }
        // The library takes lines that end without a carriage return, too.
        let is_end = byte == b'\n' && self.line_is_empty;
        self.line_is_empty = byte == b'\n' || (byte == b'\r' && self.line_is_empty);
        is_end
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
                if waiting.words.are_whole(&buffer.filled()[before..]) {
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
    async fn who_does_not_say_what_it_wants_is_not_waited_for() {
        for bytes in [
            &b""[..],
            b"P",
            b"PRI * HTTP/2.0\r\n",
            b"PRI / HTTP/1.1\r\n",
            b"G",
            b"GET / HTTP/1.1\r\nhost: a\r\n",
            b"GET / HTTP/1.1\r\nhost: a\r\n\r",
        ] {
            assert_eq!(said(bytes).await, Some(io::ErrorKind::TimedOut), "{bytes:?}");
        }
        // From here on it is the library's patience that counts.
        for bytes in [
            PREFACE,
            b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\nmore",
            b"GET / HTTP/1.1\r\n\r\n",
            b"GET / HTTP/1.1\nhost: a\n\n",
            b"PUT / HTTP/1.1\r\nhost: a\r\n\r\nbody",
        ] {
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
