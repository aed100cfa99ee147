//! The two functions that a transformer applies to every number, written so that the compiler
//! makes vector instructions of them: candle calls libm for each number, which takes longer
//! than the matrix products.

use candle_core::{CpuStorage, InplaceOp1, Layout, Result, bail};
use rayon::prelude::*;

/// Numbers that one thread takes at a time.
const CHUNK: usize = 1 << 14;

/// The Gaussian error linear unit, in place, by the error function rather than by tanh.
pub(super) struct Gelu;

/// Softmax over rows of `width` numbers, each first multiplied by `scale`, in place.
pub(super) struct Softmax {
    pub(super) scale: f32,
    pub(super) width: usize,
}

impl InplaceOp1 for Gelu {
    fn name(&self) -> &'static str {
        "gelu"
    }

    fn cpu_fwd(&self, storage: &mut CpuStorage, layout: &Layout) -> Result<()> {
        let numbers = contiguous(storage, layout)?;
        numbers.par_chunks_mut(CHUNK).for_each(|chunk| chunk.iter_mut().for_each(|x| *x = gelu(*x)));
        Ok(())
    }
}

impl InplaceOp1 for Softmax {
    fn name(&self) -> &'static str {
        "softmax"
    }

    fn cpu_fwd(&self, storage: &mut CpuStorage, layout: &Layout) -> Result<()> {
        let (numbers, scale, width) = (contiguous(storage, layout)?, self.scale, self.width.max(1));
        let rows = (CHUNK / width).max(1);
        numbers.par_chunks_mut(rows * width).for_each(|rows| {
            rows.chunks_exact_mut(width).for_each(|row| softmax(row, scale));
        });
        Ok(())
    }
}

fn contiguous<'a>(storage: &'a mut CpuStorage, layout: &Layout) -> Result<&'a mut [f32]> {
    let (CpuStorage::F32(numbers), Some((start, end))) = (storage, layout.contiguous_offsets()) else {
        bail!("expected contiguous f32 numbers");
    };
    Ok(&mut numbers[start..end])
}

fn softmax(row: &mut [f32], scale: f32) {
    // Shifted by the largest, so that nothing overflows.
    let largest = row.iter().fold(f32::NEG_INFINITY, |largest, x| if *x > largest { *x } else { largest });
    row.iter_mut().for_each(|x| *x = exp((*x - largest) * scale));
    let sum: f32 = row.chunks(16).map(|part| part.iter().sum::<f32>()).sum();
    row.iter_mut().for_each(|x| *x /= sum);
}

/// `x` times the share of a normal distribution below `x`. The tail is formula 7.1.26 of
/// Abramowitz and Stegun, Handbook of Mathematical Functions (error below 1.5e-7).
#[inline(always)]
fn gelu(x: f32) -> f32 {
    const P: f32 = 0.327_591_1;
    const A: [f32; 5] = [0.254_829_6, -0.284_496_74, 1.421_413_7, -1.453_152, 1.061_405_4];
    let z = x.abs() * std::f32::consts::FRAC_1_SQRT_2;
    let t = 1.0 / (1.0 + P * z);
    let tail = t * (A[0] + t * (A[1] + t * (A[2] + t * (A[3] + t * A[4])))) * exp(-z * z);
    0.5 * x * if x < 0.0 { tail } else { 2.0 - tail }
}

/// e to the power of `x`, for `x` of at most zero: a power of two times a polynomial on the rest,
/// with a relative error of about 2e-7.
#[inline(always)]
fn exp(x: f32) -> f32 {
    /// Adding it leaves the nearest whole number in the lowest bits.
    const ROUND: f32 = 12_582_912.0;
    const LN_2: [f32; 2] = [0.693_359_4, -2.121_944_4e-4];
    // Below that the result is no normal number any more.
    let x = if x < -87.0 { -87.0 } else { x };
    let shifted = x * std::f32::consts::LOG2_E + ROUND;
    let whole = shifted - ROUND;
    let rest = x - whole * LN_2[0] - whole * LN_2[1];
    let series = 1.0
        + rest
            * (1.0
                + rest
                    * (0.5
                        + rest
                            * (1.0 / 6.0
                                + rest * (1.0 / 24.0 + rest * (1.0 / 120.0 + rest * (1.0 / 720.0))))));
    let power = f32::from_bits((shifted.to_bits() << 23).wrapping_add(1.0f32.to_bits()));
    series * power
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn exp_and_gelu_are_what_f64_says() {
        for step in -9000..=9000 {
            let x = step as f32 / 900.0;
            let wanted = f64::from(-x.abs() * 8.7).exp();
            let found = f64::from(exp(-x.abs() * 8.7));
            assert!((found - wanted).abs() <= wanted * 1e-6, "exp({}): {found} {wanted}", -x.abs() * 8.7);
            // The normal distribution by Simpson's rule over 2,000 steps.
            let (wide, steps) = (f64::from(x), 2000);
            let density = |t: f64| (-t * t / 2.0).exp() / (2.0 * std::f64::consts::PI).sqrt();
            if step % 90 == 0 {
                let h = wide / f64::from(steps);
                let sum: f64 = (0..=steps)
                    .map(|i| {
                        let weight = if i == 0 || i == steps { 1.0 } else { f64::from(2 + 2 * (i % 2)) };
                        weight * density(h * f64::from(i))
                    })
                    .sum();
                let wanted = wide * (0.5 + sum * h / 3.0);
                assert!((f64::from(gelu(x)) - wanted).abs() < 2e-6, "gelu({x}): {} {wanted}", gelu(x));
            }
        }
    }

    #[test]
    fn softmax_sums_to_one_and_keeps_what_is_masked_out() {
        let mut row: Vec<f32> = (0..37).map(|i| (i % 5) as f32).collect();
        row[36] = -1e9;
        softmax(&mut row, 0.5);
        assert!((row.iter().sum::<f32>() - 1.0).abs() < 1e-6);
        assert!(row[36] < 1e-30 && (row[4] / row[3] - 0.5f32.exp()).abs() < 1e-5);
    }
}
