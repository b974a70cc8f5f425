//! The board: memory that all processes of a node map, on which the members of collectives post what they bring, and
//! meet.
//!
//! - BOARD-1: what lies here comes from other processes and may be wrong. So the board holds atomics and bytes only, and
//!   whoever takes an offset from it checks it against the arena that it is of.
//! - BOARD-2: every wait ends within `TICK` of an abort, whatever happened to the other processes.
//! - BOARD-3: a member has at most one call under way. Its posts alternate between two places, so that one may still be
//!   read while the next is written: nobody comes to meeting k+2 before all have left meeting k.
#![allow(unsafe_code)]

use std::hash::{DefaultHasher, Hash, Hasher};
use std::sync::Arc;
use std::sync::atomic::{AtomicU8, AtomicU32, AtomicU64, Ordering};
use std::time::{Duration, Instant};

use rustix::thread::futex;

use crate::collective::Group;
use crate::error::KernelError;
use crate::memory::Arena;

/// Longest sleep without a look at whether to give up.
pub(super) const TICK: Duration = Duration::from_millis(20);

/// How long a member keeps its core while it looks for the others, where each can have a core.
const SPIN: Duration = Duration::from_micros(5);

/// How long it looks for them before it sleeps, letting other threads run between looks.
const YIELD: Duration = Duration::from_micros(50);

/// An x of at most so many bytes is copied to the board, so that its owner need not wait until others have read it.
pub(super) const COPY_BYTES_MAX: usize = 8 << 10;

/// Longest text on the board, in bytes; what is longer is cut.
const TEXT_BYTES_MAX: usize = 500;

/// States of what is written once: nobody has, somebody is about to, it can be read.
const UNSET: u32 = 0;
const CLAIMED: u32 = 1;
const SET: u32 = 2;

/// The board's memory, and where each group's part is.
#[derive(Debug)]
pub struct Board {
    arena: Arena,
    starts: Vec<usize>,
}

/// A text that some process wrote.
#[repr(C)]
pub(super) struct Text {
    len: AtomicU32,
    bytes: [AtomicU8; TEXT_BYTES_MAX],
}

#[repr(C, align(64))]
pub(super) struct Head {
    /// Digest of the groups, for all processes must have the same.
    groups: AtomicU64,
    aborted: AtomicU32,
    cause: Text,
}

/// A count that members wait on.
#[repr(C, align(64))]
pub(super) struct Counter {
    pub(super) value: AtomicU32,
    /// Waiters that are asleep or about to be; one that was killed is counted for ever, which costs a needless call.
    sleepers: AtomicU32,
}

#[repr(C, align(64))]
pub(super) struct GroupArea {
    /// Arrivals of all members at all barriers; wraps.
    pub(super) arrivals: Counter,
    failed: AtomicU32,
    odd_member: AtomicU32,
    expected: Text,
    got: Text,
}

/// What a member brings to a meeting.
#[repr(C, align(64))]
#[derive(Default)]
pub(super) struct Post {
    /// Number of the meeting, from 1; wraps.
    pub(super) number: AtomicU32,
    /// Digest of what all must agree on.
    pub(super) terms: AtomicU64,
    /// Bytes from the start of the member's arena.
    pub(super) x: AtomicU64,
    pub(super) y: AtomicU64,
}

/// One member's place.
#[repr(C, align(64))]
pub(super) struct MemberSlot {
    pub(super) posts: [Post; 2],
    /// Member that something is sent to, plus 1, while it waits to be taken; 0 otherwise.
    pub(super) offer: Counter,
    /// Of the offer.
    pub(super) sent: Post,
    /// Number of the call that the member is in; wraps.
    pub(super) call: AtomicU32,
    /// Member that it waits to receive from, plus 1; 0 when it does not.
    pub(super) receiving: AtomicU32,
    /// Number of the call that `text` tells of.
    said: AtomicU32,
    text: Text,
}

/// The copies that a member's posts come with.
#[repr(C, align(64))]
struct Copies([[AtomicU8; COPY_BYTES_MAX]; 2]);

impl Text {
    fn write(&self, text: &str) {
        let len = text.len().min(TEXT_BYTES_MAX);
        self.bytes.iter().zip(text.bytes()).for_each(|(place, byte)| place.store(byte, Ordering::Relaxed));
        self.len.store(len as u32, Ordering::Relaxed);
    }

