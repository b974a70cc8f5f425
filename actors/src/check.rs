//! Checks the consistency of a plan: ids, writers, readers, tables, slots and lists. `simulate` checks for deadlocks.

use std::collections::HashSet;

use crate::spec::{
    ActionRef, ActionSpec, ActorId, ActorSpec, Firing, InputSpec, Pieces, RegisterId, RegisterSpec, Spec,
};
use crate::table::{Id, Table};

mod error;
mod tables;

pub use error::{PERIOD_STEPS_MAX, SpecError};

/// Checks a plan's structure and returns the first inconsistency. [`crate::protocol::Protocol`] relies on this check.
pub fn check(spec: &Spec) -> Result<(), SpecError> {
    spec.registers.ids().try_for_each(|register| check_register(spec, register))?;
    spec.actors.ids().try_for_each(|actor| check_actor(spec, actor))?;
    check_decision(spec)?;
    spec.registers.ids().try_for_each(|register| tables::check(spec, register))?;
    let steps = spec.period_steps();
    if steps > PERIOD_STEPS_MAX {
        return Err(SpecError::Period { steps });
    }
    // A part of a plan does not show whether host tokens limit the firings of other processes' actors.
    if spec.is_whole() { check_bounded(spec) } else { Ok(()) }
}

fn check_register(spec: &Spec, id: RegisterId) -> Result<(), SpecError> {
    let register = spec.register(id);
    let at = || format!("register '{}'", register.name);
    for (count, is_zero) in [("slots", register.slots == 0), ("pieces_per_step", register.pieces_per_step == 0)] {
        if is_zero {
            return Err(SpecError::Zero { at: at(), count });
        }
    }
    let producer = known(&spec.actors, register.producer, "actor", &at())?;
    let (mut actions, mut ports) = (0, 0);
    for (index, action) in (0..).zip(&producer.actions) {
        let own = action.outputs.iter().filter(|output| output.register == id).count();
        if own > 1 {
            let (register, by) = (register.name.clone(), spec.action_name(register.producer, index));
            return Err(SpecError::Writers { register, by, writers: own, expected: "at most 1" });
        }
        (actions, ports) = (actions + own.min(1), ports + own);
    }
    let (name, actor) = (|| register.name.clone(), || producer.name.clone());
    if ports == 0 {
        let by = format!("actor {}", actor());
        return Err(SpecError::Writers { register: name(), by, writers: 0, expected: "at least 1" });
    }
    if actions > 1 && producer.firing == Firing::Credit {
        return Err(SpecError::Unordered { register: name(), producer: actor(), writers: actions });
    }
    for reader in &register.readers {
        if spec.actors.has_id(reader.actor) && spec.actors.get(reader.actor).is_none() {
            // This part of the plan lacks the reader.
            continue;
        }
        let actor = known(&spec.actors, reader.actor, "actor", &at())?;
        known_action(actor, reader.action, &at())?;
        check_reader(spec, id, *reader)?;
    }
    check_slots(register)
}

/// Checks that slot table entries are valid slots, that each slot has a piece, and that no initial pieces share a slot.
fn check_slots(register: &RegisterSpec) -> Result<(), SpecError> {
    let name = || register.name.clone();
    if let Some(slot) = register.slot_of.iter().find(|slot| **slot >= register.slots) {
        let at = format!("register '{}'", register.name);
        return Err(SpecError::UnknownIndex { at, kind: "slot", index: *slot as usize });
    }
    if !register.slot_of.is_empty() {
        let used: HashSet<u32> = register.slot_of.iter().copied().collect();
        if let Some(slot) = (0..register.slots).find(|slot| !used.contains(slot)) {
            return Err(SpecError::UnusedSlot { register: name(), slot });
        }
    }
    let mut holds: Vec<Option<u64>> = vec![None; register.slots as usize];
    for second in 0..u64::from(register.initial) {
        let slot = register.slot(second);
        if let Some(first) = holds[slot as usize].replace(second) {
            return Err(SpecError::InitialSlots { register: name(), first, second, slot });
        }
    }
    Ok(())
}

fn check_actor(spec: &Spec, id: ActorId) -> Result<(), SpecError> {
    let actor = spec.actor(id);
    for (index, action) in (0..).zip(&actor.actions) {
        let name = spec.action_name(id, index);
        if action.per_step == 0 {
            return Err(SpecError::Zero { at: name, count: "per_step" });
        }
        for input in &action.inputs {
            let register = known(&spec.registers, input.register, "register", &name)?;
            check_pieces(&name, register, action.per_step, &input.pieces, "reads")?;
            check_reader(spec, input.register, ActionRef { actor: id, action: index })?;
        }
        for output in &action.outputs {
            let register = known(&spec.registers, output.register, "register", &name)?;
            if register.producer != id {
                let producer = spec.actor(register.producer).name.clone();
                return Err(SpecError::ForeignWriter { register: register.name.clone(), action: name, producer });
            }
            check_pieces(&name, register, action.per_step, &output.pieces, "writes")?;
        }
        check_accumulation(spec, &name, action)?;
    }
    let Firing::Ordered(list) = &actor.firing else { return Ok(()) };
    list.iter().try_for_each(|&action| known_action(actor, action, &actor.name))?;
    for (index, action) in (0..).zip(&actor.actions) {
        let listed = list.iter().filter(|&&a| a == index).count() as u32;
        if listed != action.per_step {
            let (action, per_step) = (spec.action_name(id, index), action.per_step);
            return Err(SpecError::Ordered { action, listed, per_step });
        }
    }
    Ok(())
}

