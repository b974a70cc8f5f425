//! Executes operations.
#![allow(unsafe_code)]

use std::sync::{Arc, MutexGuard};
use std::time::Instant;

use crate::clock::Clock;
use crate::config::DeviceFaultKind;
use crate::cublaslt::product;
use crate::cudnn::evaluate;
use crate::findings::Findings;
use crate::kernel;
use crate::memory::Registry;
use crate::nccl::engine;
use crate::shadow::{Access, Accessor, OperationName, Shadow};
use crate::world::{OpKind, QueuedOp, Rows, SoftwareMachine, SourceState, State, lock, set_in_callback};

/// A running operation, its agent (see `clock`) and its clock.
pub(crate) struct Running {
    /// Agent of the operation's stream.
    pub agent: usize,
    /// Device of the operation's stream.
    pub device: usize,
    /// The operation's number among all operations.
    pub operation: u32,
    /// The operation's clock, padded to the number of agents.
    pub clock: Vec<u32>,
    /// The operation's clock without padding.
    pub knows: Clock,
}

/// Starts an operation of a stream: gives it a number, and joins the clocks of all work that precedes it.
pub fn start(machine: &SoftwareMachine, state: &mut State, handle: u64, host: &Clock, action: Arc<str>) -> Running {
    let null = state.devices[state.streams[&handle].device].null_stream;
    let own = &state.streams[&handle];
    let mut clock = own.clock.clone();
    clock.join(host);
    if !own.is_non_blocking {
        // The work of the NULL stream and of blocking streams runs in submission order. Work that was submitted earlier
        // has ended, and work that was submitted later has not started.
        let ordered = state
            .streams
            .iter()
            .filter(|(h, s)| s.device == own.device && !s.is_non_blocking && (handle == null || **h == null));
        ordered.for_each(|(_, s)| clock.join(&s.clock));
    }
    if let Some(OpKind::Wait(signal)) = own.queue.front().map(|o| &o.kind)
        && let Some((known, _)) = signal.done.get()
    {
        clock.join(known);
    }
    let (agent, device) = (own.agent, own.device);
    let number = clock.tick(agent);
    let own = state.streams.get_mut(&handle).expect("looked up above");
    own.clock = clock.clone();
    let name = OperationName { action, agent: own.name.clone() };
    let operation = lock(&machine.shadow).operation(agent, number, name);
    Running { agent, device, operation, clock: clock.padded(state.agents), knows: clock }
}

/// Executes the first operation of a stream, or its next part. Releases the lock while it executes.
pub fn run<'a>(machine: &'a SoftwareMachine, mut state: MutexGuard<'a, State>, handle: u64) -> MutexGuard<'a, State> {
    let stream = state.streams.get_mut(&handle).expect("the caller picked it");
    let is_nccl = matches!(stream.queue[0].kind, OpKind::Nccl(_));
    if machine.config.trace {
        eprintln!("software-cuda: {handle:#x}: {}", stream.queue[0].name);
    }
    if is_nccl {
        return engine::advance(machine, state, handle);
    }
    let device = stream.device;
    if matches!(stream.queue[0].kind, OpKind::Launch(_) | OpKind::Product(_) | OpKind::Graph(_)) {
        match state.trigger_fault(device) {
            Some(DeviceFaultKind::Hang) => {
                state.streams.get_mut(&handle).expect("the caller picked it").is_hung = true;
                return state;
            }
            Some(DeviceFaultKind::Kill | DeviceFaultKind::Die) => return state,
            None => {}
        }
    }
    let (host, name) = {
        let op = &state.streams[&handle].queue[0];
        (op.host.clone(), op.name.clone())
    };
    let running = start(machine, &mut state, handle, &host, name);
    let seed = state.random();
    let stream = state.streams.get_mut(&handle).expect("the caller picked it");
    let op = stream.queue.pop_front().expect("the caller picked it");
    stream.is_busy = true;
    if let OpKind::Record(signal) = &op.kind {
        // This cannot fail, because only this operation sets the signal.
        let _ = signal.done.set((running.knows.clone(), Instant::now()));
    }
    drop(state);
    perform(machine, &op, &running, seed);
    let mut state = machine.state();
    let stream = state.streams.get_mut(&handle).expect("busy streams are not removed");
    stream.is_busy = false;
    state.remove_if_finished(handle);
    state
}

