//! How a level comes into force ([`shoal_proto::level`]), and what is refused until then.
//!
//! ```text
//!  control group's leader ── Hello ─────────▶ every member: which level does your build know?
//!                         ── PromiseLevel ──▶ every member: a file on its disk keeps older builds out from now on
//!                         ── RaiseLevel ────▶ the log: exactly these members have promised
//! ```
//!
//! Nodes tell their levels in greetings and not in the log: builds that knew no levels would not understand such
//! an entry, and leave out what a greeting has more than they know. Who does not answer may be of any build, so
//! that a level comes into force only while all members run. Until then each of them can go back to the build
//! before; from the promises on none can.
//!
//! **2026-11, promises.** The leader could raise the level as soon as all have told theirs. But a node may be
//! put back to the build before just then, and that build would skip the entry and go its own way. A promise
//! costs one file on each node, and such a build refuses to start where there is one.

use std::collections::{BTreeMap, BTreeSet};
use std::io;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use futures::future::join_all;
use parking_lot::Mutex;
use shoal_proto::peer::HelloRequest;
use shoal_proto::{Error, ErrorCode, GroupId, Level, NodeId};
use shoal_raft::Lane;
use shoal_raft::cluster::{ClusterState, Command, too_old};

use crate::bootstrap::NodeFile;
use crate::call::{Call, Reply};
use crate::cluster::Cluster;

/// How often the leader of the control group looks whether a level can come into force.
const TICK: Duration = Duration::from_millis(500);
/// How long a node may take to tell its level.
const HELLO_TIMEOUT: Duration = Duration::from_secs(2);
/// How long a node may take to write its promise down.
const PROMISE_TIMEOUT: Duration = Duration::from_secs(5);
/// How long the control group may take to bring a level into force.
const RAISE_TIMEOUT: Duration = Duration::from_secs(5);

/// What a node says of its build.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Build {
    /// Its version.
    pub version: String,
    /// The highest level that it knows.
    pub level: Level,
}

/// The node's file, in which it keeps what it has promised.
pub(crate) struct Promise {
    dir: PathBuf,
    file: Mutex<NodeFile>,
}

impl Promise {
    pub(crate) fn new(dir: &Path, file: NodeFile) -> Promise {
        Promise { dir: dir.to_owned(), file: Mutex::new(file) }
    }

    fn has(&self, level: Level) -> bool {
        self.file.lock().promised() >= level
    }

    /// Writes it down durably.
    fn make(&self, level: Level) -> io::Result<()> {
        let mut file = self.file.lock();
        if file.promised() >= level {
            return Ok(());
        }
        let mut promised = file.clone();
        promised.promise(level);
        promised.save(&self.dir)?;
        *file = promised;
        Ok(())
    }
}

impl Cluster {
    /// What those members that answer say of their builds.
    pub async fn builds(&self) -> BTreeMap<NodeId, Build> {
        let state = self.state();
        let asked = state.nodes.keys().map(|node| async move { Some((*node, self.build_of(*node).await?)) });
        join_all(asked).await.into_iter().flatten().collect()
    }

    async fn build_of(&self, node: NodeId) -> Option<Build> {
        if node == self.node() {
            return Some(Build { version: env!("CARGO_PKG_VERSION").to_owned(), level: Level::LATEST });
        }
        let mut client = self.groups().peers().client(node, Lane::Fast).ok()?;
        let asked = client.hello(HelloRequest::default());
        let reply = tokio::time::timeout(HELLO_TIMEOUT, asked).await.ok()?.ok()?.into_inner();
        // Its address may have changed hands.
        let is_meant = reply.node_id == node.0;
        is_meant.then(|| Build { version: reply.version, level: Level::from_wire(reply.level) })
    }

    /// Checks that a level is in force, as far as this node knows.
    ///
    /// # Errors
    /// Conflict, which says which nodes are to be upgraded; unavailable when it is about to come into force.
    pub(crate) async fn require(&self, level: Level) -> Result<(), Error> {
        if level == Level::FIRST || level <= self.state().level {
            return Ok(());
        }
        let builds = self.builds().await;
        Err(refusal(&self.state(), &builds, level))
    }

