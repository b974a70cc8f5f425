//! The shadow memory: the last writer and the readers of each word, and the checks on them.
//!
//! Compiled kernels run the same checks (`shim/access.h`), and call [`slow`] for the complex cases. Copies, products
//! and collectives are checked directly in this file. The shim has the same layouts, so change both files together.
//!
//! - SH-1: if two operations access a byte and one of them writes it, a stream, event, host thread or collective orders
//!   the two operations. Otherwise they are a race, even if this run executes them in a harmless order.
//! - SH-2: if two threads of one launch access a byte and one of them writes it, the threads are in one block, and a
//!   barrier is between the accesses.
//! - SH-3: a byte is written before it is read. Each access is to allocated memory, through a pointer to the region
//!   that contains this memory.
#![allow(unsafe_code)]

use std::collections::HashMap;
use std::ffi::{CStr, c_char};
use std::sync::{Arc, Mutex};

use crate::findings::Findings;
use crate::memory::{Owner, Place, Registry, WORD_BYTES};

/// The shadow of one word of memory.
#[repr(C)]
#[derive(Clone, Copy, Default)]
pub(crate) struct Cell {
    writer: u32,
    /// The operation that read the word. If the highest bit is set, this is the number of a set of operations.
    reader: u32,
    /// Four groups of four bits, one bit per byte: allocated, initialised, written by `writer`, and read by `reader`.
    /// One further bit is set if the last write was atomic.
    bits: u32,
    region: u32,
    /// The thread of a launch that wrote the word; 0 if there is none.
    writer_thread: u64,
    reader_thread: u64,
}

/// The bits of all bytes of a word. The shifts that follow select a group of bits in [`Cell::bits`].
const ALL: u32 = 0xf;
const INIT: u32 = 4;
const WRITTEN: u32 = 8;
const READ: u32 = 12;
const ATOMIC: u32 = 1 << 16;
const SET: u32 = 1 << 31;
/// Number of words whose region is checked together.
const REGION_CHECK_WORDS: usize = 256;
/// The block number that is stored if several blocks have read a word.
const MANY_BLOCKS: u64 = 0xfffff;
/// The lane number that is stored if several warps of a block have read a word.
const MANY_WARPS: u64 = 2047;

/// An executed operation: its agent, and its number among the agent's operations.
#[repr(C)]
#[derive(Clone, Copy)]
pub(crate) struct Entry {
    agent: u32,
    number: u32,
}

/// Kinds of memory accesses, with the shim's numbers.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Access {
    /// A read.
    Read,
    /// A write.
    Write,
    /// An atomic read and write.
    Atomic,
}

/// The context of a kernel's checks. `shim/access.h` has the same layout.
#[repr(C)]
pub(crate) struct Checker {
    base: usize,
    bytes: usize,
    shadow: *mut Cell,
    entries: *const Entry,
    clock: *const u32,
    operation: u32,
    /// `Cell::reader` before and after [`slow`] last added this operation to a set of readers. The kernel repeats this
    /// change in other cells.
    readers_from: u32,
    readers_to: u32,
    /// Whether the block has executed a fence.
    pub fenced: u32,
    regions: [u32; 16],
    // SAFETY: these lines are only types. The two functions at the end of this file state their contracts.
    slow: unsafe extern "C" fn(*mut Checker, usize, usize, u32, u64) -> u32,
    report: unsafe extern "C" fn(*mut Checker, *const c_char, *const c_char),
    user: *mut Accessor<'static>,
    /// Stacks of the fibers.
    pub stacks: usize,
    /// Bytes of each stack.
    pub stack_bytes: usize,
    /// Scratch memory for products of fragments, 4 KiB per warp.
    pub scratch: usize,
    /// Cells for the words of shared memory.
    pub shared_cells: usize,
    /// Seed of the order of threads and blocks.
    pub seed: u64,
    /// Number of the block, counted over all launches. A cell of shared memory with an earlier number is invalid.
    pub generation: u64,
}

/// Accesses memory on behalf of an operation, with all checks.
pub(crate) struct Accessor<'a> {
    shadow: &'a mut Shadow,
    registry: &'a Mutex<Registry>,
    findings: &'a Mutex<Findings>,
    operation: u32,
    agent: usize,
    device: Option<usize>,
    clock: &'a [u32],
    /// Regions that the operation may access; `None` for all regions.
    allowed: Option<Vec<u32>>,
    name: String,
}

