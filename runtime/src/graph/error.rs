//! An error of the user's graph, with the line that caused it.

use std::panic::Location;

/// Something the user's program asks for that cannot be.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct GraphError {
    /// Name of the op or tensor.
    pub what: String,
    /// What is wrong, with the numbers, and what to change.
    pub message: String,
    /// Where the user wrote it.
    pub location: &'static Location<'static>,
}

impl std::fmt::Display for GraphError {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{}: {}\n  at {}:{}", self.what, self.message, self.location.file(), self.location.line())
    }
}
