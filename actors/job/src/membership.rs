//! Tracks the members of a session, detects failures, and decides why the session ended.
//!
//! Each process has one [`Membership`], which is connected only to its neighbours in the [`ControlTree`]. Heartbeats
//! (datagrams) detect silent neighbours. The control plane uses connections that the caller has authenticated. It
//! passes failures, orderly ends, small application messages and numbers to combine ([`MergeRule`]) from neighbour to
//! neighbour. Any failure ends the session in all processes with one [`FirstCause`].

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
mod core;
mod datagram;
mod detector;
mod error;
#[cfg(any(test, fuzzing))]
#[doc(hidden)]
pub mod fuzz;
mod heartbeat;
mod outbox;
mod reduce;
mod rounds;
mod shared;
mod status;
mod tree;

pub use cause::FirstCause;
pub use control_message::MESSAGE_BYTES_MAX;
pub use error::MembershipError;
pub use reduce::{Difference, MergeRule, Reduced};
pub use status::{Counters, MembershipEvent};
pub use tree::{ControlTree, FAN_OUT};

use crate::exit::Exit;
use crate::transport::Connection;
use datagram::Codec;
use heartbeat::Heartbeats;
use shared::{JoinOnDrop, NOTICES_MAX, Shared};

/// Timeout of an orderly end that waits for acknowledgements from peers.
const LEAVE_TIMEOUT: Duration = Duration::from_secs(1);
/// Time that a dropped membership waits for peers to receive its last message. A frozen peer never receives it.
const DROP_TIMEOUT: Duration = Duration::from_millis(500);

/// Configuration of a membership; the rendezvous supplies most of it.
#[derive(Debug)]
pub struct MembershipConfig {
    /// Number of this process.
    pub process: u32,
    /// Number of processes of the world, including this one.
    pub processes: u32,
    /// Id of the run; the same for all its incarnations.
    pub session: [u8; 16],
    /// The incarnation of the run. Messages of older incarnations are rejected.
    pub epoch: u64,
    /// The job's key. A separate key for each use is derived from it.
    pub key: [u8; 32],
    /// The bound heartbeat socket, see [`bind`].
    pub heartbeat: UdpSocket,
    /// The tree of connections. By default, all processes are on one node.
    pub tree: Arc<ControlTree>,
    /// Addresses of the heartbeat sockets of this process's neighbours in the tree.
    pub addresses: BTreeMap<u32, SocketAddr>,
    /// An authenticated connection to each neighbour. Only the control plane uses it.
    pub connections: BTreeMap<u32, Connection>,
    /// Time between heartbeats.
    pub interval: Duration,
    /// Time without heartbeats after which a peer is lost.
    pub deadline: Duration,
    /// Time after the first symptom during which reports of better causes may arrive.
    pub grace: Duration,
    /// Timeout for peers to join.
    pub join_within: Duration,
    /// Timeout for peers that send heartbeats but have not joined.
    pub join_at_most: Duration,
}

