//! How a session does, as one value that is served as JSON and shown on one screen. Imports `session` and the actors' traces.

use std::collections::BTreeMap;
use std::fmt;

use serde::{Deserialize, Serialize};
use shardflow_actors::spec::ActorId;
use shardflow_actors::trace::{Cause, RING_FIRINGS};

use crate::session::observer::{Health, Observer};

/// Shares are of so much time, back from now.
const WINDOW_NS: u64 = 10_000_000_000;
/// Waits that are told.
const WAITS_MAX: usize = 5;

/// How a session does. Shares are of the last ten seconds, or of the time since its start.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Status {
    /// Its mesh.
    pub mesh: String,
    /// Kind of its devices.
    pub device: String,
    /// Number of the process.
    pub process: u32,
    /// How many there are.
    pub processes: u32,
    /// What it has failed for.
    pub failed: Option<String>,
    /// Steps done.
    pub steps: u64,
    /// Of the last step.
    pub loss: Option<f32>,
    /// Of the last step.
    pub gradient_norm: Option<f64>,
    /// Median of the newest steps.
    pub step_seconds: Option<f64>,
    /// Of the newest steps, the one that one in a hundred exceeds.
    pub step_seconds_p99: Option<f64>,
    /// By the median step.
    pub tokens_per_second: Option<f64>,
    /// Since a firing began or ended.
    pub idle_seconds: f64,
    /// Those of this process.
    pub devices: Vec<DeviceStatus>,
    /// Those of this process.
    pub actors: Vec<ActorStatus>,
    /// What all actors together waited for most.
    pub waits: Vec<WaitStatus>,
}

/// One device's memory, bytes.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct DeviceStatus {
    /// Its rank.
    pub device: usize,
    /// The plan's peak.
    pub planned_bytes: usize,
    /// The most in use so far.
    pub peak_bytes: usize,
}

/// One actor.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct ActorStatus {
    /// Its name.
    pub name: String,
    /// Share of the time with a firing in flight.
    pub busy: f64,
    /// What it does or waits for.
    pub now: String,
    /// For so long.
    pub now_seconds: f64,
}

/// One thing that was waited for.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct WaitStatus {
    /// `input` or `credit`.
    pub reason: String,
    /// Of this register.
    pub register: String,
    /// Share of the time, summed over actors.
    pub share: f64,
}

