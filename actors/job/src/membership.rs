//! Tracks the members of a session, detects failures, and decides why the session ended.
//!
//! Each process has one [`Membership`], which is connected only to its neighbours in the [`ControlTree`]. Neighbours
//! exchange heartbeats (UDP datagrams), so each process detects a silent neighbour. The control plane uses connections
//! that the caller has authenticated. Over these, neighbours pass on reports of failures, departures of processes,
//! small application messages, and numbers that all processes combine ([`MergeRule`]). Any failure ends the session in
//! all processes, which agree on one [`FirstCause`].

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

/// How long [`Membership::leave`] waits for acknowledgements from peers.
const LEAVE_TIMEOUT: Duration = Duration::from_secs(1);
/// How long dropping a [`Membership`] waits for peers to receive its last message. A frozen peer never receives it.
const DROP_TIMEOUT: Duration = Duration::from_millis(500);

/// Configuration of a membership; the rendezvous supplies most of it.
#[derive(Debug)]
pub struct MembershipConfig {
    /// Number of this process.
    pub process: u32,
    /// Number of processes of the world, including this one.
    pub processes: u32,
    /// Id of the session. Heartbeats of other sessions are rejected.
    pub session: [u8; 16],
    /// The world's epoch, which is its restart count. Heartbeats of older epochs are rejected.
    pub epoch: u64,
    /// The key from which the key of the heartbeats is derived.
    pub key: [u8; 32],
    /// The heartbeat socket, bound by [`bind`].
    pub heartbeat: UdpSocket,
    /// The tree of connections. The default is the tree for processes that are all on one node.
    pub tree: Arc<ControlTree>,
    /// Addresses of the heartbeat sockets of this process's neighbours in the tree.
    pub addresses: BTreeMap<u32, SocketAddr>,
    /// An authenticated connection to each neighbour. Only the control plane uses it.
    pub connections: BTreeMap<u32, Connection>,
    /// Time between heartbeats.
    pub interval: Duration,
    /// Time without heartbeats after which a peer is lost.
    pub deadline: Duration,
    /// How long to wait, after the first sign of a failure, for reports that explain the failure better.
    pub grace: Duration,
    /// How long to wait for peers to join.
    pub join_within: Duration,
    /// How long to wait, in total, for peers that send heartbeats but have not joined.
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
            return wrong(format!(
                "got heartbeat addresses of {:?}, expected those of {peers:?}",
                self.addresses.keys()
            ));
        }
        if !self.connections.keys().eq(&peers) {
            return wrong(format!(
                "got control connections to {:?}, expected those to {peers:?}",
                self.connections.keys()
            ));
        }
        if self.interval.is_zero() || self.deadline < 4 * self.interval {
            let (interval, deadline) = (self.interval, self.deadline);
            return wrong(format!(
                "the heartbeat deadline is {deadline:?}, but must be at least 4 intervals of {interval:?}"
            ));
        }
        Ok(())
    }
}

/// Binds a heartbeat socket to an address of this node. If the port is 0, the system chooses a port.
pub fn bind(address: SocketAddr) -> io::Result<UdpSocket> {
    UdpSocket::bind(address)
}

/// The membership of this process in the session.
///
/// Dropping it takes at most a second, even if peers are frozen. If it is dropped without [`Membership::leave`], peers
/// treat this as a failure of this process.
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
        // The extra room is for one `Left` event of each peer and for the `Ended` event.
        let (sender, notices) = bounded(NOTICES_MAX + processes as usize);
        let shared = Arc::new(Shared::new(process, tree, epoch, (config.deadline, config.grace), sender));
        let codec = Codec::new(&key, session, epoch, processes);
        // Heartbeats start before the connections, because peers wait longer for a process that sends heartbeats.
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

    /// The channel of events; the events of one peer are in order. The caller must read the channel, because too many
    /// unread messages end the session.
    pub fn notices(&self) -> &Receiver<MembershipEvent> {
        &self.notices
    }

    /// Sends a message of at most [`MESSAGE_BYTES_MAX`] bytes to a process, through the tree. Messages to one process
    /// arrive in order. Does not wait for delivery. Fails with [`MembershipError::Backlog`] if the next process on the
    /// way does not read its messages. If a later process on the way does not read them, the session ends.
    pub fn send(&self, to: u32, topic: u16, bytes: Vec<u8>) -> Result<(), MembershipError> {
        self.shared.send(Some(to), topic, bytes)
    }

    /// Sends a message to all other processes. If this fails at a neighbour, still sends to all other neighbours, and
    /// returns the first error.
    pub fn send_to_all(&self, topic: u16, bytes: &[u8]) -> Result<(), MembershipError> {
        self.shared.send(None, topic, bytes.to_vec())
    }

    /// Supplies this process's numbers to the topic's next round, which combines the numbers of all processes. `fields`
    /// has one list of numbers for each rule. Returns the channel of the topic's results. All processes must supply
    /// numbers to every round. After the session's end no result arrives, so the caller must also wait for the end.
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

    /// The process whose numbers are missing in the topic's current round, and whether that process has left. During
    /// the first fraction of a second, the result may be the neighbour on the way to the missing process instead.
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

    /// Ends the session because this process has failed. After losing a peer, call [`Membership::suspect`] instead.
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

    /// Returns the time since the last sign of life of each other process; `None` if that process has left. Of the
    /// processes behind one neighbour in the tree, only the longest-silent one has an exact time.
    pub fn silent_times(&self) -> Vec<(u32, Option<Duration>)> {
        self.shared.silent_times()
    }

    /// Returns the counters of rejected datagrams and control messages.
    pub fn counters(&self) -> Counters {
        self.shared.counters()
    }

    /// Leaves the session cleanly. Call this after this process has ended its work. Waits until peers have received all
    /// messages; returns false if that takes over a second. Later failures of peers do not affect this process.
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
