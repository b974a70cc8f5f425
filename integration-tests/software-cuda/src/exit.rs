//! What is checked and written when the process ends.
#![allow(unsafe_code)]

use std::time::Duration;

use crate::findings::Report;
use crate::memory::Place;
use crate::nccl::hub;
use crate::scheduler::drain;
use crate::world::{World, lock, world};

const DRAIN_MAX: Duration = Duration::from_secs(5);

/// Has the report written when the process ends by itself.
pub fn report_at_exit() {
    extern "C" fn at_exit() {
        let world = world();
        drain(world, DRAIN_MAX);
        find_leaks(world);
        let left = world.state().comms.left();
        hub::wait_until_left(&left, DRAIN_MAX);
        let Some(path) = &world.config.report else { return };
        if let Err(error) = report(world).write(path) {
            eprintln!("software-cuda: cannot write {}: {error}", path.display());
        }
    }
    // SAFETY: the handler is a function of this library, which is never unloaded: its executor runs in it.
    unsafe { libc::atexit(at_exit) };
}

/// What is known so far.
pub fn report(world: &World) -> Report {
    let executed = world.state().executed;
    let findings = lock(&world.findings).list().to_vec();
    let peak_bytes = lock(&world.registry).peak_bytes().iter().map(|b| *b as u64).collect();
    Report { findings, peak_bytes, executed, ..Report::default() }.with_calls()
}

/// What was made and not given back, as findings.
pub fn find_leaks(world: &World) -> usize {
    let leaks = leaks(world);
    for leak in &leaks {
        world.find("leak", leak, || leak.clone());
    }
    leaks.len()
}

/// What was made and not given back. Nothing is blamed on a program whose device was lost.
pub fn leaks(world: &World) -> Vec<String> {
    let mut leaks = Vec::new();
    let state = world.state();
    if state.was_injected {
        return leaks;
    }
    for allocation in lock(&world.registry).leaks() {
        let pinned = if allocation.place == Place::Host { " of pinned memory" } else { "" };
        leaks.push(format!("{} bytes{pinned} at {:#x} on {}", allocation.bytes, allocation.base, allocation.place));
    }
    let own: Vec<u64> = state.devices.iter().map(|d| d.null_stream).collect();
    for (handle, stream) in &state.streams {
        if !own.contains(handle) && !stream.is_destroyed {
            leaks.push(state.stream_name(*handle));
        }
    }
    leaks.extend(state.events.iter().map(|(handle, event)| format!("event {handle:#x} of device {}", event.device)));
    leaks.extend(state.comms.leaks());
    leaks
}
