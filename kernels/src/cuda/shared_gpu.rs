//! Collectives between devices of one process that share GPUs, which NCCL refuses: members meet on the host, and whoever comes
//! last puts all members' parts on their streams, ordered by events. No host waits for a GPU. What lies on another GPU is
//! copied over before a kernel reads it.
//!
//! - LOCAL-1: a member that is not the last waits on the host until the last has come: its stream's own thread does, so
//!   nothing is put on its stream meanwhile but by the last.
//! - LOCAL-2: on the streams a member touches another's memory only behind that member's `ready` event, and goes on only
//!   behind all members' `done` events: as MEET-1, between streams.
//! - LOCAL-3: a group whose members disagreed fails for good, so that nobody waits for a member that has left.

use std::collections::HashMap;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};

use super::engine::{self, CudaCollective, Enqueue, Enqueued};
use super::event::Recorded;
use super::lower::collective::{PIECE_BYTES, regions, start_of_piece};
use super::raw_stream::RawStream;
use super::staged::device_address;
use super::strided_copy::{StridedRegion, combine, copy_region, fetch_region, foreign_elements};
use crate::collective::exchange::{Terms, check_call, check_members, describe, describe_views, taken};
use crate::collective::{AbortStatus, Collective, CollectiveCall, CollectiveKind, MemberWait, ReduceOp};
use crate::error::KernelError;
use crate::memory::View;
use crate::tensor::{DType, Region, element_count, split_range};

/// The engine of devices that share a GPU. One is shared by all of them.
#[derive(Debug, Default)]
pub struct SharedGpu(Arc<Inner>);

#[derive(Debug, Default)]
struct Inner {
    groups: Mutex<HashMap<u32, Arc<Meeting>>>,
    received: Mutex<HashMap<usize, u64>>,
    outcome: AbortStatus,
}

/// Where the members of one group meet.
#[derive(Debug, Default)]
struct Meeting {
    state: Mutex<State>,
    changed: Condvar,
}

#[derive(Debug, Default)]
struct State {
    /// Of the members that wait in a collective, by member.
    posts: Vec<Option<Post>>,
    /// Collectives that all have come to.
    rounds: u64,
    /// Of the members that wait in a point-to-point call, in their order.
    messages: Vec<Message>,
    next_message: u64,
    failed: Option<KernelError>,
}

/// What a member brings.
#[derive(Clone, Debug)]
struct Post {
    call: CollectiveCall,
    /// Addresses.
    x: u64,
    y: u64,
    /// STAGE-1.
    workspace: u64,
    x_shape: Vec<usize>,
    y_shape: Vec<usize>,
    dtype: DType,
    lane: Arc<RawStream>,
    /// Behind all that the member's stream did before.
    ready: Arc<Recorded>,
}

/// One side of a point-to-point transfer that waits for the other.
#[derive(Debug)]
struct Message {
    id: u64,
    from: usize,
    to: usize,
    /// Whether the sender waits, and not the receiver.
    sends: bool,
    address: u64,
    shape: Vec<usize>,
    dtype: DType,
    lane: Arc<RawStream>,
    ready: Arc<Recorded>,
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Post {
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
    /// An engine with no groups yet; they come with the calls.
    pub fn new() -> Self {
        Self::default()
    }
}

impl Inner {
    fn meeting(&self, group: u32) -> Arc<Meeting> {
        lock(&self.groups).entry(group).or_default().clone()
    }

    /// What ends a call that comes or waits, if anything does.
    fn ended(&self, state: &State) -> Option<KernelError> {
        state.failed.clone().or_else(|| self.outcome.aborted())
    }

    fn count(&self, call: &CollectiveCall, y_shape: &[usize]) {
        let bytes = foreign_elements(call, y_shape) * DType::F32.bytes();
        *lock(&self.received).entry(call.group.ranks[call.member]).or_default() += bytes as u64;
    }

