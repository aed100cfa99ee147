//! What openraft and this crate run on: tokio. In this crate's tests its randomness has a seed and
//! blocking work is done in place, so that a simulation runs again exactly as it ran before.

use std::io;

/// The runtime of every group.
#[cfg(not(test))]
pub type Runtime = openraft::TokioRuntime;

/// The runtime of every group.
#[cfg(test)]
pub type Runtime = crate::simulation::Seeded;

/// Does work that blocks, away from the threads that run everything else.
///
/// # Errors
/// Those of the work, and when it has panicked.
#[cfg(not(test))]
pub(crate) async fn blocking<T: Send + 'static>(
    work: impl FnOnce() -> io::Result<T> + Send + 'static,
) -> io::Result<T> {
    tokio::task::spawn_blocking(work).await.map_err(io::Error::other)?
}

/// Does work that blocks.
#[cfg(test)]
pub(crate) async fn blocking<T: Send + 'static>(
    work: impl FnOnce() -> io::Result<T> + Send + 'static,
) -> io::Result<T> {
    work()
}
