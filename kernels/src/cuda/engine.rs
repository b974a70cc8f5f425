//! How a collective gets onto a CUDA stream without the host waiting in it.

use std::sync::Arc;

use super::raw_stream::RawStream;
use crate::collective::CollectiveCall;
use crate::error::KernelError;
use crate::memory::View;

/// An engine's side of which CUDA streams know: [`crate::collective::Collective::on_device`] gives it.
#[derive(Clone, Copy)]
pub struct CudaCollective<'a>(pub(crate) &'a dyn Enqueue);

/// What a call still needs before the stream can go on with what comes behind it.
pub(crate) type Wait = Box<dyn FnOnce() -> Result<(), KernelError> + Send>;

/// How far a call has come.
pub(crate) enum Enqueued {
    /// It is on the stream.
    Issued,
    /// It will be once this returns, which may block: the stream's own thread calls it.
    Waits(Wait),
}

/// Collectives on CUDA streams.
pub(crate) trait Enqueue {
    /// Puts one member's part of a call on its stream, in order. The context is bound. Does not block for longer than a few
    /// calls of the driver take. `workspace` is the launch's (STAGE-1). Memory is kept alive by the caller until the stream has done it.
    ///
    /// # Errors
    /// As for [`crate::collective::Collective::run`].
    fn enqueue(
        &self,
        call: &CollectiveCall,
        reads: &[View<'_>],
        writes: &[View<'_>],
        workspace: Option<&View<'_>>,
        lane: &Arc<RawStream>,
    ) -> Result<Enqueued, KernelError>;
}
