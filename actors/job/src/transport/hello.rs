//! What a dialler states about itself and the process that it dials.

use std::fmt;

use serde::{Deserialize, Serialize};

use crate::secret::{RandomError, random};

/// Maximum number of processes in a world.
pub const PROCESSES_MAX: u32 = 4096;

/// Random id of a session. Each restart of a world begins a new session. All bytes are zero before the rendezvous.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
pub struct SessionId(pub [u8; 16]);

impl SessionId {
    /// Creates a random id.
    pub fn random() -> Result<Self, RandomError> {
        Ok(Self(random()?))
    }
}

impl fmt::Display for SessionId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.iter().try_for_each(|byte| write!(f, "{byte:02x}"))
    }
}

/// The purpose of a connection.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
#[allow(missing_docs, reason = "the comments of the variants name the fields")]
pub enum Purpose {
    /// A connection to process 0 before the session exists.
    Rendezvous,
    /// Control messages: failure detection and the end of the session.
    Control,
    /// Messages and register data. `index` distinguishes several connections between the same two processes.
    Registers { index: u16 },
    /// One edge of a collective: group member `member` has dialled member `peer`. `group` is an index in the plan.
    Group { group: u32, member: u32, peer: u32 },
    /// Descriptors of shared memory, sent over a Unix socket.
    Memory,
}

impl fmt::Display for Purpose {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Rendezvous => write!(f, "rendezvous"),
            Self::Control => write!(f, "control"),
            Self::Registers { index } => write!(f, "register connection {index}"),
            Self::Group { group, member, peer } => write!(f, "group {group}, from member {member} to member {peer}"),
            Self::Memory => write!(f, "shared memory"),
        }
    }
}

/// The dialler's description of both processes; the handshake authenticates it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Hello {
    /// The session id; zero for [`Purpose::Rendezvous`].
    pub session: SessionId,
    /// The world's epoch. For [`Purpose::Rendezvous`], the number of restarts of the dialler.
    pub epoch: u64,
    /// The process that dials.
    pub from: u32,
    /// The process that is dialled.
    pub to: u32,
    /// Whether the bytes that follow the handshake are encrypted.
    pub sealed: bool,
    /// What the connection is for.
    pub purpose: Purpose,
}
