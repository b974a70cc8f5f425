//! A CUDA stream: the driver's handle, launches, copies, fills and events.
#![allow(unsafe_code)]

use std::ffi::c_void;
use std::sync::Arc;

use cudarc::driver::sys;

use super::context::{Context, Raw};
use super::event::Recorded;
use super::gpu::Gpu;
use super::memory::{destroy_stream, new_stream};
use super::module::Function;
use super::poller::{Completion, CompletionQueue};
use super::progress::CallProgress;
use super::test_delay::TestDelays;
use crate::error::{KernelError, Result};
use crate::metrics::CollectiveTimer;

pub(crate) const PARAMETERS_MAX: usize = 32;

/// Maximum row pitch of a copy, in bytes. Every GPU has this `CU_DEVICE_ATTRIBUTE_MAX_PITCH`.
const PITCH_MAX: u64 = i32::MAX as u64;

/// A copy of rows of equal size. In the source and in the destination, the distance between rows is constant.
#[derive(Clone, Copy, Debug)]
pub(crate) struct RowCopy {
    from: u64,
    to: u64,
    bytes: usize,
    count: usize,
    /// Pitch: the distance between rows in the source and in the destination, in bytes.
    pitch: (u64, u64),
}

impl RowCopy {
    pub(crate) fn one(from: u64, to: u64, bytes: usize) -> Self {
        Self { from, to, bytes, count: 1, pitch: (0, 0) }
    }

    /// Appends a row. Returns false, without effect, if the row has another size, or if the distance between rows would
    /// then vary or exceed [`PITCH_MAX`], in the source or in the destination.
    pub(crate) fn append(&mut self, next: &RowCopy) -> bool {
        let first = (next.from - self.from, next.to - self.to);
        let pitch = if self.count == 1 { first } else { self.pitch };
        let count = self.count as u64;
        let is_equidistant = first == (pitch.0 * count, pitch.1 * count) && pitch.0.max(pitch.1) <= PITCH_MAX;
        if is_equidistant && next.bytes == self.bytes {
            (self.count, self.pitch) = (self.count + 1, pitch);
            return true;
        }
        false
    }
}

#[derive(Debug)]
pub(crate) struct RawStream {
    pub(crate) gpu: Arc<Gpu>,
    pub(crate) rank: usize,
    pub(crate) handle: Raw<sys::CUstream>,
    /// The name of the stream in error messages.
    pub(crate) place: String,
    /// `None` if the GPU has no progress words left.
    pub(crate) call_progress: Option<Arc<CallProgress>>,
    completions: Arc<CompletionQueue>,
}

#[derive(Clone, Copy, Debug)]
pub(crate) struct Geometry {
    pub(crate) grid: [u32; 3],
    pub(crate) block: [u32; 3],
    pub(crate) shared_bytes: u32,
}

impl RawStream {
    /// Creates a stream; `urgent` gives it the greatest priority.
    pub(crate) fn new(gpu: &Arc<Gpu>, rank: usize, name: &str, urgent: bool) -> Result<Self> {
        let place = format!("stream {name} of device {rank} on {}", gpu.place());
        gpu.context.bind()?;
        let (least, greatest) = gpu.priorities;
        let handle = new_stream(&gpu.context, if urgent { greatest } else { least }, &place)?;
        let call_progress = gpu.progress_words.allocate();
        let completions = gpu.poller.register(&place, call_progress.as_ref());
        Ok(Self { gpu: gpu.clone(), rank, handle, place, call_progress, completions })
    }

    fn check(&self, result: sys::CUresult, call: &'static str) -> Result<()> {
        self.gpu.context.check(result, call, &self.place)
    }

