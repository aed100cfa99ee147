//! Free ports on loopback that stay free while the node that owns them is down.

use std::collections::BTreeSet;
use std::net::TcpListener;
use std::sync::Mutex;

use anyhow::{Context, Result};

/// The lowest port that is handed out.
const LOWEST: u16 = 10_000;

/// Ports of one node.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Ports {
    /// Where clients connect.
    pub http: u16,
    /// Where peers connect.
    pub grpc: u16,
    /// Where peers' actors connect.
    pub mesh: u16,
}

impl Ports {
    /// Three ports that nothing listens on and that this process has not handed out before.
    ///
    /// They lie below the kernel's range for outgoing connections. A port from `bind(0)` would
    /// lie inside it: while a node is down, another node's outgoing connection may take its
    /// port, and one that dials the dead node may even be connected to itself.
    ///
    /// # Errors
    /// When no port is free.
    pub fn reserve() -> Result<Ports> {
        Ok(Ports { http: reserve()?, grpc: reserve()?, mesh: reserve()? })
    }
}

fn reserve() -> Result<u16> {
    static TAKEN: Mutex<BTreeSet<u16>> = Mutex::new(BTreeSet::new());
    let end = first_outgoing_port().max(LOWEST + 1000);
    let mut taken = TAKEN.lock().expect("nothing panics while it holds the lock");
    // Other test processes choose at the same time, so the start is random.
    let is_free = |port: &u16| TcpListener::bind(("127.0.0.1", *port)).is_ok();
    let port = (0..1000)
        .map(|_| rand::random_range(LOWEST..end))
        .filter(|port| !taken.contains(port))
        .find(is_free)
        .context("1000 random ports are all in use")?;
    taken.insert(port);
    Ok(port)
}

/// The start of the range that the kernel takes ports of outgoing connections from.
fn first_outgoing_port() -> u16 {
    let range = std::fs::read_to_string("/proc/sys/net/ipv4/ip_local_port_range").unwrap_or_default();
    range.split_whitespace().next().and_then(|first| first.parse().ok()).unwrap_or(32_768)
}
