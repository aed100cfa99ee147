//! Qdrant's envelopes and the pieces that several requests share.

use std::time::Instant;

use axum::Json;
use axum::response::{IntoResponse, Response};
use serde::Serialize;
use serde_json::{Map, Value, json};
use shoal_engine::command::{Hit, Select, Target};
use shoal_proto::{Error, Filter, PointId, Position};

use crate::http::context::position_header;

/// The most points that one answer holds.
pub const MAX_LIMIT: usize = 10_000;
/// The most ids in one request.
pub const MAX_IDS: usize = 10_000;

/// A result in Qdrant's envelope, with the position that it was reached at.
pub fn envelope(result: impl Serialize, started: Instant, position: &Position) -> Response {
    let body = json!({"result": result, "status": "ok", "time": started.elapsed().as_secs_f64()});
    (position_header(position), Json(body)).into_response()
}

/// `with_payload` and `with_vector`: a flag, a list, or include and exclude.
///
/// # Errors
/// Invalid argument that names the field.
pub fn select(value: Option<&Value>, field: &str, default: Select) -> Result<Select, Error> {
    let names = |value: &Value, field: &str| -> Result<Vec<String>, Error> {
        serde_json::from_value(value.clone())
            .map_err(|_| Error::invalid(field, "expected an array of strings"))
    };
    match value {
        None | Some(Value::Null) => Ok(default),
        Some(Value::Bool(true)) => Ok(Select::All),
        Some(Value::Bool(false)) => Ok(Select::Nothing),
        Some(list @ Value::Array(_)) => Ok(Select::Include(names(list, field)?)),
        Some(Value::String(name)) => Ok(Select::Include(vec![name.clone()])),
        Some(Value::Object(map)) => match (map.get("include"), map.get("exclude")) {
            (Some(list), None | Some(Value::Null)) if !list.is_null() => {
                Ok(Select::Include(names(list, &format!("{field}.include"))?))
            }
            (_, Some(list)) => Ok(Select::Exclude(names(list, &format!("{field}.exclude"))?)),
            _ => Err(Error::invalid(field, "expected include or exclude")),
        },
        Some(_) => Err(Error::invalid(field, "expected a flag, an array or an object")),
    }
}

/// A filter that was parsed once to refuse a bad one, as the text that the shards get.
///
/// # Errors
/// Invalid argument that names the part.
pub fn filter(value: Option<&Value>, field: &str) -> Result<Option<String>, Error> {
    match value {
        None | Some(Value::Null) => Ok(None),
        Some(value) => {
            Filter::parse(value, field)?;
            Ok(Some(value.to_string()))
        }
    }
}

/// The target of a change: `points` or `filter`, exactly one.
///
/// # Errors
/// Invalid argument.
pub fn target(points: Option<Vec<PointId>>, by: Option<&Value>) -> Result<Target, Error> {
    match (points, filter(by, "filter")?) {
        (Some(ids), None) if ids.len() > MAX_IDS => {
            Err(Error::invalid("points", format!("at most {MAX_IDS} ids")))
        }
        (Some(ids), None) => Ok(Target::Ids(ids)),
        (None, Some(filter)) => Ok(Target::Filter(filter)),
        _ => Err(Error::invalid("points", "exactly one of points and filter is needed")),
    }
}

/// A limit between 1 and [`MAX_LIMIT`].
///
/// # Errors
/// Invalid argument.
pub fn limit(value: Option<u64>, field: &str, default: usize) -> Result<usize, Error> {
    let value = value.unwrap_or(default as u64);
    match usize::try_from(value) {
        Ok(limit) if (1..=MAX_LIMIT).contains(&limit) => Ok(limit),
        _ => Err(Error::invalid(field, format!("{value} is not between 1 and {MAX_LIMIT}"))),
    }
}

/// A point as Qdrant shows it.
pub fn record(hit: Hit, with_score: bool) -> Value {
    let mut record = Map::new();
    record.insert("id".into(), json!(hit.id));
    if with_score {
        record.insert("version".into(), json!(hit.version));
        record.insert("score".into(), json!(hit.score));
    }
    record.insert("payload".into(), hit.payload.map_or(Value::Null, |payload| payload_value(&payload)));
    record.insert("vector".into(), hit.vectors.map_or(Value::Null, vectors_value));
    Value::Object(record)
}

fn payload_value(payload: &str) -> Value {
    match payload {
        "" => json!({}),
        payload => serde_json::from_str(payload).unwrap_or(Value::Null),
    }
}

fn vectors_value(mut vectors: Vec<(String, Vec<f32>)>) -> Value {
    match vectors.iter().position(|(name, _)| name.is_empty()) {
        Some(at) if vectors.len() == 1 => json!(vectors.remove(at).1),
        _ => Value::Object(vectors.into_iter().map(|(name, vector)| (name, json!(vector))).collect()),
    }
}

/// A point's vectors as a request gives them: one array, or arrays by name.
///
/// # Errors
/// Invalid argument that names the field.
pub fn vectors(value: &Value, field: &str) -> Result<Vec<(String, Vec<f32>)>, Error> {
    match value {
        Value::Array(_) => Ok(vec![(String::new(), vector(value, field)?)]),
        Value::Object(map) => map
            .iter()
            .map(|(name, value)| Ok((name.clone(), vector(value, &format!("{field}.{name}"))?)))
            .collect(),
        _ => Err(Error::invalid(field, "expected an array of numbers, or arrays by name")),
    }
}

/// One dense vector.
///
/// # Errors
/// Invalid argument that names the field.
pub fn vector(value: &Value, field: &str) -> Result<Vec<f32>, Error> {
    let items = value.as_array().ok_or_else(|| Error::invalid(field, "expected an array of numbers"))?;
    items
        .iter()
        .enumerate()
        .map(|(index, item)| {
            let number = item.as_f64().map(|number| number as f32).filter(|number| number.is_finite());
            number.ok_or_else(|| Error::invalid(format!("{field}[{index}]"), "expected a finite number"))
        })
        .collect()
}
