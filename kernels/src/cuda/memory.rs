//! Pinned host memory, and synchronous copies between host and device through a pinned buffer on a dedicated stream.
//!
//! - PINNED-1: nobody accesses the part of a pinned buffer that a copy in progress uses. [`HostTransfer`] waits for
//!   each piece before the next. Streams wait for an event recorded after the copy before they reuse the buffer. Users
//!   of staging memory ([`crate::device::Device::staging`]) access it only before a submission or after its end.
#![allow(unsafe_code)]

use std::ptr::NonNull;
use std::sync::Arc;

use cudarc::driver::sys;

use super::context::{Context, Raw};
use crate::clock::{Stamped, host_access};
use crate::error::Result;
use crate::memory::Arena;

const PIECE_BYTES: usize = 4 << 20;

/// The stream and pinned buffer for host copies, which run one at a time.
#[derive(Debug)]
pub(crate) struct HostTransfer {
    context: Arc<Context>,
    stream: Raw<sys::CUstream>,
    pinned: Pinned,
    /// For the race checker: each user of the buffer reads this stamp first, and renews it after the last access.
    released: Stamped<()>,
}

impl HostTransfer {
    /// Requires the context to be bound.
    pub(crate) fn new(context: &Arc<Context>) -> Result<Self> {
        let pinned = Pinned::new(context, PIECE_BYTES)?;
        Ok(Self {
            context: context.clone(),
            stream: new_stream(context, 0, &context.place())?,
            pinned,
            released: Stamped::default(),
        })
    }

    /// Zeroes device memory and waits for completion. Requires the context to be bound.
    pub(crate) fn zero(&self, address: u64, bytes: usize) -> Result<()> {
        // SAFETY: the caller guarantees that the range is device memory of this context.
        let result = unsafe { sys::cuMemsetD8Async(address, 0, bytes, self.stream.0) };
        self.wait(result, "cuMemsetD8Async")
    }

    /// Copies `bytes` bytes to device memory in pieces. `fill` writes each piece. The copy stops early if `fill`
    /// returns false. Requires a bound context.
    pub(crate) fn write(&mut self, to: u64, bytes: usize, fill: &mut dyn FnMut(&mut [u8]) -> bool) -> Result<()> {
        self.released.get();
        for at in (0..bytes).step_by(PIECE_BYTES) {
            let piece = PIECE_BYTES.min(bytes - at);
            if !fill(self.pinned.first_mut(piece)) {
                break;
            }
            let from = self.pinned.start.0.cast();
            // SAFETY: the caller guarantees that `to` is device memory of this context. Nobody changes the piece until
            // `wait` returns (PINNED-1).
            let result = unsafe { sys::cuMemcpyHtoDAsync_v2(to + at as u64, from, piece, self.stream.0) };
            self.wait(result, "cuMemcpyHtoDAsync")?;
        }
        self.released = Stamped::new(());
        Ok(())
    }

    /// Passes `bytes` bytes of device memory to `take` in pieces, until `take` returns false. Requires a bound context.
    pub(crate) fn read(&mut self, from: u64, bytes: usize, take: &mut dyn FnMut(&[u8]) -> bool) -> Result<()> {
        self.released.get();
        for at in (0..bytes).step_by(PIECE_BYTES) {
            let piece = PIECE_BYTES.min(bytes - at);
            let to = self.pinned.start.0.cast();
            // SAFETY: as in `write`.
            let result = unsafe { sys::cuMemcpyDtoHAsync_v2(to, from + at as u64, piece, self.stream.0) };
            self.wait(result, "cuMemcpyDtoHAsync")?;
            if !take(self.pinned.first(piece)) {
                break;
            }
        }
        self.released = Stamped::new(());
        Ok(())
    }

    /// Checks the `result` of an asynchronous call and waits until the call has completed on the stream.
    fn wait(&self, result: sys::CUresult, call: &'static str) -> Result<()> {
        self.context.check(result, call, &self.context.place())?;
        // SAFETY: the stream is live.
        let result = unsafe { sys::cuStreamSynchronize(self.stream.0) };
        self.context.check(result, "cuStreamSynchronize", &self.context.place())
    }
}

