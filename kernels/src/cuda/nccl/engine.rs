//! Collectives between GPUs by NCCL: non-blocking communicators, created within a deadline from a unique id that the
//! caller distributes. Calls are enqueued on streams; pollers detect errors. If one communicator fails, all abort.
//!
//! - NCCL-1: one thread at a time makes the calls of a communicator, in the order that the plan fixes for all members.
//!   Over all communicators of a device, calls are in the order of the submissions (ORDER-1).
//! - NCCL-2: nothing is put on a stream after a call until NCCL reports that the call is on the stream.
//! - NCCL-3: after an abort no call is made, and work that looks complete on a stream is not treated as complete.
//!
//! NCCL's summation order differs from that of [`crate::collective::Group`]: results are correct up to rounding, and
//! all members get the same bits. NCCL does not compare the members' calls, so members that call different collectives
//! get no error. Instead, the plan is checked before it runs.

use std::collections::{BTreeMap, HashMap};
use std::sync::Arc;
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

use parking_lot::Mutex;

use super::api::{Api, REMOTE_ERROR, UNHANDLED_CUDA_ERROR};
use super::comm::{self, Comm, GroupMember, NcclCall, Transfer};
use crate::bound::Bound;
use crate::clock::Stamped;
use crate::collective::exchange::{check_call, check_members, taken};
use crate::collective::issue_order::{IssueOrder, IssueSlot};
use crate::collective::status::ReceivedBytes;
use crate::collective::{
    AbortStatus, Collective, CollectiveCall, CollectiveKind, DeviceCollective, Enqueue, Enqueued, Group, MemberWait,
    ReduceOp,
};
use crate::cuda::gpu_call::GpuCall;
use crate::cuda::lower::collective::{are_rows, messages, regions};
use crate::cuda::poller::ErrorCheck;
use crate::cuda::strided_copy::{StridedRegion, copy_region};
use crate::error::{KernelError, Result};
use crate::event::BackendObject;
use crate::tensor::{Region, element_count};

/// How long the issuing thread polls whether a call is on the stream. After that, the stream's own thread polls.
pub(super) const ISSUE_SPIN: Duration = Duration::from_micros(50);
/// Poll interval of the stream's own thread.
const ISSUE_STEP: Duration = Duration::from_micros(20);
/// How long to wait for a report of the cause, if NCCL's error is only the consequence of another error.
const CAUSE_WITHIN: Duration = Duration::from_millis(500);
/// How long members wait for each other at shutdown.
const FINALIZE_WITHIN: Duration = Duration::from_secs(5);

/// The NCCL engine of this process's devices.
#[derive(Debug)]
pub struct Nccl(pub(super) Arc<Inner>);

#[derive(Debug)]
pub(super) struct Inner {
    /// Groups of several members, by id.
    groups: BTreeMap<u32, Arc<Group>>,
    /// Communicators, by group id and member. A group of one member has no communicator.
    pub(super) comms: HashMap<(u32, usize), Arc<Comm>>,
    received: ReceivedBytes,
    orders: Mutex<HashMap<usize, Arc<IssueOrder>>>,
    pub(super) abort_status: AbortStatus,
    /// The thread that aborts the communicators after a poller found an error.
    aborting: Mutex<Option<JoinHandle<()>>>,
}

impl Nccl {
    /// Joins the groups, in the order of their ids. Each process passes all memberships of its own devices.
    ///
    /// # Errors
    /// [`KernelError::Unavailable`] if NCCL is missing; [`KernelError::Cuda`] if not all members join before the time
    /// `within` has passed, and for NCCL's own errors.
    pub fn join(memberships: &[GroupMember], within: Duration) -> Result<Self> {
        Api::get()?;
        let deadline = Instant::now() + within;
        let mut groups: BTreeMap<u32, Vec<&GroupMember>> = BTreeMap::new();
        for membership in memberships.iter().filter(|membership| membership.group.ranks.len() > 1) {
            groups.entry(membership.group.id).or_default().push(membership);
        }
        let mut comms = HashMap::new();
        for (id, memberships) in groups {
            for (membership, comm) in memberships.iter().zip(comm::join(&memberships, deadline, within)?) {
                comms.insert((id, membership.member), Arc::new(comm));
            }
        }
        let inner = Arc::new(Inner {
            groups: memberships.iter().map(|membership| (membership.group.id, membership.group.clone())).collect(),
            comms,
            received: ReceivedBytes::default(),
            orders: Mutex::default(),
            abort_status: AbortStatus::default(),
            aborting: Mutex::default(),
        });
        for (i, membership) in memberships.iter().enumerate() {
            let is_registered = memberships[..i].iter().any(|other| Arc::ptr_eq(&other.gpu, &membership.gpu));
            if !is_registered {
                let check: Arc<dyn ErrorCheck> = inner.clone();
                membership.gpu.poller.add_error_check(Arc::downgrade(&check));
            }
        }
        Ok(Self(inner))
    }
}

