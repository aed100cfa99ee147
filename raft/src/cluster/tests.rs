//! Golden scripts: each file of `testscripts/cluster` is a story of commands and what they
//! answered. `UPDATE_SCRIPTS=1 cargo test` writes the answers anew, to be read in the diff.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt::Write as _;
use std::path::Path;

use shoal_proto::{
    CollectionConfig, Distance, GroupId, Level, NodeId, Position, RequestId, Route, ShardId, VectorParams,
};

use super::*;

#[test]
fn scripts() {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("testscripts/cluster");
    let mut files: Vec<_> =
        std::fs::read_dir(&folder).expect("scripts").map(|entry| entry.expect("entry").path()).collect();
    files.sort();
    assert!(!files.is_empty(), "no scripts in {}", folder.display());
    for file in files {
        let script = std::fs::read_to_string(&file).expect("readable");
        let played = play(&script);
        if std::env::var_os("UPDATE_SCRIPTS").is_some() {
            std::fs::write(&file, &played).expect("writable");
        } else {
            assert_eq!(script, played, "{} (left: file, right: now)", file.display());
        }
    }
}

/// Plays the commands (`> …`) and comments (`# …`) of a script and puts the answers under them.
fn play(script: &str) -> String {
    let mut state = ClusterState::default();
    let mut played = String::new();
    for line in script.lines().filter(|line| line.is_empty() || line.starts_with(['#', '>'])) {
        writeln!(played, "{line}").expect("a string takes writes");
        if let Some(command) = line.strip_prefix("> ") {
            let words: Vec<&str> = command.split_whitespace().collect();
            played.push_str(&step(&mut state, &words));
        }
    }
    played
}

