//! `shoal status` and `shoal health`.

use anyhow::{Result, bail};
use reqwest::Method;

use super::client::{Client, ClientArgs};
use super::table::{Table, list, text};

/// Prints nodes, shards and groups as the asked node knows them, without asking another one.
pub async fn run(args: ClientArgs) -> Result<()> {
    let cluster = Client::new(args)?.get("/admin/cluster").await?;
    println!("cluster {}  (map version {})\n", text(&cluster["cluster_id"]), cluster["version"]);
    let mut nodes = Table::new(&["NODE", "NAME", "ZONE", "HTTP", "GRPC"]);
    for node in list(&cluster["nodes"]) {
        let [name, zone, http, grpc] =
            ["name", "zone", "http", "grpc"].map(|field| text(&node[field]).to_owned());
        nodes.row([node["id"].to_string(), name, zone, http, grpc]);
    }
    nodes.print();
    println!();
    let mut shards = Table::new(&["SHARD", "COLLECTION", "REPLICAS"]);
    for shard in list(&cluster["shards"]) {
        let collection = text(&shard["collection"]).to_owned();
        shards.row([shard["id"].to_string(), collection, shard["replicas"].to_string()]);
    }
    shards.print();
    println!("\ngroups on node {}:", cluster["node"]["id"]);
    let mut groups = Table::new(&["GROUP", "ROLE", "LEADER", "TERM", "APPLIED", "LAST", "VOTERS"]);
    for group in list(&cluster["groups"]) {
        let field = |name: &str| group[name].to_string();
        let role = text(&group["role"]).to_owned();
        let [id, leader, term] = ["group", "leader", "term"].map(field);
        let [applied, last, voters] = ["applied", "last_index", "voters"].map(field);
        groups.row([id, role, leader, term, applied, last, voters]);
    }
    groups.print();
    Ok(())
}

/// Succeeds when the node answers that it lives or is ready.
pub async fn health(args: ClientArgs, ready: bool) -> Result<()> {
    let path = if ready { "/health/ready" } else { "/health/live" };
    let client = Client::new(args)?;
    let response = client.request(Method::GET, path).send().await?;
    let status = response.status();
    let body = response.text().await?;
    println!("{body}");
    if !status.is_success() {
        bail!("{status}");
    }
    Ok(())
}
