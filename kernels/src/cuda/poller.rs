//! One thread per GPU. It queries, in stream order, whether the work of each stream is done, and reports the result.
//!
//! - POLL-1: the completions of a stream are reported in stream order, each only after its work is done.
//! - POLL-2: the thread parks while no completion is pending and no stream is about to enter or leave a collective or
//!   pipe call. Otherwise it spins briefly and then sleeps at most [`SLEEP_MAX`] at a time, which bounds the delay of a
//!   report.
//! - POLL-3: if the context is lost (CONTEXT-1), all pending completions fail with the context's error, in order.
//! - POLL-4: after each round of queries, the thread reads the progress of streams through collectives (PROGRESS-1).

use std::collections::VecDeque;
use std::fmt;
use std::num::NonZeroU64;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Arc, Weak};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

use parking_lot::{Condvar, Mutex};

use super::context::Context;
use super::event::Recorded;
use super::progress::CallProgress;
use crate::error::{KernelError, Result};
use crate::event::Event;
use crate::memory::Arena;

/// How long the thread spins after the last progress.
const SPIN: Duration = Duration::from_micros(20);
/// The first sleep after the spin. Each following sleep is twice as long, up to `SLEEP_MAX`.
const SLEEP_MIN: Duration = Duration::from_micros(10);
const SLEEP_MAX: Duration = Duration::from_micros(50);
/// Interval at which engines check for errors while the thread is not parked.
const CHECK_INTERVAL: Duration = Duration::from_millis(1);

/// Called when an event is done, or with an error if the context is lost (POLL-3) or its stream closed. Must not block.
pub(crate) type Completion = Box<dyn FnOnce(Option<&KernelError>) + Send>;

pub(crate) fn set_event(event: Event) -> Completion {
    Box::new(move |_| event.set())
}

/// Releases the memory, then sets the event.
pub(crate) fn release(arena: Arena, event: Event) -> Completion {
    Box::new(move |_| {
        arena.mark_released();
        drop(arena);
        event.set();
    })
}

/// An engine that detects its own errors. The poller calls the engine periodically while the poller is not parked.
pub(crate) trait ErrorCheck: Send + Sync {
    /// Must not block: the calling thread reports all completions of the GPU.
    fn check_errors(self: Arc<Self>);
}

pub(crate) struct CompletionQueue {
    place: String,
    progress: Option<Arc<CallProgress>>,
    pending: Mutex<VecDeque<(Arc<Recorded>, Completion)>>,
}

struct Shared {
    context: Arc<Context>,
    queues: Mutex<Vec<Arc<CompletionQueue>>>,
    error_checks: Mutex<Vec<Weak<dyn ErrorCheck>>>,
    /// Number of pending completions in all queues.
    pending: AtomicUsize,
    stop: AtomicBool,
    parked: Mutex<bool>,
    wake: Condvar,
}

pub(crate) struct Poller {
    shared: Arc<Shared>,
    thread: Option<JoinHandle<()>>,
}

impl fmt::Debug for CompletionQueue {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("CompletionQueue").field("place", &self.place).finish_non_exhaustive()
    }
}

impl Poller {
    pub(crate) fn start(context: &Arc<Context>) -> Result<Self> {
        let shared = Arc::new(Shared {
            context: context.clone(),
            queues: Mutex::default(),
            error_checks: Mutex::default(),
            pending: AtomicUsize::new(0),
            stop: AtomicBool::new(false),
            parked: Mutex::new(false),
            wake: Condvar::new(),
        });
        let name = format!("cuda {} poller", context.ordinal);
        let own = shared.clone();
        let thread = thread::Builder::new().name(name.clone()).spawn(move || own.serve());
        let thread = thread.map_err(|e| KernelError::thread(&name, &e))?;
        Ok(Self { shared, thread: Some(thread) })
    }

    pub(crate) fn register(&self, place: &str, progress: Option<&Arc<CallProgress>>) -> Arc<CompletionQueue> {
        let (place, progress) = (place.to_owned(), progress.cloned());
        let queue = Arc::new(CompletionQueue { place, progress, pending: Mutex::default() });
        self.shared.queues.lock().push(queue.clone());
        queue
    }

    /// Removes the queue of a stream that has ended; pending completions fail with `cause`.
    pub(crate) fn unregister(&self, queue: &Arc<CompletionQueue>, cause: &KernelError) {
        self.shared.queues.lock().retain(|other| !Arc::ptr_eq(other, queue));
        self.shared.fail(queue, cause);
    }

    /// Reports `completion` once `after` is done and all earlier completions of the queue are reported (POLL-1).
    pub(crate) fn push(&self, queue: &CompletionQueue, after: Arc<Recorded>, completion: Completion) {
        // Count first, so that the thread never subtracts a completion that is not yet counted.
        self.shared.pending.fetch_add(1, Ordering::SeqCst);
        queue.pending.lock().push_back((after, completion));
        self.wake();
    }

    pub(crate) fn wake(&self) {
        let parked = self.shared.parked.lock();
        if *parked {
            self.shared.wake.notify_one();
        }
    }

