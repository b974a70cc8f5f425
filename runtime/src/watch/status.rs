//! The status of a session, as one value that is served as JSON and printed on one screen.

use std::collections::BTreeMap;
use std::fmt;

use serde::{Deserialize, Serialize};
use shardflow_actors::protocol::Missing;
use shardflow_actors::snapshot::ActorSnapshot;
use shardflow_actors::spec::RegisterId;
use shardflow_actors::trace::RING_FIRINGS;

use super::number;
use super::under_way::RunningStep;
use crate::session::metrics::DeviceMetrics;
use crate::session::observer::{Observer, SessionHealth, cause_of};

/// Shares of time refer to the last ten seconds. This constant is that window's length in nanoseconds.
const WINDOW_NS: u64 = 10_000_000_000;
/// Maximum number of reported waits.
const WAITS_MAX: usize = 5;
/// Smallest share of the time for which a wait is reported.
const WAIT_MIN: f64 = 5e-4;
/// A step that makes no progress for this time is reported.
const IDLE_SECONDS_REPORTED: f64 = 1.0;

/// Status of a session. Shares refer to the last ten seconds, or to the session's whole time if that time is shorter.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Status {
    /// Mesh of the session.
    pub mesh: String,
    /// Kind of the session's devices.
    pub device: String,
    /// Rank of the process.
    pub process: u32,
    /// Number of processes.
    pub processes: u32,
    /// The cause of the session's failure, if it failed.
    pub failed: Option<String>,
    /// Number of completed steps.
    pub steps: u64,
    /// Loss of the last step. In JSON an Inf or NaN value is the text `NaN`, `inf` or `-inf`.
    #[serde(with = "number")]
    pub loss: Option<f64>,
    /// Gradient norm of the last step, encoded like the loss.
    #[serde(with = "number")]
    pub gradient_norm: Option<f64>,
    /// Median duration of the newest steps.
    pub step_seconds: Option<f64>,
    /// 99th percentile of the durations of the newest steps.
    pub step_seconds_p99: Option<f64>,
    /// Tokens per second at the median duration.
    pub tokens_per_second: Option<f64>,
    /// Time since the last progress.
    pub idle_seconds: f64,
    /// True while a step is running.
    pub is_under_way: bool,
    /// Devices of this process.
    pub devices: Vec<DeviceStatus>,
    /// Actors of this process.
    pub actors: Vec<ActorStatus>,
    /// The longest waits, summed over all actors.
    pub waits: Vec<WaitStatus>,
}

/// Memory of one device, in bytes.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct DeviceStatus {
    /// Rank of the device in the mesh.
    pub device: usize,
    /// Peak memory according to the plan.
    pub planned_bytes: usize,
    /// Peak memory in use so far.
    pub peak_bytes: usize,
}

/// Status of one actor.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct ActorStatus {
    /// Name of the actor.
    pub name: String,
    /// Share of the time in which a firing was in flight.
    pub busy: f64,
    /// The actor's current firing or wait.
    pub now: String,
    /// Duration of the current firing or wait.
    pub now_seconds: f64,
}

/// A condition that actors waited for.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct WaitStatus {
    /// `input` or `credit`.
    pub reason: String,
    /// The register.
    pub register: String,
    /// Share of the time spent in this wait, summed over actors.
    pub share: f64,
}

impl Status {
    /// Status of a running session; `None` after it has ended.
    pub(super) fn of(observer: &Observer) -> Option<Self> {
        let failed = match observer.health() {
            SessionHealth::Healthy(_) => None,
            SessionHealth::Failed(cause) => Some(cause),
            SessionHealth::Ended => return None,
        };
        // Take the snapshots first, so that no time in them is later than `now_ns`.
        let control = observer.control();
        let (snapshots, now_ns) = (control.snapshot(), control.now_ns()?);
        let (plan, process_map) = (observer.plan(), observer.process_map());
        let is_under_way = control.is_under_way();
        let running_step = is_under_way.then(|| RunningStep::new(&plan.spec, &snapshots));
        let (mut actors, mut waits) = (Vec::new(), Waits::new());
        for actor in process_map.own_actors(plan) {
            actors.push(match snapshots.iter().find(|snapshot| snapshot.actor == actor) {
                Some(snapshot) => ActorStatus::of(observer, snapshot, running_step.as_ref(), now_ns, &mut waits),
                None => {
                    let name = plan.spec.actors[actor].name.clone();
                    let now = format!("{name} does not respond");
                    ActorStatus { name, busy: 0.0, now, now_seconds: 0.0 }
                }
            });
        }
        let mut waits: Vec<_> = waits.into_iter().filter(|(_, share)| *share >= WAIT_MIN).collect();
        waits.sort_by(|a, b| b.1.total_cmp(&a.1));
        let wait = |((reason, register), share): ((&str, _), f64)| WaitStatus {
            reason: reason.to_owned(),
            register: plan.spec.register_name(register),
            share,
        };
        let device = |d: DeviceMetrics| DeviceStatus {
            device: d.device,
            planned_bytes: d.planned_peak_bytes,
            peak_bytes: d.measured_peak_bytes,
        };
        let (metrics, steps) = (observer.metrics(), observer.recent_steps());
        Some(Self {
            mesh: plan.graph.mesh().to_string(),
            device: plan.device.to_string(),
            process: process_map.process,
            processes: process_map.processes,
            failed,
            steps: metrics.steps,
            loss: steps.last().and_then(|step| step.loss).map(f64::from),
            gradient_norm: steps.last().and_then(|step| step.gradient_norm),
            step_seconds: steps.quantile(0.5),
            step_seconds_p99: steps.quantile(0.99),
            tokens_per_second: steps.quantile(0.5).map(|seconds| steps.tokens as f64 / seconds),
            idle_seconds: control.idle_ns()? as f64 * 1e-9,
            is_under_way,
            devices: metrics.devices.into_iter().map(device).collect(),
            actors,
            waits: waits.into_iter().take(WAITS_MAX).map(wait).collect(),
        })
    }
}

