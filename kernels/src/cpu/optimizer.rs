//! AdamW, and the global gradient norm for clipping.

use crate::cpu::args::Args;
use crate::cpu::pool::{FORK_ELEMENTS, Pool};
use crate::cpu::simd::{LANES, dispatch, inlined};
use crate::error::Result;
use crate::op::{SQUARES_SCALE, norm_of_squares};
use crate::tensor::split_range;

/// Maximum number of parts of a sum of squares. One thread sums each part.
const PARTS_MAX: usize = 64;

pub(crate) fn sum_squares(args: &mut Args<'_>, pool: &Pool, index: usize) -> Result<()> {
    let x = args.f32(0)?;
    // Each part has one partial sum. These are added in order. The number of parts depends only on the size (BITS-1).
    let mut partial = [0f64; PARTS_MAX];
    let parts = (x.len() / FORK_ELEMENTS).clamp(1, PARTS_MAX);
    pool.ranges(&mut partial[..parts], 1, x.len(), |range, partial| {
        for (part, partial) in range.zip(partial) {
            let x = &x[split_range(x.len(), parts, part)];
            *partial = inlined!(dispatch(|| squares(x)));
        }
    });
    let sum: f64 = partial[..parts].iter().sum();
    let out = args.out(0)?;
    out[2 * index] += sum as f32;
    out[2 * index + 1] += (sum * SQUARES_SCALE) as f32;
    Ok(())
}

#[inline(always)]
fn squares(x: &[f32]) -> f64 {
    let (blocks, tail) = x.as_chunks::<LANES>();
    let mut sums = [0f64; LANES];
    for block in blocks {
        for j in 0..LANES {
            let value = f64::from(block[j]);
            sums[j] += value * value;
        }
    }
    let tail: f64 = tail.iter().map(|&value| f64::from(value) * f64::from(value)).sum();
    sums.iter().sum::<f64>() + tail
}

pub(crate) fn clip_scale(args: &mut Args<'_>, max_norm: f32) -> Result<()> {
    let sums = args.f32(0)?;
    let norm = norm_of_squares(sums.as_chunks().0.iter().map(|pair| pair.map(f64::from)));
    // Checks `norm` first, because `f64::min` would return 1 for a NaN norm.
    let scale = if norm.is_finite() { (f64::from(max_norm) / (norm + 1e-6)).min(1.0) } else { f64::NAN };
    args.out(0)?[0] = scale as f32;
    args.out(1)?[0] = norm as f32;
    Ok(())
}

pub(crate) fn adamw(args: &mut Args<'_>, pool: &Pool, [beta1, beta2]: [f32; 2], eps: f32, decay: f32) -> Result<()> {
    let (grad, hyper, scale) = (args.f32(0)?, args.f32(1)?, args.f32(2)?[0]);
    let (learning_rate, step) = (hyper[0], f64::from(hyper[1]));
    let outs = [args.out(0)?, args.out(1)?, args.out(2)?];
    if !scale.is_finite() || !learning_rate.is_finite() {
        return Ok(());
    }
    let correction = |beta: f32| 1.0 - f64::from(beta).powf(step);
    let keep = 1.0 - learning_rate * decay;
    let step_size = (f64::from(learning_rate) / correction(beta1)) as f32;
    let root_correction = (1.0 / correction(beta2).sqrt()) as f32;
    pool.rows(grad.len(), 2 * grad.len(), outs, |range, [params, ms, vs]| {
        let grad = &grad[range];
        inlined!(dispatch(|| {
            let values = grad.iter().zip(params.iter_mut()).zip(ms.iter_mut()).zip(vs.iter_mut());
            values.for_each(
                #[inline(always)]
                |(((&grad, param), m), v)| {
                    let g = scale * grad;
                    *m = beta1 * *m + (1.0 - beta1) * g;
                    *v = beta2 * *v + (1.0 - beta2) * g * g;
                    *param = *param * keep - step_size * *m / (v.sqrt() * root_correction + eps);
                },
            );
        }));
    });
    Ok(())
}
