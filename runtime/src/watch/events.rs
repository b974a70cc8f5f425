//! An event for a live page: the session's changes since the page's last event, as one JSON value of bounded size.

use std::collections::HashMap;

use serde::Serialize;
use shardflow_actors::protocol::Missing;
use shardflow_actors::snapshot::ActorSnapshot;
use shardflow_actors::spec::{ActorId, RegisterId, Spec};
use shardflow_actors::trace::{Cause, FiringRecord};

use super::bubble::Bubble;
use super::number;
use super::under_way::RunningStep;
use crate::session::metrics::DeviceMetrics;
use crate::session::observer::{Observer, RecentSteps, SessionHealth, pass_of};
use crate::session::recent::StepStats;

#[cfg(test)]
mod tests;

/// Maximum number of firings in one event. If there are more, the event has the newest firings of the last ended step.
pub(super) const FIRINGS_MAX: usize = 12_000;
const FIRING_FIELDS: usize = 7;
/// Maximum number of waits, and of edges, in one event.
const BLOCKED_MAX: usize = 200;
/// An edge counts as blocked if it holds up an actor for at least this time while a step is running.
const BLOCKED_NS: u64 = 1_000_000_000;
/// Maximum length of a text, in bytes; longer texts are truncated.
const TEXT_MAX: usize = 2_000;

/// A step: its number, loss, gradient norm, learning rate and seconds.
#[derive(Clone, Copy, Debug, PartialEq, Serialize)]
pub(super) struct Point(
    u64,
    #[serde(serialize_with = "number::serialize")] Option<f64>,
    #[serde(serialize_with = "number::serialize")] Option<f64>,
    f32,
    f64,
);

/// An event for one client. Times are relative to the session's start.
#[derive(Debug, Default, Serialize)]
pub(super) struct Event {
    /// Id of the session, as in `/plan`. If no session is running, all fields except `health` are empty.
    pub session: String,
    /// `running`, `failed`, `ended` or `none`.
    pub health: &'static str,
    pub now_us: u64,
    /// Time since a firing last began or ended, in microseconds.
    pub idle_us: u64,
    pub steps: u64,
    /// For each pass over the plan at which the step number jumps, such as after a rollback: the pass's number, and the
    /// number of steps done before this pass. The numbers of firings count passes, not steps.
    pub passes: Vec<(u64, u64)>,
    /// Total number of steps that the program plans.
    pub steps_planned: Option<u64>,
    /// Tokens of all steps of the session.
    pub tokens: u64,
    /// Median duration of the newest steps.
    pub step_seconds: Option<f64>,
    pub tokens_per_second: Option<f64>,
    /// For each new step: number of steps done including this one, loss, gradient norm, learning rate, seconds.
    pub points: Vec<Point>,
    /// For each newly ended firing: actor, action, firing, launch (us), duration (us), the condition that became true
    /// last (0 input, 1 credit, 2 host, 3 itself), and the register of that condition.
    pub firings: Vec<u64>,
    /// Number of new firings that this event leaves out.
    pub firings_left_out: u64,
    /// For each actor with changes: the actor, and the times (us) that it has spent since the start in firings without
    /// collectives, in collectives, and in waits for inputs, for credits, for the host and for itself.
    pub busy: Vec<[u64; 7]>,
    /// For each changed register: the register, slots held, pieces published, and pieces released by each reader.
    pub registers: Vec<Vec<u64>>,
    /// For each device: the device, bytes planned, peak bytes in use, bytes allocated.
    pub memory: Vec<[usize; 4]>,
    pub bubble: Option<f64>,
    /// For each edge that holds up an actor: the register, the reading actor, 0 if that actor waits for a piece or 1 if
    /// the producer waits for a slot, and the time (us).
    pub blocked: Vec<[u64; 4]>,
    /// For each actor with a long wait: the actor, and what it waits for.
    pub waits: Vec<(u32, String)>,
    /// For each other process: its rank, and the time (us) since its last heartbeat, or `None` if it has ended.
    pub peers: Vec<(u32, Option<u64>)>,
    /// For each incident, in the order of time: time (us), kind, description.
    pub incidents: Vec<(u64, &'static str, String)>,
}

/// The state that one client has received.
#[derive(Debug, Default)]
pub(super) struct Cursor {
    session: u64,
    step: u64,
    firings_read: HashMap<ActorId, u64>,
    busy: HashMap<ActorId, [u64; 7]>,
    registers: HashMap<RegisterId, Vec<u64>>,
    bubble: Option<Bubble>,
}

impl Cursor {
    pub(super) fn no_session() -> Event {
        Event { health: "none", ..Event::default() }
    }

