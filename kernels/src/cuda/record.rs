//! The error record of a stream ([`ErrorRecord`]), and the pinned memory to which it is copied after each submission.
#![allow(unsafe_code)]

use std::sync::Arc;

use parking_lot::Mutex;

use super::device_memory::DeviceMemory;
use super::gpu::Gpu;
use super::memory::Pinned;
use super::raw_stream::RawStream;
use super::step::ErrorRecord;
use crate::clock::{ReleaseClocks, host_access};
use crate::error::Result;
use crate::memory::{Arena, Tally};

const BYTES: usize = ErrorRecord::BYTES;

const SLOTS: usize = 128;

#[derive(Debug)]
pub(crate) struct ErrorRecords {
    pub(crate) memory: Arena,
    blocks: Vec<Arc<SlotBlock>>,
}

#[derive(Debug)]
struct SlotBlock {
    pinned: Pinned,
    free: Mutex<Vec<usize>>,
    /// For the race checker: the clocks of the threads that returned slots.
    returned: ReleaseClocks,
}

impl Drop for SlotBlock {
    fn drop(&mut self) {
        self.returned.join();
    }
}

/// Pinned memory for one record. Dropping the slot returns it to its block.
#[derive(Debug)]
pub(crate) struct RecordSlot {
    block: Arc<SlotBlock>,
    index: usize,
}

impl ErrorRecords {
    /// Allocates the record on the device and counts its memory in `tally`.
    pub(crate) fn new(gpu: &Arc<Gpu>, rank: usize, tally: &Arc<Tally>) -> Result<Self> {
        let memory = Arena::on_device(DeviceMemory::new(gpu, rank, BYTES, tally)?);
        Ok(Self { memory, blocks: Vec::new() })
    }

    pub(crate) fn address(&self) -> u64 {
        self.memory.device_memory().map_or(0, DeviceMemory::address)
    }

    /// Allocates slots. Requires the context to be bound.
    pub(crate) fn prepare(&mut self, gpu: &Gpu) -> Result<()> {
        self.take_slot(gpu).map(drop)
    }

    fn take_slot(&mut self, gpu: &Gpu) -> Result<RecordSlot> {
        let take = |block: &Arc<SlotBlock>| {
            let index = block.free.lock().pop()?;
            block.returned.join();
            Some(RecordSlot { block: block.clone(), index })
        };
        if let Some(slot) = self.blocks.iter().find_map(take) {
            return Ok(slot);
        }
        let pinned = Pinned::new(&gpu.context, SLOTS * BYTES)?;
        let block =
            Arc::new(SlotBlock { pinned, free: Mutex::new((1..SLOTS).collect()), returned: ReleaseClocks::default() });
        self.blocks.push(block.clone());
        Ok(RecordSlot { block, index: 0 })
    }

    /// Enqueues a copy and a reset of the record. Requires the context to be bound.
    pub(crate) fn fetch(&mut self, stream: &RawStream) -> Result<RecordSlot> {
        let slot = self.take_slot(&stream.gpu)?;
        stream.copy_out(slot.start(), self.address(), BYTES)?;
        stream.fill(self.address(), 0, ErrorRecord::WORDS)?;
        Ok(slot)
    }
}

impl RecordSlot {
    fn start(&self) -> *mut u8 {
        self.block.pinned.start().wrapping_add(self.index * BYTES)
    }

    /// Decodes the copied record. The event recorded after the copy must be done.
    pub(crate) fn read(&self) -> Option<ErrorRecord> {
        let mut words = [0; ErrorRecord::WORDS];
        let start = self.start();
        host_access(start, BYTES, false);
        // SAFETY: the slot is inside the page-aligned pinned memory. Only the copy writes the slot, and the copy is
        // done. Other slots may be written meanwhile, but are not accessed here.
        unsafe { std::ptr::copy_nonoverlapping(start.cast::<u32>(), words.as_mut_ptr(), words.len()) };
        ErrorRecord::decode(words)
    }
}

impl Drop for RecordSlot {
    fn drop(&mut self) {
        self.block.returned.add();
        self.block.free.lock().push(self.index);
    }
}
