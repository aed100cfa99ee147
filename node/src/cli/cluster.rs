//! `shoal cluster …`: what operators look at, and what they order.

use std::io::IsTerminal;
use std::time::{Duration, Instant};

use anyhow::{Result, bail};
use clap::Subcommand;
use reqwest::Method;
use serde_json::{Value, json};

use super::client::{Client, ClientArgs};
use super::table::{Table, list, text};

/// How often a view that is watched is drawn anew, and a drain is asked after.
const TICK: Duration = Duration::from_secs(1);

/// What can be done with a cluster.
#[derive(Subcommand)]
pub enum ClusterCommand {
    /// Show every node's own word, who holds and leads what, and what placement does.
    Status {
        #[command(flatten)]
        client: ClientArgs,
        /// Draw it anew every second.
        #[arg(long)]
        watch: bool,
    },
    /// Show what placement would do next, what it is at, and what it waits for.
    Plan {
        #[command(flatten)]
        client: ClientArgs,
    },
    /// Move everything off a node; returns when it can be stopped and nothing is lost.
    Drain {
        /// Name or id.
        node: String,
        #[command(flatten)]
        client: ClientArgs,
        /// Seconds after which to give up. The drain itself goes on.
        #[arg(long, default_value_t = 600)]
        timeout: u64,
    },
    /// Use a node again.
    Undrain {
        /// Name or id.
        node: String,
        #[command(flatten)]
        client: ClientArgs,
    },
    /// Take a node out of the cluster for good: one that is drained, or gone.
    Remove {
        /// Name or id.
        node: String,
        #[command(flatten)]
        client: ClientArgs,
        /// Remove it although it lives and is not drained, or a shard waits for it; never what would be lost
        /// with it.
        #[arg(long)]
        force: bool,
    },
    /// Begin a shard anew, empty, whose data are out of reach for good; `status` names those that are.
    Abandon {
        /// The shard's id.
        shard: u64,
        /// Its collection.
        #[arg(long)]
        collection: String,
        #[command(flatten)]
        client: ClientArgs,
    },
    /// Move a replica. Placement may move it back, unless it is paused.
    Move {
        /// The shard's id.
        shard: u64,
        /// The node that holds it: name or id.
        #[arg(long)]
        from: String,
        /// The node that is to hold it: name or id.
        #[arg(long)]
        to: String,
        #[command(flatten)]
        client: ClientArgs,
    },
    /// Let another of its replicas lead a shard.
    Lead {
        /// The shard's id.
        shard: u64,
        /// The node that is to lead it: name or id.
        #[arg(long)]
        to: String,
        #[command(flatten)]
        client: ClientArgs,
    },
    /// Change how many replicas a collection wants of each shard.
    Replicate {
        /// The collection.
        collection: String,
        /// The number of replicas.
        factor: u32,
        #[command(flatten)]
        client: ClientArgs,
    },
    /// Split a shard while it is used; returns when that is done.
    Split {
        /// The shard's id.
        shard: u64,
        /// How many shards take its place.
        #[arg(long, default_value_t = 2)]
        into: u32,
        #[command(flatten)]
        client: ClientArgs,
    },
    /// Make one shard of two neighbours while they are used; returns when that is done.
    Merge {
        /// The shard's id.
        shard: u64,
        /// The id of a shard whose range begins or ends where its own ends or begins.
        other: u64,
        #[command(flatten)]
        client: ClientArgs,
    },
    /// Keep placement from moving anything by itself.
    Pause {
        #[command(flatten)]
        client: ClientArgs,
    },
    /// Let placement go on.
    Resume {
        #[command(flatten)]
        client: ClientArgs,
    },
}

