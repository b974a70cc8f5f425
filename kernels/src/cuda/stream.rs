//! A CUDA stream. The submitting thread issues work until a submission has to wait on the host. Then the stream's own
//! thread takes over, and later submissions wait in the queue behind that submission.
//!
//! - STREAM-1: one thread at a time issues commands, in the order of the queue. Meanwhile, `busy` is set.
//! - STREAM-2: the stream's own thread is started when a submission first has to wait on the host.

use std::collections::VecDeque;
use std::fmt;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

use parking_lot::{Condvar, Mutex, MutexGuard};

use super::gpu::Gpu;
use super::issue::{Issuer, Run};
use super::lowered::ProgramCache;
use super::raw_stream::RawStream;
use super::record::ErrorRecords;
use crate::clock::Stamped;
use crate::collective::{AbortStatus, Collective};
use crate::error::{KernelError, Result};
use crate::memory::Tally;
use crate::metrics::{CollectiveTime, StreamMetrics};
use crate::op::Program;
use crate::submission::Command;

/// How long dropping a stream waits for an unresponsive device.
const DRAIN_WITHIN: Duration = Duration::from_secs(5);

const DRAIN_STEP: Duration = Duration::from_micros(20);

pub(crate) struct CudaStream {
    inner: Arc<Inner>,
}

struct Inner {
    name: String,
    stream: Arc<RawStream>,
    queue: Mutex<Queue>,
    changed: Condvar,
    /// The lowered programs. They are separate from the issuer, which stays locked while its thread waits.
    cache: Mutex<ProgramCache>,
    engine: Arc<dyn Collective>,
    abort_statuses: Arc<[AbortStatus]>,
    issuer: Mutex<Issuer>,
    collective_time: CollectiveTime,
    /// Whether the stream was dropped without waiting for its work.
    is_detached: AtomicBool,
}

/// The queue of commands. As for every stream, the credits of the register protocol bound its length.
#[derive(Default)]
struct Queue {
    commands: VecDeque<Stamped<Command<Run>>>,
    busy: bool,
    handed_over: bool,
    closed: bool,
    thread: Option<JoinHandle<Stamped<()>>>,
}

impl fmt::Debug for CudaStream {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("CudaStream").field("name", &self.inner.name).field("rank", &self.inner.stream.rank).finish()
    }
}

impl CudaStream {
    /// Starts a stream; `urgent` gives its work priority over other streams.
    pub(crate) fn start(
        gpu: &Arc<Gpu>,
        rank: usize,
        name: &str,
        urgent: bool,
        engine: Arc<dyn Collective>,
        tally: &Arc<Tally>,
    ) -> Result<Self> {
        let stream = Arc::new(RawStream::new(gpu, rank, name, urgent)?);
        let abort_statuses = engine.abort_statuses().into();
        let metrics = StreamMetrics::new(name);
        let collective_time = metrics.collective_time();
        let records = ErrorRecords::new(gpu, rank, tally)?;
        let issuer = Mutex::new(Issuer::new(&stream, engine.clone(), records, metrics));
        let inner = Inner {
            name: name.to_owned(),
            stream,
            queue: Mutex::default(),
            changed: Condvar::new(),
            cache: Mutex::default(),
            engine,
            abort_statuses,
            issuer,
            collective_time,
            is_detached: AtomicBool::new(false),
        };
        Ok(Self { inner: Arc::new(inner) })
    }

    pub(crate) fn send(&self, command: Command) -> Result<()> {
        let Inner { stream, cache, engine, abort_statuses, .. } = &*self.inner;
        let command = match command {
            Command::Run(submission) => {
                stream.gpu.context.check_alive()?;
                let lowered = cache.lock().get(&submission.program, submission.repeat);
                let issue_slot = lowered.last_call.and_then(|_| engine.issue_slot(stream.rank));
                Command::Run(Run::new(submission, lowered, abort_statuses, issue_slot))
            }
            Command::Record(event) => Command::Record(event),
            Command::Wait(event) => Command::Wait(event),
            Command::CheckFinite(on) => Command::CheckFinite(on),
        };
        self.inner.issue(command)
    }

    pub(crate) fn prepare(&self, program: &Arc<Program>) -> Result<()> {
        let gpu = &self.inner.stream.gpu;
        gpu.context.check_alive()?;
        gpu.context.bind()?;
        let lowered = [false, true].map(|repeat| self.inner.cache.lock().get(program, repeat));
        let mut issuer = self.inner.issuer.lock();
        lowered.iter().try_for_each(|lowered| issuer.prepare(program, lowered))
    }

