//! Collectives between the devices of one process: members meet, then read each other's memory directly, with nothing
//! staged.
//!
//! - MEET-1: all members of a group are in the same call before any touches another's memory, and none leaves before
//!   the last has finished: in between, the register protocol lets nobody else write what they post.
//! - MEET-2: arguments are checked at the meeting, so nothing between meeting and leaving can fail or wait for longer
//!   than the members' own copying. So an abort needs to wake only those who wait for a meeting.
//! - MEET-3: a group whose members disagreed fails for good, so that nobody waits for a member that has left.
#![allow(unsafe_code)]

use std::collections::HashMap;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, OnceLock, PoisonError};
use std::time::{Duration, Instant};

use crate::collective::exchange::{
    Met, Posted, Terms, check_buffers, check_members, copy_elements, describe, describe_views, exchange,
};
use crate::collective::{Collective, CollectiveCall, CollectiveKind, Group, MemberWait};
use crate::error::KernelError;
use crate::memory::View;
use crate::tensor::{DType, element_count};

/// How long a member spins for the others before it parks.
const SPIN: Duration = Duration::from_micros(20);

/// The engine of devices that share a process. One is shared by all of them.
#[derive(Debug, Default)]
pub struct InProcess {
    groups: Mutex<HashMap<u32, Arc<Meeting>>>,
    received: Mutex<HashMap<usize, u64>>,
    aborted: Mutex<Option<String>>,
}

/// Where the members of one group meet.
#[derive(Debug, Default)]
struct Meeting {
    state: Mutex<State>,
    changed: Condvar,
    /// Grows whenever all have arrived, or the group fails. Read without the lock while spinning.
    round: AtomicU64,
    /// Whose it is, once somebody has come.
    group: OnceLock<Arc<Group>>,
}

#[derive(Debug, Default)]
struct State {
    /// What the members that wait have posted, by member.
    posts: Vec<Option<Post>>,
    /// All posts of the meeting that is under way.
    current: Option<Arc<Vec<Post>>>,
    /// Meetings that all members have come to.
    meetings: u64,
    /// Members that have arrived at the barrier that ends a phase.
    at_barrier: usize,
    /// Barriers that all members have come to.
    barriers: u64,
    /// Point-to-point transfers that wait for their other side, or are being copied.
    transfers: Vec<Transfer>,
    next_transfer: u64,
    /// `(from, to)` of the members that wait to receive.
    receiving: Vec<(usize, usize)>,
    failed: Option<KernelError>,
}

/// What a member brings to a meeting.
#[derive(Clone, Debug)]
struct Post {
    call: CollectiveCall,
    x: Posted,
    y: Posted,
    x_shape: Vec<usize>,
    y_shape: Vec<usize>,
    dtype: DType,
}

#[derive(Debug)]
struct Transfer {
    id: u64,
    from: usize,
    to: usize,
    source: Posted,
    shape: Vec<usize>,
    dtype: DType,
    taken: bool,
}

impl Post {
    fn terms(&self) -> Terms<'_> {
        Terms::of(&self.call, &self.x_shape, &self.y_shape, self.dtype)
    }

    fn describe(&self) -> String {
        describe(&self.call, Some((self.dtype, &self.x_shape)))
    }
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Meeting {
    fn advance(&self) {
        self.round.fetch_add(1, Ordering::Release);
        self.changed.notify_all();
    }

    /// Waits until `done` holds of the state. Whoever makes it hold calls [`Meeting::advance`] with the lock held, or
    /// notifies after having held it.
    fn wait<'a>(&'a self, mut state: MutexGuard<'a, State>, done: impl Fn(&State) -> bool) -> MutexGuard<'a, State> {
        while !done(&state) {
            let round = self.round.load(Ordering::Acquire);
            drop(state);
            let began = Instant::now();
            while self.round.load(Ordering::Acquire) == round && began.elapsed() < SPIN {
                std::hint::spin_loop();
            }
            state = lock(&self.state);
            if self.round.load(Ordering::Acquire) == round && !done(&state) {
                state = self.changed.wait(state).unwrap_or_else(PoisonError::into_inner);
            }
        }
        state
    }

    /// Waits for all `members` to arrive here. All of them are in the call (MEET-1, MEET-2).
    fn barrier(&self, members: usize) {
        let mut state = lock(&self.state);
        state.at_barrier += 1;
        if state.at_barrier == members {
            state.at_barrier = 0;
            state.barriers += 1;
            self.advance();
            return;
        }
        let barriers = state.barriers;
        drop(self.wait(state, |state| state.barriers != barriers));
    }
}

