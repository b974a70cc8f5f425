//! The NCCL communicator of one group member.
#![allow(unsafe_code)]

use std::collections::VecDeque;
use std::ffi::{c_int, c_void};
use std::sync::Arc;
use std::thread;
use std::time::{Duration, Instant};

use cudarc::nccl::sys::{ncclComm_t, ncclDataType_t, ncclRedOp_t, ncclUniqueId};
use parking_lot::Mutex;

use super::api::{Api, Config, IN_PROGRESS, SUCCESS};
use crate::collective::{Group, ReduceOp};
use crate::cuda::context::{Context, Raw};
use crate::cuda::gpu::Gpu;
use crate::cuda::progress::CallProgress;
use crate::cuda::raw_stream::RawStream;
use crate::error::{KernelError, Result};
use crate::tensor::DType;

/// Poll interval while a communicator is created or finalized.
const POLL_INTERVAL: Duration = Duration::from_micros(200);

/// The `ncclUniqueId` of a group. One member creates it, and all members receive it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct UniqueId(pub [u8; 128]);

impl UniqueId {
    /// Creates a new id.
    ///
    /// # Errors
    /// [`KernelError::Unavailable`] if NCCL is missing; [`KernelError::Cuda`] if NCCL finds no network interface.
    pub fn new() -> Result<Self> {
        let api = Api::get()?;
        let mut id = ncclUniqueId { internal: [0; 128] };
        // SAFETY: the call writes an id to a local.
        api.check(unsafe { (api.unique_id)(&mut id) }, "ncclGetUniqueId", "nccl")?;
        Ok(Self(id.internal.map(|byte| byte as u8)))
    }
}

/// One member of one group.
#[derive(Clone, Debug)]
pub struct GroupMember {
    /// The group.
    pub group: Arc<Group>,
    /// Index of the member.
    pub member: usize,
    /// The GPU of the member's device. No two members of a group share a GPU.
    pub gpu: Arc<Gpu>,
    /// The group's id.
    pub id: UniqueId,
}

/// A communicator. Its `drop` aborts it, except after [`finalize`].
#[derive(Debug)]
pub(super) struct Comm {
    api: &'static Api,
    /// `None` after the communicator has ended. Locked during NCCL calls (NCCL-1).
    handle: Mutex<Option<Raw<ncclComm_t>>>,
    /// Stored instead of the `Gpu`, because the GPU's poller may drop the communicator, and must not drop its own GPU.
    context: Arc<Context>,
    place: String,
    call_log: Mutex<CallLog>,
}

/// The member's calls, counted from 1.
#[derive(Debug, Default)]
struct CallLog {
    calls: u64,
    /// Calls that may still be in progress.
    open: VecDeque<Open>,
}

/// A call of this communicator and its number among the calls of its stream.
#[derive(Debug)]
struct Open {
    call: u64,
    stream: Arc<CallProgress>,
    number: u32,
}

#[derive(Clone, Copy, Debug)]
pub(super) enum NcclCall {
    AllReduce(ReduceOp),
    ReduceScatter(ReduceOp),
    AllGather,
    /// A broadcast from the member with this index.
    Broadcast(usize),
}

