//! A CPU stream: one named thread that takes submissions from a queue and runs their launches in order.

use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Arc;
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

use crossbeam_channel::{Receiver, Sender, unbounded};

use crate::collective::Collective;
use crate::cpu::THREADS_MAX;
use crate::cpu::launch::{not_finite, run_launch};
use crate::cpu::pool::Pool;
use crate::cpu::scratch::Scratch;
use crate::error::KernelError;
use crate::event::Event;
use crate::memory::Tally;
use crate::metrics::{CollectiveTime, StreamMetrics};
use crate::op::{Op, Program};
use crate::stream::{Notification, Submission};

/// Target of the events, of level TRACE, that tell of each launch before it runs, on the stream's thread.
const LAUNCH: &str = "shardflow::launch";

/// See [`crate::stream::Stream`].
#[derive(Debug)]
pub struct CpuStream {
    // The queue has no bound of its own: the register protocol's credits bound what is submitted.
    queue: Option<Sender<Command>>,
    thread: Option<JoinHandle<()>>,
    device: usize,
    threads: usize,
    collective_time: CollectiveTime,
    scratch: Scratch,
}

enum Command {
    Run(Submission),
    Record(Event),
    Wait(Event),
    CheckFinite(bool),
}

impl CpuStream {
    pub(crate) fn start(
        name: &str,
        device: usize,
        threads: usize,
        engine: Arc<dyn Collective>,
        tally: Arc<Tally>,
    ) -> Result<Self, KernelError> {
        let threads = threads.max(1);
        if threads > THREADS_MAX {
            let expected = format!("at most {THREADS_MAX}");
            return Err(KernelError::arguments("stream", "threads", expected, threads.to_string()));
        }
        let pool = Pool::start(name, threads).map_err(|_| KernelError::Closed { device })?;
        let (queue, commands) = unbounded();
        let metrics = StreamMetrics::new(name);
        let collective_time = metrics.collective_time();
        let scratch = Scratch::new(device, threads, tally);
        let own = scratch.clone();
        let thread = thread::Builder::new()
            .name(name.to_owned())
            .spawn(move || serve(&commands, &pool, &*engine, &own, metrics))
            .map_err(|_| KernelError::Closed { device })?;
        Ok(Self { queue: Some(queue), thread: Some(thread), device, threads, collective_time, scratch })
    }

    fn send(&self, command: Command) -> Result<(), KernelError> {
        let closed = KernelError::Closed { device: self.device };
        self.queue.as_ref().ok_or_else(|| closed.clone())?.send(command).map_err(|_| closed)
    }

    pub(crate) fn submit(&self, submission: Submission) -> Result<(), KernelError> {
        self.send(Command::Run(submission))
    }

    pub(crate) fn prepare(&self, program: &Program) -> Result<(), KernelError> {
        self.scratch.prepare(program)
    }

    pub(crate) fn record(&self) -> Event {
        let event = Event::default();
        if self.send(Command::Record(event.clone())).is_err() {
            // A stream that has ended has done all it ever will.
            event.set();
        }
        event
    }

    pub(crate) fn wait_for(&self, event: &Event) -> Result<(), KernelError> {
        if event.query() {
            return Ok(());
        }
        self.send(Command::Wait(event.clone()))
    }

    pub(crate) fn check_finite(&self, on: bool) -> Result<(), KernelError> {
        self.send(Command::CheckFinite(on))
    }

    pub(crate) fn synchronize(&self) -> Result<(), KernelError> {
        let event = Event::default();
        self.send(Command::Record(event.clone()))?;
        event.synchronize();
        Ok(())
    }

    pub(crate) fn threads(&self) -> usize {
        self.threads
    }

    pub(crate) fn collective_time(&self) -> Duration {
        self.collective_time.get()
    }
}

impl Drop for CpuStream {
    fn drop(&mut self) {
        self.queue = None;
        if let Some(thread) = self.thread.take()
            && thread.thread().id() != thread::current().id()
        {
            // The thread catches every panic, so there is nothing to learn from the result.
            let _ = thread.join();
        }
    }
}

fn serve(
    commands: &Receiver<Command>,
    pool: &Pool,
    engine: &dyn Collective,
    scratch: &Scratch,
    mut metrics: StreamMetrics,
) {
    let mut check = false;
    for command in commands {
        match command {
            Command::CheckFinite(on) => check = on,
            Command::Run(submission) => run(submission, check, pool, engine, scratch, &mut metrics),
            Command::Record(event) => event.set(),
            Command::Wait(event) => event.synchronize(),
        }
    }
}

/// Runs one program. A panic of the submitter's own `notify` is swallowed: there is nobody to tell.
fn run(
    submission: Submission,
    mut check: bool,
    pool: &Pool,
    engine: &dyn Collective,
    scratch: &Scratch,
    metrics: &mut StreamMetrics,
) {
    let Submission { program, bases, repeat, mut notify } = submission;
    let mut tell = |notice| drop(catch_unwind(AssertUnwindSafe(|| notify(notice))));
    let mut signals = program.signals.iter().peekable();
    for done in 0..=program.launches.len() {
        while let Some((_, tag)) = signals.next_if(|(launches, _)| *launches <= done) {
            tell(Notification::Signal(*tag));
        }
        let Some(launch) = program.launches.get(done) else { break };
        trace_launch(&program, done);
        let told = if let Op::Collective(call) = &launch.op { Some(metrics.collective(call)) } else { None };
        told.iter().for_each(|told| told.came(Instant::now()));
        let result = catch_unwind(AssertUnwindSafe(|| run_launch(launch, &bases, repeat, pool, engine, scratch)));
        told.iter().for_each(|told| told.went(Instant::now()));
        let result = result.unwrap_or_else(|panic| {
            Err(KernelError::Panic {
                launch: format!("{done} ({})", launch.op.name()),
                program: program.name.clone(),
                message: panic_message(&*panic),
            })
        });
        if let Err(error) = result {
            return tell(Notification::Failed(error));
        }
        if check && let Some((write, elements)) = not_finite(launch, &bases) {
            tell(Notification::NotFinite { launch: done, write, elements });
            // What follows from it is of no interest.
            check = false;
        }
    }
    tell(Notification::Done);
}

/// Tells whoever traces that this launch of a program comes next.
pub(crate) fn trace_launch(program: &Program, index: usize) {
    let (name, launches) = (program.name.as_str(), program.launches.len());
    let op = program.launches.get(index).map_or("none", |launch| launch.op.name());
    tracing::trace!(target: LAUNCH, program = name, op, index, launches);
}

/// What a panic says.
pub(crate) fn panic_message(panic: &(dyn std::any::Any + Send)) -> String {
    if let Some(text) = panic.downcast_ref::<&str>() {
        (*text).to_owned()
    } else if let Some(text) = panic.downcast_ref::<String>() {
        text.clone()
    } else {
        "no message".to_owned()
    }
}
