//! CUDA events, taken from a pool and given back to it, so that none is made in the steady state.
#![allow(unsafe_code)]

use std::fmt::Display;
use std::sync::{Arc, Mutex, PoisonError};

use cudarc::driver::sys::{self, CUresult};

use super::context::{Context, Raw};
use crate::error::KernelError;

/// Events made at once, when there are none left.
const BATCH: usize = 64;

/// The events of one context.
#[derive(Debug)]
pub(crate) struct Events {
    context: Arc<Context>,
    free: Mutex<Vec<Raw<sys::CUevent>>>,
}

/// An event that a stream has recorded. Given back when the last who knows it lets go.
#[derive(Debug)]
pub(crate) struct Recorded {
    event: Raw<sys::CUevent>,
    events: Arc<Events>,
}

impl Events {
    /// With the first of them made. The context is bound.
    pub(crate) fn new(context: Arc<Context>) -> Result<Self, KernelError> {
        let (place, mut free) = (context.place(), Vec::new());
        make(&context, &mut free, &place)?;
        Ok(Self { context, free: Mutex::new(free) })
    }

    fn take(&self, place: &dyn Display) -> Result<Raw<sys::CUevent>, KernelError> {
        let mut free = self.free.lock().unwrap_or_else(PoisonError::into_inner);
        if free.is_empty() {
            make(&self.context, &mut free, place)?;
        }
        Ok(free.pop().expect("some were made"))
    }

    /// Records one on a stream. The context is bound.
    pub(crate) fn record(
        self: &Arc<Self>,
        stream: Raw<sys::CUstream>,
        place: &dyn Display,
    ) -> Result<Arc<Recorded>, KernelError> {
        let recorded = Recorded { event: self.take(place)?, events: self.clone() };
        // SAFETY: both are live handles of this context: the event is ours, the stream the caller's.
        let result = unsafe { sys::cuEventRecord(recorded.event.0, stream.0) };
        self.context.check(result, "cuEventRecord", place)?;
        Ok(Arc::new(recorded))
    }
}

fn make(context: &Context, free: &mut Vec<Raw<sys::CUevent>>, place: &dyn Display) -> Result<(), KernelError> {
    for _ in 0..BATCH {
        let mut event = std::ptr::null_mut();
        let flags = sys::CUevent_flags::CU_EVENT_DISABLE_TIMING as u32;
        // SAFETY: writes a handle to a local; the caller has bound the context.
        let result = unsafe { sys::cuEventCreate(&mut event, flags) };
        context.check(result, "cuEventCreate", place)?;
        free.push(Raw(event));
    }
    Ok(())
}

impl Drop for Events {
    fn drop(&mut self) {
        if !self.context.bind_to_drop() {
            return;
        }
        for event in self.free.get_mut().unwrap_or_else(PoisonError::into_inner).drain(..) {
            // SAFETY: made here, destroyed once; the driver keeps what is still recorded until it is done.
            let _ = unsafe { sys::cuEventDestroy_v2(event.0) };
        }
    }
}

impl Recorded {
    /// Whether all before it on its stream is done.
    pub(crate) fn is_done(&self, place: &dyn Display) -> Result<bool, KernelError> {
        // SAFETY: a live event.
        match unsafe { sys::cuEventQuery(self.event.0) } {
            CUresult::CUDA_ERROR_NOT_READY => Ok(false),
            result => self.events.context.check(result, "cuEventQuery", place).map(|()| true),
        }
    }

    /// Has a stream, which may be another device's, wait for it.
    pub(crate) fn wait_on(&self, stream: Raw<sys::CUstream>, place: &dyn Display) -> Result<(), KernelError> {
        // SAFETY: live handles. The call takes the event as it is now, so it may be recorded again as soon as it is done.
        let result = unsafe { sys::cuStreamWaitEvent(stream.0, self.event.0, 0) };
        self.events.context.check(result, "cuStreamWaitEvent", place)
    }
}

impl Drop for Recorded {
    fn drop(&mut self) {
        self.events.free.lock().unwrap_or_else(PoisonError::into_inner).push(self.event);
    }
}
