//! Which stream goes on next, what waits for what, and when nothing can go on.
//!
//! One thread executes everything. An operation is ready when it is its stream's first, the NULL stream's order allows
//! it, its event was recorded, and (once started) its partners in a collective have started too.

use std::sync::MutexGuard;
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use crate::config::Policy;
use crate::nccl::{abroad, engine};
use crate::run::run;
use crate::world::{Kind, Refused, State, Stream, World, in_callback, lock};

/// How long work waits for the host under the late policies, if the host neither waits nor asks nor submits more.
const LATE_AFTER: Duration = Duration::from_millis(1);
/// How often the host asks in vain before work goes on under the late policies.
const LATE_POLLS: u64 = 3;
const IDLE_WAIT: Duration = Duration::from_millis(20);

/// The streams whose order with `handle` the NULL stream rules, and whose work submitted before must be over.
fn ruled_by_null<'a>(state: &'a State, handle: u64) -> impl Iterator<Item = (u64, &'a Stream)> + 'a {
    let own = &state.streams[&handle];
    let null = state.devices[own.device].null_stream;
    let is_null = null == handle;
    let is_free = own.is_free;
    let device = own.device;
    state.streams.iter().filter_map(move |(other, stream)| {
        let ruled =
            stream.device == device && *other != handle && !stream.is_free && !is_free && (is_null || *other == null);
        ruled.then_some((*other, stream))
    })
}

/// What keeps a stream's first operation from being executed.
#[derive(Debug, PartialEq)]
pub enum Hold {
    /// Another stream has to do something first.
    Stream(u64, String),
    /// Something that no queued operation will do.
    Missing(String),
}

/// What holds the first operation of a stream; empty when it is ready, `None` when there is none.
pub fn holds(state: &State, handle: u64) -> Option<Vec<Hold>> {
    let stream = &state.streams[&handle];
    let op = stream.queue.front()?;
    let mut holds: Vec<Hold> = ruled_by_null(state, handle)
        .filter(|(_, s)| s.is_busy || s.is_hung || s.queue.front().is_some_and(|o| o.sequence < op.sequence))
        .map(|(other, _)| Hold::Stream(other, "the order of the NULL stream".into()))
        .collect();
    match &op.kind {
        Kind::Wait(signal) if signal.done.get().is_none() => {
            holds.push(Hold::Stream(signal.stream, op.name.to_string()));
        }
        Kind::Nccl(group) if group.started.is_some() => holds.extend(engine::holds(state, handle, group)),
        _ => {}
    }
    Some(holds)
}

fn is_ready(state: &State, handle: u64, stream: &Stream) -> bool {
    if stream.is_busy || stream.is_hung {
        return false;
    }
    match stream.queue.front() {
        None => false,
        Some(op) => match &op.kind {
            Kind::Nccl(group) if group.started.is_some() => engine::next_transfer(state, handle).is_some(),
            _ => holds(state, handle).is_some_and(|h| h.is_empty()),
        },
    }
}

fn pick(state: &mut State, ready: &[u64]) -> u64 {
    let sequence = |handle: &u64| state.streams[handle].queue[0].sequence;
    match state.policy {
        Policy::InOrder | Policy::Lazy => *ready.iter().min_by_key(|h| sequence(h)).expect("one is ready"),
        Policy::Adversarial => *ready.iter().max_by_key(|h| sequence(h)).expect("one is ready"),
        Policy::Starve => {
            let seed = state.seed;
            *ready.iter().min_by_key(|h| crate::world::mix(**h ^ seed << 20)).expect("one is ready")
        }
        Policy::Random => ready[(state.random() >> 11) as usize % ready.len()],
    }
}

/// The executor's thread.
pub fn execute(world: &'static World) {
    let (mut state, mut told) = (world.state(), Instant::now());
    loop {
        state = abroad::tell_busy(world, state, &mut told, world.compiling.load(Ordering::Relaxed) > 0);
        let ready: Vec<u64> = state.streams.iter().filter(|(h, s)| is_ready(&state, **h, s)).map(|(h, _)| *h).collect();
        if ready.is_empty() {
            if engine::settle_old(world, &mut state) {
                continue;
            }
            look_for_deadlock(world, &mut state);
            state = world.submitted.wait_timeout(state, IDLE_WAIT).unwrap_or_else(|e| e.into_inner()).0;
            continue;
        }
        let is_asked = state.waiting_hosts > 0 || state.polls >= LATE_POLLS;
        state.is_released |= is_asked || state.last_submission.elapsed() > LATE_AFTER;
        if state.policy.is_late() && !state.is_released {
            let wait = Duration::from_micros(200);
            state = world.submitted.wait_timeout(state, wait).unwrap_or_else(|e| e.into_inner()).0;
            continue;
        }
        let stream = pick(&mut state, &ready);
        state = run(world, state, stream);
        state.executed += 1;
        state.last_move = Instant::now();
        world.progressed.notify_all();
    }
}

/// Finds a ring of streams that wait for each other, or, after a while in which nothing moved, waits that nobody ends.
fn look_for_deadlock(world: &World, state: &mut State) {
    let is_compiling = world.compiling.load(Ordering::Relaxed) > 0;
    let is_deferred = state.comms.comms.values().any(|c| !c.deferred.is_empty());
    if is_deferred || state.is_stuck || state.was_injected || state.streams.values().all(|s| s.queue.is_empty()) {
        return;
    }
    let stuck: Vec<(u64, Vec<Hold>)> =
        state.streams.keys().filter_map(|h| Some((*h, holds(state, *h)?))).filter(|(_, h)| !h.is_empty()).collect();
    let is_ring = stuck.iter().any(|(start, _)| reaches(&stuck, *start, *start));
    let quiet = state.last_move.elapsed().min(state.peers_moved.elapsed());
    if stuck.is_empty() || (!is_ring && (is_compiling || quiet < world.config.deadlock)) {
        return;
    }
    state.is_stuck = true;
    let lines: Vec<String> = stuck.iter().map(|(handle, holds)| describe(state, *handle, holds)).collect();
    let key = lines.first().cloned().unwrap_or_default();
    let what =
        if is_ring { "streams wait for each other" } else { "nothing moves, and nobody does what is waited for" };
    world.find("deadlock", &key, || format!("{what}:\n  {}", lines.join("\n  ")));
    world.progressed.notify_all();
}

fn describe(state: &State, handle: u64, holds: &[Hold]) -> String {
    let reasons: Vec<String> = holds
        .iter()
        .map(|hold| match hold {
            Hold::Stream(other, why) => format!("{} ({why})", state.stream_name(*other)),
            Hold::Missing(what) => what.clone(),
        })
        .collect();
    let stream = &state.streams[&handle];
    let queued = stream.queue.len() - 1;
    let name = &stream.queue[0].name;
    format!("{}: {name} waits for {}; {queued} more queued", state.stream_name(handle), reasons.join(", and for "))
}

fn reaches(stuck: &[(u64, Vec<Hold>)], from: u64, to: u64) -> bool {
    let (mut seen, mut todo) = (vec![], vec![from]);
    while let Some(at) = todo.pop() {
        let Some((_, holds)) = stuck.iter().find(|s| s.0 == at) else { continue };
        for hold in holds {
            let Hold::Stream(next, _) = hold else { continue };
            if *next == to {
                return true;
            }
            if !seen.contains(next) {
                seen.push(*next);
                todo.push(*next);
            }
        }
    }
    false
}

/// Waits until `is_over`; `device` is the one that is waited for. The answer is an error when nothing can go on.
pub fn host_wait<'a>(
    world: &'a World,
    mut state: MutexGuard<'a, State>,
    device: usize,
    is_over: impl Fn(&State) -> bool,
) -> Result<MutexGuard<'a, State>, Refused> {
    if in_callback() {
        world.find("misuse", "callback", || {
            "a host function of a stream waits for the device: it would never end".into()
        });
        return Err(Refused::CUDA_ERROR_NOT_PERMITTED);
    }
    let start = Instant::now();
    state.waiting_hosts += 1;
    world.submitted.notify_all();
    let answer = loop {
        if let Some(error) = state.devices[device].error {
            break Err(error);
        }
        if is_over(&state) {
            break Ok(());
        }
        let hangs = state.devices[device].is_hung && start.elapsed() > world.config.hang;
        if state.is_stuck || hangs {
            break Err(Refused::CUDA_ERROR_LAUNCH_TIMEOUT);
        }
        state = world.progressed.wait_timeout(state, IDLE_WAIT).unwrap_or_else(|e| e.into_inner()).0;
    };
    state.waiting_hosts -= 1;
    answer.map(|()| state)
}

