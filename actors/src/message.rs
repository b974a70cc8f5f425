//! What a shard's mailbox carries.

use crossbeam_channel::Sender;
use shardflow_kernels::clock::RaceClock;
use shardflow_kernels::error::KernelError;

use crate::protocol::ProtocolEvent;
use crate::snapshot::ActorSnapshot;

/// One entry of a mailbox. Within a process only; what other actors send is the event's [`crate::protocol::Message`], ids
/// and slots.
#[derive(Debug)]
pub(crate) enum Cast {
    /// Something for the protocol.
    Event(ProtocolEvent),
    /// The firing in flight failed.
    Failed(KernelError),
    /// Answer with the state, and what had happened then.
    Snapshot(Sender<(ActorSnapshot, RaceClock)>),
    /// A bug in the actor itself.
    #[cfg(test)]
    Panic,
}

/// What travels: an entry, and what its sender knew to have happened.
#[derive(Debug)]
pub(crate) struct Mail {
    pub(crate) cast: Cast,
    pub(crate) clock: RaceClock,
}

/// The message of actors that get none.
#[derive(Debug)]
pub(crate) enum Never {}
