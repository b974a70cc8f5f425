//! Runs a plan's protocols in virtual time. Reports makespan, timeline, slot peaks, data races and causes of deadlocks.
//!
//! Data is symbolic: a slot holds a hash, and a firing mixes the hashes that it reads. The protocol is deterministic.
//! So all runs of one plan must end with the same digest, whatever the delays are.

use std::cmp::Reverse;
use std::collections::{BinaryHeap, HashMap};
use std::sync::Arc;

use shardflow_kernels::hash::SplitMix64;

use crate::check::{SpecError, check};
use crate::hang::{Hang, HangSnapshot, explain};
use crate::protocol::{Effect, Message, Protocol, ProtocolError, ProtocolEvent, SlotState};
use crate::snapshot::ActorSnapshot;
use crate::spec::{ActionRef, ActorId, Decision, RegisterId, RegisterSpec, Spec};

mod data;

use data::{Data, Groups};
pub use data::{DataRace, SimulatedFiring};

/// Durations in ticks. The caller chooses the length of a tick.
#[derive(Clone, Debug, Default)]
pub struct Timing {
    /// Duration of a firing, by actor and action.
    pub action_ticks: Vec<Vec<u64>>,
    /// Latency of a message between two actors; within one actor it is 0.
    pub hop_ticks: u64,
}

impl Timing {
    /// Creates a timing with the same duration for every action.
    pub fn uniform(spec: &Spec, action_ticks: u64, hop_ticks: u64) -> Self {
        let action_ticks = spec.actors.values().map(|a| vec![action_ticks; a.actions.len()]).collect();
        Self { action_ticks, hop_ticks }
    }

    /// Creates a timing from measured durations, by actor and action. The latency is 0. Measured durations include
    /// waits for late members of a collective. The simulator adds these waits itself, so actions of one group and name
    /// all get the shortest of their durations.
    pub fn measured(spec: &Spec, mut action_ticks: Vec<Vec<u64>>) -> Self {
        let mut least: HashMap<(u32, &str), u64> = HashMap::new();
        for (at, action) in spec.all_actions() {
            for group in &action.groups {
                let least = least.entry((*group, &action.name)).or_insert(u64::MAX);
                *least = action_ticks[at.actor.0 as usize][at.action as usize].min(*least);
            }
        }
        for (at, action) in spec.all_actions() {
            let ticks = &mut action_ticks[at.actor.0 as usize][at.action as usize];
            let of_groups = action.groups.iter().map(|group| least[&(*group, action.name.as_str())]);
            *ticks = of_groups.fold(*ticks, u64::min);
        }
        Self { action_ticks, ..Self::default() }
    }
}

/// Random delays, from a seed.
#[derive(Clone, Copy, Debug)]
pub struct Jitter {
    /// Runs with the same seed are equal.
    pub seed: u64,
    /// Maximum delay added to each firing.
    pub action_ticks_max: u64,
    /// Maximum delay added to each message; messages between the same two actors keep their order.
    pub hop_ticks_max: u64,
}

/// Options of a run.
#[derive(Clone, Debug, Default)]
pub struct SimulationOptions {
    /// Number of steps; each action fires `per_step` times per step.
    pub steps: u32,
    /// Random delays and tie-breaking. Without jitter, the run is exact: all messages of a tick arrive before firings
    /// are chosen.
    pub jitter: Option<Jitter>,
    /// A fault to inject, for tests of the checks themselves.
    #[cfg(test)]
    pub(crate) fault: Option<tests::Fault>,
}

impl SimulationOptions {
    /// Creates the options of an exact run with all the tokens that `steps` steps need.
    pub fn steps(steps: u32) -> Self {
        Self { steps, ..Self::default() }
    }
}

/// The result of a completed run.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct SimulatedRun {
    /// Tick at which the last firing ended.
    pub makespan: u64,
    /// All firings, ordered by end.
    pub timeline: Vec<SimulatedFiring>,
    /// Maximum number of slots held at the same time, by register.
    pub slots_peak: Vec<u32>,
    /// Hash of all data. It does not depend on timing.
    pub digest: u64,
}

