//! Dropout. The mask is a function of the element's index in the whole tensor.

use crate::cpu::args::Args;
use crate::cpu::pool::Pool;
use crate::cpu::simd::{Operand, dispatch, inlined};
use crate::error::Result;
use crate::hash::{GOLDEN_GAMMA, mix64};
use crate::op::describe::dropout_threshold;
use crate::tensor::element_count;

/// `lowbias32`, a 32-bit mixing function that vectorizes: <https://github.com/skeeto/hash-prospector>.
#[inline(always)]
fn mix32(mut x: u32) -> u32 {
    x = (x ^ (x >> 16)).wrapping_mul(0x7feb_352d);
    x = (x ^ (x >> 15)).wrapping_mul(0x846c_a68b);
    x ^ (x >> 16)
}

/// Values shared by all elements of one launch.
#[derive(Clone, Copy)]
struct Mask {
    key: u64,
    threshold: u32,
    kept: f32,
}

impl Mask {
    /// Keeps or drops element `place + index` of the step's whole tensor. `x` is the element's value.
    #[inline(always)]
    fn apply(self, place: u64, index: u32, x: f32) -> f32 {
        let (low, carry) = (place as u32).overflowing_add(index);
        let high = ((place >> 32) as u32).wrapping_add(u32::from(carry));
        let bits = mix32(low ^ self.key as u32);
        let bits = mix32(bits.wrapping_add((self.key >> 32) as u32).wrapping_add(high));
        if bits >= self.threshold { x * self.kept } else { 0.0 }
    }
}

pub(crate) fn dropout(
    args: &mut Args<'_>,
    pool: &Pool,
    p: f32,
    seed: u64,
    shape: &[usize],
    start: &[usize],
    stride: usize,
) -> Result<()> {
    let local = args.reads[0].shape();
    let (x, rng) = (args.operand(0, 0)?, args.i32(1)?);
    let (step, micro_batch) = (rng[0] as u32, rng[1] as u32);
    let key = mix64(seed.wrapping_add(mix64(u64::from(step).wrapping_add(GOLDEN_GAMMA))));
    let (threshold, kept) = dropout_threshold(p);
    let mask = Mask { key, threshold, kept };
    let part_start = u64::from(micro_batch) * stride as u64;
    let width = local.last().copied().unwrap_or(1);
    let y = args.out(0)?;
    let (rows, weight) = (y.len().checked_div(width).unwrap_or(0), 2 * y.len());
    pool.rows(rows, weight, [y], |range, [y]| {
        for (i, row) in range.clone().enumerate() {
            let place = part_start + row_start(row, local, shape, start) as u64;
            let x = x.range(row * width..(row + 1) * width);
            let y = &mut y[i * width..(i + 1) * width];
            inlined!(dispatch(|| match x {
                Operand::Same => (0u32..).zip(y.iter_mut()).for_each(
                    #[inline(always)]
                    |(j, y)| *y = mask.apply(place, j, *y),
                ),
                Operand::Other(x) => {
                    (0u32..).zip(y.iter_mut().zip(x)).for_each(
                        #[inline(always)]
                        |(j, (y, x))| *y = mask.apply(place, j, *x),
                    );
                }
            }));
        }
    });
    Ok(())
}

/// Returns the index in the whole tensor at which row `row` of the local tensor starts. Rows lie along the last dim.
fn row_start(mut row: usize, local: &[usize], shape: &[usize], start: &[usize]) -> usize {
    let rank = local.len();
    if rank == 0 {
        return 0;
    }
    let (mut place, mut stride) = (start[rank - 1], shape[rank - 1]);
    for d in (0..rank - 1).rev() {
        place += (start[d] + row % local[d]) * stride;
        row /= local[d];
        stride *= shape[d];
    }
    debug_assert!(place < element_count(shape));
    place
}
