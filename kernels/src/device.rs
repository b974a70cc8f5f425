//! Devices: where arenas and streams come from. Imports `memory`, `stream`, `collective` and the backends.

use std::sync::Arc;

use crate::collective::Collective;
use crate::cpu::device::CpuDevice;
use crate::error::KernelError;
use crate::memory::Arena;
use crate::stream::Stream;

/// One device of a session's mesh. Clones are the same device.
#[derive(Clone, Debug)]
pub enum Device {
    /// Some of this process's cores, with memory of their own.
    Cpu(Arc<CpuDevice>),
}

impl Device {
    /// A CPU device. `threads_per_stream` is how many threads a compute stream should be given (at least 1);
    /// collectives launched on its streams go to `engine`.
    pub fn cpu(rank: usize, threads_per_stream: usize, engine: Arc<dyn Collective>) -> Self {
        Device::Cpu(Arc::new(CpuDevice::new(rank, threads_per_stream, engine)))
    }

    /// Memory of `bytes` bytes, zeroed.
    ///
    /// # Errors
    /// [`KernelError::OutOfMemory`].
    pub fn arena(&self, bytes: usize) -> Result<Arena, KernelError> {
        match self {
            Device::Cpu(device) => device.arena(bytes),
        }
    }

    /// Memory of `bytes` bytes, zeroed, that other processes of the node can map ([`Arena::descriptor`]).
    ///
    /// # Errors
    /// [`KernelError::OutOfMemory`].
    pub fn shared_arena(&self, bytes: usize) -> Result<Arena, KernelError> {
        match self {
            Device::Cpu(device) => device.shared_arena(bytes),
        }
    }

    /// A stream with `threads` threads for each kernel (at least 1, at most [`crate::cpu::THREADS_MAX`]); `name` is
    /// that of its thread.
    ///
    /// # Errors
    /// [`KernelError::Closed`] when the system gives no thread; [`KernelError::Arguments`] for too many of them.
    pub fn stream(&self, name: &str, threads: usize) -> Result<Stream, KernelError> {
        match self {
            Device::Cpu(device) => Ok(Stream::Cpu(device.stream(name, threads)?)),
        }
    }

    /// Rank in the session's mesh.
    pub fn rank(&self) -> usize {
        match self {
            Device::Cpu(device) => device.rank(),
        }
    }

    /// Threads that a compute stream should be given.
    pub fn threads_per_stream(&self) -> usize {
        match self {
            Device::Cpu(device) => device.threads_per_stream(),
        }
    }

    /// The collective engine that its streams call.
    pub fn engine(&self) -> &Arc<dyn Collective> {
        match self {
            Device::Cpu(device) => device.engine(),
        }
    }

    /// Bytes in live arenas.
    pub fn bytes_allocated(&self) -> usize {
        match self {
            Device::Cpu(device) => device.bytes_allocated(),
        }
    }

    /// The most bytes that were in live arenas at once.
    pub fn bytes_peak(&self) -> usize {
        match self {
            Device::Cpu(device) => device.bytes_peak(),
        }
    }

    /// Arenas made so far; does not grow after a plan is loaded.
    pub fn allocation_count(&self) -> usize {
        match self {
            Device::Cpu(device) => device.allocation_count(),
        }
    }
}