/// Runs one of them.
///
/// # Errors
/// What the cluster refused, for the person who typed it.
pub async fn run(command: ClusterCommand) -> Result<()> {
    match command {
        ClusterCommand::Status { client, watch } => status(&Client::new(client)?, watch).await,
        ClusterCommand::Plan { client } => {
            print_plan(&Client::new(client)?.get("/admin/placement").await?);
            Ok(())
        }
        ClusterCommand::Drain { node, client, timeout } => {
            drain(&Client::new(client)?, &node, Duration::from_secs(timeout)).await
        }
        ClusterCommand::Undrain { node, client } => {
            order(client, Method::DELETE, &format!("/admin/nodes/{node}/drain"), None).await?;
            println!("node {node} is used again");
            Ok(())
        }
        ClusterCommand::Remove { node, client, force } => {
            order(client, Method::DELETE, &format!("/admin/nodes/{node}?force={force}"), None).await?;
            println!("node {node} is removed; its id is never used again");
            Ok(())
        }
        ClusterCommand::Abandon { shard, collection, client } => {
            let body = json!({"collection": collection});
            order(client, Method::POST, &format!("/admin/shards/{shard}/abandon"), Some(body)).await?;
            println!("shard {shard} of {collection} is given up; an empty one takes its place");
            Ok(())
        }
        ClusterCommand::Move { shard, from, to, client } => {
            let body = json!({"from": from, "to": to});
            order(client, Method::POST, &format!("/admin/shards/{shard}/move"), Some(body)).await?;
            println!("shard {shard} moves from {from} to {to}; `shoal cluster status` shows how far it is");
            Ok(())
        }
        ClusterCommand::Lead { shard, to, client } => {
            let body = json!({"to": to});
            order(client, Method::POST, &format!("/admin/shards/{shard}/leader"), Some(body)).await?;
            println!("{to} is asked to lead shard {shard}");
            Ok(())
        }
        ClusterCommand::Replicate { collection, factor, client } => {
            let body = json!({"replication_factor": factor});
            let path = format!("/admin/collections/{collection}/replication");
            order(client, Method::PUT, &path, Some(body)).await?;
            println!("every shard of {collection} is to have {factor} replicas");
            Ok(())
        }
        ClusterCommand::Split { shard, into, client } => {
            reshard(&Client::new(client)?, &format!("/admin/shards/{shard}/split"), json!({"into": into}))
                .await
        }
        ClusterCommand::Merge { shard, other, client } => {
            reshard(&Client::new(client)?, &format!("/admin/shards/{shard}/merge"), json!({"with": other}))
                .await
        }
        ClusterCommand::Pause { client } => {
            order(client, Method::POST, "/admin/placement/pause", None).await?;
            println!("placement is paused; what is under way ends");
            Ok(())
        }
        ClusterCommand::Resume { client } => {
            order(client, Method::POST, "/admin/placement/resume", None).await?;
            println!("placement goes on");
            Ok(())
        }
    }
}

async fn order(args: ClientArgs, method: Method, path: &str, body: Option<Value>) -> Result<Value> {
    let client = Client::new(args)?;
    let request = client.request(method, path);
    client.send(if let Some(body) = body { request.json(&body) } else { request }).await
}

/// Orders a change of shards and waits for its end.
async fn reshard(client: &Client, path: &str, body: Value) -> Result<()> {
    let before = client.get("/admin/cluster/report").await?;
    client.send(client.request(Method::POST, path).json(&body)).await?;
    let began = Instant::now();
    loop {
        tokio::time::sleep(TICK).await;
        // Somebody who waits for a cluster in trouble goes on waiting.
        let Ok(report) = client.get("/admin/cluster/report").await else { continue };
        if list(&report["resharding"]).is_empty() {
            let known = |shard: &&Value| list(&before["shards"]).iter().any(|old| old["id"] == shard["id"]);
            let new: Vec<String> = list(&report["shards"])
                .iter()
                .filter(|shard| !known(shard))
                .map(|shard| shard["id"].to_string())
                .collect();
            if new.is_empty() {
                bail!(
                    "it was given up, and the shards stay as they are; the node that leads the control group logs why"
                );
            }
            println!("done in {:.1} s: shards {}", began.elapsed().as_secs_f64(), new.join(", "));
            return Ok(());
        }
    }
}

async fn status(client: &Client, watch: bool) -> Result<()> {
    loop {
        let report = client.get("/admin/cluster/report").await;
        if watch && std::io::stdout().is_terminal() {
            // Clears the screen and goes to its upper left corner.
            print!("\x1b[2J\x1b[H");
        }
        match report {
            Ok(report) => print_report(&report),
            // Somebody who watches a cluster in trouble goes on watching.
            Err(error) if watch => println!("{error:#}"),
            Err(error) => return Err(error),
        }
        if !watch {
            return Ok(());
        }
        tokio::time::sleep(TICK).await;
    }
}

