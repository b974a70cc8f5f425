//! Checks that a node has enough memory for its processes of a job. Only this module sums the bytes of a rank.
//!
//! All processes share the machine's memory. Cgroup limits differ by container, so each process checks its own bounds.

use std::collections::BTreeMap;

use std::ops::Range;

use shardflow_kernels::device::DeviceKind;

use crate::graph::Var;
use crate::plan::error::PlanError;
use crate::plan::instance::Instance;
use crate::plan::{Plan, ResidentTensor};
use crate::process_map::ProcessMap;
use shardflow_job::machine::{CGROUPS_MAX, CgroupId, FreeMemory, MemoryClaim, memory_bounds};

/// Reserved bytes outside the plan: per process for libraries and connections, and per device and thread for packed
/// matrices. Measured for `gpt` with widths from 64 to 1024 and up to 8 threads: 3 to 31 MiB in total.
const RANK_BYTES: u64 = 16 << 20;
const DEVICE_BYTES: u64 = 8 << 20;
const THREAD_BYTES: u64 = 2 << 20;

/// Maximum number of snapshots in a process: the one being written, and the next.
pub(crate) const SNAPSHOTS_MAX: usize = 2;

/// The memory of this node for a job of CPU devices.
#[derive(Clone, Debug)]
pub(crate) struct Budget {
    /// Free memory of each of this process's cgroups, and of the machine (the entry without a cgroup), the tightest
    /// bound first. Measured before any process of the job allocates for the plan. Empty for GPUs, or if it is unknown.
    bounds: Vec<(Option<CgroupId>, FreeMemory)>,
    /// For each process of the node, by rank: its cgroups, and the bytes that it allocates besides the plan.
    pub(super) claims: BTreeMap<u32, MemoryClaim>,
}

impl Budget {
    /// Call this before the rendezvous, because other processes may allocate memory after it. There is no budget for
    /// GPUs, because their memory is not the host's. Each device has its own limit (`CompileOptions::memory_bytes`).
    pub(crate) fn measure(plan: &Plan) -> Self {
        let bounds = if plan.device == DeviceKind::Cpu { memory_bounds() } else { Vec::new() };
        Self { bounds: bounds.into_iter().map(|free| (free.bound.cgroup(), free)).collect(), claims: BTreeMap::new() }
    }

    /// This process's cgroups, and the bytes that it allocates besides the plan.
    pub(crate) fn claim(&self, extra_bytes: u64) -> MemoryClaim {
        let cgroups = self.bounds.iter().filter_map(|(cgroup, _)| *cgroup).take(CGROUPS_MAX).collect();
        MemoryClaim { cgroups, extra_bytes }
    }

    /// Checks that there is memory for these processes, which all run on this node: for their devices and mirrors, for
    /// `snapshots` snapshots per process, and for the bytes that they allocate besides the plan.
    pub(crate) fn check(
        &self,
        plan: &Instance,
        process_map: &ProcessMap,
        node_processes: &[u32],
        snapshots: usize,
    ) -> Result<(), PlanError> {
        for (cgroup, FreeMemory { bytes, bound }) in &self.bounds {
            let shares = |process: &u32| match (cgroup, self.claims.get(process)) {
                (Some(cgroup), Some(claim)) => *process == process_map.process || claim.cgroups.contains(cgroup),
                _ => true,
            };
            let processes = || node_processes.iter().filter(|process| shares(process)).copied();
            let uses = processes().flat_map(|process| self.uses(plan, process_map, process, snapshots));
            let (uses, rows): (Vec<u64>, Vec<String>) = uses.unzip();
            let needed = uses.into_iter().fold(0, u64::saturating_add);
            if needed > *bytes {
                let extra = processes().map(|process| self.extra_bytes(process)).fold(0, u64::saturating_add);
                let (budget, bound, table) = (*bytes, bound.to_string(), rows.concat());
                return Err(PlanError::NodeMemory { budget, bound, needed, extra, table });
            }
        }
        Ok(())
    }

    fn extra_bytes(&self, process: u32) -> u64 {
        self.claims.get(&process).map_or(0, |claim| claim.extra_bytes)
    }

    /// The bytes of each use of memory by a process, with a row of the error's table.
    fn uses(&self, plan: &Instance, process_map: &ProcessMap, process: u32, snapshots: usize) -> Vec<(u64, String)> {
        let devices = process_map.devices_of(process);
        let memory = |device| (plan.memory(device).total_bytes() as u64, plan.memory(device).row(device));
        let mut uses: Vec<(u64, String)> = devices.clone().map(memory).collect();
        let mut add = |bytes: u64, why: &str| uses.push((bytes, format!("  rank {process}: {bytes} bytes {why}\n")));
        add(rank_bytes(plan, devices.len()), "for threads, libraries and connections");
        if snapshots > 0 {
            let bytes = snapshots as u64 * snapshot_bytes(plan, devices);
            add(bytes, &format!("for {snapshots} snapshots of checkpoints"));
        }
        if self.extra_bytes(process) > 0 {
            add(self.extra_bytes(process), "that the program allocates besides the plan");
        }
        uses
    }
}

