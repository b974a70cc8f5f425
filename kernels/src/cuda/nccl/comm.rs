//! One member's communicator.
#![allow(unsafe_code)]

use std::collections::VecDeque;
use std::ffi::{c_int, c_void};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread;
use std::time::{Duration, Instant};

use cudarc::nccl::sys::{ncclComm_t, ncclDataType_t, ncclRedOp_t, ncclUniqueId};

use super::GroupMember;
use super::api::{Api, Config, IN_PROGRESS, SUCCESS};
use crate::collective::ReduceOp;
use crate::cuda::context::{Context, Raw};
use crate::cuda::progress::Calls;
use crate::cuda::raw_stream::RawStream;
use crate::error::KernelError;
use crate::tensor::DType;

/// How often a communicator that is being made, or ended, is asked.
const STEP: Duration = Duration::from_micros(200);

/// See the module. What is not ended by [`finalize`] is broken off when it is dropped.
#[derive(Debug)]
pub(super) struct Comm {
    api: ApiRef,
    /// `None` after its end. Held while NCCL is called (NCCL-1).
    handle: Mutex<Option<Raw<ncclComm_t>>>,
    /// Not the GPU: a poller, which is a part of that, may be the last to let a communicator go.
    context: Arc<Context>,
    place: String,
    made: Mutex<Made>,
}

/// The member's calls, counted from 1.
#[derive(Debug, Default)]
struct Made {
    calls: u64,
    /// Those that may not be over.
    open: VecDeque<Open>,
}

/// A call, and where it is: on a stream, as that one's call of this number.
#[derive(Debug)]
struct Open {
    call: u64,
    stream: Arc<Calls>,
    number: u32,
}

#[derive(Clone, Copy)]
struct ApiRef(&'static Api);

impl std::fmt::Debug for ApiRef {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("nccl")
    }
}

/// What NCCL does itself.
#[derive(Clone, Copy, Debug)]
pub(super) enum Kind {
    AllReduce(ReduceOp),
    ReduceScatter(ReduceOp),
    AllGather,
    /// By the root's index.
    Broadcast(usize),
}

/// One message of a group of them.
#[derive(Clone, Copy, Debug)]
pub(super) struct Transfer {
    pub(super) sends: bool,
    /// Index of the other member.
    pub(super) peer: usize,
    pub(super) address: u64,
    pub(super) elements: usize,
}

fn data_type(dtype: DType) -> ncclDataType_t {
    match dtype {
        DType::F32 => ncclDataType_t::ncclFloat32,
        DType::I32 => ncclDataType_t::ncclInt32,
        DType::BF16 => ncclDataType_t::ncclBfloat16,
    }
}

fn reduction(op: ReduceOp) -> ncclRedOp_t {
    match op {
        ReduceOp::Sum => ncclRedOp_t::ncclSum,
        ReduceOp::Max => ncclRedOp_t::ncclMax,
    }
}

/// A new id.
pub(super) fn unique_id() -> Result<[u8; 128], KernelError> {
    let api = Api::get()?;
    let mut id = ncclUniqueId { internal: [0; 128] };
    // SAFETY: writes an id to a local.
    api.check(unsafe { (api.unique_id)(&mut id) }, "ncclGetUniqueId", "nccl")?;
    Ok(id.internal.map(|byte| byte as u8))
}

/// Makes the communicators of this process's members of one group, all at once.
pub(super) fn join(seats: &[&GroupMember], deadline: Instant, within: Duration) -> Result<Vec<Comm>, KernelError> {
    let api = Api::get()?;
    let mut comms = Vec::new();
    let grouped = grouped(api, "nccl", || {
        for seat in seats {
            let (n, member) = (seat.group.ranks.len() as c_int, seat.member as c_int);
            let rank = seat.group.ranks.get(seat.member).copied().unwrap_or(usize::MAX);
            let place = format!("nccl, group {}, device {rank} on {}", seat.group.id, seat.gpu.place());
            seat.gpu.context().bind()?;
            let id = ncclUniqueId { internal: seat.id.0.map(|byte| byte as _) };
            let (mut config, mut handle) = (Config::not_blocking(), Box::new(std::ptr::null_mut()));
            // SAFETY: the handle's place is kept until the group has ended, which is when NCCL has written it.
            let code = unsafe { (api.init)(&mut *handle, n, id, member, &mut config) };
            api.check(code, "ncclCommInitRankConfig", &place)?;
            let (context, made) = (seat.gpu.context().clone(), Mutex::default());
            comms.push((handle, Comm { api: ApiRef(api), handle: Mutex::new(None), context, place, made }));
        }
        Ok(())
    });
    // NCCL has written the handles of those that it has begun to make.
    let comm = |(handle, mut comm): (Box<ncclComm_t>, Comm)| {
        let made = (!handle.is_null()).then_some(Raw(*handle));
        *comm.handle.get_mut().unwrap_or_else(PoisonError::into_inner) = made;
        comm
    };
    let comms: Vec<Comm> = comms.into_iter().map(comm).collect();
    grouped?;
    // A communicator that is dropped before it is made is broken off.
    for comm in &comms {
        while !comm.is_settled()? {
            if Instant::now() >= deadline {
                return Err(comm.late("ncclCommInitRankConfig", within));
            }
            thread::sleep(STEP);
        }
    }
    Ok(comms)
}