/// The name of an operation in messages.
#[derive(Clone, Debug)]
pub(crate) struct OperationName {
    /// What the operation does, such as a kernel's name, or a copy and its number of bytes.
    pub action: Arc<str>,
    /// The operation's stream or host thread.
    pub agent: Arc<str>,
}

/// The operations that the shadow's cells refer to.
pub(crate) struct Shadow {
    entries: Vec<Entry>,
    names: Vec<OperationName>,
    sets: Vec<Vec<u32>>,
    set_index: HashMap<Vec<u32>, u32>,
}

fn block_of(thread: u64) -> u64 {
    thread >> 43 & 0xfffff
}

fn lane_of(thread: u64) -> u64 {
    thread >> 32 & 0x7ff
}

/// Whether the accesses of two threads of one launch to a word violate SH-2. The thread `before` accessed the word
/// first. The shim has the same function.
fn conflict(before: u64, now: u64, fenced: bool) -> bool {
    if before == 0 || now == 0 {
        return false;
    }
    if block_of(before) != block_of(now) {
        return !fenced;
    }
    let (a, b) = (lane_of(before), lane_of(now));
    if a == b || (before >> 16 & 0xffff) != (now >> 16 & 0xffff) {
        return false;
    }
    let warp = if a < 1024 { a >> 5 } else { a - 1024 };
    a == MANY_WARPS || warp != b >> 5 || before & 0xffff == now & 0xffff
}

/// Returns the thread number to store for a word that the threads `before` and `now` have read.
fn merged(before: u64, now: u64) -> u64 {
    const LANE: u64 = 0x7ff << 32;
    if before == 0 || now == 0 || before == now {
        return now;
    }
    if block_of(before) != block_of(now) {
        return now | MANY_BLOCKS << 43 | LANE;
    }
    let (a, b) = (lane_of(before), lane_of(now));
    if a == b || (before >> 16 & 0xffff) != (now >> 16 & 0xffff) {
        return now;
    }
    let warp = if a < 1024 { a >> 5 } else { a - 1024 };
    if a == MANY_WARPS || warp != b >> 5 {
        return now | LANE;
    }
    if before & 0xffff == now & 0xffff { now & !LANE | (1024 + warp) << 32 } else { now }
}

impl Default for Shadow {
    fn default() -> Self {
        // Operation 0 is before all other operations.
        let first = Entry { agent: 0, number: 0 };
        Shadow {
            entries: vec![first],
            names: vec![OperationName { action: "nothing".into(), agent: "".into() }],
            sets: Vec::new(),
            set_index: HashMap::new(),
        }
    }
}

impl Shadow {
    /// Adds an operation of `agent`, which is a stream or a host thread. `number` counts the agent's operations.
    pub fn operation(&mut self, agent: usize, number: u32, name: OperationName) -> u32 {
        self.entries.push(Entry { agent: agent as u32, number });
        self.names.push(name);
        assert!(self.entries.len() < SET as usize, "too many operations");
        (self.entries.len() - 1) as u32
    }

    /// Returns an operation's name.
    pub fn name(&self, operation: u32) -> String {
        let OperationName { action, agent } = &self.names[operation as usize];
        format!("{action} (operation {} of {agent})", self.entries[operation as usize].number)
    }

    /// Whether an operation happens before the action that has this clock.
    pub fn is_before(&self, operation: u32, clock: &[u32]) -> bool {
        let entry = self.entries[operation as usize];
        clock.get(entry.agent as usize).copied().unwrap_or(0) >= entry.number
    }

    fn readers(&self, reader: u32) -> Vec<u32> {
        match reader {
            0 => Vec::new(),
            set if set & SET != 0 => self.sets[(set & !SET) as usize].clone(),
            one => vec![one],
        }
    }

