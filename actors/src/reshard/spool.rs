//! An old shard's log, kept from before its copy is made: it may be purged before the copy is through.

use std::collections::VecDeque;
use std::io::{Seek as _, SeekFrom, Write as _};
use std::os::unix::fs::FileExt as _;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, Instant};

use bytes::Bytes;
use parking_lot::Mutex;
use shoal_proto::{Error, ErrorCode, NodeId, ShardId, codec};
use tokio::task::JoinHandle;

use super::{BUSY_PAUSE, STEP_TIMEOUT, TAIL_PAUSE};
use crate::call::{Call, Reply};
use crate::cluster::Cluster;
use crate::scratch::Scratch;

/// Bytes of the old shards' logs that are fetched at a time.
const TAIL_BYTES: u64 = 1 << 20;

/// An old shard's log from some index on, in a file, while a task fetches more of it.
pub(super) struct Spool {
    file: Arc<std::fs::File>,
    shared: Arc<Mutex<Spooled>>,
    fetching: JoinHandle<()>,
    _path: Scratch,
}

#[derive(Default)]
struct Spooled {
    /// Where in the file the next pieces are.
    pieces: VecDeque<(u64, usize)>,
    /// The last index that is known to be applied somewhere.
    applied: Option<u64>,
    /// The index that is to be fetched in any case: a replica that is behind it is not the only one that is asked.
    least: u64,
    failed: Option<Error>,
}

impl Spool {
    pub(super) fn begin(cluster: Cluster, shard: ShardId, after: u64, path: PathBuf) -> Result<Spool, Error> {
        let open = || {
            std::fs::create_dir_all(path.parent().unwrap_or(Path::new(".")))?;
            std::fs::File::options().create_new(true).read(true).write(true).open(&path)
        };
        let file = Arc::new(open().map_err(on_disk)?);
        let shared: Arc<Mutex<Spooled>> = Arc::default();
        let fetching = tokio::spawn(fetch(cluster, (shard, after), file.clone(), shared.clone()));
        Ok(Spool { file, shared, fetching, _path: Scratch(path) })
    }

    /// How many entries were applied after an index, as far as is known: very many before anything is.
    pub(super) fn behind(&self, index: u64) -> Result<u64, Error> {
        let spooled = self.shared.lock();
        match (&spooled.failed, spooled.applied) {
            (Some(error), _) => Err(error.clone()),
            (None, Some(applied)) => Ok(applied.saturating_sub(index)),
            (None, None) => Ok(u64::MAX),
        }
    }

    /// From now on replicas that have applied less are passed over when they have nothing new.
    pub(super) fn require(&self, least: u64) {
        self.shared.lock().least = least;
    }

    /// The next piece, or none when nothing more was fetched yet.
    pub(super) async fn next(&mut self) -> Result<Option<Vec<(u64, Option<Bytes>)>>, Error> {
        let (offset, length) = {
            let mut spooled = self.shared.lock();
            if let Some(error) = &spooled.failed {
                return Err(error.clone());
            }
            let Some(piece) = spooled.pieces.pop_front() else { return Ok(None) };
            piece
        };
        let file = self.file.clone();
        let bytes = tokio::task::spawn_blocking(move || {
            let mut bytes = vec![0; length];
            file.read_exact_at(&mut bytes, offset).map(|()| bytes)
        });
        let bytes = bytes.await.map_err(Error::internal)?.map_err(Error::internal)?;
        Ok(Some(codec::decode(&bytes)?))
    }
}

impl Drop for Spool {
    fn drop(&mut self) {
        self.fetching.abort();
    }
}

async fn fetch(
    cluster: Cluster,
    (shard, mut after): (ShardId, u64),
    file: Arc<std::fs::File>,
    shared: Arc<Mutex<Spooled>>,
) {
    loop {
        let least = shared.lock().least;
        let fetched = match cluster.tail(shard, after, least).await {
            Ok(_) if !cluster.is_writable() => Err(disk_full()),
            Ok((commands, applied)) => keep(&file, commands).await.map(|kept| (kept, applied)),
            Err(error) => Err(error),
        };
        let has_all = {
            let mut spooled = shared.lock();
            match fetched {
                Ok((kept, applied)) => {
                    if let Some((last, piece)) = kept {
                        after = last;
                        spooled.pieces.push_back(piece);
                    }
                    // The next one to answer may be behind the last one.
                    spooled.applied = spooled.applied.max(Some(applied));
                    after >= applied
                }
                Err(error) => {
                    spooled.failed = Some(error);
                    return;
                }
            }
        };
        if has_all {
            tokio::time::sleep(TAIL_PAUSE).await;
        }
    }
}

/// A piece of a spool: the last index in it, and where it is.
type Kept = Option<(u64, (u64, usize))>;

async fn keep(file: &Arc<std::fs::File>, commands: Vec<(u64, Option<Bytes>)>) -> Result<Kept, Error> {
    let Some((last, _)) = commands.last() else { return Ok(None) };
    let (last, file) = (*last, file.clone());
    let written = tokio::task::spawn_blocking(move || {
        let bytes = codec::encode(&commands);
        let mut file = &*file;
        let offset = file.seek(SeekFrom::End(0))?;
        file.write_all(&bytes)?;
        std::io::Result::Ok((offset, bytes.len()))
    });
    let piece = written.await.map_err(Error::internal)?.map_err(on_disk)?;
    Ok(Some((last, piece)))
}

fn on_disk(error: std::io::Error) -> Error {
    match error.kind() {
        std::io::ErrorKind::StorageFull => disk_full(),
        _ => Error::internal(error),
    }
}

fn disk_full() -> Error {
    Error::new(ErrorCode::DiskFull, "the disk of this node has no room for the log of an old shard")
}

impl Cluster {
    /// Commands that a shard has applied after an index, from a replica that has them, and the last index that
    /// it has applied: `least` or a later one, or else there are some, or no replica that answers has come so far.
    pub(super) async fn tail(
        &self,
        shard: ShardId,
        after: u64,
        least: u64,
    ) -> Result<(Vec<(u64, Option<Bytes>)>, u64), Error> {
        let deadline = Instant::now() + STEP_TIMEOUT;
        loop {
            let mut reason = String::from("no replica answers");
            let mut behind = None;
            for node in self.holders(shard) {
                let call = Call::Tail { group: shard.into(), after, limit_bytes: TAIL_BYTES };
                match self.call(node, call, Duration::from_secs(5)).await {
                    Reply::Tail(commands, applied) if applied >= least || !commands.is_empty() => {
                        return Ok((commands, applied));
                    }
                    Reply::Tail(commands, applied) => behind = Some((commands, applied)),
                    Reply::Failed(error) => reason = format!("node {node}: {}", error.message),
                    _ => {}
                }
            }
            if let Some(known) = behind {
                return Ok(known);
            }
            if Instant::now() > deadline {
                return Err(Error::unavailable(format!(
                    "the log of shard {shard} is not to be had: {reason}"
                )));
            }
            tokio::time::sleep(BUSY_PAUSE).await;
        }
    }

    /// The nodes that hold a shard, its leader first.
    pub(super) fn holders(&self, shard: ShardId) -> Vec<NodeId> {
        let state = self.state();
        let leader = self.groups().get(shard.into()).ok().and_then(|group| group.leader());
        let replicas = state.shards.get(&shard).map(|shard| shard.replicas.clone()).unwrap_or_default();
        let mut nodes: Vec<NodeId> = replicas.into_iter().collect();
        nodes.sort_by_key(|node| (Some(*node) != leader, *node != self.node()));
        nodes
    }
}
