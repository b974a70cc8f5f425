//! Executes one operation.
#![allow(unsafe_code)]

use std::sync::{Arc, MutexGuard};
use std::time::Instant;

use crate::clock::Clock;
use crate::config::FaultKind;
use crate::cublaslt::product;
use crate::cudnn::evaluate;
use crate::findings::Findings;
use crate::kernel;
use crate::memory::Registry;
use crate::nccl::engine;
use crate::shadow::{Access, Guest, Name, Shadow};
use crate::world::{Kind, Op, Rows, Seen, State, World, lock, set_in_callback};

/// An operation under way: who does it, and what is known to have ended before.
pub struct Running {
    /// Its agent.
    pub agent: usize,
    /// Its device.
    pub device: usize,
    /// The operation's number among all.
    pub operation: u32,
    /// What it knows, as long as there are agents.
    pub clock: Vec<u32>,
    /// The same.
    pub knows: Clock,
}

/// Starts an operation of a stream: joins what it knows, and gives it a number.
pub fn start(world: &World, state: &mut State, handle: u64, host: &Clock, what: Arc<str>) -> Running {
    let null = state.devices[state.streams[&handle].device].null_stream;
    let own = &state.streams[&handle];
    let mut clock = own.clock.clone();
    clock.join(host);
    if !own.is_free {
        // Blocking streams and the NULL stream come after each other; the others' work is over, or not started.
        let ruled = state
            .streams
            .iter()
            .filter(|(h, s)| s.device == own.device && !s.is_free && (handle == null || **h == null));
        ruled.for_each(|(_, s)| clock.join(&s.clock));
    }
    if let Some(Kind::Wait(signal)) = own.queue.front().map(|o| &o.kind)
        && let Some((known, _)) = signal.done.get()
    {
        clock.join(known);
    }
    let (agent, device) = (own.agent, own.device);
    let number = clock.tick(agent);
    let own = state.streams.get_mut(&handle).expect("it was looked up");
    own.clock = clock.clone();
    let name = Name { what, whose: own.name.clone() };
    let operation = lock(&world.shadow).operation(agent, number, name);
    Running { agent, device, operation, clock: clock.padded(state.agents), knows: clock }
}

/// Does what the first operation of a stream says, or the next part of it. The lock is given up meanwhile.
pub fn run<'a>(world: &'a World, mut state: MutexGuard<'a, State>, handle: u64) -> MutexGuard<'a, State> {
    let stream = state.streams.get_mut(&handle).expect("it was picked");
    let is_nccl = matches!(stream.queue[0].kind, Kind::Nccl(_));
    if world.config.trace {
        eprintln!("software-cuda: {handle:#x}: {}", stream.queue[0].name);
    }
    if is_nccl {
        return engine::advance(world, state, handle);
    }
    let device = stream.device;
    if matches!(stream.queue[0].kind, Kind::Launch(_) | Kind::Product(_) | Kind::Graph(_)) {
        match state.meet_fault(device) {
            Some(FaultKind::Hang) => {
                state.streams.get_mut(&handle).expect("it was picked").is_hung = true;
                return state;
            }
            Some(FaultKind::Kill | FaultKind::Die) => return state,
            None => {}
        }
    }
    let (host, name) = {
        let op = &state.streams[&handle].queue[0];
        (op.host.clone(), op.name.clone())
    };
    let running = start(world, &mut state, handle, &host, name);
    let seed = state.random();
    let stream = state.streams.get_mut(&handle).expect("it was picked");
    let op = stream.queue.pop_front().expect("it was picked");
    stream.is_busy = true;
    if let Kind::Record(signal) = &op.kind {
        // Nobody else sets it.
        let _ = signal.done.set((running.knows.clone(), Instant::now()));
    }
    drop(state);
    perform(world, &op, &running, seed);
    let mut state = world.state();
    let stream = state.streams.get_mut(&handle).expect("streams stay while they are busy");
    stream.is_busy = false;
    state.remove_if_over(handle);
    state
}

fn perform(world: &World, op: &Op, running: &Running, seed: u64) {
    if let Kind::Host { function, data } = &op.kind {
        world.state().host(world.config.one_host).clock.join(&running.knows);
        set_in_callback(true);
        if let Some(function) = function {
            // SAFETY: the program gave both, to be called here.
            unsafe { function(*data as *mut std::ffi::c_void) };
        }
        set_in_callback(false);
        return;
    }
    let mut shadow = lock(&world.shadow);
    if let Kind::Alloc { base } = &op.kind {
        if let Some(allocation) = lock(&world.registry).find_mut(*base) {
            (allocation.born, allocation.unborn) = (Some(running.operation), false);
        }
        return;
    }
    let mut guest = guest(&mut shadow, &world.registry, &world.findings, running);
    if matches!(op.kind, Kind::Copy { .. }) {
        // Copies reach every device, with or without access enabled.
        guest.reach_all();
    }
    match &op.kind {
        Kind::Launch(launch) => kernel::launch(&mut guest, launch, seed),
        Kind::Product(product) => product::run(&mut guest, product),
        Kind::Graph(job) => evaluate::run(&mut guest, job),
        Kind::Copy { from, to, rows, staged, seen } => {
            copy(&mut guest, world, (*from, *to), *rows, staged.as_deref(), *seen);
        }
        Kind::Fill { to, pattern, width, count } => fill(&mut guest, *to, *pattern, *width, *count),
        Kind::Free { base } => free(&mut guest, world, *base, &op.name),
        Kind::Alloc { .. } | Kind::Record(_) | Kind::Wait(_) | Kind::Host { .. } | Kind::Nccl(_) => {}
    }
}

