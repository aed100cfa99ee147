//! Payload filters in Qdrant's shape: `must`, `should`, `must_not` over conditions.
//!
//! A filter is parsed by hand from JSON rather than derived, because an untagged enum can only
//! say "did not match any variant": here every refusal names the path. Parsing enforces the
//! limits [`MAX_FILTER_DEPTH`] and [`MAX_FILTER_NODES`], so that an evaluator may recurse.
//!
//! Evaluation of a condition against a payload is here too ([`Filter::matches`]), because the
//! engine and the tests' naive model must agree about it; indexes and planning are the engine's.

use std::collections::BTreeSet;

use serde_json::{Map, Value};

use crate::{Error, PointId, Result};

/// The deepest nesting of filters.
pub const MAX_FILTER_DEPTH: usize = 32;
/// The most conditions and values in one filter.
pub const MAX_FILTER_NODES: usize = 4096;

/// All of `must`, at least one of `should` (when there are any), none of `must_not`.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Filter {
    /// Conditions that must all hold.
    pub must: Vec<Condition>,
    /// Conditions of which at least one must hold, when there are any.
    pub should: Vec<Condition>,
    /// Conditions none of which may hold.
    pub must_not: Vec<Condition>,
}

/// One condition.
#[derive(Clone, Debug, PartialEq)]
pub enum Condition {
    /// Any value at the path equals one of the values.
    MatchAny(String, Vec<Scalar>),
    /// Some value at the path equals none of the values.
    MatchExcept(String, Vec<Scalar>),
    /// A string at the path contains every word of the text, in any case.
    MatchText(String, Vec<String>),
    /// A number at the path lies in the range.
    Range(String, Range),
    /// The number of values at the path lies in the range.
    ValuesCount(String, Range),
    /// The path is missing, null or an empty array.
    IsEmpty(String),
    /// The path holds null.
    IsNull(String),
    /// The point's id is one of these.
    HasId(BTreeSet<PointId>),
    /// One element of the array at the path satisfies the filter.
    Nested(String, Box<Filter>),
    /// A filter inside a filter.
    Filter(Box<Filter>),
}

/// A value that a payload value can equal.
#[derive(Clone, Debug, PartialEq)]
pub enum Scalar {
    /// A string.
    Keyword(String),
    /// An integer.
    Integer(i64),
    /// A boolean.
    Bool(bool),
}

impl Scalar {
    /// Whether a payload value equals this.
    pub fn equals(&self, value: &Value) -> bool {
        match (self, value) {
            (Scalar::Keyword(text), Value::String(value)) => text == value,
            (Scalar::Integer(number), Value::Number(value)) => value.as_i64() == Some(*number),
            (Scalar::Bool(flag), Value::Bool(value)) => flag == value,
            _ => false,
        }
    }
}

/// A range of numbers; an absent bound is open.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct Range {
    /// Greater than.
    pub gt: Option<f64>,
    /// Greater than or equal to.
    pub gte: Option<f64>,
    /// Less than.
    pub lt: Option<f64>,
    /// Less than or equal to.
    pub lte: Option<f64>,
}

impl Range {
    /// Whether the number lies in the range.
    pub fn contains(&self, number: f64) -> bool {
        self.gt.is_none_or(|bound| number > bound)
            && self.gte.is_none_or(|bound| number >= bound)
            && self.lt.is_none_or(|bound| number < bound)
            && self.lte.is_none_or(|bound| number <= bound)
    }
}

impl Filter {
    /// Parses a filter. `path` is where it stands in the request, for messages.
    ///
    /// # Errors
    /// [`crate::ErrorCode::InvalidArgument`] with the path of the part at fault.
    pub fn parse(value: &Value, path: &str) -> Result<Filter> {
        Parser { nodes: 0 }.filter(value, path, 0)
    }

    /// Whether the filter holds for a point.
    pub fn matches(&self, id: PointId, payload: &Map<String, Value>) -> bool {
        self.must.iter().all(|condition| condition.matches(id, payload))
            && (self.should.is_empty() || self.should.iter().any(|condition| condition.matches(id, payload)))
            && !self.must_not.iter().any(|condition| condition.matches(id, payload))
    }
}

