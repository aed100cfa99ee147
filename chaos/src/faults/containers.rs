//! Nodes as containers of a Docker Engine, where there are no rights to make network namespaces.
//!
//! ```text
//!  bridge network  10.x.y.0/24 ── .1   this machine, and on it the clients
//!                              ├─ .11  container n1      image: the binary, the libraries that it
//!                              └─ .12  container n2             names, and /tmp
//! ```
//!
//! The image is made on the spot, so that no registry is needed. The run's folder is mounted into
//! every container under its own path: data and logs are where they are without containers. Nodes are
//! killed and paused one by one ([`shoal_tests::Container`]). One is isolated by taking it off the
//! network, which cuts it off from clients too; an engine can make no partition of another shape.
//!
//! Everything is named after the run's folder, so that the next run there with containers finds what one that
//! was killed has left. Nothing else on the engine is touched.

use std::collections::BTreeSet;
use std::ffi::OsStr;
use std::fs::File;
use std::net::{Ipv4Addr, TcpStream};
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use shoal_tests::{Container, Host};

use super::partition::isolated;
use crate::shell;

/// The label of all that is made; its value is the run's id.
const LABEL: &str = "shoal-chaos";
/// The last number of the first node's address. The engine takes 1 for this machine.
const FIRST_HOST: usize = 11;
/// How many subnets are tried.
const SUBNETS: u32 = 64;
/// How long a probe waits for an answer. The first one after a change of networks takes a second.
const ANSWER_LIMIT: Duration = Duration::from_secs(3);
/// How long a container that is connected again may take to be reached, and the pause between two tries.
const BACK_LIMIT: Duration = Duration::from_secs(15);
const BACK_PAUSE: Duration = Duration::from_millis(100);

/// The image, the network and whatever runs there. All of it is removed when this is dropped.
pub struct Containers {
    id: String,
    dir: PathBuf,
    /// Nodes run as whom the folder belongs to, who can then read and remove what they write.
    owner: String,
    nodes: usize,
    subnet: Ipv4Addr,
}

impl Containers {
    /// Makes the image of a program and a network for so many containers of it. `dir` is the run's
    /// folder; both paths are absolute.
    ///
    /// # Errors
    /// When there is no engine, or it refuses.
    pub fn create(nodes: usize, program: &Path, dir: &Path) -> Result<Containers> {
        Containers::create_as(id_of(dir), nodes, program, dir)
    }

    /// The same under a name of its own. What has that name already is removed first.
    fn create_as(id: String, nodes: usize, program: &Path, dir: &Path) -> Result<Containers> {
        remove(&id).context("Docker Engine")?;
        let folder = std::fs::metadata(dir)?;
        let owner = format!("{}:{}", folder.uid(), folder.gid());
        let subnet = Ipv4Addr::UNSPECIFIED;
        let mut containers = Containers { id, dir: dir.to_owned(), owner, nodes, subnet };
        containers.make_image(program).context("the image of the nodes")?;
        containers.make_network().context("the network of the nodes")?;
        Ok(containers)
    }

    fn make_image(&self, program: &Path) -> Result<()> {
        let tar = self.dir.join("image.tar");
        let named = shell::run_words(&[OsStr::new("ldd"), program.as_os_str()])?;
        let files = libraries(&named)?;
        let create = "tar --create --dereference --no-recursion --directory / --file";
        let mut words: Vec<&OsStr> = create.split(' ').map(OsStr::new).collect();
        words.extend([tar.as_os_str(), OsStr::new("tmp")]);
        for file in files.iter().map(PathBuf::as_path).chain([program]) {
            words.push(file.strip_prefix("/").context("a path is not absolute")?.as_os_str());
        }
        shell::run_words(&words)?;
        // What is made from the image inherits its label.
        let label = format!("LABEL {LABEL}={}", self.id);
        let import = ["docker", "import", "--change", &label].map(OsStr::new);
        let imported = shell::run_words(&[&import[..], &[tar.as_os_str(), OsStr::new(&self.id)]].concat());
        std::fs::remove_file(&tar)?;
        imported.map(drop)
    }

    fn make_network(&mut self) -> Result<()> {
        let routes = std::fs::read_to_string("/proc/net/route").context("/proc/net/route")?;
        let numbers = (0..SUBNETS).map(|step| std::process::id().wrapping_add(step));
        let free = numbers.map(candidate).filter(|subnet| !is_routed(&routes, *subnet));
        let mut refusal = None;
        for subnet in free {
            let id = &self.id;
            let create = "docker network create --internal";
            // Refused as well where a network of the engine has no route yet.
            match shell::run(&format!("{create} --label {LABEL}={id} --subnet {subnet}/24 {id}")) {
                Ok(_) => {
                    self.subnet = subnet;
                    return Ok(());
                }
                Err(error) => refusal = Some(error),
            }
        }
        Err(refusal.context("no subnet is free")?)
    }