impl InProcess {
    /// An engine with no groups yet; they come with the calls.
    pub fn new() -> Self {
        Self::default()
    }

    fn meeting(&self, group: &Arc<Group>) -> Arc<Meeting> {
        let meeting = lock(&self.groups).entry(group.id).or_default().clone();
        meeting.group.get_or_init(|| group.clone());
        meeting
    }

    fn check_aborted(&self) -> Result<(), KernelError> {
        match &*lock(&self.aborted) {
            Some(cause) => Err(KernelError::Aborted { cause: cause.clone() }),
            None => Ok(()),
        }
    }

    fn is_aborted(&self) -> bool {
        lock(&self.aborted).is_some()
    }

    /// Why a wait ended without what it waited for.
    fn why_not(&self, state: &State) -> KernelError {
        let cause = lock(&self.aborted).clone();
        let aborted = |cause| KernelError::Aborted { cause };
        state.failed.clone().or(cause.map(aborted)).unwrap_or_else(|| aborted("the other side has left".to_owned()))
    }

    fn count(&self, call: &CollectiveCall, elements: usize) {
        let bytes = (elements * size_of::<f32>()) as u64;
        *lock(&self.received).entry(call.group.ranks[call.member]).or_default() += bytes;
    }

    /// Fails the group for good, and tells who waits.
    fn fail(&self, meeting: &Meeting, mut state: MutexGuard<'_, State>, error: KernelError) -> KernelError {
        let error = state.failed.get_or_insert(error).clone();
        meeting.advance();
        error
    }

    /// Tells the others that this member cannot join, for its buffers do not fit.
    fn refuse(&self, meeting: &Meeting, call: &CollectiveCall, seen: &str, error: KernelError) -> KernelError {
        let state = lock(&meeting.state);
        let failed = state.failed.clone().map(Err).unwrap_or_else(|| self.check_aborted());
        if let Err(earlier) = failed {
            return earlier;
        }
        let told = KernelError::CollectiveMismatch {
            group: call.group.id,
            member: call.member,
            expected: "buffers that fit the call".to_owned(),
            got: format!("{seen} ({error})"),
        };
        self.fail(meeting, state, told);
        error
    }

    /// Posts `post` and waits for the others' posts.
    fn meet(&self, meeting: &Meeting, post: Post) -> Result<Arc<Vec<Post>>, KernelError> {
        let (member, members) = (post.call.member, post.call.group.ranks.len());
        let mut state = lock(&meeting.state);
        self.check_aborted()?;
        if let Some(error) = &state.failed {
            return Err(error.clone());
        }
        if let Some(error) = disagreement(&state, &post) {
            return Err(self.fail(meeting, state, error));
        }
        state.posts.resize(members, None);
        state.posts[member] = Some(post);
        if state.posts.iter().all(Option::is_some) {
            let all: Vec<Post> = state.posts.iter_mut().filter_map(Option::take).collect();
            let all = Arc::new(all);
            state.current = Some(all.clone());
            state.meetings += 1;
            meeting.advance();
            return Ok(all);
        }
        let meetings = state.meetings;
        let met = |state: &State| state.meetings != meetings;
        let mut state = meeting.wait(state, |state| met(state) || state.failed.is_some() || self.is_aborted());
        match (met(&state), &state.current) {
            (true, Some(all)) => Ok(all.clone()),
            _ => {
                state.posts[member] = None;
                Err(self.why_not(&state))
            }
        }
    }

    fn exchange(
        &self,
        meeting: &Meeting,
        call: &CollectiveCall,
        x: &View<'_>,
        y: &View<'_>,
    ) -> Result<(), KernelError> {
        let post = Post {
            call: call.clone(),
            x: Posted::of(x),
            y: Posted::of(y),
            x_shape: x.shape().to_vec(),
            y_shape: y.shape().to_vec(),
            dtype: x.dtype(),
        };
        let posts = self.meet(meeting, post)?;
        let (xs, ys): (Vec<_>, Vec<_>) = posts.iter().map(|post| (post.x.clone(), post.y.clone())).unzip();
        let met = Met { call, x_shape: x.shape(), y_shape: y.shape(), xs: &xs, y: &ys[call.member], ys: &ys };
        let barrier = || {
            meeting.barrier(xs.len());
            Ok(())
        };
        let foreign = exchange(&met, &barrier)?;
        barrier()?;
        self.count(call, foreign);
        Ok(())
    }

