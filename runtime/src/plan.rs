//! The compiled program as plain data: actors with their registers and credits, each action's launches, and each
//! device's memory map. A session loads it.

use std::collections::BTreeMap;

use shardflow_actors::spec::{ActorId, RegisterId, Spec, StreamKind};
use shardflow_kernels::collective::CollectiveCall;
use shardflow_kernels::device::DeviceKind;
use shardflow_kernels::op::{Buffer, Launch, Op};
use shardflow_kernels::tensor::{DType, Region};

use crate::graph::{Graph, NodeId, Var};
use crate::plan::segments::{SegmentId, Segments};
pub use schedule::Schedule;

pub(crate) mod assign;
pub mod classes;
pub(crate) mod emit;
pub(crate) mod explain;
pub mod flops;
mod hash;
pub(crate) mod lower;
pub(crate) mod memory;
pub(crate) mod picture;
pub mod schedule;
pub mod segments;
pub(crate) mod slots;
pub mod validate;

/// The memory that a buffer's offset is relative to.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum BaseKey {
    /// The start of the device's arena, which holds tensors with a fixed address.
    Fixed,
    /// The actor's scratch.
    Scratch,
    /// The current slot of an input port.
    Input(usize),
    /// The current slot of an output port.
    Output(usize),
}

/// What the host does in an action.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum HostTransfer {
    /// It feeds inputs.
    Feed,
    /// After it has seen a step's results, it feeds what the update needs, such as the learning rate.
    Decide,
    /// It fetches outputs.
    Fetch,
}

/// The host's transfer of an action; the session supplies the kernel.
#[derive(Clone, Debug, PartialEq)]
pub struct HostPort {
    /// What the host does.
    pub transfer: HostTransfer,
    /// The tensors, in the order of `buffers`.
    pub vars: Vec<Var>,
    /// Their memory.
    pub buffers: Vec<Buffer>,
}

/// The plan of one action.
#[derive(Clone, Debug)]
pub struct ActionPlan {
    /// The segment that it runs.
    pub segment: SegmentId,
    /// The name in plans and errors.
    pub name: String,
    /// The kernel launches, in order.
    pub launches: Vec<Launch>,
    /// The node of each launch.
    pub nodes: Vec<NodeId>,
    /// Early signals: `(number of completed launches, output port)`.
    pub signals: Vec<(usize, u32)>,
    /// The meaning of each base index in the launches' buffers.
    pub bases: Vec<BaseKey>,
    /// The host's transfer, if there is one.
    pub host: Option<HostPort>,
}

impl ActionPlan {
    pub(crate) fn collectives(&self) -> impl Iterator<Item = &CollectiveCall> {
        self.launches.iter().filter_map(|launch| if let Op::Collective(call) = &launch.op { Some(call) } else { None })
    }
}

/// The memory of a register's slots.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct RegisterPlace {
    /// The device whose arena holds it.
    pub device: usize,
    /// Offset of slot 0 in the arena, bytes.
    pub offset: usize,
    /// Bytes from one slot to the next.
    pub stride: usize,
}

/// A parameter or a state on one device.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ResidentTensor {
    /// The tensor.
    pub var: Var,
    /// The device's part of it.
    pub region: Region,
    /// Element type.
    pub dtype: DType,
    /// Offset in the device's arena, bytes.
    pub offset: usize,
    /// Offset of the bf16 copy in the arena, bytes, if the parameter has one.
    pub bf16_offset: Option<usize>,
}

/// One device's memory.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct DeviceMemory {
    /// Bytes of tensors that no other action reads or nothing replaces: moments, f32 values of weights read in bf16.
    pub fixed_bytes: usize,
    /// Register slots, bytes: everything that passes between actions, including weights and gradients.
    pub register_bytes: usize,
    /// Scratch offset and bytes, by actor.
    pub scratch: BTreeMap<ActorId, (usize, usize)>,
    /// The whole arena, bytes: fixed tensors, registers and scratch.
    pub arena_bytes: usize,
    /// Bytes that the device's streams allocate outside the arena: on CPUs the scratch of kernel threads and of tensors
    /// widened from bf16. It depends on the process's number of threads, so it is not part of the plan's hash.
    pub stream_bytes: usize,
    /// Mirrors of registers that other processes write, bytes; 0 until a session has assigned devices to processes.
    pub mirror_bytes: usize,
    /// Parameters and states.
    pub residents: Vec<ResidentTensor>,
}

