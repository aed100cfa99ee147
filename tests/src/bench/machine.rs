//! What a measurement was made on: without that, no number means anything.

use std::fs;
use std::io::Write;
use std::path::Path;
use std::process::Command;
use std::time::{Duration, Instant};

use anyhow::Result;

/// The facts at the top of a report, with their names.
pub fn describe() -> Vec<(&'static str, String)> {
    let cores = std::thread::available_parallelism().map_or(1, usize::from);
    let cpu = line_of("/proc/cpuinfo", "model name").unwrap_or_else(|| "unknown CPU".into());
    let memory = line_of("/proc/meminfo", "MemTotal").unwrap_or_else(|| "unknown".into());
    let kernel = fs::read_to_string("/proc/sys/kernel/osrelease").unwrap_or_default();
    let date = Command::new("date").args(["-u", "+%Y-%m-%d %H:%M UTC"]).output();
    let date = date.map(|output| String::from_utf8_lossy(&output.stdout).trim().to_owned());
    let command: Vec<String> = std::env::args().collect();
    vec![
        ("machine", format!("{cpu}, {cores} cores, {memory} of memory, Linux {}", kernel.trim())),
        ("disk", file_system(&std::env::temp_dir())),
        ("date", date.unwrap_or_else(|_| "unknown".into())),
        ("command", command.join(" ")),
    ]
}

/// How long it takes to make 4 KiB durable where the nodes keep their data, in order of length.
/// Every acknowledged write waits for at least one of these.
pub(super) fn sync_times(rounds: usize) -> Result<Vec<Duration>> {
    let mut file = tempfile::tempfile()?;
    let mut times = Vec::with_capacity(rounds);
    for _ in 0..rounds {
        file.write_all(&[7; 4096])?;
        let started = Instant::now();
        file.sync_data()?;
        times.push(started.elapsed());
    }
    times.sort_unstable();
    Ok(times)
}

/// What follows the colon in the first line that begins with a name.
fn line_of(file: &str, name: &str) -> Option<String> {
    let text = fs::read_to_string(file).ok()?;
    let line = text.lines().find(|line| line.starts_with(name))?;
    Some(line.split_once(':')?.1.trim().to_owned())
}

fn file_system(dir: &Path) -> String {
    let mounts = fs::read_to_string("/proc/mounts").unwrap_or_default();
    let fields = mounts.lines().map(|line| line.split(' ').collect::<Vec<_>>());
    let holding = fields.filter(|fields| fields.len() > 2 && dir.starts_with(fields[1]));
    match holding.max_by_key(|fields| fields[1].len()) {
        Some(fields) => format!("{} ({}) under {}", fields[2], fields[0], dir.display()),
        None => format!("unknown, under {}", dir.display()),
    }
}