    /// Launches a kernel. Each parameter occupies 8 bytes; the kernel reads only the bytes of the parameter's type. The
    /// caller guarantees that the types match, and that the device memory that parameters point to lives until the
    /// launch is done.
    pub(crate) fn launch(&self, function: Function, geometry: &Geometry, parameters: &[u64]) -> Result<()> {
        let mut pointers = [std::ptr::null_mut::<c_void>(); PARAMETERS_MAX];
        debug_assert!(parameters.len() <= PARAMETERS_MAX);
        for (pointer, parameter) in pointers.iter_mut().zip(parameters) {
            *pointer = (&raw const *parameter).cast_mut().cast();
        }
        let Geometry { grid: [gx, gy, gz], block: [bx, by, bz], shared_bytes } = *geometry;
        let (kernel, stream) = (function.handle.0, self.handle.0);
        let (parameters, none) = (pointers.as_mut_ptr(), std::ptr::null_mut());
        // SAFETY: the handles are live. The driver copies the parameters. By contract, these match the kernel.
        let result =
            unsafe { sys::cuLaunchKernel(kernel, gx, gy, gz, bx, by, bz, shared_bytes, stream, parameters, none) };
        self.check(result, "cuLaunchKernel")
    }

    /// Delays the stream before the next step if a test has requested delays.
    pub(crate) fn issue_test_delay(&self) -> Result<()> {
        let Some(cycles) = self.gpu.test_delays.as_ref().and_then(TestDelays::next) else { return Ok(()) };
        let geometry = Geometry { grid: [1; 3], block: [1; 3], shared_bytes: 0 };
        self.launch(self.gpu.modules.function("spin", 0)?, &geometry, &[cycles])
    }

    /// Copies on the device. The caller guarantees that both ranges are valid.
    pub(crate) fn copy(&self, to: u64, from: u64, bytes: usize) -> Result<()> {
        if bytes == 0 || to == from {
            return Ok(());
        }
        // SAFETY: the caller guarantees that both ranges are device memory that lives until the copy is done.
        self.check(unsafe { sys::cuMemcpyDtoDAsync_v2(to, from, bytes, self.handle.0) }, "cuMemcpyDtoDAsync")
    }

    pub(crate) fn is_on(&self, context: &Context) -> bool {
        std::ptr::eq(&*self.gpu.context, context)
    }

    /// Copies from memory of any GPU, directly or through host memory as the driver chooses.
    pub(crate) fn copy_from(&self, to: u64, source: &Context, from: u64, bytes: usize) -> Result<()> {
        if self.is_on(source) || bytes == 0 {
            return self.copy(to, from, bytes);
        }
        let own = self.gpu.context.handle.0;
        // SAFETY: the caller guarantees device memory of these two contexts that lives until the copy is done.
        let result = unsafe { sys::cuMemcpyPeerAsync(to, own, from, source.handle.0, bytes, self.handle.0) };
        self.check(result, "cuMemcpyPeerAsync")
    }

    pub(crate) fn copy_rows_from(&self, source: &Context, rows: &RowCopy) -> Result<()> {
        let &RowCopy { from, to, bytes, count, pitch } = rows;
        if count == 1 {
            return self.copy_from(to, source, from, bytes);
        }
        let description = sys::CUDA_MEMCPY3D_PEER {
            srcXInBytes: 0,
            srcY: 0,
            srcZ: 0,
            srcLOD: 0,
            srcMemoryType: sys::CUmemorytype::CU_MEMORYTYPE_DEVICE,
            srcHost: std::ptr::null(),
            srcDevice: from,
            srcArray: std::ptr::null_mut(),
            srcContext: source.handle.0,
            srcPitch: pitch.0 as usize,
            srcHeight: count,
            dstXInBytes: 0,
            dstY: 0,
            dstZ: 0,
            dstLOD: 0,
            dstMemoryType: sys::CUmemorytype::CU_MEMORYTYPE_DEVICE,
            dstHost: std::ptr::null_mut(),
            dstDevice: to,
            dstArray: std::ptr::null_mut(),
            dstContext: self.gpu.context.handle.0,
            dstPitch: pitch.1 as usize,
            dstHeight: count,
            WidthInBytes: bytes,
            Height: count,
            Depth: 1,
        };
        // SAFETY: the caller guarantees device memory of these two contexts that lives until the copy is done. The
        // driver has read the description when the call returns.
        self.check(unsafe { sys::cuMemcpy3DPeerAsync(&description, self.handle.0) }, "cuMemcpy3DPeerAsync")
    }

    /// Copies to pinned host memory, which nobody may access until an event after the copy is done (PINNED-1).
    pub(crate) fn copy_out(&self, to: *mut u8, from: u64, bytes: usize) -> Result<()> {
        if bytes == 0 {
            return Ok(());
        }
        // SAFETY: the caller guarantees that both ranges live until the copy is done.
        self.check(unsafe { sys::cuMemcpyDtoHAsync_v2(to.cast(), from, bytes, self.handle.0) }, "cuMemcpyDtoHAsync")
    }

