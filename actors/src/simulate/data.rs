//! The data of a simulation: hashes in slots, and groups whose members mix each other's hashes.

use std::collections::{BTreeMap, HashMap};

use shardflow_kernels::hash::{GOLDEN_GAMMA, mix64};

use crate::protocol::Protocol;
use crate::spec::{ActorId, RegisterId, Spec};

/// Mixes a value into a hash. The result depends on the order of the arguments.
fn mix(hash: u64, value: u64) -> u64 {
    mix64(hash.rotate_left(5) ^ mix64(value.wrapping_add(GOLDEN_GAMMA)))
}

/// Content of a slot while a firing writes it.
const UNWRITTEN: u64 = 0;

/// One firing.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct SimulatedFiring {
    /// The actor.
    pub actor: ActorId,
    /// Index of the action.
    pub action: u32,
    /// Number of the firing, counted from 0 over all steps.
    pub firing: u64,
    /// First tick of the firing. The firing includes the wait for its groups.
    pub start: u64,
    /// The tick after the firing's last tick.
    pub end: u64,
}

/// A violation of CR-7: a firing's input changed, or the input was not written.
#[derive(Clone, Debug, thiserror::Error, PartialEq, Eq)]
#[error("{action}, firing {firing}: its input slot of register '{register}' {fault} (CR-7)")]
pub struct DataRace {
    action: String,
    firing: u64,
    register: String,
    fault: &'static str,
}

pub(super) struct Data {
    /// Hashes by register and slot.
    slots: Vec<Vec<u64>>,
    flights: Vec<Flight>,
    /// Hash of the values of all firings, by actor and action.
    history: Vec<Vec<u64>>,
}

#[derive(Clone, Default)]
struct Flight {
    /// By input port: the slot's hash at launch.
    reads: Vec<u64>,
    /// By output port: the slot's previous hash, if the firing accumulates or updates in place.
    before: Vec<u64>,
    value: u64,
}

impl Data {
    pub(super) fn new(spec: &Spec) -> Self {
        let slots = spec.registers.iter().map(|(id, register)| {
            let mut slots = vec![UNWRITTEN; register.slots as usize];
            for piece in 0..u64::from(register.initial) {
                slots[register.slot(piece) as usize] = mix(1 + piece, u64::from(id.0));
            }
            slots
        });
        let history = spec.actors.values().map(|a| vec![0; a.actions.len()]).collect();
        Self { slots: slots.collect(), flights: vec![Flight::default(); spec.actors.len()], history }
    }

    /// Reads the inputs and marks the outputs as unwritten. Returns the hash of the inputs.
    pub(super) fn launch(&mut self, spec: &Spec, protocol: &Protocol, fired: SimulatedFiring) -> Result<u64, DataRace> {
        let action = spec.action(fired.actor, fired.action);
        let flight = &mut self.flights[fired.actor.0 as usize];
        flight.reads.clear();
        flight.before.clear();
        flight.value = mix(mix(u64::from(fired.actor.0), u64::from(fired.action)), fired.firing);
        for (port, input) in action.inputs.iter().enumerate() {
            let slot = protocol.input_slot(fired.action, port, fired.firing);
            let read = self.slots[input.register.0 as usize][slot as usize];
            if read == UNWRITTEN {
                return Err(race(spec, fired, input.register, "has not been written"));
            }
            flight.reads.push(read);
            flight.value = mix(flight.value, read);
        }
        for (port, output) in action.outputs.iter().enumerate() {
            let slot = protocol.output_slot(fired.action, port, fired.firing) as usize;
            let register = spec.register(output.register);
            let in_place = register.initial > 0 && register.slots == 1;
            let kept = in_place || protocol.repeats(fired.action, port, fired.firing);
            let value = &mut self.slots[output.register.0 as usize][slot];
            flight.before.push(if kept { *value } else { UNWRITTEN });
            *value = UNWRITTEN;
        }
        Ok(flight.value)
    }

    /// Mixes the hash of the firing's groups into its value.
    pub(super) fn compute(&mut self, actor: ActorId, shared: u64) {
        let value = &mut self.flights[actor.0 as usize].value;
        *value = mix(*value, shared);
    }

