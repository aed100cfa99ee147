//! Where the shared test data is.

use std::path::{Path, PathBuf};

/// The folder with the shared test data: `data` in `SHOAL_SHARED`, or in `../shared` as seen from
/// the workspace.
pub fn data() -> PathBuf {
    let shared = std::env::var_os("SHOAL_SHARED").map(PathBuf::from);
    let beside = || Path::new(env!("CARGO_MANIFEST_DIR")).join("../../shared");
    shared.unwrap_or_else(beside).join("data")
}