/// Share of the time for which actors waited for a register, by reason and register.
type Waits = BTreeMap<(&'static str, RegisterId), f64>;

impl ActorStatus {
    /// Returns the status of an actor at `now_ns`, and adds its waits to `waits`.
    fn of(
        observer: &Observer,
        snapshot: &ActorSnapshot,
        running_step: Option<&RunningStep<'_>>,
        now_ns: u64,
        waits: &mut Waits,
    ) -> Self {
        let (spec, actor) = (&observer.plan().spec, snapshot.actor);
        let recent = observer.kept_firings(actor);
        // A full ring buffer may not cover the whole window.
        let oldest = recent.first().filter(|_| recent.len() >= RING_FIRINGS);
        let since_ns = oldest.map_or(0, |fired| fired.idle_ns).max(now_ns - now_ns.clamp(1, WINDOW_NS));
        let share = |ns: u64| ns as f64 / (now_ns - since_ns).max(1) as f64;
        let within = |from: u64, to: u64| to.saturating_sub(from.max(since_ns));
        let mut busy_ns = snapshot.in_flight_since_ns.map_or(0, |since| within(since, now_ns));
        for fired in &recent {
            busy_ns += within(fired.launched_ns, fired.ended_ns);
            let (reason, Some(register)) = cause_of(fired.cause) else { continue };
            *waits.entry((reason, register)).or_insert(0.0) += share(within(fired.idle_ns, fired.launched_ns));
        }
        let now_for_ns = snapshot.in_flight_since_ns.map_or(snapshot.idle_now_ns, |since| now_ns - since);
        // A wait that has not ended also counts.
        let idle_step = running_step.filter(|_| snapshot.in_flight_since_ns.is_none());
        let awaited = idle_step.and_then(|step| step.missing(snapshot).next());
        if let Some((_, missing)) = awaited {
            let reason = match missing {
                Missing::Piece { register, .. } => Some(("input", *register)),
                Missing::Credit { register, .. } => Some(("credit", *register)),
                Missing::Token | Missing::Turn { .. } => None,
            };
            let waited = share(within(now_ns - snapshot.idle_now_ns.min(now_ns), now_ns));
            reason.into_iter().for_each(|reason| *waits.entry(reason).or_insert(0.0) += waited);
        }
        let default = || snapshot.waiting.describe(spec).lines().next().unwrap_or("is done").to_owned();
        let now = |(action, missing): (u32, &Missing)| {
            format!("{} waits for {}", spec.action_name(actor, action), missing.describe(spec, actor))
        };
        Self {
            name: spec.actors[actor].name.clone(),
            busy: share(busy_ns).min(1.0),
            now: awaited.map_or_else(default, now),
            now_seconds: now_for_ns as f64 * 1e-9,
        }
    }
}

impl fmt::Display for Status {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let or_none = |value: Option<String>| value.unwrap_or_else(|| "none yet".to_owned());
        writeln!(f, "rank {} of {}, {} on {}", self.process, self.processes, self.mesh, self.device)?;
        if let Some(cause) = &self.failed {
            writeln!(f, "failed: {cause}")?;
        }
        let loss = or_none(self.loss.map(|loss| format!("{loss:.4}")));
        let norm = or_none(self.gradient_norm.map(|norm| format!("{norm:.3}")));
        writeln!(f, "step {}, loss {loss}, gradient norm {norm}", self.steps)?;
        if self.is_under_way && self.idle_seconds >= IDLE_SECONDS_REPORTED {
            writeln!(f, "no progress for {:.1} s; run `shardflow explain-hang` for the cause", self.idle_seconds)?;
        }
        if let (Some(median), Some(p99), Some(tokens)) =
            (self.step_seconds, self.step_seconds_p99, self.tokens_per_second)
        {
            let [median, p99] = [median, p99].map(|seconds| seconds * 1e3);
            writeln!(f, "{median:.1} ms per step, {p99:.1} ms at the 99th percentile, {tokens:.0} tokens/s")?;
        }
        for device in &self.devices {
            let mib = |bytes: usize| bytes as f64 / (1 << 20) as f64;
            let (peak, planned) = (mib(device.peak_bytes), mib(device.planned_bytes));
            writeln!(f, "device {}: peak memory {peak:.2} MiB, planned {planned:.2} MiB", device.device)?;
        }
        if !self.actors.is_empty() {
            writeln!(f, "{:>6}  {:>11}  what each actor does or waits for", "busy", "now for")?;
        }
        for actor in &self.actors {
            writeln!(f, "{:4.0} %  {:9.3} s  {}", actor.busy * 100.0, actor.now_seconds, actor.now)?;
        }
        for wait in &self.waits {
            let WaitStatus { reason, register, share } = wait;
            writeln!(f, "waited {:4.1} % of the time (sum over actors) for {reason} of '{register}'", share * 100.0)?;
        }
        Ok(())
    }
}
