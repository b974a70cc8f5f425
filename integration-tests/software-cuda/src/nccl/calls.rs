//! NCCL's collectives, messages and groups.
//!
//! A thread collects the calls of nested groups until the outermost group ends. Then the calls on the same communicator
//! and the same stream become one operation.
#![allow(unsafe_code, non_snake_case)]

use std::cell::RefCell;
use std::collections::HashMap;
use std::ffi::{c_int, c_void};

use cudarc::nccl::sys::{cudaStream_t, ncclComm_t, ncclDataType_t, ncclRedOp_t, ncclResult_t};

use crate::export::exports;
use crate::nccl::data::element_bytes;
use crate::nccl::engine::{Call, CallKind, Group, Part, Stage, Tag, defer};
use crate::world::{OpKind, State, machine};

/// The calls that a thread has made in an open group.
#[derive(Default)]
struct Pending {
    depth: u32,
    calls: Vec<(u64, u64, Call)>,
    /// For each clique (ranks that share one unique id), the rank and number of the last collective by this thread.
    last: HashMap<u64, (usize, u64)>,
}

thread_local!(static PENDING: RefCell<Pending> = RefCell::default());

/// Whether the calling thread is inside a group.
pub fn in_group() -> bool {
    PENDING.with_borrow(|p| p.depth > 0)
}

fn accept(handle: ncclComm_t, stream: cudaStream_t, call: Call) -> Result<(), ncclResult_t> {
    let mut state = machine().state();
    let found = super::comm(&state, handle)?;
    let (device, ranks) = (found.device, state.comms.cliques[&found.clique].ranks.len());
    match super::status_of(&state, found) {
        ncclResult_t::ncclSuccess => {}
        // A communicator refuses calls while it is not ready or has a call in progress.
        ncclResult_t::ncclInProgress => {
            let key = format!("{handle:?} in progress");
            machine().report_finding("misuse", &key, || {
                "NCCL is called before the communicator's last call has finished".into()
            });
            return Err(ncclResult_t::ncclInvalidArgument);
        }
        error => return Err(error),
    }
    let stream = state.stream(stream as u64).map_err(|_| ncclResult_t::ncclUnhandledCudaError)?;
    let reduces = matches!(call.kind, CallKind::AllReduce | CallKind::Reduce | CallKind::ReduceScatter);
    let is_typed = element_bytes(call.dtype).is_some() && (!reduces || (call.dtype != 6 && call.dtype < 10));
    let is_known = !reduces || call.reduction < 5;
    if state.streams[&stream].device != device || !(0..ranks as i32).contains(&call.peer) || !is_typed || !is_known {
        return Err(ncclResult_t::ncclInvalidArgument);
    }
    PENDING.with_borrow_mut(|pending| {
        if pending.depth > 0 {
            pending.calls.push((handle as u64, stream, call));
            return Ok(());
        }
        issue(&mut state, pending, vec![(handle as u64, stream, call)])
    })
}

/// Submits one operation for each pair of communicator and stream. Operations are in the order of their first calls.
fn issue(state: &mut State, pending: &mut Pending, calls: Vec<(u64, u64, Call)>) -> Result<(), ncclResult_t> {
    let is_alone = calls.len() == 1;
    let mut groups: Vec<(u64, u64, Vec<Part>)> = Vec::new();
    for (handle, stream, call) in calls {
        let (tag, broken) = state.comms.tag(handle, &call);
        if let Some((pair, broken)) = broken {
            // Report each pair of communicators once, because all later calls of the pair are also out of order.
            machine().report_finding("collective-order", &format!("{pair:?}"), || broken);
        }
        let (clique, rank) = (state.comms.comms[&handle].clique, state.comms.comms[&handle].rank);
        if let Tag::Collective(number) = tag {
            let before = pending.last.insert(clique, (rank, number));
            // Only a blocking call can wait for a call that its own thread has not issued yet.
            if is_alone
                && state.comms.comms[&handle].is_blocking
                && before.is_some_and(|(other, n)| other != rank && n == number)
            {
                machine().report_finding("ungrouped", &format!("{clique}"), || {
                    format!("one thread issues collective {number} of two ranks of a communicator outside of a group")
                });
            }
        }
        let part = Part { call, tag, stage: Stage::Waiting };
        match groups.iter_mut().find(|g| g.0 == handle && g.1 == stream) {
            Some(group) => group.2.push(part),
            None => groups.push((handle, stream, vec![part])),
        }
    }
    let mut answer = Ok(());
    for (comm, stream, parts) in groups {
        let rank = state.comms.comms[&comm].rank;
        let names: Vec<String> =
            parts.iter().map(|p| format!("{:?} of {} ({:?})", p.call.kind, p.call.count, p.tag)).collect();
        let name = format!("NCCL rank {rank} of {:#x}: {}", state.comms.comms[&comm].clique, names.join(" and "));
        let group = Group { comm, parts, started: None };
        if state.comms.comms[&comm].is_blocking {
            state.submit(machine(), stream, OpKind::Nccl(Box::new(group)), name);
        } else {
            defer(machine(), state, stream, group, name);
            answer = Err(ncclResult_t::ncclInProgress);
        }
    }
    answer
}

