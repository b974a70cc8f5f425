//! A mesh device on a GPU: its memory tally, its collective engine and its streams. Several devices may share one GPU.
use std::sync::Arc;

use super::device_memory::DeviceMemory;
use super::gpu::Gpu;
use super::stream::CudaStream;
use crate::collective::Collective;
use crate::error::KernelError;
use crate::memory::{Arena, Tally};

/// The CUDA form of [`crate::device::Device`].
#[derive(Debug)]
pub struct CudaDevice {
    rank: usize,
    gpu: Arc<Gpu>,
    engine: Arc<dyn Collective>,
    tally: Arc<Tally>,
}

impl CudaDevice {
    pub(crate) fn new(rank: usize, gpu: Arc<Gpu>, engine: Arc<dyn Collective>) -> Self {
        Self { rank, gpu, engine, tally: Arc::default() }
    }

    pub(crate) fn arena(&self, bytes: usize) -> Result<Arena, KernelError> {
        DeviceMemory::new(&self.gpu, self.rank, bytes, &self.tally).map(Arena::on_device)
    }

    pub(crate) fn stream(
        &self,
        name: &str,
        urgent: bool,
        engine: Arc<dyn Collective>,
    ) -> Result<CudaStream, KernelError> {
        CudaStream::start(&self.gpu, self.rank, name, urgent, engine, &self.tally)
    }

    /// The GPU that the device is on.
    pub fn gpu(&self) -> &Arc<Gpu> {
        &self.gpu
    }

    pub(crate) fn rank(&self) -> usize {
        self.rank
    }

    pub(crate) fn engine(&self) -> &Arc<dyn Collective> {
        &self.engine
    }

    pub(crate) fn tally(&self) -> &Tally {
        &self.tally
    }
}
