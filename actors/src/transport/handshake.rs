//! The handshake of a connection: bytes in, bytes out, no sockets, so that it can be fuzzed.
//!
//! ```text
//! dialler                                        acceptor
//! greeting: magic, version, nonce a ───────────►
//!                       ◄─────────── greeting: magic, version, nonce b
//! proof: hello, MAC over both greetings, hello ►
//!                       ◄─────── verdict, MAC over both greetings, proof, verdict
//! ```
//!
//! - **HS-1**: neither side acts on a hello or a verdict before its MAC is right. Until then only magic, version and lengths
//!   are looked at, which no secret has part in.
//! - **HS-2**: both nonces are under both MACs, so a recorded message fits no other handshake.
//! - **HS-3**: the two MACs have different domains, so neither side can be made to answer for the other.
//! - **HS-4**: the dialler proves first: who does not hold the secret gets no MAC from an acceptor.
//! - **HS-5**: the hello names both processes, so a proof for one process is of no use with another.
//!
//! On the wire each message stands behind its length, a little-endian u16.

use serde::{Deserialize, Serialize};

use super::wire::{self, WireError};
use super::{Hello, PROCESSES_MAX, SessionId, SharedKey};

/// Version of everything that is sent between processes. It goes up with any change to a message.
pub const PROTOCOL_VERSION: u16 = 2;
/// Bytes of a message of the handshake, at most.
pub const HANDSHAKE_BYTES_MAX: usize = 1024;
/// Bytes of a greeting.
pub const GREETING_BYTES: usize = 38;

/// A number used once.
pub type Nonce = [u8; 32];
/// Magic, version, nonce.
pub type Greeting = [u8; GREETING_BYTES];

const MAGIC: [u8; 4] = *b"SHFL";
const MAC_BYTES: usize = 32;
const DIALLER: &str = "handshake: dialler";
const ACCEPTOR: &str = "handshake: acceptor";

/// Why an acceptor refuses a dialler that holds the secret. It is told so, under a MAC.
#[derive(Clone, Debug, thiserror::Error, PartialEq, Eq, Serialize, Deserialize)]
pub enum Refusal {
    /// Another session of the same job.
    #[error("it is in session {ours}, this is session {theirs}")]
    Session {
        /// Of the acceptor.
        ours: SessionId,
        /// Of the dialler.
        theirs: SessionId,
    },
    /// The dialler belongs to an incarnation that has ended.
    #[error("epoch {theirs} has ended, epoch {ours} is running")]
    OldEpoch {
        /// Of the acceptor.
        ours: u64,
        /// Of the dialler.
        theirs: u64,
    },
    /// The acceptor belongs to an incarnation that has ended; it will be gone soon.
    #[error("it is still in epoch {ours}, this is epoch {theirs}")]
    NewEpoch {
        /// Of the acceptor.
        ours: u64,
        /// Of the dialler.
        theirs: u64,
    },
    /// The world is complete and runs; nobody can join it.
    #[error("epoch {epoch} is running: this process came late, or stands there already")]
    Late {
        /// The epoch that runs.
        epoch: u64,
    },
    /// The acceptor has not met the others yet.
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
    /// Somebody else was wanted.
    #[error("process {wanted} was wanted, this is process {me}")]
    NotMe {
        /// Whom the dialler wanted.
        wanted: u32,
        /// Who the acceptor is.
        me: u32,
    },
    /// A hello that cannot be read: an unknown purpose, for one.
    #[error("it cannot read the hello: does it run the same program?")]
    Unreadable,
    /// Too many connections that nobody has asked for.
    #[error("{unclaimed} connections wait to be claimed there")]
    Crowded {
        /// Connections that wait.
        unclaimed: u64,
    },
}

impl Refusal {
    /// True when it may go another way in a moment.
    pub fn is_passing(&self) -> bool {
        matches!(self, Self::NotStarted | Self::Crowded { .. } | Self::NewEpoch { .. })
    }
}

