//! Snapshots and whole states as this node takes them in, and the states that it gives.

use std::fmt::Display;

use bytes::Bytes;
use futures::{Stream, StreamExt};
use openraft::async_runtime::WatchReceiver;
use openraft::raft::SnapshotResponse;
use openraft::type_config::TypeConfigExt;
use shoal_proto::peer::{FetchStateRequest, Piece, RaftReply};
use shoal_proto::{GroupId, NodeId, codec};

use super::{Group, Groups};
use crate::error::Error;
use crate::machine::{ReceivedFile, SnapshotData};
use crate::network::Lane;
use crate::runtime::blocking;
use crate::snapshot::inbox::Installing;
use crate::snapshot::tally::SnapshotId;
use crate::snapshot::{Header, Offer, pieces};
use crate::types::{SnapshotMetaOf, SnapshotOf, TypeConfig};

impl Groups {
    /// A group's whole state as it is here, in pieces, for a peer whose own copy is damaged.
    pub async fn state_pieces(&self, id: GroupId) -> Result<impl Stream<Item = Piece> + Send + use<>, Error> {
        let group = self.get(id)?;
        let stopped = |reason: String| Error::Stopped { group: id, reason };
        let exported = blocking(move || group.state.export()).await;
        let (tag, export) = exported.map_err(|error| stopped(error.to_string()))?;
        let tag = tag.ok_or_else(|| stopped("nothing was applied here yet".into()))?;
        Ok(pieces(tag.into(), export.into()))
    }

    /// Fetches a group's whole state from a node, this one or another: its tag, the last index that it holds,
    /// and a file for [`crate::StateMachine::install`].
    pub async fn fetch_state(
        &self,
        id: GroupId,
        from: NodeId,
    ) -> Result<(Vec<u8>, u64, ReceivedFile), Error> {
        let failed = |reason: String| Error::Timeout { group: id, reason };
        let (tag, received) = if from == self.inner.node {
            self.receive(&mut self.state_pieces(id).await?.map(Ok).boxed()).await?
        } else {
            let mut client = self.peers().client(from, Lane::Bulk).map_err(failed)?;
            let answer = client.fetch_state(FetchStateRequest { group: id.0 }).await;
            self.receive(&mut answer.map_err(|status| failed(status.message().to_owned()))?.into_inner())
                .await?
        };
        let index = crate::machine::index_of(&tag).map_err(|error| Error::BadMessage(error.to_string()))?;
        Ok((tag.into(), index, received))
    }

    /// Receives pieces into a file: the header of the first, and the file once all were there.
    async fn receive(
        &self,
        pieces: &mut (impl Stream<Item = Result<Piece, tonic::Status>> + Unpin),
    ) -> Result<(Bytes, ReceivedFile), Error> {
        let mut header: Option<Bytes> = None;
        let mut frames = self.inner.snapshots.file().map_err(broken)?;
        let mut whole = false;
        while let Some(piece) = pieces.next().await {
            let piece = piece.map_err(|status| broken(status.message()))?;
            if !piece.header.is_empty() {
                header = Some(piece.header.clone());
            }
            let body = checked(&piece)?;
            whole = body.is_empty();
            if !whole {
                let written = blocking(move || frames.write(&body).map(|()| frames)).await;
                frames = written.map_err(broken)?;
            }
        }
        let header = header.ok_or_else(|| broken("no header"))?;
        if !whole {
            return Err(broken("it ended early"));
        }
        let received = blocking(|| frames.finish()).await.map_err(broken)?;
        Ok((header, received))
    }

    /// Receives the pieces of a snapshot after the first `from`, which are here. Those that come before a break stay.
    async fn receive_rest(
        &self,
        group: GroupId,
        id: SnapshotId,
        from: u64,
        pieces: &mut (impl Stream<Item = Result<Piece, tonic::Status>> + Unpin),
    ) -> Result<(ReceivedFile, Installing), Error> {
        let snapshots = self.inner.snapshots.clone();
        let receipt = blocking(move || snapshots.inbox().begin(group, &id, from)).await.map_err(broken)?;
        let mut whole = false;
        while let Some(piece) = pieces.next().await {
            let body = checked(&piece.map_err(|status| broken(status.message()))?)?;
            whole = body.is_empty();
            if !whole {
                let receipt = receipt.clone();
                blocking(move || receipt.take(&body)).await.map_err(broken)?;
            }
        }
        if !whole {
            return Err(broken("it ended early"));
        }
        blocking(move || receipt.finish()).await.map_err(broken)
    }

