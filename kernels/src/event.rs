//! One-shot events: set once by the stream that recorded them, waited for by other streams or by the host.

use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Condvar, Mutex, OnceLock, PoisonError};

use crate::clock::RaceClock;
use crate::cuda::event::Recorded;

/// Set when the stream that recorded it has done all that was submitted before. Clones are the same event.
#[derive(Clone, Debug, Default)]
pub struct Event(Arc<State>);

#[derive(Debug, Default)]
struct State {
    set: AtomicBool,
    lock: Mutex<()>,
    changed: Condvar,
    /// What the thread knew that set it.
    clock: OnceLock<RaceClock>,
    /// Of a CUDA stream that has recorded it: other CUDA streams wait for it on their device.
    recorded: OnceLock<Arc<Recorded>>,
}

impl Event {
    /// True once set; never false again.
    pub fn query(&self) -> bool {
        let set = self.0.set.load(Ordering::Acquire);
        if set && let Some(clock) = self.0.clock.get() {
            clock.join();
        }
        set
    }

    /// Blocks until set. It always comes: a stream ends only after all that was queued on it.
    pub fn synchronize(&self) {
        // A short spin first, since parking a thread and waking it costs tens of microseconds.
        for _ in 0..200 {
            if self.query() {
                return;
            }
            std::hint::spin_loop();
        }
        let mut guard = self.0.lock.lock().unwrap_or_else(PoisonError::into_inner);
        while !self.query() {
            guard = self.0.changed.wait(guard).unwrap_or_else(PoisonError::into_inner);
        }
    }

    /// Sets it and wakes whoever waits.
    pub(crate) fn set(&self) {
        self.0.clock.get_or_init(RaceClock::capture);
        self.0.set.store(true, Ordering::Release);
        // Taken so that nobody can check before the store and wait after the notification.
        drop(self.0.lock.lock().unwrap_or_else(PoisonError::into_inner));
        self.0.changed.notify_all();
    }

    /// Makes it one that CUDA streams can wait for on their device.
    pub(crate) fn record(&self, recorded: Arc<Recorded>) {
        // Once: an event is recorded by one stream.
        let _ = self.0.recorded.set(recorded);
    }

    /// What a CUDA stream recorded; `None` before it has, and for the events of others.
    pub(crate) fn recorded(&self) -> Option<&Arc<Recorded>> {
        self.0.recorded.get()
    }
}
