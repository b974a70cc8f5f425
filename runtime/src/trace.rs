//! What a session's actors did, as a file for <https://ui.perfetto.dev> or `chrome://tracing`: a track for each actor, and an arrow
//! from each piece's writing to its reading.
//!
//! The format is the Trace Event Format's JSON
//! (<https://docs.google.com/document/d/1CvAClvFfyA5R-PhYUmn5OOQtYMH4h6I0nSsKchNAySU>).

use std::collections::BTreeMap;
use std::fs::File;
use std::io::{self, BufWriter, Write};
use std::path::{Path, PathBuf};
use std::sync::Arc;

use serde_json::json;
use shardflow_actors::simulate::{SimulationOptions, Timing, simulate};
use shardflow_actors::spec::{ActorId, ActorSpec, Spec};
use shardflow_actors::trace::{Cause, FiringRecord};

use crate::session::Session;
use crate::session::observer::{Observer, pass_of};

pub mod join;
pub mod summary;

/// Name of the event with what the simulator says of a step.
const PREDICTION: &str = "prediction";
/// Name of the event with the Unix time at which a file's times begin.
const CLOCK: &str = "clock";
/// Name of the event that ends a file which has reached its limit.
const LIMIT: &str = "size limit reached: later steps are not in this file";

/// Bytes kept free for the events at a file's end.
const END_BYTES: u64 = 64 << 10;

/// A trace that is being written.
pub struct TraceFile {
    path: PathBuf,
    out: BufWriter<File>,
    /// Of the session, once it is known.
    spec: Option<Arc<Spec>>,
    /// By actor and action: firings, and nanoseconds of all together.
    spent: BTreeMap<(ActorId, u32), (u64, u64)>,
    /// By actor: firings read.
    read: BTreeMap<ActorId, u64>,
    lost: u64,
    bytes: u64,
    /// Of the largest step so far.
    step_bytes: u64,
    bytes_max: u64,
    /// Of the newest end of a firing.
    last_ns: u64,
    is_empty: bool,
    has_ended: bool,
}

/// What keeps a trace from being written.
#[derive(Debug, thiserror::Error)]
#[error("cannot write the trace {path}: {source}")]
pub struct TraceError {
    /// The file.
    pub path: PathBuf,
    /// What the system says.
    pub source: io::Error,
}

impl TraceFile {
    /// An empty one, for a session's process, of at most `bytes_max` bytes, and of one step if that is larger.
    ///
    /// # Errors
    /// When the file cannot be made.
    pub fn create(path: &Path, bytes_max: u64) -> Result<Self, TraceError> {
        let failed = |source| TraceError { path: path.to_owned(), source };
        let mut out = BufWriter::new(File::create(path).map_err(failed)?);
        out.write_all(b"[\n").map_err(failed)?;
        Ok(Self {
            path: path.to_owned(),
            out,
            spec: None,
            spent: BTreeMap::new(),
            read: BTreeMap::new(),
            lost: 0,
            bytes: 0,
            step_bytes: 0,
            bytes_max,
            last_ns: 0,
            is_empty: true,
            has_ended: false,
        })
    }

    /// Adds what actors did since it was last called: to be called after each step, before their rings are full. Returns false
    /// once another step would exceed the limit: the file is complete then.
    ///
    /// # Errors
    /// When the file cannot be written.
    pub fn add(&mut self, session: &Session) -> Result<bool, TraceError> {
        let Some(observer) = session.observer().filter(|_| !self.has_ended) else { return Ok(!self.has_ended) };
        let before = self.bytes;
        if self.spec.is_none() {
            self.begin(observer)?;
        }
        let spec = self.spec.get_or_insert_with(|| Arc::new(session.plan().spec.clone())).clone();
        let process = observer.process_map().process;
        for actor in observer.process_map().actors_of(session.plan(), process) {
            if !self.read.contains_key(&actor) {
                self.event(&track(&spec, actor))?;
            }
            let next = self.read.entry(actor).or_default();
            let told = observer.fired(actor, *next);
            *next = told.next;
            self.lost += told.lost;
            for fired in &told.firings {
                let pass = pass_of(&spec, actor, fired);
                self.firing(&spec, actor, fired, (pass, observer.step_of(pass)))?;
            }
        }
        self.step_bytes = self.step_bytes.max(self.bytes - before);
        if self.bytes + self.step_bytes + END_BYTES <= self.bytes_max {
            return Ok(true);
        }
        let (pid, ts) = (observer.process_map().own().start, micros(self.last_ns));
        self.event(&json!({ "name": LIMIT, "ph": "i", "s": "g", "pid": pid, "tid": 0, "ts": ts }))?;
        self.end()?;
        Ok(false)
    }

