//! A pool of CUDA events, so that no event is created in the steady state.
#![allow(unsafe_code)]

use std::fmt::Display;
use std::sync::Arc;

use cudarc::driver::sys::{self, CUresult};
use parking_lot::Mutex;

use super::context::{Context, Raw};
use crate::error::Result;

const BATCH: usize = 64;

#[derive(Debug)]
pub(crate) struct EventPool {
    context: Arc<Context>,
    free: Mutex<Vec<Raw<sys::CUevent>>>,
}

/// An event that a stream has recorded. It returns to the pool when it is dropped.
#[derive(Debug)]
pub(crate) struct Recorded {
    event: Raw<sys::CUevent>,
    events: Arc<EventPool>,
}

impl EventPool {
    /// Creates the pool and its first events. Requires the context to be bound.
    pub(crate) fn new(context: Arc<Context>) -> Result<Self> {
        let (place, mut free) = (context.place(), Vec::new());
        create_batch(&context, &mut free, &place)?;
        Ok(Self { context, free: Mutex::new(free) })
    }

    /// Records an event on a stream. Requires the context to be bound.
    pub(crate) fn record(self: &Arc<Self>, stream: Raw<sys::CUstream>, place: &dyn Display) -> Result<Arc<Recorded>> {
        let mut free = self.free.lock();
        if free.is_empty() {
            create_batch(&self.context, &mut free, place)?;
        }
        let event = free.pop().expect("the pool was just filled");
        drop(free);
        let recorded = Recorded { event, events: self.clone() };
        // SAFETY: both handles are live and belong to this context.
        let result = unsafe { sys::cuEventRecord(recorded.event.0, stream.0) };
        self.context.check(result, "cuEventRecord", place)?;
        Ok(Arc::new(recorded))
    }
}

fn create_batch(context: &Context, free: &mut Vec<Raw<sys::CUevent>>, place: &dyn Display) -> Result<()> {
    for _ in 0..BATCH {
        let mut event = std::ptr::null_mut();
        let flags = sys::CUevent_flags::CU_EVENT_DISABLE_TIMING as u32;
        // SAFETY: the call writes a handle to a local. The caller has bound the context.
        let result = unsafe { sys::cuEventCreate(&mut event, flags) };
        context.check(result, "cuEventCreate", place)?;
        free.push(Raw(event));
    }
    Ok(())
}

impl Drop for EventPool {
    fn drop(&mut self) {
        if !self.context.bind_to_drop() {
            return;
        }
        for event in self.free.get_mut().drain(..) {
            // SAFETY: the pool owns the event and destroys it once. The driver keeps a recorded event until it is done.
            let _ = unsafe { sys::cuEventDestroy_v2(event.0) };
        }
    }
}

impl Recorded {
    pub(crate) fn is_done(&self, place: &dyn Display) -> Result<bool> {
        // SAFETY: the event is live.
        match unsafe { sys::cuEventQuery(self.event.0) } {
            CUresult::CUDA_ERROR_NOT_READY => Ok(false),
            result => self.events.context.check(result, "cuEventQuery", place).map(|()| true),
        }
    }

    /// Makes a stream wait for the event. The stream may belong to another device.
    pub(crate) fn wait_on(&self, stream: Raw<sys::CUstream>, place: &dyn Display) -> Result<()> {
        // SAFETY: the handles are live. The call captures the event's state, so the event may be recorded again.
        let result = unsafe { sys::cuStreamWaitEvent(stream.0, self.event.0, 0) };
        self.events.context.check(result, "cuStreamWaitEvent", place)
    }
}

impl Drop for Recorded {
    fn drop(&mut self) {
        self.events.free.lock().push(self.event);
    }
}
