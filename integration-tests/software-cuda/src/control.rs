//! The control interface for tests: findings, counters, schedules, faults, clock tokens, regions.
//!
//! Clock tokens: a message between host threads carries the sender's `software_cuda_clock_capture()`, and the receiver
//! calls `software_cuda_clock_join` with it; otherwise the sender's actions are not ordered before the receiver's.
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

/// Exports functions under their own names. Callers keep the contracts in their comments.
macro_rules! control {
    ($($(#[$meta:meta])* fn $name:ident($($arg:ident: $ty:ty),*) $(-> $ret:ty)? $body:block)*) => { $(
        $(#[$meta])*
        ///
        /// # Safety
        ///
        /// Texts end with NUL.
        #[unsafe(no_mangle)]
        pub unsafe extern "C" fn $name($($arg: $ty),*) $(-> $ret)? {
            // SAFETY: texts end with NUL, as the comments require.
            #[allow(unused_unsafe)]
            unsafe { $body }
        }
    )* };
}

control! {
    /// Captures the calling host thread's clock as a token to send with a message. Never 0.
    fn software_cuda_clock_capture() -> u64 {
        host::capture(machine())
    }

    /// Joins the token of a received message into the calling host thread's clock; several threads may join one.
    fn software_cuda_clock_join(token: u64) {
        host::join(machine(), token);
    }

    /// Drops a token that no thread will join any more.
    fn software_cuda_clock_forget(token: u64) {
        host::forget(machine(), token);
    }

    /// Records that the calling host thread reads (0) or writes (1) pinned memory; checked like any other access.
    fn software_cuda_host_access(address: u64, bytes: u64, is_write: u32) {
        host::touch(machine(), address as usize, bytes as usize, is_write != 0);
    }

    /// Names a part of an allocation, such as a slot of an arena: operations may access it only through a pointer into
    /// it. Returns 1, or 0 if it overlaps another part or exceeds its allocation.
    fn software_cuda_name_region(address: u64, bytes: u64) -> u32 {
        let machine = machine();
        let _shadow = lock(&machine.shadow);
        u32::from(lock(&machine.registry).name_region(address as usize, bytes as usize))
    }

    /// Waits until all submitted work is finished or can never finish.
    fn software_cuda_drain() {
        drain(machine(), DRAIN_MAX);
    }

    /// Number of distinct findings, after all submitted work.
    fn software_cuda_finding_count() -> u64 {
        drain(machine(), DRAIN_MAX);
        lock(&machine().findings).list().len() as u64
    }

    /// All findings and counters as JSON, as in the report at exit; the text is never freed.
    fn software_cuda_report() -> *const c_char {
        drain(machine(), DRAIN_MAX);
        static_text(&serde_json::to_string(&report(machine())).expect("reports hold texts and numbers"))
    }

    /// Forgets all findings.
    fn software_cuda_forget_findings() {
        drain(machine(), DRAIN_MAX);
        lock(&machine().findings).clear();
    }

    /// Number of allocations, streams, events and communicators that exist now.
    fn software_cuda_leak_count() -> u64 {
        drain(machine(), DRAIN_MAX);
        leaks(machine()).len() as u64
    }

    /// Number of calls of an exported function, or of a class of them (`allocations`, `frees`, `synchronisations`,
    /// `event-tracking`, `launches`, `queries`). `name` ends with NUL.
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

    /// Injects a fault at a device's `launch`-th launch from now: 0 kills it, 1 hangs it.
    fn software_cuda_inject(kind: u32, device: u32, launch: u64) {
        let mut state = machine().state();
        let device = device as usize;
        let kind = if kind == 0 { DeviceFaultKind::Kill } else { DeviceFaultKind::Hang };
        let launch = state.devices[device].launches + launch;
        state.fault = Some(DeviceFault { kind, device, launch });
    }
}
