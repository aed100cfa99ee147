//! HTTP/1.1 on one connection, as much of it as the tests need: one request, one answer, with a
//! length, in chunks, or until the end of the connection.

use std::fmt;
use std::io;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use serde_json::Value;
use tokio::io::{AsyncBufReadExt, AsyncReadExt, AsyncWriteExt, BufReader};
use tokio::net::TcpStream;

/// The largest body that is read.
const MAX_BODY_BYTES: usize = 256 << 20;

/// An answer, whole.
#[derive(Clone, Debug)]
pub struct Reply {
    /// The HTTP status.
    pub status: u16,
    /// The headers in the order they came.
    pub headers: Vec<(String, String)>,
    /// The body.
    pub body: Vec<u8>,
}

impl Reply {
    /// Whether the status is 2xx.
    pub fn is_success(&self) -> bool {
        (200..300).contains(&self.status)
    }

    /// The first header of that name, in whatever case.
    pub fn header(&self, name: &str) -> Option<&str> {
        find(&self.headers, name)
    }

    /// The body as text.
    pub fn text(&self) -> String {
        String::from_utf8_lossy(&self.body).into_owned()
    }

    /// The body as JSON.
    ///
    /// # Errors
    /// When it is not JSON; the message has the status and the body.
    pub fn json(&self) -> Result<Value> {
        serde_json::from_slice(&self.body)
            .with_context(|| format!("not JSON: status {}, body {:?}", self.status, self.text()))
    }

    /// The position that the answer reached.
    ///
    /// # Errors
    /// When the answer has no `X-Shoal-Position`.
    pub fn position(&self) -> Result<String> {
        let position = self.header("x-shoal-position");
        Ok(position.context("the answer has no X-Shoal-Position")?.to_owned())
    }
}

fn find<'a>(headers: &'a [(String, String)], name: &str) -> Option<&'a str> {
    headers.iter().find(|(known, _)| known.eq_ignore_ascii_case(name)).map(|(_, value)| value.as_str())
}

/// There is no connection, so nothing was sent.
#[derive(Debug)]
pub struct NotConnected(io::Error);

impl fmt::Display for NotConnected {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "no connection: {}", self.0)
    }
}

impl std::error::Error for NotConnected {}

/// One connection to one node.
pub(crate) struct Connection {
    stream: BufReader<TcpStream>,
}

impl Connection {
    /// Connects.
    pub(crate) async fn open(address: &str) -> Result<Connection> {
        let stream = TcpStream::connect(address).await.map_err(NotConnected)?;
        stream.set_nodelay(true)?;
        Ok(Connection { stream: BufReader::new(stream) })
    }

    /// Whether the other side has neither closed the connection nor said anything unasked.
    pub(crate) fn is_idle(&self) -> bool {
        let read = self.stream.get_ref().try_read(&mut [0u8; 1]);
        let is_quiet = matches!(read, Err(error) if error.kind() == io::ErrorKind::WouldBlock);
        is_quiet && self.stream.buffer().is_empty()
    }

    /// Sends a request and receives its answer. Also says whether the connection can be used
    /// again. A node may answer before it has read everything, so an answer counts even when
    /// sending failed.
    pub(crate) async fn exchange(&mut self, request: &[u8]) -> Result<(Reply, bool)> {
        let sent = self.stream.get_mut().write_all(request).await;
        match (self.receive().await, sent) {
            (Ok((reply, reusable)), sent) => Ok((reply, reusable && sent.is_ok())),
            (Err(_), Err(sent)) => Err(sent).context("the request could not be sent"),
            (Err(error), Ok(())) => Err(error),
        }
    }

    /// Sends a request in pieces, with a pause before each of them, and receives its answer.
    pub(crate) async fn trickle(&mut self, request: &[u8], pieces: usize, pause: Duration) -> Result<Reply> {
        for piece in request.chunks(request.len().div_ceil(pieces.max(1))) {
            tokio::time::sleep(pause).await;
            self.stream.get_mut().write_all(piece).await.context("the node has stopped listening")?;
        }
        Ok(self.receive().await?.0)
    }

    async fn receive(&mut self) -> Result<(Reply, bool)> {
        let (status, headers) = loop {
            let head = self.head().await?;
            // 1xx only announces the answer.
            if head.0 >= 200 {
                break head;
            }
        };
        let mut body = Vec::new();
        let mut reusable = find(&headers, "connection").is_none_or(|value| value != "close");
        let is_chunked = find(&headers, "transfer-encoding").is_some_and(|value| value.contains("chunked"));
        let length = find(&headers, "content-length").map(str::parse::<usize>).transpose()?;
        match length {
            _ if is_chunked => self.chunks(&mut body).await?,
            Some(length) => self.piece(&mut body, length).await?,
            None if matches!(status, 204 | 304) => {}
            None => {
                self.stream.read_to_end(&mut body).await?;
                reusable = false;
            }
        }
        Ok((Reply { status, headers, body }, reusable))
    }

    async fn head(&mut self) -> Result<(u16, Vec<(String, String)>)> {
        let status_line = self.line().await?;
        let status = status_line.split(' ').nth(1).and_then(|status| status.parse().ok());
        let status = status.with_context(|| format!("not a status line: {status_line:?}"))?;
        let mut headers = Vec::new();
        loop {
            let line = self.line().await?;
            if line.is_empty() {
                return Ok((status, headers));
            }
            let (name, value) = line.split_once(':').with_context(|| format!("not a header: {line:?}"))?;
            headers.push((name.trim().to_owned(), value.trim().to_owned()));
        }
    }

    async fn line(&mut self) -> Result<String> {
        let mut line = Vec::new();
        self.stream.read_until(b'\n', &mut line).await?;
        ensure!(line.ends_with(b"\n"), "the connection was closed in the middle of an answer");
        Ok(String::from_utf8_lossy(&line).trim_end_matches(['\r', '\n']).to_owned())
    }

    async fn chunks(&mut self, body: &mut Vec<u8>) -> Result<()> {
        loop {
            let line = self.line().await?;
            let digits = line.split(';').next().unwrap_or_default().trim();
            let size = usize::from_str_radix(digits, 16).context("a chunk has no size")?;
            if size == 0 {
                while !self.line().await?.is_empty() {}
                return Ok(());
            }
            self.piece(body, size).await?;
            ensure!(self.line().await?.is_empty(), "a chunk is longer than it says");
        }
    }

    async fn piece(&mut self, body: &mut Vec<u8>, size: usize) -> Result<()> {
        let start = body.len();
        ensure!(size <= MAX_BODY_BYTES - start, "the answer's body is too large");
        body.resize(start + size, 0);
        self.stream.read_exact(&mut body[start..]).await?;
        Ok(())
    }
}