impl Inner {
    fn abort(&self, cause: &str) {
        if self.abort_status.abort(cause) {
            self.comms.values().for_each(|comm| comm.abort());
        }
    }

    /// Aborts all communicators after one has failed, since other members would wait forever. If the error is only the
    /// consequence of an error of a device or of another process, first waits for a report of the cause.
    pub(super) fn abort_on_error(&self, error: KernelError) -> KernelError {
        let began = Instant::now();
        while is_passed_on(&error) && self.abort_status.aborted().is_none() && began.elapsed() < CAUSE_WITHIN {
            thread::sleep(ISSUE_STEP);
        }
        if let Some(aborted) = self.abort_status.aborted() {
            return aborted;
        }
        self.abort(&error.to_string());
        error
    }

    /// Waits until NCCL has put a call on its stream (NCCL-2). Returns `None` after the timeout.
    pub(super) fn settle(&self, comm: &Comm, within: Option<Duration>) -> Option<Result<()>> {
        let began = Instant::now();
        loop {
            if let Some(error) = self.abort_status.aborted() {
                return Some(Err(error));
            }
            match comm.is_settled() {
                Ok(true) => return Some(Ok(())),
                Ok(false) => {}
                Err(error) => return Some(Err(self.abort_on_error(error))),
            }
            let took = began.elapsed();
            match within {
                Some(within) if took >= within => return None,
                Some(_) if took < ISSUE_SPIN => std::hint::spin_loop(),
                _ => thread::sleep(ISSUE_STEP),
            }
        }
    }
}

fn is_passed_on(error: &KernelError) -> bool {
    let codes = [UNHANDLED_CUDA_ERROR, REMOTE_ERROR];
    matches!(error, KernelError::Cuda { call, code, .. } if call.starts_with("nccl") && codes.contains(code))
}

impl ErrorCheck for Inner {
    /// Aborts on a separate thread, since an abort waits for NCCL's threads and for the device.
    fn check_errors(self: Arc<Self>) {
        if self.abort_status.aborted().is_some() {
            return;
        }
        let Some(error) = self.comms.values().find_map(|comm| comm.is_settled().err()) else { return };
        let mut aborting = self.aborting.lock();
        if aborting.is_some() {
            return;
        }
        let own = Stamped::new(self.clone());
        let abort = move || drop(own.open().abort_on_error(error));
        *aborting = thread::Builder::new().name("nccl abort".to_owned()).spawn(abort).ok();
    }
}

/// Finalizes the communicators, which blocks. `Inner` may be dropped by a poller, and so must not block in its `drop`.
impl Drop for Nccl {
    fn drop(&mut self) {
        if self.0.abort_status.aborted().is_none() {
            let comms: Vec<_> = self.0.comms.values().collect();
            comm::finalize(&comms, FINALIZE_WITHIN);
        }
        let aborting = self.0.aborting.lock().take();
        let began = Instant::now();
        while aborting.as_ref().is_some_and(|thread| !thread.is_finished()) && began.elapsed() < FINALIZE_WITHIN {
            thread::sleep(ISSUE_STEP);
        }
    }
}

struct MemberCall<'a> {
    of: &'a GpuCall<'a>,
    /// `None` in a group of one member.
    comm: Option<&'a Comm>,
}

/// A copy from the first region to the second, due once the call is on the stream (NCCL-2).
type Unpack = (StridedRegion, StridedRegion);

