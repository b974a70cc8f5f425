//! What a host thread hands over, beside the data, so that a software CUDA device can check that one thing happened before
//! another. Without debug assertions, as in a release, it is nothing, and costs nothing.
#![cfg_attr(debug_assertions, allow(unsafe_code))]

#[cfg(debug_assertions)]
use std::{
    collections::HashMap,
    sync::{Mutex, PoisonError},
    thread::{self, ThreadId},
};

/// All that the thread knows to have happened when it captures one. Whoever sends a message between threads sends one
/// along, and the receiver joins it.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct RaceClock(#[cfg(debug_assertions)] u64);

impl RaceClock {
    /// The calling thread's.
    pub fn capture() -> Self {
        #[cfg(debug_assertions)]
        return Self(software::functions().map_or(0, |functions| (functions.capture)()));
        #[cfg(not(debug_assertions))]
        Self()
    }

    /// The calling thread knows from now on what the one knew that captured it.
    pub fn join(self) {
        #[cfg(debug_assertions)]
        if let (token @ 1.., Some(functions)) = (self.0, software::functions()) {
            (functions.join)(token);
        }
    }
}

/// The calling thread reads or writes pinned memory by itself, which nothing else tells a software device.
pub(crate) fn host_access(start: *const u8, bytes: usize, writes: bool) {
    #[cfg(debug_assertions)]
    if let Some(functions) = software::functions() {
        (functions.access)(start.addr() as u64, bytes as u64, u32::from(writes));
    }
    #[cfg(not(debug_assertions))]
    let _ = (start, bytes, writes);
}

/// What each of many threads knew when it let go of something, for the one that is last.
#[derive(Debug, Default)]
pub struct ReleaseClocks(#[cfg(debug_assertions)] Mutex<HashMap<ThreadId, RaceClock>>);

impl ReleaseClocks {
    /// The calling thread lets go.
    pub fn add(&self) {
        #[cfg(debug_assertions)]
        if let clock @ RaceClock(1..) = RaceClock::capture() {
            self.0.lock().unwrap_or_else(PoisonError::into_inner).insert(thread::current().id(), clock);
        }
    }

    /// The calling thread knows what they all knew.
    pub fn join(&self) {
        #[cfg(debug_assertions)]
        self.0.lock().unwrap_or_else(PoisonError::into_inner).values().for_each(|clock| clock.join());
    }
}

#[cfg(debug_assertions)]
mod software {
    use std::sync::OnceLock;

    pub(super) struct Functions {
        pub(super) capture: extern "C" fn() -> u64,
        pub(super) join: extern "C" fn(u64),
        pub(super) access: extern "C" fn(u64, u64, u32),
    }

    /// Those of the software device; `None` with any other driver, and with none.
    pub(super) fn functions() -> Option<&'static Functions> {
        static FUNCTIONS: OnceLock<Option<Functions>> = OnceLock::new();
        FUNCTIONS.get_or_init(find).as_ref()
    }

    fn find() -> Option<Functions> {
        // SAFETY: loading the driver runs its initialisers only, and it stays loaded: `culib` keeps it for good.
        let library = unsafe { cudarc::driver::sys::is_culib_present().then(|| cudarc::driver::sys::culib()) }?;
        // SAFETY: the software device exports these names with these types, and nobody else exports them.
        unsafe {
            let capture = library.get(b"software_cuda_clock_capture").ok().map(|symbol| *symbol)?;
            let join = library.get(b"software_cuda_clock_join").ok().map(|symbol| *symbol)?;
            let access = library.get(b"software_cuda_host_access").ok().map(|symbol| *symbol)?;
            Some(Functions { capture, join, access })
        }
    }
}