/// A firing has one `repeat` flag for its whole program: all accumulating outputs add to their slots, or all overwrite
/// them. So an action's accumulating outputs must begin their pieces in the same firings.
fn check_accumulation(spec: &Spec, name: &str, action: &ActionSpec) -> Result<(), SpecError> {
    let mut accumulating = action.outputs.iter().filter(|output| output.pieces.accumulates());
    let Some(one) = accumulating.next() else { return Ok(()) };
    for other in accumulating {
        let firsts =
            (0..action.per_step).map(|firing| (one.pieces.access(firing).first, other.pieces.access(firing).first));
        if let Some((firing, (begins, _))) = (0..).zip(firsts).find(|(_, (one, other))| one != other) {
            let (added, begun) = if begins { (other, one) } else { (one, other) };
            let [added, begun] = [added, begun].map(|output| spec.register_name(output.register));
            return Err(SpecError::Accumulation { action: name.into(), firing, added, begun });
        }
    }
    Ok(())
}

/// Returns the value of an id. An error names `at`, the place in the plan that contains the id.
fn known<'a, K: Id, T>(table: &'a Table<K, T>, id: K, kind: &'static str, at: &str) -> Result<&'a T, SpecError> {
    table.get(id).ok_or_else(|| SpecError::UnknownIndex { at: at.into(), kind, index: id.number() as usize })
}

/// Checks that an actor has the action. An error names `at`, the place in the plan that contains the index.
fn known_action(actor: &ActorSpec, action: u32, at: &str) -> Result<(), SpecError> {
    let index = action as usize;
    let unknown = || SpecError::UnknownIndex { at: at.into(), kind: "action", index };
    actor.actions.get(index).map(drop).ok_or_else(unknown)
}

/// Checks that a register lists a reader exactly once, and that the reader has exactly one input port for the register.
fn check_reader(spec: &Spec, id: RegisterId, reader: ActionRef) -> Result<(), SpecError> {
    let register = spec.register(id);
    let listed = register.readers.iter().filter(|r| **r == reader).count();
    let ports = spec.action(reader.actor, reader.action).inputs.iter().filter(|i| i.register == id).count();
    if (listed, ports) == (1, 1) {
        return Ok(());
    }
    let action = spec.action_name(reader.actor, reader.action);
    Err(SpecError::Readers { register: register.name.clone(), action, listed, ports })
}

/// Checks one port: its rate, or its table's length and entries, must fit the firings and pieces of a step.
fn check_pieces(
    action: &str,
    register: &RegisterSpec,
    per_step: u32,
    pieces: &Pieces,
    does: &'static str,
) -> Result<(), SpecError> {
    let (name, expected) = (|| register.name.clone(), register.pieces_per_step);
    match pieces {
        Pieces::Rate(0) => {
            Err(SpecError::Zero { at: format!("{action}, '{}'", register.name), count: "firings_per_piece" })
        }
        &Pieces::Rate(firings_per_piece) => {
            if !per_step.is_multiple_of(firings_per_piece) {
                let (action, register) = (action.into(), name());
                return Err(SpecError::Remainder { action, register, per_step, firings_per_piece });
            }
            let got = per_step / firings_per_piece;
            if got != expected {
                return Err(SpecError::Rates { register: name(), expected, action: action.into(), does, got });
            }
            Ok(())
        }
        Pieces::Table(table) => {
            if table.len() != per_step as usize {
                let (action, register, entries) = (action.into(), name(), table.len());
                return Err(SpecError::TableLength { action, register, per_step, entries });
            }
            if let Some((firing, access)) = (0..).zip(&**table).find(|(_, access)| access.piece >= expected) {
                let (action, register, piece) = (action.into(), name(), access.piece);
                return Err(SpecError::PieceRange { action, register, firing, piece, pieces_per_step: expected });
            }
            Ok(())
        }
    }
}

fn check_decision(spec: &Spec) -> Result<(), SpecError> {
    for at in spec.decision.observed.iter().chain(&spec.decision.granted) {
        let actor = known(&spec.actors, at.actor, "actor", "the decision")?;
        known_action(actor, at.action, &format!("the decision, {}", actor.name))?;
    }
    Ok(())
}

/// Checks that host tokens limit the firings of every action. An action is bounded if it is external or if a bounded
/// action writes one of its inputs.
fn check_bounded(spec: &Spec) -> Result<(), SpecError> {
    let is_external = |(_, action): &(ActionRef, &ActionSpec)| action.external;
    let mut bounded: HashSet<ActionRef> = spec.all_actions().filter(is_external).map(|(at, _)| at).collect();
    // All writers of a register share an ordered list. Once one writer is bounded, the list bounds all writers.
    let writers = spec.registers.map(|(register, of)| -> Vec<ActionRef> {
        spec.writers(register).map(|(action, _)| ActionRef { actor: of.producer, action }).collect()
    });
    // Each pass adds at least one bounded action. The loop ends after a pass that adds none.
    loop {
        let before = bounded.len();
        for (at, action) in spec.all_actions() {
            let follows = |i: &InputSpec| writers[i.register].iter().any(|w| bounded.contains(w));
            if action.inputs.iter().any(follows) {
                bounded.insert(at);
            }
        }
        if bounded.len() == before {
            break;
        }
    }
    match spec.all_actions().find(|(at, _)| !bounded.contains(at)) {
        Some((at, _)) => Err(SpecError::Unbounded { action: spec.action_name(at.actor, at.action) }),
        None => Ok(()),
    }
}

#[cfg(test)]
mod tests;
