//! Scores between f32 vectors: exact, used for rescoring and for what no graph holds.

use shoal_proto::Distance;

/// The score of two vectors as clients see it: similarity for cosine and dot (higher is
/// nearer), distance for euclid and manhattan (lower is nearer). Vectors of cosine
/// collections are normalised already.
pub fn score(distance: Distance, a: &[f32], b: &[f32]) -> f32 {
    match distance {
        Distance::Cosine | Distance::Dot => dot(a, b),
        Distance::Euclid => lanes(a, b, |x, y| (x - y) * (x - y)).sqrt(),
        Distance::Manhattan => lanes(a, b, |x, y| (x - y).abs()),
    }
}

/// Whether score `a` is nearer than score `b`.
pub fn is_nearer(distance: Distance, a: f32, b: f32) -> bool {
    if distance.higher_is_nearer() { a > b } else { a < b }
}

/// The inner product.
pub fn dot(a: &[f32], b: &[f32]) -> f32 {
    lanes(a, b, |x, y| x * y)
}

/// Sums a function over pairs in 16 lanes, which the compiler turns into vector instructions.
#[inline(always)]
fn lanes(a: &[f32], b: &[f32], f: impl Fn(f32, f32) -> f32) -> f32 {
    const LANES: usize = 16;
    let mut sums = [0f32; LANES];
    let (a_chunks, b_chunks) = (a.chunks_exact(LANES), b.chunks_exact(LANES));
    let rest: f32 = a_chunks.remainder().iter().zip(b_chunks.remainder()).map(|(x, y)| f(*x, *y)).sum();
    for (x, y) in a_chunks.zip(b_chunks) {
        for lane in 0..LANES {
            sums[lane] += f(x[lane], y[lane]);
        }
    }
    sums.iter().sum::<f32>() + rest
}

/// Scales a vector to length one. Returns false, and changes nothing, when it has no length.
pub fn normalize(vector: &mut [f32]) -> bool {
    let length = dot(vector, vector).sqrt();
    if !length.is_finite() || length < f32::MIN_POSITIVE {
        return false;
    }
    // A vector that is normalised already keeps its bits, so that clients read what they wrote.
    if (length - 1.0).abs() > 1e-6 {
        vector.iter_mut().for_each(|x| *x /= length);
    }
    true
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn scores_are_what_the_formulas_say() {
        let a: Vec<f32> = (0..37).map(|i| i as f32 * 0.1).collect();
        let b: Vec<f32> = (0..37).map(|i| 3.0 - i as f32 * 0.2).collect();
        let pairs = || a.iter().zip(&b);
        let near = |x: f32, y: f32| (x - y).abs() < 1e-3;
        assert!(near(score(Distance::Dot, &a, &b), pairs().map(|(x, y)| x * y).sum()));
        assert!(near(
            score(Distance::Euclid, &a, &b),
            pairs().map(|(x, y)| (x - y).powi(2)).sum::<f32>().sqrt()
        ));
        assert!(near(score(Distance::Manhattan, &a, &b), pairs().map(|(x, y)| (x - y).abs()).sum()));
        let mut unit = a.clone();
        assert!(normalize(&mut unit) && near(dot(&unit, &unit), 1.0));
        assert!(!normalize(&mut [0.0, 0.0]));
    }
}
