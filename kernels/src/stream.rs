//! In-order streams of launches. A backend executes commands; all other code is the same for every backend.

use std::sync::Arc;
use std::time::Duration;

use crate::cpu::stream::CpuStream;
use crate::cuda::stream::CudaStream;
use crate::error::KernelError;
use crate::event::Event;
use crate::op::Program;
use crate::submission::Command;

pub use crate::submission::{Notification, Notify, Submission};

/// A queue of work on one device, executed in order. Dropping the stream waits until the queued work has finished,
/// unless the stream's own thread drops the stream. If a member of a queued collective may be missing, this wait can
/// last forever: abort the collective engine first.
#[derive(Debug)]
pub struct Stream(pub(crate) StreamBackend);

#[derive(Debug)]
pub(crate) enum StreamBackend {
    Cpu(CpuStream),
    Cuda(CudaStream),
}

impl Stream {
    fn send(&self, command: Command) -> Result<(), KernelError> {
        match &self.0 {
            StreamBackend::Cpu(stream) => stream.send(command),
            StreamBackend::Cuda(stream) => stream.send(command),
        }
    }

    /// Queues a program and returns immediately.
    ///
    /// # Errors
    /// [`KernelError::Closed`] if the stream has ended. Errors of the program are passed to `notify`.
    pub fn submit(&self, submission: Submission) -> Result<(), KernelError> {
        self.send(Command::Run(submission))
    }

    /// Loads or compiles the program's kernels and allocates scratch memory, so that submitting the program allocates
    /// nothing. This call is optional. Make it when a plan is loaded.
    ///
    /// # Errors
    /// [`KernelError::OutOfMemory`], [`KernelError::Cuda`]; an invalid launch is reported only when it is submitted.
    pub fn prepare(&self, program: &Arc<Program>) -> Result<(), KernelError> {
        match &self.0 {
            StreamBackend::Cpu(stream) => stream.scratch.prepare(program),
            StreamBackend::Cuda(stream) => stream.prepare(program),
        }
    }

    /// Returns an event that is set when all work submitted so far has finished.
    pub fn record(&self) -> Event {
        let event = Event::default();
        if self.send(Command::Record(event.clone())).is_err() {
            // A stream that has ended or failed runs nothing more, so the event is set now.
            event.set();
        }
        event
    }

    /// Delays later submissions until `event`, possibly of another stream, is set. Does not block.
    ///
    /// # Errors
    /// [`KernelError::Closed`] if the stream has ended.
    pub fn wait_for(&self, event: &Event) -> Result<(), KernelError> {
        if event.query() { Ok(()) } else { self.send(Command::Wait(event.clone())) }
    }

    /// Enables or disables Inf/NaN checks on launch outputs, from the next submission on. The checks are slow, so use
    /// them only for debugging.
    ///
    /// # Errors
    /// [`KernelError::Closed`] if the stream has ended.
    pub fn check_finite(&self, on: bool) -> Result<(), KernelError> {
        self.send(Command::CheckFinite(on))
    }

    /// Blocks until all work submitted so far has finished. Do not call this from a [`Notify`].
    ///
    /// # Errors
    /// [`KernelError::Closed`] if the stream has ended.
    pub fn synchronize(&self) -> Result<(), KernelError> {
        let event = Event::default();
        self.send(Command::Record(event.clone()))?;
        event.synchronize();
        Ok(())
    }

    /// Number of threads that run each kernel of this stream.
    pub fn threads(&self) -> usize {
        match &self.0 {
            StreamBackend::Cpu(stream) => stream.threads,
            StreamBackend::Cuda(_) => 1,
        }
    }

    /// Total time that the stream has spent in collectives: waiting for other members or transferring bytes.
    pub fn collective_time(&self) -> Duration {
        match &self.0 {
            StreamBackend::Cpu(stream) => stream.collective_time.get(),
            StreamBackend::Cuda(stream) => stream.collective_time(),
        }
    }
}