    /// Writes down that only builds that know a level may go on with this node's data.
    ///
    /// # Errors
    /// When this one does not know it, or it cannot be written.
    pub(crate) async fn promise_level(&self, level: Level) -> Result<(), Error> {
        if level > Level::LATEST {
            return Err(too_old(Level::LATEST, level));
        }
        let promise =
            self.promise().ok_or_else(|| Error::unavailable("this node is still starting"))?.clone();
        if promise.has(level) {
            return Ok(());
        }
        let made = tokio::task::spawn_blocking(move || promise.make(level)).await;
        made.map_err(Error::internal)?.map_err(Error::internal)?;
        tracing::info!(
            cluster_level = level.0,
            "from now on only builds that know this level can run on this data"
        );
        Ok(())
    }

    /// Brings the highest level into force that all members know.
    async fn raise_level(&self) -> Result<(), Error> {
        let state = self.state();
        let builds = self.builds().await;
        let level = match common(&state, &builds) {
            Some(level) if level > state.level => level,
            _ => return Err(refusal(&state, &builds, Level::LATEST)),
        };
        let promises = state.nodes.keys().map(|node| async move {
            match self.call(*node, Call::PromiseLevel { level }, PROMISE_TIMEOUT).await {
                Reply::Done => Ok(()),
                Reply::Failed(error) => Err(error),
                _ => Err(Error::internal(format!(
                    "node {node} answered a request for a promise with something else"
                ))),
            }
        });
        join_all(promises).await.into_iter().collect::<Result<(), Error>>()?;
        let nodes: BTreeSet<NodeId> = state.nodes.keys().copied().collect();
        self.control(Command::RaiseLevel { level, nodes }, Instant::now() + RAISE_TIMEOUT).await?;
        tracing::info!(cluster_level = level.0, "a level has come into force: all nodes know it");
        Ok(())
    }
}

/// Where this node leads the control group, brings levels into force, until there is none that this build knows
/// and the cluster does not have.
pub(crate) fn keep_raising(cluster: Cluster) {
    tokio::spawn(async move {
        let mut said = String::new();
        while cluster.state().level < Level::LATEST {
            tokio::time::sleep(TICK).await;
            let leads = cluster.groups().get(GroupId::CONTROL).is_ok_and(|control| control.is_leader());
            if !leads {
                continue;
            }
            if let Err(error) = cluster.raise_level().await
                && said != error.message
            {
                tracing::info!(reason = error.message, "the level of the cluster stays what it is");
                said = error.message;
            }
        }
    });
}

/// Promises what is in force already, and goes by it: on a node that has just joined, and on one that was away.
pub(crate) fn keep_promising(cluster: Cluster) {
    let mut watch = cluster.watch();
    // At once: a snapshot that was being sent when this process ended goes on when its shard opens.
    cluster.groups().set_snapshot_offers(cluster.state().level >= Level::SNAPSHOT_OFFERS);
    tokio::spawn(async move {
        loop {
            let level = watch.borrow_and_update().level;
            cluster.groups().set_snapshot_offers(level >= Level::SNAPSHOT_OFFERS);
            if let Err(error) = cluster.promise_level(level).await {
                tracing::warn!(%error, "the level in force could not be written down yet");
                tokio::time::sleep(TICK).await;
                continue;
            }
            if watch.changed().await.is_err() {
                return;
            }
        }
    });
}

/// Ends a process whose build does not know what the cluster has agreed upon: it must not apply any of it.
pub(crate) fn exit_too_old(in_force: Level) -> ! {
    let reason = too_old(Level::LATEST, in_force);
    tracing::error!(%reason, "this node stops");
    std::process::exit(crate::EXIT_TOO_OLD);
}

/// The highest level that all members know; none while one does not answer.
fn common(state: &ClusterState, builds: &BTreeMap<NodeId, Build>) -> Option<Level> {
    let levels = state.nodes.keys().map(|node| Some(builds.get(node)?.level));
    levels.collect::<Option<Vec<Level>>>()?.into_iter().min().map(|level| level.min(Level::LATEST))
}

