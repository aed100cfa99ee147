//! What nodes run as, and what joins them: processes on a network of their own or on loopback, or
//! containers of a Docker Engine. Which faults a backend can do is a pure question; whether this
//! machine has what they need is [`crate::doctor`]'s.

use std::collections::BTreeSet;
use std::path::Path;

use anyhow::{Context, Result, bail, ensure};
use clap::ValueEnum;
use shoal_tests::binary::binary;
use shoal_tests::{Host, Ports};

use crate::cluster::DiskKind;
use crate::doctor;
use crate::faults::containers::Containers;
use crate::faults::net::Net;
use crate::faults::partition::{cuts, isolated};
use crate::faults::{Fault, Need};
use crate::scenario::Scenario;

/// The ports of every node that has an address of its own.
const PORTS: Ports = Ports { http: 6333, grpc: 6334, mesh: 6335 };

/// What nodes run as.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum BackendKind {
    /// Processes: in network namespaces where this machine allows that, else on loopback.
    Processes,
    /// Containers of a Docker Engine.
    Docker,
}

impl BackendKind {
    /// Its name on the command line.
    pub fn name(self) -> &'static str {
        match self {
            BackendKind::Processes => "processes",
            BackendKind::Docker => "docker",
        }
    }

    /// What a scenario needs of the machine when it runs with so many nodes, each with who needs it.
    ///
    /// # Errors
    /// Why it cannot run on this backend at all, whatever the machine has.
    pub fn needs(self, scenario: &Scenario, nodes: usize) -> Result<Vec<(String, Need)>> {
        match self {
            BackendKind::Processes => {
                Ok(scenario.faults.iter().map(|fault| (fault.name(), fault.need())).collect())
            }
            BackendKind::Docker => {
                ensure!(scenario.disk == DiskKind::Plain, "containers have no disks that can be broken");
                for fault in &scenario.faults {
                    by_engine(*fault, nodes).with_context(|| fault.name())?;
                }
                // An engine does the rest, but the build is the nodes' own.
                let of_build = scenario.faults.iter().filter(|fault| fault.need() == Need::CrashPoints);
                let of_build = of_build.map(|fault| (fault.name(), fault.need()));
                Ok([("containers".to_owned(), Need::Containers)].into_iter().chain(of_build).collect())
            }
        }
    }
}

/// Whether a Docker Engine can do a fault, or why not.
fn by_engine(fault: Fault, nodes: usize) -> Result<()> {
    match fault.need() {
        // A node that dies at a crash point aborts. The kernel spares the first process of a container a
        // SIGABRT of its own, but not the fault that abort(3) runs into next, and the node has said by then
        // where it dies.
        Need::Nothing | Need::Containers | Need::CrashPoints => Ok(()),
        Need::Net => {
            let cuts = cuts(fault, 0, nodes).context("an engine loses no packets")?;
            isolated(&cuts, nodes).context("an engine isolates whole nodes, also from clients")?;
            Ok(())
        }
        Need::Cables => bail!("an engine has no bad cables"),
        Need::Clock => bail!("the image has no libfaketime"),
        Need::BreakableDisk | Need::SmallDisk => bail!("containers have no disks that can be broken"),
        Need::Limits => bail!("only processes are put into cgroups"),
        Need::OldBinary => bail!("all containers are of one image"),
    }
}

/// The nodes' hosts and the network between them. What was made for them goes when it is dropped.
pub enum Backend {
    /// Processes that share this machine's loopback.
    Loopback,
    /// Processes in network namespaces.
    Namespaces(Net),
    /// Containers.
    Containers(Containers),
}

impl Backend {
    /// Makes hosts for so many nodes, whose folder is `dir`. Cables that can be bad are laid where
    /// there are namespaces. The calling thread may move into the new network, so this is called
    /// before there are others.
    ///
    /// # Errors
    /// When the machine or the engine refuses.
    pub fn create(kind: BackendKind, nodes: usize, with_cables: bool, dir: &Path) -> Result<Backend> {
        Ok(match kind {
            BackendKind::Docker => Backend::Containers(Containers::create(nodes, &binary()?, dir)?),
            BackendKind::Processes if doctor::probe(Need::Net).is_ok() => {
                Backend::Namespaces(Net::create(nodes, with_cables)?)
            }
            BackendKind::Processes => Backend::Loopback,
        })
    }

