//! Golden scripts: each file of `testscripts/placement` is a story of what happens to a cluster and
//! what placement does about it. `UPDATE_SCRIPTS=1 cargo test` writes the answers anew, to be read in
//! the diff.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt::Write as _;
use std::path::Path;
use std::time::Duration;

use proptest::prelude::*;
use shoal_proto::{CollectionConfig, Distance, Level, NodeId, RequestId, ShardId, VectorParams};
use shoal_raft::cluster::{Addresses, ClusterState, Command, Drain, Response};

use super::control_voters;
use super::plan::{
    Load, Moving, PlacementLimits, Seen, Step, Unled, is_out_of_reach, keeps_from_leaving, likely_reason,
    needs, plan, without_leader,
};

#[test]
fn scripts() {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("testscripts/placement");
    let mut files: Vec<_> =
        std::fs::read_dir(&folder).expect("scripts").map(|entry| entry.expect("entry").path()).collect();
    files.sort();
    assert!(!files.is_empty(), "no scripts in {}", folder.display());
    for file in files {
        let script = std::fs::read_to_string(&file).expect("readable");
        let mut story = Story::default();
        let mut played = String::new();
        for line in script.lines().filter(|line| line.is_empty() || line.starts_with(['#', '>'])) {
            writeln!(played, "{line}").expect("a string takes writes");
            if let Some(command) = line.strip_prefix("> ") {
                let words: Vec<&str> = command.split_whitespace().collect();
                played.push_str(&story.step(&words));
            }
        }
        if std::env::var_os("UPDATE_SCRIPTS").is_some() {
            std::fs::write(&file, &played).expect("writable");
        } else {
            assert_eq!(script, played, "{} (left: file, right: now)", file.display());
        }
    }
}

/// A cluster whose shards' leaders do at once what the state wants of them.
#[derive(Default)]
struct Story {
    state: ClusterState,
    silent: BTreeMap<NodeId, Duration>,
    leaders: BTreeMap<ShardId, NodeId>,
    /// Shards whose leaders have not got to it yet, as they were.
    stuck: BTreeMap<ShardId, BTreeSet<NodeId>>,
    calm: Duration,
    requests: u8,
}

fn number(text: &str) -> u64 {
    text.parse().expect("a number")
}

impl Story {
    fn step(&mut self, words: &[&str]) -> String {
        let command = match words {
            ["node", name, zone @ ..] => Command::AddNode {
                name: (*name).to_owned(),
                incarnation: format!("{name}-{}", self.state.version),
                addresses: Addresses::default(),
                zone: zone.first().copied().unwrap_or_default().to_owned(),
            },
            ["collection", name, shards, replicas] => self.collection(name, number(shards), number(replicas)),
            // As all nodes know of it by then.
            ["zone", node, zone] => {
                let nodes = self.state.nodes.keys().copied().collect();
                self.state.apply(Command::RaiseLevel { level: Level::LATEST, nodes });
                Command::SetZone { node: NodeId(number(node)), zone: (*zone).to_owned() }
            }
            ["drain", node] => Command::SetDrain { node: NodeId(number(node)), drain: Drain::Yes },
            ["undrain", node] => Command::SetDrain { node: NodeId(number(node)), drain: Drain::No },
            ["remove", node] => Command::RemoveNode { node: NodeId(number(node)) },
            ["replication", name, factor] => Command::SetReplicationFactor {
                name: (*name).to_owned(),
                replication_factor: number(factor) as u32,
            },
            ["silent", node, seconds] => {
                self.silent.insert(NodeId(number(node)), Duration::from_secs(number(seconds)));
                return String::new();
            }
            ["back", node] => {
                self.silent.remove(&NodeId(number(node)));
                return String::new();
            }
            ["calm", seconds] => {
                self.calm = Duration::from_secs(number(seconds));
                return String::new();
            }
            ["leader", shard, node] => {
                self.leaders.insert(ShardId(number(shard)), NodeId(number(node)));
                return String::new();
            }
            ["place", shard, nodes] => {
                let shard = ShardId(number(shard));
                let expected = self.state.shards[&shard].replicas.clone();
                let replicas = nodes.split(',').map(|node| NodeId(number(node))).collect();
                Command::SetReplicas { shard, expected, replicas }
            }
            ["stuck", shard] => {
                let shard = ShardId(number(shard));
                self.stuck.insert(shard, self.state.shards[&shard].replicas.clone());
                return String::new();
            }
            ["unstuck", shard] => {
                self.stuck.remove(&ShardId(number(shard)));
                return String::new();
            }
            ["show"] => return self.show(),
            ["plan"] => return self.plan(),
            ["run"] => return self.run(),
            ["needs", node] => {
                let shard = needs(&self.state, &self.load(), NodeId(number(node)));
                return shard.map_or("nothing\n".to_owned(), |shard| format!("shard {shard}\n"));
            }
            ["out-of-reach", without @ ..] => {
                let (load, without) = (self.load(), without.first().map(|node| NodeId(number(node))));
                let shards = self.state.shards.keys();
                let lost: Vec<String> = shards
                    .filter(|id| is_out_of_reach(&self.state, &load, **id, without))
                    .map(|id| format!("shard {id}\n"))
                    .collect();
                return if lost.is_empty() { "nothing\n".to_owned() } else { lost.concat() };
            }
            ["without-leader"] => return format!("{}\n", without_leader(&self.state, &self.load())),
            ["why"] => {
                let (load, limits) = (self.load(), PlacementLimits::default());
                let moving = plan(&self.state, &load, &limits).moving;
                let why = |moving: &Moving| likely_reason(&self.state, &load, &limits, moving);
                let lines = moving.iter().map(|moving| format!("shard {}: {}\n", moving.shard, why(moving)));
                return lines.collect();
            }
            ["leaving", node] => {
                let reasons = keeps_from_leaving(&self.state, &self.load(), NodeId(number(node)));
                return if reasons.is_empty() { "can go\n".to_owned() } else { reasons.join("\n") + "\n" };
            }
            other => panic!("unknown command {other:?}"),
        };
        match self.state.apply(command) {
            Response::Rejected(error) => format!("rejected: {}: {error}\n", error.code.name()),
            Response::Done => String::new(),
            response => format!("{response:?}\n"),
        }
    }