/// Why a run did not complete.
#[derive(Clone, Debug, thiserror::Error, PartialEq, Eq)]
#[allow(missing_docs, reason = "the texts describe variants and fields")]
pub enum SimulationError {
    #[error(transparent)]
    Spec(#[from] SpecError),
    #[error(transparent)]
    Protocol(#[from] ProtocolError),
    /// No action can fire, although work is left.
    #[error("{0}")]
    Stuck(Box<Hang>),
    /// CR-6: a message was lost, duplicated or invented.
    #[error(
        "register '{register}': a message from or to reader {reader} was lost, duplicated or invented (CR-6): {numbers}"
    )]
    Conservation { register: String, reader: String, numbers: String },
    #[error(transparent)]
    Race(#[from] DataRace),
}

struct Simulator<'a> {
    spec: &'a Arc<Spec>,
    timing: &'a Timing,
    options: &'a SimulationOptions,
    rng: Option<SplitMix64>,
    now: u64,
    /// The pending arrivals, as `(tick, tie, index in arrivals)`. `tie` orders the arrivals of one tick.
    queue: BinaryHeap<Reverse<(u64, u64, usize)>>,
    arrivals: Vec<(ActorId, ProtocolEvent)>,
    /// Tick of the last delivery between two actors; later messages must not overtake it.
    last_delivery: HashMap<(ActorId, ActorId), u64>,
    protocols: Vec<Protocol>,
    flights: Vec<Option<SimulatedFiring>>,
    groups: Groups,
    data: Data,
    timeline: Vec<SimulatedFiring>,
    /// Number of steps for which the host has decided.
    decided: u32,
    #[cfg(test)]
    sent: u64,
}

/// Runs `options.steps` steps of a plan.
///
/// # Panics
/// Panics if `timing.action_ticks` has no entry for an action.
pub fn simulate(
    spec: &Arc<Spec>,
    timing: &Timing,
    options: &SimulationOptions,
) -> Result<SimulatedRun, SimulationError> {
    check(spec)?;
    if !spec.is_whole() {
        return Err(SpecError::Part.into());
    }
    let actors = spec.actors.ids();
    #[cfg(not(test))]
    let protocols = actors.map(|actor| Protocol::new(spec, actor));
    #[cfg(test)]
    let protocols = actors.map(|actor| tests::protocol(spec, actor, options.fault));
    let mut simulator = Simulator {
        spec,
        timing,
        options,
        rng: options.jitter.map(|j| SplitMix64(j.seed)),
        now: 0,
        queue: BinaryHeap::new(),
        arrivals: Vec::new(),
        last_delivery: HashMap::new(),
        flights: vec![None; spec.actors.len()],
        groups: Groups::new(spec),
        data: Data::new(spec),
        timeline: Vec::new(),
        decided: 0,
        protocols: protocols.collect(),
        #[cfg(test)]
        sent: 0,
    };
    simulator.start()?;
    simulator.run()?;
    simulator.finish()
}

