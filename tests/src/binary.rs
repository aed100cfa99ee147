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

/// The binary of an earlier build, which `SHOAL_OLD_BIN` names; none when it is not set.
///
/// # Errors
/// When it names no file.
pub fn old_binary() -> Result<Option<PathBuf>> {
    let Some(path) = std::env::var_os("SHOAL_OLD_BIN").map(PathBuf::from) else { return Ok(None) };
    ensure!(path.is_file(), "SHOAL_OLD_BIN: {} does not exist", path.display());
    Ok(Some(path.canonicalize()?))
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
    Ok(shoal_under(&binary()?, &[], subcommand))
}

/// The same of any binary, run by another command that becomes it, such as `ip netns exec NAME`.
pub fn shoal_under(binary: &Path, launcher: &[String], subcommand: &str) -> Command {
    let mut command = match launcher {
        [] => Command::new(binary),
        [program, arguments @ ..] => {
            let mut command = Command::new(program);
            command.args(arguments).arg(binary);
            command
        }
    };
    for (name, _) in std::env::vars_os() {
        if name.to_string_lossy().starts_with("SHOAL_") {
            command.env_remove(name);
        }
    }
    command.arg(subcommand);
    command
}
