//! Runs launches on bf16 tensors: widens the reads to f32 in the stream's scratch memory, runs the kernel there, and
//! rounds the kernel's writes back to bf16. The results are the reference for devices that widen in registers and also
//! sum in f32.
#![allow(unsafe_code)]

use half::bf16;

use crate::cpu::args::Args;
use crate::cpu::scratch::{Scratch, thread_bytes, wide_bytes};
use crate::error::Result;
use crate::memory::{Base, View};
use crate::op::{Buffer, Launch};
use crate::tensor::DType;

/// Runs a launch in f32. `run_wide` runs the launch on the widened buffers.
pub(crate) fn run(
    launch: &Launch,
    bases: &[Base],
    threads: usize,
    scratch: &Scratch,
    run_wide: impl FnOnce(&Launch, &[Base]) -> Result<()>,
) -> Result<()> {
    // Runs all checks on the original buffers.
    let args = Args::resolve(launch, bases, false)?;
    let views = || args.reads.iter().chain(&args.writes).filter(|view| view.dtype() == DType::BF16);
    let mut places: Vec<(View<'_>, usize)> = Vec::new();
    let mut bytes = thread_bytes(launch, threads);
    for view in views() {
        if !places.iter().any(|(other, _)| other.same_memory(view)) {
            places.push((*view, bytes));
            bytes += wide_bytes(view.element_count());
        }
    }
    let arena = scratch.at_least(bytes)?;
    let at = |view: &View<'_>| places.iter().find(|(other, _)| other.same_memory(view)).map_or(0, |(_, at)| *at);
    for view in args.reads.iter().filter(|view| view.dtype() == DType::BF16) {
        let x = View::new(launch.op.name(), &arena, at(view), view.shape(), DType::F32)?;
        // SAFETY: the dtypes match; only this stream uses the arena; nothing writes the read buffer (MEM-2, MEM-3).
        let (x, halves) = unsafe { (x.slice_mut::<f32>(), view.slice::<bf16>()) };
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
        reads: widened(&launch.reads, &args.reads),
        writes: widened(&launch.writes, &args.writes),
        ..launch.clone()
    };
    let mut all = bases.to_vec();
    all.push(Base { arena: arena.clone(), offset: 0 });
    run_wide(&launch_wide, &all)?;
    for view in args.writes.iter().filter(|view| view.dtype() == DType::BF16) {
        let y = View::new(launch.op.name(), &arena, at(view), view.shape(), DType::F32)?;
        // SAFETY: dtypes match; only this stream uses the arena; nothing else uses the written buffer (MEM-2, MEM-3).
        let (y, halves) = unsafe { (y.slice::<f32>(), view.slice_mut::<bf16>()) };
        halves.iter_mut().zip(y).for_each(|(half, y)| *half = bf16::from_f32(*y));
    }
    Ok(())
}
