//! Softmax cross entropy in several ops, so that a vocabulary can be split over devices.

use crate::cpu::args::Args;
use crate::cpu::pool::Pool;
use crate::cpu::simd::{dispatch, exp, fold, inlined, map_operand, max};
use crate::error::Result;

pub(crate) fn row_max(args: &mut Args<'_>, pool: &Pool) -> Result<()> {
    let [count, width] = args.launch.rows_of(0)?;
    let (logits, out) = (args.f32(0)?, args.out(0)?);
    pool.rows(count, logits.len(), [out], |rows, [out]| {
        inlined!(dispatch(|| {
            for (out, row) in out.iter_mut().zip(rows.clone()) {
                *out = max(&logits[row * width..(row + 1) * width]);
            }
        }));
    });
    Ok(())
}

/// The target's column in this shard. `None` if another shard holds that column.
fn column(target: i32, vocab_start: usize, width: usize) -> Option<usize> {
    (target as usize).checked_sub(vocab_start).filter(|&column| column < width)
}

pub(crate) fn sum_exp_target(args: &mut Args<'_>, pool: &Pool, vocab_start: usize, vocab: usize) -> Result<()> {
    let [count, width] = args.launch.rows_of(0)?;
    let (logits, maxima, targets) = (args.f32(0)?, args.f32(1)?, args.indices(2, vocab)?);
    let outs = [args.out(0)?, args.out(1)?];
    pool.rows(count, 4 * logits.len(), outs, |rows, [sums, chosen]| {
        inlined!(dispatch(|| {
            for (i, row) in rows.clone().enumerate() {
                let logits = &logits[row * width..(row + 1) * width];
                let max = maxima[row];
                sums[i] = inlined!(fold([logits], |[logit]| exp(logit - max)));
                chosen[i] = column(targets[row], vocab_start, width).map_or(0.0, |column| logits[column]);
            }
        }));
    });
    Ok(())
}

pub(crate) fn token_loss(args: &mut Args<'_>, scale: f32) -> Result<()> {
    let (maxima, sums, chosen) = (args.f32(0)?, args.f32(1)?, args.f32(2)?);
    let tokens = maxima.iter().zip(sums).zip(chosen);
    let loss: f64 =
        tokens.map(|((&max, &sum), &target)| f64::from(max) + f64::from(sum).ln() - f64::from(target)).sum();
    let loss = (f64::from(scale) * loss) as f32;
    let accumulate = args.accumulate;
    let out = &mut args.out(0)?[0];
    *out = if accumulate { *out + loss } else { loss };
    Ok(())
}

pub(crate) fn cross_entropy_grad(args: &mut Args<'_>, pool: &Pool, vocab_start: usize, scale: f32) -> Result<()> {
    let [count, width] = args.launch.rows_of(1)?;
    let (logits, factor) = (args.operand(1, 0)?, args.f32(0)?[0] * scale);
    let (maxima, sums, targets) = (args.f32(2)?, args.f32(3)?, args.i32(4)?);
    let dlogits = args.out(0)?;
    let weight = 4 * dlogits.len();
    pool.rows(count, weight, [dlogits], |rows, [dlogits]| {
        inlined!(dispatch(|| {
            for (i, row) in rows.clone().enumerate() {
                let (max, factor_row) = (maxima[row], factor / sums[row]);
                let dlogits = &mut dlogits[i * width..(i + 1) * width];
                let logits = logits.range(row * width..(row + 1) * width);
                inlined!(map_operand(logits, dlogits, |logit| factor_row * exp(logit - max)));
                if let Some(column) = column(targets[row], vocab_start, width) {
                    dlogits[column] -= factor;
                }
            }
        }));
    });
    Ok(())
}
