//! Collectives between devices of one process that share GPUs, which NCCL does not support. Members rendezvous on the
//! host; the last to arrive enqueues all members' parts on their streams, ordered by events. No host thread waits for a
//! GPU. Data on another GPU is copied over before a kernel reads it.
//!
//! - LOCAL-1: a member that is not the last waits on its stream's own thread for the last to arrive. So only the last
//!   member puts work on its stream meanwhile.
//! - LOCAL-2: a member's stream accesses another member's memory only after that member's `ready` event, and continues
//!   only after the `done` events of all members: MEET-1, between streams.
//! - LOCAL-3: a group whose members called different collectives fails permanently, so that no member waits for one
//!   that has left.

use std::collections::HashMap;
use std::sync::Arc;

use parking_lot::{Condvar, Mutex};

use super::engine::{self, CudaCollective, Enqueue, Enqueued};
use super::event::Recorded;
use super::lower::collective::{PIECE_BYTES, contiguous_start, regions};
use super::raw_stream::RawStream;
use super::staged::device_address;
use super::strided_copy::{StridedRegion, combine, copy_region, fetch_from_peer, foreign_elements};
use crate::collective::exchange::{Terms, check_call, check_members, describe, describe_views, taken};
use crate::collective::{AbortStatus, Collective, CollectiveCall, CollectiveKind, MemberWait, ReduceOp};
use crate::error::KernelError;
use crate::memory::View;
use crate::tensor::{DType, Region, element_count, split_range};

/// The engine of devices that share GPUs. All of them share one engine.
#[derive(Debug, Default)]
pub struct SharedGpu(Arc<Inner>);

#[derive(Debug, Default)]
struct Inner {
    groups: Mutex<HashMap<u32, Arc<Rendezvous>>>,
    received: Mutex<HashMap<usize, u64>>,
    abort_status: AbortStatus,
}

/// The rendezvous of the members of one group.
#[derive(Debug, Default)]
struct Rendezvous {
    state: Mutex<State>,
    changed: Condvar,
}

#[derive(Debug, Default)]
struct State {
    /// Calls of the members that wait in a collective, by member.
    arrivals: Vec<Option<Arrival>>,
    /// Number of collectives that all members have joined.
    rounds: u64,
    /// Point-to-point calls that wait for their peer, in order of arrival.
    pending_transfers: Vec<Transfer>,
    next_transfer: u64,
    failed: Option<KernelError>,
}

/// One member's arrival at a collective.
#[derive(Clone, Debug)]
struct Arrival {
    call: CollectiveCall,
    /// Device addresses.
    x: u64,
    y: u64,
    /// Address of the launch's workspace (STAGE-1).
    workspace: u64,
    x_shape: Vec<usize>,
    y_shape: Vec<usize>,
    dtype: DType,
    stream: Arc<RawStream>,
    /// Recorded after all earlier work of the member's stream.
    ready: Arc<Recorded>,
}

/// One side of a point-to-point transfer that waits for the other.
#[derive(Debug)]
struct Transfer {
    id: u64,
    from: usize,
    to: usize,
    /// Whether this is the sender's side.
    sends: bool,
    address: u64,
    shape: Vec<usize>,
    dtype: DType,
    stream: Arc<RawStream>,
    ready: Arc<Recorded>,
}

impl Arrival {
    fn terms(&self) -> Terms<'_> {
        Terms::of(&self.call, &self.x_shape, &self.y_shape, self.dtype)
    }

    fn describe(&self) -> String {
        describe(&self.call, Some((self.dtype, &self.x_shape)))
    }

    fn y(&self, element: usize) -> u64 {
        self.y + (element * self.dtype.bytes()) as u64
    }
}

impl SharedGpu {
    /// Creates an engine without groups; calls create them.
    pub fn new() -> Self {
        Self::default()
    }
}

impl Inner {
    fn rendezvous(&self, group: u32) -> Arc<Rendezvous> {
        self.groups.lock().entry(group).or_default().clone()
    }

    /// The error that ends new and waiting calls, if any.
    fn failure(&self, state: &State) -> Option<KernelError> {
        state.failed.clone().or_else(|| self.abort_status.aborted())
    }

