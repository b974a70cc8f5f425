//! The interface by which collective engines enqueue calls on CUDA streams without blocking the host.

use std::sync::Arc;

use super::raw_stream::RawStream;
use crate::collective::CollectiveCall;
use crate::error::KernelError;
use crate::memory::View;

/// An engine that can enqueue on CUDA streams; [`crate::collective::Collective::on_device`] returns it.
#[derive(Clone, Copy)]
pub struct CudaCollective<'a>(pub(crate) &'a dyn Enqueue);

/// Blocks until the stream may take the work after a call.
pub(crate) type Wait = Box<dyn FnOnce() -> Result<(), KernelError> + Send>;

/// The state of a call after [`Enqueue::enqueue`].
pub(crate) enum Enqueued {
    /// The call is on the stream.
    Issued,
    /// The call is on the stream once this function returns. It may block, so the stream's own thread calls it.
    Pending(Wait),
}

/// Collectives on CUDA streams.
pub(crate) trait Enqueue {
    /// Enqueues one member's part of a call on its stream, in order. Requires the context to be bound. Blocks no longer
    /// than a few driver calls take. `workspace` is the launch's (STAGE-1). The caller keeps all memory alive until the
    /// stream has run the call.
    ///
    /// # Errors
    /// Those of [`crate::collective::Collective::run`].
    fn enqueue(
        &self,
        call: &CollectiveCall,
        reads: &[View<'_>],
        writes: &[View<'_>],
        workspace: Option<&View<'_>>,
        stream: &Arc<RawStream>,
    ) -> Result<Enqueued, KernelError>;
}
