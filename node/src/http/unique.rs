//! JSON objects in which every key stands once. `serde_json` keeps the last of several, so that
//! a client and a proxy before it could read two things in one request; structs refuse repeated
//! fields by themselves, free-form objects (payloads, filters, metadata) do it here.

use std::fmt;

use serde::de::{DeserializeSeed, Deserializer, Error, MapAccess, SeqAccess, Visitor};
use serde_json::{Map, Number, Value};

/// For a field that holds any JSON, or nothing.
pub fn value<'de, D: Deserializer<'de>>(reader: D) -> Result<Option<Value>, D::Error> {
    Ok(Some(Unique.deserialize(reader)?).filter(|value| !value.is_null()))
}

/// For a field that must hold some JSON.
pub fn required_value<'de, D: Deserializer<'de>>(reader: D) -> Result<Value, D::Error> {
    Unique.deserialize(reader)
}

/// For a field that holds an object, or nothing.
pub fn object<'de, D: Deserializer<'de>>(reader: D) -> Result<Option<Map<String, Value>>, D::Error> {
    value(reader)?.map(into_object).transpose()
}

/// For a field that must hold an object.
pub fn required_object<'de, D: Deserializer<'de>>(reader: D) -> Result<Map<String, Value>, D::Error> {
    into_object(Unique.deserialize(reader)?)
}

/// Objects, some of which may be null.
type Objects = Vec<Option<Map<String, Value>>>;

/// For a field that holds an array of objects and nulls, or nothing.
pub fn objects<'de, D: Deserializer<'de>>(reader: D) -> Result<Option<Objects>, D::Error> {
    let Some(value) = value(reader)? else { return Ok(None) };
    let Value::Array(items) = value else { return Err(D::Error::custom("expected an array of objects")) };
    let objects = items.into_iter().map(|item| match item {
        Value::Null => Ok(None),
        item => into_object(item).map(Some),
    });
    objects.collect::<Result<_, _>>().map(Some)
}

fn into_object<E: Error>(value: Value) -> Result<Map<String, Value>, E> {
    match value {
        Value::Object(map) => Ok(map),
        _ => Err(E::custom("expected an object")),
    }
}

/// Reads any JSON value and refuses an object that names a key twice.
struct Unique;

impl<'de> DeserializeSeed<'de> for Unique {
    type Value = Value;

    fn deserialize<D: Deserializer<'de>>(self, reader: D) -> Result<Value, D::Error> {
        reader.deserialize_any(self)
    }
}

impl<'de> Visitor<'de> for Unique {
    type Value = Value;

    fn expecting(&self, to: &mut fmt::Formatter) -> fmt::Result {
        to.write_str("any JSON value")
    }

    fn visit_bool<E>(self, value: bool) -> Result<Value, E> {
        Ok(Value::Bool(value))
    }

    fn visit_i64<E>(self, value: i64) -> Result<Value, E> {
        Ok(Value::Number(value.into()))
    }

    fn visit_u64<E>(self, value: u64) -> Result<Value, E> {
        Ok(Value::Number(value.into()))
    }

    fn visit_f64<E: Error>(self, value: f64) -> Result<Value, E> {
        Number::from_f64(value).map(Value::Number).ok_or_else(|| E::custom("expected a finite number"))
    }

    fn visit_str<E>(self, value: &str) -> Result<Value, E> {
        Ok(Value::String(value.to_owned()))
    }

    fn visit_string<E>(self, value: String) -> Result<Value, E> {
        Ok(Value::String(value))
    }

    fn visit_unit<E>(self) -> Result<Value, E> {
        Ok(Value::Null)
    }

    fn visit_seq<A: SeqAccess<'de>>(self, mut items: A) -> Result<Value, A::Error> {
        let mut array = Vec::new();
        while let Some(item) = items.next_element_seed(Unique)? {
            array.push(item);
        }
        Ok(Value::Array(array))
    }

    fn visit_map<A: MapAccess<'de>>(self, mut entries: A) -> Result<Value, A::Error> {
        let mut map = Map::new();
        while let Some(key) = entries.next_key::<String>()? {
            if map.contains_key(&key) {
                return Err(A::Error::custom(format!("the key `{key}` stands twice in one object")));
            }
            let value = entries.next_value_seed(Unique)?;
            map.insert(key, value);
        }
        Ok(Value::Object(map))
    }
}

#[cfg(test)]
mod tests {
    use serde::Deserialize;

    use super::*;

    #[derive(Deserialize)]
    struct Body {
        #[serde(default, deserialize_with = "object")]
        payload: Option<Map<String, Value>>,
    }

    #[test]
    fn reads_what_serde_json_reads_and_refuses_what_stands_twice() {
        let text = r#"{"a":[1,-2,2.5,1e3,18446744073709551615,true,null,"x"],"b":{"c":{}}}"#;
        let read = Unique.deserialize(&mut serde_json::Deserializer::from_str(text)).expect("reads");
        assert_eq!(read, serde_json::from_str::<Value>(text).expect("reads"));

        let body = |text: &str| serde_json::from_str::<Body>(text).map(|body| body.payload);
        assert_eq!(body("{}").expect("absent"), None);
        assert_eq!(body(r#"{"payload":null}"#).expect("null"), None);
        assert_eq!(body(r#"{"payload":{"n":1}}"#).expect("one").expect("there")["n"], 1);
        for twice in [r#"{"payload":{"n":1,"n":2}}"#, r#"{"payload":{"a":[{"n":1,"n":1}]}}"#] {
            let refused = body(twice).expect_err(twice).to_string();
            assert!(refused.contains("`n` stands twice"), "{refused}");
        }
        assert!(body(r#"{"payload":[1]}"#).is_err());
    }
}
