//! An open GPU of this process: its context, modules, cuBLASLt handle, transfers and poller. Mesh devices may share it.

use std::fmt;
use std::sync::Arc;

use cudarc::driver::sys;
use parking_lot::Mutex;

use super::attention::{Attention, AttentionCounters};
use super::blas::Blas;
use super::context::Context;
use super::event::EventPool;
use super::library::Library;
use super::memory::HostTransfer;
use super::module::Modules;
use super::poller::Poller;
use super::progress::ProgressWords;
use super::test_delay::TestDelays;
use crate::error::KernelError;

/// An open GPU. Its resources are freed when the last user drops it.
pub struct Gpu {
    // The fields are in drop order.
    pub(crate) poller: Poller,
    pub(crate) modules: Modules,
    /// Created on first use.
    blas: Mutex<Option<Arc<Blas>>>,
    pub(crate) transfer: Mutex<HostTransfer>,
    pub(crate) events: Arc<EventPool>,
    pub(crate) progress_words: Arc<ProgressWords>,
    /// `Some` only in tests.
    pub(crate) test_delays: Option<TestDelays>,
    /// Lowest and highest stream priority. The highest priority is the smaller number.
    pub(crate) priorities: (i32, i32),
    pub(crate) attention: Attention,
    pub(crate) attention_counters: AttentionCounters,
    pub(crate) context: Arc<Context>,
}

impl fmt::Debug for Gpu {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.context.fmt(f)
    }
}

impl Gpu {
    /// Opens the GPU of this ordinal, with the attention implementation that [`Attention::from_env`] selects.
    ///
    /// # Errors
    /// [`KernelError::Unavailable`] if the driver, the device or cuBLASLt is missing, if the driver is too old, or if
    /// `SHARDFLOW_ATTENTION` names an unknown implementation; [`KernelError::Cuda`] for driver errors.
    pub fn open(ordinal: usize) -> Result<Arc<Self>, KernelError> {
        Self::open_with(ordinal, Attention::from_env()?)
    }

    /// Opens the GPU of this ordinal with this attention implementation.
    ///
    /// # Errors
    /// Those of [`Gpu::open`].
    pub fn open_with(ordinal: usize, attention: Attention) -> Result<Arc<Self>, KernelError> {
        let context = Arc::new(Context::open(ordinal)?);
        Library::CublasLt.require()?;
        let events = Arc::new(EventPool::new(context.clone())?);
        let gpu = Self {
            poller: Poller::start(&context)?,
            modules: Modules::new(&context),
            blas: Mutex::default(),
            transfer: Mutex::new(HostTransfer::new(&context)?),
            events,
            progress_words: ProgressWords::new(&context)?,
            test_delays: TestDelays::from_environment()?,
            priorities: priorities(&context)?,
            attention,
            attention_counters: AttentionCounters::default(),
            context,
        };
        Ok(Arc::new(gpu))
    }

    /// Enables peer access among these GPUs where the machine supports it, so that copies between them bypass host
    /// memory. Call this function before creating arenas.
    ///
    /// # Errors
    /// [`KernelError::Cuda`]. Lack of support is not an error.
    pub fn connect(gpus: &[&Arc<Self>]) -> Result<(), KernelError> {
        for gpu in gpus {
            for other in gpus.iter().filter(|other| other.context.ordinal != gpu.context.ordinal) {
                gpu.context.enable_peer_access(&other.context)?;
            }
        }
        Ok(())
    }

    /// The name of the device in error messages.
    pub fn place(&self) -> String {
        self.context.place()
    }

    /// The driver's name for the device.
    pub fn name(&self) -> &str {
        &self.context.name
    }

    /// Compute capability, major and minor.
    pub fn capability(&self) -> (i32, i32) {
        self.context.capability
    }

    /// Number of GPUs that the driver reports.
    ///
    /// # Errors
    /// [`KernelError::Unavailable`] if the driver is missing or too old.
    pub fn count() -> Result<usize, KernelError> {
        super::library::driver().map(|driver| driver.devices)
    }

    /// Free and total memory in bytes. cuBLASLt's own allocations count as used.
    ///
    /// # Errors
    /// [`KernelError::Cuda`].
    pub fn memory(&self) -> Result<(usize, usize), KernelError> {
        self.context.bind()?;
        self.blas()?;
        super::memory::free_and_total(&self.context)
    }

    /// Counters of this GPU, by name. They count the attention launches of each pass and implementation.
    pub fn counts(&self) -> Vec<(&'static str, u64)> {
        self.attention_counters.by_name().to_vec()
    }

    /// Requires the context to be bound.
    pub(crate) fn blas(&self) -> Result<Arc<Blas>, KernelError> {
        let mut blas = self.blas.lock();
        match &*blas {
            Some(blas) => Ok(blas.clone()),
            None => Ok(blas.insert(Arc::new(Blas::new(&self.context)?)).clone()),
        }
    }
}

#[allow(unsafe_code)]
fn priorities(context: &Context) -> Result<(i32, i32), KernelError> {
    let (mut least, mut greatest) = (0, 0);
    // SAFETY: the call writes to locals.
    let result = unsafe { sys::cuCtxGetStreamPriorityRange(&mut least, &mut greatest) };
    context.check(result, "cuCtxGetStreamPriorityRange", &context.place())?;
    Ok((least, greatest))
}
