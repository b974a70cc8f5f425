//! The operations that a stream can launch, and programs, which are lists of launches. A backend dispatches on [`Op`]
//! once per launch. An op's attributes describe the local shard.
//!
//! Shapes are row-major. `[..]` before the last dims stands for any number of leading dims.

use std::fmt::Debug;
use std::sync::Arc;

use crate::collective::call::CollectiveCall;
use crate::error::Result;
use crate::tensor::{DType, Region};

mod check;
pub(crate) mod describe;
mod einsum;

/// Scale of the second column of [`Op::SumSquares`]: `2^-192`. A float's square is below `2^256`, so a scaled sum of
/// `2^63` squares is below `2^127`, which a float can represent. If the first column overflows (at `2^128`), the second
/// column is above `2^-64` and keeps full precision.
pub const SQUARES_SCALE: f64 = f64::from_bits((1023 - 192) << 52);

/// Computes the norm from the sums of [`Op::SumSquares`]: the root of the first column's sum. If that sum is Inf, uses
/// the second column's sum. The norm is NaN or Inf if and only if an element of a tensor is NaN or Inf.
pub fn norm_of_squares(sums: impl IntoIterator<Item = [f64; 2]>) -> f64 {
    let [plain, scaled] = sums.into_iter().fold([0.0; 2], |total, sums| [total[0] + sums[0], total[1] + sums[1]]);
    if plain == f64::INFINITY { (scaled / SQUARES_SCALE).sqrt() } else { plain.sqrt() }
}

