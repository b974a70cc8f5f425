//! The request for a collective: the group, and the operation that its members call together.

use std::sync::Arc;

use crate::collective::ranks::Ranks;
use crate::error::KernelError;
use crate::tensor::regions::Regions;
use crate::tensor::{element_count, split_range};

/// How a reduction combines the members' values.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum ReduceOp {
    /// Addition.
    Sum,
    /// The larger value.
    Max,
}

/// An ordered set of devices that call collectives together.
///
/// The order determines the bits of every reduction, in every engine except MPI and NCCL. Each prime factor of the number
/// of members, in ascending order, combines as many consecutive values into one: `((v[0] + v[1]) + ...) + v[last]`. So 4
/// members compute `(x[0] + x[1]) + (x[2] + x[3])`. The order is the same for each element of a tensor.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct Group {
    /// Id, unique within a plan.
    pub id: u32,
    /// Ranks of the member devices in the session's mesh.
    pub ranks: Ranks,
}

impl Group {
    /// The error if a member's call differs from the call of the other members.
    pub(crate) fn mismatch(&self, member: usize, expected: impl Into<String>, got: impl Into<String>) -> KernelError {
        KernelError::CollectiveMismatch { group: self.id, member, expected: expected.into(), got: got.into() }
    }
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

/// A collective's operation. A list of regions holds one region of the shared tensor per member. Regions may be empty,
/// may differ in size, and may split any dim.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub enum CollectiveKind {
    /// `(x) -> (y)`: x and y have the same shape on all members and may share memory. Every member gets the same bits
    /// (by MPI, only if the implementation of MPI ensures this), combined in the order of [`Group`]. If member `c`
    /// combines chunk `c` of the flat tensor ([`crate::tensor::split_range`]), each of n members receives
    /// `(n-1) * own chunk + (all - own chunk)` elements. Metrics count this number for every algorithm.
    AllReduce {
        /// How values are combined.
        op: ReduceOp,
    },
    /// `(part) -> (whole)`: each member contributes its region and receives the whole tensor.
    AllGather {
        /// The region that each member contributes.
        parts: Regions,
    },
    /// `(whole) -> (part)`: each member receives its region, combined over all members in the order of [`Group`].
    ReduceScatter {
        /// How values are combined.
        op: ReduceOp,
        /// The region that each member receives.
        parts: Regions,
    },
    /// `(part) -> (other part)`: each member contributes its region of `sources` and receives its region of `targets`.
    /// A member takes each element from its own source or, if its source lacks the element, from the first source that
    /// has the element.
    AllToAll {
        /// The region that each member contributes.
        sources: Regions,
        /// The region that each member receives.
        targets: Regions,
    },
    /// `(x) -> (y)`: every member receives the root's tensor.
    Broadcast {
        /// The member that sends.
        root: usize,
    },
    /// `(x) -> ()`, point to point. Returns once the receiver has joined the call and x may be overwritten.
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

impl CollectiveCall {
    /// The operation's name, as errors, plans and traces show it.
    pub fn name(&self) -> &'static str {
        match self.kind {
            CollectiveKind::AllReduce { .. } => "all_reduce",
            CollectiveKind::AllGather { .. } => "all_gather",
            CollectiveKind::ReduceScatter { .. } => "reduce_scatter",
            CollectiveKind::AllToAll { .. } => "all_to_all",
            CollectiveKind::Broadcast { .. } => "broadcast",
            CollectiveKind::Send { .. } => "send",
            CollectiveKind::Receive { .. } => "receive",
        }
    }

    /// Number of elements that this member receives from others. `y_shape` is the shape of its y.
    pub(crate) fn foreign_elements(&self, y_shape: &[usize]) -> usize {
        let (members, member, elements) = (self.group.ranks.len(), self.member, element_count(y_shape));
        match &self.kind {
            CollectiveKind::AllReduce { .. } => {
                let own = split_range(elements, members, member).len();
                (members - 1) * own + (elements - own)
            }
            CollectiveKind::ReduceScatter { .. } => (members - 1) * elements,
            CollectiveKind::AllGather { parts } => elements - parts.region(member).element_count(),
            CollectiveKind::AllToAll { sources, targets } => {
                elements
                    - sources.region(member).intersect(&targets.region(member)).map_or(0, |own| own.element_count())
            }
            CollectiveKind::Broadcast { root: from } | CollectiveKind::Receive { from } if *from != member => elements,
            CollectiveKind::Broadcast { .. } | CollectiveKind::Send { .. } | CollectiveKind::Receive { .. } => 0,
        }
    }
}

impl CollectiveKind {
    /// Number of buffers read, and number of buffers written.
    pub(crate) fn arity(&self) -> (usize, usize) {
        match self {
            CollectiveKind::Send { .. } => (1, 0),
            CollectiveKind::Receive { .. } => (0, 1),
            _ => (1, 1),
        }
    }
}
