//! Checks the consistency of a plan: ids, writers, readers, rates and ordered lists. `simulate` checks for deadlocks.

use std::collections::HashSet;

use crate::spec::{ActionRef, ActionSpec, ActorId, Firing, InputSpec, RegisterId, RegisterSpec, Spec};

/// An inconsistent plan; [`check`] finds it before anything runs.
#[derive(Clone, Debug, thiserror::Error, PartialEq, Eq)]
#[allow(missing_docs, reason = "the texts describe variants and fields")]
pub enum SpecError {
    #[error("{at}: no {kind} has index {index}")]
    UnknownIndex { at: String, kind: &'static str, index: usize },
    #[error("{at}: {count} is 0, expected at least 1")]
    Zero { at: String, count: &'static str },
    #[error("register '{register}' is written by {writers} output ports of actor {producer}, expected exactly 1")]
    Writers { register: String, producer: String, writers: usize },
    #[error("register '{register}' and {action} disagree: {listed} entries in its readers, {ports} input ports")]
    Readers { register: String, action: String, listed: usize, ports: usize },
    #[error(
        "{action} fires {per_step} times per step, not a multiple of the {firings_per_piece} firings per piece of '{register}'"
    )]
    Remainder { action: String, register: String, per_step: u32, firings_per_piece: u32 },
    #[error("register '{register}': {written} pieces per step are written, but {reader} reads {read}")]
    Rates { register: String, written: u32, reader: String, read: u32 },
    #[error("{action} appears {listed} times in its actor's ordered list but fires {per_step} times per step")]
    Ordered { action: String, listed: u32, per_step: u32 },
    #[error("{action} can fire without end: it is not external and none of its inputs depends on an external action")]
    Unbounded { action: String },
    #[error("{action} accumulates over {first} firings in one output and over {second} in another")]
    Accumulation { action: String, first: u32, second: u32 },
}

/// Checks a plan's structure, up to the first inconsistency. [`crate::protocol::Protocol`] relies on this.
pub fn check(spec: &Spec) -> Result<(), SpecError> {
    for index in 0..spec.registers.len() {
        check_register(spec, RegisterId(index as u32))?;
    }
    for index in 0..spec.actors.len() {
        check_actor(spec, ActorId(index as u32))?;
    }
    check_decision(spec)?;
    check_rates(spec)?;
    check_bounded(spec)
}

fn check_register(spec: &Spec, id: RegisterId) -> Result<(), SpecError> {
    let register = spec.register(id);
    let at = format!("register '{}'", register.name);
    if register.slots == 0 {
        return Err(SpecError::Zero { at, count: "slots" });
    }
    let producer = known(&spec.actors, register.producer.0, "actor", &at)?;
    let writers = producer.actions.iter().flat_map(|a| &a.outputs).filter(|o| o.register == id).count();
    if writers != 1 {
        return Err(SpecError::Writers { register: register.name.clone(), producer: producer.name.clone(), writers });
    }
    for reader in &register.readers {
        let actor = known(&spec.actors, reader.actor.0, "actor", &at)?;
        known(&actor.actions, reader.action, "action", &at)?;
        check_reader(spec, id, *reader)?;
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
            let register = known(&spec.registers, input.register.0, "register", &name)?;
            check_pieces(&name, &register.name, action.per_step, input.firings_per_piece)?;
            check_reader(spec, input.register, ActionRef { actor: id, action: index })?;
        }
        for output in &action.outputs {
            let register = known(&spec.registers, output.register.0, "register", &name)?;
            check_pieces(&name, &register.name, action.per_step, output.firings_per_piece)?;
            if register.producer != id {
                let producer = spec.actor(register.producer).name.clone();
                return Err(SpecError::Writers { register: register.name.clone(), producer, writers: 2 });
            }
        }
        // A submission has one `repeat` flag for all outputs.
        let mut spans = action.outputs.iter().map(|o| o.firings_per_piece).filter(|&f| f > 1);
        if let Some(first) = spans.next()
            && let Some(second) = spans.find(|&f| f != first)
        {
            return Err(SpecError::Accumulation { action: name, first, second });
        }
    }
    let Firing::Ordered(list) = &actor.firing else { return Ok(()) };
    list.iter().try_for_each(|&action| known(&actor.actions, action, "action", &actor.name).map(drop))?;
    for (index, action) in (0..).zip(&actor.actions) {
        let listed = list.iter().filter(|&&a| a == index).count() as u32;
        if listed != action.per_step {
            let (action, per_step) = (spec.action_name(id, index), action.per_step);
            return Err(SpecError::Ordered { action, listed, per_step });
        }
    }
    Ok(())
}

/// The entry of a table, or an error with the place that holds its index.
fn known<'a, T>(table: &'a [T], index: u32, kind: &'static str, at: &str) -> Result<&'a T, SpecError> {
    let index = index as usize;
    table.get(index).ok_or_else(|| SpecError::UnknownIndex { at: at.into(), kind, index })
}

/// Checks that a register and its reading action list each other once.
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

fn check_pieces(action: &str, register: &str, per_step: u32, firings_per_piece: u32) -> Result<(), SpecError> {
    if firings_per_piece == 0 {
        return Err(SpecError::Zero { at: format!("{action}, '{register}'"), count: "firings_per_piece" });
    }
    if !per_step.is_multiple_of(firings_per_piece) {
        let (action, register) = (action.into(), register.into());
        return Err(SpecError::Remainder { action, register, per_step, firings_per_piece });
    }
    Ok(())
}

