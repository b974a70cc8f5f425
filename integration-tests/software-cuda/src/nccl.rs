//! NCCL's functions: communicators here, calls in `calls`.
//!
//! A unique id names a socket of the process that made it, where ranks of several processes meet: see `hub`.
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
use crate::nccl::wire::{Joining, Said, Wire};
use crate::nvrtc::lasting_text;
use crate::scheduler::host_wait;
use crate::world::{State, world};

fn comm(state: &State, handle: ncclComm_t) -> Result<&Comm, ncclResult_t> {
    let comm = state.comms.comms.get(&(handle as u64)).ok_or(ncclResult_t::ncclInvalidArgument)?;
    if comm.is_closed {
        world().find("misuse", &format!("comm {handle:?}"), || {
            format!("communicator of rank {} on device {} is used after it was given up", comm.rank, comm.device)
        });
        return Err(ncclResult_t::ncclInvalidArgument);
    }
    Ok(comm)
}

/// What is the matter with a communicator: nothing, not all ranks there or a call in progress, or an error.
fn condition(state: &State, comm: &Comm) -> ncclResult_t {
    let clique = &state.comms.cliques[&comm.clique];
    match comm.error.or(clique.error) {
        Some(error) => error,
        None if state.devices[comm.device].error.is_some() => ncclResult_t::ncclUnhandledCudaError,
        None if clique.is_full() && comm.deferred.is_empty() => ncclResult_t::ncclSuccess,
        None => ncclResult_t::ncclInProgress,
    }
}

/// Adds a rank.
fn join(id: &ncclUniqueId, ranks: c_int, rank: c_int, is_blocking: bool) -> Result<u64, ncclResult_t> {
    let mut state = world().state();
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
            let wire = Wire::connect(&name, handle).map_err(|_| ncclResult_t::ncclRemoteError)?;
            state.comms.ids.insert(name.clone(), handle);
            state.comms.cliques.insert(handle, Clique::of(ranks, wire));
            handle
        }
    };
    let members = &state.comms.cliques[&clique];
    if members.ranks.len() != ranks || members.ranks[rank].is_some() {
        return Err(ncclResult_t::ncclInvalidUsage);
    }
    if let Some(wire) = &members.wire {
        let (on, process) = ((world().config.node.clone(), device), std::process::id());
        wire.say(&Said::Join(Joining { clique: name, ranks, rank, device: on, process }), &[]);
    }
    let handle = state.handle();
    state.comms.add(handle, clique, rank, device, is_blocking);
    world().progressed.notify_all();
    Ok(handle)
}

/// As [`join`], and waits for the others if it may.
fn join_and_wait(id: &ncclUniqueId, ranks: c_int, rank: c_int, is_blocking: bool) -> Result<u64, ncclResult_t> {
    let handle = join(id, ranks, rank, is_blocking)?;
    if is_blocking && !calls::in_group() {
        wait_for_ranks(handle)?;
    }
    Ok(handle)
}

/// Waits until all ranks are there.
fn wait_for_ranks(handle: u64) -> Result<(), ncclResult_t> {
    let start = Instant::now();
    let mut state = world().state();
    loop {
        let found = &state.comms.comms[&handle];
        match condition(&state, found) {
            ncclResult_t::ncclInProgress => {}
            ncclResult_t::ncclSuccess => return Ok(()),
            error => return Err(error),
        }
        if found.is_closed || start.elapsed() > world().config.hang {
            return Err(ncclResult_t::ncclSystemError);
        }
        let wait = std::time::Duration::from_millis(20);
        state = world().progressed.wait_timeout(state, wait).unwrap_or_else(|e| e.into_inner()).0;
    }
}

/// Waits until a communicator has nothing left in queues.
fn flush(handle: u64) -> Result<(), ncclResult_t> {
    let state = world().state();
    let device = state.comms.comms[&handle].device;
    let failed = |_| ncclResult_t::ncclUnhandledCudaError;
    host_wait(world(), state, device, |s| !is_pending(s, handle)).map(drop).map_err(failed)
}

exports! { nccl;
    fn ncclGetVersion(version: *mut c_int) -> ncclResult_t {
        *version = world().config.nccl_version;
        Ok(())
    }

    fn ncclGetUniqueId(id: *mut ncclUniqueId) -> ncclResult_t {
        let handle = world().state().handle();
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
        // Only this field is read: callers of older versions pass a shorter structure.
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

    fn ncclCommGetAsyncError(asked: ncclComm_t, error: *mut ncclResult_t) -> ncclResult_t {
        let mut state = world().state();
        let found = condition(&state, comm(&state, asked)?);
        let is_over = engine::ask(world(), &mut state, asked as u64);
        *error = if is_over || found != ncclResult_t::ncclInProgress { condition(&state, comm(&state, asked)?) } else { found };
        Ok(())
    }

    fn ncclCommFinalize(finished: ncclComm_t) -> ncclResult_t {
        let is_blocking = comm(&world().state(), finished)?.is_blocking;
        if is_blocking { flush(finished as u64) } else { Ok(()) }
    }

    fn ncclCommDestroy(destroyed: ncclComm_t) -> ncclResult_t {
        comm(&world().state(), destroyed)?;
        let flushed = flush(destroyed as u64);
        world().state().comms.close(destroyed as u64, true);
        flushed
    }

    fn ncclCommAbort(aborted: ncclComm_t) -> ncclResult_t {
        // NVIDIA's waits for its proxy threads, and for what the device does.
        std::thread::sleep(world().config.abort);
        let mut state = world().state();
        let (rank, device) = comm(&state, aborted).map(|c| (c.rank, c.device))?;
        let is_excused = state.was_injected || state.is_stuck || condition(&state, comm(&state, aborted)?) != ncclResult_t::ncclSuccess;
        let dropped = abort(&mut state, aborted as u64);
        state.comms.close(aborted as u64, false);
        state.is_stuck = false;
        world().submitted.notify_all();
        world().progressed.notify_all();
        if dropped > 0 && !is_excused {
            world().find("aborted", &format!("{rank}"), || {
                format!("communicator of rank {rank} on device {device} is aborted with {dropped} operations in queues")
            });
        }
        Ok(())
    }

    fn ncclCommCount(asked: ncclComm_t, count: *mut c_int) -> ncclResult_t {
        let state = world().state();
        *count = state.comms.cliques[&comm(&state, asked)?.clique].ranks.len() as c_int;
        Ok(())
    }

    fn ncclCommUserRank(asked: ncclComm_t, rank: *mut c_int) -> ncclResult_t {
        *rank = comm(&world().state(), asked)?.rank as c_int;
        Ok(())
    }

    fn ncclCommCuDevice(asked: ncclComm_t, device: *mut c_int) -> ncclResult_t {
        *device = comm(&world().state(), asked)?.device as c_int;
        Ok(())
    }
}

plain_exports! { nccl;
    fn ncclGetErrorString(result: ncclResult_t) -> *const c_char {
        lasting_text(&format!("{result:?}"))
    }

    fn ncclGetLastError(asked: ncclComm_t) -> *const c_char {
        let state = world().state();
        let text = match state.comms.comms.get(&(asked as u64)) {
            Some(found) if state.comms.cliques[&found.clique].error == Some(ncclResult_t::ncclRemoteError) => {
                "another rank was given up, or its process is gone"
            }
            Some(found) if state.comms.cliques[&found.clique].error.is_some() => "two ranks are on one device",
            Some(found) if found.error.is_some() => "the ranks' calls do not match",
            _ => "",
        };
        lasting_text(text)
    }
}
