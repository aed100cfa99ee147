//! OpenAI's attribute filters, translated into the filter that the shards know.

use serde_json::{Value, json};
use shoal_proto::filter::MAX_FILTER_DEPTH;
use shoal_proto::{Error, Filter};

/// Translates a comparison or compound filter.
///
/// # Errors
/// Invalid argument that names the part.
pub fn translate(filter: &Value) -> Result<Value, Error> {
    let translated = json!({"must": [condition(filter, "filters", 0)?]});
    Filter::parse(&translated, "filters")?;
    Ok(translated)
}

fn condition(filter: &Value, path: &str, depth: usize) -> Result<Value, Error> {
    if depth >= MAX_FILTER_DEPTH / 2 {
        return Err(Error::invalid(path, "filters nest too deep"));
    }
    let kind = filter
        .get("type")
        .and_then(Value::as_str)
        .ok_or_else(|| Error::invalid(format!("{path}.type"), "is missing"))?;
    if matches!(kind, "and" | "or") {
        let parts = filter.get("filters").and_then(Value::as_array);
        let parts = parts.ok_or_else(|| Error::invalid(format!("{path}.filters"), "expected an array"))?;
        let parts = parts
            .iter()
            .enumerate()
            .map(|(at, part)| condition(part, &format!("{path}.filters[{at}]"), depth + 1));
        let clause = if kind == "and" { "must" } else { "should" };
        return Ok(json!({clause: parts.collect::<Result<Vec<Value>, Error>>()?}));
    }
    let key = filter
        .get("key")
        .and_then(Value::as_str)
        .ok_or_else(|| Error::invalid(format!("{path}.key"), "is missing"))?;
    let value = filter.get("value").ok_or_else(|| Error::invalid(format!("{path}.value"), "is missing"))?;
    let not = |condition: Value| json!({"must_not": [condition]});
    match kind {
        "eq" => equals(key, value, path),
        "ne" => Ok(not(equals(key, value, path)?)),
        "gt" | "gte" | "lt" | "lte" if value.is_number() => Ok(json!({"key": key, "range": {kind: value}})),
        "gt" | "gte" | "lt" | "lte" => Err(Error::invalid(format!("{path}.value"), "expected a number")),
        "in" | "nin" => {
            let items = value
                .as_array()
                .ok_or_else(|| Error::invalid(format!("{path}.value"), "expected an array"))?;
            let any: Vec<Value> =
                items.iter().map(|item| equals(key, item, path)).collect::<Result<_, Error>>()?;
            // An empty `should` would hold for everything; nothing is in an empty list.
            let within = if any.is_empty() { json!({"has_id": []}) } else { json!({"should": any}) };
            Ok(if kind == "in" { within } else { not(within) })
        }
        _ => Err(Error::invalid(
            format!("{path}.type"),
            "expected eq, ne, gt, gte, lt, lte, in, nin, and or or",
        )),
    }
}

fn equals(key: &str, value: &Value, path: &str) -> Result<Value, Error> {
    match value {
        Value::String(_) | Value::Bool(_) => Ok(json!({"key": key, "match": {"value": value}})),
        // 2022 and 2022.0 are the same number to a client.
        Value::Number(_) => Ok(json!({"key": key, "range": {"gte": value, "lte": value}})),
        _ => Err(Error::invalid(format!("{path}.value"), "expected a string, a number or a boolean")),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use shoal_proto::PointId;

    #[test]
    fn comparisons_mean_what_they_say() {
        let payload = json!({"year": 2023, "lang": "en", "draft": false});
        let cases = [
            (json!({"type": "eq", "key": "year", "value": 2023.0}), true),
            (json!({"type": "ne", "key": "lang", "value": "en"}), false),
            (json!({"type": "gt", "key": "year", "value": 2022.5}), true),
            (json!({"type": "in", "key": "lang", "value": ["de", "en"]}), true),
            (json!({"type": "nin", "key": "lang", "value": ["de"]}), true),
            (json!({"type": "in", "key": "lang", "value": []}), false),
            (
                json!({"type": "or", "filters": [{"type": "eq", "key": "draft", "value": true}, {"type": "lt", "key": "year", "value": 2024}]}),
                true,
            ),
            (
                json!({"type": "and", "filters": [{"type": "eq", "key": "draft", "value": false}, {"type": "lt", "key": "year", "value": 2000}]}),
                false,
            ),
        ];
        for (filter, holds) in cases {
            let translated = translate(&filter).expect("good");
            let parsed = Filter::parse(&translated, "filters").expect("good");
            assert_eq!(
                parsed.matches(PointId::Num(1), payload.as_object().expect("an object")),
                holds,
                "{filter}"
            );
        }
        for bad in
            [json!({"type": "like", "key": "a", "value": 1}), json!({"type": "eq", "value": 1}), json!(5)]
        {
            assert!(translate(&bad).is_err(), "{bad}");
        }
    }
}