    fn count(&self, call: &CollectiveCall, y_shape: &[usize]) {
        let bytes = foreign_elements(call, y_shape) * DType::F32.bytes();
        *self.received.lock().entry(call.group.ranks[call.member]).or_default() += bytes as u64;
    }

    /// Fails the group permanently and wakes its waiting members.
    fn fail_group(&self, rendezvous: &Rendezvous, state: &mut State, error: KernelError) -> KernelError {
        let error = state.failed.get_or_insert(error).clone();
        rendezvous.changed.notify_all();
        error
    }

    fn join_collective(
        self: &Arc<Self>,
        rendezvous: Arc<Rendezvous>,
        arrival: Arrival,
    ) -> Result<Enqueued, KernelError> {
        let (member, members) = (arrival.call.member, arrival.call.group.ranks.len());
        let mut state = rendezvous.state.lock();
        if let Some(error) = self.failure(&state) {
            return Err(error);
        }
        if let Some(error) = find_mismatch(&state, &arrival) {
            return Err(self.fail_group(&rendezvous, &mut state, error));
        }
        state.arrivals.resize(members, None);
        state.arrivals[member] = Some(arrival);
        if state.arrivals.iter().all(Option::is_some) {
            let arrivals: Vec<Arrival> = state.arrivals.iter_mut().filter_map(Option::take).collect();
            // Bind the caller's own context again in every case.
            if let Err(error) = enqueue_all(&arrivals).and(bind(&arrivals[member].stream)) {
                return Err(self.fail_group(&rendezvous, &mut state, error));
            }
            arrivals.iter().for_each(|arrival| self.count(&arrival.call, &arrival.y_shape));
            state.rounds += 1;
            rendezvous.changed.notify_all();
            return Ok(Enqueued::Issued);
        }
        let (rounds, own) = (state.rounds, self.clone());
        drop(state);
        let is_done = move |state: &State| state.rounds != rounds;
        let withdraw = move |state: &mut State| state.arrivals[member] = None;
        Ok(Enqueued::Pending(own.wait(rendezvous, is_done, withdraw)))
    }

    /// Blocks on the host until `is_done` holds or the call fails; `withdraw` then removes the member.
    fn wait(
        self: Arc<Self>,
        rendezvous: Arc<Rendezvous>,
        is_done: impl Fn(&State) -> bool + Send + 'static,
        withdraw: impl FnOnce(&mut State) + Send + 'static,
    ) -> engine::Wait {
        Box::new(move || {
            let mut state = rendezvous.state.lock();
            loop {
                if is_done(&state) {
                    return Ok(());
                }
                if let Some(error) = self.failure(&state) {
                    withdraw(&mut state);
                    return Err(error);
                }
                rendezvous.changed.wait(&mut state);
            }
        })
    }

    fn join_transfer(
        self: &Arc<Self>,
        rendezvous: Arc<Rendezvous>,
        call: &CollectiveCall,
        mut transfer: Transfer,
    ) -> Result<Enqueued, KernelError> {
        let mut state = rendezvous.state.lock();
        if let Some(error) = self.failure(&state) {
            return Err(error);
        }
        let peer = if transfer.sends { transfer.to } else { transfer.from };
        if let Some(Some(peer_call)) = state.arrivals.get(peer) {
            let (expected, got) = (peer_call.describe(), call.name().to_owned());
            let (group, member) = (call.group.id, call.member);
            let error = KernelError::CollectiveMismatch { group, member, expected, got };
            return Err(self.fail_group(&rendezvous, &mut state, error));
        }
        let matches =
            |other: &Transfer| (other.from, other.to, other.sends) == (transfer.from, transfer.to, !transfer.sends);
        if let Some(index) = state.pending_transfers.iter().position(matches) {
            let other = state.pending_transfers.remove(index);
            let (sender, receiver) = if transfer.sends { (&transfer, &other) } else { (&other, &transfer) };
            if let Err(error) = enqueue_transfer(call, sender, receiver).and(bind(&transfer.stream)) {
                return Err(self.fail_group(&rendezvous, &mut state, error));
            }
            if sender.from != sender.to {
                let (rank, bytes) = (call.group.ranks[sender.to], element_count(&sender.shape) * sender.dtype.bytes());
                *self.received.lock().entry(rank).or_default() += bytes as u64;
            }
            rendezvous.changed.notify_all();
            return Ok(Enqueued::Issued);
        }
        let id = state.next_transfer;
        state.next_transfer += 1;
        transfer.id = id;
        state.pending_transfers.push(transfer);
        drop(state);
        let is_done = move |state: &State| state.pending_transfers.iter().all(|transfer| transfer.id != id);
        let withdraw = move |state: &mut State| state.pending_transfers.retain(|transfer| transfer.id != id);
        Ok(Enqueued::Pending(self.clone().wait(rendezvous, is_done, withdraw)))
    }
}