    /// The container of node `n`, from 0, and its address.
    pub fn host(&self, node: usize) -> Host {
        let dir = self.dir.display();
        let address = self.address(node);
        let mount = format!("type=bind,source={dir},target={dir}");
        let options = [
            ["--log-driver", "none"],
            ["--network", &self.id],
            ["--ip", &address],
            ["--user", &self.owner],
            ["--mount", &mount],
        ];
        let options = options.as_flattened().iter().map(|word| (*word).to_owned()).collect();
        let container = Container { name: self.name(node), options, image: self.id.clone() };
        Host { address, launcher: Vec::new(), container: Some(container) }
    }

    /// From now on exactly these pairs do not reach each other, in this direction.
    ///
    /// # Errors
    /// When that is not the isolation of whole nodes, or the engine refuses.
    pub fn cut(&self, pairs: &BTreeSet<(usize, usize)>) -> Result<()> {
        self.isolate(&isolated(pairs, self.nodes).context("a container can only be isolated as a whole")?)
    }

    /// From now on exactly these nodes are on no network. Whoever does not run is left alone: it
    /// starts on the network.
    fn isolate(&self, nodes: &BTreeSet<usize>) -> Result<()> {
        let running = names_of(&format!("label={LABEL}={}", self.id))?;
        let attached = names_of(&format!("network={}", self.id))?;
        for node in 0..self.nodes {
            let (id, name, address) = (&self.id, self.name(node), self.address(node));
            match (nodes.contains(&node), attached.contains(&name)) {
                (true, true) => shell::run(&format!("docker network disconnect {id} {name}"))?,
                (false, false) if running.contains(&name) => {
                    shell::run(&format!("docker network connect --ip {address} {id} {name}"))?
                }
                _ => continue,
            };
        }
        Ok(())
    }

    fn name(&self, node: usize) -> String {
        format!("{}-n{}", self.id, node + 1)
    }

    fn address(&self, node: usize) -> String {
        let [a, b, c, _] = self.subnet.octets();
        format!("{a}.{b}.{c}.{}", FIRST_HOST + node)
    }
}

impl Drop for Containers {
    fn drop(&mut self) {
        // What an engine does not remove now, it is told to remove by the next run.
        drop(remove(&self.id));
    }
}

/// Removes what a run in this folder has left when it was killed.
///
/// # Errors
/// When an engine that is there does not do so.
pub fn clear(dir: &Path) -> Result<()> {
    match shell::run("docker version") {
        Ok(_) => remove(&id_of(dir)),
        // Without an engine there are no containers.
        Err(_) => Ok(()),
    }
}

fn id_of(dir: &Path) -> String {
    let hash = blake3::hash(dir.as_os_str().as_encoded_bytes()).to_hex();
    format!("shoal-chaos-{}", &hash[..12])
}

fn remove(id: &str) -> Result<()> {
    let label = format!("label={LABEL}={id}");
    // In this order: the engine keeps what is in use.
    for (list, end) in [
        ("docker ps --all", "docker rm --force"),
        ("docker network ls", "docker network rm"),
        ("docker images", "docker image rm --force"),
    ] {
        for left in shell::run(&format!("{list} --quiet --filter {label}"))?.split_whitespace() {
            shell::run(&format!("{end} {left}"))?;
        }
    }
    Ok(())
}

/// The names of running containers that match a filter of `docker ps`.
fn names_of(filter: &str) -> Result<BTreeSet<String>> {
    let names = shell::run(&format!("docker ps --filter {filter} --format {{{{.Names}}}}"))?;
    Ok(names.split_whitespace().map(str::to_owned).collect())
}

/// The files that `ldd` names: libraries, and the loader.
fn libraries(named: &str) -> Result<BTreeSet<PathBuf>> {
    if let Some(missing) = named.lines().find(|line| line.contains("not found")) {
        bail!("a library is missing: {}", missing.trim());
    }
    let path = |line: &str| line.split_whitespace().find(|word| word.starts_with('/')).map(PathBuf::from);
    Ok(named.lines().filter_map(path).collect())
}

/// A subnet of 256 addresses out of 10.64.0.0/10.
fn candidate(number: u32) -> Ipv4Addr {
    let [_, _, high, low] = number.to_be_bytes();
    Ipv4Addr::new(10, 64 + high % 64, low, 0)
}

/// Whether a subnet of 256 addresses overlaps with a route of this machine, as `/proc/net/route` has
/// them. The default route overlaps with none.
fn is_routed(routes: &str, subnet: Ipv4Addr) -> bool {
    let overlaps = |line: &str| {
        let field = |at: usize| {
            // The kernel writes addresses as numbers of its own byte order.
            Some(u32::from_be(u32::from_str_radix(line.split_whitespace().nth(at)?, 16).ok()?))
        };
        let (destination, mask) = (field(1)?, field(7)?);
        let mask = mask & 0xffff_ff00;
        Some(mask != 0 && destination & mask == subnet.to_bits() & mask)
    };
    routes.lines().any(|line| overlaps(line).unwrap_or(false))
}

