//! A container of a Docker Engine that a node runs in.
//!
//! ```text
//!  Node ── child ──▶ docker run (in the foreground) ── engine ──▶ container: shoal serve
//!    │                  ◀── what it writes, its exit code
//!    └── kill, pause: docker kill, docker pause ──▶ engine
//! ```
//!
//! The node is the first process of its container. The child is only its stand-in: it ends when the
//! container has ended and is removed. Signals to the child would not do: nobody can pass on SIGKILL
//! and SIGSTOP. So the engine is asked for them. Left out: everything that several containers share,
//! such as a network and an image.

use std::process::{Child, Command, ExitStatus, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};

/// How long the engine may take to start or to remove a container.
const DEADLINE: Duration = Duration::from_secs(60);
/// The pause between two looks at a container.
const PAUSE: Duration = Duration::from_millis(50);
/// Above this, an exit code is 128 and the signal that has ended the process.
const HIGHEST_CODE: i32 = 128;

/// A container by name. It exists while its node runs.
#[derive(Clone, Debug)]
pub struct Container {
    /// Its name, which nothing else on the engine has.
    pub name: String,
    /// What `docker run` is told besides: its network, its mounts, its user.
    pub options: Vec<String>,
    /// The image that it is made from.
    pub image: String,
}

impl Container {
    /// The command that runs another one in it, with these environment variables of its caller.
    pub fn launcher<'a>(&self, variables: impl IntoIterator<Item = &'a String>) -> Vec<String> {
        let mut words = ["docker", "run", "--rm", "--name", &self.name].map(str::to_owned).to_vec();
        words.extend(self.options.iter().cloned());
        words.extend(variables.into_iter().flat_map(|name| ["--env".to_owned(), name.clone()]));
        words.push(self.image.clone());
        words
    }

    /// Waits until its process runs or has ended already. Before that the engine has nothing that a
    /// signal could be sent to.
    ///
    /// # Errors
    /// When it does not start in time.
    pub fn wait_started(&self, child: &mut Child) -> Result<()> {
        let end = Instant::now() + DEADLINE;
        while self.pid().is_none() && child.try_wait()?.is_none() {
            ensure!(Instant::now() < end, "the container {} does not start", self.name);
            std::thread::sleep(PAUSE);
        }
        Ok(())
    }

    /// The id of its process on this machine; none while it has no process.
    pub fn pid(&self) -> Option<u32> {
        let pid = docker(&["container", "inspect", "--format", "{{.State.Pid}}", &self.name]).ok()?;
        pid.trim().parse().ok().filter(|pid| *pid != 0)
    }

    /// Sends its process a signal. SIGSTOP and SIGCONT are for all that it holds.
    ///
    /// # Errors
    /// When it does not run, or not as the signal supposes: SIGCONT is for what is stopped.
    pub fn signal(&self, signal: i32) -> Result<()> {
        let number = signal.to_string();
        match signal {
            libc::SIGSTOP => docker(&["pause", &self.name])?,
            libc::SIGCONT => docker(&["unpause", &self.name])?,
            _ => docker(&["kill", "--signal", &number, &self.name])?,
        };
        Ok(())
    }

    /// Kills and removes it, and waits until both it and its stand-in are gone.
    ///
    /// # Errors
    /// When they are not gone in time.
    pub fn end(&self, child: &mut Child) -> Result<()> {
        let end = Instant::now() + DEADLINE;
        loop {
            // Refused while the engine is removing it of its own accord.
            let removed = self.remove();
            if child.try_wait()?.is_some() {
                return Ok(());
            }
            ensure!(Instant::now() < end, "the container {} is still there: {removed:?}", self.name);
            std::thread::sleep(PAUSE);
        }
    }

    /// Kills and removes it. Harmless when there is none.
    ///
    /// # Errors
    /// When the engine does not do so.
    pub fn remove(&self) -> Result<()> {
        match docker(&["rm", "--force", &self.name]) {
            Err(error) if error.to_string().contains("No such container") => Ok(()),
            outcome => outcome.map(drop),
        }
    }

    /// The exit code of its process, from that of its stand-in: `None` when a signal ended it.
    pub fn code(status: ExitStatus) -> Option<i32> {
        status.code().filter(|code| *code <= HIGHEST_CODE)
    }
}

fn docker(words: &[&str]) -> Result<String> {
    let output = Command::new("docker").args(words).stdin(Stdio::null()).output();
    let output = output.context("docker does not run")?;
    let complaint = String::from_utf8_lossy(&output.stderr);
    ensure!(output.status.success(), "docker {}: {}", words.join(" "), complaint.trim());
    Ok(String::from_utf8_lossy(&output.stdout).into_owned())
}

#[cfg(test)]
mod tests {
    use std::os::unix::process::ExitStatusExt;

    use super::*;

    #[test]
    fn variables_go_before_the_image() {
        let options = vec!["--network".to_owned(), "net".to_owned()];
        let container = Container { name: "n1".to_owned(), options, image: "shoal".to_owned() };
        let words = container.launcher(&["A".to_owned(), "B".to_owned()]);
        let expected = "docker run --rm --name n1 --network net --env A --env B shoal";
        assert_eq!(words.join(" "), expected);
    }

    #[test]
    fn a_node_that_a_signal_has_ended_has_no_code() {
        let exited = |code: i32| Container::code(ExitStatus::from_raw(code << 8));
        assert_eq!([exited(0), exited(74)], [Some(0), Some(74)]);
        assert_eq!(exited(128 + libc::SIGKILL), None);
        assert_eq!(Container::code(ExitStatus::from_raw(libc::SIGKILL)), None);
    }
}
