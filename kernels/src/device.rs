//! Devices, which create arenas and streams.

use std::sync::Arc;
use std::sync::atomic::Ordering;

use crate::collective::Collective;
use crate::cpu::device::CpuDevice;
use crate::cpu::scratch;
use crate::cuda::device::CudaDevice;
use crate::cuda::gpu::Gpu;
use crate::cuda::lower;
use crate::cuda::step::ErrorRecord;
use crate::error::KernelError;
use crate::memory::{Arena, Tally};
use crate::op::Launch;
use crate::stream::Stream;

/// One device of a session's mesh. Clones are the same device.
#[derive(Clone, Debug)]
pub enum Device {
    /// Some cores of this process, with their own memory.
    Cpu(Arc<CpuDevice>),
    /// A GPU, or a share of a GPU.
    Cuda(Arc<CudaDevice>),
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
    /// Bytes of workspace that a launch needs in the plan's arena, from the shapes of its buffers: the same on every
    /// machine.
    pub fn workspace_bytes(self, launch: &Launch) -> usize {
        match self {
            DeviceKind::Cpu => 0,
            DeviceKind::Cuda => lower::workspace_bytes(launch),
        }
    }

    /// Bytes of scratch memory that a stream of `threads` threads allocates to run a launch. A stream allocates the
    /// maximum over its prepared launches.
    pub fn scratch_bytes(self, launch: &Launch, threads: usize) -> usize {
        match self {
            DeviceKind::Cpu => scratch::bytes(launch, threads),
            DeviceKind::Cuda => 0,
        }
    }

    /// Bytes of device memory that each stream allocates, independent of its launches.
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
    /// Layers and copies.
    #[default]
    Normal,
    /// Work that other devices wait for: collectives that overlap with compute. CPU streams ignore priorities.
    High,
}

impl Device {
    /// A CPU device. `threads_per_stream` is the number of threads of a compute stream (at least 1). `engine` runs the
    /// collectives of its streams.
    pub fn cpu(rank: usize, threads_per_stream: usize, engine: Arc<dyn Collective>) -> Self {
        Device::Cpu(Arc::new(CpuDevice::new(rank, threads_per_stream, engine)))
    }

    /// A device on a GPU, which other devices may share. `engine` runs the collectives of its streams: a GPU engine, or
    /// any other, which then works on copies in host memory.
    pub fn cuda(rank: usize, gpu: Arc<Gpu>, engine: Arc<dyn Collective>) -> Self {
        Device::Cuda(Arc::new(CudaDevice::new(rank, gpu, engine)))
    }

    /// Allocates `bytes` bytes of zeroed memory.
    ///
    /// # Errors
    /// [`KernelError::OutOfMemory`]; [`KernelError::Cuda`].
    pub fn arena(&self, bytes: usize) -> Result<Arena, KernelError> {
        match self {
            Device::Cpu(device) => device.arena(bytes),
            Device::Cuda(device) => device.arena(bytes),
        }
    }

    /// Allocates `bytes` bytes of zeroed memory that other processes of the node can map ([`Arena::descriptor`]).
    ///
    /// # Errors
    /// [`KernelError::OutOfMemory`]; [`KernelError::Arguments`] for a GPU, whose memory other processes cannot map.
    pub fn shared_arena(&self, bytes: usize) -> Result<Arena, KernelError> {
        match self {
            Device::Cpu(device) => device.shared_arena(bytes),
            Device::Cuda(device) => {
                let got = format!("memory of {}", device.gpu().place());
                Err(KernelError::arguments("shared_arena", "memory", "memory that other processes can map", got))
            }
        }
    }

    /// Starts a stream with `threads` threads for each kernel (at least 1, at most [`crate::cpu::THREADS_MAX`]). `name`
    /// becomes the name of its thread.
    ///
    /// # Errors
    /// [`KernelError::Closed`] when the system cannot start a thread; [`KernelError::Arguments`] for too many threads.
    pub fn stream(&self, name: &str, threads: usize) -> Result<Stream, KernelError> {
        self.stream_with(name, threads, self.engine().clone(), Priority::Normal)
    }

    /// [`Device::stream`] with a priority and another engine: one that needs the device's memory to exist first. GPU
    /// streams ignore `threads`.
    ///
    /// # Errors
    /// As [`Device::stream`].
    pub fn stream_with(
        &self,
        name: &str,
        threads: usize,
        engine: Arc<dyn Collective>,
        priority: Priority,
    ) -> Result<Stream, KernelError> {
        match self {
            Device::Cpu(device) => Ok(Stream::Cpu(device.stream(name, threads, engine)?)),
            Device::Cuda(device) => {
                let stream = device.stream(name, priority == Priority::High, engine)?;
                Ok(Stream::Cuda(stream))
            }
        }
    }

    /// The device's kind.
    pub fn kind(&self) -> DeviceKind {
        match self {
            Device::Cpu(_) => DeviceKind::Cpu,
            Device::Cuda(_) => DeviceKind::Cuda,
        }
    }

    /// The device's rank in the session's mesh.
    pub fn rank(&self) -> usize {
        match self {
            Device::Cpu(device) => device.rank(),
            Device::Cuda(device) => device.rank(),
        }
    }

    /// Number of threads of a compute stream.
    pub fn threads_per_stream(&self) -> usize {
        match self {
            Device::Cpu(device) => device.threads_per_stream(),
            Device::Cuda(_) => 1,
        }
    }

    /// The collective engine of the device's streams.
    pub fn engine(&self) -> &Arc<dyn Collective> {
        match self {
            Device::Cpu(device) => device.engine(),
            Device::Cuda(device) => device.engine(),
        }
    }

    fn tally(&self) -> &Tally {
        match self {
            Device::Cpu(device) => device.tally(),
            Device::Cuda(device) => device.tally(),
        }
    }

    /// Counters of the backend, by name. For a GPU they cover the whole GPU, which other devices may share.
    pub fn counts(&self) -> Vec<(&'static str, u64)> {
        match self {
            Device::Cpu(_) => Vec::new(),
            Device::Cuda(device) => device.gpu().counts(),
        }
    }

    /// Bytes of the live arenas.
    pub fn bytes_allocated(&self) -> usize {
        self.tally().bytes.load(Ordering::Relaxed)
    }

    /// Peak number of bytes of live arenas.
    pub fn bytes_peak(&self) -> usize {
        self.tally().bytes_peak.load(Ordering::Relaxed)
    }

    /// Number of arenas allocated so far; constant after a plan is loaded.
    pub fn allocation_count(&self) -> usize {
        self.tally().allocations.load(Ordering::Relaxed)
    }
}
