//! The handshake of a connection, as a state machine on bytes without sockets, so that it can be fuzzed.
//!
//! ```text
//! dialler                                        acceptor
//! greeting: magic, version, nonce a ───────────►
//!                       ◄─────────── greeting: magic, version, nonce b
//! proof: hello, MAC over both greetings, hello ►
//!                       ◄─────── verdict, MAC over both greetings, proof, verdict
//! ```
//!
//! - **HS-1**: neither side uses a hello or a verdict before it has verified the MAC. Until then it reads only magic,
//!   version and lengths, which do not depend on the secret.
//! - **HS-2**: both MACs cover both nonces, so a recorded message is invalid in any other handshake.
//! - **HS-3**: the two MACs have different domains, so a MAC of one side is never valid as one of the other.
//! - **HS-4**: the dialler proves first: an acceptor sends no MAC to a dialler without the secret.
//! - **HS-5**: the hello names both processes, so a proof for one process is invalid at another.
//!
//! On the wire, the length of each message precedes it as a little-endian u16.

use serde::{Deserialize, Serialize};

use super::wire::{self, WireError};
use super::{Hello, PROCESSES_MAX, SessionId, SharedKey};

/// Version of all messages between processes. Any change to a message increments it.
pub const PROTOCOL_VERSION: u16 = 2;
/// Maximum size of a handshake message in bytes.
pub const HANDSHAKE_BYTES_MAX: usize = 1024;
/// Size of a greeting in bytes.
pub const GREETING_BYTES: usize = 38;

/// A number used once.
pub type Nonce = [u8; 32];
/// Magic, version, nonce.
pub type Greeting = [u8; GREETING_BYTES];

const MAGIC: [u8; 4] = *b"SHFL";
const MAC_BYTES: usize = 32;
const DIALLER: &str = "handshake: dialler";
const ACCEPTOR: &str = "handshake: acceptor";

/// Why an acceptor refuses an authenticated dialler. The dialler receives it under a MAC.
#[derive(Clone, Debug, thiserror::Error, PartialEq, Eq, Serialize, Deserialize)]
pub enum Refusal {
    /// Another session of the same job.
    #[error("it is in session {acceptor}, this process is in session {dialler}")]
    Session {
        /// Session of the acceptor.
        acceptor: SessionId,
        /// Session of the dialler.
        dialler: SessionId,
    },
    /// The dialler belongs to an incarnation that has ended.
    #[error("epoch {dialler} has ended, epoch {acceptor} is running")]
    OldEpoch {
        /// Epoch of the acceptor.
        acceptor: u64,
        /// Epoch of the dialler.
        dialler: u64,
    },
    /// The acceptor belongs to an incarnation that has ended; it will exit soon.
    #[error("it is still in epoch {acceptor}, this process is in epoch {dialler}")]
    NewEpoch {
        /// Epoch of the acceptor.
        acceptor: u64,
        /// Epoch of the dialler.
        dialler: u64,
    },
    /// The world is complete and running; no process can join it.
    #[error("epoch {epoch} is running: this process is too late, or its rank is already taken")]
    Late {
        /// The running epoch.
        epoch: u64,
    },
    /// The acceptor has not finished the rendezvous.
    #[error("it has not started yet")]
    NotStarted,
    /// A process number that the world does not have.
    #[error("there is no process {process} in a world of {processes}")]
    Process {
        /// The number.
        process: u32,
        /// Processes of the world.
        processes: u32,
    },
    /// The dialler expected another process at this address.
    #[error("expected process {expected} at this address, found process {actual}")]
    WrongProcess {
        /// The process that the dialler expected.
        expected: u32,
        /// The acceptor's process.
        actual: u32,
    },
    /// The acceptor cannot decode the hello, for example because of an unknown purpose.
    #[error("it cannot decode the hello: do both processes run the same build?")]
    Unreadable,
    /// The acceptor has too many unclaimed connections.
    #[error("it has {unclaimed} unclaimed connections, the maximum")]
    Crowded {
        /// Number of unclaimed connections.
        unclaimed: u64,
    },
}

impl Refusal {
    /// True if a retry may succeed.
    pub fn is_temporary(&self) -> bool {
        matches!(self, Self::NotStarted | Self::Crowded { .. } | Self::NewEpoch { .. })
    }
}

