//! The operations that a stream can launch, and the program that lists launches.
//! A backend dispatches on [`Op`] once per launch. Attributes are those of the local shard.
//!
//! Shapes are row-major; `[..]` before the last dims stands for any number of leading dims.

use std::fmt::Debug;
use std::sync::Arc;

use crate::collective::call::CollectiveCall;
use crate::error::Result;
use crate::tensor::{DType, Region};

mod check;
pub(crate) mod describe;
mod einsum;

/// Scale of the second column of [`Op::SumSquares`]: `2^-192`. A float's square is below `2^256`, so a scaled sum of
/// `2^63` squares stays below `2^127`, in a float's range. When the first column overflows, past `2^128`, the second is
/// above `2^-64` and keeps full precision.
pub const SQUARES_SCALE: f64 = f64::from_bits((1023 - 192) << 52);

/// Norm from the sums of [`Op::SumSquares`]: the root of the first column's sum, or, if that overflows a float, of the
/// second column's. NaN or Inf if and only if an element of a tensor is NaN or Inf.
pub fn norm_of_squares(sums: impl IntoIterator<Item = [f64; 2]>) -> f64 {
    let [plain, scaled] = sums.into_iter().fold([0.0; 2], |total, sums| [total[0] + sums[0], total[1] + sums[1]]);
    if plain == f64::INFINITY { (scaled / SQUARES_SCALE).sqrt() } else { plain.sqrt() }
}

