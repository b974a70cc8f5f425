//! Runs one launch on the CPU: resolves and checks its buffers, then calls its kernel.
#![allow(unsafe_code)]

use half::bf16;

use crate::bound::Bound;
use crate::collective::Collective;
use crate::cpu::pool::Pool;
use crate::cpu::scratch::{Scratch, thread_bytes};
use crate::cpu::simd::Operand;
use crate::cpu::widen;
use crate::cpu::{attention, dropout, elementwise, embedding, loss, matmul, norm, optimizer};
use crate::error::KernelError;
use crate::memory::{Base, View};
use crate::op::{CpuArgs, CpuRead, CpuSlice, CpuSliceMut, CpuWrite, CustomKernel, Launch, Op};
use crate::tensor::{DType, element_count};

/// The checked buffers of a launch, and access to their slices.
pub(crate) struct Args<'a> {
    name: &'a str,
    reads: Vec<View<'a>>,
    writes: Vec<View<'a>>,
    /// Writes already handed out as slices: each is handed out once, which keeps slices exclusive.
    taken: Vec<bool>,
    /// The threads' parts of the stream's scratch memory.
    scratch: Option<View<'a>>,
    /// Whether to add to the accumulating write.
    pub(crate) accumulate: bool,
}

pub(crate) fn run_launch(
    launch: &Launch,
    bases: &[Base],
    repeat: bool,
    pool: &Pool,
    engine: &dyn Collective,
    scratch: &Scratch,
) -> Result<(), KernelError> {
    if widen::is_for(launch) {
        return widen::run(launch, bases, repeat, pool, engine, scratch);
    }
    let op = &launch.op;
    let bytes = thread_bytes(launch, pool.threads());
    let floats = [bytes / size_of::<f32>()];
    let arena = (bytes > 0).then(|| scratch.at_least(bytes)).transpose()?;
    let mut args = Args::resolve(launch, bases, repeat)?;
    args.scratch = arena.as_ref().map(|arena| View::new(op.name(), arena, 0, &floats, DType::F32)).transpose()?;
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
        Op::CrossEntropyGrad { vocab_start, scale } => loss::cross_entropy_grad(&mut args, pool, *vocab_start, *scale),
        Op::Dropout { p, seed, shape, start, stride } => {
            dropout::dropout(&mut args, pool, *p, *seed, shape, start, *stride)
        }
        Op::SumSquares { index } => optimizer::sum_squares(&mut args, pool, *index),
        Op::ClipScale { max_norm } => optimizer::clip_scale(&mut args, *max_norm),
        Op::AdamW { beta1, beta2, eps, weight_decay } => {
            let rates = optimizer::AdamW { beta1: *beta1, beta2: *beta2, eps: *eps, weight_decay: *weight_decay };
            optimizer::adamw(&mut args, pool, rates)
        }
        Op::Collective(call) => engine.run(call, &args.reads, &args.writes),
        Op::Custom(kernel) => custom(&**kernel, &mut args),
    }
}

fn custom(kernel: &dyn CustomKernel, args: &mut Args<'_>) -> Result<(), KernelError> {
    let reads = (0..args.reads.len()).map(|i| {
        let data = match args.reads[i].dtype() {
            DType::F32 => CpuSlice::F32(args.f32(i)?),
            DType::I32 => CpuSlice::I32(args.i32(i)?),
            DType::BF16 => return Err(args.refused(&format!("dtype of read {i}"), "F32 or I32", "BF16")),
        };
        Ok(CpuRead { shape: args.reads[i].shape(), data })
    });
    let reads = reads.collect::<Result<Vec<_>, KernelError>>()?;
    let mut writes = Vec::new();
    for i in 0..args.writes.len() {
        let data = match args.writes[i].dtype() {
            DType::F32 => CpuSliceMut::F32(args.out(i)?),
            DType::I32 => CpuSliceMut::I32(args.out_i32(i)?),
            DType::BF16 => return Err(args.refused(&format!("dtype of write {i}"), "F32 or I32", "BF16")),
        };
        writes.push(CpuWrite { shape: args.writes[i].shape(), data });
    }
    kernel.run_cpu(CpuArgs { reads, writes, accumulate: args.accumulate })
}

