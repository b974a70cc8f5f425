//! The events and counters of a membership.

use super::cause::FirstCause;

/// An event that other processes caused.
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
    /// The session has ended. This event is sent only once.
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
    /// Datagrams of another session with the same key.
    pub other_session: u64,
    pub old_epoch: u64,
    /// Datagrams of a newer epoch. The first one makes this process end.
    pub newer_epoch: u64,
    pub garbled: u64,
}
