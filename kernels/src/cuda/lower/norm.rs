//! Layer norm and its gradient.

use super::args::Args;
use super::kernel::{Steps, blocks, long, read, variants, write};
use super::reduce::{ColumnSum, sum_columns};
use crate::cuda::step::{Arg, Place};
use crate::tensor::element_count;

/// Number of threads per block. Each warp processes one row.
const ROW_THREADS: usize = 128;

pub(super) fn warps(function: &'static str, rows: usize, args: Vec<Arg>) -> Steps {
    blocks(function, rows.div_ceil(ROW_THREADS / 32), ROW_THREADS, 0, args)
}

pub(super) fn layer_norm(args: &Args<'_>, eps: f32) -> Steps {
    let [rows, width] = args.launch.rows_of(0)?;
    let arguments = vec![read(0), read(1), write(0), write(1), write(2), long(rows), long(width), Arg::F32(eps)];
    warps(args.pick(0, 0, variants!("layer_norm")), rows, arguments)
}

/// Number of floats for the partial sums of dweight.
pub(super) fn workspace_floats(dy: &[usize]) -> usize {
    let Some((&width, leading)) = dy.split_last() else { return 0 };
    ColumnSum::new(element_count(leading), width).workspace_floats(width)
}

pub(super) fn layer_norm_grad(args: &Args<'_>) -> Steps {
    let [rows, width] = args.launch.rows_of(0)?;
    if width == 0 {
        return Ok(vec![]);
    }
    let mut arguments = [0, 1, 2, 3, 4].map(read).to_vec();
    arguments.extend([write(0), long(rows), long(width)]);
    let mut steps = warps(args.pick(0, 0, variants!("layer_norm_grad")), rows, arguments)?;
    let inputs = [0, 1, 3, 4].map(read).to_vec();
    let weight = args.pick_by_read(0, ["layer_norm_grad_weight_f32", "layer_norm_grad_weight_bf16"]);
    let kernels = [weight, weight, "sum_leading_f32"];
    steps.extend(sum_columns(kernels, inputs, Place::write(1), [rows, width], args.accumulate)?);
    Ok(steps)
}
