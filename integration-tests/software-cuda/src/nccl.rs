//! NCCL's functions for communicators. Collectives and messages are in `calls`.
//!
//! A unique id names a socket of the process that created the id. All processes connect to this socket; see `hub`.
#![allow(unsafe_code, non_snake_case)]

pub mod abroad;
pub mod calls;
pub mod data;
pub mod engine;
pub mod hub;
pub mod wire;

use std::ffi::{c_char, c_int};
use std::time::Instant;

use cudarc::nccl::sys::{ncclComm_t, ncclConfig_t, ncclResult_t, ncclUniqueId};

use crate::export::{exports, plain_exports};
use crate::nccl::engine::{Clique, Comm, abort, is_pending};
use crate::nccl::wire::{HubConnection, HubMessage, JoinRequest};
use crate::nvrtc::static_text;
use crate::scheduler::host_wait;
use crate::world::{State, machine};

fn comm(state: &State, handle: ncclComm_t) -> Result<&Comm, ncclResult_t> {
    let comm = state.comms.comms.get(&(handle as u64)).ok_or(ncclResult_t::ncclInvalidArgument)?;
    if comm.is_closed {
        machine().report_finding("misuse", &format!("comm {handle:?}"), || {
            format!("communicator of rank {} on device {} is used after it was closed", comm.rank, comm.device)
        });
        return Err(ncclResult_t::ncclInvalidArgument);
    }
    Ok(comm)
}

/// Returns a communicator's status: success, an error, or "in progress" if ranks are missing or calls are deferred.
fn status_of(state: &State, comm: &Comm) -> ncclResult_t {
    let clique = &state.comms.cliques[&comm.clique];
    match comm.error.or(clique.error) {
        Some(error) => error,
        None if state.devices[comm.device].error.is_some() => ncclResult_t::ncclUnhandledCudaError,
        None if clique.is_full() && comm.deferred.is_empty() => ncclResult_t::ncclSuccess,
        None => ncclResult_t::ncclInProgress,
    }
}

/// Adds a rank to the communicator with this id.
fn join(id: &ncclUniqueId, ranks: c_int, rank: c_int, is_blocking: bool) -> Result<u64, ncclResult_t> {
    let mut state = machine().state();
    let device = state.device().map_err(|_| ncclResult_t::ncclUnhandledCudaError)?;
    let (ranks, rank) = (ranks.max(0) as usize, usize::try_from(rank).unwrap_or(usize::MAX));
    if rank >= ranks {
        return Err(ncclResult_t::ncclInvalidArgument);
    }
    let name = wire::name_of(id);
    let clique = match state.comms.ids.get(&name) {
        Some(clique) => *clique,
        None => {
            let handle = state.handle();
            let hub = HubConnection::connect(&name, handle).map_err(|_| ncclResult_t::ncclRemoteError)?;
            state.comms.ids.insert(name.clone(), handle);
            state.comms.cliques.insert(handle, Clique::of(ranks, hub));
            handle
        }
    };
    let members = &state.comms.cliques[&clique];
    if members.ranks.len() != ranks || members.ranks[rank].is_some() {
        return Err(ncclResult_t::ncclInvalidUsage);
    }
    if let Some(hub) = &members.hub {
        let (on, process) = ((machine().config.node.clone(), device), std::process::id());
        hub.send(&HubMessage::Join(JoinRequest { clique: name, ranks, rank, device: on, process }), &[]);
    }
    let handle = state.handle();
    state.comms.add(handle, clique, rank, device, is_blocking);
    machine().progressed.notify_all();
    Ok(handle)
}

/// Adds a rank. Also waits for the other ranks if the communicator is blocking and no group is open.
fn join_and_wait(id: &ncclUniqueId, ranks: c_int, rank: c_int, is_blocking: bool) -> Result<u64, ncclResult_t> {
    let handle = join(id, ranks, rank, is_blocking)?;
    if is_blocking && !calls::in_group() {
        wait_for_ranks(handle)?;
    }
    Ok(handle)
}

/// Waits until all ranks have joined.
fn wait_for_ranks(handle: u64) -> Result<(), ncclResult_t> {
    let start = Instant::now();
    let mut state = machine().state();
    loop {
        let found = &state.comms.comms[&handle];
        match status_of(&state, found) {
            ncclResult_t::ncclInProgress => {}
            ncclResult_t::ncclSuccess => return Ok(()),
            error => return Err(error),
        }
        if found.is_closed || start.elapsed() > machine().config.hang {
            return Err(ncclResult_t::ncclSystemError);
        }
        let wait = std::time::Duration::from_millis(20);
        state = machine().progressed.wait_timeout(state, wait).unwrap_or_else(|e| e.into_inner()).0;
    }
}

/// Waits until a communicator has no queued operations.
fn flush(handle: u64) -> Result<(), ncclResult_t> {
    let state = machine().state();
    let device = state.comms.comms[&handle].device;
    let failed = |_| ncclResult_t::ncclUnhandledCudaError;
    host_wait(machine(), state, device, |s| !is_pending(s, handle)).map(drop).map_err(failed)
}