/// One operation. Each variant's comment lists `reads` and `writes` in their order.
#[derive(Clone, Debug)]
pub enum Op {
    /// Writes `value` to all elements. `() -> (out)`
    Fill {
        /// The value.
        value: f32,
    },
    /// `(x) -> (y)`, same number of elements, any dtype; shapes may differ (a reshape). Accumulates (f32).
    Copy,
    /// `(x) -> (y)`, same shape: converts between float types, rounded to nearest, ties to even.
    Cast,
    /// `(x) -> (y)`: copies box `src` of x to box `dst` of y; the rest of y is unchanged. Any dtype. Accumulates (f32).
    CopyRegion {
        /// Box of the read tensor.
        src: Region,
        /// Box of the written tensor; same size as `src`.
        dst: Region,
    },
    /// `(a, b) -> (y)`: `y = a + b`, where b's shape is a suffix of a's (b is broadcast over the leading dims).
    Add,
    /// `(x) -> (y)`: sums over the leading dims of x; y's shape is a suffix of x's. Accumulates.
    SumLeading,
    /// `(x) -> (y)`: `y = factor * x`.
    Scale {
        /// The factor.
        factor: f32,
    },
    /// Product of two tensors over named index groups, see [`Einsum`]. `(a, b) -> (y)`. Accumulates.
    Einsum(Einsum),
    /// `(ids [..], table [v, c]) -> (y [.., c])`: row `ids - vocab_start` of the table; zeros if another shard has it.
    Embedding {
        /// First row of the whole table that this shard holds.
        vocab_start: usize,
        /// Rows of the whole table; an id outside of it is an error on every shard.
        vocab: usize,
    },
    /// `(ids [..], dy [.., c]) -> (dtable [v, c])`. Accumulates (rows are added in the order of the ids).
    EmbeddingGrad {
        /// First row of the whole table that this shard holds.
        vocab_start: usize,
    },
    /// `(x [.., c], weight [c]) -> (y [.., c], mean [..], rstd [..])`, without bias.
    /// Ba, Kiros and Hinton 2016, <https://arxiv.org/abs/1607.06450>.
    LayerNorm {
        /// Added to the variance.
        eps: f32,
    },
    /// `(dy, x, weight, mean, rstd) -> (dx, dweight)`. `dweight` accumulates; `dx` does not.
    LayerNormGrad,
    /// `(x) -> (y)`, exact: `x/2 (1 + erf(x / sqrt 2))`. <https://arxiv.org/abs/1606.08415>
    Gelu,
    /// `(dy, x) -> (dx)`.
    GeluGrad,
    /// Causal attention, scores never stored: `(q, k, v [b, t, h, d]) -> (o [b, t, h, d], lse [b, h, t])`. `lse` is the
    /// log-sum-exp of each row of scaled scores. Dao et al. 2022, <https://arxiv.org/abs/2205.14135>.
    Attention {
        /// Factor of the scores, usually `1/sqrt(d)`.
        scale: f32,
    },
    /// `(do, q, k, v, o, lse) -> (dq, dk, dv)`.
    AttentionGrad {
        /// Factor of the scores.
        scale: f32,
    },
    /// `(logits [.., v]) -> (max [..])`; `-inf` when v is 0.
    RowMax,
    /// `(logits [.., v], max [..], targets i32 [..]) -> (sum_exp [..], target [..])`: the sum over this shard's columns
    /// of `exp(logit - max)`, and the target's logit, or 0 if this shard does not hold the target's column.
    SumExpTarget {
        /// First column of the whole vocabulary that this shard holds.
        vocab_start: usize,
        /// Columns of the whole vocabulary; a target outside of it is an error on every shard.
        vocab: usize,
    },
    /// `(max [..], sum_exp [..], target [..]) -> (loss [])`: `scale * sum(max + ln(sum_exp) - target)`. Accumulates.
    TokenLoss {
        /// `1 / number of tokens` for a mean.
        scale: f32,
    },
    /// `(dloss [], logits [.., v], max, sum_exp, targets) -> (dlogits)`:
    /// `dloss * scale * (exp(logit - max) / sum_exp - [column == target])`.
    CrossEntropyGrad {
        /// First column of the whole vocabulary that this shard holds.
        vocab_start: usize,
        /// `1 / number of tokens` for a mean.
        scale: f32,
    },
    /// `(x, rng i32 [2]) -> (y)`: `y = x / (1 - p)` for kept elements, else 0. The mask of an element is a function of
    /// `seed`, of the step and of the element's index in the step's whole tensor, so it is the same for every layout
    /// and number of micro-batches. `rng = [step, micro-batch]`. It is its own gradient, applied to dy.
    Dropout {
        /// Probability of zeroing an element.
        p: f32,
        /// Differs for each dropout in a model.
        seed: u64,
        /// Shape of the whole (logical) tensor of a step, over all micro-batches.
        shape: Vec<usize>,
        /// Start of this shard's part of micro-batch 0 in that tensor.
        start: Vec<usize>,
        /// Elements from the start of a micro-batch to the start of the next, row-major in `shape`.
        stride: usize,
    },
    /// `(x) -> (out [n, 2])`: adds the sum of the squares of x to `out[index, 0]`, and the sum times [`SQUARES_SCALE`]
    /// to `out[index, 1]`, each in f32 from a fixed-order f64 sum. Needs `out` zeroed by `Fill`; changes nothing else.
    SumSquares {
        /// The row of `out`.
        index: usize,
    },
    /// `(sums [n, 2]) -> (scale [], norm [])`: `norm` is [`norm_of_squares`] (in order, f64), `scale = min(1, max_norm
    /// / (norm + 1e-6))`; `scale` is NaN if the norm is not finite.
    ClipScale {
        /// Largest norm that is not scaled down; infinity disables clipping and leaves `scale` 1.
        max_norm: f32,
    },
    /// AdamW, <https://arxiv.org/abs/1711.05101>. All buffers but `hyper` and `scale` have one shape. In place.
    /// `(grad, hyper [2] = [learning rate, update counted from 1], scale []) -> (param, m, v)`.
    /// `g = scale * grad; p *= 1 - lr * decay; m, v as usual; p -= lr / (1 - b1^t) * m / (sqrt(v / (1 - b2^t)) + eps)`.
    /// Changes nothing if `scale` or the learning rate is not finite.
    AdamW {
        /// Decay rate of the first moment.
        beta1: f32,
        /// Decay rate of the second moment.
        beta2: f32,
        /// Added to the denominator.
        eps: f32,
        /// Decoupled weight decay.
        weight_decay: f32,
    },
    /// A collective over a group of devices; blocks the stream until all members have joined.
    Collective(CollectiveCall),
    /// A kernel defined outside this crate.
    Custom(Arc<dyn CustomKernel>),
}

