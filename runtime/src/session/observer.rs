//! Observes a running session from any thread: snapshots of its state, and samples for the `metrics` facade. An
//! observer does not keep the session's device memory alive.

use std::collections::{BTreeMap, HashMap, VecDeque};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Weak};
use std::time::{Duration, Instant};

use metrics::{Counter, Gauge, Histogram, counter, gauge, histogram};
use parking_lot::Mutex;
use shardflow_actors::hang::Hang;
use shardflow_actors::shell::Control;
use shardflow_actors::snapshot::ActorSnapshot;
use shardflow_actors::spec::{ActorId, RegisterId, Spec};
use shardflow_actors::trace::{Cause, FiringRecord};

use super::StepReport;
use super::metrics::{Metrics, MetricsSource, TrainingTime};
use super::process_map::ProcessMap;
use crate::cluster::world::World;
use crate::metrics as names;
use crate::plan::Plan;
use shardflow_job::exit::unix_ns;

/// Shortest time between two samples, which are taken at the end of a step.
const SAMPLE_EVERY: Duration = Duration::from_secs(1);

/// A view of a running session that any thread may use.
pub struct Observer {
    plan: Arc<Plan>,
    process_map: ProcessMap,
    control: Control,
    source: MetricsSource,
    world: Weak<World>,
    /// Registers of peers whose bytes are copied here, each with its transport.
    mirrored: BTreeMap<RegisterId, &'static str>,
    steps: AtomicU64,
    recent: Mutex<RecentSteps>,
    passes: Mutex<Passes>,
    incidents: Mutex<Vec<Incident>>,
    /// Unix time of the start in nanoseconds, which identifies a session among those that one server shows.
    started: u64,
    published: Mutex<PublishedMetrics>,
    /// `Some` if the session publishes to the `metrics` facade.
    training: Option<Arc<TrainingTime>>,
}

/// Number of recent steps that are kept, and how many of them quantiles of step durations use.
const STEPS_KEPT: usize = 512;
const STEPS_TIMED: usize = 128;
/// Incidents of each kind that are kept. The first ones are kept because they explain later ones.
const INCIDENTS_MAX: usize = 8;

/// Statistics of the most recent steps.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct RecentSteps {
    /// Tokens of each step.
    pub tokens: u64,
    /// Total number of steps that the program plans, if it has set one.
    pub planned: Option<u64>,
    /// Steps done by this session, without those before a restored checkpoint.
    pub done: u64,
    /// At most 512 steps, the newest last.
    pub steps: VecDeque<StepStats>,
}

/// Maps passes over the plan to steps. Firings count passes, which differ from steps: a non-finite step runs twice, to
/// find its first non-finite tensor, and a restore continues from another step.
#[derive(Clone, Debug, Default)]
struct Passes {
    begun: u64,
    /// Passes, each with the number of steps done before it; passes between two marks have consecutive steps.
    marks: VecDeque<(u64, u64)>,
}

/// Number of newest marks that are kept.
const MARKS_MAX: usize = 256;

/// The pass over the plan to which a firing belongs.
pub fn pass_of(spec: &Spec, actor: ActorId, fired: &FiringRecord) -> u64 {
    let per_step = spec.actors[actor.0 as usize].actions[fired.action as usize].per_step;
    fired.firing / u64::from(per_step.max(1))
}

impl Passes {
    fn step_of(&self, pass: u64) -> u64 {
        let mark = self.marks.iter().rev().find(|(first, _)| *first <= pass);
        mark.map_or(pass, |(first, steps)| steps + (pass - first))
    }

    fn begin(&mut self, steps: u64) {
        if self.step_of(self.begun) != steps || self.marks.is_empty() {
            self.marks.push_back((self.begun, steps));
            if self.marks.len() > MARKS_MAX {
                self.marks.pop_front();
            }
        }
        self.begun += 1;
    }
}

/// One step.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct StepStats {
    /// Steps done, including this one.
    pub steps: u64,
    /// Its loss.
    pub loss: Option<f32>,
    /// Global norm of its gradients, before clipping.
    pub gradient_norm: Option<f64>,
    /// Its learning rate.
    pub learning_rate: f32,
    /// Its wall time.
    pub seconds: f64,
}

