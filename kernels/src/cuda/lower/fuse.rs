//! Fuses two adjacent launches into one kernel to reduce memory traffic: residual sum with layer norm, bias with GELU,
//! row maximum with sum of exponentials. The backend finds the pairs in a program; the graph stays unchanged.
use super::kernel::{long, pack_of, read, threads, write};
use super::loss::rows;
use super::lower;
use super::norm::warps;
use crate::cuda::step::{Arg, SHARED_BYTES_DEFAULT, Step};
use crate::error::Result;
use crate::op::{Buffer, Launch, Op};
use crate::tensor::{DType, element_count};

/// Two launches fused into one. Places in `steps` refer to `reads` and `writes`.
#[derive(Clone, Debug)]
pub struct FusedLaunches {
    /// Buffers that the pair reads and whose content comes from outside the pair.
    pub reads: Vec<Buffer>,
    /// All buffers that the two launches write.
    pub writes: Vec<Buffer>,
    pub steps: Vec<Step>,
}

/// Whether two buffers share memory without being identical.
type Overlap<'a> = dyn Fn(&Buffer, &Buffer) -> bool + 'a;

/// Whether there is a fused kernel for these two ops.
pub fn may_fuse(first: &Launch, second: &Launch) -> bool {
    let pair = (&first.op, &second.op);
    let has_kernel = matches!(pair, (Op::Add, Op::LayerNorm { .. } | Op::Gelu) | (Op::RowMax, Op::SumExpTarget { .. }));
    has_kernel && !first.accumulate && !second.accumulate
}

/// Fuses two launches if possible. [`Arg::LaunchIndex`] is the index of the second launch. No signal may be due between
/// the two launches.
///
/// # Errors
/// Those of [`lower`] for either launch.
pub fn fuse(first: &Launch, second: &Launch, overlap: &Overlap<'_>) -> Result<Option<FusedLaunches>> {
    if !may_fuse(first, second) {
        return Ok(None);
    }
    // Both launches must be valid on their own.
    lower(first, false, SHARED_BYTES_DEFAULT as usize)?;
    lower(second, false, SHARED_BYTES_DEFAULT as usize)?;
    let is_sum = first.writes[0] == second.reads[0] && element_count(&first.writes[0].shape) > 0;
    let fused = match second.op {
        Op::SumExpTarget { vocab_start, vocab } => max_and_sum(first, second, [vocab_start, vocab], overlap)?,
        Op::LayerNorm { eps } if is_sum && first.reads[0].shape == first.reads[1].shape => {
            add_layer_norm(first, second, eps, overlap)?
        }
        Op::Gelu if is_sum && first.reads[0].shape != first.reads[1].shape => bias_gelu(first, second, overlap)?,
        _ => None,
    };
    let writes = [&first.writes[..], &second.writes[..]].concat();
    Ok(fused.map(|(reads, steps)| FusedLaunches { reads, writes, steps }))
}

/// The reads of a fused pair and its steps, if it can be fused.
type Fused = Result<Option<(Vec<Buffer>, Vec<Step>)>>;

/// Returns true if a fused launch could overwrite data before reading it. Separate launches would read it first.
fn conflict(reads: &[Buffer], writes: &[Buffer], overlap: &Overlap<'_>) -> bool {
    let touches = |read: &Buffer, write: &Buffer| overlap(read, write) || same_start(read, write);
    reads.iter().any(|read| writes.iter().any(|write| touches(read, write)))
}

fn same_start(a: &Buffer, b: &Buffer) -> bool {
    (a.base, a.offset) == (b.base, b.offset) && element_count(&a.shape).min(element_count(&b.shape)) > 0
}

/// Picks the kernel for the type of the operands, the sum and the result. Returns `None` if these types differ.
fn pick_uniform(first: &Launch, second: &Launch, f32: &'static str, bf16: &'static str) -> Option<&'static str> {
    let dtype = first.reads[0].dtype;
    let same = [&first.reads[1], &first.writes[0], &second.writes[0]].iter().all(|buffer| buffer.dtype == dtype);
    same.then_some(if dtype == DType::BF16 { bf16 } else { f32 })
}

fn add_layer_norm(first: &Launch, second: &Launch, eps: f32, overlap: &Overlap<'_>) -> Fused {
    let weight = &second.reads[1..2];
    // A separate norm may overwrite the summands, because only the earlier sum reads them. A fused norm may not.
    if conflict(&first.reads, &second.writes, overlap) || conflict(weight, &first.writes, overlap) {
        return Ok(None);
    }
    let Some((&width, leading)) = first.writes[0].shape.split_last() else { return Ok(None) };
    let Some(name) = pick_uniform(first, second, "add_layer_norm_f32", "add_layer_norm_bf16") else { return Ok(None) };
    let rows = element_count(leading);
    let mut arguments = vec![read(0), read(1), read(2), write(0), write(1), write(2), write(3)];
    arguments.extend([long(rows), long(width), Arg::F32(eps)]);
    Ok(Some(([&first.reads[..], weight].concat(), warps(name, rows, arguments)?)))
}

fn bias_gelu(first: &Launch, second: &Launch, overlap: &Overlap<'_>) -> Fused {
    let in_place = same_start(&first.writes[0], &second.writes[0]);
    // If GELU works in place, it may also overwrite x: each element of x is read by the thread that overwrites it.
    let [x_conflicts, bias_conflicts] = [0, 1].map(|i| conflict(&first.reads[i..=i], &second.writes, overlap));
    if bias_conflicts || x_conflicts && !in_place {
        return Ok(None);
    }
    let Some(name) = pick_uniform(first, second, "bias_gelu_f32", "bias_gelu_bf16") else { return Ok(None) };
    let n = element_count(&first.writes[0].shape);
    let width = element_count(&first.reads[1].shape);
    let pack = pack_of(first.reads[0].dtype);
    // If GELU overwrites the sums, nothing else reads them, so the kernel does not store them.
    let sums = if in_place { Arg::Null } else { write(0) };
    let arguments = vec![read(0), read(1), sums, write(1), long(n), long(width)];
    Ok(Some((first.reads.clone(), threads(name, n.div_ceil(pack), arguments)?)))
}

fn max_and_sum(first: &Launch, second: &Launch, vocab: [usize; 2], overlap: &Overlap<'_>) -> Fused {
    let (logits, max, targets) = (&first.reads[0], &first.writes[0], &second.reads[2]);
    let same = second.reads[0] == *logits && second.reads[1] == *max;
    let inputs = [logits.clone(), targets.clone()];
    let Some((&width, leading)) = logits.shape.split_last() else { return Ok(None) };
    let count = element_count(leading);
    let conflicts = [first, second].into_iter().any(|launch| conflict(&inputs, &launch.writes, overlap));
    if !same || count == 0 || conflicts {
        return Ok(None);
    }
    let mut arguments = vec![read(0), read(1), write(0), write(1), write(2)];
    arguments.extend([count, width, vocab[0], vocab[1]].map(long));
    arguments.extend([Arg::ErrorRecord, Arg::LaunchIndex]);
    let is_bf16 = logits.dtype == DType::BF16;
    let name = if is_bf16 { "row_max_sum_exp_target_bf16" } else { "row_max_sum_exp_target_f32" };
    Ok(Some((inputs.to_vec(), rows(name, count, width, arguments)?)))
}
