//! Giving a snapshot out as one file, piece by piece, for as long as somebody takes them.
//!
//! Whoever reads slowly, or does not read, must not fill a node's memory: copies of a few pieces wait for each
//! client and never what they were cut of, a few clients are served at once, and who takes nothing for a while is
//! given up. What it has by then is shorter than it was told, so that nobody takes it for the whole.

use std::time::Duration;

use bytes::Bytes;
use futures::{Stream, StreamExt};
use shoal_proto::{Error, ErrorCode};
use tokio::sync::{OwnedSemaphorePermit, mpsc};
use tokio_stream::wrappers::ReceiverStream;
use tracing::Instrument;

use super::Backups;
use super::archive::pack;
use super::snapshot::Snapshot;
use super::target::Target;

/// Snapshots that a node gives out at once. For each of them a few objects are in memory.
pub(super) const DOWNLOADS_AT_ONCE: usize = 2;
/// The most bytes of a piece.
const PIECE_BYTES: usize = 256 << 10;
/// Pieces that wait for a client.
const PIECES_WAITING: usize = 4;
/// How long a client may take for one piece.
const PATIENCE: Duration = Duration::from_secs(60);

impl Backups {
    /// A snapshot as one file, of as many bytes as its head says.
    ///
    /// # Errors
    /// Busy, when others are given out; as [`Target::manifest`]; in the middle of it when an object is missing or
    /// damaged.
    pub async fn download(
        &self,
        target: &Target,
        snapshot: &Snapshot,
    ) -> Result<impl Stream<Item = Result<Bytes, Error>> + Send + use<>, Error> {
        let turn = self.inner.downloads.clone().try_acquire_owned().map_err(|_| {
            let message = "this node gives out other snapshots; try again later, or another node";
            Error::new(ErrorCode::Busy, message)
        })?;
        let manifest = target.snapshot_manifest(snapshot).await?;
        Ok(give_out(turn, snapshot.name(), pack(target, snapshot, &manifest)))
    }
}

/// The pieces of an archive as they can be taken. The turn ends with the last one, or with its client.
fn give_out(
    turn: OwnedSemaphorePermit,
    name: String,
    archive: impl Stream<Item = Result<Bytes, Error>> + Send + 'static,
) -> ReceiverStream<Result<Bytes, Error>> {
    let (sender, pieces) = mpsc::channel(PIECES_WAITING);
    let giving = async move {
        let _turn = turn;
        if let Err(error) = give(archive, &sender).await {
            tracing::warn!(%error, snapshot = name, "it was not given out to its end");
        }
    };
    tokio::spawn(giving.in_current_span());
    ReceiverStream::new(pieces)
}

async fn give(
    archive: impl Stream<Item = Result<Bytes, Error>>,
    to: &mpsc::Sender<Result<Bytes, Error>>,
) -> Result<(), Error> {
    let mut archive = std::pin::pin!(archive);
    while let Some(part) = archive.next().await {
        match part {
            Ok(part) => {
                for piece in part.chunks(PIECE_BYTES) {
                    offer(to, Ok(Bytes::copy_from_slice(piece))).await?;
                }
            }
            Err(error) => {
                offer(to, Err(error.clone())).await?;
                return Err(error);
            }
        }
    }
    Ok(())
}

async fn offer(to: &mpsc::Sender<Result<Bytes, Error>>, piece: Result<Bytes, Error>) -> Result<(), Error> {
    match tokio::time::timeout(PATIENCE, to.send(piece)).await {
        Ok(Ok(())) => Ok(()),
        Ok(Err(_)) => Err(Error::unavailable("its client has gone")),
        Err(_) => Err(Error::unavailable(format!("its client has taken nothing for {PATIENCE:?}"))),
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use tokio::sync::Semaphore;

    use super::*;

    const PART_BYTES: usize = 3 * PIECE_BYTES + 1;

    /// Three parts of an archive, the only turn, and what is given out.
    fn given(last: Result<Bytes, Error>) -> (Arc<Semaphore>, ReceiverStream<Result<Bytes, Error>>) {
        let turns = Arc::new(Semaphore::new(1));
        let turn = turns.clone().try_acquire_owned().expect("it is free");
        let part = || Ok(Bytes::from(vec![7; PART_BYTES]));
        let given = give_out(turn, "a".to_owned(), futures::stream::iter([part(), part(), last]));
        assert_eq!(turns.available_permits(), 0);
        (turns, given)
    }

    #[tokio::test(start_paused = true)]
    async fn all_of_it_is_given_out_in_pieces() {
        let (turns, mut given) = given(Ok(Bytes::from_static(b"end")));
        let mut all = Vec::new();
        while let Some(piece) = given.next().await {
            let piece = piece.expect("nothing has failed");
            assert!(piece.len() <= PIECE_BYTES);
            all.extend_from_slice(&piece);
        }
        assert!(all.len() == 2 * PART_BYTES + 3 && all.ends_with(b"\x07end"));
        drop(turns.acquire().await.expect("the turn is over"));
    }

    #[tokio::test(start_paused = true)]
    async fn what_fails_in_the_middle_is_said() {
        let (turns, given) = given(Err(Error::internal("damaged")));
        let pieces: Vec<_> = given.collect().await;
        assert_eq!(pieces.last(), Some(&Err(Error::internal("damaged"))));
        drop(turns.acquire().await.expect("the turn is over"));
    }

    #[tokio::test(start_paused = true)]
    async fn who_takes_nothing_or_goes_keeps_nobody_waiting() {
        let (turns, mut slow) = given(Ok(Bytes::from_static(b"end")));
        assert!(slow.next().await.is_some_and(|piece| piece.is_ok()));
        drop(turns.acquire().await.expect("the turn is over"));
        let rest: Vec<_> = slow.collect().await;
        assert!(rest.len() <= PIECES_WAITING + 1, "{} pieces were kept", rest.len());
        let (turns, gone) = given(Ok(Bytes::from_static(b"end")));
        drop(gone);
        drop(turns.acquire().await.expect("the turn is over"));
    }
}
