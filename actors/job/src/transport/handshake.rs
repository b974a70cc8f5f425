//! The handshake of a connection: a state machine on bytes without sockets, so that it can be fuzzed. The protocol is
//! Noise (`NNpsk0`, <https://noiseprotocol.org/noise.html>). Its pre-shared key is derived from the job's secret.
//!
//! ```text
//! dialler                                        acceptor
//! greeting: magic, version, psk, e ────────────►
//!                       ◄──────────── greeting: magic, version, e, ee
//! hello, encrypted ────────────────────────────►
//!                       ◄─────────────────────── verdict, encrypted
//! ```
//!
//! - **HS-1**: neither side uses a hello or a verdict before it has decrypted the message. Before that, a side reads
//!   only magic, version and lengths, which do not depend on the secret.
//! - **HS-2**: the keys depend on an ephemeral key of each side, so a recorded message is invalid in any other
//!   handshake. An acceptor answers a replayed greeting, but the replaying peer cannot make a valid hello for it.
//! - **HS-3**: each direction has its own key, so a message of one side is never valid as a message of the other side.
//! - **HS-4**: the dialler proves first that it has the secret. Before that, the acceptor encrypts nothing for it.
//! - **HS-5**: the hello names both processes, so a process refuses a hello meant for another one.
//!
//! On the wire, the length of each message precedes it as a little-endian u16.

use serde::{Deserialize, Serialize};
use snow::{Builder, HandshakeState, StatelessTransportState};

use super::hello::{Hello, PROCESSES_MAX, Purpose, SessionId};
use super::wire::{self, WireError};
use crate::secret::Secret;

/// Version of all messages between processes. Increment it with any change to a message.
pub const PROTOCOL_VERSION: u16 = 5;
/// Maximum size of a handshake message in bytes.
pub const HANDSHAKE_BYTES_MAX: usize = 1024;
/// Size of a greeting in bytes: magic, version, a public key and a tag.
pub const GREETING_BYTES: usize = HEAD_BYTES + 32 + TAG_BYTES;

const MAGIC: [u8; 4] = *b"SHFL";
const HEAD_BYTES: usize = 6;
/// Bytes that encryption adds to a message.
pub(super) const TAG_BYTES: usize = 16;
const PATTERN: &str = "Noise_NNpsk0_25519_AESGCM_SHA256";

/// Why an acceptor refuses an authenticated dialler. The refusal is sent encrypted.
#[derive(Clone, Debug, thiserror::Error, PartialEq, Eq, Serialize, Deserialize)]
#[allow(missing_docs, reason = "the error texts explain variants and fields")]
pub enum Refusal {
    #[error("it is in session {acceptor}, but this process is in session {dialler}")]
    Session { acceptor: SessionId, dialler: SessionId },
    #[error("this process is in epoch {dialler}, but epoch {acceptor} is running")]
    OldEpoch { acceptor: u64, dialler: u64 },
    /// The acceptor belongs to an earlier epoch, which has ended. The acceptor will exit soon.
    #[error("it is still in epoch {acceptor}, but this process is in epoch {dialler}")]
    NewEpoch { acceptor: u64, dialler: u64 },
    #[error("epoch {epoch} is running: this process is too late, or its rank is already taken")]
    Late { epoch: u64 },
    #[error("it has not started yet")]
    NotStarted,
    #[error("there is no process {process} in a world of {processes}")]
    Process { process: u32, processes: u32 },
    #[error("expected process {expected} at this address, found process {actual}")]
    WrongProcess { expected: u32, actual: u32 },
    #[error("it cannot decode the hello message: run the same build for all processes")]
    Unreadable,
    #[error("it already has {unclaimed} unused connections, which is the maximum")]
    Crowded { unclaimed: u64 },
}

impl Refusal {
    /// True if a retry may succeed.
    pub fn is_temporary(&self) -> bool {
        matches!(self, Self::NotStarted | Self::Crowded { .. } | Self::NewEpoch { .. })
    }
}

