//! Checks for leaks and writes the report when the process exits.
#![allow(unsafe_code)]

use std::time::Duration;

use crate::findings::SimReport;
use crate::memory::Place;
use crate::nccl::hub;
use crate::scheduler::drain;
use crate::world::{SoftwareMachine, lock, machine};

const DRAIN_MAX: Duration = Duration::from_secs(5);

/// Makes each normal exit of the process write the report.
pub fn report_at_exit() {
    extern "C" fn at_exit() {
        let machine = machine();
        drain(machine, DRAIN_MAX);
        find_leaks(machine);
        let closed = machine.state().comms.closed_names();
        hub::wait_until_left(&closed, DRAIN_MAX);
        let Some(path) = &machine.config.report else { return };
        if let Err(error) = report(machine).write(path) {
            eprintln!("software-cuda: cannot write {}: {error}", path.display());
        }
    }
    // SAFETY: the handler is in this library. The library is never unloaded, because its executor thread runs in it.
    unsafe { libc::atexit(at_exit) };
}

/// Returns the report so far.
pub fn report(machine: &SoftwareMachine) -> SimReport {
    let executed = machine.state().executed;
    let findings = lock(&machine.findings).list().to_vec();
    let peak_bytes = lock(&machine.registry).peak_bytes().iter().map(|b| *b as u64).collect();
    SimReport { findings, peak_bytes, executed, ..SimReport::default() }.with_calls()
}

/// Records leaked objects as findings, and returns their number.
pub fn find_leaks(machine: &SoftwareMachine) -> usize {
    let leaks = leaks(machine);
    for leak in &leaks {
        machine.report_finding("leak", leak, || format!("the program did not release {leak}"));
    }
    leaks.len()
}

/// Returns the objects that were created but not destroyed. Returns none after an injected fault.
pub fn leaks(machine: &SoftwareMachine) -> Vec<String> {
    let mut leaks = Vec::new();
    let state = machine.state();
    if state.was_injected {
        return leaks;
    }
    for allocation in lock(&machine.registry).leaks() {
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
