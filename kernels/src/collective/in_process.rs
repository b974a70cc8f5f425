//! Collectives between the devices of one process: members meet, then read each other's memory directly, with nothing
//! staged. Imports `collective`, `memory`, `region`, `error`, `tensor`.
//!
//! - MEET-1: all members of a group are in the same call before any touches another's memory, and none leaves before
//!   the last has finished: in between, the register protocol lets nobody else write what they post.
//! - MEET-2: arguments are checked at the meeting, so nothing between meeting and leaving can fail or wait for longer
//!   than the members' own copying. So an abort needs to wake only those who wait for a meeting.
//! - MEET-3: a group whose members disagreed fails for good, so that nobody waits for a member that has left.
#![allow(unsafe_code)]

use std::collections::HashMap;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use crate::collective::{Collective, CollectiveCall, CollectiveKind, ReduceOp};
use crate::error::KernelError;
use crate::memory::{Arena, View};
use crate::region::{check_inside, for_each_run, subtract};
use crate::tensor::{DType, Region, element_count, split_range};

/// How long a member spins for the others before it parks.
const SPIN: Duration = Duration::from_micros(20);

/// Elements that a reduction holds in registers and L1 at once.
const BLOCK: usize = 1024;

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
    reads: Vec<Posted>,
    writes: Vec<Posted>,
}

/// A view without its lifetime; keeps the memory alive.
#[derive(Clone, Debug)]
struct Posted {
    arena: Arena,
    offset: usize,
    shape: Vec<usize>,
    dtype: DType,
}

#[derive(Debug)]
struct Transfer {
    id: u64,
    from: usize,
    to: usize,
    source: Posted,
    taken: bool,
}

impl Posted {
    fn of(view: &View<'_>) -> Self {
        Self { arena: view.arena().clone(), offset: view.offset(), shape: view.shape().to_vec(), dtype: view.dtype() }
    }

    /// Where element `index` lies.
    fn at(&self, index: usize) -> *mut u32 {
        debug_assert!(index <= element_count(&self.shape));
        self.arena.host_start().wrapping_add(self.offset).cast::<u32>().wrapping_add(index)
    }

    /// # Safety
    /// The range is inside, of floats, and written by nobody for `'a`.
    unsafe fn floats<'a>(&self, start: usize, len: usize) -> &'a [f32] {
        debug_assert!(start + len <= element_count(&self.shape) && self.dtype == DType::F32);
        // SAFETY: inside a view, which MEM-1 holds to be in bounds and aligned; the rest is the contract.
        unsafe { std::slice::from_raw_parts(self.at(start).cast(), len) }
    }

    /// # Safety
    /// The range is inside, of floats, and touched by nobody else for `'a`.
    #[allow(clippy::mut_from_ref)]
    unsafe fn floats_mut<'a>(&self, start: usize, len: usize) -> &'a mut [f32] {
        debug_assert!(start + len <= element_count(&self.shape) && self.dtype == DType::F32);
        // SAFETY: inside a view, which MEM-1 holds to be in bounds and aligned; the rest is the contract.
        unsafe { std::slice::from_raw_parts_mut(self.at(start).cast(), len) }
    }
}

