//! What tests ask of the software device itself: findings, counters, schedules, faults, clock tokens, regions.
//!
//! Clock tokens: a message from one host thread to another carries `software_cuda_clock_capture()` of the sender, and its
//! receiver calls `software_cuda_clock_join` with it; otherwise what the sender did is not known to come before.
#![allow(unsafe_code)]

use std::ffi::c_char;
use std::time::Duration;

use crate::config::{Fault, FaultKind, Policy};
use crate::exit::{leaks, report};
use crate::findings::count;
use crate::host;
use crate::kernel::text;
use crate::nvrtc::lasting_text;
use crate::scheduler::drain;
use crate::world::{lock, mix, world};

const DRAIN_MAX: Duration = Duration::from_secs(30);

/// Exports functions under their own names. What they are given is what their comments ask for.
macro_rules! control {
    ($($(#[$meta:meta])* fn $name:ident($($arg:ident: $ty:ty),*) $(-> $ret:ty)? $body:block)*) => { $(
        $(#[$meta])*
        ///
        /// # Safety
        ///
        /// Texts end in a zero.
        #[unsafe(no_mangle)]
        pub unsafe extern "C" fn $name($($arg: $ty),*) $(-> $ret)? {
            // SAFETY: texts end in a zero, as the comments ask.
            #[allow(unused_unsafe)]
            unsafe { $body }
        }
    )* };
}

control! {
    /// What the calling host thread knows, to be sent with a message. Never 0.
    fn software_cuda_clock_capture() -> u64 {
        host::capture(world())
    }

    /// The calling host thread received a message with that token; several threads may join one.
    fn software_cuda_clock_join(token: u64) {
        host::join(world(), token);
    }

    /// No thread will join that token any more.
    fn software_cuda_clock_forget(token: u64) {
        host::forget(world(), token);
    }

    /// The calling host thread reads (0) or writes (1) pinned memory by itself; checked like any other access.
    fn software_cuda_host_access(address: u64, bytes: u64, is_write: u32) {
        host::touch(world(), address as usize, bytes as usize, is_write != 0);
    }

    /// Names a part of an allocation, as a slot of an arena: operations may touch it only through a pointer into it.
    /// Returns 1, or 0 when it overlaps another part or leaves its allocation.
    fn software_cuda_name_region(address: u64, bytes: u64) -> u32 {
        let world = world();
        let _shadow = lock(&world.shadow);
        u32::from(lock(&world.registry).name_region(address as usize, bytes as usize))
    }

    /// Waits until everything that was submitted is over, or can never be.
    fn software_cuda_drain() {
        drain(world(), DRAIN_MAX);
    }

    /// How many different findings there are, once everything submitted is over.
    fn software_cuda_finding_count() -> u64 {
        drain(world(), DRAIN_MAX);
        lock(&world().findings).list().len() as u64
    }

    /// All findings and counters as JSON, as the report at exit has them; the text lives as long as the process.
    fn software_cuda_report() -> *const c_char {
        drain(world(), DRAIN_MAX);
        lasting_text(&serde_json::to_string(&report(world())).expect("reports hold texts and numbers"))
    }

    /// Forgets all findings.
    fn software_cuda_forget_findings() {
        drain(world(), DRAIN_MAX);
        lock(&world().findings).clear();
    }

    /// Allocations, streams, events and communicators that exist now.
    fn software_cuda_leak_count() -> u64 {
        drain(world(), DRAIN_MAX);
        leaks(world()).len() as u64
    }

    /// Calls so far of an exported function, or of a class of them (`allocations`, `frees`, `synchronisations`,
    /// `event-tracking`, `launches`, `queries`).
    /// `name` ends in a zero.
    fn software_cuda_call_count(name: *const c_char) -> u64 {
        count(&text(name))
    }

    /// Changes the schedule. Returns 1, or 0 when there is no such policy.
    /// `policy` ends in a zero.
    fn software_cuda_schedule(policy: *const c_char, seed: u64) -> u32 {
        drain(world(), DRAIN_MAX);
        let Some(policy) = Policy::named(&text(policy)) else { return 0 };
        let mut state = world().state();
        (state.policy, state.seed, state.random) = (policy, seed, mix(seed));
        1
    }

    /// Injects a fault at the `launch`-th launch from now of a device: 0 kills it, 1 hangs it.
    fn software_cuda_inject(kind: u32, device: u32, launch: u64) {
        let mut state = world().state();
        let device = device as usize;
        let kind = if kind == 0 { FaultKind::Kill } else { FaultKind::Hang };
        let launch = state.devices[device].launches + launch;
        state.fault = Some(Fault { kind, device, launch });
    }
}
