//! The shadow of memory: for each word who wrote and read it, and the checks that follow.
//!
//! The same checks run in the compiled kernels (`shim/access.h`), which call [`slow`] where the answer is not plain;
//! copies, products and collectives come here directly. Layouts are shared with the shim: change both.
//!
//! - SH-1: two accesses of a byte, one of them a write, are ordered by streams, events, host threads or collectives, or
//!   it is a race, whatever the order in which they were executed.
//! - SH-2: inside one launch, two threads that touch a byte, one of them writing, are of one block, with a barrier between.
//! - SH-3: what is read was written before; what is touched is allocated, and reached through a pointer to its region.
#![allow(unsafe_code)]

use std::collections::HashMap;
use std::ffi::{CStr, c_char};
use std::sync::{Arc, Mutex};

use crate::findings::Findings;
use crate::memory::{Place, Registry, WORD_BYTES};

/// What the shadow keeps of one word.
#[repr(C)]
#[derive(Clone, Copy, Default)]
pub struct Cell {
    writer: u32,
    /// An operation, or with the highest bit set a set of them.
    reader: u32,
    /// Four bits for each of: allocated, initialised, written by `writer`, read by `reader`; then one: written atomically.
    bits: u32,
    region: u32,
    /// The thread of the launch that wrote; 0 for none.
    writer_thread: u64,
    reader_thread: u64,
}

/// All bytes of a word.
const ALL: u32 = 0xf;
const INIT: u32 = 4;
const WRITTEN: u32 = 8;
const READ: u32 = 12;
const ATOMIC: u32 = 1 << 16;
const SET: u32 = 1 << 31;
/// Words that are looked up at once.
const ADMITTED_WORDS: usize = 256;
/// The block of a word that several blocks read.
const MANY_BLOCKS: u64 = 0xfffff;
const MANY_WARPS: u64 = 2047;

/// An executed operation: which agent's, and its number there.
#[repr(C)]
#[derive(Clone, Copy)]
pub struct Entry {
    agent: u32,
    number: u32,
}

/// How memory is touched; numbers are the shim's.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Access {
    /// A read.
    Read,
    /// A write.
    Write,
    /// An atomic read and write.
    Atomic,
}

/// What a kernel's checks need; `shim/access.h` has the same.
#[repr(C)]
pub struct Checker {
    base: usize,
    bytes: usize,
    shadow: *mut Cell,
    entries: *const Entry,
    clock: *const u32,
    operation: u32,
    /// The last change of a word's readers that [`slow`] made.
    readers_from: u32,
    readers_to: u32,
    /// Whether the block asked for a fence.
    pub fenced: u32,
    regions: [u32; 16],
    // SAFETY: types of the two functions at the end of this file, which state what their callers promise.
    slow: unsafe extern "C" fn(*mut Checker, usize, usize, u32, u64) -> u32,
    report: unsafe extern "C" fn(*mut Checker, *const c_char, *const c_char),
    user: *mut Guest<'static>,
    /// Stacks of the fibers.
    pub stacks: usize,
    /// Bytes of each.
    pub stack_bytes: usize,
    /// 4 KiB for each warp, for products of fragments.
    pub scratch: usize,
    /// Cells of shared memory.
    pub shared_cells: usize,
    /// Seed of the order of threads and blocks.
    pub seed: u64,
    /// Number of the block, counted over all launches: cells of shared memory older than it are void.
    pub generation: u64,
}

/// Who touches memory now.
pub struct Guest<'a> {
    shadow: &'a mut Shadow,
    registry: &'a Mutex<Registry>,
    findings: &'a Mutex<Findings>,
    operation: u32,
    agent: usize,
    device: Option<usize>,
    clock: &'a [u32],
    /// Regions that the operation may touch; all when `None`.
    allowed: Option<Vec<u32>>,
    name: String,
}

