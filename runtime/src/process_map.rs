//! Which process hosts which device, and which data of a plan crosses processes: bytes of registers, groups of
//! collectives. The plan and the number of processes determine this, so every process can compute it for all processes.

use std::collections::{BTreeMap, BTreeSet};
use std::ops::Range;
use std::sync::Arc;

use shardflow_actors::remote::ByteRun;
use shardflow_actors::spec::{ActionRef, ActorId, RegisterId};
use shardflow_kernels::collective::Group;
use shardflow_kernels::op::{Buffer, Launch, Op};
use shardflow_kernels::tensor::{element_count, split_range};

use crate::plan::{BaseKey, Instance};

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

impl ProcessMap {
    /// Ranks of the devices that a process hosts, in order.
    pub fn devices_of(&self, process: u32) -> Range<usize> {
        split_range(self.devices, self.processes as usize, process as usize)
    }

    pub fn own(&self) -> Range<usize> {
        self.devices_of(self.process)
    }

    pub fn process_of(&self, device: usize) -> u32 {
        let hosts = |process: &u32| self.devices_of(*process).contains(&device);
        (0..self.processes).find(hosts).unwrap_or_default()
    }

    /// Counts the devices of a node's processes: those with ranks below `process`, and all of them.
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

    pub fn actors_of(&self, plan: &Instance, process: u32) -> Vec<ActorId> {
        let devices = self.devices_of(process);
        let actors = plan.spec.actors.iter().enumerate().filter(|(_, actor)| devices.contains(&actor.device));
        actors.map(|(index, _)| ActorId(index as u32)).collect()
    }

    /// Registers that process `from` produces and process `to` reads, with the byte runs of a slot that `to` reads.
    pub fn crossing(&self, plan: &Instance, from: u32, to: u32) -> BTreeMap<RegisterId, Vec<ByteRun>> {
        let (producers, readers) = (self.devices_of(from), self.devices_of(to));
        let device = |actor: ActorId| plan.spec.actor(actor).device;
        let mut out = BTreeMap::new();
        for (index, register) in plan.spec.registers.iter().enumerate() {
            let remote: Vec<_> = register.readers.iter().filter(|r| readers.contains(&device(r.actor))).collect();
            if producers.contains(&device(register.producer)) && !remote.is_empty() {
                let id = RegisterId(index as u32);
                let ranges = remote.into_iter().flat_map(|r| read_ranges(plan, *r, id));
                out.insert(id, merge(ranges.collect()));
            }
        }
        out
    }

    /// The device of process `to` that receives a register's bytes: the device of the register's first reader there.
    pub fn landing(&self, plan: &Instance, register: RegisterId, to: u32) -> Option<usize> {
        let readers = plan.spec.register(register).readers.iter();
        readers.map(|reader| plan.spec.actor(reader.actor).device).find(|device| self.process_of(*device) == to)
    }

    /// Registers that `from` produces and this process reads, with the device and the bytes of the local mirror (copy).
    pub fn mirrors(&self, plan: &Instance, from: u32) -> Vec<(RegisterId, usize, usize)> {
        let mirror = |register: RegisterId| {
            let spec = &plan.spec.registers[register.0 as usize];
            let landing = self.landing(plan, register, self.process)?;
            Some((register, landing, spec.slots as usize * spec.slot_bytes))
        };
        self.crossing(plan, from, self.process).into_keys().filter_map(mirror).collect()
    }

    /// Registers of all processes whose bytes cross processes, by the producing and the receiving device.
    pub fn crossing_pairs(&self, plan: &Instance) -> BTreeMap<(usize, usize), Vec<RegisterId>> {
        let mut out: BTreeMap<(usize, usize), Vec<RegisterId>> = BTreeMap::new();
        for from in 0..self.processes {
            for to in (0..self.processes).filter(|to| *to != from) {
                for (id, runs) in self.crossing(plan, from, to) {
                    let source = plan.spec.actor(plan.spec.register(id).producer).device;
                    let landing = self.landing(plan, id, to).filter(|_| !runs.is_empty());
                    landing.into_iter().for_each(|landing| out.entry((source, landing)).or_default().push(id));
                }
            }
        }
        out
    }

    pub fn processes_of(&self, group: &Group) -> BTreeSet<u32> {
        group.ranks.iter().map(|rank| self.process_of(*rank)).collect()
    }
}

/// All groups of a plan, in order of id.
pub fn groups(plan: &Instance) -> Vec<Arc<Group>> {
    let mut out = BTreeMap::new();
    for call in plan.actions.iter().flatten().flat_map(|action| action.collectives()) {
        out.entry(call.group.id).or_insert_with(|| call.group.clone());
    }
    out.into_values().collect()
}

/// Byte ranges of a register's slot that an action reads.
fn read_ranges(plan: &Instance, ActionRef { actor, action }: ActionRef, register: RegisterId) -> Vec<Range<usize>> {
    let (spec, own) = (plan.spec.action(actor, action), &plan.actions[actor.0 as usize][action as usize]);
    let is_of_register = |buffer: &&Buffer| match own.bases[buffer.base] {
        BaseKey::Input(port) => spec.inputs[port].register == register,
        _ => false,
    };
    let launches = own.launches.iter();
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
                    assert_eq!(hosts, [process_map.process_of(device)], "{device} of {devices} over {processes}");
                }
                assert!((0..processes).all(|p| !process_map.devices_of(p).is_empty()));
            }
        }
    }
}
