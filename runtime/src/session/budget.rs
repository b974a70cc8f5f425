//! Compares a node's memory with the needs of a job's processes there. Only this module sums the bytes of a rank.

use shardflow_kernels::device::DeviceKind;

use crate::graph::Var;
use crate::plan::validate::PlanError;
use crate::plan::{Plan, ResidentTensor};
use crate::process_map::ProcessMap;
use shardflow_job::machine::{FreeMemory, free_memory};

/// Reserve for memory outside the plan: libraries and connections of a process, and packing buffers of matrix products
/// for each device and each of its threads. Measured: 3 to 31 MiB in total, for `gpt` with widths from 64 to 1024 and
/// up to 8 threads.
const RANK_BYTES: u64 = 16 << 20;
const DEVICE_BYTES: u64 = 8 << 20;
const THREAD_BYTES: u64 = 2 << 20;

/// Maximum number of snapshots in a process: the one being written, and the next.
pub(crate) const SNAPSHOTS_MAX: usize = 2;

/// The node's memory for a job of CPU devices.
#[derive(Clone, Debug)]
pub(crate) struct Budget {
    /// Free memory before any process of the job allocates for the plan; `None` if unknown or not applicable.
    free: Option<FreeMemory>,
}

impl Budget {
    /// Call it before the rendezvous: afterwards, other processes may have allocated memory. No budget for GPUs, whose
    /// memory is not the host's. Does not replace the devices' budget (`CompileOptions::memory_bytes`).
    pub(crate) fn measure(plan: &Plan) -> Self {
        Self { free: (plan.device == DeviceKind::Cpu).then(free_memory).flatten() }
    }

    /// Checks that this node has memory for these processes, all of which run on it: their devices and mirrors, and
    /// `snapshots` snapshots each.
    pub(crate) fn check(
        &self,
        plan: &Plan,
        process_map: &ProcessMap,
        node_processes: &[u32],
        snapshots: usize,
    ) -> Result<(), PlanError> {
        let Some(FreeMemory { bytes: budget, bound }) = &self.free else { return Ok(()) };
        let (mut needed, mut table) = (0u64, String::new());
        for process in node_processes {
            let devices = process_map.devices_of(*process);
            for device in devices.clone() {
                needed += plan.memory[device].total_bytes() as u64;
                table += &plan.memory[device].row(device);
            }
            let reserve = rank_bytes(plan, devices.len());
            needed += reserve;
            table += &format!("  rank {process}: {reserve} bytes for threads, libraries and connections\n");
            if snapshots > 0 {
                let bytes = snapshots as u64 * snapshot_bytes(plan, |device| devices.contains(&device));
                needed += bytes;
                table += &format!("  rank {process}: {bytes} bytes for {snapshots} snapshots of checkpoints\n");
            }
        }
        if needed <= *budget {
            return Ok(());
        }
        Err(PlanError::NodeMemory { budget: *budget, bound: bound.to_string(), needed, table })
    }
}

/// The reserve of a process with this many devices.
fn rank_bytes(plan: &Plan, devices: usize) -> u64 {
    RANK_BYTES + devices as u64 * (DEVICE_BYTES + plan.threads_per_device as u64 * THREAD_BYTES)
}

/// The parts of a parameter or a state that a checkpoint holds, each with the device that provides it: the first device
/// that has it, in the order of the placement.
pub(crate) fn saved_parts(plan: &Plan, var: Var) -> Vec<(usize, &ResidentTensor)> {
    let mut parts: Vec<(usize, &ResidentTensor)> = Vec::new();
    for (device, _, resident) in plan.resident_parts(var) {
        let region = &resident.region;
        if !region.is_empty() && !parts.iter().any(|(_, other)| other.region == *region) {
            parts.push((device, resident));
        }
    }
    parts
}