impl Condition {
    /// Whether the condition holds for a point.
    pub fn matches(&self, id: PointId, payload: &Map<String, Value>) -> bool {
        match self {
            Condition::MatchAny(key, wanted) => values_at(payload, key)
                .into_iter()
                .any(|value| wanted.iter().any(|scalar| scalar.equals(value))),
            Condition::MatchExcept(key, refused) => values_at(payload, key)
                .into_iter()
                .any(|value| !refused.iter().any(|scalar| scalar.equals(value))),
            Condition::MatchText(key, words) => values_at(payload, key).into_iter().any(|value| {
                value.as_str().is_some_and(|text| {
                    let text = text.to_lowercase();
                    words.iter().all(|word| text.contains(word.as_str()))
                })
            }),
            Condition::Range(key, range) => values_at(payload, key)
                .into_iter()
                .any(|value| value.as_f64().is_some_and(|number| range.contains(number))),
            Condition::ValuesCount(key, range) => range.contains(values_at(payload, key).len() as f64),
            Condition::IsEmpty(key) => {
                let values = raw_at(payload, key);
                values.iter().all(|value| value.is_null() || value.as_array().is_some_and(Vec::is_empty))
            }
            Condition::IsNull(key) => raw_at(payload, key).iter().any(|value| value.is_null()),
            Condition::HasId(ids) => ids.contains(&id),
            Condition::Nested(key, filter) => values_at(payload, key)
                .into_iter()
                .any(|value| value.as_object().is_some_and(|object| filter.matches(id, object))),
            Condition::Filter(filter) => filter.matches(id, payload),
        }
    }
}

/// The values at a path, arrays opened: `a.b` and `a[].b` both reach into arrays of objects.
pub fn values_at<'a>(payload: &'a Map<String, Value>, path: &str) -> Vec<&'a Value> {
    let mut opened = Vec::new();
    for value in raw_at(payload, path) {
        match value {
            Value::Array(items) => opened.extend(items),
            Value::Null => {}
            other => opened.push(other),
        }
    }
    opened
}

/// The values at a path as they stand, with only the arrays on the way opened.
fn raw_at<'a>(payload: &'a Map<String, Value>, path: &str) -> Vec<&'a Value> {
    // A key that itself contains dots is found first, as users expect of flat metadata.
    if let Some(value) = payload.get(path) {
        return vec![value];
    }
    let Some((head, rest)) = path.split_once('.') else {
        let head = path.strip_suffix("[]").unwrap_or(path);
        return payload.get(head).into_iter().collect();
    };
    let objects: Vec<&Map<String, Value>> = match payload.get(head.strip_suffix("[]").unwrap_or(head)) {
        Some(Value::Object(object)) => vec![object],
        Some(Value::Array(items)) => items.iter().filter_map(Value::as_object).collect(),
        _ => Vec::new(),
    };
    objects.into_iter().flat_map(|object| raw_at(object, rest)).collect()
}

struct Parser {
    nodes: usize,
}

impl Parser {
    fn count(&mut self, nodes: usize, path: &str) -> Result<()> {
        self.nodes += nodes;
        if self.nodes > MAX_FILTER_NODES {
            return Err(Error::invalid(path, format!("a filter has at most {MAX_FILTER_NODES} parts")));
        }
        Ok(())
    }

    fn filter(&mut self, value: &Value, path: &str, depth: usize) -> Result<Filter> {
        if depth >= MAX_FILTER_DEPTH {
            return Err(Error::invalid(path, format!("filters nest at most {MAX_FILTER_DEPTH} deep")));
        }
        let mut filter = Filter::default();
        for (key, value) in object(value, path)? {
            let path = format!("{path}.{key}");
            let conditions = match key.as_str() {
                "must" => &mut filter.must,
                "should" => &mut filter.should,
                "must_not" => &mut filter.must_not,
                _ => return Err(Error::invalid(path, "unknown field; expected must, should or must_not")),
            };
            match value {
                Value::Null => {}
                Value::Array(items) => {
                    for (index, item) in items.iter().enumerate() {
                        conditions.push(self.condition(item, &format!("{path}[{index}]"), depth)?);
                    }
                }
                single => conditions.push(self.condition(single, &path, depth)?),
            }
        }
        Ok(filter)
    }

    fn condition(&mut self, value: &Value, path: &str, depth: usize) -> Result<Condition> {
        self.count(1, path)?;
        let fields = object(value, path)?;
        if fields.contains_key("key") {
            return self.field_condition(fields, path);
        }
        if ["must", "should", "must_not"].iter().any(|key| fields.contains_key(*key)) {
            return Ok(Condition::Filter(Box::new(self.filter(value, path, depth + 1)?)));
        }
        let (kind, body) = match fields.iter().next() {
            Some(only) if fields.len() == 1 => only,
            _ => return Err(Error::invalid(path, "expected exactly one condition")),
        };
        let path = format!("{path}.{kind}");
        match kind.as_str() {
            "has_id" => {
                let ids = array(body, &path)?;
                self.count(ids.len(), &path)?;
                let parse = |(index, id): (usize, &Value)| {
                    serde_json::from_value(id.clone())
                        .map_err(|_| Error::invalid(format!("{path}[{index}]"), "not a point id"))
                };
                Ok(Condition::HasId(ids.iter().enumerate().map(parse).collect::<Result<_>>()?))
            }
            "is_empty" => Ok(Condition::IsEmpty(key_of(body, &path)?)),
            "is_null" => Ok(Condition::IsNull(key_of(body, &path)?)),
            "nested" => {
                let fields = object(body, &path)?;
                only_fields(fields, &["key", "filter"], &path)?;
                let inner = fields
                    .get("filter")
                    .ok_or_else(|| Error::invalid(format!("{path}.filter"), "is missing"))?;
                let inner = self.filter(inner, &format!("{path}.filter"), depth + 1)?;
                let key = string(fields.get("key"), &format!("{path}.key"))?;
                Ok(Condition::Nested(key, Box::new(inner)))
            }
            _ => Err(Error::invalid(path, "unknown condition")),
        }
    }

