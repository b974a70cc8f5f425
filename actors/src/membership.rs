//! Who is in the session, who has failed, and what its end is put down to.
//! Layers: `detector, cause, datagram, letter (pure) <- outbox <- shared <- heartbeat, control <- this`.
//!
//! Each process holds one [`Membership`]. Heartbeats (datagrams) find peers that are silent; the control plane (letters over
//! connections that the caller authenticated) carries failures, orderly ends and the application's small messages. Whatever fails ends the session everywhere, with one [`FirstCause`].

use std::collections::BTreeMap;
use std::io;
use std::net::{SocketAddr, UdpSocket};
use std::sync::Arc;
use std::time::Duration;

use crossbeam_channel::{Receiver, bounded};

mod cause;
mod control;
mod datagram;
mod detector;
#[cfg(any(test, fuzzing))]
#[doc(hidden)]
pub mod fuzz;
mod heartbeat;
mod letter;
mod outbox;
mod shared;

pub use cause::FirstCause;
pub use detector::PeerHealth;
pub use letter::MESSAGE_BYTES_MAX;

use crate::transport::Connection;
use datagram::Codec;
use shared::{NOTICES_MAX, Shared};

/// How long the orderly end waits for peers to answer.
const LEAVE_TIMEOUT: Duration = Duration::from_secs(1);
/// How long a dropped membership waits for peers to have its last word; a frozen peer does not answer.
const DROP_TIMEOUT: Duration = Duration::from_millis(500);

/// Exit codes that this module decides on.
mod exit {
    /// A peer was lost.
    pub(crate) const UNAVAILABLE: u8 = 69;
    /// A bug of ours.
    pub(crate) const INTERNAL: u8 = 70;
    /// A newer epoch runs; start again.
    pub(crate) const RETRY: u8 = 75;
    /// A peer did not pass the handshake.
    pub(crate) const PROTOCOL: u8 = 76;
}

/// What could not be done.
#[derive(Debug, thiserror::Error)]
pub enum MembershipError {
    /// The configuration contradicts itself.
    #[error("membership of process {process} of {processes}: {what}")]
    Config {
        /// Ours.
        process: u32,
        /// Of the world.
        processes: u32,
        /// What is wrong.
        what: String,
    },
    /// The system refused something.
    #[error("cannot {what}: {source}")]
    Io {
        /// What was tried.
        what: &'static str,
        /// What the system says.
        source: io::Error,
    },
    /// Peers did not connect in time.
    #[error("processes {processes:?} did not join within {seconds:.1} s: look at their logs")]
    Missing {
        /// Those that did not.
        processes: Vec<u32>,
        /// How long they were waited for.
        seconds: f64,
    },
    /// A peer closed its connection while starting, or did not pass the handshake.
    #[error(
        "process {process} closed its control connection while joining: is its secret, session and epoch the same?"
    )]
    Refused {
        /// The peer.
        process: u32,
    },
    /// A message is too large for the control plane.
    #[error("a message of {bytes} bytes, at most {MESSAGE_BYTES_MAX} go over the control plane")]
    TooLarge {
        /// Its size.
        bytes: usize,
    },
    /// A peer does not read its messages.
    #[error(
        "{messages} messages ({bytes} bytes) wait for process {process}, which reads none; at most 1024 (4 MiB) may"
    )]
    Backlog {
        /// The peer.
        process: u32,
        /// Messages that wait to be sent to it.
        messages: u64,
        /// Their bytes.
        bytes: u64,
    },
    /// There is no such peer.
    #[error("process {process} is no peer: there are {processes} with this one")]
    NoPeer {
        /// The number asked for.
        process: u32,
        /// Of the world.
        processes: u32,
    },
    /// The peer has left, or its connection is gone.
    #[error("process {process} is gone")]
    Gone {
        /// The peer.
        process: u32,
    },
    /// The session is over.
    #[error("the session has ended: {0}")]
    Ended(FirstCause),
    /// This process has left the session.
    #[error("this process has left the session")]
    Left,
}

impl MembershipError {
    /// The exit code that goes with it.
    pub fn exit(&self) -> u8 {
        match self {
            Self::Config { .. } | Self::Io { .. } => exit::INTERNAL,
            Self::TooLarge { .. } | Self::NoPeer { .. } | Self::Left => exit::INTERNAL,
            Self::Missing { .. } | Self::Backlog { .. } | Self::Gone { .. } => exit::UNAVAILABLE,
            Self::Ended(first) => first.exit,
            Self::Refused { .. } => exit::PROTOCOL,
        }
    }
}

