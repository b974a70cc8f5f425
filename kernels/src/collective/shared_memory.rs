//! Collectives between devices of several processes of one node. Members post their calls on a board in shared memory,
//! and then read each other's arenas directly.
//!
//! MEET-3 (see `rendezvous`) holds. MEET-1 (see `in_process`) holds except in calls of NODE-2. NODE-1 replaces MEET-2:
//! - NODE-1: a peer may die or freeze at any time, so every wait ends once any process aborts. Partial results of an
//!   aborted call are invalid.
//! - NODE-2: if no member's x in a collective exceeds `COPY_BYTES_MAX`, each member copies its x to the board, and does
//!   not wait until the others have read the copy. No other member reads the original x. The copy stays unchanged until
//!   all members have left the call (BOARD-3).
#![allow(unsafe_code)]

use std::collections::{BTreeMap, HashMap};
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::Instant;

use crate::collective::board::{Board, COPY_BYTES_MAX, Counter, GroupArea, MemberSlot, Post, TICK, digest};
use crate::collective::exchange::{
    ExchangeBuffers, Posted, Terms, check_buffers, check_members, copy_elements, describe_views, exchange,
    exchange_copies,
};
use crate::collective::status::{AbortStatus, ReceivedBytes};
use crate::collective::{Collective, CollectiveCall, CollectiveKind, Group, MemberWait};
use crate::error::{KernelError, Result};
use crate::memory::{Arena, View};

/// After a mismatch of calls, a member waits at most this many [`TICK`]s until the other member has described its call.
const DESCRIPTION_TICKS_MAX: u32 = 50;

/// The engine of groups whose members run in several processes of one node. Each process has one engine.
#[derive(Debug)]
pub struct SharedMemory {
    board: Board,
    groups: Vec<GroupProgress>,
    index: HashMap<u32, usize>,
    arenas: BTreeMap<usize, Arena>,
    received: ReceivedBytes,
    abort_status: AbortStatus,
    cores: usize,
}

/// A group, and the progress of the members that this process runs.
#[derive(Debug)]
struct GroupProgress {
    group: Arc<Group>,
    progress: Vec<Progress>,
}

/// Counters of one member. Only the thread of the member's stream changes them. They wrap around.
#[derive(Debug, Default)]
struct Progress {
    calls: AtomicU32,
    rendezvous_count: AtomicU32,
    barriers: AtomicU32,
}

struct Call<'a> {
    engine: &'a SharedMemory,
    call: &'a CollectiveCall,
    reads: &'a [View<'a>],
    writes: &'a [View<'a>],
    group: usize,
    group_area: &'a GroupArea,
    slot: &'a MemberSlot,
    progress: &'a Progress,
    oversubscribed: bool,
}

impl SharedMemory {
    /// Creates the engine of this process. `board` is a memfd from [`Board::create`], mapped read-write. All processes
    /// pass the same board and the same `groups` in the same order. `arenas` maps the rank of every member device to
    /// the memory of its x and y: the device's own arena if this process runs the device, else a read-only mapping.
    ///
    /// # Errors
    /// [`KernelError::Arguments`] if the board does not match the groups, or if a member's arena is missing.
    pub fn new(board: Arena, groups: &[Arc<Group>], arenas: BTreeMap<usize, Arena>) -> Result<Self> {
        let board = Board::new(board, groups)?;
        let missing = groups.iter().flat_map(|group| group.ranks.iter()).find(|rank| !arenas.contains_key(rank));
        if let Some(rank) = missing {
            let got = format!("no arena of rank {rank}");
            return Err(KernelError::arguments("collectives of a node", "arenas", "one per member", got));
        }
        let index: HashMap<u32, usize> = groups.iter().enumerate().map(|(i, group)| (group.id, i)).collect();
        if index.len() != groups.len() {
            let got = format!("{} different ids for {} groups", index.len(), groups.len());
            return Err(KernelError::arguments("collectives of a node", "groups", "a unique id per group", got));
        }
        let known = |group: &Arc<Group>| GroupProgress {
            group: group.clone(),
            progress: group.ranks.iter().map(|_| Progress::default()).collect(),
        };
        Ok(Self {
            board,
            groups: groups.iter().map(known).collect(),
            index,
            received: ReceivedBytes::default(),
            arenas,
            abort_status: AbortStatus::default(),
            cores: std::thread::available_parallelism().map_or(1, usize::from),
        })
    }

