//! How a node comes to belong to a cluster: created once by agreement, or joined.
//!
//! ```text
//!  identity on disk? ── yes ─▶ greet the others, go on as that node
//!        │ no
//!        ▼
//!  greet every known address, again and again:
//!    somebody has a cluster            ─▶ join it (idempotent: the incarnation is on disk first),
//!                                         unless a node of this name lives there
//!    all `expect` nodes have none, and
//!    this node's name is the lowest    ─▶ create it
//! ```
//!
//! Creating needs the word of *all* expected nodes, so two halves of a partition cannot both
//! create; and a node that was promised an id stores it before it uses it.

use std::collections::BTreeMap;
use std::error::Error as _;
use std::io;
use std::path::Path;
use std::time::{Duration, Instant};

use serde::{Deserialize, Serialize};
use shoal_engine::files::{self, sync_dir};
use shoal_proto::peer::{HelloReply, HelloRequest, JoinRequest};
use shoal_proto::planted::crash_point;
use shoal_proto::{Error, ErrorCode, Level, NodeId};
use shoal_raft::Peers;
use shoal_raft::cluster::{Addresses, too_old};

/// How long one round of greetings may take per address.
const HELLO_TIMEOUT: Duration = Duration::from_secs(2);
/// How long a node whose disk is damaged looks for members that take it in anew.
const REJOIN_LIMIT: Duration = Duration::from_secs(60);
/// How long a node tries to join under the name of a node that lives: as long as a process may take to end
/// whose successor has been started already.
const NAME_PATIENCE: Duration = Duration::from_secs(20);
/// The pause between two rounds.
const ROUND_PAUSE: Duration = Duration::from_millis(200);

/// What a node knows of itself across restarts: `node.json` in the data directory.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct NodeFile {
    /// The level that a build must know to go on with the data directory: what the node has promised to the
    /// cluster. To builds that know no levels it is the layout of the directory, of which they know 1.
    format: u32,
    /// A UUID made once per data directory.
    pub incarnation: String,
    /// Zero until the cluster has given one.
    pub node: NodeId,
    /// Empty until the node belongs to a cluster.
    pub cluster_id: String,
    /// Over everything else: a flipped bit must not make this node another one.
    checksum: String,
}

impl NodeFile {
    /// Reads the file, or makes one with a fresh incarnation and stores it durably.
    pub fn open(dir: &Path) -> io::Result<NodeFile> {
        std::fs::create_dir_all(dir)?;
        match std::fs::read(dir.join("node.json")) {
            Ok(bytes) => {
                let damaged = |reason: String| {
                    io::Error::new(io::ErrorKind::InvalidData, format!("node.json is damaged: {reason}"))
                };
                let file: NodeFile =
                    serde_json::from_slice(&bytes).map_err(|error| match error.is_data() {
                        // Well-formed, but of another version.
                        true => io::Error::other(format!("node.json: {error}")),
                        false => damaged(error.to_string()),
                    })?;
                if file.checksum != file.sum() {
                    return Err(damaged("wrong checksum".to_owned()));
                }
                match file.promised() {
                    Level(0) => Err(damaged("no level".to_owned())),
                    promised if promised > Level::LATEST => {
                        Err(io::Error::other(too_old(Level::LATEST, promised)))
                    }
                    _ => Ok(file),
                }
            }
            Err(error) if error.kind() == io::ErrorKind::NotFound => {
                let mut file = NodeFile::fresh();
                file.save(dir)?;
                Ok(file)
            }
            Err(error) => Err(error),
        }
    }

    /// A node that belongs to no cluster yet.
    pub(crate) fn fresh() -> NodeFile {
        NodeFile {
            format: Level::FIRST.0,
            incarnation: uuid::Uuid::new_v4().to_string(),
            node: NodeId(0),
            cluster_id: String::new(),
            checksum: String::new(),
        }
    }

    fn sum(&self) -> String {
        let of = format!("{} {} {} {}", self.format, self.incarnation, self.node, self.cluster_id);
        blake3::hash(of.as_bytes()).to_hex()[..16].to_owned()
    }

    /// Stores the file durably.
    pub fn save(&mut self, dir: &Path) -> io::Result<()> {
        self.checksum = self.sum();
        let content = serde_json::to_vec_pretty(self).map_err(io::Error::other)?;
        files::replace(&dir.join("node.json"), &content)
    }

    /// The level that only builds which know it may go on from here.
    pub fn promised(&self) -> Level {
        Level(self.format)
    }

    /// Promises a level, once it is saved.
    pub fn promise(&mut self, level: Level) {
        self.format = self.format.max(level.0);
    }

    /// Whether the node belongs to a cluster.
    pub fn is_member(&self) -> bool {
        self.node.0 != 0
    }
}

