//! Collectives: the request ([`CollectiveCall`]) and the trait that every engine implements ([`Collective`]).
//! CPU engines live in `collective/`, GPU engines in `cuda/`.

use std::fmt::Debug;
use std::sync::Arc;

use parking_lot::Mutex;

use crate::cuda::engine::CudaCollective;
use crate::cuda::issue_order::IssueTicket;
use crate::error::KernelError;
use crate::memory::View;
use crate::tensor::Region;

pub mod board;
pub(crate) mod exchange;
pub mod in_process;
#[cfg(feature = "mpi")]
pub mod mpi;
pub mod routed;
pub mod shared_memory;
pub mod wire;

/// An engine that runs collectives: within a process, by NCCL, by MPI. Each member's stream calls [`Collective::run`]
/// and blocks in it. All members issue the calls of a group in the same order.
pub trait Collective: Debug + Send + Sync {
    /// Runs one collective as one member, with the buffers that [`CollectiveKind`] names. Returns once the member's
    /// result is written and no other member reads its buffers any more.
    ///
    /// # Errors
    /// [`KernelError::CollectiveMismatch`] on all members when they disagree, [`KernelError::Arguments`] when the
    /// buffers do not fit the call, [`KernelError::Aborted`] after [`Collective::abort`].
    fn run(&self, call: &CollectiveCall, reads: &[View<'_>], writes: &[View<'_>]) -> Result<(), KernelError>;

    /// Fails every waiting call and every later call with [`KernelError::Aborted`]. The first cause is kept.
    fn abort(&self, cause: &str);

    /// The members of this process that wait now, and the members that they wait for.
    fn waits(&self) -> Vec<MemberWait>;

    /// Whether [`Collective::waits`] is complete: a member in a call that it does not list waits for nobody.
    fn knows_waits(&self) -> bool {
        true
    }

    /// Bytes that the device of this rank has received from other members since the engine was created.
    fn bytes_received(&self, rank: usize) -> u64;

    /// For GPU engines, whose aborted calls look completed: the abort status of each engine.
    fn outcomes(&self) -> Vec<AbortStatus> {
        Vec::new()
    }

    /// For engines that need one issue order on all devices: a ticket for a submission to a stream of this device,
    /// taken at submission.
    fn turn(&self, rank: usize) -> Option<IssueTicket> {
        let _ = rank;
        None
    }

    /// For GPU engines: how to issue this call on a CUDA stream. For any other engine, the stream copies the buffers to
    /// host memory.
    fn on_device(&self, call: &CollectiveCall) -> Option<CudaCollective<'_>> {
        let _ = call;
        None
    }
}

/// Whether an engine was aborted, and why. Clones share the status of one engine and do not keep it alive.
#[derive(Clone, Debug, Default)]
pub struct AbortStatus(Arc<Mutex<Option<String>>>);

impl AbortStatus {
    /// Records the cause unless one is recorded already. Returns whether this cause is the first.
    pub(crate) fn abort(&self, cause: &str) -> bool {
        let mut aborted = self.0.lock();
        let first = aborted.is_none();
        aborted.get_or_insert_with(|| cause.to_owned());
        first
    }

    /// The error that calls return after an abort.
    pub(crate) fn aborted(&self) -> Option<KernelError> {
        let aborted = self.0.lock();
        aborted.clone().map(|cause| KernelError::Aborted { cause })
    }
}

/// A member that waits for another member in a collective.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct MemberWait {
    /// Id of the group.
    pub group: u32,
    /// Rank of the device that waits.
    pub rank: usize,
    /// Rank of the device that it waits for.
    pub peer: usize,
}

/// How partial values are combined.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum ReduceOp {
    /// Addition.
    Sum,
    /// The larger value.
    Max,
}

/// An ordered set of devices that call collectives together.
///
/// The order fixes the bits of every reduction, in every engine: the data that member `c` owns (chunk `c` of an
/// all-reduce, part `c` of a reduce-scatter) is combined as `((x[c+1] + x[c+2]) + ...) + x[c]`, with member indices
/// modulo the group size. A ring passes the values in this order, the owner's value last.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct Group {
    /// Unique in a plan.
    pub id: u32,
    /// Ranks of the member devices in the session's mesh.
    pub ranks: Vec<usize>,
}

/// One collective, as one member sees it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct CollectiveCall {
    /// The participating devices.
    pub group: Arc<Group>,
    /// Index of this member in `group.ranks`.
    pub member: usize,
    /// The operation.
    pub kind: CollectiveKind,
}

/// The operation of a collective. Regions lie in the whole tensor that the group shares, one per member, in order.
/// They may be empty or uneven, and split any dim.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub enum CollectiveKind {
    /// `(x) -> (y)`, same shape on all members; may be in place. Every member gets the same bits.
    /// Member `c` combines chunk `c` of the flat tensor ([`crate::tensor::split_range`]) in the order of [`Group`], so
    /// each of n members receives `(n-1) * own chunk + (all - own chunk)` elements.
    AllReduce {
        /// How values are combined.
        op: ReduceOp,
    },
    /// `(part) -> (whole)`: each member contributes its region and receives the whole tensor.
    AllGather {
        /// The region that each member contributes.
        parts: Vec<Region>,
    },
    /// `(whole) -> (part)`: each member receives its region, combined over all members in the order of [`Group`].
    ReduceScatter {
        /// How values are combined.
        op: ReduceOp,
        /// The region that each member receives.
        parts: Vec<Region>,
    },
    /// `(part) -> (other part)`: each member contributes its region of `sources` and receives its region of `targets`.
    /// An element comes from the member's own source if that holds it, else from the first member that does.
    AllToAll {
        /// The region that each member contributes.
        sources: Vec<Region>,
        /// The region that each member receives.
        targets: Vec<Region>,
    },
    /// `(x) -> (y)`: every member receives the root's tensor.
    Broadcast {
        /// The member that sends.
        root: usize,
    },
    /// `(x) -> ()`, point to point. Returns once the receiver has x, or is in its call and x may be overwritten.
    Send {
        /// The receiving member.
        to: usize,
    },
    /// `() -> (y)`, point to point.
    Receive {
        /// The sending member.
        from: usize,
    },
}