    /// Adds `operation`, whose clock is `clock`, to a word's readers. Removes the readers that happen before it.
    fn with_reader(&mut self, reader: u32, operation: u32, clock: &[u32]) -> u32 {
        let mut set = self.readers(reader);
        set.retain(|r| *r != operation && !self.is_before(*r, clock));
        set.push(operation);
        if let [one] = set[..] {
            return one;
        }
        set.sort_unstable();
        let next = self.sets.len() as u32;
        let index = *self.set_index.entry(set.clone()).or_insert(next);
        if index == next {
            self.sets.push(set);
        }
        index | SET
    }
}

impl<'a> Accessor<'a> {
    /// Creates an accessor for `operation` of `agent` at this clock.
    #[allow(clippy::too_many_arguments)]
    pub fn new(
        shadow: &'a mut Shadow,
        registry: &'a Mutex<Registry>,
        findings: &'a Mutex<Findings>,
        operation: u32,
        agent: usize,
        device: Option<usize>,
        clock: &'a [u32],
    ) -> Accessor<'a> {
        let name = shadow.name(operation);
        Accessor { shadow, registry, findings, operation, agent, device, clock, allowed: None, name }
    }

    /// Allows access to all devices.
    pub fn allow_all_devices(&mut self) {
        self.device = None;
    }

    /// Restricts access to the regions of these addresses.
    pub fn allow_only(&mut self, addresses: &[usize]) {
        let registry = self.registry.lock().unwrap_or_else(|e| e.into_inner());
        self.allowed = Some(addresses.iter().filter_map(|a| registry.owner(*a)).map(|o| o.region).collect());
    }

    /// Records a finding about the operation.
    pub fn report(&mut self, kind: &str, message: &str) {
        let mut findings = self.findings.lock().unwrap_or_else(|e| e.into_inner());
        let function = self.name.split(" (").next().unwrap_or("");
        findings.add(kind, &format!("{function} {message}"), || format!("{}: {message}", self.name));
    }

    /// Returns a checker for compiled kernels. It is valid as long as the accessor does not move.
    pub fn checker(&mut self) -> Checker {
        let window = self.registry.lock().unwrap_or_else(|e| e.into_inner()).window;
        Checker {
            base: window.base,
            bytes: window.bytes,
            shadow: window.shadow as *mut Cell,
            entries: self.shadow.entries.as_ptr(),
            clock: self.clock.as_ptr(),
            operation: self.operation,
            readers_from: 0,
            readers_to: 0,
            fenced: 0,
            regions: [0; 16],
            slow,
            report: report_text,
            user: (self as *mut Accessor<'a>).cast(),
            stacks: 0,
            stack_bytes: 0,
            scratch: 0,
            shared_cells: 0,
            seed: 0,
            generation: 0,
        }
    }

    /// Checks and records an access. Returns false if the access must not be executed.
    pub fn touch(&mut self, address: usize, bytes: usize, access: Access) -> bool {
        let mut checker = self.checker();
        self.touch_as(&mut checker, address, bytes, access, 0)
    }

    fn touch_as(&mut self, checker: &mut Checker, address: usize, bytes: usize, access: Access, thread: u64) -> bool {
        let (mut at, end) = (address, address.saturating_add(bytes));
        while at < end {
            let word_end = (at / WORD_BYTES + 1) * WORD_BYTES;
            let stop = word_end.min(end);
            let mask = ((1u32 << (stop - at)) - 1) << (at % WORD_BYTES);
            if at.wrapping_sub(checker.base) >= checker.bytes {
                let message = format!("accesses address {at:#x}, which is neither device memory nor pinned memory");
                self.report("bounds", &message);
                return false;
            }
            // SAFETY: the address is in the window, so its cell is in the shadow. Only the holder of the shadow's lock
            // accesses the cell, and `self` borrows the data behind that lock.
            let cell = unsafe { &mut *checker.shadow.add((at - checker.base) / WORD_BYTES) };
            if mask == ALL && thread == 0 && self.touch_whole(checker, cell, access) {
                at = stop;
                continue;
            }
            let index = (cell.region & 15) as usize;
            if (cell.bits & mask != mask || checker.regions[index] != cell.region)
                && !self.check_region(checker, cell, at, stop - at, mask, (address, bytes, access))
            {
                return false;
            }
            self.check_word(checker, cell, at, mask, access, thread);
            at = stop;
        }
        true
    }

    /// Handles an ordered access to a whole word outside of a launch. In all other cases, returns false.
    fn touch_whole(&self, checker: &Checker, cell: &mut Cell, access: Access) -> bool {
        let is_known = checker.regions[(cell.region & 15) as usize] == cell.region && cell.bits & ALL == ALL;
        let me = self.operation;
        let is_after = |operation: u32| operation == me || self.shadow.is_before(operation, self.clock);
        if !is_known || cell.reader & SET != 0 || !is_after(cell.writer) || !is_after(cell.reader) {
            return false;
        }
        match access {
            Access::Read if cell.bits >> INIT & ALL == ALL => {
                cell.reader = me;
                cell.reader_thread = 0;
                cell.bits |= ALL << READ;
                true
            }
            Access::Write => {
                if cell.reader != me {
                    cell.reader = 0;
                }
                cell.writer = me;
                cell.writer_thread = 0;
                cell.bits = cell.bits & !ATOMIC | ALL << WRITTEN | ALL << INIT;
                true
            }
            _ => false,
        }
    }

    /// Checks that the access is to existing memory, on an accessible device, in an allowed region (SH-3). Called for a
    /// word that is not known to be allocated, and for this operation's first access to a region.
    fn check_region(
        &mut self,
        checker: &mut Checker,
        cell: &mut Cell,
        at: usize,
        bytes: usize,
        mask: u32,
        whole: (usize, usize, Access),
    ) -> bool {
        let registry = self.registry;
        let mut registry = registry.lock().unwrap_or_else(|e| e.into_inner());
        let verb = if whole.2 == Access::Read { "reads" } else { "writes" };
        let Some(owner) = registry.owner(at).filter(|o| at + bytes <= o.base + o.bytes) else {
            let near = registry.nearest(at).map_or(format!("address {at:#x}, before all allocations"), |a| {
                let (offset, bytes, place) = (at - a.base, a.bytes, a.place);
                format!("offset {offset}, past the end of the nearest allocation of {bytes} bytes on {place}")
            });
            drop(registry);
            self.report("bounds", &format!("{verb} {} bytes at {near}", whole.1));
            return false;
        };
        let offset = at - owner.base;
        let allocation = registry.find_mut(at).expect("the address has an owner");
        if let Some(by) = &allocation.freed {
            let message = format!("{verb} offset {offset} of an allocation of {} bytes, freed by {by}", owner.bytes);
            drop(registry);
            self.report("use-after-free", &message);
            return false;
        }
        let born = !allocation.unborn && allocation.born.is_none_or(|b| self.shadow.is_before(b, self.clock));
        allocation.users.insert(self.agent, self.operation);
        let is_pooled = allocation.is_pooled();
        let is_peer = match (self.device, owner.place) {
            (Some(own), Place::Device(other)) => own == other || (registry.peers.contains(&(own, other)) && !is_pooled),
            _ => true,
        };
        drop(registry);
        if !born {
            let bytes = owner.bytes;
            let message = format!("{verb} an allocation of {bytes} bytes by another stream, without synchronisation");
            self.report("race", &message);
        }
        if !is_peer {
            self.report("peer", &format!("{verb} memory of {} without peer access", owner.place));
            return false;
        }
        if self.allowed.as_ref().is_some_and(|a| !a.contains(&owner.region)) {
            let bytes = owner.bytes;
            let message =
                format!("{verb} offset {offset} of an allocation of {bytes} bytes, outside its pointers' regions");
            self.report("bounds", &message);
            return false;
        }
        if cell.region != owner.region {
            *cell = Cell { region: owner.region, ..Cell::default() };
        }
        cell.bits |= mask;
        if owner.place == Place::Host {
            // The host's own writes are not visible here, so pinned memory counts as initialised.
            cell.bits |= mask << INIT;
        }
        checker.regions[(owner.region & 15) as usize] = owner.region;
        claim_next_words(cell, &owner, at);
        true
    }

    /// Checks SH-1, SH-2 and, for a read, whether the bytes were written (SH-3). All bytes are in one word.
    fn check_word(
        &mut self,
        checker: &mut Checker,
        cell: &mut Cell,
        at: usize,
        mask: u32,
        access: Access,
        thread: u64,
    ) {
        let (me, fenced) = (self.operation, checker.fenced != 0);
        let reads = access != Access::Write;
        let verb = if reads { "reads" } else { "writes" };
        if reads && cell.bits >> INIT & mask != mask {
            self.word_finding("uninitialised", at, &format!("{verb} bytes that nothing has written"));
            cell.bits |= mask << INIT;
        }
        let same_bytes = cell.bits >> WRITTEN & mask != 0;
        let both_atomic = access == Access::Atomic && cell.bits & ATOMIC != 0;
        if cell.writer != me && !self.shadow.is_before(cell.writer, self.clock) {
            if same_bytes {
                let writer = self.shadow.name(cell.writer);
                self.word_finding("race", at, &format!("{verb} bytes that {writer} writes, without synchronisation"));
            }
        } else if cell.writer == me && same_bytes && !both_atomic && conflict(cell.writer_thread, thread, fenced) {
            self.word_finding(
                "race-in-launch",
                at,
                &format!("a thread {verb} bytes that another thread of the launch writes"),
            );
        }
        if access == Access::Read {
            let set = self.shadow.with_reader(cell.reader, me, self.clock);
            let had_me = cell.reader == set;
            if set & SET != 0 {
                (checker.readers_from, checker.readers_to) = (cell.reader, set);
            }
            let overlaps = had_me && cell.bits >> READ & mask != 0;
            cell.reader_thread = if overlaps { merged(cell.reader_thread, thread) } else { thread };
            let others = if overlaps { cell.bits & 0xf << READ } else { 0 };
            cell.bits = cell.bits & !(0xf << READ) | others | mask << READ;
            cell.reader = set;
            return;
        }
        let read_bytes = cell.bits >> READ & mask != 0;
        for reader in self.shadow.readers(cell.reader) {
            if reader == me {
                if read_bytes && conflict(cell.reader_thread, thread, fenced) && !both_atomic {
                    self.word_finding("race-in-launch", at, "a thread writes bytes that another thread reads");
                }
            } else if read_bytes && !self.shadow.is_before(reader, self.clock) {
                let reader = self.shadow.name(reader);
                self.word_finding("race", at, &format!("writes bytes that {reader} reads, without synchronisation"));
            }
        }
        if cell.reader != me {
            cell.reader = 0;
        }
        let others = if cell.writer == me && same_bytes { cell.bits & 0xf << WRITTEN } else { 0 };
        cell.bits = cell.bits & !(0xf << WRITTEN | ATOMIC) | others | mask << WRITTEN | mask << INIT;
        if access == Access::Atomic {
            cell.bits |= ATOMIC;
        }
        cell.writer = me;
        cell.writer_thread = thread;
    }

    fn word_finding(&mut self, kind: &str, at: usize, message: &str) {
        let registry = self.registry.lock().unwrap_or_else(|e| e.into_inner());
        let owner = registry.owner(at);
        drop(registry);
        let mut findings = self.findings.lock().unwrap_or_else(|e| e.into_inner());
        let function = self.name.split(" (").next().unwrap_or("").to_string();
        let generic = message.split(" (").next().unwrap_or("");
        findings.add(kind, &format!("{function} {generic}"), || match owner {
            Some(o) => {
                let place = format!("offset {} of an allocation of {} bytes on {}", at - o.base, o.bytes, o.place);
                format!("{} {message} (at {place})", self.name)
            }
            None => format!("{} {message} (at address {at:#x})", self.name),
        });
    }

    /// Checks SH-1 for the free of an allocation: the free must happen after all operations that accessed the
    /// allocation. Returns the first operation that is not ordered before the free.
    pub fn unordered_user(&self, users: &HashMap<usize, u32>) -> Option<String> {
        let mut late: Vec<u32> = users.values().copied().filter(|u| !self.shadow.is_before(*u, self.clock)).collect();
        late.sort_unstable();
        late.first().map(|u| self.shadow.name(*u))
    }
}

