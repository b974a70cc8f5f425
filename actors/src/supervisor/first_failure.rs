//! The first cause of a session's failure, and the waits that it ends.

use std::sync::OnceLock;
use std::time::{Duration, Instant};

use crossbeam_channel::{Receiver, Sender, bounded};
use parking_lot::{Condvar, Mutex};

use crate::error::Failure;

pub(crate) struct FirstFailure {
    /// The first cause, with its time in nanoseconds since the session's start.
    first: Mutex<Option<(u64, Failure)>>,
    /// Notified when a step ends and when the session fails.
    settled: Condvar,
    failed: Sender<Failure>,
    /// Called with the first cause before anything stops.
    callback: OnceLock<OnFailure>,
}

pub(crate) type OnFailure = Box<dyn Fn(&Failure) + Send + Sync>;

impl FirstFailure {
    pub(super) fn new() -> (Self, Receiver<Failure>) {
        let (failed, failures) = bounded(1);
        (Self { first: Mutex::default(), settled: Condvar::new(), failed, callback: OnceLock::new() }, failures)
    }

    pub(crate) fn get(&self) -> Option<(u64, Failure)> {
        self.first.lock().clone()
    }

    /// Sets the callback for the first cause. If the session has already failed, calls it before returning.
    pub(crate) fn set_callback(&self, callback: OnFailure) {
        // A concurrent `record` may also call the callback. A repeated call changes nothing.
        let _ = self.callback.set(callback);
        if let Some((_, first)) = self.get() {
            self.call_back(&first);
        }
    }

    fn call_back(&self, failure: &Failure) {
        self.callback.get().into_iter().for_each(|callback| callback(failure));
    }

    /// Records the cause and calls the callback. Returns false if the session had already failed.
    pub(super) fn record(&self, at_ns: u64, failure: &Failure) -> bool {
        {
            let mut first = self.first.lock();
            if first.is_some() {
                return false;
            }
            *first = Some((at_ns, failure.clone()));
        }
        tracing::error!(%failure, "session ends");
        self.call_back(failure);
        true
    }

    /// Reports the recorded cause to the host and ends all waits.
    pub(super) fn publish(&self, failure: Failure) {
        // The channel has room for one message, and this is the only one.
        let _ = self.failed.try_send(failure);
        self.settled.notify_all();
    }

    pub(crate) fn notify(&self) {
        // The lock ensures that a waiter cannot check before the change and start to wait after the notification.
        drop(self.first.lock());
        self.settled.notify_all();
    }

    /// Waits for a condition. Returns false on timeout, and the first cause as an error if the session fails first.
    pub(crate) fn wait_until(&self, timeout: Duration, condition: impl Fn() -> bool) -> Result<bool, Failure> {
        let begin = Instant::now();
        let mut first = self.first.lock();
        loop {
            if let Some((_, failure)) = &*first {
                return Err(failure.clone());
            }
            let left = timeout.saturating_sub(begin.elapsed());
            let holds = condition();
            if holds || left.is_zero() {
                return Ok(holds);
            }
            self.settled.wait_for(&mut first, left);
        }
    }
}
