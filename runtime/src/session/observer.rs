//! A running session as others see it, from any thread: snapshots, and samples of it on the `metrics` facade. It keeps nothing of
//! the session alive that takes memory.

use std::collections::{BTreeMap, HashMap, VecDeque};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError, Weak};
use std::time::{Duration, Instant};

use metrics::{Counter, Gauge, Histogram, counter, gauge, histogram};
use shardflow_actors::hang::Hang;
use shardflow_actors::shell::Control;
use shardflow_actors::snapshot::ActorSnapshot;
use shardflow_actors::spec::{ActorId, RegisterId, Spec};
use shardflow_actors::trace::{Cause, FiringRecord};

use super::StepReport;
use super::metrics::{Metrics, Snapshots, TrainingTime};
use super::process_map::ProcessMap;
use crate::cluster::world::World;
use crate::exit::unix_ns;
use crate::metrics as names;
use crate::plan::Plan;

/// Samples are taken at the end of a step, and no more often than this.
const SAMPLE_EVERY: Duration = Duration::from_secs(1);

/// See the module.
pub struct Observer {
    plan: Arc<Plan>,
    process_map: ProcessMap,
    control: Control,
    snapshots: Snapshots,
    world: Weak<World>,
    /// Registers of peers whose bytes are copied here, and how.
    mirrored: BTreeMap<RegisterId, &'static str>,
    steps: AtomicU64,
    newest: Mutex<RecentSteps>,
    passes: Mutex<Passes>,
    incidents: Mutex<Vec<Incident>>,
    /// Unix time of the start in nanoseconds: no two sessions that one server shows have the same.
    started: u64,
    facade: Mutex<Facade>,
    /// Where the facade is told.
    training: Option<Arc<TrainingTime>>,
}

/// Steps that are kept, and of them those whose durations speak for what a step takes now.
const STEPS_KEPT: usize = 512;
const STEPS_TIMED: usize = 128;
/// Incidents of each kind that are kept: the first of them are the ones that explain the others.
const INCIDENTS_MAX: usize = 8;

/// The newest steps.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct RecentSteps {
    /// Of each step.
    pub tokens: u64,
    /// Steps that the program means to do in all, where it has said so.
    pub planned: Option<u64>,
    /// Steps done by this session, whatever it had been restored from.
    pub done: u64,
    /// The newest last; at most 512.
    pub steps: VecDeque<StepStats>,
}

/// Which step each pass over the plan was for. Firings are counted in passes: a step whose numbers are not finite is passed
/// twice, to find where from, and a training that is restored goes on from another step.
#[derive(Clone, Debug, Default)]
struct Passes {
    begun: u64,
    /// Passes, and steps done before them; those between follow one by one.
    marks: VecDeque<(u64, u64)>,
}

/// Marks of passes that are kept, the newest.
const MARKS_MAX: usize = 256;

/// The pass over the plan that a firing is of.
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
    /// Steps done with this one.
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

/// Something that went wrong.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Incident {
    /// When it happened first, nanoseconds since the session's start.
    pub at_ns: u64,
    /// `restart`, `not finite`, `stall`, `refused` or `failure`.
    pub kind: &'static str,
    /// What happened, its cause first.
    pub text: String,
}

impl RecentSteps {
    /// The last one.
    pub fn last(&self) -> Option<&StepStats> {
        self.steps.back()
    }

    /// What a step's time is at most in this part of the newest 128.
    pub fn quantile(&self, part: f64) -> Option<f64> {
        let mut sorted: Vec<f64> = self.steps.iter().rev().take(STEPS_TIMED).map(|step| step.seconds).collect();
        sorted.sort_by(f64::total_cmp);
        let index = (part * sorted.len() as f64).ceil() as usize;
        sorted.get(index.saturating_sub(1)).copied()
    }
}

/// What the facade was given so far.
struct Facade {
    sampled: Option<Instant>,
    /// By actor: firings read.
    read: BTreeMap<ActorId, u64>,
    firings: HashMap<(ActorId, u32), Histogram>,
    waits: HashMap<(ActorId, Cause), Histogram>,
    slots: HashMap<RegisterId, [Gauge; 3]>,
    /// By name and labels: each counter, and what it was told of this session. Sessions of one program add up.
    totals: HashMap<String, (Counter, u64)>,
}

