//! Devices: where arenas and streams come from.

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
    /// Some of this process's cores, with memory of their own.
    Cpu(Arc<CpuDevice>),
    /// A GPU, or a share of one.
    Cuda(Arc<CudaDevice>),
}

/// Kinds of devices; all devices of a plan are of one.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub enum DeviceKind {
    /// Cores.
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
    /// Bytes of scratch memory that a launch needs in the plan's arena, given the buffers that it reads and writes: the same
    /// on every machine.
    pub fn workspace_bytes(self, launch: &Launch) -> usize {
        match self {
            DeviceKind::Cpu => 0,
            DeviceKind::Cuda => lower::workspace_bytes(launch),
        }
    }

    /// Bytes of scratch memory that a stream of `threads` threads allocates for itself to run a launch; the largest launch
    /// that it has prepared decides.
    pub fn scratch_bytes(self, launch: &Launch, threads: usize) -> usize {
        match self {
            DeviceKind::Cpu => scratch::bytes(launch, threads),
            DeviceKind::Cuda => 0,
        }
    }

    /// Bytes of the device's memory that each stream takes for itself, whatever it runs.
    pub fn stream_bytes(self) -> usize {
        match self {
            DeviceKind::Cpu => 0,
            DeviceKind::Cuda => ErrorRecord::BYTES,
        }
    }
}

/// Which of a device's streams goes first where both could.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Priority {
    /// Layers, and copies.
    #[default]
    Normal,
    /// What others wait for: collectives that overlap compute. CPU streams know no priorities.
    High,
}

impl Device {
    /// A CPU device. `threads_per_stream` is how many threads a compute stream should be given (at least 1);
    /// collectives launched on its streams go to `engine`.
    pub fn cpu(rank: usize, threads_per_stream: usize, engine: Arc<dyn Collective>) -> Self {
        Device::Cpu(Arc::new(CpuDevice::new(rank, threads_per_stream, engine)))
    }

    /// A device on a GPU, which other devices may share. Collectives launched on its streams go to `engine`: one for GPUs,
    /// or any other, which then works on copies in the host's memory.
    pub fn cuda(rank: usize, gpu: Arc<Gpu>, engine: Arc<dyn Collective>) -> Self {
        Device::Cuda(Arc::new(CudaDevice::new(rank, gpu, engine)))
    }

    /// Memory of `bytes` bytes, zeroed.
    ///
    /// # Errors
    /// [`KernelError::OutOfMemory`]; [`KernelError::Cuda`].
    pub fn arena(&self, bytes: usize) -> Result<Arena, KernelError> {
        match self {
            Device::Cpu(device) => device.arena(bytes),
            Device::Cuda(device) => device.arena(bytes),
        }
    }

    /// Memory of `bytes` bytes, zeroed, that other processes of the node can map ([`Arena::descriptor`]).
    ///
    /// # Errors
    /// [`KernelError::OutOfMemory`]; [`KernelError::Arguments`] for a GPU's, which others cannot map.
    pub fn shared_arena(&self, bytes: usize) -> Result<Arena, KernelError> {
        match self {
            Device::Cpu(device) => device.shared_arena(bytes),
            Device::Cuda(device) => {
                let got = format!("memory of {}", device.gpu().place());
                Err(KernelError::arguments("shared_arena", "memory", "memory that other processes can map", got))
            }
        }
    }

    /// A stream with `threads` threads for each kernel (at least 1, at most [`crate::cpu::THREADS_MAX`]); `name` is
    /// that of its thread.
    ///
    /// # Errors
    /// [`KernelError::Closed`] when the system gives no thread; [`KernelError::Arguments`] for too many of them.
    pub fn stream(&self, name: &str, threads: usize) -> Result<Stream, KernelError> {
        self.stream_with(name, threads, self.engine().clone(), Priority::Normal)
    }

    /// As [`Device::stream`], of this priority and with another engine: one that could be made only when the device's memory
    /// was there. A GPU's stream has no use for threads.
    ///
    /// # Errors
    /// As `stream`.
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

    /// Its kind.
    pub fn kind(&self) -> DeviceKind {
        match self {
            Device::Cpu(_) => DeviceKind::Cpu,
            Device::Cuda(_) => DeviceKind::Cuda,
        }
    }

    /// Rank in the session's mesh.
    pub fn rank(&self) -> usize {
        match self {
            Device::Cpu(device) => device.rank(),
            Device::Cuda(device) => device.rank(),
        }
    }

    /// Threads that a compute stream should be given.
    pub fn threads_per_stream(&self) -> usize {
        match self {
            Device::Cpu(device) => device.threads_per_stream(),
            Device::Cuda(_) => 1,
        }
    }

    /// The collective engine that its streams call.
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

    /// What the backend counts of its own work, by name; of the whole GPU, which other devices may share.
    pub fn counts(&self) -> Vec<(&'static str, u64)> {
        match self {
            Device::Cpu(_) => Vec::new(),
            Device::Cuda(device) => device.gpu().counts(),
        }
    }

    /// Bytes in live arenas.
    pub fn bytes_allocated(&self) -> usize {
        self.tally().bytes.load(Ordering::Relaxed)
    }

    /// The most bytes that were in live arenas at once.
    pub fn bytes_peak(&self) -> usize {
        self.tally().bytes_peak.load(Ordering::Relaxed)
    }

    /// Arenas made so far; does not grow after a plan is loaded.
    pub fn allocation_count(&self) -> usize {
        self.tally().allocations.load(Ordering::Relaxed)
    }
}
