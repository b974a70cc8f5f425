//! Writes the firings of a session's actors to a file for <https://ui.perfetto.dev> or `chrome://tracing`: one track
//! per actor, and an arrow from the write of each piece to its read.
//!
//! JSON Trace Event Format: <https://docs.google.com/document/d/1CvAClvFfyA5R-PhYUmn5OOQtYMH4h6I0nSsKchNAySU>.

use std::collections::BTreeMap;
use std::fs::File;
use std::io::{self, BufWriter, Write};
use std::path::{Path, PathBuf};
use std::sync::Arc;

use serde_json::json;
use shardflow_actors::label::Role;
use shardflow_actors::simulate::{SimulationOptions, Timing, simulate};
use shardflow_actors::spec::{ActorId, ActorSpec, Spec};
use shardflow_actors::trace::FiringRecord;

use crate::session::Session;
use crate::session::observer::{Observer, cause_of, pass_of};

pub mod join;
pub mod summary;

/// Name of the event with the simulator's prediction of a step.
const PREDICTION: &str = "prediction";
/// Name of the event with the Unix time that corresponds to time 0 of a file.
const CLOCK: &str = "clock";
/// Name of the event that ends a file at its size limit.
const LIMIT: &str = "size limit reached: later steps are not in this file";

/// Bytes reserved for the events at the end of a file.
const END_BYTES: u64 = 64 << 10;

/// A trace that is being written.
pub struct TraceFile {
    path: PathBuf,
    out: BufWriter<File>,
    /// The session's spec, set by the first call of `add`.
    spec: Option<Arc<Spec>>,
    /// For each actor and action: the number of firings, and their total duration in nanoseconds.
    spent: BTreeMap<(ActorId, u32), (u64, u64)>,
    firings_read: BTreeMap<ActorId, u64>,
    lost: u64,
    bytes: u64,
    /// Bytes of the largest step so far.
    step_bytes: u64,
    bytes_max: u64,
    /// Latest end of a firing.
    last_ns: u64,
    has_ended: bool,
}

/// The error of a trace that cannot be written.
#[derive(Debug, thiserror::Error)]
#[error("cannot write the trace {path}: {source}")]
pub struct TraceError {
    /// The file.
    pub path: PathBuf,
    /// The system's error.
    pub source: io::Error,
}

impl TraceFile {
    /// Creates an empty file for this process. The file is limited to `bytes_max` bytes, but holds at least one step.
    pub fn create(path: &Path, bytes_max: u64) -> Result<Self, TraceError> {
        let failed = |source| TraceError { path: path.to_owned(), source };
        let mut out = BufWriter::new(File::create(path).map_err(failed)?);
        out.write_all(b"[\n").map_err(failed)?;
        Ok(Self {
            path: path.to_owned(),
            out,
            spec: None,
            spent: BTreeMap::new(),
            firings_read: BTreeMap::new(),
            lost: 0,
            bytes: 0,
            step_bytes: 0,
            bytes_max,
            last_ns: 0,
            has_ended: false,
        })
    }

    /// Adds the firings since the last call. Call this function after each step, before the actors' ring buffers are
    /// full. Returns false if another step would exceed the limit; the file is then complete.
    pub fn add(&mut self, session: &Session) -> Result<bool, TraceError> {
        let Some(observer) = session.observer().filter(|_| !self.has_ended) else { return Ok(!self.has_ended) };
        let before = self.bytes;
        if self.spec.is_none() {
            self.write_header(observer)?;
        }
        let spec = self.spec.get_or_insert_with(|| Arc::new(session.plan().spec.clone())).clone();
        for actor in observer.process_map().own_actors(session.plan()) {
            if !self.firings_read.contains_key(&actor) {
                let ActorSpec { name, device, .. } = &spec.actors[actor];
                let args = json!({ "name": name });
                self.write_event(
                    &json!({ "name": "thread_name", "ph": "M", "pid": device, "tid": actor.0, "args": args }),
                )?;
            }
            let next = self.firings_read.entry(actor).or_default();
            let new_firings = observer.control().fired(actor, *next);
            *next = new_firings.next;
            self.lost += new_firings.lost;
            for fired in &new_firings.firings {
                let pass = pass_of(&spec, actor, fired);
                self.write_firing(&spec, actor, fired, (pass, observer.step_of(pass)))?;
            }
        }
        self.step_bytes = self.step_bytes.max(self.bytes - before);
        if self.bytes + self.step_bytes + END_BYTES <= self.bytes_max {
            return Ok(true);
        }
        let (pid, ts) = (observer.process_map().own().start, micros(self.last_ns));
        self.write_event(&json!({ "name": LIMIT, "ph": "i", "s": "g", "pid": pid, "tid": 0, "ts": ts }))?;
        self.close()?;
        Ok(false)
    }

    /// Writes the clock event, and the names of devices, which a viewer shows as processes.
    fn write_header(&mut self, observer: &Observer) -> Result<(), TraceError> {
        let (process_map, pid) = (observer.process_map(), observer.process_map().own().start);
        let args = json!({ "unix_ns": observer.started });
        self.write_event(&json!({ "name": CLOCK, "ph": "M", "pid": pid, "args": args }))?;
        for device in process_map.own() {
            let name = json!({ "name": format!("device {device}, rank {}", process_map.process) });
            for (event, args) in [("process_name", name), ("process_sort_index", json!({ "sort_index": device }))] {
                self.write_event(&json!({ "name": event, "ph": "M", "pid": device, "args": args }))?;
            }
        }
        Ok(())
    }