    fn read(&self) -> String {
        let len = self.len.load(Ordering::Relaxed) as usize;
        let bytes: Vec<u8> = self.bytes.iter().take(len).map(|byte| byte.load(Ordering::Relaxed)).collect();
        String::from_utf8_lossy(&bytes).into_owned()
    }
}

impl Counter {
    /// Wakes all who sleep here, in every process. Comes after the change of `value`.
    pub(super) fn ring(&self) {
        if self.sleepers.load(Ordering::SeqCst) > 0 {
            self.wake();
        }
    }

    fn wake(&self) {
        // Fails for no valid word.
        let _ = futex::wake(&self.value, futex::Flags::empty(), i32::MAX as u32);
    }

    /// Waits until `done` holds of the value. `trouble` is asked before each sleep, with how many sleeps there were.
    pub(super) fn wait(
        &self,
        crowded: bool,
        done: &dyn Fn(u32) -> bool,
        trouble: &dyn Fn(usize) -> Result<(), KernelError>,
    ) -> Result<(), KernelError> {
        let mut sleeps = 0;
        while !self.spin(crowded, done) {
            trouble(sleeps)?;
            self.sleep(done);
            sleeps += 1;
        }
        Ok(())
    }

    fn spin(&self, crowded: bool, done: &dyn Fn(u32) -> bool) -> bool {
        let is_done = || done(self.value.load(Ordering::Acquire));
        if is_done() {
            return true;
        }
        let (began, spin) = (Instant::now(), if crowded { Duration::ZERO } else { SPIN });
        loop {
            let waited = began.elapsed();
            if waited < spin {
                (0..16).for_each(|_| std::hint::spin_loop());
            } else if waited < YIELD {
                std::thread::yield_now();
            } else {
                return false;
            }
            if is_done() {
                return true;
            }
        }
    }

    /// Until the value changes, somebody rings, or [`TICK`] is over.
    fn sleep(&self, done: &dyn Fn(u32) -> bool) {
        self.sleepers.fetch_add(1, Ordering::SeqCst);
        // Loaded after the sleeper was counted: whoever changes the value later sees it and rings.
        let seen = self.value.load(Ordering::SeqCst);
        if !done(seen) {
            let tick = futex::Timespec { tv_sec: 0, tv_nsec: i64::from(TICK.subsec_nanos()) };
            // Returns early for a signal or a changed value; the caller looks again in any case.
            let _ = futex::wait(&self.value, futex::Flags::empty(), seen, Some(&tick));
        }
        self.sleepers.fetch_sub(1, Ordering::SeqCst);
    }
}

impl GroupArea {
    /// Fails the group for good, unless it has failed. Rings at those who wait for arrivals only.
    pub(super) fn fail(&self, member: usize, expected: &str, got: &str) {
        if self.failed.compare_exchange(UNSET, CLAIMED, Ordering::Acquire, Ordering::Relaxed).is_ok() {
            self.odd_member.store(member as u32, Ordering::Relaxed);
            self.expected.write(expected);
            self.got.write(got);
            self.failed.store(SET, Ordering::Release);
        }
        self.arrivals.wake();
    }

    /// Fails once the group has. While somebody is writing why, it has not yet.
    pub(super) fn check(&self, group: u32) -> Result<(), KernelError> {
        if self.failed.load(Ordering::Acquire) != SET {
            return Ok(());
        }
        Err(KernelError::CollectiveMismatch {
            group,
            member: self.odd_member.load(Ordering::Relaxed) as usize,
            expected: self.expected.read(),
            got: self.got.read(),
        })
    }
}

impl MemberSlot {
    /// Tells the others what the member calls.
    pub(super) fn say(&self, text: &str) {
        let call = self.call.load(Ordering::Relaxed);
        if self.said.load(Ordering::Relaxed) != call {
            self.text.write(text);
            self.said.store(call, Ordering::Release);
        }
    }

    /// What the member says it calls, once it has said so.
    pub(super) fn heard(&self) -> Option<String> {
        let call = self.call.load(Ordering::Acquire);
        (self.said.load(Ordering::Acquire) == call).then(|| self.text.read())
    }
}

impl Board {
    /// Size of a board for these groups, in bytes.
    pub fn bytes(groups: &[Arc<Group>]) -> usize {
        size_of::<Head>() + groups.iter().map(|group| Self::group_bytes(group)).sum::<usize>()
    }

