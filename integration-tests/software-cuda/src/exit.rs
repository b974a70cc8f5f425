//! Checks for leaks and writes the report when the process exits.
#![allow(unsafe_code)]

use std::time::Duration;

use crate::findings::Report;
use crate::memory::Place;
use crate::nccl::hub;
use crate::scheduler::drain;
use crate::world::{World, lock, world};

const DRAIN_MAX: Duration = Duration::from_secs(5);

/// Registers the report for a normal exit of the process.
pub fn report_at_exit() {
    extern "C" fn at_exit() {
        let world = world();
        drain(world, DRAIN_MAX);
        find_leaks(world);
        let closed = world.state().comms.closed_names();
        hub::wait_until_left(&closed, DRAIN_MAX);
        let Some(path) = &world.config.report else { return };
        if let Err(error) = report(world).write(path) {
            eprintln!("software-cuda: cannot write {}: {error}", path.display());
        }
    }
    // SAFETY: the handler is in this library, which is never unloaded, because its executor thread runs in it.
    unsafe { libc::atexit(at_exit) };
}

/// The report so far.
pub fn report(world: &World) -> Report {
    let executed = world.state().executed;
    let findings = lock(&world.findings).list().to_vec();
    let peak_bytes = lock(&world.registry).peak_bytes().iter().map(|b| *b as u64).collect();
    Report { findings, peak_bytes, executed, ..Report::default() }.with_calls()
}

/// Records leaked objects as findings.
pub fn find_leaks(world: &World) -> usize {
    let leaks = leaks(world);
    for leak in &leaks {
        world.find("leak", leak, || leak.clone());
    }
    leaks.len()
}

/// Objects that were created and not destroyed; none after an injected fault.
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
