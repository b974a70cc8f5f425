//! A training in which one process is killed or frozen. The environment sets the moment: the middle of forward, of
//! backward, of a collective or of the update of a step.
//!
//! The environment variable is `DIES="TARGET RANK STEP PHASE"`. TARGET is `KILL` or `STOP` for the process of RANK, or
//! `LAUNCHER` to kill that process's parent. The fault happens only once over all restarts. The file `died` then holds
//! the Unix time in nanoseconds and the launch. The file `log` records progress over all restarts.
//!
//! Each stream emits an event on its own thread before a launch. The process therefore dies between two launches of an
//! action, or inside a collective. This program delays the other members of such a collective.

use std::fs::{self, OpenOptions};
use std::io::Write;
use std::process::ExitCode;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use rustix::process::{Signal, getpid, getppid, kill_process};
use shardflow::exit;
use shardflow::plan::Schedule::OneFOneB;
use shardflow::prelude::*;
use shardflow_integration_tests::training::{LEARNING_RATE, Model, options};
use tracing::field::{Field, Visit};
use tracing::span;
use tracing::{Event, Metadata};

const STEPS: u64 = 24;
const SAVE_EVERY: u64 = 4;
/// After the launch event, the dying process's stream has this long to enter the collective and wait there. The other
/// members enter only after the death, so the exact time does not matter.
const DIES_AFTER: Duration = Duration::from_millis(100);
/// Time limit within which the other members must see the death.
const DEATH_WITHIN: Duration = Duration::from_secs(10);
/// Interval at which the other members check for the death.
const POLL_EVERY: Duration = Duration::from_millis(20);

type Result<T> = std::result::Result<T, Box<dyn std::error::Error>>;

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Target {
    Own(Signal),
    Launcher,
}

/// Which process dies, how it dies, and when.
#[derive(Clone, Debug)]
struct DeathPlan {
    target: Target,
    /// Whether this process has the rank RANK. If so, it signals itself or, if the target is `Launcher`, its launcher.
    is_own: bool,
    step: u64,
    phase: String,
}

impl DeathPlan {
    fn read(rank: u32) -> Result<Option<Self>> {
        let Ok(text) = std::env::var("DIES") else { return Ok(None) };
        let [target, victim, step, phase] = text.split(' ').collect::<Vec<_>>()[..] else { return Err(text.into()) };
        let target = match target {
            "KILL" => Target::Own(Signal::KILL),
            "STOP" => Target::Own(Signal::STOP),
            "LAUNCHER" => Target::Launcher,
            _ => return Err(text.into()),
        };
        let plan = Self { target, is_own: victim.parse::<u32>()? == rank, step: step.parse()?, phase: phase.into() };
        Ok((!fs::exists("died")?).then_some(plan))
    }

    fn execute(&self, launch: &Launch) {
        let (process, signal) = match self.target {
            Target::Own(signal) => (getpid(), signal),
            Target::Launcher => (getppid().expect("a launcher"), Signal::KILL),
        };
        let (step, pid) = (self.step, process.as_raw_nonzero());
        let text = format!("{} {step} {} {} by {pid}\n", exit::unix_ns(), launch.program, launch.op);
        // Create the file atomically.
        fs::write("dies", text).and_then(|()| fs::rename("dies", "died")).expect("the folder can be written to");
        kill_process(process, signal).expect("permission to signal the process");
    }
}

/// The fields of a launch event.
#[derive(Clone, Debug, Default)]
struct Launch {
    program: String,
    op: String,
    index: u64,
    launches: u64,
}

impl Visit for Launch {
    fn record_debug(&mut self, _: &Field, _: &dyn std::fmt::Debug) {}

    fn record_str(&mut self, field: &Field, value: &str) {
        match field.name() {
            "program" => self.program = value.into(),
            "op" => self.op = value.into(),
            _ => {}
        }
    }

    fn record_u64(&mut self, field: &Field, value: u64) {
        match field.name() {
            "index" => self.index = value,
            "launches" => self.launches = value,
            _ => {}
        }
    }
}

/// A subscriber to launch events.
struct Watch {
    plan: DeathPlan,
    /// The current step.
    step: Arc<AtomicU64>,
    /// Whether a collective of the step of the death has begun.
    begun: AtomicBool,
}

impl Watch {
    fn on_launch(&self, launch: &Launch) {
        if self.step.load(Ordering::Relaxed) != self.plan.step {
            return;
        }
        if self.plan.phase == "collective" {
            return self.in_collective(launch);
        }
        // The launch in the middle of the action: earlier launches have finished, and later launches have not begun.
        let middle = launch.program.ends_with(&format!(" {}", self.plan.phase)) && launch.index == launch.launches / 2;
        if self.plan.is_own && middle {
            self.plan.execute(launch);
        }
    }

