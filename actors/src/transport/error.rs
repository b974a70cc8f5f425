//! What can go wrong with a connection.

use std::io;

use super::connection::Address;
use super::handshake::{HandshakeError, Refusal};
use super::wire::WireError;
use super::{Purpose, SECRET_BYTES_MIN};

/// Why there is no connection, or why it ended.
#[derive(Debug, thiserror::Error)]
pub enum TransportError {
    /// The job's secret is too short to keep anybody out.
    #[error(
        "the job's secret has {bytes} bytes, at least {SECRET_BYTES_MIN} are needed: \
         let the launcher draw one, or give 32 random hexadecimal digits"
    )]
    WeakSecret {
        /// Its length without surrounding white space.
        bytes: usize,
    },
    /// The system gives no random numbers.
    #[error("no random numbers from the system: {message}")]
    Random {
        /// What the system says.
        message: String,
    },
    /// An address that is neither `HOST:PORT` nor `unix:PATH`.
    #[error("'{text}' is no address: expected HOST:PORT or unix:PATH")]
    Address {
        /// What was given.
        text: String,
    },
    /// Cannot listen.
    #[error("cannot listen on {address}: {cause}")]
    Listen {
        /// Where.
        address: Address,
        /// What the system says.
        #[source]
        cause: io::Error,
    },
    /// Nobody answered until the deadline.
    #[error(
        "no connection to process {to} at {address} for {purpose}: tried {attempts} times in {waited_ms} ms, last: {last}"
    )]
    Unreachable {
        /// Process wanted.
        to: u32,
        /// Where it should be.
        address: Address,
        /// What for.
        purpose: Purpose,
        /// Times tried.
        attempts: u32,
        /// Milliseconds since the first.
        waited_ms: u64,
        /// Why the last one failed.
        last: Box<TransportError>,
    },
    /// The system failed a call.
    #[error("{doing} {peer}: {cause}")]
    Io {
        /// What was tried, such as `connecting to`.
        doing: &'static str,
        /// The other side.
        peer: String,
        /// What the system says.
        #[source]
        cause: io::Error,
    },
    /// The handshake failed on this side, or the other side refused.
    #[error("handshake with {peer}: {cause}")]
    Handshake {
        /// The other side.
        peer: String,
        /// Why.
        #[source]
        cause: HandshakeError,
    },
    /// A message after the handshake could not be read or written.
    #[error("{peer}: {cause}")]
    Wire {
        /// The other side.
        peer: String,
        /// Why.
        #[source]
        cause: WireError,
    },
    /// Nobody dialled until the deadline.
    #[error("no connection from {} for {purpose} in {waited_ms} ms{}", who(.from), refusals(.refused))]
    Missing {
        /// Process that should have dialled; any, when `None`.
        from: Option<u32>,
        /// What for.
        purpose: Purpose,
        /// Milliseconds waited.
        waited_ms: u64,
        /// Connections that this side refused since it listens.
        refused: u64,
    },
    /// This side closed its endpoint.
    #[error("the endpoint is closed")]
    Closed,
    /// Descriptors pass through Unix sockets only.
    #[error("{peer} is no Unix socket: descriptors cannot be passed")]
    NotUnix {
        /// The other side.
        peer: String,
    },
    /// Not the descriptors that were promised.
    #[error("{peer}: {got} descriptors, expected {expected}")]
    Descriptors {
        /// The other side.
        peer: String,
        /// How many were due.
        expected: String,
        /// How many came, or would have to go.
        got: usize,
    },
}

fn who(from: &Option<u32>) -> String {
    from.map_or("any process".into(), |process| format!("process {process}"))
}

fn refusals(count: &u64) -> String {
    if *count == 0 { String::new() } else { format!("; {count} connections were refused since the start") }
}

impl TransportError {
    pub(super) fn io(doing: &'static str, peer: &impl ToString, cause: impl Into<io::Error>) -> Self {
        Self::Io { doing, peer: peer.to_string(), cause: cause.into() }
    }

    /// True when one side does not believe the other, or does not speak its protocol: trying again will not help.
    pub fn is_authentication(&self) -> bool {
        match self {
            Self::WeakSecret { .. } => true,
            Self::Handshake { cause: HandshakeError::Refused(refusal), .. } => !refusal.is_passing(),
            Self::Handshake { .. } => true,
            Self::Unreachable { last, .. } => last.is_authentication(),
            _ => false,
        }
    }

    /// What the other side answered, when it was an authenticated refusal.
    pub fn refusal(&self) -> Option<&Refusal> {
        match self {
            Self::Handshake { cause: HandshakeError::Refused(refusal), .. } => Some(refusal),
            Self::Unreachable { last, .. } => last.refusal(),
            _ => None,
        }
    }
}
