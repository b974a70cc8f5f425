//! One-shot events: set once by the stream that recorded them; other streams or the host wait for them.

use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, OnceLock};

use parking_lot::{Condvar, Mutex};

use crate::clock::RaceClock;
use crate::cuda::event::Recorded;

/// Set when the stream that recorded it has finished all earlier submissions. Clones are the same event.
#[derive(Clone, Debug, Default)]
pub struct Event(Arc<State>);

#[derive(Debug, Default)]
struct State {
    set: AtomicBool,
    lock: Mutex<()>,
    changed: Condvar,
    /// Clock of the thread that set the event.
    clock: OnceLock<RaceClock>,
    /// Set when a CUDA stream has recorded the event: other CUDA streams wait for it on the device.
    recorded: OnceLock<Arc<Recorded>>,
}

impl Event {
    /// Whether the event is set; it is never cleared.
    pub fn query(&self) -> bool {
        let set = self.0.set.load(Ordering::Acquire);
        if set && let Some(clock) = self.0.clock.get() {
            clock.join();
        }
        set
    }

    /// Blocks until the event is set. That always happens: a stream ends only after all of its queued work.
    pub fn synchronize(&self) {
        // A short spin first, since parking a thread and waking it costs tens of microseconds.
        for _ in 0..200 {
            if self.query() {
                return;
            }
            std::hint::spin_loop();
        }
        let mut guard = self.0.lock.lock();
        while !self.query() {
            self.0.changed.wait(&mut guard);
        }
    }

    /// Sets the event and wakes all waiters.
    pub(crate) fn set(&self) {
        self.0.clock.get_or_init(RaceClock::capture);
        self.0.set.store(true, Ordering::Release);
        // Locked so that no waiter can check before the store and start to wait after the notification.
        drop(self.0.lock.lock());
        self.0.changed.notify_all();
    }

    /// Lets CUDA streams wait for the event on the device.
    pub(crate) fn record(&self, recorded: Arc<Recorded>) {
        // Once: an event is recorded by one stream.
        let _ = self.0.recorded.set(recorded);
    }

    /// The recorded CUDA event; `None` before a CUDA stream has recorded it, and for events of CPU streams.
    pub(crate) fn recorded(&self) -> Option<&Arc<Recorded>> {
        self.0.recorded.get()
    }
}
