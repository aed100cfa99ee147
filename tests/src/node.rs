//! One node: a process, its data directory, its ports and its log file. All of them outlive the
//! process, so that a node can be killed and started again as the same node.

use std::collections::BTreeMap;
use std::fs::File;
use std::path::{Path, PathBuf};
use std::process::{Child, Stdio};
use std::time::Duration;

use anyhow::{Context, Result, bail, ensure};

use crate::binary::{binary, shoal_under};
use crate::client::{Client, Request};
use crate::container::Container;
use crate::ports::Ports;
use crate::view::{self, View};
use crate::wait::wait_until;

/// The API key of every node that the tests start.
pub const KEY: &str = "key-of-the-tests";

/// How long a node may take from its start to ready.
const READY_DEADLINE: Duration = Duration::from_secs(60);

/// Where a node runs.
#[derive(Clone, Debug)]
pub struct Host {
    /// The IP address that it listens on.
    pub address: String,
    /// The command that starts it there and becomes it; empty to start it as it is.
    pub launcher: Vec<String>,
    /// The container that it runs in there; none when it is a plain process.
    pub container: Option<Container>,
}

impl Default for Host {
    /// This machine's loopback.
    fn default() -> Self {
        Host { address: "127.0.0.1".to_owned(), launcher: Vec::new(), container: None }
    }
}

/// A node. Dropping it kills its process.
pub struct Node {
    name: String,
    dir: PathBuf,
    models: PathBuf,
    /// What it runs, if that is not the binary under test.
    binary: Option<PathBuf>,
    host: Host,
    ports: Ports,
    env: BTreeMap<String, String>,
    join: Vec<String>,
    expect: usize,
    child: Option<Child>,
    is_paused: bool,
    client: Client,
}

impl Node {
    /// A node that is not started yet, with everything it stores under `dir`.
    ///
    /// # Errors
    /// When the directory cannot be made or no port is free.
    pub fn new(name: &str, dir: &Path, models: &Path, env: &[(String, String)]) -> Result<Node> {
        Node::on(Host::default(), Ports::reserve()?, name, dir, models, env)
    }

    /// A node on a host of its own.
    ///
    /// # Errors
    /// When the directory cannot be made.
    pub fn on(
        host: Host,
        ports: Ports,
        name: &str,
        dir: &Path,
        models: &Path,
        env: &[(String, String)],
    ) -> Result<Node> {
        std::fs::create_dir_all(dir)?;
        let client = client_at(&host, ports);
        Ok(Node {
            name: name.to_owned(),
            dir: dir.to_owned(),
            models: models.to_owned(),
            binary: None,
            ports,
            env: env.iter().cloned().collect(),
            join: Vec::new(),
            expect: 1,
            child: None,
            is_paused: false,
            client,
            host,
        })
    }

    /// Its data directory, which the node itself makes.
    pub fn data_dir(&self) -> PathBuf {
        self.dir.join("data")
    }

    /// Its name.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// Where clients connect.
    pub fn http_address(&self) -> String {
        format!("{}:{}", self.host.address, self.ports.http)
    }

    /// Where clients connect, as a URL.
    pub fn url(&self) -> String {
        format!("http://{}", self.http_address())
    }

    /// Where peers connect.
    pub fn grpc_address(&self) -> String {
        format!("{}:{}", self.host.address, self.ports.grpc)
    }

    /// Where peers' actors connect.
    pub fn mesh_address(&self) -> String {
        format!("{}:{}", self.host.address, self.ports.mesh)
    }

    /// A client of this node alone.
    pub fn client(&self) -> &Client {
        &self.client
    }

    /// Its process id while it has a process, for what the kernel knows of that.
    pub fn pid(&self) -> Option<u32> {
        let child = self.child.as_ref()?;
        match &self.host.container {
            Some(container) => container.pid(),
            None => Some(child.id()),
        }
    }

    /// Whether it runs and is not paused.
    pub fn is_running(&self) -> bool {
        self.child.is_some() && !self.is_paused
    }

