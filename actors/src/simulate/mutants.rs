//! Tests faults in the rules for tables and slots. One actor breaks a rule or runs a different plan. Each fault must
//! end a run with an error or change the run's data.

use std::collections::BTreeMap;
use std::sync::Arc;

use super::tests::{Fault, shuffled};
use super::{SimulationOptions, Timing, plans, simulate};
use crate::protocol::SlotFault;
use crate::spec::{ActionRef, ActorId, Firing, PieceAccess, Pieces, RegisterId, RegisterSpec, Spec};

/// A change of a register in the plan of one actor.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) enum Mutation {
    /// Every piece lies in the next slot.
    NextSlot,
    /// A write before the last write publishes the piece. The last write does not.
    PublishesEarly,
    /// The last write of a piece does not publish it.
    PublishesNever,
    /// The first write of a piece does not acquire its slot.
    AcquiresNever,
    /// A later write of a piece acquires its slot again.
    AcquiresTwice,
    /// Two writers of one piece change places in the list.
    WritersSwapped,
    /// Two firings exchange the pieces that they write.
    WritesSwapped,
    /// A read before the last read releases the piece. The last read does not.
    ReleasesEarly,
    /// The last read of a piece does not release it.
    ReleasesNever,
    /// Two firings exchange the pieces that they read.
    ReadsSwapped,
    /// A reader reads one of its pieces where it should read another one.
    ReadsFewer,
    /// The register has one more initial piece.
    LagsMore,
    /// The register has one fewer initial piece.
    LagsLess,
}

const ALL: [Mutation; 13] = [
    Mutation::NextSlot,
    Mutation::PublishesEarly,
    Mutation::PublishesNever,
    Mutation::AcquiresNever,
    Mutation::AcquiresTwice,
    Mutation::WritersSwapped,
    Mutation::WritesSwapped,
    Mutation::ReleasesEarly,
    Mutation::ReleasesNever,
    Mutation::ReadsSwapped,
    Mutation::ReadsFewer,
    Mutation::LagsMore,
    Mutation::LagsLess,
];

impl Mutation {
    /// True if the mutation only removes an order between two accesses. Another register or the actor's list may impose
    /// the same order, and then no run can show the mutation.
    fn is_race(self) -> bool {
        use Mutation::{AcquiresNever, LagsLess, LagsMore, PublishesEarly, WritersSwapped, WritesSwapped};
        matches!(self, AcquiresNever | LagsLess | LagsMore | PublishesEarly | WritersSwapped | WritesSwapped)
    }
}

/// Returns the changed table, or `None` if the change does not apply.
fn changed(mutation: Mutation, mut table: Vec<PieceAccess>) -> Option<Vec<PieceAccess>> {
    let position = |test: fn(&PieceAccess) -> bool| table.iter().position(test);
    match mutation {
        Mutation::PublishesEarly | Mutation::ReleasesEarly => {
            let early = position(|access| !access.last)?;
            let piece = table[early].piece;
            table.iter_mut().filter(|access| access.piece == piece).for_each(|access| access.last = false);
            table[early].last = true;
        }
        Mutation::PublishesNever | Mutation::ReleasesNever => {
            let at = position(|access| access.last)?;
            table[at].last = false;
        }
        Mutation::AcquiresNever => {
            let at = position(|access| access.first)?;
            table[at].first = false;
        }
        Mutation::AcquiresTwice => {
            let at = position(|access| !access.first)?;
            table[at].first = true;
        }
        Mutation::WritesSwapped | Mutation::ReadsSwapped => {
            let other = table.iter().position(|access| access.piece != table[0].piece)?;
            table.swap(0, other);
        }
        Mutation::ReadsFewer => {
            let other = table.iter().position(|access| access.piece != table[0].piece)?;
            table[0].piece = table[other].piece;
        }
        _ => return None,
    }
    Some(table)
}

/// Returns the plan with a changed register, or `None` if the change does not apply.
pub(crate) fn mutated(spec: &Spec, id: RegisterId, mutation: Mutation) -> Option<Spec> {
    let mut spec = spec.clone();
    let register = spec.registers[id].clone();
    let own = &mut spec.registers[id];
    let table = |pieces: &Pieces, per_step| changed(mutation, pieces.accesses(per_step).collect());
    match mutation {
        Mutation::NextSlot if own.slots > 1 => {
            let length = if own.slot_of.is_empty() { own.slots } else { own.slot_of.len() as u32 };
            own.slot_of = (0..length).map(|piece| (register.slot(piece.into()) + 1) % own.slots).collect();
        }
        Mutation::LagsMore if own.initial < own.slots => own.initial += 1,
        Mutation::LagsLess if own.initial > 0 => own.initial -= 1,
        Mutation::NextSlot | Mutation::LagsMore | Mutation::LagsLess => return None,
        Mutation::WritersSwapped => {
            let writers: Vec<u32> = spec.writers(id).map(|(action, _)| action).collect();
            let Firing::Ordered(list) = &mut spec.actors[register.producer].firing else { return None };
            let first = list.iter().position(|action| writers.contains(action))?;
            let other = list.iter().position(|action| writers.contains(action) && *action != list[first])?;
            list.swap(first, other);
        }
        Mutation::ReleasesEarly | Mutation::ReleasesNever | Mutation::ReadsSwapped | Mutation::ReadsFewer => {
            let changed = register.readers.iter().find_map(|&ActionRef { actor, action }| {
                let action = &mut spec.actors[actor].actions[action as usize];
                let input = action.inputs.iter_mut().find(|input| input.register == id)?;
                input.pieces = Pieces::Table(table(&input.pieces, action.per_step)?.into());
                Some(())
            });
            changed?;
        }
        _ => {
            let changed = spec.writers(id).collect::<Vec<_>>().into_iter().find_map(|(action, port)| {
                let action = &mut spec.actors[register.producer].actions[action as usize];
                let output = &mut action.outputs[port as usize];
                output.pieces = Pieces::Table(table(&output.pieces, action.per_step)?.into());
                Some(())
            });
            changed?;
        }
    }
    Some(spec)
}

