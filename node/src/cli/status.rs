//! `shoal status` and `shoal health`.

use anyhow::{Result, bail};
use reqwest::Method;
use serde_json::Value;

use super::client::{Client, ClientArgs};

/// Prints nodes, collections and groups as the asked node knows them.
pub async fn run(args: ClientArgs) -> Result<()> {
    let cluster = Client::new(args)?.get("/admin/cluster").await?;
    println!("cluster {}  (map version {})", text(&cluster["cluster_id"]), cluster["version"]);
    println!("\n{:<5} {:<16} {:<10} {:<24} GRPC", "NODE", "NAME", "ZONE", "HTTP");
    for node in list(&cluster["nodes"]) {
        let (name, zone) = (text(&node["name"]), text(&node["zone"]));
        println!(
            "{:<5} {name:<16} {zone:<10} {:<24} {}",
            node["id"].to_string(),
            text(&node["http"]),
            text(&node["grpc"])
        );
    }
    println!("\n{:<7} {:<40} REPLICAS", "SHARD", "COLLECTION");
    for shard in list(&cluster["shards"]) {
        println!("{:<7} {:<40} {}", shard["id"].to_string(), text(&shard["collection"]), shard["replicas"]);
    }
    println!("\ngroups on node {}:", cluster["node"]["id"]);
    println!(
        "{:<7} {:<10} {:<7} {:<6} {:<9} {:<9} VOTERS",
        "GROUP", "ROLE", "LEADER", "TERM", "APPLIED", "LAST"
    );
    for group in list(&cluster["groups"]) {
        let field = |name: &str| group[name].to_string();
        let (role, leader, term) = (text(&group["role"]), field("leader"), field("term"));
        let (applied, last) = (field("applied"), field("last_index"));
        println!(
            "{:<7} {role:<10} {leader:<7} {term:<6} {applied:<9} {last:<9} {}",
            field("group"),
            group["voters"]
        );
    }
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

fn list(value: &Value) -> &[Value] {
    value.as_array().map_or(&[], Vec::as_slice)
}

fn text(value: &Value) -> &str {
    value.as_str().unwrap_or("-")
}
