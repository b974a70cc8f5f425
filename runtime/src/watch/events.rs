//! What has happened in a session since one client of the live page was last told: one value that is sent as JSON, of a size that
//! does not grow with how much has happened.

use std::collections::HashMap;

use serde::Serialize;
use shardflow_actors::protocol::Missing;
use shardflow_actors::snapshot::ActorSnapshot;
use shardflow_actors::spec::{ActorId, RegisterId, Spec};
use shardflow_actors::trace::{Cause, FiringRecord};

use super::bubble::Bubble;
use super::status::number;
use super::under_way::UnderWay;
use crate::session::observer::{Observer, RecentSteps, SessionHealth, StepStats, pass_of};

#[cfg(test)]
mod tests;

/// Firings of one event. Where there were more, it has those of the newest step that has ended, and of these the newest.
pub(super) const FIRINGS_MAX: usize = 12_000;
/// Numbers that tell one firing.
const FIRING_FIELDS: usize = 7;
/// Waits and edges of one event.
const BLOCKED_MAX: usize = 200;
/// An edge that held an actor up for so long, with a step under way, is blocked.
const BLOCKED_NS: u64 = 1_000_000_000;
/// Texts are cut off here.
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

/// See the module. Times are since the session's start.
#[derive(Debug, Default, Serialize)]
pub(super) struct Event {
    /// As in `/plan`; empty where no session runs, and then there is nothing else.
    pub session: String,
    /// `running`, `failed`, `ended` or `none`.
    pub health: &'static str,
    pub now_us: u64,
    /// Since a firing began or ended.
    pub idle_us: u64,
    pub steps: u64,
    /// Where passes over the plan, which firings are counted in, do not follow steps one by one: the pass, and the steps done before.
    pub passes: Vec<(u64, u64)>,
    /// Steps that the program means to do in all.
    pub steps_planned: Option<u64>,
    /// Of all steps of the session.
    pub tokens: u64,
    /// The median of the newest steps.
    pub step_seconds: Option<f64>,
    pub tokens_per_second: Option<f64>,
    /// Newly done: steps done with it, loss, gradient norm, learning rate, seconds.
    pub points: Vec<Point>,
    /// Of each newly ended firing: actor, action, firing, launched (us), duration (us), what let it begin (0 input, 1 credit, 2 host,
    /// 3 itself), and of which register.
    pub firings: Vec<u64>,
    /// Firings that are not told.
    pub firings_left_out: u64,
    /// Of each actor that has worked since: the actor, then us in firings but not in collectives, us in collectives, and us that it
    /// waited for inputs, credits, the host and itself, all since the start.
    pub busy: Vec<[u64; 7]>,
    /// Of each register that changed: the register, slots held, pieces published, and pieces released by each reader.
    pub registers: Vec<Vec<u64>>,
    /// Of each device: bytes planned, at most in use so far, allocated.
    pub memory: Vec<[usize; 4]>,
    /// Measured.
    pub bubble: Option<f64>,
    /// Of each edge that holds an actor up: the register, the reader's actor, 0 where it waits for a piece and 1 where the producer waits
    /// for a slot, for how long (us).
    pub blocked: Vec<[u64; 4]>,
    /// Of each actor that waits for long: what for.
    pub waits: Vec<(u32, String)>,
    /// Of each other process: its number, and us since its last heartbeat, which are none once it has ended.
    pub peers: Vec<(u32, Option<u64>)>,
    /// The first first: when (us), what kind, what.
    pub incidents: Vec<(u64, &'static str, String)>,
}

/// Up to where one client was told.
#[derive(Debug, Default)]
pub(super) struct Cursor {
    session: u64,
    step: u64,
    /// By actor: firings read.
    read: HashMap<ActorId, u64>,
    busy: HashMap<ActorId, [u64; 7]>,
    registers: HashMap<RegisterId, Vec<u64>>,
    bubble: Option<Bubble>,
}

impl Cursor {
    /// Where no session runs.
    pub(super) fn none() -> Event {
        Event { health: "none", ..Event::default() }
    }

    /// What is new since it was last called.
    pub(super) fn next(&mut self, observer: &Observer) -> Event {
        if self.session != observer.started() {
            *self = Self { session: observer.started(), ..Self::default() };
        }
        let health = match observer.health() {
            SessionHealth::Well { .. } => "running",
            SessionHealth::Failed(_) => "failed",
            SessionHealth::Ended => "ended",
        };
        // In this order: nothing in the states is later than now.
        let (snapshots, now_ns) = (observer.snapshot(), observer.now_ns().unwrap_or_default());
        let (metrics, steps) = (observer.metrics(), observer.newest_steps());
        let idle_ns = snapshots.iter().map(|s| still_ns(s, now_ns)).min().unwrap_or_default();
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
            memory: metrics
                .devices
                .iter()
                .map(|d| [d.device, d.planned_peak_bytes, d.measured_peak_bytes, d.allocated_bytes])
                .collect(),
            peers: observer.peers().iter().map(|p| (p.process, p.silent.map(|s| s.as_micros() as u64))).collect(),
            ..Event::default()
        };
        self.points(&mut event, &steps);
        self.firings(&mut event, observer, &snapshots);
        for snapshot in &snapshots {
            self.changed(&mut event, snapshot, now_ns);
        }
        look_for_trouble(&mut event, observer, &snapshots);
        event
    }

