//! Taking in a snapshot that comes from outside: unpacked as it comes, so that it needs its room on the disk
//! once, and nothing of it stays when it breaks off.

use std::io::{self, Read};

use bytes::{Buf, Bytes};
use sha2::{Digest, Sha256};
use shoal_proto::{Error, ErrorCode};
use tokio::sync::{OwnedSemaphorePermit, mpsc};
use tokio::task::JoinHandle;

use super::archive::{MAX_MANIFEST_BYTES, hex, spool, unpack, wrong};
use super::manifest::Manifest;
use super::snapshot::refused;
use super::target::Target;
use super::{Backups, check_idle};
use crate::cluster::Cluster;
use crate::scratch::Scratch;

/// Pieces that wait for the disk.
const PIECES_WAITING: usize = 16;

/// How much is taken in.
#[derive(Clone, Copy, Debug)]
pub struct ReceiveLimits {
    /// Bytes of the archive.
    pub archive_bytes: u64,
    /// Bytes of one of its objects: a file, as a rule. Pieces of shards and the manifest have less.
    pub object_bytes: u64,
}

/// A snapshot on its way in. What has come is deleted when it is dropped.
pub struct Receipt {
    cluster: Cluster,
    limits: ReceiveLimits,
    bytes: u64,
    pieces: mpsc::Sender<Bytes>,
    unpacking: JoinHandle<Result<Unpacked, Error>>,
    turn: OwnedSemaphorePermit,
}

struct Unpacked {
    target: Target,
    id: String,
    /// SHA-256 of the archive, in hexadecimal digits.
    checksum: String,
    // After the target: files are deleted when nobody reads them.
    dir: Scratch,
}

/// A snapshot that has come, in files of this node that are deleted when it is dropped.
pub struct Received {
    pub(super) target: Target,
    pub(super) id: String,
    pub(super) manifest: Manifest,
    _dir: Scratch,
    _turn: OwnedSemaphorePermit,
}

impl Backups {
    /// Begins to take in a snapshot.
    ///
    /// # Errors
    /// Conflict, when this node could do nothing with it now; busy, when it takes in others; disk full.
    pub fn receive(&self, limits: ReceiveLimits) -> Result<Receipt, Error> {
        check_idle(self.inner.job.lock().as_ref())?;
        let turn = self.inner.receiving.clone().try_acquire_owned().map_err(|_| {
            Error::new(
                ErrorCode::Busy,
                "this node takes in other snapshots; try again later, or another node",
            )
        })?;
        let cluster = self.inner.cluster.clone();
        check_room(&cluster)?;
        let (pieces, waiting) = mpsc::channel(PIECES_WAITING);
        let path = self.inner.received.join(uuid::Uuid::new_v4().to_string());
        let unpacking = tokio::task::spawn_blocking(move || {
            // A target has an absolute path.
            let path = std::path::absolute(path).map_err(|error| spool(&error))?;
            std::fs::create_dir_all(&path).map_err(|error| spool(&error))?;
            let dir = Scratch(path);
            let mut incoming = Incoming { waiting, piece: Bytes::new(), hasher: Sha256::new() };
            let id = unpack(&mut incoming, &dir.0, limits.object_bytes)?;
            let name =
                dir.0.to_str().ok_or_else(|| Error::internal("the data directory's path is not text"))?;
            let target = Target::open(name)?;
            Ok(Unpacked { target, id, checksum: hex(&incoming.hasher.finalize()), dir })
        });
        Ok(Receipt { cluster, limits, bytes: 0, pieces, unpacking, turn })
    }
}

fn check_room(cluster: &Cluster) -> Result<(), Error> {
    match cluster.is_writable() {
        true => Ok(()),
        false => Err(Error::new(ErrorCode::DiskFull, "the disk's reserve is reached on this node")),
    }
}

impl Receipt {
    /// Takes in the next piece.
    ///
    /// # Errors
    /// Invalid, as soon as it is known that this is no snapshot or a damaged one; too large; disk full.
    pub async fn write(&mut self, piece: Bytes) -> Result<(), Error> {
        self.bytes += piece.len() as u64;
        if self.bytes > self.limits.archive_bytes {
            let message = format!("snapshot: it has at most {} bytes", self.limits.archive_bytes);
            return Err(Error::new(ErrorCode::TooLarge, message));
        }
        check_room(&self.cluster)?;
        match self.pieces.send(piece).await {
            Ok(()) => Ok(()),
            // Nobody takes it any more, and says why.
            Err(_) => match (&mut self.unpacking).await.map_err(Error::internal)? {
                Err(error) => Err(error),
                Ok(_) => Err(Error::internal("a snapshot was unpacked before it had come")),
            },
        }
    }

    /// To be called when everything has come, with the SHA-256 that somebody expects.
    ///
    /// # Errors
    /// Invalid, when it is damaged, or has another checksum.
    pub async fn finish(self, checksum: Option<&str>) -> Result<Received, Error> {
        let Receipt { pieces, unpacking, turn, .. } = self;
        drop(pieces);
        let Unpacked { target, id, checksum: found, dir } = unpacking.await.map_err(Error::internal)??;
        if checksum.is_some_and(|wanted| !wanted.eq_ignore_ascii_case(&found)) {
            return Err(Error::invalid("checksum", format!("the snapshot has the SHA-256 {found}")));
        }
        let head = target.head(&id).await.map_err(|error| refused(error, "snapshot"))?;
        if head.manifest.bytes > MAX_MANIFEST_BYTES {
            let message = format!(
                "snapshot: its manifest has {} bytes, and {MAX_MANIFEST_BYTES} is the most that is taken in; \
                 unpacked with tar it is a backup target, to restore it from",
                head.manifest.bytes
            );
            return Err(Error::new(ErrorCode::TooLarge, message));
        }
        let manifest = target.manifest(&head).await.map_err(|error| refused(error, "snapshot"))?;
        for object in manifest.objects() {
            if !target.has(&object).await? {
                return Err(wrong(format!("object {} is missing", object.hash)));
            }
        }
        Ok(Received { target, id, manifest, _dir: dir, _turn: turn })
    }
}

/// The bytes as they come, for a thread that waits for them.
struct Incoming {
    waiting: mpsc::Receiver<Bytes>,
    piece: Bytes,
    hasher: Sha256,
}

impl Read for Incoming {
    fn read(&mut self, into: &mut [u8]) -> io::Result<usize> {
        while self.piece.is_empty() {
            match self.waiting.blocking_recv() {
                Some(piece) => {
                    self.hasher.update(&piece);
                    self.piece = piece;
                }
                None => return Ok(0),
            }
        }
        let count = into.len().min(self.piece.len());
        self.piece.copy_to_slice(&mut into[..count]);
        Ok(count)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn bytes_come_in_order_whatever_they_are_cut_into() {
        let (sender, waiting) = mpsc::channel(2);
        let reading = tokio::task::spawn_blocking(move || {
            let mut incoming = Incoming { waiting, piece: Bytes::new(), hasher: Sha256::new() };
            let mut all = Vec::new();
            incoming.read_to_end(&mut all).map(|_| (all, hex(&incoming.hasher.finalize())))
        });
        for piece in ["ab", "", "c"] {
            sender.send(Bytes::from_static(piece.as_bytes())).await.expect("taken");
        }
        drop(sender);
        let (all, sum) = reading.await.expect("ends").expect("read");
        assert_eq!(all, b"abc");
        assert_eq!(sum, "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad");
    }
}
