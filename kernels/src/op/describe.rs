//! Properties of ops for the planner: name, number of buffers, accumulating write, scratch memory, supported dtypes.

use crate::op::Op;
use crate::tensor::DType;

/// Number of query rows that attention processes as one block.
pub(crate) const ATTENTION_BLOCK: usize = 64;

impl Op {
    /// Name for errors, plans and traces.
    pub fn name(&self) -> &str {
        match self {
            Op::Fill { .. } => "fill",
            Op::Copy => "copy",
            Op::Cast => "cast",
            Op::CopyRegion { .. } => "copy_region",
            Op::Add => "add",
            Op::SumLeading => "sum_leading",
            Op::Scale { .. } => "scale",
            Op::Einsum(_) => "einsum",
            Op::Embedding { .. } => "embedding",
            Op::EmbeddingGrad { .. } => "embedding_grad",
            Op::LayerNorm { .. } => "layer_norm",
            Op::LayerNormGrad => "layer_norm_grad",
            Op::Gelu => "gelu",
            Op::GeluGrad => "gelu_grad",
            Op::Attention { .. } => "attention",
            Op::AttentionGrad { .. } => "attention_grad",
            Op::RowMax => "row_max",
            Op::SumExpTarget { .. } => "sum_exp_target",
            Op::TokenLoss { .. } => "token_loss",
            Op::CrossEntropyGrad { .. } => "cross_entropy_grad",
            Op::Dropout { .. } => "dropout",
            Op::SumSquares { .. } => "sum_squares",
            Op::ClipScale { .. } => "clip_scale",
            Op::AdamW { .. } => "adamw",
            Op::Collective(call) => call.name(),
            Op::Custom(kernel) => kernel.name(),
        }
    }

    /// Number of buffers read and written; `None` for custom kernels.
    pub fn arity(&self) -> Option<(usize, usize)> {
        Some(match self {
            Op::Fill { .. } => (0, 1),
            Op::Copy | Op::CopyRegion { .. } | Op::SumLeading | Op::Scale { .. } | Op::Gelu | Op::RowMax => (1, 1),
            Op::Cast | Op::SumSquares { .. } => (1, 1),
            Op::Add | Op::Einsum(_) | Op::Embedding { .. } | Op::EmbeddingGrad { .. } | Op::GeluGrad => (2, 1),
            Op::Dropout { .. } => (2, 1),
            Op::LayerNorm { .. } => (2, 3),
            Op::LayerNormGrad => (5, 2),
            Op::Attention { .. } => (3, 2),
            Op::AttentionGrad { .. } => (6, 3),
            Op::SumExpTarget { .. } => (3, 2),
            Op::TokenLoss { .. } => (3, 1),
            Op::CrossEntropyGrad { .. } => (5, 1),
            Op::ClipScale { .. } => (1, 2),
            Op::AdamW { .. } => (3, 3),
            Op::Collective(call) => call.kind.arity(),
            Op::Custom(_) => return None,
        })
    }

    /// Index of the write that a launch may add to instead of overwriting it; `None` if the op cannot accumulate. A
    /// custom kernel handles `accumulate` itself and returns `None` here.
    pub fn can_accumulate(&self) -> Option<usize> {
        match self {
            Op::Copy
            | Op::CopyRegion { .. }
            | Op::SumLeading
            | Op::Einsum(_)
            | Op::EmbeddingGrad { .. }
            | Op::TokenLoss { .. } => Some(0),
            Op::LayerNormGrad => Some(1),
            _ => None,
        }
    }

    /// Whether read `port` may have dtype [`DType::BF16`]: activations and their gradients. Parameters, statistics and
    /// sums are [`DType::F32`], except for operands of a product. All such reads of a launch have the same dtype.
    pub fn reads_bf16(&self, port: usize) -> bool {
        match self {
            Op::Cast | Op::Copy | Op::CopyRegion { .. } | Op::Add | Op::SumLeading | Op::Scale { .. } => true,
            Op::Einsum(_) | Op::Gelu | Op::GeluGrad | Op::Attention { .. } => true,
            Op::LayerNorm { .. } | Op::RowMax | Op::SumExpTarget { .. } | Op::Dropout { .. } => port == 0,
            Op::EmbeddingGrad { .. } | Op::CrossEntropyGrad { .. } => port == 1,
            Op::LayerNormGrad => port < 2,
            Op::AttentionGrad { .. } => port < 5,
            _ => false,
        }
    }

    /// Whether write `port` may have dtype [`DType::BF16`]. It is only used when the reads that may be BF16 are. An
    /// accumulating write is always [`DType::F32`].
    pub fn writes_bf16(&self, port: usize) -> bool {
        match self {
            Op::Fill { .. } | Op::Cast | Op::Copy | Op::CopyRegion { .. } | Op::Add | Op::SumLeading => true,
            Op::Scale { .. } | Op::Einsum(_) | Op::Gelu | Op::GeluGrad | Op::Embedding { .. } => true,
            Op::CrossEntropyGrad { .. } | Op::Dropout { .. } | Op::AttentionGrad { .. } => true,
            Op::LayerNorm { .. } | Op::LayerNormGrad | Op::Attention { .. } => port == 0,
            _ => false,
        }
    }

    /// Checks a launch that uses BF16; on failure returns the buffer, the expected and the actual dtype. Each port must
    /// support BF16, and:
    /// - the reads that may be BF16 all have one dtype;
    /// - if they are F32, so are the writes: only a cast converts. If they are BF16, a write may have either dtype, for
    ///   sums and for values that a collective engine adds up.
    pub(crate) fn bf16_fault(&self, reads: &[DType], writes: &[DType]) -> Option<(String, &'static str, &'static str)> {
        if matches!(self, Op::Collective(_)) {
            return None;
        }
        let none = ("F32 or I32", "BF16");
        let refused = |what: &str, i: usize, (expected, got)| Some((format!("dtype of {what} {i}"), expected, got));
        let unsupported = |types: &[DType], may: &dyn Fn(usize) -> bool| {
            types.iter().enumerate().position(|(i, dtype)| *dtype == DType::BF16 && !may(i))
        };
        if let Some(i) = unsupported(reads, &|i| self.reads_bf16(i)) {
            return refused("read", i, none);
        }
        if let Some(i) = unsupported(writes, &|i| self.writes_bf16(i)) {
            return refused("write", i, none);
        }
        let wide = (0..reads.len()).find(|&i| reads[i] == DType::F32 && self.reads_bf16(i))?;
        if reads.contains(&DType::BF16) {
            return refused("read", wide, ("BF16, like the other reads", "F32"));
        }
        let half = writes.iter().position(|dtype| *dtype == DType::BF16 && !matches!(self, Op::Cast))?;
        refused("write", half, ("F32, like the reads", "BF16"))
    }

    /// Floats of scratch memory that each CPU thread needs for a launch that reads these shapes. 0 for most ops, and
    /// for shapes that the op rejects anyway.
    pub(crate) fn thread_floats(&self, reads: &[&[usize]]) -> usize {
        match (self, reads) {
            // A block of scores.
            (Op::Attention { .. }, [_, k, ..]) => ATTENTION_BLOCK * k.get(1).copied().unwrap_or(0),
            // A block of probabilities and a block of their gradients.
            (Op::AttentionGrad { .. }, [_, _, k, ..]) => ATTENTION_BLOCK * 2 * k.get(1).copied().unwrap_or(0),
            _ => 0,
        }
    }
}
