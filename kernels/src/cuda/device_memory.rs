//! Memory of a GPU.
#![allow(unsafe_code)]

use std::sync::Arc;
use std::sync::atomic::Ordering;

use cudarc::driver::sys::{self, CUresult};

use super::gpu::Gpu;
use crate::clock::{ReleaseClocks, Stamped};
use crate::error::{KernelError, Result};
use crate::memory::{DeviceStorage, Tally, View};

#[derive(Debug)]
pub(crate) struct DeviceMemory {
    pub(crate) gpu: Arc<Gpu>,
    rank: usize,
    /// Stamped after the zeroing. The race checker orders it before all accesses by threads that read the address.
    address: Stamped<u64>,
    bytes: usize,
    tally: Arc<Tally>,
    releases: ReleaseClocks,
}

impl DeviceMemory {
    /// Allocates zeroed memory and counts it in `tally`. No other code of this crate allocates device memory.
    pub(crate) fn new(gpu: &Arc<Gpu>, rank: usize, bytes: usize, tally: &Arc<Tally>) -> Result<Self> {
        let (mut address, place) = (0, gpu.place());
        if bytes > 0 {
            let transfer = gpu.transfer.lock();
            gpu.context.bind()?;
            // Do not use a memory pool: other GPUs cannot access pool memory, even if the contexts have peer access.
            // SAFETY: the call writes an address to a local.
            let result = unsafe { sys::cuMemAlloc_v2(&mut address, bytes) };
            if result == CUresult::CUDA_ERROR_OUT_OF_MEMORY || result == CUresult::CUDA_ERROR_INVALID_VALUE {
                return Err(KernelError::OutOfMemory { device: rank, bytes });
            }
            gpu.context.check(result, "cuMemAlloc", &place)?;
            transfer.zero(address, bytes)?;
        }
        tally.add(bytes);
        let (gpu, address, tally, releases) =
            (gpu.clone(), Stamped::new(address), tally.clone(), ReleaseClocks::default());
        Ok(Self { gpu, rank, address, bytes, tally, releases })
    }

    pub(crate) fn address(&self) -> u64 {
        *self.address.get()
    }
}

/// Device address of a view's first element.
pub(crate) fn device_address(view: &View<'_>) -> Result<u64> {
    let memory = view.arena().device_memory::<DeviceMemory>();
    let memory = memory.ok_or_else(|| KernelError::arguments("copy", "memory", "device memory", "host memory"))?;
    Ok(memory.address() + view.offset() as u64)
}

impl DeviceStorage for DeviceMemory {
    fn bytes(&self) -> usize {
        self.bytes
    }

    fn place(&self) -> String {
        format!("device {} on {}", self.rank, self.gpu.place())
    }

    fn write(&self, offset: usize, bytes: usize, fill: &mut dyn FnMut(&mut [u8]) -> bool) -> Result<()> {
        let mut transfer = self.gpu.transfer.lock();
        self.gpu.context.bind()?;
        transfer.write(self.address() + offset as u64, bytes, fill)
    }

    fn read(&self, offset: usize, bytes: usize, take: &mut dyn FnMut(&[u8]) -> bool) -> Result<()> {
        let mut transfer = self.gpu.transfer.lock();
        self.gpu.context.bind()?;
        transfer.read(self.address() + offset as u64, bytes, take)
    }

    fn mark_released(&self) {
        self.releases.add();
    }
}

impl Drop for DeviceMemory {
    fn drop(&mut self) {
        self.tally.bytes.fetch_sub(self.bytes, Ordering::Relaxed);
        self.releases.join();
        if self.bytes > 0 && self.gpu.context.bind_to_drop() {
            // SAFETY: the memory was allocated in `new` and is freed once. No work uses it: a submission keeps its
            // arenas until it ends. If the call fails and makes the context unusable, `check` stores the error.
            let result = unsafe { sys::cuMemFree_v2(*self.address.get()) };
            let _ = self.gpu.context.check(result, "cuMemFree", &self.gpu.place());
        }
    }
}
