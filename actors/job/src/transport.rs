//! Connections between the processes of a world: listening, dialling, and the handshake that authenticates both sides.
//!
//! The handshake proves that both sides hold the job's secret and agree on session, epoch, processes and purpose. Later
//! bytes are encrypted and authenticated only if the dialler requests it ([`Hello::sealed`]).

mod address;
mod connection;
pub mod descriptors;
mod dial;
mod error;
mod folder;
pub mod handshake;
mod hello;
pub mod listener;
mod sealed;
pub mod wire;

pub(crate) use address::first_success;
pub use address::{Address, UNIX_PATH_BYTES_MAX, resolve, with_zone_of, without_zone};
pub use connection::{Connection, SEND_TIMEOUT, Socket};
pub use descriptors::{receive_descriptors, send_descriptors};
pub use dial::connect;
pub use error::TransportError;
pub use folder::PrivateFolder;
pub use handshake::{HandshakeError, Refusal, SettledWorld};
pub use hello::{Hello, PROCESSES_MAX, Purpose, SessionId};
pub use listener::{ListenAddress, Listener, ListenerOptions};
