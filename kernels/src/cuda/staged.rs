//! Host work in the order of a CUDA stream: copies buffers to pinned memory, works on them there, and copies them back.
//! For custom kernels, for engines without GPU support, and for Inf/NaN checks. Blocks, so only a stream's own thread
//! calls it.
#![allow(unsafe_code)]

use std::sync::Arc;

use super::memory::Pinned;
use super::poller::{Completion, CompletionQueue};
use super::raw_stream::RawStream;
use crate::bound::Bound;
use crate::clock::host_access;
use crate::cpu::launch::faults;
use crate::error::KernelError;
use crate::event::Event;
use crate::memory::{ALIGNMENT, Arena, View};
use crate::op::{Buffer, CpuArgs, CpuRead, CpuSlice, CpuSliceMut, CpuWrite, CustomKernel, Launch, Op};
use crate::tensor::{DType, element_count};

/// The staging memory of one stream.
#[derive(Debug)]
pub(crate) struct HostStaging {
    stream: Arc<RawStream>,
    completions: Arc<CompletionQueue>,
    /// Grows to the needs of the largest launch.
    arena: Option<Arena>,
}

impl HostStaging {
    pub(crate) fn new(stream: &Arc<RawStream>, completions: &Arc<CompletionQueue>) -> Self {
        Self { stream: stream.clone(), completions: completions.clone(), arena: None }
    }

    /// Returns an event that is set when all work put on the stream so far is done.
    fn record(&self) -> Result<Event, KernelError> {
        let event = Event::default();
        let recorded = self.stream.record()?;
        self.stream.gpu().poller().push(&self.completions, recorded, Completion::SetEvent(event.clone()));
        Ok(event)
    }

    /// Waits for the event, which a lost device also sets.
    fn wait(&self, event: &Event) -> Result<(), KernelError> {
        event.synchronize();
        self.stream.gpu().context().check_alive()
    }

    /// Returns staging memory of at least `bytes` bytes. An earlier copy from it may still be in progress, so the host
    /// accesses it only after a later event (PINNED-1).
    fn arena(&mut self, bytes: usize) -> Result<Arena, KernelError> {
        if let Some(arena) = self.arena.as_ref().filter(|arena| arena.bytes() >= bytes) {
            return Ok(arena.clone());
        }
        if self.arena.is_some() {
            // Wait, since this frees the old memory.
            let event = self.record()?;
            self.wait(&event)?;
        }
        let arena = Arena::pinned(Pinned::new(self.stream.gpu().context(), bytes.next_power_of_two())?);
        self.arena = Some(arena.clone());
        Ok(arena)
    }

    /// The staging memory, if allocated.
    pub(crate) fn memory(&self) -> Option<&Arena> {
        self.arena.as_ref()
    }

    /// Allocates staging memory for a launch's buffers. Requires the context to be bound.
    pub(crate) fn prepare(&mut self, launch: &Launch) -> Result<(), KernelError> {
        let bytes = |buffer: &Buffer| element_count(&buffer.shape) * buffer.dtype.bytes();
        let buffers = launch.reads.iter().chain(&launch.writes);
        self.arena(buffers.map(|buffer| bytes(buffer).next_multiple_of(ALIGNMENT)).sum()).map(drop)
    }

