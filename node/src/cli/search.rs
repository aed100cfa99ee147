//! `shoal search`.

use anyhow::{Context, Result, bail};
use clap::Args;
use serde_json::{Value, json};

use super::client::{Client, ClientArgs};

/// A search.
#[derive(Args, Debug)]
pub struct SearchArgs {
    #[command(flatten)]
    client: ClientArgs,
    /// The question.
    query: String,
    /// The store, by name or id; the newest one when absent.
    #[arg(long)]
    store: Option<String>,
    /// Results.
    #[arg(long, default_value_t = 5)]
    limit: u64,
}

/// Searches and prints the results with their sources.
pub async fn run(args: SearchArgs) -> Result<()> {
    let client = Client::new(args.client)?;
    let store = find_store(&client, args.store.as_deref())
        .await?
        .context("there is no vector store yet; run `shoal ingest DIR`")?;
    let started = std::time::Instant::now();
    let body = json!({"query": args.query, "max_num_results": args.limit});
    let answer = client.post(&format!("/v1/vector_stores/{store}/search"), &body).await?;
    let milliseconds = started.elapsed().as_secs_f64() * 1e3;
    let shards = &answer["shards"];
    println!(
        "{:?} in {store}: {milliseconds:.1} ms, {} of {} shards",
        args.query, shards["ok"], shards["total"]
    );
    for (rank, hit) in answer["data"].as_array().into_iter().flatten().enumerate() {
        let place = match (hit["heading"].as_str(), hit["page"].as_u64()) {
            (Some(heading), _) => format!(" § {heading}"),
            (None, Some(page)) => format!(" p. {page}"),
            (None, None) => String::new(),
        };
        let (file, score) = (hit["filename"].as_str().unwrap_or("?"), hit["score"].as_f64().unwrap_or(0.0));
        println!("\n{}. {file}{place}  (score {score:.3})", rank + 1);
        let text = hit["content"][0]["text"].as_str().unwrap_or_default();
        let line: String = text.split_whitespace().collect::<Vec<_>>().join(" ").chars().take(240).collect();
        println!("   {line}");
    }
    Ok(())
}

/// The id of a store by name or id, or of the newest one.
pub(super) async fn find_store(client: &Client, wanted: Option<&str>) -> Result<Option<String>> {
    let stores = client.get("/v1/vector_stores?limit=100").await?;
    let all: Vec<&Value> = stores["data"].as_array().into_iter().flatten().collect();
    let found = match wanted {
        None => all.first(),
        Some(wanted) => all.iter().find(|store| store["id"] == wanted || store["name"] == wanted),
    };
    if let (None, Some(wanted)) = (found, wanted.filter(|wanted| wanted.starts_with("vs_"))) {
        bail!("no such vector store: {wanted}");
    }
    Ok(found.and_then(|store| store["id"].as_str()).map(str::to_owned))
}