#[derive(Clone, Copy, Debug)]
pub(super) struct Transfer {
    pub(super) sends: bool,
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

/// Creates the communicators of those members of one group that belong to this process, in one NCCL group call.
pub(super) fn join(memberships: &[&GroupMember], deadline: Instant, within: Duration) -> Result<Vec<Comm>> {
    let api = Api::get()?;
    let mut comms = Vec::new();
    let grouped = grouped(api, "nccl", || {
        for membership in memberships {
            let (n, member) = (membership.group.ranks.len() as c_int, membership.member as c_int);
            let rank = membership.group.ranks.iter().nth(membership.member).unwrap_or(usize::MAX);
            let place = format!("nccl, group {}, device {rank} on {}", membership.group.id, membership.gpu.place());
            membership.gpu.context.bind()?;
            let id = ncclUniqueId { internal: membership.id.0.map(|byte| byte as _) };
            let (mut config, mut handle) = (Config::non_blocking(), Box::new(std::ptr::null_mut()));
            // SAFETY: the box for the handle outlives the NCCL group. NCCL writes the handle before the group ends.
            let code = unsafe { (api.init)(&mut *handle, n, id, member, &mut config) };
            api.check(code, "ncclCommInitRankConfig", &place)?;
            let (context, call_log) = (membership.gpu.context.clone(), Mutex::default());
            comms.push((handle, Comm { api, handle: Mutex::new(None), context, place, call_log }));
        }
        Ok(())
    });
    // NCCL has written the handles of all communicators that it began to create.
    let comm = |(handle, mut comm): (Box<ncclComm_t>, Comm)| {
        let created = (!handle.is_null()).then_some(Raw(*handle));
        *comm.handle.get_mut() = created;
        comm
    };
    let comms: Vec<Comm> = comms.into_iter().map(comm).collect();
    grouped?;
    // Dropping an incomplete communicator aborts it.
    for comm in &comms {
        while !comm.is_settled()? {
            if Instant::now() >= deadline {
                return Err(comm.timeout_error("ncclCommInitRankConfig", within));
            }
            thread::sleep(POLL_INTERVAL);
        }
    }
    Ok(comms)
}

fn grouped(api: &Api, place: &str, calls: impl FnOnce() -> Result<()>) -> Result<()> {
    // SAFETY: the call has no preconditions.
    api.check(unsafe { (api.group_start)() }, "ncclGroupStart", place)?;
    let called = calls();
    // SAFETY: the call closes the group opened above, whether or not `calls` failed.
    let ended = api.check(unsafe { (api.group_end)() }, "ncclGroupEnd", place);
    called.and(ended)
}

impl Comm {
    fn check(&self, code: u32, call: &'static str) -> Result<()> {
        self.api.check(code, call, &self.place)
    }

    fn closed(&self) -> KernelError {
        KernelError::Aborted { cause: format!("the communicator of {} has ended", self.place) }
    }

    pub(super) fn timeout_error(&self, call: &'static str, within: Duration) -> KernelError {
        let text = format!(
            "not all members joined within {} s: check that all processes of the launch are alive and can reach \
             each other; set NCCL_DEBUG=INFO for details",
            within.as_secs()
        );
        let (place, name) = (self.place.clone(), "timeout".to_owned());
        KernelError::Cuda { place, call, code: IN_PROGRESS, name, text }
    }

    /// Whether the host part of the last call is complete.
    pub(super) fn is_settled(&self) -> Result<bool> {
        let locked = self.handle.lock();
        let Some(comm) = *locked else { return Ok(true) };
        let mut state = SUCCESS;
        // SAFETY: the communicator is live. The call writes a code to a local.
        self.check(unsafe { (self.api.async_error)(comm.0, &mut state) }, "ncclCommGetAsyncError")?;
        self.check(state, "ncclCommGetAsyncError")?;
        Ok(state != IN_PROGRESS)
    }

    pub(super) fn record_call(&self, stream: &RawStream) {
        let mut call_log = self.call_log.lock();
        call_log.calls += 1;
        call_log.open.retain(|open| !open.stream.has_passed(open.number));
        let call = call_log.calls;
        if let Some(progress) = &stream.call_progress {
            call_log.open.push_back(Open { call, stream: progress.clone(), number: progress.last() });
        }
    }

    /// The first call that a stream of this member has reached but not completed.
    pub(super) fn pending_call(&self) -> Option<u64> {
        let is_pending = |open: &&Open| open.stream.has_reached(open.number) && !open.stream.has_passed(open.number);
        self.call_log.lock().open.iter().find(is_pending).map(|open| open.call)
    }

    /// Returns whether the stream has reached the call. If the stream has no progress words (PROGRESS-1), returns
    /// whether the member has made the call.
    pub(super) fn has_reached(&self, call: u64) -> bool {
        let call_log = self.call_log.lock();
        let is_ahead = |open: &Open| open.call == call && !open.stream.has_reached(open.number);
        call <= call_log.calls && !call_log.open.iter().any(is_ahead)
    }