/// Why a handshake failed.
#[derive(Debug, thiserror::Error)]
#[allow(missing_docs, reason = "the error texts explain variants and fields")]
pub enum HandshakeError {
    #[error("it does not speak Shardflow's protocol: check the address")]
    Magic,
    #[error("it speaks protocol version {peer}, but this process speaks {own}: all processes must run the same build")]
    Version { own: u16, peer: u16 },
    #[error("it sent a {message} with an invalid length of {bytes} bytes")]
    Length { message: &'static str, bytes: usize },
    #[error("it returns this process's own greeting: the address leads back to this process")]
    Echo,
    #[error("it does not hold this job's secret, or its message was modified")]
    Proof,
    /// The acceptor could not decrypt this side's greeting. The acceptor's answer is not authenticated.
    #[error("it rejects this process's proof of the job's secret: set the same secret for all processes")]
    Denied,
    #[error("it holds the secret, but its message cannot be decoded: {0}")]
    Unreadable(WireError),
    /// The cipher could not be set up, because the system provides no random numbers.
    #[error("cannot encrypt: {0}")]
    Cipher(snow::Error),
    #[error("refused: {0}")]
    Refused(Refusal),
}

/// The magic and the version, which are the first bytes of both greetings. To a dialler with another version or secret,
/// an acceptor sends only these.
pub fn head() -> [u8; HEAD_BYTES] {
    let mut head = [0; HEAD_BYTES];
    head[..4].copy_from_slice(&MAGIC);
    head[4..].copy_from_slice(&PROTOCOL_VERSION.to_le_bytes());
    head
}

pub(super) fn with_length(part: &[u8]) -> Vec<u8> {
    debug_assert!(part.len() <= HANDSHAKE_BYTES_MAX);
    [&(part.len() as u16).to_le_bytes()[..], part].concat()
}

/// Checks magic and version, whose positions stay the same in later versions. Returns the rest of the greeting.
fn check_head(message: &[u8]) -> Result<&[u8], HandshakeError> {
    let Some((head, rest)) = message.split_first_chunk::<HEAD_BYTES>() else { return Err(HandshakeError::Magic) };
    if head[..4] != MAGIC {
        return Err(HandshakeError::Magic);
    }
    let peer = u16::from_le_bytes([head[4], head[5]]);
    if peer != PROTOCOL_VERSION {
        return Err(HandshakeError::Version { own: PROTOCOL_VERSION, peer });
    }
    Ok(rest)
}

fn check_length(body: &[u8]) -> Result<(), HandshakeError> {
    let bytes = HEAD_BYTES + body.len();
    if bytes == GREETING_BYTES { Ok(()) } else { Err(HandshakeError::Length { message: "greeting", bytes }) }
}

fn noise(secret: &Secret, initiates: bool) -> Result<HandshakeState, snow::Error> {
    let (head, key) = (head(), secret.key("handshake"));
    let builder = Builder::new(PATTERN.parse()?).prologue(&head)?.psk(0, &key)?;
    if initiates { builder.build_initiator() } else { builder.build_responder() }
}

/// Makes a greeting: the head, followed by the Noise message.
fn greeting(noise: &mut HandshakeState) -> Result<Vec<u8>, HandshakeError> {
    let mut message = vec![0; GREETING_BYTES];
    message[..HEAD_BYTES].copy_from_slice(&head());
    noise.write_message(&[], &mut message[HEAD_BYTES..]).map_err(HandshakeError::Cipher)?;
    Ok(message)
}

fn encrypt(keys: &StatelessTransportState, message: &impl Serialize) -> Result<Vec<u8>, HandshakeError> {
    let plain = wire::encode(message).map_err(HandshakeError::Unreadable)?;
    let mut sealed = vec![0; plain.len() + TAG_BYTES];
    keys.write_message(0, &plain, &mut sealed).map_err(HandshakeError::Cipher)?;
    Ok(sealed)
}

fn decrypt(keys: &StatelessTransportState, name: &'static str, message: &[u8]) -> Result<Vec<u8>, HandshakeError> {
    if !(TAG_BYTES..=HANDSHAKE_BYTES_MAX).contains(&message.len()) {
        return Err(HandshakeError::Length { message: name, bytes: message.len() });
    }
    let mut plain = vec![0; message.len() - TAG_BYTES];
    keys.read_message(0, message, &mut plain).map_err(|_| HandshakeError::Proof)?;
    Ok(plain)
}

/// A dialler that has sent its greeting.
#[derive(Debug)]
pub struct Dialler {
    noise: HandshakeState,
    greeting: Vec<u8>,
}

/// A dialler that has sent its hello.
#[derive(Debug)]
pub struct GreetedDialler(StatelessTransportState);

impl Dialler {
    /// Creates a dialler and its greeting.
    pub fn new(secret: &Secret) -> Result<(Self, Vec<u8>), HandshakeError> {
        let mut noise = noise(secret, true).map_err(HandshakeError::Cipher)?;
        let greeting = greeting(&mut noise)?;
        Ok((Self { noise, greeting: greeting.clone() }, greeting))
    }

