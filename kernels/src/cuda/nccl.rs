//! Collectives between GPUs by NCCL: communicators that do not block, made within a deadline of a unique id that the caller
//! has passed round; calls on the streams; errors looked for by the pollers; everything broken off when one fails.
//!
//! - NCCL-1: calls of one communicator are made by one thread at a time, in the order that the plan fixes for all members;
//!   over all communicators of a device in the order of the submissions (TURN-1).
//! - NCCL-2: nothing is put on a stream behind a call until NCCL says that the call is on the stream.
//! - NCCL-3: after an abort no call is made any more, and what seems done on a stream is not taken for done.
//!
//! Sums are added in NCCL's order, not in that of [`crate::collective::Group`]: right within rounding, the same bits on all
//! members. Members that call different things are not told of it, since NCCL does not compare calls; the plan is checked
//! before it runs.

use std::collections::{BTreeMap, HashMap};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

use super::engine::{CudaCollective, Enqueue, Enqueued};
use super::gpu::Gpu;
use super::issue_order::{IssueOrder, IssueTicket};
use super::lower::collective::{are_rows, messages, regions};
use super::poller::Watched;
use super::raw_stream::RawStream;
use super::staged::device_address;
use super::strided_copy::{OwnedRegion, StridedRegion, copy_region, foreign_elements};
use crate::clock::RaceClock;
use crate::collective::exchange::{check_call, check_members, taken};
use crate::collective::{AbortStatus, Collective, CollectiveCall, CollectiveKind, Group, MemberWait, ReduceOp};
use crate::error::KernelError;
use crate::memory::View;
use crate::tensor::{DType, Region, element_count};

mod api;
mod comm;
mod pipe;

pub(crate) use api::Api;
use comm::{Comm, Kind, Transfer};
pub use pipe::{Pipe, Sent};

/// How long a stream's thread asks whether a call is on the stream before the stream's own thread goes on asking.
const ISSUE_SPIN: Duration = Duration::from_micros(50);
/// How often that one asks.
const ISSUE_STEP: Duration = Duration::from_micros(20);
/// How long members wait for each other at the end.
const FINALIZE_WITHIN: Duration = Duration::from_secs(5);

/// What the members of a group know each other by: made by one of them, passed to all.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct UniqueId(pub [u8; 128]);

impl UniqueId {
    /// A new one, which no other has.
    ///
    /// # Errors
    /// [`KernelError::Unavailable`] where there is no NCCL; [`KernelError::Cuda`] when it finds no network interface.
    pub fn new() -> Result<Self, KernelError> {
        comm::unique_id().map(Self)
    }
}

/// One member's place in one group.
#[derive(Clone, Debug)]
pub struct GroupMember {
    /// The group.
    pub group: Arc<Group>,
    /// Index of the member.
    pub member: usize,
    /// The GPU of the member's device; no two members of a group share one.
    pub gpu: Arc<Gpu>,
    /// The group's.
    pub id: UniqueId,
}

/// The engine of this process's devices.
#[derive(Debug)]
pub struct Nccl(Arc<Inner>);

