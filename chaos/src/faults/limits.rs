//! Nodes that may use only so much memory and processor time, by cgroups of either version.

use std::path::{Path, PathBuf};

use anyhow::{Context, Result, ensure};

/// Memory of a node, in bytes.
const MEMORY_BYTES: u64 = 512 << 20;
/// Microseconds of processor time in each [`PERIOD_US`]: a quarter of a core.
const QUOTA_US: u64 = 25_000;
const PERIOD_US: u64 = 100_000;

/// The cgroups of one node. They are removed when it is dropped, after its process.
pub struct Limits {
    dirs: Vec<PathBuf>,
}

impl Limits {
    /// Makes the cgroups.
    ///
    /// # Errors
    /// When this is not allowed, or the kernel has no such controllers.
    pub fn create(node: &str) -> Result<Limits> {
        let root = Path::new("/sys/fs/cgroup");
        let name = format!("shoal-chaos-{}-{node}", std::process::id());
        let (memory, quota, period) = (MEMORY_BYTES.to_string(), QUOTA_US.to_string(), PERIOD_US.to_string());
        let settings: Vec<(PathBuf, &str, String)> = match root.join("cgroup.controllers").is_file() {
            true => {
                // Already on where anything else is limited; else this says why it cannot be.
                std::fs::write(root.join("cgroup.subtree_control"), "+memory +cpu").context("cgroup v2")?;
                let dir = root.join(&name);
                vec![(dir.clone(), "memory.max", memory), (dir, "cpu.max", format!("{quota} {period}"))]
            }
            false => {
                let (for_memory, for_cpu) = (root.join("memory").join(&name), root.join("cpu").join(&name));
                vec![
                    (for_memory, "memory.limit_in_bytes", memory),
                    (for_cpu.clone(), "cpu.cfs_period_us", period),
                    (for_cpu, "cpu.cfs_quota_us", quota),
                ]
            }
        };
        let mut limits = Limits { dirs: Vec::new() };
        for (dir, file, value) in settings {
            if !limits.dirs.contains(&dir) {
                std::fs::create_dir(&dir).with_context(|| dir.display().to_string())?;
                limits.dirs.push(dir.clone());
            }
            std::fs::write(dir.join(file), value).with_context(|| format!("{} {file}", dir.display()))?;
        }
        Ok(limits)
    }

    /// The command that runs another one within these limits.
    pub fn launcher(&self) -> Vec<String> {
        let enter: Vec<String> =
            self.dirs.iter().map(|dir| format!("echo $$ > {}/cgroup.procs", dir.display())).collect();
        let script = format!("{} && exec \"$@\"", enter.join(" && "));
        ["sh", "-c", &script, "sh"].map(str::to_owned).to_vec()
    }
}

impl Drop for Limits {
    fn drop(&mut self) {
        for dir in &self.dirs {
            drop(std::fs::remove_dir(dir));
        }
    }
}

/// Whether nodes can be limited here.
///
/// # Errors
/// The reason, for a report.
pub fn probe() -> Result<()> {
    let limits = Limits::create("probe")?;
    let launcher = limits.launcher();
    let (program, arguments) = launcher.split_first().context("no command")?;
    let output = std::process::Command::new(program).args(arguments).arg("true").output()?;
    ensure!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr).trim());
    Ok(())
}
