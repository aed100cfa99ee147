//! Where a snapshot is that is to be recovered: one of the backup target's own, a file in the target's
//! directory, or what an HTTP server has.
//!
//! Whoever has the key can make a node send requests, as with Qdrant: to any address that the node reaches. So a
//! node follows no redirects, uses no proxy, sends no key but the one that it was told to send, and waits for a
//! limited time. What it tells of a server is whether it was reached, with the reason when it was not, and its
//! status; of what came, why that is no snapshot, which names the first file of an archive that does not belong there,
//! and otherwise nothing of its content.
//!
//! Of files only those are opened that lie in the directory of `backup.target`, wherever links may lead. Whoever can
//! change that directory while a file is being opened can have another one opened.

use std::path::{Path, PathBuf};
use std::time::Duration;

use bytes::Bytes;
use futures::TryStreamExt;
use reqwest::Url;
use reqwest::redirect::Policy;
use shoal_actors::backup::Receipt;
use shoal_proto::Error;
use tokio::io::AsyncReadExt;

/// How long a server may take to take the connection, and between two pieces of what it sends.
const CONNECT_TIMEOUT: Duration = Duration::from_secs(10);
const READ_TIMEOUT: Duration = Duration::from_secs(30);
/// How long all of it may take.
const FETCH_TIMEOUT: Duration = Duration::from_secs(6 * 3600);
/// Bytes that are read of a file at a time.
const PIECE_BYTES: usize = 1 << 20;

/// Where a snapshot is.
#[derive(Clone, Debug, PartialEq)]
pub(super) enum Location {
    /// In the backup target, by its name.
    Kept(String),
    /// In a file.
    File(PathBuf),
    /// On a server.
    Web(Url),
}

impl Location {
    /// Reads a location: the name of a snapshot, `file:///…`, `http://…` or `https://…`.
    ///
    /// # Errors
    /// Invalid argument.
    pub(super) fn parse(text: &str) -> Result<Location, Error> {
        if text.is_empty() {
            return Err(wrong("is empty"));
        }
        if !text.contains(':') {
            return Ok(Location::Kept(text.to_owned()));
        }
        let url = Url::parse(text).map_err(wrong)?;
        match url.scheme() {
            "file" => {
                url.to_file_path().map(Location::File).map_err(|()| wrong("is no path of this machine"))
            }
            "http" | "https" if !url.username().is_empty() || url.password().is_some() => {
                Err(wrong("a name and a password do not go into a URL; there is `api_key`"))
            }
            "http" | "https" => Ok(Location::Web(url)),
            _ => Err(wrong("expected the name of a snapshot, file://, http:// or https://")),
        }
    }
}

fn wrong(reason: impl std::fmt::Display) -> Error {
    Error::invalid("location", reason)
}

/// Brings a file of the backup target's directory.
///
/// # Errors
/// Invalid, when it lies elsewhere or does not exist, which is not told apart; and as [`Receipt::write`].
pub(super) async fn read(path: PathBuf, target: &str, receipt: &mut Receipt) -> Result<(), Error> {
    let target = PathBuf::from(target);
    let opened = tokio::task::spawn_blocking(move || open_within(&path, &target));
    let file = opened.await.map_err(Error::internal)?.ok_or_else(|| {
        wrong("there is no such file in the directory of backup.target, and only those there are read")
    })?;
    let mut file = tokio::fs::File::from_std(file);
    loop {
        let mut piece = vec![0; PIECE_BYTES];
        let count = file.read(&mut piece).await.map_err(|error| wrong(format!("cannot be read: {error}")))?;
        if count == 0 {
            return Ok(());
        }
        piece.truncate(count);
        receipt.write(Bytes::from(piece)).await?;
    }
}

/// Opens a regular file that lies in a directory, wherever links may lead.
fn open_within(path: &Path, dir: &Path) -> Option<std::fs::File> {
    let dir = dir.is_absolute().then(|| dir.canonicalize().ok())??;
    let path = path.canonicalize().ok().filter(|path| path.starts_with(&dir) && path.is_file())?;
    std::fs::File::open(path).ok()
}

/// Brings what a server has.
///
/// # Errors
/// Invalid, when the server is not reached, answers with anything but 200, or is too slow; and as
/// [`Receipt::write`].
pub(super) async fn fetch(url: Url, api_key: Option<String>, receipt: &mut Receipt) -> Result<(), Error> {
    let fetching = tokio::time::timeout(FETCH_TIMEOUT, try_fetch(url, api_key, receipt));
    fetching.await.unwrap_or_else(|_| Err(wrong(format!("not fetched within {FETCH_TIMEOUT:?}"))))
}

async fn try_fetch(url: Url, api_key: Option<String>, receipt: &mut Receipt) -> Result<(), Error> {
    let client = reqwest::Client::builder()
        .connect_timeout(CONNECT_TIMEOUT)
        .read_timeout(READ_TIMEOUT)
        .redirect(Policy::none())
        .no_proxy()
        .build()
        .map_err(Error::internal)?;
    let failed = |error: reqwest::Error| wrong(format!("cannot be fetched: {}", error.without_url()));
    let mut request = client.get(url);
    if let Some(key) = api_key {
        request = request.header("api-key", key);
    }
    let answer = request.send().await.map_err(failed)?;
    if answer.status() != reqwest::StatusCode::OK {
        return Err(wrong(format!("cannot be fetched: the server answers {}", answer.status())));
    }
    let mut pieces = answer.bytes_stream();
    while let Some(piece) = pieces.try_next().await.map_err(failed)? {
        receipt.write(piece).await?;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn locations_are_names_files_and_servers() {
        let parse = |text: &str| Location::parse(text);
        assert_eq!(parse("c-1.snapshot"), Ok(Location::Kept("c-1.snapshot".into())));
        assert_eq!(parse("file:///a/b%20c"), Ok(Location::File("/a/b c".into())));
        assert!(matches!(parse("http://n1:6333/collections/c/snapshots/x"), Ok(Location::Web(_))));
        assert!(matches!(parse("https://n1/x"), Ok(Location::Web(_))));
        for bad in ["", "ftp://a/b", "file://elsewhere/a", "http://", "http://name:secret@n1/x", "data:,x"] {
            let refused = parse(bad).expect_err(bad);
            assert_eq!(refused.field.as_deref(), Some("location"), "{bad}");
        }
    }

    #[test]
    fn only_files_of_the_directory_are_opened() {
        let dir = tempfile::tempdir().expect("a directory");
        let (inside, outside) = (dir.path().join("target"), dir.path().join("secret"));
        std::fs::create_dir(&inside).expect("made");
        std::fs::write(inside.join("a"), b"x").expect("written");
        std::fs::write(&outside, b"x").expect("written");
        std::os::unix::fs::symlink(&outside, inside.join("link")).expect("linked");
        assert!(open_within(&inside.join("a"), &inside).is_some());
        for path in
            [outside, inside.join("../secret"), inside.join("link"), inside.join("no"), inside.clone()]
        {
            assert!(open_within(&path, &inside).is_none(), "{}", path.display());
        }
        // Without a target, or with one that is no directory.
        assert!(open_within(&inside.join("a"), Path::new("")).is_none());
        assert!(open_within(&inside.join("a"), Path::new("s3://bucket")).is_none());
    }
}