impl Simulator<'_> {
    fn start(&mut self) -> Result<(), SimulationError> {
        let (spec, steps) = (self.spec, self.options.steps);
        for (at, action) in spec.all_actions().filter(|(_, action)| action.external) {
            // The host's decision adds the tokens of `granted` actions after the observed actions have fired.
            if !spec.decision.granted.contains(&at) {
                let count = action.per_step * steps;
                #[cfg(test)]
                let count = tests::tokens(count, self.options.fault);
                self.apply(at.actor, ProtocolEvent::Token { action: at.action, count })?;
            }
        }
        // The list of touched actors is not needed, because all actors fire below.
        self.decide(&mut Vec::new())?;
        for actor in 0..self.spec.actors.len() as u32 {
            self.apply(ActorId(actor), ProtocolEvent::Start)?;
            self.fire(ActorId(actor))?;
        }
        Ok(())
    }

    fn run(&mut self) -> Result<(), SimulationError> {
        let mut touched = Vec::new();
        while let Some(Reverse((tick, _, index))) = self.queue.pop() {
            self.now = tick;
            let (actor, event) = self.arrivals[index];
            self.arrive(actor, event)?;
            touched.push(actor);
            self.decide(&mut touched)?;
            // An exact run processes all arrivals of a tick before it fires, so that priorities decide.
            let more = self.queue.peek().is_some_and(|Reverse((next, ..))| *next == tick);
            if self.rng.is_some() || !more {
                for actor in touched.drain(..) {
                    self.fire(actor)?;
                }
            }
        }
        Ok(())
    }

    /// Adds the decision's tokens for each step in which all observed actions have fired.
    fn decide(&mut self, touched: &mut Vec<ActorId>) -> Result<(), SimulationError> {
        let spec = self.spec;
        let Decision { observed, granted } = &spec.decision;
        let per_step = |at: &ActionRef| spec.action(at.actor, at.action).per_step;
        let ended = |this: &Self, at: &ActionRef| this.protocols[at.actor.0 as usize].completed(at.action);
        while self.decided < self.options.steps
            && observed.iter().all(|at| ended(self, at) >= u64::from(self.decided + 1) * u64::from(per_step(at)))
        {
            self.decided += 1;
            for at in granted {
                self.apply(at.actor, ProtocolEvent::Token { action: at.action, count: per_step(at) })?;
                touched.push(at.actor);
            }
        }
        Ok(())
    }

    fn explain_hang(&self) -> Option<Hang> {
        let snapshots: Vec<_> = self.protocols.iter().map(ActorSnapshot::of).collect();
        let snapshot = HangSnapshot { is_acyclic: false, ..HangSnapshot::of_one_process(self.spec, &snapshots) };
        explain(snapshot, u64::from(self.options.steps))
    }

    fn finish(self) -> Result<SimulatedRun, SimulationError> {
        if let Some(hang) = self.explain_hang() {
            return Err(SimulationError::Stuck(Box::new(hang)));
        }
        self.spec.registers.ids().try_for_each(|register| self.check_conservation(register, true))?;
        let peak = |(id, register): (RegisterId, &RegisterSpec)| {
            self.protocols[register.producer.0 as usize].slots(id).map_or(0, |slots| slots.peak)
        };
        let slots_peak = self.spec.registers.iter().map(peak).collect();
        // Releases may still be in transit after the last firing.
        let makespan = self.timeline.last().map_or(0, |f| f.end);
        Ok(SimulatedRun { makespan, timeline: self.timeline, slots_peak, digest: self.data.digest() })
    }

    fn arrive(&mut self, actor: ActorId, event: ProtocolEvent) -> Result<(), SimulationError> {
        let protocol = &self.protocols[actor.0 as usize];
        let mut touched = Vec::new();
        match event {
            ProtocolEvent::Message(Message::Filled { register, .. } | Message::Released { register, .. }) => {
                touched.push(register);
            }
            ProtocolEvent::Signal { output, .. } => {
                let flight = self.flights[actor.0 as usize].expect("a signal precedes the end of its firing");
                self.data.write(self.spec, protocol, flight, output as usize);
            }
            ProtocolEvent::Done { action } => {
                let flight = self.flights[actor.0 as usize].take().expect("a firing ends once");
                self.data.end(self.spec, protocol, flight)?;
                self.timeline.push(SimulatedFiring { end: self.now, ..flight });
                let ports = self.spec.action(actor, action);
                touched.extend(ports.inputs.iter().map(|i| i.register).chain(ports.outputs.iter().map(|o| o.register)));
            }
            ProtocolEvent::Start | ProtocolEvent::Token { .. } => {}
        }
        self.apply(actor, event)?;
        touched.into_iter().try_for_each(|register| self.check_conservation(register, false))
    }

    fn apply(&mut self, actor: ActorId, event: ProtocolEvent) -> Result<(), SimulationError> {
        let mut effects = Vec::new();
        self.protocols[actor.0 as usize].apply(event, &mut effects)?;
        self.perform(actor, &effects)
    }

    fn fire(&mut self, actor: ActorId) -> Result<(), SimulationError> {
        let mut effects = Vec::new();
        self.protocols[actor.0 as usize].fire(&mut effects);
        self.perform(actor, &effects)?;
        Ok(self.protocols[actor.0 as usize].check()?)
    }

    fn perform(&mut self, actor: ActorId, effects: &[Effect]) -> Result<(), SimulationError> {
        for effect in effects {
            match *effect {
                Effect::Launch { action, firing } => self.launch(actor, action, firing)?,
                Effect::Send { to, message } => self.post(actor, to, message),
            }
        }
        Ok(())
    }

    fn launch(&mut self, actor: ActorId, action: u32, firing: u64) -> Result<(), SimulationError> {
        let fired = SimulatedFiring { actor, action, firing, start: self.now, end: self.now };
        self.flights[actor.0 as usize] = Some(fired);
        let protocol = &self.protocols[actor.0 as usize];
        let read = self.data.launch(self.spec, protocol, fired)?;
        for (member, shared) in self.groups.join(self.spec, actor, action, read) {
            let flight = self.flights[member.0 as usize].expect("a waiting member has a firing in flight");
            self.start_kernels(member, flight.action, flight.firing, shared);
        }
        Ok(())
    }

    /// Starts the kernels of a firing: computes its value and schedules its end.
    fn start_kernels(&mut self, actor: ActorId, action: u32, firing: u64, shared: u64) {
        #[cfg(test)]
        if self.options.fault == Some(tests::Fault::Hang(ActionRef { actor, action }, firing)) {
            return;
        }
        self.data.compute(actor, shared);
        let random = self.options.jitter.map_or(0, |j| j.action_ticks_max);
        let ticks = self.timing.action_ticks[actor.0 as usize][action as usize] + self.random(random);
        let outputs = &self.spec.action(actor, action).outputs;
        let early: Vec<u32> = (0..outputs.len() as u32).filter(|&o| outputs[o as usize].early).collect();
        // The signals of early outputs are spread evenly over the firing's duration.
        for (n, &output) in early.iter().enumerate() {
            let protocol = &self.protocols[actor.0 as usize];
            if protocol.completes(action, output as usize, firing) {
                let tick = self.now + ticks * (n as u64 + 1) / (early.len() as u64 + 1);
                self.schedule(tick, 0, actor, ProtocolEvent::Signal { action, output });
            }
        }
        self.schedule(self.now + ticks, u64::MAX, actor, ProtocolEvent::Done { action });
    }

    fn post(&mut self, from: ActorId, to: ActorId, message: Message) {
        #[cfg(test)]
        if let Some(fault) = self.options.fault {
            let nth = self.sent;
            self.sent += 1;
            for message in fault.apply(self.spec, nth, message) {
                self.send(from, to, message);
            }
            return;
        }
        self.send(from, to, message);
    }

    fn send(&mut self, from: ActorId, to: ActorId, message: Message) {
        let random = self.options.jitter.map_or(0, |j| j.hop_ticks_max);
        let mut tick = self.now + self.timing.hop_ticks + self.random(random);
        let tie = self.rng.as_mut().map_or(1, |rng| rng.below(u64::MAX - 2) + 1);
        if let Some(&last) = self.last_delivery.get(&(from, to)) {
            // If ties are broken at random, messages between the same two actors must not share a tick.
            tick = tick.max(last + u64::from(self.rng.is_some()));
        }
        self.last_delivery.insert((from, to), tick);
        self.schedule(tick, tie, to, ProtocolEvent::Message(message));
    }

    fn schedule(&mut self, tick: u64, tie: u64, actor: ActorId, event: ProtocolEvent) {
        self.queue.push(Reverse((tick, tie, self.arrivals.len())));
        self.arrivals.push((actor, event));
    }

    fn random(&mut self, max: u64) -> u64 {
        self.rng.as_mut().map_or(0, |rng| rng.below(max + 1))
    }

    /// Checks CR-6 for one register. If `settled` is set, also checks that no message is in transit.
    fn check_conservation(&self, id: RegisterId, settled: bool) -> Result<(), SimulationError> {
        let register = self.spec.register(id);
        let Some(slots) = self.protocols[register.producer.0 as usize].slots(id) else { return Ok(()) };
        let credited: Vec<u64> = slots.released().collect();
        for (index, reader) in register.readers.iter().enumerate() {
            let actor = self.spec.actor(reader.actor);
            let inputs = &actor.actions[reader.action as usize].inputs;
            let Some(port) = inputs.iter().position(|i| i.register == id) else { continue };
            let protocol = &self.protocols[reader.actor.0 as usize];
            let (filled, released) = protocol.input_pieces(reader.action, port);
            let (credited, published) = (credited[index], slots.published_to(index));
            let in_order = credited <= released && released <= filled && filled <= published;
            let at_rest = credited == released && filled == published;
            // The producer must not free a slot that the reader still holds.
            let is_filled = |(slot, piece): (u32, u64)| {
                let state = slots.states()[slot as usize];
                matches!(state, SlotState::Filled { piece: held, .. } if held == piece) && slots.is_left(slot, index)
            };
            let mut held = protocol.input_held(reader.action, port);
            if !in_order || (settled && !at_rest) || !held.all(is_filled) {
                let numbers = format!(
                    "{published} pieces published, {filled} received, {released} released by the reader, {credited} \
                     releases received by the producer"
                );
                let reader = self.spec.action_name(reader.actor, reader.action);
                return Err(SimulationError::Conservation { register: register.name.clone(), reader, numbers });
            }
        }
        Ok(())
    }
}

#[cfg(test)]
mod mutants;
#[cfg(test)]
pub(crate) mod plans;
#[cfg(test)]
pub(crate) mod random;
#[cfg(test)]
pub(crate) mod tests;
