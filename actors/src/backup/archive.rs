//! A snapshot as one file: a tar archive (POSIX.1-1988, `ustar`) of a target that holds one backup.
//!
//! ```text
//!  backups/<id>.json     the head, first
//!  objects/ab/<BLAKE3>   the manifest, then pieces, then bytes of files: each once, under its hash
//! ```
//!
//! Whoever unpacks it with `tar` has a directory that `backup.target` can name. The same snapshot gives
//! the same bytes whenever it is packed, and by whatever build: its checksum was told before. What comes in
//! is refused unless it looks exactly like that: regular files of these names, every object with its hash.

use std::collections::BTreeSet;
use std::fs::File;
use std::io::{self, Read, Write};
use std::ops::Range;
use std::path::Path;

use bytes::Bytes;
use futures::{Stream, StreamExt, TryStreamExt, stream};
use shoal_proto::{BlobHash, Error, ErrorCode};

use super::manifest::{Manifest, Object};
use super::snapshot::Snapshot;
use super::target::{AT_ONCE, Target};

/// Everything in a tar archive is padded to this.
const BLOCK: usize = 512;
/// The largest file that eleven octal digits can tell.
pub(super) const MAX_ENTRY_BYTES: u64 = (1 << 33) - 1;
/// The largest head that is taken in.
const MAX_HEAD_BYTES: u64 = 1 << 20;
/// The largest manifest that is taken in, in bytes: that of about 400,000 files, or of some 100 GB of points.
pub(super) const MAX_MANIFEST_BYTES: u64 = 64 << 20;
/// The longest id that is taken in, in bytes.
const MAX_ID_BYTES: usize = 64;
/// Bytes that are read at a time.
const READ_BYTES: usize = 64 << 10;
/// Where a header has its own sum, which is taken with spaces in that place.
const SUM: Range<usize> = 148..156;

/// A snapshot's archive, as it is read from a target: an object or a few at a time.
pub(super) fn pack(
    target: &Target,
    snapshot: &Snapshot,
    manifest: &Manifest,
) -> impl Stream<Item = Result<Bytes, Error>> + Send + use<> {
    let mut known = BTreeSet::new();
    let shards = || manifest.collections.iter().flat_map(|collection| &collection.shards);
    let pieces = shards().flat_map(|shard| shard.pieces.iter().copied());
    let mut small = vec![(head_path(&snapshot.id), snapshot.head)];
    small.extend(unknown(&mut known, [snapshot.manifest].into_iter().chain(pieces)));
    let files = shards().flat_map(|shard| shard.blobs.iter().map(|blob| blob.object));
    let large = unknown(&mut known, files);
    let written_at = snapshot.created_at;
    let read = |entries: Vec<(String, Object)>, at_once| {
        let (paths, objects): (Vec<String>, Vec<Object>) = entries.into_iter().unzip();
        let objects = target.get_all(objects, at_once);
        stream::iter(paths)
            .zip(objects)
            .map(move |(path, bytes)| Ok::<_, Error>(entry(&path, bytes?, written_at)))
    };
    // Two empty blocks end it.
    let blocks = [Bytes::from_static(&[0; 2 * BLOCK]), Bytes::new(), Bytes::new()];
    let end = stream::iter([Ok::<_, Error>(blocks)]);
    // Of files one at a time: it may be as large as an upload may be.
    let parts = read(small, AT_ONCE).chain(read(large, 1)).chain(end);
    let parts = parts.map_ok(|parts| stream::iter(parts.map(Ok::<_, Error>))).try_flatten();
    parts.try_filter(|part| std::future::ready(!part.is_empty()))
}

/// Those that are new, with their paths.
fn unknown(known: &mut BTreeSet<BlobHash>, objects: impl Iterator<Item = Object>) -> Vec<(String, Object)> {
    let new = objects.filter(|object| known.insert(object.hash));
    new.map(|object| (object_path(object.hash), object)).collect()
}

/// One file: header, content, padding.
fn entry(path: &str, content: Bytes, written_at: u64) -> [Bytes; 3] {
    let header = Bytes::copy_from_slice(&header(path, content.len() as u64, written_at));
    let padding = Bytes::from_static(&[0; BLOCK]).slice(..padding(content.len() as u64));
    [header, content, padding]
}