    fn field_condition(&mut self, fields: &Map<String, Value>, path: &str) -> Result<Condition> {
        let known = ["key", "match", "range", "values_count", "is_empty", "is_null"];
        only_fields(fields, &known, path)?;
        let key = string(fields.get("key"), &format!("{path}.key"))?;
        let mut given = fields.iter().filter(|(name, value)| *name != "key" && !value.is_null());
        let (Some((kind, body)), None) = (given.next(), given.next()) else {
            return Err(Error::invalid(
                path,
                "a key needs exactly one of match, range, values_count, is_empty, is_null",
            ));
        };
        let path = format!("{path}.{kind}");
        match kind.as_str() {
            "match" => self.match_condition(key, body, &path),
            "range" => Ok(Condition::Range(key, range(body, &path)?)),
            "values_count" => Ok(Condition::ValuesCount(key, range(body, &path)?)),
            flag => {
                let holds = body.as_bool().ok_or_else(|| Error::invalid(&path, "expected true or false"))?;
                let condition = match flag {
                    "is_empty" => Condition::IsEmpty(key),
                    _ => Condition::IsNull(key),
                };
                Ok(if holds {
                    condition
                } else {
                    let must_not = vec![condition];
                    Condition::Filter(Box::new(Filter { must_not, ..Filter::default() }))
                })
            }
        }
    }

    fn match_condition(&mut self, key: String, body: &Value, path: &str) -> Result<Condition> {
        let fields = object(body, path)?;
        let (kind, value) = match fields.iter().next() {
            Some(only) if fields.len() == 1 => only,
            _ => return Err(Error::invalid(path, "expected exactly one of value, any, except, text")),
        };
        let path = format!("{path}.{kind}");
        let mut scalars = |value: &Value| -> Result<Vec<Scalar>> {
            let items = array(value, &path)?;
            self.count(items.len(), &path)?;
            items.iter().enumerate().map(|(i, item)| scalar(item, &format!("{path}[{i}]"))).collect()
        };
        match kind.as_str() {
            "value" => Ok(Condition::MatchAny(key, vec![scalar(value, &path)?])),
            "any" => Ok(Condition::MatchAny(key, scalars(value)?)),
            "except" => Ok(Condition::MatchExcept(key, scalars(value)?)),
            "text" | "phrase" => {
                let text = string(Some(value), &path)?.to_lowercase();
                let words = match kind.as_str() {
                    "phrase" => vec![text],
                    _ => text.split_whitespace().map(str::to_owned).collect(),
                };
                Ok(Condition::MatchText(key, words))
            }
            _ => Err(Error::invalid(path, "unknown kind of match; expected value, any, except or text")),
        }
    }
}

fn object<'a>(value: &'a Value, path: &str) -> Result<&'a Map<String, Value>> {
    value.as_object().ok_or_else(|| Error::invalid(path, "expected an object"))
}

fn array<'a>(value: &'a Value, path: &str) -> Result<&'a Vec<Value>> {
    value.as_array().ok_or_else(|| Error::invalid(path, "expected an array"))
}

fn string(value: Option<&Value>, path: &str) -> Result<String> {
    let text = value.and_then(Value::as_str).ok_or_else(|| Error::invalid(path, "expected a string"))?;
    Ok(text.to_owned())
}

fn key_of(value: &Value, path: &str) -> Result<String> {
    let fields = object(value, path)?;
    only_fields(fields, &["key"], path)?;
    string(fields.get("key"), &format!("{path}.key"))
}

fn only_fields(fields: &Map<String, Value>, known: &[&str], path: &str) -> Result<()> {
    match fields.keys().find(|name| !known.contains(&name.as_str())) {
        Some(name) => Err(Error::invalid(format!("{path}.{name}"), "unknown field")),
        None => Ok(()),
    }
}

