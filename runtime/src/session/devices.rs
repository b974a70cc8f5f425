//! The devices of this process, of the kind that the plan is for, and the engine of collectives between them.

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

use super::process_map::{NodeDevices, ProcessMap, groups};
use crate::plan::Plan;

/// How long members of a group may take to join each other, once all processes are about to.
const JOIN_WITHIN: Duration = Duration::from_secs(60);

/// Hardware queues of a GPU where the driver was told nothing, and the most that it gives.
const QUEUES_DEFAULT: usize = 8;
const QUEUES_MAX: usize = 32;

/// Gives what NCCL knows groups by.
pub(crate) type Ids<'a> = &'a dyn Fn(&[Arc<Group>]) -> Result<Vec<UniqueId>, KernelError>;

/// Memory that each of `devices` devices of this node may have of a GPU, as it is free now.
///
/// # Errors
/// [`KernelError::Unavailable`] where there is no GPU, or what it needs.
pub fn gpu_memory_bytes(devices: usize) -> Result<usize, KernelError> {
    let count = Gpu::count()?.max(1);
    let (free, _) = Gpu::open(0)?.memory()?;
    Ok(free / devices.div_ceil(count).max(1))
}

/// What registers take from a GPU of one process to one of another, by the two devices: the ends that this process has.
pub(crate) type Pipes = BTreeMap<(usize, usize), Arc<Pipe>>;

/// A process's devices.
pub(crate) struct Opened {
    /// In order of rank.
    pub(crate) devices: Vec<Device>,
    /// Of collectives among them; with GPUs also of those with other processes' devices.
    pub(crate) engine: Arc<dyn Collective>,
    /// Where registers are to take them.
    pub(crate) pipes: Pipes,
}

/// The devices that this process hosts; `ids` give what NCCL knows each group by.
pub(crate) fn open(
    plan: &Plan,
    process_map: &ProcessMap,
    node: NodeDevices,
    takes_pipes: bool,
    ids: Ids<'_>,
) -> Result<Opened, KernelError> {
    match plan.device {
        DeviceKind::Cpu => {
            let engine: Arc<dyn Collective> = Arc::new(InProcess::new());
            let make = |rank| Device::cpu(rank, plan.threads_per_device, engine.clone());
            Ok(Opened { devices: process_map.own().map(make).collect(), engine, pipes: Pipes::new() })
        }
        DeviceKind::Cuda => {
            let gpus = gpus(process_map, node, Gpu::count()?)?;
            let (engine, pipes) = gpu_engine(plan, process_map, &gpus, takes_pipes, ids)?;
            let make = |(rank, gpu): (&usize, &Arc<Gpu>)| Device::cuda(*rank, gpu.clone(), engine.clone());
            Ok(Opened { devices: gpus.iter().map(make).collect(), engine, pipes })
        }
    }
}

/// The GPU of each device; they reach each other's memory.
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

/// Which of so many GPUs each of this process's devices gets: they are dealt out in the order of ranks, over all processes of
/// the node. Devices share GPUs only where one process hosts them all.
fn ordinals(process_map: &ProcessMap, node: NodeDevices, count: usize) -> Result<Vec<usize>, KernelError> {
    if count == 0 || (node.all > count && process_map.processes > 1) {
        let what = format!("{} devices of this node need a GPU each, and it has {count}", node.all);
        let hint = "choose a mesh of fewer devices, or more nodes; the devices of a job of one process share GPUs";
        return Err(KernelError::Unavailable { what, hint: hint.to_owned() });
    }
    Ok((0..process_map.own().len()).map(|index| (node.before + index) % count).collect())
}

/// NCCL where each device has a GPU of its own; it takes no two members on one. Where devices share GPUs, all are this
/// process's.
fn gpu_engine(
    plan: &Plan,
    process_map: &ProcessMap,
    gpus: &BTreeMap<usize, Arc<Gpu>>,
    takes_pipes: bool,
    ids: Ids<'_>,
) -> Result<(Arc<dyn Collective>, Pipes), KernelError> {
    let shares = gpus.iter().any(|(a, gpu)| gpus.iter().any(|(b, other)| a != b && Arc::ptr_eq(gpu, other)));
    if shares || process_map.devices == 1 {
        return Ok((Arc::new(SharedGpu::new()), Pipes::new()));
    }
    let mut groups = groups(plan);
    let pairs = if takes_pipes { process_map.crossing_pairs(plan) } else { BTreeMap::new() };
    let first = groups.last().map_or(0, |group| group.id + 1);
    groups.retain(|group| group.ranks.len() > 1);
    let queues = env::var(QUEUES).ok();
    for rank in gpus.keys() {
        let pipes = pairs.keys().filter(|(from, to)| from == rank || to == rank).count();
        // The host's copies have a stream, too.
        let streams = plan.spec.actors.iter().filter(|actor| actor.device == *rank).count() + 1;
        check_queues(*rank, streams, pipes, queues.as_deref())?;
    }
    // Behind the plan's own, in the same order in all processes.
    let pair = |(id, (from, to)): (u32, &(usize, usize))| Arc::new(Group { id, ranks: vec![*from, *to] });
    groups.extend((first..).zip(pairs.keys()).map(pair));
    let mut seats = Vec::new();
    for (group, id) in groups.iter().zip(ids(&groups)?) {
        for (member, rank) in group.ranks.iter().enumerate() {
            let Some(gpu) = gpus.get(rank) else { continue };
            seats.push(GroupMember { group: group.clone(), member, gpu: gpu.clone(), id });
        }
    }
    let engine = Nccl::join(&seats, JOIN_WITHIN)?;
    let mut pipes = Pipes::new();
    for seat in seats.iter().filter(|seat| seat.group.id >= first) {
        pipes.insert((seat.group.ranks[0], seat.group.ranks[1]), Arc::new(engine.pipe(seat)?));
    }
    // In the order of their ends, which is the same in all processes.
    pipes.values().try_for_each(|pipe| pipe.connect(JOIN_WITHIN))?;
    Ok((Arc::new(engine), pipes))
}

