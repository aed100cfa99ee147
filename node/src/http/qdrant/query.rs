//! Search: `/points/query` with its kinds of query and fusion, and the older `/points/search`.

use std::time::Instant;

use axum::body::Bytes;
use axum::extract::{Path, State};
use axum::response::Response;
use serde::Deserialize;
use serde_json::{Value, json};
use shoal_actors::Cluster;
use shoal_actors::search::{self, RRF_K, ShardCounts};
use shoal_engine::command::{Hit, Leg, Search, Select};
use shoal_engine::state::check_vector;
use shoal_proto::{Error, PointId, Position};
use utoipa::ToSchema;

use super::shapes::{self, MAX_LIMIT, envelope};
use crate::app::App;
use crate::http::context::{Context, json};
use crate::http::error::QdrantError;
use crate::http::openapi::QdrantAnswers;
use crate::http::points::{Found, ask_all};
use crate::http::unique;

/// The most searches in one batch.
const MAX_BATCH: usize = 100;
/// The most candidates while searching a graph.
const MAX_EF: usize = 10_000;
/// The most lists that are fused.
const MAX_PREFETCH: usize = 8;

#[derive(Clone, Default, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
struct Params {
    hnsw_ef: Option<usize>,
    exact: Option<bool>,
    #[serde(rename = "quantization")]
    _quantization: Option<Value>,
    #[serde(rename = "indexed_only")]
    _indexed_only: Option<bool>,
    #[serde(rename = "acorn")]
    _acorn: Option<Value>,
}

#[derive(Clone, Default, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
struct Query {
    query: Option<Value>,
    using: Option<String>,
    #[serde(default, deserialize_with = "unique::value")]
    prefetch: Option<Value>,
    #[serde(default, deserialize_with = "unique::value")]
    filter: Option<Value>,
    params: Option<Params>,
    limit: Option<u64>,
    offset: Option<u64>,
    score_threshold: Option<f32>,
    with_payload: Option<Value>,
    with_vector: Option<Value>,
    lookup_from: Option<Value>,
    #[serde(rename = "shard_key")]
    _shard_key: Option<Value>,
}

#[derive(Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
struct OldSearch {
    vector: Value,
    #[serde(default, deserialize_with = "unique::value")]
    filter: Option<Value>,
    params: Option<Params>,
    limit: Option<u64>,
    offset: Option<u64>,
    score_threshold: Option<f32>,
    with_payload: Option<Value>,
    with_vector: Option<Value>,
    #[serde(rename = "shard_key")]
    _shard_key: Option<Value>,
}

impl OldSearch {
    /// The same as a query: `vector` is an array, or an object with name and vector.
    fn into_query(self) -> Query {
        let (query, using) = match self.vector {
            Value::Object(named) => {
                (named.get("vector").cloned(), named.get("name").and_then(Value::as_str).map(str::to_owned))
            }
            other => (Some(other), None),
        };
        Query {
            query,
            using,
            filter: self.filter,
            params: self.params,
            limit: self.limit,
            offset: self.offset,
            score_threshold: self.score_threshold,
            with_payload: self.with_payload,
            with_vector: self.with_vector,
            ..Query::default()
        }
    }
}

#[derive(Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
struct BatchOf<T> {
    searches: Vec<T>,
}

/// What a search came to.
struct Ranked {
    hits: Vec<Hit>,
    shards: ShardCounts,
    position: Position,
}

/// Search by vector or point, fusion of several lists, or plain order of ids.
#[utoipa::path(
    post, path = "/collections/{collection}/points/query", operation_id = "query_points", tag = "points",
    params(("collection" = String, Path, description = "Name or alias"), Context),
    request_body = Query,
    responses(QdrantAnswers),
)]
pub(super) async fn query(
    State(app): State<App>,
    Path(name): Path<String>,
    context: Context,
    body: Bytes,
) -> Result<Response, QdrantError> {
    let started = Instant::now();
    let answer = run(&app, &name, json(&body)?, &context).await?;
    let points: Vec<Value> = answer.hits.into_iter().map(|hit| shapes::record(hit, true)).collect();
    Ok(envelope(json!({"points": points, "shards": answer.shards}), started, &answer.position))
}

