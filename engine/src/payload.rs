//! Payload indexes: roaring bitmaps of slots by value, and ordered maps for ranges.
//!
//! Kept in memory and rebuilt when a shard opens. Entries of dead slots may linger: every
//! result is masked with the live slots by the caller.

use std::collections::{BTreeMap, HashMap};

use roaring::RoaringBitmap;
use serde_json::{Map, Value};
use shoal_proto::FieldType;
use shoal_proto::filter::{Condition, Filter, Range, Scalar, values_at};

/// An index over one payload path.
pub struct FieldIndex {
    kind: FieldType,
    values: HashMap<Key, RoaringBitmap>,
    numbers: BTreeMap<Number, RoaringBitmap>,
}

#[derive(Clone, PartialEq, Eq, Hash)]
enum Key {
    Keyword(String),
    Integer(i64),
    Bool(bool),
}

impl From<&Scalar> for Key {
    fn from(scalar: &Scalar) -> Key {
        match scalar {
            Scalar::Keyword(text) => Key::Keyword(text.clone()),
            Scalar::Integer(number) => Key::Integer(*number),
            Scalar::Bool(flag) => Key::Bool(*flag),
        }
    }
}

/// A finite number in order; JSON has no others.
#[derive(Clone, Copy, PartialEq)]
struct Number(f64);

impl Eq for Number {}

impl PartialOrd for Number {
    fn partial_cmp(&self, other: &Self) -> Option<std::cmp::Ordering> {
        Some(self.cmp(other))
    }
}

impl Ord for Number {
    fn cmp(&self, other: &Self) -> std::cmp::Ordering {
        self.0.total_cmp(&other.0)
    }
}

impl FieldIndex {
    /// An empty index.
    pub fn new(kind: FieldType) -> FieldIndex {
        FieldIndex { kind, values: HashMap::new(), numbers: BTreeMap::new() }
    }

    /// Its kind.
    pub fn kind(&self) -> FieldType {
        self.kind
    }

    fn key(&self, value: &Value) -> Option<Key> {
        match (self.kind, value) {
            (FieldType::Keyword, Value::String(text)) => Some(Key::Keyword(text.clone())),
            (FieldType::Integer, Value::Number(number)) => number.as_i64().map(Key::Integer),
            (FieldType::Bool, Value::Bool(flag)) => Some(Key::Bool(*flag)),
            _ => None,
        }
    }

    fn has_numbers(&self) -> bool {
        matches!(self.kind, FieldType::Integer | FieldType::Float)
    }

    /// Takes in the values of a slot.
    pub fn insert(&mut self, slot: u32, path: &str, payload: &Map<String, Value>) {
        for value in values_at(payload, path) {
            if let Some(key) = self.key(value) {
                self.values.entry(key).or_default().insert(slot);
            }
            if let Some(number) = value.as_f64().filter(|_| self.has_numbers()) {
                self.numbers.entry(Number(number)).or_default().insert(slot);
            }
        }
    }

    /// Takes out the values of a slot.
    pub fn remove(&mut self, slot: u32, path: &str, payload: &Map<String, Value>) {
        for value in values_at(payload, path) {
            if let Some(key) = self.key(value)
                && let Some(slots) = self.values.get_mut(&key)
            {
                slots.remove(slot);
            }
            if let Some(slots) = value.as_f64().and_then(|number| self.numbers.get_mut(&Number(number))) {
                slots.remove(slot);
            }
        }
    }

    fn any_of(&self, wanted: &[Scalar]) -> Option<RoaringBitmap> {
        let fits = wanted.iter().all(|scalar| {
            matches!(
                (self.kind, scalar),
                (FieldType::Keyword, Scalar::Keyword(_))
                    | (FieldType::Integer, Scalar::Integer(_))
                    | (FieldType::Bool, Scalar::Bool(_))
            )
        });
        if !fits {
            return None;
        }
        let mut slots = RoaringBitmap::new();
        for scalar in wanted {
            if let Some(found) = self.values.get(&Key::from(scalar)) {
                slots |= found;
            }
        }
        Some(slots)
    }

    fn range(&self, range: &Range) -> Option<RoaringBitmap> {
        if !self.has_numbers() {
            return None;
        }
        use std::ops::Bound::{Excluded, Included, Unbounded};
        let bound = |inclusive: Option<f64>, exclusive: Option<f64>| match (inclusive, exclusive) {
            (_, Some(bound)) => Excluded(Number(bound)),
            (Some(bound), None) => Included(Number(bound)),
            (None, None) => Unbounded,
        };
        let (low, high) = (bound(range.gte, range.gt), bound(range.lte, range.lt));
        let value = |bound: &std::ops::Bound<Number>| match bound {
            Included(number) | Excluded(number) => Some(*number),
            Unbounded => None,
        };
        let mut slots = RoaringBitmap::new();
        if value(&low).zip(value(&high)).is_some_and(|(low, high)| {
            low >= high && (low, range.gte, range.lte) != (high, Some(high.0), Some(low.0))
        }) {
            return Some(slots);
        }
        for (number, found) in self.numbers.range((low, high)) {
            // Both an inclusive and an exclusive bound may have been given on one side.
            if range.contains(number.0) {
                slots |= found;
            }
        }
        Some(slots)
    }
}