/// A pipe's calls may wait for another process as long as that waits for one of this GPU's streams, so none may share a
/// hardware queue with a pipe; `given` is what the driver was told of queues.
fn check_queues(rank: usize, streams: usize, pipes: usize, given: Option<&str>) -> Result<(), KernelError> {
    let (needed, most) = (streams + pipes, QUEUES_MAX);
    let queues = given.and_then(|given| given.trim().parse().ok()).unwrap_or(QUEUES_DEFAULT).min(most);
    if pipes == 0 || needed <= queues {
        return Ok(());
    }
    let what = format!(
        "the GPU of device {rank} has too few hardware queues: {streams} streams and {pipes} ends of pipes to other \
         processes need {needed}, {QUEUES} gives {queues}"
    );
    let hint = if needed <= most {
        format!("set {QUEUES}={most} for all processes before they start, as shardflow launch does")
    } else {
        format!("no GPU has more than {most}: set SHARDFLOW_TRANSPORT=tcp for all processes")
    };
    Err(KernelError::Unavailable { what, hint })
}

/// New ids, for groups whose members are all in this process.
pub(crate) fn new_ids(groups: &[Arc<Group>]) -> Result<Vec<UniqueId>, KernelError> {
    groups.iter().map(|_| UniqueId::new()).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    /// What each process of a node gets; `nodes` of as many processes each.
    fn dealt(devices: usize, processes: u32, nodes: u32, count: usize) -> Result<Vec<Vec<usize>>, KernelError> {
        let each = processes / nodes;
        let of = |process: u32| {
            let process_map = ProcessMap { process, processes, devices };
            let first = process / each * each;
            ordinals(&process_map, process_map.on_node(first..first + each, process), count)
        };
        (0..processes).map(of).collect()
    }

    #[test]
    fn devices_of_a_node_get_a_gpu_each() {
        assert_eq!(dealt(4, 2, 1, 4).unwrap(), [[0, 1], [2, 3]]);
        assert_eq!(dealt(3, 2, 1, 3).unwrap(), [vec![0, 1], vec![2]], "uneven");
        assert_eq!(dealt(7, 4, 2, 4).unwrap(), [vec![0, 1], vec![2, 3], vec![0, 1], vec![2]], "two nodes");
        assert!(dealt(7, 4, 2, 3).is_err(), "the first node has four devices");
        assert!(dealt(3, 2, 1, 2).is_err() && dealt(1, 1, 1, 0).is_err());
    }

    #[test]
    fn devices_of_one_process_share_gpus() {
        assert_eq!(dealt(4, 1, 1, 2).unwrap(), [[0, 1, 0, 1]]);
        assert_eq!(dealt(3, 1, 1, 1).unwrap(), [[0, 0, 0]]);
    }

    #[test]
    fn pipes_have_queues_of_their_own() {
        let check = |streams, pipes, given| check_queues(3, streams, pipes, given).map_err(|error| error.to_string());
        assert_eq!(check(5, 3, None), Ok(()));
        assert_eq!(check(9, 0, None), Ok(()), "nothing waits for another process");
        assert_eq!(check(5, 27, Some("32")), Ok(()));
        let told = check(5, 4, None).unwrap_err();
        assert!(told.contains("5 streams and 4 ends") && told.contains("need 9, CUDA_DEVICE_MAX_CONNECTIONS gives 8"));
        assert!(told.contains("set CUDA_DEVICE_MAX_CONNECTIONS=32"), "{told}");
        let told = check(5, 28, Some("64")).unwrap_err();
        assert!(told.contains("gives 32") && told.contains("SHARDFLOW_TRANSPORT=tcp"), "{told}");
    }

    #[test]
    fn every_device_is_dealt_once() {
        for devices in 1..10 {
            for processes in 1..=devices as u32 {
                let all: Vec<usize> = dealt(devices, processes, 1, devices).unwrap().concat();
                assert_eq!(all, (0..devices).collect::<Vec<_>>(), "{devices} devices in {processes} processes");
            }
        }
    }
}
