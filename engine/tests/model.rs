//! The engine against a naive model: random operations, checkpoints, background work, crashes
//! and restarts, with so many points in some runs that there is a graph. After each step both must hold the
//! same points and answer alike, whatever filter is asked for and whichever fields are indexed.
//!
//! A *crash* drops every byte that was not synced: the shard's directory goes back to its copy
//! from the last checkpoint, and the log's entries after that checkpoint are applied again, as
//! Raft would. A *kill* keeps the files as they are, as kill -9 does.

mod common;

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use common::write_frames;
use proptest::prelude::*;
use serde_json::{Value, json};
use shoal_engine::command::{
    Answer, Command, Envelope, Leg, Outcome, PayloadMode, Point, Read, Search, Select, Target,
};
use shoal_engine::distance::dot;
use shoal_engine::vectors::GRAPH_MIN_VECTORS;
use shoal_engine::{Entry, Shard};
use shoal_proto::{CollectionConfig, Distance, FieldType, Filter, PointId, RequestId, VectorParams, codec};

const DIMENSIONS: usize = 4;
/// Points that are written at once in some runs: more than a shard searches without a graph.
const MANY: std::ops::Range<u64> = 1000..1000 + GRAPH_MIN_VECTORS as u64 + 600;
/// Candidates of a search in a graph of that size: all of them, so that nothing is missed by chance.
const EF: usize = 4096;
/// Fields that have an index now and then.
const INDEXED: [&str; 4] = ["city", "price", "tags", "at.depth"];

#[derive(Clone, Debug)]
enum Step {
    Upsert(Vec<(u8, i8, u8)>),
    Delete(Vec<u8>),
    DeleteCity(u8),
    SetCity(Vec<u8>, u8),
    Many,
    Retry,
    Index(usize, bool),
    Work,
    Checkpoint,
    Crash,
    Kill,
    Snapshot,
}

fn steps() -> impl Strategy<Value = Vec<Step>> {
    let ids = || proptest::collection::vec(0u8..40, 1..4);
    let step = prop_oneof![
        8 => proptest::collection::vec((0u8..40, any::<i8>(), 0u8..4), 1..6).prop_map(Step::Upsert),
        3 => ids().prop_map(Step::Delete),
        1 => (0u8..4).prop_map(Step::DeleteCity),
        2 => (ids(), 0u8..4).prop_map(|(ids, city)| Step::SetCity(ids, city)),
        1 => Just(Step::Retry),
        1 => Just(Step::Many),
        2 => (0..INDEXED.len(), any::<bool>()).prop_map(|(field, on)| Step::Index(field, on)),
        2 => Just(Step::Work),
        2 => Just(Step::Checkpoint),
        2 => Just(Step::Crash),
        1 => Just(Step::Kill),
        1 => Just(Step::Snapshot),
    ];
    proptest::collection::vec(step, 1..40)
}

struct Rig {
    dir: tempfile::TempDir,
    shard: Option<Shard>,
    /// Every entry ever applied, by index from 1.
    log: Vec<Vec<u8>>,
    durable: u64,
    model: BTreeMap<PointId, (Vec<f32>, Value)>,
}

fn config() -> CollectionConfig {
    let mut config = CollectionConfig::default();
    config.vectors.insert(String::new(), VectorParams::new(DIMENSIONS, Distance::Cosine));
    config.text_fields.push("text".into());
    config
}

impl Rig {
    fn new() -> Rig {
        let dir = tempfile::tempdir().expect("a directory");
        let shard = Some(Shard::open(&dir.path().join("live"), config()).expect("opens"));
        Rig { dir, shard, log: Vec::new(), durable: 0, model: BTreeMap::new() }
    }

    fn shard(&self) -> &Shard {
        self.shard.as_ref().expect("open between steps")
    }

    fn live(&self) -> PathBuf {
        self.dir.path().join("live")
    }

    fn apply(&mut self, command: Command) -> Outcome {
        let request_id = Some(RequestId([self.log.len() as u8; 16])).filter(|_| self.log.len() < 200);
        self.log.push(codec::encode(&Envelope { request_id, now: 7, command }));
        self.replay(self.log.len() as u64)
    }

