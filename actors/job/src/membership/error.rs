//! The error type of a membership.

use std::io;

use super::cause::FirstCause;
use super::control_message::MESSAGE_BYTES_MAX;
use super::outbox;
use crate::exit::Exit;

/// Why a membership could not start or continue.
#[derive(Debug, thiserror::Error)]
#[allow(missing_docs, reason = "the error texts explain variants and fields")]
pub enum MembershipError {
    #[error("cannot start the membership of process {process} of {processes}: {problem}")]
    Config { process: u32, processes: u32, problem: String },
    #[error("cannot {operation}: {source}")]
    Io { operation: &'static str, source: io::Error },
    #[error("processes {processes:?} did not join within {seconds:.1} s: see their logs")]
    Missing { processes: Vec<u32>, seconds: f64 },
    #[error("process {process} closed its control connection while joining: see its log")]
    Closed { process: u32 },
    #[error("a message of {bytes} bytes exceeds the control plane's maximum of {MESSAGE_BYTES_MAX} bytes")]
    TooLarge { bytes: usize },
    #[error(
        "process {process} does not read its messages: {messages} messages ({bytes} bytes) are queued for it; the \
         maximum is {} messages or {} MiB",
        outbox::MESSAGES_MAX,
        outbox::BYTES_MAX >> 20
    )]
    Backlog { process: u32, messages: u64, bytes: u64 },
    #[error("cannot send a message to process {process}: it must be another process of this world of {processes}")]
    NoPeer { process: u32, processes: u32 },
    #[error(
        "invalid numbers for topic {topic}: the topic must be below 64, and each field must have the number of words \
         that its merge rule requires"
    )]
    Numbers { topic: u16 },
    #[error("process {process} has left or is disconnected")]
    Gone { process: u32 },
    #[error("the session has ended: {0}")]
    Ended(FirstCause),
    #[error("this process has left the session")]
    Left,
}

impl MembershipError {
    /// The exit code for this error.
    pub fn exit(&self) -> Exit {
        match self {
            // `WouldBlock` means that the system cannot start a thread.
            Self::Io { source, .. } if source.kind() == io::ErrorKind::WouldBlock => Exit::Refused,
            Self::Config { .. } | Self::Io { .. } => Exit::Internal,
            Self::TooLarge { .. } | Self::NoPeer { .. } | Self::Numbers { .. } | Self::Left => Exit::Internal,
            Self::Missing { .. } | Self::Closed { .. } | Self::Backlog { .. } | Self::Gone { .. } => {
                Exit::PeerUnavailable
            }
            Self::Ended(first) => Exit::from_code(first.exit),
        }
    }
}