fn print_report(report: &Value) {
    let (version, level) = (&report["version"], number(&report["level"]));
    println!("cluster {}  (map version {version}, level {level})\n", text(&report["cluster_id"]));
    let mut nodes = Table::new(&[
        "NODE",
        "NAME",
        "ZONE",
        "STATE",
        "VERSION",
        "LEVEL",
        "REPLICAS",
        "LEADS",
        "FREE DISK",
        "HTTP",
    ]);
    for node in list(&report["nodes"]) {
        let free =
            node["disk_free_bytes"].as_f64().map_or("-".to_owned(), |free| format!("{:.1} GiB", free / GIB));
        nodes.row([
            node["id"].to_string(),
            text(&node["name"]).to_owned(),
            text(&node["zone"]).to_owned(),
            node_state(node),
            text(&node["version"]).to_owned(),
            number(&node["level"]),
            node["replicas"].to_string(),
            node["leads"].to_string(),
            free,
            text(&node["http"]).to_owned(),
        ]);
    }
    nodes.print();
    println!();
    let mut shards =
        Table::new(&["SHARD", "COLLECTION", "LEADER", "REPLICAS", "VOTERS", "LEARNERS", "BEHIND"]);
    let control = json!({"id": 0, "collection": "(control group)", "group": report["control"]});
    for shard in std::iter::once(&control).chain(list(&report["shards"])) {
        let group = &shard["group"];
        let behind = group["behind"].as_object().and_then(|all| all.values().filter_map(Value::as_u64).max());
        // A shard that a split or a merge has made is nobody's yet.
        let coming = if shard["is_in_use"] == json!(false) { " (to come)" } else { "" };
        let collection = format!("{}{coming}", text(&shard["collection"]));
        let leader = if group.is_null() { "NONE".to_owned() } else { group["leader"].to_string() };
        shards.row([
            shard["id"].to_string(),
            collection,
            leader,
            ids(&shard["replicas"]),
            ids(&group["voters"]),
            ids(&group["learners"]),
            behind.map_or("-".to_owned(), |behind| behind.to_string()),
        ]);
    }
    shards.print();
    println!();
    out_of_reach(report).iter().for_each(|line| println!("{line}"));
    print_plan(&report["placement"]);
    for change in list(&report["resharding"]) {
        let (from, into) = (ids(&change["shards"]), ids(&change["into"]));
        let attempt = change["attempt"].as_u64().map_or(String::new(), |number| {
            let failed = change["last_error"].as_str().map_or(String::new(), |error| format!(": {error}"));
            format!("  (attempt {number} of {}{failed})", change["attempts"])
        });
        println!("shards of {}: {from} become {into}{attempt}", text(&change["collection"]));
    }
}

/// How a node is: all that is out of the ordinary.
fn node_state(node: &Value) -> String {
    let mut words = Vec::new();
    if node["answers"] == json!(false) {
        words.push("silent");
    }
    match (text(&node["drain"]), &node["is_drained"]) {
        ("yes" | "until_restart", Value::Bool(true)) => words.push("drained"),
        ("yes" | "until_restart", _) => words.push("draining"),
        _ => {}
    }
    if node["disk_writable"] == json!(false) {
        words.push("disk full");
    }
    if words.is_empty() { "up".to_owned() } else { words.join(", ") }
}

/// What is to be said of the shards whose data are out of reach.
fn out_of_reach(report: &Value) -> Vec<String> {
    let silent = |id: &Value| {
        let node = list(&report["nodes"]).iter().find(|node| node["id"] == *id)?;
        (node["answers"] == json!(false)).then(|| text(&node["name"]).to_owned())
    };
    let lost = list(&report["shards"]).iter().filter(|shard| shard["is_out_of_reach"] == json!(true));
    let say = |shard: &Value| {
        let missed: Vec<String> = list(&shard["replicas"]).iter().filter_map(silent).collect();
        let missed = if missed.is_empty() { "what held it".to_owned() } else { missed.join(", ") };
        let (id, collection) = (&shard["id"], text(&shard["collection"]));
        format!(
            "shard {id} of {collection} is out of reach: start {missed}, or, when the disks are gone for \
             good, `shoal cluster abandon {id} --collection {collection}`"
        )
    };
    lost.map(say).collect()
}

const GIB: f64 = (1u64 << 30) as f64;

/// A number, or a dash: a node of an earlier build does not tell all.
fn number(value: &Value) -> String {
    value.as_u64().map_or("-".to_owned(), |number| number.to_string())
}

