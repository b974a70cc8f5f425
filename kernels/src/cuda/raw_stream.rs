//! A CUDA stream's own things, that whoever puts work on it uses: the handle, launches, copies, events.
#![allow(unsafe_code)]

use std::ffi::c_void;
use std::sync::Arc;

use cudarc::driver::sys;

use super::context::{Context, Raw};
use super::event::Recorded;
use super::gpu::Gpu;
use super::memory::{destroy_stream, new_stream};
use super::module::Function;
use super::progress::Calls;
use super::test_delay::TestDelays;
use crate::error::KernelError;
use crate::metrics::CollectiveTimer;

/// Parameters that a kernel may have.
pub(crate) const PARAMETERS_MAX: usize = 32;

/// The largest distance of rows that a copy takes: what every GPU's `CU_DEVICE_ATTRIBUTE_MAX_PITCH` is.
const PITCH_MAX: u64 = i32::MAX as u64;

/// Rows of so many bytes at equal distances, on either side of a copy.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Rows {
    from: u64,
    to: u64,
    bytes: usize,
    count: usize,
    /// From row to row, of `from` and of `to`.
    pitch: (u64, u64),
}

impl Rows {
    /// A single one.
    pub(crate) fn one(from: u64, to: u64, bytes: usize) -> Self {
        Self { from, to, bytes, count: 1, pitch: (0, 0) }
    }

    /// Takes in the next row, which lies behind the others on both sides; false where its distance is another.
    pub(crate) fn take(&mut self, next: &Rows) -> bool {
        let first = (next.from - self.from, next.to - self.to);
        let pitch = if self.count == 1 { first } else { self.pitch };
        let count = self.count as u64;
        let fits = first == (pitch.0 * count, pitch.1 * count) && pitch.0.max(pitch.1) <= PITCH_MAX;
        if fits && next.bytes == self.bytes {
            (self.count, self.pitch) = (self.count + 1, pitch);
            return true;
        }
        false
    }
}

/// See the module. The stream is destroyed with it.
#[derive(Debug)]
pub(crate) struct RawStream {
    gpu: Arc<Gpu>,
    rank: usize,
    stream: Raw<sys::CUstream>,
    /// For errors.
    place: String,
    /// `None` where the GPU has no words left.
    calls: Option<Arc<Calls>>,
}

/// How a kernel is launched.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Geometry {
    pub(crate) grid: [u32; 3],
    pub(crate) block: [u32; 3],
    pub(crate) shared_bytes: u32,
}

impl RawStream {
    /// `urgent` gives it the greatest priority.
    pub(crate) fn new(gpu: &Arc<Gpu>, rank: usize, name: &str, urgent: bool) -> Result<Self, KernelError> {
        let place = format!("stream {name} of device {rank} on {}", gpu.place());
        gpu.context().bind()?;
        let (least, greatest) = gpu.priorities();
        let stream = new_stream(gpu.context(), if urgent { greatest } else { least }, &place)?;
        Ok(Self { gpu: gpu.clone(), rank, stream, place, calls: gpu.words().calls() })
    }

    pub(crate) fn gpu(&self) -> &Arc<Gpu> {
        &self.gpu
    }

    /// Of the device in the mesh.
    pub(crate) fn rank(&self) -> usize {
        self.rank
    }

    pub(crate) fn stream(&self) -> Raw<sys::CUstream> {
        self.stream
    }

    pub(crate) fn place(&self) -> &str {
        &self.place
    }

    fn check(&self, result: sys::CUresult, call: &'static str) -> Result<(), KernelError> {
        self.gpu.context().check(result, call, &self.place)
    }

    /// Launches a kernel. Each parameter is 8 bytes, of which the kernel takes as many as its own type has.
    ///
    /// The caller guarantees that the parameters are those that the kernel declares, and that addresses among them are of
    /// device memory that lives until the launch is done.
    pub(crate) fn launch(&self, function: Function, how: &Geometry, parameters: &[u64]) -> Result<(), KernelError> {
        let mut pointers = [std::ptr::null_mut::<c_void>(); PARAMETERS_MAX];
        debug_assert!(parameters.len() <= PARAMETERS_MAX);
        for (pointer, parameter) in pointers.iter_mut().zip(parameters) {
            *pointer = (&raw const *parameter).cast_mut().cast();
        }
        self.launch_with(function, how, &mut pointers[..parameters.len()])
    }