    fn collection(&mut self, name: &str, shards: u64, replicas: u64) -> Command {
        self.requests += 1;
        let mut config = CollectionConfig::default();
        config.vectors.insert(String::new(), VectorParams::new(4, Distance::Cosine));
        Command::CreateCollection {
            request_id: RequestId([self.requests; 16]),
            name: name.to_owned(),
            config,
            shard_count: Some(shards as u32),
            replication_factor: Some(replicas as u32),
            created_at: 0,
        }
    }

    fn load(&self) -> Load {
        let (mut shards, mut unled) = (BTreeMap::new(), BTreeMap::new());
        for (id, shard) in &self.state.shards {
            let wanted = self.stuck.get(id).unwrap_or(&shard.replicas);
            let answering: Vec<NodeId> =
                wanted.iter().copied().filter(|node| !self.silent.contains_key(node)).collect();
            if 2 * answering.len() <= wanted.len() {
                if !answering.is_empty() {
                    let (holders, voters) = (answering.into_iter().collect(), wanted.clone());
                    unled.insert(*id, Unled { holders, voters, learners: BTreeSet::new() });
                }
                continue;
            }
            let known = self.leaders.get(id).copied().filter(|leader| answering.contains(leader));
            let leader = known.unwrap_or(answering[id.0 as usize % answering.len()]);
            let seen = Seen { leader, voters: wanted.clone(), learners: BTreeSet::new(), is_joint: false };
            shards.insert(*id, seen);
        }
        Load { silent: self.silent.clone(), shards, unled, calm_for: self.calm }
    }

    fn plan(&self) -> String {
        let plan = plan(&self.state, &self.load(), &PlacementLimits::default());
        let mut text = String::new();
        for planned in &plan.steps {
            writeln!(text, "{}: {}", planned.step, planned.reason).expect("a string takes writes");
        }
        for moving in &plan.moving {
            let (arriving, leaving) = (&moving.arriving, &moving.leaving);
            writeln!(text, "under way: shard {}: {arriving:?} for {leaving:?}", moving.shard)
                .expect("a string takes writes");
        }
        for waiting in &plan.waiting {
            writeln!(text, "waits: {waiting}").expect("a string takes writes");
        }
        if text.is_empty() { "nothing\n".to_owned() } else { text }
    }

    /// Takes all steps of a plan; returns whether there was one.
    fn take(&mut self) -> Option<String> {
        let plan = plan(&self.state, &self.load(), &PlacementLimits::default());
        let mut text = String::new();
        for planned in plan.steps {
            writeln!(text, "{}: {}", planned.step, planned.reason).expect("a string takes writes");
            match planned.step {
                Step::SetReplicas { shard, from, to } => {
                    let command = Command::SetReplicas { shard, expected: from, replicas: to };
                    assert_eq!(self.state.apply(command), Response::Done);
                }
                Step::MoveLeader { shard, to, .. } => drop(self.leaders.insert(shard, to)),
            }
        }
        (!text.is_empty()).then_some(text)
    }