/// Marks the whole words after the checked word at `at` as words of the same region, so that the region of these words
/// need not be checked again.
fn claim_next_words(cell: &mut Cell, owner: &Owner, at: usize) {
    let words = (owner.region_end - at) / WORD_BYTES;
    let bits = if owner.place == Place::Host { ALL | ALL << INIT } else { ALL };
    let first = std::ptr::from_mut(cell);
    for i in 1..words.min(REGION_CHECK_WORDS) {
        // SAFETY: these cells follow in the shadow and belong to the same allocation.
        let next = unsafe { &mut *first.add(i) };
        if next.region == owner.region {
            break;
        }
        *next = Cell { region: owner.region, bits, ..Cell::default() };
    }
}

/// Kernels call this function when their quick check cannot decide. Returns 1 if the access must not be executed.
///
/// # Safety
///
/// `checker` must come from [`Accessor::checker`], and its accessor must not have moved.
unsafe extern "C" fn slow(checker: *mut Checker, address: usize, bytes: usize, access: u32, thread: u64) -> u32 {
    let access = [Access::Read, Access::Write, Access::Atomic][access as usize];
    // SAFETY: the caller keeps the contract above, and the calling kernel holds no reference to either object.
    let (checker, accessor) = unsafe { (&mut *checker, &mut *(*checker).user) };
    u32::from(!accessor.touch_as(checker, address, bytes, access, thread))
}