/// Calls of NCCL as one.
fn grouped(api: &Api, place: &str, calls: impl FnOnce() -> Result<(), KernelError>) -> Result<(), KernelError> {
    // SAFETY: needs nothing.
    api.check(unsafe { (api.group_start)() }, "ncclGroupStart", place)?;
    let called = calls();
    // SAFETY: closes what was opened, whatever happened between.
    let ended = api.check(unsafe { (api.group_end)() }, "ncclGroupEnd", place);
    called.and(ended)
}

impl Comm {
    fn check(&self, code: u32, call: &'static str) -> Result<(), KernelError> {
        self.api.0.check(code, call, &self.place)
    }

    /// It was ended, or broken off.
    fn closed(&self) -> KernelError {
        KernelError::Aborted { cause: format!("{} has ended", self.place) }
    }

    /// The call did not end in time.
    pub(super) fn late(&self, call: &'static str, within: Duration) -> KernelError {
        let text = format!(
            "not all members came within {} s: look whether every process of the launch is alive and reaches the others; \
             NCCL_DEBUG=INFO tells more",
            within.as_secs()
        );
        let (place, name) = (self.place.clone(), "late".to_owned());
        KernelError::Cuda { place, call, code: IN_PROGRESS, name, text }
    }

    /// Whether NCCL is through with the last call, as far as the host is concerned.
    pub(super) fn is_settled(&self) -> Result<bool, KernelError> {
        let handle = self.handle.lock().unwrap_or_else(PoisonError::into_inner);
        let Some(comm) = *handle else { return Ok(true) };
        let mut state = SUCCESS;
        // SAFETY: a live communicator; writes a code to a local.
        self.check(unsafe { (self.api.0.async_error)(comm.0, &mut state) }, "ncclCommGetAsyncError")?;
        self.check(state, "ncclCommGetAsyncError")?;
        Ok(state != IN_PROGRESS)
    }

    fn made(&self) -> MutexGuard<'_, Made> {
        self.made.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Notes that the call which the stream was told of last is one of this communicator.
    pub(super) fn note(&self, lane: &RawStream) {
        let mut made = self.made();
        made.calls += 1;
        made.open.retain(|open| !open.stream.has_passed(open.number));
        let call = made.calls;
        if let Some(stream) = lane.calls() {
            made.open.push_back(Open { call, stream: stream.clone(), number: stream.last() });
        }
    }

    /// The first call that a stream of the member's has come to and has not left.
    pub(super) fn waits_in(&self) -> Option<u64> {
        let waits = |open: &&Open| open.stream.has_reached(open.number) && !open.stream.has_passed(open.number);
        self.made().open.iter().find(waits).map(|open| open.call)
    }

    /// Whether the member's stream has come to the call, as far as is known: without words to tell from (PROGRESS-1) it
    /// has as soon as the call is made.
    pub(super) fn has_reached(&self, call: u64) -> bool {
        let made = self.made();
        let is_ahead = |open: &Open| open.call == call && !open.stream.has_reached(open.number);
        call <= made.calls && !made.open.iter().any(is_ahead)
    }

