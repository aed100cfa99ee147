//! The file system itself: every call goes to the folder below, past the journal.

use std::collections::HashMap;
use std::ffi::OsStr;
use std::fs::{File, Metadata, OpenOptions};
use std::io;
use std::os::fd::AsRawFd;
use std::os::unix::fs::{DirBuilderExt, FileExt, MetadataExt, OpenOptionsExt, PermissionsExt};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use fuser::{
    FileAttr, FileType, Filesystem, ReplyAttr, ReplyCreate, ReplyData, ReplyDirectory, ReplyEmpty,
    ReplyEntry, ReplyOpen, ReplyStatfs, ReplyWrite, Request, TimeOrNow,
};
use parking_lot::Mutex;

use super::Faults;
use super::journal::Journal;

/// How long the kernel may keep names and attributes: all changes pass through it anyway.
const TTL: Duration = Duration::from_secs(60);
const ROOT: u64 = 1;

/// The state of one mount.
pub(super) struct Passthrough {
    paths: HashMap<u64, PathBuf>,
    numbers: HashMap<PathBuf, u64>,
    next_number: u64,
    open: HashMap<u64, Arc<File>>,
    next_handle: u64,
    faults: Arc<Faults>,
    journal: Arc<Mutex<Journal>>,
}

fn code(error: &io::Error) -> i32 {
    error.raw_os_error().unwrap_or(libc::EIO)
}

/// Answers with the error of a result, or goes on with its value.
macro_rules! answer {
    ($reply:ident, $result:expr) => {
        match $result {
            Ok(value) => value,
            Err(error) => return $reply.error(code(&error)),
        }
    };
}

impl Passthrough {
    pub(super) fn new(below: &Path, faults: Arc<Faults>, journal: Arc<Mutex<Journal>>) -> Passthrough {
        Passthrough {
            paths: HashMap::from([(ROOT, below.to_owned())]),
            numbers: HashMap::from([(below.to_owned(), ROOT)]),
            next_number: ROOT + 1,
            open: HashMap::new(),
            next_handle: 1,
            faults,
            journal,
        }
    }

    fn path(&self, number: u64) -> io::Result<PathBuf> {
        self.paths.get(&number).cloned().ok_or_else(|| io::Error::from_raw_os_error(libc::ENOENT))
    }

    fn child(&self, parent: u64, name: &OsStr) -> io::Result<PathBuf> {
        Ok(self.path(parent)?.join(name))
    }

    fn number(&mut self, path: &Path) -> u64 {
        if let Some(number) = self.numbers.get(path) {
            return *number;
        }
        let number = self.next_number;
        self.next_number += 1;
        self.paths.insert(number, path.to_owned());
        self.numbers.insert(path.to_owned(), number);
        number
    }

    fn attributes(&mut self, path: &Path) -> io::Result<FileAttr> {
        let metadata = std::fs::symlink_metadata(path)?;
        Ok(attributes(self.number(path), &metadata))
    }

    fn opened(&mut self, file: File) -> u64 {
        let handle = self.next_handle;
        self.next_handle += 1;
        self.open.insert(handle, Arc::new(file));
        handle
    }

    fn file(&self, handle: u64) -> io::Result<Arc<File>> {
        self.open.get(&handle).cloned().ok_or_else(|| io::Error::from_raw_os_error(libc::EBADF))
    }

    /// A name is gone. What is open goes on without one, and nothing of it outlives a power cut.
    fn forget_name(&mut self, path: &Path) {
        if let Some(number) = self.numbers.remove(path) {
            self.paths.remove(&number);
        }
    }

    /// Notes what a change of a file's bytes is about to overwrite.
    fn note(&self, number: u64, file: &File, offset: u64, length: u64) -> io::Result<()> {
        match self.paths.get(&number) {
            Some(path) => self.journal.lock().before_write(number, path, file, offset, length),
            None => Ok(()),
        }
    }

