//! Files that are durable, or are not there.

use std::fs::File;
use std::io::{self, Write as _};
use std::path::Path;
use std::time::{Duration, Instant};

/// How often a lock that is still held is tried again.
const LOCK_PAUSE: Duration = Duration::from_millis(5);

/// fsyncs a directory, so that the names in it are durable.
pub fn sync_dir(dir: &Path) -> io::Result<()> {
    File::open(dir)?.sync_all()
}

/// Replaces a file's content durably and in one step: a crash leaves the old content or the new.
pub fn replace(path: &Path, content: &[u8]) -> io::Result<()> {
    let mut fresh = path.as_os_str().to_owned();
    fresh.push(".fresh");
    let mut file = File::create(&fresh)?;
    file.write_all(content)?;
    file.sync_all()?;
    std::fs::rename(&fresh, path)?;
    sync_dir(path.parent().unwrap_or(Path::new(".")))
}

/// Waits until nobody holds the lock on a file, if there is such a file.
///
/// # Errors
/// Would block, when it is still held after `limit`.
pub(crate) fn wait_until_unlocked(path: &Path, limit: Duration) -> io::Result<()> {
    let file = match File::options().read(true).write(true).open(path) {
        Ok(file) => file,
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(()),
        Err(error) => return Err(error),
    };
    let end = Instant::now() + limit;
    loop {
        match file.try_lock() {
            Ok(()) => return file.unlock(),
            Err(std::fs::TryLockError::WouldBlock) if Instant::now() < end => std::thread::sleep(LOCK_PAUSE),
            Err(error) => return Err(error.into()),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_file_has_its_old_content_or_its_new() {
        let dir = tempfile::tempdir().expect("a directory");
        let path = dir.path().join("a.json");
        replace(&path, b"one").expect("written");
        replace(&path, b"two").expect("written");
        assert_eq!(std::fs::read(&path).expect("readable"), b"two");
        assert_eq!(std::fs::read_dir(dir.path()).expect("readable").count(), 1);
    }

    #[test]
    fn a_lock_is_waited_for_and_not_for_ever() {
        let dir = tempfile::tempdir().expect("a directory");
        let path = dir.path().join("db");
        wait_until_unlocked(&path, Duration::ZERO).expect("no file, no lock");
        let holder = File::create(&path).expect("made");
        holder.lock().expect("free");
        let refused = wait_until_unlocked(&path, Duration::from_millis(20)).expect_err("held");
        assert_eq!(refused.kind(), io::ErrorKind::WouldBlock);
        let release = std::thread::spawn(move || {
            std::thread::sleep(Duration::from_millis(30));
            drop(holder);
        });
        wait_until_unlocked(&path, Duration::from_secs(10)).expect("let go");
        release.join().expect("ended");
    }
}
