//! `/v1/embeddings` and `/v1/models`.

use axum::Json;
use axum::body::Bytes;
use axum::extract::{Path, State};
use base64::Engine as _;
use serde::Deserialize;
use serde_json::{Value, json};
use shoal_actors::embed::TextKind;
use shoal_actors::work::Work;
use shoal_proto::{EmbedderConfig, Error};
use utoipa::ToSchema;

use crate::app::App;
use crate::http::context::{Context, json as read_json};
use crate::http::error::OpenAiError;
use crate::http::openapi::OpenAiAnswers;

/// The most texts in one request.
const MAX_INPUTS: usize = 2048;

#[derive(Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
struct CreateEmbeddings {
    model: String,
    input: Value,
    encoding_format: Option<Encoding>,
    dimensions: Option<usize>,
    #[serde(rename = "user")]
    _user: Option<String>,
    /// `query` or `passage`, for models that embed them differently: an extension.
    input_type: Option<InputType>,
}

#[derive(Clone, Copy, PartialEq, Eq, Deserialize, ToSchema)]
#[serde(rename_all = "snake_case")]
enum Encoding {
    Float,
    Base64,
}

#[derive(Clone, Copy, PartialEq, Eq, Deserialize, ToSchema)]
#[serde(rename_all = "snake_case")]
enum InputType {
    Query,
    Passage,
}

/// Embeds texts.
#[utoipa::path(
    post, path = "/v1/embeddings", operation_id = "create_embedding", tag = "documents",
    params(Context),
    request_body = CreateEmbeddings,
    responses(OpenAiAnswers),
)]
pub(super) async fn create(
    State(app): State<App>,
    context: Context,
    body: Bytes,
) -> Result<Json<Value>, OpenAiError> {
    let request: CreateEmbeddings = read_json(&body)?;
    let texts = inputs(&request.input)?;
    let work = &app.running()?.work;
    let config = work.embedders().config(Some(&request.model))?;
    if request.dimensions.is_some_and(|dimensions| dimensions != config.dimension) {
        let message =
            format!("model `{}` has {} dimensions and cannot be shortened", config.model, config.dimension);
        return Err(Error::invalid("dimensions", message).into());
    }
    let kind = match request.input_type {
        Some(InputType::Query) => TextKind::Query,
        Some(InputType::Passage) | None => TextKind::Passage,
    };
    let vectors = embed_in_time(work, &config.model, kind, &texts, &context).await?;
    let tokens: usize = texts.iter().map(|text| work.embedders().count_tokens(&config.model, text)).sum();
    let data: Vec<Value> = vectors
        .into_iter()
        .enumerate()
        .map(|(index, vector)| {
            let embedding = match request.encoding_format {
                Some(Encoding::Base64) => {
                    let bytes: Vec<u8> = vector.iter().flat_map(|x| x.to_le_bytes()).collect();
                    json!(base64::engine::general_purpose::STANDARD.encode(bytes))
                }
                Some(Encoding::Float) | None => json!(vector),
            };
            json!({"object": "embedding", "index": index, "embedding": embedding})
        })
        .collect();
    let usage = json!({"prompt_tokens": tokens, "total_tokens": tokens});
    Ok(Json(json!({"object": "list", "data": data, "model": config.model, "usage": usage})))
}

/// Embeds texts for a client that waits for them, and does not wait for longer than that does.
///
/// # Errors
/// Unavailable when the time is over, and as [`Work::embed`].
pub(super) async fn embed_in_time(
    work: &Work,
    model: &str,
    kind: TextKind,
    texts: &[String],
    context: &Context,
) -> Result<Vec<Vec<f32>>, Error> {
    let embedded = tokio::time::timeout_at(context.deadline.into(), work.embed(model, kind, texts)).await;
    embedded.unwrap_or_else(|_| {
        let count = texts.len();
        let reason = format!("model `{model}` has not embedded {count} texts in time");
        Err(Error::unavailable(format!("{reason}; try again, with fewer, or with a longer ?timeout=")))
    })
}

fn inputs(input: &Value) -> Result<Vec<String>, Error> {
    let texts: Vec<String> = match input {
        Value::String(text) => vec![text.clone()],
        Value::Array(items) => items
            .iter()
            .enumerate()
            .map(|(at, item)| {
                let text = item.as_str().map(str::to_owned);
                text.ok_or_else(|| {
                    Error::invalid(format!("input[{at}]"), "expected a string; token ids are not taken")
                })
            })
            .collect::<Result<_, Error>>()?,
        _ => return Err(Error::invalid("input", "expected a string or an array of strings")),
    };
    if texts.is_empty() || texts.len() > MAX_INPUTS {
        return Err(Error::invalid("input", format!("expected 1 to {MAX_INPUTS} texts")));
    }
    match texts.iter().position(|text| text.trim().is_empty()) {
        Some(at) => Err(Error::invalid(format!("input[{at}]"), "is empty")),
        None => Ok(texts),
    }
}

/// The embedding models of this node.
#[utoipa::path(
    get,
    path = "/v1/models",
    operation_id = "list_models",
    tag = "documents",
    responses(OpenAiAnswers)
)]
pub(super) async fn list_models(State(app): State<App>) -> Result<Json<Value>, OpenAiError> {
    let models: Vec<Value> = app.running()?.work.embedders().list().iter().map(model).collect();
    Ok(Json(json!({"object": "list", "data": models})))
}

/// One embedding model.
#[utoipa::path(
    get, path = "/v1/models/{model}", operation_id = "retrieve_model", tag = "documents",
    params(("model" = String, Path)),
    responses(OpenAiAnswers),
)]
pub(super) async fn get_model(
    State(app): State<App>,
    Path(name): Path<String>,
) -> Result<Json<Value>, OpenAiError> {
    Ok(Json(model(&app.running()?.work.embedders().config(Some(&name))?)))
}

fn model(config: &EmbedderConfig) -> Value {
    json!({
        "id": config.model, "object": "model", "created": 0, "owned_by": "shoal",
        "dimension": config.dimension, "checksum": config.checksum,
    })
}
