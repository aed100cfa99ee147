//! Wall clocks that can be set while a node runs, by libfaketime; its monotonic clock stays.

use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result, ensure};

/// Where distributions put the library: below these folders, in one for each architecture or not.
const ROOTS: [&str; 3] = ["/usr/lib", "/usr/lib64", "/usr/local/lib"];
const LIBRARY: &str = "faketime/libfaketime.so.1";

/// One node's wall clock: a file that says how wrong it is.
pub struct Clock {
    library: PathBuf,
    file: PathBuf,
}

impl Clock {
    /// A clock that is right, in a file of its own.
    ///
    /// # Errors
    /// When the library is missing.
    pub fn create(file: &Path) -> Result<Clock> {
        let clock = Clock { library: library()?, file: file.to_owned() };
        clock.set(0.0)?;
        Ok(clock)
    }

    /// How far it is ahead from now on.
    ///
    /// # Errors
    /// When the file cannot be replaced.
    pub fn set(&self, seconds: f64) -> Result<()> {
        // A node must never read a half of it.
        let fresh = self.file.with_extension("fresh");
        std::fs::write(&fresh, format!("{seconds:+.3}\n"))?;
        Ok(std::fs::rename(&fresh, &self.file)?)
    }

    /// The command that runs another one by this clock.
    pub fn launcher(&self) -> Vec<String> {
        let settings = [
            ("LD_PRELOAD", self.library.display().to_string()),
            ("FAKETIME_TIMESTAMP_FILE", self.file.display().to_string()),
            ("FAKETIME_NO_CACHE", "1".to_owned()),
            ("FAKETIME_DONT_FAKE_MONOTONIC", "1".to_owned()),
        ];
        let settings = settings.iter().map(|(name, value)| format!("{name}={value}"));
        ["env".to_owned()].into_iter().chain(settings).collect()
    }
}

fn library() -> Result<PathBuf> {
    let below =
        |root: &&str| std::fs::read_dir(root).into_iter().flatten().flatten().map(|entry| entry.path());
    let folders = ROOTS.iter().map(PathBuf::from).chain(ROOTS.iter().flat_map(below));
    let found = folders.map(|folder| folder.join(LIBRARY)).find(|path| path.is_file());
    found.context("libfaketime is not installed (the package libfaketime)")
}

/// Whether a clock can be set here.
///
/// # Errors
/// The reason, for a report.
pub fn probe() -> Result<()> {
    let dir = tempfile::tempdir()?;
    let clock = Clock::create(&dir.path().join("clock"))?;
    let now = || -> Result<i64> {
        let launcher = clock.launcher();
        let (program, arguments) = launcher.split_first().context("no command")?;
        let output = Command::new(program).args(arguments).args(["date", "+%s"]).output()?;
        Ok(String::from_utf8_lossy(&output.stdout).trim().parse()?)
    };
    let before = now()?;
    clock.set(-3600.0)?;
    let after = now()?;
    ensure!(
        (3500..3700).contains(&(before - after)),
        "the clock went from {before} to {after}, not back by an hour"
    );
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_clock_says_how_wrong_it_is() {
        if library().is_err() {
            return;
        }
        let dir = tempfile::tempdir().expect("a directory");
        let file = dir.path().join("clock");
        let clock = Clock::create(&file).expect("made");
        clock.set(-3600.0).expect("set");
        assert_eq!(std::fs::read_to_string(&file).expect("there"), "-3600.000\n");
        assert_eq!(clock.launcher().first().map(String::as_str), Some("env"));
    }
}
