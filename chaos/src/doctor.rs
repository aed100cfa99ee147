//! Which faults this machine can do, found out by doing them once.

use std::process::Command;

use anyhow::{Context, Result, ensure};

use crate::disk::Disk;
use crate::faults::{Need, clock, containers, crash, limits};
use crate::shell;

/// Whether a need can be met, or why not.
///
/// # Errors
/// The reason, for a report.
pub fn probe(need: Need) -> Result<()> {
    match need {
        // Whether there is an earlier build does not depend on the machine.
        Need::Nothing | Need::OldBinary => Ok(()),
        Need::Containers => containers::probe(),
        Need::Net => probe_net(false),
        Need::Cables => probe_net(true),
        Need::Clock => clock::probe(),
        Need::BreakableDisk => probe_disk(),
        Need::SmallDisk => probe_small_disk(),
        Need::Limits => limits::probe(),
        Need::CrashPoints => crash::probe(),
    }
}

/// The network is made by another process, because whoever makes it moves into it.
fn probe_net(with_cables: bool) -> Result<()> {
    let mut command = Command::new(std::env::current_exe()?);
    command.arg("probe-net").args(with_cables.then_some("--cables"));
    let output = command.output()?;
    let complaint = String::from_utf8_lossy(&output.stderr);
    ensure!(output.status.success(), "{}", complaint.trim());
    Ok(())
}

fn probe_disk() -> Result<()> {
    let dir = tempfile::tempdir()?;
    let disk = Disk::mount(&dir.path().join("disk")).context("FUSE (/dev/fuse, and the right to mount)")?;
    std::fs::write(dir.path().join("disk/file"), "content")?;
    ensure!(disk.below().join("file").is_file(), "a file that was written is not below");
    Ok(())
}

fn probe_small_disk() -> Result<()> {
    let dir = tempfile::tempdir()?;
    let path = dir.path().display();
    shell::run(&format!("mount -t tmpfs -o size=1m shoal-chaos {path}"))?;
    shell::run(&format!("umount {path}"))?;
    Ok(())
}