/// Kernels call this function to record their own findings.
///
/// # Safety
///
/// The contract of [`slow`] applies, and both texts must end with NUL.
unsafe extern "C" fn report_text(checker: *mut Checker, kind: *const c_char, message: *const c_char) {
    // SAFETY: the caller keeps the contract above.
    let (accessor, kind, message) = unsafe { (&mut *(*checker).user, CStr::from_ptr(kind), CStr::from_ptr(message)) };
    accessor.report(&kind.to_string_lossy(), &message.to_string_lossy());
}

#[cfg(test)]
mod tests {
    use super::*;

    fn thread(block: u64, lane: u64, barrier: u64, warp_barrier: u64) -> u64 {
        1 << 63 | block << 43 | lane << 32 | barrier << 16 | warp_barrier
    }

    #[test]
    fn threads_of_a_launch_conflict_without_a_barrier() {
        let a = thread(0, 3, 1, 1);
        assert!(!conflict(a, a, false) && !conflict(0, a, false));
        assert!(conflict(a, thread(0, 4, 1, 1), false) && conflict(a, thread(0, 40, 1, 1), false));
        assert!(!conflict(a, thread(0, 4, 1, 2), false), "a barrier of the warp prevents a conflict");
        assert!(conflict(a, thread(0, 40, 1, 2), false), "a barrier of another warp does not prevent a conflict");
        assert!(!conflict(a, thread(0, 40, 2, 1), false), "a barrier of the block prevents a conflict");
        assert!(conflict(a, thread(1, 3, 2, 2), false) && !conflict(a, thread(1, 3, 2, 2), true));
    }

