//! Tracks the members of a session, detects failures, and decides why the session ended.
//!
//! Each process holds one [`Membership`]. Heartbeats (datagrams) detect silent peers. The control plane (messages over
//! connections that the caller has authenticated) carries failures, orderly ends and small application messages.
//! Any failure ends the session in all processes with one [`FirstCause`].

use std::collections::BTreeMap;
use std::io;
use std::net::{SocketAddr, UdpSocket};
use std::sync::Arc;
use std::time::Duration;

use crossbeam_channel::{Receiver, bounded};
use tokio::sync::oneshot;

mod cause;
mod control;
mod control_message;
mod datagram;
mod detector;
mod error;
#[cfg(any(test, fuzzing))]
#[doc(hidden)]
pub mod fuzz;
mod heartbeat;
mod outbox;
mod shared;
mod status;

pub use cause::FirstCause;
pub use control_message::MESSAGE_BYTES_MAX;
pub use error::MembershipError;
pub use status::{Counters, MembershipEvent};

use crate::exit::Exit;
use crate::transport::Connection;
use datagram::Codec;
use heartbeat::Heartbeats;
use shared::{JoinOnDrop, NOTICES_MAX, Shared};

/// Timeout for a clean leave to get acknowledgements from all peers.
const LEAVE_TIMEOUT: Duration = Duration::from_secs(1);
/// How long a dropped membership waits until peers have received its last message. A frozen peer never receives it.
const DROP_TIMEOUT: Duration = Duration::from_millis(500);

/// Configuration of a membership. Most values come from the rendezvous.
#[derive(Debug)]
pub struct MembershipConfig {
    /// Number of this process.
    pub process: u32,
    /// Number of processes in the world, including this one.
    pub processes: u32,
    /// Id of the run; the same for all incarnations of the run.
    pub session: [u8; 16],
    /// Number of the incarnation. Messages of older incarnations are rejected.
    pub epoch: u64,
    /// The job's key, from which a separate key for each use is derived.
    pub key: [u8; 32],
    /// The bound heartbeat socket. See [`bind`].
    pub heartbeat: UdpSocket,
    /// Addresses of the peers' heartbeat sockets.
    pub addresses: BTreeMap<u32, SocketAddr>,
    /// An authenticated connection to each peer, used only for control messages.
    pub connections: BTreeMap<u32, Connection>,
    /// Time between heartbeats.
    pub interval: Duration,
    /// Time without heartbeats after which a peer is lost.
    pub deadline: Duration,
    /// Time after the first symptom during which reports of a better cause may arrive.
    pub grace: Duration,
    /// How long to wait for all peers to join.
    pub join_within: Duration,
    /// How long to wait for a peer that sends heartbeats but has not joined.
    pub join_at_most: Duration,
}

impl MembershipConfig {
    /// Defaults: no addresses or connections, a heartbeat every 250 ms, a deadline of 4 s, 500 ms grace, 30 s to join.
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
            connections: BTreeMap::new(),
            interval: Duration::from_millis(250),
            deadline: Duration::from_secs(4),
            grace: Duration::from_millis(500),
            join_within: Duration::from_secs(30),
            join_at_most: Duration::from_secs(30),
        }
    }

    fn check(&self) -> Result<(), MembershipError> {
        let Self { process, processes, .. } = *self;
        let wrong = |problem: String| Err(MembershipError::Config { process, processes, problem });
        if process >= processes {
            return wrong(format!("processes are numbered 0 to {}", i64::from(processes) - 1));
        }
        let peers = || (0..processes).filter(|p| *p != process);
        if !self.addresses.keys().copied().eq(peers()) {
            return wrong(format!("heartbeat addresses of {:?}, expected one per peer", self.addresses.keys()));
        }
        if !self.connections.keys().copied().eq(peers()) {
            return wrong(format!("control connections to {:?}, expected one per peer", self.connections.keys()));
        }
        if self.interval.is_zero() || self.deadline < 4 * self.interval {
            let (interval, deadline) = (self.interval, self.deadline);
            return wrong(format!(
                "a deadline of {deadline:?} with a heartbeat every {interval:?}: the deadline must be at least 4 intervals"
            ));
        }
        Ok(())
    }
}

/// Binds a heartbeat socket to an address of this node. With port 0, the system chooses the port.
pub fn bind(address: SocketAddr) -> io::Result<UdpSocket> {
    UdpSocket::bind(address)
}