fn scalar(value: &Value, path: &str) -> Result<Scalar> {
    match value {
        Value::String(text) => Ok(Scalar::Keyword(text.clone())),
        Value::Bool(flag) => Ok(Scalar::Bool(*flag)),
        Value::Number(number) if number.is_i64() => {
            Ok(Scalar::Integer(number.as_i64().expect("checked by is_i64")))
        }
        _ => Err(Error::invalid(path, "expected a string, an integer or a boolean")),
    }
}

fn range(value: &Value, path: &str) -> Result<Range> {
    let mut range = Range::default();
    for (name, value) in object(value, path)? {
        let path = format!("{path}.{name}");
        let bound = match name.as_str() {
            "gt" => &mut range.gt,
            "gte" => &mut range.gte,
            "lt" => &mut range.lt,
            "lte" => &mut range.lte,
            _ => return Err(Error::invalid(path, "unknown field; expected gt, gte, lt or lte")),
        };
        if !value.is_null() {
            *bound = Some(value.as_f64().ok_or_else(|| Error::invalid(path, "expected a number"))?);
        }
    }
    Ok(range)
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    fn holds(filter: Value, payload: Value) -> bool {
        let filter = Filter::parse(&filter, "filter").expect("a good filter");
        filter.matches(PointId::Num(7), payload.as_object().expect("an object"))
    }

    #[test]
    fn conditions_hold_as_qdrant_says() {
        let payload = json!({"city": "Rome", "tags": ["a", "b"], "n": 5, "none": null, "e": [],
            "rooms": [{"size": 3, "sun": true}, {"size": 9, "sun": false}], "a": {"b": 2}, "ok": true});
        let cases = [
            (json!({"must": [{"key": "city", "match": {"value": "Rome"}}]}), true),
            (json!({"must": {"key": "tags", "match": {"any": ["x", "b"]}}}), true),
            (json!({"must": [{"key": "tags", "match": {"except": ["a", "b"]}}]}), false),
            (json!({"must": [{"key": "city", "match": {"text": "rom"}}]}), true),
            (json!({"must": [{"key": "n", "range": {"gte": 5, "lt": 6}}]}), true),
            (json!({"must": [{"key": "a.b", "range": {"gt": 2}}]}), false),
            (json!({"should": [{"key": "n", "match": {"value": 4}}, {"has_id": [7]}]}), true),
            (json!({"should": [{"has_id": [8]}]}), false),
            (json!({"must_not": [{"is_empty": {"key": "missing"}}]}), false),
            (json!({"must": [{"is_empty": {"key": "e"}}, {"is_empty": {"key": "none"}}]}), true),
            (json!({"must": [{"is_null": {"key": "none"}}]}), true),
            (json!({"must": [{"is_null": {"key": "missing"}}]}), false),
            (json!({"must": [{"key": "tags", "values_count": {"gte": 2}}]}), true),
            (json!({"must": [{"key": "rooms[].size", "range": {"gt": 8}}]}), true),
            (
                json!({"must": [{"nested": {"key": "rooms", "filter": {"must": [
                {"key": "size", "range": {"gt": 8}}, {"key": "sun", "match": {"value": true}}]}}}]}),
                false,
            ),
            (json!({"must": [{"must_not": [{"key": "ok", "match": {"value": false}}]}]}), true),
            (json!({}), true),
        ];
        for (filter, expected) in cases {
            assert_eq!(holds(filter.clone(), payload.clone()), expected, "{filter}");
        }
    }

    #[test]
    fn refusals_name_the_path() {
        let cases = [
            (json!({"mus": []}), "filter.mus"),
            (json!({"must": [{"key": "a"}]}), "filter.must[0]"),
            (json!({"must": [{"key": "a", "match": {"value": 1.5}}]}), "filter.must[0].match.value"),
            (json!({"must": [{"key": "a", "range": {"above": 1}}]}), "filter.must[0].range.above"),
            (json!({"must": [{"key": "a", "colour": {}}]}), "filter.must[0].colour"),
            (json!({"should": [{"has_id": ["x"]}]}), "filter.should[0].has_id[0]"),
            (json!([]), "filter"),
        ];
        for (filter, field) in cases {
            let error = Filter::parse(&filter, "filter").expect_err(field);
            assert_eq!(error.field.as_deref(), Some(field));
        }
    }

    #[test]
    fn depth_and_size_are_limited() {
        let deep = (0..MAX_FILTER_DEPTH).fold(json!({"must": []}), |inner, _| json!({"must": [inner]}));
        assert!(Filter::parse(&deep, "filter").is_err());
        let wide = json!({"must": [{"has_id": (0..5000).collect::<Vec<u32>>()}]});
        assert!(Filter::parse(&wide, "filter").is_err());
    }
}
