//! Work of the host on a CUDA stream, in its order: buffers are copied to pinned memory, worked on there, and copied back.
//! For custom kernels, for engines that know no GPU, and for the look at what a launch has written. Blocks, so only a
//! stream's own thread calls it.
#![allow(unsafe_code)]

use std::sync::Arc;

use super::memory::Pinned;
use super::poller::{Then, Track};
use super::raw_stream::RawStream;
use crate::bound::Bound;
use crate::clock::host_access;
use crate::cpu::launch::faults;
use crate::error::KernelError;
use crate::event::Event;
use crate::memory::{ALIGNMENT, Arena, View};
use crate::op::{Buffer, CpuArgs, CpuRead, CpuSlice, CpuSliceMut, CpuWrite, CustomKernel, Launch, Op};
use crate::tensor::{DType, element_count};

/// One stream's staging memory.
#[derive(Debug)]
pub(crate) struct Staged {
    lane: Arc<RawStream>,
    track: Arc<Track>,
    /// Grows to what the largest launch needs.
    arena: Option<Arena>,
}

impl Staged {
    pub(crate) fn new(lane: &Arc<RawStream>, track: &Arc<Track>) -> Self {
        Self { lane: lane.clone(), track: track.clone(), arena: None }
    }

    /// An event that is set when all that is on the stream so far is done.
    fn record(&self) -> Result<Event, KernelError> {
        let event = Event::default();
        let recorded = self.lane.record()?;
        self.lane.gpu().poller().push(&self.track, recorded, Then::Set(event.clone()));
        Ok(event)
    }

    /// Waits for it; a lost device sets it, too.
    fn wait(&self, event: &Event) -> Result<(), KernelError> {
        event.synchronize();
        self.lane.gpu().context().check_alive()
    }

    /// Staging memory of at least so many bytes. What was copied back from it last may still be under way; the host touches it
    /// only behind an event that comes after that (PINNED-1).
    fn arena(&mut self, bytes: usize) -> Result<Arena, KernelError> {
        if let Some(arena) = self.arena.as_ref().filter(|arena| arena.bytes() >= bytes) {
            return Ok(arena.clone());
        }
        if self.arena.is_some() {
            // The old memory goes.
            let event = self.record()?;
            self.wait(&event)?;
        }
        let arena = Arena::pinned(Pinned::new(self.lane.gpu().context(), bytes.next_power_of_two())?);
        self.arena = Some(arena.clone());
        Ok(arena)
    }

    /// The memory that copies are made to.
    pub(crate) fn memory(&self) -> Option<&Arena> {
        self.arena.as_ref()
    }

    /// Has memory made for what the host does with a launch's buffers. The context is bound.
    pub(crate) fn prepare(&mut self, launch: &Launch) -> Result<(), KernelError> {
        let bytes = |buffer: &Buffer| element_count(&buffer.shape) * buffer.dtype.bytes();
        let buffers = launch.reads.iter().chain(&launch.writes);
        self.arena(buffers.map(|buffer| bytes(buffer).next_multiple_of(ALIGNMENT)).sum()).map(drop)
    }

    /// Runs `work` on copies of a launch's buffers, and copies back what it has written.
    pub(crate) fn run(
        &mut self,
        bound: &Bound<'_>,
        work: impl FnOnce(&[View<'_>], &[View<'_>]) -> Result<(), KernelError>,
    ) -> Result<(), KernelError> {
        // What is written in place of a read is one copy.
        let twin = |write: &View<'_>| bound.reads.iter().position(|read| read.same_memory(write));
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
            if let Some(read) = twin(write) {
                offsets[bound.reads.len() + i] = offsets[read];
            }
        }
        let arena = self.arena(end)?;
        let both = || bound.reads.iter().chain(&bound.writes).zip(&offsets);
        for (view, offset) in both() {
            // What is written is copied, too: a kernel may leave some of it, or add to it.
            self.lane.copy_out(arena.host_start().wrapping_add(*offset), device_address(view)?, view.bytes())?;
        }
        let event = self.record()?;
        self.wait(&event)?;
        let views = both().map(|(view, offset)| View::new(bound.name, &arena, *offset, view.shape(), view.dtype()));
        let views = views.collect::<Result<Vec<_>, _>>()?;
        let (reads, writes) = views.split_at(bound.reads.len());
        reads.iter().for_each(|view| host_access(view.start(), view.bytes(), false));
        writes.iter().for_each(|view| host_access(view.start(), view.bytes(), true));
        let worked = work(reads, writes);
        // Others' code may have bound another GPU's context.
        self.lane.gpu().context().bind()?;
        if worked.is_ok() {
            for (view, copy) in bound.writes.iter().zip(writes) {
                self.lane.copy_in(device_address(view)?, copy.start(), view.bytes())?;
            }
        }
        worked
    }

    /// Runs a custom kernel.
    pub(crate) fn custom(
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
            // SAFETY: copies of this stream's own; no read overlaps a write (just checked), and no two writes overlap
            // (`bound` has checked that).
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

    /// The first of a launch's writes that holds an infinity or no number, and how many of them.
    pub(crate) fn faults(&mut self, op: &Op, bound: &Bound<'_>) -> Result<Option<(usize, usize)>, KernelError> {
        for (i, write) in bound.writes.iter().enumerate().filter(|(_, write)| write.dtype().is_float()) {
            let arena = self.arena(write.bytes())?;
            self.lane.copy_out(arena.host_start(), device_address(write)?, write.bytes())?;
            let event = self.record()?;
            self.wait(&event)?;
            let copy = View::new(bound.name, &arena, 0, write.shape(), write.dtype())?;
            let widened: Vec<f32>;
            // SAFETY: of the type; the copy is ours, and done.
            let values = unsafe {
                if write.dtype() == DType::BF16 {
                    widened = copy.bf16().iter().map(|half| half.to_f32()).collect();
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

/// Where a view's first element lies on the device.
pub(crate) fn device_address(view: &View<'_>) -> Result<u64, KernelError> {
    let memory = view.arena().device_memory();
    let memory = memory.ok_or_else(|| KernelError::arguments("copy", "memory", "memory of a GPU", "the host's"))?;
    Ok(memory.address() + view.offset() as u64)
}

/// # Safety
/// For `'a` nobody writes the elements.
unsafe fn read<'a>(view: &View<'a>) -> Result<CpuRead<'a>, KernelError> {
    // SAFETY: of the dtype that is asked for; the rest is the contract.
    let data = unsafe {
        match view.dtype() {
            DType::F32 => CpuSlice::F32(view.f32()),
            DType::I32 => CpuSlice::I32(view.i32()),
            DType::BF16 => return Err(half_refused()),
        }
    };
    Ok(CpuRead { shape: view.shape(), data })
}

fn half_refused() -> KernelError {
    KernelError::arguments("custom kernel", "dtype", "F32 or I32", "BF16")
}

/// # Safety
/// For `'a` nobody else touches the elements.
unsafe fn write<'a>(view: &View<'a>) -> Result<CpuWrite<'a>, KernelError> {
    // SAFETY: as in `read`.
    let data = unsafe {
        match view.dtype() {
            DType::F32 => CpuSliceMut::F32(view.f32_mut()),
            DType::I32 => CpuSliceMut::I32(view.i32_mut()),
            DType::BF16 => return Err(half_refused()),
        }
    };
    Ok(CpuWrite { shape: view.shape(), data })
}
