//! Exchanges each group's `ncclUniqueId` over the control plane. The process of a group's first member sends the id to
//! the group's other processes. Then all processes wait for each other.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;
use std::time::{Duration, Instant};

use crossbeam_channel::Receiver;
use shardflow_job::membership::Membership;
use shardflow_kernels::collective::Group;
use shardflow_kernels::cuda::nccl::UniqueId;
use shardflow_kernels::error::KernelError;

use super::save_agreement::Received;
use crate::process_map::ProcessMap;

pub(super) const TOPIC: u16 = 2;
/// Topic of the round that ends when all processes have joined it.
const ROUND_TOPIC: u16 = 8;

/// Interval at which [`wait_for_all`] checks whether the session has ended.
const CHECK_EVERY: Duration = Duration::from_millis(100);

/// Bytes of a group's number and id in a message.
const ENTRY_BYTES: usize = 4 + 128;

/// Returns the id of each of `groups`: the groups of several members that include a device of this process, and the
/// groups of this process's NCCL pipes. Each process calls this function exactly once.
pub(super) fn exchange(
    groups: &[Arc<Group>],
    process_map: &ProcessMap,
    membership: &Membership,
    messages: &Receiver<Received>,
    deadline: Instant,
) -> Result<Vec<UniqueId>, KernelError> {
    let aborted = |cause| KernelError::Aborted { cause };
    let creator = |group: &Group| process_map.process_of(group.ranks.rank(0));
    let mut ids: BTreeMap<u32, UniqueId> = BTreeMap::new();
    let mut outgoing: BTreeMap<u32, Vec<u8>> = BTreeMap::new();
    for group in groups.iter().filter(|group| creator(group) == process_map.process) {
        let id = UniqueId::new()?;
        ids.insert(group.id, id);
        for process in process_map.processes_of(group).into_iter().filter(|p| *p != process_map.process) {
            outgoing.entry(process).or_default().extend([&group.id.to_le_bytes()[..], &id.0].concat());
        }
    }
    for (process, bytes) in outgoing {
        membership.send(process, TOPIC, bytes).map_err(|error| aborted(error.to_string()))?;
    }
    let is_member = |group: &&Arc<Group>| process_map.processes_of(group).contains(&process_map.process);
    let own_groups: Vec<&Arc<Group>> = groups.iter().filter(is_member).collect();
    let mut pending: BTreeSet<u32> = own_groups.iter().map(|group| creator(group)).collect();
    pending.remove(&process_map.process);
    while let Some(peer) = pending.first().copied() {
        let Received { from: sender, bytes } = messages.recv_deadline(deadline).map_err(|error| {
            let cause = membership.first_cause().map(|first| first.to_string());
            aborted(cause.unwrap_or_else(|| format!("rank {peer} did not send its NCCL group ids: {error}")))
        })?;
        pending.remove(&sender);
        for entry in bytes.chunks_exact(ENTRY_BYTES) {
            let (number, id) = entry.split_at(4);
            let number = u32::from_le_bytes([number[0], number[1], number[2], number[3]]);
            // An id is accepted only from the group's creator.
            let group = own_groups.iter().find(|g| g.id == number && creator(g) == sender);
            if let (Some(_), Ok(id)) = (group, id.try_into()) {
                ids.insert(number, UniqueId(id));
            }
        }
    }
    // NCCL has its own timeout, so no process may join a group before all processes are ready.
    wait_for_all(membership, deadline).map_err(aborted)?;
    if let Some(missing) = own_groups.iter().find(|group| !ids.contains_key(&group.id)) {
        return Err(aborted(format!("rank {} sent no NCCL id for group {}", creator(missing), missing.id)));
    }
    // The ids of other processes' groups are not used and stay zero.
    Ok(groups.iter().map(|group| ids.get(&group.id).copied().unwrap_or(UniqueId([0; 128]))).collect())
}

/// Waits until all processes have called this function.
fn wait_for_all(membership: &Membership, deadline: Instant) -> Result<(), String> {
    let results = membership.reduce(ROUND_TOPIC, &[].into(), Vec::new()).map_err(|error| error.to_string())?;
    loop {
        if results.recv_timeout(CHECK_EVERY).is_ok() {
            return Ok(());
        }
        if let Some(first) = membership.first_cause() {
            return Err(first.to_string());
        }
        if Instant::now() >= deadline {
            let rank = membership.missing(ROUND_TOPIC).map_or(0, |(process, _)| process);
            return Err(format!("rank {rank} did not finish the exchange of NCCL group ids in time"));
        }
    }
}
