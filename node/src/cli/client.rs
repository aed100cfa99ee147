//! The HTTP client of the commands.

use std::time::Duration;

use anyhow::{Context, Result, bail};
use clap::Args;
use reqwest::{Method, RequestBuilder, Response, StatusCode};
use serde_json::Value;

/// Where the cluster is.
#[derive(Args, Clone, Debug)]
pub struct ClientArgs {
    /// Any node.
    #[arg(long, env = "SHOAL_URL", default_value = "http://127.0.0.1:6333")]
    pub url: String,
    /// The API key.
    #[arg(long, env = "SHOAL_API_KEY", hide_env_values = true)]
    pub api_key: Option<String>,
}

/// A client to one node.
#[derive(Clone)]
pub struct Client {
    http: reqwest::Client,
    args: ClientArgs,
}

impl Client {
    /// A client; nothing is sent yet.
    pub fn new(args: ClientArgs) -> Result<Client> {
        let http = reqwest::Client::builder().timeout(Duration::from_secs(120)).build()?;
        Ok(Client { http, args })
    }

    /// A request to a path.
    pub fn request(&self, method: Method, path: &str) -> RequestBuilder {
        let request = self.http.request(method, format!("{}{path}", self.args.url.trim_end_matches('/')));
        match &self.args.api_key {
            Some(key) => request.bearer_auth(key),
            None => request,
        }
    }

    /// Sends a request and reads a JSON answer; an error answer becomes its message.
    pub async fn send(&self, request: RequestBuilder) -> Result<Value> {
        read(self.answer(request).await?).await
    }

    async fn answer(&self, request: RequestBuilder) -> Result<Response> {
        request.send().await.with_context(|| format!("no answer from {}", self.args.url))
    }

    /// Sends a GET.
    pub async fn get(&self, path: &str) -> Result<Value> {
        self.send(self.request(Method::GET, path)).await
    }

    /// Sends a GET for what may not be there.
    pub async fn find(&self, path: &str) -> Result<Option<Value>> {
        let response = self.answer(self.request(Method::GET, path)).await?;
        match response.status() {
            StatusCode::NOT_FOUND => Ok(None),
            _ => read(response).await.map(Some),
        }
    }

    /// Sends a POST with a JSON body.
    pub async fn post(&self, path: &str, body: &Value) -> Result<Value> {
        self.send(self.request(Method::POST, path).json(body)).await
    }
}

async fn read(response: Response) -> Result<Value> {
    let status = response.status();
    let text = response.text().await?;
    if !status.is_success() {
        let body: Value = serde_json::from_str(&text).unwrap_or_default();
        let message =
            ["/error/message", "/detail", "/status/error"].iter().find_map(|at| body.pointer(at)?.as_str());
        bail!("{status}: {}", message.unwrap_or(&text));
    }
    serde_json::from_str(&text).context("the answer is not JSON")
}