/// An event that went wrong.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Incident {
    /// Time of its first occurrence, nanoseconds since the session's start.
    pub at_ns: u64,
    /// `restart`, `not finite`, `stall`, `refused` or `failure`.
    pub kind: &'static str,
    /// Description, beginning with the cause.
    pub text: String,
}

impl RecentSteps {
    /// The last step.
    pub fn last(&self) -> Option<&StepStats> {
        self.steps.back()
    }

    /// Quantile of the durations of the newest 128 steps, seconds.
    pub fn quantile(&self, fraction: f64) -> Option<f64> {
        let mut sorted: Vec<f64> = self.steps.iter().rev().take(STEPS_TIMED).map(|step| step.seconds).collect();
        sorted.sort_by(f64::total_cmp);
        let index = (fraction * sorted.len() as f64).ceil() as usize;
        sorted.get(index.saturating_sub(1)).copied()
    }
}

/// Metric handles, and values that were published so far.
struct PublishedMetrics {
    sampled: Option<Instant>,
    /// By actor: number of firings read.
    firings_read: BTreeMap<ActorId, u64>,
    firings: HashMap<(ActorId, u32), Histogram>,
    waits: HashMap<(ActorId, Cause), Histogram>,
    slots: HashMap<RegisterId, [Gauge; 3]>,
    /// By name and labels: each counter, and this session's share of its value. Sessions of one program add up.
    totals: HashMap<String, (Counter, u64)>,
}

impl PublishedMetrics {
    /// Raises this session's share of a counter to `total`.
    fn advance_total(&mut self, name: &'static str, labels: &[(&'static str, &str)], total: u64) {
        let key = labels.iter().fold(name.to_owned(), |key, (_, value)| key + "\n" + value);
        let (counter, published) = self.totals.entry(key).or_insert_with(|| {
            let labels: Vec<(&'static str, String)> = labels.iter().map(|(k, v)| (*k, (*v).to_owned())).collect();
            (counter!(name, &labels), 0)
        });
        counter.increment(total.saturating_sub(*published));
        *published = total.max(*published);
    }
}

/// Another process of the session.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct PeerState {
    /// Its rank.
    pub process: u32,
    /// Name of its machine.
    pub host: String,
    /// Its process id there.
    pub pid: u32,
    /// True if it runs on the same machine as this process.
    pub is_on_this_node: bool,
    /// Time since its last heartbeat; `None` if it has ended normally.
    pub silent: Option<Duration>,
}

/// State of a session.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum SessionHealth {
    /// It runs a step, or waits for its program.
    Healthy {
        /// Steps done.
        steps: u64,
    },
    /// It has failed with this cause.
    Failed(String),
    /// It has ended.
    Ended,
}

impl Observer {
    pub(super) fn new(
        plan: Arc<Plan>,
        process_map: ProcessMap,
        control: Control,
        source: MetricsSource,
        world: Option<&Arc<World>>,
        mirrored: BTreeMap<RegisterId, &'static str>,
        steps: RecentSteps,
    ) -> Self {
        let published = PublishedMetrics {
            sampled: None,
            firings_read: BTreeMap::new(),
            firings: HashMap::new(),
            waits: HashMap::new(),
            slots: HashMap::new(),
            totals: HashMap::new(),
        };
        let world = world.map_or_else(Weak::new, Arc::downgrade);
        let started = unix_ns().saturating_sub(control.now_ns().unwrap_or_default());
        Self {
            plan,
            process_map,
            control,
            source,
            world,
            mirrored,
            steps: AtomicU64::new(0),
            recent: Mutex::new(steps),
            passes: Mutex::default(),
            incidents: Mutex::default(),
            started,
            published: Mutex::new(published),
            training: None,
        }
    }

    /// The same observer, publishing to the `metrics` facade.
    pub(super) fn with_metrics(self, training: Arc<TrainingTime>) -> Self {
        Self { training: Some(training), ..self }
    }

    /// The plan that runs.
    pub fn plan(&self) -> &Plan {
        &self.plan
    }

    /// Which process hosts which device.
    pub fn process_map(&self) -> ProcessMap {
        self.process_map
    }

