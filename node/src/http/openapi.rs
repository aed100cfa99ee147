//! `GET /openapi.json`: what is served, generated from the handlers themselves. A route can only
//! be added together with its description (`.clippy.toml` forbids the router's plain `route`),
//! and a system test compares the document with the routes that clients really used.

use std::collections::BTreeMap;

use axum::Json;
use axum::http::StatusCode;
use serde_json::Value;
use shoal_proto::ErrorCode;
use utoipa::openapi::path::{Parameter, ParameterBuilder, ParameterIn};
use utoipa::openapi::schema::{Object, ObjectBuilder, OneOfBuilder, Schema, Type};
use utoipa::openapi::security::{
    ApiKey, ApiKeyValue, Http, HttpAuthScheme, SecurityRequirement, SecurityScheme,
};
use utoipa::openapi::{ContentBuilder, KnownFormat, OpenApi, RefOr, Response, ResponseBuilder, SchemaFormat};
use utoipa::{IntoParams, IntoResponses, PartialSchema, ToSchema};
use utoipa_axum::router::OpenApiRouter;

use super::context::{self, Context};
use super::error::status;

/// The document with the product's name, before the routes are added.
pub(super) fn base() -> OpenApi {
    let mut document = OpenApi::default();
    document.info.title = "Shoal".to_owned();
    document.info.version = env!("CARGO_PKG_VERSION").to_owned();
    document.info.description = Some(
        "A document retrieval cluster. Paths under /v1 follow the OpenAI API, /collections and /aliases follow \
         Qdrant's; bodies refuse unknown fields."
            .to_owned(),
    );
    let mut components = utoipa::openapi::Components::default();
    let key = SecurityScheme::ApiKey(ApiKey::Header(ApiKeyValue::new("api-key")));
    components.add_security_scheme("api_key", key);
    components.add_security_scheme("bearer", SecurityScheme::Http(Http::new(HttpAuthScheme::Bearer)));
    document.components = Some(components);
    let none: [&str; 0] = [];
    document.security =
        Some(vec![SecurityRequirement::new("api_key", none), SecurityRequirement::new("bearer", none)]);
    document
}

/// Adds the route that serves the finished document.
pub(super) fn serve(routes: OpenApiRouter<crate::app::App>) -> axum::Router<crate::app::App> {
    let (router, document) = routes.routes(described!(openapi)).split_for_parts();
    let document = serde_json::to_value(document).expect("the document is plain data");
    router.layer(axum::Extension(Document(std::sync::Arc::new(document))))
}

#[derive(Clone)]
struct Document(std::sync::Arc<Value>);

/// This document.
#[utoipa::path(
    get,
    path = "/openapi.json",
    operation_id = "openapi",
    tag = "operators",
    responses(OperatorAnswers)
)]
async fn openapi(axum::Extension(document): axum::Extension<Document>) -> Json<Value> {
    Json(Value::clone(&document.0))
}

/// Headers and query parameters that [`Context`] reads.
impl IntoParams for Context {
    fn into_params(_: impl Fn() -> Option<ParameterIn>) -> Vec<Parameter> {
        context_parameters()
    }
}

/// Apart from the trait's method, which is generic: every handler would be compiled with its own.
#[inline(never)]
fn context_parameters() -> Vec<Parameter> {
    let header = |name: &axum::http::HeaderName, description: &str| {
        optional(name.as_str(), ParameterIn::Header, Type::String, description)
    };
    vec![
        header(&context::CONSISTENCY, "How fresh reads must be: linearizable, session or eventual"),
        header(&context::POSITION, "The token of an earlier answer: read at least what it had seen"),
        header(&context::IDEMPOTENCY_KEY, "Names a write, so that sending it again does nothing twice"),
        header(&context::PARTIAL, "true: answer a search even when some shards do not"),
        optional("timeout", ParameterIn::Query, Type::Integer, "Seconds after which the client gives up"),
    ]
}

#[inline(never)]
fn optional(name: &str, within: ParameterIn, kind: Type, description: &str) -> Parameter {
    ParameterBuilder::new()
        .name(name)
        .parameter_in(within)
        .required(utoipa::openapi::Required::False)
        .description(Some(description))
        .schema(Some(ObjectBuilder::new().schema_type(kind)))
        .build()
}

/// The id of a point, as it stands in JSON.
pub(super) enum PointIdShape {}

impl PartialSchema for PointIdShape {
    fn schema() -> RefOr<Schema> {
        let of = |kind, format: &str| {
            ObjectBuilder::new().schema_type(kind).format(Some(SchemaFormat::Custom(format.to_owned())))
        };
        OneOfBuilder::new().item(of(Type::Integer, "uint64")).item(of(Type::String, "uuid")).into()
    }
}

