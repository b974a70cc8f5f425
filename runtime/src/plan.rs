//! The compiled program as plain data: actors with their registers and credits, each action's launches, and each
//! device's memory map. A session loads it.

use std::collections::BTreeMap;

use shardflow_actors::spec::StreamKind;
use shardflow_kernels::device::DeviceKind;

use crate::graph::{Graph, Var};
use action::EmittedAction;
pub use action::{ActionPlan, BaseKey, HostPort};
use assign::{Aliases, ClassStorage};
use classes::Classes;
use groups::Patterns;
use memory::{ArenaMap, local_part};
pub use memory::{DeviceMemory, RegisterPlace, ResidentTensor, StagingPlace};
pub use schedule::Schedule;
pub use segments::HostTransfer;
use segments::{SegmentId, Segments};
use slots::Slots;

pub(crate) mod action;
pub(crate) mod assign;
pub(crate) mod classes;
pub(crate) mod emit;
pub mod error;
pub mod flops;
pub(crate) mod groups;
mod hash;
pub mod instance;
pub(crate) mod lower;
pub(crate) mod memory;
pub(crate) mod schedule;
pub(crate) mod segments;
pub(crate) mod slots;
pub(crate) mod validate;

/// The plan of one class of devices (see `Classes`), computed for the device that represents the class.
#[derive(Clone, Debug, Default)]
pub struct ClassPlan {
    pub(crate) storage: ClassStorage,
    /// The slots of each register.
    pub(crate) slots: Vec<Slots>,
    /// The memory map, including scratch.
    pub(crate) arena: ArenaMap,
    /// The parameters and states of the class's representative, in the order of their variables.
    pub(crate) residents: Vec<ResidentTensor>,
    /// The actions of the class's representative, in the order of its segments.
    pub(crate) actions: Vec<EmittedAction>,
}

impl ClassPlan {
    /// The index of a parameter or state in `residents`.
    pub(crate) fn resident_index(&self, var: Var) -> Option<usize> {
        self.residents.binary_search_by_key(&var, |resident| resident.var).ok()
    }
}

/// A compiled program. All devices that do the same work share a [`ClassPlan`]. A session loads an
/// [`instance::Instance`], which adds the actors and registers of every device.
#[derive(Clone, Debug)]
pub struct Plan {
    /// The graph after all passes.
    pub graph: Graph,
    /// The units of work.
    pub segments: Segments,
    /// The classes of the mesh's devices.
    pub classes: Classes,
    /// The plan of each class.
    pub(crate) class_plans: Vec<ClassPlan>,
    pub(crate) aliases: Aliases,
    /// Accumulations without a kernel of their own (see `fuse_accumulation`), as a map from the value to the sum.
    pub(crate) fused: BTreeMap<Var, Var>,
    pub(crate) patterns: Patterns,
    /// For each site (see `WorkGraph::sites`): the segments that its compute actors fire, in order.
    pub(crate) lists: Vec<Vec<SegmentId>>,
    /// Priorities of compute segments, for actors without a list (`Firing::Credit`).
    pub(crate) priorities: BTreeMap<SegmentId, i32>,
    /// The site of each device that computes; `None` for other devices.
    pub(crate) site_of: Vec<Option<usize>>,
    /// Micro-batches per step.
    pub micro_batches: usize,
    /// The schedule.
    pub schedule: Schedule,
    /// Number of threads of a compute stream. Each process chooses it, so the plan's hash does not cover it.
    pub threads_per_device: usize,
    /// The kind of the devices.
    pub device: DeviceKind,
    /// Memory limit of one device, in bytes. Each process chooses it, so the plan's hash does not cover it.
    pub memory_bytes: Option<usize>,
    /// For each placement: the maximum number of micro-batches in flight, from start of forward to end of backward.
    pub in_flight: Vec<u32>,
}

impl Plan {
    pub(crate) fn class_plan(&self, device: usize) -> &ClassPlan {
        &self.class_plans[self.classes.of[device].index()]
    }

    /// True if each of these devices needs no more than the plan's memory limit.
    pub(crate) fn fits<'a>(&self, mut memories: impl Iterator<Item = &'a DeviceMemory>) -> bool {
        memories.all(|memory| memory.total_bytes() <= self.memory_bytes.unwrap_or(usize::MAX))
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

    /// Parameters and states of a device.
    pub fn residents(&self, device: usize) -> impl Iterator<Item = ResidentTensor> {
        self.class_plan(device).residents.iter().map(move |resident| self.part_of(device, resident))
    }

    /// The parts of a parameter or state on these devices.
    pub(crate) fn resident_parts(
        &self,
        var: Var,
        devices: impl Iterator<Item = usize>,
    ) -> impl Iterator<Item = (usize, ResidentTensor)> {
        devices.filter_map(move |device| {
            let class = self.class_plan(device);
            Some((device, self.part_of(device, &class.residents[class.resident_index(var)?])))
        })
    }

    /// A device's part of a resident tensor of its class.
    fn part_of(&self, device: usize, resident: &ResidentTensor) -> ResidentTensor {
        ResidentTensor { region: local_part(&self.graph, resident.var, device), ..resident.clone() }
    }

    /// Sets the number of threads of compute streams, and recomputes the memory that streams use outside the arena.
    pub(crate) fn set_threads(&mut self, threads_per_device: usize) {
        self.threads_per_device = threads_per_device;
        let (segments, device) = (&self.segments, self.device);
        for class in &mut self.class_plans {
            let scratch = most_by_stream(segments, &class.actions, |stream, action| {
                let threads = threads_of(stream, threads_per_device);
                let bytes = action.plan.launches.iter().map(|launch| device.scratch_bytes(launch, threads)).max();
                bytes.unwrap_or(0)
            });
            class.arena.memory.stream_bytes = scratch.values().map(|bytes| device.stream_bytes() + bytes).sum();
        }
    }
}

/// For each stream, the maximum of `bytes` over its actions. The actions of a stream do not run at the same time, so
/// they can share this memory.
fn most_by_stream(
    segments: &Segments,
    actions: &[EmittedAction],
    bytes: impl Fn(StreamKind, &EmittedAction) -> usize,
) -> BTreeMap<StreamKind, usize> {
    let mut most: BTreeMap<StreamKind, usize> = BTreeMap::new();
    for action in actions {
        let stream = segments.get(action.plan.segment).stream;
        let of_stream = most.entry(stream).or_default();
        *of_stream = bytes(stream, action).max(*of_stream);
    }
    most
}

#[cfg(test)]
pub(crate) mod tests;

/// Number of threads of a stream: `threads_per_device` for a compute stream, 1 for any other stream.
pub fn threads_of(stream: StreamKind, threads_per_device: usize) -> usize {
    if stream == StreamKind::Compute { threads_per_device } else { 1 }
}
