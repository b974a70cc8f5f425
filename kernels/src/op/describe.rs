//! Properties of ops for the planner: name, number of buffers, accumulating write, scratch memory, supported dtypes.

use std::ops::Range;

use crate::op::Op;

/// Number of query rows in one block of attention.
pub(crate) const ATTENTION_BLOCK: usize = 64;

/// Threshold and factor of dropout with probability `p`: an element is dropped if its random number is below the
/// threshold, and otherwise multiplied by the factor. At p = 1, only the random number `u32::MAX` keeps an element, and
/// the factor is 0.
pub(crate) fn dropout_threshold(p: f32) -> (u32, f32) {
    let threshold = (f64::from(p) * 4_294_967_296.0).min(f64::from(u32::MAX)) as u32;
    (threshold, if p < 1.0 { 1.0 / (1.0 - p) } else { 0.0 })
}

/// Properties of an op that do not depend on its attributes.
struct Properties<'a> {
    name: &'a str,
    arity: (usize, usize),
    sum: Option<usize>,
    bf16_reads: Range<usize>,
    bf16_writes: Range<usize>,
}

const ALL: Range<usize> = 0..usize::MAX;

const NONE: Range<usize> = 0..0;

impl Op {
    fn properties(&self) -> Properties<'_> {
        let (name, arity, sum, bf16_reads, bf16_writes) = match self {
            Op::Fill { .. } => ("fill", (0, 1), None, NONE, ALL),
            Op::Copy => ("copy", (1, 1), Some(0), ALL, ALL),
            Op::Cast => ("cast", (1, 1), None, ALL, ALL),
            Op::CopyRegion { .. } => ("copy_region", (1, 1), Some(0), ALL, ALL),
            Op::Add => ("add", (2, 1), None, ALL, ALL),
            Op::SumLeading => ("sum_leading", (1, 1), Some(0), ALL, ALL),
            Op::Scale { .. } => ("scale", (1, 1), None, ALL, ALL),
            Op::Einsum(_) => ("einsum", (2, 1), Some(0), ALL, ALL),
            Op::Embedding { .. } => ("embedding", (2, 1), None, NONE, ALL),
            Op::EmbeddingGrad { .. } => ("embedding_grad", (2, 1), Some(0), 1..2, NONE),
            Op::LayerNorm { .. } => ("layer_norm", (2, 3), None, 0..1, 0..1),
            Op::LayerNormGrad => ("layer_norm_grad", (5, 2), Some(1), 0..2, 0..1),
            Op::Gelu => ("gelu", (1, 1), None, ALL, ALL),
            Op::GeluGrad => ("gelu_grad", (2, 1), None, ALL, ALL),
            Op::Attention { .. } => ("attention", (3, 2), None, ALL, 0..1),
            Op::AttentionGrad { .. } => ("attention_grad", (6, 3), None, 0..5, ALL),
            Op::RowMax => ("row_max", (1, 1), None, 0..1, NONE),
            Op::SumExpTarget { .. } => ("sum_exp_target", (3, 2), None, 0..1, NONE),
            Op::TokenLoss { .. } => ("token_loss", (3, 1), Some(0), NONE, NONE),
            Op::CrossEntropyGrad { .. } => ("cross_entropy_grad", (5, 1), None, 1..2, ALL),
            Op::Dropout { .. } => ("dropout", (2, 1), None, 0..1, ALL),
            Op::SumSquares { .. } => ("sum_squares", (1, 1), None, NONE, NONE),
            Op::ClipScale { .. } => ("clip_scale", (1, 2), None, NONE, NONE),
            Op::AdamW { .. } => ("adamw", (3, 3), None, NONE, NONE),
            Op::Collective(call) => (call.name(), call.kind.arity(), None, NONE, NONE),
            Op::Custom(kernel) => (kernel.name(), (0, 0), None, NONE, NONE),
        };
        Properties { name, arity, sum, bf16_reads, bf16_writes }
    }

    /// Name of the op for errors, plans and traces.
    pub fn name(&self) -> &str {
        self.properties().name
    }

    /// Numbers of read and written buffers. `None` for custom kernels.
    pub fn arity(&self) -> Option<(usize, usize)> {
        (!matches!(self, Op::Custom(_))).then(|| self.properties().arity)
    }

    /// Index of the write that can accumulate, if any. `None` for custom kernels, which handle `accumulate` themselves.
    pub fn can_accumulate(&self) -> Option<usize> {
        self.properties().sum
    }

    /// True if read `port` may be `BF16`. Activations, their gradients, and operands of a product may be `BF16`. Other
    /// parameters, statistics and sums are `F32`. In a launch, all reads that may be `BF16` have one dtype.
    pub fn reads_bf16(&self, port: usize) -> bool {
        self.properties().bf16_reads.contains(&port)
    }

    /// True if write `port` may be `BF16`, provided that all reads for which [`Self::reads_bf16`] is true are `BF16`.
    /// Accumulating writes are `F32`.
    pub fn writes_bf16(&self, port: usize) -> bool {
        self.properties().bf16_writes.contains(&port)
    }

    /// Number of scratch floats that each CPU thread needs for reads of these shapes; 0 if the op rejects the shapes.
    pub(crate) fn thread_floats(&self, reads: &[&[usize]]) -> usize {
        match (self, reads) {
            // One block of scores.
            (Op::Attention { .. }, [_, k, ..]) => ATTENTION_BLOCK * k.get(1).copied().unwrap_or(0),
            // One block of probabilities and one block of their gradients.
            (Op::AttentionGrad { .. }, [_, _, k, ..]) => ATTENTION_BLOCK * 2 * k.get(1).copied().unwrap_or(0),
            _ => 0,
        }
    }
}
