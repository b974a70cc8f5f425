//! Static memory planning: the offset of each register, resident tensor and scratch buffer in a device's arena.

use std::collections::BTreeMap;

use shardflow_actors::spec::StreamKind;
use shardflow_kernels::memory::ALIGNMENT;
use shardflow_kernels::tensor::{DType, Region};

use crate::graph::{Graph, Node, NodeOp, Var};
use crate::plan::assign::{ClassStorage, Storage};
use crate::plan::segments::SegmentId;
use crate::plan::slots::Slots;
use crate::sbp::local_region;

/// The memory of a register's slots.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct RegisterPlace {
    /// The device whose arena holds it.
    pub device: usize,
    /// Offset of slot 0 in the arena, in bytes.
    pub offset: usize,
    /// Bytes from one slot to the next.
    pub stride: usize,
}

/// A parameter or a state on one device.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ResidentTensor {
    /// The tensor.
    pub var: Var,
    /// The region of the tensor that the device holds.
    pub region: Region,
    /// Element type.
    pub dtype: DType,
    /// Offset in the device's arena, in bytes.
    pub offset: usize,
    /// Offset of the bf16 copy in the arena, in bytes, if the parameter has one.
    pub bf16_offset: Option<usize>,
}

/// The staging memory of an action of the host: host memory through which tensors move to or from the device. The n-th
/// firing of the action uses slot `n mod slots`. There is a slot for each firing of a step: at the end of a step all
/// devices are idle and the host has read all results, so no slot is in use when the next step begins.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct StagingPlace {
    /// Offset of slot 0 in the device's staging memory, in bytes.
    pub offset: usize,
    /// Bytes from one slot to the next.
    pub stride: usize,
    /// Number of slots.
    pub slots: usize,
}

/// One device's memory.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct DeviceMemory {
    /// Bytes of tensors with fixed addresses, such as moments and the f32 values of weights that are read in bf16.
    pub fixed_bytes: usize,
    /// Bytes of register slots. They hold all tensors that pass between actions, including weights and gradients.
    pub register_bytes: usize,
    /// Offset and bytes of scratch, by stream.
    pub scratch: BTreeMap<StreamKind, (usize, usize)>,
    /// Bytes of the whole arena: fixed tensors, registers and scratch.
    pub arena_bytes: usize,
    /// The staging memory of each action of the host, by segment. It is not part of the arena.
    pub staging: BTreeMap<SegmentId, StagingPlace>,
    /// Bytes of staging memory that count as memory of the device: 0 for a GPU.
    pub staging_bytes: usize,
    /// Bytes that the device's streams allocate outside the arena. On CPUs, this is scratch of kernel threads and f32
    /// copies of bf16 tensors. It depends on the process's number of threads, so it is not part of the plan's hash.
    pub stream_bytes: usize,
    /// Bytes of mirrors, which are copies of registers that other processes write. This number is 0 until a session has
    /// assigned devices to processes.
    pub mirror_bytes: usize,
}

impl DeviceMemory {
    /// The planned peak of device memory in bytes, without the memory of the driver and libraries, such as contexts.
    pub fn total_bytes(&self) -> usize {
        self.arena_bytes + self.staging_bytes + self.stream_bytes + self.mirror_bytes
    }

    /// Bytes of all staging memory. For a GPU, it is pinned memory of the host.
    pub fn staging_end(&self) -> usize {
        self.staging.values().map(|place| place.offset + place.stride * place.slots).max().unwrap_or(0)
    }

    /// Name and bytes of each part of the total, for display. Parts outside the arena are omitted if zero.
    pub fn parts(&self) -> Vec<(&'static str, usize)> {
        let scratch = self.scratch.values().map(|s| s.1).sum();
        let mut parts = vec![("fixed", self.fixed_bytes), ("in registers", self.register_bytes), ("scratch", scratch)];
        let outside =
            [("in staging", self.staging_bytes), ("of streams", self.stream_bytes), ("in mirrors", self.mirror_bytes)];
        parts.extend(outside.into_iter().filter(|(_, bytes)| *bytes > 0));
        parts
    }

    pub(crate) fn row(&self, device: usize) -> String {
        format!("  device {device}: {} bytes = {}\n", self.total_bytes(), self.sum())
    }

    /// The parts as text, joined by `+`.
    pub(crate) fn sum(&self) -> String {
        self.parts().iter().map(|(name, bytes)| format!("{bytes} {name}")).collect::<Vec<_>>().join(" + ")
    }
}

/// Rounds up to the alignment of tensors.
pub fn align(bytes: usize) -> usize {
    bytes.next_multiple_of(ALIGNMENT)
}

pub fn local_part(graph: &Graph, var: Var, device: usize) -> Region {
    let placement = &graph.placements[graph.placement_of(var)];
    let index = placement.index_of(device).expect("callers pass only devices of the tensor's placement");
    local_region(graph.shape(var), graph.layout(var), placement, index)
}

pub fn local_bytes(graph: &Graph, var: Var, device: usize) -> usize {
    local_part(graph, var, device).element_count() * graph.tensor(var).dtype.bytes()
}

/// Places these tensors one after another. Returns the offset of each, and the aligned end of the last one.
fn offsets<'a>(
    graph: &Graph,
    tensors: impl IntoIterator<Item = &'a Var>,
    device: usize,
) -> (BTreeMap<Var, usize>, usize) {
    let mut offsets = BTreeMap::new();
    let mut end = 0;
    for var in tensors {
        offsets.insert(*var, end);
        end = align(end + local_bytes(graph, *var, device));
    }
    (offsets, end)
}

/// The size of a scratch buffer in bytes, and its lifetime in launches of one action.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Interval {
    pub bytes: usize,
    pub first: usize,
    pub last: usize,
}