/// Search by vector: the older form of a query.
#[utoipa::path(
    post, path = "/collections/{collection}/points/search", operation_id = "search_points", tag = "points",
    params(("collection" = String, Path, description = "Name or alias"), Context),
    request_body = OldSearch,
    responses(QdrantAnswers),
)]
pub(super) async fn search(
    State(app): State<App>,
    Path(name): Path<String>,
    context: Context,
    body: Bytes,
) -> Result<Response, QdrantError> {
    let started = Instant::now();
    let request: OldSearch = json(&body)?;
    let answer = run(&app, &name, request.into_query(), &context).await?;
    let points: Vec<Value> = answer.hits.into_iter().map(|hit| shapes::record(hit, true)).collect();
    Ok(envelope(points, started, &answer.position))
}

/// Several queries at once.
#[utoipa::path(
    post, path = "/collections/{collection}/points/query/batch", operation_id = "query_batch_points", tag = "points",
    params(("collection" = String, Path, description = "Name or alias"), Context),
    request_body = BatchOf<Query>,
    responses(QdrantAnswers),
)]
pub(super) async fn query_batch(
    State(app): State<App>,
    Path(name): Path<String>,
    context: Context,
    body: Bytes,
) -> Result<Response, QdrantError> {
    let batch: BatchOf<Query> = json(&body)?;
    run_batch(&app, &name, batch.searches, &context, |points| json!({"points": points})).await
}

/// Several searches at once.
#[utoipa::path(
    post, path = "/collections/{collection}/points/search/batch", operation_id = "search_batch_points", tag = "points",
    params(("collection" = String, Path, description = "Name or alias"), Context),
    request_body = BatchOf<OldSearch>,
    responses(QdrantAnswers),
)]
pub(super) async fn search_batch(
    State(app): State<App>,
    Path(name): Path<String>,
    context: Context,
    body: Bytes,
) -> Result<Response, QdrantError> {
    let batch: BatchOf<OldSearch> = json(&body)?;
    let searches = batch.searches.into_iter().map(OldSearch::into_query).collect();
    run_batch(&app, &name, searches, &context, |points| json!(points)).await
}

async fn run_batch(
    app: &App,
    name: &str,
    searches: Vec<Query>,
    context: &Context,
    shape: impl Fn(Vec<Value>) -> Value,
) -> Result<Response, QdrantError> {
    let started = Instant::now();
    if searches.len() > MAX_BATCH {
        return Err(Error::invalid("searches", format!("at most {MAX_BATCH} searches in one batch")).into());
    }
    let runs = searches.into_iter().map(|search| run(app, name, search, context));
    let mut position = Position::default();
    let mut results = Vec::new();
    for answer in futures::future::try_join_all(runs).await? {
        position.merge(&answer.position);
        results.push(shape(answer.hits.into_iter().map(|hit| shapes::record(hit, true)).collect()));
    }
    Ok(envelope(results, started, &position))
}

async fn run(app: &App, name: &str, request: Query, context: &Context) -> Result<Ranked, Error> {
    let cluster = &app.running()?.cluster;
    let found = Found::find(cluster, name).await?;
    if request.lookup_from.as_ref().is_some_and(|lookup| !lookup.is_null()) {
        return Err(Error::invalid("lookup_from", "is not supported"));
    }
    let limit = shapes::limit(request.limit, "limit", 10)?;
    let offset = usize::try_from(request.offset.unwrap_or(0)).unwrap_or(usize::MAX);
    let wanted = limit.saturating_add(offset);
    if wanted > MAX_LIMIT {
        return Err(Error::invalid("offset", format!("limit and offset together are at most {MAX_LIMIT}")));
    }
    let payload = shapes::select(request.with_payload.as_ref(), "with_payload", Select::Nothing)?;
    let vectors = shapes::select(request.with_vector.as_ref(), "with_vector", Select::Nothing)?;
    let plan = Plan { cluster, found: &found, context, payload, vectors };
    let prefetches = prefetches(request.prefetch.as_ref())?;
    let mut answer = match (prefetches.is_empty(), fusion(request.query.as_ref())?) {
        (true, None) => plan.single(&request, wanted).await?,
        (false, Some(())) => plan.fused(&prefetches, request.filter.as_ref(), wanted).await?,
        (true, Some(())) => return Err(Error::invalid("prefetch", "a fusion needs lists to fuse")),
        (false, None) => {
            return Err(Error::invalid("query", "prefetch is supported with a fusion (rrf) only"));
        }
    };
    if let (Some(threshold), false) = (request.score_threshold, prefetches.is_empty()) {
        answer.hits.retain(|hit| hit.score >= threshold);
    }
    answer.hits.drain(..offset.min(answer.hits.len()));
    answer.hits.truncate(limit);
    Ok(answer)
}

