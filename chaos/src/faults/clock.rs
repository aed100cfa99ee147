//! Wall clocks that can be set while a node runs, by libfaketime; its monotonic clock stays.
//!
//! Whether a clock has jumped is asked of the node itself: `GET /cluster` says what time it is there.
//! The `Date` header does not: hyper writes it again when the next second has come, which after a
//! jump back is an hour later.

use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use anyhow::{Context, Result, ensure};
use shoal_tests::{Client, Request};

/// How long a node may take to say what time it is.
const ASK_LIMIT: Duration = Duration::from_secs(10);

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

/// How far a node's wall clock is ahead of this machine's by its own word, in seconds.
///
/// # Errors
/// When it does not answer, or does not say what time it is.
pub async fn seconds_ahead(client: &Client) -> Result<i64> {
    let client = client.clone().with_limits(ASK_LIMIT, ASK_LIMIT);
    let status = client.json(&Request::get("/cluster")).await?;
    let told = status["result"]["consensus_thread_status"]["last_update"].as_str();
    let told = told.context("the node does not say what time it is")?;
    let told_seconds = parse(told).with_context(|| format!("{told:?} is not a time"))?;
    Ok(told_seconds - i64::try_from(seconds_since_1970())?)
}

/// This machine's wall clock.
pub fn seconds_since_1970() -> u64 {
    #[expect(
        clippy::disallowed_methods,
        reason = "dates are for people, and nodes' clocks are compared with it"
    )]
    let now = SystemTime::now();
    now.duration_since(UNIX_EPOCH).map_or(0, |since| since.as_secs())
}

/// The seconds since 1970 of a time in UTC and whole seconds, as RFC 3339 writes it.
fn parse(time: &str) -> Option<i64> {
    let (date, clock) = time.strip_suffix('Z')?.split_once('T')?;
    let [year, month, day] = numbers(date, '-')?;
    let [hour, minute, second] = numbers(clock, ':')?;
    // Hinnant, "chrono-compatible low-level date algorithms": a year begins in March, so that the
    // day that it may have more is its last one.
    let (year, month) = if month > 2 { (year, month - 3) } else { (year - 1, month + 9) };
    let leap_days = year.div_euclid(4) - year.div_euclid(100) + year.div_euclid(400);
    let days = 365 * year + leap_days + (153 * month + 2) / 5 + day - 1 - 719_468;
    Some(86_400 * days + 3_600 * hour + 60 * minute + second)
}

fn numbers(text: &str, between: char) -> Option<[i64; 3]> {
    let numbers: Option<Vec<i64>> = text.split(between).map(|number| number.parse().ok()).collect();
    numbers?.try_into().ok()
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
    fn a_time_is_read() {
        assert_eq!(parse("1970-01-01T00:00:00Z"), Some(0));
        assert_eq!(parse("2000-02-29T23:59:59Z"), Some(951_868_799));
        assert_eq!(parse("2026-11-22T07:41:20Z"), Some(1_795_333_280));
        assert_eq!(parse("yesterday"), None);
    }

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