/// This process's membership in the session.
///
/// Dropping it takes at most a second, even with frozen peers. Without [`Membership::leave`], peers report a failure.
#[derive(Debug)]
pub struct Membership {
    shared: Arc<Shared>,
    notices: Receiver<MembershipEvent>,
    /// The threads, in drop order. Each thread ends when the first element of its pair is dropped.
    _heartbeat: (Arc<()>, JoinOnDrop),
    _control: (oneshot::Sender<()>, JoinOnDrop),
}

impl Membership {
    /// Joins the session. Blocks until all peers have joined.
    pub fn start(config: MembershipConfig) -> Result<Self, MembershipError> {
        config.check()?;
        let MembershipConfig { process, processes, session, epoch, key, .. } = config;
        // Extra capacity for one `Left` event per peer and for `Ended`.
        let (sender, notices) = bounded(NOTICES_MAX + processes as usize);
        let shared = Arc::new(Shared::new(process, processes, epoch, config.grace, sender));
        let codec = Codec::new(&key, session, epoch, processes);
        let addresses = config.addresses.into_values().collect();
        // Heartbeats start before the connections, because a peer that starts earlier already monitors this process.
        let (socket, interval) = (config.heartbeat, config.interval);
        let heartbeats = Heartbeats { shared: shared.clone(), codec, socket, addresses, interval };
        let heartbeat =
            heartbeats.start().map_err(|source| MembershipError::Io { operation: "start heartbeats", source })?;
        let control = control::start(shared.clone(), config.connections)?;
        // From here on, dropping `membership` ends both threads.
        let membership = Self { shared: shared.clone(), notices, _heartbeat: heartbeat, _control: control };
        if let Err(error) = shared.wait_for_peers(config.join_within, config.join_at_most, config.deadline) {
            // Reports the failure to the peers that are connected.
            shared.fail(error.to_string(), error.exit().code());
            return Err(error);
        }
        Ok(membership)
    }

    /// The received events, in order for each peer. The application must read them; a large backlog ends the session.
    pub fn notices(&self) -> &Receiver<MembershipEvent> {
        &self.notices
    }

    /// Sends a peer a message of at most [`MESSAGE_BYTES_MAX`] bytes. Messages to the same peer arrive in order. Does
    /// not wait for delivery. Fails with [`MembershipError::Backlog`] if the peer does not read its messages.
    pub fn send(&self, to: u32, topic: u16, bytes: Vec<u8>) -> Result<(), MembershipError> {
        self.shared.send(to, topic, bytes)
    }

    /// Sends a message to all peers. Stops at the first error.
    pub fn send_to_all(&self, topic: u16, bytes: &[u8]) -> Result<(), MembershipError> {
        let peers = (0..self.shared.processes).filter(|p| *p != self.shared.own);
        peers.into_iter().try_for_each(|to| self.send(to, topic, bytes.to_vec()))
    }

    /// Ends the session because this process has failed. If a lost peer caused the error, use [`Membership::suspect`].
    pub fn fail(&self, cause: impl Into<String>, exit: u8) {
        self.shared.fail(cause.into(), exit);
    }

    /// Reports a symptom of a lost peer, such as a broken data connection. The session ends with this peer as the
    /// cause, except if a better cause arrives within the grace window.
    pub fn suspect(&self, process: u32, cause: impl Into<String>) {
        self.shared.suspect(process, cause.into());
    }

    /// The first cause, if the session has ended because of a failure.
    pub fn first_cause(&self) -> Option<FirstCause> {
        self.shared.first_cause()
    }

    /// Returns the time since each peer's last heartbeat; `None` if the peer has left.
    pub fn silent_times(&self) -> Vec<(u32, Option<Duration>)> {
        self.shared.silent_times()
    }

    /// Returns the counters of rejected datagrams and control messages.
    pub fn counters(&self) -> Counters {
        self.shared.counters()
    }

    /// Leaves the session cleanly, after all work of this process. Waits at most a second until peers have received all
    /// messages; false if a peer did not acknowledge them. Later failures of peers do not affect this process.
    pub fn leave(&self) -> bool {
        self.shared.leave();
        self.shared.wait_for_delivery(LEAVE_TIMEOUT)
    }
}

impl Drop for Membership {
    fn drop(&mut self) {
        if !self.shared.has_ended() {
            self.shared.fail("it ended without leaving the session: see its log".into(), Exit::Internal.code());
        }
        self.shared.wait_for_delivery(DROP_TIMEOUT);
    }
}

#[cfg(test)]
mod tests;
