//! Opens this process's devices and the engine that runs collectives between them.

use std::collections::BTreeMap;
use std::env;
use std::sync::Arc;
use std::time::Duration;

use shardflow_kernels::collective::in_process::InProcess;
use shardflow_kernels::collective::{Collective, Group};
use shardflow_kernels::cuda::gpu::Gpu;
use shardflow_kernels::cuda::library::QUEUES;
use shardflow_kernels::cuda::nccl::{GroupMember, Nccl, Pipe, UniqueId};
use shardflow_kernels::cuda::shared_gpu::SharedGpu;
use shardflow_kernels::device::{Device, DeviceKind};
use shardflow_kernels::error::KernelError;

use crate::plan::instance::Instance;
use crate::process_map::{NodeDevices, ProcessMap, groups};

/// Time limit for the members of a group to join, after all processes are ready.
const JOIN_TIMEOUT: Duration = Duration::from_secs(60);

/// Number of hardware queues of a GPU: the default, and the maximum that the driver provides.
const QUEUES_DEFAULT: usize = 8;
const QUEUES_MAX: usize = 32;

pub(crate) type IdSource<'a> = &'a dyn Fn(&[Arc<Group>]) -> Result<Vec<UniqueId>, KernelError>;

/// Bytes of GPU memory for each of `devices` devices on this node: the free memory of the first GPU, divided by the
/// number of devices that share a GPU.
///
/// # Errors
/// [`KernelError::Unavailable`] if there is no GPU, or if a library for GPUs is missing.
pub fn gpu_memory_bytes(devices: usize) -> Result<usize, KernelError> {
    let count = Gpu::count()?.max(1);
    let (free, _) = Gpu::open(0)?.memory()?;
    Ok(free / devices.div_ceil(count).max(1))
}

/// This process's ends of the pipes between GPUs of two processes. The key is the pair of sending and receiving device.
pub(crate) type Pipes = BTreeMap<(usize, usize), Arc<Pipe>>;

pub(crate) struct ProcessDevices {
    /// The devices in order of rank.
    pub(crate) devices: Vec<Device>,
    /// Runs collectives between these devices. With GPUs, the collectives may include devices of other processes.
    pub(crate) engine: Arc<dyn Collective>,
    pub(crate) pipes: Pipes,
}

/// Opens the devices that this process hosts; `ids` returns each group's `ncclUniqueId`.
pub(crate) fn open(
    plan: &Instance,
    process_map: &ProcessMap,
    node: NodeDevices,
    takes_pipes: bool,
    ids: IdSource<'_>,
) -> Result<ProcessDevices, KernelError> {
    match plan.device {
        DeviceKind::Cpu => {
            let engine: Arc<dyn Collective> = Arc::new(InProcess::new());
            let make = |rank| Device::cpu(rank, plan.threads_per_device, engine.clone());
            Ok(ProcessDevices { devices: process_map.own().map(make).collect(), engine, pipes: Pipes::new() })
        }
        DeviceKind::Cuda => {
            let gpus = gpus(process_map, node, Gpu::count()?)?;
            let (engine, pipes) = gpu_engine(plan, process_map, &gpus, takes_pipes, ids)?;
            let make = |(rank, gpu): (&usize, &Arc<Gpu>)| Device::cuda(*rank, gpu.clone(), engine.clone());
            Ok(ProcessDevices { devices: gpus.iter().map(make).collect(), engine, pipes })
        }
    }
}

/// Opens the GPU of each device, and lets the GPUs access each other's memory.
fn gpus(process_map: &ProcessMap, node: NodeDevices, count: usize) -> Result<BTreeMap<usize, Arc<Gpu>>, KernelError> {
    let mut opened: BTreeMap<usize, Arc<Gpu>> = BTreeMap::new();
    let mut out = BTreeMap::new();
    for (rank, ordinal) in process_map.own().zip(ordinals(process_map, node, count)?) {
        let gpu = match opened.get(&ordinal) {
            Some(gpu) => gpu.clone(),
            None => opened.entry(ordinal).or_insert(Gpu::open(ordinal)?).clone(),
        };
        out.insert(rank, gpu);
    }
    Gpu::connect(&opened.values().collect::<Vec<_>>())?;
    Ok(out)
}

