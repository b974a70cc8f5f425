//! An error in the user's graph, with the source line that caused it.

use std::panic::Location;

/// An error in the user's program.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct GraphError {
    /// Name of the op or tensor.
    pub subject: String,
    /// The cause, with the numbers, and what to change.
    pub message: String,
    /// The user's source line.
    pub location: &'static Location<'static>,
}

impl std::fmt::Display for GraphError {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{}: {}\n  at {}:{}", self.subject, self.message, self.location.file(), self.location.line())
    }
}