fn ids(value: &Value) -> String {
    let ids: Vec<String> = list(value).iter().map(Value::to_string).collect();
    if ids.is_empty() { "-".to_owned() } else { ids.join(",") }
}

fn print_plan(plan: &Value) {
    if plan.is_null() {
        return println!("placement: no word from the control group's leader");
    }
    let paused = if plan["is_paused"] == json!(true) { " (paused)" } else { "" };
    let (steps, moving, waiting) = (list(&plan["steps"]), list(&plan["moving"]), list(&plan["waiting"]));
    if steps.is_empty() && moving.is_empty() && waiting.is_empty() {
        return println!("placement{paused}: nothing to do");
    }
    println!("placement{paused}:");
    for moving in moving {
        let (arriving, leaving) = (ids(&moving["arriving"]), ids(&moving["leaving"]));
        let reason = moving["reason"].as_str().map_or(String::new(), |reason| format!("  ({reason})"));
        let behind = moving["behind"].as_object().into_iter().flatten();
        let behind: String = behind.map(|(node, entries)| format!("; {node} is {entries} behind")).collect();
        println!(
            "  under way  shard {}: arriving {arriving}, leaving {leaving}{behind}{reason}",
            moving["shard"]
        );
    }
    for step in steps {
        println!("  next       {}  ({})", text(&step["step"]), text(&step["reason"]));
    }
    for waiting in waiting {
        println!("  waits      {}", text(waiting));
    }
}

/// Begins the drain and waits until it is done, saying what is left whenever that changes.
async fn drain(client: &Client, node: &str, patience: Duration) -> Result<()> {
    let path = format!("/admin/nodes/{node}/drain");
    let started = Instant::now();
    let mut status = client.send(client.request(Method::POST, &path)).await?;
    let mut said = String::new();
    loop {
        let waits: Vec<&str> = list(&status["waits_for"]).iter().map(text).collect();
        if status["is_done"] == json!(true) {
            println!(
                "node {node} is drained after {:.0} s: it can be stopped",
                started.elapsed().as_secs_f64()
            );
            return Ok(());
        }
        if status["drain"] == json!("no") {
            bail!("somebody has ended the drain of node {node}");
        }
        let left = waits.join("; ");
        if left != said {
            println!("{} left: {left}", waits.len());
            said = left;
        }
        if started.elapsed() > patience {
            bail!("node {node} is not drained yet; it goes on: `shoal cluster status` shows how far it is");
        }
        tokio::time::sleep(TICK).await;
        match client.get(&path).await {
            Ok(next) => status = next,
            // An election, perhaps: the drain goes on by itself.
            Err(error) => println!("{error:#}; asking again"),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_node_is_drained_only_when_nothing_is_left_on_it() {
        let state = |answers: bool, drain: &str, is_drained: bool, disk_writable: Value| {
            node_state(&json!({
                "answers": answers, "drain": drain, "is_drained": is_drained, "disk_writable": disk_writable,
            }))
        };
        assert_eq!(state(true, "no", false, json!(true)), "up");
        assert_eq!(state(true, "yes", false, json!(true)), "draining");
        assert_eq!(state(true, "yes", true, json!(true)), "drained");
        assert_eq!(state(true, "until_restart", false, json!(false)), "draining, disk full");
        assert_eq!(state(false, "until_restart", true, Value::Null), "silent, drained");
        assert_eq!(state(false, "yes", false, Value::Null), "silent, draining");
        assert_eq!(state(false, "no", false, Value::Null), "silent");
        // A node of an earlier build does not say whether it is done.
        assert_eq!(node_state(&json!({"answers": true, "drain": "yes"})), "draining");
    }

    #[test]
    fn what_is_out_of_reach_is_named_with_the_way_out() {
        let report = json!({
            "nodes": [{"id": 1, "name": "n1", "answers": true}, {"id": 3, "name": "n3", "answers": false}],
            "shards": [
                {"id": 6, "collection": "docs", "replicas": [1], "is_out_of_reach": false},
                {"id": 7, "collection": "docs", "replicas": [3], "is_out_of_reach": true},
            ],
        });
        assert_eq!(
            out_of_reach(&report),
            ["shard 7 of docs is out of reach: start n3, or, when the disks are gone for good, \
                 `shoal cluster abandon 7 --collection docs`"]
        );
    }
}