    /// How it finds others from its next start on.
    pub fn introduce(&mut self, join: Vec<String>, expect: usize) {
        self.join = join;
        self.expect = expect;
    }

    /// Gives it other ports from its next start on, as a new pod has another address.
    ///
    /// # Errors
    /// When no port is free.
    pub fn readdress(&mut self) -> Result<()> {
        self.ports = Ports::reserve()?;
        self.client = client_at(&self.host, self.ports);
        Ok(())
    }

    /// Runs another binary from its next start on: that of another build.
    pub fn set_binary(&mut self, binary: &Path) {
        self.binary = Some(binary.to_owned());
    }

    /// Sets an environment variable from its next start on.
    pub fn set_env(&mut self, name: &str, value: &str) {
        self.env.insert(name.to_owned(), value.to_owned());
    }

    /// Takes an environment variable away from its next start on.
    pub fn unset_env(&mut self, name: &str) {
        self.env.remove(name);
    }

    /// Starts the process. It is not ready yet: see [`Node::ready`].
    ///
    /// # Errors
    /// When it runs already or cannot be started.
    pub fn start(&mut self) -> Result<()> {
        ensure!(self.child.is_none(), "{} runs already", self.name);
        let log = File::options().create(true).append(true).open(self.log_file())?;
        let mut launcher = self.host.launcher.clone();
        if let Some(container) = &self.host.container {
            container.remove()?;
            launcher.extend(container.launcher(self.env.keys()));
        }
        let binary = match &self.binary {
            Some(binary) => binary.clone(),
            None => binary()?,
        };
        let mut command = shoal_under(&binary, &launcher, "serve");
        command.args(["--name", &self.name]).arg("--data").arg(self.data_dir());
        command.args(["--http", &self.http_address(), "--grpc", &self.grpc_address()]);
        command.args(["--mesh", &self.mesh_address()]);
        command.args(["--api-key", KEY]).arg("--models").arg(&self.models);
        if !self.join.is_empty() {
            command.args(["--join", &self.join.join(","), "--expect", &self.expect.to_string()]);
        }
        command.envs(&self.env).stdin(Stdio::null()).stdout(log.try_clone()?).stderr(log);
        let child = command.spawn().with_context(|| format!("start {}", self.name))?;
        let child = self.child.insert(child);
        match &self.host.container {
            Some(container) => container.wait_started(child),
            None => Ok(()),
        }
    }

    /// Whether it has no process, because it was never started or has ended.
    ///
    /// # Errors
    /// When the system does not tell.
    pub fn has_exited(&mut self) -> Result<bool> {
        if let Some(child) = &mut self.child
            && child.try_wait()?.is_some()
        {
            self.child = None;
            self.is_paused = false;
        }
        Ok(self.child.is_none())
    }

    /// Waits until it serves.
    ///
    /// # Errors
    /// When it exits instead, or the deadline has passed.
    pub async fn ready(&mut self) -> Result<()> {
        let child = self.child.as_mut().with_context(|| format!("{} does not run", self.name))?;
        let client = &self.client;
        let what = format!("{} to be ready", self.name);
        let exited = wait_until(READY_DEADLINE, &what, || {
            let exited = child.try_wait();
            async move {
                if let Some(status) = exited? {
                    return Ok(Some(Some(status)));
                }
                let reply = client.once(&Request::get("/health/ready")).await?;
                ensure!(reply.status == 200, "not ready: {} {}", reply.status, reply.text());
                Ok(Some(None))
            }
        })
        .await?;
        if let Some(status) = exited {
            self.child = None;
            bail!("{} exited ({status}) instead of becoming ready:\n{}", self.name, self.log_tail(20));
        }
        Ok(())
    }

    /// Kills it (SIGKILL): it has no chance to save anything. Harmless when it does not run.
    ///
    /// # Errors
    /// When the process cannot be killed.
    pub fn kill(&mut self) -> Result<()> {
        self.is_paused = false;
        if let Some(mut child) = self.child.take() {
            match &self.host.container {
                Some(container) => container.end(&mut child)?,
                None => child.kill()?,
            }
            child.wait()?;
        }
        Ok(())
    }

