//! Submissions to a stream, their notifications, and code for notifications that all backends share.

use std::any::Any;
use std::sync::Arc;

use crate::error::KernelError;
use crate::event::Event;
use crate::memory::Base;
use crate::op::{Op, Program};

/// Target of the TRACE event that the stream's thread logs before each launch.
const LAUNCH: &str = "shardflow::launch";

/// Receives the notifications of a submission on a thread of the backend. The call must not block.
pub type Notify = Box<dyn FnMut(Notification) + Send>;

/// An event in the execution of a submission.
#[derive(Clone, Debug, PartialEq)]
pub enum Notification {
    /// The launches before a signal of the program have finished. Contains the signal's tag.
    Signal(u32),
    /// The submission's first write that contains Inf or NaN. Sent only if
    /// [`Stream::check_finite`](crate::stream::Stream::check_finite) is enabled.
    NotFinite {
        /// Index of the launch in the program.
        launch: usize,
        /// Index among the launch's writes.
        write: usize,
        /// Number of elements that are Inf or NaN.
        elements: usize,
    },
    /// All launches have finished. The last notification is always `Done` or `Failed`, and only one of these is sent.
    Done,
    /// A launch failed, and the later launches were skipped. The stream continues with the next submission.
    Failed(KernelError),
}

/// A program to run, and its memory. The arenas stay alive until the program has ended.
pub struct Submission {
    /// The launches to run.
    pub program: Arc<Program>,
    /// The addresses to which the offsets of the program's buffers are relative.
    pub bases: Vec<Base>,
    /// True if launches marked `accumulate` add to the existing values instead of overwriting them.
    pub repeat: bool,
    /// Receives signals and the result.
    pub notify: Notify,
}

/// A command in a stream's queue. `R` is the backend's form of a submission.
pub(crate) enum Command<R = Submission> {
    Run(R),
    Record(Event),
    Wait(Event),
    CheckFinite(bool),
}

fn op_name(program: &Program, index: usize) -> &str {
    program.launches.get(index).map_or("none", |launch| launch.op.name())
}

pub(crate) fn trace_launch(program: &Program, index: usize) {
    let (name, op, launches) = (program.name.as_str(), op_name(program, index), program.launches.len());
    tracing::trace!(target: LAUNCH, program = name, op, index, launches);
}

pub(crate) fn launch_panic(program: &Program, index: usize, panic: &(dyn Any + Send)) -> KernelError {
    let text = panic.downcast_ref::<&str>().copied();
    let message =
        text.or_else(|| panic.downcast_ref::<String>().map(String::as_str)).unwrap_or("no message").to_owned();
    let launch = format!("{index} ({})", op_name(program, index));
    KernelError::Panic { launch, program: program.name.clone(), message }
}

/// Counts, among the floats that an op has written, the Inf and NaN values that indicate an error.
pub(crate) fn faults(op: &Op, shape: &[usize], values: &[f32]) -> usize {
    let is_fault = |value: &f32| match op {
        // The maximum of an empty row is -Inf.
        Op::RowMax => !value.is_finite() && *value != f32::NEG_INFINITY,
        _ => !value.is_finite(),
    };
    let count = |values: &[f32]| values.iter().filter(|value| is_fault(value)).count();
    match op {
        // The op writes only the elements inside the box.
        Op::CopyRegion { dst, .. } => dst.runs(shape).into_iter().map(|run| count(&values[run])).sum(),
        _ => count(values),
    }
}
