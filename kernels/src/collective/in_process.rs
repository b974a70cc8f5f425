//! Collectives between the devices of one process. Members rendezvous, then read each other's memory directly, without
//! staging buffers.
//!
//! - MEET-1: all members of a group are in the same call before any member accesses another's memory, and none leaves
//!   before the last has finished. In between, the register protocol keeps others from writing the posted memory.
//! - MEET-2: arguments are checked at the rendezvous, so nothing between the rendezvous and the return can fail or wait
//!   for longer than the members' own copying. So an abort needs to wake only members that wait for a rendezvous.
//! - MEET-3: a group whose members disagreed fails permanently, so that no member waits for one that has left.
#![allow(unsafe_code)]

use std::collections::HashMap;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, OnceLock};
use std::time::{Duration, Instant};

use parking_lot::{Condvar, Mutex, MutexGuard};

use crate::collective::exchange::{
    ExchangeBuffers, Posted, Terms, check_buffers, check_members, copy_elements, describe, describe_views, exchange,
};
use crate::collective::{Collective, CollectiveCall, CollectiveKind, Group, MemberWait};
use crate::error::KernelError;
use crate::memory::View;
use crate::tensor::{DType, element_count};

/// How long a member spins for the others before it parks.
const SPIN: Duration = Duration::from_micros(20);

/// The engine of devices in one process, which share it.
#[derive(Debug, Default)]
pub struct InProcess {
    groups: Mutex<HashMap<u32, Arc<Rendezvous>>>,
    received: Mutex<HashMap<usize, u64>>,
    aborted: Mutex<Option<String>>,
}

/// The rendezvous state of one group.
#[derive(Debug, Default)]
struct Rendezvous {
    state: Mutex<State>,
    changed: Condvar,
    /// Incremented when all members have arrived and when the group fails. Read without the lock while spinning.
    round: AtomicU64,
    /// The group, set by the first member that arrives.
    group: OnceLock<Arc<Group>>,
}

#[derive(Debug, Default)]
struct State {
    /// Posts of the waiting members, by member.
    posts: Vec<Option<Post>>,
    /// All posts of the current rendezvous.
    current: Option<Arc<Vec<Post>>>,
    /// Number of completed rendezvous.
    rendezvous_count: u64,
    /// Members that have arrived at the barrier at the end of a phase.
    at_barrier: usize,
    /// Number of completed barriers.
    barriers: u64,
    /// Point-to-point transfers that wait for the receiver or are being copied.
    transfers: Vec<Transfer>,
    next_transfer: u64,
    /// `(from, to)` of the members that wait to receive.
    receiving: Vec<(usize, usize)>,
    failed: Option<KernelError>,
}

/// What a member posts for a rendezvous.
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

impl Rendezvous {
    fn advance(&self) {
        self.round.fetch_add(1, Ordering::Release);
        self.changed.notify_all();
    }

    /// Waits until `done` holds for the state. Code that makes it hold calls [`Rendezvous::advance`] with the lock
    /// held, or notifies after having held it.
    fn wait<'a>(&'a self, mut state: MutexGuard<'a, State>, done: impl Fn(&State) -> bool) -> MutexGuard<'a, State> {
        while !done(&state) {
            let round = self.round.load(Ordering::Acquire);
            drop(state);
            let began = Instant::now();
            while self.round.load(Ordering::Acquire) == round && began.elapsed() < SPIN {
                std::hint::spin_loop();
            }
            state = self.state.lock();
            if self.round.load(Ordering::Acquire) == round && !done(&state) {
                self.changed.wait(&mut state);
            }
        }
        state
    }

