//! An error in the user's graph, with the source line that caused it.

use std::panic::Location;

/// The source line of the user's program that created a node or a tensor.
pub type SourceLine = &'static Location<'static>;

/// An error in the user's program.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{subject}: {message}\n  at {}:{}", .location.file(), .location.line())]
pub struct GraphError {
    /// Name of the op or tensor.
    pub subject: String,
    /// The cause, with the numbers, and what to change.
    pub message: String,
    /// The user's source line.
    pub location: SourceLine,
}
