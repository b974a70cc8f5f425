//! Metrics of a session: a typed snapshot, and the values of each step for the `metrics` facade.

use std::collections::BTreeMap;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Once};
use std::time::{Duration, Instant};

use metrics::{Counter, Gauge, Histogram, counter, gauge, histogram};
use shardflow_actors::snapshot::ActorSnapshot;
use shardflow_actors::spec::{RegisterId, RegisterSpec};
use shardflow_job::exit::unix_ns;
use shardflow_kernels::collective::Collective;
use shardflow_kernels::device::Device;

use super::options::SessionOptions;
use super::report::StepReport;
use super::tokens::tokens_per_step;
use crate::checkpoint::manifest::JobTime;
use crate::metrics as names;
use crate::plan::flops;
use crate::plan::instance::Instance;
use crate::process_map::ProcessMap;

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
    /// Minimum duration of a step: its operations, divided by the peak operations per second of all devices.
    step_seconds_min: f64,
    /// Unix time in milliseconds when the job's launcher started or, without a launcher, when this session started.
    job_began_ms: u64,
    pub(super) training: Arc<TrainingTime>,
}

/// Share of the job's time spent in productive steps.
pub(super) struct TrainingTime {
    ratio: Gauge,
    started: Instant,
    /// Time of the job before `started`.
    earlier: Duration,
    /// Total duration, in nanoseconds, of the steps whose updates are part of the current model.
    productive_ns: AtomicU64,
}

impl TrainingTime {
    /// Publishes the ratio, which decreases until the next step ends.
    pub(super) fn publish(&self) {
        let productive = self.productive_ns.load(Ordering::Relaxed) as f64 * 1e-9;
        let all = self.earlier + self.started.elapsed();
        // If the clock was set back, the job's time is too short, and the ratio could exceed 1.
        self.ratio.set((productive / all.as_secs_f64()).min(1.0));
    }
}

impl StepMetrics {
    pub(super) fn new(plan: &Instance, process_map: &ProcessMap, options: &SessionOptions) -> Self {
        let peak_flops = options.peak_flops;
        let now_ms = unix_ns() / 1_000_000;
        let job_began_ms = options.cluster.job_began_ms.unwrap_or(now_ms);
        let earlier = Duration::from_millis(now_ms.saturating_sub(job_began_ms));
        let step_flops = flops::step_flops(&plan.graph, plan.micro_batches) as f64;
        let publishes = options.publishes_metrics;
        let counter = |name: &'static str| if publishes { counter!(name) } else { Counter::noop() };
        let gauge = |name: &'static str| if publishes { gauge!(name) } else { Gauge::noop() };
        let ratio = gauge(names::TRAINING_RATIO);
        if publishes {
            publish_start(plan, process_map, options, step_flops);
        }
        Self {
            steps: counter(names::STEPS),
            step: gauge(names::STEP),
            non_finite: counter(names::STEPS_NON_FINITE),
            tokens: counter(names::TOKENS),
            duration: if publishes { histogram!(names::STEP_DURATION) } else { Histogram::noop() },
            loss: gauge(names::LOSS),
            gradient_norm: gauge(names::GRADIENT_NORM),
            learning_rate: gauge(names::LEARNING_RATE),
            mfu: peak_flops.map(|_| gauge(names::MFU)),
            step_tokens: tokens_per_step(plan),
            step_seconds_min: step_flops / (peak_flops.unwrap_or(1.0) * process_map.devices as f64),
            job_began_ms,
            training: Arc::new(TrainingTime { ratio, started: Instant::now(), earlier, productive_ns: 0.into() }),
        }
    }

    /// Records a step; `steps` is the number of steps done, including it.
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
        self.training.publish();
    }

    pub(super) fn job_time(&self) -> JobTime {
        let productive_ms = self.training.productive_ns.load(Ordering::Relaxed) / 1_000_000;
        JobTime { began_ms: self.job_began_ms, productive_ms }
    }

    /// Productive milliseconds of this job before a checkpoint; 0 for a checkpoint of another job.
    pub(super) fn productive_ms(&self, job: JobTime) -> u64 {
        if self.job_began_ms == job.began_ms { job.productive_ms } else { 0 }
    }

    /// Sets the productive time to that of a loaded checkpoint, because the steps after the checkpoint are lost.
    pub(super) fn set_productive(&self, ms: u64) {
        self.training.productive_ns.store(ms.saturating_mul(1_000_000), Ordering::Relaxed);
        self.training.publish();
    }
}