    /// The session's progress and memory use. Cheap: it pauses nothing.
    pub fn metrics(&self) -> Metrics {
        self.source.metrics(&self.plan, self.steps.load(Ordering::Relaxed), &self.control.snapshot())
    }

    /// Ended firings of an actor of this process, starting with number `from`, in the order of their ends. The newest
    /// [`shardflow_actors::trace::RING_FIRINGS`] are kept.
    pub fn fired(&self, actor: ActorId, from: u64) -> shardflow_actors::trace::NewFirings {
        self.control.fired(actor, from)
    }

    /// State of each actor of this process; empty after the session has ended.
    pub fn snapshot(&self) -> Vec<ActorSnapshot> {
        self.control.snapshot()
    }

    /// Nanoseconds since the session's start; `None` after it has ended.
    pub fn now_ns(&self) -> Option<u64> {
        self.control.now_ns()
    }

    /// Steps done before a pass over the plan ([`pass_of`]).
    pub fn step_of(&self, pass: u64) -> u64 {
        self.passes.lock().step_of(pass)
    }

    /// Passes at which the step number jumps, each with the steps done before it.
    pub fn marks(&self) -> Vec<(u64, u64)> {
        self.passes.lock().marks.iter().copied().collect()
    }

    /// Records the start of a pass, for the step after `steps` steps.
    pub(super) fn begin_pass(&self, steps: u64) {
        self.passes.lock().begin(steps);
    }

    /// Nanoseconds since the last progress; `None` after the session has ended.
    pub fn idle_ns(&self) -> Option<u64> {
        self.control.idle_ns()
    }

    /// True while a step runs.
    pub fn is_under_way(&self) -> bool {
        self.control.is_under_way()
    }

    /// The chain of waits, if a step runs without progress.
    pub fn hang(&self) -> Option<Hang> {
        self.control.hang()
    }

    /// Statistics of the most recent steps.
    pub fn recent_steps(&self) -> RecentSteps {
        self.recent.lock().clone()
    }

    /// Unix time of the session's start in nanoseconds, which distinguishes it from other sessions.
    pub fn started(&self) -> u64 {
        self.started
    }

    /// Incidents so far, in the order of time; at most 8 of each kind.
    pub fn incidents(&self) -> Vec<Incident> {
        for (reason, count) in self.world.upgrade().map(|world| world.refused()).into_iter().flatten() {
            // Without the count, which changes; the metric has it.
            if count > 0 {
                let text = format!("messages that do not belong to this job or this attempt: {reason}");
                self.note("refused", text);
            }
        }
        if let Some((at_ns, failure)) = self.control.failed_at() {
            self.add_incident(Incident { at_ns, kind: "failure", text: failure.to_string() });
        }
        let mut incidents = self.incidents.lock().clone();
        incidents.sort_by_key(|incident| incident.at_ns);
        incidents
    }

    /// Records an incident with the current time.
    pub fn note(&self, kind: &'static str, text: String) {
        self.add_incident(Incident { at_ns: self.now_ns().unwrap_or_default(), kind, text });
    }

    /// Records an incident unless it is known, or the list has enough of its kind.
    fn add_incident(&self, incident: Incident) {
        let mut incidents = self.incidents.lock();
        let is_known = incidents.iter().any(|known| known.kind == incident.kind && known.text == incident.text);
        let same_kind = incidents.iter().filter(|known| known.kind == incident.kind).count();
        if !is_known && same_kind < INCIDENTS_MAX {
            incidents.push(incident);
        }
    }

    /// State of the other processes; empty after the session has ended.
    pub fn peers(&self) -> Vec<PeerState> {
        self.world.upgrade().map_or_else(Vec::new, |world| world.peers())
    }