    /// Sends SIGKILL without waiting for the end, so that several nodes can die at once.
    ///
    /// # Errors
    /// When it does not run.
    pub fn strike(&self) -> Result<()> {
        self.signal(libc::SIGKILL)
    }

    /// Asks it to stop (SIGTERM) and waits until it has: `None` when a signal ended it.
    ///
    /// # Errors
    /// When it does not run, or not stop in time.
    pub async fn terminate(&mut self, deadline: Duration) -> Result<Option<i32>> {
        self.signal(libc::SIGTERM)?;
        self.exited(deadline).await
    }

    /// Waits until it has exited by itself and returns the code: `None` when a signal ended it.
    ///
    /// # Errors
    /// When it does not run, or not exit in time.
    pub async fn exited(&mut self, deadline: Duration) -> Result<Option<i32>> {
        let child = self.child.as_mut().with_context(|| format!("{} does not run", self.name))?;
        let what = format!("{} to exit", self.name);
        let status = wait_until(deadline, &what, || {
            let exited = child.try_wait();
            async move { Ok(exited?) }
        })
        .await?;
        self.child = None;
        Ok(match &self.host.container {
            Some(_) => Container::code(status),
            None => status.code(),
        })
    }

    /// Stops it in its tracks (SIGSTOP); to others it is silent, to itself no time passes.
    ///
    /// # Errors
    /// When it does not run.
    pub fn pause(&mut self) -> Result<()> {
        self.signal(libc::SIGSTOP)?;
        self.is_paused = true;
        Ok(())
    }

    /// Lets it go on (SIGCONT).
    ///
    /// # Errors
    /// When it does not run.
    pub fn resume(&mut self) -> Result<()> {
        self.is_paused = false;
        self.signal(libc::SIGCONT)
    }

    #[expect(unsafe_code, reason = "std sends no signal but SIGKILL")]
    fn signal(&self, signal: i32) -> Result<()> {
        let child = self.child.as_ref().with_context(|| format!("{} does not run", self.name))?;
        if let Some(container) = &self.host.container {
            return container.signal(signal);
        }
        let pid = libc::pid_t::try_from(child.id())?;
        // SAFETY: kill touches no memory. The pid is still our child's: it was not waited for.
        let sent = unsafe { libc::kill(pid, signal) };
        ensure!(sent == 0, "signal {signal} to {}: {}", self.name, std::io::Error::last_os_error());
        Ok(())
    }

    /// How the cluster looks from here.
    ///
    /// # Errors
    /// When it does not answer.
    pub async fn view(&self) -> Result<View> {
        view::of(&self.client).await
    }

    /// Everything it has logged, over all its starts.
    pub fn log(&self) -> String {
        let bytes = std::fs::read(self.log_file()).unwrap_or_default();
        String::from_utf8_lossy(&bytes).into_owned()
    }

    /// The last lines it has logged.
    pub fn log_tail(&self, count: usize) -> String {
        let log = self.log();
        let lines: Vec<&str> = log.lines().collect();
        lines[lines.len().saturating_sub(count)..].join("\n")
    }

    /// Checks that it has never panicked.
    ///
    /// # Errors
    /// The line of its log that tells of a panic.
    pub fn check_panics(&self) -> Result<()> {
        let log = self.log();
        let panic = log.lines().find(|line| line.contains("panicked at"));
        ensure!(panic.is_none(), "{} panicked: {}", self.name, panic.unwrap_or_default());
        Ok(())
    }

    fn log_file(&self) -> PathBuf {
        self.dir.join("node.log")
    }
}

impl Drop for Node {
    fn drop(&mut self) {
        // Nothing can be done about a process that cannot be killed.
        drop(self.kill());
    }
}

fn client_at(host: &Host, ports: Ports) -> Client {
    Client::new(vec![format!("{}:{}", host.address, ports.http)], Some(KEY))
}