#[derive(Debug)]
struct Inner {
    /// By id, those of several members.
    groups: BTreeMap<u32, Arc<Group>>,
    /// By group and member; those of groups of one have none.
    comms: HashMap<(u32, usize), Arc<Comm>>,
    received: Mutex<HashMap<usize, u64>>,
    /// By device.
    orders: Mutex<HashMap<usize, Arc<IssueOrder>>>,
    outcome: AbortStatus,
    /// Breaks communicators off, where a poller has found the error.
    aborting: Mutex<Option<JoinHandle<()>>>,
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Nccl {
    /// Joins the groups, in the order of their ids; all processes call it with all seats of their own devices.
    ///
    /// # Errors
    /// [`KernelError::Unavailable`] without NCCL; [`KernelError::Cuda`] when members do not come within the time, and for
    /// what NCCL says.
    pub fn join(seats: &[GroupMember], within: Duration) -> Result<Self, KernelError> {
        Api::get()?;
        let deadline = Instant::now() + within;
        let mut groups: BTreeMap<u32, Vec<&GroupMember>> = BTreeMap::new();
        for seat in seats.iter().filter(|seat| seat.group.ranks.len() > 1) {
            groups.entry(seat.group.id).or_default().push(seat);
        }
        let mut comms = HashMap::new();
        for (id, seats) in groups {
            for (seat, comm) in seats.iter().zip(comm::join(&seats, deadline, within)?) {
                comms.insert((id, seat.member), Arc::new(comm));
            }
        }
        let inner = Arc::new(Inner {
            groups: seats.iter().map(|seat| (seat.group.id, seat.group.clone())).collect(),
            comms,
            received: Mutex::default(),
            orders: Mutex::default(),
            outcome: AbortStatus::default(),
            aborting: Mutex::default(),
        });
        for (i, seat) in seats.iter().enumerate() {
            let known = seats[..i].iter().any(|other| Arc::ptr_eq(&other.gpu, &seat.gpu));
            if !known {
                let watched: Arc<dyn Watched> = inner.clone();
                seat.gpu.poller().watch(Arc::downgrade(&watched));
            }
        }
        Ok(Self(inner))
    }

    /// A member's end of a group of two that was joined to carry bytes between them, beside the collectives: its calls are in
    /// no device's order of calls (TURN-1), but in that of its own stream. It ends with this engine. See [`Pipe::connect`].
    ///
    /// # Errors
    /// [`KernelError::Arguments`] for a seat that was not joined; [`KernelError::Cuda`].
    pub fn pipe(&self, seat: &GroupMember) -> Result<Pipe, KernelError> {
        let comm = self.0.comms.get(&(seat.group.id, seat.member)).filter(|_| seat.group.ranks.len() == 2);
        let Some(comm) = comm.cloned() else {
            let got = format!("group {}, member {}", seat.group.id, seat.member);
            return Err(KernelError::arguments("pipe", "group", "one of two that was joined", got));
        };
        let (rank, peer) = (seat.group.ranks[seat.member], 1 - seat.member);
        let name = format!("{}{}", ["to ", "from "][seat.member], seat.group.ranks[peer]);
        let lane = RawStream::new(&seat.gpu, rank, &name, true)?;
        Ok(Pipe::new(self.0.clone(), comm, peer, lane))
    }
}

impl Inner {
    fn abort(&self, cause: &str) {
        if self.outcome.abort(cause) {
            self.comms.values().for_each(|comm| comm.abort());
        }
    }

    /// A comm failed: everything is broken off, for what others wait for would not come.
    fn failed(&self, error: KernelError) -> KernelError {
        if let Some(aborted) = self.outcome.aborted() {
            return aborted;
        }
        self.abort(&error.to_string());
        error
    }

    fn count(&self, call: &CollectiveCall, y_shape: &[usize]) {
        let bytes = foreign_elements(call, y_shape) * DType::F32.bytes();
        *lock(&self.received).entry(call.group.ranks[call.member]).or_default() += bytes as u64;
    }