fn collective(kind: CallKind, send: *const c_void, receive: *mut c_void, count: usize, dtype: ncclDataType_t) -> Call {
    Call { kind, send: send as usize, receive: receive as usize, count, dtype: dtype as u32, reduction: 0, peer: 0 }
}

exports! { nccl;
    fn ncclGroupStart() -> ncclResult_t {
        PENDING.with_borrow_mut(|pending| pending.depth += 1);
        Ok(())
    }

    fn ncclGroupEnd() -> ncclResult_t {
        PENDING.with_borrow_mut(|pending| {
            pending.depth = pending.depth.checked_sub(1).ok_or(ncclResult_t::ncclInvalidUsage)?;
            if pending.depth == 0 {
                let calls = std::mem::take(&mut pending.calls);
                return issue(&mut machine().state(), pending, calls);
            }
            Ok(())
        })
    }

    fn ncclAllReduce(
        send: *const c_void,
        receive: *mut c_void,
        count: usize,
        dtype: ncclDataType_t,
        reduction: ncclRedOp_t,
        comm: ncclComm_t,
        stream: cudaStream_t,
    ) -> ncclResult_t {
        let call = collective(CallKind::AllReduce, send, receive, count, dtype);
        accept(comm, stream, Call { reduction: reduction as u32, ..call })
    }

    fn ncclReduce(
        send: *const c_void,
        receive: *mut c_void,
        count: usize,
        dtype: ncclDataType_t,
        reduction: ncclRedOp_t,
        root: c_int,
        comm: ncclComm_t,
        stream: cudaStream_t,
    ) -> ncclResult_t {
        let call = collective(CallKind::Reduce, send, receive, count, dtype);
        accept(comm, stream, Call { reduction: reduction as u32, peer: root, ..call })
    }

    fn ncclReduceScatter(
        send: *const c_void,
        receive: *mut c_void,
        count: usize,
        dtype: ncclDataType_t,
        reduction: ncclRedOp_t,
        comm: ncclComm_t,
        stream: cudaStream_t,
    ) -> ncclResult_t {
        let call = collective(CallKind::ReduceScatter, send, receive, count, dtype);
        accept(comm, stream, Call { reduction: reduction as u32, ..call })
    }

    fn ncclAllGather(
        send: *const c_void,
        receive: *mut c_void,
        count: usize,
        dtype: ncclDataType_t,
        comm: ncclComm_t,
        stream: cudaStream_t,
    ) -> ncclResult_t {
        accept(comm, stream, collective(CallKind::AllGather, send, receive, count, dtype))
    }

    fn ncclBroadcast(
        send: *const c_void,
        receive: *mut c_void,
        count: usize,
        dtype: ncclDataType_t,
        root: c_int,
        comm: ncclComm_t,
        stream: cudaStream_t,
    ) -> ncclResult_t {
        let call = collective(CallKind::Broadcast, send, receive, count, dtype);
        accept(comm, stream, Call { peer: root, ..call })
    }

    fn ncclSend(
        send: *const c_void,
        count: usize,
        dtype: ncclDataType_t,
        peer: c_int,
        comm: ncclComm_t,
        stream: cudaStream_t,
    ) -> ncclResult_t {
        let call = collective(CallKind::Send, send, std::ptr::null_mut(), count, dtype);
        accept(comm, stream, Call { peer, ..call })
    }

    fn ncclRecv(
        receive: *mut c_void,
        count: usize,
        dtype: ncclDataType_t,
        peer: c_int,
        comm: ncclComm_t,
        stream: cudaStream_t,
    ) -> ncclResult_t {
        let call = collective(CallKind::Receive, std::ptr::null(), receive, count, dtype);
        accept(comm, stream, Call { peer, ..call })
    }
}