/// Why a handshake failed.
#[derive(Debug, thiserror::Error)]
pub enum HandshakeError {
    /// Not our protocol at all.
    #[error("it does not speak Shardflow's protocol: is the address right?")]
    Magic,
    /// Another version of it.
    #[error(
        "it speaks version {theirs} of the protocol, this is version {ours}: all processes must run the same build"
    )]
    Version {
        /// Of this side.
        ours: u16,
        /// Of the other.
        theirs: u16,
    },
    /// A message of a length that it cannot have.
    #[error("a {what} of {bytes} bytes")]
    Length {
        /// Which message.
        what: &'static str,
        /// Its length.
        bytes: usize,
    },
    /// Our own greeting came back.
    #[error("it sends back what it gets: the address leads back to this process")]
    Echo,
    /// The other side's MAC is wrong.
    #[error("it does not hold this job's secret, or was tampered with")]
    Proof,
    /// The acceptor did not believe us. This answer has no MAC.
    #[error("it does not believe that this process holds the job's secret: is the same one set everywhere?")]
    Denied,
    /// The hello or the verdict cannot be read although its MAC is right.
    #[error("it holds the secret, but sent: {0}")]
    Unreadable(WireError),
    /// The acceptor knows us and does not want us.
    #[error("refused: {0}")]
    Refused(Refusal),
}

/// Opens each side's part.
pub fn greeting(nonce: &Nonce) -> Greeting {
    let mut message = [0; GREETING_BYTES];
    message[..4].copy_from_slice(&MAGIC);
    message[4..6].copy_from_slice(&PROTOCOL_VERSION.to_le_bytes());
    message[6..].copy_from_slice(nonce);
    message
}

/// Looks at the other side's greeting. A later version's may be longer, but magic and version stay where they are.
///
/// # Errors
/// [`HandshakeError::Magic`], [`HandshakeError::Version`], [`HandshakeError::Length`].
pub fn check_greeting(message: &[u8]) -> Result<Greeting, HandshakeError> {
    let Some((magic, rest)) = message.split_first_chunk::<4>() else { return Err(HandshakeError::Magic) };
    let Some((version, _)) = rest.split_first_chunk::<2>() else { return Err(HandshakeError::Magic) };
    if *magic != MAGIC {
        return Err(HandshakeError::Magic);
    }
    let theirs = u16::from_le_bytes(*version);
    if theirs != PROTOCOL_VERSION {
        return Err(HandshakeError::Version { ours: PROTOCOL_VERSION, theirs });
    }
    message.try_into().map_err(|_| HandshakeError::Length { what: "greeting", bytes: message.len() })
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
    /// With a nonce that is used once, and the greeting to send.
    pub fn new(nonce: &Nonce) -> (Self, Greeting) {
        let greeting = greeting(nonce);
        (Self { greeting }, greeting)
    }

    /// Takes the acceptor's greeting and gives the proof to send.
    ///
    /// # Errors
    /// Those of [`check_greeting`], [`HandshakeError::Echo`].
    pub fn prove(
        self,
        secret: &SharedKey,
        hello: &Hello,
        theirs: &[u8],
    ) -> Result<(DiallerProof, Vec<u8>), HandshakeError> {
        let theirs = check_greeting(theirs)?;
        if theirs == self.greeting {
            return Err(HandshakeError::Echo);
        }
        let mut proof = wire::encode(hello).map_err(HandshakeError::Unreadable)?;
        let mac = secret.mac(DIALLER, &[&self.greeting, &theirs, &proof]);
        proof.extend_from_slice(mac.as_bytes());
        Ok((DiallerProof { greetings: [self.greeting, theirs], proof: proof.clone() }, proof))
    }
}

impl DiallerProof {
    /// Takes the acceptor's verdict.
    ///
    /// # Errors
    /// [`HandshakeError::Denied`], [`HandshakeError::Length`], [`HandshakeError::Proof`], [`HandshakeError::Refused`].
    pub fn finish(self, secret: &SharedKey, message: &[u8]) -> Result<(), HandshakeError> {
        if message.is_empty() {
            return Err(HandshakeError::Denied);
        }
        let (verdict, mac) = split_mac("verdict", message)?;
        if secret.mac(ACCEPTOR, &[&self.greetings[0], &self.greetings[1], &self.proof, verdict]) != mac {
            return Err(HandshakeError::Proof);
        }
        let verdict: Result<(), Refusal> = wire::decode(verdict).map_err(HandshakeError::Unreadable)?;
        verdict.map_err(HandshakeError::Refused)
    }
}

/// An acceptor that has taken a dialler's greeting and sent its own.
#[derive(Debug)]
pub struct Acceptor {
    greetings: [Greeting; 2],
}

