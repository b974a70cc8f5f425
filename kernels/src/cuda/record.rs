//! A stream's record of an index out of range ([`ErrorRecord`]), and the pinned memory that it is copied to behind each
//! submission that may write it.
#![allow(unsafe_code)]

use std::sync::{Arc, Mutex, PoisonError};

use cudarc::driver::sys;

use super::context::Raw;
use super::gpu::Gpu;
use super::memory::{DeviceMemory, Pinned};
use super::step::ErrorRecord;
use crate::clock::{ReleaseClocks, host_access};
use crate::error::KernelError;
use crate::memory::{Arena, Tally};

const BYTES: usize = ErrorRecord::BYTES;

/// Records that one piece of pinned memory holds.
const SLOTS: usize = 128;

/// One stream's.
#[derive(Debug)]
pub(crate) struct Records {
    device: Arena,
    blocks: Vec<Arc<Block>>,
}

#[derive(Debug)]
struct Block {
    pinned: Pinned,
    free: Mutex<Vec<usize>>,
    /// When slots were given back.
    given_back: ReleaseClocks,
}

impl Drop for Block {
    fn drop(&mut self) {
        self.given_back.join();
    }
}

/// A place for one record; given back when dropped.
#[derive(Debug)]
pub(crate) struct RecordSlot {
    block: Arc<Block>,
    index: usize,
}

impl Records {
    /// Counted in `tally`.
    pub(crate) fn new(gpu: &Arc<Gpu>, rank: usize, tally: &Arc<Tally>) -> Result<Self, KernelError> {
        let device = Arena::cuda(DeviceMemory::new(gpu, rank, BYTES, tally)?);
        Ok(Self { device, blocks: Vec::new() })
    }

    /// The memory that kernels write.
    pub(crate) fn memory(&self) -> &Arena {
        &self.device
    }

    /// Where kernels write it.
    pub(crate) fn address(&self) -> u64 {
        self.device.device_memory().map_or(0, DeviceMemory::address)
    }

    /// Has room made for records. The context is bound.
    pub(crate) fn prepare(&mut self, gpu: &Gpu) -> Result<(), KernelError> {
        self.slot(gpu).map(drop)
    }

    fn slot(&mut self, gpu: &Gpu) -> Result<RecordSlot, KernelError> {
        let take = |block: &Arc<Block>| {
            let index = block.free.lock().unwrap_or_else(PoisonError::into_inner).pop()?;
            block.given_back.join();
            Some(RecordSlot { block: block.clone(), index })
        };
        if let Some(slot) = self.blocks.iter().find_map(take) {
            return Ok(slot);
        }
        let pinned = Pinned::new(gpu.context(), SLOTS * BYTES)?;
        let block =
            Arc::new(Block { pinned, free: Mutex::new((1..SLOTS).collect()), given_back: ReleaseClocks::default() });
        self.blocks.push(block.clone());
        Ok(RecordSlot { block, index: 0 })
    }

    /// Has the record copied, and cleared, in the stream's order. The context is bound.
    pub(crate) fn fetch(
        &mut self,
        gpu: &Gpu,
        stream: Raw<sys::CUstream>,
        place: &str,
    ) -> Result<RecordSlot, KernelError> {
        let slot = self.slot(gpu)?;
        let to = slot.block.pinned.start().wrapping_add(slot.index * BYTES);
        // SAFETY: both are live and hold a record; nobody reads the slot before the event behind this copy is done.
        let result = unsafe { sys::cuMemcpyDtoHAsync_v2(to.cast(), self.address(), BYTES, stream.0) };
        gpu.context().check(result, "cuMemcpyDtoHAsync", &place)?;
        // SAFETY: the record is live.
        let result = unsafe { sys::cuMemsetD32Async(self.address(), 0, ErrorRecord::WORDS, stream.0) };
        gpu.context().check(result, "cuMemsetD32Async", &place)?;
        Ok(slot)
    }
}

impl RecordSlot {
    /// What was copied; the event behind the copy is done.
    pub(crate) fn read(&self) -> Option<ErrorRecord> {
        let mut words = [0; ErrorRecord::WORDS];
        let start = self.block.pinned.start().wrapping_add(self.index * BYTES);
        host_access(start, BYTES, false);
        // SAFETY: inside the pinned memory, which starts at a page; written only by the copy, which is done. Read so that
        // other slots, which may be being written, are not touched.
        unsafe { std::ptr::copy_nonoverlapping(start.cast::<u32>(), words.as_mut_ptr(), words.len()) };
        ErrorRecord::decode(words)
    }
}

impl Drop for RecordSlot {
    fn drop(&mut self) {
        self.block.given_back.add();
        self.block.free.lock().unwrap_or_else(PoisonError::into_inner).push(self.index);
    }
}
