//! One-shot events: set once by the stream that recorded them; other streams or the host wait for them.

use std::any::Any;
use std::sync::{Arc, OnceLock};

use parking_lot::{Condvar, Mutex};

use crate::clock::Stamped;

/// A backend's own object, which only that backend interprets.
pub(crate) type BackendObject = Arc<dyn Any + Send + Sync>;

/// Set when the stream that recorded it has finished all earlier submissions. Clones are the same event.
#[derive(Clone, Debug, Default)]
pub struct Event(Arc<State>);

#[derive(Debug, Default)]
struct State {
    set: OnceLock<Stamped<()>>,
    lock: Mutex<()>,
    changed: Condvar,
    /// The backend's own event, for streams of the same backend.
    recorded: OnceLock<BackendObject>,
}

impl Event {
    /// Whether the event is set; it is never cleared.
    pub fn query(&self) -> bool {
        self.0.set.get().map(Stamped::get).is_some()
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

    pub(crate) fn set(&self) {
        self.0.set.get_or_init(|| Stamped::new(()));
        // Locked so that no waiter can check before the store and start to wait after the notification.
        drop(self.0.lock.lock());
        self.0.changed.notify_all();
    }

    /// Attaches the backend's event, on which streams of the same backend wait without the host.
    pub(crate) fn record(&self, recorded: BackendObject) {
        // Once: an event is recorded by one stream.
        let _ = self.0.recorded.set(recorded);
    }

    /// The backend's event, if a stream of that backend has recorded one.
    pub(crate) fn recorded<T: Any>(&self) -> Option<&T> {
        self.0.recorded.get()?.downcast_ref()
    }
}