/// What happened to others.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum MembershipEvent {
    /// A peer told us something.
    Told {
        /// The peer.
        from: u32,
        /// The application's number for what it is about.
        topic: u16,
        /// Opaque.
        bytes: Vec<u8>,
    },
    /// A peer has ended in order.
    Left {
        /// The peer.
        process: u32,
    },
    /// The session has ended; told once.
    Ended(FirstCause),
}

/// What was refused since the start.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Counters {
    /// Datagrams and openings of another format.
    pub bad_format: u64,
    /// Datagrams and openings made without the job's key.
    pub bad_mac: u64,
    /// Datagrams seen before, or overtaken.
    pub replays: u64,
    /// Datagrams and openings of another run with the same key.
    pub other_session: u64,
    /// Datagrams and openings of an incarnation before this one.
    pub old_epoch: u64,
    /// Datagrams and openings of an incarnation after this one; the first ends this process.
    pub newer_epoch: u64,
    /// Letters that make no sense.
    pub garbled: u64,
}

/// What is known of a peer.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct PeerStatus {
    /// Its number.
    pub process: u32,
    /// It has ended in order.
    pub left: bool,
    /// The step that its last heartbeat told.
    pub step: u64,
    /// `None` when it has left.
    pub health: Option<PeerHealth>,
    /// Time since its last heartbeat; `None` when it has left.
    pub silent: Option<Duration>,
}

/// What a membership starts from; most of it comes from the rendezvous.
#[derive(Debug)]
pub struct MembershipConfig {
    /// This process's number.
    pub process: u32,
    /// Processes of the world, this one included.
    pub processes: u32,
    /// The same for all incarnations of a run; tells it from other runs.
    pub session: [u8; 16],
    /// The incarnation: everything of an older one is refused.
    pub epoch: u64,
    /// The job's secret. Keys for each use are derived from it.
    pub key: [u8; 32],
    /// Bound, see [`bind`].
    pub heartbeat: UdpSocket,
    /// Where the peers' heartbeat sockets are bound.
    pub addresses: BTreeMap<u32, SocketAddr>,
    /// An authenticated connection to each peer, for control only.
    pub links: BTreeMap<u32, Connection>,
    /// Time between heartbeats.
    pub every: Duration,
    /// Silence after which a peer is lost.
    pub deadline: Duration,
    /// Time that better causes may take to arrive after the first symptom.
    pub grace: Duration,
    /// How long peers may take to join.
    pub join_within: Duration,
    /// Limit for peers that send heartbeats.
    pub join_at_most: Duration,
}

impl MembershipConfig {
    /// The default times: a heartbeat each 250 ms, lost after 4 s, 500 ms of grace, 30 s to join. A world of one process
    /// until addresses and links are given.
    pub fn new(
        process: u32,
        processes: u32,
        session: [u8; 16],
        epoch: u64,
        key: [u8; 32],
        heartbeat: UdpSocket,
    ) -> Self {
        Self {
            process,
            processes,
            session,
            epoch,
            key,
            heartbeat,
            addresses: BTreeMap::new(),
            links: BTreeMap::new(),
            every: Duration::from_millis(250),
            deadline: Duration::from_secs(4),
            grace: Duration::from_millis(500),
            join_within: Duration::from_secs(30),
            join_at_most: Duration::from_secs(30),
        }
    }

    fn check(&self) -> Result<(), MembershipError> {
        let Self { process, processes, .. } = *self;
        let wrong = |what: String| Err(MembershipError::Config { process, processes, what });
        if process >= processes {
            return wrong(format!("processes are numbered 0 to {}", i64::from(processes) - 1));
        }
        let peers = || (0..processes).filter(|p| *p != process);
        if !self.addresses.keys().copied().eq(peers()) {
            return wrong(format!("heartbeat addresses of {:?}, needed of all peers", self.addresses.keys()));
        }
        if !self.links.keys().copied().eq(peers()) {
            return wrong(format!("control connections to {:?}, needed to all peers", self.links.keys()));
        }
        if self.every.is_zero() || self.deadline < 4 * self.every {
            let (every, deadline) = (self.every, self.deadline);
            return wrong(format!(
                "a deadline of {deadline:?} for a heartbeat each {every:?}: give it 4 beats or more"
            ));
        }
        Ok(())
    }
}

/// A socket for heartbeats at this address of the node; port 0 lets the system choose one.
///
/// # Errors
/// When the address is not there.
pub fn bind(address: SocketAddr) -> io::Result<UdpSocket> {
    UdpSocket::bind(address)
}

/// This process's part in the session.
///
/// Dropping it ends it within a second, even with frozen peers; without [`Membership::leave`] that is a failure, which peers
/// are told.
#[derive(Debug)]
pub struct Membership {
    shared: Arc<Shared>,
    notices: Receiver<MembershipEvent>,
    // In the order in which they end.
    heartbeat: Option<heartbeat::Heartbeat>,
    control: Option<control::Control>,
}