    /// Records a step; `steps` is the number of steps done, including it.
    pub(super) fn record_step(&self, steps: u64, report: &StepReport, learning_rate: f32, took: Duration) {
        self.set_steps(steps);
        if let Some(found) = &report.non_finite {
            self.note("not finite", found.to_string());
        }
        let mut recent = self.recent.lock();
        recent.done += 1;
        if recent.steps.len() == STEPS_KEPT {
            recent.steps.pop_front();
        }
        let (loss, gradient_norm, seconds) = (report.loss, report.grad_norm, took.as_secs_f64());
        recent.steps.push_back(StepStats { steps, loss, gradient_norm, learning_rate, seconds });
        // Not after each step, because quantiles sort the durations.
        if recent.done.is_power_of_two() || recent.done.is_multiple_of(STEPS_TIMED as u64 / 2) {
            let p99 = recent.quantile(0.99).unwrap_or_default();
            self.control.set_step_p99(Duration::from_secs_f64(p99));
        }
    }

    /// Current state of the session.
    pub fn health(&self) -> SessionHealth {
        match (self.control.first_failure(), self.control.now_ns()) {
            (Some(failure), _) => SessionHealth::Failed(failure.to_string()),
            (None, None) => SessionHealth::Ended,
            (None, Some(_)) => SessionHealth::Healthy { steps: self.steps.load(Ordering::Relaxed) },
        }
    }

    pub(super) fn set_steps(&self, steps: u64) {
        self.steps.store(steps, Ordering::Relaxed);
    }

    /// Takes a sample if the last one is at least [`SAMPLE_EVERY`] old.
    pub(super) fn sample_if_due(&self) {
        let is_due = |published: &PublishedMetrics| published.sampled.is_none_or(|at| at.elapsed() >= SAMPLE_EVERY);
        if is_due(&self.published.lock()) {
            self.sample();
        }
    }

    /// Publishes the current values of all metrics.
    pub fn sample(&self) {
        let Some(training) = &self.training else { return };
        let mut published = self.published.lock();
        published.sampled = Some(Instant::now());
        if matches!(self.health(), SessionHealth::Healthy { .. }) {
            training.publish();
        }
        let snapshots = self.control.snapshot();
        if snapshots.is_empty() {
            return;
        }
        for snapshot in &snapshots {
            self.sample_firings(&mut published, snapshot);
            self.sample_slots(&mut published, snapshot);
        }
        self.sample_edges(&mut published, &snapshots);
        for device in self.source.metrics(&self.plan, 0, &snapshots).devices {
            let rank = device.device.to_string();
            let memory = [
                ("planned", device.planned_peak_bytes),
                ("allocated", device.allocated_bytes),
                ("peak", device.measured_peak_bytes),
            ];
            for (kind, bytes) in memory {
                gauge!(names::MEMORY, "device" => rank.clone(), "kind" => kind).set(bytes as f64);
            }
            published.advance_total(names::COLLECTIVE_BYTES, &[("device", &rank)], device.collective_bytes);
        }
        if let Some(world) = self.world.upgrade() {
            for (reason, count) in world.refused() {
                published.advance_total(names::REFUSED, &[("reason", reason)], count);
            }
        }
    }

    fn sample_firings(&self, published: &mut PublishedMetrics, snapshot: &ActorSnapshot) {
        let actor = snapshot.actor;
        let next = published.firings_read.entry(actor).or_default();
        let new_firings = self.control.fired(actor, *next);
        *next = new_firings.next;
        if new_firings.lost > 0 {
            counter!(names::FIRINGS_LOST).increment(new_firings.lost);
        }
        for FiringRecord { action, idle_ns, launched_ns, ended_ns, cause, .. } in new_firings.firings {
            let spec = &self.plan.spec.actors[actor.0 as usize];
            let firing = published.firings.entry((actor, action)).or_insert_with(|| {
                let action = spec.actions[action as usize].name.clone();
                histogram!(names::FIRING, "actor" => spec.name.clone(), "action" => action)
            });
            firing.record(seconds(ended_ns - launched_ns));
            let wait = published.waits.entry((actor, cause)).or_insert_with(|| self.wait_histogram(actor, cause));
            wait.record(seconds(launched_ns - idle_ns));
        }
    }

    fn wait_histogram(&self, actor: ActorId, cause: Cause) -> Histogram {
        let spec = &self.plan.spec;
        let (reason, register) = match cause {
            Cause::Input(register) => ("input", spec.register_name(register)),
            Cause::Credit(register) => ("credit", spec.register_name(register)),
            Cause::Host => ("host", String::new()),
            Cause::Own => ("own", String::new()),
        };
        let actor = spec.actors[actor.0 as usize].name.clone();
        histogram!(names::WAIT, "actor" => actor, "reason" => reason, "register" => register)
    }