    /// Lets time pass on the stream before the next step, where a test asked for that.
    pub(crate) fn spin(&self) -> Result<(), KernelError> {
        let Some(cycles) = self.gpu.spins().and_then(TestDelays::next) else { return Ok(()) };
        let how = Geometry { grid: [1; 3], block: [1; 3], shared_bytes: 0 };
        self.launch(self.gpu.modules().function("spin", 0)?, &how, &[cycles])
    }

    /// As [`RawStream::launch`], with a pointer to each parameter.
    pub(crate) fn launch_with(
        &self,
        function: Function,
        how: &Geometry,
        pointers: &mut [*mut c_void],
    ) -> Result<(), KernelError> {
        let ([gx, gy, gz], [bx, by, bz]) = (how.grid, how.block);
        // SAFETY: live handles; the driver copies as many parameters as the kernel has, which the caller answers for.
        let result = unsafe {
            sys::cuLaunchKernel(
                function.handle.0,
                gx,
                gy,
                gz,
                bx,
                by,
                bz,
                how.shared_bytes,
                self.stream.0,
                pointers.as_mut_ptr(),
                std::ptr::null_mut(),
            )
        };
        self.check(result, "cuLaunchKernel")
    }

    /// Copies on the device; both ranges are the caller's to answer for.
    pub(crate) fn copy(&self, to: u64, from: u64, bytes: usize) -> Result<(), KernelError> {
        if bytes == 0 || to == from {
            return Ok(());
        }
        // SAFETY: ranges of device memory that live until the copy is done, by the caller.
        self.check(unsafe { sys::cuMemcpyDtoDAsync_v2(to, from, bytes, self.stream.0) }, "cuMemcpyDtoDAsync")
    }

    /// Copies from memory of another GPU, directly or through the host's, as the driver can.
    pub(crate) fn copy_from(&self, to: u64, source: &Context, from: u64, bytes: usize) -> Result<(), KernelError> {
        if bytes == 0 {
            return Ok(());
        }
        let own = self.gpu.context().raw();
        // SAFETY: ranges of device memory of these contexts that live until the copy is done, by the caller.
        let result = unsafe { sys::cuMemcpyPeerAsync(to, own, from, source.raw(), bytes, self.stream.0) };
        self.check(result, "cuMemcpyPeerAsync")
    }

    /// As [`RawStream::copy_from`], of rows, in one call.
    pub(crate) fn copy_rows_from(&self, source: &Context, rows: &Rows) -> Result<(), KernelError> {
        let &Rows { from, to, bytes, count, pitch } = rows;
        if count == 1 {
            return self.copy_from(to, source, from, bytes);
        }
        let what = sys::CUDA_MEMCPY3D_PEER {
            srcXInBytes: 0,
            srcY: 0,
            srcZ: 0,
            srcLOD: 0,
            srcMemoryType: sys::CUmemorytype::CU_MEMORYTYPE_DEVICE,
            srcHost: std::ptr::null(),
            srcDevice: from,
            srcArray: std::ptr::null_mut(),
            srcContext: source.raw(),
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
            dstContext: self.gpu.context().raw(),
            dstPitch: pitch.1 as usize,
            dstHeight: count,
            WidthInBytes: bytes,
            Height: count,
            Depth: 1,
        };
        // SAFETY: ranges of device memory of these contexts that live until the copy is done, by the caller; the driver has
        // read the description when the call returns.
        self.check(unsafe { sys::cuMemcpy3DPeerAsync(&what, self.stream.0) }, "cuMemcpy3DPeerAsync")
    }