    /// If this process hosts all actors, writes the step time that the simulator computes from mean firing times.
    fn write_prediction(&mut self) -> Result<(), TraceError> {
        let Some(spec) =
            self.spec.clone().filter(|spec| spec.is_whole() && spec.actors.len() == self.firings_read.len())
        else {
            return Ok(());
        };
        let mean = |actor: ActorId, action: usize| {
            let (count, ns) = self.spent.get(&(actor, action as u32)).copied().unwrap_or_default();
            ns / count.max(1)
        };
        let actions = |(id, actor): (ActorId, &ActorSpec)| (0..actor.actions.len()).map(|x| mean(id, x)).collect();
        let timing = Timing::measured(&spec, spec.actors.iter().map(actions).collect());
        // The simulation of a plan that ran cannot deadlock.
        let Ok(run) = simulate(&spec, &timing, &SimulationOptions::steps(1)) else { return Ok(()) };
        let mut busy: BTreeMap<&str, u64> = BTreeMap::new();
        for fired in &run.timeline {
            *busy.entry(&spec.actors[fired.actor].name).or_default() += fired.end - fired.start;
        }
        let idle = busy.into_iter().map(|(name, ns)| (name, micros(run.makespan - ns)));
        let idle: serde_json::Map<String, serde_json::Value> = idle.map(|(n, us)| (n.to_owned(), us.into())).collect();
        let args = json!({ "step_us": micros(run.makespan), "idle_us": idle });
        self.write_event(&json!({ "name": PREDICTION, "ph": "M", "pid": 0, "args": args }))
    }

    /// Completes the file. Returns the number of firings that were dropped before they were read.
    pub fn finish(mut self) -> Result<u64, TraceError> {
        self.close()?;
        Ok(self.lost)
    }

    fn close(&mut self) -> Result<(), TraceError> {
        if std::mem::replace(&mut self.has_ended, true) {
            return Ok(());
        }
        self.write_prediction()?;
        let ended = self.out.write_all(b"\n]\n").and_then(|()| self.out.flush());
        ended.map_err(|source| TraceError { path: self.path.clone(), source })
    }

    fn write_event(&mut self, event: &serde_json::Value) -> Result<(), TraceError> {
        let separator = if self.bytes == 0 { "" } else { ",\n" };
        let text = format!("{separator}{event}");
        self.bytes += text.len() as u64;
        self.out.write_all(text.as_bytes()).map_err(|source| TraceError { path: self.path.clone(), source })
    }

    /// Writes a firing as a slice, and the arrows that end and begin in it.
    fn write_firing(
        &mut self,
        spec: &Spec,
        actor: ActorId,
        fired: &FiringRecord,
        (pass, steps): (u64, u64),
    ) -> Result<(), TraceError> {
        let own = &spec.actors[actor];
        let action = &own.actions[fired.action as usize];
        let spent = self.spent.entry((actor, fired.action)).or_default();
        // The first step is a warm-up: discard its counts when the second step begins.
        if fired.firing == u64::from(action.per_step) {
            *spent = (0, 0);
        }
        *spent = (spent.0 + 1, spent.1 + fired.ended_ns - fired.launched_ns);
        self.last_ns = self.last_ns.max(fired.ended_ns);
        let (pid, tid) = (own.device, actor.0);
        let (cause, register) = cause_of(fired.cause);
        let register = register.map(|register| spec.register_name(register)).unwrap_or_default();
        self.write_event(&json!({
            "name": action.name, "cat": category(action.label.role), "ph": "X", "pid": pid, "tid": tid,
            "ts": micros(fired.launched_ns), "dur": micros(fired.ended_ns - fired.launched_ns),
            "args": {
                "role": action.label.role.name(), "chunk": action.label.chunk, "program": &*action.label.program,
                "step": steps + 1, "pass": pass, "firing": fired.firing,
                "waited_us": micros(fired.launched_ns - fired.idle_ns), "cause": cause, "register": register,
            },
        }))?;
        for input in &action.inputs {
            let register = &spec.registers[input.register];
            let (piece, is_first, _) = input.pieces.of_firing(fired.firing, register.pieces_per_step);
            if register.producer == actor || !is_first {
                continue;
            }
            let reader =
                register.readers.iter().position(|r| (r.actor, r.action) == (actor, fired.action)).unwrap_or(0);
            // No firing writes the initial pieces.
            if piece >= u64::from(register.initial) {
                let at = (pid, tid, micros(fired.launched_ns));
                self.write_event(&arrow("f", register, (input.register.0, piece, reader), at))?;
            }
        }
        for output in &action.outputs {
            let register = &spec.registers[output.register];
            let (piece, _, is_last) = output.pieces.of_firing(fired.firing, register.pieces_per_step);
            if !is_last {
                continue;
            }
            let piece = piece + u64::from(register.initial);
            for (index, _) in register.readers.iter().enumerate().filter(|(_, reader)| reader.actor != actor) {
                // The time must be inside the slice, otherwise the arrow binds to the next slice.
                let ready_ns = if output.early { fired.early_ns } else { fired.ended_ns.saturating_sub(1) };
                let at = (pid, tid, micros(ready_ns.max(fired.launched_ns)));
                self.write_event(&arrow("s", register, (output.register.0, piece, index), at))?;
            }
        }
        Ok(())
    }
}

/// Completes the file even if the run ends early.
impl Drop for TraceFile {
    fn drop(&mut self) {
        // `drop` cannot return an error.
        let _ = self.close();
    }
}

/// The event for one end of an arrow. An arrow stands for one piece of a register and one reader of the piece.
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

/// Category of an action, which selects its color.
pub fn category(role: Role) -> &'static str {
    if role == Role::Norm { Role::Update.name() } else { role.name() }
}

fn micros(ns: u64) -> f64 {
    ns as f64 * 1e-3
}
