//! Causal attention and its gradient. One thread processes each (batch, head), in blocks of query rows. A block's
//! scores are in the thread's part of the stream's scratch memory. A block reads only keys up to its last row. The
//! method is that of Dao et al. 2022, <https://arxiv.org/abs/2205.14135>, without the online softmax, because whole
//! rows of a block's scores fit in L2.
#![allow(unsafe_code)]

use crate::cpu::args::Args;
use crate::cpu::matmul::{Matrix, product};
use crate::cpu::pool::{Pieces, Pool};
use crate::cpu::simd::{dispatch, exp, fold, inlined, max, sum, update};
use crate::error::Result;
use crate::op::describe::ATTENTION_BLOCK;
use crate::tensor::split_range;

/// Extents of `[b, t, h, d]`.
#[derive(Clone, Copy)]
struct Dims {
    batch: usize,
    time: usize,
    heads: usize,
    depth: usize,
}

impl Dims {
    fn of(args: &Args<'_>) -> Result<Self> {
        let [batch, time, heads, depth] = args.launch.attention_dims()?;
        Ok(Self { batch, time, heads, depth })
    }

    /// The `[t, d]` matrix of one (batch, head). `start` is the start of the whole tensor.
    fn matrix(self, start: *const f32, item: usize) -> Matrix {
        let (batch, head) = (item / self.heads, item % self.heads);
        let row = self.heads * self.depth;
        Matrix { start: start.wrapping_add(batch * self.time * row + head * self.depth), row, column: 1 }
    }

    /// Returns the query blocks as `(first row, end row)`. The last block comes first.
    fn blocks(self) -> impl Iterator<Item = (usize, usize)> {
        let time = self.time;
        (0..time).step_by(ATTENTION_BLOCK).rev().map(move |first| (first, (first + ATTENTION_BLOCK).min(time)))
    }

    /// Calls `work(item, scratch)` for each (batch, head). Each thread gets a fixed range of items.
    fn for_each_item(self, pool: &Pool, scratch: &mut [f32], work: impl Fn(usize, &mut [f32]) + Sync) {
        let items = self.batch * self.heads;
        let share = scratch.len() / pool.threads();
        let scratch = Pieces::new(scratch);
        let scores = items * self.time * self.time;
        let parts = pool.parts_for(scores * self.depth.max(1) / 8).min(items);
        pool.run(parts, &|part| {
            // SAFETY: the parts of the scratch memory are disjoint, and each part runs only once.
            let scratch = unsafe { scratch.range(part * share..(part + 1) * share) };
            for item in split_range(items, parts, part) {
                work(item, scratch);
            }
        });
    }
}

fn plain(slice: &mut [f32], columns: usize) -> Matrix {
    Matrix { start: slice.as_mut_ptr(), row: columns, column: 1 }
}

/// Row `row` of a matrix whose columns are adjacent.
///
/// # Safety
/// The row's `len` elements are in live memory, and nothing writes them during `'a`.
unsafe fn row<'a>(matrix: Matrix, row: usize, len: usize) -> &'a [f32] {
    // SAFETY: the caller upholds the contract.
    unsafe { std::slice::from_raw_parts(matrix.at(row, 0).start, len) }
}

pub(crate) fn attention(args: &mut Args<'_>, pool: &Pool, scale: f32) -> Result<()> {
    let dims = Dims::of(args)?;
    let [q, k, v] = [args.f32(0)?, args.f32(1)?, args.f32(2)?].map(|slice| start_of(slice.as_ptr()));
    let o = start_of(args.out(0)?.as_mut_ptr());
    let lse = Pieces::new(args.out(1)?);
    dims.for_each_item(pool, args.take_scratch(), |item, scores| {
        let [q, k, v, o] = [q, k, v, o].map(|tensor| dims.matrix(tensor.start, item));
        // SAFETY: items are disjoint rows of lse, and only one thread processes each item.
        let lse = unsafe { lse.range(item * dims.time..(item + 1) * dims.time) };
        for (first, end) in dims.blocks() {
            let (rows, depth) = (end - first, dims.depth);
            let scores = &mut scores[..rows * end];
            // SAFETY: matrices of this item lie inside their slices (shapes were checked) and outlive the job; only
            // this item's thread writes its rows of `o`; the scores are in this thread's part of the scratch memory.
            unsafe {
                product((rows, end, depth), plain(scores, end), false, scale, q.at(first, 0), k.transposed());
            }
            let lse = &mut lse[first..end];
            inlined!(dispatch(|| softmax_block(scores, lse, first, end)));
            // SAFETY: as for the product above.
            unsafe { product((rows, depth, end), o.at(first, 0), false, 1.0, plain(scores, end), v) };
        }
    });
    Ok(())
}

