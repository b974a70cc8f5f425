//! The scratch memory of a CPU stream: one part per thread, followed by the tensors that a launch widens from bf16.
//! Every launch reuses it. It is not in the plan's arena, because its size depends on the number of threads.

use std::collections::BTreeSet;
use std::sync::Arc;

use parking_lot::Mutex;

use crate::error::Result;
use crate::memory::{ALIGNMENT, Arena, Tally};
use crate::op::{Buffer, Launch, Op, Program};
use crate::tensor::{DType, element_count};

/// Scratch memory for the largest launch that a stream has prepared or run. Clones share the memory.
#[derive(Clone, Debug)]
pub(crate) struct Scratch {
    device: usize,
    threads: usize,
    tally: Arc<Tally>,
    arena: Arc<Mutex<Option<Arena>>>,
}

impl Scratch {
    pub(crate) fn new(device: usize, threads: usize, tally: Arc<Tally>) -> Self {
        Self { device, threads, tally, arena: Arc::default() }
    }

    pub(crate) fn prepare(&self, program: &Program) -> Result<()> {
        let bytes = program.launches.iter().map(|launch| bytes(launch, self.threads)).max().unwrap_or(0);
        if bytes > 0 { self.at_least(bytes).map(drop) } else { Ok(()) }
    }

    /// Returns the memory, enlarged to `bytes` if needed. Only the stream's thread uses it, for one launch at a time.
    pub(crate) fn at_least(&self, bytes: usize) -> Result<Arena> {
        let mut arena = self.arena.lock();
        match &*arena {
            Some(arena) if arena.bytes() >= bytes => Ok(arena.clone()),
            _ => {
                // Frees the smaller arena first, so that the two never exist at the same time.
                *arena = None;
                Ok(arena.insert(Arena::host(self.device, bytes, &self.tally)?).clone())
            }
        }
    }
}

/// True if a launch runs on widened buffers. Casts, copies and collectives run on the bf16 buffers.
pub(crate) fn is_widened(launch: &Launch) -> bool {
    let is_half = |buffer: &Buffer| buffer.dtype == DType::BF16;
    let supports_bf16 = matches!(launch.op, Op::Cast | Op::Copy | Op::CopyRegion { .. } | Op::Collective(_));
    !supports_bf16 && launch.reads.iter().chain(&launch.writes).any(is_half)
}

/// Total size in bytes of the threads' parts for a launch on `threads` threads. Widened tensors follow these parts.
pub(crate) fn thread_bytes(launch: &Launch, threads: usize) -> usize {
    let shapes: Vec<&[usize]> = launch.reads.iter().map(|read| &read.shape[..]).collect();
    (launch.op.thread_floats(&shapes) * threads * size_of::<f32>()).next_multiple_of(ALIGNMENT)
}

/// Scratch size in bytes for a launch on a stream of `threads` threads.
pub(crate) fn bytes(launch: &Launch, threads: usize) -> usize {
    let wide = |launch: &Launch| {
        let halves = launch.reads.iter().chain(&launch.writes).filter(|buffer| buffer.dtype == DType::BF16);
        // An in-place op lists the same buffer twice.
        let places: BTreeSet<_> = halves.map(|b| (b.base, b.offset, element_count(&b.shape))).collect();
        places.into_iter().map(|(_, _, elements)| wide_bytes(elements)).sum()
    };
    thread_bytes(launch, threads) + if is_widened(launch) { wide(launch) } else { 0 }
}

/// Size in bytes of a bf16 tensor after widening to f32.
pub(crate) fn wide_bytes(elements: usize) -> usize {
    (elements * size_of::<f32>()).next_multiple_of(ALIGNMENT)
}
