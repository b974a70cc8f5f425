//! The board: memory mapped by all processes of a node. Members of collectives publish their calls and buffer offsets
//! on it, and synchronize through its counters.
//!
//! - BOARD-1: other processes write the board, so its content may be wrong. The board holds only atomics and bytes.
//!   Code that reads an offset from the board checks that the offset is inside its arena.
//! - BOARD-2: every wait ends within `TICK` of an abort, whatever the other processes do.
//! - BOARD-3: a member has at most one call in flight. The member's posts alternate between two places, so others may
//!   still read its last post while it writes the next one. No member starts rendezvous k+2 before all members have
//!   left rendezvous k, because rendezvous k+1 ends only after all members have arrived at it.
#![allow(unsafe_code)]

use std::hash::{DefaultHasher, Hash, Hasher};
use std::sync::Arc;
use std::sync::atomic::{AtomicU8, AtomicU32, AtomicU64, Ordering};
use std::time::{Duration, Instant};

use rustix::thread::futex;

use crate::collective::Group;
use crate::error::{KernelError, Result};
use crate::memory::Arena;

/// Longest sleep between two checks for an abort.
pub(super) const TICK: Duration = Duration::from_millis(20);

/// How long a waiting member spins. A member does not spin when the members outnumber the cores.
const SPIN: Duration = Duration::from_micros(5);

/// Total time for which a waiting member first spins and then yields its core, before it sleeps.
const YIELD: Duration = Duration::from_micros(50);

/// Largest x, in bytes, that a member copies to the board. The member then leaves without waiting for others to read x.
pub(super) const COPY_BYTES_MAX: usize = 8 << 10;

/// Longest text on the board, in bytes; longer texts are truncated.
const TEXT_BYTES_MAX: usize = 500;

/// States of a value that is written once: not written, being written, readable.
const UNSET: u32 = 0;
const CLAIMED: u32 = 1;
const SET: u32 = 2;

/// The board's memory, and the offset of each group's area.
#[derive(Debug)]
pub struct Board {
    arena: Arena,
    starts: Vec<usize>,
}

/// A text that any process may have written.
#[repr(C)]
pub(super) struct Text {
    len: AtomicU32,
    bytes: [AtomicU8; TEXT_BYTES_MAX],
}

#[repr(C, align(64))]
pub(super) struct Head {
    /// Digest of the groups, which must be the same in all processes.
    groups: AtomicU64,
    aborted: AtomicU32,
    cause: Text,
}

#[repr(C, align(64))]
pub(super) struct Counter {
    pub(super) value: AtomicU32,
    /// Number of waiters that sleep or are about to sleep. A killed waiter stays counted; this only costs system calls.
    sleepers: AtomicU32,
}

#[repr(C, align(64))]
pub(super) struct GroupArea {
    /// Number of arrivals at barriers, summed over all members and all barriers. Wraps around.
    pub(super) arrivals: Counter,
    failed: AtomicU32,
    mismatched_member: AtomicU32,
    expected: Text,
    got: Text,
}

/// What a member publishes for a rendezvous.
#[repr(C, align(64))]
#[derive(Default)]
pub(super) struct Post {
    /// Number of the rendezvous, counted from 1. Wraps around.
    pub(super) number: AtomicU32,
    /// Digest of the terms that all members must agree on.
    pub(super) terms: AtomicU64,
    /// Offsets of x and y in the member's arena, in bytes.
    pub(super) x: AtomicU64,
    pub(super) y: AtomicU64,
}

#[repr(C, align(64))]
pub(super) struct MemberSlot {
    pub(super) posts: [Post; 2],
    /// The receiver of this member's pending send, plus 1; 0 when no send is pending.
    pub(super) offer: Counter,
    pub(super) sent: Post,
    /// Number of the call that the member is in. Wraps around.
    pub(super) call: AtomicU32,
    /// The member from which this member waits to receive, plus 1; 0 when it waits for none.
    pub(super) receiving: AtomicU32,
    text_call: AtomicU32,
    text: Text,
}