    /// Copies from pinned host memory, which nobody may write until an event after the copy is done (PINNED-1).
    pub(crate) fn copy_in(&self, to: u64, from: *const u8, bytes: usize) -> Result<()> {
        if bytes == 0 {
            return Ok(());
        }
        // SAFETY: the caller guarantees that both ranges live until the copy is done.
        self.check(unsafe { sys::cuMemcpyHtoDAsync_v2(to, from.cast(), bytes, self.handle.0) }, "cuMemcpyHtoDAsync")
    }

    pub(crate) fn fill(&self, to: u64, word: u32, words: usize) -> Result<()> {
        if words == 0 {
            return Ok(());
        }
        // SAFETY: the caller guarantees that the range is device memory that lives until the fill is done.
        self.check(unsafe { sys::cuMemsetD32Async(to, word, words, self.handle.0) }, "cuMemsetD32Async")
    }

    /// Marks on the stream that a call begins. `timer` receives the call's time after the call has ended (PROGRESS-1).
    pub(crate) fn begin_call(&self, timer: Option<CollectiveTimer>) -> Result<()> {
        self.call_progress.as_ref().map_or(Ok(()), |call_progress| self.write_word(call_progress.begin(timer)))
    }

    /// Marks the end of the last call on the stream. The caller has waited until the call itself is on the stream.
    pub(crate) fn end_call(&self) -> Result<()> {
        self.call_progress.as_ref().map_or(Ok(()), |call_progress| self.write_word(call_progress.end()))
    }

    /// Makes the stream write a progress word ([`CallProgress`]), which the poller reads.
    fn write_word(&self, (to, value): (u64, u32)) -> Result<()> {
        // The only flag that the call accepts.
        let flags = sys::CUstreamWriteValue_flags::CU_STREAM_WRITE_VALUE_DEFAULT as u32;
        // SAFETY: `to` is an aligned word of pinned host memory. `ProgressWords` outlive all streams that write them.
        let result = unsafe { sys::cuStreamWriteValue32_v2(self.handle.0, to, value, flags) };
        self.gpu.poller.wake();
        self.check(result, "cuStreamWriteValue32")
    }

    /// Returns the root cause of a failed library call: the driver's error if the device is lost, else `error`.
    pub(crate) fn root_cause(&self, error: KernelError) -> KernelError {
        // SAFETY: the stream lives as long as `self`.
        let result = self.check(unsafe { sys::cuStreamQuery(self.handle.0) }, "cuStreamQuery");
        result.err().filter(|_| self.gpu.context.lost().is_some()).unwrap_or(error)
    }

    pub(crate) fn synchronize(&self) -> Result<()> {
        // SAFETY: the stream lives as long as `self`.
        self.check(unsafe { sys::cuStreamSynchronize(self.handle.0) }, "cuStreamSynchronize")
    }

    /// Records an event after all work that was put on the stream so far.
    pub(crate) fn record(&self) -> Result<Arc<Recorded>> {
        self.gpu.events.record(self.handle, &self.place)
    }

    /// Reports the completion when `after`, an event of this stream, is done.
    pub(crate) fn report(&self, after: Arc<Recorded>, completion: Completion) {
        self.gpu.poller.push(&self.completions, after, completion);
    }

    /// Reports the completion when all work that was put on the stream so far is done.
    pub(crate) fn report_end(&self, completion: Completion) -> Result<()> {
        self.record().map(|after| self.report(after, completion))
    }

    pub(crate) fn is_idle(&self) -> bool {
        self.gpu.poller.is_idle(&self.completions)
    }

    /// Stops reports. Pending completions fail with `cause`.
    pub(crate) fn close(&self, cause: &KernelError) {
        self.gpu.poller.unregister(&self.completions, cause);
    }

    pub(crate) fn wait(&self, event: &Recorded) -> Result<()> {
        event.wait_on(self.handle, &self.place)
    }
}

impl Drop for RawStream {
    fn drop(&mut self) {
        destroy_stream(&self.gpu.context, self.handle);
    }
}
