//! `shoal search`.

use anyhow::{Context, Result, bail};
use clap::Args;
use serde_json::json;

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
    let store = find_store(&client, args.store.as_deref()).await?.with_context(|| match &args.store {
        Some(name) => format!("no vector store is called {name}; run `shoal ingest DIR --store {name}`"),
        None => "there is no vector store yet; run `shoal ingest DIR`".to_owned(),
    })?;
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
    let mut after = String::new();
    loop {
        let page = client.get(&format!("/v1/vector_stores?limit=100{after}")).await?;
        let mut stores = page["data"].as_array().into_iter().flatten();
        let found =
            stores.find(|store| wanted.is_none_or(|wanted| store["id"] == wanted || store["name"] == wanted));
        if let Some(id) = found.and_then(|store| store["id"].as_str()) {
            return Ok(Some(id.to_owned()));
        }
        match (page["has_more"].as_bool(), page["last_id"].as_str()) {
            (Some(true), Some(last)) => after = format!("&after={last}"),
            _ => break,
        }
    }
    match wanted.filter(|wanted| wanted.starts_with("vs_")) {
        Some(wanted) => bail!("no such vector store: {wanted}"),
        None => Ok(None),
    }
}

#[cfg(test)]
mod tests {
    use std::collections::HashMap;

    use axum::extract::Query;
    use axum::routing::get;
    use axum::{Json, Router};
    use serde_json::Value;

    use super::super::client::ClientArgs;
    use super::*;

    /// 250 stores in pages of 100, newest first.
    async fn page(Query(query): Query<HashMap<String, String>>) -> Json<Value> {
        let number = |id: &String| id.strip_prefix("vs_").and_then(|number| number.parse::<usize>().ok());
        let first = query.get("after").and_then(number).map_or(0, |after| after + 1);
        let last = (first + 99).min(249);
        let store = |n: usize| json!({"id": format!("vs_{n}"), "name": format!("store {n}")});
        let data: Vec<Value> = (first..=last).map(store).collect();
        Json(json!({"data": data, "has_more": last < 249, "last_id": format!("vs_{last}")}))
    }

    #[tokio::test]
    async fn a_store_is_found_beyond_the_first_page() {
        // Another test may have been first.
        drop(rustls::crypto::ring::default_provider().install_default());
        let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.expect("a port");
        let url = format!("http://{}", listener.local_addr().expect("an address"));
        let server = Router::new().route("/v1/vector_stores", get(page));
        tokio::spawn(axum::serve(listener, server).into_future());
        let client = Client::new(ClientArgs { url, api_key: None }).expect("a client");
        let find = async |wanted: Option<&str>| find_store(&client, wanted).await.expect("an answer");
        assert_eq!(find(None).await.as_deref(), Some("vs_0"), "the newest one");
        assert_eq!(find(Some("store 249")).await.as_deref(), Some("vs_249"));
        assert_eq!(find(Some("vs_101")).await.as_deref(), Some("vs_101"));
        assert_eq!(find(Some("store 250")).await, None);
        assert!(find_store(&client, Some("vs_250")).await.is_err(), "nobody makes a store of a given id");
    }
}
