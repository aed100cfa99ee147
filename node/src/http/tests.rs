//! All routes with JSON bodies, without a socket and without a cluster: what is wrong with a request is said
//! before anything is asked of the node, in the shape of the route's surface, with the name of the field.

use std::collections::BTreeSet;
use std::time::Duration;

use axum::Router;
use axum::body::{Body, Bytes, to_bytes};
use axum::http::{Request, StatusCode, header};
use metrics_exporter_prometheus::PrometheusBuilder;
use serde_json::Value;
use tower::ServiceExt;

use super::error::Surface;
use super::router;
use crate::app::App;
use crate::config::Config;
use crate::log::LogLevel;

/// Method, path, a body in which one field is of a wrong type, and that field.
const ROUTES: [(&str, &str, &str, &str); 32] = [
    ("POST", "/collections/aliases", r#"{"actions":1}"#, "actions"),
    ("PUT", "/collections/{collection}", r#"{"shard_number":"many"}"#, "shard_number"),
    ("PUT", "/collections/{collection}/index", r#"{"field_name":1}"#, "field_name"),
    ("PUT", "/collections/{collection}/points", r#"{"points":1}"#, "points"),
    ("POST", "/collections/{collection}/points", r#"{"ids":1}"#, "ids"),
    ("POST", "/collections/{collection}/points/count", r#"{"exact":"yes"}"#, "exact"),
    ("POST", "/collections/{collection}/points/delete", r#"{"points":1}"#, "points"),
    ("POST", "/collections/{collection}/points/payload", r#"{"payload":1}"#, "payload"),
    ("PUT", "/collections/{collection}/points/payload", r#"{"payload":[]}"#, "payload"),
    ("POST", "/collections/{collection}/points/payload/clear", r#"{"points":{}}"#, "points"),
    ("POST", "/collections/{collection}/points/payload/delete", r#"{"keys":"a"}"#, "keys"),
    ("POST", "/collections/{collection}/points/query", r#"{"limit":"ten"}"#, "limit"),
    ("POST", "/collections/{collection}/points/query/batch", r#"{"searches":[7]}"#, "searches[0]"),
    ("POST", "/collections/{collection}/points/scroll", r#"{"limit":1.5}"#, "limit"),
    ("POST", "/collections/{collection}/points/search", r#"{"vector":[1],"offset":"a"}"#, "offset"),
    ("POST", "/collections/{collection}/points/search/batch", r#"{"searches":1}"#, "searches"),
    ("PUT", "/collections/{collection}/snapshots/recover", r#"{"location":1}"#, "location"),
    ("POST", "/v1/embeddings", r#"{"model":1}"#, "model"),
    ("POST", "/v1/vector_stores", r#"{"name":1}"#, "name"),
    ("POST", "/v1/vector_stores/{store}", r#"{"metadata":"a"}"#, "metadata"),
    ("POST", "/v1/vector_stores/{store}/files", r#"{"file_id":1}"#, "file_id"),
    ("POST", "/v1/vector_stores/{store}/files/{file}", r#"{"attributes":1}"#, "attributes"),
    ("POST", "/v1/vector_stores/{store}/search", r#"{"max_num_results":"a"}"#, "max_num_results"),
    ("POST", "/admin/backups", r#"{"collections":1}"#, "collections"),
    ("POST", "/admin/backups/{backup}/restore", r#"{"shard_number":"a"}"#, "shard_number"),
    (
        "PUT",
        "/admin/collections/{collection}/replication",
        r#"{"replication_factor":-1}"#,
        "replication_factor",
    ),
    ("POST", "/admin/log-level", r#"{"level":1}"#, "level"),
    ("POST", "/admin/shards/{shard}/abandon", r#"{"collection":1}"#, "collection"),
    ("POST", "/admin/shards/{shard}/leader", r#"{"to":1}"#, "to"),
    ("POST", "/admin/shards/{shard}/merge", r#"{"with":"other"}"#, "with"),
    ("POST", "/admin/shards/{shard}/move", r#"{"from":1}"#, "from"),
    ("POST", "/admin/shards/{shard}/split", r#"{"into":"two"}"#, "into"),
];

/// All routes of a node that has not started: whatever gets past the checks is answered 503.
fn routes() -> Router {
    let metrics = PrometheusBuilder::new().build_recorder().handle();
    router(App::new(Config::default(), metrics, LogLevel::of_nothing()))
}

/// A path with something in the place of each parameter.
fn filled(path: &str) -> String {
    let file = format!("file-{}", "0".repeat(32));
    let values =
        [("{collection}", "c"), ("{store}", "vs_1"), ("{file}", &file), ("{backup}", "b"), ("{shard}", "1")];
    values.into_iter().fold(path.to_owned(), |path, (name, value)| path.replace(name, value))
}

async fn answer(routes: &Router, method: &str, path: &str, body: &str) -> (StatusCode, Value) {
    let request = Request::builder().method(method).uri(path);
    let request = request.header(header::CONTENT_TYPE, "application/json");
    let request = request.body(Body::from(body.to_owned())).expect("a request");
    let response = routes.clone().oneshot(request).await.expect("refusals are answers");
    let status = response.status();
    let bytes = to_bytes(response.into_body(), 1 << 20).await.expect("a whole answer");
    (status, serde_json::from_slice(&bytes).expect("every answer is JSON"))
}

/// The code and the message of a refusal, and the field where its surface has a place for it.
fn refusal(path: &str, answer: &Value) -> (Value, String, Option<Value>) {
    let (code, message, field) = match Surface::of(path) {
        Surface::Qdrant => ("/status/code", "/status/error", None),
        Surface::OpenAi => ("/error/code", "/error/message", Some("/error/param")),
        Surface::Operator => ("/code", "/detail", Some("/field")),
    };
    let at = |pointer| answer.pointer(pointer).cloned().unwrap_or_default();
    (at(code), at(message).as_str().unwrap_or_default().to_owned(), field.map(at))
}

#[tokio::test]
async fn a_bad_body_is_refused_with_the_name_of_the_field() {
    let routes = routes();
    for (method, path, wrong_type, field) in ROUTES {
        let bodies = [
            (wrong_type, field),
            (r#"{"colour":1}"#, "colour"),
            (r#"{"colour":1,"colour":1}"#, "colour"),
            ("7", "body"),
            ("{} {}", ""),
            (r#"{"nam"#, ""),
            ("\u{0}", ""),
        ];
        for (body, named) in bodies {
            let path = filled(path);
            let (status, answer) = answer(&routes, method, &path, body).await;
            let (code, message, in_field) = refusal(&path, &answer);
            assert_eq!(status, StatusCode::BAD_REQUEST, "{method} {path} {body}: {answer}");
            assert_eq!(code, "invalid_argument", "{method} {path} {body}: {answer}");
            assert!(message.contains(named), "{method} {path} {body} does not name {named}: {answer}");
            if body == wrong_type {
                assert_eq!(in_field.unwrap_or(field.into()), field, "{method} {path}: {answer}");
            }
        }
    }
}

#[tokio::test]
async fn no_route_with_a_body_is_left_out() {
    let (_, document) = answer(&routes(), "GET", "/openapi.json", "").await;
    let mut listed = BTreeSet::new();
    for (path, operations) in document["paths"].as_object().expect("paths") {
        for (method, operation) in operations.as_object().expect("operations by method") {
            if operation.pointer("/requestBody/content/application~1json").is_some() {
                listed.insert((method.to_uppercase(), path.clone()));
            }
        }
    }
    let tested = ROUTES.map(|(method, path, ..)| (method.to_owned(), path.to_owned()));
    assert_eq!(BTreeSet::from(tested), listed, "every route with a JSON body has a row in the table");
}

#[tokio::test]
async fn what_is_wrong_outside_the_body_is_refused_as_well() {
    let routes = routes();
    let refused = [
        ("POST", "/collections/c/points/scroll?timeout=0", StatusCode::BAD_REQUEST, "timeout"),
        ("POST", "/collections/c/points/scroll?timeout=soon", StatusCode::BAD_REQUEST, "timeout"),
        ("GET", "/collections/c/points/no-id", StatusCode::BAD_REQUEST, "id"),
        ("GET", "/v1/vector_stores/vs_1/files?limit=many", StatusCode::BAD_REQUEST, "limit"),
        ("POST", "/admin/shards/one/split", StatusCode::BAD_REQUEST, "one"),
        ("DELETE", "/admin/nodes/n1?force=perhaps", StatusCode::BAD_REQUEST, "force"),
        ("PATCH", "/collections/c", StatusCode::METHOD_NOT_ALLOWED, "method"),
        ("GET", "/v1/nothing", StatusCode::NOT_FOUND, "no such path: /v1/nothing"),
    ];
    for (method, path, wanted, named) in refused {
        let (status, answer) = answer(&routes, method, path, "{}").await;
        let (code, message, _) = refusal(path, &answer);
        assert_eq!(status, wanted, "{method} {path}: {answer}");
        assert!(code.is_string(), "{method} {path}: {answer}");
        assert!(message.contains(named), "{method} {path} does not name {named}: {answer}");
    }
}

#[tokio::test]
async fn what_is_right_gets_as_far_as_the_node() {
    let routes = routes();
    for (method, path, body) in [
        ("POST", "/collections/c/points/scroll", "{}"),
        ("POST", "/v1/vector_stores", ""),
        ("PUT", "/admin/collections/c/replication", r#"{"replication_factor":3}"#),
    ] {
        let (status, answer) = answer(&routes, method, path, body).await;
        let (code, message, _) = refusal(path, &answer);
        assert_eq!(status, StatusCode::SERVICE_UNAVAILABLE, "{method} {path}: {answer}");
        assert!(code == "unavailable" && message.contains("still starting"), "{answer}");
    }
    let (status, said) = answer(&routes, "POST", "/admin/log-level", r#"{"level":"debug"}"#).await;
    assert_eq!((status, &said["level"]), (StatusCode::OK, &Value::from("debug")));
    assert_eq!(answer(&routes, "GET", "/health/live", "").await.0, StatusCode::OK);
}

#[tokio::test]
async fn a_request_whose_client_goes_away_is_not_there_any_more() {
    let recorder = PrometheusBuilder::new().build_recorder();
    let page = recorder.handle();
    let _here = metrics::set_default_local_recorder(&recorder);
    let endless = futures::stream::pending::<Result<Bytes, std::io::Error>>();
    let request = Request::post("/collections/c/points/scroll").body(Body::from_stream(endless));
    let answering = routes().oneshot(request.expect("a request"));
    let answered = tokio::time::timeout(Duration::from_millis(50), answering).await;
    assert!(answered.is_err(), "half a body was answered");
    let page = page.render();
    assert!(page.contains("shoal_http_in_flight 0"), "{page}");
    let counted = page.lines().find(|line| line.starts_with("http_requests_total{"));
    assert!(counted.is_some_and(|line| line.contains("status=\"499\"") && line.ends_with(" 1")), "{page}");
}