    fn group_bytes(group: &Group) -> usize {
        size_of::<GroupArea>() + group.ranks.len() * (size_of::<MemberSlot>() + size_of::<Copies>())
    }

    /// Fresh memory for a board: one process of the node makes it, and passes it to the others, which map it with
    /// [`Arena::map_peer`]. An epoch needs a board of its own.
    ///
    /// # Errors
    /// [`KernelError::Arguments`] when the system gives no memory.
    pub fn create(groups: &[Arc<Group>]) -> Result<Arena, KernelError> {
        Arena::shared_by_processes(Self::bytes(groups))
    }

    /// The board in this memory. All processes give the same groups in the same order.
    pub(super) fn new(arena: Arena, groups: &[Arc<Group>]) -> Result<Self, KernelError> {
        let refused = |what: &str, expected: String, got: String| {
            Err(KernelError::arguments("board of collectives", what, expected, got))
        };
        if arena.bytes() != Self::bytes(groups) || !arena.is_writable() || arena.descriptor().is_none() {
            let expected = format!("{} bytes, shared, to read and write", Self::bytes(groups));
            let got = format!("{} bytes, writable {}", arena.bytes(), arena.is_writable());
            return refused("memory", expected, got);
        }
        let mut end = size_of::<Head>();
        let mut starts = Vec::new();
        for group in groups {
            starts.push(end);
            end += Self::group_bytes(group);
        }
        let board = Self { arena, starts };
        let mut hasher = DefaultHasher::new();
        groups.iter().for_each(|group| group.hash(&mut hasher));
        let digest = hasher.finish().max(1);
        let before = board.head().groups.compare_exchange(0, digest, Ordering::AcqRel, Ordering::Acquire);
        match before {
            Err(other) if other != digest => {
                refused("groups", format!("those of the other processes ({other:016x})"), format!("{digest:016x}"))
            }
            _ => Ok(board),
        }
    }

    pub(super) fn arena(&self) -> &Arena {
        &self.arena
    }

    /// # Safety
    /// `T` is one of this file's types, which hold atomics only.
    unsafe fn at<T>(&self, offset: usize) -> &T {
        assert!(offset + size_of::<T>() <= self.arena.bytes() && offset.is_multiple_of(align_of::<T>()));
        // SAFETY: inside the mapping (just checked), which lives as long as the arena and is aligned to pages; every bit
        // pattern is a valid atomic, and atomics may be shared with anybody.
        unsafe { &*self.arena.host_start().add(offset).cast::<T>() }
    }

    pub(super) fn head(&self) -> &Head {
        // SAFETY: one of this file's types.
        unsafe { self.at(0) }
    }

    pub(super) fn table(&self, group: usize) -> &GroupArea {
        // SAFETY: one of this file's types.
        unsafe { self.at(self.starts[group]) }
    }

    pub(super) fn seat(&self, group: usize, member: usize) -> &MemberSlot {
        let offset =
            self.starts[group] + size_of::<GroupArea>() + member * (size_of::<MemberSlot>() + size_of::<Copies>());
        // SAFETY: one of this file's types.
        unsafe { self.at(offset) }
    }

    /// Where on the board the copy of x lies that a member brings to a meeting.
    pub(super) fn copy_offset(&self, group: usize, member: usize, meeting: u32) -> usize {
        let seats =
            self.starts[group] + size_of::<GroupArea>() + member * (size_of::<MemberSlot>() + size_of::<Copies>());
        seats + size_of::<MemberSlot>() + (meeting % 2) as usize * COPY_BYTES_MAX
    }

    /// Tells all processes to give up; the first cause is kept. `members` of each group are woken.
    pub(super) fn abort(&self, cause: &str, members: impl Iterator<Item = usize>) {
        let head = self.head();
        if head.aborted.compare_exchange(UNSET, CLAIMED, Ordering::Acquire, Ordering::Relaxed).is_ok() {
            head.cause.write(cause);
            head.aborted.store(SET, Ordering::Release);
        }
        for (group, members) in members.enumerate() {
            self.table(group).arrivals.wake();
            (0..members).for_each(|member| self.seat(group, member).offer.wake());
        }
    }

    /// Why some process aborted, if one has.
    pub(super) fn aborted(&self) -> Option<String> {
        let head = self.head();
        (head.aborted.load(Ordering::Acquire) == SET).then(|| head.cause.read())
    }
}
