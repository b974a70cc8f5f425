//! The control interface for tests: findings, counters, schedules, faults, clock tokens and regions.
//!
//! Clock tokens order the actions of two host threads. The sender adds a token from `software_cuda_clock_capture()` to
//! its message, and the receiver passes the token to `software_cuda_clock_join`. Without a token, the actions of the
//! two threads are unordered.
#![allow(unsafe_code)]

use std::ffi::c_char;
use std::time::Duration;

use crate::config::{DeviceFault, DeviceFaultKind, SchedulePolicy};
use crate::exit::{leaks, report};
use crate::findings::count;
use crate::host;
use crate::kernel::text;
use crate::nvrtc::static_text;
use crate::scheduler::drain;
use crate::world::{lock, machine, mix};

const DRAIN_MAX: Duration = Duration::from_secs(30);

/// Exports functions under their own names. Callers must keep the contracts in the functions' comments.
macro_rules! control {
    ($($(#[$meta:meta])* fn $name:ident($($arg:ident: $ty:ty),*) $(-> $ret:ty)? $body:block)*) => { $(
        $(#[$meta])*
        ///
        /// # Safety
        ///
        /// Every text must end with NUL.
        #[unsafe(no_mangle)]
        pub unsafe extern "C" fn $name($($arg: $ty),*) $(-> $ret)? {
            // SAFETY: texts end with NUL, as the contract above requires.
            #[allow(unused_unsafe)]
            unsafe { $body }
        }
    )* };
}

control! {
    /// Returns the calling host thread's clock as a token to send with a message. A token is never 0.
    fn software_cuda_clock_capture() -> u64 {
        host::capture(machine())
    }

    /// Joins a received token into the calling host thread's clock. Several threads may join the same token.
    fn software_cuda_clock_join(token: u64) {
        host::join(machine(), token);
    }

    /// Drops a token that no thread will join any more.
    fn software_cuda_clock_forget(token: u64) {
        host::forget(machine(), token);
    }

    /// Records a read or write (`is_write` is 1) of pinned memory by the calling host thread. All checks apply to it.
    fn software_cuda_host_access(address: u64, bytes: u64, is_write: u32) {
        host::touch(machine(), address as usize, bytes as usize, is_write != 0);
    }

    /// Names a part of an allocation, such as a slot of an arena. Operations may then access the part only through a
    /// pointer into it. Returns 1, or 0 if the part overlaps another named part or exceeds the allocation.
    fn software_cuda_name_region(address: u64, bytes: u64) -> u32 {
        let machine = machine();
        let _shadow = lock(&machine.shadow);
        u32::from(lock(&machine.registry).name_region(address as usize, bytes as usize))
    }

    /// Waits, for a limited time, until no submitted operation can run without further calls.
    fn software_cuda_drain() {
        drain(machine(), DRAIN_MAX);
    }

    /// Waits for all submitted work, then returns the number of distinct findings.
    fn software_cuda_finding_count() -> u64 {
        drain(machine(), DRAIN_MAX);
        lock(&machine().findings).list().len() as u64
    }

    /// Returns all findings and counters in the JSON format of the report at exit. The text is never freed.
    fn software_cuda_report() -> *const c_char {
        drain(machine(), DRAIN_MAX);
        static_text(&serde_json::to_string(&report(machine())).expect("reports hold texts and numbers"))
    }

    /// Deletes all findings.
    fn software_cuda_forget_findings() {
        drain(machine(), DRAIN_MAX);
        lock(&machine().findings).clear();
    }

    /// Returns the number of allocations, streams, events and communicators that exist now.
    fn software_cuda_leak_count() -> u64 {
        drain(machine(), DRAIN_MAX);
        leaks(machine()).len() as u64
    }

    /// Returns the number of calls of an exported function, or of all functions of a class (`allocations`, `frees`,
    /// `synchronisations`, `event-tracking`, `launches`, `queries`). `name` ends with NUL.
    fn software_cuda_call_count(name: *const c_char) -> u64 {
        count(&text(name))
    }

    /// Changes the schedule. Returns 1, or 0 for an unknown policy. `policy` ends with NUL.
    fn software_cuda_schedule(policy: *const c_char, seed: u64) -> u32 {
        drain(machine(), DRAIN_MAX);
        let Some(policy) = SchedulePolicy::named(&text(policy)) else { return 0 };
        let mut state = machine().state();
        (state.policy, state.seed, state.random) = (policy, seed, mix(seed));
        1
    }

    /// Injects a fault at the `launch`-th launch on a device, counted from this call. Kind 0 kills the device. With
    /// kind 1, the launch hangs.
    fn software_cuda_inject(kind: u32, device: u32, launch: u64) {
        let mut state = machine().state();
        let device = device as usize;
        let kind = if kind == 0 { DeviceFaultKind::Kill } else { DeviceFaultKind::Hang };
        let launch = state.devices[device].launches + launch;
        state.fault = Some(DeviceFault { kind, device, launch });
    }
}
