//! Device memory, pinned host memory, and synchronous copies between host and device through a pinned buffer on a
//! dedicated stream.
//!
//! - PINNED-1: nobody accesses the part of a pinned buffer that a copy in progress uses. [`HostTransfer`] waits for
//!   each piece before the next; streams wait for the event recorded after a copy before they reuse a buffer.
#![allow(unsafe_code)]

use std::fmt;
use std::sync::Arc;
use std::sync::atomic::Ordering;

use cudarc::driver::sys::{self, CUresult};

use super::context::{Context, Raw};
use super::gpu::Gpu;
use crate::clock::{RaceClock, ReleaseClocks, host_access};
use crate::error::KernelError;
use crate::memory::Tally;

/// Size of the pinned buffer for host copies, in bytes.
const PIECE_BYTES: usize = 4 << 20;

/// An allocation of device memory.
pub(crate) struct DeviceMemory {
    gpu: Arc<Gpu>,
    /// Rank of the device in the session's mesh.
    rank: usize,
    address: u64,
    bytes: usize,
    tally: Arc<Tally>,
    /// Captured when the memory was zeroed.
    zeroed: RaceClock,
    /// Captured each time that a submission released the memory.
    releases: ReleaseClocks,
}

impl fmt::Debug for DeviceMemory {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("DeviceMemory").field("rank", &self.rank).field("bytes", &self.bytes).finish()
    }
}

impl DeviceMemory {
    /// Records that a submission no longer uses the memory, as the calling thread knows.
    pub(crate) fn mark_released(&self) {
        self.releases.add();
    }

    /// Allocates zeroed memory and counts it in `tally`. Nothing else allocates device memory, so the tally is
    /// complete.
    ///
    /// # Errors
    /// [`KernelError::OutOfMemory`], [`KernelError::Cuda`].
    pub(crate) fn new(gpu: &Arc<Gpu>, rank: usize, bytes: usize, tally: &Arc<Tally>) -> Result<Self, KernelError> {
        let (mut address, place) = (0, gpu.place());
        if bytes > 0 {
            let transfer = gpu.transfer().lock();
            gpu.context().bind()?;
            // Not from a memory pool: other GPUs cannot access pool memory, whatever peer access the contexts have.
            // SAFETY: writes an address to a local.
            let result = unsafe { sys::cuMemAlloc_v2(&mut address, bytes) };
            if result == CUresult::CUDA_ERROR_OUT_OF_MEMORY || result == CUresult::CUDA_ERROR_INVALID_VALUE {
                return Err(KernelError::OutOfMemory { device: rank, bytes });
            }
            gpu.context().check(result, "cuMemAlloc", &place)?;
            // SAFETY: the range was just allocated.
            let result = unsafe { sys::cuMemsetD8Async(address, 0, bytes, transfer.stream.0) };
            gpu.context().check(result, "cuMemsetD8Async", &place)?;
            transfer.wait(gpu.context())?;
        }
        tally.add(bytes);
        Ok(Self {
            gpu: gpu.clone(),
            rank,
            address,
            bytes,
            tally: tally.clone(),
            zeroed: RaceClock::capture(),
            releases: ReleaseClocks::default(),
        })
    }

    pub(crate) fn bytes(&self) -> usize {
        self.bytes
    }

    /// Device address of the first byte.
    pub(crate) fn address(&self) -> u64 {
        self.zeroed.join();
        self.address
    }

    /// The GPU that holds the memory.
    pub(crate) fn gpu(&self) -> &Arc<Gpu> {
        &self.gpu
    }

    /// Device and GPU, as error messages name them.
    pub(crate) fn place(&self) -> String {
        format!("device {} on {}", self.rank, self.gpu.place())
    }

    /// Copies host bytes to `offset`, which the caller has checked, and waits for the copy.
    pub(crate) fn write(&self, offset: usize, bytes: &[u8]) -> Result<(), KernelError> {
        let mut rest = bytes;
        self.write_pieces(offset, bytes.len(), |piece| {
            let (current, later) = rest.split_at(piece.len());
            piece.copy_from_slice(current);
            rest = later;
            Ok(())
        })
    }

    /// Copies bytes from `offset`, which the caller has checked, to the host.
    pub(crate) fn read(&self, offset: usize, bytes: &mut [u8]) -> Result<(), KernelError> {
        let mut at = 0;
        self.read_pieces(offset, bytes.len(), |piece| {
            bytes[at..at + piece.len()].copy_from_slice(piece);
            at += piece.len();
            Ok(())
        })
    }

    /// Writes `bytes` bytes from `offset` on, in pieces that `fill` provides.
    pub(crate) fn write_pieces<E: From<KernelError>>(
        &self,
        offset: usize,
        bytes: usize,
        mut fill: impl FnMut(&mut [u8]) -> Result<(), E>,
    ) -> Result<(), E> {
        let mut transfer = self.gpu.transfer().lock();
        self.gpu.context().bind()?;
        transfer.released.join();
        for at in (0..bytes).step_by(PIECE_BYTES) {
            let piece = PIECE_BYTES.min(bytes - at);
            fill(transfer.pinned.first_mut(piece))?;
            let (to, from) = (self.address() + (offset + at) as u64, transfer.pinned.start.0);
            // SAFETY: the range is inside this memory; the pinned buffer holds the piece until the wait below
            // (PINNED-1).
            let result = unsafe { sys::cuMemcpyHtoDAsync_v2(to, from.cast(), piece, transfer.stream.0) };
            self.gpu.context().check(result, "cuMemcpyHtoDAsync", &self.gpu.place())?;
            transfer.wait(self.gpu.context())?;
        }
        transfer.released = RaceClock::capture();
        Ok(())
    }

