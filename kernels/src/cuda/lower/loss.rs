//! Ops that take indices: embeddings, and the pieces of softmax cross entropy.

use super::args::Args;
use super::kernel::{PACK, Steps, THREADS, blocks, long, read, threads, variants, write};
use crate::cuda::step::{Arg, Place, Step};
use crate::tensor::{DType, element_count};

/// Maximum number of threads of a block that processes a row, and the target number of four-element packs per thread.
const ROW_THREADS_MAX: usize = 512;
const ROW_PACKS: usize = 4;

/// Maximum number of threads of the single block that sums the token losses.
const TOKEN_THREADS_MAX: usize = 1024;

/// Returns a number of threads for `work` work items: a power of two, and at least one warp.
fn threads_for(work: usize, max: usize) -> usize {
    work.clamp(32, max).next_power_of_two()
}

/// A kernel with one block per row of `width` elements.
pub(super) fn rows(function: &'static str, rows: usize, width: usize, args: Vec<Arg>) -> Steps {
    blocks(function, rows, threads_for(width.div_ceil(PACK * ROW_PACKS), ROW_THREADS_MAX), 0, args)
}

pub(super) fn embedding(args: &Args<'_>, vocab_start: usize, vocab: usize) -> Steps {
    let [held, width] = args.launch.dims("shape of read 1", args.read_shape(1), "[v, c]")?;
    let count = element_count(args.read_shape(0));
    let mut arguments = vec![read(0), read(1), write(0)];
    arguments.extend([count, held, width, vocab_start, vocab].map(long));
    arguments.extend([Arg::ErrorRecord, Arg::LaunchIndex]);
    let name = if args.write_dtype(0) == DType::BF16 { "embedding_f32_bf16" } else { "embedding_f32" };
    // The kernel checks indices even if it writes no element.
    threads(name, count * width.div_ceil(PACK).max(1), arguments)
}

pub(super) fn embedding_grad(args: &Args<'_>, vocab_start: usize) -> Steps {
    let [held, width] = args.launch.dims("shape of write 0", args.write_shape(0), "[v, c]")?;
    let (count, words) = (element_count(args.read_shape(0)), held * width);
    if words == 0 {
        return Ok(vec![]);
    }
    let mut steps = Vec::new();
    if !args.accumulate {
        steps.push(Step::Fill { to: Place::write(0), word: 0, words });
    }
    let arguments = vec![read(0), read(1), write(0), long(count), long(held), long(width), long(vocab_start)];
    let name = args.pick_by_read(1, ["embedding_grad_f32", "embedding_grad_bf16"]);
    steps.extend(blocks(name, count, THREADS, 0, arguments)?);
    Ok(steps)
}

pub(super) fn row_max(args: &Args<'_>) -> Steps {
    let [count, width] = args.launch.rows_of(0)?;
    rows(args.pick_by_read(0, ["row_max_f32", "row_max_bf16"]), count, width, vec![read(0), write(0), long(width)])
}

pub(super) fn sum_exp_target(args: &Args<'_>, vocab_start: usize, vocab: usize) -> Steps {
    let [count, width] = args.launch.rows_of(0)?;
    let mut arguments = vec![read(0), read(1), read(2), write(0), write(1)];
    arguments.extend([count, width, vocab_start, vocab].map(long));
    arguments.extend([Arg::ErrorRecord, Arg::LaunchIndex]);
    rows(args.pick_by_read(0, ["sum_exp_target_f32", "sum_exp_target_bf16"]), count, width, arguments)
}

pub(super) fn token_loss(args: &Args<'_>, scale: f32) -> Steps {
    let tokens = element_count(args.read_shape(0));
    let accumulate = Arg::I32(i32::from(args.accumulate));
    let arguments = vec![read(0), read(1), read(2), write(0), long(tokens), Arg::F32(scale), accumulate];
    blocks("token_loss", 1, threads_for(tokens, TOKEN_THREADS_MAX), 0, arguments)
}

pub(super) fn cross_entropy_grad(args: &Args<'_>, vocab_start: usize, scale: f32) -> Steps {
    let [count, width] = args.launch.rows_of(1)?;
    if width == 0 {
        return Ok(vec![]);
    }
    let mut arguments = [0, 1, 2, 3, 4].map(read).to_vec();
    arguments.extend([write(0), long(width), long(vocab_start), Arg::F32(scale)]);
    rows(args.pick(1, 0, variants!("cross_entropy_grad")), count, width, arguments)
}
