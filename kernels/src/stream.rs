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

/// What the stream tells about a submission, on a thread of the backend's; the call must not block.
pub type Notify = Box<dyn FnMut(Notification) + Send>;

/// One thing that a stream tells about a submission.
#[derive(Clone, Debug, PartialEq)]
pub enum Notification {
    /// The launches before a signal of the program are done; its tag.
    Signal(u32),
    /// With [`Stream::check_finite`] on: the first write of the submission that holds an infinity or no number.
    NotFinite {
        /// Index of the launch in the program.
        launch: usize,
        /// Index among the launch's writes.
        write: usize,
        /// How many elements are not finite.
        elements: usize,
    },
    /// All is done. Exactly one of `Done` and `Failed` comes, and it comes last.
    Done,
    /// A launch failed; those after it were left out. The stream goes on with the next submission.
    Failed(KernelError),
}

/// A program to run, and on what. Its arenas stay alive until it has run.
pub struct Submission {
    /// What to launch.
    pub program: Arc<Program>,
    /// What the program's buffers are counted from.
    pub bases: Vec<Base>,
    /// True when launches marked `accumulate` are to add to what is there, not overwrite it.
    pub repeat: bool,
    /// Told of signals and of the end.
    pub notify: Notify,
}

impl fmt::Debug for Submission {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Submission").field("program", &self.program.name).field("repeat", &self.repeat).finish()
    }
}

/// A queue of work on one device, done in order. Dropping it waits for queued work to finish (unless the stream's own
/// thread drops it), so abort the collective engine first when members may be missing.
#[derive(Debug)]
pub enum Stream {
    /// A thread of this process, with helpers.
    Cpu(CpuStream),
    /// A queue of a GPU.
    Cuda(CudaStream),
}

impl Stream {
    /// Queues a program. Returns at once.
    ///
    /// # Errors
    /// [`KernelError::Closed`] when the stream has ended. What goes wrong in the program comes through `notify`.
    pub fn submit(&self, submission: Submission) -> Result<(), KernelError> {
        match self {
            Stream::Cpu(stream) => stream.submit(submission),
            Stream::Cuda(stream) => stream.submit(submission),
        }
    }

    /// Has everything made that the stream needs to run this program, so that no submission of it allocates anything: kernels
    /// are loaded, or compiled, and scratch memory is allocated. Worth calling when a plan is loaded; nothing depends on it.
    ///
    /// # Errors
    /// [`KernelError::OutOfMemory`], [`KernelError::Cuda`]; what is wrong with a launch is told when it is submitted.
    pub fn prepare(&self, program: &Arc<Program>) -> Result<(), KernelError> {
        match self {
            Stream::Cpu(stream) => stream.prepare(program),
            Stream::Cuda(stream) => stream.prepare(program),
        }
    }

    /// An event that is set when all that was submitted so far is done.
    pub fn record(&self) -> Event {
        match self {
            Stream::Cpu(stream) => stream.record(),
            Stream::Cuda(stream) => stream.record(),
        }
    }

    /// Lets what is submitted from now on begin only after `event`, which may be another stream's. Does not block.
    ///
    /// # Errors
    /// [`KernelError::Closed`] when the stream has ended.
    pub fn wait_for(&self, event: &Event) -> Result<(), KernelError> {
        match self {
            Stream::Cpu(stream) => stream.wait_for(event),
            Stream::Cuda(stream) => stream.wait_for(event),
        }
    }

    /// Has the floats that each launch writes looked at, from the next submission on, or no more. Slow: for whoever looks
    /// for where an infinity came from.
    ///
    /// # Errors
    /// [`KernelError::Closed`] when the stream has ended.
    pub fn check_finite(&self, on: bool) -> Result<(), KernelError> {
        match self {
            Stream::Cpu(stream) => stream.check_finite(on),
            Stream::Cuda(stream) => stream.check_finite(on),
        }
    }

    /// Blocks until all that was submitted so far is done. Must not be called from a [`Notify`].
    ///
    /// # Errors
    /// [`KernelError::Closed`] when the stream has ended.
    pub fn synchronize(&self) -> Result<(), KernelError> {
        match self {
            Stream::Cpu(stream) => stream.synchronize(),
            Stream::Cuda(stream) => stream.synchronize(),
        }
    }

    /// Threads that a kernel on this stream runs on.
    pub fn threads(&self) -> usize {
        match self {
            Stream::Cpu(stream) => stream.threads(),
            Stream::Cuda(_) => 1,
        }
    }

    /// Time that it has been in collectives so far, waiting for other members or moving bytes.
    pub fn collective_time(&self) -> Duration {
        match self {
            Stream::Cpu(stream) => stream.collective_time(),
            Stream::Cuda(stream) => stream.collective_time(),
        }
    }
}