impl MembershipConfig {
    /// Creates a configuration without addresses and connections. Heartbeats are 250 ms apart, the deadline is 4 s, the
    /// grace window is 500 ms, and peers have 30 s to join.
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
            tree: Arc::new(ControlTree::new(&vec![0; processes as usize])),
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
        if self.tree.processes() != processes {
            return wrong(format!("the control tree has {} processes", self.tree.processes()));
        }
        let peers = self.tree.neighbours(process);
        if !self.addresses.keys().eq(&peers) {
            return wrong(format!("heartbeat addresses of {:?}, expected {peers:?}", self.addresses.keys()));
        }
        if !self.connections.keys().eq(&peers) {
            return wrong(format!("control connections to {:?}, expected {peers:?}", self.connections.keys()));
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

/// Binds a heartbeat socket to an address of this node; with port 0 the system chooses a port.
pub fn bind(address: SocketAddr) -> io::Result<UdpSocket> {
    UdpSocket::bind(address)
}

/// The membership of this process in the session.
///
/// Dropping it takes at most a second, even with frozen peers. A drop without [`Membership::leave`] is a failure for
/// peers.
#[derive(Debug)]
pub struct Membership {
    shared: Arc<Shared>,
    notices: Receiver<MembershipEvent>,
    /// The threads, dropped in this order. Each thread ends when the first element of its tuple is dropped.
    _heartbeat: (Arc<()>, JoinOnDrop),
    _control: (oneshot::Sender<()>, JoinOnDrop),
}

impl Membership {
    /// Joins the session; blocks until all peers have joined.
    pub fn start(config: MembershipConfig) -> Result<Self, MembershipError> {
        config.check()?;
        let MembershipConfig { process, processes, session, epoch, key, tree, .. } = config;
        // Extra room for one `Left` of each peer and for `Ended`.
        let (sender, notices) = bounded(NOTICES_MAX + processes as usize);
        let shared = Arc::new(Shared::new(process, tree, epoch, (config.deadline, config.grace), sender));
        let codec = Codec::new(&key, session, epoch, processes);
        // Heartbeats start before the connections, because peers that are ready earlier already monitor this process.
        let (socket, addresses, interval) = (config.heartbeat, config.addresses, config.interval);
        let heartbeats = Heartbeats { shared: shared.clone(), codec, socket, addresses, interval };
        let heartbeat =
            heartbeats.start().map_err(|source| MembershipError::Io { operation: "start heartbeats", source })?;
        let control = control::start(shared.clone(), config.connections)?;
        // From here on, dropping `membership` ends both threads.
        let membership = Self { shared: shared.clone(), notices, _heartbeat: heartbeat, _control: control };
        if let Err(error) = shared.wait_for_peers(config.join_within, config.join_at_most, config.deadline) {
            // Reports the reason to the peers that have connected.
            shared.fail(error.to_string(), error.exit().code());
            return Err(error);
        }
        Ok(membership)
    }

    /// The channel of events, in order by peer. The application must read it: too many unread events end the session.
    pub fn notices(&self) -> &Receiver<MembershipEvent> {
        &self.notices
    }

    /// Sends a message of at most [`MESSAGE_BYTES_MAX`] bytes to a process, through the tree. Messages to one process
    /// arrive in order. Does not wait for delivery. Fails with [`MembershipError::Backlog`] if the next process on the
    /// way does not read. If a later process on the way does not read, the session ends.
    pub fn send(&self, to: u32, topic: u16, bytes: Vec<u8>) -> Result<(), MembershipError> {
        self.shared.send(Some(to), topic, bytes)
    }

    /// Sends a message to all other processes. Returns the first error, after it has sent to all reachable processes.
    pub fn send_to_all(&self, topic: u16, bytes: &[u8]) -> Result<(), MembershipError> {
        self.shared.send(None, topic, bytes.to_vec())
    }

    /// Supplies this process's numbers, one list per field of `rules`, to the topic's next round. Returns the channel
    /// of the topic's results. All processes must supply their numbers, in the same order of rounds. After the
    /// session's end no result arrives, so the caller must also wait for the end.
    ///
    /// # Errors
    /// [`MembershipError::Numbers`] if the topic is above 63 or the numbers do not fit the rules;
    /// [`MembershipError::TooLarge`] if the numbers do not fit in a message.
    pub fn reduce(
        &self,
        topic: u16,
        rules: &Arc<[MergeRule]>,
        fields: Vec<Vec<u64>>,
    ) -> Result<Receiver<Reduced>, MembershipError> {
        self.shared.supply(topic, rules, fields)
    }

    /// The process whose numbers are missing in the topic's round, as far as this process knows, and whether it has
    /// left. For a fraction of a second, the result is only a neighbour on the way to that process.
    pub fn missing(&self, topic: u16) -> Option<(u32, bool)> {
        self.shared.missing(topic)
    }

    /// True if another process has left the session cleanly.
    pub fn has_left(&self, process: u32) -> bool {
        self.shared.has_left(process)
    }

    /// The tree that determines which processes are connected.
    pub fn tree(&self) -> &ControlTree {
        &self.shared.tree
    }

    /// Ends the session because this process has failed. If a lost peer caused the error, use [`Membership::suspect`].
    pub fn fail(&self, cause: impl Into<String>, exit: u8) {
        self.shared.fail(cause.into(), exit);
    }

    /// Reports a symptom of a lost peer, such as a broken data connection. The session ends with that peer as the
    /// cause, unless a better cause arrives within the grace window.
    pub fn suspect(&self, process: u32, cause: impl Into<String>) {
        self.shared.suspect(process, cause.into());
    }

    /// The first cause, if the session has ended.
    pub fn first_cause(&self) -> Option<FirstCause> {
        self.shared.first_cause()
    }

    /// Returns the time since the last sign of life of each other process; `None` if that process has left. For a
    /// process that is no neighbour, the time is exact only if no process in its direction is more silent.
    pub fn silent_times(&self) -> Vec<(u32, Option<Duration>)> {
        self.shared.silent_times()
    }

    /// Returns the counters of rejected datagrams and control messages.
    pub fn counters(&self) -> Counters {
        self.shared.counters()
    }

    /// Leaves the session cleanly. Call this after this process has ended its work. Waits at most a second until peers
    /// have received all messages. Returns false if a peer has not. Later failures of peers do not affect this process.
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
