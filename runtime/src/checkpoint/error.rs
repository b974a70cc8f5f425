//! Errors of checkpoints and of the stores that hold them.

use shardflow_kernels::error::THREADS_HINT;
use std::fmt;
use std::path::PathBuf;

use super::manifest::VERSION;

/// The failed operation on a store.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum StoreOperation {
    /// Reading a file or its size.
    Read,
    /// Writing a file, or committing.
    Write,
    /// Listing a folder.
    List,
    /// Deleting files that are no longer needed.
    Delete,
}

impl fmt::Display for StoreOperation {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(["read", "write", "list", "delete"][*self as usize])
    }
}

/// Errors of checkpoints, parameter files and stores.
#[derive(Debug, thiserror::Error)]
#[allow(missing_docs, reason = "the messages explain the fields")]
pub enum CheckpointError {
    #[error("{path}: {source}")]
    Io { path: PathBuf, source: std::io::Error },
    #[error("{path}: not a complete safetensors file: {message}")]
    Format { path: PathBuf, message: String },
    /// The file does not fit the program. For example, a tensor is missing, unknown to the program or of another shape,
    /// or a declared value differs.
    #[error("{path}: {why}")]
    Unfit { path: PathBuf, why: String },
    #[error("{path}: tensor {name} is {got}, expected {expected}; convert the file")]
    Dtype { path: PathBuf, name: String, expected: String, got: String },
    #[error("{place}: cannot store checkpoints here: {why}")]
    Place { place: String, why: String },
    #[error("{file}: cannot {doing}: {source}")]
    Store { file: String, doing: StoreOperation, source: Box<object_store::Error> },
    #[error("{file}: cannot {doing}: no response from the store within {seconds} s; a disk or server may have stalled")]
    Stalled { file: String, doing: StoreOperation, seconds: f64 },
    /// A file of a committed checkpoint is missing, truncated, altered or invalid.
    #[error("{file}: damaged: {why}")]
    Damaged { file: String, why: String },
    #[error(
        "{file}: the format version is {version}, but this program reads only 1 to {VERSION}; use the build that wrote the file"
    )]
    Newer { file: String, version: u32 },
    #[error("{place}: no complete checkpoint{}", step.map(|s| format!(" of step {s}")).unwrap_or_default())]
    Absent { place: String, step: Option<u64> },
    #[error("{place}: the checkpoint of step {step} was deleted while it was read")]
    Deleted { place: String, step: u64 },
    #[error("{file}: step {step} already has a committed checkpoint; committed checkpoints are never overwritten")]
    Exists { file: String, step: u64 },
    #[error("{place}: another run writes its checkpoints here: {holder}; end that run, or use another place")]
    Held { place: String, holder: String },
    #[error("{place}: this run has lost the lock and writes no more checkpoints: the lock is held by {holder}")]
    Fenced { place: String, holder: String },
    #[error("{place}: {why}")]
    NoRoom { place: String, checkpoints: u64, why: String },
    #[error(
        "{place}: {ranks} cannot see a file that rank 0 has written there; all nodes must share the folder, so use a network file system"
    )]
    NotShared { place: String, ranks: String },
    /// Another process failed, or the processes could not agree.
    #[error("the checkpoint of step {step} was not committed: {source}")]
    Others { step: u64, source: AgreeError },
    #[error("{place}: rank {rank} {problem}; see the log of rank {rank}")]
    OnRank { place: String, rank: u32, exit: u8, problem: String },
    #[error("cannot start a thread for checkpoints: {0}; {THREADS_HINT}")]
    Thread(std::io::Error),
    #[error("{0}")]
    Refused(String),
}

/// Why processes did not agree on a save.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{}{why}", process.map(|p| format!("rank {p}: ")).unwrap_or_default())]
pub struct AgreeError {
    /// The process that failed, if known.
    pub process: Option<u32>,
    /// The reason.
    pub why: String,
}

impl CheckpointError {
    pub(crate) fn missing(path: impl Into<PathBuf>, name: &str) -> Self {
        Self::Unfit { path: path.into(), why: format!("it has no tensor {name}; another model saved it") }
    }

    pub(crate) fn shape(path: impl Into<PathBuf>, name: &str, expected: &str, got: &str) -> Self {
        let why = format!("tensor {name}: expected {expected}, got {got}; a model with other sizes saved this file");
        Self::Unfit { path: path.into(), why }
    }

    /// True if a file could not be created because it already exists.
    pub(crate) fn is_there(&self) -> bool {
        use object_store::Error::{AlreadyExists, Precondition};
        matches!(self, Self::Store { source, .. } if matches!(**source, AlreadyExists { .. } | Precondition { .. }))
    }

    /// The kind of the underlying system error, if there is one.
    pub fn io_kind(&self) -> Option<std::io::ErrorKind> {
        crate::files::system_error(self).map(std::io::Error::kind)
    }

    /// True if the checkpoint is damaged; an older checkpoint may then be good. False for any other cause, for instance
    /// if the checkpoint is unfit or deleted.
    pub fn is_damage(&self) -> bool {
        matches!(self, Self::Damaged { .. })
    }

    /// The exit code of a program that ends with this error: 2 for a usage error, 65 for bad data or a failed read, 73
    /// for a failed write or an unusable store, 78 if no thread can start. Another rank's error keeps its code.
    pub fn exit_code(&self) -> u8 {
        match self {
            Self::Place { .. } | Self::Refused(_) => 2,
            Self::OnRank { exit, .. } => *exit,
            Self::Thread(_) => 78,
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