    fn note_resize(&self, number: u64, file: &File, length: u64) -> io::Result<()> {
        match self.paths.get(&number) {
            Some(path) => self.journal.lock().before_resize(number, path, file, length),
            None => Ok(()),
        }
    }

    fn rename_known(&mut self, from: &Path, to: &Path) {
        self.numbers.remove(to);
        let moved: Vec<(u64, PathBuf)> = self
            .paths
            .iter()
            .filter_map(|(number, path)| Some((*number, path.strip_prefix(from).ok()?.to_owned())))
            .collect();
        for (number, rest) in moved {
            let fresh = if rest.as_os_str().is_empty() { to.to_owned() } else { to.join(rest) };
            if let Some(old) = self.paths.insert(number, fresh.clone()) {
                self.numbers.remove(&old);
            }
            self.numbers.insert(fresh, number);
        }
    }

    /// Syncs: at once, later, not at all, or with an error. The answer comes from a thread of
    /// its own, so that a slow sync holds up nothing else.
    fn sync(&self, number: Option<u64>, reply: ReplyEmpty) {
        let (faults, journal) = (self.faults.clone(), self.journal.clone());
        let sync = move || {
            if faults.sync_fails.load(Ordering::Relaxed) {
                return reply.error(libc::EIO);
            }
            if !faults.sync_lies.load(Ordering::Relaxed) {
                journal.lock().synced(number);
            }
            reply.ok();
        };
        let delay = self.faults.delay();
        if delay.is_zero() {
            // The machine itself does not fail here: the folder below needs no sync.
            sync();
        } else {
            std::thread::spawn(move || {
                std::thread::sleep(delay);
                sync();
            });
        }
    }
}

fn attributes(number: u64, metadata: &Metadata) -> FileAttr {
    let time = |seconds: i64, nanos: i64| {
        UNIX_EPOCH + Duration::new(u64::try_from(seconds).unwrap_or(0), u32::try_from(nanos).unwrap_or(0))
    };
    FileAttr {
        ino: number,
        size: metadata.len(),
        blocks: metadata.blocks(),
        atime: time(metadata.atime(), metadata.atime_nsec()),
        mtime: time(metadata.mtime(), metadata.mtime_nsec()),
        ctime: time(metadata.ctime(), metadata.ctime_nsec()),
        crtime: UNIX_EPOCH,
        kind: if metadata.is_dir() { FileType::Directory } else { FileType::RegularFile },
        perm: (metadata.permissions().mode() & 0o7777) as u16,
        nlink: metadata.nlink() as u32,
        uid: metadata.uid(),
        gid: metadata.gid(),
        rdev: 0,
        blksize: 4096,
        flags: 0,
    }
}

impl Filesystem for Passthrough {
    fn lookup(&mut self, _: &Request<'_>, parent: u64, name: &OsStr, reply: ReplyEntry) {
        let path = answer!(reply, self.child(parent, name));
        let attributes = answer!(reply, self.attributes(&path));
        reply.entry(&TTL, &attributes, 0);
    }

    fn getattr(&mut self, _: &Request<'_>, number: u64, handle: Option<u64>, reply: ReplyAttr) {
        // A file that was removed and is still open has no path any more.
        let metadata = match handle.and_then(|handle| self.file(handle).ok()) {
            Some(file) => file.metadata(),
            None => self.path(number).and_then(std::fs::symlink_metadata),
        };
        let metadata = answer!(reply, metadata);
        reply.attr(&TTL, &attributes(number, &metadata));
    }

