//! The errors of a session.

use shardflow_kernels::error::{KernelError, THREADS_HINT};

use crate::check::SpecError;
use crate::frame::FrameError;
use crate::protocol::ProtocolError;

/// The first cause of a session's end. Later failures follow from it.
#[derive(Clone, Debug, thiserror::Error, PartialEq)]
#[allow(missing_docs, reason = "the texts describe variants and fields")]
pub enum Failure {
    #[error("{actor} on device {device}, action {action}: {cause}")]
    Kernel { actor: String, device: usize, action: String, cause: Box<KernelError> },
    #[error("{actor} on device {device}: {cause}")]
    Protocol { actor: String, device: usize, cause: ProtocolError },
    /// An actor panicked. This is a bug in this crate.
    #[error("{actor} on device {device} panicked{}: {message}", .action.as_ref().map(|a| format!(" in action {a}")).unwrap_or_default())]
    Panic { actor: String, device: usize, action: Option<String>, message: String },
    #[error("rank {process}: {cause}")]
    Peer { process: u32, cause: PeerError },
    /// There is no progress although work is left. If the cause lies in another process, `process` is that process's
    /// number. `report` lists what each actor waits for.
    #[error("no progress for {idle_ms} ms: {cause}\n{report}")]
    Stalled { idle_ms: u64, cause: String, process: Option<u32>, report: String },
}

impl Failure {
    /// True if another process failed, not this one.
    pub fn is_peer_failure(&self) -> bool {
        matches!(self, Self::Peer { .. } | Self::Stalled { process: Some(_), .. })
    }
}

/// A failure of a peer process.
#[derive(Clone, Debug, thiserror::Error, PartialEq)]
#[allow(missing_docs, reason = "the texts describe variants and fields")]
pub enum PeerError {
    #[error("connection lost: {message}")]
    Lost { message: String },
    #[error("sent an unreadable frame: {0}")]
    Frame(#[from] FrameError),
    #[error("sent {message}; the plan does not allow this")]
    Unexpected { message: String },
    #[error("sent a message that violates the protocol: {0}")]
    Protocol(ProtocolError),
    #[error("did not become ready within {seconds} s")]
    Late { seconds: u64 },
    #[error("ended the session before this process did: run the same number of steps on all processes")]
    Ended,
    #[error("{cause}")]
    Failed { cause: String, exit: u8 },
}

impl From<std::io::Error> for PeerError {
    fn from(error: std::io::Error) -> Self {
        let closed = error.kind() == std::io::ErrorKind::UnexpectedEof;
        Self::Lost { message: if closed { "the peer closed it".into() } else { error.to_string() } }
    }
}

/// Errors of [`crate::shell::start`].
#[derive(Clone, Debug, thiserror::Error, PartialEq)]
#[allow(missing_docs, reason = "the texts describe variants and fields")]
pub enum ActorError {
    #[error(transparent)]
    Spec(#[from] SpecError),
    #[error("{at}: {part}: expected {expected}, got {got}")]
    Loaded { at: String, part: &'static str, expected: String, got: String },
    #[error("cannot start the thread of device {device}: {message}; {THREADS_HINT}")]
    Thread { device: usize, message: String },
    #[error("the session has ended: {0}")]
    Ended(#[from] Failure),
}