fn prefetches(value: Option<&Value>) -> Result<Vec<Query>, Error> {
    let parse = |value: &Value, field: &str| -> Result<Query, Error> {
        serde_path_to_error::deserialize(value)
            .map_err(|error| Error::invalid(format!("{field}.{}", error.path()), error.inner()))
    };
    match value {
        None | Some(Value::Null) => Ok(Vec::new()),
        Some(Value::Array(items)) if items.len() > MAX_PREFETCH => {
            Err(Error::invalid("prefetch", format!("at most {MAX_PREFETCH} lists are fused")))
        }
        Some(Value::Array(items)) => {
            items.iter().enumerate().map(|(at, item)| parse(item, &format!("prefetch[{at}]"))).collect()
        }
        Some(single) => Ok(vec![parse(single, "prefetch")?]),
    }
}

fn fusion(query: Option<&Value>) -> Result<Option<()>, Error> {
    let Some(query) = query.and_then(Value::as_object) else { return Ok(None) };
    match (query.get("fusion").and_then(Value::as_str), query.contains_key("rrf")) {
        (Some("rrf"), _) | (None, true) => Ok(Some(())),
        (Some(other), _) => {
            Err(Error::invalid("query.fusion", format!("{other:?} is not supported; rrf is")))
        }
        (None, false) => Ok(None),
    }
}

/// One list that is wanted.
struct Wish {
    leg: Leg,
    higher_is_nearer: bool,
    /// The point whose neighbours are looked for: it is none of them itself.
    without: Option<PointId>,
}

struct Plan<'a> {
    cluster: &'a Cluster,
    found: &'a Found,
    context: &'a Context,
    payload: Select,
    vectors: Select,
}

