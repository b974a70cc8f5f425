//! Publishes the state of a running session to the `metrics` facade.

use std::collections::{BTreeMap, HashMap};
use std::sync::{Arc, Weak};
use std::time::{Duration, Instant};

use metrics::{Counter, Gauge, Histogram, counter, gauge, histogram};
use shardflow_actors::label::Label;
use shardflow_actors::shell::Control;
use shardflow_actors::snapshot::ActorSnapshot;
use shardflow_actors::spec::{ActorId, RegisterId};
use shardflow_actors::trace::{Cause, FiringRecord};

use super::metrics::MetricsSource;
use super::passes::cause_of;
use crate::cluster::world::World;
use crate::metrics as names;
use crate::plan::instance::Instance;
use crate::process_map::ProcessMap;

/// Shortest time between two samples. The session takes a sample at the end of a step.
const SAMPLE_EVERY: Duration = Duration::from_secs(1);

/// The parts of a running session that an observer reads. They do not keep the session's device memory alive.
pub(super) struct Sources {
    pub(super) plan: Arc<Instance>,
    pub(super) process_map: ProcessMap,
    pub(super) control: Control,
    pub(super) metrics: MetricsSource,
    pub(super) world: Weak<World>,
    /// Peers' registers that this process copies, each with the transport of its bytes.
    pub(super) mirrored: BTreeMap<RegisterId, &'static str>,
}

impl Sources {
    pub(super) fn transport(&self, register: RegisterId, reader: ActorId) -> &'static str {
        let spec = &self.plan.spec;
        let device = |actor: ActorId| spec.actors[actor].device;
        let from = device(spec.registers[register].producer);
        match () {
            () if from == device(reader) => "device",
            () if self.process_map.process_of(from) == self.process_map.process_of(device(reader)) => "process",
            () => self.mirrored.get(&register).copied().unwrap_or("shared_memory"),
        }
    }
}

/// Metric handles, and the values published so far.
#[derive(Default)]
pub(super) struct PublishedMetrics {
    sampled: Option<Instant>,
    firings_read: BTreeMap<ActorId, u64>,
    firings: HashMap<(ActorId, u32), Histogram>,
    waits: HashMap<(ActorId, Cause), Histogram>,
    slots: HashMap<RegisterId, [Gauge; 3]>,
    /// Each counter and this session's share of it, by name and labels. Sessions of a program add to the same counters.
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

    pub(super) fn is_due(&self) -> bool {
        self.sampled.is_none_or(|at| at.elapsed() >= SAMPLE_EVERY)
    }

    pub(super) fn sample(&mut self, sources: &Sources) {
        self.sampled = Some(Instant::now());
        let snapshots = sources.control.snapshot();
        if snapshots.is_empty() {
            return;
        }
        for snapshot in &snapshots {
            self.sample_firings(sources, snapshot);
            self.sample_slots(sources, snapshot);
        }
        self.sample_edges(sources, &snapshots);
        for device in sources.metrics.metrics(&sources.plan, 0, &snapshots).devices {
            let rank = device.device.to_string();
            let memory = [
                ("planned", device.planned_peak_bytes),
                ("allocated", device.allocated_bytes),
                ("peak", device.measured_peak_bytes),
            ];
            for (kind, bytes) in memory {
                gauge!(names::MEMORY, "device" => rank.clone(), "kind" => kind).set(bytes as f64);
            }
            self.advance_total(names::COLLECTIVE_BYTES, &[("device", &rank)], device.collective_bytes);
        }
        if let Some(world) = sources.world.upgrade() {
            for (reason, count) in world.refused() {
                self.advance_total(names::REFUSED, &[("reason", reason)], count);
            }
        }
    }

    fn sample_firings(&mut self, sources: &Sources, snapshot: &ActorSnapshot) {
        let actor = snapshot.actor;
        let next = self.firings_read.entry(actor).or_default();
        let new_firings = sources.control.fired(actor, *next);
        *next = new_firings.next;
        if new_firings.lost > 0 {
            counter!(names::FIRINGS_LOST).increment(new_firings.lost);
        }
        for FiringRecord { action, idle_ns, launched_ns, ended_ns, cause, .. } in new_firings.firings {
            let spec = &sources.plan.spec.actors[actor];
            let firing = self.firings.entry((actor, action)).or_insert_with(|| {
                let action = &spec.actions[action as usize];
                let Label { role, chunk, program } = &action.label;
                histogram!(
                    names::FIRING,
                    "actor" => spec.name.clone(),
                    "action" => action.name.clone(),
                    "role" => role.name(),
                    "chunk" => chunk.to_string(),
                    "program" => program.to_string()
                )
            });
            firing.record(seconds(ended_ns - launched_ns));
            let wait = self.waits.entry((actor, cause)).or_insert_with(|| {
                let (reason, register) = cause_of(cause);
                let register = register.map(|register| sources.plan.spec.register_name(register)).unwrap_or_default();
                histogram!(names::WAIT, "actor" => spec.name.clone(), "reason" => reason, "register" => register)
            });
            wait.record(seconds(launched_ns - idle_ns));
        }
    }

    fn sample_slots(&mut self, sources: &Sources, snapshot: &ActorSnapshot) {
        for used in &snapshot.registers {
            let gauges = self.slots.entry(used.register).or_insert_with(|| {
                let register = sources.plan.spec.register_name(used.register);
                ["free", "writing", "filled"]
                    .map(|state| gauge!(names::SLOTS, "register" => register.clone(), "state" => state))
            });
            let filled = used.slots_filled();
            let counts = [used.slots.saturating_sub(used.slots_held), used.slots_held.saturating_sub(filled), filled];
            gauges.iter().zip(counts).for_each(|(gauge, count)| gauge.set(f64::from(count)));
        }
    }

    /// Publishes how many bytes each actor of this process has read from registers of each other actor.
    fn sample_edges(&mut self, sources: &Sources, snapshots: &[ActorSnapshot]) {
        let spec = &sources.plan.spec;
        let mut bytes: BTreeMap<(&str, &str, &'static str), u64> = BTreeMap::new();
        for snapshot in snapshots {
            // Counts a register once for this reader, even if two of its actions read the register.
            let mut read: BTreeMap<RegisterId, u64> = BTreeMap::new();
            let reader = &spec.actors[snapshot.actor];
            for (index, action) in (0..).zip(&reader.actions) {
                for input in &action.inputs {
                    let most = read.entry(input.register).or_default();
                    *most = input.pieces.finished(snapshot.completed(index)).max(*most);
                }
            }
            for (id, pieces) in read {
                let register = &spec.registers[id];
                if register.producer != snapshot.actor && register.slot_bytes > 0 {
                    let from = &spec.actors[register.producer].name;
                    let transport = sources.transport(id, snapshot.actor);
                    *bytes.entry((from, &reader.name, transport)).or_default() += pieces * register.slot_bytes as u64;
                }
            }
        }
        for ((from, to, transport), bytes) in bytes {
            self.advance_total(names::EDGE_BYTES, &[("from", from), ("to", to), ("transport", transport)], bytes);
        }
    }
}

fn seconds(ns: u64) -> f64 {
    ns as f64 * 1e-9
}