    fn points(&mut self, event: &mut Event, steps: &RecentSteps) {
        let loss = |s: &StepStats| s.loss.map(f64::from);
        let point = |s: &StepStats| Point(s.steps, loss(s), s.gradient_norm, s.learning_rate, s.seconds);
        // A training that was rolled back counts from there again.
        let known = self.step;
        let is_new = |s: &&StepStats| s.steps > known || known > event.steps;
        event.points = steps.steps.iter().filter(is_new).map(point).collect();
        self.step = event.steps;
    }

    fn firings(&mut self, event: &mut Event, observer: &Observer, snapshots: &[ActorSnapshot]) {
        let (spec, own) = (&observer.plan().spec, observer.process_map().own());
        let bubble = self.bubble.get_or_insert_with(|| Bubble::new(spec, |device| own.contains(&device)));
        let mut fired: Vec<(ActorId, FiringRecord)> = Vec::new();
        for snapshot in snapshots {
            let from = self.read.entry(snapshot.actor).or_default();
            let is_first = *from == 0;
            let told = observer.fired(snapshot.actor, *from);
            *from = told.next;
            // What was before a client came is no loss to it.
            event.firings_left_out += if is_first { 0 } else { told.lost };
            for one in told.firings {
                bubble.add(spec, snapshot.actor, (one.action, one.firing), (one.launched_ns, one.ended_ns));
                fired.push((snapshot.actor, one));
            }
        }
        event.bubble = bubble.share();
        let all = fired.len();
        cut(spec, &mut fired);
        event.firings_left_out += (all - fired.len()) as u64;
        event.firings.reserve(fired.len() * FIRING_FIELDS);
        for (actor, one) in fired {
            let (cause, register) = match one.cause {
                Cause::Input(register) => (0, register.0),
                Cause::Credit(register) => (1, register.0),
                Cause::Host => (2, 0),
                Cause::Own => (3, 0),
            };
            let (launched, took) = (one.launched_ns / 1000, (one.ended_ns - one.launched_ns) / 1000);
            let (actor, action) = (u64::from(actor.0), u64::from(one.action));
            event.firings.extend([actor, action, one.firing, launched, took, cause, u64::from(register)]);
        }
    }

    fn changed(&mut self, event: &mut Event, snapshot: &ActorSnapshot, now_ns: u64) {
        let idle = &snapshot.idle;
        let flying_ns = snapshot.in_flight_since_ns.map_or(0, |since| now_ns.saturating_sub(since));
        let firing_ns = snapshot.busy_ns.iter().sum::<u64>() + flying_ns;
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

/// Where there are too many firings, leaves those of one step.
fn cut(spec: &Spec, fired: &mut Vec<(ActorId, FiringRecord)>) {
    if fired.len() <= FIRINGS_MAX {
        return;
    }
    // The newest step has hardly ended, the one before it has.
    let steps = |(actor, one): &(ActorId, FiringRecord)| pass_of(spec, *actor, one);
    let newest = fired.iter().map(steps).max().unwrap_or_default();
    let told = fired.iter().map(steps).filter(|step| *step < newest).max().unwrap_or(newest);
    fired.retain(|one| steps(one) == told);
    fired.sort_by_key(|(_, one)| std::cmp::Reverse(one.ended_ns));
    fired.truncate(FIRINGS_MAX);
}

/// For how long an actor has done the same: what it does, or nothing.
fn still_ns(snapshot: &ActorSnapshot, now_ns: u64) -> u64 {
    snapshot.in_flight_since_ns.map_or(snapshot.idle_now_ns, |since| now_ns.saturating_sub(since))
}

/// Edges that are blocked, who waits for what, and all that went wrong so far.
fn look_for_trouble(event: &mut Event, observer: &Observer, snapshots: &[ActorSnapshot]) {
    let waits_long = |s: &&ActorSnapshot| s.in_flight_since_ns.is_none() && s.idle_now_ns >= BLOCKED_NS;
    let long: Vec<&ActorSnapshot> = snapshots.iter().filter(waits_long).collect();
    // Between steps all actors wait, and nothing is wrong.
    if observer.is_under_way() {
        blocked(event, &observer.plan().spec, snapshots, &long);
    }
    let cut = |mut text: String| {
        let end = (0..=TEXT_MAX.min(text.len())).rev().find(|end| text.is_char_boundary(*end)).unwrap_or_default();
        text.truncate(end);
        text
    };
    event.incidents = observer.incidents().into_iter().map(|i| (i.at_ns / 1000, i.kind, cut(i.text))).collect();
}

fn blocked(event: &mut Event, spec: &Spec, snapshots: &[ActorSnapshot], long: &[&ActorSnapshot]) {
    let step = UnderWay::new(spec, snapshots);
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
