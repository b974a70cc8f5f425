//! What a membership reports: events and counters.

use super::cause::FirstCause;

/// An event from the other processes.
#[derive(Clone, Debug, PartialEq, Eq)]
#[allow(missing_docs, reason = "the names explain the fields")]
pub enum MembershipEvent {
    Message {
        from: u32,
        topic: u16,
        bytes: Vec<u8>,
    },
    Left {
        process: u32,
    },
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