/// An acceptor that believes the dialler.
#[derive(Debug)]
pub struct AuthenticatedDialler {
    greetings: [Greeting; 2],
    proof: Vec<u8>,
}

impl Acceptor {
    /// Takes the dialler's greeting; the acceptor's own is [`greeting`] of the same nonce, which is used once.
    ///
    /// # Errors
    /// Those of [`check_greeting`]. On [`HandshakeError::Version`] the own greeting is sent all the same, so that both know.
    pub fn new(nonce: &Nonce, theirs: &[u8]) -> Result<Self, HandshakeError> {
        Ok(Self { greetings: [check_greeting(theirs)?, greeting(nonce)] })
    }

    /// Takes the dialler's proof. A hello that it holds but that cannot be read, such as one of an unknown purpose, is
    /// [`Refusal::Unreadable`], to be told to the dialler like any other refusal.
    ///
    /// # Errors
    /// [`HandshakeError::Proof`] or [`HandshakeError::Length`]: answer with an empty message.
    pub fn believe(
        self,
        secret: &SharedKey,
        message: Vec<u8>,
    ) -> Result<(AuthenticatedDialler, Result<Hello, Refusal>), HandshakeError> {
        let (hello, mac) = split_mac("proof", &message)?;
        if secret.mac(DIALLER, &[&self.greetings[0], &self.greetings[1], hello]) != mac {
            return Err(HandshakeError::Proof);
        }
        let hello = wire::decode(hello).map_err(|_| Refusal::Unreadable);
        Ok((AuthenticatedDialler { greetings: self.greetings, proof: message }, hello))
    }
}

impl AuthenticatedDialler {
    /// The verdict to send.
    ///
    /// # Errors
    /// None in practice: a refusal can always be written.
    pub fn answer(self, secret: &SharedKey, verdict: &Result<(), Refusal>) -> Result<Vec<u8>, HandshakeError> {
        let mut message = wire::encode(verdict).map_err(HandshakeError::Unreadable)?;
        let mac = secret.mac(ACCEPTOR, &[&self.greetings[0], &self.greetings[1], &self.proof, &message]);
        message.extend_from_slice(mac.as_bytes());
        Ok(message)
    }
}

/// What is authenticated, and its MAC.
fn split_mac<'a>(what: &'static str, message: &'a [u8]) -> Result<(&'a [u8], blake3::Hash), HandshakeError> {
    let too_long = message.len() > HANDSHAKE_BYTES_MAX;
    match message.split_last_chunk::<MAC_BYTES>() {
        Some((body, mac)) if !too_long => Ok((body, blake3::Hash::from_bytes(*mac))),
        _ => Err(HandshakeError::Length { what, bytes: message.len() }),
    }
}

/// Who an acceptor is, and whom it lets in.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct AcceptPolicy {
    /// The acceptor.
    pub process: u32,
    /// Session, epoch and number of processes, once they are settled.
    pub world: Option<SettledWorld>,
}

/// What rendezvous settles.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct SettledWorld {
    /// The session.
    pub session: SessionId,
    /// Its epoch.
    pub epoch: u64,
    /// Its processes.
    pub processes: u32,
}

impl AcceptPolicy {
    /// Whether an authenticated dialler may come in.
    ///
    /// # Errors
    /// The first that speaks against it.
    pub fn admit(&self, hello: &Hello) -> Result<(), Refusal> {
        if hello.to != self.process {
            return Err(Refusal::NotMe { wanted: hello.to, me: self.process });
        }
        let rendezvous = hello.purpose == super::Purpose::Rendezvous;
        let (processes, theirs) = (self.world.map_or(PROCESSES_MAX, |w| w.processes), hello.epoch);
        match self.world {
            None if !rendezvous => return Err(Refusal::NotStarted),
            Some(SettledWorld { epoch: ours, .. }) if theirs > ours => return Err(Refusal::NewEpoch { ours, theirs }),
            Some(SettledWorld { epoch, .. }) if rendezvous => return Err(Refusal::Late { epoch }),
            Some(SettledWorld { epoch: ours, .. }) if theirs < ours => return Err(Refusal::OldEpoch { ours, theirs }),
            Some(SettledWorld { session, .. }) if session != hello.session => {
                return Err(Refusal::Session { ours: session, theirs: hello.session });
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
