//! Records each actor's newest firings in a ring buffer: launch, end, and the last event that the firing waited for.

use std::collections::{BTreeMap, VecDeque};

use parking_lot::Mutex;

use crate::protocol::{Message, ProtocolEvent};
use crate::spec::RegisterId;

/// Capacity of a ring buffer, in firings.
pub const RING_FIRINGS: usize = 4096;

/// The last event that an idle actor needed before it could fire.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub enum Cause {
    /// A piece of an input.
    Input(RegisterId),
    /// A slot of an output, released by the output's readers.
    Credit(RegisterId),
    /// A token from the host.
    Host,
    /// The end of the actor's own previous firing, or the session's start.
    #[default]
    Own,
}

impl Cause {
    pub(crate) fn of(event: &ProtocolEvent) -> Self {
        match *event {
            ProtocolEvent::Message(Message::Filled { register, .. }) => Self::Input(register),
            ProtocolEvent::Message(Message::Released { register, .. }) => Self::Credit(register),
            ProtocolEvent::Token { .. } => Self::Host,
            ProtocolEvent::Start | ProtocolEvent::Signal { .. } | ProtocolEvent::Done { .. } => Self::Own,
        }
    }
}

/// One firing that has ended. Times are nanoseconds since the session's start.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct FiringRecord {
    /// Index of the action.
    pub action: u32,
    /// Number of earlier firings of the action.
    pub firing: u64,
    /// When the actor became idle.
    pub idle_ns: u64,
    /// When the firing was launched. From `idle_ns` until then, the actor waited for `cause`.
    pub launched_ns: u64,
    /// When the actor received the signal of its first early output; `ended_ns` if it has no early output.
    pub early_ns: u64,
    /// When the actor received the notification of the firing's end.
    pub ended_ns: u64,
    /// What the actor waited for before the launch.
    pub cause: Cause,
}

/// Idle time of an actor by cause, in nanoseconds.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Idle {
    /// Time spent waiting for a piece, by register.
    pub input_ns: BTreeMap<RegisterId, u64>,
    /// Time spent waiting for a free slot, by register.
    pub credit_ns: BTreeMap<RegisterId, u64>,
    /// Time spent waiting for the host.
    pub host_ns: u64,
    /// Time before the first firing, if that firing waited only for the session's start. Later firings add no time.
    pub own_ns: u64,
}

impl Idle {
    pub(crate) fn add(&mut self, cause: Cause, ns: u64) {
        match cause {
            Cause::Input(register) => *self.input_ns.entry(register).or_default() += ns,
            Cause::Credit(register) => *self.credit_ns.entry(register).or_default() += ns,
            Cause::Host => self.host_ns += ns,
            Cause::Own => self.own_ns += ns,
        }
    }
}

/// One actor's newest firings, ordered by end time.
#[derive(Debug, Default)]
pub(crate) struct Ring(Mutex<RingState>);

#[derive(Debug, Default)]
struct RingState {
    firings: VecDeque<FiringRecord>,
    /// Index of the oldest kept firing, counted since the start.
    first: u64,
}

/// The result of reading a ring buffer.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct NewFirings {
    /// Firings that have ended since the given position.
    pub firings: Vec<FiringRecord>,
    /// The position for the next read.
    pub next: u64,
    /// Number of firings that were overwritten before they were read.
    pub lost: u64,
}

impl Ring {
    pub(crate) fn push(&self, fired: FiringRecord) {
        let mut state = self.0.lock();
        if state.firings.len() == RING_FIRINGS {
            state.firings.pop_front();
            state.first += 1;
        }
        state.firings.push_back(fired);
    }

    /// Returns all firings from index `from`, counted since the start.
    pub(crate) fn read(&self, from: u64) -> NewFirings {
        let state = self.0.lock();
        let skip = from.saturating_sub(state.first) as usize;
        let firings: Vec<FiringRecord> = state.firings.iter().skip(skip).copied().collect();
        let next = state.first + state.firings.len() as u64;
        NewFirings { firings, next, lost: state.first.saturating_sub(from) }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_ring_keeps_the_newest_firings_and_counts_the_lost_ones() {
        let ring = Ring::default();
        let fired = |firing| FiringRecord { firing, ..FiringRecord::default() };
        assert_eq!(ring.read(0), NewFirings::default());
        (0..3).for_each(|n| ring.push(fired(n)));
        assert_eq!(ring.read(1), NewFirings { firings: vec![fired(1), fired(2)], next: 3, lost: 0 });
        assert_eq!(ring.read(3), NewFirings { firings: vec![], next: 3, lost: 0 });
        let total = RING_FIRINGS as u64 + 5;
        (3..total).for_each(|n| ring.push(fired(n)));
        let new = ring.read(3);
        assert_eq!((new.firings.len(), new.next, new.lost), (RING_FIRINGS, total, 2));
        assert_eq!(new.firings[0], fired(5));
    }
}