/// Returns the offset of each buffer, and the total bytes. Buffers that are live at the same launch do not overlap.
///
/// Places larger buffers first, each at the lowest offset that is free for its lifetime ("greedy by size" of Pisarchyk
/// and Lee 2020, <https://arxiv.org/abs/2001.03288>).
pub fn pack(intervals: &[Interval]) -> (Vec<usize>, usize) {
    let mut order: Vec<usize> = (0..intervals.len()).collect();
    order.sort_by_key(|i| (std::cmp::Reverse(intervals[*i].bytes), intervals[*i].first, *i));
    let mut offsets = vec![0; intervals.len()];
    let mut placed: Vec<usize> = Vec::new();
    let mut total = 0;
    for index in order {
        let buffer = intervals[index];
        let overlaps =
            |other: &&usize| intervals[**other].first <= buffer.last && buffer.first <= intervals[**other].last;
        let mut used: Vec<(usize, usize)> =
            placed.iter().filter(overlaps).map(|o| (offsets[*o], offsets[*o] + intervals[*o].bytes)).collect();
        used.sort_unstable();
        let mut offset = 0;
        for (start, end) in used {
            if align(buffer.bytes) + offset <= start {
                break;
            }
            offset = offset.max(align(end));
        }
        offsets[index] = offset;
        total = total.max(align(offset + buffer.bytes));
        placed.push(index);
    }
    (offsets, total)
}

/// The memory map of a class's devices.
#[derive(Clone, Debug, Default)]
pub struct ArenaMap {
    /// The memory of each register of the class.
    pub registers: Vec<RegisterPlace>,
    /// For each register: the offset of each of its tensors in a slot.
    pub slot_offsets: Vec<BTreeMap<Var, usize>>,
    /// Offset of each fixed tensor's part.
    pub fixed: BTreeMap<Var, usize>,
    /// The sizes of the parts of the device's memory.
    pub memory: DeviceMemory,
}

/// Lays out the arena of a class's devices: fixed tensors, then registers. The caller places scratch after them.
pub fn lay_out(graph: &Graph, storage: &ClassStorage, slots: &[Slots], device: usize) -> ArenaMap {
    let mut map = ArenaMap::default();
    let memory = &mut map.memory;
    let fixed = storage.storage.iter().filter(|(_, storage)| **storage == Storage::Fixed).map(|(var, _)| var);
    (map.fixed, memory.fixed_bytes) = offsets(graph, fixed, device);
    memory.arena_bytes = memory.fixed_bytes;
    for (register, slots) in storage.registers.iter().zip(slots) {
        let (within_slot, stride) = offsets(graph, &register.tensors, device);
        map.slot_offsets.push(within_slot);
        map.registers.push(RegisterPlace { device, offset: memory.arena_bytes, stride });
        memory.arena_bytes += stride * slots.count as usize;
        memory.register_bytes += stride * slots.count as usize;
    }
    map
}

/// The parameters and states of a device, with the offsets of its class.
pub fn residents(graph: &Graph, storage: &ClassStorage, map: &ArenaMap, device: usize) -> Vec<ResidentTensor> {
    let offset = |var: &Var| match storage.storage.get(var)? {
        Storage::Fixed => map.fixed.get(var).copied(),
        Storage::Register(index) => Some(map.registers[*index].offset + map.slot_offsets[*index][var]),
        Storage::Scratch => None,
    };
    let copy_of = |node: &Node| if let NodeOp::Bf16Copy { of } = node.op { Some((of, node.outputs[0])) } else { None };
    let copies: BTreeMap<Var, Var> = graph.nodes.iter().filter_map(copy_of).collect();
    let resident = |var: &Var| {
        let is_resident = matches!(graph.producer(*var).op, NodeOp::Parameter { .. } | NodeOp::State);
        let own_offset = offset(var).filter(|_| is_resident)?;
        let bf16_offset = copies.get(var).map(|copy| offset(copy).expect("a bf16 copy is on its parameter's devices"));
        let (region, dtype) = (local_part(graph, *var, device), graph.tensor(*var).dtype);
        Some(ResidentTensor { var: *var, region, dtype, offset: own_offset, bf16_offset })
    };
    storage.storage.keys().filter_map(resident).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The total is at most the sum of all sizes, and at least the largest sum of buffers that are live at once.
    #[test]
    fn packed_buffers_that_are_live_together_do_not_overlap() {
        let mut seed = 1u64;
        let mut next = |n: u64| {
            seed = crate::init::mix(seed);
            seed % n
        };
        for _ in 0..200 {
            let intervals: Vec<Interval> = (0..next(30) + 1)
                .map(|_| {
                    let first = next(20) as usize;
                    Interval { bytes: next(1000) as usize, first, last: first + next(6) as usize }
                })
                .collect();
            let (offsets, total) = pack(&intervals);
            for (i, a) in intervals.iter().enumerate() {
                assert!(offsets[i] % ALIGNMENT == 0 && offsets[i] + a.bytes <= total);
                for (j, b) in intervals.iter().enumerate().skip(i + 1) {
                    let both_live = a.first <= b.last && b.first <= a.last && a.bytes > 0 && b.bytes > 0;
                    let overlap = offsets[i] < offsets[j] + b.bytes && offsets[j] < offsets[i] + a.bytes;
                    assert!(!(both_live && overlap), "{a:?} at {} overlaps {b:?} at {}", offsets[i], offsets[j]);
                }
            }
            let live_bytes = |t: usize| intervals.iter().filter(|i| i.first <= t && t <= i.last).map(|i| i.bytes).sum();
            assert!(total >= (0..30).map(live_bytes).max().unwrap_or(0usize));
            assert!(total <= intervals.iter().map(|i| align(i.bytes)).sum());
        }
    }
}