    /// Waits for all `members` to arrive. All of them are in the call (MEET-1, MEET-2).
    fn barrier(&self, members: usize) {
        let mut state = self.state.lock();
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
    /// Creates an engine without groups; each group is added by its first call.
    pub fn new() -> Self {
        Self::default()
    }

    fn rendezvous(&self, group: &Arc<Group>) -> Arc<Rendezvous> {
        let rendezvous = self.groups.lock().entry(group.id).or_default().clone();
        rendezvous.group.get_or_init(|| group.clone());
        rendezvous
    }

    fn check_aborted(&self) -> Result<(), KernelError> {
        match &*self.aborted.lock() {
            Some(cause) => Err(KernelError::Aborted { cause: cause.clone() }),
            None => Ok(()),
        }
    }

    fn is_aborted(&self) -> bool {
        self.aborted.lock().is_some()
    }

    /// The error of a wait that ended early.
    fn wait_error(&self, state: &State) -> KernelError {
        let cause = self.aborted.lock().clone();
        let aborted = |cause| KernelError::Aborted { cause };
        state.failed.clone().or(cause.map(aborted)).unwrap_or_else(|| aborted("the peer has left the call".to_owned()))
    }

    fn count(&self, call: &CollectiveCall, elements: usize) {
        let bytes = (elements * size_of::<f32>()) as u64;
        *self.received.lock().entry(call.group.ranks[call.member]).or_default() += bytes;
    }

    /// Fails the group permanently and wakes its waiting members.
    fn fail(&self, rendezvous: &Rendezvous, mut state: MutexGuard<'_, State>, error: KernelError) -> KernelError {
        let error = state.failed.get_or_insert(error).clone();
        rendezvous.advance();
        error
    }

    /// Fails the group because this member's buffers do not fit the call.
    fn reject_buffers(
        &self,
        rendezvous: &Rendezvous,
        call: &CollectiveCall,
        description: &str,
        error: KernelError,
    ) -> KernelError {
        let state = rendezvous.state.lock();
        let failed = state.failed.clone().map(Err).unwrap_or_else(|| self.check_aborted());
        if let Err(earlier) = failed {
            return earlier;
        }
        let mismatch = KernelError::CollectiveMismatch {
            group: call.group.id,
            member: call.member,
            expected: "buffers that fit the call".to_owned(),
            got: format!("{description} ({error})"),
        };
        self.fail(rendezvous, state, mismatch);
        error
    }

    /// Adds `post` and waits for the posts of all other members.
    fn exchange_posts(&self, rendezvous: &Rendezvous, post: Post) -> Result<Arc<Vec<Post>>, KernelError> {
        let (member, members) = (post.call.member, post.call.group.ranks.len());
        let mut state = rendezvous.state.lock();
        self.check_aborted()?;
        if let Some(error) = &state.failed {
            return Err(error.clone());
        }
        if let Some(error) = disagreement(&state, &post) {
            return Err(self.fail(rendezvous, state, error));
        }
        state.posts.resize(members, None);
        state.posts[member] = Some(post);
        if state.posts.iter().all(Option::is_some) {
            let all: Vec<Post> = state.posts.iter_mut().filter_map(Option::take).collect();
            let all = Arc::new(all);
            state.current = Some(all.clone());
            state.rendezvous_count += 1;
            rendezvous.advance();
            return Ok(all);
        }
        let rendezvous_count = state.rendezvous_count;
        let is_complete = |state: &State| state.rendezvous_count != rendezvous_count;
        let mut state =
            rendezvous.wait(state, |state| is_complete(state) || state.failed.is_some() || self.is_aborted());
        match (is_complete(&state), &state.current) {
            (true, Some(all)) => Ok(all.clone()),
            _ => {
                state.posts[member] = None;
                Err(self.wait_error(&state))
            }
        }
    }

    fn exchange(
        &self,
        rendezvous: &Rendezvous,
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
        let posts = self.exchange_posts(rendezvous, post)?;
        let (xs, ys): (Vec<_>, Vec<_>) = posts.iter().map(|post| (post.x.clone(), post.y.clone())).unzip();
        let buffers =
            ExchangeBuffers { call, x_shape: x.shape(), y_shape: y.shape(), xs: &xs, y: &ys[call.member], ys: &ys };
        let barrier = || {
            rendezvous.barrier(xs.len());
            Ok(())
        };
        let received = exchange(&buffers, &barrier)?;
        barrier()?;
        self.count(call, received);
        Ok(())
    }

    fn send(&self, rendezvous: &Rendezvous, call: &CollectiveCall, to: usize, x: &View<'_>) -> Result<(), KernelError> {
        let mut state = rendezvous.state.lock();
        self.check_aborted()?;
        if let Some(error) = state.failed.clone().or_else(|| peer_in_collective(&state, call, to)) {
            return Err(self.fail(rendezvous, state, error));
        }
        let id = state.next_transfer;
        state.next_transfer += 1;
        let (source, shape, dtype) = (Posted::of(x), x.shape().to_vec(), x.dtype());
        state.transfers.push(Transfer { id, from: call.member, to, source, shape, dtype, taken: false });
        rendezvous.advance();
        let interrupted = |state: &State| state.failed.is_some() || self.is_aborted();
        let transfer = |state: &State| state.transfers.iter().find(|t| t.id == id).map(|t| t.taken);
        let mut state = rendezvous.wait(state, |state| match transfer(state) {
            None => true,
            // A transfer that the receiver has taken always completes.
            Some(taken) => !taken && interrupted(state),
        });
        if transfer(&state).is_none() {
            return Ok(());
        }
        state.transfers.retain(|t| t.id != id);
        Err(self.wait_error(&state))
    }

    fn receive(
        &self,
        rendezvous: &Rendezvous,
        call: &CollectiveCall,
        from: usize,
        y: &View<'_>,
    ) -> Result<(), KernelError> {
        let mut state = rendezvous.state.lock();
        if let Some(error) = peer_in_collective(&state, call, from) {
            state.failed.get_or_insert(error);
            rendezvous.advance();
        }
        let pair = (from, call.member);
        let matches = |t: &Transfer| (t.from, t.to) == pair && !t.taken;
        state.receiving.push(pair);
        let mut state = rendezvous
            .wait(state, |state| state.transfers.iter().any(matches) || state.failed.is_some() || self.is_aborted());
        if let Some(place) = state.receiving.iter().position(|other| *other == pair) {
            state.receiving.swap_remove(place);
        }
        if state.failed.is_some() || self.is_aborted() {
            return Err(self.wait_error(&state));
        }
        let Some(transfer) = state.transfers.iter_mut().find(|t| matches(t)) else {
            return Err(self.wait_error(&state));
        };
        if transfer.shape != y.shape() || transfer.dtype != y.dtype() {
            let error = KernelError::CollectiveMismatch {
                group: call.group.id,
                member: call.member,
                expected: format!("send of {:?} {:?}", transfer.dtype, transfer.shape),
                got: format!("receive of {:?} {:?}", y.dtype(), y.shape()),
            };
            return Err(self.fail(rendezvous, state, error));
        }
        transfer.taken = true;
        let (id, source) = (transfer.id, transfer.source.clone());
        drop(state);
        let elements = element_count(y.shape());
        // SAFETY: both are whole views; the sender stays in its call, and only the receiver uses its register.
        unsafe { copy_elements(&source, 0, &Posted::of(y), 0, elements) };
        if from != call.member {
            self.count(call, elements);
        }
        let mut state = rendezvous.state.lock();
        state.transfers.retain(|t| t.id != id);
        rendezvous.advance();
        Ok(())
    }
}

/// The error of a point-to-point call whose peer waits in a collective of the same group: the two can never match.
fn peer_in_collective(state: &State, call: &CollectiveCall, peer: usize) -> Option<KernelError> {
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
        let rendezvous = self.rendezvous(&call.group);
        if let Err(error) = check_buffers(call, reads, writes) {
            return Err(self.reject_buffers(&rendezvous, call, &describe_views(call, reads, writes), error));
        }
        match (&call.kind, reads, writes) {
            (CollectiveKind::Send { to }, [x], _) => self.send(&rendezvous, call, *to, x),
            (CollectiveKind::Receive { from }, _, [y]) => self.receive(&rendezvous, call, *from, y),
            (_, [x], [y]) => self.exchange(&rendezvous, call, x, y),
            _ => Ok(()),
        }
    }

