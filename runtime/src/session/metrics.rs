//! What a session tells of itself: a typed snapshot, and the counters of each step on the `metrics` facade, which cost
//! nothing until a program installs a recorder. Imports `session`, `plan` and the actors' shell.
//!
//! | metric | kind | meaning |
//! |---|---|---|
//! | `shardflow_steps_total` | counter | steps done |
//! | `shardflow_steps_non_finite_total` | counter | steps whose loss or gradients were not finite: nothing was updated |
//! | `shardflow_step_duration_seconds` | histogram | wall time of a step |
//! | `shardflow_loss` | gauge | loss of the last step |
//! | `shardflow_gradient_norm` | gauge | global norm of the last step's gradients, before clipping |

use std::time::Duration;

use metrics::{Counter, Gauge, Histogram, counter, gauge, histogram};

use super::{Session, StepReport};

/// Handles of the step's metrics.
pub(super) struct StepMetrics {
    steps: Counter,
    non_finite: Counter,
    duration: Histogram,
    loss: Gauge,
    gradient_norm: Gauge,
}

impl StepMetrics {
    pub(super) fn new() -> Self {
        Self {
            steps: counter!("shardflow_steps_total"),
            non_finite: counter!("shardflow_steps_non_finite_total"),
            duration: histogram!("shardflow_step_duration_seconds"),
            loss: gauge!("shardflow_loss"),
            gradient_norm: gauge!("shardflow_gradient_norm"),
        }
    }

    pub(super) fn non_finite(&self) {
        self.non_finite.increment(1);
    }

    pub(super) fn record(&self, report: &StepReport, took: Duration) {
        self.steps.increment(1);
        self.duration.record(took);
        report.loss.iter().for_each(|loss| self.loss.set(*loss));
        report.grad_norm.iter().for_each(|norm| self.gradient_norm.set(*norm));
    }
}

/// One device's memory and messages.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct DeviceMetrics {
    /// Rank in the mesh.
    pub device: usize,
    /// What the plan says is the most that is in use at once, bytes.
    pub planned_peak_bytes: usize,
    /// What was in use at once so far, bytes: fixed tensors, the scratch of streams that have worked, and of each register
    /// the most slots that were held at one time.
    pub measured_peak_bytes: usize,
    /// Bytes in arenas.
    pub allocated_bytes: usize,
    /// Arenas made so far; does not grow after the start.
    pub allocations: usize,
    /// Bytes that collectives brought in from other devices.
    pub collective_bytes: u64,
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

impl Session {
    /// What the session has done and holds now. Cheap: nothing stops for it.
    pub fn metrics(&self) -> Metrics {
        let spec = &self.plan.spec;
        let snapshots = self.running.as_ref().map(|r| r.snapshot()).unwrap_or_default();
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
        let mut measured: Vec<usize> = self.plan.memory.iter().map(|m| m.fixed_bytes).collect();
        let mut actors = Vec::new();
        for snapshot in &snapshots {
            let actor = &spec.actors[snapshot.actor.0 as usize];
            for used in &snapshot.registers {
                let register = &mut registers[used.register.0 as usize];
                (register.slots_held, register.slots_peak) = (used.slots_held, used.slots_peak);
                measured[actor.device] += register.slot_bytes * used.slots_peak as usize;
            }
            if snapshot.firings.iter().any(|f| *f > 0) {
                let scratch = self.plan.memory[actor.device].scratch.get(&snapshot.actor);
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
            planned_peak_bytes: self.plan.memory[device.rank()].total_bytes,
            measured_peak_bytes: measured[device.rank()],
            allocated_bytes: device.bytes_allocated(),
            allocations: device.allocation_count(),
            collective_bytes: self.engine.bytes_received(device.rank()),
        });
        Metrics { steps: self.steps, devices: devices.collect(), actors, registers }
    }
}
