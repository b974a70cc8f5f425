//! The clock of long waits, which tests replace.

use std::fmt;
use std::time::{Duration, Instant};

/// A clock that also waits.
pub trait WaitClock: Send + Sync + fmt::Debug {
    /// Time since a fixed moment.
    fn now(&self) -> Duration;
    /// Waits for `time`.
    fn wait(&self, time: Duration);
}

/// The system's clock, counted from the value's creation.
#[derive(Debug)]
pub(crate) struct SystemClock(pub(crate) Instant);

impl WaitClock for SystemClock {
    fn now(&self) -> Duration {
        self.0.elapsed()
    }

    fn wait(&self, time: Duration) {
        std::thread::sleep(time);
    }
}