    fn check_aborted(&self) -> Result<()> {
        // Prefers the cause on the board: that of the first abort by any process. If the process that aborted first has
        // died before it wrote its cause, the board has none.
        match self.board.aborted() {
            Some(cause) => Err(KernelError::Aborted { cause }),
            None => self.abort_status.check(),
        }
    }
}

/// The bytes of the largest contribution, and a function that returns the number of elements that a member contributes.
fn contributions(call: &CollectiveCall, own_elements: usize) -> (usize, impl Fn(usize) -> usize) {
    let regions = match &call.kind {
        CollectiveKind::AllGather { parts } => Some(parts),
        CollectiveKind::AllToAll { sources, .. } => Some(sources),
        _ => None,
    };
    let elements = move |member: usize| regions.map_or(own_elements, |regions| regions.region(member).element_count());
    let most = (0..call.group.ranks.len()).map(&elements).max().unwrap_or(0);
    (most * size_of::<f32>(), elements)
}

impl Call<'_> {
    fn run(&self) -> Result<()> {
        self.engine.check_aborted()?;
        self.group_area.check(self.call.group.id)?;
        let number = self.progress.calls.load(Ordering::Relaxed).wrapping_add(1);
        self.progress.calls.store(number, Ordering::Relaxed);
        self.slot.call.store(number, Ordering::Release);
        if let Err(error) = self.check() {
            // The other members receive this member's error.
            let got = format!("{} ({error})", self.describe());
            self.fail(self.call.member, "buffers that fit the call", &got);
            return Err(error);
        }
        match (&self.call.kind, self.reads, self.writes) {
            (CollectiveKind::Send { to }, [x], _) => self.send(*to, x),
            (CollectiveKind::Receive { from }, _, [y]) => self.receive(*from, y),
            (_, [x], [y]) => self.exchange(x, y),
            _ => Ok(()),
        }
    }

    fn check(&self) -> Result<()> {
        check_buffers(self.call, self.reads, self.writes)?;
        let rank = self.call.group.ranks.rank(self.call.member);
        let inside = |view: &View<'_>| self.engine.arenas.get(&rank).is_some_and(|arena| arena.same(view.arena()));
        if self.reads.iter().chain(self.writes).all(inside) {
            return Ok(());
        }
        let expected = format!("the shared arena of rank {rank}");
        Err(KernelError::arguments(self.call.name(), "buffers", expected, "memory of another arena"))
    }

    fn describe(&self) -> String {
        describe_views(self.call, self.reads, self.writes)
    }

    fn members(&self) -> usize {
        self.call.group.ranks.len()
    }

    fn other(&self, member: usize) -> &MemberSlot {
        self.engine.board.member_slot(self.group, member)
    }

    /// Fails the group permanently and wakes all members.
    fn fail(&self, member: usize, expected: &str, got: &str) {
        self.group_area.fail(member, expected, got);
        (0..self.members()).for_each(|member| self.other(member).offer.wake_waiters());
    }

    /// Returns the description of another member's call, once that member has published it. A live member does so
    /// within a tick.
    fn wait_for_description(&self, member: usize) -> String {
        let until = Instant::now() + TICK * DESCRIPTION_TICKS_MAX;
        loop {
            if let Some(text) = self.other(member).published_call() {
                return text;
            }
            if Instant::now() >= until || self.engine.check_aborted().is_err() {
                return format!("an unknown call (member {member} has not described it)");
            }
            std::thread::sleep(TICK / 4);
        }
    }

    /// Fails the group, because this member's call differs from that of `other`. The error names the
    /// one of these two members whose call fewer members make.
    fn fail_disagreement(&self, other: usize) -> KernelError {
        let (member, own_call) = (self.call.member, self.describe());
        self.slot.publish_call(&own_call);
        let other_call = self.wait_for_description(other);
        let posted = |member| self.posted_next(member).map(|post| post.terms.load(Ordering::Relaxed));
        let agree = |with: usize| {
            let terms = posted(with);
            (0..self.members()).filter(|&member| terms.is_some() && posted(member) == terms).count()
        };
        if agree(member) < agree(other) {
            self.fail(member, &other_call, &own_call);
        } else {
            self.fail(other, &own_call, &other_call);
        }
        self.group_error()
    }

    fn posted_next(&self, member: usize) -> Option<&Post> {
        let next = self.progress.rendezvous_count.load(Ordering::Relaxed).wrapping_add(1);
        let post = &self.other(member).posts[(next % 2) as usize];
        (post.number.load(Ordering::SeqCst) == next).then_some(post)
    }

    /// The error of a group that has failed, or whose failure a member is recording now.
    fn group_error(&self) -> KernelError {
        let known = self.group_area.check(self.call.group.id).and_then(|()| self.engine.check_aborted());
        let unknown = || self.call.group.mismatch(self.call.member, "a different call", self.describe());
        known.err().unwrap_or_else(unknown)
    }

    /// Returns the error that ends a wait, if any. Its cause is an abort, a failed group or, after the first sleep, a
    /// peer whose call can never match this call.
    fn check_interrupt(&self, sleeps: usize, mismatched_peer: &dyn Fn() -> Option<usize>) -> Result<()> {
        self.engine.check_aborted()?;
        let failed = self.group_area.check(self.call.group.id);
        if sleeps > 0 || failed.is_err() {
            self.slot.publish_call(&self.describe());
        }
        failed?;
        match mismatched_peer() {
            Some(other) if sleeps > 0 => Err(self.fail_disagreement(other)),
            _ => Ok(()),
        }
    }

    /// Waits until `done` returns true for the counter. Fails if an error interrupts the call.
    fn wait(
        &self,
        counter: &Counter,
        done: &dyn Fn(u32) -> bool,
        mismatched: &dyn Fn() -> Option<usize>,
    ) -> Result<()> {
        let mismatched_peer = || if done(counter.value.load(Ordering::SeqCst)) { None } else { mismatched() };
        counter.wait(self.oversubscribed, done, &|sleeps| self.check_interrupt(sleeps, &mismatched_peer))
    }

    fn barrier(&self, mismatched_peer: &dyn Fn() -> Option<usize>) -> Result<()> {
        let barriers = self.progress.barriers.load(Ordering::Relaxed).wrapping_add(1);
        self.progress.barriers.store(barriers, Ordering::Relaxed);
        let target = barriers.wrapping_mul(self.members() as u32);
        let arrivals_counter = &self.group_area.arrivals;
        // The increment publishes this member's earlier writes to every member that reads the counter.
        if arrivals_counter.value.fetch_add(1, Ordering::SeqCst).wrapping_add(1) == target {
            arrivals_counter.wake_waiters();
            return Ok(());
        }
        // The counter may exceed the target, because other members may have arrived at the next barrier already.
        let done = |arrivals: u32| arrivals.wrapping_sub(target) as i32 >= 0;
        self.wait(arrivals_counter, &done, mismatched_peer)
    }

    /// Posts x and y and waits for the other members' posts. Returns the number of the rendezvous.
    fn rendezvous(&self, terms: u64, x: &View<'_>, y: &View<'_>, copied: bool) -> Result<u32> {
        let number = self.progress.rendezvous_count.load(Ordering::Relaxed).wrapping_add(1);
        let index = (number % 2) as usize;
        if copied {
            let offset = self.engine.board.copy_offset(self.group, self.call.member, number);
            if let Some(copy) = Posted::checked(self.engine.board.arena(), offset, x.element_count()) {
                // SAFETY: x and its copy have equal sizes. Until this member posts, others ignore the copy (BOARD-3).
                unsafe { copy_elements(&Posted::of(x), 0, &copy, 0, x.element_count()) };
            }
        }
        let post = &self.slot.posts[index];
        post.terms.store(terms, Ordering::Relaxed);
        post.x.store(x.offset() as u64, Ordering::Relaxed);
        post.y.store(y.offset() as u64, Ordering::Relaxed);
        post.number.store(number, Ordering::Release);
        let differs =
            |other: &usize| self.posted_next(*other).is_some_and(|post| post.terms.load(Ordering::Relaxed) != terms);
        let own = self.call.member as u32 + 1;
        let waits_for_this = |other: &usize| {
            let slot = self.other(*other);
            slot.offer.value.load(Ordering::SeqCst) == own || slot.receiving.load(Ordering::SeqCst) == own
        };
        self.barrier(&|| (0..self.members()).find(|other| differs(other) || waits_for_this(other)))?;
        if let Some(other) = (0..self.members()).find(differs) {
            return Err(self.fail_disagreement(other));
        }
        self.progress.rendezvous_count.store(number, Ordering::Relaxed);
        Ok(number)
    }

    fn exchange(&self, x: &View<'_>, y: &View<'_>) -> Result<()> {
        let terms = digest(&Terms::of(self.call, x.shape(), y.shape(), x.dtype()));
        let (bytes_most, elements) = contributions(self.call, x.element_count());
        let copied = bytes_most <= COPY_BYTES_MAX;
        let number = self.rendezvous(terms, x, y, copied)?;
        let mut xs = Vec::with_capacity(self.members());
        let mut ys = Vec::new();
        for member in 0..self.members() {
            let post = &self.other(member).posts[(number % 2) as usize];
            if copied {
                let offset = self.engine.board.copy_offset(self.group, member, number);
                xs.push(self.posted(member, self.engine.board.arena(), offset as u64, elements(member))?);
                continue;
            }
            let arena = &self.engine.arenas[&self.call.group.ranks.rank(member)];
            xs.push(self.posted(member, arena, post.x.load(Ordering::Relaxed), elements(member))?);
            if matches!(self.call.kind, CollectiveKind::AllReduce { .. }) {
                ys.push(self.posted(member, arena, post.y.load(Ordering::Relaxed), y.element_count())?);
            }
        }
        let buffers = ExchangeBuffers {
            call: self.call,
            x_shape: x.shape(),
            y_shape: y.shape(),
            xs: &xs,
            y: &Posted::of(y),
            ys: &ys,
        };
        if copied {
            exchange_copies(&buffers)?;
        } else {
            let barrier = || self.barrier(&|| None);
            exchange(&buffers, &barrier)?;
            barrier()?;
        }
        self.engine.received.count(self.call, y.shape(), y.dtype());
        Ok(())
    }

    /// The memory that a member posted, after a check that it lies in the member's arena (BOARD-1).
    fn posted(&self, member: usize, arena: &Arena, offset: u64, elements: usize) -> Result<Posted> {
        let checked = usize::try_from(offset).ok().and_then(|offset| Posted::checked(arena, offset, elements));
        checked.ok_or_else(|| {
            let expected = format!("memory inside the {} bytes of member {member}", arena.bytes());
            self.fail(member, &expected, &format!("{elements} elements at byte {offset}"));
            self.group_error()
        })
    }

    /// Returns `other` if that member waits in a collective. A send or receive with that member then cannot match.
    fn in_collective(&self, other: usize) -> Option<usize> {
        self.posted_next(other).map(|_| other)
    }

    fn send(&self, to: usize, x: &View<'_>) -> Result<()> {
        let (slot, offer) = (self.slot, &self.slot.offer);
        slot.sent.terms.store(digest(&(x.dtype(), x.shape())), Ordering::Relaxed);
        slot.sent.x.store(x.offset() as u64, Ordering::Relaxed);
        offer.value.store(to as u32 + 1, Ordering::SeqCst);
        offer.wake_waiters();
        self.wait(offer, &|value| value == 0, &|| self.in_collective(to))
    }

    fn receive(&self, from: usize, y: &View<'_>) -> Result<()> {
        let (sender, member) = (self.other(from), self.call.member);
        self.slot.receiving.store(from as u32 + 1, Ordering::SeqCst);
        let offered = self.wait(&sender.offer, &|value| value == member as u32 + 1, &|| self.in_collective(from));
        self.slot.receiving.store(0, Ordering::SeqCst);
        offered?;
        if sender.sent.terms.load(Ordering::Relaxed) != digest(&(y.dtype(), y.shape())) {
            return Err(self.fail_disagreement(from));
        }
        let arena = &self.engine.arenas[&self.call.group.ranks.rank(from)];
        let source = self.posted(from, arena, sender.sent.x.load(Ordering::Relaxed), y.element_count())?;
        // SAFETY: source and y are whole views. The sender stays in its call, and only the receiver accesses y.
        unsafe { copy_elements(&source, 0, &Posted::of(y), 0, y.element_count()) };
        self.engine.received.count(self.call, y.shape(), y.dtype());
        sender.offer.value.store(0, Ordering::SeqCst);
        sender.offer.wake_waiters();
        Ok(())
    }
}