    pub(super) fn next_event(&mut self, observer: &Observer) -> Event {
        if self.session != observer.started {
            *self = Self { session: observer.started, ..Self::default() };
        }
        let health = match observer.health() {
            SessionHealth::Healthy(_) => "running",
            SessionHealth::Failed(_) => "failed",
            SessionHealth::Ended => "ended",
        };
        // Take the snapshots first, so that no time in them is later than `now_ns`.
        let control = observer.control();
        let (snapshots, now_ns) = (control.snapshot(), control.now_ns().unwrap_or_default());
        let (metrics, steps) = (observer.metrics(), observer.recent_steps());
        let idle_ns = snapshots.iter().map(|s| unchanged_ns(s, now_ns)).min().unwrap_or_default();
        let memory = |d: &DeviceMetrics| [d.device, d.planned_peak_bytes, d.measured_peak_bytes, d.allocated_bytes];
        let mut event = Event {
            session: self.session.to_string(),
            health,
            now_us: now_ns / 1000,
            idle_us: idle_ns / 1000,
            steps: steps.last().map_or(metrics.steps, |step| step.steps),
            passes: observer.marks(),
            steps_planned: steps.planned,
            tokens: steps.done * steps.tokens,
            step_seconds: steps.quantile(0.5),
            tokens_per_second: steps.quantile(0.5).map(|seconds| steps.tokens as f64 / seconds),
            memory: metrics.devices.iter().map(memory).collect(),
            peers: observer.peers().iter().map(|p| (p.process, p.silent.map(|s| s.as_micros() as u64))).collect(),
            ..Event::default()
        };
        self.add_points(&mut event, &steps);
        self.add_firings(&mut event, observer, &snapshots);
        for snapshot in &snapshots {
            self.add_changes(&mut event, snapshot, now_ns);
        }
        add_problems(&mut event, observer, &snapshots);
        event
    }

    fn add_points(&mut self, event: &mut Event, steps: &RecentSteps) {
        let loss = |s: &StepStats| s.loss.map(f64::from);
        let point = |s: &StepStats| Point(s.steps, loss(s), s.gradient_norm, s.learning_rate, s.seconds);
        // After a rollback, steps count again from the restored step.
        let known = self.step;
        let is_new = |s: &&StepStats| s.steps > known || known > event.steps;
        event.points = steps.steps.iter().filter(is_new).map(point).collect();
        self.step = event.steps;
    }

    fn add_firings(&mut self, event: &mut Event, observer: &Observer, snapshots: &[ActorSnapshot]) {
        let (spec, own) = (&observer.plan().spec, observer.process_map().own());
        let bubble = self.bubble.get_or_insert_with(|| Bubble::new(spec, |device| own.contains(&device)));
        let mut fired: Vec<(ActorId, FiringRecord)> = Vec::new();
        for snapshot in snapshots {
            let from = self.firings_read.entry(snapshot.actor).or_default();
            let is_first = *from == 0;
            let new_firings = observer.control().fired(snapshot.actor, *from);
            *from = new_firings.next;
            // Firings before the client connected do not count as lost.
            event.firings_left_out += if is_first { 0 } else { new_firings.lost };
            for firing in new_firings.firings {
                bubble.add(spec, snapshot.actor, (firing.action, firing.firing), (firing.launched_ns, firing.ended_ns));
                fired.push((snapshot.actor, firing));
            }
        }
        event.bubble = bubble.share();
        let all = fired.len();
        limit_firings(spec, &mut fired);
        event.firings_left_out += (all - fired.len()) as u64;
        event.firings.reserve(fired.len() * FIRING_FIELDS);
        for (actor, record) in fired {
            let (cause, register) = match record.cause {
                Cause::Input(register) => (0, register.0),
                Cause::Credit(register) => (1, register.0),
                Cause::Host => (2, 0),
                Cause::Own => (3, 0),
            };
            let (launched, took) = (record.launched_ns / 1000, (record.ended_ns - record.launched_ns) / 1000);
            let (actor, action) = (u64::from(actor.0), u64::from(record.action));
            event.firings.extend([actor, action, record.firing, launched, took, cause, u64::from(register)]);
        }
    }

