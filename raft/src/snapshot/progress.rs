//! How far a stream of pieces has come: whether whoever takes them still does.
//!
//! A total time would have to know how fast the network is and who else sends at the node's pace. Here a
//! piece that was handed out must be followed by the wish for another one: time that this node itself takes
//! to read a piece, or to wait for its pace, does not count.

use std::sync::Arc;
use std::time::Duration;

use futures::stream::BoxStream;
use futures::{Stream, StreamExt};
use parking_lot::Mutex;
use shoal_proto::peer::Piece;
use tokio::time::Instant;

use super::SUM_BYTES;

/// How long a member may take for a piece.
const PIECE_TIMEOUT: Duration = Duration::from_secs(60);
/// How long a member may take to install a snapshot that has come. It goes on afterwards, and the next
/// attempt finds it installed.
const INSTALL_TIMEOUT: Duration = Duration::from_secs(600);

/// How far a stream has come. Clones share it.
#[derive(Clone)]
pub(crate) struct Progress(Arc<Mutex<Stage>>);

struct Stage {
    /// Since when the other side has been waited for; not while it waits for a piece.
    idle_since: Option<Instant>,
    /// Whether the end was handed out, which is an empty piece.
    is_whole: bool,
}

impl Progress {
    /// Of a stream that begins now.
    pub(crate) fn new() -> Progress {
        Progress(Arc::new(Mutex::new(Stage { idle_since: Some(Instant::now()), is_whole: false })))
    }

    /// Whether all pieces were handed out.
    pub(crate) fn is_whole(&self) -> bool {
        self.0.lock().is_whole
    }

    fn asked(&self) {
        self.0.lock().idle_since = None;
    }

    fn handed(&self, piece: Option<&Piece>) {
        let mut stage = self.0.lock();
        stage.idle_since = Some(Instant::now());
        stage.is_whole |= piece.is_some_and(|piece| piece.data.len() == SUM_BYTES);
    }

    /// The same pieces, followed by this.
    pub(crate) fn of(&self, pieces: impl Stream<Item = Piece> + Send + 'static) -> BoxStream<'static, Piece> {
        let progress = self.clone();
        let followed = futures::stream::unfold(pieces.boxed(), move |mut pieces| {
            let progress = progress.clone();
            async move {
                progress.asked();
                let piece = pieces.next().await;
                progress.handed(piece.as_ref());
                Some((piece?, pieces))
            }
        });
        followed.boxed()
    }

    /// Ends once the other side has taken too long.
    pub(crate) async fn stalled(&self) {
        loop {
            let (idle_since, limit) = {
                let stage = self.0.lock();
                (stage.idle_since, if stage.is_whole { INSTALL_TIMEOUT } else { PIECE_TIMEOUT })
            };
            let left = idle_since.map_or(limit, |since| limit.saturating_sub(since.elapsed()));
            if left.is_zero() {
                return;
            }
            tokio::time::sleep(left).await;
        }
    }
}

#[cfg(test)]
mod tests {
    use bytes::Bytes;

    use super::*;

    const SECOND: Duration = Duration::from_secs(1);

    /// So many pieces, each of which takes so long to be made, and the end.
    fn pieces(count: usize, each: Duration) -> impl Stream<Item = Piece> + Send + 'static {
        let bodies = std::iter::repeat_n(SUM_BYTES + 10, count).chain([SUM_BYTES]);
        futures::stream::iter(bodies).then(move |bytes| async move {
            tokio::time::sleep(each).await;
            Piece { header: Bytes::new(), data: vec![0; bytes].into() }
        })
    }

    /// How long it took until the stream counted as stalled, when so many of its pieces are taken, with a
    /// pause before each.
    async fn stalls_after(made_in: Duration, taken: usize, pause: Duration) -> Option<Duration> {
        let (progress, began) = (Progress::new(), Instant::now());
        let mut stream = progress.of(pieces(20, made_in));
        let takes = async {
            for _ in 0..taken {
                tokio::time::sleep(pause).await;
                drop(stream.next().await);
            }
            std::future::pending::<()>().await;
        };
        tokio::select! {
            () = takes => None,
            () = progress.stalled() => Some(began.elapsed()),
        }
    }

    #[tokio::test(start_paused = true)]
    async fn a_stream_that_goes_on_may_take_as_long_as_it_takes() {
        let slow = 50 * SECOND;
        // Slow to take, or slow to make.
        for (made_in, pause) in [(Duration::ZERO, slow), (4 * slow, Duration::ZERO)] {
            let stalled = stalls_after(made_in, 21, pause).await.expect("nobody answers");
            let took = 21 * (pause + made_in);
            assert!(stalled >= took + INSTALL_TIMEOUT, "stalled after {stalled:?} of {took:?}");
        }
    }

    #[tokio::test(start_paused = true)]
    async fn who_takes_nothing_for_long_is_given_up() {
        for taken in [0, 7] {
            let stalled = stalls_after(Duration::ZERO, taken, SECOND).await.expect("stalled");
            let limit = taken as u32 * SECOND + PIECE_TIMEOUT;
            assert!(stalled >= limit && stalled < limit + SECOND, "{stalled:?}, not {limit:?}");
        }
    }
}