/// Waits until a device has nothing left to do, and lets the calling thread know all that it did.
pub fn synchronise_device(world: &World, device: usize) -> Result<(), Refused> {
    let is_open = |s: &Stream| s.device == device && !s.is_destroyed;
    let streams: Vec<u64> = world.state().streams.iter().filter(|(_, s)| is_open(s)).map(|(h, _)| *h).collect();
    for stream in streams {
        match synchronise(world, stream) {
            // It was destroyed meanwhile, and is waited for below.
            Err(Refused::CUDA_ERROR_INVALID_HANDLE) => {}
            other => other?,
        }
    }
    let is_over = |s: &State| s.streams.values().all(|x| x.device != device || !x.is_destroyed);
    let mut state = host_wait(world, world.state(), device, is_over)?;
    let ended = state.devices[device].ended.clone();
    state.host(world.config.one_host).clock.join(&ended);
    Ok(())
}

/// Waits until a stream is empty, and lets the calling thread know what it did.
pub fn synchronise(world: &World, stream: u64) -> Result<(), Refused> {
    let mut state = world.state();
    let handle = state.stream(stream)?;
    let device = state.streams[&handle].device;
    let signal = state.record(world, handle, "for the host");
    let mut state = host_wait(world, state, device, |_| signal.done.get().is_some())?;
    if let Some((clock, _)) = signal.done.get() {
        state.host(world.config.one_host).clock.join(clock);
    }
    Ok(())
}

/// Waits until nothing can go on any more: until all is done, or what is left is held for good.
pub fn drain(world: &World, limit: Duration) {
    let start = Instant::now();
    let mut state = lock(&world.state);
    state.waiting_hosts += 1;
    loop {
        let is_over = state.streams.iter().all(|(h, s)| !s.is_busy && !is_ready(&state, *h, s))
            && state.comms.comms.values().all(|c| c.deferred.is_empty());
        if is_over || start.elapsed() > limit {
            break;
        }
        world.submitted.notify_all();
        state = world.progressed.wait_timeout(state, IDLE_WAIT).unwrap_or_else(|e| e.into_inner()).0;
    }
    state.waiting_hosts -= 1;
}
