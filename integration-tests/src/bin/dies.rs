//! A training that is killed, or frozen, at a moment that its environment names: in the middle of forward, backward, a
//! collective or the update of a step.
//!
//! `DIES="WHO RANK STEP PHASE"`: WHO is `KILL` or `STOP` for the process itself, `LAUNCHER` for its parent, which is killed.
//! That happens once: the file `died` then says when (Unix time in nanoseconds) and where. What comes of the training stands
//! in the file `log`, which goes on over restarts. Streams tell of each launch before it runs, on their own thread; so the
//! process dies between two launches of one action, or while a collective waits for members that this program holds up.

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
/// How long the stream of who is to die has to get from its word into the collective, and to wait there. The others come only
/// after the death, so it may take any time.
const DIES_AFTER: Duration = Duration::from_millis(100);
/// How long they wait for that, and how often they look.
const DEATH_WITHIN: Duration = Duration::from_secs(10);
const LOOK_EVERY: Duration = Duration::from_millis(20);

type Result<T> = std::result::Result<T, Box<dyn std::error::Error>>;

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Who {
    Itself(Signal),
    Launcher,
}

/// When to die.
#[derive(Clone, Debug)]
struct Fate {
    who: Who,
    /// It is this process that dies.
    mine: bool,
    step: u64,
    phase: String,
}

impl Fate {
    fn read(rank: u32) -> Result<Option<Self>> {
        let Ok(text) = std::env::var("DIES") else { return Ok(None) };
        let [who, dies, step, phase] = text.split(' ').collect::<Vec<_>>()[..] else { return Err(text.into()) };
        let who = match who {
            "KILL" => Who::Itself(Signal::KILL),
            "STOP" => Who::Itself(Signal::STOP),
            "LAUNCHER" => Who::Launcher,
            _ => return Err(text.into()),
        };
        let fate = Self { who, mine: dies.parse::<u32>()? == rank, step: step.parse()?, phase: phase.into() };
        Ok((!fs::exists("died")?).then_some(fate))
    }

    fn strike(&self, launch: &Launch) {
        let (who, signal) = match self.who {
            Who::Itself(signal) => (getpid(), signal),
            Who::Launcher => (getppid().expect("a launcher"), Signal::KILL),
        };
        let (step, pid) = (self.step, who.as_raw_nonzero());
        let text = format!("{} {step} {} {} by {pid}\n", exit::unix_ns(), launch.program, launch.op);
        // Whole, or not there.
        fs::write("dies", text).and_then(|()| fs::rename("dies", "died")).expect("the folder can be written to");
        kill_process(who, signal).expect("a signal of ours");
    }
}

/// A launch, as its event tells.
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

/// Hears of launches.
struct Watch {
    fate: Fate,
    /// The step under way.
    step: Arc<AtomicU64>,
    /// A collective of the fatal step has begun.
    begun: AtomicBool,
}

impl Watch {
    fn heard(&self, launch: &Launch) {
        if self.step.load(Ordering::Relaxed) != self.fate.step {
            return;
        }
        if self.fate.phase == "collective" {
            return self.in_collective(launch);
        }
        // In the middle: what is before it has been done, what comes after has not.
        let middle = launch.program.ends_with(&format!(" {}", self.fate.phase)) && launch.index == launch.launches / 2;
        if self.fate.mine && middle {
            self.fate.strike(launch);
        }
    }

    fn in_collective(&self, launch: &Launch) {
        if launch.op != "all_reduce" || self.begun.swap(true, Ordering::Relaxed) {
            return;
        }
        if !self.fate.mine {
            return wait_for_death();
        }
        // The stream goes on into the collective, and waits there.
        let (fate, launch) = (self.fate.clone(), launch.clone());
        thread::spawn(move || {
            thread::sleep(DIES_AFTER);
            fate.strike(&launch);
        });
    }
}

/// Members that live come to the collective only when another has died in it.
fn wait_for_death() {
    let deadline = Instant::now() + DEATH_WITHIN;
    while !is_dead() {
        assert!(Instant::now() < deadline, "nobody died within {DEATH_WITHIN:?}");
        thread::sleep(LOOK_EVERY);
    }
}

/// The process that the file names has ended, or does not run any more.
fn is_dead() -> bool {
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
        self.heard(&launch);
    }

    fn new_span(&self, _: &span::Attributes<'_>) -> span::Id {
        span::Id::from_u64(1)
    }

    fn record(&self, _: &span::Id, _: &span::Record<'_>) {}

    fn record_follows_from(&self, _: &span::Id, _: &span::Id) {}

    fn enter(&self, _: &span::Id) {}

    fn exit(&self, _: &span::Id) {}
}

/// Says a line in the log of all restarts. Only the first process does.
fn note(speaks: bool, line: String) -> Result<()> {
    if speaks {
        OpenOptions::new().create(true).append(true).open("log")?.write_all(format!("{line}\n").as_bytes())?;
    }
    Ok(())
}

fn run() -> Result<()> {
    let cluster = Cluster::from_env()?;
    let (rank, speaks) = (cluster.process(), cluster.is_first());
    let step = Arc::new(AtomicU64::new(u64::MAX));
    if let Some(fate) = Fate::read(rank)? {
        let watch = Watch { fate, step: step.clone(), begun: AtomicBool::default() };
        tracing::subscriber::set_global_default(watch)?;
    }
    let model = Model { max_norm: 1.0, dropout: 0.1, ..Model::default() };
    let plan = model.plan("data=2,stage=2", &options(2, OneFOneB));
    let mut session = Session::start(plan, &SessionOptions { cluster, ..SessionOptions::default() })?;
    let store = Store::open("checkpoints")?;
    let restored = session.restore_newest(&store)?;
    note(speaks, format!("from {}", restored.found.map_or(0, |(step, _)| step)))?;
    let (agree, member) = session.agreement()?;
    let mut saver = Saver::new(store, agree, SaverOptions { member, ..SaverOptions::default() })?;
    while session.steps() < STEPS {
        let batch = model.batch(session.steps());
        step.store(session.steps(), Ordering::Relaxed);
        let report = session.step(&batch, LEARNING_RATE)?;
        let loss = report.loss.ok_or("the program has a loss")?.to_bits();
        note(speaks, format!("step {} {loss} {}", report.step, exit::unix_ns()))?;
        if let Some(report) = saver.poll() {
            note(speaks, format!("committed {}", report.step))?;
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
    let told = exit::report(code, &error.to_string(), session.and_then(SessionError::first_cause_rank));
    told.unwrap_or_else(|e| eprintln!("warning: cannot report to the launcher: {e}"));
    eprintln!("error: {error}");
    code.into()
}
