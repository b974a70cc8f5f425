//! What actors did, firing by firing: when each was launched and ended, and what came last of all that it had waited for. Each
//! actor keeps its newest firings in a ring, which others read from where they left off.

use std::collections::{BTreeMap, VecDeque};
use std::sync::{Mutex, MutexGuard, PoisonError};

use crate::protocol::{Message, ProtocolEvent};
use crate::spec::RegisterId;

/// Firings that a ring holds.
pub const RING_FIRINGS: usize = 4096;

/// What let an actor that stood idle fire: whatever came last.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Cause {
    /// A piece of an input.
    Input(RegisterId),
    /// A slot of an output that its readers gave back.
    Credit(RegisterId),
    /// A token of the host.
    Host,
    /// Nothing: the actor's own firing before it had ended.
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
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct FiringRecord {
    /// Index of the action.
    pub action: u32,
    /// Firings of the action before this one.
    pub firing: u64,
    /// When the actor had nothing to do.
    pub idle_ns: u64,
    /// When it was launched: what lies between, the actor waited for `cause`.
    pub launched_ns: u64,
    /// When the actor heard that the first of its early outputs was written; its end, if it has none.
    pub early_ns: u64,
    /// When the actor heard of its end.
    pub ended_ns: u64,
    /// Why it was not launched before.
    pub cause: Cause,
}

/// Time that an actor stood idle, by what ended it, nanoseconds.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Idle {
    /// For a piece of each register.
    pub input_ns: BTreeMap<RegisterId, u64>,
    /// For a slot of each register.
    pub credit_ns: BTreeMap<RegisterId, u64>,
    /// For the host.
    pub host_ns: u64,
    /// For nothing from outside: messages on their way to the actor itself.
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

/// One actor's newest firings, in the order of their ends.
#[derive(Debug, Default)]
pub(crate) struct Ring(Mutex<Kept>);

#[derive(Debug, Default)]
struct Kept {
    firings: VecDeque<FiringRecord>,
    /// Of the first that is kept.
    first: u64,
}

/// What a ring told.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct NewFirings {
    /// Firings that have ended since.
    pub firings: Vec<FiringRecord>,
    /// Where to read on.
    pub next: u64,
    /// Firings that were dropped before they were read.
    pub lost: u64,
}

impl Ring {
    fn lock(&self) -> MutexGuard<'_, Kept> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub(crate) fn push(&self, fired: FiringRecord) {
        let mut kept = self.lock();
        if kept.firings.len() == RING_FIRINGS {
            kept.firings.pop_front();
            kept.first += 1;
        }
        kept.firings.push_back(fired);
    }

    /// All from the `from`-th on, counted since the start.
    pub(crate) fn read(&self, from: u64) -> NewFirings {
        let kept = self.lock();
        let skip = from.saturating_sub(kept.first) as usize;
        let firings: Vec<FiringRecord> = kept.firings.iter().skip(skip).copied().collect();
        let next = kept.first + kept.firings.len() as u64;
        NewFirings { firings, next, lost: kept.first.saturating_sub(from) }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_ring_keeps_the_newest_and_tells_what_was_lost() {
        let ring = Ring::default();
        let fired = |firing| FiringRecord {
            action: 0,
            firing,
            idle_ns: 0,
            launched_ns: 0,
            early_ns: 0,
            ended_ns: 0,
            cause: Cause::Own,
        };
        assert_eq!(ring.read(0), NewFirings::default());
        (0..3).for_each(|n| ring.push(fired(n)));
        assert_eq!(ring.read(1), NewFirings { firings: vec![fired(1), fired(2)], next: 3, lost: 0 });
        assert_eq!(ring.read(3), NewFirings { firings: vec![], next: 3, lost: 0 });
        let total = RING_FIRINGS as u64 + 5;
        (3..total).for_each(|n| ring.push(fired(n)));
        let told = ring.read(3);
        assert_eq!((told.firings.len(), told.next, told.lost), (RING_FIRINGS, total, 2));
        assert_eq!(told.firings[0], fired(5));
    }
}