    fn send(&self, meeting: &Meeting, call: &CollectiveCall, to: usize, x: &View<'_>) -> Result<(), KernelError> {
        let mut state = lock(&meeting.state);
        self.check_aborted()?;
        if let Some(error) = state.failed.clone().or_else(|| absent(&state, call, to)) {
            return Err(self.fail(meeting, state, error));
        }
        let id = state.next_transfer;
        state.next_transfer += 1;
        let (source, shape, dtype) = (Posted::of(x), x.shape().to_vec(), x.dtype());
        state.transfers.push(Transfer { id, from: call.member, to, source, shape, dtype, taken: false });
        meeting.advance();
        let given_up = |state: &State| state.failed.is_some() || self.is_aborted();
        let transfer = |state: &State| state.transfers.iter().find(|t| t.id == id).map(|t| t.taken);
        let mut state = meeting.wait(state, |state| match transfer(state) {
            None => true,
            // A transfer that is taken ends by itself.
            Some(taken) => !taken && given_up(state),
        });
        if transfer(&state).is_none() {
            return Ok(());
        }
        state.transfers.retain(|t| t.id != id);
        Err(self.why_not(&state))
    }

    fn receive(&self, meeting: &Meeting, call: &CollectiveCall, from: usize, y: &View<'_>) -> Result<(), KernelError> {
        let mut state = lock(&meeting.state);
        if let Some(error) = absent(&state, call, from) {
            state.failed.get_or_insert(error);
            meeting.advance();
        }
        let pair = (from, call.member);
        let wanted = |t: &Transfer| (t.from, t.to) == pair && !t.taken;
        state.receiving.push(pair);
        let mut state = meeting
            .wait(state, |state| state.transfers.iter().any(wanted) || state.failed.is_some() || self.is_aborted());
        if let Some(place) = state.receiving.iter().position(|other| *other == pair) {
            state.receiving.swap_remove(place);
        }
        if state.failed.is_some() || self.is_aborted() {
            return Err(self.why_not(&state));
        }
        let Some(transfer) = state.transfers.iter_mut().find(|t| wanted(t)) else { return Err(self.why_not(&state)) };
        if transfer.shape != y.shape() || transfer.dtype != y.dtype() {
            let error = KernelError::CollectiveMismatch {
                group: call.group.id,
                member: call.member,
                expected: format!("send of {:?} {:?}", transfer.dtype, transfer.shape),
                got: format!("receive of {:?} {:?}", y.dtype(), y.shape()),
            };
            return Err(self.fail(meeting, state, error));
        }
        transfer.taken = true;
        let (id, source) = (transfer.id, transfer.source.clone());
        drop(state);
        let elements = element_count(y.shape());
        // SAFETY: both are whole views; the sender waits in its call, and the receiver's register is its own.
        unsafe { copy_elements(&source, 0, &Posted::of(y), 0, elements) };
        if from != call.member {
            self.count(call, elements);
        }
        let mut state = lock(&meeting.state);
        state.transfers.retain(|t| t.id != id);
        meeting.advance();
        Ok(())
    }
}

/// A point-to-point call whose other side waits in a collective of the same group can never be answered.
fn absent(state: &State, call: &CollectiveCall, peer: usize) -> Option<KernelError> {
    let waiting = state.posts.get(peer)?.as_ref()?;
    Some(KernelError::CollectiveMismatch {
        group: call.group.id,
        member: call.member,
        expected: waiting.describe(),
        got: call.name().to_owned(),
    })
}

fn disagreement(state: &State, post: &Post) -> Option<KernelError> {
    let mismatch = |expected: String| KernelError::CollectiveMismatch {
        group: post.call.group.id,
        member: post.call.member,
        expected,
        got: post.describe(),
    };
    let member = post.call.member;
    if state.transfers.iter().any(|t| !t.taken && t.to == member) {
        return Some(mismatch("receive".to_owned()));
    }
    if state.receiving.iter().any(|(from, _)| *from == member) {
        return Some(mismatch("send".to_owned()));
    }
    if state.posts.get(member).is_some_and(Option::is_some) {
        return Some(mismatch("one call of a member at a time".to_owned()));
    }
    let first = state.posts.iter().flatten().next()?;
    (first.terms() != post.terms()).then(|| mismatch(first.describe()))
}

