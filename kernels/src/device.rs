//! Devices, which create arenas and streams.

use std::sync::Arc;
use std::sync::atomic::Ordering;

use crate::collective::Collective;
use crate::cpu::scratch;
use crate::cpu::stream::CpuStream;
use crate::cuda::device_memory::DeviceMemory;
use crate::cuda::gpu::Gpu;
use crate::cuda::lower;
use crate::cuda::memory::Pinned;
use crate::cuda::step::ErrorRecord;
use crate::cuda::stream::CudaStream;
use crate::error::{KernelError, Result};
use crate::memory::{Arena, Tally};
use crate::op::Launch;
use crate::stream::{Stream, StreamBackend};

/// One device of a session's mesh. All clones are the same device.
#[derive(Clone, Debug)]
pub struct Device(Arc<Inner>);

#[derive(Debug)]
struct Inner {
    rank: usize,
    engine: Arc<dyn Collective>,
    tally: Arc<Tally>,
    backend: Backend,
}

#[derive(Debug)]
enum Backend {
    Cpu { threads_per_stream: usize },
    Cuda(Arc<Gpu>),
}

/// Device kinds; all devices of a plan have the same kind.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub enum DeviceKind {
    /// CPU cores.
    #[default]
    Cpu,
    /// GPUs.
    Cuda,
}

impl std::fmt::Display for DeviceKind {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(match self {
            DeviceKind::Cpu => "cpu",
            DeviceKind::Cuda => "cuda",
        })
    }
}

impl DeviceKind {
    /// Size in bytes of the workspace that a launch needs in the plan's arena. It is the same on every machine.
    pub fn workspace_bytes(self, launch: &Launch) -> usize {
        match self {
            DeviceKind::Cpu => 0,
            DeviceKind::Cuda => lower::workspace_bytes(launch),
        }
    }

    /// Scratch bytes of a launch on a stream of `threads` threads. A stream allocates the maximum over its launches.
    pub fn scratch_bytes(self, launch: &Launch, threads: usize) -> usize {
        match self {
            DeviceKind::Cpu => scratch::bytes(launch, threads),
            DeviceKind::Cuda => 0,
        }
    }

    /// Size in bytes of the device memory that each stream allocates, independent of its launches.
    pub fn stream_bytes(self) -> usize {
        match self {
            DeviceKind::Cpu => 0,
            DeviceKind::Cuda => ErrorRecord::BYTES,
        }
    }
}

/// Scheduling priority of a stream on its device.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Priority {
    /// For layers and copies.
    #[default]
    Normal,
    /// For work that other devices wait for: collectives that overlap with compute. CPU streams ignore priorities.
    High,
}

impl Device {
    fn new(rank: usize, engine: Arc<dyn Collective>, backend: Backend) -> Self {
        Self(Arc::new(Inner { rank, engine, tally: Arc::default(), backend }))
    }

    /// Creates a CPU device with a collective engine, and `threads_per_stream` threads (1 or more) per compute stream.
    pub fn cpu(rank: usize, threads_per_stream: usize, engine: Arc<dyn Collective>) -> Self {
        Self::new(rank, engine, Backend::Cpu { threads_per_stream: threads_per_stream.max(1) })
    }

    /// Creates a device on a GPU. Several devices may share the GPU. If `engine` is not made for GPUs, it works on
    /// copies in host memory.
    pub fn cuda(rank: usize, gpu: Arc<Gpu>, engine: Arc<dyn Collective>) -> Self {
        Self::new(rank, engine, Backend::Cuda(gpu))
    }

    /// Allocates `bytes` bytes of zeroed memory.
    ///
    /// # Errors
    /// [`KernelError::OutOfMemory`]; [`KernelError::Cuda`].
    pub fn arena(&self, bytes: usize) -> Result<Arena> {
        let Inner { rank, tally, backend, .. } = &*self.0;
        match backend {
            Backend::Cpu { .. } => Arena::host(*rank, bytes, tally),
            Backend::Cuda(gpu) => DeviceMemory::new(gpu, *rank, bytes, tally).map(Arena::on_device),
        }
    }