    fn abort(&self, cause: &str) {
        self.aborted.lock().get_or_insert_with(|| cause.to_owned());
        let groups: Vec<_> = self.groups.lock().values().cloned().collect();
        for rendezvous in groups {
            // Locked so that no member can check for an abort before it and start to wait after the notification.
            drop(rendezvous.state.lock());
            rendezvous.changed.notify_all();
        }
    }

    /// Members that have posted wait for those that have not; each side of a transfer waits for the other.
    fn waits(&self) -> Vec<MemberWait> {
        let groups: Vec<_> = self.groups.lock().values().cloned().collect();
        let mut waits = Vec::new();
        for rendezvous in groups {
            let Some(group) = rendezvous.group.get() else { continue };
            let state = rendezvous.state.lock();
            let (present, absent): (Vec<usize>, Vec<usize>) =
                (0..state.posts.len()).partition(|member| state.posts[*member].is_some());
            let sends = state.transfers.iter().filter(|transfer| !transfer.taken).map(|t| (t.from, t.to));
            let pairs = present.iter().flat_map(|member| absent.iter().map(|peer| (*member, *peer)));
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
        self.received.lock().get(&rank).copied().unwrap_or(0)
    }
}

#[cfg(test)]
mod tests {
    use std::thread;

    use super::*;
    use crate::memory::Arena;

    /// Far longer than any wait in these tests.
    const DEADLINE: Duration = Duration::from_secs(20);

    fn wait_until_waits_are(engine: &InProcess, expected: &[MemberWait]) {
        let until = Instant::now() + DEADLINE;
        while engine.waits() != expected {
            assert!(Instant::now() < until, "{:?}", engine.waits());
            thread::yield_now();
        }
    }

    #[test]
    fn waits_lists_each_member_and_its_peers() {
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
            wait_until_waits_are(&engine, &expected.into_iter().map(wait).collect::<Vec<_>>());
            engine.abort("aborted by the test");
            assert!(member.join().expect("no panic").is_err());
            assert_eq!(engine.waits(), []);
        }
    }
}
