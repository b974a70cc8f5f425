//! In-order streams of launches. A backend is a variant, dispatched once per submission.

use std::sync::Arc;
use std::time::Duration;

use crate::cpu::stream::CpuStream;
use crate::cuda::stream::CudaStream;
use crate::error::KernelError;
use crate::event::Event;
use crate::op::Program;

pub use crate::submission::{Notification, Notify, Submission};

/// A queue of work on one device, executed in order. Dropping it waits for queued work to finish (unless the stream's
/// own thread drops it), so abort the collective engine first when members may be missing.
#[derive(Debug)]
pub enum Stream {
    /// A thread of this process, with helper threads.
    Cpu(CpuStream),
    /// A GPU stream.
    Cuda(CudaStream),
}

impl Stream {
    /// Queues a program and returns immediately.
    ///
    /// # Errors
    /// [`KernelError::Closed`] when the stream has ended. Errors of the program are passed to `notify`.
    pub fn submit(&self, submission: Submission) -> Result<(), KernelError> {
        match self {
            Stream::Cpu(stream) => stream.submit(submission),
            Stream::Cuda(stream) => stream.submit(submission),
        }
    }

    /// Prepares everything that the stream needs to run this program, so that its submissions allocate nothing: loads
    /// or compiles kernels and allocates scratch memory. Call it when a plan is loaded. Optional.
    ///
    /// # Errors
    /// [`KernelError::OutOfMemory`], [`KernelError::Cuda`]; an invalid launch is reported when it is submitted.
    pub fn prepare(&self, program: &Arc<Program>) -> Result<(), KernelError> {
        match self {
            Stream::Cpu(stream) => stream.prepare(program),
            Stream::Cuda(stream) => stream.prepare(program),
        }
    }

    /// An event that is set when all work submitted so far has finished.
    pub fn record(&self) -> Event {
        match self {
            Stream::Cpu(stream) => stream.record(),
            Stream::Cuda(stream) => stream.record(),
        }
    }

    /// Delays later submissions until `event` is set, which may belong to another stream. Does not block.
    ///
    /// # Errors
    /// [`KernelError::Closed`] when the stream has ended.
    pub fn wait_for(&self, event: &Event) -> Result<(), KernelError> {
        match self {
            Stream::Cpu(stream) => stream.wait_for(event),
            Stream::Cuda(stream) => stream.wait_for(event),
        }
    }

    /// Enables or disables Inf/NaN checks on launch outputs, from the next submission on. Slow: for finding the origin
    /// of an Inf or NaN.
    ///
    /// # Errors
    /// [`KernelError::Closed`] when the stream has ended.
    pub fn check_finite(&self, on: bool) -> Result<(), KernelError> {
        match self {
            Stream::Cpu(stream) => stream.check_finite(on),
            Stream::Cuda(stream) => stream.check_finite(on),
        }
    }

    /// Blocks until all work submitted so far has finished. Must not be called from a [`Notify`].
    ///
    /// # Errors
    /// [`KernelError::Closed`] when the stream has ended.
    pub fn synchronize(&self) -> Result<(), KernelError> {
        match self {
            Stream::Cpu(stream) => stream.synchronize(),
            Stream::Cuda(stream) => stream.synchronize(),
        }
    }

    /// Number of threads that run each kernel of this stream.
    pub fn threads(&self) -> usize {
        match self {
            Stream::Cpu(stream) => stream.threads(),
            Stream::Cuda(_) => 1,
        }
    }

    /// Total time that the stream has spent in collectives, waiting for other members or transferring bytes.
    pub fn collective_time(&self) -> Duration {
        match self {
            Stream::Cpu(stream) => stream.collective_time(),
            Stream::Cuda(stream) => stream.collective_time(),
        }
    }
}
