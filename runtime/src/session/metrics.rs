//! What a session tells of itself: a typed snapshot, and the numbers of each step on the `metrics` facade.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use metrics::{Counter, Gauge, Histogram, counter, gauge, histogram};
use shardflow_actors::snapshot::ActorSnapshot;
use shardflow_kernels::collective::Collective;
use shardflow_kernels::device::Device;

use super::process_map::ProcessMap;
use super::{SessionOptions, StepReport};
use crate::checkpoint::manifest::JobTime;
use crate::exit::unix_ns;
use crate::metrics as names;
use crate::plan::{Plan, flops};

/// Handles of the step's metrics.
pub(super) struct StepMetrics {
    steps: Counter,
    step: Gauge,
    non_finite: Counter,
    tokens: Counter,
    duration: Histogram,
    loss: Gauge,
    gradient_norm: Gauge,
    learning_rate: Gauge,
    mfu: Option<Gauge>,
    step_tokens: u64,
    /// Operations that a step needs, over what all devices could do in a second.
    step_seconds_min: f64,
    /// When the job began: its launcher, or else this session.
    job_began_ms: u64,
    training: Arc<TrainingTime>,
}

/// What the job has made of its time so far.
pub(super) struct TrainingTime {
    ratio: Gauge,
    started: Instant,
    /// What of the job was over by then.
    earlier: Duration,
    /// Nanoseconds in the steps that made the model what it is.
    productive_ns: AtomicU64,
}

impl TrainingTime {
    fn new(ratio: Gauge, earlier: Duration) -> Arc<Self> {
        Arc::new(Self { ratio, started: Instant::now(), earlier, productive_ns: AtomicU64::new(0) })
    }

    /// Brings the facade up to date: while no step ends, too, the ratio falls.
    pub(super) fn tell(&self) {
        let productive = self.productive_ns.load(Ordering::Relaxed) as f64 * 1e-9;
        let all = self.earlier + self.started.elapsed();
        // A clock that was set back may make the time too short.
        self.ratio.set((productive / all.as_secs_f64()).min(1.0));
    }
}

impl StepMetrics {
    pub(super) fn new(plan: &Plan, process_map: &ProcessMap, step_tokens: u64, options: &SessionOptions) -> Self {
        let peak_flops = options.peak_flops;
        let now_ms = unix_ns() / 1_000_000;
        let job_began_ms = options.cluster.job_began_ms.unwrap_or(now_ms);
        let earlier = Duration::from_millis(now_ms.saturating_sub(job_began_ms));
        if !options.tells_metrics {
            return Self { job_began_ms, ..Self::silent() };
        }
        let step_flops = flops::step_flops(&plan.graph, plan.micro_batches) as f64;
        gauge!(names::STEP_FLOPS).set(step_flops);
        let labels = [
            ("version", env!("CARGO_PKG_VERSION").to_owned()),
            ("mesh", plan.graph.mesh().to_string()),
            ("device", format!("{:?}", plan.device).to_lowercase()),
            ("process", process_map.process.to_string()),
        ];
        gauge!(names::BUILD_INFO, &labels).set(1.0);
        gauge!(names::START).set(unix_ns() as f64 * 1e-9);
        // So that they are there before the first of them happens.
        counter!(names::STALLS).absolute(0);
        counter!(names::FIRINGS_LOST).absolute(0);
        Self {
            steps: counter!(names::STEPS),
            step: gauge!(names::STEP),
            non_finite: counter!(names::STEPS_NON_FINITE),
            tokens: counter!(names::TOKENS),
            duration: histogram!(names::STEP_DURATION),
            loss: gauge!(names::LOSS),
            gradient_norm: gauge!(names::GRADIENT_NORM),
            learning_rate: gauge!(names::LEARNING_RATE),
            mfu: peak_flops.map(|_| gauge!(names::MFU)),
            step_tokens,
            step_seconds_min: step_flops / (peak_flops.unwrap_or(1.0) * process_map.devices as f64),
            job_began_ms,
            training: TrainingTime::new(gauge!(names::TRAINING_RATIO), earlier),
        }
    }

    fn silent() -> Self {
        Self {
            steps: Counter::noop(),
            step: Gauge::noop(),
            non_finite: Counter::noop(),
            tokens: Counter::noop(),
            duration: Histogram::noop(),
            loss: Gauge::noop(),
            gradient_norm: Gauge::noop(),
            learning_rate: Gauge::noop(),
            mfu: None,
            step_tokens: 0,
            step_seconds_min: 0.0,
            job_began_ms: 0,
            training: TrainingTime::new(Gauge::noop(), Duration::ZERO),
        }
    }

    /// A step has ended, `steps` being done by then.
    pub(super) fn record(&mut self, steps: u64, report: &StepReport, learning_rate: f32, took: Duration) {
        self.steps.increment(1);
        self.step.set(steps as f64);
        self.tokens.increment(self.step_tokens);
        self.duration.record(took);
        self.learning_rate.set(learning_rate);
        report.loss.iter().for_each(|loss| self.loss.set(*loss));
        report.grad_norm.iter().for_each(|norm| self.gradient_norm.set(*norm));
        self.mfu.iter().for_each(|mfu| mfu.set(self.step_seconds_min / took.as_secs_f64()));
        match report.non_finite {
            Some(_) => self.non_finite.increment(1),
            None => drop(self.training.productive_ns.fetch_add(took.as_nanos() as u64, Ordering::Relaxed)),
        }
        self.training.tell();
    }

