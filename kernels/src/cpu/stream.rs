//! A CPU stream: one named thread that takes commands from a queue and runs their launches in order.

use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Arc;
use std::thread::{self, JoinHandle};
use std::time::Instant;

use crossbeam_channel::{Receiver, Sender, unbounded};

use crate::collective::Collective;
use crate::cpu::THREADS_MAX;
use crate::cpu::launch::{Runner, not_finite};
use crate::cpu::pool::Pool;
use crate::cpu::scratch::Scratch;
use crate::error::{KernelError, Result};
use crate::memory::Tally;
use crate::metrics::{CollectiveTime, StreamMetrics};
use crate::op::Op;
use crate::submission::{Command, Notification, Submission, launch_panic, trace_launch};

#[derive(Debug)]
pub(crate) struct CpuStream {
    // The queue has no limit of its own: the register protocol's credits limit the number of submissions.
    queue: Option<Sender<Command>>,
    thread: Option<JoinHandle<()>>,
    device: usize,
    pub(crate) threads: usize,
    pub(crate) collective_time: CollectiveTime,
    pub(crate) scratch: Scratch,
}

impl CpuStream {
    pub(crate) fn start(
        name: &str,
        device: usize,
        threads: usize,
        engine: Arc<dyn Collective>,
        tally: Arc<Tally>,
    ) -> Result<Self> {
        let threads = threads.max(1);
        if threads > THREADS_MAX {
            let expected = format!("at most {THREADS_MAX}");
            return Err(KernelError::arguments("stream", "threads", expected, threads.to_string()));
        }
        let pool = Pool::start(name, threads).map_err(|e| KernelError::thread(name, &e))?;
        let (queue, commands) = unbounded();
        let metrics = StreamMetrics::new(name);
        let collective_time = metrics.collective_time();
        let scratch = Scratch::new(device, threads, tally);
        let runner = Runner { pool, engine, scratch: scratch.clone() };
        let builder = thread::Builder::new().name(name.to_owned());
        let thread = builder.spawn(move || run_commands(&commands, &runner, metrics));
        let thread = thread.map_err(|e| KernelError::thread(name, &e))?;
        Ok(Self { queue: Some(queue), thread: Some(thread), device, threads, collective_time, scratch })
    }

    pub(crate) fn send(&self, command: Command) -> Result<()> {
        let closed = KernelError::Closed { device: self.device };
        self.queue.as_ref().ok_or_else(|| closed.clone())?.send(command).map_err(|_| closed)
    }
}

impl Drop for CpuStream {
    fn drop(&mut self) {
        self.queue = None;
        if let Some(thread) = self.thread.take()
            && thread.thread().id() != thread::current().id()
        {
            // The thread catches every panic, so this result is always `Ok`.
            let _ = thread.join();
        }
    }
}

fn run_commands(commands: &Receiver<Command>, runner: &Runner, mut metrics: StreamMetrics) {
    let mut check_finite = false;
    for command in commands {
        match command {
            Command::CheckFinite(on) => check_finite = on,
            Command::Run(submission) => run(submission, check_finite, runner, &mut metrics),
            Command::Record(event) => event.set(),
            Command::Wait(event) => event.synchronize(),
        }
    }
}

/// Runs one program. Ignores a panic of the submitter's `notify`, because nothing could receive the panic's message.
fn run(submission: Submission, mut check_finite: bool, runner: &Runner, metrics: &mut StreamMetrics) {
    let Submission { program, bases, repeat, mut notify } = submission;
    let mut send = |notification| drop(catch_unwind(AssertUnwindSafe(|| notify(notification))));
    let mut signals = program.signals.iter().peekable();
    for done in 0..=program.launches.len() {
        while let Some((_, tag)) = signals.next_if(|(launches, _)| *launches <= done) {
            send(Notification::Signal(*tag));
        }
        let Some(launch) = program.launches.get(done) else { break };
        trace_launch(&program, done);
        let timer = if let Op::Collective(call) = &launch.op { Some(metrics.collective(call)) } else { None };
        timer.iter().for_each(|timer| timer.begin(Instant::now()));
        let result = catch_unwind(AssertUnwindSafe(|| runner.run(launch, &bases, repeat)));
        timer.iter().for_each(|timer| timer.end(Instant::now()));
        let result = result.unwrap_or_else(|panic| Err(launch_panic(&program, done, &*panic)));
        if let Err(error) = result {
            return send(Notification::Failed(error));
        }
        if check_finite && let Some((write, elements)) = not_finite(launch, &bases) {
            send(Notification::NotFinite { launch: done, write, elements });
            // Later Inf and NaN values are presumably consequences of this write.
            check_finite = false;
        }
    }
    send(Notification::Done);
}