impl DeviceMemory {
    /// The planned peak of allocated device memory, bytes, without that of driver and libraries (such as contexts).
    pub fn total_bytes(&self) -> usize {
        self.arena_bytes + self.stream_bytes + self.mirror_bytes
    }

    /// Name and bytes of each part of the total, for display. Each of the last two is omitted if it is 0.
    pub fn parts(&self) -> Vec<(&'static str, usize)> {
        let scratch = self.scratch.values().map(|s| s.1).sum();
        let mut parts = vec![("fixed", self.fixed_bytes), ("in registers", self.register_bytes), ("scratch", scratch)];
        let optional = [("of streams", self.stream_bytes), ("in mirrors", self.mirror_bytes)];
        parts.extend(optional.into_iter().filter(|(_, bytes)| *bytes > 0));
        parts
    }

    pub(crate) fn row(&self, device: usize) -> String {
        format!("  device {device}: {} bytes = {}\n", self.total_bytes(), self.sum())
    }

    /// The parts as text, joined by `+`.
    fn sum(&self) -> String {
        self.parts().iter().map(|(name, bytes)| format!("{bytes} {name}")).collect::<Vec<_>>().join(" + ")
    }
}

/// A compiled program: everything that a session needs to run it.
#[derive(Clone, Debug)]
pub struct Plan {
    /// The graph after all passes.
    pub graph: Graph,
    /// Actors and registers.
    pub spec: Spec,
    /// `[actor][action]`.
    pub actions: Vec<Vec<ActionPlan>>,
    /// By register.
    pub registers: Vec<RegisterPlace>,
    /// By device rank.
    pub memory: Vec<DeviceMemory>,
    /// Micro-batches per step.
    pub micro_batches: usize,
    /// The units of work.
    pub segments: Segments,
    /// The schedule.
    pub schedule: Schedule,
    /// Threads of a compute stream. Each process chooses its own; not part of the plan's hash.
    pub threads_per_device: usize,
    /// The kind of the devices.
    pub device: DeviceKind,
    /// Memory limit of one device, bytes. Each process chooses its own; not part of the plan's hash.
    pub memory_bytes: Option<usize>,
    /// Maximum forward micro-batches in flight, by placement.
    pub in_flight: Vec<u32>,
}

impl Plan {
    /// Sets the threads of compute streams and recomputes the memory of streams outside the arena.
    pub(crate) fn set_threads(&mut self, threads_per_device: usize) {
        self.threads_per_device = threads_per_device;
        self.memory.iter_mut().for_each(|memory| memory.stream_bytes = 0);
        for (actor, actions) in self.spec.actors.iter().zip(&self.actions) {
            let threads = threads_of(actor.stream, threads_per_device);
            let launches = actions.iter().flat_map(|action| &action.launches);
            let scratch = launches.map(|launch| self.device.scratch_bytes(launch, threads)).max().unwrap_or(0);
            self.memory[actor.device].stream_bytes += self.device.stream_bytes() + scratch;
        }
    }

    /// A resident tensor's part on each device, in the placement's order, with its index among the device's residents.
    pub(crate) fn resident_parts(&self, var: Var) -> Vec<(usize, usize, &ResidentTensor)> {
        let placement = &self.graph.placements[self.graph.placement_of(var)];
        let part = |device: &usize| {
            let mut residents = self.memory[*device].residents.iter().enumerate();
            let (index, resident) = residents.find(|(_, r)| r.var == var)?;
            Some((*device, index, resident))
        };
        placement.devices().iter().filter_map(part).collect()
    }

    /// The memory of a register.
    pub fn register_place(&self, id: RegisterId) -> RegisterPlace {
        self.registers[id.0 as usize]
    }
}

#[cfg(test)]
mod tests;

/// Threads of a stream: several for compute streams, one for the others.
pub fn threads_of(stream: StreamKind, threads_per_device: usize) -> usize {
    if stream == StreamKind::Compute { threads_per_device } else { 1 }
}