fn find_mismatch(state: &State, arrival: &Arrival) -> Option<KernelError> {
    let mismatch = |expected: String| KernelError::CollectiveMismatch {
        group: arrival.call.group.id,
        member: arrival.call.member,
        expected,
        got: arrival.describe(),
    };
    let member = arrival.call.member;
    if state.pending_transfers.iter().any(|m| m.sends && m.to == member) {
        return Some(mismatch("receive".to_owned()));
    }
    if state.pending_transfers.iter().any(|m| !m.sends && m.from == member) {
        return Some(mismatch("send".to_owned()));
    }
    if state.arrivals.get(member).is_some_and(Option::is_some) {
        return Some(mismatch("one call of a member at a time".to_owned()));
    }
    let first = state.arrivals.iter().flatten().next()?;
    (first.terms() != arrival.terms()).then(|| mismatch(first.describe()))
}

/// Enqueues a transfer on the receiver's stream; the sender's stream waits for it.
fn enqueue_transfer(call: &CollectiveCall, sender: &Transfer, receiver: &Transfer) -> Result<(), KernelError> {
    if (&sender.shape, sender.dtype) != (&receiver.shape, receiver.dtype) {
        return Err(KernelError::CollectiveMismatch {
            group: call.group.id,
            member: receiver.to,
            expected: format!("send of {:?} {:?}", sender.dtype, sender.shape),
            got: format!("receive of {:?} {:?}", receiver.dtype, receiver.shape),
        });
    }
    let stream = &receiver.stream;
    bind(stream)?;
    stream.wait(&sender.ready)?;
    copy(
        stream,
        receiver.address,
        &sender.stream,
        sender.address,
        element_count(&sender.shape) * sender.dtype.bytes(),
    )?;
    let done = stream.record()?;
    bind(&sender.stream)?;
    sender.stream.wait(&done)
}

/// Binds the context of the stream's GPU, as enqueueing requires.
fn bind(stream: &RawStream) -> Result<(), KernelError> {
    stream.gpu().context().bind()
}

fn same_gpu(stream: &RawStream, other: &RawStream) -> bool {
    Arc::ptr_eq(stream.gpu().context(), other.gpu().context())
}

/// Copies from memory on `source`'s GPU.
fn copy(stream: &RawStream, to: u64, source: &RawStream, from: u64, bytes: usize) -> Result<(), KernelError> {
    if same_gpu(stream, source) {
        return stream.copy(to, from, bytes);
    }
    stream.copy_from(to, source.gpu().context(), from, bytes)
}

/// Copies a region from memory on `source`'s GPU.
fn copy_between(
    stream: &RawStream,
    source: &RawStream,
    from: StridedRegion<'_>,
    to: StridedRegion<'_>,
    dtype: DType,
) -> Result<(), KernelError> {
    if same_gpu(stream, source) {
        return copy_region(stream, from, to, dtype);
    }
    fetch_from_peer(stream, source.gpu().context(), from, to, dtype)
}

/// Makes each member's stream wait for the events of all other members.
fn wait_for_all(arrivals: &[Arrival], events: &[Arc<Recorded>]) -> Result<(), KernelError> {
    for (i, arrival) in arrivals.iter().enumerate() {
        bind(&arrival.stream)?;
        for (_, event) in events.iter().enumerate().filter(|(j, _)| *j != i) {
            arrival.stream.wait(event)?;
        }
    }
    Ok(())
}

fn record_all(arrivals: &[Arrival]) -> Result<Vec<Arc<Recorded>>, KernelError> {
    arrivals.iter().map(|arrival| bind(&arrival.stream).and_then(|()| arrival.stream.record())).collect()
}

