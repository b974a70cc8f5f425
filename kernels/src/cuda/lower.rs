//! Lowers a launch to steps on a CUDA device: kernels with their geometry, or a matrix product. Accesses no device.
//!
//! The backend checks memory: no write may overlap another buffer (MEM-2), except as [`in_place`] allows.

use crate::cuda::step::{Arg, Step, product_workspace_bytes};
use crate::error::KernelError;
use crate::memory::ALIGNMENT;
use crate::op::{Launch, Op};
use crate::tensor::{DType, element_count};

mod args;
mod attention;
pub(crate) mod collective;
mod elementwise;
pub(crate) mod fuse;
mod kernel;
mod loss;
mod norm;
mod product;
mod reduce;
mod region;

#[cfg(test)]
mod tests;

use args::Args;
pub use attention::cudnn_attention;
use kernel::variants;

/// Alignment of cuBLASLt's and cuDNN's workspaces, in bytes; buffers are aligned to [`ALIGNMENT`].
const LIBRARY_ALIGNMENT: usize = 256;

/// Returns the steps of a launch; none if there is nothing to write. If `accumulate` is true, the op adds to its
/// accumulating write; the caller passes true for a launch with `accumulate` in a submission with `repeat`. No kernel
/// uses more dynamic shared memory than `shared_bytes_max`, the device's limit, which is at least
/// [`SHARED_BYTES_DEFAULT`](crate::cuda::step::SHARED_BYTES_DEFAULT).
///
/// # Errors
/// [`KernelError::Arguments`] for buffers that do not fit the op, for a workspace smaller than [`workspace_bytes`], for
/// collectives, which the stream's engine runs, and for custom kernels, which have no CUDA form.
pub fn lower(launch: &Launch, accumulate: bool, shared_bytes_max: usize) -> Result<Vec<Step>, KernelError> {
    let args = Args::new(launch, accumulate, workspace_bytes(launch))?;
    match &launch.op {
        Op::Fill { value } => elementwise::fill(&args, *value),
        Op::Copy => elementwise::copy(&args),
        Op::Cast => elementwise::cast(&args),
        Op::CopyRegion { src, dst } => region::copy_region(&args, src, dst),
        Op::Add => elementwise::add(&args),
        Op::SumLeading => reduce::sum_leading(&args),
        Op::Scale { factor } => elementwise::map(&args, variants!("scale"), &[Arg::F32(*factor)]),
        Op::Einsum(einsum) => product::einsum(&args, einsum),
        Op::Embedding { vocab_start, vocab } => loss::embedding(&args, *vocab_start, *vocab),
        Op::EmbeddingGrad { vocab_start } => loss::embedding_grad(&args, *vocab_start),
        Op::LayerNorm { eps } => norm::layer_norm(&args, *eps),
        Op::LayerNormGrad => norm::layer_norm_grad(&args),
        Op::Gelu => elementwise::map(&args, variants!("gelu"), &[]),
        Op::GeluGrad => elementwise::map(&args, variants!("gelu_grad"), &[]),
        Op::Attention { scale } => attention::attention(&args, *scale, shared_bytes_max),
        Op::AttentionGrad { scale } => attention::attention_grad(&args, *scale, shared_bytes_max),
        Op::RowMax => loss::row_max(&args),
        Op::SumExpTarget { vocab_start, vocab } => loss::sum_exp_target(&args, *vocab_start, *vocab),
        Op::TokenLoss { scale } => loss::token_loss(&args, *scale),
        Op::CrossEntropyGrad { vocab_start, scale } => loss::cross_entropy_grad(&args, *vocab_start, *scale),
        Op::Dropout { p, seed, shape, start, stride } => region::dropout(&args, *p, *seed, shape, start, *stride),
        Op::SumSquares { index } => reduce::sum_squares(&args, *index),
        Op::ClipScale { max_norm } => reduce::clip_scale(&args, *max_norm),
        Op::AdamW { beta1, beta2, eps, weight_decay } => elementwise::adamw(&args, *beta1, *beta2, *eps, *weight_decay),
        Op::Collective(_) => Err(launch.refused("op", "an op that is lowered", "a collective, which the engine runs")),
        Op::Custom(_) => {
            Err(launch.refused("op", "an op with a CUDA kernel", "a custom kernel, which runs on the CPU only"))
        }
    }
}

/// Workspace in bytes that a launch needs on a CUDA device, for any of the kernels, libraries or engines that may run
/// it. Returns 0 for most ops, and for shapes that the op refuses. A launch has no other scratch memory on a GPU.
pub fn workspace_bytes(launch: &Launch) -> usize {
    let read = |i: usize| launch.reads.get(i).map_or(&[][..], |buffer| &buffer.shape[..]);
    let own = match &launch.op {
        Op::LayerNormGrad => norm::workspace_floats(read(0)),
        Op::AttentionGrad { .. } => attention::workspace_floats(read(1)),
        Op::SumLeading => reduce::sum_workspace_floats(element_count(read(0))),
        Op::SumSquares { .. } => reduce::squares_workspace_floats(element_count(read(0))),
        _ => 0,
    };
    let library = match &launch.op {
        Op::Einsum(_) => launch.writes.first().map_or(0, |d| product_workspace_bytes(element_count(&d.shape))),
        Op::Collective(call) => return collective::workspace_bytes(call, launch),
        _ => cudnn_attention(launch).map_or(0, |attention| attention.workspace_bytes()),
    };
    let library = if library > 0 { library + LIBRARY_ALIGNMENT - ALIGNMENT } else { 0 };
    library.max(own * DType::F32.bytes())
}

pub(crate) fn library_start(address: u64) -> u64 {
    address.next_multiple_of(LIBRARY_ALIGNMENT as u64)
}

/// The reads that may share the memory of write 0, since elementwise ops work in place. All other overlaps of a write
/// with a read, another write or the workspace are errors.
pub fn in_place(launch: &Launch) -> &'static [usize] {
    match launch.op {
        Op::Copy | Op::Scale { .. } | Op::Gelu | Op::Dropout { .. } => &[0],
        Op::GeluGrad => &[0, 1],
        Op::Add if launch.reads.first().map(|a| &a.shape) == launch.reads.get(1).map(|b| &b.shape) => &[0, 1],
        Op::Add => &[0],
        Op::CrossEntropyGrad { .. } => &[1],
        _ => &[],
    }
}
