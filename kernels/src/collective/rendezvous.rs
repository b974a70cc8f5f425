//! The rendezvous of a group's members on the host, for engines whose members all run in this process.
//!
//! - MEET-3: if the calls of a group's members differ, the group fails permanently. So no member waits for a member
//!   that has left.

use std::collections::HashMap;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use parking_lot::{Condvar, Mutex, MutexGuard};

use crate::collective::call::{CollectiveCall, CollectiveKind, Group};
use crate::collective::exchange::{Terms, check_buffers, check_call, check_members, describe, describe_views};
use crate::collective::status::{AbortStatus, MemberWait, ReceivedBytes};
use crate::error::{KernelError, Result};
use crate::memory::View;
use crate::tensor::DType;

/// How long a waiting member spins before it parks.
const SPIN: Duration = Duration::from_micros(20);

/// What a member posts when it arrives. `M` is the engine's type for access to the member's buffers.
#[derive(Clone, Debug)]
pub(crate) struct Post<M> {
    pub(crate) call: CollectiveCall,
    /// This shape is empty if the call reads nothing. Likewise, `y_shape` is empty if the call writes nothing.
    pub(crate) x_shape: Vec<usize>,
    pub(crate) y_shape: Vec<usize>,
    pub(crate) dtype: DType,
    pub(crate) memory: M,
}

/// All posts of a collective, by member.
pub(crate) type Posts<M> = Arc<[Post<M>]>;

impl<M> Post<M> {
    pub(crate) fn new(call: &CollectiveCall, reads: &[View<'_>], writes: &[View<'_>], memory: M) -> Self {
        let shape = |views: &[View<'_>]| views.first().map_or(Vec::new(), |view| view.shape().to_vec());
        let dtype = reads.iter().chain(writes).next().map_or(DType::F32, View::dtype);
        Self { call: call.clone(), x_shape: shape(reads), y_shape: shape(writes), dtype, memory }
    }

    fn terms(&self) -> Terms<'_> {
        Terms::of(&self.call, &self.x_shape, &self.y_shape, self.dtype)
    }

    fn describe(&self) -> String {
        describe(&self.call, Some((self.dtype, &self.x_shape)))
    }

    fn mismatch(&self, expected: String, got: String) -> KernelError {
        self.call.group.mismatch(self.call.member, expected, got)
    }

    /// The sender, the receiver, and whether this is the sender's post. `None` for a collective of all members.
    pub(crate) fn ends(&self) -> Option<(usize, usize, bool)> {
        match self.call.kind {
            CollectiveKind::Send { to } => Some((self.call.member, to, true)),
            CollectiveKind::Receive { from } => Some((from, self.call.member, false)),
            _ => None,
        }
    }
}

#[derive(Debug)]
pub(crate) struct Groups<M> {
    by_id: Mutex<HashMap<u32, Arc<Rendezvous<M>>>>,
    pub(crate) received: ReceivedBytes,
    pub(crate) abort_status: AbortStatus,
}

impl<M> Default for Groups<M> {
    fn default() -> Self {
        Self { by_id: Mutex::default(), received: ReceivedBytes::default(), abort_status: AbortStatus::default() }
    }
}

