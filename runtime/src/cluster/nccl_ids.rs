//! What NCCL knows groups by, passed from the process of each group's first member to those of the others, over the control
//! plane.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;
use std::time::Instant;

use crossbeam_channel::Receiver;
use shardflow_actors::membership::Membership;
use shardflow_kernels::collective::Group;
use shardflow_kernels::cuda::nccl::UniqueId;
use shardflow_kernels::error::KernelError;

use super::save_agreement::Received;
use crate::session::process_map::ProcessMap;

/// Topic of these messages on the control plane.
pub(super) const TOPIC: u16 = 2;

/// A group's number and id, as they are sent.
const BYTES: usize = 4 + 128;

/// The ids of these groups, which are all of a plan's with several members; all processes call it once.
///
/// # Errors
/// [`KernelError::Unavailable`] without NCCL; [`KernelError::Aborted`] when an id does not come before the deadline, or the
/// session ends meanwhile.
pub(super) fn exchange(
    groups: &[Arc<Group>],
    process_map: &ProcessMap,
    membership: &Membership,
    heard: &Receiver<Received>,
    deadline: Instant,
) -> Result<Vec<UniqueId>, KernelError> {
    let aborted = |cause: String| KernelError::Aborted { cause };
    let maker = |group: &Group| process_map.process_of(group.ranks[0]);
    let mut ids: BTreeMap<u32, UniqueId> = BTreeMap::new();
    // All are sent something: NCCL is joined, within a time of its own, only when all have come as far.
    let mut told: BTreeMap<u32, Vec<u8>> = process_map.peers().map(|process| (process, Vec::new())).collect();
    for group in groups.iter().filter(|group| maker(group) == process_map.process) {
        let id = UniqueId::new()?;
        ids.insert(group.id, id);
        for process in process_map.processes_of(group).into_iter().filter(|p| *p != process_map.process) {
            told.entry(process).or_default().extend([&group.id.to_le_bytes()[..], &id.0].concat());
        }
    }
    for (process, bytes) in told {
        membership.send(process, TOPIC, bytes).map_err(|error| aborted(error.to_string()))?;
    }
    let joins = |group: &&Arc<Group>| process_map.processes_of(group).contains(&process_map.process);
    let wanted: Vec<&Arc<Group>> = groups.iter().filter(joins).collect();
    let mut late: BTreeSet<u32> = process_map.peers().collect();
    while let Some(from) = late.first().copied() {
        let Received { from: sender, bytes } = heard.recv_deadline(deadline).map_err(|error| {
            let cause = membership.first_cause().map(|first| first.to_string());
            aborted(cause.unwrap_or_else(|| format!("rank {from} sends no ids of NCCL's groups: {error}")))
        })?;
        late.remove(&sender);
        for entry in bytes.chunks_exact(BYTES) {
            let (number, id) = entry.split_at(4);
            let number = u32::from_le_bytes([number[0], number[1], number[2], number[3]]);
            // Only a group's own maker is believed.
            if let (Some(_), Ok(id)) = (wanted.iter().find(|g| g.id == number && maker(g) == sender), id.try_into()) {
                ids.insert(number, UniqueId(id));
            }
        }
    }
    if let Some(missing) = wanted.iter().find(|group| !ids.contains_key(&group.id)) {
        return Err(aborted(format!("rank {} sent no id of group {}", maker(missing), missing.id)));
    }
    // Of groups of other processes nothing is asked.
    Ok(groups.iter().map(|group| ids.get(&group.id).copied().unwrap_or(UniqueId([0; 128]))).collect())
}