    /// Runs `work` on copies of a launch's buffers and copies its writes back.
    pub(crate) fn run(
        &mut self,
        bound: &Bound<'_>,
        work: impl FnOnce(&[View<'_>], &[View<'_>]) -> Result<(), KernelError>,
    ) -> Result<(), KernelError> {
        // A write in place of a read shares its copy.
        let read_in_place = |write: &View<'_>| bound.reads.iter().position(|read| read.same_memory(write));
        let (mut offsets, mut end) = (Vec::new(), 0);
        let mut place = |view: &View<'_>| {
            offsets.push(end);
            end += view.bytes().next_multiple_of(ALIGNMENT);
        };
        bound.reads.iter().for_each(&mut place);
        for write in &bound.writes {
            place(write);
        }
        for (i, write) in bound.writes.iter().enumerate() {
            if let Some(read) = read_in_place(write) {
                offsets[bound.reads.len() + i] = offsets[read];
            }
        }
        let arena = self.arena(end)?;
        let buffers = || bound.reads.iter().chain(&bound.writes).zip(&offsets);
        for (view, offset) in buffers() {
            // Copy writes too: a kernel may leave some elements unchanged, or add to them.
            self.stream.copy_out(arena.host_start().wrapping_add(*offset), device_address(view)?, view.bytes())?;
        }
        let event = self.record()?;
        self.wait(&event)?;
        let views = buffers().map(|(view, offset)| View::new(bound.name, &arena, *offset, view.shape(), view.dtype()));
        let views = views.collect::<Result<Vec<_>, _>>()?;
        let (reads, writes) = views.split_at(bound.reads.len());
        reads.iter().for_each(|view| host_access(view.start(), view.bytes(), false));
        writes.iter().for_each(|view| host_access(view.start(), view.bytes(), true));
        let result = work(reads, writes);
        // User code may have bound another GPU's context.
        self.stream.gpu().context().bind()?;
        if result.is_ok() {
            for (view, copy) in bound.writes.iter().zip(writes) {
                self.stream.copy_in(device_address(view)?, copy.start(), view.bytes())?;
            }
        }
        result
    }

    /// Runs a custom kernel.
    pub(crate) fn run_custom(
        &mut self,
        bound: &Bound<'_>,
        kernel: &dyn CustomKernel,
        accumulate: bool,
    ) -> Result<(), KernelError> {
        self.run(bound, |reads, writes| {
            if writes.iter().any(|write| reads.iter().any(|read| read.overlaps(write))) {
                let got = "an op in place";
                return Err(KernelError::arguments(bound.name, "read", "memory that is not written", got));
            }
            // SAFETY: the copies belong to this stream; no read overlaps a write (just checked), and no two writes
            // overlap (`bound` has checked that).
            let args = unsafe {
                CpuArgs {
                    reads: reads.iter().map(|view| read(view)).collect::<Result<_, _>>()?,
                    writes: writes.iter().map(|view| write(view)).collect::<Result<_, _>>()?,
                    accumulate,
                }
            };
            kernel.run_cpu(args)
        })
    }

    /// Finds the first of a launch's writes that holds Inf or NaN, and the number of such elements.
    pub(crate) fn find_non_finite(
        &mut self,
        op: &Op,
        bound: &Bound<'_>,
    ) -> Result<Option<(usize, usize)>, KernelError> {
        for (i, write) in bound.writes.iter().enumerate().filter(|(_, write)| write.dtype().is_float()) {
            let arena = self.arena(write.bytes())?;
            self.stream.copy_out(arena.host_start(), device_address(write)?, write.bytes())?;
            let event = self.record()?;
            self.wait(&event)?;
            let copy = View::new(bound.name, &arena, 0, write.shape(), write.dtype())?;
            let widened: Vec<f32>;
            // SAFETY: the type matches; the copy is exclusively ours and complete.
            let values = unsafe {
                if write.dtype() == DType::BF16 {
                    widened = copy.bf16().iter().map(|value| value.to_f32()).collect();
                    &widened
                } else {
                    copy.f32()
                }
            };
            let elements = faults(op, write.shape(), values);
            if elements > 0 {
                return Ok(Some((i, elements)));
            }
        }
        Ok(None)
    }
}

/// Device address of a view's first element.
pub(crate) fn device_address(view: &View<'_>) -> Result<u64, KernelError> {
    let memory = view.arena().device_memory();
    let memory = memory.ok_or_else(|| KernelError::arguments("copy", "memory", "device memory", "host memory"))?;
    Ok(memory.address() + view.offset() as u64)
}

/// # Safety
/// Nobody writes the elements during `'a`.
unsafe fn read<'a>(view: &View<'a>) -> Result<CpuRead<'a>, KernelError> {
    // SAFETY: the dtype matches; the caller guarantees the rest.
    let data = unsafe {
        match view.dtype() {
            DType::F32 => CpuSlice::F32(view.f32()),
            DType::I32 => CpuSlice::I32(view.i32()),
            DType::BF16 => return Err(bf16_error()),
        }
    };
    Ok(CpuRead { shape: view.shape(), data })
}

fn bf16_error() -> KernelError {
    KernelError::arguments("custom kernel", "dtype", "F32 or I32", "BF16")
}

/// # Safety
/// Nobody else accesses the elements during `'a`.
unsafe fn write<'a>(view: &View<'a>) -> Result<CpuWrite<'a>, KernelError> {
    // SAFETY: see `read`.
    let data = unsafe {
        match view.dtype() {
            DType::F32 => CpuSliceMut::F32(view.f32_mut()),
            DType::I32 => CpuSliceMut::I32(view.i32_mut()),
            DType::BF16 => return Err(bf16_error()),
        }
    };
    Ok(CpuWrite { shape: view.shape(), data })
}
