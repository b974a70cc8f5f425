//! Collectives: the request ([`CollectiveCall`]) and the trait that every engine implements ([`Collective`]).
//! CPU engines live in `collective/`, GPU engines in `cuda/`.

use std::fmt::Debug;

use crate::bound::Bound;
use crate::error::{KernelError, Result};
use crate::event::BackendObject;
use crate::memory::View;

pub mod board;
pub(crate) mod call;
pub(crate) mod exchange;
pub mod in_process;
pub(crate) mod issue_order;
#[cfg(feature = "mpi")]
pub mod mpi;
pub(crate) mod order;
pub(crate) mod ranks;
pub(crate) mod rendezvous;
pub mod routed;
pub mod shared_memory;
pub(crate) mod status;
pub mod wire;

pub use call::{CollectiveCall, CollectiveKind, Group, ReduceOp};
pub use issue_order::IssueSlot;
pub use ranks::{RankAxis, Ranks};
pub use status::{AbortStatus, MemberWait};

/// An engine that runs collectives, for example in one process's memory, with NCCL or with MPI. Each member's stream
/// calls [`Collective::run`] and blocks in that call. All members issue the calls of a group in the same order.
pub trait Collective: Debug + Send + Sync {
    /// Runs one member's part of a call on the buffers that [`CollectiveKind`] names. Returns once the result is
    /// written and no other member reads the buffers. The default implementation returns an error; engines that
    /// implement [`Collective::on_device`] keep it.
    ///
    /// # Errors
    /// [`KernelError::CollectiveMismatch`] on all members if their calls differ; [`KernelError::Arguments`] if the
    /// buffers do not fit the call; [`KernelError::Aborted`] after [`Collective::abort`].
    fn run(&self, call: &CollectiveCall, _reads: &[View<'_>], _writes: &[View<'_>]) -> Result<()> {
        Err(KernelError::arguments(call.name(), "stream", "a CUDA stream", "a host thread"))
    }

    /// Fails every waiting and every later call with [`KernelError::Aborted`]. Repeated aborts keep the first cause.
    fn abort(&self, cause: &str);

    /// The current waits: each member of this process that waits, and the member that it waits for.
    fn waits(&self) -> Vec<MemberWait>;

    /// Whether [`Collective::waits`] is complete. If true, a member that is in a call but not listed waits for nobody.
    fn knows_waits(&self) -> bool {
        true
    }

    /// Bytes that the device of this rank has received from other members since the engine was created.
    fn bytes_received(&self, rank: usize) -> u64;

    /// The abort status of each GPU engine; empty for other engines. On its stream, an aborted call of a GPU engine
    /// looks like a completed call, so the caller must check this status.
    fn abort_statuses(&self) -> Vec<AbortStatus> {
        Vec::new()
    }

    /// Reserves the next position in this device's issue order. `None` if the engine has no such order. The stream
    /// calls this function once per submission.
    fn issue_slot(&self, _rank: usize) -> Option<IssueSlot> {
        None
    }

    /// Returns the object that puts this call on a device's stream. Engines that run on host memory return `None`.
    fn on_device(&self, _call: &CollectiveCall) -> Option<DeviceCollective<'_>> {
        None
    }
}

/// An engine that can put calls on a device's streams.
#[derive(Clone, Copy)]
pub struct DeviceCollective<'a>(pub(crate) &'a dyn Enqueue);

/// A function that blocks until later work may be put on the stream.
pub(crate) type Wait = Box<dyn FnOnce() -> Result<()> + Send>;

pub(crate) enum Enqueued {
    Issued,
    /// The call is on the stream once this function returns. The function may block, so the stream's thread calls it.
    Pending(Wait),
}

pub(crate) trait Enqueue {
    /// Puts one member's part of a call on the backend's `stream`, whose device is current. Blocks for a few driver
    /// calls at most. The caller keeps `bound`'s memory alive until the call has run (STAGE-1 limits the workspace).
    fn enqueue(&self, call: &CollectiveCall, bound: &Bound<'_>, stream: BackendObject) -> Result<Enqueued>;
}