fn snapshot_bytes(plan: &Plan, is_included: impl Fn(usize) -> bool) -> u64 {
    let parts = plan.graph.residents().flat_map(|var| saved_parts(plan, var));
    let parts = parts.filter(|(device, _)| is_included(*device));
    parts.map(|(_, part)| (part.region.element_count() * part.dtype.bytes()) as u64).sum()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::prelude::*;
    use shardflow_job::machine::MemoryBound;

    fn plan(mesh: &str) -> Plan {
        let mut g = Graph::new(&Mesh::parse(mesh).unwrap());
        let ids = g.input("ids", &[8, 4], DType::I32, Layout::split("data", 0));
        let x = nn::embedding(&mut g, "embedding", ids, 16, 32, Parallel::Replicated);
        let loss = g.cross_entropy(x, ids);
        g.minimize(loss, AdamW::default());
        compile(g, &CompileOptions::default()).unwrap()
    }

    /// Checks the budget of a job with `processes` processes, of which `node_processes` run on this node.
    fn check(budget: u64, plan: &Plan, processes: u32, node_processes: &[u32], snapshots: usize) -> Result<(), String> {
        let budget = Budget { free: Some(FreeMemory { bytes: budget, bound: MemoryBound::Machine }) };
        let process_map = ProcessMap { process: node_processes[0], processes, devices: plan.memory.len() };
        budget.check(plan, &process_map, node_processes, snapshots).map_err(|error| error.to_string())
    }

    #[test]
    fn the_processes_of_a_node_share_its_memory() {
        let mut plan = plan("data=4");
        plan.memory[2].mirror_bytes = 1000;
        let bytes = |devices: &[usize]| devices.iter().map(|d| plan.memory[*d].total_bytes() as u64).sum::<u64>();
        for (node_processes, devices) in [(&[0, 1][..], &[0, 1, 2, 3][..]), (&[0], &[0, 1]), (&[1], &[2, 3])] {
            let needed = bytes(devices) + node_processes.len() as u64 * rank_bytes(&plan, 2);
            assert_eq!(check(needed, &plan, 2, node_processes, 0), Ok(()), "{node_processes:?}");
            let message = check(needed - 1, &plan, 2, node_processes, 0).unwrap_err();
            for part in [&format!("this node has {} bytes free (MemAvailable", needed - 1), &format!("needs {needed}")]
            {
                assert!(message.contains(part), "no {part:?} in {message}");
            }
            for device in 0..4 {
                let row = plan.memory[device].row(device);
                assert_eq!(message.contains(&row), devices.contains(&device), "{row} in {message}");
            }
        }
        assert!(plan.memory[2].row(2).contains("1000 in mirrors"));
    }

    #[test]
    fn snapshots_count_each_part_once() {
        let plan = plan("data=2");
        let devices = plan.memory.iter().map(|m| m.total_bytes() as u64).sum::<u64>() + rank_bytes(&plan, 2);
        // Weights and two moments, held by both devices.
        let snapshot = 3 * 16 * 32 * 4;
        assert_eq!(check(devices + 2 * snapshot, &plan, 1, &[0], 2), Ok(()));
        let message = check(devices + 2 * snapshot - 1, &plan, 1, &[0], 2).unwrap_err();
        assert!(message.contains(&format!("rank 0: {} bytes for 2 snapshots", 2 * snapshot)), "{message}");
        // With two processes, the second writes nothing.
        let message = check(0, &plan, 2, &[0, 1], 1).unwrap_err();
        assert!(
            message.contains(&format!("rank 0: {snapshot} bytes")) && message.contains("rank 1: 0 bytes"),
            "{message}"
        );
        let session = Session::start(plan, &SessionOptions::default()).unwrap();
        assert_eq!(session.snapshot(None).unwrap().bytes(), snapshot);
    }

    #[test]
    fn all_plans_for_cpus_are_compared_with_the_machine() {
        let mut plan = plan("data=1");
        assert!(Budget::measure(&plan).free.is_some());
        plan.memory_bytes = Some(1 << 30);
        assert!(Budget::measure(&plan).free.is_some(), "a budget of each device does not replace the node's");
        let gpu = Plan { device: DeviceKind::Cuda, ..plan };
        assert!(Budget::measure(&gpu).free.is_none());
    }

    /// Products of bf16 matrices widen them into memory of the streams.
    #[test]
    fn memory_of_streams_is_planned() {
        let stream_bytes = |precision| {
            let mut g = Graph::new(&Mesh::parse("data=1").unwrap());
            let x = g.input("x", &[1, 64, 64], DType::F32, Layout::broadcast());
            let h = nn::linear(&mut g, "up", x, 64, Parallel::Replicated);
            let h = g.gelu(h);
            let y = nn::linear(&mut g, "down", h, 64, Parallel::Replicated);
            g.output("y", y);
            compile(g, &CompileOptions { precision, ..CompileOptions::default() }).unwrap().memory[0].stream_bytes
        };
        assert_eq!(stream_bytes(Precision::F32), 0);
        // A launch holds two or three matrices of this size in f32.
        let matrices = stream_bytes(Precision::BF16) / (64 * 64 * 4);
        assert!((2..=3).contains(&matrices), "{matrices}");
    }
}