/// GPU ordinals of this process's devices; each ordinal is below `count`. GPUs are assigned to all devices of the node
/// in the order of ranks. Devices share GPUs only if one process hosts all devices.
fn ordinals(process_map: &ProcessMap, node: NodeDevices, count: usize) -> Result<Vec<usize>, KernelError> {
    if count == 0 || (node.all > count && process_map.processes > 1) {
        let what = format!("{} devices of this node need one GPU each, but the node has {count}", node.all);
        let hint = "choose a smaller mesh, or use more nodes; devices can share a GPU only in a single-process job";
        return Err(KernelError::Unavailable { what, hint: hint.to_owned() });
    }
    Ok((0..process_map.own().len()).map(|index| (node.before + index) % count).collect())
}

/// Creates the engine: NCCL if there are several devices and each has its own GPU, else `SharedGpu`. NCCL does not
/// accept two members on one GPU. If devices share GPUs, this process hosts all devices.
fn gpu_engine(
    plan: &Instance,
    process_map: &ProcessMap,
    gpus: &BTreeMap<usize, Arc<Gpu>>,
    takes_pipes: bool,
    ids: IdSource<'_>,
) -> Result<(Arc<dyn Collective>, Pipes), KernelError> {
    let shares = gpus.iter().any(|(a, gpu)| gpus.iter().any(|(b, other)| a != b && Arc::ptr_eq(gpu, other)));
    if shares || process_map.devices == 1 {
        return Ok((Arc::new(SharedGpu::new()), Pipes::new()));
    }
    let mut groups = groups(plan, process_map.own());
    let pairs = if takes_pipes { process_map.crossing_pairs(plan) } else { BTreeMap::new() };
    let first = plan.patterns.count(&plan.graph);
    groups.retain(|group| group.ranks.len() > 1);
    let queues = env::var(QUEUES).ok();
    for rank in gpus.keys() {
        let pipes = pairs.keys().filter(|(from, to)| from == rank || to == rank).count();
        // The copies for the host need one more stream.
        let streams = plan.spec.actors.values().filter(|actor| actor.device == *rank).count() + 1;
        check_queues(*rank, streams, pipes, queues.as_deref())?;
    }
    // The ids of the pipes' groups follow those of the plan's groups. A pair of devices has the same id in both
    // processes.
    let pair = |(from, to): &(usize, usize)| {
        let id = first + (from * process_map.devices + to) as u32;
        Arc::new(Group { id, ranks: vec![*from, *to].into() })
    };
    groups.extend(pairs.keys().map(pair));
    let mut members = Vec::new();
    for (group, id) in groups.iter().zip(ids(&groups)?) {
        for (index, rank) in group.ranks.iter().enumerate() {
            let Some(gpu) = gpus.get(&rank) else { continue };
            members.push(GroupMember { group: group.clone(), member: index, gpu: gpu.clone(), id });
        }
    }
    let engine = Nccl::join(&members, JOIN_TIMEOUT)?;
    let mut pipes = Pipes::new();
    for member in members.iter().filter(|member| member.group.id >= first) {
        pipes.insert((member.group.ranks.rank(0), member.group.ranks.rank(1)), Arc::new(engine.pipe(member)?));
    }
    // Connect in the order of the devices, which is the same in all processes.
    pipes.values().try_for_each(|pipe| pipe.connect(JOIN_TIMEOUT))?;
    Ok((Arc::new(engine), pipes))
}

