//! Errors of checkpoints and of the stores that hold them.

use std::fmt;
use std::path::PathBuf;

/// What was being done with a store when it failed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum StoreOperation {
    /// Reading a file, or asking for its size.
    Read,
    /// Writing or committing.
    Write,
    /// Listing a folder.
    List,
    /// Deleting what is no longer needed.
    Delete,
}

impl fmt::Display for StoreOperation {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Read => "read",
            Self::Write => "write",
            Self::List => "list",
            Self::Delete => "delete",
        })
    }
}

/// What is wrong with a checkpoint or a file.
#[derive(Debug, thiserror::Error)]
pub enum CheckpointError {
    /// A local file cannot be read or written.
    #[error("{path}: {source}")]
    Io {
        /// The file.
        path: PathBuf,
        /// Why.
        source: std::io::Error,
    },
    /// It is not a safetensors file.
    #[error("{path}: not a complete safetensors file: {message}")]
    Format {
        /// The file.
        path: PathBuf,
        /// What the reader says.
        message: String,
    },
    /// A file of another program: a tensor is missing, too many or of another shape, or a declared value is another.
    #[error("{path}: {why}")]
    Unfit {
        /// The file.
        path: PathBuf,
        /// What differs, with the names and the numbers.
        why: String,
    },
    /// A tensor of an unsupported type.
    #[error("{path}: tensor {name} is {got}, expected {expected}; convert the file")]
    Dtype {
        /// The file.
        path: PathBuf,
        /// The tensor.
        name: String,
        /// The supported types.
        expected: String,
        /// The file's type.
        got: String,
    },
    /// Checkpoints cannot lie here.
    #[error("{place}: not a place for checkpoints: {why}")]
    Place {
        /// What was given.
        place: String,
        /// Why not.
        why: String,
    },
    /// The store failed.
    #[error("{file}: cannot {doing}: {source}")]
    Store {
        /// The file or folder.
        file: String,
        /// What was being done.
        doing: StoreOperation,
        /// What the store says.
        source: Box<object_store::Error>,
    },
    /// The store did not answer.
    #[error("{file}: cannot {doing}: no answer from the store within {seconds} s; a disk or server may have stalled")]
    Stalled {
        /// The file or folder.
        file: String,
        /// What was being done.
        doing: StoreOperation,
        /// How long it was waited for.
        seconds: f64,
    },
    /// A file of a committed checkpoint is missing, short, altered or not what it should be.
    #[error("{file}: damaged: {why}")]
    Damaged {
        /// The file.
        file: String,
        /// What is wrong, with the tensor and the numbers.
        why: String,
    },
    /// There is no committed checkpoint.
    #[error("{place}: no complete checkpoint{}", step.map(|s| format!(" of step {s}")).unwrap_or_default())]
    Absent {
        /// The store.
        place: String,
        /// The step that was asked for; `None` for any.
        step: Option<u64>,
    },
    /// The step has a checkpoint already.
    #[error("{file}: step {step} is committed already; committed checkpoints are never overwritten")]
    Exists {
        /// The manifest that is there.
        file: String,
        /// The step.
        step: u64,
    },
    /// Another training writes to the store.
    #[error("{place}: another run writes its checkpoints here: {holder}; end that run, or give this one another place")]
    Held {
        /// The store.
        place: String,
        /// Host, process, job, epoch and start time.
        holder: String,
    },
    /// Another training has taken the store from this one.
    #[error("{place}: this run has lost the lock and writes no more checkpoints: held by {holder}")]
    Fenced {
        /// The store.
        place: String,
        /// Host, process, job, epoch and start time.
        holder: String,
    },
    /// Too little free space for the checkpoints to keep.
    #[error("{place}: {why}")]
    NoRoom {
        /// The store.
        place: String,
        /// Checkpoints to be written, beyond the existing ones, at most at once.
        checkpoints: u64,
        /// How much is free, and how much is needed.
        why: String,
    },
    /// Not all processes see the same folder.
    #[error(
        "{place}: {ranks} cannot see a file that rank 0 has written there; it must be one folder for all nodes, such as on a network file system"
    )]
    NotShared {
        /// The store.
        place: String,
        /// Such as `rank 1, rank 3`.
        ranks: String,
    },
    /// Another process, or the agreement with the others, failed, so that nothing was committed.
    #[error("checkpoint of step {step} not committed: {source}")]
    Others {
        /// The step.
        step: u64,
        /// Who, and why.
        source: AgreeError,
    },
    /// What was asked for cannot be done.
    #[error("{0}")]
    Refused(String),
}

/// Why processes did not agree.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{}{why}", process.map(|p| format!("rank {p}: ")).unwrap_or_default())]
pub struct AgreeError {
    /// The process that failed, where it is known.
    pub process: Option<u32>,
    /// What it says.
    pub why: String,
}

impl CheckpointError {
    pub(crate) fn missing(path: impl Into<PathBuf>, name: &str) -> Self {
        Self::Unfit { path: path.into(), why: format!("has no tensor {name}; it was saved by another model") }
    }

    pub(crate) fn shape(path: impl Into<PathBuf>, name: &str, expected: &str, got: &str) -> Self {
        let why = format!("tensor {name}: expected {expected}, got {got}; it was saved by a model of other sizes");
        Self::Unfit { path: path.into(), why }
    }

    /// True for a file that could not be created because it is there.
    pub(crate) fn is_there(&self) -> bool {
        use object_store::Error::{AlreadyExists, Precondition};
        matches!(self, Self::Store { source, .. } if matches!(**source, AlreadyExists { .. } | Precondition { .. }))
    }

    /// The kind of the underlying system error, if there is one.
    pub fn io_kind(&self) -> Option<std::io::ErrorKind> {
        crate::files::system_error(self).map(std::io::Error::kind)
    }

    /// True when a checkpoint itself is no good, so that an older one may help; false for a store that does not answer,
    /// or a program that the checkpoint does not fit.
    pub fn is_damage(&self) -> bool {
        matches!(self, Self::Damaged { .. })
    }

    /// The exit code of a program that ends by this: 2 usage, 65 bad data, 73 cannot write.
    pub fn exit_code(&self) -> u8 {
        match self {
            Self::Place { .. } | Self::Refused(_) => 2,
            Self::Store { doing, .. } | Self::Stalled { doing, .. } => match doing {
                StoreOperation::Read | StoreOperation::List => 65,
                StoreOperation::Write | StoreOperation::Delete => 73,
            },
            Self::Exists { .. } | Self::Others { .. } | Self::Held { .. } | Self::Fenced { .. } => 73,
            Self::NoRoom { .. } | Self::NotShared { .. } => 73,
            _ => 65,
        }
    }
}
