//! The constant part of a running plan, for the live page.

use serde_json::{Value, json};
use shardflow_actors::label::Label;
use shardflow_actors::spec::{ActionRef, ActionSpec, ActorId, ActorSpec, RegisterId, RegisterSpec, StreamKind};

use crate::session::observer::{Observer, PeerState};
use crate::trace::category;

/// The actors and registers that this process knows, in the order of their ids: those of this process, and those of
/// other processes that share a register with an actor of this process.
pub(super) fn shape(observer: &Observer) -> Value {
    let (plan, process_map) = (observer.plan(), observer.process_map());
    let action = |action: &ActionSpec| {
        let Label { role, chunk, program } = &action.label;
        json!({
            "name": action.name, "category": category(*role), "per_step": action.per_step,
            "role": role.name(), "chunk": chunk, "program": &**program,
        })
    };
    let actor = |(id, actor): (ActorId, &ActorSpec)| {
        json!({
            "id": id.0,
            "name": actor.name,
            "device": actor.device,
            "is_compute": actor.stream == StreamKind::Compute,
            "is_here": process_map.own().contains(&actor.device),
            "actions": actor.actions.iter().map(action).collect::<Value>(),
        })
    };
    let reader = |id: RegisterId, at: &ActionRef| {
        let action = plan.spec.action(at.actor, at.action);
        let input = action.inputs.iter().find(|input| input.register == id);
        let pieces_per_step = input.map_or(0, |input| input.pieces.finished(action.per_step.into()));
        let transport = observer.transport(id, at.actor);
        json!({ "actor": at.actor.0, "pieces_per_step": pieces_per_step, "transport": transport })
    };
    let register = |(id, register): (RegisterId, &RegisterSpec)| {
        let readers = register.readers.iter().filter(|at| plan.spec.actors.get(at.actor).is_some());
        json!({
            "id": id.0,
            "name": register.name,
            "producer": register.producer.0,
            "slots": register.slots,
            "slot_bytes": register.slot_bytes,
            "readers": readers.map(|at| reader(id, at)).collect::<Value>(),
        })
    };
    // First device of a process, and the number of its devices.
    let devices = |process: u32| {
        let range = process_map.devices_of(process);
        [range.start, range.len()]
    };
    let peer = |PeerState { process, host, pid, is_on_this_node, .. }| {
        let devices = devices(process);
        json!({ "process": process, "devices": devices, "host": host, "pid": pid, "is_on_this_node": is_on_this_node })
    };
    json!({
        // Send the id as text, because a JavaScript number cannot hold it.
        "session": observer.started.to_string(),
        "mesh": plan.graph.mesh().to_string(),
        "device": plan.device.to_string(),
        "schedule": plan.schedule.to_string(),
        "micro_batches": plan.micro_batches,
        "process": process_map.process,
        "processes": process_map.processes,
        "devices": devices(process_map.process),
        "peers": observer.peers().into_iter().map(peer).collect::<Value>(),
        "actors": plan.spec.actors.iter().map(actor).collect::<Value>(),
        "registers": plan.spec.registers.iter().map(register).collect::<Value>(),
    })
}
