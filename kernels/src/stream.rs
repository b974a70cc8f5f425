//! In-order streams of launches. A backend is a variant, dispatched once per submission.

use std::fmt;
use std::sync::Arc;
use std::time::Duration;

use crate::cpu::stream::CpuStream;
use crate::cuda::stream::CudaStream;
use crate::error::KernelError;
use crate::event::Event;
use crate::memory::Base;
use crate::op::Program;

/// Receives the notifications of a submission, on a thread of the backend; the call must not block.
pub type Notify = Box<dyn FnMut(Notification) + Send>;

/// An event in the execution of a submission.
#[derive(Clone, Debug, PartialEq)]
pub enum Notification {
    /// The launches before a signal of the program have finished; holds the signal's tag.
    Signal(u32),
    /// With [`Stream::check_finite`] enabled: the first write of the submission that contains Inf or NaN.
    NotFinite {
        /// Index of the launch in the program.
        launch: usize,
        /// Index among the launch's writes.
        write: usize,
        /// Number of elements that are Inf or NaN.
        elements: usize,
    },
    /// All launches have finished. Exactly one of `Done` and `Failed` is sent, and it is the last notification.
    Done,
    /// A launch failed; the launches after it were skipped. The stream continues with the next submission.
    Failed(KernelError),
}

/// A program to run and its memory. The arenas stay alive until it has run.
pub struct Submission {
    /// The launches to run.
    pub program: Arc<Program>,
    /// The addresses that the program's buffers are relative to.
    pub bases: Vec<Base>,
    /// Whether launches marked `accumulate` add to the existing values instead of overwriting them.
    pub repeat: bool,
    /// Receives signals and the result.
    pub notify: Notify,
}

impl fmt::Debug for Submission {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Submission").field("program", &self.program.name).field("repeat", &self.repeat).finish()
    }
}

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
