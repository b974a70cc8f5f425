//! Errors of a membership.

use std::io;

use super::cause::FirstCause;
use super::control_message::MESSAGE_BYTES_MAX;
use super::outbox;
use crate::exit::Exit;

/// Errors of a membership.
#[derive(Debug, thiserror::Error)]
pub enum MembershipError {
    /// The configuration contradicts itself.
    #[error("membership of process {process} of {processes}: {problem}")]
    Config {
        /// Number of this process.
        process: u32,
        /// Number of processes.
        processes: u32,
        /// The contradiction.
        problem: String,
    },
    /// A system call failed.
    #[error("cannot {operation}: {source}")]
    Io {
        /// The operation.
        operation: &'static str,
        /// The system's error.
        source: io::Error,
    },
    /// Peers did not connect in time.
    #[error("processes {processes:?} did not join within {seconds:.1} s: see their logs")]
    Missing {
        /// The missing processes.
        processes: Vec<u32>,
        /// The waiting time.
        seconds: f64,
    },
    /// A peer closed its connection during the start.
    #[error("process {process} closed its control connection while joining: see its log")]
    Closed {
        /// The peer.
        process: u32,
    },
    /// A message is too large for the control plane.
    #[error("a message of {bytes} bytes exceeds the control plane's maximum of {MESSAGE_BYTES_MAX} bytes")]
    TooLarge {
        /// Size of the message.
        bytes: usize,
    },
    /// A peer does not read its messages.
    #[error(
        "{messages} messages ({bytes} bytes) wait for process {process}, which reads none; at most {} ({} MiB) may",
        outbox::MESSAGES_MAX,
        outbox::BYTES_MAX >> 20
    )]
    Backlog {
        /// The peer.
        process: u32,
        /// Messages that wait to be sent to it.
        messages: u64,
        /// Their size in bytes.
        bytes: u64,
    },
    /// There is no such peer.
    #[error("process {process} is not a peer: the world has {processes} processes, including this one")]
    NoPeer {
        /// The requested number.
        process: u32,
        /// Number of processes of the world.
        processes: u32,
    },
    /// The peer has left, or its connection is closed.
    #[error("process {process} has left or is disconnected")]
    Gone {
        /// The peer.
        process: u32,
    },
    /// The session has ended.
    #[error("the session has ended: {0}")]
    Ended(FirstCause),
    /// This process has left the session.
    #[error("this process has left the session")]
    Left,
}

impl MembershipError {
    /// The exit code for this error.
    pub fn exit(&self) -> Exit {
        match self {
            Self::Config { .. } | Self::Io { .. } => Exit::Internal,
            Self::TooLarge { .. } | Self::NoPeer { .. } | Self::Left => Exit::Internal,
            Self::Missing { .. } | Self::Closed { .. } | Self::Backlog { .. } | Self::Gone { .. } => {
                Exit::PeerUnavailable
            }
            Self::Ended(first) => Exit::from_code(first.exit),
        }
    }
}