    fn replay(&self, index: u64) -> Outcome {
        let command = Some(self.log[index as usize - 1].clone());
        let entry = Entry { index, tag: index.to_be_bytes().to_vec(), command };
        let outcomes = self.shard().apply(vec![entry]).expect("applies");
        codec::decode(&outcomes[0]).expect("decodes")
    }

    fn checkpoint(&mut self) {
        let tag = self.shard().checkpoint().expect("durable");
        self.durable = tag.map_or(0, |tag| u64::from_be_bytes(tag.try_into().expect("our tag")));
        copy(&self.live(), &self.dir.path().join("durable"));
    }

    fn reopen(&mut self) {
        self.shard = Some(Shard::open(&self.live(), config()).expect("opens again"));
        let tag = self.shard().applied_tag().expect("readable");
        let applied = tag.map_or(0, |tag| u64::from_be_bytes(tag.try_into().expect("our tag")));
        assert!(applied >= self.durable, "a checkpoint at {} was lost: {applied}", self.durable);
        for index in applied + 1..=self.log.len() as u64 {
            self.replay(index);
        }
    }

    fn step(&mut self, step: &Step) {
        match step {
            Step::Upsert(points) => {
                let points: Vec<Point> = points.iter().map(|(id, x, city)| point(*id, *x, *city)).collect();
                for point in &points {
                    let payload: Value = serde_json::from_str(&point.payload).expect("JSON");
                    self.model.insert(point.id, (unit(&point.vectors[0].1), payload));
                }
                self.apply(Command::Upsert(points));
            }
            Step::Delete(ids) => {
                let ids: Vec<PointId> = ids.iter().map(|id| PointId::Num(u64::from(*id))).collect();
                ids.iter().for_each(|id| drop(self.model.remove(id)));
                self.apply(Command::Delete(Target::Ids(ids)));
            }
            Step::DeleteCity(city) => {
                self.model.retain(|_, (_, payload)| payload["city"] != json!(city));
                self.apply(Command::Delete(Target::Filter(by_city(*city).to_string())));
            }
            Step::SetCity(ids, city) => {
                let ids: Vec<PointId> = ids.iter().map(|id| PointId::Num(u64::from(*id))).collect();
                for id in &ids {
                    if let Some((_, payload)) = self.model.get_mut(id) {
                        payload["city"] = json!(city);
                    }
                }
                let payload = json!({"city": city}).to_string();
                self.apply(Command::SetPayload {
                    target: Target::Ids(ids),
                    payload,
                    mode: PayloadMode::Merge,
                });
            }
            Step::Retry => {
                // The same request again, later in the log: it must change nothing.
                if let Some(first) = self.log.first().filter(|_| self.log.len() < 200).cloned() {
                    self.log.push(first);
                    self.replay(self.log.len() as u64);
                }
            }
            Step::Many => {
                let points: Vec<Point> = MANY.map(one_of_many).collect();
                for point in &points {
                    let payload: Value = serde_json::from_str(&point.payload).expect("JSON");
                    self.model.insert(point.id, (unit(&point.vectors[0].1), payload));
                }
                self.apply(Command::Upsert(points));
            }
            Step::Index(field, on) => {
                let index = on.then_some(FieldType::Integer);
                self.apply(Command::SetPayloadIndex { field: INDEXED[*field].into(), index });
            }
            Step::Work => {
                while self.shard().work().expect("works") {}
                self.shard().save_derived(true).expect("saves");
            }
            Step::Checkpoint => self.checkpoint(),
            Step::Crash => {
                self.shard = None;
                let durable = self.dir.path().join("durable");
                if durable.exists() {
                    copy(&durable, &self.live());
                } else {
                    std::fs::remove_dir_all(self.live()).expect("removable");
                }
                self.reopen();
            }
            Step::Kill => {
                self.shard = None;
                self.reopen();
            }
            Step::Snapshot => {
                let (tag, cursor) = self.shard().export().expect("exports");
                let Some(tag) = tag else { return };
                let file = self.dir.path().join("snapshot");
                write_frames(&cursor, &file);
                self.shard().install(&tag, &file).expect("installs");
                self.checkpoint();
            }
        }
    }

