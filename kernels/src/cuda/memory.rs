//! Memory of a GPU, pinned memory of the host, and copies between them that the host waits for: by way of a pinned buffer,
//! on a stream of their own.
//!
//! - PINNED-1: while a copy is under way nobody touches its part of a pinned buffer: [`Transfer`] waits for each piece
//!   before it goes on, and streams wait for the event behind a copy before they use a buffer again.
#![allow(unsafe_code)]

use std::fmt;
use std::sync::atomic::Ordering;
use std::sync::{Arc, PoisonError};

use cudarc::driver::sys::{self, CUresult};

use super::context::{Context, Raw};
use super::gpu::Gpu;
use crate::clock::{RaceClock, ReleaseClocks, host_access};
use crate::error::KernelError;
use crate::memory::Tally;

/// Bytes of the buffer by which the host's copies go.
const PIECE_BYTES: usize = 4 << 20;

/// A piece of a GPU's memory.
pub(crate) struct DeviceMemory {
    gpu: Arc<Gpu>,
    /// Of the device in the session's mesh.
    rank: usize,
    address: u64,
    bytes: usize,
    tally: Arc<Tally>,
    /// When it was zeroed.
    made: RaceClock,
    /// When submissions were done with it.
    used: ReleaseClocks,
}

impl fmt::Debug for DeviceMemory {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("DeviceMemory").field("rank", &self.rank).field("bytes", &self.bytes).finish()
    }
}

impl DeviceMemory {
    /// A submission has done with it, as the calling thread knows.
    pub(crate) fn let_go(&self) {
        self.used.add();
    }

