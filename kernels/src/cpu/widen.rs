//! Launches on bf16: what they read is widened to f32 in the stream's scratch, the kernel runs there, and what it wrote is
//! rounded back. So sums are in f32, as on devices that do this in registers; it is their reference, and no faster than f32.
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

/// True for a launch that [`run`] is for. Casts and copies take bf16 as it is; collectives are not to compute with it.
pub(crate) fn is_for(launch: &Launch) -> bool {
    let is_half = |buffer: &Buffer| buffer.dtype == DType::BF16;
    let takes_it = matches!(launch.op, Op::Cast | Op::Copy | Op::CopyRegion { .. } | Op::Collective(_));
    !takes_it && launch.reads.iter().chain(&launch.writes).any(is_half)
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
    // All checks, on the buffers as they are.
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
        // SAFETY: the types fit; the arena is this stream's own; nobody writes what is read (MEM-2, MEM-3).
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
        // SAFETY: the types fit; the arena is this stream's own; nobody else uses what is written (MEM-2, MEM-3).
        let (y, halves) = unsafe { (y.f32(), view.bf16_mut()) };
        halves.iter_mut().zip(y).for_each(|(half, y)| *half = bf16::from_f32(*y));
    }
    Ok(())
}
