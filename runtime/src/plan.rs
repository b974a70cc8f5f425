//! The compiled program: actors with their registers and credits, each action's launches, each device's memory map.
//! Plain data; a session loads it.

use std::collections::BTreeMap;
use std::fmt;

use shardflow_actors::spec::{ActionSpec, ActorId, RegisterId, Spec};
use shardflow_kernels::device::DeviceKind;
use shardflow_kernels::op::{Buffer, Launch};
use shardflow_kernels::tensor::{DType, Region};

use crate::graph::{Graph, NodeId, Phase, Rate, Var};

pub mod assign;
pub mod collective_order;
pub mod emit;
pub mod explain;
pub mod flops;
mod hash;
pub mod lower;
pub mod memory;
pub mod picture;
pub mod slots;
pub mod validate;

/// Which schedule orders the micro-batches of a pipeline.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Schedule {
    /// All forwards, then all backwards. Huang et al. 2019, <https://arxiv.org/abs/1811.06965>.
    GPipe,
    /// One forward, one backward, with as few micro-batches in flight as keep every stage busy.
    /// Narayanan et al. 2019, <https://arxiv.org/abs/1806.03377>.
    OneFOneB,
}

impl fmt::Display for Schedule {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::GPipe => "gpipe",
            Self::OneFOneB => "1f1b",
        })
    }
}

/// An action of a device, before actors are numbered.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum ActionKey {
    /// The host's tensors come in.
    Feed(Rate),
    /// One transfer from another placement: the boxing node.
    Pull(NodeId),
    /// Layer shards, forward.
    Forward,
    /// Layer shards, backward.
    Backward,
    /// One bucket of gradients is reduced: the bucket node.
    Bucket(NodeId),
    /// The gradients are measured.
    Norm,
    /// The host, which has seen loss and norm, gives the learning rate of the update.
    Decide,
    /// The optimizer.
    Update,
    /// The host gets outputs.
    Fetch(Rate),
}

impl ActionKey {
    /// The action of the compute actor that runs nodes of this phase.
    pub fn of_phase(phase: Phase) -> Self {
        match phase {
            Phase::Forward => Self::Forward,
            Phase::Backward => Self::Backward,
            Phase::Norm => Self::Norm,
            Phase::Update => Self::Update,
        }
    }
}

/// Where an action's program counts a buffer from.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum BaseKey {
    /// The device's arena, at its start: tensors that stay where they are.
    Fixed,
    /// The stream's scratch.
    Scratch,
    /// The current slot of an input port.
    Input(usize),
    /// The current slot of an output port.
    Output(usize),
}

/// A host transfer at the end of a `Feed` or `Fetch` action: the session supplies the kernel.
#[derive(Clone, Debug, PartialEq)]
pub struct HostPort {
    /// The tensors, in the order of `buffers`.
    pub vars: Vec<Var>,
    /// Where they lie.
    pub buffers: Vec<Buffer>,
}

/// One action as planned.
#[derive(Clone, Debug)]
pub struct ActionPlan {
    /// What it is.
    pub key: ActionKey,
    /// Shown in plans and errors.
    pub name: String,
    /// In order.
    pub launches: Vec<Launch>,
    /// The node that each launch is made for.
    pub nodes: Vec<NodeId>,
    /// `(launches done, output port)`.
    pub signals: Vec<(usize, u32)>,
    /// What each base index of the launches' buffers is.
    pub bases: Vec<BaseKey>,
    /// What the host gives or gets.
    pub host: Option<HostPort>,
}

/// Where a register's slots lie.
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
    /// Which part of it.
    pub region: Region,
    /// Element type.
    pub dtype: DType,
    /// Offset in the device's arena, bytes.
    pub offset: usize,
    /// Where its values lie once more, in bf16: of a parameter that is read so.
    pub half_offset: Option<usize>,
}