fn step(state: &mut ClusterState, words: &[&str]) -> String {
    let set = |text: &str| -> BTreeSet<NodeId> {
        text.split(',').filter(|id| !id.is_empty()).map(|id| NodeId(id.parse().expect("a node id"))).collect()
    };
    let number = |text: &str| -> u64 { text.parse().expect("a number") };
    let command = match words {
        ["show"] => return show(state),
        ["route", collection, route] => {
            let (_, found) = state.collection(collection).expect("exists");
            return format!("shard {}\n", state.shard_of(found, Route(number(route) as u32)));
        }
        ["behind", seen] => {
            let mut position = Position::default();
            seen.split(',').for_each(|group| position.advance(GroupId(number(group)), 1));
            return format!("{}\n", state.is_behind(&position));
        }
        ["create-cluster", id] => Command::CreateCluster { cluster_id: (*id).to_owned() },
        ["add-node", name, incarnation, zone @ ..] => Command::AddNode {
            name: (*name).to_owned(),
            incarnation: (*incarnation).to_owned(),
            addresses: Addresses { grpc: format!("{name}:6334"), ..Addresses::default() },
            zone: zone.first().copied().unwrap_or_default().to_owned(),
        },
        ["admit-node", name, incarnation, level, instead_of @ ..] => Command::AdmitNode {
            name: (*name).to_owned(),
            incarnation: (*incarnation).to_owned(),
            addresses: Addresses::default(),
            zone: String::new(),
            level: Level(number(level) as u32),
            instead_of: instead_of.first().map(|node| NodeId(number(node))),
        },
        ["raise-level", level, nodes] => {
            Command::RaiseLevel { level: Level(number(level) as u32), nodes: set(nodes) }
        }
        ["set-zone", node, zone @ ..] => Command::SetZone {
            node: NodeId(number(node)),
            zone: zone.first().copied().unwrap_or_default().to_owned(),
        },
        ["remove-node", node] => Command::RemoveNode { node: NodeId(number(node)) },
        ["create", name, shards, replicas, request] => {
            let config = vectors_of_four();
            let optional = |text: &str| text.parse().ok();
            let request_id = RequestId([number(request) as u8; 16]);
            let (shard_count, replication_factor) = (optional(shards), optional(replicas));
            let name = (*name).to_owned();
            Command::CreateCollection {
                request_id,
                name,
                config,
                shard_count,
                replication_factor,
                created_at: 0,
            }
        }
        ["drain", node, how] => Command::SetDrain {
            node: NodeId(number(node)),
            drain: match *how {
                "no" => Drain::No,
                "until-restart" => Drain::UntilRestart,
                "yes" => Drain::Yes,
                other => panic!("no such drain: {other}"),
            },
        },
        ["pause", paused] => Command::PausePlacement { is_paused: *paused == "yes" },
        ["replication", name, factor] => Command::SetReplicationFactor {
            name: (*name).to_owned(),
            replication_factor: number(factor) as u32,
        },
        ["delete", name, request] => {
            let request_id = RequestId([number(request) as u8; 16]);
            Command::DeleteCollection { request_id, name: (*name).to_owned() }
        }
        ["begin-restore", name, shards, restore, node] => Command::BeginRestore {
            restore: RequestId([number(restore) as u8; 16]),
            node: NodeId(number(node)),
            name: (*name).to_owned(),
            config: vectors_of_four(),
            shard_count: shards.parse().ok(),
            replication_factor: 1,
            created_at: 0,
        },
        ["abort-restore", restore] => {
            Command::AbortRestore { restore: RequestId([number(restore) as u8; 16]) }
        }
        ["end-restore", restore, collections, aliases @ ..] => {
            let pair = |text: &&str| {
                let (alias, collection) = text.split_once('=').expect("alias=collection");
                (alias.to_owned(), collection.to_owned())
            };
            let restore = RequestId([number(restore) as u8; 16]);
            let collections = collections.split(',').map(str::to_owned).collect();
            Command::EndRestore { restore, collections, aliases: aliases.iter().map(pair).collect() }
        }
        ["end-restore-as", restore, collections, hidden, name, only_if_free @ ..] => Command::EndRestoreAs {
            restore: RequestId([number(restore) as u8; 16]),
            collections: collections.split(',').map(str::to_owned).collect(),
            hidden: (*hidden).to_owned(),
            name: (*name).to_owned(),
            only_if_free: only_if_free == ["only-if-free"],
        },
        ["begin-reshard", reshard, name, parents, firsts, instead_of @ ..] => Command::BeginReshard {
            reshard: RequestId([number(reshard) as u8; 16]),
            instead_of: instead_of.first().map(|id| RequestId([number(id) as u8; 16])),
            name: (*name).to_owned(),
            parents: parents.split(',').map(|shard| ShardId(number(shard))).collect(),
            firsts: firsts
                .split(',')
                .map(|first| Route(u32::from_str_radix(first, 16).expect("a route")))
                .collect(),
        },
        ["end-reshard", reshard, begins] => {
            let pair = |text: &str| {
                let (shard, index) = text.split_once('=').expect("shard=index");
                (ShardId(number(shard)), number(index))
            };
            let begins = begins.split(',').map(pair).collect();
            Command::EndReshard { reshard: RequestId([number(reshard) as u8; 16]), begins }
        }
        ["abandon", shard, expected, among] => Command::AbandonShards {
            shards: BTreeMap::from([(ShardId(number(shard)), set(expected))]),
            among: set(among),
        },
        ["abort-reshard", reshard] => {
            Command::AbortReshard { reshard: RequestId([number(reshard) as u8; 16]) }
        }
        ["alias", alias, target @ ..] => {
            let collection = target.first().map(|&name| name.to_owned());
            Command::SetAlias { alias: (*alias).to_owned(), collection }
        }
        ["set-replicas", shard, expected, replicas] => Command::SetReplicas {
            shard: ShardId(number(shard)),
            expected: set(expected),
            replicas: set(replicas),
        },
        other => panic!("unknown command {other:?}"),
    };
    match state.apply(command) {
        Response::Rejected(error) => format!("rejected: {}: {error}\n", error.code.name()),
        response => format!("{response:?}\n"),
    }
}

fn vectors_of_four() -> CollectionConfig {
    let mut config = CollectionConfig::default();
    config.vectors.insert(String::new(), VectorParams::new(4, Distance::Cosine));
    config
}

fn show(state: &ClusterState) -> String {
    let mut text = format!("version {}\n", state.version);
    if state.level > Level::FIRST {
        writeln!(text, "level {}", state.level).expect("a string takes writes");
    }
    for (id, node) in &state.nodes {
        let drain = if node.drain == Drain::No { String::new() } else { format!(" drain {:?}", node.drain) };
        writeln!(text, "node {id} {} {}{drain}", node.name, node.zone).expect("a string takes writes");
    }
    for (id, shard) in &state.shards {
        let replicas: Vec<u64> = shard.replicas.iter().map(|node| node.0).collect();
        let (first, last) = (shard.first.0, shard.last.0);
        let hidden = if state.collection(&shard.collection).is_err() { " (hidden)" } else { "" };
        writeln!(text, "shard {id} of {}{hidden} {first:08x}-{last:08x} on {replicas:?}", shard.collection)
            .expect("a string takes writes");
    }
    for (alias, collection) in &state.aliases {
        writeln!(text, "alias {alias} of {collection}").expect("a string takes writes");
    }
    text
}