/// Enqueues all members' parts on their streams (LOCAL-2).
fn enqueue_all(arrivals: &[Arrival]) -> Result<(), KernelError> {
    let Some(first) = arrivals.first() else { return Ok(()) };
    let ready: Vec<_> = arrivals.iter().map(|arrival| arrival.ready.clone()).collect();
    wait_for_all(arrivals, &ready)?;
    for (i, arrival) in arrivals.iter().enumerate() {
        bind(&arrival.stream)?;
        match &first.call.kind {
            CollectiveKind::AllReduce { op } => {
                let own = split_range(element_count(&arrival.y_shape), arrivals.len(), i);
                let chunk = Region { start: vec![own.start], size: vec![own.len()] };
                reduce(arrivals, i, *op, (&[element_count(&arrival.y_shape)], &chunk), arrival.y(own.start))?;
            }
            CollectiveKind::ReduceScatter { op, parts } => {
                reduce(arrivals, i, *op, (&arrival.x_shape, &parts[i]), arrival.y)?
            }
            CollectiveKind::Broadcast { root } => {
                let (root, bytes) = (&arrivals[*root], element_count(&arrival.y_shape) * arrival.dtype.bytes());
                copy(&arrival.stream, arrival.y, &root.stream, root.x, bytes)?;
            }
            kind => {
                if let Some((sources, targets)) = regions(kind, &arrival.y_shape) {
                    gather(arrivals, i, sources, &targets[i])?;
                }
            }
        }
    }
    if let CollectiveKind::AllReduce { .. } = first.call.kind {
        wait_for_all(arrivals, &record_all(arrivals)?)?;
        exchange_chunks(arrivals)?;
    }
    wait_for_all(arrivals, &record_all(arrivals)?)
}

/// The second half of an all-reduce: each member copies the reduced chunk of every other member.
fn exchange_chunks(arrivals: &[Arrival]) -> Result<(), KernelError> {
    for (i, arrival) in arrivals.iter().enumerate() {
        bind(&arrival.stream)?;
        for (j, other) in arrivals.iter().enumerate().filter(|(j, _)| *j != i) {
            let chunk = split_range(element_count(&arrival.y_shape), arrivals.len(), j);
            let (to, from) = (arrival.y(chunk.start), other.y(chunk.start));
            copy(&arrival.stream, to, &other.stream, from, chunk.len() * arrival.dtype.bytes())?;
        }
    }
    Ok(())
}

/// Combines all members' regions `(shape, part)` into `y` for member `owner`. Copies non-contiguous regions to slots of
/// the owner's workspace first, and regions on other GPUs piece by piece.
fn reduce(
    arrivals: &[Arrival],
    owner: usize,
    op: ReduceOp,
    (shape, part): (&[usize], &Region),
    y: u64,
) -> Result<(), KernelError> {
    let (own, elements) = (&arrivals[owner], part.element_count());
    let bytes = |elements: usize| elements * own.dtype.bytes();
    let in_order = || (1..=arrivals.len()).map(|m| &arrivals[(owner + m) % arrivals.len()]).enumerate();
    let slot = |i: usize, elements: usize| own.workspace + (i * bytes(elements)) as u64;
    let Some(start) = contiguous_start(shape, part) else {
        let whole = Region::whole(&part.size);
        for (i, arrival) in in_order() {
            let to = StridedRegion { address: slot(i, elements), shape: &part.size, region: &whole };
            let from = StridedRegion { address: arrival.x, shape, region: part };
            copy_between(&own.stream, &arrival.stream, from, to, own.dtype)?;
        }
        let xs: Vec<u64> = in_order().map(|(i, _)| slot(i, elements)).collect();
        return combine(&own.stream, op, &xs, y, elements);
    };
    let all_on_one_gpu = arrivals.iter().all(|arrival| same_gpu(&own.stream, &arrival.stream));
    let chunk = if all_on_one_gpu { elements } else { elements.min(PIECE_BYTES / own.dtype.bytes()) };
    for offset in (0..elements).step_by(chunk.max(1)) {
        let count = chunk.min(elements - offset);
        let mut xs = Vec::new();
        for (i, arrival) in in_order() {
            let x = arrival.x + bytes(start + offset) as u64;
            if same_gpu(&own.stream, &arrival.stream) {
                xs.push(x);
                continue;
            }
            copy(&own.stream, slot(i, chunk), &arrival.stream, x, bytes(count))?;
            xs.push(slot(i, chunk));
        }
        combine(&own.stream, op, &xs, y + bytes(offset) as u64, count)?;
    }
    Ok(())
}