    fn run(&mut self) -> String {
        let mut text = String::new();
        for _ in 0..200 {
            match self.take() {
                Some(taken) => text.push_str(&taken),
                None => return text + &self.plan(),
            }
        }
        panic!("placement does not come to rest:\n{text}");
    }

    fn show(&self) -> String {
        let load = self.load();
        let mut text = String::new();
        for (id, node) in &self.state.nodes {
            let replicas = self.state.shards.values().filter(|shard| shard.replicas.contains(id)).count();
            let leads = load.shards.values().filter(|seen| seen.leader == *id).count();
            let zone = if node.zone.is_empty() { String::new() } else { format!(" in {}", node.zone) };
            writeln!(text, "node {id}{zone}: {replicas} replicas, leads {leads}")
                .expect("a string takes writes");
        }
        text
    }
}

#[test]
fn control_voters_are_odd_spread_and_stay() {
    let none = BTreeSet::new();
    let mut state = ClusterState::default();
    let mut sizes = Vec::new();
    for (number, zone) in ["a", "a", "a", "b", "c", "c"].iter().enumerate() {
        state.apply(Command::AddNode {
            name: format!("n{number}"),
            incarnation: format!("i{number}"),
            addresses: Addresses::default(),
            zone: (*zone).to_owned(),
        });
        sizes.push(control_voters(&state, &none, &none, &none).len());
    }
    assert_eq!(sizes, [1, 1, 3, 3, 5, 5]);
    let ids = |ids: &[u64]| -> BTreeSet<NodeId> { ids.iter().copied().map(NodeId).collect() };
    let chosen = control_voters(&state, &none, &none, &none);
    assert_eq!(chosen, ids(&[1, 2, 3, 4, 5]), "one of each zone, then the lowest");
    let voting = ids(&[2, 3, 4, 5, 6]);
    assert_eq!(control_voters(&state, &voting, &none, &none), voting, "who votes goes on");
    assert_eq!(
        control_voters(&state, &voting, &ids(&[3]), &ids(&[3])),
        ids(&[1, 2, 4, 5, 6]),
        "who is lost is replaced"
    );
    state.apply(Command::SetDrain { node: NodeId(2), drain: Drain::Yes });
    assert_eq!(
        control_voters(&state, &voting, &none, &none),
        ids(&[1, 3, 4, 5, 6]),
        "who is drained as well"
    );
    let gone = ids(&[1, 4, 5]);
    assert_eq!(control_voters(&state, &voting, &none, &gone), voting, "not to a majority that is not there");
}

proptest! {
    /// Whatever the nodes, zones, shards and drains: placement comes to rest, every shard then has the
    /// replicas that it can have, on nodes that are not drained, and nobody holds two more than another
    /// one where zones do not ask for it.
    #[test]
    fn placement_comes_to_rest(
        zones in proptest::collection::vec(0u8..3, 1..8),
        collections in proptest::collection::vec((1u64..7, 1u64..5), 1..4),
        later in proptest::collection::vec(0u8..3, 0..3),
        drained in proptest::collection::btree_set(1u64..9, 0..4),
    ) {
        let mut story = Story::default();
        let add = |story: &mut Story, at: usize, zone: u8| {
            story.step(&["node", &format!("n{at}"), &format!("z{zone}")]);
        };
        for (at, zone) in zones.iter().enumerate() {
            add(&mut story, at, *zone);
        }
        for (at, (shards, replicas)) in collections.iter().enumerate() {
            story.step(&["collection", &format!("c{at}"), &shards.to_string(), &replicas.to_string()]);
        }
        for (at, zone) in later.iter().enumerate() {
            add(&mut story, zones.len() + at, *zone);
        }
        let nodes = zones.len() + later.len();
        let drained: Vec<u64> = drained.into_iter().filter(|node| *node <= nodes as u64).collect();
        let used = nodes - drained.len();
        for node in drained.iter().take(nodes - 1) {
            story.step(&["drain", &node.to_string()]);
        }
        let used = used.max(1);
        story.calm = Duration::from_secs(3600);
        story.run();
        for shard in story.state.shards.values() {
            let wanted = story.state.collections[&shard.collection].replication_factor as usize;
            prop_assert_eq!(shard.replicas.len(), wanted.min(used));
            let is_used = |node: &NodeId| story.state.nodes[node].drain == Drain::No;
            prop_assert!(shard.replicas.iter().all(is_used), "{:?}", shard.replicas);
        }
    }
}
