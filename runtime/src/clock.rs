//! The clock for long waits. Tests replace it.

use std::fmt;
use std::time::{Duration, Instant};

use parking_lot::Mutex;

/// A clock that can also wait.
pub trait WaitClock: Send + Sync + fmt::Debug {
    /// Time since a fixed moment.
    fn now(&self) -> Duration;
    /// Waits for `time`.
    fn wait(&self, time: Duration);
}

/// The system's clock. Time counts from the contained `Instant`.
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

/// A function that each wait calls with the clock's new time.
type OnWait = Box<dyn FnMut(Duration) + Send>;

/// A clock for tests, which advances only when a caller waits.
#[derive(Default)]
pub struct SimulatedClock {
    now: Mutex<Duration>,
    on_wait: Mutex<Option<OnWait>>,
}

impl SimulatedClock {
    /// Sets the function that each wait calls with the new time. Replaces an earlier function.
    pub fn on_wait(&self, work: impl FnMut(Duration) + Send + 'static) {
        *self.on_wait.lock() = Some(Box::new(work));
    }
}

impl fmt::Debug for SimulatedClock {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:?}", self.now)
    }
}

impl WaitClock for SimulatedClock {
    fn now(&self) -> Duration {
        *self.now.lock()
    }

    fn wait(&self, time: Duration) {
        *self.now.lock() += time;
        let now = self.now();
        self.on_wait.lock().iter_mut().for_each(|work| work(now));
    }
}
