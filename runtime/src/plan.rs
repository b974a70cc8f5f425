//! The compiled program as plain data: actors with their registers and credits, each action's launches, and each
//! device's memory map. A session loads it.

use std::collections::BTreeMap;

use shardflow_actors::spec::StreamKind;
use shardflow_kernels::collective::CollectiveCall;
use shardflow_kernels::device::DeviceKind;
use shardflow_kernels::op::{Buffer, Launch, Op};
use shardflow_kernels::tensor::{DType, Region};

use crate::graph::{Graph, NodeId, Var};
use assign::{Aliases, ClassStorage};
use classes::{ClassId, Classes};
use emit::EmittedAction;
use explain::listed;
use groups::Patterns;
pub use instance::Instance;
use memory::{ArenaMap, residents};
pub use schedule::Schedule;
use segments::{SegmentId, Segments};
use slots::Slots;

pub(crate) mod assign;
pub mod classes;
pub(crate) mod emit;
pub(crate) mod explain;
pub mod flops;
pub mod groups;
mod hash;
pub mod instance;
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
    /// Scratch offset and bytes, by stream.
    pub scratch: BTreeMap<StreamKind, (usize, usize)>,
    /// The whole arena, bytes: fixed tensors, registers and scratch.
    pub arena_bytes: usize,
    /// Bytes that the device's streams allocate outside the arena: on CPUs the scratch of kernel threads and of tensors
    /// widened from bf16. It depends on the process's number of threads, so it is not part of the plan's hash.
    pub stream_bytes: usize,
    /// Mirrors of registers that other processes write, bytes; 0 until a session has assigned devices to processes.
    pub mirror_bytes: usize,
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

/// What the devices of a class have in common.
#[derive(Clone, Debug)]
pub struct ClassPlan {
    pub(crate) storage: ClassStorage,
    /// By register.
    pub(crate) slots: Vec<Slots>,
    /// The memory map, with scratch.
    pub(crate) arena: ArenaMap,
    /// The actions of the class's representative, in the order of its segments.
    pub(crate) actions: Vec<EmittedAction>,
}

/// A compiled program. Everything is described once for each class of devices; an [`Instance`] is the part of a plan
/// that a session loads.
#[derive(Clone, Debug)]
pub struct Plan {
    /// The graph after all passes.
    pub graph: Graph,
    /// The units of work.
    pub segments: Segments,
    /// The classes of the mesh's devices.
    pub classes: Classes,
    /// By class.
    pub(crate) class_plans: Vec<ClassPlan>,
    pub(crate) aliases: Aliases,
    /// Accumulations fused into the producing kernel: value to sum.
    pub(crate) fused: BTreeMap<Var, Var>,
    pub(crate) patterns: Patterns,
    /// By site: the segments that its compute actors fire, in order.
    pub(crate) lists: Vec<Vec<SegmentId>>,
    /// Priorities of compute segments where credits decide the order.
    pub(crate) priorities: BTreeMap<SegmentId, i32>,
    /// By device: its site, if it computes.
    pub(crate) site_of: Vec<Option<usize>>,
    /// Micro-batches per step.
    pub micro_batches: usize,
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
    pub(crate) fn class_plan(&self, device: usize) -> &ClassPlan {
        &self.class_plans[self.classes.of[device].index()]
    }

    /// Number of devices.
    pub fn device_count(&self) -> usize {
        self.classes.of.len()
    }

    /// The memory of a device.
    pub fn memory(&self, device: usize) -> &DeviceMemory {
        &self.class_plan(device).arena.memory
    }

    /// The memory of each device, in the order of ranks.
    pub fn memories(&self) -> impl ExactSizeIterator<Item = &DeviceMemory> {
        (0..self.device_count()).map(|device| self.memory(device))
    }

    /// The memory of a class's devices, as a line.
    pub(crate) fn memory_row(&self, class: ClassId) -> String {
        let (devices, memory) = (&self.classes.devices[class.index()], &self.class_plans[class.index()].arena.memory);
        let subject =
            if let [only] = devices[..] { format!("device {only}") } else { format!("devices {}", listed(devices)) };
        format!("  {subject}: {} = {}\n", memory.total_bytes(), memory.sum())
    }

    /// Parameters and states of a device.
    pub fn residents(&self, device: usize) -> Vec<ResidentTensor> {
        let ClassPlan { storage, arena, .. } = self.class_plan(device);
        residents(&self.graph, storage, arena, device)
    }

    /// Sets the threads of compute streams and recomputes the memory of streams outside the arena.
    pub(crate) fn set_threads(&mut self, threads_per_device: usize) {
        self.threads_per_device = threads_per_device;
        let (segments, device) = (&self.segments, self.device);
        for class in &mut self.class_plans {
            let mut scratch: BTreeMap<StreamKind, usize> = BTreeMap::new();
            for action in &class.actions {
                let stream = segments.get(action.plan.segment).stream;
                let threads = threads_of(stream, threads_per_device);
                let bytes = action.plan.launches.iter().map(|launch| device.scratch_bytes(launch, threads)).max();
                let most = scratch.entry(stream).or_default();
                *most = bytes.unwrap_or(0).max(*most);
            }
            class.arena.memory.stream_bytes = scratch.values().map(|bytes| device.stream_bytes() + bytes).sum();
        }
    }
}

#[cfg(test)]
mod tests;

/// Threads of a stream: several for compute streams, one for the others.
pub fn threads_of(stream: StreamKind, threads_per_device: usize) -> usize {
    if stream == StreamKind::Compute { threads_per_device } else { 1 }
}