    pub(super) fn write(&mut self, spec: &Spec, protocol: &Protocol, fired: SimulatedFiring, port: usize) {
        let flight = &self.flights[fired.actor.0 as usize];
        let value = mix(mix(flight.value, port as u64), flight.before[port]);
        let slot = protocol.output_slot(fired.action, port, fired.firing) as usize;
        let register = spec.action(fired.actor, fired.action).outputs[port].register;
        self.slots[register.0 as usize][slot] = value;
    }

    /// Ends a firing: checks that its inputs are unchanged (CR-7) and writes the outputs that no signal has written.
    pub(super) fn end(&mut self, spec: &Spec, protocol: &Protocol, fired: SimulatedFiring) -> Result<(), DataRace> {
        let action = spec.action(fired.actor, fired.action);
        for (port, input) in action.inputs.iter().enumerate() {
            let slot = protocol.input_slot(fired.action, port, fired.firing) as usize;
            let read = self.flights[fired.actor.0 as usize].reads[port];
            if self.slots[input.register.0 as usize][slot] != read {
                return Err(race(spec, fired, input.register, "was overwritten during the firing"));
            }
        }
        for (port, output) in action.outputs.iter().enumerate() {
            if !(output.early && protocol.completes(fired.action, port, fired.firing)) {
                self.write(spec, protocol, fired, port);
            }
        }
        let history = &mut self.history[fired.actor.0 as usize][fired.action as usize];
        *history = mix(*history, self.flights[fired.actor.0 as usize].value);
        Ok(())
    }

    pub(super) fn digest(&self) -> u64 {
        self.history.iter().flatten().fold(0, |hash, &value| mix(hash, value))
    }
}

fn race(spec: &Spec, fired: SimulatedFiring, register: RegisterId, fault: &'static str) -> DataRace {
    let (action, register) = (spec.action_name(fired.actor, fired.action), spec.register_name(register));
    DataRace { action, firing: fired.firing, register, fault }
}

/// Groups of actors. The n-th firings of a group's members run together.
pub(super) struct Groups {
    /// For each group and member: number of begun firings.
    begun: HashMap<u32, BTreeMap<ActorId, u64>>,
    /// For each group and round: the sum of the members' hashes.
    contributions: HashMap<(u32, u64), u64>,
    /// Members in flight that wait for other members, with the groups and rounds in which they wait.
    waiting: Vec<(ActorId, Vec<(u32, u64)>)>,
}

impl Groups {
    pub(super) fn new(spec: &Spec) -> Self {
        let mut begun: HashMap<u32, BTreeMap<ActorId, u64>> = HashMap::new();
        for (at, action) in spec.all_actions() {
            for group in &action.groups {
                begun.entry(*group).or_default().insert(at.actor, 0);
            }
        }
        Self { begun, contributions: HashMap::new(), waiting: Vec::new() }
    }

    /// Starts a firing with input hash `read`. Returns the actors that no longer wait, and their groups' hashes.
    pub(super) fn join(&mut self, spec: &Spec, actor: ActorId, action: u32, read: u64) -> Vec<(ActorId, u64)> {
        let mut rounds = Vec::new();
        for &group in &spec.action(actor, action).groups {
            let begun = self.begun.get_mut(&group).and_then(|members| members.get_mut(&actor));
            let begun = begun.expect("collected from the plan");
            rounds.push((group, *begun));
            // A sum does not depend on the order in which members join.
            let sum = self.contributions.entry((group, *begun)).or_default();
            *sum = sum.wrapping_add(mix(u64::from(actor.0), read));
            *begun += 1;
        }
        self.waiting.push((actor, rounds));
        let (begun, contributions) = (&self.begun, &self.contributions);
        let complete = |round: &(u32, u64)| begun[&round.0].values().all(|begun| *begun > round.1);
        let mut ready = Vec::new();
        self.waiting.retain(|(actor, rounds)| {
            let is_ready = rounds.iter().all(complete);
            if is_ready {
                ready.push((*actor, rounds.iter().fold(0, |hash, round| mix(hash, contributions[round]))));
            }
            !is_ready
        });
        ready
    }
}
