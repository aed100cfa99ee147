//! The child process: limits itself, reads one file from its input, answers on its output.

use std::io::{Read, Write};

use nix::sys::resource::{Resource, setrlimit};

use super::{ParseLimits, Parsed};

/// Runs the child. Returns the exit code.
pub fn main() -> i32 {
    match run() {
        Ok(()) => 0,
        Err(_) => 1,
    }
}

fn run() -> Result<(), Box<dyn std::error::Error>> {
    let mut stdin = std::io::stdin().lock();
    let mut length = [0u8; 4];
    stdin.read_exact(&mut length)?;
    let mut header = vec![0u8; u32::from_le_bytes(length) as usize];
    stdin.read_exact(&mut header)?;
    let (limits, filename): (ParseLimits, String) = serde_json::from_slice(&header)?;
    limit(&limits)?;
    let mut bytes = Vec::new();
    stdin.read_to_end(&mut bytes)?;
    let answer = guarded(&filename, &bytes);
    let mut stdout = std::io::stdout().lock();
    stdout.write_all(&serde_json::to_vec(&answer)?)?;
    stdout.flush()?;
    Ok(())
}

fn limit(limits: &ParseLimits) -> nix::Result<()> {
    setrlimit(Resource::RLIMIT_AS, limits.memory_bytes, limits.memory_bytes)?;
    setrlimit(Resource::RLIMIT_CPU, limits.cpu_seconds, limits.cpu_seconds)?;
    setrlimit(Resource::RLIMIT_CORE, 0, 0)?;
    setrlimit(Resource::RLIMIT_FSIZE, 0, 0)?;
    setrlimit(Resource::RLIMIT_NOFILE, 16, 16)
}

/// Parser libraries panic on some broken files: that is the file's fault, and an answer.
fn guarded(filename: &str, bytes: &[u8]) -> Result<Parsed, String> {
    std::panic::set_hook(Box::new(|_| {}));
    let parse = std::panic::AssertUnwindSafe(|| super::parse(filename, bytes));
    std::panic::catch_unwind(parse).unwrap_or_else(|_| Err("the file is damaged: its parser gave up".into()))
}