/// A kernel defined outside this crate. It runs on the stream's thread.
pub trait CustomKernel: Debug + Send + Sync {
    /// Name for plans and errors.
    fn name(&self) -> &str;
    /// Runs on the CPU backend. The slices are the launch's buffers, in order, with their shapes.
    ///
    /// # Errors
    /// Any error ends the session and is reported as its cause.
    fn run_cpu(&self, args: CpuArgs<'_>) -> Result<()>;
}

/// Arguments of a custom kernel on the CPU backend.
pub struct CpuArgs<'a> {
    /// Buffers that the launch reads.
    pub reads: Vec<CpuRead<'a>>,
    /// Buffers that the launch writes.
    pub writes: Vec<CpuWrite<'a>>,
    /// Whether to add the results to the existing values instead of overwriting them.
    pub accumulate: bool,
}

/// A buffer that a custom kernel reads.
pub struct CpuRead<'a> {
    /// Extent of each dim.
    pub shape: &'a [usize],
    /// The elements.
    pub data: CpuSlice<'a>,
}

/// Elements of a read buffer.
pub enum CpuSlice<'a> {
    /// Floats.
    F32(&'a [f32]),
    /// Integers.
    I32(&'a [i32]),
}

/// A buffer that a custom kernel writes.
pub struct CpuWrite<'a> {
    /// Extent of each dim.
    pub shape: &'a [usize],
    /// The elements.
    pub data: CpuSliceMut<'a>,
}

/// Elements of a written buffer.
pub enum CpuSliceMut<'a> {
    /// Floats.
    F32(&'a mut [f32]),
    /// Integers.
    I32(&'a mut [i32]),
}

/// A product such as `"btc,hdc->bthd"`: each letter is an index. Letters in both operands but not in the result are
/// summed. Restricted to what one matrix product can compute without moving data: no index is in all three terms, and
/// the indices of each operand form two runs (rows and columns of a matrix, or its transpose).
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct Einsum {
    /// Letters of the first operand's dims.
    pub a: String,
    /// Letters of the second operand's dims.
    pub b: String,
    /// Letters of the result's dims.
    pub out: String,
}

/// The matrix product that an [`Einsum`] computes for given shapes: `out[m, n] = sum_k A[m, k] B[k, n]`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct GemmDims {
    /// Rows of the result.
    pub m: usize,
    /// Columns of the result.
    pub n: usize,
    /// Length of the summed index.
    pub k: usize,
    /// The first operand is stored as `[k, m]`.
    pub a_transposed: bool,
    /// The second operand is stored as `[n, k]`.
    pub b_transposed: bool,
    /// The result is stored as `[n, m]`.
    pub out_transposed: bool,
}

/// Location of a launch's buffer: an offset from one of the bases of the submission.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Buffer {
    /// Index into the submission's bases.
    pub base: usize,
    /// Bytes from the base.
    pub offset: usize,
    /// Extent of each dim (of this device's part).
    pub shape: Vec<usize>,
    /// Element type.
    pub dtype: DType,
}

/// One launch of a program.
#[derive(Clone, Debug)]
pub struct Launch {
    /// The operation.
    pub op: Op,
    /// Buffers that it reads.
    pub reads: Vec<Buffer>,
    /// Buffers that it writes. A write may be the same buffer as a read only if the op is in place or elementwise.
    pub writes: Vec<Buffer>,
    /// Whether a submission with `repeat` set adds to the op's accumulating write instead of overwriting it.
    pub accumulate: bool,
    /// Scratch memory, if [`crate::device::DeviceKind::workspace_bytes`] requires some.
    pub workspace: Option<Buffer>,
}

/// The launches of one action, in order, on one stream.
#[derive(Clone, Debug, Default)]
pub struct Program {
    /// Name for errors and traces.
    pub name: String,
    /// Launches in stream order.
    pub launches: Vec<Launch>,
    /// `(n, tag)`: notify the submitter with `tag` once the first n launches have finished. Sorted by n.
    pub signals: Vec<(usize, u32)>,
}