impl Status {
    /// Of a session that runs; `None` once it has ended.
    pub(super) fn of(observer: &Observer) -> Option<Self> {
        let failed = match observer.health() {
            Health::Well { .. } => None,
            Health::Failed(cause) => Some(cause),
            Health::Ended => return None,
        };
        // In this order: nothing in the states is later than now.
        let (snapshots, now_ns) = (observer.snapshot(), observer.now_ns()?);
        let (plan, hosting) = (observer.plan(), observer.hosting());
        let window_ns = now_ns.clamp(1, WINDOW_NS);
        let since_ns = now_ns - window_ns;
        let share = |ns: u64| ns as f64 / window_ns as f64;
        let within = |from: u64, to: u64| to.saturating_sub(from.max(since_ns));
        let (mut actors, mut waits, mut idle_ns) = (Vec::new(), BTreeMap::new(), u64::MAX);
        for snapshot in snapshots {
            let told = observer.fired(snapshot.actor, newest(observer, snapshot.actor));
            let flying_ns = now_ns - snapshot.flying_since_ns.unwrap_or(now_ns);
            let mut busy_ns = flying_ns.min(window_ns);
            for fired in &told.firings {
                busy_ns += within(fired.launched_ns, fired.ended_ns);
                let reason = match fired.cause {
                    Cause::Input(register) => ("input", register),
                    Cause::Credit(register) => ("credit", register),
                    Cause::Host | Cause::Own => continue,
                };
                *waits.entry(reason).or_insert(0) += within(fired.idle_ns, fired.launched_ns);
            }
            let now_for_ns = if snapshot.flying_since_ns.is_some() { flying_ns } else { snapshot.idle_now_ns };
            idle_ns = idle_ns.min(now_for_ns);
            actors.push(ActorStatus {
                name: plan.spec.actors[snapshot.actor.0 as usize].name.clone(),
                busy: share(busy_ns).min(1.0),
                now: snapshot.waiting.describe(&plan.spec).lines().next().unwrap_or("is done").to_owned(),
                now_seconds: now_for_ns as f64 * 1e-9,
            });
        }
        let mut waits: Vec<_> = waits.into_iter().map(|((reason, register), ns)| (ns, reason, register)).collect();
        waits.sort_by(|a, b| b.cmp(a));
        let wait = |(ns, reason, register): (u64, &str, _)| WaitStatus {
            reason: reason.to_owned(),
            register: plan.spec.register_name(register),
            share: share(ns),
        };
        let device = |d: crate::session::metrics::DeviceMetrics| DeviceStatus {
            device: d.device,
            planned_bytes: d.planned_peak_bytes,
            peak_bytes: d.measured_peak_bytes,
        };
        let (metrics, steps) = (observer.metrics(), observer.newest_steps());
        Some(Self {
            mesh: plan.graph.mesh().to_string(),
            device: format!("{:?}", plan.device).to_lowercase(),
            process: hosting.process,
            processes: hosting.processes,
            failed,
            steps: metrics.steps,
            loss: steps.last().and_then(|step| step.loss),
            gradient_norm: steps.last().and_then(|step| step.gradient_norm),
            step_seconds: steps.quantile(0.5),
            step_seconds_p99: steps.quantile(0.99),
            tokens_per_second: steps.quantile(0.5).map(|seconds| steps.tokens as f64 / seconds),
            idle_seconds: if idle_ns == u64::MAX { 0.0 } else { idle_ns as f64 * 1e-9 },
            devices: metrics.devices.into_iter().map(device).collect(),
            actors,
            waits: waits.into_iter().take(WAITS_MAX).map(wait).collect(),
        })
    }
}

/// Where to begin to read an actor's firings: all that its ring holds.
fn newest(observer: &Observer, actor: ActorId) -> u64 {
    observer.fired(actor, u64::MAX).next.saturating_sub(RING_FIRINGS as u64)
}

impl fmt::Display for Status {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let or = |value: Option<String>| value.unwrap_or_else(|| "none yet".to_owned());
        writeln!(f, "rank {} of {}, {} on {}", self.process, self.processes, self.mesh, self.device)?;
        if let Some(cause) = &self.failed {
            writeln!(f, "failed: {cause}")?;
        }
        let loss = or(self.loss.map(|loss| format!("{loss:.4}")));
        let norm = or(self.gradient_norm.map(|norm| format!("{norm:.3}")));
        writeln!(f, "step {}, loss {loss}, gradient norm {norm}", self.steps)?;
        if let (Some(median), Some(p99), Some(tokens)) =
            (self.step_seconds, self.step_seconds_p99, self.tokens_per_second)
        {
            let [median, p99] = [median, p99].map(|seconds| seconds * 1e3);
            writeln!(f, "{median:.1} ms a step, {p99:.1} ms at the 99th percentile, {tokens:.0} tokens/s")?;
        }
        for device in &self.devices {
            let mib = |bytes: usize| bytes as f64 / (1 << 20) as f64;
            let (peak, planned) = (mib(device.peak_bytes), mib(device.planned_bytes));
            writeln!(f, "device {}: memory at most {peak:.2} MiB, planned {planned:.2} MiB", device.device)?;
        }
        for actor in &self.actors {
            writeln!(f, "{:4.0} %  {:9.3} s  {}", actor.busy * 100.0, actor.now_seconds, actor.now)?;
        }
        for wait in &self.waits {
            writeln!(f, "waited {:4.1} % for {} of '{}'", wait.share * 100.0, wait.reason, wait.register)?;
        }
        Ok(())
    }
}
