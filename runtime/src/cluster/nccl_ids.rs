//! Exchanges each group's `ncclUniqueId` over the control plane: its first member's process sends it to the others.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;
use std::time::Instant;

use crossbeam_channel::Receiver;
use shardflow_job::membership::Membership;
use shardflow_kernels::collective::Group;
use shardflow_kernels::cuda::nccl::UniqueId;
use shardflow_kernels::error::KernelError;

use super::save_agreement::Received;
use crate::process_map::ProcessMap;

pub(super) const TOPIC: u16 = 2;

/// Bytes of a group's number and id in a message.
const ENTRY_BYTES: usize = 4 + 128;

/// The ids of these groups: all of a plan with several members. A collective call that each process makes once.
pub(super) fn exchange(
    groups: &[Arc<Group>],
    process_map: &ProcessMap,
    membership: &Membership,
    messages: &Receiver<Received>,
    deadline: Instant,
) -> Result<Vec<UniqueId>, KernelError> {
    let aborted = |cause: String| KernelError::Aborted { cause };
    let creator = |group: &Group| process_map.process_of(group.ranks[0]);
    let mut ids: BTreeMap<u32, UniqueId> = BTreeMap::new();
    // Every peer gets a message, even an empty one: NCCL has its own timeout, so none may join before all are here.
    let mut outgoing: BTreeMap<u32, Vec<u8>> = process_map.peers().map(|process| (process, Vec::new())).collect();
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
    let mut pending: BTreeSet<u32> = process_map.peers().collect();
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
    if let Some(missing) = own_groups.iter().find(|group| !ids.contains_key(&group.id)) {
        return Err(aborted(format!("rank {} sent no NCCL id for group {}", creator(missing), missing.id)));
    }
    // The ids of other processes' groups are not used and stay zero.
    Ok(groups.iter().map(|group| ids.get(&group.id).copied().unwrap_or(UniqueId([0; 128]))).collect())
}