    /// Waits until NCCL has put a call on its stream (NCCL-2); `None` when the time is over.
    fn settle(&self, comm: &Comm, within: Option<Duration>) -> Option<Result<(), KernelError>> {
        let began = Instant::now();
        loop {
            if let Some(error) = self.outcome.aborted() {
                return Some(Err(error));
            }
            match comm.is_settled() {
                Ok(true) => return Some(Ok(())),
                Ok(false) => {}
                Err(error) => return Some(Err(self.failed(error))),
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

impl Watched for Inner {
    /// An abort waits for threads of NCCL's and for the device, so it has a thread of its own.
    fn look(self: Arc<Self>) {
        if self.outcome.aborted().is_some() {
            return;
        }
        let Some(error) = self.comms.values().find_map(|comm| comm.is_settled().err()) else { return };
        let mut aborting = lock(&self.aborting);
        if aborting.is_some() {
            return;
        }
        let (own, clock) = (self.clone(), RaceClock::capture());
        let abort = move || {
            clock.join();
            own.failed(error);
        };
        *aborting = thread::Builder::new().name("nccl abort".to_owned()).spawn(abort).ok();
    }
}

/// Not of `Inner`, which a poller may be looking at: it must not be the one that waits here.
impl Drop for Nccl {
    fn drop(&mut self) {
        if self.0.outcome.aborted().is_none() {
            let comms: Vec<_> = self.0.comms.values().collect();
            comm::finalize(&comms, FINALIZE_WITHIN);
        }
        let aborting = lock(&self.0.aborting).take();
        let began = Instant::now();
        while aborting.as_ref().is_some_and(|thread| !thread.is_finished()) && began.elapsed() < FINALIZE_WITHIN {
            thread::sleep(ISSUE_STEP);
        }
    }
}

/// One member's call: its memory, and what puts it on the stream.
struct Member<'a> {
    call: &'a CollectiveCall,
    /// Addresses; 0 where there is none.
    x: u64,
    y: u64,
    /// STAGE-1.
    workspace: u64,
    x_shape: &'a [usize],
    y_shape: &'a [usize],
    dtype: DType,
    lane: &'a RawStream,
    /// `None` in a group of one.
    comm: Option<&'a Comm>,
}

/// A copy that is due when the call before it is on the stream (NCCL-2): from, to.
type Unpack = (OwnedRegion, OwnedRegion);

impl Member<'_> {
    /// Puts the call on the stream; returns what is to be put behind it.
    fn issue(&self) -> Result<Vec<Unpack>, KernelError> {
        let elements = element_count(self.y_shape);
        let nothing = |()| Vec::new();
        match &self.call.kind {
            CollectiveKind::AllReduce { op } => {
                self.simple(Kind::AllReduce(*op), self.x, self.y, elements).map(nothing)
            }
            CollectiveKind::Broadcast { root } => {
                self.simple(Kind::Broadcast(*root), self.x, self.y, elements).map(nothing)
            }
            CollectiveKind::ReduceScatter { op, parts } if are_rows(parts, self.x_shape) => {
                self.simple(Kind::ReduceScatter(*op), self.x, self.y, elements).map(nothing)
            }
            CollectiveKind::ReduceScatter { op, parts } => self.reduce_parts(*op, parts),
            CollectiveKind::AllGather { parts } if are_rows(parts, self.y_shape) => {
                self.simple(Kind::AllGather, self.x, self.y, element_count(self.x_shape)).map(nothing)
            }
            CollectiveKind::Send { to } => {
                let (address, elements, peer) = (self.x, element_count(self.x_shape), *to);
                self.transfers(&[Transfer { sends: true, peer, address, elements }]).map(nothing)
            }
            CollectiveKind::Receive { from } => {
                let (address, peer) = (self.y, *from);
                self.transfers(&[Transfer { sends: false, peer, address, elements }]).map(nothing)
            }
            kind => match regions(kind, self.y_shape) {
                Some((sources, targets)) => self.moves(sources, &targets),
                None => Ok(Vec::new()),
            },
        }
    }

    /// A call of NCCL's own, or a copy where there are no others. `elements` are those of one member.
    fn simple(&self, kind: Kind, x: u64, y: u64, elements: usize) -> Result<(), KernelError> {
        match self.comm {
            _ if elements == 0 => Ok(()),
            None => self.lane.copy(y, x, elements * self.dtype.bytes()),
            Some(comm) => comm.call(kind, x, y, elements, self.dtype, self.lane),
        }
    }

    fn transfers(&self, transfers: &[Transfer]) -> Result<(), KernelError> {
        match self.comm {
            Some(comm) if transfers.iter().any(|t| t.elements > 0) => {
                comm.transfer(transfers, Some(self.dtype), self.lane)
            }
            _ => Ok(()),
        }
    }

    /// Parts that are uneven, or not in one piece: each is brought to the beginning of a slot of its own. What is behind it
    /// in the slot is added up, too, and not looked at.
    fn reduce_parts(&self, op: ReduceOp, parts: &[Region]) -> Result<Vec<Unpack>, KernelError> {
        let longest = parts.iter().map(Region::element_count).max().unwrap_or(0);
        let slot = longest * self.dtype.bytes();
        let staging = self.workspace;
        for (i, part) in parts.iter().enumerate() {
            let to = OwnedRegion::whole(staging + (i * slot) as u64, &part.size);
            copy_region(
                self.lane,
                StridedRegion { address: self.x, shape: self.x_shape, region: part },
                to.boxed(),
                self.dtype,
            )?;
        }
        if element_count(self.y_shape) == longest {
            return self.simple(Kind::ReduceScatter(op), staging, self.y, longest).map(|()| Vec::new());
        }
        let out = staging + (parts.len() * slot) as u64;
        self.simple(Kind::ReduceScatter(op), staging, out, longest)?;
        Ok(vec![(OwnedRegion::whole(out, self.y_shape), OwnedRegion::whole(self.y, self.y_shape))])
    }

    /// Boxes from everybody to everybody: each pair's in one message, packed where they do not lie in one piece.
    fn moves(&self, sources: &[Region], targets: &[Region]) -> Result<Vec<Unpack>, KernelError> {
        let (me, dtype) = (self.call.member, self.dtype);
        let (source, target) = (&sources[me], &targets[me]);
        let in_x = |part: &Region| OwnedRegion { address: self.x, shape: source.size.clone(), region: part.clone() };
        let in_y = |part: &Region| OwnedRegion { address: self.y, shape: target.size.clone(), region: part.clone() };
        for (_, boxes) in taken(me, sources, target).into_iter().filter(|(from, _)| *from == me) {
            for common in &boxes {
                let [from, to] = [common.relative_to(source), common.relative_to(target)];
                copy_region(self.lane, in_x(&from).boxed(), in_y(&to).boxed(), dtype)?;
            }
        }
        let bytes = |elements: usize| (elements * dtype.bytes()) as u64;
        let (mut transfers, mut unpacks, mut next) = (Vec::new(), Vec::new(), self.workspace);
        for message in messages(me, sources, targets) {
            let (sends, peer, elements) = (message.sends, message.peer, message.elements());
            if let Some(start) = message.direct {
                let address = if sends { self.x } else { self.y } + bytes(start);
                transfers.push(Transfer { sends, peer, address, elements });
                continue;
            }
            transfers.push(Transfer { sends, peer, address: next, elements });
            let mut place = next;
            for common in &message.boxes {
                let piece = OwnedRegion::whole(place, &common.size);
                if sends {
                    copy_region(self.lane, in_x(common).boxed(), piece.boxed(), dtype)?;
                } else {
                    unpacks.push((piece, in_y(common)));
                }
                place += bytes(common.element_count());
            }
            next += message.packed_bytes(dtype) as u64;
        }
        self.transfers(&transfers)?;
        Ok(unpacks)
    }
}

impl Enqueue for Nccl {
    fn enqueue(
        &self,
        call: &CollectiveCall,
        reads: &[View<'_>],
        writes: &[View<'_>],
        workspace: Option<&View<'_>>,
        lane: &Arc<RawStream>,
    ) -> Result<Enqueued, KernelError> {
        check_members(call)?;
        if let Some(error) = self.0.outcome.aborted() {
            return Err(error);
        }
        // The others would wait for this member for ever.
        check_call(call, reads, writes).map_err(|error| self.0.failed(error))?;
        let comm = self.0.comms.get(&(call.group.id, call.member)).cloned();
        if comm.is_none() && call.group.ranks.len() > 1 {
            let got = format!("group {}, member {}", call.group.id, call.member);
            return Err(KernelError::arguments(call.name(), "group", "one that was joined", got));
        }
        let Some(any) = reads.iter().chain(writes).next() else { return Ok(Enqueued::Issued) };
        let address = |view: Option<&View<'_>>| view.map_or(Ok(0), device_address);
        let shape = |view: Option<&View<'_>>| view.map_or(Vec::new(), |view| view.shape().to_vec());
        let (x_shape, y_shape) = (shape(reads.first()), shape(writes.first()));
        let member = Member {
            call,
            x: address(reads.first())?,
            y: address(writes.first())?,
            workspace: address(workspace)?,
            x_shape: &x_shape,
            y_shape: &y_shape,
            dtype: any.dtype(),
            lane,
            comm: comm.as_deref(),
        };
        if let Some(comm) = &comm {
            comm.note(lane);
        }
        // What NCCL has not accepted the others wait for in vain.
        let unpacks = member.issue().map_err(|error| self.0.failed(error))?;
        self.0.count(call, &y_shape);
        let (lane, dtype) = (lane.clone(), any.dtype());
        let behind =
            move || unpacks.iter().try_for_each(|(from, to)| copy_region(&lane, from.boxed(), to.boxed(), dtype));
        let Some(comm) = comm else { return behind().map(|()| Enqueued::Issued) };
        match self.0.settle(&comm, Some(ISSUE_SPIN)) {
            Some(settled) => settled.and_then(|()| behind()).map(|()| Enqueued::Issued),
            None => {
                let own = self.0.clone();
                let wait = move || own.settle(&comm, None).unwrap_or(Ok(())).and_then(|()| behind());
                Ok(Enqueued::Waits(Box::new(wait)))
            }
        }
    }
}

impl Collective for Nccl {
    fn run(&self, call: &CollectiveCall, _: &[View<'_>], _: &[View<'_>]) -> Result<(), KernelError> {
        Err(KernelError::arguments(call.name(), "stream", "a stream of a GPU", "the host"))
    }

    fn abort(&self, cause: &str) {
        self.0.abort(cause);
    }

    /// A stream that has come to a call and not left it waits for the members that have not come as far, and for those of
    /// other processes, of which nothing is known here.
    fn waits(&self) -> Vec<MemberWait> {
        let mut waits = Vec::new();
        for ((id, member), comm) in &self.0.comms {
            let (Some(call), Some(group)) = (comm.waits_in(), self.0.groups.get(id)) else { continue };
            let is_late = |peer: &usize| self.0.comms.get(&(*id, *peer)).is_none_or(|peer| !peer.has_reached(call));
            let late = (0..group.ranks.len()).filter(|peer| peer != member).filter(is_late);
            waits.extend(late.map(|peer| MemberWait {
                group: *id,
                rank: group.ranks[*member],
                peer: group.ranks[peer],
            }));
        }
        waits
    }

    fn outcomes(&self) -> Vec<AbortStatus> {
        vec![self.0.outcome.clone()]
    }

    fn turn(&self, rank: usize) -> Option<IssueTicket> {
        Some(lock(&self.0.orders).entry(rank).or_default().turn())
    }

    fn on_device(&self, _: &CollectiveCall) -> Option<CudaCollective<'_>> {
        Some(CudaCollective(self))
    }

    fn bytes_received(&self, rank: usize) -> u64 {
        lock(&self.0.received).get(&rank).copied().unwrap_or(0)
    }
}