fn check_decision(spec: &Spec) -> Result<(), SpecError> {
    for at in spec.decision.observed.iter().chain(&spec.decision.granted) {
        let actor = known(&spec.actors, at.actor.0, "actor", "the decision")?;
        known(&actor.actions, at.action, "action", &format!("the decision, {}", actor.name))?;
    }
    Ok(())
}

/// Checks that every reader reads as many pieces per step as are written.
fn check_rates(spec: &Spec) -> Result<(), SpecError> {
    for (index, register) in spec.registers.iter().enumerate() {
        let id = RegisterId(index as u32);
        let Some((action, port)) = spec.writer(id) else { continue };
        let writer = spec.action(register.producer, action);
        let written = writer.per_step / writer.outputs[port as usize].firings_per_piece;
        for reader in &register.readers {
            let action = spec.action(reader.actor, reader.action);
            let Some(input) = action.inputs.iter().find(|i| i.register == id) else { continue };
            let read = action.per_step / input.firings_per_piece;
            if read != written {
                let reader = spec.action_name(reader.actor, reader.action);
                return Err(SpecError::Rates { register: register.name.clone(), written, reader, read });
            }
        }
    }
    Ok(())
}

/// Checks that host tokens bound every action: it is external, or a bounded action writes one of its inputs.
fn check_bounded(spec: &Spec) -> Result<(), SpecError> {
    let is_external = |(_, action): &(ActionRef, &ActionSpec)| action.external;
    let mut bounded: HashSet<ActionRef> = spec.all_actions().filter(is_external).map(|(at, _)| at).collect();
    let writer = |(register, of): (u32, &RegisterSpec)| {
        let (action, _) = spec.writer(RegisterId(register))?;
        Some(ActionRef { actor: of.producer, action })
    };
    let writers: Vec<_> = (0..).zip(&spec.registers).map(writer).collect();
    // Each pass adds at least one more action, or is the last.
    loop {
        let before = bounded.len();
        for (at, action) in spec.all_actions() {
            let follows = |i: &InputSpec| writers[i.register.0 as usize].is_some_and(|w| bounded.contains(&w));
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
mod tests {
    use super::*;
    use crate::builder::Builder;
    use crate::simulate::plans;

    type Change = fn(&mut Spec);

    fn reject(change: impl FnOnce(&mut Spec)) -> String {
        let mut spec = plans::accumulation();
        change(&mut spec);
        check(&spec).unwrap_err().to_string()
    }

    #[test]
    fn the_plans_of_all_shapes_are_valid() {
        for (name, spec, _) in plans::all() {
            assert_eq!(check(&spec), Ok(()), "{name}");
        }
    }

    #[test]
    fn inconsistent_plans_are_rejected() {
        let faults: [(&str, Change); 13] = [
            ("the decision: no actor has index 9", |s| {
                s.decision.observed.push(ActionRef { actor: ActorId(9), action: 0 });
            }),
            ("the decision, host: no action has index 9", |s| {
                s.decision.granted.push(ActionRef { actor: ActorId(0), action: 9 });
            }),
            ("register 'batch': slots is 0, expected at least 1", |s| s.registers[0].slots = 0),
            ("register 'batch': no actor has index 9", |s| s.registers[0].producer = ActorId(9)),
            ("register 'batch': no action has index 9", |s| s.registers[0].readers[0].action = 9),
            ("host feed: per_step is 0, expected at least 1", |s| s.actors[0].actions[0].per_step = 0),
            ("register 'batch': 2 pieces per step are written, but shard train reads 4", |s| {
                s.actors[0].actions[0].per_step = 2
            }),
            ("shard train fires 4 times per step, not a multiple of the 3 firings per piece of 'gradient'", |s| {
                s.actors[1].actions[0].outputs[0].firings_per_piece = 3
            }),
            ("shard train accumulates over 4 firings in one output and over 2 in another", |s| {
                s.actors[1].actions[0].outputs[1].firings_per_piece = 2
            }),
            ("shard train appears 1 times in its actor's ordered list but fires 4 times per step", |s| {
                s.actors[1].firing = Firing::Ordered(vec![0, 1])
            }),
            ("register 'batch' and shard train disagree: 2 entries in its readers, 1 input ports", |s| {
                let reader = s.registers[0].readers[0];
                s.registers[0].readers.push(reader);
            }),
            ("register 'batch' is written by 0 output ports of actor host, expected exactly 1", |s| {
                s.actors[0].actions[0].outputs.clear();
            }),
            ("register 'batch' and shard train disagree: 1 entries in its readers, 0 input ports", |s| {
                s.actors[1].actions[0].inputs[0].register = RegisterId(77);
            }),
        ];
        for (text, change) in faults {
            assert_eq!(reject(change), text);
        }
    }

    #[test]
    fn unbounded_actions_are_rejected() {
        let text =
            "host feed can fire without end: it is not external and none of its inputs depends on an external action";
        assert_eq!(reject(|s| s.actors[0].actions[0].external = false), text);
        // A cycle that starts from its own initial piece.
        let mut b = Builder::new();
        let actor = b.actor("ring", 0, Firing::Credit);
        let turn = b.action(actor, "turn", 1);
        let register = b.edge("state", 2, turn, turn);
        b.register_mut(register).initial = true;
        assert!(matches!(check(&b.build()), Err(SpecError::Unbounded { .. })));
    }
}
