//! A GPU that this process has opened: context, modules, products, the host's copies and the poller. Virtual devices of a
//! mesh may share one.

use std::fmt;
use std::sync::{Arc, Mutex, PoisonError};

use cudarc::driver::sys;

use super::blas::Blas;
use super::context::Context;
use super::cudnn::{Attention, Attentions};
use super::event::Events;
use super::library::Library;
use super::memory::Transfer;
use super::module::Modules;
use super::poller::Poller;
use super::progress::Words;
use super::test_delay::TestDelays;
use crate::error::KernelError;

/// See the module. Everything is given back when the last user lets go.
pub struct Gpu {
    // In the order in which they end.
    poller: Poller,
    modules: Modules,
    /// Made when the first product comes.
    blas: Mutex<Option<Arc<Blas>>>,
    transfer: Mutex<Transfer>,
    events: Arc<Events>,
    words: Arc<Words>,
    /// For tests.
    spins: Option<TestDelays>,
    /// Least and greatest; the greatest is the lower number.
    priorities: (i32, i32),
    attention: Attention,
    attentions: Attentions,
    context: Arc<Context>,
}

impl fmt::Debug for Gpu {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.context.fmt(f)
    }
}

impl Gpu {
    /// Opens the GPU of this ordinal; which attention it uses the environment says ([`Attention::from_env`]).
    ///
    /// # Errors
    /// [`KernelError::Unavailable`] where there is no driver, an old one, no such device or no library for products, and for
    /// an attention that there is none of; [`KernelError::Cuda`] for what the driver says.
    pub fn open(ordinal: usize) -> Result<Arc<Self>, KernelError> {
        Self::open_with(ordinal, Attention::from_env()?)
    }

    /// As [`Gpu::open`], with this attention.
    ///
    /// # Errors
    /// As [`Gpu::open`].
    pub fn open_with(ordinal: usize, attention: Attention) -> Result<Arc<Self>, KernelError> {
        let context = Arc::new(Context::open(ordinal)?);
        Library::CublasLt.require()?;
        let events = Arc::new(Events::new(context.clone())?);
        let gpu = Self {
            poller: Poller::start(&context)?,
            modules: Modules::new(&context),
            blas: Mutex::default(),
            transfer: Mutex::new(Transfer::new(&context)?),
            events,
            words: Words::new(&context)?,
            spins: TestDelays::from_environment()?,
            priorities: priorities(&context)?,
            attention,
            attentions: Attentions::default(),
            context,
        };
        Ok(Arc::new(gpu))
    }

    /// Lets each of these GPUs read and write the memory of the others, where the machine can: what one copies from another
    /// takes no way through the host's memory then. Comes before their arenas are made.
    ///
    /// # Errors
    /// [`KernelError::Cuda`]; that a machine cannot is none.
    pub fn connect(gpus: &[&Arc<Self>]) -> Result<(), KernelError> {
        for gpu in gpus {
            for other in gpus.iter().filter(|other| other.context.ordinal() != gpu.context.ordinal()) {
                gpu.context.reach(&other.context)?;
            }
        }
        Ok(())
    }

    /// Where it is, for errors.
    pub fn place(&self) -> String {
        self.context.place()
    }

    /// As the driver calls it.
    pub fn name(&self) -> &str {
        self.context.name()
    }

    /// Compute capability, major and minor.
    pub fn capability(&self) -> (i32, i32) {
        self.context.capability()
    }

    /// How many GPUs the driver shows.
    ///
    /// # Errors
    /// [`KernelError::Unavailable`] where there is no driver, or an old one.
    pub fn count() -> Result<usize, KernelError> {
        super::library::driver().map(|driver| driver.devices)
    }

    /// Bytes that nobody uses, and all bytes. What the library of products takes for itself is in use.
    ///
    /// # Errors
    /// [`KernelError::Cuda`].
    pub fn memory(&self) -> Result<(usize, usize), KernelError> {
        self.context.bind()?;
        self.blas()?;
        super::memory::free_and_total(&self.context)
    }

    /// What was counted of its work so far, by name: launches of attention, by who does them.
    pub fn counts(&self) -> Vec<(&'static str, u64)> {
        self.attentions.told().to_vec()
    }

    pub(crate) fn context(&self) -> &Arc<Context> {
        &self.context
    }

    pub(crate) fn events(&self) -> &Arc<Events> {
        &self.events
    }

    pub(crate) fn words(&self) -> &Arc<Words> {
        &self.words
    }

    pub(crate) fn spins(&self) -> Option<&TestDelays> {
        self.spins.as_ref()
    }

    pub(crate) fn poller(&self) -> &Poller {
        &self.poller
    }

    pub(crate) fn modules(&self) -> &Modules {
        &self.modules
    }

    /// The context is bound.
    pub(crate) fn blas(&self) -> Result<Arc<Blas>, KernelError> {
        let mut blas = self.blas.lock().unwrap_or_else(PoisonError::into_inner);
        match &*blas {
            Some(blas) => Ok(blas.clone()),
            None => Ok(blas.insert(Arc::new(Blas::new(&self.context)?)).clone()),
        }
    }

    pub(crate) fn transfer(&self) -> &Mutex<Transfer> {
        &self.transfer
    }

    pub(crate) fn attention(&self) -> Attention {
        self.attention
    }

    pub(crate) fn attentions(&self) -> &Attentions {
        &self.attentions
    }

    pub(crate) fn priorities(&self) -> (i32, i32) {
        self.priorities
    }
}

#[allow(unsafe_code)]
fn priorities(context: &Context) -> Result<(i32, i32), KernelError> {
    let (mut least, mut greatest) = (0, 0);
    // SAFETY: writes to locals.
    let result = unsafe { sys::cuCtxGetStreamPriorityRange(&mut least, &mut greatest) };
    context.check(result, "cuCtxGetStreamPriorityRange", &context.place())?;
    Ok((least, greatest))
}