/// Why a level is not in force.
fn refusal(state: &ClusterState, builds: &BTreeMap<NodeId, Build>, level: Level) -> Error {
    let (mut older, mut silent) = (Vec::new(), Vec::new());
    for (id, node) in &state.nodes {
        match builds.get(id) {
            None => silent.push(node.name.as_str()),
            Some(build) if build.level < level => {
                older.push(format!("{} (version {}, level {})", node.name, build.version, build.level))
            }
            Some(_) => {}
        }
    }
    let begin = format!("this needs level {level}, and the cluster works at level {}", state.level);
    match (older.as_slice(), silent.as_slice()) {
        ([], []) => {
            Error::unavailable(format!("{begin}: all nodes know it, and it is about to come into force"))
        }
        ([], silent) => {
            let silent = silent.join(", ");
            Error::new(
                ErrorCode::Conflict,
                format!("{begin}: nobody knows the build of {silent}: start or remove it"),
            )
        }
        (older, _) => {
            let older = older.join(", ");
            Error::new(
                ErrorCode::Conflict,
                format!("{begin}: it still has nodes of earlier builds: upgrade {older}"),
            )
        }
    }
}

#[cfg(test)]
mod tests {
    use shoal_raft::cluster::Addresses;

    use super::*;

    fn cluster_of(names: &[&str]) -> ClusterState {
        let mut state = ClusterState::default();
        for name in names {
            let (name, incarnation) = ((*name).to_owned(), format!("inc-{name}"));
            state.apply(Command::AddNode {
                name,
                incarnation,
                addresses: Addresses::default(),
                zone: String::new(),
            });
        }
        state
    }

    fn builds(levels: &[(u64, u32)]) -> BTreeMap<NodeId, Build> {
        let build = |level| Build { version: "0.1.0".to_owned(), level: Level(level) };
        levels.iter().map(|(node, level)| (NodeId(*node), build(*level))).collect()
    }

    #[test]
    fn the_level_is_that_of_the_oldest_build_and_everybody_must_tell() {
        let state = cluster_of(&["a", "b"]);
        assert_eq!(common(&state, &builds(&[(1, 2), (2, 1)])), Some(Level::FIRST));
        assert_eq!(common(&state, &builds(&[(1, 2), (2, 2)])), Some(Level(2)));
        assert_eq!(
            common(&state, &builds(&[(1, 9), (2, 9)])),
            Some(Level::LATEST),
            "this build knows no other"
        );
        assert_eq!(common(&state, &builds(&[(1, 2)])), None);
        // Who has left is not waited for.
        assert_eq!(common(&state, &builds(&[(1, 2), (2, 2), (3, 1)])), Some(Level(2)));
    }

    #[test]
    fn a_refusal_says_what_is_to_be_done() {
        let state = cluster_of(&["a", "b", "c"]);
        let refused = |levels: &[(u64, u32)]| refusal(&state, &builds(levels), Level(2));
        let older = refused(&[(1, 2), (2, 1)]);
        assert_eq!(older.code, ErrorCode::Conflict);
        assert!(older.message.ends_with("upgrade b (version 0.1.0, level 1)"), "{older}");
        let silent = refused(&[(1, 2), (2, 2)]);
        assert!(silent.message.ends_with("nobody knows the build of c: start or remove it"), "{silent}");
        assert_eq!(refused(&[(1, 2), (2, 2), (3, 2)]).code, ErrorCode::Unavailable);
    }

    #[test]
    fn a_promise_is_kept_on_the_disk() {
        let dir = tempfile::tempdir().expect("a directory");
        let promise = Promise::new(dir.path(), NodeFile::open(dir.path()).expect("made"));
        assert!(promise.has(Level::FIRST) && !promise.has(Level::LATEST));
        promise.make(Level::LATEST).expect("written");
        promise.make(Level::FIRST).expect("a lower one is part of it");
        let again = Promise::new(dir.path(), NodeFile::open(dir.path()).expect("read"));
        assert!(again.has(Level::LATEST));
    }
}
