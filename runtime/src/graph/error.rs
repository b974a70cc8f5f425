//! An error in the user's graph, with the source line that caused it.

use std::panic::Location;

/// The line of the user's program that created something.
pub type SourceLine = &'static Location<'static>;

/// An error in the user's program.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct GraphError {
    /// Name of the op or tensor.
    pub subject: String,
    /// The cause, with the numbers, and what to change.
    pub message: String,
    /// The user's source line.
    pub location: SourceLine,
}

impl std::fmt::Display for GraphError {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{}: {}\n  at {}:{}", self.subject, self.message, self.location.file(), self.location.line())
    }
}
