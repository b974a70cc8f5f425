//! A CPU device: counts memory and creates streams.

use std::sync::Arc;

use crate::collective::Collective;
use crate::cpu::stream::CpuStream;
use crate::error::KernelError;
use crate::memory::{Arena, Tally};

/// The CPU variant of [`crate::device::Device`].
#[derive(Debug)]
pub struct CpuDevice {
    rank: usize,
    threads_per_stream: usize,
    engine: Arc<dyn Collective>,
    tally: Arc<Tally>,
}

impl CpuDevice {
    pub(crate) fn new(rank: usize, threads_per_stream: usize, engine: Arc<dyn Collective>) -> Self {
        Self { rank, threads_per_stream: threads_per_stream.max(1), engine, tally: Arc::default() }
    }

    pub(crate) fn arena(&self, bytes: usize) -> Result<Arena, KernelError> {
        Arena::host(self.rank, bytes, &self.tally)
    }

    pub(crate) fn shared_arena(&self, bytes: usize) -> Result<Arena, KernelError> {
        Arena::shared(self.rank, bytes, &self.tally)
    }

    pub(crate) fn stream(
        &self,
        name: &str,
        threads: usize,
        engine: Arc<dyn Collective>,
    ) -> Result<CpuStream, KernelError> {
        CpuStream::start(name, self.rank, threads, engine, self.tally.clone())
    }

    pub(crate) fn rank(&self) -> usize {
        self.rank
    }

    pub(crate) fn threads_per_stream(&self) -> usize {
        self.threads_per_stream
    }

    pub(crate) fn engine(&self) -> &Arc<dyn Collective> {
        &self.engine
    }

    pub(crate) fn tally(&self) -> &Tally {
        &self.tally
    }
}