/// Who this node is to others, and how it finds them.
#[derive(Clone, Debug)]
pub struct Discovery {
    /// Host name or ordinal.
    pub name: String,
    /// Failure domain; may be empty.
    pub zone: String,
    /// Where this node listens.
    pub addresses: Addresses,
    /// gRPC addresses of others: `host:port`; a DNS name may stand for several.
    pub join: Vec<String>,
    /// How many nodes must agree before a cluster is created.
    pub expect: usize,
}

/// What the search for a cluster came to.
#[derive(Debug, PartialEq, Eq)]
pub enum Found {
    /// This node is to create the cluster.
    Create,
    /// The cluster has taken this node in.
    Joined {
        /// The id it was given.
        node: NodeId,
        /// The cluster.
        cluster_id: String,
        /// The level that is in force there.
        level: Level,
    },
}

/// Searches until the node can join or must create. Never gives up for want of others: an operator sees in
/// the log what is being waited for.
///
/// # Errors
/// Conflict, when the cluster works at a level that this build does not know, or has a node of this name that
/// lives.
pub async fn find_cluster(peers: &Peers, discovery: &Discovery, file: &NodeFile) -> Result<Found, Error> {
    let mut rounds = 0u32;
    let mut name_is_taken_since = None;
    let mut said = String::new();
    loop {
        let greetings = greet(peers, discovery, file).await?;
        match decide(&discovery.name, discovery.expect, &greetings) {
            Decision::Create => return Ok(Found::Create),
            Decision::Join(address) => match join(peers, discovery, file, &address, false).await {
                Ok(found) => return Ok(found),
                Err(error) => {
                    if error.code == ErrorCode::Conflict {
                        let since: &mut Instant = name_is_taken_since.get_or_insert_with(Instant::now);
                        if since.elapsed() >= NAME_PATIENCE {
                            return Err(error);
                        }
                    }
                    if said != error.message {
                        tracing::warn!(%error, address, "could not join yet; will try again");
                        said = error.message;
                    }
                }
            },
            Decision::Wait(reason) if rounds.is_multiple_of(25) => {
                tracing::info!(reason, "waiting to join a cluster")
            }
            Decision::Wait(_) => {}
        }
        rounds += 1;
        tokio::time::sleep(ROUND_PAUSE).await;
    }
}

#[derive(Debug, PartialEq, Eq)]
enum Decision {
    Create,
    Join(String),
    Wait(String),
}

/// Decides from one round of greetings: address to name and cluster (empty for none).
fn decide(name: &str, expect: usize, greetings: &BTreeMap<String, (String, String)>) -> Decision {
    if let Some((address, _)) = greetings.iter().find(|(_, (_, cluster))| !cluster.is_empty()) {
        return Decision::Join(address.clone());
    }
    if greetings.values().any(|(other, _)| other == name) {
        return Decision::Wait(format!("another process is called `{name}` as well: each node needs a name"));
    }
    let mut names: Vec<&str> = greetings.values().map(|(name, _)| name.as_str()).chain([name]).collect();
    names.sort_unstable();
    names.dedup();
    if names.len() < expect {
        return Decision::Wait(format!(
            "{} of {expect} nodes have answered: {}",
            names.len(),
            names.join(", ")
        ));
    }
    match names.first() {
        Some(lowest) if *lowest == name => Decision::Create,
        _ => Decision::Wait(format!("all nodes are here; {} creates the cluster", names[0])),
    }
}

/// Greets every known address once.
///
/// # Errors
/// Conflict, when one belongs to a cluster of a level that this build does not know.
async fn greet(
    peers: &Peers,
    discovery: &Discovery,
    file: &NodeFile,
) -> Result<BTreeMap<String, (String, String)>, Error> {
    // A DNS name may stand for all nodes, this one among them.
    let is_here = |reply: &HelloReply| match reply.incarnation.as_str() {
        "" => reply.name == discovery.name,
        incarnation => incarnation == file.incarnation,
    };
    let mut greetings = BTreeMap::new();
    for address in resolve(&discovery.join).await {
        let request = HelloRequest { name: discovery.name.clone(), ..HelloRequest::default() };
        if let Some(reply) = hello(peers, request, &address).await
            && !is_here(&reply)
        {
            check_level(&reply)?;
            greetings.insert(address, (reply.name, reply.cluster_id));
        }
    }
    Ok(greetings)
}

/// Checks that this build knows the level of the cluster that a node belongs to.
fn check_level(reply: &HelloReply) -> Result<(), Error> {
    match Level::from_wire(reply.cluster_level) {
        in_force if in_force > Level::LATEST => Err(too_old(Level::LATEST, in_force)),
        _ => Ok(()),
    }
}

