//! One thread for each GPU that asks, stream by stream and in order, what is done, and tells it.
//!
//! - POLL-1: what a stream tells comes in the order in which it was put on the stream, and only when it is done.
//! - POLL-2: the thread is parked while nothing is pending, and no stream moves to or in a collective. Otherwise it spins a
//!   little, and then sleeps never longer than [`SLEEP_MAX`]: no completion is told later than that for the sleep's sake.
//! - POLL-4: what a stream has come to and gone on from (PROGRESS-1) is looked at as often.
//! - POLL-3: when the context is lost (CONTEXT-1), all that is pending fails with the error, in order.

use std::collections::VecDeque;
use std::fmt;
use std::num::NonZeroU64;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError, Weak};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

use super::context::Context;
use super::event::Recorded;
use super::in_flight::InFlight;
use super::memory::DeviceMemory;
use super::progress::Calls;
use super::raw_stream::RawStream;
use crate::error::KernelError;
use crate::event::Event;
use crate::memory::{Arena, Base};

/// How long the thread spins after the last progress.
const SPIN: Duration = Duration::from_micros(20);
/// The first sleep behind that; each is twice as long as the one before.
const SLEEP_MIN: Duration = Duration::from_micros(10);
/// The longest.
const SLEEP_MAX: Duration = Duration::from_micros(50);
/// How often engines are asked for errors while something is pending.
const WATCH_EVERY: Duration = Duration::from_millis(1);

/// What is to be told when an event is done.
#[derive(Debug)]
pub(crate) enum Then {
    /// The signal of this tag.
    Signal(Arc<InFlight>, u32),
    /// The end of a submission. Its memory is let go before the end is told, so that whoever hears of it can count on that.
    End(Arc<InFlight>, Vec<Base>, Result<(), KernelError>),
    /// To whoever waits for the event.
    Set(Event),
    /// The same, once memory that was in use is let go.
    LetGo(Arena, Event),
}

/// Is asked now and then while something is pending: an engine that looks for errors of its own.
pub(crate) trait Watched: Send + Sync {
    /// Must not block: all that the GPU does is told by the thread that asks.
    fn look(self: Arc<Self>);
}

/// One stream's pending events.
#[derive(Debug)]
pub(crate) struct Track {
    /// Of the stream, for errors.
    pub(crate) place: String,
    calls: Option<Arc<Calls>>,
    pending: Mutex<VecDeque<(Arc<Recorded>, Then)>>,
}

struct Shared {
    context: Arc<Context>,
    tracks: Mutex<Vec<Arc<Track>>>,
    watched: Mutex<Vec<Weak<dyn Watched>>>,
    /// Of all tracks.
    pending: AtomicUsize,
    stop: AtomicBool,
    parked: Mutex<bool>,
    wake: Condvar,
}

/// See the module.
pub(crate) struct Poller {
    shared: Arc<Shared>,
    thread: Option<JoinHandle<()>>,
}

impl fmt::Debug for Poller {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Poller").field("pending", &self.shared.pending).finish()
    }
}

fn lock<T: ?Sized>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Poller {
    pub(crate) fn start(context: &Arc<Context>) -> Result<Self, KernelError> {
        let shared = Arc::new(Shared {
            context: context.clone(),
            tracks: Mutex::default(),
            watched: Mutex::default(),
            pending: AtomicUsize::new(0),
            stop: AtomicBool::new(false),
            parked: Mutex::new(false),
            wake: Condvar::new(),
        });
        let name = format!("cuda {} poller", context.ordinal());
        let own = shared.clone();
        let thread = thread::Builder::new().name(name).spawn(move || own.serve());
        let thread = thread.map_err(|_| KernelError::Closed { device: context.ordinal() })?;
        Ok(Self { shared, thread: Some(thread) })
    }

    /// A track for a new stream.
    pub(crate) fn track(&self, lane: &RawStream) -> Arc<Track> {
        let (place, calls) = (lane.place().to_owned(), lane.calls().cloned());
        let track = Arc::new(Track { place, calls, pending: Mutex::default() });
        lock(&self.shared.tracks).push(track.clone());
        track
    }

    /// Forgets a track, whose stream has ended; what is still pending on it fails.
    pub(crate) fn forget(&self, track: &Arc<Track>, why: &KernelError) {
        lock(&self.shared.tracks).retain(|other| !Arc::ptr_eq(other, track));
        self.shared.fail(track, why);
    }

    /// Has `then` told when `after` is done, behind all else of the track (POLL-1).
    pub(crate) fn push(&self, track: &Track, after: Arc<Recorded>, then: Then) {
        // Counted first, so that the thread never takes away what is not yet counted.
        self.shared.pending.fetch_add(1, Ordering::SeqCst);
        lock(&track.pending).push_back((after, then));
        self.wake();
    }

    /// Has it look, if it is parked.
    pub(crate) fn wake(&self) {
        let parked = lock(&self.shared.parked);
        if *parked {
            self.shared.wake.notify_one();
        }
    }

    /// Has an engine asked for errors while something is pending.
    pub(crate) fn watch(&self, watched: Weak<dyn Watched>) {
        lock(&self.shared.watched).push(watched);
    }

    /// True when nothing of the track is pending.
    pub(crate) fn is_idle(&self, track: &Track) -> bool {
        lock(&track.pending).is_empty()
    }

    /// True on the poller's own thread, which can wait for nothing.
    pub(crate) fn is_this_thread(&self) -> bool {
        self.thread.as_ref().is_some_and(|thread| thread.thread().id() == thread::current().id())
    }
}