/// Whether containers can be made, paused, isolated and killed here. What this makes has always the same name
/// for one user, so that a probe removes what one that was killed has left; there is one at a time.
///
/// # Errors
/// The reason, for a report.
pub fn probe() -> Result<()> {
    let id = format!("shoal-chaos-probe-{}", nix::unistd::getuid());
    let lock = File::create(std::env::temp_dir().join(format!("{id}.lock")))?;
    // Until this function or this process ends, in whichever way.
    lock.lock()?;
    let path = std::env::var_os("PATH").unwrap_or_default();
    let sleep = std::env::split_paths(&path).map(|dir| dir.join("sleep")).find(|path| path.is_file());
    let sleep = sleep.context("there is no program sleep")?.canonicalize()?;
    let dir = tempfile::tempdir()?;
    let containers = Containers::create_as(id, 1, &sleep, &dir.path().canonicalize()?)?;
    let Host { address, container, .. } = containers.host(0);
    let container = container.context("a node has a container")?;
    let words = container.launcher([]);
    let (program, arguments) = words.split_first().context("no command")?;
    let mut command = Command::new(program);
    command.args(arguments).arg(&sleep).arg("60").stdin(Stdio::null()).stdout(Stdio::null());
    let mut child = command.spawn()?;
    let outcome = container.wait_started(&mut child).and_then(|()| {
        ensure!(is_reached(&address)?, "a container is not reached at its address");
        container.signal(libc::SIGSTOP)?;
        container.signal(libc::SIGCONT)?;
        containers.isolate(&BTreeSet::from([0]))?;
        ensure!(!is_reached(&address)?, "a container is reached without a network");
        containers.isolate(&BTreeSet::new())?;
        // Whoever has asked in vain a moment ago asks for the way again only after a while.
        let deadline = Instant::now() + BACK_LIMIT;
        while !is_reached(&address)? {
            ensure!(Instant::now() < deadline, "a container is not reached on the network again");
            std::thread::sleep(BACK_PAUSE);
        }
        container.signal(libc::SIGKILL)
    });
    container.end(&mut child)?;
    outcome
}

/// Whether a host answers: by refusing, because nothing listens there.
fn is_reached(address: &str) -> Result<bool> {
    let answer = TcpStream::connect_timeout(&format!("{address}:6333").parse()?, ANSWER_LIMIT);
    Ok(answer.map_or_else(|error| error.kind() == std::io::ErrorKind::ConnectionRefused, |_| true))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_image_has_the_libraries_and_the_loader() {
        let named = "\tlinux-vdso.so.1 (0x00007ffd)\n\
                     \tlibc.so.6 => /lib/x86_64-linux-gnu/libc.so.6 (0x00007f1c)\n\
                     \t/lib64/ld-linux-x86-64.so.2 (0x00007f1d)\n";
        let expected = ["/lib/x86_64-linux-gnu/libc.so.6", "/lib64/ld-linux-x86-64.so.2"];
        assert_eq!(libraries(named).expect("all are there"), BTreeSet::from(expected.map(PathBuf::from)));
        let missing = libraries("\tlibfoo.so.1 => not found\n").expect_err("one is missing");
        assert!(missing.to_string().contains("libfoo"), "{missing}");
    }

    #[test]
    #[cfg(target_endian = "little")]
    fn a_subnet_that_is_in_use_is_not_taken() {
        let routes = "Iface\tDestination\tGateway\tFlags\tRefCnt\tUse\tMetric\tMask\tMTU\tWindow\tIRTT\n\
                      eth0\t00000000\t010200C0\t0003\t0\t0\t0\t00000000\t0\t0\t0\n\
                      br0\t00034D0A\t00000000\t0001\t0\t0\t0\t00FFFFFF\t0\t0\t0\n\
                      vpn\t0000500A\t00000000\t0001\t0\t0\t0\t0000FCFF\t0\t0\t0\n\
                      peer\t07095A0A\t00000000\t0005\t0\t0\t0\tFFFFFFFF\t0\t0\t0\n";
        let is_routed = |b: u8, c: u8| is_routed(routes, Ipv4Addr::new(10, b, c, 0));
        assert!(is_routed(77, 3), "the same");
        assert!(!is_routed(77, 4));
        assert!(is_routed(83, 255), "within 10.80.0.0/14");
        assert!(!is_routed(84, 0));
        assert!(is_routed(90, 9), "around 10.90.9.7");
    }

    #[test]
    fn subnets_are_private() {
        for number in [0, 1, 16_383, 16_384, u32::MAX] {
            let [a, b, _, d] = candidate(number).octets();
            assert!(a == 10 && (64..128).contains(&b) && d == 0, "{}", candidate(number));
        }
    }

    #[test]
    fn a_folder_is_known_again() {
        let id = id_of(Path::new("/run/one"));
        assert_eq!(id, id_of(Path::new("/run/one")));
        assert_ne!(id, id_of(Path::new("/run/two")));
        assert_eq!(id.len(), "shoal-chaos-".len() + 12);
    }
}