/// The start address of a whole tensor, in a form that can be sent to the pool's threads.
fn start_of(start: *const f32) -> Matrix {
    Matrix { start, row: 1, column: 1 }
}

/// Turns a block's scores into probabilities, with zeros for future keys. Stores each row's log-sum-exp.
#[inline(always)]
fn softmax_block(scores: &mut [f32], lse: &mut [f32], first: usize, end: usize) {
    for (i, (row, lse)) in scores.chunks_exact_mut(end).zip(lse).enumerate() {
        let (past, future) = row.split_at_mut(first + i + 1);
        let largest = max(past);
        inlined!(update(past, [], |score, []| exp(score - largest)));
        let sum = sum(past);
        let inverse = 1.0 / sum;
        inlined!(update(past, [], |p, []| p * inverse));
        future.fill(0.0);
        *lse = largest + sum.ln();
    }
}

pub(crate) fn attention_grad(args: &mut Args<'_>, pool: &Pool, scale: f32) -> Result<()> {
    let dims = Dims::of(args)?;
    let inputs = [args.f32(0)?, args.f32(1)?, args.f32(2)?, args.f32(3)?, args.f32(4)?];
    let inputs = inputs.map(|slice| start_of(slice.as_ptr()));
    let lse = args.f32(5)?;
    let outputs = [args.out(0)?, args.out(1)?, args.out(2)?].map(|slice| start_of(slice.as_mut_ptr()));
    dims.for_each_item(pool, args.take_scratch(), |item, scratch| {
        let inputs = inputs.map(|tensor| dims.matrix(tensor.start, item));
        let outputs = outputs.map(|tensor| dims.matrix(tensor.start, item));
        let lse = &lse[item * dims.time..(item + 1) * dims.time];
        for (first, end) in dims.blocks() {
            // The last block is processed first and overwrites all of dk and dv. The earlier blocks add to them.
            let accumulate = end < dims.time;
            grad_block(dims, scale, (first, end), accumulate, inputs, outputs, lse, scratch);
        }
    });
    Ok(())
}

/// Computes the gradients for one block of query rows. With `'` for the transpose: `p = e^(s - lse)`, `dv += p' do`,
/// `dp = do v'`, `ds = p (dp - rowsum(do o))`, `dq = scale ds k`, `dk += scale ds' q`.
#[allow(clippy::too_many_arguments)]
fn grad_block(
    dims: Dims,
    scale: f32,
    (first, end): (usize, usize),
    accumulate: bool,
    [d_o, q, k, v, o]: [Matrix; 5],
    [dq, dk, dv]: [Matrix; 3],
    lse: &[f32],
    scratch: &mut [f32],
) {
    let (rows, depth) = (end - first, dims.depth);
    let (p, rest) = scratch.split_at_mut(rows * end);
    let ds = &mut rest[..rows * end];
    let (d_o, q, o, dq) = (d_o.at(first, 0), q.at(first, 0), o.at(first, 0), dq.at(first, 0));
    // SAFETY: here and below, matrices of this item lie inside their slices (shapes were checked) and outlive the job;
    // only this item's thread writes its rows of dq, dk, dv; p and ds are in this thread's part of the scratch memory.
    unsafe {
        product((rows, end, depth), plain(p, end), false, scale, q, k.transposed());
        product((rows, end, depth), plain(ds, end), false, 1.0, d_o, v.transposed());
    }
    inlined!(dispatch(|| {
        for i in 0..rows {
            let (past, future) = p[i * end..(i + 1) * end].split_at_mut(first + i + 1);
            let (ds_past, ds_future) = ds[i * end..(i + 1) * end].split_at_mut(first + i + 1);
            let lse = lse[first + i];
            // SAFETY: as for the products above; both rows are only read.
            let delta = unsafe { inlined!(fold([row(d_o, i, depth), row(o, i, depth)], |[d_o, o]| d_o * o)) };
            inlined!(update(past, [], |score, []| exp(score - lse)));
            inlined!(update(ds_past, [past], |dp, [p]| p * (dp - delta)));
            future.fill(0.0);
            ds_future.fill(0.0);
        }
    }));
    // SAFETY: as for the products above.
    unsafe {
        product((end, depth, rows), dv, accumulate, 1.0, plain(p, end).transposed(), d_o);
        product((rows, depth, end), dq, false, scale, plain(ds, end), k);
        product((end, depth, rows), dk, accumulate, scale, plain(ds, end).transposed(), q);
    }
}