    /// Fails the group for good, and tells who waits.
    fn fail(&self, meeting: &Meeting, state: &mut State, error: KernelError) -> KernelError {
        let error = state.failed.get_or_insert(error).clone();
        meeting.changed.notify_all();
        error
    }

    fn collective(self: &Arc<Self>, meeting: Arc<Meeting>, post: Post) -> Result<Enqueued, KernelError> {
        let (member, members) = (post.call.member, post.call.group.ranks.len());
        let mut state = lock(&meeting.state);
        if let Some(error) = self.ended(&state) {
            return Err(error);
        }
        if let Some(error) = disagreement(&state, &post) {
            return Err(self.fail(&meeting, &mut state, error));
        }
        state.posts.resize(members, None);
        state.posts[member] = Some(post);
        if state.posts.iter().all(Option::is_some) {
            let posts: Vec<Post> = state.posts.iter_mut().filter_map(Option::take).collect();
            // The caller's own context is bound again, whatever happened.
            if let Err(error) = issue(&posts).and(bind(&posts[member].lane)) {
                return Err(self.fail(&meeting, &mut state, error));
            }
            posts.iter().for_each(|post| self.count(&post.call, &post.y_shape));
            state.rounds += 1;
            meeting.changed.notify_all();
            return Ok(Enqueued::Issued);
        }
        let (rounds, own) = (state.rounds, self.clone());
        drop(state);
        let come = move |state: &State| state.rounds != rounds;
        let leave = move |state: &mut State| state.posts[member] = None;
        Ok(Enqueued::Waits(own.wait(meeting, come, leave)))
    }

    /// Waits on the host until `come` holds, or the call has ended: then the member is taken away by `leave`.
    fn wait(
        self: Arc<Self>,
        meeting: Arc<Meeting>,
        come: impl Fn(&State) -> bool + Send + 'static,
        leave: impl FnOnce(&mut State) + Send + 'static,
    ) -> engine::Wait {
        Box::new(move || {
            let mut state = lock(&meeting.state);
            loop {
                if come(&state) {
                    return Ok(());
                }
                if let Some(error) = self.ended(&state) {
                    leave(&mut state);
                    return Err(error);
                }
                state = meeting.changed.wait(state).unwrap_or_else(PoisonError::into_inner);
            }
        })
    }