/// The first write of a finished launch that contains Inf or NaN, and the number of such elements.
pub(crate) fn not_finite(launch: &Launch, bases: &[Base]) -> Option<(usize, usize)> {
    let args = Args::resolve(launch, bases, false).ok()?;
    let count = |write: &View<'_>| {
        let widened: Vec<f32>;
        // SAFETY: of the matching dtype; the launch that wrote them has ended, and this stream has not started the next
        // one; other streams: MEM-3.
        let values = unsafe {
            match write.dtype() {
                DType::I32 => return 0,
                DType::F32 => write.f32(),
                DType::BF16 => {
                    widened = write.bf16().iter().map(|half| half.to_f32()).collect();
                    &widened
                }
            }
        };
        faults(&launch.op, write.shape(), values)
    };
    args.writes.iter().map(count).enumerate().find(|(_, elements)| *elements > 0)
}

/// Number of invalid Inf and NaN values among the floats that an op has written.
pub(crate) fn faults(op: &Op, shape: &[usize], values: &[f32]) -> usize {
    let is_fault = |value: &f32| match op {
        // The maximum of an empty row.
        Op::RowMax => !value.is_finite() && *value != f32::NEG_INFINITY,
        _ => !value.is_finite(),
    };
    let count = |values: &[f32]| values.iter().filter(|value| is_fault(value)).count();
    match op {
        // The op does not write elements outside of the box.
        Op::CopyRegion { dst, .. } => dst.runs(shape).into_iter().map(|run| count(&values[run])).sum(),
        _ => count(values),
    }
}

impl<'a> Args<'a> {
    pub(crate) fn resolve(launch: &'a Launch, bases: &'a [Base], repeat: bool) -> Result<Self, KernelError> {
        let bound = Bound::resolve(launch, bases, |_| 0)?;
        bound.all().try_for_each(|view| view.check_host(bound.name))?;
        let Bound { name, reads, writes, .. } = bound;
        let taken = vec![false; writes.len()];
        Ok(Self { name, taken, reads, writes, scratch: None, accumulate: launch.accumulate && repeat })
    }

    /// The buffers that the launch reads.
    pub(crate) fn reads(&self) -> &[View<'a>] {
        &self.reads
    }

    /// The buffers that the launch writes.
    pub(crate) fn writes(&self) -> &[View<'a>] {
        &self.writes
    }

    pub(crate) fn refused(&self, what: &str, expected: impl Into<String>, got: impl Into<String>) -> KernelError {
        KernelError::arguments(self.name, what, expected, got)
    }