/// One device's memory.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct DeviceMemory {
    /// Tensors that no other action reads, or that nothing replaces (moments, floats of weights that are read in bf16), bytes.
    pub fixed_bytes: usize,
    /// Register slots, bytes: what goes from one action to another, weights and gradients among it.
    pub register_bytes: usize,
    /// For each stream of the device: scratch offset and bytes, by actor.
    pub scratch: BTreeMap<ActorId, (usize, usize)>,
    /// The whole arena, bytes: fixed tensors, registers and scratch.
    pub arena_bytes: usize,
    /// Bytes that the device's streams allocate outside the arena: on CPUs the scratch of kernels' threads and of tensors
    /// widened from bf16. It depends on the process's threads, so it is not part of the plan's hash.
    pub stream_bytes: usize,
    /// Mirrors of registers that other processes make, bytes; 0 until a session knows which process hosts what.
    pub mirror_bytes: usize,
    /// Parameters and states.
    pub residents: Vec<ResidentTensor>,
}

impl DeviceMemory {
    /// All that is allocated on the device, bytes: the planned peak. Outside it are only a driver's and a library's own
    /// (contexts, code, communicators).
    pub fn total_bytes(&self) -> usize {
        self.arena_bytes + self.stream_bytes + self.mirror_bytes
    }

    /// What it is made of, and bytes, as people are told: what is always there, then what only some devices have.
    pub fn parts(&self) -> Vec<(&'static str, usize)> {
        let scratch = self.scratch.values().map(|s| s.1).sum();
        let mut parts = vec![("fixed", self.fixed_bytes), ("in registers", self.register_bytes), ("scratch", scratch)];
        let beside = [("of streams", self.stream_bytes), ("in mirrors", self.mirror_bytes)];
        parts.extend(beside.into_iter().filter(|(_, bytes)| *bytes > 0));
        parts
    }

    /// A line of a memory table.
    pub(crate) fn row(&self, device: usize) -> String {
        format!("  device {device}: {} bytes = {}\n", self.total_bytes(), self.sum())
    }

    /// The parts as a sum.
    fn sum(&self) -> String {
        self.parts().iter().map(|(name, bytes)| format!("{bytes} {name}")).collect::<Vec<_>>().join(" + ")
    }
}

/// What a session needs to know beyond actors: the program it came from and its setting.
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
    /// Micro-batches in a step.
    pub micro_batches: usize,
    /// The schedule.
    pub schedule: Schedule,
    /// Threads of a compute stream. Each process's own: not part of the plan's hash.
    pub threads_per_device: usize,
    /// What the devices are.
    pub device: DeviceKind,
    /// Memory of one device, bytes, that the plan must not exceed; without it, a session holds a plan for CPUs against what its
    /// node has free. Each process's own: not part of the plan's hash.
    pub memory_bytes: Option<usize>,
    /// Forward micro-batches that each placement may have in flight.
    pub in_flight: Vec<u32>,
}

impl Plan {
    /// The action's specification for the protocol.
    pub fn action_spec(&self, actor: ActorId, action: usize) -> &ActionSpec {
        &self.spec.actors[actor.0 as usize].actions[action]
    }

    /// Sets the threads of compute streams, and with them what streams take beside the arena.
    pub(crate) fn set_threads(&mut self, threads_per_device: usize) {
        self.threads_per_device = threads_per_device;
        self.memory.iter_mut().for_each(|memory| memory.stream_bytes = 0);
        for (actor, actions) in self.spec.actors.iter().zip(&self.actions) {
            let threads = lower::threads_of(actor.stream, threads_per_device);
            let launches = actions.iter().flat_map(|action| &action.launches);
            let own = launches.map(|launch| self.device.scratch_bytes(launch, threads)).max().unwrap_or(0);
            self.memory[actor.device].stream_bytes += self.device.stream_bytes() + own;
        }
    }

    /// Register by id.
    pub fn register_place(&self, id: RegisterId) -> RegisterPlace {
        self.registers[id.0 as usize]
    }
}

#[cfg(test)]
mod tests;
