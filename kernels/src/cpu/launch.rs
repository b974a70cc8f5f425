//! Runs one launch on the CPU by calling the op's kernel.
#![allow(unsafe_code)]

use std::sync::Arc;

use crate::bound::run_custom;
use crate::collective::Collective;
use crate::cpu::args::Args;
use crate::cpu::pool::Pool;
use crate::cpu::scratch::{Scratch, is_widened, thread_bytes};
use crate::cpu::widen;
use crate::cpu::{attention, dropout, elementwise, embedding, loss, matmul, norm, optimizer};
use crate::error::Result;
use crate::memory::{Base, View};
use crate::op::{Launch, Op};
use crate::submission::faults;
use crate::tensor::DType;

pub(crate) struct Runner {
    pub(crate) pool: Pool,
    pub(crate) engine: Arc<dyn Collective>,
    pub(crate) scratch: Scratch,
}

impl Runner {
    pub(crate) fn run(&self, launch: &Launch, bases: &[Base], repeat: bool) -> Result<()> {
        let Self { pool, engine, scratch } = self;
        if is_widened(launch) {
            let run = |launch: &Launch, bases: &[Base]| self.run(launch, bases, repeat);
            return widen::run(launch, bases, pool.threads(), scratch, run);
        }
        let op = &launch.op;
        let bytes = thread_bytes(launch, pool.threads());
        let floats = [bytes / size_of::<f32>()];
        let arena = (bytes > 0).then(|| scratch.at_least(bytes)).transpose()?;
        let mut args = Args::resolve(launch, bases, repeat)?;
        let scratch = arena.as_ref().map(|arena| View::new(op.name(), arena, 0, &floats, DType::F32)).transpose()?;
        args.scratch = scratch;
        match op {
            Op::Fill { value } => elementwise::fill(&mut args, pool, *value),
            Op::Copy => elementwise::copy(&mut args, pool),
            Op::Cast => elementwise::cast(&mut args),
            Op::CopyRegion { src, dst } => elementwise::copy_region(&mut args, src, dst),
            Op::Add => elementwise::add(&mut args, pool),
            Op::SumLeading => elementwise::sum_leading(&mut args, pool),
            Op::Scale { factor } => elementwise::scale(&mut args, pool, *factor),
            Op::Einsum(einsum) => matmul::einsum(&mut args, pool, einsum),
            Op::Embedding { vocab_start, vocab } => embedding::embedding(&mut args, pool, *vocab_start, *vocab),
            Op::EmbeddingGrad { vocab_start } => embedding::embedding_grad(&mut args, pool, *vocab_start),
            Op::LayerNorm { eps } => norm::layer_norm(&mut args, pool, *eps),
            Op::LayerNormGrad => norm::layer_norm_grad(&mut args, pool),
            Op::Gelu => elementwise::gelu(&mut args, pool),
            Op::GeluGrad => elementwise::gelu_grad(&mut args, pool),
            Op::Attention { scale } => attention::attention(&mut args, pool, *scale),
            Op::AttentionGrad { scale } => attention::attention_grad(&mut args, pool, *scale),
            Op::RowMax => loss::row_max(&mut args, pool),
            Op::SumExpTarget { vocab_start, vocab } => loss::sum_exp_target(&mut args, pool, *vocab_start, *vocab),
            Op::TokenLoss { scale } => loss::token_loss(&mut args, *scale),
            Op::CrossEntropyGrad { vocab_start, scale } => {
                loss::cross_entropy_grad(&mut args, pool, *vocab_start, *scale)
            }
            Op::Dropout { p, seed, shape, start, stride } => {
                dropout::dropout(&mut args, pool, *p, *seed, shape, start, *stride)
            }
            Op::SumSquares { index } => optimizer::sum_squares(&mut args, pool, *index),
            Op::ClipScale { max_norm } => optimizer::clip_scale(&mut args, *max_norm),
            Op::AdamW { beta1, beta2, eps, weight_decay } => {
                optimizer::adamw(&mut args, pool, [*beta1, *beta2], *eps, *weight_decay)
            }
            Op::Collective(call) => engine.run(call, &args.reads, &args.writes),
            // SAFETY: no two writes overlap (`Bound` has checked that); MEM-3 covers other streams.
            Op::Custom(kernel) => unsafe {
                run_custom(&**kernel, op.name(), &args.reads, &args.writes, args.accumulate)
            },
        }
    }
}

/// For a finished launch, returns the index of the first write with erroneous Inf or NaN values, and their number.
pub(crate) fn not_finite(launch: &Launch, bases: &[Base]) -> Option<(usize, usize)> {
    let args = Args::resolve(launch, bases, false).ok()?;
    let count = |write: &View<'_>| {
        // SAFETY: the writing launch has ended, and this stream runs no other launch; MEM-3 covers other streams.
        let values = unsafe { write.to_f32() }.unwrap_or_default();
        faults(&launch.op, write.shape(), &values)
    };
    args.writes.iter().map(count).enumerate().find(|(_, elements)| *elements > 0)
}
