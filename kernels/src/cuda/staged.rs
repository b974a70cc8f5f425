//! Host work in the order of a CUDA stream: copies buffers to pinned memory, works on them there, and copies them back.
//! Used for custom kernels, engines without GPU support, and Inf/NaN checks. Blocks the stream's own thread.
#![allow(unsafe_code)]

use std::sync::Arc;

use super::device_memory::device_address;
use super::memory::Pinned;
use super::poller::set_event;
use super::raw_stream::RawStream;
use crate::bound::{Bound, run_custom};
use crate::clock::host_access;
use crate::error::Result;
use crate::event::Event;
use crate::memory::{ALIGNMENT, Arena, View};
use crate::op::{Buffer, CustomKernel, Launch, Op};
use crate::submission::faults;
use crate::tensor::element_count;

#[derive(Debug)]
pub(crate) struct HostStaging {
    stream: Arc<RawStream>,
    /// Grows to the size that the largest launch needs.
    pub(crate) arena: Option<Arena>,
}

impl HostStaging {
    pub(crate) fn new(stream: &Arc<RawStream>) -> Self {
        Self { stream: stream.clone(), arena: None }
    }

    fn wait(&self) -> Result<()> {
        let event = Event::default();
        self.stream.report_end(set_event(event.clone()))?;
        event.synchronize();
        // The event is also set if the device is lost.
        self.stream.gpu.context.check_alive()
    }

    /// Returns an arena of at least `bytes` bytes. Earlier copies may still use it: `wait` before an access (PINNED-1).
    fn arena(&mut self, bytes: usize) -> Result<Arena> {
        if let Some(arena) = self.arena.as_ref().filter(|arena| arena.bytes() >= bytes) {
            return Ok(arena.clone());
        }
        if self.arena.is_some() {
            // Wait, since replacing the arena frees the old memory.
            self.wait()?;
        }
        let arena = Pinned::new(&self.stream.gpu.context, bytes.next_power_of_two())?.into_arena();
        self.arena = Some(arena.clone());
        Ok(arena)
    }

    /// Allocates staging memory for a launch's buffers. Requires the context to be bound.
    pub(crate) fn prepare(&mut self, launch: &Launch) -> Result<()> {
        let bytes = |buffer: &Buffer| element_count(&buffer.shape) * buffer.dtype.bytes();
        let buffers = launch.reads.iter().chain(&launch.writes);
        self.arena(buffers.map(|buffer| bytes(buffer).next_multiple_of(ALIGNMENT)).sum()).map(drop)
    }

    /// Runs `work` on copies of a launch's buffers and copies its writes back.
    pub(crate) fn run(
        &mut self,
        bound: &Bound<'_>,
        work: impl FnOnce(&[View<'_>], &[View<'_>]) -> Result<()>,
    ) -> Result<()> {
        // If a write uses the memory of a read, both share one copy.
        let read_in_place = |write: &View<'_>| bound.reads.iter().position(|read| read.same_memory(write));
        let (mut offsets, mut end) = (Vec::new(), 0);
        for view in bound.reads.iter().chain(&bound.writes) {
            offsets.push(end);
            end += view.bytes().next_multiple_of(ALIGNMENT);
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
        self.wait()?;
        let views = buffers().map(|(view, offset)| View::new(bound.name, &arena, *offset, view.shape(), view.dtype()));
        let views = views.collect::<Result<Vec<_>, _>>()?;
        let (reads, writes) = views.split_at(bound.reads.len());
        reads.iter().for_each(|view| host_access(view.start(), view.bytes(), false));
        writes.iter().for_each(|view| host_access(view.start(), view.bytes(), true));
        let result = work(reads, writes);
        // User code may have bound another GPU's context.
        self.stream.gpu.context.bind()?;
        if result.is_ok() {
            for (view, copy) in bound.writes.iter().zip(writes) {
                self.stream.copy_in(device_address(view)?, copy.start(), view.bytes())?;
            }
        }
        result
    }

    pub(crate) fn run_custom(&mut self, bound: &Bound<'_>, kernel: &dyn CustomKernel, accumulate: bool) -> Result<()> {
        self.run(bound, |reads, writes| {
            // SAFETY: the copies belong to this stream, and `bound` has checked that no two writes overlap.
            unsafe { run_custom(kernel, bound.name, reads, writes, accumulate) }
        })
    }

    /// Finds the first of a launch's writes that holds Inf or NaN. Returns its index and the number of such elements.
    pub(crate) fn find_non_finite(&mut self, op: &Op, bound: &Bound<'_>) -> Result<Option<(usize, usize)>> {
        // A copy to pinned memory computes nothing, so it is not checked.
        let is_checked = |write: &View<'_>| write.dtype().is_float() && !write.arena().is_pinned();
        for (i, write) in bound.writes.iter().enumerate().filter(|(_, write)| is_checked(write)) {
            let arena = self.arena(write.bytes())?;
            self.stream.copy_out(arena.host_start(), device_address(write)?, write.bytes())?;
            self.wait()?;
            let copy = View::new(bound.name, &arena, 0, write.shape(), write.dtype())?;
            // SAFETY: only this stream uses the copy, which is complete.
            let values = unsafe { copy.to_f32() }.unwrap_or_default();
            let elements = faults(op, write.shape(), &values);
            if elements > 0 {
                return Ok(Some((i, elements)));
            }
        }
        Ok(None)
    }
}