/// What an operation is called in messages: what it does, and whose it is.
#[derive(Clone, Debug)]
pub struct Name {
    /// What it does: a kernel's name, a copy of so many bytes.
    pub what: Arc<str>,
    /// A stream or a host thread.
    pub whose: Arc<str>,
}

/// History of all words.
pub struct Shadow {
    entries: Vec<Entry>,
    names: Vec<Name>,
    sets: Vec<Vec<u32>>,
    set_index: HashMap<Vec<u32>, u32>,
}

fn block_of(thread: u64) -> u64 {
    thread >> 43 & 0xfffff
}

fn lane_of(thread: u64) -> u64 {
    thread >> 32 & 0x7ff
}

/// SH-2, for a word last touched by `before` and touched by `now` in one launch. The shim has the same.
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

/// The thread to remember of a word that `before` and `now` read.
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
        // Operation 0 is before everything.
        let first = Entry { agent: 0, number: 0 };
        Shadow {
            entries: vec![first],
            names: vec![Name { what: "nothing".into(), whose: "".into() }],
            sets: Vec::new(),
            set_index: HashMap::new(),
        }
    }
}

impl Shadow {
    /// A new operation, the agent's `number`-th.
    pub fn operation(&mut self, agent: usize, number: u32, name: Name) -> u32 {
        self.entries.push(Entry { agent: agent as u32, number });
        self.names.push(name);
        assert!(self.entries.len() < SET as usize, "too many operations");
        (self.entries.len() - 1) as u32
    }

    /// An operation's name.
    pub fn name(&self, operation: u32) -> String {
        let Name { what, whose } = &self.names[operation as usize];
        format!("{what} ({whose}, operation {} there)", self.entries[operation as usize].number)
    }

    /// Whether a clock knows of an operation.
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

    /// The word's readers with `operation` added and those before it left out.
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

impl<'a> Guest<'a> {
    /// Somebody who is about to touch memory as `operation` of `agent`, knowing what `clock` knows.
    #[allow(clippy::too_many_arguments)]
    pub fn new(
        shadow: &'a mut Shadow,
        registry: &'a Mutex<Registry>,
        findings: &'a Mutex<Findings>,
        operation: u32,
        agent: usize,
        device: Option<usize>,
        clock: &'a [u32],
    ) -> Guest<'a> {
        let name = shadow.name(operation);
        Guest { shadow, registry, findings, operation, agent, device, clock, allowed: None, name }
    }

    /// Memory of all devices may be touched.
    pub fn reach_all(&mut self) {
        self.device = None;
    }

    /// Only the regions that these addresses point into may be touched.
    pub fn allow_only(&mut self, addresses: &[usize]) {
        let registry = self.registry.lock().unwrap_or_else(|e| e.into_inner());
        self.allowed = Some(addresses.iter().filter_map(|a| registry.owner(*a)).map(|o| o.region).collect());
    }

    /// Reports something that the operation did.
    pub fn report(&mut self, kind: &str, what: &str) {
        let mut findings = self.findings.lock().unwrap_or_else(|e| e.into_inner());
        let function = self.name.split(" (").next().unwrap_or("");
        findings.add(kind, &format!("{function} {what}"), || format!("{}: {what}", self.name));
    }

