//! Collectives between devices of several processes of one node: members meet on a board in shared memory, then read
//! each other's arenas directly.
//!
//! MEET-1 and MEET-3 hold as in `in_process`. Instead of MEET-2:
//! - NODE-1: a peer may die or freeze at any moment, so every wait gives up once this process, or any other, aborts. What
//!   a member then leaves half done is worth nothing.
//! - NODE-2: a small x is copied to the board, and the member leaves as soon as all have come: its own memory is read by
//!   nobody, and the copy stays until all have left (BOARD-3).
#![allow(unsafe_code)]

use std::collections::{BTreeMap, HashMap};
use std::hash::{DefaultHasher, Hash, Hasher};
use std::sync::atomic::{AtomicU32, AtomicU64, Ordering};
use std::sync::{Arc, OnceLock};
use std::time::Instant;

use crate::collective::board::{Board, COPY_BYTES_MAX, GroupArea, MemberSlot, Post, TICK};
use crate::collective::exchange::{
    Met, Posted, Terms, check_buffers, check_members, copy_elements, describe_views, exchange, exchange_copies,
};
use crate::collective::{Collective, CollectiveCall, CollectiveKind, Group, MemberWait};
use crate::error::KernelError;
use crate::memory::{Arena, View};

/// How often a member that found a disagreement looks for what the other calls, [`TICK`] apart.
const PATIENCE_TICKS: u32 = 50;

/// The engine of groups whose members live in several processes of one node; each process has one.
#[derive(Debug)]
pub struct SharedMemory {
    board: Board,
    groups: Vec<Known>,
    index: HashMap<u32, usize>,
    arenas: BTreeMap<usize, Arena>,
    received: BTreeMap<usize, AtomicU64>,
    aborted: OnceLock<String>,
    cores: usize,
}

/// A group, and how far the members that are run here have come.
#[derive(Debug)]
struct Known {
    group: Arc<Group>,
    progress: Vec<Progress>,
}

/// Counts of one member, which one stream's thread uses; they wrap.
#[derive(Debug, Default)]
struct Progress {
    calls: AtomicU32,
    meetings: AtomicU32,
    barriers: AtomicU32,
}

/// One call of one member, with what it needs at every step.
struct Call<'a> {
    engine: &'a SharedMemory,
    call: &'a CollectiveCall,
    reads: &'a [View<'a>],
    writes: &'a [View<'a>],
    group: usize,
    table: &'a GroupArea,
    seat: &'a MemberSlot,
    progress: &'a Progress,
    crowded: bool,
}

impl SharedMemory {
    /// The engine of this process. `board` is one memfd in all processes ([`Board::create`]), mapped to read and write;
    /// `groups` are the same, in the same order, in all processes. `arenas` has every member device's memory, by rank:
    /// its own arena for a device of this process, and a peer's mapped to be read. Calls take x and y from there.
    ///
    /// # Errors
    /// [`KernelError::Arguments`] when the board is not of these groups, or a member's arena is missing.
    pub fn new(board: Arena, groups: &[Arc<Group>], arenas: BTreeMap<usize, Arena>) -> Result<Self, KernelError> {
        let board = Board::new(board, groups)?;
        let missing = groups.iter().flat_map(|group| &group.ranks).find(|rank| !arenas.contains_key(rank));
        if let Some(rank) = missing {
            let got = format!("none of rank {rank}");
            return Err(KernelError::arguments("collectives of a node", "arenas", "one of each member", got));
        }
        let index: HashMap<u32, usize> = groups.iter().enumerate().map(|(i, group)| (group.id, i)).collect();
        if index.len() != groups.len() {
            let got = format!("{} ids of {} groups", index.len(), groups.len());
            return Err(KernelError::arguments("collectives of a node", "groups", "an id of its own for each", got));
        }
        let known = |group: &Arc<Group>| Known {
            group: group.clone(),
            progress: group.ranks.iter().map(|_| Progress::default()).collect(),
        };
        Ok(Self {
            board,
            groups: groups.iter().map(known).collect(),
            index,
            received: arenas.keys().map(|&rank| (rank, AtomicU64::new(0))).collect(),
            arenas,
            aborted: OnceLock::new(),
            cores: std::thread::available_parallelism().map_or(1, usize::from),
        })
    }

    fn check_aborted(&self) -> Result<(), KernelError> {
        // The board's comes first: it is the first cause of all processes. A peer that died while writing it leaves none.
        match self.board.aborted().or_else(|| self.aborted.get().cloned()) {
            Some(cause) => Err(KernelError::Aborted { cause }),
            None => Ok(()),
        }
    }

    fn count(&self, call: &CollectiveCall, elements: usize) {
        if let Some(bytes) = self.received.get(&call.group.ranks[call.member]) {
            bytes.fetch_add((elements * size_of::<f32>()) as u64, Ordering::Relaxed);
        }
    }
}

