//! The messages in a shard's mailbox.

use crossbeam_channel::Sender;
use shardflow_kernels::clock::Stamped;
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
    /// Requests the actor's state.
    Snapshot(Sender<Stamped<ActorSnapshot>>),
    /// Makes the actor panic.
    #[cfg(test)]
    Panic,
}

/// A mailbox entry.
pub(crate) type Mail = Stamped<Cast>;

/// The message of actors that get none.
#[derive(Debug)]
pub(crate) enum Never {}