impl ToSchema for PointIdShape {}

/// The form of an upload.
pub(super) enum UploadForm {}

impl PartialSchema for UploadForm {
    fn schema() -> RefOr<Schema> {
        let text = || ObjectBuilder::new().schema_type(Type::String);
        ObjectBuilder::new()
            .property("file", text().format(Some(SchemaFormat::KnownFormat(KnownFormat::Binary))))
            .required("file")
            .property("purpose", text())
            .required("purpose")
            .property("id", text().description(Some("An id of one's own, to replace a file: an extension")))
            .into()
    }
}

impl ToSchema for UploadForm {}

/// The form of a snapshot that is uploaded.
pub(super) enum SnapshotForm {}

impl PartialSchema for SnapshotForm {
    fn schema() -> RefOr<Schema> {
        let file = ObjectBuilder::new()
            .schema_type(Type::String)
            .format(Some(SchemaFormat::KnownFormat(KnownFormat::Binary)));
        ObjectBuilder::new().property("snapshot", file).required("snapshot").into()
    }
}

impl ToSchema for SnapshotForm {}

/// Answers and refusals of the Qdrant surface.
pub(super) enum QdrantAnswers {}

/// Answers and refusals of the OpenAI surface.
pub(super) enum OpenAiAnswers {}

/// Answers and refusals of the operators' surface.
pub(super) enum OperatorAnswers {}

impl IntoResponses for QdrantAnswers {
    fn responses() -> BTreeMap<String, RefOr<Response>> {
        let status = ObjectBuilder::new().property("error", string()).property("code", string());
        let refusal = ObjectBuilder::new().property("status", status).property("time", number()).build();
        let answer = ObjectBuilder::new()
            .property("result", Schema::default())
            .property("status", string())
            .property("time", number())
            .build();
        answers(answer, "application/json", refusal)
    }
}

impl IntoResponses for OpenAiAnswers {
    fn responses() -> BTreeMap<String, RefOr<Response>> {
        let error = ObjectBuilder::new()
            .property("message", string())
            .property("type", string())
            .property("param", string())
            .property("code", string());
        answers(Object::default(), "application/json", ObjectBuilder::new().property("error", error).build())
    }
}

impl IntoResponses for OperatorAnswers {
    fn responses() -> BTreeMap<String, RefOr<Response>> {
        let problem = ["type", "title", "detail", "code", "field"]
            .into_iter()
            .fold(ObjectBuilder::new(), |problem, name| problem.property(name, string()))
            .property("status", ObjectBuilder::new().schema_type(Type::Integer))
            .build();
        answers(Object::default(), "application/problem+json", problem)
    }
}

fn string() -> Object {
    ObjectBuilder::new().schema_type(Type::String).build()
}

fn number() -> Object {
    ObjectBuilder::new().schema_type(Type::Number).build()
}

/// 200, and every refusal that any route may give.
#[inline(never)]
fn answers(answer: Object, kind: &str, refusal: Object) -> BTreeMap<String, RefOr<Response>> {
    let codes = [
        (ErrorCode::InvalidArgument, "Wrong input; the message names the field"),
        (ErrorCode::Unauthenticated, "A valid API key is needed"),
        (ErrorCode::NotFound, "No such thing"),
        (ErrorCode::Conflict, "The name is taken, or something else changed meanwhile"),
        (ErrorCode::TooLarge, "The body is larger than the limit"),
        (ErrorCode::Unprocessable, "The content cannot be read"),
        (ErrorCode::Busy, "Too much at once; see Retry-After"),
        (ErrorCode::Internal, "A fault of the node; its log has the details"),
        (ErrorCode::Unavailable, "A shard cannot answer now; see Retry-After"),
        (ErrorCode::Unknown, "No answer in time: a write may or may not have happened"),
        (ErrorCode::DiskFull, "A disk is full; reads and deletes go on"),
    ];
    let response = |description: &str, kind: &str, schema: &Object| {
        let content = ContentBuilder::new().schema(Some(Schema::Object(schema.clone()))).build();
        ResponseBuilder::new().description(description).content(kind, content).build()
    };
    let mut all = BTreeMap::new();
    let ok = response("Done", "application/json", &answer);
    all.insert(StatusCode::OK.as_str().to_owned(), RefOr::T(ok));
    for (code, description) in codes {
        let refused = response(description, kind, &refusal);
        all.insert(status(code).as_str().to_owned(), RefOr::T(refused));
    }
    all
}