/// Why a handshake failed.
#[derive(Debug, thiserror::Error)]
pub enum HandshakeError {
    /// The peer uses another protocol.
    #[error("it does not speak Shardflow's protocol: is the address right?")]
    Magic,
    /// The peer uses another version of the protocol.
    #[error("it speaks protocol version {peer}, this process speaks {own}: all processes must run the same build")]
    Version {
        /// Version of this side.
        own: u16,
        /// Version of the peer.
        peer: u16,
    },
    /// A message with an invalid length.
    #[error("it sent a {message} with an invalid length of {bytes} bytes")]
    Length {
        /// Name of the message.
        message: &'static str,
        /// Its length.
        bytes: usize,
    },
    /// The peer returned this side's greeting.
    #[error("it returns this process's own greeting: the address leads back to this process")]
    Echo,
    /// The peer's MAC is wrong.
    #[error("it does not hold this job's secret, or its message was modified")]
    Proof,
    /// The acceptor rejected this side's proof. This answer has no MAC.
    #[error("it rejects this process's proof of the job's secret: is the same secret set everywhere?")]
    Denied,
    /// The hello or the verdict cannot be decoded although its MAC is valid.
    #[error("it holds the secret, but its message cannot be decoded: {0}")]
    Unreadable(WireError),
    /// The acceptor authenticated this process and refuses it.
    #[error("refused: {0}")]
    Refused(Refusal),
}

/// Returns the first message of either side.
pub fn greeting(nonce: &Nonce) -> Greeting {
    let mut message = [0; GREETING_BYTES];
    message[..4].copy_from_slice(&MAGIC);
    message[4..6].copy_from_slice(&PROTOCOL_VERSION.to_le_bytes());
    message[6..].copy_from_slice(nonce);
    message
}

/// Checks the peer's greeting. A later version may have a longer greeting, but magic and version keep their positions.
///
/// # Errors
/// [`HandshakeError::Magic`], [`HandshakeError::Version`], [`HandshakeError::Length`].
pub fn check_greeting(message: &[u8]) -> Result<Greeting, HandshakeError> {
    let Some((magic, rest)) = message.split_first_chunk::<4>() else { return Err(HandshakeError::Magic) };
    let Some((version, _)) = rest.split_first_chunk::<2>() else { return Err(HandshakeError::Magic) };
    if *magic != MAGIC {
        return Err(HandshakeError::Magic);
    }
    let peer = u16::from_le_bytes(*version);
    if peer != PROTOCOL_VERSION {
        return Err(HandshakeError::Version { own: PROTOCOL_VERSION, peer });
    }
    message.try_into().map_err(|_| HandshakeError::Length { message: "greeting", bytes: message.len() })
}

/// A dialler that has sent its greeting.
#[derive(Debug)]
pub struct Dialler {
    greeting: Greeting,
}

/// A dialler that has sent its proof.
#[derive(Debug)]
pub struct DiallerProof {
    greetings: [Greeting; 2],
    proof: Vec<u8>,
}

impl Dialler {
    /// Creates a dialler and its greeting. The nonce must be used only once.
    pub fn new(nonce: &Nonce) -> (Self, Greeting) {
        let greeting = greeting(nonce);
        (Self { greeting }, greeting)
    }

    /// Processes the acceptor's greeting and returns the proof to send.
    ///
    /// # Errors
    /// Those of [`check_greeting`], [`HandshakeError::Echo`].
    pub fn prove(
        self,
        key: &SharedKey,
        hello: &Hello,
        peer_greeting: &[u8],
    ) -> Result<(DiallerProof, Vec<u8>), HandshakeError> {
        let peer_greeting = check_greeting(peer_greeting)?;
        if peer_greeting == self.greeting {
            return Err(HandshakeError::Echo);
        }
        let mut proof = wire::encode(hello).map_err(HandshakeError::Unreadable)?;
        let mac = key.mac(DIALLER, &[&self.greeting, &peer_greeting, &proof]);
        proof.extend_from_slice(mac.as_bytes());
        Ok((DiallerProof { greetings: [self.greeting, peer_greeting], proof: proof.clone() }, proof))
    }
}

impl DiallerProof {
    /// Processes the acceptor's verdict.
    ///
    /// # Errors
    /// [`HandshakeError::Denied`], [`HandshakeError::Length`], [`HandshakeError::Proof`], [`HandshakeError::Refused`].
    pub fn finish(self, key: &SharedKey, message: &[u8]) -> Result<(), HandshakeError> {
        if message.is_empty() {
            return Err(HandshakeError::Denied);
        }
        let (verdict, mac) = split_mac("verdict", message)?;
        if key.mac(ACCEPTOR, &[&self.greetings[0], &self.greetings[1], &self.proof, verdict]) != mac {
            return Err(HandshakeError::Proof);
        }
        let verdict: Result<(), Refusal> = wire::decode(verdict).map_err(HandshakeError::Unreadable)?;
        verdict.map_err(HandshakeError::Refused)
    }
}

/// An acceptor that has received a dialler's greeting and sent its own.
#[derive(Debug)]
pub struct Acceptor {
    greetings: [Greeting; 2],
}

