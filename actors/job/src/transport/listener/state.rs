//! The state shared by a listener's thread and its owner: unclaimed connections and counters.

use std::collections::VecDeque;
use std::time::Duration;

use parking_lot::{Condvar, Mutex};

use crate::transport::connection::Connection;
use crate::transport::handshake::AcceptPolicy;
use crate::transport::hello::Purpose;

/// Limits of a listener.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ListenerOptions {
    /// Maximum number of unauthenticated connections.
    pub unauthenticated_max: usize,
    /// Maximum duration of a handshake.
    pub handshake_timeout: Duration,
    /// Maximum number of authenticated connections that nobody has claimed.
    pub unclaimed_max: usize,
}

impl Default for ListenerOptions {
    fn default() -> Self {
        Self { unauthenticated_max: 64, handshake_timeout: Duration::from_secs(5), unclaimed_max: 1024 }
    }
}

/// Number of connections that a listener rejected, by reason. The counters only grow.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[allow(missing_docs, reason = "the names explain the other fields")]
pub struct Refusals {
    /// Connections that a newer connection replaced, because too many were unauthenticated.
    pub evicted: u64,
    pub timed_out: u64,
    pub disconnected: u64,
    /// The peer does not speak this protocol: the magic or the message length is wrong.
    pub malformed: u64,
    pub version: u64,
    /// A message cannot be decrypted: the peer has another secret, or it has replayed or modified a message.
    pub proof: u64,
    pub session: u64,
    /// The peer has an older epoch, or is too late for the running world.
    pub old_epoch: u64,
    pub new_epoch: u64,
    /// The peer's process number does not exist, or the connection is meant for another process.
    pub process: u64,
    pub unreadable: u64,
    /// The refusal is temporary: the listener's world has not started, or too many connections are unclaimed.
    pub retry: u64,
}

impl Refusals {
    /// Sum of all counters.
    pub fn total(&self) -> u64 {
        let handshakes = self.evicted + self.timed_out + self.disconnected + self.malformed + self.version + self.proof;
        handshakes + self.session + self.old_epoch + self.new_epoch + self.process + self.unreadable + self.retry
    }
}

/// An authenticated connection that nobody has claimed yet.
#[derive(Debug)]
pub(super) struct Unclaimed {
    pub(super) from: u32,
    pub(super) purpose: Purpose,
    pub(super) connection: Connection,
}

#[derive(Debug)]
pub(super) struct State {
    pub(super) policy: AcceptPolicy,
    pub(super) unclaimed: VecDeque<Unclaimed>,
    pub(super) refusals: Refusals,
    pub(super) closed: bool,
}

#[derive(Debug)]
pub(super) struct Shared {
    pub(super) state: Mutex<State>,
    pub(super) arrived: Condvar,
}

impl Shared {
    pub(super) fn close(&self) {
        let mut state = self.state.lock();
        state.closed = true;
        state.unclaimed.clear();
        self.arrived.notify_all();
    }
}