impl MemberCall<'_> {
    /// Enqueues the call. Returns the copies to enqueue after the call.
    fn issue(&self) -> Result<Vec<Unpack>> {
        let &GpuCall { call, x, y, x_shape, y_shape, .. } = self.of;
        let [x_elements, y_elements] = [x_shape, y_shape].map(element_count);
        let (kind, elements) = match &call.kind {
            CollectiveKind::AllReduce { op } => (NcclCall::AllReduce(*op), y_elements),
            CollectiveKind::Broadcast { root } => (NcclCall::Broadcast(*root), y_elements),
            CollectiveKind::AllGather { parts } if are_rows(parts, y_shape) => (NcclCall::AllGather, x_elements),
            CollectiveKind::ReduceScatter { op, parts } if are_rows(parts, x_shape) => {
                (NcclCall::ReduceScatter(*op), y_elements)
            }
            CollectiveKind::ReduceScatter { op, parts } => return self.reduce_parts(*op, &parts.list()),
            CollectiveKind::Send { to: peer } | CollectiveKind::Receive { from: peer } => {
                let sends = matches!(call.kind, CollectiveKind::Send { .. });
                let (address, elements) = if sends { (x, x_elements) } else { (y, y_elements) };
                return self.transfers(&[Transfer { sends, peer: *peer, address, elements }]).map(|()| Vec::new());
            }
            kind => {
                let Some([sources, targets]) = regions(kind, y_shape) else { return Ok(Vec::new()) };
                return self.exchange_regions(&sources, &targets);
            }
        };
        self.call_or_copy(kind, x, y, elements).map(|()| Vec::new())
    }

    /// Makes an NCCL call, or a copy in a group of one member. One member's part has `elements` elements.
    fn call_or_copy(&self, kind: NcclCall, x: u64, y: u64, elements: usize) -> Result<()> {
        match self.comm {
            _ if elements == 0 => Ok(()),
            None => self.of.stream.copy(y, x, elements * self.of.dtype.bytes()),
            Some(comm) => comm.call(kind, x, y, elements, self.of.dtype, &self.of.stream),
        }
    }

    fn transfers(&self, transfers: &[Transfer]) -> Result<()> {
        match self.comm {
            Some(comm) if transfers.iter().any(|t| t.elements > 0) => {
                comm.transfer(transfers, Some(self.of.dtype), &self.of.stream)
            }
            _ => Ok(()),
        }
    }

    /// Reduce-scatters parts that are uneven or not contiguous. First copies each part to a slot of the workspace. All
    /// slots have the size of the longest part. The results for the padding after shorter parts are ignored.
    fn reduce_parts(&self, op: ReduceOp, parts: &[Region]) -> Result<Vec<Unpack>> {
        let longest = parts.iter().map(Region::element_count).max().unwrap_or(0);
        let slot = longest * self.of.dtype.bytes();
        let staging = self.of.workspace;
        for (i, part) in parts.iter().enumerate() {
            let from = StridedRegion::new(self.of.x, self.of.x_shape, part.clone());
            let to = StridedRegion::whole(staging + (i * slot) as u64, &part.size);
            copy_region(&self.of.stream, &from, &to, self.of.dtype)?;
        }
        if element_count(self.of.y_shape) == longest {
            return self.call_or_copy(NcclCall::ReduceScatter(op), staging, self.of.y, longest).map(|()| Vec::new());
        }
        let out = staging + (parts.len() * slot) as u64;
        self.call_or_copy(NcclCall::ReduceScatter(op), staging, out, longest)?;
        Ok(vec![(StridedRegion::whole(out, self.of.y_shape), StridedRegion::whole(self.of.y, self.of.y_shape))])
    }

    /// Exchanges regions, with one message from each member to each other one. Packs messages that are not contiguous.
    fn exchange_regions(&self, sources: &[Region], targets: &[Region]) -> Result<Vec<Unpack>> {
        let (me, dtype) = (self.of.call.member, self.of.dtype);
        let (source, target) = (&sources[me], &targets[me]);
        let in_x = |part: Region| StridedRegion::new(self.of.x, &source.size, part);
        let in_y = |part: Region| StridedRegion::new(self.of.y, &target.size, part);
        for (_, boxes) in taken(me, sources, target).into_iter().filter(|(from, _)| *from == me) {
            for common in &boxes {
                let (from, to) = (in_x(common.relative_to(source)), in_y(common.relative_to(target)));
                copy_region(&self.of.stream, &from, &to, dtype)?;
            }
        }
        let bytes = |elements: usize| (elements * dtype.bytes()) as u64;
        let (mut transfers, mut unpacks, mut next) = (Vec::new(), Vec::new(), self.of.workspace);
        for message in messages(me, sources, targets) {
            let (sends, peer, elements) = (message.sends, message.peer, message.elements());
            if let Some(start) = message.direct {
                let address = if sends { self.of.x } else { self.of.y } + bytes(start);
                transfers.push(Transfer { sends, peer, address, elements });
                continue;
            }
            transfers.push(Transfer { sends, peer, address: next, elements });
            let mut place = next;
            next += message.packed_bytes(dtype) as u64;
            for common in message.boxes {
                let piece = StridedRegion::whole(place, &common.size);
                place += bytes(common.element_count());
                if sends {
                    copy_region(&self.of.stream, &in_x(common), &piece, dtype)?;
                } else {
                    unpacks.push((piece, in_y(common)));
                }
            }
        }
        self.transfers(&transfers)?;
        Ok(unpacks)
    }
}