/// Bytes that a process needs to run this plan alone.
pub fn bytes_alone(plan: &Plan) -> u64 {
    let devices = 0..plan.device_count();
    rank_bytes(plan, devices.len()) + devices.map(|device| plan.memory(device).total_bytes() as u64).sum::<u64>()
}

/// The reserve of a process with this many devices.
fn rank_bytes(plan: &Plan, devices: usize) -> u64 {
    RANK_BYTES + devices as u64 * (DEVICE_BYTES + plan.threads_per_device as u64 * THREAD_BYTES)
}

/// The parts of a parameter or state that these devices save in a checkpoint. Of several copies, the first device of the
/// placement saves its copy: the device with coordinate 0 on each axis along which the tensor is broadcast.
pub(crate) fn saved_parts(
    plan: &Plan,
    var: Var,
    devices: Range<usize>,
) -> impl Iterator<Item = (usize, ResidentTensor)> {
    let (graph, layout) = (&plan.graph, plan.graph.layout(var));
    let placement = &graph.placements[graph.placement_of(var)];
    let is_first_copy = |index| layout.is_first_copy(&placement.coords(index));
    let saves = move |device: &usize| placement.index_of(*device).is_some_and(is_first_copy);
    plan.resident_parts(var, devices.filter(saves)).filter(|(_, part)| !part.region.is_empty())
}