/// The most bytes that a member of this call brings, and how many elements each does.
fn brought(call: &CollectiveCall, own_elements: usize) -> (usize, impl Fn(usize) -> usize) {
    let regions = match &call.kind {
        CollectiveKind::AllGather { parts } => Some(parts),
        CollectiveKind::AllToAll { sources, .. } => Some(sources),
        _ => None,
    };
    let elements = move |member: usize| regions.map_or(own_elements, |regions| regions[member].element_count());
    let most = (0..call.group.ranks.len()).map(&elements).max().unwrap_or(0);
    (most * size_of::<f32>(), elements)
}

fn digest(terms: &impl Hash) -> u64 {
    // Its keys are fixed, and all processes run one binary.
    let mut hasher = DefaultHasher::new();
    terms.hash(&mut hasher);
    hasher.finish()
}

impl Call<'_> {
    fn run(&self) -> Result<(), KernelError> {
        self.engine.check_aborted()?;
        self.table.check(self.call.group.id)?;
        let number = self.progress.calls.load(Ordering::Relaxed).wrapping_add(1);
        self.progress.calls.store(number, Ordering::Relaxed);
        self.seat.call.store(number, Ordering::Release);
        if let Err(error) = self.check() {
            // The others are told that this member could not join.
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

    fn check(&self) -> Result<(), KernelError> {
        check_buffers(self.call, self.reads, self.writes)?;
        let rank = self.call.group.ranks[self.call.member];
        let inside = |view: &View<'_>| self.engine.arenas.get(&rank).is_some_and(|arena| arena.same(view.arena()));
        if self.reads.iter().chain(self.writes).all(inside) {
            return Ok(());
        }
        let expected = format!("the shared arena of rank {rank}");
        Err(KernelError::arguments(self.call.name(), "buffers", expected, "memory of another"))
    }

    fn describe(&self) -> String {
        describe_views(self.call, self.reads, self.writes)
    }

    fn members(&self) -> usize {
        self.call.group.ranks.len()
    }

    fn other(&self, member: usize) -> &MemberSlot {
        self.engine.board.seat(self.group, member)
    }

    /// Fails the group for good and wakes all members.
    fn fail(&self, member: usize, expected: &str, got: &str) {
        self.table.fail(member, expected, got);
        (0..self.members()).for_each(|member| self.other(member).offer.ring());
    }

    /// What another member calls, for an error. It says so within a tick, unless it is gone.
    fn hear(&self, member: usize) -> String {
        let until = Instant::now() + TICK * PATIENCE_TICKS;
        loop {
            if let Some(text) = self.other(member).heard() {
                return text;
            }
            if Instant::now() >= until || self.engine.check_aborted().is_err() {
                return format!("something else (member {member} has not said what)");
            }
            std::thread::sleep(TICK / 4);
        }
    }

    /// The group's failure, after this member and `other` have turned out to disagree. It names the one of the two that
    /// fewer members agree with.
    fn disagree(&self, other: usize) -> KernelError {
        let (member, ours) = (self.call.member, self.describe());
        self.seat.say(&ours);
        let theirs = self.hear(other);
        let posted = |member| self.posted_next(member).map(|post| post.terms.load(Ordering::Relaxed));
        let agree = |with: usize| {
            let terms = posted(with);
            (0..self.members()).filter(|&member| terms.is_some() && posted(member) == terms).count()
        };
        if agree(member) < agree(other) {
            self.fail(member, &theirs, &ours);
        } else {
            self.fail(other, &ours, &theirs);
        }
        self.failure()
    }

    /// What a member has posted for this member's next meeting, or the one it is in.
    fn posted_next(&self, member: usize) -> Option<&Post> {
        let next = self.progress.meetings.load(Ordering::Relaxed).wrapping_add(1);
        let post = &self.other(member).posts[(next % 2) as usize];
        (post.number.load(Ordering::SeqCst) == next).then_some(post)
    }

    /// The failure of a group that has failed, or is being failed.
    fn failure(&self) -> KernelError {
        let known = self.table.check(self.call.group.id).and_then(|()| self.engine.check_aborted());
        known.err().unwrap_or_else(|| KernelError::CollectiveMismatch {
            group: self.call.group.id,
            member: self.call.member,
            expected: "something else".to_owned(),
            got: self.describe(),
        })
    }

    /// What ends a wait; from the first sleep on, also what can never be answered.
    fn trouble(&self, sleeps: usize, unanswerable: &dyn Fn() -> Option<usize>) -> Result<(), KernelError> {
        self.engine.check_aborted()?;
        let told = self.table.check(self.call.group.id);
        if sleeps > 0 || told.is_err() {
            self.seat.say(&self.describe());
        }
        told?;
        match unanswerable() {
            Some(other) if sleeps > 0 => Err(self.disagree(other)),
            _ => Ok(()),
        }
    }

    /// Waits until all members have come here.
    fn barrier(&self, unanswerable: &dyn Fn() -> Option<usize>) -> Result<(), KernelError> {
        let barriers = self.progress.barriers.load(Ordering::Relaxed).wrapping_add(1);
        self.progress.barriers.store(barriers, Ordering::Relaxed);
        let target = barriers.wrapping_mul(self.members() as u32);
        let bell = &self.table.arrivals;
        // Publishes all that this member wrote to whoever sees the count.
        if bell.value.fetch_add(1, Ordering::SeqCst).wrapping_add(1) == target {
            bell.ring();
            return Ok(());
        }
        // Others may have come to the next barrier already.
        let done = |arrivals: u32| arrivals.wrapping_sub(target) as i32 >= 0;
        let unanswerable = || if done(bell.value.load(Ordering::SeqCst)) { None } else { unanswerable() };
        bell.wait(self.crowded, &done, &|sleeps| self.trouble(sleeps, &unanswerable))
    }

    /// Posts x and y and waits for the others' posts; returns the meeting's number.
    fn meet(&self, terms: u64, x: &View<'_>, y: &View<'_>, copied: bool) -> Result<u32, KernelError> {
        let meeting = self.progress.meetings.load(Ordering::Relaxed).wrapping_add(1);
        let place = (meeting % 2) as usize;
        if copied {
            let offset = self.engine.board.copy_offset(self.group, self.call.member, meeting);
            if let Some(copy) = Posted::checked(self.engine.board.arena(), offset, x.element_count()) {
                // SAFETY: both are whole, and the copy's place is this member's until it posts (BOARD-3).
                unsafe { copy_elements(&Posted::of(x), 0, &copy, 0, x.element_count()) };
            }
        }
        let post = &self.seat.posts[place];
        post.terms.store(terms, Ordering::Relaxed);
        post.x.store(x.offset() as u64, Ordering::Relaxed);
        post.y.store(y.offset() as u64, Ordering::Relaxed);
        post.number.store(meeting, Ordering::Release);
        let differs =
            |other: &usize| self.posted_next(*other).is_some_and(|post| post.terms.load(Ordering::Relaxed) != terms);
        let us = self.call.member as u32 + 1;
        let waits_for_us = |other: &usize| {
            let seat = self.other(*other);
            seat.offer.value.load(Ordering::SeqCst) == us || seat.receiving.load(Ordering::SeqCst) == us
        };
        self.barrier(&|| (0..self.members()).find(|other| differs(other) || waits_for_us(other)))?;
        if let Some(other) = (0..self.members()).find(differs) {
            return Err(self.disagree(other));
        }
        self.progress.meetings.store(meeting, Ordering::Relaxed);
        Ok(meeting)
    }

    fn exchange(&self, x: &View<'_>, y: &View<'_>) -> Result<(), KernelError> {
        let terms = digest(&Terms::of(self.call, x.shape(), y.shape(), x.dtype()));
        let (bytes_most, elements) = brought(self.call, x.element_count());
        let copied = bytes_most <= COPY_BYTES_MAX;
        let meeting = self.meet(terms, x, y, copied)?;
        let mut xs = Vec::with_capacity(self.members());
        let mut ys = Vec::new();
        for member in 0..self.members() {
            let post = &self.other(member).posts[(meeting % 2) as usize];
            if copied {
                let offset = self.engine.board.copy_offset(self.group, member, meeting);
                xs.push(self.posted(member, self.engine.board.arena(), offset as u64, elements(member))?);
                continue;
            }
            let arena = &self.engine.arenas[&self.call.group.ranks[member]];
            xs.push(self.posted(member, arena, post.x.load(Ordering::Relaxed), elements(member))?);
            if matches!(self.call.kind, CollectiveKind::AllReduce { .. }) {
                ys.push(self.posted(member, arena, post.y.load(Ordering::Relaxed), y.element_count())?);
            }
        }
        let met = Met { call: self.call, x_shape: x.shape(), y_shape: y.shape(), xs: &xs, y: &Posted::of(y), ys: &ys };
        let foreign = if copied {
            exchange_copies(&met)?
        } else {
            let barrier = || self.barrier(&|| None);
            let foreign = exchange(&met, &barrier)?;
            barrier()?;
            foreign
        };
        self.engine.count(self.call, foreign);
        Ok(())
    }

    /// What a member says it posted, once that is known to lie in its memory (BOARD-1).
    fn posted(&self, member: usize, arena: &Arena, offset: u64, elements: usize) -> Result<Posted, KernelError> {
        let checked = usize::try_from(offset).ok().and_then(|offset| Posted::checked(arena, offset, elements));
        checked.ok_or_else(|| {
            let expected = format!("memory inside the {} bytes of member {member}", arena.bytes());
            self.fail(member, &expected, &format!("{elements} elements at byte {offset}"));
            self.failure()
        })
    }

    /// The other side of a point-to-point call, when it waits for this member in a collective.
    fn in_collective(&self, other: usize) -> Option<usize> {
        self.posted_next(other).map(|_| other)
    }

    fn send(&self, to: usize, x: &View<'_>) -> Result<(), KernelError> {
        let (seat, offer) = (self.seat, &self.seat.offer);
        seat.sent.terms.store(digest(&(x.dtype(), x.shape())), Ordering::Relaxed);
        seat.sent.x.store(x.offset() as u64, Ordering::Relaxed);
        offer.value.store(to as u32 + 1, Ordering::SeqCst);
        offer.ring();
        let done = |value| value == 0;
        let unanswerable = || if done(offer.value.load(Ordering::SeqCst)) { None } else { self.in_collective(to) };
        offer.wait(self.crowded, &done, &|sleeps| self.trouble(sleeps, &unanswerable))
    }

    fn receive(&self, from: usize, y: &View<'_>) -> Result<(), KernelError> {
        let (sender, member) = (self.other(from), self.call.member);
        self.seat.receiving.store(from as u32 + 1, Ordering::SeqCst);
        let done = |value| value == member as u32 + 1;
        let unanswerable =
            || if done(sender.offer.value.load(Ordering::SeqCst)) { None } else { self.in_collective(from) };
        let offered = sender.offer.wait(self.crowded, &done, &|sleeps| self.trouble(sleeps, &unanswerable));
        self.seat.receiving.store(0, Ordering::SeqCst);
        offered?;
        if sender.sent.terms.load(Ordering::Relaxed) != digest(&(y.dtype(), y.shape())) {
            return Err(self.disagree(from));
        }
        let arena = &self.engine.arenas[&self.call.group.ranks[from]];
        let source = self.posted(from, arena, sender.sent.x.load(Ordering::Relaxed), y.element_count())?;
        // SAFETY: both are whole views; the sender waits in its call, and the receiver's register is its own.
        unsafe { copy_elements(&source, 0, &Posted::of(y), 0, y.element_count()) };
        if from != member {
            self.engine.count(self.call, y.element_count());
        }
        sender.offer.value.store(0, Ordering::SeqCst);
        sender.offer.ring();
        Ok(())
    }
}

impl Collective for SharedMemory {
    fn run(&self, call: &CollectiveCall, reads: &[View<'_>], writes: &[View<'_>]) -> Result<(), KernelError> {
        check_members(call)?;
        let known = self.index.get(&call.group.id).map(|&group| (group, &self.groups[group]));
        let Some((group, known)) = known.filter(|(_, known)| known.group.ranks == call.group.ranks) else {
            let got = format!("group {} of ranks {:?}", call.group.id, call.group.ranks);
            return Err(KernelError::arguments(call.name(), "group", "one of this node's", got));
        };
        let (table, seat) = (self.board.table(group), self.board.seat(group, call.member));
        let progress = &known.progress[call.member];
        let crowded = call.group.ranks.len() > self.cores;
        Call { engine: self, call, reads, writes, group, table, seat, progress, crowded }.run()
    }

    fn abort(&self, cause: &str) {
        let _ = self.aborted.set(cause.to_owned());
        self.board.abort(cause, self.groups.iter().map(|known| known.group.ranks.len()));
    }

    /// A member that has posted for its next meeting waits for those that have not.
    fn waits(&self) -> Vec<MemberWait> {
        let mut waits = Vec::new();
        for (index, Known { group, progress }) in self.groups.iter().enumerate() {
            // Memory that may be written is of a device of this process.
            let here = |(_, rank): &(usize, &usize)| self.arenas[*rank].is_writable();
            for (member, &rank) in group.ranks.iter().enumerate().filter(here) {
                let next = progress[member].meetings.load(Ordering::Relaxed).wrapping_add(1);
                let posted = |member: usize| {
                    let post = &self.board.seat(index, member).posts[(next % 2) as usize];
                    post.number.load(Ordering::Relaxed) == next
                };
                if posted(member) {
                    let absent = (0..group.ranks.len()).filter(|peer| !posted(*peer));
                    waits.extend(absent.map(|peer| MemberWait { group: group.id, rank, peer: group.ranks[peer] }));
                }
            }
        }
        waits
    }

    fn bytes_received(&self, rank: usize) -> u64 {
        self.received.get(&rank).map_or(0, |bytes| bytes.load(Ordering::Relaxed))
    }
}

#[cfg(test)]
mod tests;
