//! Errors of connections.

use std::io;

use super::Purpose;
use super::connection::Address;
use super::handshake::{HandshakeError, Refusal};
use super::wire::WireError;
use crate::secret::RandomError;

/// Why a connection could not be established, or why it ended.
#[derive(Debug, thiserror::Error)]
pub enum TransportError {
    /// The system returns no random numbers.
    #[error(transparent)]
    Random(#[from] RandomError),
    /// An address that is neither `HOST:PORT` nor `unix:PATH`.
    #[error("'{text}' is not an address: expected HOST:PORT or unix:PATH")]
    Address {
        /// The text.
        text: String,
    },
    /// Listening failed.
    #[error("cannot listen on {address}: {cause}")]
    Listen {
        /// The address.
        address: Address,
        /// The system's error.
        #[source]
        cause: io::Error,
    },
    /// No connection before the deadline.
    #[error(
        "no connection to process {to} at {address} for {purpose}: {attempts} attempts in {waited_ms} ms, the last error: {last}"
    )]
    Unreachable {
        /// The process to connect to.
        to: u32,
        /// Its address.
        address: Address,
        /// The purpose.
        purpose: Purpose,
        /// Number of attempts.
        attempts: u32,
        /// Milliseconds since the first attempt.
        waited_ms: u64,
        /// The error of the last attempt that was not cut short.
        last: Box<TransportError>,
    },
    /// A system call failed.
    #[error("{operation} {peer}: {cause}")]
    Io {
        /// The operation, such as `connecting to`.
        operation: &'static str,
        /// The peer.
        peer: String,
        /// The system's error.
        #[source]
        cause: io::Error,
    },
    /// The handshake failed on this side, or the peer refused.
    #[error("handshake with {peer}: {cause}")]
    Handshake {
        /// The peer.
        peer: String,
        /// The error.
        #[source]
        cause: HandshakeError,
    },
    /// A message after the handshake could not be read or written.
    #[error("{peer}: {cause}")]
    Wire {
        /// The peer.
        peer: String,
        /// The error.
        #[source]
        cause: WireError,
    },
    /// No process dialled before the deadline.
    #[error("no connection from {} for {purpose} in {waited_ms} ms{}", process_name(.from), describe_refusals(.refused))]
    Missing {
        /// The expected process; `None` for any.
        from: Option<u32>,
        /// The purpose.
        purpose: Purpose,
        /// Waiting time in milliseconds.
        waited_ms: u64,
        /// Number of connections that this listener has rejected since its start.
        refused: u64,
    },
    /// This side closed its listener.
    #[error("the listener is closed")]
    Closed,
    /// Only Unix sockets can transfer descriptors.
    #[error("{peer} is not a Unix socket: it cannot transfer descriptors")]
    NotUnix {
        /// The peer.
        peer: String,
    },
    /// Unexpected number of descriptors.
    #[error("{peer}: {got} descriptors, expected {expected}")]
    Descriptors {
        /// The peer.
        peer: String,
        /// The expected number.
        expected: String,
        /// The actual number.
        got: usize,
    },
}

fn process_name(from: &Option<u32>) -> String {
    from.map_or("any process".into(), |process| format!("process {process}"))
}

fn describe_refusals(count: &u64) -> String {
    if *count == 0 { String::new() } else { format!("; {count} connections were refused since the start") }
}

impl TransportError {
    pub(super) fn io(operation: &'static str, peer: &impl ToString, cause: impl Into<io::Error>) -> Self {
        Self::Io { operation, peer: peer.to_string(), cause: cause.into() }
    }

    /// True if authentication failed or the protocols differ, so that a retry cannot succeed.
    pub fn is_authentication(&self) -> bool {
        match self {
            Self::Handshake { cause: HandshakeError::Refused(refusal), .. } => !refusal.is_temporary(),
            Self::Handshake { .. } => true,
            Self::Unreachable { last, .. } => last.is_authentication(),
            _ => false,
        }
    }

    /// The peer's authenticated refusal, if there is one.
    pub fn refusal(&self) -> Option<&Refusal> {
        match self {
            Self::Handshake { cause: HandshakeError::Refused(refusal), .. } => Some(refusal),
            Self::Unreachable { last, .. } => last.refusal(),
            _ => None,
        }
    }
}
