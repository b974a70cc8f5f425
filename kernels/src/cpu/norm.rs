//! Layer norm and its gradient.

use crate::cpu::args::Args;
use crate::cpu::pool::Pool;
use crate::cpu::simd::{LANES, dispatch, fold, inlined, map, sum, update};
use crate::error::Result;

pub(crate) fn layer_norm(args: &mut Args<'_>, pool: &Pool, eps: f32) -> Result<()> {
    let [count, width] = args.launch.rows_of(0)?;
    let (x, weight) = (args.f32(0)?, args.f32(1)?);
    let outs = [args.out(0)?, args.out(1)?, args.out(2)?];
    pool.rows(count, 2 * x.len(), outs, |rows, [y, means, rstds]| {
        inlined!(dispatch(|| {
            for (i, row) in rows.clone().enumerate() {
                let x = &x[row * width..(row + 1) * width];
                let y = &mut y[i * width..(i + 1) * width];
                let mean = sum(x) / width as f32;
                let variance = inlined!(fold([x], |[x]| (x - mean) * (x - mean))) / width as f32;
                let rstd = 1.0 / (variance + eps).sqrt();
                inlined!(map([x, weight], y, |[x, weight]| (x - mean) * rstd * weight));
                (means[i], rstds[i]) = (mean, rstd);
            }
        }));
    });
    Ok(())
}

/// Number of columns of `dweight` that are summed together in an array on the stack.
const COLUMNS: usize = 256;

/// Computes `dx = rstd (g - mean(g) - xhat mean(g xhat))` with `g = dy weight` and `xhat = (x - mean) rstd`, and
/// `dweight = sum over rows of dy xhat`. The threads split `dx` by rows, and then `dweight` by columns. Each column is
/// summed in row order (BITS-1).
pub(crate) fn layer_norm_grad(args: &mut Args<'_>, pool: &Pool) -> Result<()> {
    let [count, width] = args.launch.rows_of(0)?;
    let (dy, x, weight) = (args.f32(0)?, args.f32(1)?, args.f32(2)?);
    let (means, rstds) = (args.f32(3)?, args.f32(4)?);
    let (dx, dweight, accumulate) = (args.out(0)?, args.out(1)?, args.accumulate);
    pool.rows(count, 3 * x.len(), [dx], |rows, [dx]| {
        inlined!(dispatch(|| {
            for (i, row) in rows.clone().enumerate() {
                let (dy, x) = (&dy[row * width..(row + 1) * width], &x[row * width..(row + 1) * width]);
                let (mean, rstd) = (means[row], rstds[row]);
                let g_mean = inlined!(fold([dy, weight], |[dy, weight]| dy * weight)) / width as f32;
                let gx_mean = inlined!(fold([dy, weight, x], |[dy, weight, x]| dy * weight * ((x - mean) * rstd)));
                let gx_mean = gx_mean / width as f32;
                inlined!(map([dy, weight, x], &mut dx[i * width..(i + 1) * width], |[dy, weight, x]| rstd
                    * (dy * weight - g_mean - (x - mean) * rstd * gx_mean)));
            }
        }));
    });
    pool.ranges(dweight, LANES, 2 * x.len(), |columns, dweight| {
        for (block, dweight) in dweight.chunks_mut(COLUMNS).enumerate() {
            let first = columns.start + block * COLUMNS;
            let mut sums = [0.0; COLUMNS];
            let sums = &mut sums[..dweight.len()];
            inlined!(dispatch(|| {
                for (row, (&mean, &rstd)) in means.iter().zip(rstds).enumerate() {
                    let start = row * width + first;
                    inlined!(update(sums, [&dy[start..], &x[start..]], |sum, [dy, x]| sum + dy * ((x - mean) * rstd)));
                }
            }));
            for (out, sum) in dweight.iter_mut().zip(sums) {
                *out = if accumulate { *out + *sum } else { *sum };
            }
        }
    });
    Ok(())
}
