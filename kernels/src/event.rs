//! One-shot events. The stream that recorded an event sets it once; other streams or the host wait for it.

use std::any::Any;
use std::sync::{Arc, OnceLock};

use parking_lot::{Condvar, Mutex};

use crate::clock::Stamped;

/// An object of a backend. Only that backend interprets the object.
pub(crate) type BackendObject = Arc<dyn Any + Send + Sync>;

/// An event that is set once its stream has finished all earlier submissions. All clones are the same event.
#[derive(Clone, Debug, Default)]
pub struct Event(Arc<State>);

#[derive(Debug, Default)]
struct State {
    set: OnceLock<Stamped<()>>,
    lock: Mutex<()>,
    changed: Condvar,
    /// The backend's own event, on which streams of the same backend wait.
    recorded: OnceLock<BackendObject>,
}

impl Event {
    /// True if the event is set. An event is never cleared.
    pub fn query(&self) -> bool {
        self.0.set.get().map(Stamped::get).is_some()
    }

    /// Blocks until the event is set. A dropped stream also sets its events, because it first finishes its queued work.
    pub fn synchronize(&self) {
        // Spins briefly first, since parking and waking a thread costs tens of microseconds.
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
        // Without this lock, a waiter could check the flag before it is set and start to wait after the notification.
        drop(self.0.lock.lock());
        self.0.changed.notify_all();
    }

    /// Attaches the backend's event. Streams of the same backend wait for it without the host.
    pub(crate) fn record(&self, recorded: BackendObject) {
        // This succeeds, because only one stream records an event.
        let _ = self.0.recorded.set(recorded);
    }

    /// The backend's event, if a stream of that backend has recorded this event.
    pub(crate) fn recorded<T: Any>(&self) -> Option<&T> {
        self.0.recorded.get()?.downcast_ref()
    }
}