    fn check(&self) {
        let read = |question: Read| self.shard().read(&question).expect("answers").1;
        let all = Read::Scroll {
            from: None,
            filter: None,
            limit: 10_000,
            payload: Select::All,
            vectors: Select::All,
        };
        let Answer::Points(points) = read(all) else { panic!("not points") };
        let found: BTreeMap<PointId, (Vec<f32>, Value)> = points
            .into_iter()
            .map(|hit| {
                let vector = hit.vectors.expect("asked for").remove(0).1;
                (hit.id, (vector, serde_json::from_str(&hit.payload.expect("asked for")).expect("JSON")))
            })
            .collect();
        assert_eq!(found.keys().collect::<Vec<_>>(), self.model.keys().collect::<Vec<_>>());
        assert_eq!(found, self.model);
        for (filter, keeps) in filters() {
            let kept = || self.model.iter().filter(|(id, (_, payload))| keeps(**id, payload));
            let counted = read(Read::Count { filter: Some(filter.to_string()) });
            assert_eq!(counted, Answer::Count(kept().count() as u64), "{filter}");
            let query = unit(&[0.3, 1.0, -0.2, 0.4]);
            let mut best: Vec<f32> = kept().map(|(_, (vector, _))| dot(&query, vector)).collect();
            best.sort_by(|a, b| b.total_cmp(a));
            best.truncate(5);
            let legs = vec![Leg::Dense { using: String::new(), vector: query, exact: false, ef: Some(EF) }];
            let (payload, vectors) = (Select::Nothing, Select::Nothing);
            let asked = Some(filter.to_string());
            let search = Search { legs, filter: asked, limit: 5, score_threshold: None, payload, vectors };
            let Answer::Lists(lists) = read(Read::Search(search)) else { panic!("not lists") };
            let scores: Vec<f32> = lists[0].iter().map(|hit| hit.score).collect();
            assert_eq!(scores.len(), best.len(), "{filter}");
            let same = scores.iter().zip(&best).all(|(a, b)| (a - b).abs() < 1e-5);
            assert!(same, "{filter}: {scores:?} {best:?}");
            assert!(lists[0].iter().all(|hit| keeps(hit.id, &self.model[&hit.id].1)), "{filter}");
        }
        for city in 0..4 {
            let filter = by_city(city);
            let parsed = Filter::parse(&filter, "filter").expect("good");
            let keeps =
                |id: &PointId, payload: &Value| parsed.matches(*id, payload.as_object().expect("an object"));
            let expected = self.model.iter().filter(|(id, (_, payload))| keeps(id, payload)).count() as u64;
            assert_eq!(read(Read::Count { filter: Some(filter.to_string()) }), Answer::Count(expected));
            let query = unit(&[1.0, f32::from(city) - 1.5, 0.5, 0.1]);
            let mut best: Vec<f32> = self
                .model
                .iter()
                .filter(|(id, (_, payload))| keeps(id, payload))
                .map(|(_, (vector, _))| dot(&query, vector))
                .collect();
            best.sort_by(|a, b| b.total_cmp(a));
            best.truncate(5);
            let legs = vec![
                Leg::Dense { using: String::new(), vector: query, exact: false, ef: Some(EF) },
                Leg::Text { query: format!("word{city}") },
            ];
            let (payload, vectors) = (Select::Nothing, Select::Nothing);
            let filter = Some(filter.to_string());
            let search = Search { legs, filter, limit: 5, score_threshold: None, payload, vectors };
            let Answer::Lists(lists) = read(Read::Search(search)) else { panic!("not lists") };
            let scores: Vec<f32> = lists[0].iter().map(|hit| hit.score).collect();
            assert_eq!(scores.len(), best.len());
            assert!(scores.iter().zip(&best).all(|(a, b)| (a - b).abs() < 1e-5), "{scores:?} {best:?}");
            for hit in &lists[1] {
                let text = self.model[&hit.id].1["text"].as_str().expect("text");
                assert!(text.contains(&format!("word{city}")), "{text}");
            }
            let with_word = self.model.iter().filter(|(id, (_, payload))| {
                keeps(id, payload)
                    && payload["text"].as_str().is_some_and(|text| text.contains(&format!("word{city}")))
            });
            assert_eq!(lists[1].len(), with_word.count().min(5));
        }
    }
}