    /// Shape of read `i`.
    pub(crate) fn read_shape(&self, i: usize) -> &'a [usize] {
        self.reads[i].shape()
    }

    /// Shape of write `i`.
    pub(crate) fn write_shape(&self, i: usize) -> &'a [usize] {
        self.writes[i].shape()
    }

    /// Dtype of read `i`.
    pub(crate) fn read_dtype(&self, i: usize) -> DType {
        self.reads[i].dtype()
    }

    /// Dtype of write `i`.
    pub(crate) fn write_dtype(&self, i: usize) -> DType {
        self.writes[i].dtype()
    }

    fn check_dtype(&self, what: &str, i: usize, view: &View<'_>, dtype: DType) -> Result<(), KernelError> {
        if view.dtype() == dtype {
            return Ok(());
        }
        Err(self.refused(&format!("dtype of {what} {i}"), format!("{dtype:?}"), format!("{:?}", view.dtype())))
    }

    fn check_not_in_place(&self, i: usize) -> Result<(), KernelError> {
        if self.writes.iter().any(|write| write.overlaps(&self.reads[i])) {
            return Err(self.refused(&format!("read {i}"), "memory that is not written", "memory of a write"));
        }
        Ok(())
    }

    /// Fails unless read `i` has this shape.
    pub(crate) fn expect_read(&self, i: usize, shape: &[usize]) -> Result<(), KernelError> {
        self.expect(&format!("shape of read {i}"), self.reads[i].shape(), shape)
    }

    /// Fails unless write `i` has this shape.
    pub(crate) fn expect_write(&self, i: usize, shape: &[usize]) -> Result<(), KernelError> {
        self.expect(&format!("shape of write {i}"), self.writes[i].shape(), shape)
    }

    fn expect(&self, what: &str, got: &[usize], expected: &[usize]) -> Result<(), KernelError> {
        if got == expected {
            return Ok(());
        }
        Err(self.refused(what, format!("{expected:?}"), format!("{got:?}")))
    }

    /// An error for input values that no valid program produces.
    pub(crate) fn bad_data(&self, what: String) -> KernelError {
        KernelError::Data { op: self.name.to_owned(), what }
    }

    /// Read `i` as indices, after a check that all are below `limit`.
    pub(crate) fn indices(&self, i: usize, limit: usize) -> Result<&'a [i32], KernelError> {
        let indices = self.i32(i)?;
        let inside = |index: &i32| usize::try_from(*index).is_ok_and(|index| index < limit);
        match indices.iter().position(|index| !inside(index)) {
            None => Ok(indices),
            Some(position) => {
                Err(self.bad_data(format!("index {} at position {position} is not in 0..{limit}", indices[position])))
            }
        }
    }

    /// Splits read `i`'s shape into its leading dims and its last dim.
    pub(crate) fn rows_of(&self, i: usize) -> Result<(&'a [usize], usize), KernelError> {
        let shape = self.reads[i].shape();
        let (last, leading) =
            shape.split_last().ok_or_else(|| self.refused(&format!("shape of read {i}"), "at least one dim", "[]"))?;
        Ok((leading, *last))
    }

    /// Fails unless write `w` has as many elements as read `r`.
    pub(crate) fn expect_same_count(&self, r: usize, w: usize) -> Result<(), KernelError> {
        if self.reads[r].element_count() == self.writes[w].element_count() {
            return Ok(());
        }
        let (expected, got) = (self.reads[r].shape(), self.writes[w].shape());
        Err(self.refused(
            &format!("elements of write {w}"),
            format!("as many as {expected:?}"),
            format!("{got:?}, {}", element_count(got)),
        ))
    }

    /// Read `i` as f32; it must not also be a write.
    pub(crate) fn f32(&self, i: usize) -> Result<&'a [f32], KernelError> {
        self.check_dtype("read", i, &self.reads[i], DType::F32)?;
        self.check_not_in_place(i)?;
        // SAFETY: f32, and no write of this launch overlaps it (just checked); other streams: MEM-3.
        Ok(unsafe { self.reads[i].f32() })
    }

    /// Read `i` as i32; it must not also be a write.
    pub(crate) fn i32(&self, i: usize) -> Result<&'a [i32], KernelError> {
        self.check_dtype("read", i, &self.reads[i], DType::I32)?;
        self.check_not_in_place(i)?;
        // SAFETY: i32, and no write of this launch overlaps it (just checked); other streams: MEM-3.
        Ok(unsafe { self.reads[i].i32() })
    }

    /// Read `i` of an elementwise op that writes write `w`: separate memory, or the memory that is written.
    pub(crate) fn operand(&self, i: usize, w: usize) -> Result<Operand<'a>, KernelError> {
        let (read, write) = (&self.reads[i], &self.writes[w]);
        self.check_dtype("read", i, read, DType::F32)?;
        if read.same_memory(write) && read.element_count() > 0 {
            return Ok(Operand::Same);
        }
        self.f32(i).map(Operand::Other)
    }

    fn take(&mut self, i: usize, dtype: DType) -> Result<(), KernelError> {
        self.check_dtype("write", i, &self.writes[i], dtype)?;
        assert!(!std::mem::replace(&mut self.taken[i], true), "write {i} taken twice");
        Ok(())
    }

    /// Write `i` as f32, once.
    pub(crate) fn out(&mut self, i: usize) -> Result<&'a mut [f32], KernelError> {
        self.take(i, DType::F32)?;
        // SAFETY: f32, taken once, no other write overlaps (checked in `check`), and no slice is made of an overlapping
        // read (`f32`, `i32`, `operand`); other streams: MEM-3.
        Ok(unsafe { self.writes[i].f32_mut() })
    }

    /// Read `i` as bf16; it must not also be a write.
    pub(crate) fn bf16(&self, i: usize) -> Result<&'a [bf16], KernelError> {
        self.check_dtype("read", i, &self.reads[i], DType::BF16)?;
        self.check_not_in_place(i)?;
        // SAFETY: bf16, and no write of this launch overlaps it (just checked); other streams: MEM-3.
        Ok(unsafe { self.reads[i].bf16() })
    }

    /// Write `i` as bf16, once.
    pub(crate) fn out_bf16(&mut self, i: usize) -> Result<&'a mut [bf16], KernelError> {
        self.take(i, DType::BF16)?;
        // SAFETY: as in `out`.
        Ok(unsafe { self.writes[i].bf16_mut() })
    }

    /// Write `i` as i32, once.
    pub(crate) fn out_i32(&mut self, i: usize) -> Result<&'a mut [i32], KernelError> {
        self.take(i, DType::I32)?;
        // SAFETY: as in `out`.
        Ok(unsafe { self.writes[i].i32_mut() })
    }

    /// The threads' parts of scratch memory, once; empty if the op needs none.
    pub(crate) fn take_scratch(&mut self) -> &'a mut [f32] {
        let Some(view) = self.scratch.take() else { return &mut [] };
        // SAFETY: f32, taken once, from an arena of this stream. No buffer of a program lies in it, except for widened
        // tensors, which lie after the threads' parts.
        unsafe { view.f32_mut() }
    }
}