    fn message(
        self: &Arc<Self>,
        meeting: Arc<Meeting>,
        call: &CollectiveCall,
        mut message: Message,
    ) -> Result<Enqueued, KernelError> {
        let mut state = lock(&meeting.state);
        if let Some(error) = self.ended(&state) {
            return Err(error);
        }
        let peer = if message.sends { message.to } else { message.from };
        if let Some(Some(waiting)) = state.posts.get(peer) {
            let (expected, got) = (waiting.describe(), call.name().to_owned());
            let (group, member) = (call.group.id, call.member);
            let error = KernelError::CollectiveMismatch { group, member, expected, got };
            return Err(self.fail(&meeting, &mut state, error));
        }
        let fits = |other: &Message| (other.from, other.to, other.sends) == (message.from, message.to, !message.sends);
        if let Some(place) = state.messages.iter().position(fits) {
            let other = state.messages.remove(place);
            let (sender, receiver) = if message.sends { (&message, &other) } else { (&other, &message) };
            if let Err(error) = transfer(call, sender, receiver).and(bind(&message.lane)) {
                return Err(self.fail(&meeting, &mut state, error));
            }
            if sender.from != sender.to {
                let (rank, bytes) = (call.group.ranks[sender.to], element_count(&sender.shape) * sender.dtype.bytes());
                *lock(&self.received).entry(rank).or_default() += bytes as u64;
            }
            meeting.changed.notify_all();
            return Ok(Enqueued::Issued);
        }
        let id = state.next_message;
        state.next_message += 1;
        message.id = id;
        state.messages.push(message);
        drop(state);
        let come = move |state: &State| state.messages.iter().all(|message| message.id != id);
        let leave = move |state: &mut State| state.messages.retain(|message| message.id != id);
        Ok(Enqueued::Waits(self.clone().wait(meeting, come, leave)))
    }
}

fn disagreement(state: &State, post: &Post) -> Option<KernelError> {
    let mismatch = |expected: String| KernelError::CollectiveMismatch {
        group: post.call.group.id,
        member: post.call.member,
        expected,
        got: post.describe(),
    };
    let member = post.call.member;
    if state.messages.iter().any(|m| m.sends && m.to == member) {
        return Some(mismatch("receive".to_owned()));
    }
    if state.messages.iter().any(|m| !m.sends && m.from == member) {
        return Some(mismatch("send".to_owned()));
    }
    if state.posts.get(member).is_some_and(Option::is_some) {
        return Some(mismatch("one call of a member at a time".to_owned()));
    }
    let first = state.posts.iter().flatten().next()?;
    (first.terms() != post.terms()).then(|| mismatch(first.describe()))
}

/// Puts a transfer on the receiver's stream; the sender's goes on behind it.
fn transfer(call: &CollectiveCall, sender: &Message, receiver: &Message) -> Result<(), KernelError> {
    if (&sender.shape, sender.dtype) != (&receiver.shape, receiver.dtype) {
        return Err(KernelError::CollectiveMismatch {
            group: call.group.id,
            member: receiver.to,
            expected: format!("send of {:?} {:?}", sender.dtype, sender.shape),
            got: format!("receive of {:?} {:?}", receiver.dtype, receiver.shape),
        });
    }
    let lane = &receiver.lane;
    bind(lane)?;
    lane.wait(&sender.ready)?;
    copy(lane, receiver.address, &sender.lane, sender.address, element_count(&sender.shape) * sender.dtype.bytes())?;
    let done = lane.record()?;
    bind(&sender.lane)?;
    sender.lane.wait(&done)
}

/// What is put on a stream is put there with its GPU's context bound.
fn bind(lane: &RawStream) -> Result<(), KernelError> {
    lane.gpu().context().bind()
}

fn on_one_gpu(lane: &RawStream, other: &RawStream) -> bool {
    Arc::ptr_eq(lane.gpu().context(), other.gpu().context())
}

/// Copies what lies on `source`'s GPU.
fn copy(lane: &RawStream, to: u64, source: &RawStream, from: u64, bytes: usize) -> Result<(), KernelError> {
    if on_one_gpu(lane, source) {
        return lane.copy(to, from, bytes);
    }
    lane.copy_from(to, source.gpu().context(), from, bytes)
}

/// Copies a box of what lies on `source`'s GPU.
fn copy_boxed(
    lane: &RawStream,
    source: &RawStream,
    from: StridedRegion<'_>,
    to: StridedRegion<'_>,
    dtype: DType,
) -> Result<(), KernelError> {
    if on_one_gpu(lane, source) {
        return copy_region(lane, from, to, dtype);
    }
    fetch_region(lane, source.gpu().context(), from, to, dtype)
}

/// Has each member's stream wait for an event of each other's.
fn all_wait(posts: &[Post], events: &[Arc<Recorded>]) -> Result<(), KernelError> {
    for (i, post) in posts.iter().enumerate() {
        bind(&post.lane)?;
        for (_, event) in events.iter().enumerate().filter(|(j, _)| *j != i) {
            post.lane.wait(event)?;
        }
    }
    Ok(())
}

fn record_all(posts: &[Post]) -> Result<Vec<Arc<Recorded>>, KernelError> {
    posts.iter().map(|post| bind(&post.lane).and_then(|()| post.lane.record())).collect()
}

/// Puts all members' parts on their streams (LOCAL-2).
fn issue(posts: &[Post]) -> Result<(), KernelError> {
    let Some(first) = posts.first() else { return Ok(()) };
    let ready: Vec<_> = posts.iter().map(|post| post.ready.clone()).collect();
    all_wait(posts, &ready)?;
    for (i, post) in posts.iter().enumerate() {
        bind(&post.lane)?;
        match &first.call.kind {
            CollectiveKind::AllReduce { op } => {
                let own = split_range(element_count(&post.y_shape), posts.len(), i);
                let chunk = Region { start: vec![own.start], size: vec![own.len()] };
                reduce(posts, i, *op, (&[element_count(&post.y_shape)], &chunk), post.y(own.start))?;
            }
            CollectiveKind::ReduceScatter { op, parts } => reduce(posts, i, *op, (&post.x_shape, &parts[i]), post.y)?,
            CollectiveKind::Broadcast { root } => {
                let (root, bytes) = (&posts[*root], element_count(&post.y_shape) * post.dtype.bytes());
                copy(&post.lane, post.y, &root.lane, root.x, bytes)?;
            }
            kind => {
                if let Some((sources, targets)) = regions(kind, &post.y_shape) {
                    gather(posts, i, sources, &targets[i])?;
                }
            }
        }
    }
    if let CollectiveKind::AllReduce { .. } = first.call.kind {
        all_wait(posts, &record_all(posts)?)?;
        exchange_chunks(posts)?;
    }
    all_wait(posts, &record_all(posts)?)
}

/// The second half of an all-reduce: everybody takes from each member the chunk that it has combined.
fn exchange_chunks(posts: &[Post]) -> Result<(), KernelError> {
    for (i, post) in posts.iter().enumerate() {
        bind(&post.lane)?;
        for (j, other) in posts.iter().enumerate().filter(|(j, _)| *j != i) {
            let chunk = split_range(element_count(&post.y_shape), posts.len(), j);
            let (to, from) = (post.y(chunk.start), other.y(chunk.start));
            copy(&post.lane, to, &other.lane, from, chunk.len() * post.dtype.bytes())?;
        }
    }
    Ok(())
}

/// Combines all members' boxes of `(shape, part)` to `y`, for member `owner`: boxes that are not in one piece are brought to slots
/// of the owner's workspace first, and those on other GPUs too, a piece at a time.
fn reduce(
    posts: &[Post],
    owner: usize,
    op: ReduceOp,
    (shape, part): (&[usize], &Region),
    y: u64,
) -> Result<(), KernelError> {
    let (own, elements) = (&posts[owner], part.element_count());
    let bytes = |elements: usize| elements * own.dtype.bytes();
    let in_order = || (1..=posts.len()).map(|m| &posts[(owner + m) % posts.len()]).enumerate();
    let slot = |i: usize, elements: usize| own.workspace + (i * bytes(elements)) as u64;
    let Some(start) = start_of_piece(shape, part) else {
        let whole = Region::whole(&part.size);
        for (i, post) in in_order() {
            let to = StridedRegion { address: slot(i, elements), shape: &part.size, region: &whole };
            let from = StridedRegion { address: post.x, shape, region: part };
            copy_boxed(&own.lane, &post.lane, from, to, own.dtype)?;
        }
        let xs: Vec<u64> = in_order().map(|(i, _)| slot(i, elements)).collect();
        return combine(&own.lane, op, &xs, y, elements);
    };
    let near = posts.iter().all(|post| on_one_gpu(&own.lane, &post.lane));
    let most = if near { elements } else { elements.min(PIECE_BYTES / own.dtype.bytes()) };
    for at in (0..elements).step_by(most.max(1)) {
        let count = most.min(elements - at);
        let mut xs = Vec::new();
        for (i, post) in in_order() {
            let x = post.x + bytes(start + at) as u64;
            if on_one_gpu(&own.lane, &post.lane) {
                xs.push(x);
                continue;
            }
            copy(&own.lane, slot(i, most), &post.lane, x, bytes(count))?;
            xs.push(slot(i, most));
        }
        combine(&own.lane, op, &xs, y + bytes(at) as u64, count)?;
    }
    Ok(())
}

/// Copies a member's target together from the members' sources.
fn gather(posts: &[Post], member: usize, sources: &[Region], target: &Region) -> Result<(), KernelError> {
    let own = &posts[member];
    for (other, boxes) in taken(member, sources, target) {
        let source = &sources[other];
        for common in &boxes {
            let (from, to) = (common.relative_to(source), common.relative_to(target));
            let from = StridedRegion { address: posts[other].x, shape: &source.size, region: &from };
            let to = StridedRegion { address: own.y, shape: &target.size, region: &to };
            copy_boxed(&own.lane, &posts[other].lane, from, to, own.dtype)?;
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
        lane: &Arc<RawStream>,
    ) -> Result<Enqueued, KernelError> {
        check_members(call)?;
        let meeting = self.0.meeting(call.group.id);
        if let Err(error) = check_call(call, reads, writes) {
            let mut state = lock(&meeting.state);
            if let Some(earlier) = self.0.ended(&state) {
                return Err(earlier);
            }
            let seen = describe_views(call, reads, writes);
            let told = KernelError::CollectiveMismatch {
                group: call.group.id,
                member: call.member,
                expected: "buffers that fit the call".to_owned(),
                got: format!("{seen} ({error})"),
            };
            self.0.fail(&meeting, &mut state, told);
            return Err(error);
        }
        let ready = lane.record()?;
        let message = |view: &View<'_>, from, to, sends| {
            let (address, shape, dtype) = (device_address(view)?, view.shape().to_vec(), view.dtype());
            Ok(Message { id: 0, from, to, sends, address, shape, dtype, lane: lane.clone(), ready: ready.clone() })
        };
        match (&call.kind, reads, writes) {
            (CollectiveKind::Send { to }, [x], _) => self.0.message(meeting, call, message(x, call.member, *to, true)?),
            (CollectiveKind::Receive { from }, _, [y]) => {
                self.0.message(meeting, call, message(y, *from, call.member, false)?)
            }
            (_, [x], [y]) => {
                let post = Post {
                    call: call.clone(),
                    x: device_address(x)?,
                    y: device_address(y)?,
                    workspace: workspace.map_or(Ok(0), device_address)?,
                    x_shape: x.shape().to_vec(),
                    y_shape: y.shape().to_vec(),
                    dtype: x.dtype(),
                    lane: lane.clone(),
                    ready,
                };
                self.0.collective(meeting, post)
            }
            _ => Ok(Enqueued::Issued),
        }
    }
}

impl Collective for SharedGpu {
    fn run(&self, call: &CollectiveCall, _: &[View<'_>], _: &[View<'_>]) -> Result<(), KernelError> {
        Err(KernelError::arguments(call.name(), "stream", "a stream of a GPU", "the host"))
    }

    fn abort(&self, cause: &str) {
        self.0.outcome.abort(cause);
        let groups: Vec<_> = lock(&self.0.groups).values().cloned().collect();
        for meeting in groups {
            // Taken so that nobody can look for an abort before it and wait after the notification.
            drop(lock(&meeting.state));
            meeting.changed.notify_all();
        }
    }

    /// Nothing is known of a member that waits on the GPU for another's stream.
    fn waits(&self) -> Vec<MemberWait> {
        Vec::new()
    }

    fn knows_waits(&self) -> bool {
        false
    }

    fn outcomes(&self) -> Vec<AbortStatus> {
        vec![self.0.outcome.clone()]
    }

    fn on_device(&self, _: &CollectiveCall) -> Option<CudaCollective<'_>> {
        Some(CudaCollective(self))
    }

    fn bytes_received(&self, rank: usize) -> u64 {
        lock(&self.0.received).get(&rank).copied().unwrap_or(0)
    }
}
