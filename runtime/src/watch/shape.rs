//! The constant part of a running plan, for the live page.

use serde::Serialize;
use shardflow_actors::spec::{RegisterId, StreamKind};

use crate::session::observer::{Observer, PeerState};
use crate::trace::category;

#[derive(Debug, Serialize)]
pub(super) struct Shape {
    /// [`Observer::started`] as text, because a JavaScript number cannot hold it.
    session: String,
    mesh: String,
    device: String,
    schedule: String,
    micro_batches: usize,
    process: u32,
    processes: u32,
    /// First device of this process, and the number of its devices.
    devices: [usize; 2],
    peers: Vec<Peer>,
    /// In the plan's order, including actors of other processes.
    actors: Vec<Actor>,
    registers: Vec<Register>,
}

#[derive(Debug, Serialize)]
struct Peer {
    process: u32,
    devices: [usize; 2],
    host: String,
    pid: u32,
    is_on_this_node: bool,
}

#[derive(Debug, Serialize)]
struct Actor {
    name: String,
    device: usize,
    is_compute: bool,
    is_here: bool,
    actions: Vec<Action>,
}

#[derive(Debug, Serialize)]
struct Action {
    name: String,
    category: &'static str,
    per_step: u32,
}

#[derive(Debug, Serialize)]
struct Register {
    name: String,
    producer: u32,
    slots: u32,
    slot_bytes: usize,
    readers: Vec<Reader>,
}

#[derive(Debug, Serialize)]
struct Reader {
    actor: u32,
    pieces_per_step: u32,
    transport: &'static str,
}

impl Shape {
    pub(super) fn of(observer: &Observer) -> Self {
        let (plan, process_map) = (observer.plan(), observer.process_map());
        let action = |action: &shardflow_actors::spec::ActionSpec| Action {
            name: action.name.clone(),
            category: category(&action.name),
            per_step: action.per_step,
        };
        let actor = |actor: &shardflow_actors::spec::ActorSpec| Actor {
            name: actor.name.clone(),
            device: actor.device,
            is_compute: actor.stream == StreamKind::Compute,
            is_here: process_map.own().contains(&actor.device),
            actions: actor.actions.iter().map(action).collect(),
        };
        let reader = |id: RegisterId, at: &shardflow_actors::spec::RegisterReader| {
            let action = plan.action_spec(at.actor, at.action as usize);
            let input = action.inputs.iter().find(|input| input.register == id);
            Reader {
                actor: at.actor.0,
                pieces_per_step: input.map_or(0, |input| action.per_step / input.firings_per_piece),
                transport: observer.transport(id, at.actor),
            }
        };
        let register = |(id, register): (usize, &shardflow_actors::spec::RegisterSpec)| Register {
            name: register.name.clone(),
            producer: register.producer.0,
            slots: register.slots,
            slot_bytes: register.slot_bytes,
            readers: register.readers.iter().map(|at| reader(RegisterId(id as u32), at)).collect(),
        };
        let devices = |process: u32| {
            let range = process_map.devices_of(process);
            [range.start, range.len()]
        };
        let peer = |PeerState { process, host, pid, is_on_this_node, .. }| Peer {
            process,
            devices: devices(process),
            host,
            pid,
            is_on_this_node,
        };
        Self {
            session: observer.started.to_string(),
            mesh: plan.graph.mesh().to_string(),
            device: plan.device.to_string(),
            schedule: plan.schedule.to_string(),
            micro_batches: plan.micro_batches,
            process: process_map.process,
            processes: process_map.processes,
            devices: devices(process_map.process),
            peers: observer.peers().into_iter().map(peer).collect(),
            actors: plan.spec.actors.iter().map(actor).collect(),
            registers: plan.spec.registers.iter().enumerate().map(register).collect(),
        }
    }
}
