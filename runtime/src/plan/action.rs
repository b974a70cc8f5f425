//! The plan of an action: launches, buffers and registers of a segment on one device.

use shardflow_kernels::collective::CollectiveCall;
use shardflow_kernels::op::{Buffer, Launch, Op};

use crate::graph::{NodeId, Var};
use crate::plan::segments::{HostTransfer, SegmentId};

/// The memory that a buffer's offset is relative to.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum BaseKey {
    /// The start of the device's arena. Buffers of tensors with a fixed address use this base.
    Fixed,
    /// The actor's scratch.
    Scratch,
    /// The current slot of an input port.
    Input(usize),
    /// The current slot of an output port.
    Output(usize),
    /// The slot of staging memory that a firing of a host action uses.
    Staging,
}

/// What the host transfers in an action. The action's launches copy between a slot of staging memory and the device.
#[derive(Clone, Debug, PartialEq)]
pub struct HostPort {
    /// What the host does.
    pub transfer: HostTransfer,
    /// The tensors, in the order of `buffers`.
    pub vars: Vec<Var>,
    /// The staging memory of each tensor.
    pub buffers: Vec<Buffer>,
    /// Size of a slot of staging memory.
    pub slot_bytes: usize,
}

/// The plan of one action.
#[derive(Clone, Debug)]
pub struct ActionPlan {
    /// The segment that the action runs.
    pub segment: SegmentId,
    /// The name in plans and errors.
    pub name: String,
    /// The kernel launches, in order.
    pub launches: Vec<Launch>,
    /// The node of each launch.
    pub nodes: Vec<NodeId>,
    /// Output ports that are signalled before the action ends: `(number of launches to complete first, output port)`.
    pub signals: Vec<(usize, u32)>,
    /// The memory that each base index in the launches' buffers refers to.
    pub bases: Vec<BaseKey>,
    /// The host's transfer, if there is one.
    pub host: Option<HostPort>,
}

impl ActionPlan {
    pub(crate) fn collectives(&self) -> impl Iterator<Item = &CollectiveCall> {
        self.launches.iter().filter_map(|launch| if let Op::Collective(call) = &launch.op { Some(call) } else { None })
    }
}

/// A register, by the rank of its device and its index among the registers of the device's class.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct DeviceRegister {
    pub device: usize,
    pub register: usize,
}

/// An action's launches, registers and scratch.
#[derive(Clone, Debug)]
pub struct EmittedAction {
    pub plan: ActionPlan,
    /// Registers read, in port order.
    pub inputs: Vec<DeviceRegister>,
    /// Registers written, in port order.
    pub outputs: Vec<usize>,
    pub scratch_bytes: usize,
}