fn padding(bytes: u64) -> usize {
    (bytes.next_multiple_of(BLOCK as u64) - bytes) as usize
}

fn header(path: &str, bytes: u64, written_at: u64) -> [u8; BLOCK] {
    let mut header = [0; BLOCK];
    let mut put = |at: usize, text: &str| header[at..at + text.len()].copy_from_slice(text.as_bytes());
    put(0, path);
    put(100, "0000644");
    put(108, "0000000");
    put(116, "0000000");
    put(124, &format!("{bytes:011o}"));
    put(136, &format!("{written_at:011o}"));
    put(156, "0");
    // The kind of header and its version.
    put(257, "ustar\0");
    put(263, "00");
    let sum = sum_of(&header);
    header[SUM].copy_from_slice(format!("{sum:06o}\0 ").as_bytes());
    header
}

fn sum_of(header: &[u8; BLOCK]) -> u64 {
    let bytes = header.iter().enumerate();
    bytes.map(|(at, byte)| if SUM.contains(&at) { u64::from(b' ') } else { u64::from(*byte) }).sum()
}

/// The path and the size of a regular file; none when the header is anything else.
fn parse(header: &[u8; BLOCK]) -> Option<(&str, u64)> {
    let text = |range: Range<usize>| std::str::from_utf8(header[range].split(|byte| *byte == 0).next()?).ok();
    let number = |range| u64::from_str_radix(text(range)?.trim(), 8).ok();
    let is_file = header[156] == b'0' && &header[257..263] == b"ustar\0" && text(345..500) == Some("");
    (is_file && number(SUM)? == sum_of(header)).then_some((text(0..100)?, number(124..136)?))
}

fn head_path(id: &str) -> String {
    format!("backups/{id}.json")
}

fn object_path(hash: BlobHash) -> String {
    let name = hash.to_string();
    format!("objects/{}/{name}", &name[..2])
}

/// Unpacks an archive into an empty directory, which becomes a target with one backup. Every object is
/// compared with its hash; whether all are there is for the caller to see. Returns the backup's id.
///
/// # Errors
/// Invalid, when it is not what [`pack`] makes; too large, when an object has more than so many bytes; disk
/// full. What was unpacked by then is for the caller to delete.
pub(super) fn unpack(from: &mut impl Read, dir: &Path, object_bytes: u64) -> Result<String, Error> {
    let mut id = None;
    while let Some(header) = block(from)? {
        let foreign = || wrong("this is no snapshot that Shoal has written");
        let (path, bytes) = parse(&header).ok_or_else(foreign)?;
        if let Some(found) = id_in(path).filter(|_| id.is_none() && bytes <= MAX_HEAD_BYTES) {
            take(from, &dir.join(head_path(found)), bytes)?;
            id = Some(found.to_owned());
            continue;
        }
        let hash = hash_in(path).filter(|_| id.is_some());
        let hash = hash.ok_or_else(|| wrong(format!("{path:?} does not belong there")))?;
        if bytes > object_bytes {
            let message =
                format!("snapshot: one of its files has {bytes} bytes, and {object_bytes} is the most");
            return Err(Error::new(ErrorCode::TooLarge, message));
        }
        if take(from, &dir.join(object_path(hash)), bytes)? != hash {
            return Err(wrong(format!("object {hash} is damaged")));
        }
    }
    // Other programs pad more; a checksum is over all of it.
    io::copy(from, &mut io::sink()).map_err(|error| spool(&error))?;
    id.ok_or_else(|| wrong("it is empty"))
}

fn id_in(path: &str) -> Option<&str> {
    let id = path.strip_prefix("backups/")?.strip_suffix(".json")?;
    let is_good = |byte: u8| byte.is_ascii_alphanumeric() || byte == b'-';
    ((1..=MAX_ID_BYTES).contains(&id.len()) && id.bytes().all(is_good)).then_some(id)
}

fn hash_in(path: &str) -> Option<BlobHash> {
    let hash: BlobHash = path.rsplit('/').next()?.parse().ok()?;
    (object_path(hash) == path).then_some(hash)
}

