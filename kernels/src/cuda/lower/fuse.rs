//! Two launches in a row as one kernel, where that spares a trip through memory: a residual sum and its layer norm, a
//! bias and its GELU, a row's maximum and its sum of exponentials. The graph stays as it is: the backend asks for neighbours in a program.

use super::loss::rows;
use super::norm::warps;
use super::{long, lower, pack_of, read, threads, write};
use crate::cuda::step::{Arg, SHARED_BYTES_DEFAULT, Step};
use crate::error::KernelError;
use crate::op::{Buffer, Launch, Op};
use crate::tensor::{DType, element_count};

/// What does both launches. Places in its steps are counted in the buffers given here.
#[derive(Clone, Debug)]
pub struct Fused {
    /// All that is read from outside.
    pub reads: Vec<Buffer>,
    /// All that is written: what each launch alone would have written.
    pub writes: Vec<Buffer>,
    /// The steps.
    pub steps: Vec<Step>,
}

/// Whether ops are of a kind for which there is one kernel.
pub fn may_fuse(first: &Launch, second: &Launch) -> bool {
    let pair = (&first.op, &second.op);
    let known = matches!(pair, (Op::Add, Op::LayerNorm { .. } | Op::Gelu) | (Op::RowMax, Op::SumExpTarget { .. }));
    known && !first.accumulate && !second.accumulate
}

/// One step for `first` and `second`, where there is one. `overlap` tells whether two buffers share memory other than
/// by being the same memory. No signal may be due between the two; an [`Arg::LaunchIndex`] is that of `second`.
///
/// # Errors
/// As [`lower`] of either.
pub fn fuse(
    first: &Launch,
    second: &Launch,
    overlap: &dyn Fn(&Buffer, &Buffer) -> bool,
) -> Result<Option<Fused>, KernelError> {
    if !may_fuse(first, second) {
        return Ok(None);
    }
    // Both must be what they should be on their own.
    lower(first, false, SHARED_BYTES_DEFAULT as usize)?;
    lower(second, false, SHARED_BYTES_DEFAULT as usize)?;
    if let Op::SumExpTarget { vocab_start, vocab } = second.op {
        return max_and_sum(first, second, [vocab_start, vocab], overlap);
    }
    let (sums, x) = (&first.writes[0], &second.reads[0]);
    if sums != x || element_count(&sums.shape) == 0 {
        return Ok(None);
    }
    match second.op {
        Op::LayerNorm { eps } if first.reads[0].shape == first.reads[1].shape => {
            add_layer_norm(first, second, eps, overlap)
        }
        Op::Gelu if first.reads[0].shape != first.reads[1].shape => bias_gelu(first, second, overlap),
        _ => Ok(None),
    }
}

/// True when a later write of the pair hits a read that only comes before it where the launches are two.
fn clash(reads: &[Buffer], writes: &[Buffer], overlap: &dyn Fn(&Buffer, &Buffer) -> bool) -> bool {
    let touches = |read: &Buffer, write: &Buffer| overlap(read, write) || same_start(read, write);
    reads.iter().any(|read| writes.iter().any(|write| touches(read, write)))
}

fn same_start(a: &Buffer, b: &Buffer) -> bool {
    (a.base, a.offset) == (b.base, b.offset) && element_count(&a.shape).min(element_count(&b.shape)) > 0
}

/// The kernel for activations of one type throughout: what is added, the sum and what is made of it.
fn of_one_type(first: &Launch, second: &Launch, floats: &'static str, halves: &'static str) -> Option<&'static str> {
    let dtype = first.reads[0].dtype;
    let same = [&first.reads[1], &first.writes[0], &second.writes[0]].iter().all(|buffer| buffer.dtype == dtype);
    same.then_some(if dtype == DType::BF16 { halves } else { floats })
}

fn add_layer_norm(
    first: &Launch,
    second: &Launch,
    eps: f32,
    overlap: &dyn Fn(&Buffer, &Buffer) -> bool,
) -> Result<Option<Fused>, KernelError> {
    let weight = second.reads[1].clone();
    // The norm's results may take the memory of what was added, which the norm alone no longer needs.
    if clash(&first.reads, &second.writes, overlap) || clash(std::slice::from_ref(&weight), &first.writes, overlap) {
        return Ok(None);
    }
    let Some((&width, leading)) = first.writes[0].shape.split_last() else { return Ok(None) };
    let Some(name) = of_one_type(first, second, "add_layer_norm_f32", "add_layer_norm_bf16") else { return Ok(None) };
    let rows = element_count(leading);
    let mut arguments = vec![read(0), read(1), read(2), write(0), write(1), write(2), write(3)];
    arguments.extend([long(rows), long(width), Arg::F32(eps)]);
    Ok(Some(Fused {
        reads: [&first.reads[..], &[weight]].concat(),
        writes: [&first.writes[..], &second.writes[..]].concat(),
        steps: vec![warps(name, rows, arguments)?],
    }))
}

fn bias_gelu(
    first: &Launch,
    second: &Launch,
    overlap: &dyn Fn(&Buffer, &Buffer) -> bool,
) -> Result<Option<Fused>, KernelError> {
    let in_place = same_start(&first.writes[0], &second.writes[0]);
    // An element of x is read by the thread that writes it.
    let [x_hit, bias_hit] = [0, 1].map(|i| clash(&first.reads[i..=i], &second.writes, overlap));
    if bias_hit || x_hit && !in_place {
        return Ok(None);
    }
    let Some(name) = of_one_type(first, second, "bias_gelu_f32", "bias_gelu_bf16") else { return Ok(None) };
    let n = element_count(&first.writes[0].shape);
    let width = element_count(&first.reads[1].shape);
    let pack = pack_of(first.reads[0].dtype);
    // GELU in place of the sums leaves nobody who reads them.
    let sums = if in_place { Arg::Null } else { write(0) };
    let arguments = vec![read(0), read(1), sums, write(1), long(n), long(width)];
    Ok(Some(Fused {
        reads: first.reads.clone(),
        writes: [&first.writes[..], &second.writes[..]].concat(),
        steps: vec![threads(name, n.div_ceil(pack), arguments)?],
    }))
}

fn max_and_sum(
    first: &Launch,
    second: &Launch,
    [vocab_start, vocab]: [usize; 2],
    overlap: &dyn Fn(&Buffer, &Buffer) -> bool,
) -> Result<Option<Fused>, KernelError> {
    let (logits, max, targets) = (&first.reads[0], &first.writes[0], &second.reads[2]);
    let same = second.reads[0] == *logits && second.reads[1] == *max;
    let inputs = [logits.clone(), targets.clone()];
    let writes = [&first.writes[..], &second.writes[..]].concat();
    let Some((&width, leading)) = logits.shape.split_last() else { return Ok(None) };
    let count = element_count(leading);
    if !same || count == 0 || clash(&inputs, &writes, overlap) {
        return Ok(None);
    }
    let mut arguments = vec![read(0), read(1), write(0), write(1), write(2)];
    arguments.extend([count, width, vocab_start, vocab].map(long));
    arguments.extend([Arg::ErrorRecord, Arg::LaunchIndex]);
    let half = logits.dtype == DType::BF16;
    let name = if half { "row_max_sum_exp_target_bf16" } else { "row_max_sum_exp_target_f32" };
    let steps = rows(name, count, width, arguments)?;
    Ok(Some(Fused { reads: inputs.to_vec(), writes, steps }))
}