fn unit(vector: &[f32]) -> Vec<f32> {
    let mut vector = vector.to_vec();
    shoal_engine::distance::normalize(&mut vector);
    vector
}

fn point(id: u8, x: i8, city: u8) -> Point {
    let vector = vec![f32::from(x) / 16.0, 1.0, f32::from(id) / 8.0, -0.5];
    let mut payload = json!({
        "city": city,
        "text": format!("word{} common text", (id + city) % 5),
        "tags": [city, id % 4],
        "at": {"depth": id % 5},
        "parts": [{"kind": id % 2, "size": x}, {"kind": 1 - id % 2, "size": -i16::from(x)}],
    });
    if !id.is_multiple_of(3) {
        payload["price"] = json!(x);
    }
    Point {
        id: PointId::Num(u64::from(id)),
        vectors: vec![(String::new(), vector)],
        payload: payload.to_string(),
    }
}

fn one_of_many(id: u64) -> Point {
    let at = |step: u64| ((id * step) % 997) as f32 / 498.5 - 1.0;
    let like = point((id % 251) as u8, (id % 101) as i8, (id % 4) as u8);
    let vectors = vec![(String::new(), vec![at(31), at(57), at(101), at(211)])];
    Point { id: PointId::Num(id), vectors, ..like }
}

/// Whether a filter keeps a point.
type Keeps = fn(PointId, &Value) -> bool;

/// Filters, each with what it means.
fn filters() -> Vec<(Value, Keeps)> {
    fn is(payload: &Value, field: &str, wanted: i64) -> bool {
        payload[field] == json!(wanted)
    }
    fn depth(payload: &Value) -> i64 {
        payload["at"]["depth"].as_i64().unwrap_or(-1)
    }
    let city = |city: u8| json!({"key": "city", "match": {"value": city}});
    vec![
        (json!({"must": [city(1), {"key": "price", "range": {"gte": 0, "lt": 50}}]}), |_, payload| {
            is(payload, "city", 1) && payload["price"].as_i64().is_some_and(|price| (0..50).contains(&price))
        }),
        (json!({"should": [city(0), city(2)], "must_not": [{"key": "at.depth", "match": {"value": 3}}]}), {
            |_, payload| (is(payload, "city", 0) || is(payload, "city", 2)) && depth(payload) != 3
        }),
        (json!({"must": [{"is_empty": {"key": "price"}}]}), |_, payload| payload.get("price").is_none()),
        (json!({"must": [{"has_id": [1, 2, 39, 1003]}], "must_not": [city(3)]}), |id, payload| {
            [1, 2, 39, 1003].map(PointId::Num).contains(&id) && !is(payload, "city", 3)
        }),
        (json!({"must": [{"key": "tags", "match": {"any": [0, 3]}}]}), |_, payload| {
            let tags = payload["tags"].as_array().expect("a list");
            tags.contains(&json!(0)) || tags.contains(&json!(3))
        }),
        (
            json!({"must": [{"nested": {"key": "parts", "filter": {"must": [
                {"key": "kind", "match": {"value": 1}}, {"key": "size", "range": {"lt": 0}},
            ]}}}]}),
            |_, payload| {
                let parts = payload["parts"].as_array().expect("a list");
                parts
                    .iter()
                    .any(|part| is(part, "kind", 1) && part["size"].as_i64().is_some_and(|size| size < 0))
            },
        ),
        (
            json!({"must": [{"should": [city(1), {"key": "at.depth", "range": {"gt": 2}}]}, {"must_not": [city(2)]}]}),
            { |_, payload| (is(payload, "city", 1) || depth(payload) > 2) && !is(payload, "city", 2) },
        ),
    ]
}

fn by_city(city: u8) -> Value {
    json!({"must": [{"key": "city", "match": {"value": city}}]})
}