    fn setattr(
        &mut self,
        _: &Request<'_>,
        number: u64,
        mode: Option<u32>,
        _: Option<u32>,
        _: Option<u32>,
        size: Option<u64>,
        _: Option<TimeOrNow>,
        _: Option<TimeOrNow>,
        _: Option<SystemTime>,
        handle: Option<u64>,
        _: Option<SystemTime>,
        _: Option<SystemTime>,
        _: Option<SystemTime>,
        _: Option<u32>,
        reply: ReplyAttr,
    ) {
        let file = match handle.and_then(|handle| self.file(handle).ok()) {
            Some(file) => file,
            None => {
                let path = answer!(reply, self.path(number));
                Arc::new(answer!(reply, OpenOptions::new().read(true).write(size.is_some()).open(path)))
            }
        };
        if let Some(size) = size {
            answer!(reply, self.note_resize(number, &file, size));
            answer!(reply, file.set_len(size));
        }
        if let Some(mode) = mode {
            answer!(reply, file.set_permissions(std::fs::Permissions::from_mode(mode)));
        }
        let metadata = answer!(reply, file.metadata());
        reply.attr(&TTL, &attributes(number, &metadata));
    }

    fn mkdir(
        &mut self,
        _: &Request<'_>,
        parent: u64,
        name: &OsStr,
        mode: u32,
        umask: u32,
        reply: ReplyEntry,
    ) {
        let path = answer!(reply, self.child(parent, name));
        answer!(reply, std::fs::DirBuilder::new().mode(mode & !umask).create(&path));
        self.journal.lock().created(&path);
        let attributes = answer!(reply, self.attributes(&path));
        reply.entry(&TTL, &attributes, 0);
    }

    fn unlink(&mut self, _: &Request<'_>, parent: u64, name: &OsStr, reply: ReplyEmpty) {
        let path = answer!(reply, self.child(parent, name));
        answer!(reply, self.journal.lock().remove(&path));
        self.forget_name(&path);
        reply.ok();
    }

    fn rmdir(&mut self, _: &Request<'_>, parent: u64, name: &OsStr, reply: ReplyEmpty) {
        let path = answer!(reply, self.child(parent, name));
        answer!(reply, self.journal.lock().remove_folder(&path));
        self.forget_name(&path);
        reply.ok();
    }

    fn rename(
        &mut self,
        _: &Request<'_>,
        parent: u64,
        name: &OsStr,
        new_parent: u64,
        new_name: &OsStr,
        flags: u32,
        reply: ReplyEmpty,
    ) {
        let from = answer!(reply, self.child(parent, name));
        let to = answer!(reply, self.child(new_parent, new_name));
        if flags & libc::RENAME_EXCHANGE != 0 {
            return reply.error(libc::EINVAL);
        }
        if flags & libc::RENAME_NOREPLACE != 0 && to.exists() {
            return reply.error(libc::EEXIST);
        }
        answer!(reply, self.journal.lock().rename(&from, &to));
        self.rename_known(&from, &to);
        reply.ok();
    }

    fn open(&mut self, _: &Request<'_>, number: u64, flags: i32, reply: ReplyOpen) {
        let path = answer!(reply, self.path(number));
        let writes = flags & libc::O_ACCMODE != libc::O_RDONLY;
        let file = answer!(reply, OpenOptions::new().read(true).write(writes).open(&path));
        if flags & libc::O_TRUNC != 0 {
            answer!(reply, self.note_resize(number, &file, 0));
            answer!(reply, file.set_len(0));
        }
        reply.opened(self.opened(file), 0);
    }

    fn create(
        &mut self,
        _: &Request<'_>,
        parent: u64,
        name: &OsStr,
        mode: u32,
        umask: u32,
        _: i32,
        reply: ReplyCreate,
    ) {
        let path = answer!(reply, self.child(parent, name));
        let mut options = OpenOptions::new();
        options.read(true).write(true).create_new(true).mode(mode & !umask);
        let file = answer!(reply, options.open(&path));
        self.journal.lock().created(&path);
        let attributes = answer!(reply, self.attributes(&path));
        reply.created(&TTL, &attributes, 0, self.opened(file), 0);
    }

