//! A CPU stream's scratch memory, reused by each launch: a share for each thread, then the tensors that a launch widens from
//! bf16. It lies outside the plan's arena, because its size depends on the threads.

use std::collections::BTreeSet;
use std::sync::{Arc, Mutex, PoisonError};

use crate::cpu::widen;
use crate::error::KernelError;
use crate::memory::{ALIGNMENT, Arena, Tally};
use crate::op::{Launch, Program};
use crate::tensor::{DType, element_count};

/// As large as the largest launch that a stream has prepared or run. Clones are the same memory.
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

    /// Allocates what the program's launches need.
    pub(crate) fn prepare(&self, program: &Program) -> Result<(), KernelError> {
        let bytes = program.launches.iter().map(|launch| bytes(launch, self.threads)).max().unwrap_or(0);
        if bytes > 0 { self.at_least(bytes).map(drop) } else { Ok(()) }
    }

    /// The memory, grown if need be. Only the stream's thread uses it, for one launch at a time.
    pub(crate) fn at_least(&self, bytes: usize) -> Result<Arena, KernelError> {
        let mut arena = self.arena.lock().unwrap_or_else(PoisonError::into_inner);
        match &*arena {
            Some(arena) if arena.bytes() >= bytes => Ok(arena.clone()),
            _ => {
                // Free the smaller arena first, so that both never exist at once.
                *arena = None;
                Ok(arena.insert(Arena::host(self.device, bytes, &self.tally)?).clone())
            }
        }
    }
}

/// Bytes of the threads' shares for a launch on a stream of `threads` threads; widened tensors follow them.
pub(crate) fn thread_bytes(launch: &Launch, threads: usize) -> usize {
    let shapes: Vec<&[usize]> = launch.reads.iter().map(|read| &read.shape[..]).collect();
    (launch.op.thread_floats(&shapes) * threads * size_of::<f32>()).next_multiple_of(ALIGNMENT)
}

/// Bytes that a launch needs on a stream of `threads` threads.
pub(crate) fn bytes(launch: &Launch, threads: usize) -> usize {
    let wide = |launch: &Launch| {
        let halves = launch.reads.iter().chain(&launch.writes).filter(|buffer| buffer.dtype == DType::BF16);
        // An op in place names one buffer twice.
        let places: BTreeSet<_> = halves.map(|b| (b.base, b.offset, element_count(&b.shape))).collect();
        places.into_iter().map(|(_, _, elements)| wide_bytes(elements)).sum()
    };
    thread_bytes(launch, threads) + if widen::is_for(launch) { wide(launch) } else { 0 }
}

/// Bytes of a tensor of bf16 that is widened to f32.
pub(crate) fn wide_bytes(elements: usize) -> usize {
    (elements * size_of::<f32>()).next_multiple_of(ALIGNMENT)
}
