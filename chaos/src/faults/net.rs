//! A private network: every node in a network namespace of its own, all of them on one bridge.
//!
//! ```text
//!  switch namespace:  bridge br0 ── v0 ── controller (this process)
//!                                ├─ v1 ── node 1   10.x.y.1
//!                                ├─ v2 ── node 2   10.x.y.2
//!                     nft, bridge family: a set of (in, out) pairs whose frames are dropped
//! ```
//!
//! With bad cables, every node's link goes through this process ([`super::cable`]) instead of a veth.
//!
//! A cut is a pair in that set, so that any partition of any shape, and one way only, is a
//! change of the set that nft makes at once. This process moves into the controller's namespace
//! itself: the machine's own network is not touched at all.

use std::collections::BTreeSet;
use std::fs::File;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result};
use nix::sched::{CloneFlags, setns};

use super::cable::Cables;
use crate::shell;

/// The network and its namespaces. They are taken down when it is dropped.
pub struct Net {
    id: String,
    nodes: usize,
    subnet: String,
    cables: Option<Cables>,
}

/// Ends of links: node `n` is end `n + 1`.
const CONTROLLER: usize = 0;

impl Net {
    /// Makes the network, with cables that can be bad or without, and moves the calling thread into
    /// it. Threads that it starts later are in it too, so this is called before there are any.
    ///
    /// # Errors
    /// When this is not allowed (it needs root) or a tool is missing.
    pub fn create(nodes: usize, with_cables: bool) -> Result<Net> {
        let number = std::process::id();
        let mut net = Net {
            id: format!("shoal-chaos-{number}"),
            nodes,
            // A network of one's own can have any address; nothing routes to or from it.
            subnet: format!("10.{}.{}", 64 + number / 256 % 64, number % 256),
            cables: with_cables.then(Cables::default),
        };
        net.build().context("a private network cannot be made")?;
        setns(File::open(path_of(&net.namespace(CONTROLLER)))?, CloneFlags::CLONE_NEWNET)
            .context("the controller cannot enter its namespace")?;
        Ok(net)
    }

    fn build(&mut self) -> Result<()> {
        let switch = self.switch();
        let clients = self.address_of(CONTROLLER);
        shell::run(&format!("ip netns add {switch}"))?;
        shell::run(&format!("ip -n {switch} link add br0 type bridge"))?;
        shell::run(&format!("ip -n {switch} link set br0 up"))?;
        for end in 0..=self.nodes {
            let space = self.namespace(end);
            shell::run(&format!("ip netns add {space}"))?;
            match self.cables.as_mut().filter(|_| end != CONTROLLER) {
                None => {
                    let veth =
                        format!("ip link add v{end} netns {switch} type veth peer name eth0 netns {space}");
                    shell::run(&veth)?;
                }
                Some(cables) => {
                    let port = format!("v{end}");
                    cables.lay((&path_of(&space), "eth0"), (&path_of(&switch), &port), clients.parse()?)?;
                }
            }
            shell::run(&format!("ip -n {space} addr add {}/24 dev eth0", self.address_of(end)))?;
            shell::run(&format!("ip -n {space} link set lo up"))?;
            shell::run(&format!("ip -n {space} link set eth0 up"))?;
            shell::run(&format!("ip -n {switch} link set v{end} master br0"))?;
            shell::run(&format!("ip -n {switch} link set v{end} up"))?;
        }
        let rules = "table bridge chaos {\n set cut { type ifname . ifname; }\n \
                     chain pass { type filter hook forward priority 0; policy accept;\n \
                     iifname . oifname @cut drop;\n }\n}\n";
        shell::feed(&format!("ip netns exec {switch} nft -f -"), rules)
    }

    fn switch(&self) -> String {
        format!("{}-s", self.id)
    }

    fn namespace(&self, end: usize) -> String {
        format!("{}-{end}", self.id)
    }

    fn address_of(&self, end: usize) -> String {
        match end {
            CONTROLLER => format!("{}.254", self.subnet),
            node => format!("{}.{node}", self.subnet),
        }
    }

    /// The address of node `n`, from 0.
    pub fn address(&self, node: usize) -> String {
        self.address_of(node + 1)
    }

    /// The command that runs another one on node `n`.
    pub fn launcher(&self, node: usize) -> Vec<String> {
        ["ip", "netns", "exec", &self.namespace(node + 1)].map(str::to_owned).to_vec()
    }

    /// From now on exactly these pairs of nodes do not reach each other, in this direction.
    ///
    /// # Errors
    /// When nft refuses.
    pub fn cut(&self, pairs: &BTreeSet<(usize, usize)>) -> Result<()> {
        let mut script = "flush set bridge chaos cut\n".to_owned();
        for (from, to) in pairs {
            script.push_str(&format!(
                "add element bridge chaos cut {{ \"v{}\" . \"v{}\" }}\n",
                end(*from),
                end(*to)
            ));
        }
        shell::feed(&format!("ip netns exec {} nft -f -", self.switch()), &script)
    }

    /// The cables.
    ///
    /// # Errors
    /// When the network was made without any.
    pub fn cables(&self) -> Result<&Cables> {
        self.cables.as_ref().context("the network was made without bad cables")
    }

    /// From now on this share of frames between nodes is lost; none when zero.
    ///
    /// # Errors
    /// When nft refuses.
    pub fn lose(&self, percent: u32) -> Result<()> {
        let mut script = "flush chain bridge chaos pass\n".to_owned();
        script.push_str("add rule bridge chaos pass iifname . oifname @cut drop\n");
        if percent > 0 {
            // Not the controller's: its clients have their own troubles.
            script.push_str(&format!(
                "add rule bridge chaos pass iifname != \"v0\" oifname != \"v0\" numgen random mod 100 < {percent} drop\n"
            ));
        }
        shell::feed(&format!("ip netns exec {} nft -f -", self.switch()), &script)
    }
}

impl Drop for Net {
    fn drop(&mut self) {
        self.cables.take();
        // A namespace ends with its last process; what is left behind only has a name.
        for end in 0..=self.nodes {
            drop(shell::run(&format!("ip netns delete {}", self.namespace(end))));
        }
        drop(shell::run(&format!("ip netns delete {}", self.switch())));
    }
}

fn path_of(namespace: &str) -> PathBuf {
    Path::new("/run/netns").join(namespace)
}

/// The end of a node. That of [`CLIENTS`](super::partition::CLIENTS) is the controller's.
fn end(of: usize) -> usize {
    of.wrapping_add(1)
}
