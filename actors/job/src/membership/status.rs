//! What a membership reports: events, counters, and the state of peers.

use std::time::Duration;

use super::cause::FirstCause;
use super::detector::PeerHealth;

/// An event from the other processes.
#[derive(Clone, Debug, PartialEq, Eq)]
#[allow(missing_docs, reason = "the names explain the fields")]
pub enum MembershipEvent {
    /// The bytes are opaque.
    Message { from: u32, topic: u16, bytes: Vec<u8> },
    /// A peer has left cleanly.
    Left { process: u32 },
    /// The session has ended; sent once.
    Ended(FirstCause),
}

/// Counters of rejected datagrams and control messages since the start.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[allow(missing_docs, reason = "the names explain the other fields")]
pub struct Counters {
    pub bad_format: u64,
    pub bad_mac: u64,
    /// Duplicate or reordered datagrams.
    pub replays: u64,
    /// Datagrams of another run with the same key.
    pub other_session: u64,
    pub old_epoch: u64,
    /// Datagrams of a newer epoch; the first one ends this process.
    pub newer_epoch: u64,
    pub garbled: u64,
}

/// Status of a peer.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[allow(missing_docs, reason = "the names explain the fields")]
pub struct PeerStatus {
    pub process: u32,
    pub left: bool,
    pub health: Option<PeerHealth>,
    /// Time since its last heartbeat; `None` if it has left.
    pub silent: Option<Duration>,
}
