//! Python programs that tests drive: what they need is installed once by pip into a virtual environment
//! in Cargo's target directory.

use std::ffi::OsStr;
use std::path::{Path, PathBuf};
use std::process::{Output, Stdio};
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use tokio::process::Command;
use tokio::sync::Mutex;

use crate::binary::target_dir;

/// How long pip may take.
const INSTALL_TIMEOUT: Duration = Duration::from_secs(300);

/// The folder of the scripts and of the lists of what they need.
pub fn scripts() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("python")
}

/// The Python of an environment that has what a list of requirements in [`scripts`] names. It is made
/// anew when the list has changed, and only once however many tests ask.
///
/// # Errors
/// When that is not possible here: a reason to skip.
pub async fn environment(requirements: &str) -> Result<PathBuf> {
    static ONE_AT_A_TIME: Mutex<()> = Mutex::const_new(());
    let _alone = ONE_AT_A_TIME.lock().await;
    let requirements = scripts().join(requirements);
    let wanted = std::fs::read(&requirements).with_context(|| requirements.display().to_string())?;
    let hash = blake3::hash(&wanted).to_hex();
    let dir = target_dir()?.join(format!("python-{}", &hash.as_str()[..16]));
    let (python, done) = (dir.join("bin/python"), dir.join("complete"));
    if done.is_file() {
        return Ok(python);
    }
    succeed(
        Path::new("python3"),
        ["-m", "venv", "--clear"].map(OsStr::new).into_iter().chain([dir.as_os_str()]),
    )
    .await?;
    let install = ["-m", "pip", "install", "--quiet", "--disable-pip-version-check", "-r"].map(OsStr::new);
    succeed(&python, install.into_iter().chain([requirements.as_os_str()])).await?;
    std::fs::write(done, "")?;
    Ok(python)
}

async fn succeed(program: &Path, arguments: impl IntoIterator<Item: AsRef<OsStr>>) -> Result<()> {
    let output = output(program, arguments, INSTALL_TIMEOUT).await?;
    let said = String::from_utf8_lossy(&output.stderr);
    let reason = said.lines().last().unwrap_or("no reason given");
    ensure!(output.status.success(), "{} failed: {reason}", program.display());
    Ok(())
}

/// Runs a program to its end.
///
/// # Errors
/// When it does not run, or does not end in time.
pub async fn output(
    program: &Path,
    arguments: impl IntoIterator<Item: AsRef<OsStr>>,
    timeout: Duration,
) -> Result<Output> {
    let mut command = Command::new(program);
    command.args(arguments).stdin(Stdio::null()).kill_on_drop(true);
    let output = tokio::time::timeout(timeout, command.output()).await;
    let output = output.with_context(|| format!("{} took longer than {timeout:?}", program.display()))?;
    output.with_context(|| format!("{} does not run", program.display()))
}