    /// Zeroed memory that is counted in `tally`: the only way to have memory of a GPU, so what is counted is all.
    ///
    /// # Errors
    /// [`KernelError::OutOfMemory`], [`KernelError::Cuda`].
    pub(crate) fn new(gpu: &Arc<Gpu>, rank: usize, bytes: usize, tally: &Arc<Tally>) -> Result<Self, KernelError> {
        let (mut address, place) = (0, gpu.place());
        if bytes > 0 {
            let transfer = gpu.transfer().lock().unwrap_or_else(PoisonError::into_inner);
            gpu.context().bind()?;
            // Of no pool: what a pool gives is closed to other GPUs, whatever peer access the contexts have.
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
            made: RaceClock::capture(),
            used: ReleaseClocks::default(),
        })
    }

    pub(crate) fn bytes(&self) -> usize {
        self.bytes
    }

    /// The address of its first byte on the device.
    pub(crate) fn address(&self) -> u64 {
        self.made.join();
        self.address
    }

    /// The GPU that it is of.
    pub(crate) fn gpu(&self) -> &Arc<Gpu> {
        &self.gpu
    }

    /// Whose it is, for errors.
    pub(crate) fn place(&self) -> String {
        format!("device {} on {}", self.rank, self.gpu.place())
    }

    /// Copies bytes of the host to `offset`, which the caller has checked, and waits.
    pub(crate) fn write(&self, offset: usize, bytes: &[u8]) -> Result<(), KernelError> {
        let mut rest = bytes;
        self.write_pieces(offset, bytes.len(), |piece| {
            let (now, later) = rest.split_at(piece.len());
            piece.copy_from_slice(now);
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

    /// Fills `bytes` bytes from `offset` on with what `fill` puts into each piece.
    pub(crate) fn write_pieces<E: From<KernelError>>(
        &self,
        offset: usize,
        bytes: usize,
        mut fill: impl FnMut(&mut [u8]) -> Result<(), E>,
    ) -> Result<(), E> {
        let mut transfer = self.gpu.transfer().lock().unwrap_or_else(PoisonError::into_inner);
        self.gpu.context().bind()?;
        transfer.handed.join();
        for at in (0..bytes).step_by(PIECE_BYTES) {
            let piece = PIECE_BYTES.min(bytes - at);
            fill(transfer.pinned.first_mut(piece))?;
            let (to, from) = (self.address() + (offset + at) as u64, transfer.pinned.start.0);
            // SAFETY: the range is inside this memory and the pinned buffer holds the piece, which is waited for (PINNED-1).
            let result = unsafe { sys::cuMemcpyHtoDAsync_v2(to, from.cast(), piece, transfer.stream.0) };
            self.gpu.context().check(result, "cuMemcpyHtoDAsync", &self.gpu.place())?;
            transfer.wait(self.gpu.context())?;
        }
        transfer.handed = RaceClock::capture();
        Ok(())
    }

    /// Gives `take` each piece of `bytes` bytes from `offset` on.
    pub(crate) fn read_pieces<E: From<KernelError>>(
        &self,
        offset: usize,
        bytes: usize,
        mut take: impl FnMut(&[u8]) -> Result<(), E>,
    ) -> Result<(), E> {
        let mut transfer = self.gpu.transfer().lock().unwrap_or_else(PoisonError::into_inner);
        self.gpu.context().bind()?;
        transfer.handed.join();
        for at in (0..bytes).step_by(PIECE_BYTES) {
            let piece = PIECE_BYTES.min(bytes - at);
            let (to, from) = (transfer.pinned.start.0, self.address() + (offset + at) as u64);
            // SAFETY: as in `write_pieces`.
            let result = unsafe { sys::cuMemcpyDtoHAsync_v2(to.cast(), from, piece, transfer.stream.0) };
            self.gpu.context().check(result, "cuMemcpyDtoHAsync", &self.gpu.place())?;
            transfer.wait(self.gpu.context())?;
            take(transfer.pinned.first(piece))?;
        }
        transfer.handed = RaceClock::capture();
        Ok(())
    }
}

impl Drop for DeviceMemory {
    fn drop(&mut self) {
        self.tally.bytes.fetch_sub(self.bytes, Ordering::Relaxed);
        self.used.join();
        if self.bytes > 0 && self.gpu.context().bind_to_drop() {
            // SAFETY: allocated in `new`, freed once. Whoever used it has waited for its end: submissions keep their arenas
            // until then. An error has been kept by the context, if it was one that lasts.
            let result = unsafe { sys::cuMemFree_v2(self.address) };
            let _ = self.gpu.context().check(result, "cuMemFree", &self.gpu.place());
        }
    }
}

/// The stream and the buffer of the host's copies, which are done one at a time.
#[derive(Debug)]
pub(crate) struct Transfer {
    context: Arc<Context>,
    stream: Raw<sys::CUstream>,
    pinned: Pinned,
    /// When the last who used it was done.
    handed: RaceClock,
}

impl Transfer {
    /// The context is bound.
    pub(crate) fn new(context: &Arc<Context>) -> Result<Self, KernelError> {
        let pinned = Pinned::new(context, PIECE_BYTES)?;
        Ok(Self {
            context: context.clone(),
            stream: new_stream(context, 0, &context.place())?,
            pinned,
            handed: RaceClock::default(),
        })
    }

    fn wait(&self, context: &Context) -> Result<(), KernelError> {
        // SAFETY: a live stream.
        let result = unsafe { sys::cuStreamSynchronize(self.stream.0) };
        context.check(result, "cuStreamSynchronize", &context.place())
    }
}

impl Drop for Transfer {
    fn drop(&mut self) {
        self.handed.join();
        destroy_stream(&self.context, self.stream);
    }
}

/// A stream that does not wait for the default one. The context is bound.
pub(crate) fn new_stream(context: &Context, priority: i32, place: &str) -> Result<Raw<sys::CUstream>, KernelError> {
    let mut stream = std::ptr::null_mut();
    let flags = sys::CUstream_flags::CU_STREAM_NON_BLOCKING as u32;
    // SAFETY: writes a handle to a local.
    let result = unsafe { sys::cuStreamCreateWithPriority(&mut stream, flags, priority) };
    context.check(result, "cuStreamCreateWithPriority", &place)?;
    Ok(Raw(stream))
}

/// Destroys what [`new_stream`] made; what is still on it is done all the same.
pub(crate) fn destroy_stream(context: &Context, stream: Raw<sys::CUstream>) {
    if context.bind_to_drop() {
        // SAFETY: the caller made it, and uses it no more.
        let _ = unsafe { sys::cuStreamDestroy_v2(stream.0) };
    }
}

/// Page-locked memory of the host, zeroed; not write-combined, since the host reads it too.
#[derive(Debug)]
pub(crate) struct Pinned {
    context: Arc<Context>,
    start: Raw<*mut u8>,
    bytes: usize,
}

impl Pinned {
    /// The context is bound. At least a byte.
    pub(crate) fn new(context: &Arc<Context>, bytes: usize) -> Result<Self, KernelError> {
        let mut start = std::ptr::null_mut();
        let bytes = bytes.max(1);
        // SAFETY: writes an address to a local.
        let result = unsafe { sys::cuMemHostAlloc(&mut start, bytes, sys::CU_MEMHOSTALLOC_PORTABLE) };
        context.check(result, "cuMemHostAlloc", &context.place())?;
        let start = start.cast::<u8>();
        // SAFETY: just allocated, of this size.
        unsafe { start.write_bytes(0, bytes) };
        Ok(Self { context: context.clone(), start: Raw(start), bytes })
    }

    pub(crate) fn bytes(&self) -> usize {
        self.bytes
    }

    /// Where it begins.
    pub(crate) fn start(&self) -> *mut u8 {
        self.start.0
    }

    /// The first so many bytes, to which nothing is being copied (PINNED-1).
    pub(crate) fn first(&self, bytes: usize) -> &[u8] {
        let bytes = bytes.min(self.bytes);
        host_access(self.start.0, bytes, false);
        // SAFETY: at least so many bytes from `start` on are ours, and initialised.
        unsafe { std::slice::from_raw_parts(self.start.0, bytes) }
    }

    /// The first so many bytes, to which and from which nothing is being copied (PINNED-1).
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
            // SAFETY: allocated in `new`, freed once.
            let _ = unsafe { sys::cuMemFreeHost(self.start.0.cast()) };
        }
    }
}

/// Bytes that nobody uses, and all bytes. The context is bound.
pub(crate) fn free_and_total(context: &Context) -> Result<(usize, usize), KernelError> {
    let (mut free, mut total) = (0, 0);
    // SAFETY: writes to locals.
    context.check(unsafe { sys::cuMemGetInfo_v2(&mut free, &mut total) }, "cuMemGetInfo", &context.place())?;
    Ok((free, total))
}