impl Facade {
    /// A counter's part that is this session's has come to `total`.
    fn total(&mut self, name: &'static str, labels: &[(&'static str, &str)], total: u64) {
        let key = labels.iter().fold(name.to_owned(), |key, (_, value)| key + "\n" + value);
        let (counter, told) = self.totals.entry(key).or_insert_with(|| {
            let labels: Vec<(&'static str, String)> = labels.iter().map(|(k, v)| (*k, (*v).to_owned())).collect();
            (counter!(name, &labels), 0)
        });
        counter.increment(total.saturating_sub(*told));
        *told = total.max(*told);
    }
}

/// Another process of the session.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct PeerState {
    /// Its number.
    pub process: u32,
    /// Name of its machine.
    pub host: String,
    /// Its process id there.
    pub pid: u32,
    /// It shares this one's machine.
    pub is_on_this_node: bool,
    /// Since its last heartbeat; `None` when it has ended in order.
    pub silent: Option<Duration>,
}

/// How a session does.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum SessionHealth {
    /// It works, or waits for its program.
    Well {
        /// Steps done.
        steps: u64,
    },
    /// It has failed, for this.
    Failed(String),
    /// It has ended.
    Ended,
}

impl Observer {
    pub(super) fn new(
        plan: Arc<Plan>,
        process_map: ProcessMap,
        control: Control,
        snapshots: Snapshots,
        world: Option<&Arc<World>>,
        mirrored: BTreeMap<RegisterId, &'static str>,
        steps: RecentSteps,
    ) -> Self {
        let facade = Facade {
            sampled: None,
            read: BTreeMap::new(),
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
            snapshots,
            world,
            mirrored,
            steps: AtomicU64::new(0),
            newest: Mutex::new(steps),
            passes: Mutex::default(),
            incidents: Mutex::default(),
            started,
            facade: Mutex::new(facade),
            training: None,
        }
    }

    /// The same, which tells the facade.
    pub(super) fn telling(self, training: Arc<TrainingTime>) -> Self {
        Self { training: Some(training), ..self }
    }

    /// The plan that runs.
    pub fn plan(&self) -> &Plan {
        &self.plan
    }

    /// Who hosts what.
    pub fn process_map(&self) -> ProcessMap {
        self.process_map
    }

    /// What the session has done and holds now. Cheap: nothing stops for it.
    pub fn metrics(&self) -> Metrics {
        self.snapshots.metrics(&self.plan, self.steps.load(Ordering::Relaxed), &self.control.snapshot())
    }

    /// Firings of an actor of this process that have ended, from the `from`-th on, in the order of their ends: the newest
    /// [`shardflow_actors::trace::RING_FIRINGS`] are kept.
    pub fn fired(&self, actor: ActorId, from: u64) -> shardflow_actors::trace::NewFirings {
        self.control.fired(actor, from)
    }

    /// What each actor of this process is doing; empty once the session has ended.
    pub fn snapshot(&self) -> Vec<ActorSnapshot> {
        self.control.snapshot()
    }

    /// Nanoseconds since the session's start; `None` once it has ended.
    pub fn now_ns(&self) -> Option<u64> {
        self.control.now_ns()
    }

    /// Steps done before a pass over the plan ([`pass_of`]).
    pub fn step_of(&self, pass: u64) -> u64 {
        self.passes.lock().unwrap_or_else(PoisonError::into_inner).step_of(pass)
    }

    /// Where passes do not follow their steps one by one: the pass, and the steps done before it.
    pub fn marks(&self) -> Vec<(u64, u64)> {
        self.passes.lock().unwrap_or_else(PoisonError::into_inner).marks.iter().copied().collect()
    }

    /// A pass begins, of the step that comes after so many.
    pub(super) fn pass_begins(&self, steps: u64) {
        self.passes.lock().unwrap_or_else(PoisonError::into_inner).begin(steps);
    }

    /// Nanoseconds since anything moved; `None` once the session has ended.
    pub fn idle_ns(&self) -> Option<u64> {
        self.control.idle_ns()
    }

