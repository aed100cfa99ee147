//! What the kernel knows of a node's process.

use std::fs;

use anyhow::{Context, Result};

use crate::node::Node;

/// The unit of CPU time in `/proc`: `USER_HZ`, which is 100 on x86-64 and on AArch64.
const TICKS_PER_SECOND: f64 = 100.0;

/// CPU seconds that a node has used since its start, in user and in kernel mode.
pub(super) fn cpu_seconds(node: &Node) -> Result<f64> {
    let stat = read(node, "stat")?;
    let ticks = ticks(&stat).with_context(|| format!("/proc/PID/stat is {stat:?}"))?;
    Ok(ticks as f64 / TICKS_PER_SECOND)
}

/// Memory of a node in bytes, by the name of a line of `/proc/PID/status`, such as `VmRSS`.
pub(super) fn memory_bytes(node: &Node, name: &str) -> Result<u64> {
    let status = read(node, "status")?;
    kilobytes(&status, name)
        .map(|kilobytes| kilobytes * 1024)
        .with_context(|| format!("/proc/PID/status has no {name}"))
}

fn read(node: &Node, file: &str) -> Result<String> {
    let pid = node.pid().with_context(|| format!("{} does not run", node.name()))?;
    let path = format!("/proc/{pid}/{file}");
    fs::read_to_string(&path).with_context(|| format!("read {path}"))
}

/// `utime` and `stime` together, which are the 12th and 13th field behind the command's name. The
/// name is in parentheses and may hold anything.
fn ticks(stat: &str) -> Option<u64> {
    let (_, fields) = stat.rsplit_once(')')?;
    let mut fields = fields.split_whitespace().skip(11);
    let user: u64 = fields.next()?.parse().ok()?;
    let system: u64 = fields.next()?.parse().ok()?;
    Some(user + system)
}

fn kilobytes(status: &str, name: &str) -> Option<u64> {
    let value = status.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix(':'))?;
    value.split_whitespace().next()?.parse().ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ticks_are_found_behind_any_name() {
        let stat = "7 (a) b (c)) S 1 2 3 4 5 6 7 8 9 10 250 50 0 0 20";
        assert_eq!(ticks(stat), Some(300));
        assert_eq!(ticks("nonsense"), None);
    }

    #[test]
    fn memory_is_found_by_its_whole_name() {
        let status = "VmRSSx:\t1 kB\nVmRSS:\t  2048 kB\n";
        assert_eq!(kilobytes(status, "VmRSS"), Some(2048));
        assert_eq!(kilobytes(status, "Vm"), None);
    }
}
