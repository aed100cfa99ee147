//! One attempt to send a snapshot to a member.

use std::io;
use std::sync::{Arc, Weak};
use std::time::Duration;

use bytes::Bytes;
use futures::{Stream, StreamExt};
use openraft::errors::{StreamingError, Unreachable};
use openraft::raft::SnapshotResponse;
use shoal_proto::peer::{Piece, RaftKind};
use shoal_proto::{GroupId, NodeId};

use super::progress::Progress;
use super::spool::{Spool, SpoolReader};
use super::{Header, Offer, SUM_BYTES, Snapshots, Throttle};
use crate::machine::{Export, SnapshotData};
use crate::network::Link;
use crate::runtime::blocking;
use crate::types::{SnapshotMetaOf, SnapshotOf, TypeConfig, VoteOf};

/// How long a member may take to read back what it has of a snapshot.
const OFFER_TIMEOUT: Duration = Duration::from_secs(120);

type Answer = Result<SnapshotResponse<TypeConfig>, StreamingError<TypeConfig>>;

impl Snapshots {
    /// Sends a snapshot, or what its member lacks of it.
    pub(crate) async fn send(
        &self,
        link: &Link,
        vote: VoteOf<TypeConfig>,
        snapshot: SnapshotOf<TypeConfig, SnapshotData>,
    ) -> Answer {
        let unreachable = |reason: String| StreamingError::Unreachable(Unreachable::from_string(reason));
        let (group, target, meta) = (link.group, link.target, snapshot.meta);
        // For a node that is not there nothing is written, and no log is kept.
        link.beat().await?;
        let spool = match snapshot.snapshot {
            SnapshotData::File(_) => return Err(unreachable("a received file is not sent on".to_owned())),
            SnapshotData::Spool(spool) => spool,
            SnapshotData::Export(export) => {
                let copied = self.copy(group, &meta, &export).await;
                match copied.map_err(|error| unreachable(error.to_string()))? {
                    Some(spool) => spool,
                    None => {
                        let header = Header { group, target, vote, meta, resumed: None }.write();
                        let pieces = pieces(header.into(), export);
                        let answer = self.stream(link, pieces, &Progress::new()).await?;
                        self.spools().holds().delivered(group, target);
                        return Ok(answer);
                    }
                }
            }
        };
        // From the offer on: while the member reads back what it has, the log and this copy must stay.
        let lent = spool.lend();
        let offer = Offer { vote, meta: spool.meta.clone(), id: spool.id };
        let held: u64 = link.call(RaftKind::SnapshotOffer, &offer, OFFER_TIMEOUT).await?;
        if held > spool.id.pieces {
            return Err(unreachable(format!("the member has {held} of {} pieces", spool.id.pieces)));
        }
        let resumed = Some((spool.id, held));
        let header = Header { group, target, vote, meta: spool.meta.clone(), resumed }.write();
        let pieces = spooled(spool.clone(), target, header.into(), held);
        let progress = Progress::new();
        let answer = self.stream(link, pieces, &progress).await.inspect_err(|_| {
            if progress.is_whole() {
                spool.refused();
            }
        })?;
        self.spools().holds().delivered(group, target);
        self.spools().delivered(lent, target);
        Ok(answer)
    }

    /// A copy of an export, or one of the same group that was made meanwhile; none when it cannot be offered,
    /// or there is no room for it.
    async fn copy(
        &self,
        group: GroupId,
        meta: &SnapshotMetaOf<TypeConfig>,
        export: &Arc<dyn Export>,
    ) -> io::Result<Option<Arc<Spool>>> {
        let turn = self.spools().turn(group);
        let _turn = turn.lock().await;
        if let Some(spool) = self.spools().of(group) {
            return Ok(Some(spool));
        }
        if !self.spools().are_of_use() {
            return Ok(None);
        }
        // Gone when openraft gives the attempt up, or the node stops.
        let wish = Arc::new(());
        let export = Wanted { export: export.clone(), wish: Arc::downgrade(&wish) };
        let (this, meta) = (self.clone(), meta.clone());
        let made = blocking(move || match this.spools().have_room_for(&export) {
            true => this.spools().make(group, meta, &export).map(Some),
            false => Ok(None),
        });
        let made = made.await;
        drop(wish);
        made
    }

    /// Sends pieces at the node's pace, for as long as they are taken.
    async fn stream(
        &self,
        link: &Link,
        pieces: impl Stream<Item = Piece> + Send + 'static,
        progress: &Progress,
    ) -> Answer {
        let pieces = progress.of(paced(pieces, self.throttle().clone()));
        link.snapshot(pieces, progress.stalled()).await
    }
}

/// An export that ends by an error when nobody waits for it any longer: a thread that blocks keeps a process from
/// ending.
struct Wanted {
    export: Arc<dyn Export>,
    wish: Weak<()>,
}

impl Export for Wanted {
    fn next_piece(&self) -> io::Result<Option<Vec<u8>>> {
        match self.wish.strong_count() {
            0 => Err(io::Error::other("nobody waits for the snapshot any more")),
            _ => self.export.next_piece(),
        }
    }

    fn about_bytes(&self) -> u64 {
        self.export.about_bytes()
    }
}

/// Lets pieces through at the node's pace, and counts them.
fn paced(
    pieces: impl Stream<Item = Piece> + Send + 'static,
    throttle: Throttle,
) -> impl Stream<Item = Piece> + Send + 'static {
    pieces.then(move |piece| {
        let throttle = throttle.clone();
        async move {
            let bytes = piece.data.len().saturating_sub(SUM_BYTES);
            throttle.pass(bytes).await;
            metrics::counter!("shoal_raft_snapshot_bytes_sent_total").increment(bytes as u64);
            piece
        }
    })
}