    fn add_changes(&mut self, event: &mut Event, snapshot: &ActorSnapshot, now_ns: u64) {
        let idle = &snapshot.idle;
        let in_flight_ns = snapshot.in_flight_since_ns.map_or(0, |since| now_ns.saturating_sub(since));
        let firing_ns = snapshot.busy_ns.iter().sum::<u64>() + in_flight_ns;
        let ns = [
            u64::from(snapshot.actor.0) * 1000,
            firing_ns.saturating_sub(snapshot.collective_ns),
            snapshot.collective_ns,
            idle.input_ns.values().sum(),
            idle.credit_ns.values().sum(),
            idle.host_ns,
            idle.own_ns,
        ];
        let now = ns.map(|ns| ns / 1000);
        if self.busy.insert(snapshot.actor, now) != Some(now) {
            event.busy.push(now);
        }
        for used in &snapshot.registers {
            let mut now = vec![u64::from(used.register.0), u64::from(used.slots_held), used.published];
            now.extend(&used.released);
            if self.registers.get(&used.register) != Some(&now) {
                self.registers.insert(used.register, now.clone());
                event.registers.push(now);
            }
        }
    }
}

/// If there are too many firings, keeps only those of one step.
fn limit_firings(spec: &Spec, fired: &mut Vec<(ActorId, FiringRecord)>) {
    if fired.len() <= FIRINGS_MAX {
        return;
    }
    // The newest step may still be running, but the step before it has ended.
    let step = |(actor, record): &(ActorId, FiringRecord)| pass_of(spec, *actor, record);
    let newest = fired.iter().map(step).max().unwrap_or_default();
    let kept = fired.iter().map(step).filter(|step| *step < newest).max().unwrap_or(newest);
    fired.retain(|firing| step(firing) == kept);
    fired.sort_by_key(|(_, record)| std::cmp::Reverse(record.ended_ns));
    fired.truncate(FIRINGS_MAX);
}

/// How long an actor's state, in flight or idle, has been unchanged.
fn unchanged_ns(snapshot: &ActorSnapshot, now_ns: u64) -> u64 {
    snapshot.in_flight_since_ns.map_or(snapshot.idle_now_ns, |since| now_ns.saturating_sub(since))
}

fn add_problems(event: &mut Event, observer: &Observer, snapshots: &[ActorSnapshot]) {
    let waits_long = |s: &&ActorSnapshot| s.in_flight_since_ns.is_none() && s.idle_now_ns >= BLOCKED_NS;
    let long: Vec<&ActorSnapshot> = snapshots.iter().filter(waits_long).collect();
    // Between steps all actors wait, which is normal.
    if observer.control().is_under_way() {
        add_blocked_edges(event, &observer.plan().spec, snapshots, &long);
    }
    let truncate = |mut text: String| {
        let end = (0..=TEXT_MAX.min(text.len())).rev().find(|end| text.is_char_boundary(*end)).unwrap_or_default();
        text.truncate(end);
        text
    };
    event.incidents = observer.incidents().into_iter().map(|i| (i.at_ns / 1000, i.kind, truncate(i.text))).collect();
}

fn add_blocked_edges(event: &mut Event, spec: &Spec, snapshots: &[ActorSnapshot], long: &[&ActorSnapshot]) {
    let step = RunningStep::new(spec, snapshots);
    for snapshot in long {
        let waited_us = snapshot.idle_now_ns / 1000;
        let mut texts = Vec::new();
        for (_, missing) in step.missing(snapshot) {
            let actor = u64::from(snapshot.actor.0);
            match missing {
                Missing::Piece { register, .. } => event.blocked.push([u64::from(register.0), actor, 0, waited_us]),
                Missing::Credit { register, holders, .. } => event
                    .blocked
                    .extend(holders.iter().map(|h| [u64::from(register.0), u64::from(h.reader.actor.0), 1, waited_us])),
                Missing::Token | Missing::Turn { .. } => continue,
            }
            texts.push(missing.describe(spec, snapshot.actor));
        }
        if !texts.is_empty() && event.waits.len() < BLOCKED_MAX {
            event.waits.push((snapshot.actor.0, texts.join("; ")));
        }
    }
    event.blocked.sort_by_key(|edge| std::cmp::Reverse(edge[3]));
    event.blocked.dedup();
    event.blocked.truncate(BLOCKED_MAX);
}
