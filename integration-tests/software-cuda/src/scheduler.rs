//! Schedules streams and detects deadlocks.
//!
//! One thread executes all operations. An operation is ready if it is first in its stream, the order of the NULL stream
//! permits it, and the event for which it waits (if any) was recorded. A collective that has started is ready if the
//! calls of the other ranks have also started.

use std::sync::MutexGuard;
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use crate::config::SchedulePolicy;
use crate::nccl::{abroad, engine};
use crate::run::run;
use crate::world::{DriverError, OpKind, SoftwareMachine, State, Stream, in_callback, lock};

/// How long the late policies ([`SchedulePolicy::is_late`]) hold work back if the host is idle.
const LATE_AFTER: Duration = Duration::from_millis(1);
/// Number of unsuccessful polls by the host after which the late policies start work.
const LATE_POLLS: u64 = 3;
const IDLE_WAIT: Duration = Duration::from_millis(20);

/// Returns the streams that the NULL stream's rules order with the stream `handle`. Their earlier work must end first.
fn ordered_by_null_stream<'a>(state: &'a State, handle: u64) -> impl Iterator<Item = (u64, &'a Stream)> + 'a {
    let own = &state.streams[&handle];
    let null = state.devices[own.device].null_stream;
    let is_null = null == handle;
    let is_non_blocking = own.is_non_blocking;
    let device = own.device;
    state.streams.iter().filter_map(move |(other, stream)| {
        let is_ordered = stream.device == device
            && *other != handle
            && !stream.is_non_blocking
            && !is_non_blocking
            && (is_null || *other == null);
        is_ordered.then_some((*other, stream))
    })
}

/// The reason why a stream's first operation cannot execute.
#[derive(Debug, PartialEq)]
pub(crate) enum Blocker {
    /// Another stream must execute an operation first.
    Stream(u64, String),
    /// No queued operation will make this operation ready.
    Missing(String),
}

/// Returns the blockers of a stream's first operation: none if it is ready, and `None` if the queue is empty.
pub fn blockers(state: &State, handle: u64) -> Option<Vec<Blocker>> {
    let stream = &state.streams[&handle];
    let op = stream.queue.front()?;
    let mut blockers: Vec<Blocker> = ordered_by_null_stream(state, handle)
        .filter(|(_, s)| s.is_busy || s.is_hung || s.queue.front().is_some_and(|o| o.sequence < op.sequence))
        .map(|(other, _)| Blocker::Stream(other, "the order of the NULL stream".into()))
        .collect();
    match &op.kind {
        OpKind::Wait(signal) if signal.done.get().is_none() => {
            blockers.push(Blocker::Stream(signal.stream, op.name.to_string()));
        }
        OpKind::Nccl(group) if group.started.is_some() => blockers.extend(engine::blockers(state, handle, group)),
        _ => {}
    }
    Some(blockers)
}

fn is_ready(state: &State, handle: u64, stream: &Stream) -> bool {
    if stream.is_busy || stream.is_hung {
        return false;
    }
    match stream.queue.front() {
        None => false,
        Some(op) => match &op.kind {
            OpKind::Nccl(group) if group.started.is_some() => engine::next_transfer(state, handle).is_some(),
            _ => blockers(state, handle).is_some_and(|h| h.is_empty()),
        },
    }
}

fn pick(state: &mut State, ready: &[u64]) -> u64 {
    let sequence = |handle: &u64| state.streams[handle].queue[0].sequence;
    match state.policy {
        SchedulePolicy::InOrder | SchedulePolicy::Lazy => {
            *ready.iter().min_by_key(|h| sequence(h)).expect("a stream is ready")
        }
        SchedulePolicy::Adversarial => *ready.iter().max_by_key(|h| sequence(h)).expect("a stream is ready"),
        SchedulePolicy::Starve => {
            let seed = state.seed;
            *ready.iter().min_by_key(|h| crate::world::mix(**h ^ seed << 20)).expect("a stream is ready")
        }
        SchedulePolicy::Random => ready[(state.random() >> 11) as usize % ready.len()],
    }
}

/// The loop of the executor's thread.
pub fn execute(machine: &'static SoftwareMachine) {
    let (mut state, mut busy_sent) = (machine.state(), Instant::now());
    loop {
        state = abroad::send_busy(machine, state, &mut busy_sent, machine.compiling.load(Ordering::Relaxed) > 0);
        let ready: Vec<u64> = state.streams.iter().filter(|(h, s)| is_ready(&state, **h, s)).map(|(h, _)| *h).collect();
        if ready.is_empty() {
            if engine::submit_old_deferred(machine, &mut state) {
                continue;
            }
            detect_deadlock(machine, &mut state);
            state = machine.submitted.wait_timeout(state, IDLE_WAIT).unwrap_or_else(|e| e.into_inner()).0;
            continue;
        }
        let is_polled = state.waiting_hosts > 0 || state.polls >= LATE_POLLS;
        state.is_released |= is_polled || state.last_submission.elapsed() > LATE_AFTER;
        if state.policy.is_late() && !state.is_released {
            let wait = Duration::from_micros(200);
            state = machine.submitted.wait_timeout(state, wait).unwrap_or_else(|e| e.into_inner()).0;
            continue;
        }
        let stream = pick(&mut state, &ready);
        state = run(machine, state, stream);
        state.executed += 1;
        state.last_progress = Instant::now();
        machine.progressed.notify_all();
    }
}

/// Detects streams that wait for each other. After a time without progress, also detects waits without an end.
fn detect_deadlock(machine: &SoftwareMachine, state: &mut State) {
    let is_compiling = machine.compiling.load(Ordering::Relaxed) > 0;
    let is_deferred = state.comms.comms.values().any(|c| !c.deferred.is_empty());
    if is_deferred || state.is_stuck || state.was_injected || state.streams.values().all(|s| s.queue.is_empty()) {
        return;
    }
    let stuck: Vec<(u64, Vec<Blocker>)> =
        state.streams.keys().filter_map(|h| Some((*h, blockers(state, *h)?))).filter(|(_, h)| !h.is_empty()).collect();
    let is_cycle = stuck.iter().any(|(start, _)| reaches(&stuck, *start, *start));
    let quiet = state.last_progress.elapsed().min(state.peers_progressed.elapsed());
    if stuck.is_empty() || (!is_cycle && (is_compiling || quiet < machine.config.deadlock)) {
        return;
    }
    state.is_stuck = true;
    let lines: Vec<String> = stuck.iter().map(|(handle, blockers)| describe(state, *handle, blockers)).collect();
    let key = lines.first().cloned().unwrap_or_default();
    let summary = if is_cycle { "streams wait for each other" } else { "no queued operation can end these waits" };
    machine.report_finding("deadlock", &key, || format!("{summary}:\n  {}", lines.join("\n  ")));
    machine.progressed.notify_all();
}

fn describe(state: &State, handle: u64, blockers: &[Blocker]) -> String {
    let reasons: Vec<String> = blockers
        .iter()
        .map(|blocker| match blocker {
            Blocker::Stream(other, why) => format!("{} ({why})", state.stream_name(*other)),
            Blocker::Missing(reason) => reason.clone(),
        })
        .collect();
    let stream = &state.streams[&handle];
    let queued = stream.queue.len() - 1;
    let name = &stream.queue[0].name;
    format!("{}: {name} waits for {}; {queued} more queued", state.stream_name(handle), reasons.join(", and for "))
}

fn reaches(stuck: &[(u64, Vec<Blocker>)], from: u64, to: u64) -> bool {
    let (mut seen, mut todo) = (vec![], vec![from]);
    while let Some(at) = todo.pop() {
        let Some((_, blockers)) = stuck.iter().find(|s| s.0 == at) else { continue };
        for blocker in blockers {
            let Blocker::Stream(next, _) = blocker else { continue };
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

/// Waits until `is_done` returns true. Returns an error after a deadlock, or if `device` is lost or hangs for too long.
pub fn host_wait<'a>(
    machine: &'a SoftwareMachine,
    mut state: MutexGuard<'a, State>,
    device: usize,
    is_done: impl Fn(&State) -> bool,
) -> Result<MutexGuard<'a, State>, DriverError> {
    if in_callback() {
        machine.report_finding("misuse", "callback", || {
            "a host function of a stream waits for the device, and this wait would never end".into()
        });
        return Err(DriverError::CUDA_ERROR_NOT_PERMITTED);
    }
    let start = Instant::now();
    state.waiting_hosts += 1;
    machine.submitted.notify_all();
    let answer = loop {
        if let Some(error) = state.devices[device].error {
            break Err(error);
        }
        if is_done(&state) {
            break Ok(());
        }
        let hangs = state.devices[device].is_hung && start.elapsed() > machine.config.hang;
        if state.is_stuck || hangs {
            break Err(DriverError::CUDA_ERROR_LAUNCH_TIMEOUT);
        }
        state = machine.progressed.wait_timeout(state, IDLE_WAIT).unwrap_or_else(|e| e.into_inner()).0;
    };
    state.waiting_hosts -= 1;
    answer.map(|()| state)
}

/// Waits until a device is idle, and joins its work into the calling thread's clock.
pub fn synchronise_device(machine: &SoftwareMachine, device: usize) -> Result<(), DriverError> {
    let is_open = |s: &Stream| s.device == device && !s.is_destroyed;
    let streams: Vec<u64> = machine.state().streams.iter().filter(|(_, s)| is_open(s)).map(|(h, _)| *h).collect();
    for stream in streams {
        match synchronise(machine, stream) {
            // The stream was destroyed in the meantime. The wait below also covers the work of destroyed streams.
            Err(DriverError::CUDA_ERROR_INVALID_HANDLE) => {}
            other => other?,
        }
    }
    let is_done = |s: &State| s.streams.values().all(|x| x.device != device || !x.is_destroyed);
    let mut state = host_wait(machine, machine.state(), device, is_done)?;
    let ended = state.devices[device].ended.clone();
    state.host(machine.config.one_host).clock.join(&ended);
    Ok(())
}

/// Waits until a stream is empty, and joins its work into the calling thread's clock.
pub fn synchronise(machine: &SoftwareMachine, stream: u64) -> Result<(), DriverError> {
    let mut state = machine.state();
    let handle = state.stream(stream)?;
    let device = state.streams[&handle].device;
    let signal = state.record(machine, handle, "for the host");
    let mut state = host_wait(machine, state, device, |_| signal.done.get().is_some())?;
    if let Some((clock, _)) = signal.done.get() {
        state.host(machine.config.one_host).clock.join(clock);
    }
    Ok(())
}

/// Waits until no queued operation can run without further calls, or until `limit` has passed.
pub fn drain(machine: &SoftwareMachine, limit: Duration) {
    let start = Instant::now();
    let mut state = lock(&machine.state);
    state.waiting_hosts += 1;
    loop {
        let is_done = state.streams.iter().all(|(h, s)| !s.is_busy && !is_ready(&state, *h, s))
            && state.comms.comms.values().all(|c| c.deferred.is_empty());
        if is_done || start.elapsed() > limit {
            break;
        }
        machine.submitted.notify_all();
        state = machine.progressed.wait_timeout(state, IDLE_WAIT).unwrap_or_else(|e| e.into_inner()).0;
    }
    state.waiting_hosts -= 1;
}
