//! Observes a running session from any thread: snapshots of its state, and samples for the `metrics` facade.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use parking_lot::Mutex;
use shardflow_actors::shell::Control;
use shardflow_actors::spec::{ActorId, RegisterId};
use shardflow_actors::trace::{FiringRecord, RING_FIRINGS};

use super::metrics::{Metrics, TrainingTime};
use super::passes::Passes;
pub(crate) use super::passes::cause_of;
pub use super::passes::pass_of;
use super::published::{PublishedMetrics, Sources};
pub use super::recent::RecentSteps;
use super::report::StepReport;
pub use crate::cluster::world::PeerState;
use crate::plan::instance::Instance;
use crate::process_map::ProcessMap;
use shardflow_job::exit::unix_ns;

pub struct Observer {
    sources: Sources,
    steps: AtomicU64,
    recent: Mutex<RecentSteps>,
    pub(super) passes: Mutex<Passes>,
    incidents: Mutex<Vec<Incident>>,
    /// Unix time of the start in nanoseconds. It identifies the session on a server that shows several sessions.
    pub started: u64,
    published: Mutex<PublishedMetrics>,
    /// `Some` if the session publishes to the `metrics` facade.
    training: Option<Arc<TrainingTime>>,
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub enum SessionHealth {
    /// The session runs a step or waits for the program. The value is the number of steps done.
    Healthy(u64),
    Failed(String),
    Ended,
}

impl Observer {
    /// `steps` contains no step yet.
    pub(super) fn new(sources: Sources, steps: RecentSteps, training: Option<Arc<TrainingTime>>) -> Self {
        let started = unix_ns().saturating_sub(sources.control.now_ns().unwrap_or_default());
        Self {
            sources,
            steps: AtomicU64::new(0),
            recent: Mutex::new(steps),
            passes: Mutex::default(),
            incidents: Mutex::default(),
            started,
            published: Mutex::default(),
            training,
        }
    }

    pub fn plan(&self) -> &Instance {
        &self.sources.plan
    }

    pub fn process_map(&self) -> ProcessMap {
        self.sources.process_map
    }

    /// The session's progress and memory use. The call is cheap and pauses no actor.
    pub fn metrics(&self) -> Metrics {
        let (steps, snapshots) = (self.steps.load(Ordering::Relaxed), self.control().snapshot());
        self.sources.metrics.metrics(self.plan(), steps, &snapshots)
    }

    /// The running actors: their states, firings and progress.
    pub fn control(&self) -> &Control {
        &self.sources.control
    }

    /// Firings that the actor's ring buffer holds.
    pub fn kept_firings(&self, actor: ActorId) -> Vec<FiringRecord> {
        let end = self.control().fired(actor, u64::MAX).next;
        self.control().fired(actor, end.saturating_sub(RING_FIRINGS as u64)).firings
    }

    /// Number of steps done before a pass over the plan ([`pass_of`]).
    pub fn step_of(&self, pass: u64) -> u64 {
        self.passes.lock().step_of(pass)
    }

    /// Passes at which the step number jumps, each with the number of steps done before it.
    pub fn marks(&self) -> Vec<(u64, u64)> {
        self.passes.lock().marks.iter().copied().collect()
    }

    pub fn recent_steps(&self) -> RecentSteps {
        self.recent.lock().clone()
    }

    /// Incidents so far, in the order of time; at most 8 of each kind.
    pub fn incidents(&self) -> Vec<Incident> {
        for (reason, count) in self.sources.world.upgrade().map(|world| world.refused()).into_iter().flatten() {
            // The text of an incident must not change, so only the metric has the count.
            if count > 0 {
                let text = format!("this process refused messages of another job or attempt: {reason}");
                self.note("refused", text);
            }
        }
        if let Some((at_ns, failure)) = self.sources.control.failed_at() {
            self.add_incident(Incident { at_ns, kind: "failure", text: failure.to_string() });
        }
        let mut incidents = self.incidents.lock().clone();
        incidents.sort_by_key(|incident| incident.at_ns);
        incidents
    }

    /// Adds an incident if it is new and the list has fewer than [`INCIDENTS_MAX`] of its kind.
    fn add_incident(&self, incident: Incident) {
        let mut incidents = self.incidents.lock();
        let is_known = incidents.iter().any(|known| known.kind == incident.kind && known.text == incident.text);
        let same_kind = incidents.iter().filter(|known| known.kind == incident.kind).count();
        if !is_known && same_kind < INCIDENTS_MAX {
            incidents.push(incident);
        }
    }

    /// Records an incident with the current time.
    pub fn note(&self, kind: &'static str, text: String) {
        self.add_incident(Incident { at_ns: self.control().now_ns().unwrap_or_default(), kind, text });
    }

    /// State of the other processes; empty after the session has ended.
    pub fn peers(&self) -> Vec<PeerState> {
        self.sources.world.upgrade().map_or_else(Vec::new, |world| world.peers())
    }

    /// Records a step; `steps` is the number of steps done, including it.
    pub(super) fn record_step(&self, steps: u64, report: &StepReport, learning_rate: f32, took: Duration) {
        self.set_steps(steps);
        if let Some(found) = &report.non_finite {
            self.note("not finite", found.to_string());
        }
        let p99 = self.recent.lock().record(steps, report, learning_rate, took);
        p99.into_iter().for_each(|p99| self.sources.control.set_step_p99(p99));
    }

    pub fn health(&self) -> SessionHealth {
        match (self.sources.control.first_failure(), self.sources.control.now_ns()) {
            (Some(failure), _) => SessionHealth::Failed(failure.to_string()),
            (None, None) => SessionHealth::Ended,
            (None, Some(_)) => SessionHealth::Healthy(self.steps.load(Ordering::Relaxed)),
        }
    }

    pub(super) fn set_steps(&self, steps: u64) {
        self.steps.store(steps, Ordering::Relaxed);
    }

    pub(super) fn sample_if_due(&self) {
        // The lock must end here, because `sample` takes it again.
        let is_due = self.published.lock().is_due();
        if is_due {
            self.sample();
        }
    }

    pub fn sample(&self) {
        let Some(training) = &self.training else { return };
        let mut published = self.published.lock();
        if matches!(self.health(), SessionHealth::Healthy(_)) {
            training.publish();
        }
        published.sample(&self.sources);
    }

    /// Transport of a register's bytes to a reader: `device`, `process`, `shared_memory`, `socket` or `nccl`. The
    /// transport between two other processes is unknown in this process and reported as `shared_memory`.
    pub fn transport(&self, register: RegisterId, reader: ActorId) -> &'static str {
        self.sources.transport(register, reader)
    }
}

/// Maximum number of incidents kept of each kind. The first ones are kept, because they explain later ones.
const INCIDENTS_MAX: usize = 8;

#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Incident {
    /// Time of the incident's first occurrence, in nanoseconds since the session's start.
    pub at_ns: u64,
    /// `restart`, `not finite`, `stall`, `refused` or `failure`.
    pub kind: &'static str,
    /// Description, beginning with the cause.
    pub text: String,
}