/// What the indexes know about a filter.
pub struct Estimate {
    /// Slots that may match: a superset of those that do, dead ones included. None when no
    /// index says anything.
    pub slots: Option<RoaringBitmap>,
    /// Whether every slot in `slots` matches, so that payloads need not be read.
    pub is_exact: bool,
}

/// Asks the indexes which slots a filter may keep.
pub fn estimate(filter: &Filter, indexes: &BTreeMap<String, FieldIndex>) -> Estimate {
    let mut slots: Option<RoaringBitmap> = None;
    let mut is_exact = filter.must_not.is_empty();
    let mut narrow = |found: RoaringBitmap| {
        slots = Some(match slots.take() {
            Some(slots) => slots & found,
            None => found,
        });
    };
    for condition in &filter.must {
        match estimate_condition(condition, indexes) {
            (Some(found), exact) => {
                is_exact &= exact;
                narrow(found);
            }
            (None, _) => is_exact = false,
        }
    }
    if !filter.should.is_empty() {
        let mut union = Some(RoaringBitmap::new());
        for condition in &filter.should {
            let (found, exact) = estimate_condition(condition, indexes);
            is_exact &= exact;
            union = union.zip(found).map(|(union, found)| union | found);
        }
        match union {
            Some(union) => narrow(union),
            None => is_exact = false,
        }
    }
    Estimate { is_exact: is_exact && slots.is_some(), slots }
}

fn estimate_condition(
    condition: &Condition,
    indexes: &BTreeMap<String, FieldIndex>,
) -> (Option<RoaringBitmap>, bool) {
    match condition {
        Condition::MatchAny(path, wanted) => (indexes.get(path).and_then(|index| index.any_of(wanted)), true),
        Condition::Range(path, range) => (indexes.get(path).and_then(|index| index.range(range)), true),
        Condition::Filter(filter) => {
            let inner = estimate(filter, indexes);
            (inner.slots, inner.is_exact)
        }
        Condition::MatchExcept(..)
        | Condition::MatchText(..)
        | Condition::ValuesCount(..)
        | Condition::IsEmpty(_)
        | Condition::IsNull(_)
        | Condition::HasId(_)
        | Condition::Nested(..) => (None, false),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    #[test]
    fn estimates_hold_what_the_filter_keeps() {
        let mut indexes = BTreeMap::new();
        indexes.insert("city".to_owned(), FieldIndex::new(FieldType::Keyword));
        indexes.insert("n".to_owned(), FieldIndex::new(FieldType::Integer));
        let payloads: Vec<Value> = (0..60)
            .map(|i| {
                let city = ["Rome", "Oslo", "Bonn"][i % 3];
                json!({"city": city, "n": i, "x": i})
            })
            .collect();
        for (slot, payload) in payloads.iter().enumerate() {
            for (path, index) in &mut indexes {
                index.insert(slot as u32, path, payload.as_object().expect("an object"));
            }
        }
        let cases = [
            (
                json!({"must": [{"key": "city", "match": {"value": "Rome"}}, {"key": "n", "range": {"gte": 30}}]}),
                10,
                true,
            ),
            (
                json!({"should": [{"key": "n", "match": {"any": [1, 2]}}, {"key": "n", "range": {"lt": 1}}]}),
                3,
                true,
            ),
            (json!({"must": [{"key": "n", "range": {"gt": 5, "lt": 5}}]}), 0, true),
            (json!({"must": [{"key": "n", "range": {"gte": 5, "lte": 5}}]}), 1, true),
            (json!({"must": [{"key": "n", "range": {"gte": 9, "lte": 5}}]}), 0, true),
            (
                json!({"must": [{"key": "city", "match": {"value": "Oslo"}}, {"key": "x", "range": {"gt": 3}}]}),
                20,
                false,
            ),
            (
                json!({"must": [{"key": "city", "match": {"value": "Oslo"}}], "must_not": [{"key": "n", "match": {"value": 1}}]}),
                20,
                false,
            ),
        ];
        for (filter, size, exact) in cases {
            let parsed = Filter::parse(&filter, "filter").expect("a good filter");
            let estimate = estimate(&parsed, &indexes);
            let slots = estimate.slots.expect("an index knows");
            assert_eq!((slots.len(), estimate.is_exact), (size, exact), "{filter}");
            for (slot, payload) in payloads.iter().enumerate() {
                let id = shoal_proto::PointId::Num(slot as u64);
                if parsed.matches(id, payload.as_object().expect("an object")) {
                    assert!(slots.contains(slot as u32), "{filter} keeps {slot}");
                }
            }
        }
    }
}