/// An acceptor that has verified the dialler's proof.
#[derive(Debug)]
pub struct AuthenticatedDialler {
    greetings: [Greeting; 2],
    proof: Vec<u8>,
}

impl Acceptor {
    /// Processes the dialler's greeting. The acceptor's own greeting is [`greeting`] of the same nonce; use a nonce
    /// only once.
    ///
    /// # Errors
    /// Those of [`check_greeting`]. On [`HandshakeError::Version`], send the own greeting anyway, so that both sides
    /// report it.
    pub fn new(nonce: &Nonce, peer_greeting: &[u8]) -> Result<Self, HandshakeError> {
        Ok(Self { greetings: [check_greeting(peer_greeting)?, greeting(nonce)] })
    }

    /// Verifies the dialler's proof. An authentic hello that cannot be decoded, for example with an unknown purpose, is
    /// [`Refusal::Unreadable`]; send it to the dialler like any other refusal.
    ///
    /// # Errors
    /// [`HandshakeError::Proof`] or [`HandshakeError::Length`]: answer with an empty message.
    pub fn verify(
        self,
        key: &SharedKey,
        message: Vec<u8>,
    ) -> Result<(AuthenticatedDialler, Result<Hello, Refusal>), HandshakeError> {
        let (hello, mac) = split_mac("proof", &message)?;
        if key.mac(DIALLER, &[&self.greetings[0], &self.greetings[1], hello]) != mac {
            return Err(HandshakeError::Proof);
        }
        let hello = wire::decode(hello).map_err(|_| Refusal::Unreadable);
        Ok((AuthenticatedDialler { greetings: self.greetings, proof: message }, hello))
    }
}

impl AuthenticatedDialler {
    /// Returns the verdict to send.
    ///
    /// # Errors
    /// None in practice: every refusal can be encoded.
    pub fn answer(self, key: &SharedKey, verdict: &Result<(), Refusal>) -> Result<Vec<u8>, HandshakeError> {
        let mut message = wire::encode(verdict).map_err(HandshakeError::Unreadable)?;
        let mac = key.mac(ACCEPTOR, &[&self.greetings[0], &self.greetings[1], &self.proof, &message]);
        message.extend_from_slice(mac.as_bytes());
        Ok(message)
    }
}

/// Splits a message into its authenticated body and the MAC.
fn split_mac<'a>(name: &'static str, message: &'a [u8]) -> Result<(&'a [u8], blake3::Hash), HandshakeError> {
    let too_long = message.len() > HANDSHAKE_BYTES_MAX;
    match message.split_last_chunk::<MAC_BYTES>() {
        Some((body, mac)) if !too_long => Ok((body, blake3::Hash::from_bytes(*mac))),
        _ => Err(HandshakeError::Length { message: name, bytes: message.len() }),
    }
}

/// The acceptor's identity, and the rule for accepting diallers.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct AcceptPolicy {
    /// The acceptor's process.
    pub process: u32,
    /// Session, epoch and number of processes; `None` before the rendezvous.
    pub world: Option<SettledWorld>,
}

/// The result of the rendezvous.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct SettledWorld {
    /// The session.
    pub session: SessionId,
    /// Its epoch.
    pub epoch: u64,
    /// Number of its processes.
    pub processes: u32,
}

impl AcceptPolicy {
    /// Decides whether to accept an authenticated dialler.
    ///
    /// # Errors
    /// The first reason against it.
    pub fn admit(&self, hello: &Hello) -> Result<(), Refusal> {
        if hello.to != self.process {
            return Err(Refusal::WrongProcess { expected: hello.to, actual: self.process });
        }
        let rendezvous = hello.purpose == super::Purpose::Rendezvous;
        let (processes, dialler) = (self.world.map_or(PROCESSES_MAX, |w| w.processes), hello.epoch);
        match self.world {
            None if !rendezvous => return Err(Refusal::NotStarted),
            Some(SettledWorld { epoch: acceptor, .. }) if dialler > acceptor => {
                return Err(Refusal::NewEpoch { acceptor, dialler });
            }
            Some(SettledWorld { epoch, .. }) if rendezvous => return Err(Refusal::Late { epoch }),
            Some(SettledWorld { epoch: acceptor, .. }) if dialler < acceptor => {
                return Err(Refusal::OldEpoch { acceptor, dialler });
            }
            Some(SettledWorld { session, .. }) if session != hello.session => {
                return Err(Refusal::Session { acceptor: session, dialler: hello.session });
            }
            _ => {}
        }
        if hello.from >= processes {
            return Err(Refusal::Process { process: hello.from, processes });
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests;