/// # Safety
/// Both ranges are inside, the target's is touched by nobody else and the source's is not written.
unsafe fn copy_elements(source: &Posted, from: usize, target: &Posted, to: usize, len: usize) {
    // SAFETY: both are in bounds and aligned (every dtype has 4 bytes). `copy` and not `copy_nonoverlapping`, since an
    // in-place call may copy a range onto itself.
    unsafe { std::ptr::copy(source.at(from), target.at(to), len) };
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

    fn meeting(&self, group: u32) -> Arc<Meeting> {
        lock(&self.groups).entry(group).or_default().clone()
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

    /// Posts `post` and waits for the others' posts.
    fn meet(
        &self,
        meeting: &Meeting,
        post: Post,
        checked: Result<(), KernelError>,
    ) -> Result<Arc<Vec<Post>>, KernelError> {
        let (member, members) = (post.call.member, post.call.group.ranks.len());
        let mut state = lock(&meeting.state);
        self.check_aborted()?;
        if let Some(error) = &state.failed {
            return Err(error.clone());
        }
        let trouble = checked.err().or_else(|| disagreement(&state, &post));
        if let Some(error) = trouble {
            let seen = CollectiveSummary::of(&post);
            state.failed = Some(match &error {
                KernelError::CollectiveMismatch { .. } => error.clone(),
                // The others are told that this member could not join.
                other => KernelError::CollectiveMismatch {
                    group: post.call.group.id,
                    member,
                    expected: "buffers that fit the call".to_owned(),
                    got: format!("{} ({other})", seen.0),
                },
            });
            meeting.advance();
            return Err(error);
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

    fn send(&self, meeting: &Meeting, call: &CollectiveCall, to: usize, x: &View<'_>) -> Result<(), KernelError> {
        let mut state = lock(&meeting.state);
        self.check_aborted()?;
        if let Some(error) = state.failed.clone().or_else(|| absent(&state, call, to)) {
            state.failed.get_or_insert(error.clone());
            meeting.advance();
            return Err(error);
        }
        let id = state.next_transfer;
        state.next_transfer += 1;
        state.transfers.push(Transfer { id, from: call.member, to, source: Posted::of(x), taken: false });
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
        let target = Posted::of(y);
        let Some(transfer) = state.transfers.iter_mut().find(|t| wanted(t)) else { return Err(self.why_not(&state)) };
        if transfer.source.shape != target.shape || transfer.source.dtype != target.dtype {
            let error = KernelError::CollectiveMismatch {
                group: call.group.id,
                member: call.member,
                expected: format!("send of {:?} {:?}", transfer.source.dtype, transfer.source.shape),
                got: format!("receive of {:?} {:?}", target.dtype, target.shape),
            };
            state.failed = Some(error.clone());
            meeting.advance();
            return Err(error);
        }
        transfer.taken = true;
        let (id, source) = (transfer.id, transfer.source.clone());
        drop(state);
        let elements = element_count(&target.shape);
        // SAFETY: both are whole views; the sender waits in its call, and the receiver's register is its own.
        unsafe { copy_elements(&source, 0, &target, 0, elements) };
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
        expected: CollectiveSummary::of(waiting).0,
        got: call.name().to_owned(),
    })
}

/// What all members must agree on, as text for errors; equality is checked on the calls themselves.
struct CollectiveSummary(String);

impl CollectiveSummary {
    fn of(post: &Post) -> Self {
        let shape = |posted: &Posted| format!("{:?} {:?}", posted.dtype, posted.shape);
        let reads: Vec<_> = post.reads.iter().map(shape).collect();
        Self(format!("{:?} of {} among ranks {:?}", post.call.kind, reads.join(", "), post.call.group.ranks))
    }
}

fn disagreement(state: &State, post: &Post) -> Option<KernelError> {
    let mismatch = |expected: String| KernelError::CollectiveMismatch {
        group: post.call.group.id,
        member: post.call.member,
        expected,
        got: CollectiveSummary::of(post).0,
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
    let (a, b) = (&first.call, &post.call);
    // Regions tell the shapes of parts; where there are none, shapes must be the same everywhere.
    let same_shape = match a.kind {
        CollectiveKind::AllGather { .. } | CollectiveKind::AllToAll { .. } => true,
        _ => first.reads[0].shape == post.reads[0].shape,
    };
    let same_whole = match a.kind {
        CollectiveKind::AllGather { .. } => first.writes[0].shape == post.writes[0].shape,
        _ => true,
    };
    let same_dtype = first.reads[0].dtype == post.reads[0].dtype;
    let agree = a.kind == b.kind && a.group.ranks == b.group.ranks && same_shape && same_whole && same_dtype;
    (!agree).then(|| mismatch(CollectiveSummary::of(first).0))
}

/// Whether one member's buffers fit its call.
pub(crate) fn check_buffers(call: &CollectiveCall, reads: &[View<'_>], writes: &[View<'_>]) -> Result<(), KernelError> {
    let name = call.name();
    let members = call.group.ranks.len();
    let refused = |what: &str, expected: String, got: String| Err(KernelError::arguments(name, what, expected, got));
    let (reads_wanted, writes_wanted) = match call.kind {
        CollectiveKind::Send { .. } => (1, 0),
        CollectiveKind::Receive { .. } => (0, 1),
        _ => (1, 1),
    };
    if (reads.len(), writes.len()) != (reads_wanted, writes_wanted) {
        let expected = format!("{reads_wanted} read, {writes_wanted} written");
        return refused("buffers", expected, format!("{} read, {} written", reads.len(), writes.len()));
    }
    let ([x], [y]) = (reads, writes) else { return Ok(()) };
    let shape = |what: &str, view: &View<'_>, expected: &[usize]| {
        if view.shape() == expected {
            Ok(())
        } else {
            refused(what, format!("{expected:?}"), format!("{:?}", view.shape()))
        }
    };
    let in_place = matches!(call.kind, CollectiveKind::AllReduce { .. } | CollectiveKind::Broadcast { .. });
    if x.overlaps(y) && !(in_place && x.same_memory(y)) {
        return refused("buffers", "no overlap of x and y".to_owned(), "an overlap".to_owned());
    }
    if x.dtype() != y.dtype() {
        return refused("dtype of y", format!("{:?}", x.dtype()), format!("{:?}", y.dtype()));
    }
    if reduces(&call.kind) && x.dtype() != DType::F32 {
        return refused("dtype", "F32".to_owned(), format!("{:?}", x.dtype()));
    }
    let regions = |what: &str, regions: &[Region], whole: &[usize]| {
        if regions.len() != members {
            return refused(what, format!("{members} regions"), regions.len().to_string());
        }
        regions.iter().try_for_each(|region| check_inside(name, what, region, whole))
    };
    match &call.kind {
        CollectiveKind::AllReduce { .. } => shape("shape of y", y, x.shape()),
        CollectiveKind::Broadcast { root } if *root >= members => {
            refused("root", format!("a member below {members}"), root.to_string())
        }
        CollectiveKind::Broadcast { .. } => shape("shape of y", y, x.shape()),
        CollectiveKind::AllGather { parts } => {
            regions("parts", parts, y.shape())?;
            shape("shape of the part", x, &parts[call.member].size)?;
            check_covered(name, parts, &Region::whole(y.shape()))
        }
        CollectiveKind::ReduceScatter { parts, .. } => {
            regions("parts", parts, x.shape())?;
            shape("shape of the part", y, &parts[call.member].size)
        }
        CollectiveKind::AllToAll { sources, targets } => {
            let all = || sources.iter().chain(targets);
            let rank = sources.first().map_or(0, |region| region.start.len());
            let end = |r: &Region, d: usize| r.start.get(d).zip(r.size.get(d)).map_or(0, |(a, b)| a.saturating_add(*b));
            let whole: Vec<usize> = (0..rank).map(|d| all().map(|r| end(r, d)).max().unwrap_or(0)).collect();
            regions("sources", sources, &whole)?;
            regions("targets", targets, &whole)?;
            shape("shape of the source", x, &sources[call.member].size)?;
            shape("shape of the target", y, &targets[call.member].size)?;
            targets.iter().try_for_each(|target| check_covered(name, sources, target))
        }
        CollectiveKind::Send { .. } | CollectiveKind::Receive { .. } => Ok(()),
    }
}

fn reduces(kind: &CollectiveKind) -> bool {
    matches!(kind, CollectiveKind::AllReduce { .. } | CollectiveKind::ReduceScatter { .. })
}

fn check_covered(name: &str, sources: &[Region], target: &Region) -> Result<(), KernelError> {
    let mut rest = vec![target.clone()];
    for source in sources {
        rest = rest.iter().flat_map(|region| subtract(region, source)).collect();
    }
    rest.retain(|region| !region.is_empty());
    match rest.first() {
        None => Ok(()),
        Some(missing) => {
            let expected = "every element held by a member".to_owned();
            Err(KernelError::arguments(name, "sources", expected, format!("none holds {missing:?}")))
        }
    }
}

/// Member `owner`'s `out`, from `out_start`, becomes all members' values from `start` on for `len` elements, combined in
/// the order of [`crate::collective::Group`]: the member after the owner first, the owner last.
///
/// # Safety
/// Ranges are inside; nobody else touches `out`'s, and of the inputs only `out`'s own memory is written.
unsafe fn reduce(op: ReduceOp, posts: &[Post], owner: usize, start: usize, len: usize, out_start: usize) {
    let out = &posts[owner].writes[0];
    let mut sum = [0f32; BLOCK];
    for block in (0..len).step_by(BLOCK) {
        let block_len = BLOCK.min(len - block);
        let sum = &mut sum[..block_len];
        for i in 1..=posts.len() {
            let member = (owner + i) % posts.len();
            // SAFETY: inside by the contract; `out` is written only after this block was read from everyone.
            let values = unsafe { posts[member].reads[0].floats(start + block, block_len) };
            match op {
                _ if i == 1 => sum.copy_from_slice(values),
                ReduceOp::Sum => sum.iter_mut().zip(values).for_each(|(a, b)| *a += b),
                ReduceOp::Max => sum.iter_mut().zip(values).for_each(|(a, b)| *a = a.max(*b)),
            }
        }
        // SAFETY: inside and exclusive by the contract.
        unsafe { out.floats_mut(out_start + block, block_len) }.copy_from_slice(sum);
    }
}

/// Copies the member's target together from the members' sources; returns the elements taken from others.
fn gather(posts: &[Post], member: usize, sources: &[Region], target: &Region) -> usize {
    let mut rest = vec![target.clone()];
    let mut foreign = 0;
    let own_first = std::iter::once(member).chain((0..posts.len()).filter(|&other| other != member));
    for other in own_first {
        let source = &sources[other];
        for common in rest.iter().filter_map(|region| region.intersect(source)) {
            if other != member {
                foreign += common.element_count();
            }
            let from = (&source.size[..], &common.relative_to(source).start[..]);
            let to = (&target.size[..], &common.relative_to(target).start[..]);
            for_each_run(from, to, &common.size, |from, to, len| {
                // SAFETY: inside, since shapes were checked against regions; only this member writes its target, and
                // nobody writes sources until all have left (MEET-1).
                unsafe { copy_elements(&posts[other].reads[0], from, &posts[member].writes[0], to, len) };
            });
        }
        rest = rest.iter().flat_map(|region| subtract(region, source)).collect();
    }
    foreign
}

/// What each member does once all have met; returns the elements it took from others.
fn exchange(meeting: &Meeting, call: &CollectiveCall, posts: &[Post]) -> usize {
    let (member, members) = (call.member, posts.len());
    let own = &posts[member];
    let others = members - 1;
    let foreign = match &call.kind {
        CollectiveKind::AllReduce { op } => {
            let all = element_count(&own.writes[0].shape);
            let chunk = split_range(all, members, member);
            // SAFETY: each member writes only its own chunk of its own memory, which others do not read in this phase
            // (they read their chunks of it).
            unsafe { reduce(*op, posts, member, chunk.start, chunk.len(), chunk.start) };
            meeting.barrier(members);
            for (other, post) in posts.iter().enumerate().filter(|(other, _)| *other != member) {
                let theirs = split_range(all, members, other);
                // SAFETY: chunk `other` of its owner was written before the barrier and is only read from then on;
                // chunk `other` of this member is written by it alone and read by nobody.
                unsafe { copy_elements(&post.writes[0], theirs.start, &own.writes[0], theirs.start, theirs.len()) };
            }
            others * chunk.len() + (all - chunk.len())
        }
        CollectiveKind::ReduceScatter { op, parts } => {
            let part = &parts[member];
            let zeros = vec![0; part.size.len()];
            let (from, to) = ((&own.reads[0].shape[..], &part.start[..]), (&part.size[..], &zeros[..]));
            for_each_run(from, to, &part.size, |from, to, len| {
                // SAFETY: inside, since the part was checked; y overlaps no x (checked), and only this member writes it.
                unsafe { reduce(*op, posts, member, from, len, to) };
            });
            others * part.element_count()
        }
        CollectiveKind::AllGather { parts } => gather(posts, member, parts, &Region::whole(&own.writes[0].shape)),
        CollectiveKind::AllToAll { sources, targets } => gather(posts, member, sources, &targets[member]),
        CollectiveKind::Broadcast { root } => {
            let all = element_count(&own.writes[0].shape);
            // In place on the root there is nothing to do, and its memory is being read.
            if member != *root || own.reads[0].at(0) != own.writes[0].at(0) {
                // SAFETY: whole views of one size; the root's x is not written, as its y is elsewhere or left alone.
                unsafe { copy_elements(&posts[*root].reads[0], 0, &own.writes[0], 0, all) };
            }
            if member == *root { 0 } else { all }
        }
        CollectiveKind::Send { .. } | CollectiveKind::Receive { .. } => 0,
    };
    meeting.barrier(members);
    foreign
}

impl Collective for InProcess {
    fn run(&self, call: &CollectiveCall, reads: &[View<'_>], writes: &[View<'_>]) -> Result<(), KernelError> {
        let members = call.group.ranks.len();
        let peer = match call.kind {
            CollectiveKind::Send { to: peer } | CollectiveKind::Receive { from: peer } => peer,
            _ => 0,
        };
        if call.member >= members || peer >= members {
            let got = format!("member {}, peer {peer}", call.member);
            return Err(KernelError::arguments(call.name(), "member", format!("below {members}"), got));
        }
        let checked = check_buffers(call, reads, writes);
        let meeting = self.meeting(call.group.id);
        match (&call.kind, reads, writes) {
            (CollectiveKind::Send { to }, [x], []) => self.send(&meeting, call, *to, x),
            (CollectiveKind::Receive { from }, [], [y]) => self.receive(&meeting, call, *from, y),
            (CollectiveKind::Send { .. } | CollectiveKind::Receive { .. }, ..) => checked,
            _ => {
                let post = Post {
                    call: call.clone(),
                    reads: reads.iter().map(Posted::of).collect(),
                    writes: writes.iter().map(Posted::of).collect(),
                };
                let posts = self.meet(&meeting, post, checked)?;
                let foreign = exchange(&meeting, call, &posts);
                self.count(call, foreign);
                Ok(())
            }
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

    fn bytes_received(&self, rank: usize) -> u64 {
        lock(&self.received).get(&rank).copied().unwrap_or(0)
    }
}