/// One operation. Each variant's comment lists `reads` and `writes` in their order. "Accumulates" means that the op
/// supports [`Launch::accumulate`].
#[derive(Clone, Debug)]
pub enum Op {
    /// Writes `value` to all elements. `() -> (out)`
    Fill {
        /// The written value.
        value: f32,
    },
    /// `(x) -> (y)`: copies x to y, for any dtype. x and y have the same number of elements, but their shapes may
    /// differ (a reshape). Accumulates if the dtype is F32. On a GPU, x or y may be in memory of [`Device::staging`].
    /// The host fills that memory before the submission, or reads it after the submission's end.
    ///
    /// [`Device::staging`]: crate::device::Device::staging
    Copy,
    /// `(x) -> (y)`: converts between float types. x and y have the same shape. Rounds to nearest, ties to even.
    Cast,
    /// `(x) -> (y)`: copies box `src` of x to box `dst` of y, for any dtype. Does not change the other elements of y.
    /// Accumulates if the dtype is F32.
    CopyRegion {
        /// Box of the read tensor.
        src: Region,
        /// Box of the written tensor. It has the same size as `src`.
        dst: Region,
    },
    /// `(a, b) -> (y)`: `y = a + b`. The shape of b is a suffix of a's shape: b is broadcast over the leading dims.
    Add,
    /// `(x) -> (y)`: sums over the leading dims of x. The shape of y is a suffix of x's shape. Accumulates.
    SumLeading,
    /// `(x) -> (y)`: `y = factor * x`.
    Scale {
        /// The factor.
        factor: f32,
    },
    /// `(a, b) -> (y)`: a product of two tensors over named index groups. See [`Einsum`]. Accumulates.
    Einsum(Einsum),
    /// `(ids [..], table [v, c]) -> (y [.., c])`: for each id, the table row with index `id - vocab_start`, or zeros if
    /// another shard has the row.
    Embedding {
        /// Index of this shard's first row in the whole table.
        vocab_start: usize,
        /// Number of rows of the whole table. An id outside of the whole table is an error on every shard.
        vocab: usize,
    },
    /// `(ids [..], dy [.., c]) -> (dtable [v, c])`. Accumulates. Rows are added in the order of the ids.
    EmbeddingGrad {
        /// Index of this shard's first row in the whole table.
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
    /// `(x) -> (y)`, the exact form: `y = x/2 (1 + erf(x / sqrt 2))`. <https://arxiv.org/abs/1606.08415>
    Gelu,
    /// `(dy, x) -> (dx)`.
    GeluGrad,
    /// Causal attention, which never stores all scores: `(q, k, v [b, t, h, d]) -> (o [b, t, h, d], lse [b, h, t])`.
    /// `lse` is the log-sum-exp of each row of scaled scores. Dao et al. 2022, <https://arxiv.org/abs/2205.14135>.
    Attention {
        /// Factor for the scores, usually `1/sqrt(d)`.
        scale: f32,
    },
    /// `(do, q, k, v, o, lse) -> (dq, dk, dv)`.
    AttentionGrad {
        /// Factor for the scores.
        scale: f32,
    },
    /// `(logits [.., v]) -> (max [..])`: the maximum of each row's values except NaN; `-inf` if there are none.
    RowMax,
    /// `(logits [.., v], max [..], targets i32 [..]) -> (sum_exp [..], target [..])`: the sum of `exp(logit - max)`
    /// over this shard's columns, and the logit of the target's column, or 0 if another shard holds that column.
    SumExpTarget {
        /// Index of this shard's first column in the whole vocabulary.
        vocab_start: usize,
        /// Number of columns of the whole vocabulary. A target outside of it is an error on every shard.
        vocab: usize,
    },
    /// `(max [..], sum_exp [..], target [..]) -> (loss [])`: `scale * sum(max + ln(sum_exp) - target)`. Accumulates.
    TokenLoss {
        /// For a mean: `1 / number of tokens`.
        scale: f32,
    },
    /// `(dloss [], logits [.., v], max, sum_exp, targets) -> (dlogits)`:
    /// `dloss * scale * (exp(logit - max) / sum_exp - [column == target])`.
    CrossEntropyGrad {
        /// Index of this shard's first column in the whole vocabulary.
        vocab_start: usize,
        /// For a mean: `1 / number of tokens`.
        scale: f32,
    },
    /// `(x, rng i32 [2]) -> (y)`: `y = x / (1 - p)` for kept elements, otherwise 0. `rng = [step, micro-batch]`. An
    /// element's mask is a function of `seed`, the step and the element's index in the step's whole tensor, so it is
    /// the same for every layout and number of micro-batches. The gradient is the same op, applied to dy.
    Dropout {
        /// Probability of zeroing an element.
        p: f32,
        /// Seed, which differs for each dropout in a model.
        seed: u64,
        /// Shape of the whole (logical) tensor of a step, which includes all micro-batches.
        shape: Vec<usize>,
        /// Position in the whole tensor at which this shard's part of micro-batch 0 starts.
        start: Vec<usize>,
        /// Number of elements between the starts of consecutive micro-batches in the row-major whole tensor.
        stride: usize,
    },
    /// `(x) -> (out [n, 2])`: adds the sum of x's squares to `out[index, 0]`, and this sum times [`SQUARES_SCALE`] to
    /// `out[index, 1]`. The sum is computed in f64 in a fixed order; the two additions to `out` are in f32. A `Fill`
    /// must zero `out` first. Does not change other rows of `out`.
    SumSquares {
        /// The row of `out`.
        index: usize,
    },
    /// `(sums [n, 2]) -> (scale [], norm [])`: `norm` is the result of [`norm_of_squares`], which adds the rows in f64
    /// and in their order. `scale = min(1, max_norm / (norm + 1e-6))`, or NaN if the norm is not finite.
    ClipScale {
        /// Largest norm that is not scaled down. If it is infinite, there is no clipping, and `scale` is 1.
        max_norm: f32,
    },
    /// AdamW, <https://arxiv.org/abs/1711.05101>, in place. All buffers except `hyper` and `scale` have the same shape.
    /// `(grad, hyper [2] = [lr, t], scale []) -> (param, m, v)`: learning rate `lr`, update number `t` counted from 1.
    /// `g = scale * grad; m = b1 * m + (1 - b1) * g; v = b2 * v + (1 - b2) * g^2`;
    /// `p = p * (1 - lr * decay) - lr / (1 - b1^t) * m / (sqrt(v / (1 - b2^t)) + eps)`.
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
    /// A collective over a group of devices. It blocks the stream until this member's part of the call is done.
    Collective(CollectiveCall),
    /// A kernel defined outside this crate.
    Custom(Arc<dyn CustomKernel>),
}

/// A kernel defined outside this crate. It runs on the stream's thread.
pub trait CustomKernel: Debug + Send + Sync {
    /// The kernel's name for plans and errors.
    fn name(&self) -> &str;
    /// Runs the kernel on the host. `args` has the launch's buffers, in order, with their shapes. For a GPU, these are
    /// copies in host memory.
    ///
    /// # Errors
    /// Any error ends the session, which reports the error as its cause.
    fn run_cpu(&self, args: CpuArgs<'_>) -> Result<()>;
}

/// Arguments of a custom kernel.
pub struct CpuArgs<'a> {
    /// Buffers that the launch reads.
    pub reads: Vec<CpuRead<'a>>,
    /// Buffers that the launch writes.
    pub writes: Vec<CpuWrite<'a>>,
    /// True if the kernel must add its results to the existing values instead of overwriting them.
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

/// A product such as `"btc,hdc->bthd"`. Each letter is an index. Letters in both operands but not in the result are
/// summed. Only products that one matrix product computes without moving data are valid: no index is in all three
/// terms, and the indices of each operand form two runs (the rows and columns of a matrix, or of its transpose).
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct Einsum {
    /// The letters of the first operand's dims.
    pub a: String,
    /// The letters of the second operand's dims.
    pub b: String,
    /// The letters of the result's dims.
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
    /// True if the first operand is stored as `[k, m]`.
    pub a_transposed: bool,
    /// True if the second operand is stored as `[n, k]`.
    pub b_transposed: bool,
    /// True if the result is stored as `[n, m]`.
    pub out_transposed: bool,
}

/// The location of a launch's buffer: an offset from one of the submission's bases.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Buffer {
    /// Index into the submission's bases.
    pub base: usize,
    /// Offset in bytes from the base.
    pub offset: usize,
    /// Extent of each dim of this device's part.
    pub shape: Vec<usize>,
    /// Element type.
    pub dtype: DType,
}

/// One launch of a program.
#[derive(Clone, Debug)]
pub struct Launch {
    /// The operation.
    pub op: Op,
    /// Buffers that the launch reads.
    pub reads: Vec<Buffer>,
    /// Buffers that the launch writes. If the op is in place or elementwise, a write may be the same buffer as a read.
    pub writes: Vec<Buffer>,
    /// If true, a submission with `repeat` set adds to the op's accumulating write instead of overwriting this buffer.
    pub accumulate: bool,
    /// Scratch memory, if [`crate::device::DeviceKind::workspace_bytes`] requires it.
    pub workspace: Option<Buffer>,
}

/// The launches of one action, which run in order on one stream.
#[derive(Clone, Debug, Default)]
pub struct Program {
    /// Name for errors and traces.
    pub name: String,
    /// Launches in stream order.
    pub launches: Vec<Launch>,
    /// `(n, tag)`: the submitter is notified with `tag` once the first n launches have finished. Sorted by n.
    pub signals: Vec<(usize, u32)>,
}