impl Drop for HostTransfer {
    fn drop(&mut self) {
        self.released.get();
        destroy_stream(&self.context, self.stream);
    }
}

/// Creates a stream that does not synchronize with the default stream. Requires the context to be bound.
pub(crate) fn new_stream(context: &Context, priority: i32, place: &str) -> Result<Raw<sys::CUstream>> {
    let mut stream = std::ptr::null_mut();
    let flags = sys::CUstream_flags::CU_STREAM_NON_BLOCKING as u32;
    // SAFETY: the call writes a handle to a local.
    let result = unsafe { sys::cuStreamCreateWithPriority(&mut stream, flags, priority) };
    context.check(result, "cuStreamCreateWithPriority", &place)?;
    Ok(Raw(stream))
}

/// Destroys a stream from [`new_stream`]; pending work on it still completes.
pub(crate) fn destroy_stream(context: &Context, stream: Raw<sys::CUstream>) {
    if context.bind_to_drop() {
        // SAFETY: the caller created the stream and no longer uses it.
        let _ = unsafe { sys::cuStreamDestroy_v2(stream.0) };
    }
}

/// Zeroed, page-locked host memory. It is not write-combined, because the host also reads it.
#[derive(Debug)]
pub(crate) struct Pinned {
    context: Arc<Context>,
    start: Raw<*mut u8>,
    bytes: usize,
}

impl Pinned {
    /// Allocates at least one byte. Requires the context to be bound.
    pub(crate) fn new(context: &Arc<Context>, bytes: usize) -> Result<Self> {
        let mut start = std::ptr::null_mut();
        let bytes = bytes.max(1);
        // SAFETY: the call writes an address to a local.
        let result = unsafe { sys::cuMemHostAlloc(&mut start, bytes, sys::CU_MEMHOSTALLOC_PORTABLE) };
        context.check(result, "cuMemHostAlloc", &context.place())?;
        let start = start.cast::<u8>();
        // SAFETY: the memory was just allocated with this size.
        unsafe { start.write_bytes(0, bytes) };
        Ok(Self { context: context.clone(), start: Raw(start), bytes })
    }

    pub(crate) fn into_arena(self) -> Arena {
        let (start, bytes) = (NonNull::new(self.start.0).unwrap_or(NonNull::dangling()), self.bytes);
        // SAFETY: the memory is initialized in `new`, page-aligned, and freed when `self` is dropped.
        unsafe { Arena::of_backend(start, bytes, Box::new(self)) }
    }

    pub(crate) fn start(&self) -> *mut u8 {
        self.start.0
    }

    /// The first `bytes` bytes; no copy to them may be in progress (PINNED-1).
    pub(crate) fn first(&self, bytes: usize) -> &[u8] {
        let bytes = bytes.min(self.bytes);
        host_access(self.start.0, bytes, false);
        // SAFETY: the allocation has at least `bytes` bytes, all initialized.
        unsafe { std::slice::from_raw_parts(self.start.0, bytes) }
    }

    /// The first `bytes` bytes; no copy to or from them may be in progress (PINNED-1).
    pub(crate) fn first_mut(&mut self, bytes: usize) -> &mut [u8] {
        let bytes = bytes.min(self.bytes);
        host_access(self.start.0, bytes, true);
        // SAFETY: as in `first`.
        unsafe { std::slice::from_raw_parts_mut(self.start.0, bytes) }
    }
}

impl Drop for Pinned {
    fn drop(&mut self) {
        if self.context.bind_to_drop() {
            // SAFETY: the memory was allocated in `new` and is freed once.
            let _ = unsafe { sys::cuMemFreeHost(self.start.0.cast()) };
        }
    }
}

/// Returns the free and the total memory of the device, in bytes. Requires the context to be bound.
pub(crate) fn free_and_total(context: &Context) -> Result<(usize, usize)> {
    let (mut free, mut total) = (0, 0);
    // SAFETY: the call writes to locals.
    context.check(unsafe { sys::cuMemGetInfo_v2(&mut free, &mut total) }, "cuMemGetInfo", &context.place())?;
    Ok((free, total))
}