impl Membership {
    /// Joins: blocks until all peers have.
    ///
    /// # Errors
    /// [`MembershipError::Config`], [`MembershipError::Io`], which peers are [`MembershipError::Missing`] or
    /// [`MembershipError::Refused`], or [`MembershipError::Ended`] when a peer failed meanwhile.
    pub fn start(config: MembershipConfig) -> Result<Self, MembershipError> {
        config.check()?;
        let MembershipConfig { process, processes, session, epoch, key, .. } = config;
        // Kept free: one `Left` of each peer, and `Ended`.
        let (sender, notices) = bounded(NOTICES_MAX + processes as usize);
        let shared = Arc::new(Shared::new(process, processes, epoch, config.grace, sender));
        let codec = Codec::new(&key, session, epoch, processes);
        let addresses = config.addresses.into_values().collect();
        // Beats before it is connected: peers that are ready sooner already watch it.
        let heartbeat = heartbeat::start(shared.clone(), codec, config.heartbeat, addresses, config.every);
        let heartbeat = heartbeat.map_err(|source| MembershipError::Io { what: "start heartbeats", source })?;
        let control = control::start(shared.clone(), config.links, session, &key)?;
        // From here on a failure ends both threads.
        let membership = Self { shared: shared.clone(), notices, heartbeat: Some(heartbeat), control: Some(control) };
        if let Err(error) = shared.wait_for_peers(config.join_within, config.join_at_most, config.deadline) {
            // Those that did connect are told why we give up.
            shared.fail(error.to_string(), error.exit());
            return Err(error);
        }
        Ok(membership)
    }

    /// What happens to others, in order for each peer. Take them: a peer's messages that nobody takes end the session.
    pub fn notices(&self) -> &Receiver<MembershipEvent> {
        &self.notices
    }

    /// Tells a peer something of at most [`MESSAGE_BYTES_MAX`] bytes; it arrives after what it was told before. Returns at
    /// once: Ok means that it is under way.
    ///
    /// # Errors
    /// [`MembershipError::TooLarge`], [`MembershipError::NoPeer`], [`MembershipError::Backlog`] when the peer does not take
    /// what it was told, [`MembershipError::Gone`], [`MembershipError::Ended`], [`MembershipError::Left`].
    pub fn tell(&self, to: u32, topic: u16, bytes: Vec<u8>) -> Result<(), MembershipError> {
        self.shared.tell(to, topic, bytes)
    }

    /// Tells all peers the same; those after the first error are not told.
    ///
    /// # Errors
    /// As [`Membership::tell`].
    pub fn tell_all(&self, topic: u16, bytes: &[u8]) -> Result<(), MembershipError> {
        let peers = (0..self.shared.processes).filter(|p| *p != self.shared.own);
        peers.into_iter().try_for_each(|to| self.tell(to, topic, bytes.to_vec()))
    }

    /// This process failed by itself: the session ends everywhere. Errors that a lost peer led to belong in
    /// [`Membership::suspect`], or this process would be named for them.
    pub fn fail(&self, cause: impl Into<String>, exit: u8) {
        self.shared.fail(cause.into(), exit);
    }

    /// Something that a peer should have done did not happen (a data connection broke): the session ends, and the peer is
    /// named, unless a better cause arrives within the grace window.
    pub fn suspect(&self, process: u32, cause: impl Into<String>) {
        self.shared.suspect(process, cause.into());
    }

    /// What the session ended for.
    pub fn first_cause(&self) -> Option<FirstCause> {
        self.shared.first_cause()
    }

    /// Heartbeats tell this step from now on.
    pub fn set_step(&self, step: u64) {
        self.shared.set_step(step);
    }

    /// What is known of each peer.
    pub fn peers(&self) -> Vec<PeerStatus> {
        self.shared.peers()
    }

    /// What was refused since the start.
    pub fn counters(&self) -> Counters {
        self.shared.counters()
    }

    /// Ends in order, when all work of this process is done. Waits a second at most for peers to have all that they were
    /// told; false when one did not answer. Peers that fail from now on do not matter to this process.
    pub fn leave(&self) -> bool {
        self.shared.leave();
        self.shared.settle(LEAVE_TIMEOUT)
    }
}

impl Drop for Membership {
    fn drop(&mut self) {
        if !self.shared.is_over() {
            self.shared.fail("it ended without leaving the session: see its log".into(), exit::INTERNAL);
        }
        self.shared.settle(DROP_TIMEOUT);
        drop(self.heartbeat.take());
        drop(self.control.take());
    }
}

#[cfg(test)]
mod tests;