exports! { nccl;
    fn ncclGetVersion(version: *mut c_int) -> ncclResult_t {
        *version = machine().config.nccl_version;
        Ok(())
    }

    fn ncclGetUniqueId(id: *mut ncclUniqueId) -> ncclResult_t {
        let handle = machine().state().handle();
        *id = wire::id_of(&hub::new_name(handle).map_err(|_| ncclResult_t::ncclSystemError)?);
        Ok(())
    }

    fn ncclCommInitRank(out: *mut ncclComm_t, ranks: c_int, id: ncclUniqueId, rank: c_int) -> ncclResult_t {
        *out = join_and_wait(&id, ranks, rank, true)? as ncclComm_t;
        Ok(())
    }

    fn ncclCommInitRankConfig(
        out: *mut ncclComm_t,
        ranks: c_int,
        id: ncclUniqueId,
        rank: c_int,
        config: *mut ncclConfig_t,
    ) -> ncclResult_t {
        // Read only this field, because callers of older versions pass a shorter structure.
        let is_blocking = config.is_null() || (&raw const (*config).blocking).read() != 0;
        *out = join_and_wait(&id, ranks, rank, is_blocking)? as ncclComm_t;
        if is_blocking { Ok(()) } else { Err(ncclResult_t::ncclInProgress) }
    }

    fn ncclCommInitAll(out: *mut ncclComm_t, count: c_int, devices: *const c_int) -> ncclResult_t {
        let before = crate::world::current_device();
        let mut id = ncclUniqueId { internal: [0; 128] };
        ncclGetUniqueId(&mut id);
        for rank in 0..count {
            let device = if devices.is_null() { rank } else { *devices.add(rank as usize) };
            crate::world::set_current_device(Some(device as usize));
            let joined = join(&id, count, rank, true);
            crate::world::set_current_device(before);
            *out.add(rank as usize) = joined? as ncclComm_t;
        }
        wait_for_ranks(*out as u64)
    }

    fn ncclCommGetAsyncError(queried: ncclComm_t, error: *mut ncclResult_t) -> ncclResult_t {
        let mut state = machine().state();
        let found = status_of(&state, comm(&state, queried)?);
        let is_done = engine::poll_calls(machine(), &mut state, queried as u64);
        let is_current = is_done || found != ncclResult_t::ncclInProgress;
        *error = if is_current { status_of(&state, comm(&state, queried)?) } else { found };
        Ok(())
    }

    fn ncclCommFinalize(finished: ncclComm_t) -> ncclResult_t {
        let is_blocking = comm(&machine().state(), finished)?.is_blocking;
        if is_blocking { flush(finished as u64) } else { Ok(()) }
    }

    fn ncclCommDestroy(destroyed: ncclComm_t) -> ncclResult_t {
        comm(&machine().state(), destroyed)?;
        let flushed = flush(destroyed as u64);
        machine().state().comms.close(destroyed as u64, true);
        flushed
    }

    fn ncclCommAbort(aborted: ncclComm_t) -> ncclResult_t {
        // NVIDIA's implementation takes time here: it waits for its proxy threads and for running work.
        std::thread::sleep(machine().config.abort);
        let mut state = machine().state();
        let (rank, device) = comm(&state, aborted).map(|c| (c.rank, c.device))?;
        let is_healthy = status_of(&state, comm(&state, aborted)?) == ncclResult_t::ncclSuccess;
        let is_excused = state.was_injected || state.is_stuck || !is_healthy;
        let dropped = abort(&mut state, aborted as u64);
        state.comms.close(aborted as u64, false);
        state.is_stuck = false;
        machine().submitted.notify_all();
        machine().progressed.notify_all();
        if dropped > 0 && !is_excused {
            machine().report_finding("aborted", &format!("{rank}"), || {
                format!("communicator of rank {rank} on device {device} is aborted with {dropped} queued operations")
            });
        }
        Ok(())
    }

    fn ncclCommCount(queried: ncclComm_t, count: *mut c_int) -> ncclResult_t {
        let state = machine().state();
        *count = state.comms.cliques[&comm(&state, queried)?.clique].ranks.len() as c_int;
        Ok(())
    }

    fn ncclCommUserRank(queried: ncclComm_t, rank: *mut c_int) -> ncclResult_t {
        *rank = comm(&machine().state(), queried)?.rank as c_int;
        Ok(())
    }

    fn ncclCommCuDevice(queried: ncclComm_t, device: *mut c_int) -> ncclResult_t {
        *device = comm(&machine().state(), queried)?.device as c_int;
        Ok(())
    }
}

plain_exports! { nccl;
    fn ncclGetErrorString(result: ncclResult_t) -> *const c_char {
        static_text(&format!("{result:?}"))
    }

    fn ncclGetLastError(queried: ncclComm_t) -> *const c_char {
        let state = machine().state();
        let text = match state.comms.comms.get(&(queried as u64)) {
            Some(found) if state.comms.cliques[&found.clique].error == Some(ncclResult_t::ncclRemoteError) => {
                "another rank was aborted or destroyed, or its process has ended"
            }
            Some(found) if state.comms.cliques[&found.clique].error.is_some() => {
                "two ranks have the same device or the same rank, or were given different rank counts"
            }
            Some(found) if found.error.is_some() => "the ranks' calls do not match",
            _ => "",
        };
        static_text(text)
    }
}