    pub(crate) fn add_error_check(&self, check: Weak<dyn ErrorCheck>) {
        self.shared.error_checks.lock().push(check);
    }

    pub(crate) fn is_idle(&self, queue: &CompletionQueue) -> bool {
        queue.pending.lock().is_empty()
    }

    /// Returns true on the poller's own thread, which must not block.
    pub(crate) fn is_poller_thread(&self) -> bool {
        self.thread.as_ref().is_some_and(|thread| thread.thread().id() == thread::current().id())
    }
}

impl Drop for Poller {
    fn drop(&mut self) {
        self.shared.stop.store(true, Ordering::SeqCst);
        drop(self.shared.parked.lock());
        self.shared.wake.notify_all();
        if !self.is_poller_thread()
            && let Some(thread) = self.thread.take()
        {
            // The thread catches every panic.
            let _ = thread.join();
        }
    }
}

impl Shared {
    fn serve(&self) {
        // With the default timer slack, the kernel extends short sleeps by about 50 us.
        let _ = rustix::thread::set_current_timer_slack(NonZeroU64::new(1_000));
        // If this bind fails, the first query fails in the same way and reports the error.
        let _ = self.context.bind();
        let (mut last_progress, mut sleep, mut last_check) = (Instant::now(), SLEEP_MIN, Instant::now());
        while !self.stop.load(Ordering::SeqCst) {
            if self.is_idle() {
                self.park();
                (last_progress, sleep) = (Instant::now(), SLEEP_MIN);
            }
            let queues = self.queues.lock().clone();
            let advanced = queues.iter().filter(|queue| self.advance(queue)).count();
            // Read the progress last, so that it covers all work whose completion was reported above.
            queues.iter().filter_map(|queue| queue.progress.as_ref()).for_each(|progress| progress.update());
            if advanced > 0 {
                (last_progress, sleep) = (Instant::now(), SLEEP_MIN);
                continue;
            }
            if last_check.elapsed() >= CHECK_INTERVAL {
                last_check = Instant::now();
                self.check_engines();
            }
            if last_progress.elapsed() < SPIN {
                std::hint::spin_loop();
            } else {
                thread::sleep(sleep);
                sleep = (sleep * 2).min(SLEEP_MAX);
            }
        }
        for queue in self.queues.lock().drain(..) {
            self.fail(&queue, &KernelError::Closed { device: self.context.ordinal });
        }
    }

    /// Returns whether no completion is pending and, unless the context is lost, no stream is about to enter or leave a
    /// collective or pipe call.
    fn is_idle(&self) -> bool {
        let expects_progress =
            |queue: &Arc<CompletionQueue>| queue.progress.as_ref().is_some_and(|progress| progress.expects_progress());
        self.pending.load(Ordering::SeqCst) == 0
            && (self.context.lost().is_some() || !self.queues.lock().iter().any(expects_progress))
    }

    fn park(&self) {
        let mut parked = self.parked.lock();
        while self.is_idle() && !self.stop.load(Ordering::SeqCst) {
            *parked = true;
            self.wake.wait(&mut parked);
        }
        *parked = false;
    }

    fn check_engines(&self) {
        let error_checks: Vec<_> = {
            let mut error_checks = self.error_checks.lock();
            error_checks.retain(|engine| engine.strong_count() > 0);
            error_checks.iter().filter_map(Weak::upgrade).collect()
        };
        error_checks.into_iter().for_each(ErrorCheck::check_errors);
    }

    /// Reports all finished completions of a queue. Returns whether there were any.
    fn advance(&self, queue: &CompletionQueue) -> bool {
        let mut has_progressed = false;
        loop {
            // Query without the queue's lock, since submitting threads take it.
            let Some(front) = queue.pending.lock().front().map(|(after, _)| after.clone()) else {
                return has_progressed;
            };
            let lost = self.context.check_alive();
            match lost.and_then(|()| front.is_done(&queue.place)) {
                Ok(false) => return has_progressed,
                Ok(true) => {
                    if let Some((_, completion)) = self.pop(queue) {
                        report(completion, None);
                    }
                }
                Err(error) => {
                    let error = self.context.mark_lost(error);
                    self.fail(queue, &error);
                }
            }
            has_progressed = true;
        }
    }

    fn pop(&self, queue: &CompletionQueue) -> Option<(Arc<Recorded>, Completion)> {
        let popped = queue.pending.lock().pop_front();
        if popped.is_some() {
            self.pending.fetch_sub(1, Ordering::SeqCst);
        }
        popped
    }

    /// Fails all completions of a queue (POLL-3).
    fn fail(&self, queue: &CompletionQueue, error: &KernelError) {
        while let Some((_, completion)) = self.pop(queue) {
            report(completion, Some(error));
        }
    }
}

/// Reports a completion. If the receiver panics, the panic is dropped, since no caller could handle it.
fn report(completion: Completion, failed: Option<&KernelError>) {
    drop(catch_unwind(AssertUnwindSafe(|| completion(failed))));
}