/// Publishes the values that do not change.
fn publish_start(plan: &Instance, process_map: &ProcessMap, options: &SessionOptions, step_flops: f64) {
    gauge!(names::STEP_FLOPS).set(step_flops);
    let labels = [
        ("version", env!("CARGO_PKG_VERSION").to_owned()),
        ("mesh", plan.graph.mesh().to_string()),
        ("device", format!("{:?}", plan.device).to_lowercase()),
        ("process", process_map.process.to_string()),
    ];
    gauge!(names::BUILD_INFO, &labels).set(1.0);
    gauge!(names::START).set(unix_ns() as f64 * 1e-9);
    // Makes these counters exist before their first event.
    counter!(names::STALLS).absolute(0);
    counter!(names::FIRINGS_LOST).absolute(0);
    // Published once per process, even if the process starts several sessions.
    static RESTARTS: Once = Once::new();
    let restart = |code: &u8| counter!(names::RESTARTS, "cause" => code.to_string()).increment(1);
    RESTARTS.call_once(|| options.cluster.restart_causes.iter().for_each(restart));
}

/// Memory and traffic of one device.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct DeviceMetrics {
    /// Rank in the mesh.
    pub device: usize,
    /// Peak bytes according to the plan.
    pub planned_peak_bytes: usize,
    /// Peak bytes so far: fixed tensors, streams' memory, scratch of streams that have run, and registers' peak slots.
    pub measured_peak_bytes: usize,
    /// Allocated bytes.
    pub allocated_bytes: usize,
    /// Number of allocations so far; it does not grow after the start.
    pub allocations: usize,
    /// Bytes that collectives received from other devices.
    pub collective_bytes: u64,
    /// Counters of the device's backend, by name: [`shardflow_kernels::device::Device::counts`].
    pub counts: Vec<(&'static str, u64)>,
}

/// Work of one actor.
#[derive(Clone, Debug, PartialEq)]
pub struct ActorMetrics {
    /// Name in the plan.
    pub name: String,
    /// For each action: its name, number of firings, and seconds during which its kernels were in flight.
    pub actions: Vec<(String, u64, f64)>,
    /// What the actor waits for, as text.
    pub waiting: String,
}

/// Slots of one register.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct RegisterMetrics {
    /// Name in the plan.
    pub name: String,
    /// Number of slots.
    pub slots: u32,
    /// Number of slots in use now.
    pub slots_held: u32,
    /// Largest number of slots in use at one time.
    pub slots_peak: u32,
    /// Bytes of one slot.
    pub slot_bytes: usize,
}

/// A snapshot of a session's metrics.
#[derive(Clone, Debug, PartialEq)]
pub struct Metrics {
    /// Steps done.
    pub steps: u64,
    /// Devices of this process, by rank.
    pub devices: Vec<DeviceMetrics>,
    /// Actors of this process, in the plan's order.
    pub actors: Vec<ActorMetrics>,
    /// Registers of this process's actors, in the plan's order.
    pub registers: Vec<RegisterMetrics>,
}

/// Sources of metrics other than the actors' states.
#[derive(Clone)]
pub(super) struct MetricsSource {
    pub(super) devices: Vec<Device>,
    pub(super) engine: Arc<dyn Collective>,
}

impl MetricsSource {
    pub(super) fn metrics(&self, plan: &Instance, steps: u64, snapshots: &[ActorSnapshot]) -> Metrics {
        let spec = &plan.spec;
        let unused = |RegisterSpec { name, slots, slot_bytes, .. }: &RegisterSpec| {
            let (name, slots, slot_bytes) = (name.clone(), *slots, *slot_bytes);
            RegisterMetrics { name, slots, slots_held: 0, slots_peak: 0, slot_bytes }
        };
        let own = spec.registers.iter().filter(|(_, register)| plan.actions.get(register.producer).is_some());
        let mut registers: BTreeMap<RegisterId, RegisterMetrics> = own.map(|(id, own)| (id, unused(own))).collect();
        let ranks = self.devices.iter().map(Device::rank);
        let memory: BTreeMap<usize, _> = ranks.map(|rank| (rank, plan.memory(rank))).collect();
        let mut measured: BTreeMap<usize, usize> =
            memory.iter().map(|(device, own)| (*device, own.fixed_bytes + own.stream_bytes)).collect();
        let mut actors = Vec::new();
        for snapshot in snapshots {
            let actor = &spec.actors[snapshot.actor];
            let measured = measured.entry(actor.device).or_default();
            for used in &snapshot.registers {
                let Some(register) = registers.get_mut(&used.register) else { continue };
                (register.slots_held, register.slots_peak) = (used.slots_held, used.slots_peak);
                *measured += register.slot_bytes * used.slots_peak as usize;
            }
            if snapshot.firings.iter().any(|f| *f > 0) {
                *measured += memory[&actor.device].scratch.get(&actor.stream).map_or(0, |s| s.1);
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
            planned_peak_bytes: memory[&device.rank()].total_bytes(),
            measured_peak_bytes: measured[&device.rank()],
            allocated_bytes: device.bytes_allocated(),
            allocations: device.allocation_count(),
            collective_bytes: self.engine.bytes_received(device.rank()),
            counts: device.counts(),
        });
        Metrics { steps, devices: devices.collect(), actors, registers: registers.into_values().collect() }
    }
}
