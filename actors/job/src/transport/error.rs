//! The error type of connections.

use std::io;

use super::address::Address;
use super::handshake::{HandshakeError, Refusal};
use super::hello::Purpose;
use super::wire::WireError;
use crate::secret::RandomError;

/// Why a connection could not be established or has ended.
#[derive(Debug, thiserror::Error)]
#[allow(missing_docs, reason = "the error texts explain variants and fields")]
pub enum TransportError {
    #[error(transparent)]
    Random(#[from] RandomError),
    #[error("cannot listen on {address}: {cause}")]
    Listen { address: Address, cause: io::Error },
    /// `last` is the error of the last attempt that the deadline did not interrupt.
    #[error(
        "cannot connect to process {to} at {address} for {purpose}: {attempts} attempts failed in {waited_ms} ms; \
         the last error: {last}"
    )]
    Unreachable {
        to: u32,
        address: Address,
        purpose: Purpose,
        attempts: u32,
        waited_ms: u64,
        last: Box<TransportError>,
    },
    #[error("{operation} {peer}: {cause}")]
    Io { operation: &'static str, peer: String, cause: io::Error },
    #[error("handshake with {peer}: {cause}")]
    Handshake { peer: String, cause: HandshakeError },
    #[error("{peer}: {cause}")]
    Wire { peer: String, cause: WireError },
    #[error(
        "no connection from {} for {purpose} arrived in {waited_ms} ms{}",
        process_name(.from),
        describe_refusals(.refused)
    )]
    Missing { from: Option<u32>, purpose: Purpose, waited_ms: u64, refused: u64 },
    #[error("the listener is closed")]
    Closed,
    #[error("the connection to {peer} is not a Unix socket, so it cannot transfer file descriptors")]
    NotUnix { peer: String },
    #[error("{peer} sent {got} file descriptors, but {expected} were expected")]
    Descriptors { peer: String, expected: String, got: usize },
}

fn process_name(from: &Option<u32>) -> String {
    from.map_or("any process".into(), |process| format!("process {process}"))
}

fn describe_refusals(count: &u64) -> String {
    if *count == 0 { String::new() } else { format!("; {count} connections were refused since the start") }
}

/// The operation of a [`TransportError::Io`] if the accepting thread cannot start.
pub(super) const START_THREAD: &str = "cannot start the thread that accepts connections of";

impl TransportError {
    /// True if a system limit prevented the start of a thread.
    pub fn is_thread_limit(&self) -> bool {
        matches!(self, Self::Io { operation: START_THREAD, .. })
    }

    pub(super) fn io(operation: &'static str, peer: &impl ToString, cause: impl Into<io::Error>) -> Self {
        Self::Io { operation, peer: peer.to_string(), cause: cause.into() }
    }

    /// True if authentication failed or the protocols differ: a retry cannot succeed.
    pub fn is_authentication(&self) -> bool {
        match self {
            Self::Handshake { cause: HandshakeError::Refused(refusal), .. } => !refusal.is_temporary(),
            Self::Handshake { .. } => true,
            Self::Unreachable { last, .. } => last.is_authentication(),
            _ => false,
        }
    }

    /// The peer's authenticated refusal, if the peer has sent one.
    pub fn refusal(&self) -> Option<&Refusal> {
        match self {
            Self::Handshake { cause: HandshakeError::Refused(refusal), .. } => Some(refusal),
            Self::Unreachable { last, .. } => last.refusal(),
            _ => None,
        }
    }
}