/// Copies of the small tensors that a member posts.
#[repr(C, align(64))]
struct Copies([[AtomicU8; COPY_BYTES_MAX]; 2]);

pub(super) fn digest(value: &impl Hash) -> u64 {
    // All processes compute the same digest: the hasher's keys are fixed, and all run the same binary.
    let mut hasher = DefaultHasher::new();
    value.hash(&mut hasher);
    hasher.finish()
}

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
    /// Wakes all waiters in every process. Call this function after changing `value`.
    pub(super) fn wake_waiters(&self) {
        if self.sleepers.load(Ordering::SeqCst) > 0 {
            self.wake();
        }
    }

    fn wake(&self) {
        // This cannot fail for a valid address.
        let _ = futex::wake(&self.value, futex::Flags::empty(), i32::MAX as u32);
    }

    /// Waits until `done` returns true. Before each sleep, calls `check_interrupt` with the number of earlier sleeps.
    pub(super) fn wait(
        &self,
        oversubscribed: bool,
        done: &dyn Fn(u32) -> bool,
        check_interrupt: &dyn Fn(usize) -> Result<()>,
    ) -> Result<()> {
        let mut sleeps = 0;
        while !self.spin(oversubscribed, done) {
            check_interrupt(sleeps)?;
            self.sleep(done);
            sleeps += 1;
        }
        Ok(())
    }

    fn spin(&self, oversubscribed: bool, done: &dyn Fn(u32) -> bool) -> bool {
        let is_done = || done(self.value.load(Ordering::Acquire));
        if is_done() {
            return true;
        }
        let (began, spin) = (Instant::now(), if oversubscribed { Duration::ZERO } else { SPIN });
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

    /// Sleeps until the value changes, a wake-up arrives, or [`TICK`] has passed.
    fn sleep(&self, done: &dyn Fn(u32) -> bool) {
        self.sleepers.fetch_add(1, Ordering::SeqCst);
        // Counts this sleeper before the load. So a thread that changes the value later sees the count and wakes it up.
        let seen = self.value.load(Ordering::SeqCst);
        if !done(seen) {
            let tick = futex::Timespec { tv_sec: 0, tv_nsec: i64::from(TICK.subsec_nanos()) };
            // A signal or a changed value may end the wait early. The caller checks again in any case.
            let _ = futex::wait(&self.value, futex::Flags::empty(), seen, Some(&tick));
        }
        self.sleepers.fetch_sub(1, Ordering::SeqCst);
    }
}

impl GroupArea {
    /// Fails the group permanently if it has not failed yet. Wakes only the members that wait for arrivals.
    pub(super) fn fail(&self, member: usize, expected: &str, got: &str) {
        if self.failed.compare_exchange(UNSET, CLAIMED, Ordering::Acquire, Ordering::Relaxed).is_ok() {
            self.mismatched_member.store(member as u32, Ordering::Relaxed);
            self.expected.write(expected);
            self.got.write(got);
            self.failed.store(SET, Ordering::Release);
        }
        self.arrivals.wake();
    }

    /// Returns the group's error once the error is completely written, and `Ok` before that.
    pub(super) fn check(&self, group: u32) -> Result<()> {
        if self.failed.load(Ordering::Acquire) != SET {
            return Ok(());
        }
        Err(KernelError::CollectiveMismatch {
            group,
            member: self.mismatched_member.load(Ordering::Relaxed) as usize,
            expected: self.expected.read(),
            got: self.got.read(),
        })
    }
}

impl MemberSlot {
    pub(super) fn publish_call(&self, text: &str) {
        let call = self.call.load(Ordering::Relaxed);
        if self.text_call.load(Ordering::Relaxed) != call {
            self.text.write(text);
            self.text_call.store(call, Ordering::Release);
        }
    }