    fn sample_slots(&self, published: &mut PublishedMetrics, snapshot: &ActorSnapshot) {
        for used in &snapshot.registers {
            let gauges = published.slots.entry(used.register).or_insert_with(|| {
                let register = self.plan.spec.register_name(used.register);
                ["free", "writing", "filled"]
                    .map(|state| gauge!(names::SLOTS, "register" => register.clone(), "state" => state))
            });
            let freed = used.released.iter().min().copied().unwrap_or(used.published);
            let filled = (used.published - freed) as u32;
            let counts = [used.slots.saturating_sub(used.slots_held), used.slots_held.saturating_sub(filled), filled];
            gauges.iter().zip(counts).for_each(|(gauge, count)| gauge.set(f64::from(count)));
        }
    }

    /// Transport of a register's bytes to a reader: `device`, `process`, `shared_memory`, `socket` or `nccl`. For an
    /// edge between two other processes it is unknown here, and reported as `shared_memory`.
    pub fn transport(&self, register: RegisterId, reader: ActorId) -> &'static str {
        let spec = &self.plan.spec;
        let device = |actor: ActorId| spec.actors[actor.0 as usize].device;
        let from = device(spec.registers[register.0 as usize].producer);
        match () {
            () if from == device(reader) => "device",
            () if self.process_map.process_of(from) == self.process_map.process_of(device(reader)) => "process",
            () => self.mirrored.get(&register).copied().unwrap_or("shared_memory"),
        }
    }

    /// Publishes the bytes of other actors' registers that this process's actors have released.
    fn sample_edges(&self, published: &mut PublishedMetrics, snapshots: &[ActorSnapshot]) {
        let spec = &self.plan.spec;
        let mut bytes: BTreeMap<(&str, &str, &'static str), u64> = BTreeMap::new();
        for snapshot in snapshots {
            // Two actions of an actor may read a register, whose bytes cross once.
            let mut crossed: BTreeMap<RegisterId, (&str, &'static str, u64)> = BTreeMap::new();
            let reader = &spec.actors[snapshot.actor.0 as usize];
            for (index, action) in reader.actions.iter().enumerate() {
                let completed = snapshot.completed(index as u32);
                for input in &action.inputs {
                    let register = &spec.registers[input.register.0 as usize];
                    let producer = &spec.actors[register.producer.0 as usize];
                    if register.producer == snapshot.actor || register.slot_bytes == 0 {
                        continue;
                    }
                    let transport = self.transport(input.register, snapshot.actor);
                    let pieces = completed / u64::from(input.firings_per_piece);
                    let (_, _, max) = crossed.entry(input.register).or_insert((&producer.name, transport, 0));
                    *max = pieces.max(*max);
                }
            }
            for (register, (from, transport, pieces)) in crossed {
                let slot_bytes = spec.registers[register.0 as usize].slot_bytes as u64;
                *bytes.entry((from, &reader.name, transport)).or_default() += pieces * slot_bytes;
            }
        }
        for ((from, to, transport), bytes) in bytes {
            published.advance_total(names::EDGE_BYTES, &[("from", from), ("to", to), ("transport", transport)], bytes);
        }
    }
}

fn seconds(ns: u64) -> f64 {
    ns as f64 * 1e-9
}

#[cfg(test)]
mod tests {
    use super::Passes;

    #[test]
    fn each_pass_maps_to_the_step_for_which_it_ran() {
        let mut passes = Passes::default();
        // Start from a checkpoint, repeat a non-finite step, and return to the checkpoint.
        let steps = [60, 61, 61, 62, 63, 60, 61];
        for step in steps {
            passes.begin(step);
        }
        assert_eq!((0..7).map(|pass| passes.step_of(pass)).collect::<Vec<_>>(), steps);
        assert_eq!(Vec::from(passes.marks), [(0, 60), (2, 61), (5, 60)]);
        assert_eq!(Passes::default().step_of(3), 3);
    }
}
