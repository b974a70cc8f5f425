//! Maps devices to processes, and finds which bytes of registers and which collective groups cross processes in a
//! plan. The plan and the number of processes determine all of this, so each process can compute it for all processes.

use std::collections::{BTreeMap, BTreeSet, HashSet};
use std::ops::Range;
use std::sync::Arc;

use shardflow_actors::remote::ByteRun;
use shardflow_actors::spec::{ActionRef, ActorId, ActorSpec, RegisterId, StreamKind};
use shardflow_kernels::collective::{CollectiveKind, Group, wire};
use shardflow_kernels::op::{Buffer, Launch, Op};
use shardflow_kernels::tensor::{element_count, split_range};

use crate::graph::NodeId;
use crate::plan::emit::emit;
use crate::plan::groups::collective_axes;
use crate::plan::instance::Instance;
use crate::plan::{BaseKey, ClassPlan, Plan};

/// The processes that run a plan, and the rank of this one.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ProcessMap {
    pub process: u32,
    pub processes: u32,
    pub devices: usize,
}

/// Position of a process's devices among those of its node.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct NodeDevices {
    /// Number of devices of the node's processes with lower ranks.
    pub before: usize,
    /// Number of devices of all processes of the node.
    pub all: usize,
}

/// A register that one process produces and another process reads.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Crossing {
    pub register: RegisterId,
    pub from: u32,
    pub to: u32,
    /// The device of the producer.
    pub source: usize,
    /// The device of `to` that receives the bytes: the device of the first reader.
    pub landing: usize,
    /// The actions of `to` that read the register.
    pub readers: Vec<ActionRef>,
}

impl Crossing {
    /// The byte runs of a slot that `to` reads.
    pub fn runs(&self, plan: &Instance) -> Vec<ByteRun> {
        merge(self.readers.iter().flat_map(|reader| read_ranges(plan, *reader, self.register)).collect())
    }

    /// Bytes of the register's mirror in `to`.
    pub fn mirror_bytes(&self, plan: &Instance) -> usize {
        let spec = plan.spec.register(self.register);
        spec.slots as usize * spec.slot_bytes
    }
}

impl ProcessMap {
    /// Ranks of the devices that a process hosts, in order.
    pub fn devices_of(&self, process: u32) -> Range<usize> {
        split_range(self.devices, self.processes as usize, process as usize)
    }

    pub fn own(&self) -> Range<usize> {
        self.devices_of(self.process)
    }

    pub fn process_of(&self, device: usize) -> u32 {
        let processes = (self.processes as usize).max(1);
        // See `split_range`: the first processes may have one more device.
        let (base, extra) = (self.devices / processes, self.devices % processes);
        let longer = extra * (base + 1);
        let process = if device < longer { device / (base + 1) } else { extra + (device - longer) / base.max(1) };
        if process < processes { process as u32 } else { 0 }
    }

    /// Counts the devices of a node's processes: of those with ranks below `process`, and of all.
    pub fn on_node(&self, processes: impl Iterator<Item = u32>, process: u32) -> NodeDevices {
        let mut out = NodeDevices::default();
        for other in processes {
            let devices = self.devices_of(other).len();
            out.before += if other < process { devices } else { 0 };
            out.all += devices;
        }
        out
    }

    pub fn peers(&self) -> impl Iterator<Item = u32> + use<> {
        let own = self.process;
        (0..self.processes).filter(move |process| *process != own)
    }

    /// The actors of this process.
    pub fn own_actors(&self, plan: &Instance) -> Vec<ActorId> {
        let is_own = |(_, actor): &(ActorId, &ActorSpec)| self.own().contains(&actor.device);
        plan.spec.actors.iter().filter(is_own).map(|(id, _)| id).collect()
    }

    /// The registers of an instance whose producer and reader are in different processes. A register has one entry for
    /// each reading process whose actors the instance has.
    pub fn crossings(&self, plan: &Instance) -> Vec<Crossing> {
        let mut out = Vec::new();
        for (register, spec) in plan.spec.registers.iter() {
            let source = plan.spec.actor(spec.producer).device;
            let from = self.process_of(source);
            // For each process that reads the register: the device of its first reader, and all its readers.
            let mut readers: BTreeMap<u32, (usize, Vec<ActionRef>)> = BTreeMap::new();
            for reader in &spec.readers {
                let Some(actor) = plan.spec.actors.get(reader.actor) else { continue };
                let of_process = readers.entry(self.process_of(actor.device));
                of_process.or_insert_with(|| (actor.device, Vec::new())).1.push(*reader);
            }
            let crossing = |(to, (landing, readers))| Crossing { register, from, to, source, landing, readers };
            out.extend(readers.into_iter().filter(|(to, _)| *to != from).map(crossing));
        }
        out
    }

    /// The registers of an instance whose bytes cross processes. The key is the pair of producing and receiving device.
    pub fn crossing_pairs(&self, plan: &Instance) -> BTreeMap<(usize, usize), Vec<RegisterId>> {
        let mut out: BTreeMap<(usize, usize), Vec<RegisterId>> = BTreeMap::new();
        for crossing in self.crossings(plan).into_iter().filter(|crossing| !crossing.runs(plan).is_empty()) {
            out.entry((crossing.source, crossing.landing)).or_default().push(crossing.register);
        }
        out
    }

    pub fn processes_of(&self, group: &Group) -> BTreeSet<u32> {
        group.ranks.iter().map(|rank| self.process_of(rank)).collect()
    }
}

/// The groups that contain any of these devices, in order of id.
pub fn groups(plan: &Plan, devices: impl Iterator<Item = usize>) -> Vec<Arc<Group>> {
    let all = devices.flat_map(|device| plan.patterns.groups_of(&plan.graph, device));
    all.map(|group| (group.id, group)).collect::<BTreeMap<_, _>>().into_values().collect()
}

