//! Connections between the processes of a world, each authenticated on both sides before a byte of it is believed: who
//! listens, who dials, and what goes before the first message.
//!
//! Layers: `error <- secret, wire <- handshake <- link <- dial, endpoint, descriptors`; `frame` and `folder` stand alone.
//!
//! What the handshake gives: both sides hold the job's secret, and mean the same session, epoch, processes and purpose. It
//! neither hides nor signs what follows: who can change packets on the way can change tensors. Where that matters, run the
//! world inside an encrypted network.

use std::fmt;

use serde::{Deserialize, Serialize};

mod connection;
pub mod descriptors;
mod dial;
mod error;
mod folder;
pub mod frame;
pub mod handshake;
pub mod listener;
mod secret;
pub mod wire;

pub use connection::{Address, Connection, DeadlineConnection, SEND_TIMEOUT, resolve, with_zone_of, without_zone};
pub use descriptors::{DESCRIPTORS_MAX, receive_descriptors, send_descriptors};
pub use dial::connect;
pub use error::TransportError;
pub use folder::PrivateFolder;
pub use frame::{FRAME_BYTES, Frame, FrameError};
pub use handshake::{AcceptPolicy, HandshakeError, PROTOCOL_VERSION, Refusal, SettledWorld};
pub use listener::{ListenAddress, Listener, ListenerOptions, Refusals, UNIX_PATH_BYTES_MAX};
pub use secret::{SECRET_BYTES_MIN, SharedKey};

/// Processes of one world, at most.
pub const PROCESSES_MAX: u32 = 4096;

/// Random name of one incarnation of a world; all zero before the processes have met.
#[derive(Clone, Copy, Default, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
pub struct SessionId(pub [u8; 16]);

impl SessionId {
    /// A fresh one.
    ///
    /// # Errors
    /// [`TransportError::Random`].
    pub fn random() -> Result<Self, TransportError> {
        Ok(Self(secret::random()?))
    }
}

impl fmt::Display for SessionId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.iter().try_for_each(|byte| write!(f, "{byte:02x}"))
    }
}

impl fmt::Debug for SessionId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

/// What a connection is for.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
pub enum Purpose {
    /// To process 0, before there is a session.
    Rendezvous,
    /// Supervision and the end of the session.
    Control,
    /// Messages and bytes of registers.
    Registers {
        /// One of several connections between the same two processes.
        lane: u16,
    },
    /// One edge of a collective.
    Group {
        /// Index of the group in the plan.
        group: u32,
        /// The member of the group that dialled.
        member: u32,
        /// The member that it wants.
        peer: u32,
    },
    /// Descriptors of shared memory; over a Unix socket.
    Memory,
}

impl fmt::Display for Purpose {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Rendezvous => write!(f, "rendezvous"),
            Self::Control => write!(f, "control"),
            Self::Registers { lane } => write!(f, "registers, lane {lane}"),
            Self::Group { group, member, peer } => write!(f, "group {group}, member {member} to {peer}"),
            Self::Memory => write!(f, "shared memory"),
        }
    }
}

/// What a dialler says of itself and of whom it wants; part of what both sides prove.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Hello {
    /// The session; zero for [`Purpose::Rendezvous`].
    pub session: SessionId,
    /// The incarnation of the world; for [`Purpose::Rendezvous`] how often the dialler has been restarted.
    pub epoch: u64,
    /// Process that dials.
    pub from: u32,
    /// Process that it wants.
    pub to: u32,
    /// What for.
    pub purpose: Purpose,
}
