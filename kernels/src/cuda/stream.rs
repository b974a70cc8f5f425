//! A CUDA stream: submissions are issued by whoever submits them, until one has to wait for the host; then the stream's own
//! thread goes on, and later submissions queue behind it.
//!
//! - STREAM-1: one thread at a time issues (`busy`), in the order of the queue.
//! - STREAM-2: the stream's own thread exists only once something had to wait for the host.

use std::collections::VecDeque;
use std::fmt;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

use super::gpu::Gpu;
use super::issue::{Command, Issuer};
use super::lowered::Cache;
use super::poller::Track;
use super::raw_stream::RawStream;
use super::record::Records;
use crate::clock::RaceClock;
use crate::collective::{AbortStatus, Collective};
use crate::error::KernelError;
use crate::event::Event;
use crate::memory::Tally;
use crate::metrics::{CollectiveTime, StreamMetrics};
use crate::op::Program;
use crate::stream::Submission;

/// How long a stream that is dropped waits for a device that does not come to an end.
const DRAIN_WITHIN: Duration = Duration::from_secs(5);

/// How often it looks meanwhile.
const DRAIN_STEP: Duration = Duration::from_micros(20);

/// See [`crate::stream::Stream`].
pub struct CudaStream {
    inner: Arc<Inner>,
}

struct Inner {
    name: String,
    rank: usize,
    lane: Arc<RawStream>,
    track: Arc<Track>,
    queue: Mutex<Queue>,
    changed: Condvar,
    /// Lowers what is submitted. Not the issuer's, which its thread keeps while it waits.
    cache: Mutex<Cache>,
    engine: Arc<dyn Collective>,
    /// Of its engine.
    outcomes: Arc<[AbortStatus]>,
    issuer: Mutex<Issuer>,
    collective_time: CollectiveTime,
    /// Nobody has waited for its end.
    unwatched: AtomicBool,
}

/// Bounded by the register protocol's credits, as every stream's queue is.
#[derive(Default)]
struct Queue {
    commands: VecDeque<(RaceClock, Command)>,
    /// Somebody issues.
    busy: bool,
    /// It is the stream's own thread's turn.
    handed_over: bool,
    /// Nothing more is submitted.
    closed: bool,
    thread: Option<JoinHandle<RaceClock>>,
}

impl fmt::Debug for CudaStream {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("CudaStream").field("name", &self.inner.name).field("rank", &self.inner.rank).finish()
    }
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl CudaStream {
    /// `urgent` puts its work in front of other streams'.
    pub(crate) fn start(
        gpu: &Arc<Gpu>,
        rank: usize,
        name: &str,
        urgent: bool,
        engine: Arc<dyn Collective>,
        tally: &Arc<Tally>,
    ) -> Result<Self, KernelError> {
        let lane = Arc::new(RawStream::new(gpu, rank, name, urgent)?);
        let track = gpu.poller().track(&lane);
        let outcomes = engine.outcomes().into();
        let metrics = StreamMetrics::new(name);
        let collective_time = metrics.collective_time();
        let records = Records::new(gpu, rank, tally)?;
        let issuer = Mutex::new(Issuer::new(&lane, &track, engine.clone(), records, metrics));
        let inner = Inner {
            name: name.to_owned(),
            rank,
            lane,
            track,
            queue: Mutex::default(),
            changed: Condvar::new(),
            cache: Mutex::default(),
            engine,
            outcomes,
            issuer,
            collective_time,
            unwatched: AtomicBool::new(false),
        };
        Ok(Self { inner: Arc::new(inner) })
    }

    pub(crate) fn submit(&self, submission: Submission) -> Result<(), KernelError> {
        self.inner.lane.gpu().context().check_alive()?;
        let lowered = lock(&self.inner.cache).get(&submission.program, submission.repeat);
        let turn = lowered.last_call.and_then(|_| self.inner.engine.turn(self.inner.rank));
        self.inner.put(Command::run(submission, lowered, &self.inner.outcomes, turn))
    }

    pub(crate) fn prepare(&self, program: &Arc<Program>) -> Result<(), KernelError> {
        let gpu = self.inner.lane.gpu();
        gpu.context().check_alive()?;
        gpu.context().bind()?;
        let lowered = [false, true].map(|repeat| lock(&self.inner.cache).get(program, repeat));
        let mut issuer = lock(&self.inner.issuer);
        lowered.iter().try_for_each(|lowered| issuer.prepare(program, lowered))
    }

    pub(crate) fn record(&self) -> Event {
        let event = Event::default();
        if self.inner.put(Command::Record(event.clone())).is_err() {
            // A stream that has failed has done all it ever will.
            event.set();
        }
        event
    }

    pub(crate) fn wait_for(&self, event: &Event) -> Result<(), KernelError> {
        if event.query() {
            return Ok(());
        }
        self.inner.put(Command::Wait(event.clone()))
    }

    pub(crate) fn check_finite(&self, on: bool) -> Result<(), KernelError> {
        self.inner.put(Command::CheckFinite(on))
    }

    pub(crate) fn synchronize(&self) -> Result<(), KernelError> {
        let event = Event::default();
        self.inner.put(Command::Record(event.clone()))?;
        event.synchronize();
        Ok(())
    }

    pub(crate) fn collective_time(&self) -> Duration {
        self.inner.collective_time.get()
    }
}

