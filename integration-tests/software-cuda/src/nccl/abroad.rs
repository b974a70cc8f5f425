//! Communication of a process with the hub (see `hub`), for communicators with ranks in other processes.

use std::collections::HashMap;
use std::sync::{Arc, MutexGuard};
use std::time::{Duration, Instant};

use cudarc::nccl::sys::ncclResult_t;

use crate::nccl::data;
use crate::nccl::engine::Stage;
use crate::nccl::wire::{ExchangeId, HubConnection, HubEvent, HubMessage};
use crate::world::{OpKind, SoftwareMachine, State};

/// Result of a collective or message whose ranks are in several processes.
pub(crate) struct ExchangeResult {
    /// Why the ranks' calls do not match; `None` if they match.
    pub mismatch: Option<String>,
    /// The combined data for all ranks.
    pub bytes: Vec<u8>,
}

/// Sends the calls and data of this process's ranks to the hub. Sending may block, so the caller must not hold the
/// state's lock.
pub fn post(
    machine: &SoftwareMachine,
    hub: Option<&HubConnection>,
    exchange: ExchangeId,
    members: &[data::Member],
    ranks: usize,
) {
    let (mut calls, mut bytes) = (Vec::new(), Vec::new());
    for member in members {
        // An invalid read is already a finding. Other ranks get zeros, so they report only their own errors.
        let input =
            data::read_input(machine, member, ranks).unwrap_or_else(|| vec![0; data::sent_bytes(member, ranks)]);
        calls.push((member.rank, member.call, input.len()));
        bytes.extend_from_slice(&input);
    }
    if let Some(hub) = hub {
        hub.send(&HubMessage::Post { exchange, calls }, &bytes);
    }
}

/// Handles an event from the hub for this process's ranks of a clique (the ranks that share one unique id).
pub fn deliver(machine: &SoftwareMachine, clique: u64, event: HubEvent) {
    let mut state = machine.state();
    let known = state.comms.cliques.get_mut(&clique).expect("cliques are never removed");
    match event {
        HubEvent::ExchangeResult(exchange, result) => handle_result(machine, &mut state, clique, exchange, &result),
        HubEvent::Other(HubMessage::Full) => known.has_remote_ranks = known.ranks.iter().any(Option::is_none),
        HubEvent::Other(HubMessage::Refused) => known.error = Some(ncclResult_t::ncclInvalidUsage),
        HubEvent::Other(HubMessage::Busy) => state.peers_progressed = Instant::now(),
        HubEvent::Other(HubMessage::Call(direction)) => drop(known.called.insert(direction)),
        HubEvent::Other(HubMessage::HubLeft) => known.hub_has_left = true,
        HubEvent::End if known.hub_has_left => {}
        HubEvent::Other(HubMessage::Lost) | HubEvent::End => {
            known.error.get_or_insert(ncclResult_t::ncclRemoteError);
        }
        HubEvent::Other(_) => {}
    }
    machine.submitted.notify_all();
    machine.progressed.notify_all();
}

/// Stores a result for the parts that wait for it. Reports a mismatch now, not when the part executes, because another
/// rank may see the mismatch and abort before that.
fn handle_result(
    machine: &SoftwareMachine,
    state: &mut State,
    clique: u64,
    exchange: ExchangeId,
    result: &Arc<ExchangeResult>,
) {
    if let Some(mismatch) = &result.mismatch {
        machine.report_finding("collective-mismatch", mismatch, || mismatch.clone());
    }
    let own: HashMap<u64, usize> =
        state.comms.comms.iter().filter(|(_, c)| c.clique == clique).map(|(handle, c)| (*handle, c.rank)).collect();
    for stream in state.streams.values_mut() {
        let Some(OpKind::Nccl(group)) = stream.queue.front_mut().map(|o| &mut o.kind) else { continue };
        let Some(rank) = own.get(&group.comm) else { continue };
        for part in group.parts.iter_mut().filter(|p| ExchangeId::of(*rank, p.tag) == exchange) {
            if matches!(part.stage, Stage::Posted) {
                part.stage = Stage::Answered(result.clone());
                let comm = state.comms.comms.get_mut(&group.comm).filter(|_| result.mismatch.is_some());
                comm.into_iter().for_each(|comm| comm.error = Some(ncclResult_t::ncclInvalidUsage));
            }
        }
    }
    state.last_progress = Instant::now();
}

/// Interval at which a busy process notifies the processes with which it shares communicators.
const BUSY_EVERY: Duration = Duration::from_millis(500);

/// Notifies other processes that this process makes progress or compiles, so that they do not report a deadlock.
/// Releases the lock while it sends.
pub fn send_busy<'a>(
    machine: &'a SoftwareMachine,
    state: MutexGuard<'a, State>,
    busy_sent: &mut Instant,
    is_compiling: bool,
) -> MutexGuard<'a, State> {
    if busy_sent.elapsed() < BUSY_EVERY || !(is_compiling || state.last_progress.elapsed() < BUSY_EVERY) {
        return state;
    }
    *busy_sent = Instant::now();
    let shared = state.comms.cliques.values().filter(|clique| clique.has_remote_ranks && !clique.is_closing);
    let hubs: Vec<Arc<HubConnection>> = shared.filter_map(|clique| clique.hub.clone()).collect();
    drop(state);
    hubs.iter().for_each(|hub| hub.send(&HubMessage::Busy, &[]));
    machine.state()
}