/// The actors that produce or read a register.
fn actors(spec: &Spec, id: RegisterId) -> Vec<ActorId> {
    let register = spec.register(id);
    let mut actors: Vec<_> = register.readers.iter().map(|reader| reader.actor).chain([register.producer]).collect();
    actors.sort_unstable();
    actors.dedup();
    actors
}

/// All plans of the other tests, with their numbers of steps, and some random plans.
fn all_plans() -> Vec<(String, Arc<Spec>, u32)> {
    let mut all: Vec<_> = plans::all().into_iter().map(|(name, spec, steps)| (name.to_string(), spec, steps)).collect();
    for seed in 0..30 {
        let spec = super::random::coloured(&super::random::unlimited(seed), seed);
        all.push((format!("random {seed}"), Arc::new(spec), 4));
    }
    all
}

/// True if the fault causes an error in at least one of several runs, or changes the data of at least one run.
fn is_caught(spec: &Arc<Spec>, steps: u32, digest: u64, fault: Fault) -> bool {
    (0..36).any(|seed| {
        let options = SimulationOptions { fault: Some(fault), ..shuffled(seed, steps) };
        simulate(spec, &Timing::uniform(spec, 2, seed % 3), &options).map_or(true, |run| run.digest != digest)
    })
}

/// Enough steps to use each slot of each register twice, and at least `steps`.
fn steps_of(spec: &Spec, steps: u32) -> u32 {
    let twice = |id| {
        let register: &RegisterSpec = spec.register(id);
        (2 * register.slots + register.initial).div_ceil(register.pieces_per_step.max(1)) + 1
    };
    spec.registers.ids().map(twice).fold(steps, u32::max)
}

/// True if the mutation changes the plan of `actor`, and another actor uses the register. A register within one actor
/// has no protocol that could be violated: the actor follows the changed plan as producer and as reader.
fn has_effect(spec: &Spec, mutant: &Spec, id: RegisterId, actor: ActorId) -> bool {
    let is_changed = spec.actors[actor] != mutant.actors[actor] || spec.registers[id] != mutant.registers[id];
    is_changed && !spec.register(id).readers.is_empty() && actors(spec, id).len() > 1
}

#[test]
fn a_changed_plan_in_one_actor_is_caught() {
    let mut counts: BTreeMap<Mutation, (u32, u32)> = BTreeMap::new();
    for (name, spec, steps) in all_plans() {
        let steps = steps_of(&spec, steps);
        let digest = simulate(&spec, &Timing::uniform(&spec, 2, 1), &SimulationOptions::steps(steps)).unwrap().digest;
        for (register, mutation) in spec.registers.ids().flat_map(|id| ALL.map(|mutation| (id, mutation))) {
            let Some(mutant) = mutated(&spec, register, mutation) else { continue };
            for actor in actors(&spec, register) {
                if !has_effect(&spec, &mutant, register, actor) {
                    continue;
                }
                let fault = Fault::Plan(actor, register, mutation);
                let caught = is_caught(&spec, steps, digest, fault);
                let (tried, found) = counts.entry(mutation).or_default();
                (*tried, *found) = (*tried + 1, *found + u32::from(caught));
                assert!(caught || mutation.is_race(), "{name}: missed {fault:?} of '{}'", spec.register(register).name);
            }
        }
    }
    for mutation in ALL {
        let (tried, found) = counts.get(&mutation).copied().unwrap_or_default();
        assert!(found >= 6 && 2 * found >= tried, "{mutation:?}: only {found} of {tried} faults were caught");
    }
}

#[test]
fn a_broken_rule_for_slots_is_caught() {
    // The number of readers of one register that each fault needs. A surplus slot is a race: a list or another register
    // may keep the producer from using it.
    let faults = [SlotFault::KeepsLast, SlotFault::FreesOther, SlotFault::FreedByFirst, SlotFault::Surplus];
    for (broken, readers, is_race) in faults.into_iter().zip([1, 1, 2, 1]).map(|(f, n)| (f, n, f == SlotFault::Surplus))
    {
        let (mut tried, mut found) = (0, 0);
        for (name, spec, steps) in all_plans() {
            if spec.registers.ids().all(|id| spec.register(id).readers.len() < readers) {
                continue;
            }
            let steps = steps_of(&spec, steps);
            let options = SimulationOptions::steps(steps);
            let digest = simulate(&spec, &Timing::uniform(&spec, 2, 1), &options).unwrap().digest;
            let caught = is_caught(&spec, steps, digest, Fault::Slots(broken));
            assert!(caught || is_race, "{broken:?} in {name}");
            (tried, found) = (tried + 1, found + u32::from(caught));
        }
        assert!(found >= 10 && 2 * found >= tried, "{broken:?}: {found} of {tried} plans caught it");
    }
}