impl Enqueue for Nccl {
    fn enqueue(&self, call: &CollectiveCall, bound: &Bound<'_>, stream: BackendObject) -> Result<Enqueued> {
        check_members(call)?;
        self.0.abort_status.check()?;
        // If the check fails, abort: the other members would otherwise wait forever.
        check_call(call, &bound.reads, &bound.writes).map_err(|error| self.0.abort_on_error(error))?;
        let comm = self.0.comms.get(&(call.group.id, call.member)).cloned();
        if comm.is_none() && call.group.ranks.len() > 1 {
            let got = format!("group {}, member {}", call.group.id, call.member);
            return Err(KernelError::arguments(call.name(), "group", "a group that the engine has joined", got));
        }
        let of = GpuCall::new(call, bound, stream)?;
        if let Some(comm) = &comm {
            comm.record_call(&of.stream);
        }
        // Abort, since the other members would wait forever for a call that NCCL refused.
        let member = MemberCall { of: &of, comm: comm.as_deref() };
        let unpacks = member.issue().map_err(|error| self.0.abort_on_error(error))?;
        self.0.received.count(call, of.y_shape, of.dtype);
        let (stream, dtype) = (of.stream, of.dtype);
        let enqueue_copies = move || unpacks.iter().try_for_each(|(from, to)| copy_region(&stream, from, to, dtype));
        let Some(comm) = comm else { return enqueue_copies().map(|()| Enqueued::Issued) };
        match self.0.settle(&comm, Some(ISSUE_SPIN)) {
            Some(settled) => settled.and_then(|()| enqueue_copies()).map(|()| Enqueued::Issued),
            None => {
                let own = self.0.clone();
                let wait = move || own.settle(&comm, None).unwrap_or(Ok(())).and_then(|()| enqueue_copies());
                Ok(Enqueued::Pending(Box::new(wait)))
            }
        }
    }
}

impl Collective for Nccl {
    fn abort(&self, cause: &str) {
        self.0.abort(cause);
    }

    /// A stream inside a call waits for the members that have not reached the call. It may also wait for members in
    /// other processes, whose progress is unknown.
    fn waits(&self) -> Vec<MemberWait> {
        let mut waits = Vec::new();
        for ((id, member), comm) in &self.0.comms {
            let (Some(call), Some(group)) = (comm.pending_call(), self.0.groups.get(id)) else { continue };
            let is_late = |peer: &usize| self.0.comms.get(&(*id, *peer)).is_none_or(|peer| !peer.has_reached(call));
            let late = (0..group.ranks.len()).filter(|peer| peer != member).filter(is_late);
            waits.extend(late.map(|peer| MemberWait::new(group, *member, peer)));
        }
        waits
    }

    fn abort_statuses(&self) -> Vec<AbortStatus> {
        vec![self.0.abort_status.clone()]
    }

    fn issue_slot(&self, rank: usize) -> Option<IssueSlot> {
        Some(self.0.orders.lock().entry(rank).or_default().slot())
    }

    fn on_device(&self, _: &CollectiveCall) -> Option<DeviceCollective<'_>> {
        Some(DeviceCollective(self))
    }

    fn bytes_received(&self, rank: usize) -> u64 {
        self.0.received.of(rank)
    }
}