    /// Tells the clock, and names the devices: a viewer shows each as a process.
    fn begin(&mut self, observer: &Observer) -> Result<(), TraceError> {
        let (process_map, pid) = (observer.process_map(), observer.process_map().own().start);
        let args = json!({ "unix_ns": observer.started() });
        self.event(&json!({ "name": CLOCK, "ph": "M", "pid": pid, "args": args }))?;
        for device in process_map.own() {
            let name = format!("device {device}, rank {}", process_map.process);
            let named = json!({ "name": "process_name", "ph": "M", "pid": device, "args": { "name": name } });
            self.event(&named)?;
            let sorted =
                json!({ "name": "process_sort_index", "ph": "M", "pid": device, "args": { "sort_index": device } });
            self.event(&sorted)?;
        }
        Ok(())
    }

    /// What a step would take if each firing took its mean and nothing but the plan held it up: the simulator's answer, of whose
    /// actors this process hosts all.
    fn predict(&mut self) -> Result<(), TraceError> {
        let Some(spec) = self.spec.clone().filter(|spec| spec.actors.len() == self.read.len()) else { return Ok(()) };
        let mean = |actor: usize, action: usize| {
            let (count, ns) = self.spent.get(&(ActorId(actor as u32), action as u32)).copied().unwrap_or_default();
            ns / count.max(1)
        };
        let actions = |(a, actor): (usize, &ActorSpec)| (0..actor.actions.len()).map(|x| mean(a, x)).collect();
        let timing = Timing::measured(&spec, spec.actors.iter().enumerate().map(actions).collect());
        // A plan that ran gets stuck here no more than there.
        let Ok(run) = simulate(&spec, &timing, &SimulationOptions::steps(1)) else { return Ok(()) };
        let mut busy: BTreeMap<&str, u64> = BTreeMap::new();
        for fired in &run.timeline {
            *busy.entry(&spec.actors[fired.actor.0 as usize].name).or_default() += fired.end - fired.start;
        }
        let idle = busy.into_iter().map(|(name, ns)| (name, micros(run.makespan - ns)));
        let idle: serde_json::Map<String, serde_json::Value> = idle.map(|(n, us)| (n.to_owned(), us.into())).collect();
        let args = json!({ "step_us": micros(run.makespan), "idle_us": idle });
        self.event(&json!({ "name": PREDICTION, "ph": "M", "pid": 0, "args": args }))
    }

    /// Ends the file. Gives how many firings were dropped before they were read.
    ///
    /// # Errors
    /// When the file cannot be written.
    pub fn finish(mut self) -> Result<u64, TraceError> {
        self.end()?;
        Ok(self.lost)
    }

    fn end(&mut self) -> Result<(), TraceError> {
        if std::mem::replace(&mut self.has_ended, true) {
            return Ok(());
        }
        self.predict()?;
        let ended = self.out.write_all(b"\n]\n").and_then(|()| self.out.flush());
        ended.map_err(|source| TraceError { path: self.path.clone(), source })
    }

    fn event(&mut self, event: &serde_json::Value) -> Result<(), TraceError> {
        let separator = if std::mem::take(&mut self.is_empty) { "" } else { ",\n" };
        let text = format!("{separator}{event}");
        self.bytes += text.len() as u64;
        self.out.write_all(text.as_bytes()).map_err(|source| TraceError { path: self.path.clone(), source })
    }