async fn hello(peers: &Peers, request: HelloRequest, address: &str) -> Option<HelloReply> {
    let mut client = peers.client_at(address).ok()?;
    match tokio::time::timeout(HELLO_TIMEOUT, client.hello(request)).await {
        Ok(Ok(reply)) => Some(reply.into_inner()),
        Ok(Err(status)) => {
            // The causes say more than the status, which is only that there is no connection.
            let mut cause = status.source();
            while let Some(error) = cause {
                if error.to_string().contains("certificate") {
                    tracing::error!(address, "a peer has another cluster secret than this node");
                    break;
                }
                cause = error.source();
            }
            None
        }
        Err(_) => None,
    }
}

/// All addresses behind the given ones: a name may resolve to several.
pub async fn resolve(targets: &[String]) -> Vec<String> {
    let mut addresses = Vec::new();
    for target in targets {
        match tokio::net::lookup_host(target).await {
            Ok(found) => addresses.extend(found.map(|address| address.to_string())),
            Err(error) => tracing::debug!(%error, target, "address does not resolve (yet)"),
        }
    }
    addresses.sort();
    addresses.dedup();
    addresses
}

/// Gives up an identity whose disk is damaged, and joins as the new node of `file` that takes its place. The
/// damaged files are moved into a folder beside, in place of what was there from another time.
///
/// # Errors
/// Unavailable, when no member answers in [`REJOIN_LIMIT`] or the cluster needs what is there; conflict, when this
/// build does not know the cluster's level.
pub async fn rejoin(
    peers: &Peers,
    discovery: &Discovery,
    dir: &Path,
    mut file: NodeFile,
    reason: &io::Error,
) -> Result<(), Error> {
    tracing::error!(%reason, "what this node has stored is damaged; it will join as a new node");
    let mut refusal = "no member of the cluster answers".to_owned();
    let end = Instant::now() + REJOIN_LIMIT;
    while Instant::now() < end {
        for (address, (_, cluster)) in greet(peers, discovery, &file).await? {
            if cluster.is_empty() {
                continue;
            }
            match join(peers, discovery, &file, &address, true).await {
                Ok(Found::Joined { node, cluster_id, level }) => {
                    (file.node, file.cluster_id) = (node, cluster_id);
                    file.promise(level);
                    crash_point("rejoin-joined");
                    set_aside(dir).map_err(Error::internal)?;
                    file.save(dir).map_err(Error::internal)?;
                    crash_point("rejoin-saved");
                    metrics::counter!("shoal_node_rejoins_total").increment(1);
                    tracing::warn!(node = node.0, "this node has a new id; its shards are being filled");
                    return Ok(());
                }
                Ok(Found::Create) => {}
                Err(error) => refusal = error.message,
            }
        }
        tokio::time::sleep(ROUND_PAUSE).await;
    }
    Err(Error::unavailable(format!("{reason}; and it cannot join as a new node: {refusal}")))
}

/// Moves what a node has stored into the folder `damaged`. The identity goes first and durably:
/// after a crash half-way the node has none, and can not go on as the old one without its log.
fn set_aside(dir: &Path) -> io::Result<()> {
    const PARTS: [&str; 6] = ["log", "control", "shards", "blobs", "incoming", "outgoing"];
    let aside = dir.join("damaged");
    let identity = dir.join("node.json");
    // Without an identity, what is there was begun by an attempt that did not end.
    if identity.exists() && aside.exists() {
        std::fs::remove_dir_all(&aside)?;
    }
    std::fs::create_dir_all(&aside)?;
    if identity.exists() {
        std::fs::rename(identity, aside.join("node.json"))?;
        sync_dir(&aside)?;
        sync_dir(dir)?;
        crash_point("rejoin-identity-aside");
    }
    for part in PARTS.into_iter().filter(|part| dir.join(part).exists()) {
        std::fs::rename(dir.join(part), aside.join(part))?;
    }
    sync_dir(&aside)?;
    sync_dir(dir)?;
    crash_point("rejoin-parts-aside");
    Ok(())
}

async fn join(
    peers: &Peers,
    discovery: &Discovery,
    file: &NodeFile,
    address: &str,
    gives_up: bool,
) -> Result<Found, Error> {
    let unavailable = |reason: &str| Error::new(ErrorCode::Unavailable, reason);
    let mut client = peers.client_at(address).map_err(|reason| unavailable(&reason))?;
    let request = JoinRequest {
        name: discovery.name.clone(),
        incarnation: file.incarnation.clone(),
        http_address: discovery.addresses.http.clone(),
        grpc_address: discovery.addresses.grpc.clone(),
        mesh_address: discovery.addresses.mesh.clone(),
        zone: discovery.zone.clone(),
        gives_up,
        level: Level::LATEST.0,
    };
    let reply = client.join(request).await.map_err(|status| match status.code() {
        tonic::Code::AlreadyExists => Error::new(ErrorCode::Conflict, status.message()),
        _ => unavailable(status.message()),
    })?;
    let reply = reply.into_inner();
    let level = Level::from_wire(reply.level);
    Ok(Found::Joined { node: NodeId(reply.node_id), cluster_id: reply.cluster_id, level })
}