    pub(super) fn published_call(&self) -> Option<String> {
        let call = self.call.load(Ordering::Acquire);
        (self.text_call.load(Ordering::Acquire) == call).then(|| self.text.read())
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

    /// Creates the memory of a board. One process of the node calls this; the other processes use [`Arena::map_peer`].
    ///
    /// # Errors
    /// [`KernelError::Arguments`] when the system provides no memory.
    pub fn create(groups: &[Arc<Group>]) -> Result<Arena> {
        Arena::shared_by_processes(Self::bytes(groups))
    }

    /// Opens the board in this memory. All processes pass the same groups in the same order.
    pub(super) fn new(arena: Arena, groups: &[Arc<Group>]) -> Result<Self> {
        let refused = |what: &str, expected: String, got: String| {
            Err(KernelError::arguments("board of collectives", what, expected, got))
        };
        if arena.bytes() != Self::bytes(groups) || !arena.is_writable() || arena.descriptor().is_none() {
            let expected = format!("{} bytes of shared memory (writable: true)", Self::bytes(groups));
            let got = format!("{} bytes (writable: {})", arena.bytes(), arena.is_writable());
            return refused("memory", expected, got);
        }
        let mut end = size_of::<Head>();
        let mut starts = Vec::new();
        for group in groups {
            starts.push(end);
            end += Self::group_bytes(group);
        }
        let board = Self { arena, starts };
        let digest = digest(&groups).max(1);
        let before = board.head().groups.compare_exchange(0, digest, Ordering::AcqRel, Ordering::Acquire);
        match before {
            Err(other) if other != digest => {
                let expected = format!("the same groups as the other processes (digest {other:016x})");
                refused("groups", expected, format!("digest {digest:016x}"))
            }
            _ => Ok(board),
        }
    }

    pub(super) fn arena(&self) -> &Arena {
        &self.arena
    }

    /// # Safety
    /// `T` is one of this file's types, which hold only atomics.
    unsafe fn at<T>(&self, offset: usize) -> &T {
        assert!(offset + size_of::<T>() <= self.arena.bytes() && offset.is_multiple_of(align_of::<T>()));
        // SAFETY: `T` is aligned and inside the page-aligned mapping (just checked), which lives as long as the arena.
        // Every bit pattern is a valid atomic, and processes may share atomics.
        unsafe { &*self.arena.host_start().add(offset).cast::<T>() }
    }

    pub(super) fn head(&self) -> &Head {
        // SAFETY: `Head` is one of this file's types.
        unsafe { self.at(0) }
    }

    pub(super) fn group_area(&self, group: usize) -> &GroupArea {
        // SAFETY: `GroupArea` is one of this file's types.
        unsafe { self.at(self.starts[group]) }
    }

    pub(super) fn member_slot(&self, group: usize, member: usize) -> &MemberSlot {
        // SAFETY: `MemberSlot` is one of this file's types.
        unsafe { self.at(self.slot_offset(group, member)) }
    }

    fn slot_offset(&self, group: usize, member: usize) -> usize {
        self.starts[group] + size_of::<GroupArea>() + member * (size_of::<MemberSlot>() + size_of::<Copies>())
    }

    /// Offset, on the board, of a member's copy of x for a rendezvous.
    pub(super) fn copy_offset(&self, group: usize, member: usize, rendezvous: u32) -> usize {
        self.slot_offset(group, member) + size_of::<MemberSlot>() + (rendezvous % 2) as usize * COPY_BYTES_MAX
    }

    /// Aborts all processes and wakes all members. `members` yields each group's size. The first abort sets the cause.
    pub(super) fn abort(&self, cause: &str, members: impl Iterator<Item = usize>) {
        let head = self.head();
        if head.aborted.compare_exchange(UNSET, CLAIMED, Ordering::Acquire, Ordering::Relaxed).is_ok() {
            head.cause.write(cause);
            head.aborted.store(SET, Ordering::Release);
        }
        for (group, members) in members.enumerate() {
            self.group_area(group).arrivals.wake();
            (0..members).for_each(|member| self.member_slot(group, member).offer.wake());
        }
    }

    /// The cause of the first abort by any process.
    pub(super) fn aborted(&self) -> Option<String> {
        let head = self.head();
        (head.aborted.load(Ordering::Acquire) == SET).then(|| head.cause.read())
    }
}