impl Plan<'_> {
    async fn single(&self, request: &Query, wanted: usize) -> Result<Ranked, Error> {
        let filter = shapes::filter(request.filter.as_ref(), "filter")?;
        let Some(query) = request.query.as_ref().filter(|query| !query.is_null()) else {
            return self.unscored(filter, wanted).await;
        };
        let wish = self.wish(query, request, "query").await?;
        self.list(wish, filter, wanted, request.score_threshold).await
    }

    /// Without a query, points come in the order of their ids.
    async fn unscored(&self, filter: Option<String>, limit: usize) -> Result<Ranked, Error> {
        let (payload, vectors) = (self.payload.clone(), self.vectors.clone());
        let question = shoal_engine::command::Read::Scroll { from: None, filter, limit, payload, vectors };
        let gathered = ask_all(self.cluster, self.found, &question, self.context).await?;
        let mut hits = Vec::new();
        for answer in gathered.answers {
            if let shoal_engine::command::Answer::Points(found) = answer {
                hits.extend(found);
            }
        }
        hits.sort_by_key(|hit: &Hit| hit.id);
        Ok(Ranked { hits, shards: gathered.shards, position: gathered.position })
    }

    async fn fused(
        &self,
        prefetches: &[Query],
        outer: Option<&Value>,
        wanted: usize,
    ) -> Result<Ranked, Error> {
        let outer = shapes::filter(outer, "filter")?;
        let (mut lists, mut position, mut shards) = (Vec::new(), Position::default(), ShardCounts::default());
        for (at, prefetch) in prefetches.iter().enumerate() {
            let field = format!("prefetch[{at}]");
            let query = prefetch
                .query
                .as_ref()
                .ok_or_else(|| Error::invalid(format!("{field}.query"), "is missing"))?;
            let limit = shapes::limit(prefetch.limit, &format!("{field}.limit"), 10)?;
            let inner = shapes::filter(prefetch.filter.as_ref(), &format!("{field}.filter"))?;
            let filter = match (&outer, inner) {
                (Some(outer), Some(inner)) => Some(format!("{{\"must\":[{outer},{inner}]}}")),
                (outer, inner) => inner.or_else(|| outer.clone()),
            };
            let wish = self.wish(query, prefetch, &format!("{field}.query")).await?;
            let found = self.list(wish, filter, limit, prefetch.score_threshold).await?;
            lists.push(found.hits);
            position.merge(&found.position);
            shards = found.shards;
        }
        Ok(Ranked { hits: search::fuse(lists, wanted, RRF_K), shards, position })
    }

    async fn list(
        &self,
        wish: Wish,
        filter: Option<String>,
        limit: usize,
        score_threshold: Option<f32>,
    ) -> Result<Ranked, Error> {
        let (payload, vectors) = (self.payload.clone(), self.vectors.clone());
        // One more, in whose place the point itself comes.
        let most = limit + usize::from(wish.without.is_some());
        let request = Search { legs: vec![wish.leg], filter, limit: most, score_threshold, payload, vectors };
        let options = self.context.read_options();
        let (mut lists, shards, position) = search::search(
            self.cluster,
            &self.found.name,
            request,
            &[wish.higher_is_nearer],
            &options,
            self.context.allow_partial,
        )
        .await?;
        let mut hits = lists.pop().unwrap_or_default();
        hits.retain(|hit| Some(hit.id) != wish.without);
        hits.truncate(limit);
        Ok(Ranked { hits, shards, position })
    }

    /// One list: by a vector, by a point's vector, or by words (`{"text": …}`, an extension).
    async fn wish(&self, query: &Value, request: &Query, field: &str) -> Result<Wish, Error> {
        let query = query.get("nearest").unwrap_or(query);
        if let Some(text) = query.get("text").and_then(Value::as_str) {
            let leg = Leg::Text { query: text.to_owned() };
            return Ok(Wish { leg, higher_is_nearer: true, without: None });
        }
        let using = request.using.clone().unwrap_or_default();
        let params = self.found.config.vectors.get(&using).ok_or_else(|| {
            Error::invalid("using", format!("Wrong input: Not existing vector name error: {using}"))
        })?;
        let (vector, near) = match query {
            Value::Array(_) => (shapes::vector(query, field)?, None),
            Value::Number(_) | Value::String(_) => {
                let id: PointId = serde_json::from_value(query.clone())
                    .map_err(|_| Error::invalid(field, "not a point id"))?;
                (self.vector_of(id, &using).await?, Some(id))
            }
            _ => {
                return Err(Error::invalid(
                    field,
                    "expected a vector, a point id, {\"nearest\": …}, {\"text\": …} or a fusion",
                ));
            }
        };
        check_vector(&self.found.config, &using, &vector, field)
            .map_err(|error| Error { message: format!("Wrong input: {}", error.message), ..error })?;
        let given = request.params.clone().unwrap_or_default();
        if let Some(ef) = given.hnsw_ef.filter(|ef| !(1..=MAX_EF).contains(ef)) {
            return Err(Error::invalid("params.hnsw_ef", format!("{ef} is not between 1 and {MAX_EF}")));
        }
        let higher_is_nearer = params.distance.higher_is_nearer();
        let leg = Leg::Dense { using, vector, exact: given.exact.unwrap_or(false), ef: given.hnsw_ef };
        Ok(Wish { leg, higher_is_nearer, without: near })
    }

    async fn vector_of(&self, id: PointId, using: &str) -> Result<Vec<f32>, Error> {
        let vectors = Select::Include(vec![using.to_owned()]);
        let wanted = (&Select::Nothing, &vectors);
        let options = self.context.read_options();
        let (hits, _) = self.cluster.read_points(&self.found.name, &[id], wanted, &options).await?;
        let hit = hits.into_iter().next();
        let hit = hit.ok_or_else(|| Error::not_found(format!("Not found: No point with id {id} found")))?;
        let vector = hit.vectors.and_then(|vectors| vectors.into_iter().next());
        vector
            .map(|(_, vector)| vector)
            .ok_or_else(|| Error::invalid("using", format!("point {id} has no such vector")))
    }
}