    /// Allocates `bytes` bytes of zeroed memory that other processes of the node can map ([`Arena::descriptor`]).
    ///
    /// # Errors
    /// [`KernelError::OutOfMemory`]; [`KernelError::Arguments`] for a GPU, whose memory other processes cannot map.
    pub fn shared_arena(&self, bytes: usize) -> Result<Arena> {
        match &self.0.backend {
            Backend::Cpu { .. } => Arena::shared(self.0.rank, bytes, &self.0.tally),
            Backend::Cuda(gpu) => {
                let got = format!("memory of {}", gpu.place());
                Err(KernelError::arguments("shared_arena", "memory", "memory that other processes can map", got))
            }
        }
    }

    /// Allocates `bytes` bytes of zeroed host memory that the device's streams copy from and to ([`Op::Copy`]). For a
    /// GPU, the memory is pinned, and does not count as memory of the device.
    ///
    /// [`Op::Copy`]: crate::op::Op::Copy
    ///
    /// # Errors
    /// [`KernelError::OutOfMemory`]; [`KernelError::Cuda`].
    pub fn staging(&self, bytes: usize) -> Result<Arena> {
        match &self.0.backend {
            Backend::Cpu { .. } => self.arena(bytes),
            Backend::Cuda(gpu) => {
                gpu.context.bind()?;
                Pinned::new(&gpu.context, bytes).map(Pinned::into_arena)
            }
        }
    }

    /// Starts a stream with 1 to [`crate::cpu::THREADS_MAX`] threads for each kernel. `name` names the stream's thread.
    ///
    /// # Errors
    /// [`KernelError::Thread`] when the system cannot start a thread; [`KernelError::Arguments`] for too many threads.
    pub fn stream(&self, name: &str, threads: usize) -> Result<Stream> {
        self.stream_with(name, threads, self.0.engine.clone(), Priority::Normal)
    }

    /// Like [`Device::stream`], but with a given priority and collective engine. This engine replaces the device's
    /// engine for this stream, so the caller can create the engine after the arenas. GPUs ignore `threads`.
    ///
    /// # Errors
    /// As [`Device::stream`].
    pub fn stream_with(
        &self,
        name: &str,
        threads: usize,
        engine: Arc<dyn Collective>,
        priority: Priority,
    ) -> Result<Stream> {
        let Inner { rank, tally, backend, .. } = &*self.0;
        match backend {
            Backend::Cpu { .. } => {
                CpuStream::start(name, *rank, threads, engine, tally.clone()).map(StreamBackend::Cpu).map(Stream)
            }
            Backend::Cuda(gpu) => {
                let is_urgent = priority == Priority::High;
                CudaStream::start(gpu, *rank, name, is_urgent, engine, tally).map(StreamBackend::Cuda).map(Stream)
            }
        }
    }

    /// The device's kind.
    pub fn kind(&self) -> DeviceKind {
        match &self.0.backend {
            Backend::Cpu { .. } => DeviceKind::Cpu,
            Backend::Cuda(_) => DeviceKind::Cuda,
        }
    }

    /// The device's rank in the session's mesh.
    pub fn rank(&self) -> usize {
        self.0.rank
    }

    /// Number of threads of a compute stream.
    pub fn threads_per_stream(&self) -> usize {
        match &self.0.backend {
            Backend::Cpu { threads_per_stream } => *threads_per_stream,
            Backend::Cuda(_) => 1,
        }
    }

    /// The collective engine of the device's streams.
    pub fn engine(&self) -> &Arc<dyn Collective> {
        &self.0.engine
    }

    /// Counters of the backend, by name. A GPU's counters cover the whole GPU, which other devices may share.
    pub fn counts(&self) -> Vec<(&'static str, u64)> {
        match &self.0.backend {
            Backend::Cpu { .. } => Vec::new(),
            Backend::Cuda(gpu) => gpu.counts(),
        }
    }

    /// Total size in bytes of the device's live arenas, including the arenas that its streams allocate for themselves.
    pub fn bytes_allocated(&self) -> usize {
        self.0.tally.bytes.load(Ordering::Relaxed)
    }

    /// Peak of [`Device::bytes_allocated`].
    pub fn bytes_peak(&self) -> usize {
        self.0.tally.bytes_peak.load(Ordering::Relaxed)
    }

    /// Number of arenas allocated so far, including those of streams. It stays constant after a plan is loaded.
    pub fn allocation_count(&self) -> usize {
        self.0.tally.allocations.load(Ordering::Relaxed)
    }
}