    /// Puts one of NCCL's own calls on the stream. `elements` are those of one member's part.
    pub(super) fn call(
        &self,
        kind: Kind,
        x: u64,
        y: u64,
        elements: usize,
        dtype: DType,
        lane: &RawStream,
    ) -> Result<(), KernelError> {
        let handle = self.handle.lock().unwrap_or_else(PoisonError::into_inner);
        let Some(comm) = handle.map(|handle| handle.0) else { return Err(self.closed()) };
        let (api, dtype, stream) = (self.api.0, data_type(dtype), lane.stream().0.cast::<c_void>());
        let (x, y) = (x as *const c_void, y as *mut c_void);
        // SAFETY: live communicator and stream of one context; memory of the right size that lives until the stream has done
        // the call, which whoever binds the launch has checked.
        let (code, name) = unsafe {
            match kind {
                Kind::AllReduce(op) => {
                    ((api.all_reduce)(x, y, elements, dtype, reduction(op), comm, stream), "ncclAllReduce")
                }
                Kind::ReduceScatter(op) => {
                    ((api.reduce_scatter)(x, y, elements, dtype, reduction(op), comm, stream), "ncclReduceScatter")
                }
                Kind::AllGather => ((api.all_gather)(x, y, elements, dtype, comm, stream), "ncclAllGather"),
                Kind::Broadcast(root) => {
                    ((api.broadcast)(x, y, elements, dtype, root as c_int, comm, stream), "ncclBroadcast")
                }
            }
        };
        self.check(code, name)
    }

    /// Puts messages on the stream, all as one, so that no order among them matters but that between one pair. Elements
    /// without a type are bytes.
    pub(super) fn transfer(
        &self,
        transfers: &[Transfer],
        dtype: Option<DType>,
        lane: &RawStream,
    ) -> Result<(), KernelError> {
        let handle = self.handle.lock().unwrap_or_else(PoisonError::into_inner);
        let Some(comm) = handle.map(|handle| handle.0) else { return Ok(()) };
        let dtype = dtype.map_or(ncclDataType_t::ncclUint8, data_type);
        let (api, stream) = (self.api.0, lane.stream().0.cast::<c_void>());
        grouped(api, &self.place, || {
            for transfer in transfers.iter().filter(|transfer| transfer.elements > 0) {
                let (n, peer) = (transfer.elements, transfer.peer as c_int);
                // SAFETY: as in `call`.
                let (code, name) = unsafe {
                    if transfer.sends {
                        ((api.send)(transfer.address as *const c_void, n, dtype, peer, comm, stream), "ncclSend")
                    } else {
                        ((api.receive)(transfer.address as *mut c_void, n, dtype, peer, comm, stream), "ncclRecv")
                    }
                };
                self.check(code, name)?;
            }
            Ok(())
        })
    }

    /// Breaks it off: kernels of it that wait for others end.
    pub(super) fn abort(&self) {
        let taken = self.handle.lock().unwrap_or_else(PoisonError::into_inner).take();
        if let Some(comm) = taken
            && self.context.bind_to_drop()
        {
            // SAFETY: ours, and used no more. What it says no longer matters.
            let _ = unsafe { (self.api.0.abort)(comm.0) };
        }
    }
}

impl Drop for Comm {
    fn drop(&mut self) {
        self.abort();
    }
}

/// Ends communicators in order: what is still under way is done first. Those that do not end in time are broken off.
pub(super) fn finalize(comms: &[&Arc<Comm>], within: Duration) {
    let deadline = Instant::now() + within;
    let each = |what: &dyn Fn(&Comm, ncclComm_t) -> bool| {
        for comm in comms {
            let handle = *comm.handle.lock().unwrap_or_else(PoisonError::into_inner);
            let went = handle.is_none_or(|handle| comm.context.bind_to_drop() && what(comm, handle.0));
            if !went {
                comm.abort();
            }
        }
    };
    each(&|comm, handle| {
        // SAFETY: a live communicator.
        let code = unsafe { (comm.api.0.finalize)(handle) };
        code == SUCCESS || code == IN_PROGRESS
    });
    each(&|comm, _| {
        loop {
            match comm.is_settled() {
                Ok(true) => return true,
                Ok(false) if Instant::now() < deadline => thread::sleep(STEP),
                _ => return false,
            }
        }
    });
    each(&|comm, handle| {
        // SAFETY: finalized, and used no more.
        let code = unsafe { (comm.api.0.destroy)(handle) };
        *comm.handle.lock().unwrap_or_else(PoisonError::into_inner) = None;
        code == SUCCESS || code == IN_PROGRESS
    });
}
