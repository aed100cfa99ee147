//! A bounded cache of embeddings in two generations: what is used moves to the young one, and
//! when that is full the old one is dropped. Close to LRU, with one hash look-up.

use std::collections::HashMap;

use parking_lot::Mutex;

use super::TextKind;

type Key = [u8; 32];

#[derive(Default)]
struct Generations {
    young: HashMap<Key, Vec<f32>>,
    old: HashMap<Key, Vec<f32>>,
    young_bytes: usize,
}

pub(super) struct Cache {
    generation_bytes: usize,
    generations: Mutex<Generations>,
}

impl Cache {
    pub(super) fn new(bytes: usize) -> Cache {
        Cache { generation_bytes: bytes / 2, generations: Mutex::default() }
    }

    pub(super) fn get(&self, model: &str, kind: TextKind, text: &str) -> Option<Vec<f32>> {
        let key = key(model, kind, text);
        let mut generations = self.generations.lock();
        if let Some(vector) = generations.young.get(&key) {
            return Some(vector.clone());
        }
        let vector = generations.old.remove(&key)?;
        self.insert(&mut generations, key, vector.clone());
        Some(vector)
    }

    pub(super) fn put(&self, model: &str, kind: TextKind, text: &str, vector: &[f32]) {
        self.insert(&mut self.generations.lock(), key(model, kind, text), vector.to_vec());
    }

    fn insert(&self, generations: &mut Generations, key: Key, vector: Vec<f32>) {
        let bytes = size_of::<Key>() + size_of_val(vector.as_slice()) + 64;
        if generations.young_bytes + bytes > self.generation_bytes {
            generations.old = std::mem::take(&mut generations.young);
            generations.young_bytes = 0;
        }
        if bytes <= self.generation_bytes && generations.young.insert(key, vector).is_none() {
            generations.young_bytes += bytes;
        }
    }
}

fn key(model: &str, kind: TextKind, text: &str) -> Key {
    let mut hasher = blake3::Hasher::new();
    hasher.update(model.as_bytes()).update(&[0, kind as u8]).update(text.as_bytes());
    *hasher.finalize().as_bytes()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_used_stays_and_the_size_is_bounded() {
        let cache = Cache::new(20_000);
        cache.put("m", TextKind::Query, "kept", &[1.0; 16]);
        for number in 0..1000 {
            cache.put("m", TextKind::Passage, &number.to_string(), &[0.0; 16]);
            assert!(cache.get("m", TextKind::Query, "kept").is_some());
        }
        assert!(cache.get("m", TextKind::Passage, "kept").is_none(), "the kind is part of the key");
        assert!(cache.get("m", TextKind::Passage, "0").is_none());
        let generations = cache.generations.lock();
        assert!(generations.young.len() + generations.old.len() < 150);
    }
}