fn snapshot_bytes(plan: &Plan, devices: Range<usize>) -> u64 {
    let parts = plan.graph.residents().flat_map(|var| saved_parts(plan, var, devices.clone()));
    parts.map(|(_, part)| (part.region.element_count() * part.dtype.bytes()) as u64).sum()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::prelude::*;
    use shardflow_job::machine::MemoryBound;

    fn plan(mesh: &str) -> Instance {
        let mut g = Graph::new(&Mesh::parse(mesh).unwrap());
        let ids = g.input("ids", &[8, 4], DType::I32, Layout::split("data", 0));
        let x = nn::embedding(&mut g, "embedding", ids, 16, 32, Parallel::Replicated);
        let loss = g.cross_entropy(x, ids);
        g.minimize(loss, AdamW::default());
        compile(g, &CompileOptions::default()).unwrap().instance()
    }

    /// Checks the budget of a job with `processes` processes. The processes in `node_processes` run on this node.
    fn check(
        budget: u64,
        plan: &Instance,
        processes: u32,
        node_processes: &[u32],
        snapshots: usize,
    ) -> Result<(), String> {
        let bounds = vec![(None, FreeMemory { bytes: budget, bound: MemoryBound::Machine })];
        let budget = Budget { bounds, claims: BTreeMap::new() };
        let process_map = ProcessMap { process: node_processes[0], processes, devices: plan.device_count() };
        budget.check(plan, &process_map, node_processes, snapshots).map_err(|error| error.to_string())
    }

    #[test]
    fn the_processes_of_a_node_share_its_memory() {
        let mut plan = plan("data=4");
        plan.mirrors.insert(2, 1000);
        let bytes = |devices: &[usize]| devices.iter().map(|d| plan.memory(*d).total_bytes() as u64).sum::<u64>();
        for (node_processes, devices) in [(&[0, 1][..], &[0, 1, 2, 3][..]), (&[0], &[0, 1]), (&[1], &[2, 3])] {
            let needed = bytes(devices) + node_processes.len() as u64 * rank_bytes(&plan, 2);
            assert_eq!(check(needed, &plan, 2, node_processes, 0), Ok(()), "{node_processes:?}");
            let message = check(needed - 1, &plan, 2, node_processes, 0).unwrap_err();
            for part in [&format!("this node has {} bytes free (MemAvailable", needed - 1), &format!("needs {needed}")]
            {
                assert!(message.contains(part), "no {part:?} in {message}");
            }
            for device in 0..4 {
                let row = plan.memory(device).row(device);
                assert_eq!(message.contains(&row), devices.contains(&device), "{row} in {message}");
            }
        }
        assert!(plan.memory(2).row(2).contains("1000 in mirrors"));
    }

    /// The ranks of a container share its limit, and all ranks of a machine share `MemAvailable`.
    #[test]
    fn ranks_in_different_cgroups_have_separate_limits() {
        let plan = plan("data=4");
        let process_map = ProcessMap { process: 0, processes: 4, devices: 4 };
        let bytes = |rank| plan.memory(rank).total_bytes() as u64 + rank_bytes(&plan, 1);
        let [one, two, three] = [1, 2, 3].map(|ranks| (0..ranks).map(bytes).sum::<u64>());
        let (outer, first, second) = ((1, 1), (1, 2), (1, 3));
        let claim = |cgroups: &[CgroupId], extra_bytes| MemoryClaim { cgroups: cgroups.to_vec(), extra_bytes };
        let check = |first_bytes, outer_bytes, machine_bytes, extra_bytes| {
            let cgroup = |bytes| {
                let folder = "/c".into();
                FreeMemory { bytes, bound: MemoryBound::Cgroup { folder, limit_bytes: bytes, used_bytes: 0 } }
            };
            let machine = FreeMemory { bytes: machine_bytes, bound: MemoryBound::Machine };
            let bounds = vec![(Some(first), cgroup(first_bytes)), (Some(outer), cgroup(outer_bytes)), (None, machine)];
            let claims = [claim(&[first, outer], extra_bytes), claim(&[second, outer], 5), claim(&[second], 0)];
            let budget = Budget { bounds, claims: (0..).zip(claims).collect() };
            budget.check(&plan, &process_map, &[0, 1, 2], 0).map_err(|error| error.to_string())
        };
        assert_eq!(check(one, two + 5, three + 5, 0), Ok(()));
        let message = check(one - 1, two + 5, three + 5, 0).unwrap_err();
        assert!(message.contains(&format!("needs {one} bytes")) && !message.contains("device 1"), "{message}");
        let message = check(one, two + 4, three + 5, 0).unwrap_err();
        assert!(message.contains("device 1") && !message.contains("device 2"), "{message}");
        assert!(message.contains("rank 1: 5 bytes that the program allocates besides the plan"), "{message}");
        let message = check(one, two + 5, three + 4, 0).unwrap_err();
        assert!(message.contains("MemAvailable") && message.contains("device 2"), "{message}");
        assert_eq!(check(one + 7, two + 12, three + 12, 7), Ok(()));
        assert!(check(one + 6, two + 12, three + 12, 7).is_err());
        assert!(check(one, u64::MAX - 1, three, u64::MAX).is_err());
    }

    #[test]
    fn snapshots_count_each_part_once() {
        let plan = plan("data=2");
        let devices = plan.memories().map(|m| m.total_bytes() as u64).sum::<u64>() + rank_bytes(&plan, 2);
        // Weights and two moments. Both devices hold them, but a snapshot has one copy.
        let snapshot = 3 * 16 * 32 * 4;
        assert_eq!(check(devices + 2 * snapshot, &plan, 1, &[0], 2), Ok(()));
        let message = check(devices + 2 * snapshot - 1, &plan, 1, &[0], 2).unwrap_err();
        assert!(message.contains(&format!("rank 0: {} bytes for 2 snapshots", 2 * snapshot)), "{message}");
        // With two processes, the second one writes nothing.
        let message = check(0, &plan, 2, &[0, 1], 1).unwrap_err();
        assert!(
            message.contains(&format!("rank 0: {snapshot} bytes")) && message.contains("rank 1: 0 bytes"),
            "{message}"
        );
        let session = Session::start((*plan.plan).clone(), &SessionOptions::default()).unwrap();
        assert_eq!(session.snapshot(None).unwrap().bytes(), snapshot);
    }

    #[test]
    fn all_plans_for_cpus_are_compared_with_the_machine() {
        let mut plan = (*plan("data=1").plan).clone();
        assert!(!Budget::measure(&plan).bounds.is_empty());
        plan.memory_bytes = Some(1 << 30);
        assert!(!Budget::measure(&plan).bounds.is_empty(), "a limit for each device must not replace the node's");
        let gpu = Plan { device: DeviceKind::Cuda, ..plan };
        assert!(Budget::measure(&gpu).bounds.is_empty());
    }

    /// Products of bf16 matrices convert the matrices to f32 in memory of the streams.
    #[test]
    fn memory_of_streams_is_planned() {
        let stream_bytes = |precision| {
            let mut g = Graph::new(&Mesh::parse("data=1").unwrap());
            let x = g.input("x", &[1, 64, 64], DType::F32, Layout::broadcast());
            let h = nn::linear(&mut g, "up", x, 64, Parallel::Replicated);
            let h = g.gelu(h);
            let y = nn::linear(&mut g, "down", h, 64, Parallel::Replicated);
            g.output("y", y);
            compile(g, &CompileOptions { precision, ..CompileOptions::default() }).unwrap().memory(0).stream_bytes
        };
        assert_eq!(stream_bytes(Precision::F32), 0);
        // A launch holds two or three matrices of this size in f32.
        let matrices = stream_bytes(Precision::BF16) / (64 * 64 * 4);
        assert!((2..=3).contains(&matrices), "{matrices}");
    }
}