impl<M: Clone> Groups<M> {
    /// Checks a call's host or device buffers and returns its rendezvous. If the buffers do not fit, the group fails.
    pub(crate) fn enter(
        &self,
        call: &CollectiveCall,
        reads: &[View<'_>],
        writes: &[View<'_>],
        on_host: bool,
    ) -> Result<Arc<Rendezvous<M>>> {
        check_members(call)?;
        let new = || Arc::new(Rendezvous::new(&call.group, &self.abort_status));
        let rendezvous = self.by_id.lock().entry(call.group.id).or_insert_with(new).clone();
        let checked = if on_host { check_buffers(call, reads, writes) } else { check_call(call, reads, writes) };
        let Err(error) = checked else { return Ok(rendezvous) };
        let mut state = rendezvous.state.lock();
        if let Some(earlier) = rendezvous.failure(&state) {
            return Err(earlier);
        }
        let got = format!("{} ({error})", describe_views(call, reads, writes));
        rendezvous.fail(&mut state, call.group.mismatch(call.member, "buffers that fit the call", got));
        Err(error)
    }

    pub(crate) fn abort(&self, cause: &str) {
        self.abort_status.abort(cause);
        let groups: Vec<_> = self.by_id.lock().values().cloned().collect();
        for rendezvous in groups {
            // The lock prevents a missed notification: while it is held, no member is between its check for an abort
            // and its wait.
            drop(rendezvous.state.lock());
            rendezvous.changed.notify_all();
        }
    }

    /// The current waits. In a collective, members that have posted wait for members that have not posted. In a
    /// transfer, each side waits for the other side.
    pub(crate) fn waits(&self) -> Vec<MemberWait> {
        let groups: Vec<_> = self.by_id.lock().values().cloned().collect();
        groups.iter().flat_map(|rendezvous| rendezvous.waits()).collect()
    }
}

#[derive(Debug)]
pub(crate) struct Rendezvous<M> {
    group: Arc<Group>,
    abort_status: AbortStatus,
    state: Mutex<State<M>>,
    changed: Condvar,
    /// Incremented when a waiting member may continue. Members that spin read it without the lock.
    changes: AtomicU64,
}

#[derive(Debug)]
struct State<M> {
    /// Posts of the waiting members, by member.
    posts: Vec<Option<Post<M>>>,
    /// The posts of the current round, which the last member to arrive stores for the other members.
    current: Option<Posts<M>>,
    /// Number of collectives that all members have joined.
    rounds: u64,
    /// Number of members that have arrived at the current barrier.
    at_barrier: usize,
    barriers: u64,
    /// Point-to-point posts that wait for their peer or are being copied, in order of arrival.
    transfers: Vec<Transfer<M>>,
    next_transfer: u64,
    failed: Option<KernelError>,
}

#[derive(Debug)]
struct Transfer<M> {
    id: u64,
    post: Post<M>,
    /// The peer is copying, so the transfer completes even after an abort.
    taken: bool,
}

pub(crate) enum Arrival<M> {
    /// All members have arrived. Holds the result of the `complete` that the last member to arrive ran.
    Complete(Option<Posts<M>>),
    /// The member must pass this to [`Rendezvous::wait_for`].
    Waits(Awaited),
}

#[derive(Clone, Copy, Debug)]
pub(crate) enum Awaited {
    LastMember { member: usize, round: u64 },
    Peer { transfer: u64 },
}

impl<M: Clone> State<M> {
    /// The error if a member's collective does not match the call in which the other members wait.
    fn disagreement(&self, post: &Post<M>) -> Option<KernelError> {
        let mismatch = |expected: &str| Some(post.mismatch(expected.to_owned(), post.describe()));
        let member = post.call.member;
        let waiting = self.transfers.iter().filter(|transfer| !transfer.taken);
        let mut ends = waiting.filter_map(|transfer| transfer.post.ends());
        if let Some((_, _, sends)) = ends.find(|(from, to, sends)| member == if *sends { *to } else { *from }) {
            return mismatch(if sends { "receive" } else { "send" });
        }
        if self.posts.get(member).is_some_and(Option::is_some) {
            return mismatch("at most one call of a member at a time");
        }
        let first = self.posts.iter().flatten().next()?;
        if first.terms() != post.terms() { mismatch(&first.describe()) } else { None }
    }

    fn transfer(&self, id: u64) -> Option<&Transfer<M>> {
        self.transfers.iter().find(|transfer| transfer.id == id)
    }
}

impl<M: Clone> Rendezvous<M> {
    fn new(group: &Arc<Group>, abort_status: &AbortStatus) -> Self {
        let state = State {
            posts: Vec::new(),
            current: None,
            rounds: 0,
            at_barrier: 0,
            barriers: 0,
            transfers: Vec::new(),
            next_transfer: 0,
            failed: None,
        };
        Self {
            group: group.clone(),
            abort_status: abort_status.clone(),
            state: Mutex::new(state),
            changed: Condvar::new(),
            changes: AtomicU64::new(0),
        }
    }

    /// The error that ends new and waiting calls, if any.
    fn failure(&self, state: &State<M>) -> Option<KernelError> {
        state.failed.clone().or_else(|| self.abort_status.aborted())
    }

    /// Fails the group permanently and wakes its waiting members.
    fn fail(&self, state: &mut State<M>, error: KernelError) -> KernelError {
        let error = state.failed.get_or_insert(error).clone();
        self.advance();
        error
    }

    fn advance(&self) {
        self.changes.fetch_add(1, Ordering::Release);
        self.changed.notify_all();
    }

    /// Waits until `done` returns true for the state. Code that makes `done` true either calls [`Rendezvous::advance`]
    /// while it holds the lock, or takes and releases the lock and then notifies the waiting members.
    fn wait(&self, done: impl Fn(&State<M>) -> bool) -> MutexGuard<'_, State<M>> {
        let mut state = self.state.lock();
        while !done(&state) {
            let changes = self.changes.load(Ordering::Acquire);
            drop(state);
            let began = Instant::now();
            while self.changes.load(Ordering::Acquire) == changes && began.elapsed() < SPIN {
                std::hint::spin_loop();
            }
            state = self.state.lock();
            if self.changes.load(Ordering::Acquire) == changes && !done(&state) {
                self.changed.wait(&mut state);
            }
        }
        state
    }

    /// Arrives at a collective. The last member to arrive runs `complete` on all posts. All members get its result.
    pub(crate) fn join(
        &self,
        post: Post<M>,
        complete: impl FnOnce(Vec<Post<M>>) -> Result<Option<Posts<M>>>,
    ) -> Result<Arrival<M>> {
        let member = post.call.member;
        let mut state = self.state.lock();
        if let Some(error) = self.failure(&state) {
            return Err(error);
        }
        if let Some(error) = state.disagreement(&post) {
            return Err(self.fail(&mut state, error));
        }
        state.posts.resize_with(post.call.group.ranks.len(), || None);
        state.posts[member] = Some(post);
        if state.posts.iter().any(Option::is_none) {
            return Ok(Arrival::Waits(Awaited::LastMember { member, round: state.rounds }));
        }
        let posts = state.posts.iter_mut().filter_map(Option::take).collect();
        state.current = complete(posts).map_err(|error| self.fail(&mut state, error))?;
        state.rounds += 1;
        self.advance();
        Ok(Arrival::Complete(state.current.clone()))
    }

    /// Arrives at a transfer. The second member to arrive runs `copy` on both members' posts while the first one waits.
    pub(crate) fn transfer(
        &self,
        post: Post<M>,
        copy: impl FnOnce(&Post<M>, &Post<M>) -> Result<()>,
    ) -> Result<Arrival<M>> {
        let mut state = self.state.lock();
        if let Some(error) = self.failure(&state) {
            return Err(error);
        }
        let Some((from, to, sends)) = post.ends() else { return Ok(Arrival::Complete(None)) };
        if let Some(Some(waiting)) = state.posts.get(if sends { to } else { from }) {
            // The peer waits in a collective of the group, so the two calls can never match.
            let error = post.mismatch(waiting.describe(), post.call.name().to_owned());
            return Err(self.fail(&mut state, error));
        }
        let peer_ends = Some((from, to, !sends));
        let peer = state.transfers.iter_mut().find(|other| !other.taken && other.post.ends() == peer_ends);
        let Some(peer) = peer else {
            let id = state.next_transfer;
            state.next_transfer += 1;
            state.transfers.push(Transfer { id, post, taken: false });
            self.advance();
            return Ok(Arrival::Waits(Awaited::Peer { transfer: id }));
        };
        let (id, other) = (peer.id, peer.post.clone());
        let (sender, receiver) = if sends { (&post, &other) } else { (&other, &post) };
        if (&sender.x_shape, sender.dtype) != (&receiver.y_shape, receiver.dtype) {
            let expected = format!("send of {:?} {:?}", sender.dtype, sender.x_shape);
            let error = receiver.mismatch(expected, format!("receive of {:?} {:?}", receiver.dtype, receiver.y_shape));
            return Err(self.fail(&mut state, error));
        }
        peer.taken = true;
        drop(state);
        let copied = copy(sender, receiver);
        let mut state = self.state.lock();
        if let Err(error) = copied {
            state.transfers.iter_mut().filter(|transfer| transfer.id == id).for_each(|transfer| transfer.taken = false);
            return Err(self.fail(&mut state, error));
        }
        state.transfers.retain(|transfer| transfer.id != id);
        self.advance();
        Ok(Arrival::Complete(None))
    }

    /// Blocks until the awaited member has arrived, or the call fails.
    pub(crate) fn wait_for(&self, awaited: Awaited) -> Result<Option<Posts<M>>> {
        let is_complete = |state: &State<M>| match awaited {
            Awaited::LastMember { round, .. } => state.rounds != round,
            Awaited::Peer { transfer } => state.transfer(transfer).is_none(),
        };
        let is_taken = |state: &State<M>| match awaited {
            Awaited::LastMember { .. } => false,
            Awaited::Peer { transfer } => state.transfer(transfer).is_some_and(|transfer| transfer.taken),
        };
        let mut state = self.wait(|state| is_complete(state) || (!is_taken(state) && self.failure(state).is_some()));
        match (is_complete(&state), self.failure(&state)) {
            (false, Some(error)) => {
                match awaited {
                    Awaited::LastMember { member, .. } => state.posts[member] = None,
                    Awaited::Peer { transfer } => state.transfers.retain(|other| other.id != transfer),
                }
                Err(error)
            }
            _ => Ok(state.current.clone()),
        }
    }

    /// Waits until all members reach this barrier. All of them must be in the call.
    pub(crate) fn barrier(&self, members: usize) {
        let mut state = self.state.lock();
        state.at_barrier += 1;
        if state.at_barrier == members {
            state.at_barrier = 0;
            state.barriers += 1;
            self.advance();
            return;
        }
        let barriers = state.barriers;
        drop(state);
        drop(self.wait(|state| state.barriers != barriers));
    }

    fn waits(&self) -> Vec<MemberWait> {
        let (group, state) = (&self.group, self.state.lock());
        let (present, absent): (Vec<usize>, Vec<usize>) =
            (0..state.posts.len()).partition(|member| state.posts[*member].is_some());
        let pairs = present.iter().flat_map(|member| absent.iter().map(|peer| (*member, *peer)));
        let waiting = state.transfers.iter().filter(|transfer| !transfer.taken);
        let ends = waiting.filter_map(|transfer| transfer.post.ends());
        let pairs = pairs.chain(ends.map(|(from, to, sends)| if sends { (from, to) } else { (to, from) }));
        pairs.map(|(member, peer)| MemberWait::new(group, member, peer)).collect()
    }
}