impl Drop for Poller {
    fn drop(&mut self) {
        self.shared.stop.store(true, Ordering::SeqCst);
        drop(lock(&self.shared.parked));
        self.shared.wake.notify_all();
        if !self.is_this_thread()
            && let Some(thread) = self.thread.take()
        {
            // It catches every panic.
            let _ = thread.join();
        }
    }
}

impl Shared {
    fn serve(&self) {
        // A sleep as short as these would else be made some 50 us longer by the kernel.
        let _ = rustix::thread::set_current_timer_slack(NonZeroU64::new(1_000));
        // What fails here fails at the first query, too, and is told then.
        let _ = self.context.bind();
        let (mut since, mut sleep, mut watched) = (Instant::now(), SLEEP_MIN, Instant::now());
        while !self.stop.load(Ordering::SeqCst) {
            if self.is_idle() {
                self.park();
                (since, sleep) = (Instant::now(), SLEEP_MIN);
            }
            let tracks = lock(&self.tracks).clone();
            let advanced = tracks.iter().filter(|track| self.advance(track)).count();
            // Behind that: of what has ended nothing stays unseen.
            tracks.iter().filter_map(|track| track.calls.as_ref()).for_each(|calls| calls.look());
            if advanced > 0 {
                (since, sleep) = (Instant::now(), SLEEP_MIN);
                continue;
            }
            if watched.elapsed() >= WATCH_EVERY {
                watched = Instant::now();
                self.look();
            }
            if since.elapsed() < SPIN {
                std::hint::spin_loop();
            } else {
                thread::sleep(sleep);
                sleep = (sleep * 2).min(SLEEP_MAX);
            }
        }
        for track in lock(&self.tracks).drain(..) {
            self.fail(&track, &KernelError::Closed { device: self.context.ordinal() });
        }
    }

    /// Nothing is pending, and no stream moves to or in a call.
    fn is_idle(&self) -> bool {
        let is_moving = |track: &Arc<Track>| track.calls.as_ref().is_some_and(|calls| calls.is_moving());
        self.pending.load(Ordering::SeqCst) == 0
            && (self.context.lost().is_some() || !lock(&self.tracks).iter().any(is_moving))
    }

    fn park(&self) {
        let mut parked = lock(&self.parked);
        while self.is_idle() && !self.stop.load(Ordering::SeqCst) {
            *parked = true;
            parked = self.wake.wait(parked).unwrap_or_else(PoisonError::into_inner);
        }
        *parked = false;
    }

    fn look(&self) {
        let watched: Vec<_> = {
            let mut watched = lock(&self.watched);
            watched.retain(|engine| engine.strong_count() > 0);
            watched.iter().filter_map(Weak::upgrade).collect()
        };
        watched.into_iter().for_each(Watched::look);
    }

    /// Tells all of a track that is done; whether there was any.
    fn advance(&self, track: &Track) -> bool {
        let mut progressed = false;
        loop {
            // Asked outside the lock, which submitting threads take.
            let Some(front) = lock(&track.pending).front().map(|(after, _)| after.clone()) else { return progressed };
            let lost = self.context.check_alive();
            match lost.and_then(|()| front.is_done(&track.place)) {
                Ok(false) => return progressed,
                Ok(true) => {
                    if let Some((_, then)) = self.pop(track) {
                        tell(then, None);
                    }
                }
                Err(error) => {
                    let error = self.context.lose(error);
                    self.fail(track, &error);
                }
            }
            progressed = true;
        }
    }

    fn pop(&self, track: &Track) -> Option<(Arc<Recorded>, Then)> {
        let popped = lock(&track.pending).pop_front();
        if popped.is_some() {
            self.pending.fetch_sub(1, Ordering::SeqCst);
        }
        popped
    }

    /// Tells all of a track that it has failed (POLL-3).
    fn fail(&self, track: &Track, error: &KernelError) {
        while let Some((_, then)) = self.pop(track) {
            tell(then, Some(error));
        }
    }
}

/// A panic of what is told is swallowed: there is nobody to tell that.
fn tell(then: Then, failed: Option<&KernelError>) {
    let tell = || match (then, failed) {
        (Then::Set(event), _) => event.set(),
        (Then::LetGo(arena, event), _) => {
            arena.device_memory().into_iter().for_each(DeviceMemory::let_go);
            drop(arena);
            event.set();
        }
        (Then::Signal(ticket, tag), None) => ticket.signal(tag),
        (Then::Signal(..), Some(_)) => {}
        (Then::End(ticket, bases, result), failed) => {
            let memories = bases.iter().filter_map(|base| base.arena.device_memory());
            memories.for_each(DeviceMemory::let_go);
            drop(bases);
            ticket.end(failed.map_or(result, |error| Err(error.clone())));
        }
    };
    drop(catch_unwind(AssertUnwindSafe(tell)));
}