impl Collective for SharedMemory {
    fn run(&self, call: &CollectiveCall, reads: &[View<'_>], writes: &[View<'_>]) -> Result<()> {
        check_members(call)?;
        let known = self.index.get(&call.group.id).map(|&group| (group, &self.groups[group]));
        let Some((group, known)) = known.filter(|(_, known)| known.group.ranks == call.group.ranks) else {
            let got = format!("group {} of ranks {:?}", call.group.id, call.group.ranks);
            return Err(KernelError::arguments(call.name(), "group", "a group of this node", got));
        };
        let (group_area, slot) = (self.board.group_area(group), self.board.member_slot(group, call.member));
        let progress = &known.progress[call.member];
        let oversubscribed = call.group.ranks.len() > self.cores;
        Call { engine: self, call, reads, writes, group, group_area, slot, progress, oversubscribed }.run()
    }

    fn abort(&self, cause: &str) {
        self.abort_status.abort(cause);
        self.board.abort(cause, self.groups.iter().map(|known| known.group.ranks.len()));
    }

    /// A member that has posted for its next rendezvous waits for the members that have not posted.
    fn waits(&self) -> Vec<MemberWait> {
        let mut waits = Vec::new();
        for (index, GroupProgress { group, progress }) in self.groups.iter().enumerate() {
            // Writable memory belongs to a device of this process.
            let here = |(_, rank): &(usize, usize)| self.arenas[rank].is_writable();
            for (member, _) in group.ranks.iter().enumerate().filter(here) {
                let next = progress[member].rendezvous_count.load(Ordering::Relaxed).wrapping_add(1);
                let has_posted = |member: usize| {
                    let post = &self.board.member_slot(index, member).posts[(next % 2) as usize];
                    post.number.load(Ordering::Relaxed) == next
                };
                if has_posted(member) {
                    let absent = (0..group.ranks.len()).filter(|peer| !has_posted(*peer));
                    waits.extend(absent.map(|peer| MemberWait::new(group, member, peer)));
                }
            }
        }
        waits
    }

    fn bytes_received(&self, rank: usize) -> u64 {
        self.received.of(rank)
    }
}

#[cfg(test)]
mod tests;