fn perform(machine: &SoftwareMachine, op: &QueuedOp, running: &Running, seed: u64) {
    if let OpKind::Host { function, data } = &op.kind {
        machine.state().host(machine.config.one_host).clock.join(&running.knows);
        set_in_callback(true);
        if let Some(function) = function {
            // SAFETY: the program has passed the function together with this argument.
            unsafe { function(*data as *mut std::ffi::c_void) };
        }
        set_in_callback(false);
        return;
    }
    let mut shadow = lock(&machine.shadow);
    if let OpKind::Alloc { base } = &op.kind {
        if let Some(allocation) = lock(&machine.registry).find_mut(*base) {
            (allocation.born, allocation.unborn) = (Some(running.operation), false);
        }
        return;
    }
    let mut accessor = accessor(&mut shadow, &machine.registry, &machine.findings, running);
    if matches!(op.kind, OpKind::Copy { .. }) {
        // A copy may access all devices, even without peer access.
        accessor.allow_all_devices();
    }
    match &op.kind {
        OpKind::Launch(launch) => kernel::launch(&mut accessor, launch, seed),
        OpKind::Product(product) => product::run(&mut accessor, product),
        OpKind::Graph(execution) => evaluate::run(&mut accessor, execution),
        OpKind::Copy { from, to, rows, staged, source_state } => {
            copy(&mut accessor, machine, (*from, *to), *rows, staged.as_deref(), *source_state);
        }
        OpKind::Fill { to, pattern, width, count } => fill(&mut accessor, *to, *pattern, *width, *count),
        OpKind::Free { base } => free(&mut accessor, machine, *base, &op.name),
        OpKind::Alloc { .. } | OpKind::Record(_) | OpKind::Wait(_) | OpKind::Host { .. } | OpKind::Nccl(_) => {}
    }
}

/// Returns an accessor for a running operation.
pub fn accessor<'a>(
    shadow: &'a mut Shadow,
    registry: &'a std::sync::Mutex<Registry>,
    findings: &'a std::sync::Mutex<Findings>,
    running: &'a Running,
) -> Accessor<'a> {
    let device = Some(running.device);
    Accessor::new(shadow, registry, findings, running.operation, running.agent, device, &running.clock)
}

/// Returns a digest of the bytes. A changed digest shows that the bytes have changed.
///
/// # Safety
///
/// The bytes must be readable.
pub unsafe fn digest(address: usize, bytes: usize) -> u64 {
    // SAFETY: the caller keeps the contract above.
    let bytes = unsafe { std::slice::from_raw_parts(address as *const u8, bytes) };
    let hash = blake3::hash(bytes);
    u64::from_le_bytes(hash.as_bytes()[..8].try_into().expect("eight of 32 bytes"))
}

fn copy(
    accessor: &mut Accessor,
    machine: &SoftwareMachine,
    ends: (usize, usize),
    rows: Rows,
    staged: Option<&[u8]>,
    source_state: Option<SourceState>,
) {
    let (from, to) = ends;
    let window = lock(&machine.registry).window;
    if let Some(source_state) = source_state {
        // SAFETY: pinned memory stays mapped even after a free.
        let now = unsafe { digest(from, rows.width * rows.height) };
        let copies_in = lock(&machine.registry).find(from).map(|a| a.copies_in);
        if now != source_state.digest && copies_in == Some(source_state.copies_in) {
            accessor.report("race", "reads pinned memory that the host changed after the copy was submitted");
        }
    }
    let mut is_fine = true;
    for row in 0..rows.height {
        let (from, to) = (from + row * rows.pitch.0, to + row * rows.pitch.1);
        if staged.is_none() && window.contains(from) {
            is_fine &= accessor.touch(from, rows.width, Access::Read);
        }
        if window.contains(to) {
            is_fine &= accessor.touch(to, rows.width, Access::Write);
        }
        if is_fine {
            let source = staged.map_or(from, |bytes| bytes.as_ptr() as usize + row * rows.width);
            // SAFETY: device and pinned memory was checked. The caller keeps pageable memory valid until the copy ends.
            unsafe { std::ptr::copy(source as *const u8, to as *mut u8, rows.width) };
        }
    }
    let mut registry = lock(&machine.registry);
    if let Some(a) = registry.find_mut(from) {
        a.pending.0 = a.pending.0.saturating_sub(1);
    }
    if let Some(a) = registry.find_mut(to) {
        a.pending = (a.pending.0.saturating_sub(1), a.pending.1.saturating_sub(1));
        a.copies_in += 1;
    }
}

fn fill(accessor: &mut Accessor, to: usize, pattern: u32, width: usize, count: usize) {
    if !accessor.touch(to, width * count, Access::Write) {
        return;
    }
    let pattern = &pattern.to_le_bytes()[..width];
    let is_flat = pattern.iter().all(|b| *b == pattern[0]);
    // SAFETY: the range was checked. Only operations access it, and operations run one at a time.
    let bytes = unsafe { std::slice::from_raw_parts_mut(to as *mut u8, width * count) };
    if is_flat {
        return bytes.fill(pattern[0]);
    }
    bytes.chunks_exact_mut(width).for_each(|chunk| chunk.copy_from_slice(pattern));
}

/// Frees an allocation. Reports an operation that accessed the allocation and is not ordered before the free.
pub fn free(accessor: &mut Accessor, machine: &SoftwareMachine, base: usize, by: &str) {
    let registry = lock(&machine.registry);
    let Some((users, is_freed)) =
        registry.find(base).filter(|a| a.base == base).map(|a| (a.users.clone(), a.freed.is_some()))
    else {
        drop(registry);
        return accessor.report("bad-free", "frees an address that is not the start of an allocation");
    };
    drop(registry);
    if is_freed {
        return accessor.report("bad-free", "frees an allocation a second time");
    }
    if let Some(user) = accessor.unordered_user(&users) {
        accessor.report("use-after-free", &format!("frees memory without waiting for {user}, which uses it"));
    }
    lock(&machine.registry).free(base, by.to_string());
}