impl Collective for InProcess {
    fn run(&self, call: &CollectiveCall, reads: &[View<'_>], writes: &[View<'_>]) -> Result<(), KernelError> {
        check_members(call)?;
        let meeting = self.meeting(&call.group);
        if let Err(error) = check_buffers(call, reads, writes) {
            return Err(self.refuse(&meeting, call, &describe_views(call, reads, writes), error));
        }
        match (&call.kind, reads, writes) {
            (CollectiveKind::Send { to }, [x], _) => self.send(&meeting, call, *to, x),
            (CollectiveKind::Receive { from }, _, [y]) => self.receive(&meeting, call, *from, y),
            (_, [x], [y]) => self.exchange(&meeting, call, x, y),
            _ => Ok(()),
        }
    }

    fn abort(&self, cause: &str) {
        lock(&self.aborted).get_or_insert_with(|| cause.to_owned());
        let groups: Vec<_> = lock(&self.groups).values().cloned().collect();
        for meeting in groups {
            // Taken so that nobody can look for an abort before it and wait after the notification.
            drop(lock(&meeting.state));
            meeting.changed.notify_all();
        }
    }

    /// Who has posted waits for those that have not, and one side of a transfer for the other.
    fn waits(&self) -> Vec<MemberWait> {
        let meetings: Vec<_> = lock(&self.groups).values().cloned().collect();
        let mut waits = Vec::new();
        for meeting in meetings {
            let Some(group) = meeting.group.get() else { continue };
            let state = lock(&meeting.state);
            let (here, absent): (Vec<usize>, Vec<usize>) =
                (0..state.posts.len()).partition(|member| state.posts[*member].is_some());
            let sends = state.transfers.iter().filter(|transfer| !transfer.taken).map(|t| (t.from, t.to));
            let pairs = here.iter().flat_map(|member| absent.iter().map(|peer| (*member, *peer)));
            let pairs = pairs.chain(sends).chain(state.receiving.iter().map(|(from, to)| (*to, *from)));
            let wait = |(member, peer): (usize, usize)| MemberWait {
                group: group.id,
                rank: group.ranks[member],
                peer: group.ranks[peer],
            };
            waits.extend(pairs.map(wait));
        }
        waits
    }

    fn bytes_received(&self, rank: usize) -> u64 {
        lock(&self.received).get(&rank).copied().unwrap_or(0)
    }
}

#[cfg(test)]
mod tests {
    use std::thread;

    use super::*;
    use crate::memory::Arena;

    /// Far more than any wait here takes.
    const DEADLINE: Duration = Duration::from_secs(20);

    fn expect(engine: &InProcess, wanted: &[MemberWait]) {
        let until = Instant::now() + DEADLINE;
        while engine.waits() != wanted {
            assert!(Instant::now() < until, "{:?}", engine.waits());
            thread::yield_now();
        }
    }

    #[test]
    fn who_waits_for_whom_is_known() {
        let group = Arc::new(Group { id: 7, ranks: vec![4, 2, 9] });
        for (kind, expected) in [
            (CollectiveKind::AllReduce { op: crate::collective::ReduceOp::Sum }, vec![(4, 2), (4, 9)]),
            (CollectiveKind::Send { to: 2 }, vec![(4, 9)]),
            (CollectiveKind::Receive { from: 1 }, vec![(4, 2)]),
        ] {
            let engine = Arc::new(InProcess::new());
            assert_eq!(engine.waits(), []);
            let call = CollectiveCall { group: group.clone(), member: 0, kind };
            let member = thread::spawn({
                let engine = engine.clone();
                move || {
                    let arena = Arena::host(0, 256, &Arc::default()).expect("memory");
                    let view = |offset| View::new("test", &arena, offset, &[4], DType::F32).expect("inside");
                    let (x, y) = (view(0), view(128));
                    let reads = if matches!(call.kind, CollectiveKind::Receive { .. }) { vec![] } else { vec![x] };
                    let writes = if matches!(call.kind, CollectiveKind::Send { .. }) { vec![] } else { vec![y] };
                    engine.run(&call, &reads, &writes)
                }
            });
            let wait = |(rank, peer)| MemberWait { group: 7, rank, peer };
            expect(&engine, &expected.into_iter().map(wait).collect::<Vec<_>>());
            engine.abort("the test says so");
            assert!(member.join().expect("no panic").is_err());
            assert_eq!(engine.waits(), []);
        }
    }
}