    #[test]
    fn several_readers_are_merged() {
        let (a, b, c) = (thread(0, 3, 1, 1), thread(0, 4, 1, 1), thread(0, 40, 1, 1));
        let warp = merged(a, b);
        assert!(conflict(warp, a, false) && conflict(warp, b, false) && conflict(warp, c, false));
        assert!(!conflict(warp, thread(0, 3, 1, 2), false));
        let warps = merged(warp, c);
        assert!(conflict(warps, thread(0, 3, 1, 2), false) && !conflict(warps, thread(0, 3, 2, 2), false));
        assert!(conflict(merged(a, thread(1, 3, 1, 1)), thread(0, 3, 2, 2), false));
    }

    #[test]
    fn sets_of_readers_drop_earlier_ones() {
        let mut shadow = Shadow::default();
        let name = |action: &str| OperationName { action: action.into(), agent: "a stream".into() };
        let mut add = |agent, action| shadow.operation(agent, 1, name(action));
        let (a, b, c) = (add(0, "a"), add(1, "b"), add(2, "c"));
        let both = shadow.with_reader(a, b, &[0, 1, 0]);
        assert_eq!(shadow.readers(both), [a, b]);
        assert_eq!(shadow.with_reader(a, b, &[0, 1, 0]), both);
        let later = shadow.with_reader(both, c, &[1, 0, 1]);
        assert_eq!(shadow.readers(later), [b, c]);
        assert_eq!(shadow.with_reader(later, c, &[1, 1, 1]), c);
    }
}