    /// A slice, and the arrows that end and begin in it.
    fn firing(
        &mut self,
        spec: &Spec,
        actor: ActorId,
        fired: &FiringRecord,
        (pass, steps): (u64, u64),
    ) -> Result<(), TraceError> {
        let own = &spec.actors[actor.0 as usize];
        let action = &own.actions[fired.action as usize];
        let spent = self.spent.entry((actor, fired.action)).or_default();
        // The first step warms up: it counts only while there is no other.
        if fired.firing == u64::from(action.per_step) {
            *spent = (0, 0);
        }
        *spent = (spent.0 + 1, spent.1 + fired.ended_ns - fired.launched_ns);
        self.last_ns = self.last_ns.max(fired.ended_ns);
        let (pid, tid) = (own.device, actor.0);
        let (cause, register) = match fired.cause {
            Cause::Input(register) => ("input", spec.register_name(register)),
            Cause::Credit(register) => ("credit", spec.register_name(register)),
            Cause::Host => ("host", String::new()),
            Cause::Own => ("own", String::new()),
        };
        self.event(&json!({
            "name": action.name, "cat": category(&action.name), "ph": "X", "pid": pid, "tid": tid,
            "ts": micros(fired.launched_ns), "dur": micros(fired.ended_ns - fired.launched_ns),
            "args": {
                "step": steps + 1, "pass": pass, "firing": fired.firing,
                "waited_us": micros(fired.launched_ns - fired.idle_ns), "cause": cause, "register": register,
            },
        }))?;
        for input in &action.inputs {
            let register = &spec.registers[input.register.0 as usize];
            if register.producer == actor || !fired.firing.is_multiple_of(u64::from(input.firings_per_piece)) {
                continue;
            }
            let piece = fired.firing / u64::from(input.firings_per_piece);
            let reader =
                register.readers.iter().position(|r| (r.actor, r.action) == (actor, fired.action)).unwrap_or(0);
            // An initial piece came from nowhere.
            if piece > 0 || !register.initial {
                let at = (pid, tid, micros(fired.launched_ns));
                self.event(&arrow("f", register, (input.register.0, piece, reader), at))?;
            }
        }
        for output in &action.outputs {
            let register = &spec.registers[output.register.0 as usize];
            if !(fired.firing + 1).is_multiple_of(u64::from(output.firings_per_piece)) {
                continue;
            }
            let piece = fired.firing / u64::from(output.firings_per_piece) + u64::from(register.initial);
            for (index, _) in register.readers.iter().enumerate().filter(|(_, reader)| reader.actor != actor) {
                // Inside the slice, or it would bind to the next one.
                let ready_ns = if output.early { fired.early_ns } else { fired.ended_ns.saturating_sub(1) };
                let at = (pid, tid, micros(ready_ns.max(fired.launched_ns)));
                self.event(&arrow("s", register, (output.register.0, piece, index), at))?;
            }
        }
        Ok(())
    }
}

/// A run that ends early has a trace, too.
impl Drop for TraceFile {
    fn drop(&mut self) {
        // Nobody is left to be told.
        let _ = self.end();
    }
}

/// Names an actor's track.
fn track(spec: &Spec, actor: ActorId) -> serde_json::Value {
    let own = &spec.actors[actor.0 as usize];
    json!({ "name": "thread_name", "ph": "M", "pid": own.device, "tid": actor.0, "args": { "name": own.name } })
}

/// One end of an arrow, of a register's piece to one of its readers.
fn arrow(
    phase: &str,
    register: &shardflow_actors::spec::RegisterSpec,
    (id, piece, reader): (u32, u64, usize),
    (pid, tid, ts): (usize, u32, f64),
) -> serde_json::Value {
    json!({
        "name": register.name, "cat": "register", "ph": phase, "bp": "e", "id": format!("{id}.{piece}.{reader}"),
        "pid": pid, "tid": tid, "ts": ts,
    })
}

/// What an action is of, for colours.
pub fn category(action: &str) -> &'static str {
    match action.split(' ').next().unwrap_or_default() {
        "forward" => "forward",
        "backward" => "backward",
        "norm" | "update" => "update",
        "feed" | "fetch" | "decide" => "host",
        _ => "communication",
    }
}

fn micros(ns: u64) -> f64 {
    ns as f64 * 1e-3
}