    /// Where node `n`, from 0, runs and which ports it has.
    ///
    /// # Errors
    /// When no port is free.
    pub fn host(&self, node: usize) -> Result<(Host, Ports)> {
        Ok(match self {
            Backend::Loopback => (Host::default(), Ports::reserve()?),
            Backend::Namespaces(net) => {
                let (address, launcher) = (net.address(node), net.launcher(node));
                (Host { address, launcher, container: None }, PORTS)
            }
            Backend::Containers(containers) => (containers.host(node), PORTS),
        })
    }

    /// From now on exactly these pairs of nodes do not reach each other, in this direction.
    ///
    /// # Errors
    /// When the network cannot be cut in this shape.
    pub fn cut(&self, pairs: &BTreeSet<(usize, usize)>) -> Result<()> {
        match self {
            Backend::Loopback => {
                ensure!(pairs.is_empty(), "there is no network of its own");
                Ok(())
            }
            Backend::Namespaces(net) => net.cut(pairs),
            Backend::Containers(containers) => containers.cut(pairs),
        }
    }

    /// Whether a node that is cut off from all others is cut off from clients as well.
    pub fn isolates_from_clients(&self) -> bool {
        matches!(self, Backend::Containers(_))
    }

    /// The network of namespaces.
    ///
    /// # Errors
    /// When there is none.
    pub fn net(&self) -> Result<&Net> {
        match self {
            Backend::Namespaces(net) => Ok(net),
            Backend::Loopback | Backend::Containers(_) => bail!("there are no network namespaces"),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The scenarios that run with containers in a size.
    fn with_containers(nodes: impl Fn(&Scenario) -> usize) -> Vec<String> {
        let shipped = Scenario::shipped().expect("all are right");
        let runs = |scenario: &Scenario| BackendKind::Docker.needs(scenario, nodes(scenario)).is_ok();
        shipped.into_iter().filter(runs).map(|scenario| scenario.name).collect()
    }

    #[test]
    fn what_containers_can_do() {
        let names = "baseline kill-leader kill-minority kill-all split-brain rejoin zombie-leader search \
                     batches bit-flips churn scaling rolling-restart snapshots \
                     backup crash-points resharding";
        assert_eq!(with_containers(|scenario| scenario.ci.nodes).join(" "), names);
        // Of five nodes two are apart from the leader together, which no engine can do.
        let by_night = with_containers(|scenario| scenario.nightly.nodes);
        assert!(!by_night.contains(&"split-brain".to_owned()) && by_night.contains(&"rejoin".to_owned()));
    }

    #[test]
    fn what_containers_cannot_do_has_a_reason() {
        for (fault, reason) in [
            (Fault::AnswersLost, "whole nodes"),
            (Fault::PacketLoss, "packets"),
            (Fault::ClockBack, "libfaketime"),
            (Fault::TornWrites, "disks"),
        ] {
            let error = by_engine(fault, 3).expect_err("it cannot be done");
            assert!(error.to_string().contains(reason), "{}: {error}", fault.name());
        }
    }

    #[test]
    fn crash_points_in_containers_need_a_build_that_has_some() {
        let shipped = Scenario::shipped().expect("all are right");
        let needs = |name: &str| -> Vec<Need> {
            let scenario = shipped.iter().find(|known| known.name == name).expect("it ships");
            let needs = BackendKind::Docker.needs(scenario, 3).expect("an engine can do it");
            needs.into_iter().map(|(_, need)| need).collect()
        };
        assert_eq!(needs("crash-points"), [Need::Containers, Need::CrashPoints]);
        assert_eq!(needs("kill-leader"), [Need::Containers]);
    }

    #[test]
    fn names_are_what_the_command_line_takes() {
        for kind in BackendKind::value_variants() {
            assert_eq!(BackendKind::from_str(kind.name(), false), Ok(*kind));
        }
    }
}