    /// A checker for compiled kernels, valid as long as the guest stays where it is.
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
            user: (self as *mut Guest<'a>).cast(),
            stacks: 0,
            stack_bytes: 0,
            scratch: 0,
            shared_cells: 0,
            seed: 0,
            generation: 0,
        }
    }

    /// Checks and notes an access of `bytes` at `address`; false when it must not be made.
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
                let what = format!("touches address {at:#x}, which is no memory of a device nor pinned");
                self.report("bounds", &what);
                return false;
            }
            // SAFETY: the address lies in the window, so its cell lies in the shadow, which only the holder of its lock
            // touches; `self` borrows what that lock guards.
            let cell = unsafe { &mut *checker.shadow.add((at - checker.base) / WORD_BYTES) };
            if mask == ALL && thread == 0 && self.touch_whole(checker, cell, access) {
                at = stop;
                continue;
            }
            let index = (cell.region & 15) as usize;
            if (cell.bits & mask != mask || checker.regions[index] != cell.region)
                && !self.admit(checker, cell, at, stop - at, mask, (address, bytes, access))
            {
                return false;
            }
            self.check_word(checker, cell, at, mask, access, thread);
            at = stop;
        }
        true
    }

    /// The plain case of a whole word that is touched in order, by one who is no thread of a launch; false for all else.
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

    /// SH-3: the first touch of a word, or of its region by this operation.
    fn admit(
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
            let near = registry.nearest(at).map_or(String::from("any allocation"), |a| {
                format!("an allocation of {} bytes on {}, freed or not", a.bytes, a.place)
            });
            let offset = registry.nearest(at).map_or(0, |a| at - a.base);
            drop(registry);
            self.report("bounds", &format!("{verb} {} bytes at offset {offset}, past the end of {near}", whole.1));
            return false;
        };
        let offset = at - owner.base;
        let allocation = registry.find_mut(at).expect("it has an owner");
        if let Some(by) = &allocation.freed {
            let what = format!("{verb} offset {offset} of an allocation of {} bytes, freed by {by}", owner.bytes);
            drop(registry);
            self.report("use-after-free", &what);
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
            self.report(
                "race",
                &format!("{verb} memory of {} bytes before its allocation on another stream", owner.bytes),
            );
        }
        if !is_peer {
            self.report("peer", &format!("{verb} memory of {} without access to it enabled", owner.place));
            return false;
        }
        if self.allowed.as_ref().is_some_and(|a| !a.contains(&owner.region)) {
            let what =
                format!("{verb} offset {offset} of {} bytes, where no pointer that it was given leads", owner.bytes);
            self.report("bounds", &what);
            return false;
        }
        if cell.region != owner.region {
            *cell = Cell { region: owner.region, ..Cell::default() };
        }
        cell.bits |= mask;
        if owner.place == Place::Host {
            // What the host wrote there itself is not seen.
            cell.bits |= mask << INIT;
        }
        checker.regions[(owner.region & 15) as usize] = owner.region;
        // Whole words behind it are of the same region, and need not ask one by one.
        let words = (owner.region_end - at) / WORD_BYTES;
        let bits = if owner.place == Place::Host { ALL | ALL << INIT } else { ALL };
        let first = std::ptr::from_mut(cell);
        for i in 1..words.min(ADMITTED_WORDS) {
            // SAFETY: cells of the same allocation, which lie behind this one in the shadow.
            let next = unsafe { &mut *first.add(i) };
            if next.region == owner.region {
                break;
            }
            *next = Cell { region: owner.region, bits, ..Cell::default() };
        }
        true
    }

    /// SH-1, SH-2 and the rest of SH-3, for bytes of one word.
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
                self.word_finding("race", at, &format!("{verb} what {writer} writes, with no order between them"));
            }
        } else if cell.writer == me && same_bytes && !both_atomic && conflict(cell.writer_thread, thread, fenced) {
            self.word_finding(
                "race-in-launch",
                at,
                &format!("a thread {verb} what another thread writes in one launch"),
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
                    self.word_finding("race-in-launch", at, "a thread writes what another thread reads in one launch");
                }
            } else if read_bytes && !self.shadow.is_before(reader, self.clock) {
                let reader = self.shadow.name(reader);
                self.word_finding("race", at, &format!("writes what {reader} reads, with no order between them"));
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

    fn word_finding(&mut self, kind: &str, at: usize, what: &str) {
        let registry = self.registry.lock().unwrap_or_else(|e| e.into_inner());
        let owner = registry.owner(at);
        drop(registry);
        let mut findings = self.findings.lock().unwrap_or_else(|e| e.into_inner());
        let function = self.name.split(" (").next().unwrap_or("").to_string();
        let generic = what.split(" (").next().unwrap_or("");
        findings.add(kind, &format!("{function} {generic}"), || match owner {
            Some(o) => format!("{} {what}, at offset {} of {} bytes on {}", self.name, at - o.base, o.bytes, o.place),
            None => format!("{} {what}, at {at:#x}", self.name),
        });
    }

    /// SH-1 for the freeing of a whole allocation: everybody who touched it must be before. Returns who is not.
    pub fn users_after(&self, users: &HashMap<usize, u32>) -> Option<String> {
        let mut late: Vec<u32> = users.values().copied().filter(|u| !self.shadow.is_before(*u, self.clock)).collect();
        late.sort_unstable();
        late.first().map(|u| self.shadow.name(*u))
    }
}