    pub(crate) fn collective_time(&self) -> Duration {
        self.inner.collective_time.get()
    }
}

impl Inner {
    fn issue(self: &Arc<Self>, command: Command<Run>) -> Result<()> {
        self.stream.gpu.context.bind()?;
        let mut queue = self.queue.lock();
        if queue.busy {
            queue.commands.push_back(Stamped::new(command));
            return Ok(());
        }
        queue.busy = true;
        drop(queue);
        let rest = self.issuer.lock().execute(command, false);
        let mut queue = self.queue.lock();
        match rest {
            None if queue.commands.is_empty() => {
                queue.busy = false;
                Ok(())
            }
            // Commands that other threads queued meanwhile run in order after the rest of this command.
            rest => {
                if let Some(rest) = rest {
                    queue.commands.push_front(Stamped::new(rest));
                }
                self.hand_over(queue)
            }
        }
    }

    /// Hands the queue over to the stream's own thread, starting it if necessary (STREAM-2).
    fn hand_over(self: &Arc<Self>, mut queue: MutexGuard<'_, Queue>) -> Result<()> {
        queue.handed_over = true;
        if queue.thread.is_none() {
            let own = self.clone();
            let thread = thread::Builder::new().name(self.name.clone()).spawn(move || {
                own.serve();
                Stamped::new(())
            });
            queue.thread = Some(thread.map_err(|e| KernelError::thread(&self.name, &e))?);
        }
        self.changed.notify_all();
        Ok(())
    }

    fn serve(&self) {
        let mut queue = self.queue.lock();
        loop {
            if !queue.handed_over {
                if queue.closed {
                    return;
                }
                self.changed.wait(&mut queue);
                continue;
            }
            let Some(command) = queue.commands.pop_front() else {
                (queue.handed_over, queue.busy) = (false, false);
                self.changed.notify_all();
                continue;
            };
            drop(queue);
            let command = command.open();
            // User code may have bound another GPU's context. If this `bind` fails, the command fails the same way.
            let _ = self.stream.gpu.context.bind();
            // A command that may block runs to its end.
            let _ = self.issuer.lock().execute(command, true);
            queue = self.queue.lock();
        }
    }

    /// Waits for all work; returns false if the device does not finish in time.
    fn drain(&self) -> bool {
        let deadline = Instant::now() + DRAIN_WITHIN;
        let mut queue = self.queue.lock();
        while queue.busy {
            let remaining = deadline.saturating_duration_since(Instant::now());
            if remaining.is_zero() {
                return false;
            }
            self.changed.wait_for(&mut queue, remaining);
        }
        drop(queue);
        while !self.stream.is_idle() {
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
        if self.is_detached.load(Ordering::Relaxed) {
            self.issuer.lock().release_memory();
        }
    }
}

impl Drop for CudaStream {
    fn drop(&mut self) {
        let stream = &self.inner.stream;
        let mut queue = self.inner.queue.lock();
        queue.closed = true;
        self.inner.changed.notify_all();
        let thread = queue.thread.take();
        drop(queue);
        let is_own_thread = thread.as_ref().is_some_and(|thread| thread.thread().id() == thread::current().id());
        if is_own_thread || stream.gpu.poller.is_poller_thread() {
            // A thread cannot wait for itself. The work on the stream still completes and is reported.
            self.inner.is_detached.store(true, Ordering::Relaxed);
            return;
        }
        if !self.inner.drain() {
            let place = stream.place.clone();
            let text =
                format!("pending work has not ended within {} s after the stream was dropped", DRAIN_WITHIN.as_secs());
            let error = KernelError::Cuda { place, call: "cuStreamDestroy", code: 0, name: "timeout".to_owned(), text };
            stream.close(&stream.gpu.context.mark_lost(error));
        } else {
            stream.close(&KernelError::Closed { device: stream.rank });
            // The stream's work has ended. `synchronize` orders this thread's later frees after that work. The context
            // keeps any error.
            let _ = stream.synchronize();
        }
        if let Some(thread) = thread {
            // The thread catches every panic of user code.
            thread.join().into_iter().for_each(Stamped::open);
        }
    }
}