/// The next block; none when it is empty, which ends an archive.
fn block(from: &mut impl Read) -> Result<Option<[u8; BLOCK]>, Error> {
    let mut block = [0; BLOCK];
    from.read_exact(&mut block).map_err(|error| ended(&error))?;
    Ok((block != [0; BLOCK]).then_some(block))
}

/// Writes what comes next to a new file. Returns its hash.
fn take(from: &mut impl Read, path: &Path, bytes: u64) -> Result<BlobHash, Error> {
    let parent = path.parent().expect("it lies in a folder");
    std::fs::create_dir_all(parent).map_err(|error| spool(&error))?;
    let mut file = File::create_new(path).map_err(|error| match error.kind() {
        io::ErrorKind::AlreadyExists => wrong("one of its files is there twice"),
        _ => spool(&error),
    })?;
    let mut hasher = blake3::Hasher::new();
    let mut buffer = vec![0; READ_BYTES];
    let mut left = bytes;
    while left > 0 {
        let piece = &mut buffer[..usize::try_from(left).unwrap_or(READ_BYTES).min(READ_BYTES)];
        from.read_exact(piece).map_err(|error| ended(&error))?;
        hasher.update(piece);
        file.write_all(piece).map_err(|error| spool(&error))?;
        left -= piece.len() as u64;
    }
    from.read_exact(&mut buffer[..padding(bytes)]).map_err(|error| ended(&error))?;
    Ok(BlobHash(*hasher.finalize().as_bytes()))
}

/// What is wrong with an archive.
pub(super) fn wrong(reason: impl std::fmt::Display) -> Error {
    Error::invalid("snapshot", reason)
}

fn ended(error: &io::Error) -> Error {
    match error.kind() {
        io::ErrorKind::UnexpectedEof => wrong("it ends in the middle"),
        _ => spool(error),
    }
}

pub(super) fn spool(error: &io::Error) -> Error {
    match error.kind() {
        io::ErrorKind::StorageFull => Error::new(ErrorCode::DiskFull, "the disk of this node is full"),
        _ => Error::internal(format!("the snapshot could not be stored: {error}")),
    }
}

/// Bytes in hexadecimal digits.
pub(super) fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}

#[cfg(test)]
mod tests {
    use shoal_proto::{DocumentId, ShardId};

    use super::super::manifest::{Blob, CollectionCopy, FORMAT, Head, ShardCopy};
    use super::*;

    /// A target with a snapshot of two pieces and a file, and its archive.
    async fn packed(dir: &Path) -> (Snapshot, Vec<u8>) {
        let target = Target::open(dir.to_str().expect("text")).expect("opens");
        let put = async |bytes: Vec<u8>| target.put(bytes.into()).await.expect("written").0;
        let (file, one) = (put(vec![7; 1024]).await, put(b"a piece".to_vec()).await);
        let shard = ShardCopy {
            shard: ShardId(1),
            index: 1,
            points: 0,
            documents: 0,
            files: 0,
            // One piece stands there twice, as it may.
            pieces: vec![one, put(b"another".to_vec()).await, one],
            blobs: vec![Blob { document: DocumentId([1; 16]), object: file }],
            missing: Vec::new(),
        };
        let collection = CollectionCopy {
            name: "c".into(),
            config: Default::default(),
            replication_factor: 1,
            created_at: 1,
            shards: vec![shard],
        };
        let manifest = Manifest { collections: vec![collection], ..Manifest::default() };
        let object = put(serde_json::to_vec(&manifest).expect("writable")).await;
        let head = Head {
            format: FORMAT,
            id: "20260101T000000Z-00000000".into(),
            created_at: 1,
            cluster_id: "c".into(),
            is_full: false,
            version: "0".into(),
            manifest: object,
            collections: manifest.summaries(),
            bytes: 0,
            new_bytes: 0,
            missing_files: 0,
            missing: Vec::new(),
        };
        let snapshot = Snapshot {
            format: FORMAT,
            id: head.id.clone(),
            collection: "c".into(),
            created_at: 1,
            bytes: 0,
            checksum: String::new(),
            head: put(serde_json::to_vec_pretty(&head).expect("writable")).await,
            manifest: object,
        };
        let parts: Vec<Bytes> = pack(&target, &snapshot, &manifest).try_collect().await.expect("read");
        (snapshot, parts.concat())
    }