/// Streams an export: each piece with its checksum in front, and an empty piece at the end, so
/// that a broken stream is not taken for a whole one.
pub(crate) fn pieces(header: Bytes, export: Arc<dyn Export>) -> impl Stream<Item = Piece> + Send + 'static {
    futures::stream::unfold(Some(header), move |header| {
        let export = export.clone();
        async move {
            let header = header?;
            let data = match blocking(move || export.next_piece()).await {
                Ok(data) => data,
                Err(error) => {
                    tracing::warn!(%error, "a snapshot could not be read; it will be tried again");
                    return None;
                }
            };
            let next = data.is_some().then(Bytes::new);
            Some((framed(header, data), next))
        }
    })
}

/// A spool on its way.
struct Reading {
    header: Bytes,
    reader: Option<SpoolReader>,
}

/// Streams a spool as [`pieces`] streams an export, but for the first pieces, which are held already.
fn spooled(
    spool: Arc<Spool>,
    to: NodeId,
    header: Bytes,
    held: u64,
) -> impl Stream<Item = Piece> + Send + 'static {
    futures::stream::unfold(Some(Reading { header, reader: None }), move |reading| {
        let spool = spool.clone();
        async move {
            let Reading { header, reader } = reading?;
            // Where it ends no log begins any more, or the state that it was made of is gone.
            if spool.is_retired() {
                tracing::info!("a snapshot is not sent to its end, since it is of no use any more");
                return None;
            }
            if reader.is_some() {
                spool.taken(to);
            }
            let from = spool.clone();
            let read = blocking(move || {
                let mut reader = match reader {
                    Some(reader) => reader,
                    None => begin(&from, held)?,
                };
                let piece = reader.next_piece()?;
                Ok((reader, piece))
            });
            match read.await {
                Ok((reader, data)) => {
                    let next = Reading { header: Bytes::new(), reader: Some(reader) };
                    let next = data.is_some().then_some(next);
                    Some((framed(header, data), next))
                }
                Err(error) => {
                    tracing::warn!(%error, "a snapshot could not be read; another one will be made");
                    spool.retire();
                    None
                }
            }
        }
    })
}

fn begin(spool: &Spool, held: u64) -> io::Result<SpoolReader> {
    let reader = spool.read_from(held)?;
    if held > 0 {
        let (sent_before, bytes) = (reader.skipped_bytes, spool.id.bytes);
        tracing::info!(sent_before, bytes, "a snapshot goes on where it ended");
        metrics::counter!("shoal_raft_snapshot_resumed_bytes_total").increment(sent_before);
    }
    Ok(reader)
}

fn framed(header: Bytes, data: Option<Vec<u8>>) -> Piece {
    let body = data.unwrap_or_default();
    let mut framed = Vec::with_capacity(SUM_BYTES + body.len());
    framed.extend_from_slice(&crc32fast::hash(&body).to_le_bytes());
    framed.extend_from_slice(&body);
    Piece { header, data: framed.into() }
}

#[cfg(test)]
mod tests {
    use std::path::Path;

    use parking_lot::Mutex;

    use super::*;

    struct Pieces(Mutex<usize>);

    impl Export for Pieces {
        fn next_piece(&self) -> io::Result<Option<Vec<u8>>> {
            let mut left = self.0.lock();
            *left = left.saturating_sub(1);
            Ok((*left > 0).then(|| vec![7; 10]))
        }
    }

    fn open(dir: &Path) -> Snapshots {
        let snapshots = Snapshots::open(dir, 0, 0).expect("opens");
        snapshots.spools().set_understood(true);
        snapshots
    }

    #[tokio::test]
    async fn a_copy_that_is_of_no_use_any_more_is_not_sent_to_its_end() {
        let dir = tempfile::tempdir().expect("a directory");
        let snapshots = open(dir.path());
        let export: Arc<dyn Export> = Arc::new(Pieces(Mutex::new(5)));
        let meta = SnapshotMetaOf::<TypeConfig>::default();
        let copied = snapshots.copy(GroupId(5), &meta, &export).await;
        let spool = copied.expect("made").expect("there is room");
        let mut pieces = spooled(spool.clone(), NodeId(2), Bytes::from_static(b"header"), 0).boxed();
        assert!(pieces.next().await.is_some_and(|piece| piece.data.len() > SUM_BYTES));
        spool.retire();
        assert_eq!(pieces.next().await, None);
    }

    #[tokio::test]
    async fn two_members_that_are_too_far_behind_get_one_copy() {
        let dir = tempfile::tempdir().expect("a directory");
        let snapshots = open(dir.path());
        let (group, meta) = (GroupId(5), SnapshotMetaOf::<TypeConfig>::default());
        let exports = [5, 5].map(|left| Arc::new(Pieces(Mutex::new(left))));
        let [first, second] = exports.clone().map(|export| -> Arc<dyn Export> { export });
        let copies =
            futures::join!(snapshots.copy(group, &meta, &first), snapshots.copy(group, &meta, &second));
        let ids = [copies.0, copies.1].map(|copy| copy.expect("made").expect("there is room").id);
        assert_eq!(ids[0], ids[1]);
        let left: usize = exports.iter().map(|export| *export.0.lock()).sum();
        assert_eq!(left, 5, "one of the exports was not read");
    }
}