    /// True while a step that the program has begun is not done.
    pub fn is_under_way(&self) -> bool {
        self.control.is_under_way()
    }

    /// What everything waits for now, if a step is under way and nothing moves.
    pub fn hang(&self) -> Option<Hang> {
        self.control.hang()
    }

    /// The newest steps.
    pub fn newest_steps(&self) -> RecentSteps {
        self.newest.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    /// Tells this session from others: Unix time of its start, nanoseconds.
    pub fn started(&self) -> u64 {
        self.started
    }

    /// What went wrong so far, the first first; at most 8 of each kind.
    pub fn incidents(&self) -> Vec<Incident> {
        for (reason, count) in self.world.upgrade().map(|world| world.refused()).into_iter().flatten() {
            // How often is told by the metric, and changes.
            if count > 0 {
                let text = format!("datagrams or letters that are not of this job or of this attempt: {reason}");
                self.note("refused", text);
            }
        }
        if let Some((at_ns, failure)) = self.control.failed_at() {
            self.keep(Incident { at_ns, kind: "failure", text: failure.to_string() });
        }
        let mut incidents = self.incidents.lock().unwrap_or_else(PoisonError::into_inner).clone();
        incidents.sort_by_key(|incident| incident.at_ns);
        incidents
    }

    /// Keeps an incident of now.
    pub fn note(&self, kind: &'static str, text: String) {
        self.keep(Incident { at_ns: self.now_ns().unwrap_or_default(), kind, text });
    }

    /// Unless it is there already, or too many are.
    fn keep(&self, incident: Incident) {
        let mut incidents = self.incidents.lock().unwrap_or_else(PoisonError::into_inner);
        let is_known = incidents.iter().any(|known| known.kind == incident.kind && known.text == incident.text);
        let alike = incidents.iter().filter(|known| known.kind == incident.kind).count();
        if !is_known && alike < INCIDENTS_MAX {
            incidents.push(incident);
        }
    }

    /// What is known of the other processes; nothing once the session has ended.
    pub fn peers(&self) -> Vec<PeerState> {
        self.world.upgrade().map_or_else(Vec::new, |world| world.peers())
    }

    /// A step has ended, `steps` being done by then.
    pub(super) fn step_done(&self, steps: u64, report: &StepReport, learning_rate: f32, took: Duration) {
        self.set_steps(steps);
        if let Some(found) = &report.non_finite {
            self.note("not finite", found.to_string());
        }
        let mut newest = self.newest.lock().unwrap_or_else(PoisonError::into_inner);
        newest.done += 1;
        if newest.steps.len() == STEPS_KEPT {
            newest.steps.pop_front();
        }
        let (loss, gradient_norm, seconds) = (report.loss, report.grad_norm, took.as_secs_f64());
        newest.steps.push_back(StepStats { steps, loss, gradient_norm, learning_rate, seconds });
        // Not after each step, for it sorts.
        if newest.done.is_power_of_two() || newest.done.is_multiple_of(STEPS_TIMED as u64 / 2) {
            let p99 = newest.quantile(0.99).unwrap_or_default();
            self.control.set_step_p99(Duration::from_secs_f64(p99));
        }
    }

    /// How it does.
    pub fn health(&self) -> SessionHealth {
        match (self.control.first_failure(), self.control.now_ns()) {
            (Some(failure), _) => SessionHealth::Failed(failure.to_string()),
            (None, None) => SessionHealth::Ended,
            (None, Some(_)) => SessionHealth::Well { steps: self.steps.load(Ordering::Relaxed) },
        }
    }

    pub(super) fn set_steps(&self, steps: u64) {
        self.steps.store(steps, Ordering::Relaxed);
    }

    /// A sample, if the last is old enough.
    pub(super) fn sample_now_and_then(&self) {
        let is_due = |facade: &Facade| facade.sampled.is_none_or(|at| at.elapsed() >= SAMPLE_EVERY);
        if is_due(&self.facade.lock().unwrap_or_else(PoisonError::into_inner)) {
            self.sample();
        }
    }

    /// Brings the facade up to date.
    pub fn sample(&self) {
        let Some(training) = &self.training else { return };
        let mut facade = self.facade.lock().unwrap_or_else(PoisonError::into_inner);
        facade.sampled = Some(Instant::now());
        if matches!(self.health(), SessionHealth::Well { .. }) {
            training.tell();
        }
        let snapshots = self.control.snapshot();
        if snapshots.is_empty() {
            return;
        }
        for snapshot in &snapshots {
            self.sample_firings(&mut facade, snapshot);
            self.sample_slots(&mut facade, snapshot);
        }
        self.sample_edges(&mut facade, &snapshots);
        for device in self.snapshots.metrics(&self.plan, 0, &snapshots).devices {
            let rank = device.device.to_string();
            let memory = [
                ("planned", device.planned_peak_bytes),
                ("allocated", device.allocated_bytes),
                ("peak", device.measured_peak_bytes),
            ];
            for (kind, bytes) in memory {
                gauge!(names::MEMORY, "device" => rank.clone(), "kind" => kind).set(bytes as f64);
            }
            facade.total(names::COLLECTIVE_BYTES, &[("device", &rank)], device.collective_bytes);
        }
        if let Some(world) = self.world.upgrade() {
            for (reason, count) in world.refused() {
                facade.total(names::REFUSED, &[("reason", reason)], count);
            }
        }
    }

    fn sample_firings(&self, facade: &mut Facade, snapshot: &ActorSnapshot) {
        let actor = snapshot.actor;
        let next = facade.read.entry(actor).or_default();
        let told = self.control.fired(actor, *next);
        *next = told.next;
        if told.lost > 0 {
            counter!(names::FIRINGS_LOST).increment(told.lost);
        }
        for FiringRecord { action, idle_ns, launched_ns, ended_ns, cause, .. } in told.firings {
            let spec = &self.plan.spec.actors[actor.0 as usize];
            let firing = facade.firings.entry((actor, action)).or_insert_with(|| {
                let action = spec.actions[action as usize].name.clone();
                histogram!(names::FIRING, "actor" => spec.name.clone(), "action" => action)
            });
            firing.record(seconds(ended_ns - launched_ns));
            let wait = facade.waits.entry((actor, cause)).or_insert_with(|| self.wait_of(actor, cause));
            wait.record(seconds(launched_ns - idle_ns));
        }
    }

    fn wait_of(&self, actor: ActorId, cause: Cause) -> Histogram {
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

    fn sample_slots(&self, facade: &mut Facade, snapshot: &ActorSnapshot) {
        for used in &snapshot.registers {
            let gauges = facade.slots.entry(used.register).or_insert_with(|| {
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

    /// What a register's bytes go over to a reader: `device`, `process`, `shared_memory` or `socket`. Of an edge between two other
    /// processes it is not known here, and said to be `shared_memory`.
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

    /// What this process's actors have released of others' registers.
    fn sample_edges(&self, facade: &mut Facade, snapshots: &[ActorSnapshot]) {
        let spec = &self.plan.spec;
        let mut bytes: BTreeMap<(&str, &str, &'static str), u64> = BTreeMap::new();
        for snapshot in snapshots {
            // Two actions of an actor may read a register; it crosses once.
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
                    let (_, _, most) = crossed.entry(input.register).or_insert((&producer.name, transport, 0));
                    *most = pieces.max(*most);
                }
            }
            for (register, (from, transport, pieces)) in crossed {
                let slot_bytes = spec.registers[register.0 as usize].slot_bytes as u64;
                *bytes.entry((from, &reader.name, transport)).or_default() += pieces * slot_bytes;
            }
        }
        for ((from, to, transport), bytes) in bytes {
            facade.total(names::EDGE_BYTES, &[("from", from), ("to", to), ("transport", transport)], bytes);
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
    fn passes_are_of_the_steps_that_they_were_made_for() {
        let mut passes = Passes::default();
        // From a checkpoint; a step that is not finite is done again; and back to the checkpoint.
        let steps = [60, 61, 61, 62, 63, 60, 61];
        for step in steps {
            passes.begin(step);
        }
        assert_eq!((0..7).map(|pass| passes.step_of(pass)).collect::<Vec<_>>(), steps);
        assert_eq!(Vec::from(passes.marks), [(0, 60), (2, 61), (5, 60)]);
        assert_eq!(Passes::default().step_of(3), 3);
    }
}