/// Assembles a member's target from the members' sources.
fn gather(arrivals: &[Arrival], member: usize, sources: &[Region], target: &Region) -> Result<(), KernelError> {
    let own = &arrivals[member];
    for (other, boxes) in taken(member, sources, target) {
        let source = &sources[other];
        for common in &boxes {
            let (from, to) = (common.relative_to(source), common.relative_to(target));
            let from = StridedRegion { address: arrivals[other].x, shape: &source.size, region: &from };
            let to = StridedRegion { address: own.y, shape: &target.size, region: &to };
            copy_between(&own.stream, &arrivals[other].stream, from, to, own.dtype)?;
        }
    }
    Ok(())
}

impl Enqueue for SharedGpu {
    fn enqueue(
        &self,
        call: &CollectiveCall,
        reads: &[View<'_>],
        writes: &[View<'_>],
        workspace: Option<&View<'_>>,
        stream: &Arc<RawStream>,
    ) -> Result<Enqueued, KernelError> {
        check_members(call)?;
        let rendezvous = self.0.rendezvous(call.group.id);
        if let Err(error) = check_call(call, reads, writes) {
            let mut state = rendezvous.state.lock();
            if let Some(earlier) = self.0.failure(&state) {
                return Err(earlier);
            }
            let views = describe_views(call, reads, writes);
            let mismatch = KernelError::CollectiveMismatch {
                group: call.group.id,
                member: call.member,
                expected: "buffers that fit the call".to_owned(),
                got: format!("{views} ({error})"),
            };
            self.0.fail_group(&rendezvous, &mut state, mismatch);
            return Err(error);
        }
        let ready = stream.record()?;
        let pending = |view: &View<'_>, from, to, sends| {
            let (address, shape, dtype) = (device_address(view)?, view.shape().to_vec(), view.dtype());
            Ok(Transfer { id: 0, from, to, sends, address, shape, dtype, stream: stream.clone(), ready: ready.clone() })
        };
        match (&call.kind, reads, writes) {
            (CollectiveKind::Send { to }, [x], _) => {
                self.0.join_transfer(rendezvous, call, pending(x, call.member, *to, true)?)
            }
            (CollectiveKind::Receive { from }, _, [y]) => {
                self.0.join_transfer(rendezvous, call, pending(y, *from, call.member, false)?)
            }
            (_, [x], [y]) => {
                let arrival = Arrival {
                    call: call.clone(),
                    x: device_address(x)?,
                    y: device_address(y)?,
                    workspace: workspace.map_or(Ok(0), device_address)?,
                    x_shape: x.shape().to_vec(),
                    y_shape: y.shape().to_vec(),
                    dtype: x.dtype(),
                    stream: stream.clone(),
                    ready,
                };
                self.0.join_collective(rendezvous, arrival)
            }
            _ => Ok(Enqueued::Issued),
        }
    }
}

impl Collective for SharedGpu {
    fn run(&self, call: &CollectiveCall, _: &[View<'_>], _: &[View<'_>]) -> Result<(), KernelError> {
        Err(KernelError::arguments(call.name(), "stream", "a CUDA stream", "a host thread"))
    }

    fn abort(&self, cause: &str) {
        self.0.abort_status.abort(cause);
        let groups: Vec<_> = self.0.groups.lock().values().cloned().collect();
        for rendezvous in groups {
            // Lock, so that no member can check for an abort before it and start to wait after the notification.
            drop(rendezvous.state.lock());
            rendezvous.changed.notify_all();
        }
    }

    /// A member whose stream waits on the GPU for another stream is unknown to the host.
    fn waits(&self) -> Vec<MemberWait> {
        Vec::new()
    }

    fn knows_waits(&self) -> bool {
        false
    }

    fn outcomes(&self) -> Vec<AbortStatus> {
        vec![self.0.abort_status.clone()]
    }

    fn on_device(&self, _: &CollectiveCall) -> Option<CudaCollective<'_>> {
        Some(CudaCollective(self))
    }

    fn bytes_received(&self, rank: usize) -> u64 {
        self.0.received.lock().get(&rank).copied().unwrap_or(0)
    }
}
