//! The devices of this process, of the kind that the plan is for, and the engine of collectives between them. Imports `plan`,
//! `session::hosting`, `cluster` and the kernels' devices.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Duration;

use shardflow_kernels::collective::in_process::InProcess;
use shardflow_kernels::collective::{Collective, Group};
use shardflow_kernels::cuda::gpu::Gpu;
use shardflow_kernels::cuda::local::Local;
use shardflow_kernels::cuda::nccl::{Nccl, Seat, UniqueId};
use shardflow_kernels::device::{Device, DeviceKind};
use shardflow_kernels::error::KernelError;

use super::hosting::{Hosting, groups};
use crate::plan::Plan;

/// How long members of a group may take to join each other.
const JOIN_WITHIN: Duration = Duration::from_secs(60);

/// Where a process stands among those of its node.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct OnNode {
    /// Its number among them.
    pub(crate) process: usize,
    /// How many they are.
    pub(crate) processes: usize,
}

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

/// The devices that this process hosts, in order of rank, and the engine of collectives among them; with GPUs also of those
/// with other processes' devices, which `ids` are for: what NCCL knows each group by.
pub(crate) fn open(
    plan: &Plan,
    hosting: &Hosting,
    node: OnNode,
    ids: Ids<'_>,
) -> Result<(Vec<Device>, Arc<dyn Collective>), KernelError> {
    match plan.device {
        DeviceKind::Cpu => {
            let engine: Arc<dyn Collective> = Arc::new(InProcess::new());
            let make = |rank| Device::cpu(rank, plan.threads_per_device, engine.clone());
            Ok((hosting.own().map(make).collect(), engine))
        }
        DeviceKind::Cuda => {
            let gpus = gpus(hosting, node, Gpu::count()?)?;
            let engine = gpu_engine(plan, hosting, &gpus, ids)?;
            let make = |(rank, gpu): (&usize, &Arc<Gpu>)| Device::cuda(*rank, gpu.clone(), engine.clone());
            Ok((gpus.iter().map(make).collect(), engine))
        }
    }
}

/// The GPU of each device: they are dealt out in the order of ranks, over all processes of the node.
fn gpus(hosting: &Hosting, node: OnNode, count: usize) -> Result<BTreeMap<usize, Arc<Gpu>>, KernelError> {
    let own = hosting.own();
    let each = hosting.devices.div_ceil(hosting.processes as usize);
    let needed = if node.processes > 1 { each * node.processes } else { own.len() };
    if count == 0 || (needed > count && (hosting.processes > 1 || count > 1)) {
        let what = format!("{needed} devices of this node need a GPU each, and it has {count}");
        let hint =
            "choose a mesh of fewer devices; on one GPU (see CUDA_VISIBLE_DEVICES) the devices of one process share it";
        return Err(KernelError::Unavailable { what, hint: hint.to_owned() });
    }
    let mut opened: BTreeMap<usize, Arc<Gpu>> = BTreeMap::new();
    let mut out = BTreeMap::new();
    for (index, rank) in own.enumerate() {
        let ordinal = (node.process * each + index) % count;
        let gpu = match opened.get(&ordinal) {
            Some(gpu) => gpu.clone(),
            None => opened.entry(ordinal).or_insert(Gpu::open(ordinal)?).clone(),
        };
        out.insert(rank, gpu);
    }
    Ok(out)
}

/// NCCL where each device has a GPU of its own; it takes no two members on one.
fn gpu_engine(
    plan: &Plan,
    hosting: &Hosting,
    gpus: &BTreeMap<usize, Arc<Gpu>>,
    ids: Ids<'_>,
) -> Result<Arc<dyn Collective>, KernelError> {
    let shares = gpus.iter().any(|(a, gpu)| gpus.iter().any(|(b, other)| a != b && Arc::ptr_eq(gpu, other)));
    if shares || hosting.devices == 1 {
        return Ok(Arc::new(Local::new()));
    }
    let mut groups = groups(plan);
    groups.retain(|group| group.ranks.len() > 1);
    let mut seats = Vec::new();
    for (group, id) in groups.iter().zip(ids(&groups)?) {
        for (member, rank) in group.ranks.iter().enumerate() {
            let Some(gpu) = gpus.get(rank) else { continue };
            seats.push(Seat { group: group.clone(), member, gpu: gpu.clone(), id });
        }
    }
    Ok(Arc::new(Nccl::join(&seats, JOIN_WITHIN)?))
}

/// New ids, for groups whose members are all in this process.
pub(crate) fn new_ids(groups: &[Arc<Group>]) -> Result<Vec<UniqueId>, KernelError> {
    groups.iter().map(|_| UniqueId::new()).collect()
}