    fn read(
        &mut self,
        _: &Request<'_>,
        _: u64,
        handle: u64,
        offset: i64,
        size: u32,
        _: i32,
        _: Option<u64>,
        reply: ReplyData,
    ) {
        let file = answer!(reply, self.file(handle));
        let mut bytes = vec![0; size as usize];
        let mut have = 0;
        while have < bytes.len() {
            match answer!(reply, file.read_at(&mut bytes[have..], offset as u64 + have as u64)) {
                0 => break,
                more => have += more,
            }
        }
        reply.data(&bytes[..have]);
    }

    fn write(
        &mut self,
        _: &Request<'_>,
        number: u64,
        handle: u64,
        offset: i64,
        bytes: &[u8],
        _: u32,
        _: i32,
        _: Option<u64>,
        reply: ReplyWrite,
    ) {
        let file = answer!(reply, self.file(handle));
        answer!(reply, self.note(number, &file, offset as u64, bytes.len() as u64));
        answer!(reply, file.write_all_at(bytes, offset as u64));
        reply.written(bytes.len() as u32);
    }

    #[expect(unsafe_code, reason = "std has no fallocate")]
    fn fallocate(
        &mut self,
        _: &Request<'_>,
        number: u64,
        handle: u64,
        offset: i64,
        length: i64,
        mode: i32,
        reply: ReplyEmpty,
    ) {
        let file = answer!(reply, self.file(handle));
        answer!(reply, self.note(number, &file, offset as u64, length as u64));
        // SAFETY: fallocate touches no memory, and the descriptor is open.
        let done = unsafe { libc::fallocate(file.as_raw_fd(), mode, offset, length) };
        match done {
            0 => reply.ok(),
            _ => reply.error(code(&io::Error::last_os_error())),
        }
    }

    fn flush(&mut self, _: &Request<'_>, _: u64, _: u64, _: u64, reply: ReplyEmpty) {
        reply.ok();
    }

    fn release(
        &mut self,
        _: &Request<'_>,
        _: u64,
        handle: u64,
        _: i32,
        _: Option<u64>,
        _: bool,
        reply: ReplyEmpty,
    ) {
        self.open.remove(&handle);
        reply.ok();
    }

    fn fsync(&mut self, _: &Request<'_>, number: u64, _: u64, _: bool, reply: ReplyEmpty) {
        self.sync(Some(number), reply);
    }

    fn fsyncdir(&mut self, _: &Request<'_>, _: u64, _: u64, _: bool, reply: ReplyEmpty) {
        self.sync(None, reply);
    }

    fn readdir(&mut self, _: &Request<'_>, number: u64, _: u64, offset: i64, mut reply: ReplyDirectory) {
        let path = answer!(reply, self.path(number));
        let mut entries: Vec<(u64, FileType, std::ffi::OsString)> =
            vec![(number, FileType::Directory, ".".into()), (number, FileType::Directory, "..".into())];
        let listed: io::Result<Vec<std::fs::DirEntry>> =
            std::fs::read_dir(&path).and_then(|listed| listed.collect());
        let mut listed = answer!(reply, listed);
        listed.sort_by_key(std::fs::DirEntry::file_name);
        for entry in listed {
            let is_folder = answer!(reply, entry.file_type()).is_dir();
            let kind = if is_folder { FileType::Directory } else { FileType::RegularFile };
            entries.push((self.number(&entry.path()), kind, entry.file_name()));
        }
        for (at, (number, kind, name)) in entries.into_iter().enumerate().skip(offset as usize) {
            if reply.add(number, at as i64 + 1, kind, name) {
                break;
            }
        }
        reply.ok();
    }

    fn statfs(&mut self, _: &Request<'_>, _: u64, reply: ReplyStatfs) {
        let path = answer!(reply, self.path(ROOT));
        match nix::sys::statvfs::statvfs(&path) {
            Ok(stat) => reply.statfs(
                stat.blocks(),
                stat.blocks_free(),
                stat.blocks_available(),
                stat.files(),
                stat.files_free(),
                stat.block_size() as u32,
                stat.name_max() as u32,
                stat.fragment_size() as u32,
            ),
            Err(error) => reply.error(error as i32),
        }
    }
}