    /// Reads `bytes` bytes from `offset` on and passes each piece to `take`.
    pub(crate) fn read_pieces<E: From<KernelError>>(
        &self,
        offset: usize,
        bytes: usize,
        mut take: impl FnMut(&[u8]) -> Result<(), E>,
    ) -> Result<(), E> {
        let mut transfer = self.gpu.transfer().lock();
        self.gpu.context().bind()?;
        transfer.released.join();
        for at in (0..bytes).step_by(PIECE_BYTES) {
            let piece = PIECE_BYTES.min(bytes - at);
            let (to, from) = (transfer.pinned.start.0, self.address() + (offset + at) as u64);
            // SAFETY: see `write_pieces`.
            let result = unsafe { sys::cuMemcpyDtoHAsync_v2(to.cast(), from, piece, transfer.stream.0) };
            self.gpu.context().check(result, "cuMemcpyDtoHAsync", &self.gpu.place())?;
            transfer.wait(self.gpu.context())?;
            take(transfer.pinned.first(piece))?;
        }
        transfer.released = RaceClock::capture();
        Ok(())
    }
}

impl Drop for DeviceMemory {
    fn drop(&mut self) {
        self.tally.bytes.fetch_sub(self.bytes, Ordering::Relaxed);
        self.releases.join();
        if self.bytes > 0 && self.gpu.context().bind_to_drop() {
            // SAFETY: allocated in `new`, freed once. No work uses it: submissions keep their arenas until they end.
            // The context has kept any lasting error.
            let result = unsafe { sys::cuMemFree_v2(self.address) };
            let _ = self.gpu.context().check(result, "cuMemFree", &self.gpu.place());
        }
    }
}

/// The stream and pinned buffer for host copies, which run one at a time.
#[derive(Debug)]
pub(crate) struct HostTransfer {
    context: Arc<Context>,
    stream: Raw<sys::CUstream>,
    pinned: Pinned,
    /// Captured by the last user when it was done.
    released: RaceClock,
}

impl HostTransfer {
    /// Requires the context to be bound.
    pub(crate) fn new(context: &Arc<Context>) -> Result<Self, KernelError> {
        let pinned = Pinned::new(context, PIECE_BYTES)?;
        Ok(Self {
            context: context.clone(),
            stream: new_stream(context, 0, &context.place())?,
            pinned,
            released: RaceClock::default(),
        })
    }

    fn wait(&self, context: &Context) -> Result<(), KernelError> {
        // SAFETY: the stream is live.
        let result = unsafe { sys::cuStreamSynchronize(self.stream.0) };
        context.check(result, "cuStreamSynchronize", &context.place())
    }
}

impl Drop for HostTransfer {
    fn drop(&mut self) {
        self.released.join();
        destroy_stream(&self.context, self.stream);
    }
}

/// Creates a stream that does not synchronize with the default stream. Requires the context to be bound.
pub(crate) fn new_stream(context: &Context, priority: i32, place: &str) -> Result<Raw<sys::CUstream>, KernelError> {
    let mut stream = std::ptr::null_mut();
    let flags = sys::CUstream_flags::CU_STREAM_NON_BLOCKING as u32;
    // SAFETY: writes a handle to a local.
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

/// Zeroed page-locked host memory; not write-combined, since the host also reads it.
#[derive(Debug)]
pub(crate) struct Pinned {
    context: Arc<Context>,
    start: Raw<*mut u8>,
    bytes: usize,
}

impl Pinned {
    /// Allocates at least one byte. Requires the context to be bound.
    pub(crate) fn new(context: &Arc<Context>, bytes: usize) -> Result<Self, KernelError> {
        let mut start = std::ptr::null_mut();
        let bytes = bytes.max(1);
        // SAFETY: writes an address to a local.
        let result = unsafe { sys::cuMemHostAlloc(&mut start, bytes, sys::CU_MEMHOSTALLOC_PORTABLE) };
        context.check(result, "cuMemHostAlloc", &context.place())?;
        let start = start.cast::<u8>();
        // SAFETY: just allocated with this size.
        unsafe { start.write_bytes(0, bytes) };
        Ok(Self { context: context.clone(), start: Raw(start), bytes })
    }

    pub(crate) fn bytes(&self) -> usize {
        self.bytes
    }

    /// Address of the first byte.
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
        // SAFETY: see `first`.
        unsafe { std::slice::from_raw_parts_mut(self.start.0, bytes) }
    }
}

impl Drop for Pinned {
    fn drop(&mut self) {
        if self.context.bind_to_drop() {
            // SAFETY: allocated in `new`, freed once.
            let _ = unsafe { sys::cuMemFreeHost(self.start.0.cast()) };
        }
    }
}

/// Free and total bytes of the device. Requires the context to be bound.
pub(crate) fn free_and_total(context: &Context) -> Result<(usize, usize), KernelError> {
    let (mut free, mut total) = (0, 0);
    // SAFETY: writes to locals.
    context.check(unsafe { sys::cuMemGetInfo_v2(&mut free, &mut total) }, "cuMemGetInfo", &context.place())?;
    Ok((free, total))
}
