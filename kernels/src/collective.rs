//! Collectives: what is asked for ([`CollectiveCall`]) and the one trait ([`Collective`]) that every engine stands behind.
//! Engines live in `collective/`, those of GPUs in `cuda/`.

use std::fmt::Debug;
use std::sync::{Arc, Mutex, PoisonError};

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
/// and blocks in it; calls of one group come in the same order on all members.
pub trait Collective: Debug + Send + Sync {
    /// Runs one collective as one member, with the buffers that [`CollectiveKind`] names. Returns when the member's
    /// result is written and no other member still reads its buffers.
    ///
    /// # Errors
    /// [`KernelError::CollectiveMismatch`] on all members when they disagree, [`KernelError::Arguments`] when the
    /// buffers do not fit the call, [`KernelError::Aborted`] after [`Collective::abort`].
    fn run(&self, call: &CollectiveCall, reads: &[View<'_>], writes: &[View<'_>]) -> Result<(), KernelError>;

    /// Ends every call that waits, and every later one, with [`KernelError::Aborted`]. The first cause is kept.
    fn abort(&self, cause: &str);

    /// Which members, run by this process, wait for which others now.
    fn waits(&self) -> Vec<MemberWait>;

    /// Whether [`Collective::waits`] knows of all waits: a member in a call that is not named there waits for nobody.
    fn knows_waits(&self) -> bool {
        true
    }

    /// Bytes that the device of this rank has taken in from other members since the engine was made.
    fn bytes_received(&self, rank: usize) -> u64;

    /// For engines of GPUs, whose calls seem done when they were broken off: what tells whether they were.
    fn outcomes(&self) -> Vec<AbortStatus> {
        Vec::new()
    }

    /// For engines that ask for one order of calls on all devices: the turn of a submission to a stream of this device, taken
    /// when it is submitted.
    fn turn(&self, rank: usize) -> Option<IssueTicket> {
        let _ = rank;
        None
    }

    /// For engines of GPUs: how this call is put on a CUDA stream. A stream has any other engine work on a copy in the host's
    /// memory.
    fn on_device(&self, call: &CollectiveCall) -> Option<CudaCollective<'_>> {
        let _ = call;
        None
    }
}

/// Whether an engine was aborted, and why. Clones tell of the same engine, and do not keep it alive.
#[derive(Clone, Debug, Default)]
pub struct AbortStatus(Arc<Mutex<Option<String>>>);

impl AbortStatus {
    /// Notes the cause, of which the first is kept; whether it is the first.
    pub(crate) fn abort(&self, cause: &str) -> bool {
        let mut aborted = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let first = aborted.is_none();
        aborted.get_or_insert_with(|| cause.to_owned());
        first
    }

    /// The error that calls are answered with after an abort.
    pub(crate) fn aborted(&self) -> Option<KernelError> {
        let aborted = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        aborted.clone().map(|cause| KernelError::Aborted { cause })
    }
}

/// A member that waits for another in a collective.
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
/// The order fixes the bits of every reduction, in every engine: what member `c` owns (chunk `c` of an all-reduce, part
/// `c` of a reduce-scatter) is combined as `((x[c+1] + x[c+2]) + ...) + x[c]`, members counted modulo their number. So a
/// ring brings the values round, the owner's last.
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
    /// Who takes part.
    pub group: Arc<Group>,
    /// Index of this member in `group.ranks`.
    pub member: usize,
    /// What is done.
    pub kind: CollectiveKind,
}

/// What a collective does. Regions are of the whole tensor that the group shares, one for each member, in order;
/// they may be empty or uneven, and split any dim.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub enum CollectiveKind {
    /// `(x) -> (y)`, same shape everywhere; may be in place. Every member gets the same bits.
    /// Member `c` combines chunk `c` of the flat tensor ([`crate::tensor::split_range`]), in the order of [`Group`], so
    /// each of n members takes in `(n-1) * own chunk + (all - own chunk)` elements.
    AllReduce {
        /// How values are combined.
        op: ReduceOp,
    },
    /// `(part) -> (whole)`: each member has its region and gets all.
    AllGather {
        /// What each member brings.
        parts: Vec<Region>,
    },
    /// `(whole) -> (part)`: each member gets its region, combined over all members in the order of [`Group`].
    ReduceScatter {
        /// How values are combined.
        op: ReduceOp,
        /// What each member gets.
        parts: Vec<Region>,
    },
    /// `(part) -> (other part)`: each member has its region of `sources` and gets its region of `targets`; the first
    /// member that holds an element gives it, a member's own copy being preferred.
    AllToAll {
        /// What each member brings.
        sources: Vec<Region>,
        /// What each member gets.
        targets: Vec<Region>,
    },
    /// `(x) -> (y)`: every member gets the root's tensor.
    Broadcast {
        /// Member that gives.
        root: usize,
    },
    /// `(x) -> ()`: point to point; returns when the receiver has it, or is in its call and x may be overwritten.
    Send {
        /// Member that receives.
        to: usize,
    },
    /// `() -> (y)`.
    Receive {
        /// Member that sends.
        from: usize,
    },
}
