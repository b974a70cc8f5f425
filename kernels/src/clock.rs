//! Vector clocks for the race checker of the software CUDA device. A clock holds the last known event of each thread
//! and stream. If the clocks do not order two conflicting accesses, the checker reports a race. Without debug
//! assertions, clocks are empty and cost nothing.
#![cfg_attr(debug_assertions, allow(unsafe_code))]

#[cfg(debug_assertions)]
use std::{
    collections::HashMap,
    thread::{self, ThreadId},
};

#[cfg(debug_assertions)]
use parking_lot::Mutex;

/// A snapshot of a thread's vector clock. Each message between threads carries the sender's snapshot, and the receiver
/// merges it into its own clock.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
struct RaceClock(#[cfg(debug_assertions)] u64);

impl RaceClock {
    fn capture() -> Self {
        #[cfg(debug_assertions)]
        return Self(software::functions().map_or(0, |functions| (functions.capture)()));
        #[cfg(not(debug_assertions))]
        Self()
    }

    /// Merges the snapshot into the calling thread's clock. This orders the thread's later events after the snapshot.
    fn join(self) {
        #[cfg(debug_assertions)]
        if let (token @ 1.., Some(functions)) = (self.0, software::functions()) {
            (functions.join)(token);
        }
    }
}

/// A value that one thread passes to another, with the sender's clock. The sender's events before [`Stamped::new`]
/// count as earlier than the receiver's events after it has read the value.
#[derive(Clone, Copy, Debug, Default)]
pub struct Stamped<T> {
    value: T,
    clock: RaceClock,
}

impl<T> Stamped<T> {
    /// Wraps a value together with the calling thread's clock.
    pub fn new(value: T) -> Self {
        Self { value, clock: RaceClock::capture() }
    }

    /// Returns the value.
    pub fn get(&self) -> &T {
        self.clock.join();
        &self.value
    }

    /// Unwraps the value.
    pub fn open(self) -> T {
        self.clock.join();
        self.value
    }
}

/// Reports an access by the calling thread to pinned memory. The software device cannot observe such accesses itself.
pub(crate) fn host_access(start: *const u8, bytes: usize, writes: bool) {
    #[cfg(debug_assertions)]
    if let Some(functions) = software::functions() {
        (functions.access)(start.addr() as u64, bytes as u64, u32::from(writes));
    }
    #[cfg(not(debug_assertions))]
    let _ = (start, bytes, writes);
}

/// The clocks of all threads that released an object. A thread that then uses or frees the object merges these clocks.
#[derive(Debug, Default)]
pub struct ReleaseClocks(#[cfg(debug_assertions)] Mutex<HashMap<ThreadId, RaceClock>>);

impl ReleaseClocks {
    /// Records the calling thread's clock when that thread releases the object.
    pub fn add(&self) {
        #[cfg(debug_assertions)]
        if let clock @ RaceClock(1..) = RaceClock::capture() {
            self.0.lock().insert(thread::current().id(), clock);
        }
    }

    /// Merges the clocks of all releases into the calling thread's clock.
    pub fn join(&self) {
        #[cfg(debug_assertions)]
        self.0.lock().values().for_each(|clock| clock.join());
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

    /// The functions of the software device. `None` if there is no driver, or if the driver is not the software device.
    pub(super) fn functions() -> Option<&'static Functions> {
        static FUNCTIONS: OnceLock<Option<Functions>> = OnceLock::new();
        FUNCTIONS.get_or_init(find).as_ref()
    }

    fn find() -> Option<Functions> {
        // SAFETY: loading the driver only runs its initializers, and the driver stays loaded: `culib` never unloads it.
        let library = unsafe { cudarc::driver::sys::is_culib_present().then(|| cudarc::driver::sys::culib()) }?;
        // SAFETY: only the software device exports these names, and it exports them with these types.
        unsafe {
            let capture = library.get(b"software_cuda_clock_capture").ok().map(|symbol| *symbol)?;
            let join = library.get(b"software_cuda_clock_join").ok().map(|symbol| *symbol)?;
            let access = library.get(b"software_cuda_host_access").ok().map(|symbol| *symbol)?;
            Some(Functions { capture, join, access })
        }
    }
}