/// Checks that no stream shares a hardware queue with a pipe. A shared queue can cause a deadlock: a pipe's call waits
/// for a process that waits for that stream. `setting` is the value of the driver's variable [`QUEUES`].
fn check_queues(rank: usize, streams: usize, pipes: usize, setting: Option<&str>) -> Result<(), KernelError> {
    let (needed, max) = (streams + pipes, QUEUES_MAX);
    let queues = setting.and_then(|text| text.trim().parse().ok()).unwrap_or(QUEUES_DEFAULT).min(max);
    if pipes == 0 || needed <= queues {
        return Ok(());
    }
    let what = format!(
        "the GPU of device {rank} has too few hardware queues: {streams} streams and {pipes} pipes to other processes \
         need {needed}, but {QUEUES} provides {queues}"
    );
    let hint = if needed <= max {
        format!("set {QUEUES}={max} for all processes before they start, as shardflow launch does")
    } else {
        format!("no GPU has more than {max} queues: set SHARDFLOW_TRANSPORT=tcp for all processes")
    };
    Err(KernelError::Unavailable { what, hint })
}

#[cfg(test)]
mod tests {
    use super::*;

    /// GPU ordinals of each process's devices, for `nodes` nodes with the same number of processes.
    fn by_process(devices: usize, processes: u32, nodes: u32, count: usize) -> Result<Vec<Vec<usize>>, KernelError> {
        let per_node = processes / nodes;
        let ordinals_of = |process: u32| {
            let process_map = ProcessMap { process, processes, devices };
            let first = process / per_node * per_node;
            ordinals(&process_map, process_map.on_node(first..first + per_node, process), count)
        };
        (0..processes).map(ordinals_of).collect()
    }

    #[test]
    fn each_device_of_a_node_gets_its_own_gpu() {
        assert_eq!(by_process(4, 2, 1, 4).unwrap(), [[0, 1], [2, 3]]);
        assert_eq!(by_process(3, 2, 1, 3).unwrap(), [vec![0, 1], vec![2]], "uneven");
        assert_eq!(by_process(7, 4, 2, 4).unwrap(), [vec![0, 1], vec![2, 3], vec![0, 1], vec![2]], "two nodes");
        assert!(by_process(7, 4, 2, 3).is_err(), "the first node has four devices");
        assert!(by_process(3, 2, 1, 2).is_err() && by_process(1, 1, 1, 0).is_err());
    }

    #[test]
    fn devices_of_one_process_share_gpus() {
        assert_eq!(by_process(4, 1, 1, 2).unwrap(), [[0, 1, 0, 1]]);
        assert_eq!(by_process(3, 1, 1, 1).unwrap(), [[0, 0, 0]]);
    }

    #[test]
    fn pipes_do_not_share_queues_with_streams() {
        let check =
            |streams, pipes, setting| check_queues(3, streams, pipes, setting).map_err(|error| error.to_string());
        assert_eq!(check(5, 3, None), Ok(()));
        assert_eq!(check(9, 0, None), Ok(()), "nothing waits for another process");
        assert_eq!(check(5, 27, Some("32")), Ok(()));
        let error = check(5, 4, None).unwrap_err();
        assert!(
            error.contains("5 streams and 4 pipes")
                && error.contains("need 9, but CUDA_DEVICE_MAX_CONNECTIONS provides 8")
        );
        assert!(error.contains("set CUDA_DEVICE_MAX_CONNECTIONS=32"), "{error}");
        let error = check(5, 28, Some("64")).unwrap_err();
        assert!(error.contains("provides 32") && error.contains("SHARDFLOW_TRANSPORT=tcp"), "{error}");
    }

    #[test]
    fn every_gpu_is_assigned_exactly_once() {
        for devices in 1..10 {
            for processes in 1..=devices as u32 {
                let all: Vec<usize> = by_process(devices, processes, 1, devices).unwrap().concat();
                assert_eq!(all, (0..devices).collect::<Vec<_>>(), "{devices} devices in {processes} processes");
            }
        }
    }
}