impl Inner {
    /// Issues a command, or queues it behind those that wait.
    fn put(self: &Arc<Self>, command: Command) -> Result<(), KernelError> {
        self.lane.gpu().context().bind()?;
        let mut queue = lock(&self.queue);
        if queue.busy {
            queue.commands.push_back((RaceClock::capture(), command));
            return Ok(());
        }
        queue.busy = true;
        drop(queue);
        let left = lock(&self.issuer).go(command, false);
        let mut queue = lock(&self.queue);
        match left {
            None if queue.commands.is_empty() => {
                queue.busy = false;
                Ok(())
            }
            // What came from other threads meanwhile is done in order, behind what is left.
            left => {
                if let Some(left) = left {
                    queue.commands.push_front((RaceClock::capture(), left));
                }
                self.hand_over(queue)
            }
        }
    }

    /// Lets the stream's own thread go on, which is started if there is none yet (STREAM-2).
    fn hand_over(self: &Arc<Self>, mut queue: MutexGuard<'_, Queue>) -> Result<(), KernelError> {
        queue.handed_over = true;
        if queue.thread.is_none() {
            let own = self.clone();
            let serve = move || {
                own.serve();
                RaceClock::capture()
            };
            let thread = thread::Builder::new().name(self.name.clone()).spawn(serve);
            queue.thread = Some(thread.map_err(|_| KernelError::Closed { device: self.rank })?);
        }
        self.changed.notify_all();
        Ok(())
    }

    /// The stream's own thread.
    fn serve(&self) {
        let mut queue = lock(&self.queue);
        loop {
            if !queue.handed_over {
                if queue.closed {
                    return;
                }
                queue = self.changed.wait(queue).unwrap_or_else(PoisonError::into_inner);
                continue;
            }
            let Some((clock, command)) = queue.commands.pop_front() else {
                (queue.handed_over, queue.busy) = (false, false);
                self.changed.notify_all();
                continue;
            };
            drop(queue);
            clock.join();
            // Others' code may have bound another GPU's context meanwhile. What fails here fails at the command, too.
            let _ = self.lane.gpu().context().bind();
            // Nothing is left of a command that may block.
            let _ = lock(&self.issuer).go(command, true);
            queue = lock(&self.queue);
        }
    }

    /// Waits until all is done, or the device does not come to an end; whether it did.
    fn drain(&self) -> bool {
        let deadline = Instant::now() + DRAIN_WITHIN;
        let mut queue = lock(&self.queue);
        while queue.busy {
            let left = deadline.saturating_duration_since(Instant::now());
            if left.is_zero() {
                return false;
            }
            queue = self.changed.wait_timeout(queue, left).unwrap_or_else(PoisonError::into_inner).0;
        }
        drop(queue);
        let poller = self.lane.gpu().poller();
        while !poller.is_idle(&self.track) {
            if Instant::now() > deadline {
                return false;
            }
            thread::sleep(DRAIN_STEP);
        }
        true
    }
}

impl Drop for Inner {
    fn drop(&mut self) {
        if self.unwatched.load(Ordering::Relaxed) {
            lock(&self.issuer).let_go();
        }
    }
}

impl Drop for CudaStream {
    fn drop(&mut self) {
        let poller = self.inner.lane.gpu().poller();
        let mut queue = lock(&self.inner.queue);
        queue.closed = true;
        self.inner.changed.notify_all();
        let thread = queue.thread.take();
        drop(queue);
        let own = thread.as_ref().is_some_and(|thread| thread.thread().id() == thread::current().id());
        if own || poller.is_this_thread() {
            // It cannot wait for itself. What is on the stream is done, and told, all the same.
            self.inner.unwatched.store(true, Ordering::Relaxed);
            return;
        }
        if !self.inner.drain() {
            let place = self.inner.lane.place().to_owned();
            let text = format!("what was put on it has not ended within {} s of its end", DRAIN_WITHIN.as_secs());
            let error =
                KernelError::Cuda { place, call: "cuStreamDestroy", code: 0, name: "no answer".to_owned(), text };
            let error = self.inner.lane.gpu().context().lose(error);
            poller.forget(&self.inner.track, &error);
        } else {
            poller.forget(&self.inner.track, &KernelError::Closed { device: self.inner.rank });
            // It has ended; whoever frees what it used is to know that. A failure is one of the context.
            let _ = self.inner.lane.synchronize();
        }
        if let Some(thread) = thread {
            // It catches every panic of others' code.
            thread.join().into_iter().for_each(RaceClock::join);
        }
    }
}