/// What kernels call when the quick check has no answer. Returns 1 when the access must not be made.
///
/// # Safety
///
/// `checker` comes from [`Guest::checker`], and its guest is where it was.
unsafe extern "C" fn slow(checker: *mut Checker, address: usize, bytes: usize, access: u32, thread: u64) -> u32 {
    let access = [Access::Read, Access::Write, Access::Atomic][access as usize];
    // SAFETY: by the contract above; the kernel that calls us holds no reference to either.
    let (checker, guest) = unsafe { (&mut *checker, &mut *(*checker).user) };
    u32::from(!guest.touch_as(checker, address, bytes, access, thread))
}

/// What kernels call with findings of their own.
///
/// # Safety
///
/// As for [`slow`]; the texts end in a zero.
unsafe extern "C" fn report_text(checker: *mut Checker, kind: *const c_char, what: *const c_char) {
    // SAFETY: by the contract above.
    let (guest, kind, what) = unsafe { (&mut *(*checker).user, CStr::from_ptr(kind), CStr::from_ptr(what)) };
    guest.report(&kind.to_string_lossy(), &what.to_string_lossy());
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
        assert!(!conflict(a, thread(0, 4, 1, 2), false), "a barrier of the warp");
        assert!(conflict(a, thread(0, 40, 1, 2), false), "a barrier of another warp");
        assert!(!conflict(a, thread(0, 40, 2, 1), false), "a barrier of the block");
        assert!(conflict(a, thread(1, 3, 2, 2), false) && !conflict(a, thread(1, 3, 2, 2), true));
    }

    #[test]
    fn readers_are_remembered_together() {
        let (a, b, c) = (thread(0, 3, 1, 1), thread(0, 4, 1, 1), thread(0, 40, 1, 1));
        let warp = merged(a, b);
        assert!(conflict(warp, a, false) && conflict(warp, b, false) && conflict(warp, c, false));
        assert!(!conflict(warp, thread(0, 3, 1, 2), false));
        let warps = merged(warp, c);
        assert!(conflict(warps, thread(0, 3, 1, 2), false) && !conflict(warps, thread(0, 3, 2, 2), false));
        assert!(conflict(merged(a, thread(1, 3, 1, 1)), thread(0, 3, 2, 2), false));
    }

    #[test]
    fn sets_of_readers_forget_those_before() {
        let mut shadow = Shadow::default();
        let name = |what: &str| Name { what: what.into(), whose: "a stream".into() };
        let mut add = |agent, what| shadow.operation(agent, 1, name(what));
        let (a, b, c) = (add(0, "a"), add(1, "b"), add(2, "c"));
        let both = shadow.with_reader(a, b, &[0, 1, 0]);
        assert_eq!(shadow.readers(both), [a, b]);
        assert_eq!(shadow.with_reader(a, b, &[0, 1, 0]), both);
        let later = shadow.with_reader(both, c, &[1, 0, 1]);
        assert_eq!(shadow.readers(later), [b, c]);
        assert_eq!(shadow.with_reader(later, c, &[1, 1, 1]), c);
    }
}
