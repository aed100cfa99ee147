//! Where the binary under test is.

use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result, ensure};

/// The binary under test: `SHOAL_BIN`, or the one beside the tests.
///
/// # Errors
/// When there is none.
pub fn binary() -> Result<PathBuf> {
    let path = match std::env::var_os("SHOAL_BIN") {
        Some(path) => PathBuf::from(path),
        None => target_dir()?.join("shoal"),
    };
    ensure!(path.is_file(), "{} does not exist: build it first (cargo build --release)", path.display());
    Ok(path)
}

/// The directory of the profile that the tests were built with, such as `target/release`.
///
/// # Errors
/// When the tests do not run from where Cargo puts them.
pub fn target_dir() -> Result<PathBuf> {
    let tests = std::env::current_exe()?;
    let dir = tests.parent().and_then(Path::parent);
    Ok(dir.context("the tests do not run from target/PROFILE/deps")?.to_owned())
}

/// A command of the binary that sees none of the caller's `SHOAL_…` settings.
///
/// # Errors
/// When there is no binary.
pub fn shoal(subcommand: &str) -> Result<Command> {
    let mut command = Command::new(binary()?);
    for (name, _) in std::env::vars_os() {
        if name.to_string_lossy().starts_with("SHOAL_") {
            command.env_remove(name);
        }
    }
    command.arg(subcommand);
    Ok(command)
}