    /// Enqueues an NCCL collective on the stream. `elements` is the number of elements in one member's part.
    pub(super) fn call(
        &self,
        kind: NcclCall,
        x: u64,
        y: u64,
        elements: usize,
        dtype: DType,
        stream: &RawStream,
    ) -> Result<()> {
        let locked = self.handle.lock();
        let Some(comm) = locked.map(|comm| comm.0) else { return Err(self.closed()) };
        let (api, dtype, handle) = (self.api, data_type(dtype), stream.handle.0.cast::<c_void>());
        let (x, y) = (x as *const c_void, y as *mut c_void);
        // SAFETY: communicator and stream are live and belong to one context; `Bound` has checked that the memory has
        // the right size and lives until the stream has run the call.
        let (code, name) = unsafe {
            match kind {
                NcclCall::AllReduce(op) => {
                    ((api.all_reduce)(x, y, elements, dtype, reduction(op), comm, handle), "ncclAllReduce")
                }
                NcclCall::ReduceScatter(op) => {
                    ((api.reduce_scatter)(x, y, elements, dtype, reduction(op), comm, handle), "ncclReduceScatter")
                }
                NcclCall::AllGather => ((api.all_gather)(x, y, elements, dtype, comm, handle), "ncclAllGather"),
                NcclCall::Broadcast(root) => {
                    ((api.broadcast)(x, y, elements, dtype, root as c_int, comm, handle), "ncclBroadcast")
                }
            }
        };
        self.check(code, name)
    }

    /// Enqueues messages as one NCCL group, so that the order of messages matters only within a pair of members. If
    /// `dtype` is `None`, the elements are bytes.
    pub(super) fn transfer(&self, transfers: &[Transfer], dtype: Option<DType>, stream: &RawStream) -> Result<()> {
        let locked = self.handle.lock();
        let Some(comm) = locked.map(|comm| comm.0) else { return Ok(()) };
        let dtype = dtype.map_or(ncclDataType_t::ncclUint8, data_type);
        let (api, handle) = (self.api, stream.handle.0.cast::<c_void>());
        grouped(api, &self.place, || {
            for transfer in transfers.iter().filter(|transfer| transfer.elements > 0) {
                let (n, peer) = (transfer.elements, transfer.peer as c_int);
                // SAFETY: as in `call`.
                let (code, name) = unsafe {
                    if transfer.sends {
                        ((api.send)(transfer.address as *const c_void, n, dtype, peer, comm, handle), "ncclSend")
                    } else {
                        ((api.receive)(transfer.address as *mut c_void, n, dtype, peer, comm, handle), "ncclRecv")
                    }
                };
                self.check(code, name)?;
            }
            Ok(())
        })
    }

    /// Aborts the communicator. This ends its kernels that wait for other members.
    pub(super) fn abort(&self) {
        let handle = self.handle.lock().take();
        if let Some(comm) = handle
            && self.context.bind_to_drop()
        {
            // SAFETY: the communicator is owned here and no longer used. Its status no longer matters.
            let _ = unsafe { (self.api.abort)(comm.0) };
        }
    }
}

impl Drop for Comm {
    fn drop(&mut self) {
        self.abort();
    }
}

/// Finalizes communicators, which waits for their pending work. Aborts those that do not finish in time.
pub(super) fn finalize(comms: &[&Arc<Comm>], within: Duration) {
    let deadline = Instant::now() + within;
    let each = |step: &dyn Fn(&Comm, ncclComm_t) -> bool| {
        for comm in comms {
            let handle = *comm.handle.lock();
            let succeeded = handle.is_none_or(|handle| comm.context.bind_to_drop() && step(comm, handle.0));
            if !succeeded {
                comm.abort();
            }
        }
    };
    each(&|comm, handle| {
        // SAFETY: the communicator is live.
        let code = unsafe { (comm.api.finalize)(handle) };
        code == SUCCESS || code == IN_PROGRESS
    });
    each(&|comm, _| {
        loop {
            match comm.is_settled() {
                Ok(true) => return true,
                Ok(false) if Instant::now() < deadline => thread::sleep(POLL_INTERVAL),
                _ => return false,
            }
        }
    });
    each(&|comm, handle| {
        // SAFETY: the communicator is finalized and no longer used.
        let code = unsafe { (comm.api.destroy)(handle) };
        *comm.handle.lock() = None;
        code == SUCCESS || code == IN_PROGRESS
    });
}