    /// A leader asks how many pieces of a snapshot are here. What is here of any other one is given up.
    pub(super) async fn offered(&self, group: &Group, offer: Offer) -> Result<u64, Error> {
        let id = group.id();
        let status = group.status();
        if offer.vote.leader_id.term < status.term {
            return Err(Error::NotLeader { group: id, leader: status.leader });
        }
        let snapshots = self.inner.snapshots.clone();
        if group.has_applied(&offer.meta) {
            // Nobody will go on with what may have come of it, or of an earlier one.
            let forgotten = blocking(move || snapshots.inbox().forget(id)).await;
            forgotten.map_err(|error| Error::Timeout { group: id, reason: error.to_string() })?;
            return Ok(offer.id.pieces);
        }
        let held =
            blocking(move || snapshots.inbox().offered(id, &offer.id, &codec::encode(&offer.meta))).await;
        held.map_err(|error| Error::Timeout { group: id, reason: error.to_string() })
    }

    /// Takes in a snapshot from a group's leader.
    pub async fn handle_snapshot(
        &self,
        mut pieces: impl Stream<Item = Result<Piece, tonic::Status>> + Unpin,
    ) -> Result<RaftReply, Error> {
        let first = pieces.next().await.ok_or_else(|| broken("it has no pieces"))?;
        let first = first.map_err(|status| broken(status.message()))?;
        let header = Header::read(&first.header).map_err(broken)?;
        if header.target != self.inner.node {
            return Err(Error::BadMessage("a snapshot for another node".into()));
        }
        let group = self.get(header.group)?;
        let Header { group: id, vote, meta, resumed, .. } = header;
        let mut pieces = futures::stream::iter([Ok(first)]).chain(pieces);
        let (received, installing) = match resumed {
            None => (self.receive(&mut pieces).await?.1, None),
            // It was installed before, and only the answer was lost.
            Some((snapshot, from)) if from == snapshot.pieces && group.has_applied(&meta) => {
                let vote = group.raft.metrics().borrow_watched().vote;
                let answer = SnapshotResponse::<TypeConfig>::new(vote);
                return Ok(RaftReply { body: codec::encode(&answer).into() });
            }
            Some((snapshot, from)) => {
                let (received, installing) = self.receive_rest(id, snapshot, from, &mut pieces).await?;
                (received, Some(installing))
            }
        };
        let snapshot =
            SnapshotOf::<TypeConfig, SnapshotData> { meta, snapshot: SnapshotData::File(received) };
        let raft = group.raft.clone();
        // A task of its own: it goes on when the leader does not wait any longer, and until then nothing else
        // is taken in.
        let install = TypeConfig::spawn(async move {
            let answer = raft.install_full_snapshot(vote, snapshot).await;
            drop(installing);
            answer
        });
        let stopped = |reason: String| Error::Stopped { group: id, reason };
        let answer = install.await.map_err(|error| stopped(error.to_string()))?;
        let answer = answer.map_err(|error| stopped(error.to_string()))?;
        group.stand_again();
        metrics::counter!("shoal_raft_snapshots_installed_total").increment(1);
        Ok(RaftReply { body: codec::encode(&answer).into() })
    }
}

impl Group {
    /// Whether this replica has everything that a snapshot holds.
    fn has_applied(&self, meta: &SnapshotMetaOf<TypeConfig>) -> bool {
        meta.last_log_id.is_some_and(|last| self.applied() >= last.index)
    }
}

/// What a piece carries behind its checksum.
fn checked(piece: &Piece) -> Result<Bytes, Error> {
    let (sum, body) = piece.data.split_at_checked(4).ok_or_else(|| broken("a piece is short"))?;
    if sum != crc32fast::hash(body).to_le_bytes() {
        return Err(broken("a piece has the wrong checksum"));
    }
    Ok(piece.data.slice(4..))
}

fn broken(reason: impl Display) -> Error {
    Error::BadMessage(format!("snapshot: {reason}"))
}