/// The one who touches memory for a running operation.
pub fn guest<'a>(
    shadow: &'a mut Shadow,
    registry: &'a std::sync::Mutex<Registry>,
    findings: &'a std::sync::Mutex<Findings>,
    running: &'a Running,
) -> Guest<'a> {
    let device = Some(running.device);
    Guest::new(shadow, registry, findings, running.operation, running.agent, device, &running.clock)
}

/// A digest of bytes, to see that they changed.
///
/// # Safety
///
/// The bytes are readable.
pub unsafe fn digest(address: usize, bytes: usize) -> u64 {
    // SAFETY: by the contract above.
    let bytes = unsafe { std::slice::from_raw_parts(address as *const u8, bytes) };
    let hash = blake3::hash(bytes);
    u64::from_le_bytes(hash.as_bytes()[..8].try_into().expect("eight of 32 bytes"))
}

fn copy(guest: &mut Guest, world: &World, ends: (usize, usize), rows: Rows, staged: Option<&[u8]>, seen: Option<Seen>) {
    let (from, to) = ends;
    let window = lock(&world.registry).window;
    if let Some(seen) = seen {
        // SAFETY: pinned memory stays mapped, freed or not.
        let now = unsafe { digest(from, rows.width * rows.height) };
        let copies_in = lock(&world.registry).find(from).map(|a| a.copies_in);
        if now != seen.digest && copies_in == Some(seen.copies_in) {
            guest.report("race", "reads pinned memory that the host changed after the copy was submitted");
        }
    }
    let mut is_fine = true;
    for row in 0..rows.height {
        let (from, to) = (from + row * rows.pitch.0, to + row * rows.pitch.1);
        if staged.is_none() && window.contains(from) {
            is_fine &= guest.touch(from, rows.width, Access::Read);
        }
        if window.contains(to) {
            is_fine &= guest.touch(to, rows.width, Access::Write);
        }
        if is_fine {
            let source = staged.map_or(from, |bytes| bytes.as_ptr() as usize + row * rows.width);
            // SAFETY: both ends were checked, or are pageable memory that the caller keeps until the copy is over.
            unsafe { std::ptr::copy(source as *const u8, to as *mut u8, rows.width) };
        }
    }
    let mut registry = lock(&world.registry);
    if let Some(a) = registry.find_mut(from) {
        a.pending.0 = a.pending.0.saturating_sub(1);
    }
    if let Some(a) = registry.find_mut(to) {
        a.pending = (a.pending.0.saturating_sub(1), a.pending.1.saturating_sub(1));
        a.copies_in += 1;
    }
}

fn fill(guest: &mut Guest, to: usize, pattern: u32, width: usize, count: usize) {
    if !guest.touch(to, width * count, Access::Write) {
        return;
    }
    let pattern = &pattern.to_le_bytes()[..width];
    let is_flat = pattern.iter().all(|b| *b == pattern[0]);
    // SAFETY: the range was checked, and only operations, which run one at a time, touch it.
    let bytes = unsafe { std::slice::from_raw_parts_mut(to as *mut u8, width * count) };
    if is_flat {
        return bytes.fill(pattern[0]);
    }
    bytes.chunks_exact_mut(width).for_each(|chunk| chunk.copy_from_slice(pattern));
}

/// Frees an allocation: whoever touched it must be over.
pub fn free(guest: &mut Guest, world: &World, base: usize, by: &str) {
    let registry = lock(&world.registry);
    let Some((users, is_freed)) =
        registry.find(base).filter(|a| a.base == base).map(|a| (a.users.clone(), a.freed.is_some()))
    else {
        drop(registry);
        return guest.report("bad-free", "frees an address that is no allocation's");
    };
    drop(registry);
    if is_freed {
        return guest.report("bad-free", "frees what was freed before");
    }
    if let Some(user) = guest.users_after(&users) {
        guest.report("use-after-free", &format!("frees memory that {user} still uses, with no order between them"));
    }
    lock(&world.registry).free(base, by.to_string());
}
