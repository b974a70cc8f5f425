//! Do the parts of a plan fit together: ids, writers, readers, rates, ordered lists. That it cannot get stuck is shown by
//! `simulate`. Imports `spec` and `error`.

use crate::error::SpecError;
use crate::spec::{ActorId, Firing, RegisterId, Spec};

/// Checks a plan's structure. [`crate::protocol::Protocol`] relies on it.
///
/// # Errors
/// The first fault found.
pub fn check(spec: &Spec) -> Result<(), SpecError> {
    for index in 0..spec.registers.len() {
        register(spec, RegisterId(index as u32))?;
    }
    for index in 0..spec.actors.len() {
        actor(spec, ActorId(index as u32))?;
    }
    rates(spec)?;
    bounded(spec)
}

fn register(spec: &Spec, id: RegisterId) -> Result<(), SpecError> {
    let register = &spec.registers[id.0 as usize];
    let at = || format!("register '{}'", register.name);
    let actor = |id: ActorId| {
        let unknown = SpecError::UnknownIndex { at: at(), what: "actor", index: id.0 as usize };
        spec.actors.get(id.0 as usize).ok_or(unknown)
    };
    if register.slots == 0 {
        return Err(SpecError::Zero { at: at(), what: "slots" });
    }
    let producer = actor(register.producer)?;
    let outputs = producer.actions.iter().flat_map(|a| &a.outputs);
    let writers = outputs.filter(|o| o.register == id).count();
    if writers != 1 {
        return Err(SpecError::Writers { register: register.name.clone(), producer: producer.name.clone(), writers });
    }
    for reader in &register.readers {
        let Some(action) = actor(reader.actor)?.actions.get(reader.action as usize) else {
            return Err(SpecError::UnknownIndex { at: at(), what: "action", index: reader.action as usize });
        };
        let listed = register.readers.iter().filter(|r| *r == reader).count();
        let ports = action.inputs.iter().filter(|i| i.register == id).count();
        if (listed, ports) != (1, 1) {
            let action = spec.action_name(reader.actor, reader.action);
            return Err(SpecError::Readers { register: register.name.clone(), action, listed, ports });
        }
    }
    Ok(())
}

fn actor(spec: &Spec, id: ActorId) -> Result<(), SpecError> {
    let actor = &spec.actors[id.0 as usize];
    for (index, action) in actor.actions.iter().enumerate() {
        let name = || spec.action_name(id, index as u32);
        if action.per_step == 0 {
            return Err(SpecError::Zero { at: name(), what: "per_step" });
        }
        for input in &action.inputs {
            let register = known_register(spec, input.register, &name())?;
            pieces(&name(), &register.name, action.per_step, input.firings_per_piece)?;
            let here = |r: &&crate::spec::Reader| r.actor == id && r.action as usize == index;
            let listed = register.readers.iter().filter(here).count();
            if listed != 1 {
                let ports = action.inputs.iter().filter(|i| i.register == input.register).count();
                return Err(SpecError::Readers { register: register.name.clone(), action: name(), listed, ports });
            }
        }
        for output in &action.outputs {
            let register = known_register(spec, output.register, &name())?;
            pieces(&name(), &register.name, action.per_step, output.firings_per_piece)?;
            if register.producer != id {
                let producer = spec.actors[register.producer.0 as usize].name.clone();
                return Err(SpecError::Writers { register: register.name.clone(), producer, writers: 2 });
            }
        }
        // The kernels get one `repeat` flag for a whole submission.
        let mut spans = action.outputs.iter().map(|o| o.firings_per_piece).filter(|&f| f > 1);
        if let Some(first) = spans.next()
            && let Some(second) = spans.find(|&f| f != first)
        {
            return Err(SpecError::Accumulation { action: name(), first, second });
        }
    }
    let Firing::Ordered(list) = &actor.firing else { return Ok(()) };
    if let Some(&index) = list.iter().find(|&&a| a as usize >= actor.actions.len()) {
        return Err(SpecError::UnknownIndex { at: actor.name.clone(), what: "action", index: index as usize });
    }
    for (index, action) in actor.actions.iter().enumerate() {
        let listed = list.iter().filter(|&&a| a as usize == index).count() as u32;
        if listed != action.per_step {
            let action = spec.action_name(id, index as u32);
            return Err(SpecError::Ordered { action, listed, per_step: actor.actions[index].per_step });
        }
    }
    Ok(())
}

fn known_register<'a>(spec: &'a Spec, id: RegisterId, at: &str) -> Result<&'a crate::spec::RegisterSpec, SpecError> {
    let unknown = || SpecError::UnknownIndex { at: at.into(), what: "register", index: id.0 as usize };
    spec.registers.get(id.0 as usize).ok_or_else(unknown)
}

fn pieces(action: &str, register: &str, per_step: u32, firings_per_piece: u32) -> Result<u32, SpecError> {
    if firings_per_piece == 0 {
        return Err(SpecError::Zero { at: format!("{action}, '{register}'"), what: "firings_per_piece" });
    }
    if !per_step.is_multiple_of(firings_per_piece) {
        let (action, register) = (action.into(), register.into());
        return Err(SpecError::Remainder { action, register, per_step, firings_per_piece });
    }
    Ok(per_step / firings_per_piece)
}

/// Every reader reads in a step as many pieces as are written in it.
fn rates(spec: &Spec) -> Result<(), SpecError> {
    for (index, register) in spec.registers.iter().enumerate() {
        let id = RegisterId(index as u32);
        let Some((action, port)) = spec.writer(id) else { continue };
        let writer = &spec.actors[register.producer.0 as usize].actions[action as usize];
        let written = writer.per_step / writer.outputs[port as usize].firings_per_piece;
        for reader in &register.readers {
            let action = &spec.actors[reader.actor.0 as usize].actions[reader.action as usize];
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

/// Tokens of the host bound every action: it is external, or one of its inputs is written by a bounded action.
fn bounded(spec: &Spec) -> Result<(), SpecError> {
    let writers: Vec<_> = (0..spec.registers.len())
        .map(|r| spec.writer(RegisterId(r as u32)).map(|w| (spec.registers[r].producer.0 as usize, w.0 as usize)))
        .collect();
    let mut bounded: Vec<Vec<bool>> =
        spec.actors.iter().map(|a| a.actions.iter().map(|x| x.external).collect()).collect();
    // Each pass marks one action more or is the last.
    loop {
        let mut changed = false;
        for (a, actor) in spec.actors.iter().enumerate() {
            for (x, action) in actor.actions.iter().enumerate() {
                let follows = |i: &crate::spec::InputSpec| {
                    writers[i.register.0 as usize].is_some_and(|(actor, action)| bounded[actor][action])
                };
                if !bounded[a][x] && action.inputs.iter().any(follows) {
                    bounded[a][x] = true;
                    changed = true;
                }
            }
        }
        if !changed {
            break;
        }
    }
    for (a, actions) in bounded.iter().enumerate() {
        if let Some(x) = actions.iter().position(|b| !b) {
            return Err(SpecError::Unbounded { action: spec.action_name(ActorId(a as u32), x as u32) });
        }
    }
    Ok(())
}