    /// Copies to pinned memory of the host, which nobody touches until the event behind it is done (PINNED-1).
    pub(crate) fn copy_out(&self, to: *mut u8, from: u64, bytes: usize) -> Result<(), KernelError> {
        if bytes == 0 {
            return Ok(());
        }
        // SAFETY: both ranges live until the copy is done, by the caller.
        self.check(unsafe { sys::cuMemcpyDtoHAsync_v2(to.cast(), from, bytes, self.stream.0) }, "cuMemcpyDtoHAsync")
    }

    /// Copies from pinned memory of the host, which nobody writes until the event behind it is done (PINNED-1).
    pub(crate) fn copy_in(&self, to: u64, from: *const u8, bytes: usize) -> Result<(), KernelError> {
        if bytes == 0 {
            return Ok(());
        }
        // SAFETY: both ranges live until the copy is done, by the caller.
        self.check(unsafe { sys::cuMemcpyHtoDAsync_v2(to, from.cast(), bytes, self.stream.0) }, "cuMemcpyHtoDAsync")
    }

    /// Sets words.
    pub(crate) fn fill(&self, to: u64, word: u32, words: usize) -> Result<(), KernelError> {
        if words == 0 {
            return Ok(());
        }
        // SAFETY: a range of device memory that lives until the fill is done, by the caller.
        self.check(unsafe { sys::cuMemsetD32Async(to, word, words, self.stream.0) }, "cuMemsetD32Async")
    }

    /// Its calls of collectives and pipes.
    pub(crate) fn calls(&self) -> Option<&Arc<Calls>> {
        self.calls.as_ref()
    }

    /// Puts word on the stream that a call is next, whose time is told when it is over (PROGRESS-1).
    pub(crate) fn begin_call(&self, told: Option<CollectiveTimer>) -> Result<(), KernelError> {
        self.calls.as_ref().map_or(Ok(()), |calls| self.write_word(calls.begin(told)))
    }

    /// Puts word on the stream that the last call, which is on it, is over.
    pub(crate) fn end_call(&self) -> Result<(), KernelError> {
        self.calls.as_ref().map_or(Ok(()), |calls| self.write_word(calls.end()))
    }

    /// Writes a word of the GPU's pinned memory ([`Calls`]), as a whole; the poller looks for it.
    fn write_word(&self, (to, value): (u64, u32)) -> Result<(), KernelError> {
        // The call of today takes no other.
        let flags = sys::CUstreamWriteValue_flags::CU_STREAM_WRITE_VALUE_DEFAULT as u32;
        // SAFETY: an aligned word of the host's pinned memory that lives until the stream ends, by the caller.
        let written = unsafe { sys::cuStreamWriteValue32_v2(self.stream.0, to, value, flags) };
        self.gpu.poller().wake();
        self.check(written, "cuStreamWriteValue32")
    }

    /// Why a library's call failed: the driver's error, where the device is lost.
    pub(crate) fn why(&self, error: KernelError) -> KernelError {
        // SAFETY: the stream is there until this is dropped.
        let queried = self.check(unsafe { sys::cuStreamQuery(self.stream.0) }, "cuStreamQuery");
        queried.err().filter(|_| self.gpu.context().lost().is_some()).unwrap_or(error)
    }

    /// Waits for all that was put on the stream: for its end, when that has come already.
    pub(crate) fn synchronize(&self) -> Result<(), KernelError> {
        // SAFETY: the stream is there until this is dropped.
        self.check(unsafe { sys::cuStreamSynchronize(self.stream.0) }, "cuStreamSynchronize")
    }

    /// An event behind all that was put on the stream so far.
    pub(crate) fn record(&self) -> Result<Arc<Recorded>, KernelError> {
        self.gpu.events().record(self.stream, &self.place)
    }

    /// What is put on the stream from now on waits for the event.
    pub(crate) fn wait(&self, event: &Recorded) -> Result<(), KernelError> {
        event.wait_on(self.stream, &self.place)
    }
}

impl Drop for RawStream {
    fn drop(&mut self) {
        destroy_stream(self.gpu.context(), self.stream);
    }
}
