//! The messages in a shard's mailbox.

use crossbeam_channel::Sender;
use shardflow_kernels::clock::RaceClock;
use shardflow_kernels::error::KernelError;

use crate::protocol::ProtocolEvent;
use crate::snapshot::ActorSnapshot;

/// One mailbox entry. It stays within the process; other actors send only the event's [`crate::protocol::Message`],
/// which holds ids and slots.
#[derive(Debug)]
pub(crate) enum Cast {
    /// An event for the protocol.
    Event(ProtocolEvent),
    /// The firing in flight failed.
    Failed(KernelError),
    /// Requests the actor's state, with the race clock at that time.
    Snapshot(Sender<(ActorSnapshot, RaceClock)>),
    /// Makes the actor panic.
    #[cfg(test)]
    Panic,
}

/// A mailbox entry with the sender's race clock.
#[derive(Debug)]
pub(crate) struct Mail {
    pub(crate) cast: Cast,
    pub(crate) clock: RaceClock,
}