    /// Processes the acceptor's greeting and returns the hello to send.
    pub fn introduce(
        mut self,
        hello: &Hello,
        peer_greeting: &[u8],
    ) -> Result<(GreetedDialler, Vec<u8>), HandshakeError> {
        let body = check_head(peer_greeting)?;
        if body.is_empty() {
            return Err(HandshakeError::Denied);
        }
        if peer_greeting == self.greeting {
            return Err(HandshakeError::Echo);
        }
        check_length(body)?;
        self.noise.read_message(body, &mut []).map_err(|_| HandshakeError::Proof)?;
        let keys = self.noise.into_stateless_transport_mode().map_err(HandshakeError::Cipher)?;
        let hello = encrypt(&keys, hello)?;
        Ok((GreetedDialler(keys), hello))
    }
}

impl GreetedDialler {
    /// Processes the acceptor's verdict. The returned keys continue at nonce 1 in both directions.
    pub fn finish(self, message: &[u8]) -> Result<StatelessTransportState, HandshakeError> {
        let verdict = decrypt(&self.0, "verdict", message)?;
        let verdict: Result<(), Refusal> = wire::decode(&verdict).map_err(HandshakeError::Unreadable)?;
        verdict.map(|()| self.0).map_err(HandshakeError::Refused)
    }
}

/// An acceptor that has received a dialler's greeting and sent its own.
#[derive(Debug)]
pub struct Acceptor(StatelessTransportState);

impl Acceptor {
    /// Processes the dialler's greeting and returns the greeting to send.
    ///
    /// # Errors
    /// Fails with [`HandshakeError::Magic`], [`HandshakeError::Length`], [`HandshakeError::Version`] or
    /// [`HandshakeError::Proof`]. After the last two, answer with [`head`], so that the dialler can report the reason.
    pub fn new(secret: &Secret, peer_greeting: &[u8]) -> Result<(Self, Vec<u8>), HandshakeError> {
        let body = check_head(peer_greeting)?;
        check_length(body)?;
        let mut noise = noise(secret, false).map_err(HandshakeError::Cipher)?;
        noise.read_message(body, &mut []).map_err(|_| HandshakeError::Proof)?;
        let greeting = greeting(&mut noise)?;
        let keys = noise.into_stateless_transport_mode().map_err(HandshakeError::Cipher)?;
        Ok((Self(keys), greeting))
    }

    /// Decrypts the dialler's hello. If an authentic hello cannot be decoded, for example because its purpose is
    /// unknown, returns [`Refusal::Unreadable`]. Send it to the dialler like any other refusal.
    pub fn verify(&self, message: &[u8]) -> Result<Result<Hello, Refusal>, HandshakeError> {
        Ok(wire::decode(&decrypt(&self.0, "hello", message)?).map_err(|_| Refusal::Unreadable))
    }

    /// Returns the verdict to send, and the keys, which continue at nonce 1. Call this after [`Acceptor::verify`].
    pub fn answer(self, verdict: &Result<(), Refusal>) -> Result<(Vec<u8>, StatelessTransportState), HandshakeError> {
        Ok((encrypt(&self.0, verdict)?, self.0))
    }
}

/// The acceptor's identity, and the rule by which it accepts diallers.
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
    /// The session's epoch.
    pub epoch: u64,
    /// Number of processes in the session.
    pub processes: u32,
}

impl AcceptPolicy {
    /// Decides whether to accept an authenticated dialler.
    pub fn admit(&self, hello: &Hello) -> Result<(), Refusal> {
        let Hello { epoch: dialler, from, to, purpose, .. } = *hello;
        if to != self.process {
            return Err(Refusal::WrongProcess { expected: to, actual: self.process });
        }
        let (is_rendezvous, processes) =
            (purpose == Purpose::Rendezvous, self.world.map_or(PROCESSES_MAX, |w| w.processes));
        let refusal = match self.world {
            None if !is_rendezvous => Refusal::NotStarted,
            Some(world) if dialler > world.epoch => Refusal::NewEpoch { acceptor: world.epoch, dialler },
            Some(world) if is_rendezvous => Refusal::Late { epoch: world.epoch },
            Some(world) if dialler < world.epoch => Refusal::OldEpoch { acceptor: world.epoch, dialler },
            Some(world) if hello.session != world.session => {
                Refusal::Session { acceptor: world.session, dialler: hello.session }
            }
            _ if from >= processes => Refusal::Process { process: from, processes },
            _ => return Ok(()),
        };
        Err(refusal)
    }
}

#[cfg(test)]
pub(super) mod tests;