    fn unpacked(archive: &[u8]) -> Result<(tempfile::TempDir, String), Error> {
        let dir = tempfile::tempdir().expect("a directory");
        let id = unpack(&mut &archive[..], dir.path(), 1 << 20)?;
        Ok((dir, id))
    }

    #[tokio::test]
    async fn an_archive_unpacks_to_a_target_with_one_backup() {
        let kept = tempfile::tempdir().expect("a directory");
        let (snapshot, archive) = packed(kept.path()).await;
        assert_eq!(archive.len() % BLOCK, 0);
        assert_eq!(archive, packed(kept.path()).await.1, "the same snapshot has the same bytes");
        let (dir, id) = unpacked(&archive).expect("whole");
        assert_eq!(id, snapshot.id);
        let target = Target::open(dir.path().to_str().expect("text")).expect("opens");
        let head = target.head(&id).await.expect("there");
        let manifest = target.manifest(&head).await.expect("there");
        for object in manifest.objects() {
            assert_eq!(target.get(&object).await.expect("there").len() as u64, object.bytes);
        }
        // Whatever program has padded it.
        unpacked(&[&archive[..], &[0; 8192]].concat()).expect("whole");
    }

    #[tokio::test]
    async fn what_was_changed_on_its_way_is_refused() {
        let kept = tempfile::tempdir().expect("a directory");
        let (_, archive) = packed(kept.path()).await;
        for cut in [0, 1, BLOCK, archive.len() / 2, archive.len() - 2 * BLOCK] {
            assert!(unpacked(&archive[..cut]).is_err(), "cut after {cut} bytes");
        }
        let piece = archive.windows(7).position(|bytes| bytes == b"a piece").expect("there");
        // In the header of that piece, and in its content.
        for at in [piece - BLOCK, piece - BLOCK + 124, piece - BLOCK + 156, piece] {
            let mut changed = archive.clone();
            changed[at] ^= 1;
            let refused = unpacked(&changed).map(drop).expect_err("changed");
            assert_eq!(
                (refused.code, refused.field.as_deref()),
                (ErrorCode::InvalidArgument, Some("snapshot"))
            );
        }
    }

    #[test]
    fn only_what_belongs_there_is_taken() {
        let hash = BlobHash(*blake3::hash(b"x").as_bytes());
        let head = entry("backups/1-a.json", Bytes::from_static(b"{}"), 1).concat();
        let end = [0; 2 * BLOCK];
        let names = ["../x", "/etc/x", "backups/../x.json", "backups/1-b.json", "objects/00/x", "locks/1"];
        for name in names.map(str::to_owned).into_iter().chain([format!("objects/zz/{hash}")]) {
            let other = entry(&name, Bytes::from_static(b"x"), 1).concat();
            let refused = unpacked(&[&head[..], &other, &end].concat()).map(drop).expect_err("foreign");
            assert!(refused.message.contains("does not belong there"), "{refused}");
        }
        let object = entry(&object_path(hash), Bytes::from_static(b"x"), 1).concat();
        unpacked(&[&head[..], &object, &end].concat()).expect("as it should be");
        assert!(unpacked(&[&object[..], &head, &end].concat()).is_err(), "the head comes first");
        assert!(unpacked(&[&head[..], &object, &object, &end].concat()).is_err(), "each object comes once");
        let mut link = object.clone();
        link[156] = b'2';
        let sum = sum_of(link[..BLOCK].try_into().expect("a block"));
        link[SUM].copy_from_slice(format!("{sum:06o}\0 ").as_bytes());
        assert!(unpacked(&[&head[..], &link, &end].concat()).is_err(), "no links");
        let large = entry(&object_path(hash), Bytes::from(vec![0; (1 << 20) + 1]), 1).concat();
        let refused = unpacked(&[&head[..], &large, &end].concat()).map(drop).expect_err("too large");
        assert_eq!(refused.code, ErrorCode::TooLarge);
        assert!(unpacked(&end).is_err() && unpacked(b"no archive at all").is_err());
    }
}
