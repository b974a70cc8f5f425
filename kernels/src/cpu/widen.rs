//! Launches on bf16: reads are widened to f32 in the stream's scratch memory, the kernel runs there, and its writes are
//! rounded back. So sums are in f32, as on devices that widen in registers. This is the reference for them, and no
//! faster than f32.
#![allow(unsafe_code)]

use half::bf16;

use crate::collective::Collective;
use crate::cpu::launch::{Args, run_launch};
use crate::cpu::pool::Pool;
use crate::cpu::scratch::{Scratch, thread_bytes, wide_bytes};
use crate::error::KernelError;
use crate::memory::{Base, View};
use crate::op::{Buffer, Launch, Op};
use crate::tensor::DType;

/// Whether [`run`] must run the launch. Casts and copies support bf16 directly; collectives must not compute with it.
pub(crate) fn is_for(launch: &Launch) -> bool {
    let is_half = |buffer: &Buffer| buffer.dtype == DType::BF16;
    let supports_bf16 = matches!(launch.op, Op::Cast | Op::Copy | Op::CopyRegion { .. } | Op::Collective(_));
    !supports_bf16 && launch.reads.iter().chain(&launch.writes).any(is_half)
}

/// Runs a launch in f32.
pub(crate) fn run(
    launch: &Launch,
    bases: &[Base],
    repeat: bool,
    pool: &Pool,
    engine: &dyn Collective,
    scratch: &Scratch,
) -> Result<(), KernelError> {
    // Run all checks on the original buffers.
    let args = Args::resolve(launch, bases, repeat)?;
    let views = || args.reads().iter().chain(args.writes()).filter(|view| view.dtype() == DType::BF16);
    let mut places: Vec<(View<'_>, usize)> = Vec::new();
    let mut bytes = thread_bytes(launch, pool.threads());
    for view in views() {
        if !places.iter().any(|(other, _)| other.same_memory(view)) {
            places.push((*view, bytes));
            bytes += wide_bytes(view.element_count());
        }
    }
    let arena = scratch.at_least(bytes)?;
    let at = |view: &View<'_>| places.iter().find(|(other, _)| other.same_memory(view)).map_or(0, |(_, at)| *at);
    for view in args.reads().iter().filter(|view| view.dtype() == DType::BF16) {
        let x = View::new(launch.op.name(), &arena, at(view), view.shape(), DType::F32)?;
        // SAFETY: the dtypes match; only this stream uses the arena; nothing writes the read buffer (MEM-2, MEM-3).
        let (x, halves) = unsafe { (x.f32_mut(), view.bf16()) };
        x.iter_mut().zip(halves).for_each(|(x, half)| *x = half.to_f32());
    }
    let widened = |buffers: &[Buffer], views: &[View<'_>]| {
        let widen = |(buffer, view): (&Buffer, &View<'_>)| match buffer.dtype {
            DType::BF16 => {
                Buffer { base: bases.len(), offset: at(view), shape: buffer.shape.clone(), dtype: DType::F32 }
            }
            DType::F32 | DType::I32 => buffer.clone(),
        };
        buffers.iter().zip(views).map(widen).collect()
    };
    let launch_wide = Launch {
        reads: widened(&launch.reads, args.reads()),
        writes: widened(&launch.writes, args.writes()),
        ..launch.clone()
    };
    let mut all = bases.to_vec();
    all.push(Base { arena: arena.clone(), offset: 0 });
    run_launch(&launch_wide, &all, repeat, pool, engine, scratch)?;
    for view in args.writes().iter().filter(|view| view.dtype() == DType::BF16) {
        let y = View::new(launch.op.name(), &arena, at(view), view.shape(), DType::F32)?;
        // SAFETY: the dtypes match; only this stream uses the arena; nothing else uses the written buffer (MEM-2,
        // MEM-3).
        let (y, halves) = unsafe { (y.f32(), view.bf16_mut()) };
        halves.iter_mut().zip(y).for_each(|(half, y)| *half = bf16::from_f32(*y));
    }
    Ok(())
}
