//! One-shot events: set once by the stream that recorded them, waited for by other streams or by the host.
//! Imports nothing.

use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Condvar, Mutex, PoisonError};

/// Set when the stream that recorded it has done all that was submitted before. Clones are the same event.
#[derive(Clone, Debug, Default)]
pub struct Event(Arc<State>);

#[derive(Debug, Default)]
struct State {
    set: AtomicBool,
    lock: Mutex<()>,
    changed: Condvar,
}

impl Event {
    /// True once set; never false again.
    pub fn query(&self) -> bool {
        self.0.set.load(Ordering::Acquire)
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
        self.0.set.store(true, Ordering::Release);
        // Taken so that nobody can check before the store and wait after the notification.
        drop(self.0.lock.lock().unwrap_or_else(PoisonError::into_inner));
        self.0.changed.notify_all();
    }
}
