//! Where the binary under test is.

use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result, ensure};

/// The binary under test: `SHOAL_BIN`, or the one beside the tests. Its path is absolute and has no
/// symbolic links, so that it means the same wherever a launcher runs it.
///
/// # Errors
/// When there is none.
pub fn binary() -> Result<PathBuf> {
    let path = match std::env::var_os("SHOAL_BIN") {
        Some(path) => PathBuf::from(path),
        None => target_dir()?.join("shoal"),
    };
    ensure!(path.is_file(), "{} does not exist: build it first (cargo build --release)", path.display());
    Ok(path.canonicalize()?)
}

/// The directory of the profile that this program was built with, such as `target/release`. The
/// benchmarks run from there, tests from `deps` below it.
///
/// # Errors
/// When this program does not run from where Cargo puts it.
pub fn target_dir() -> Result<PathBuf> {
    let program = std::env::current_exe()?;
    let is_profile = |dir: &&Path| !dir.ends_with("deps");
    let dir = program.ancestors().skip(1).find(is_profile);
    Ok(dir.context("this program does not run from target/PROFILE")?.to_owned())
}

/// A command of the binary that sees none of the caller's `SHOAL_…` settings.
///
/// # Errors
/// When there is no binary.
pub fn shoal(subcommand: &str) -> Result<Command> {
    shoal_under(&[], subcommand)
}

/// The same, run by another command that becomes it, such as `ip netns exec NAME`.
///
/// # Errors
/// When there is no binary.
pub fn shoal_under(launcher: &[String], subcommand: &str) -> Result<Command> {
    let mut command = match launcher {
        [] => Command::new(binary()?),
        [program, arguments @ ..] => {
            let mut command = Command::new(program);
            command.args(arguments).arg(binary()?);
            command
        }
    };
    for (name, _) in std::env::vars_os() {
        if name.to_string_lossy().starts_with("SHOAL_") {
            command.env_remove(name);
        }
    }
    command.arg(subcommand);
    Ok(command)
}