fn copy(from: &Path, to: &Path) {
    if to.exists() {
        std::fs::remove_dir_all(to).expect("removable");
    }
    std::fs::create_dir_all(to).expect("creatable");
    for entry in std::fs::read_dir(from).expect("readable") {
        let path = entry.expect("an entry").path();
        let target = to.join(path.file_name().expect("a name"));
        if path.is_dir() {
            copy(&path, &target);
        } else {
            // Background threads of the libraries may remove files while we look.
            drop(std::fs::copy(&path, &target));
        }
    }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 24, max_shrink_iters: 200, ..ProptestConfig::default() })]
    #[test]
    fn engine_equals_model(steps in steps()) {
        let mut rig = Rig::new();
        for step in &steps {
            rig.step(step);
            rig.check();
        }
    }
}

#[test]
fn graphs_find_what_the_exact_scan_finds_across_restarts() {
    let dir = tempfile::tempdir().expect("a directory");
    let mut config = CollectionConfig::default();
    config.vectors.insert(String::new(), VectorParams::new(32, Distance::Cosine));
    let mut seed = 1u64;
    let mut random = move || {
        seed = seed.wrapping_mul(6364136223846793005).wrapping_add(1442695040888963407);
        (seed >> 40) as f32 / (1 << 23) as f32 - 1.0
    };
    let mut vector = move || -> Vec<f32> { (0..32).map(|_| random()).collect() };
    let shard = Shard::open(dir.path(), config.clone()).expect("opens");
    for batch in 0..50u64 {
        let points: Vec<Point> = (0..100)
            .map(|i| Point {
                id: PointId::Num(batch * 100 + i),
                vectors: vec![(String::new(), vector())],
                payload: String::new(),
            })
            .collect();
        let command = codec::encode(&Envelope { request_id: None, now: 0, command: Command::Upsert(points) });
        shard.apply(vec![Entry { index: batch + 1, tag: vec![1], command: Some(command) }]).expect("applies");
    }
    let search = |shard: &Shard, vector: &[f32], exact: bool| -> Vec<PointId> {
        let legs = vec![Leg::Dense { using: String::new(), vector: vector.to_vec(), exact, ef: None }];
        let (payload, vectors) = (Select::Nothing, Select::Nothing);
        let search = Search { legs, filter: None, limit: 10, score_threshold: None, payload, vectors };
        let (_, Answer::Lists(lists)) = shard.read(&Read::Search(search)).expect("answers") else {
            panic!("not lists")
        };
        lists[0].iter().map(|hit| hit.id).collect()
    };
    let recall = |shard: &Shard, queries: &[Vec<f32>]| -> f64 {
        let mut found = 0;
        for query in queries {
            let exact = search(shard, query, true);
            found += search(shard, query, false).iter().filter(|id| exact.contains(id)).count();
        }
        found as f64 / (queries.len() * 10) as f64
    };
    let queries: Vec<Vec<f32>> = (0..50).map(|_| vector()).collect();
    assert!(recall(&shard, &queries) == 1.0, "before any graph, everything is exact");
    while shard.work().expect("works") {}
    let (_, Answer::Stats(stats)) = shard.read(&Read::Stats).expect("answers") else { panic!("not stats") };
    assert!(stats.indexed_vectors > 4000, "{stats:?}");
    assert!(recall(&shard, &queries) > 0.9);
    // Deleted points are never found, neither in the graph nor outside it.
    let gone: Vec<PointId> = search(&shard, &queries[0], false);
    let delete = Command::Delete(Target::Ids(gone.clone()));
    let command = codec::encode(&Envelope { request_id: None, now: 0, command: delete });
    shard.apply(vec![Entry { index: 51, tag: vec![2], command: Some(command) }]).expect("applies");
    assert!(search(&shard, &queries[0], false).iter().all(|id| !gone.contains(id)));
    shard.save_derived(true).expect("saves");
    shard.checkpoint().expect("makes durable");
    drop(shard);
    let shard = Shard::open(dir.path(), config).expect("opens again");
    let (_, Answer::Stats(again)) = shard.read(&Read::Stats).expect("answers") else { panic!("not stats") };
    assert!(again.indexed_vectors >= stats.indexed_vectors, "the saved graph is used: {again:?}");
    assert!(recall(&shard, &queries) > 0.9);
    assert!(search(&shard, &queries[0], false).iter().all(|id| !gone.contains(id)));
}