/// For each group in which these devices call collectives: `(member, peer)` for each of these devices that is a member,
/// and each peer to which it needs a channel.
pub fn links(plan: &Plan, devices: Range<usize>) -> BTreeMap<u32, BTreeSet<(usize, usize)>> {
    let mut calls_of_class = BTreeMap::new();
    let mut links: BTreeMap<u32, BTreeSet<(usize, usize)>> = BTreeMap::new();
    for device in devices {
        let calls =
            calls_of_class.entry(plan.classes.of[device]).or_insert_with(|| calls(plan, plan.class_plan(device)));
        for ((stream, axes), placement, kind) in calls.iter() {
            let group = plan.patterns.group(&plan.graph, (*stream, axes), *placement, device);
            let member = group.ranks.member_of(device).expect("a device is in its own group");
            let peers = wire::peers(kind, group.ranks.len(), member).into_iter();
            links.entry(group.id).or_default().extend(peers.map(|peer| (member, peer)));
        }
    }
    links
}

/// A collective that the devices of a class call: the stream and axes of its groups, their placement, and its kind.
type ClassCall<'a> = ((StreamKind, Vec<usize>), usize, &'a CollectiveKind);

/// The distinct collectives of a class. All devices of a class make the same calls, each in its own groups.
fn calls<'a>(plan: &Plan, class: &'a ClassPlan) -> HashSet<ClassCall<'a>> {
    let actions = class.actions.iter().map(|action| &action.plan);
    let launches = actions.flat_map(|plan| plan.nodes.iter().zip(&plan.launches));
    let call = |(id, launch): (&NodeId, &'a Launch)| {
        let (node, Op::Collective(call)) = (&plan.graph.nodes[id.index()], &launch.op) else { return None };
        Some((collective_axes(&plan.graph, node)?, node.placement, &call.kind))
    };
    launches.filter_map(call).collect()
}

/// Byte ranges of a register's slot that an action reads.
fn read_ranges(plan: &Instance, reader: ActionRef, register: RegisterId) -> Vec<Range<usize>> {
    let ((device, segment), at) = (plan.segment_at(reader), plan.register_at(register));
    let emitted = emit(plan, device, segment);
    let is_of_register = |buffer: &&Buffer| match emitted.plan.bases[buffer.base] {
        BaseKey::Input(port) => emitted.inputs[port] == at,
        _ => false,
    };
    let launches = emitted.plan.launches.iter();
    launches.flat_map(|l| l.reads.iter().filter(is_of_register).flat_map(|b| buffer_ranges(l, b))).collect()
}

/// Byte ranges of a buffer that a launch reads, relative to the base from which `buffer.offset` counts.
fn buffer_ranges(launch: &Launch, buffer: &Buffer) -> Vec<Range<usize>> {
    let elements = match &launch.op {
        Op::CopyRegion { src, .. } => src.runs(&buffer.shape),
        _ => std::iter::once(0..element_count(&buffer.shape)).collect(),
    };
    let size = buffer.dtype.bytes();
    elements.into_iter().map(|r| buffer.offset + r.start * size..buffer.offset + r.end * size).collect()
}

/// Sorts ranges and joins those that overlap or touch.
fn merge(mut ranges: Vec<Range<usize>>) -> Vec<ByteRun> {
    ranges.retain(|range| !range.is_empty());
    ranges.sort_by_key(|range| range.start);
    let mut out: Vec<Range<usize>> = Vec::new();
    for range in ranges {
        match out.last_mut() {
            Some(last) if range.start <= last.end => last.end = last.end.max(range.end),
            _ => out.push(range),
        }
    }
    out.into_iter().map(|range| ByteRun { offset: range.start, bytes: range.len() }).collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::plan::Schedule;
    use crate::plan::tests::gpt;

    #[test]
    fn the_links_of_a_class_are_those_of_each_of_its_devices() {
        for mesh in ["data=3,tensor=3", "tensor=5", "data=2,stage=2,tensor=2", "data=6,stage=2"] {
            let plan = gpt(mesh, 4, Schedule::OneFOneB).instance();
            let mut expected: BTreeMap<u32, BTreeSet<(usize, usize)>> = BTreeMap::new();
            for call in plan.actions.values().flatten().flat_map(|action| action.collectives()) {
                let peers = wire::peers(&call.kind, call.group.ranks.len(), call.member).into_iter();
                expected.entry(call.group.id).or_default().extend(peers.map(|peer| (call.member, peer)));
            }
            assert_eq!(links(&plan, 0..plan.device_count()), expected, "{mesh}");
        }
    }

    #[test]
    fn overlapping_or_touching_ranges_become_one_run() {
        let runs = merge(vec![8..12, 0..4, 4..6, 20..20, 10..16, 30..31]);
        let expected = [(0, 6), (8, 8), (30, 1)].map(|(offset, bytes)| ByteRun { offset, bytes });
        assert_eq!(runs, expected);
    }

    #[test]
    fn every_device_has_exactly_one_host_process() {
        for devices in 1..9 {
            for processes in 1..=devices as u32 {
                let process_map = ProcessMap { process: 0, processes, devices };
                for device in 0..devices {
                    let hosts =
                        (0..processes).filter(|p| process_map.devices_of(*p).contains(&device)).collect::<Vec<_>>();
                    assert_eq!(hosts, [process_map.process_of(device)], "device {device}/{devices}, {processes} ranks");
                }
                assert!((0..processes).all(|p| !process_map.devices_of(p).is_empty()));
            }
        }
    }
}