    /// Told of by whoever looks.
    pub(super) fn training(&self) -> Arc<TrainingTime> {
        self.training.clone()
    }

    /// What a checkpoint of now keeps.
    pub(super) fn job_time(&self) -> JobTime {
        JobTime {
            began_ms: self.job_began_ms,
            productive_ms: self.training.productive_ns.load(Ordering::Relaxed) / 1_000_000,
        }
    }

    /// Milliseconds of this job in the steps before a checkpoint.
    pub(super) fn productive_of(&self, job: JobTime) -> u64 {
        if self.job_began_ms == job.began_ms { job.productive_ms } else { 0 }
    }

    /// A checkpoint was loaded that took so long: steps behind it are lost.
    pub(super) fn was_productive(&self, ms: u64) {
        self.training.productive_ns.store(ms.saturating_mul(1_000_000), Ordering::Relaxed);
        self.training.tell();
    }
}

/// One device's memory and messages.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct DeviceMetrics {
    /// Rank in the mesh.
    pub device: usize,
    /// What the plan says is the most that is in use at once, bytes.
    pub planned_peak_bytes: usize,
    /// What was in use at once so far, bytes: fixed tensors, what streams hold themselves, the scratch of streams that have
    /// worked, and of each register the most slots that were held at one time.
    pub measured_peak_bytes: usize,
    /// What is allocated on it, bytes.
    pub allocated_bytes: usize,
    /// Allocations so far; does not grow after the start.
    pub allocations: usize,
    /// Bytes that collectives brought in from other devices.
    pub collective_bytes: u64,
    /// What its backend counts of its own work, by name: [`shardflow_kernels::device::Device::counts`].
    pub counts: Vec<(&'static str, u64)>,
}

/// One actor's work.
#[derive(Clone, Debug, PartialEq)]
pub struct ActorMetrics {
    /// As in the plan.
    pub name: String,
    /// Each action by name: how often it has fired, and seconds in which its kernels were in flight.
    pub actions: Vec<(String, u64, f64)>,
    /// What it waits for, as text.
    pub waiting: String,
}

/// One register's slots.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct RegisterMetrics {
    /// As in the plan.
    pub name: String,
    /// Slots that it has.
    pub slots: u32,
    /// Slots in use now.
    pub slots_held: u32,
    /// The most that were in use at once.
    pub slots_peak: u32,
    /// Bytes of one slot.
    pub slot_bytes: usize,
}

/// A snapshot.
#[derive(Clone, Debug, PartialEq)]
pub struct Metrics {
    /// Steps done.
    pub steps: u64,
    /// Those of this process, by rank.
    pub devices: Vec<DeviceMetrics>,
    /// Those of this process, in the plan's order.
    pub actors: Vec<ActorMetrics>,
    /// In the plan's order.
    pub registers: Vec<RegisterMetrics>,
}

/// What snapshots are made of, beside the actors' states.
pub(super) struct Snapshots {
    /// Of this process.
    pub(super) devices: Vec<Device>,
    pub(super) engine: Arc<dyn Collective>,
}

impl Snapshots {
    pub(super) fn metrics(&self, plan: &Plan, steps: u64, snapshots: &[ActorSnapshot]) -> Metrics {
        let spec = &plan.spec;
        let mut registers: Vec<RegisterMetrics> = spec
            .registers
            .iter()
            .map(|r| RegisterMetrics {
                name: r.name.clone(),
                slots: r.slots,
                slots_held: 0,
                slots_peak: 0,
                slot_bytes: r.slot_bytes,
            })
            .collect();
        let mut measured: Vec<usize> = plan.memory.iter().map(|m| m.fixed_bytes + m.stream_bytes).collect();
        let mut actors = Vec::new();
        for snapshot in snapshots {
            let actor = &spec.actors[snapshot.actor.0 as usize];
            for used in &snapshot.registers {
                let register = &mut registers[used.register.0 as usize];
                (register.slots_held, register.slots_peak) = (used.slots_held, used.slots_peak);
                measured[actor.device] += register.slot_bytes * used.slots_peak as usize;
            }
            if snapshot.firings.iter().any(|f| *f > 0) {
                let scratch = plan.memory[actor.device].scratch.get(&snapshot.actor);
                measured[actor.device] += scratch.map_or(0, |s| s.1);
            }
            let work = actor.actions.iter().zip(&snapshot.firings).zip(&snapshot.busy_ns);
            actors.push(ActorMetrics {
                name: actor.name.clone(),
                actions: work.map(|((a, fired), ns)| (a.name.clone(), *fired, *ns as f64 * 1e-9)).collect(),
                waiting: snapshot.waiting.describe(spec),
            });
        }
        let devices = self.devices.iter().map(|device| DeviceMetrics {
            device: device.rank(),
            planned_peak_bytes: plan.memory[device.rank()].total_bytes(),
            measured_peak_bytes: measured[device.rank()],
            allocated_bytes: device.bytes_allocated(),
            allocations: device.allocation_count(),
            collective_bytes: self.engine.bytes_received(device.rank()),
            counts: device.counts(),
        });
        Metrics { steps, devices: devices.collect(), actors, registers }
    }
}