/// Why a node does not belong to its cluster, or not any more.
#[derive(Debug, PartialEq, Eq)]
pub enum Unwelcome {
    /// It was removed.
    Removed,
    /// Its build does not know the level that is in force.
    TooOld(Level),
}

/// Learns the present addresses of members directly, for a restart at which the addresses in
/// the cluster's state may all be out of date. A node that was removed while it was away, or that the
/// cluster has outgrown, is told so by nobody else.
///
/// # Errors
/// What speaks against this node.
pub async fn learn_addresses(peers: &Peers, discovery: &Discovery, file: &NodeFile) -> Result<(), Unwelcome> {
    let mut unwelcome = None;
    for address in resolve(&discovery.join).await {
        let request = HelloRequest {
            name: discovery.name.clone(),
            node_id: file.node.0,
            cluster_id: file.cluster_id.clone(),
        };
        if let Some(reply) = hello(peers, request, &address).await
            && reply.node_id != 0
            && reply.cluster_id == file.cluster_id
        {
            if reply.is_removed {
                unwelcome = Some(Unwelcome::Removed);
            } else if check_level(&reply).is_err() {
                unwelcome = unwelcome.or(Some(Unwelcome::TooOld(Level::from_wire(reply.cluster_level))));
            }
            peers.set_address(NodeId(reply.node_id), &address);
        }
    }
    unwelcome.map_or(Ok(()), Err)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn greetings(nodes: &[(&str, &str)]) -> BTreeMap<String, (String, String)> {
        let entry = |(name, cluster): &(&str, &str)| {
            (format!("{name}:6334"), ((*name).to_owned(), (*cluster).to_owned()))
        };
        nodes.iter().map(entry).collect()
    }

    #[test]
    fn only_the_lowest_of_all_expected_nodes_creates() {
        assert_eq!(decide("a", 1, &greetings(&[])), Decision::Create);
        assert_eq!(decide("a", 3, &greetings(&[("b", ""), ("c", "")])), Decision::Create);
        assert!(matches!(decide("b", 3, &greetings(&[("a", ""), ("c", "")])), Decision::Wait(_)));
        assert!(matches!(decide("a", 3, &greetings(&[("b", "")])), Decision::Wait(_)));
    }

    #[test]
    fn two_of_one_name_do_not_create_two_clusters() {
        let twins = greetings(&[("b", ""), ("a", "")]);
        assert!(matches!(decide("a", 2, &twins), Decision::Wait(_)));
        assert_eq!(decide("a", 2, &greetings(&[("a", "id")])), Decision::Join("a:6334".into()));
    }

    #[tokio::test]
    async fn a_name_is_looked_up_and_each_address_greeted_once() {
        let targets = ["localhost:6334", "127.0.0.1:6334", "nobody.invalid:6334"].map(str::to_owned);
        let found = resolve(&targets).await;
        let here = found.iter().filter(|address| *address == "127.0.0.1:6334");
        assert_eq!(here.count(), 1, "{found:?}");
        assert!(found.iter().all(|address| address.ends_with(":6334") && !address.contains("nobody")));
    }

    #[test]
    fn a_cluster_that_exists_is_joined_even_by_the_lowest() {
        assert_eq!(decide("a", 3, &greetings(&[("b", "id"), ("c", "")])), Decision::Join("b:6334".into()));
    }

    #[test]
    fn the_node_file_survives_and_keeps_its_incarnation() {
        let dir = tempfile::tempdir().expect("a directory");
        let first = NodeFile::open(dir.path()).expect("made");
        let again = NodeFile::open(dir.path()).expect("read");
        assert_eq!(first, again);
        assert!(!first.is_member());
    }

    #[test]
    fn the_node_file_keeps_builds_out_that_do_not_know_its_level() {
        let dir = tempfile::tempdir().expect("a directory");
        let mut file = NodeFile::open(dir.path()).expect("made");
        file.promise(Level::LATEST);
        file.save(dir.path()).expect("saved");
        assert_eq!(NodeFile::open(dir.path()).expect("read").promised(), Level::LATEST);
        file.promise(Level(Level::LATEST.0 + 1));
        file.save(dir.path()).expect("saved");
        let refused = NodeFile::open(dir.path()).expect_err("this build does not know it");
        // Not damaged: then the node would give up what it has.
        assert_ne!(refused.kind(), io::ErrorKind::InvalidData);
        assert!(refused.to_string().contains("run one that is at least as new"), "{refused}");
    }
}