    fn in_collective(&self, launch: &Launch) {
        if launch.op != "all_reduce" || self.begun.swap(true, Ordering::Relaxed) {
            return;
        }
        if !self.plan.is_own {
            return wait_for_death();
        }
        // The stream continues into the collective, where it waits for the other members.
        let (plan, launch) = (self.plan.clone(), launch.clone());
        thread::spawn(move || {
            thread::sleep(DIES_AFTER);
            plan.execute(&launch);
        });
    }
}

/// Delays another member of the collective until the target process has died in the collective.
fn wait_for_death() {
    let deadline = Instant::now() + DEATH_WITHIN;
    while !victim_is_dead() {
        assert!(Instant::now() < deadline, "no process died within {DEATH_WITHIN:?}");
        thread::sleep(POLL_EVERY);
    }
}

/// Whether the process named in the file `died` has ended or is frozen.
fn victim_is_dead() -> bool {
    let Ok(text) = fs::read_to_string("died") else { return false };
    let pid = text.trim_end().rsplit(' ').next().unwrap_or_default();
    let status = fs::read_to_string(format!("/proc/{pid}/status")).unwrap_or_default();
    let state = status.lines().find_map(|line| line.strip_prefix("State:")).map(str::trim_start);
    state.is_none_or(|state| state.starts_with(['Z', 'T', 'X']))
}

impl tracing::Subscriber for Watch {
    fn enabled(&self, metadata: &Metadata<'_>) -> bool {
        metadata.target() == "shardflow::launch"
    }

    fn event(&self, event: &Event<'_>) {
        let mut launch = Launch::default();
        event.record(&mut launch);
        self.on_launch(&launch);
    }

    fn new_span(&self, _: &span::Attributes<'_>) -> span::Id {
        span::Id::from_u64(1)
    }

    fn record(&self, _: &span::Id, _: &span::Record<'_>) {}

    fn record_follows_from(&self, _: &span::Id, _: &span::Id) {}

    fn enter(&self, _: &span::Id) {}

    fn exit(&self, _: &span::Id) {}
}

/// Appends a line to the log of all restarts, if this is the first process of the job. Other processes do not log.
fn log_line(is_first: bool, line: String) -> Result<()> {
    if is_first {
        OpenOptions::new().create(true).append(true).open("log")?.write_all(format!("{line}\n").as_bytes())?;
    }
    Ok(())
}

fn run() -> Result<()> {
    let cluster = Cluster::from_env()?;
    let (rank, is_first) = (cluster.process(), cluster.is_first());
    let step = Arc::new(AtomicU64::new(u64::MAX));
    if let Some(plan) = DeathPlan::read(rank)? {
        let watch = Watch { plan, step: step.clone(), begun: AtomicBool::default() };
        tracing::subscriber::set_global_default(watch)?;
    }
    let model = Model { max_norm: 1.0, dropout: 0.1, ..Model::default() };
    let plan = model.plan("data=2,stage=2", &options(2, OneFOneB));
    let mut session = Session::start(plan, &SessionOptions { cluster, ..SessionOptions::default() })?;
    let store = Store::open("checkpoints")?;
    let restored = session.restore_newest(&store)?;
    log_line(is_first, format!("from {}", restored.found.map_or(0, |(step, _)| step)))?;
    let (agree, member) = session.agreement()?;
    let mut saver = Saver::new(store, agree, SaverOptions { member, ..SaverOptions::default() })?;
    while session.steps() < STEPS {
        let batch = model.batch(session.steps());
        step.store(session.steps(), Ordering::Relaxed);
        let report = session.step(&batch, LEARNING_RATE)?;
        let loss = report.loss.ok_or("the program has no loss")?.to_bits();
        log_line(is_first, format!("step {} {loss} {}", report.step, exit::unix_ns()))?;
        if let Some(report) = saver.poll() {
            log_line(is_first, format!("committed {}", report.step))?;
            exit::progress(report.step)?;
        }
        if session.steps().is_multiple_of(SAVE_EVERY) {
            saver.save(&session, Cursor::new())?;
        }
    }
    saver.wait(Duration::from_secs(60))?;
    Ok(session.shutdown()?)
}

fn main() -> ExitCode {
    let Err(error) = run() else { return ExitCode::SUCCESS };
    let session = error.downcast_ref::<SessionError>();
    let code = session.map_or(Exit::Internal, SessionError::exit);
    let reported = exit::report(code, &error.to_string(), session.and_then(SessionError::first_cause_rank));
    reported.unwrap_or_else(|e| eprintln!("warning: cannot report to the launcher: {e}"));
    eprintln!("error: {error}");
    code.into()
}
