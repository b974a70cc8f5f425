//! Lowers a graph after all passes to a plan: actors, registers, launches and memory.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;

use shardflow_actors::spec::{
    ActionRef, ActionSpec, ActorId, ActorSpec, Decision, Firing, InputSpec, OutputSpec, Pieces, RegisterId,
    RegisterSpec, Spec, StreamKind,
};
use shardflow_kernels::collective::Group;
use shardflow_kernels::device::DeviceKind;

use crate::graph::{Graph, NodeId, Rate};
use crate::plan::assign::{Assignment, DeviceAction, RegisterPlan, assign};
use crate::plan::emit::{EmitContext, EmittedAction, action_name, emit, fuse_accumulation};
use crate::plan::memory::{ArenaMap, align, lay_out};
use crate::plan::slots::{in_flight, slots, stages};
use crate::plan::{ActionKey, Plan, RegisterPlace, Schedule};

pub fn stream_of(key: ActionKey) -> StreamKind {
    match key {
        ActionKey::Forward | ActionKey::Backward | ActionKey::Norm | ActionKey::Update => StreamKind::Compute,
        ActionKey::Bucket(_) => StreamKind::Communication,
        ActionKey::Feed(_) | ActionKey::Pull(_) | ActionKey::Decide | ActionKey::Fetch(_) => StreamKind::Copy,
    }
}

/// Lowers a graph on which the layout, boxing and bucket passes have run.
pub fn lower(
    graph: Graph,
    micro_batches: usize,
    schedule: Schedule,
    threads_per_device: usize,
    device: DeviceKind,
) -> Plan {
    let assignment = assign(&graph);
    let flight = in_flight(&graph, schedule, micro_batches);
    let counts = slots(&graph, &assignment, &flight, micro_batches);
    let arenas = lay_out(&graph, &assignment, &counts, graph.mesh.device_count());

    let actors = number_actors(&assignment);
    let mut groups = Groups::default();
    let fused = fuse_accumulation(&graph);
    let context = EmitContext { graph: &graph, assignment: &assignment, arenas: &arenas, fused: &fused, device };
    let emit = |(site, nodes): (&DeviceAction, &Vec<NodeId>)| {
        let stream = stream_of(site.1);
        (*site, emit(&context, *site, nodes, &mut |ranks| groups.communicator(stream, ranks)))
    };
    let emitted: BTreeMap<DeviceAction, EmittedAction> = assignment.actions.iter().map(emit).collect();

    let ArenaMap { registers: places, devices: mut memory, .. } = arenas;
    let mut spec = Spec::default();
    let mut actions = Vec::new();
    for (index, (device, stream, sites)) in actors.iter().enumerate() {
        let (mut specs, mut plans, mut scratch_bytes) = (Vec::new(), Vec::new(), 0);
        for site in sites {
            let action = &emitted[site];
            specs.push(action_spec(&assignment, *site, action, (micro_batches, schedule), &mut groups));
            scratch_bytes = scratch_bytes.max(action.scratch_bytes);
            plans.push(action.plan.clone());
        }
        let memory = &mut memory[*device];
        let start = memory.arena_bytes;
        memory.arena_bytes += align(scratch_bytes);
        memory.scratch.insert(ActorId(index as u32), (start, scratch_bytes));
        let limit =
            stages(&graph).iter().find(|p| graph.placements[**p].index_of(*device).is_some()).map_or(1, |p| flight[*p]);
        let firing = firing(sites, &specs, micro_batches, limit as usize);
        let name = format!("device {device} {}", stream_name(*stream));
        spec.actors.push(ActorSpec { name, device: *device, stream: *stream, firing, actions: specs });
        actions.push(plans);
    }
    let registers = assignment.registers.iter().zip(counts).zip(&places);
    let register = |((register, slots), place): ((&RegisterPlan, u32), &RegisterPlace)| {
        let pieces_per_step = register.rate.per_step(micro_batches) as u32;
        register_spec(&graph, &actors, register, (slots, pieces_per_step), place)
    };
    spec.registers = registers.map(register).collect();
    spec.decision = decision(&actors);
    let mut plan = Plan {
        graph,
        spec,
        actions,
        registers: places,
        memory,
        micro_batches,
        schedule,
        threads_per_device,
        device,
        memory_bytes: None,
        in_flight: flight,
    };
    plan.set_threads(threads_per_device);
    plan
}

type Actors = Vec<(usize, StreamKind, Vec<DeviceAction>)>;

/// One actor for each stream that a device uses, in order of device and stream.
fn number_actors(assignment: &Assignment) -> Actors {
    let mut actors: BTreeMap<(usize, StreamKind), Vec<DeviceAction>> = BTreeMap::new();
    for site in assignment.actions.keys() {
        actors.entry((site.0, stream_of(site.1))).or_default().push(*site);
    }
    actors.into_iter().map(|((device, stream), sites)| (device, stream, sites)).collect()
}

fn locate(actors: &Actors, site: DeviceAction) -> ActionRef {
    let stream = stream_of(site.1);
    let actor = actors.iter().position(|a| (a.0, a.1) == (site.0, stream)).expect("every site has an actor");
    let action = actors[actor].2.iter().position(|s| *s == site).expect("every site is an action of its actor");
    ActionRef { actor: ActorId(actor as u32), action: action as u32 }
}

fn stream_name(stream: StreamKind) -> &'static str {
    match stream {
        StreamKind::Compute => "compute",
        StreamKind::Communication => "communication",
        StreamKind::Copy => "copy",
    }
}

fn decision(actors: &Actors) -> Decision {
    let sites = || actors.iter().flat_map(|actor| &actor.2);
    let located = |test: fn(&ActionKey) -> bool| sites().filter(|s| test(&s.1)).map(|s| locate(actors, *s)).collect();
    Decision {
        observed: located(|key| matches!(key, ActionKey::Fetch(_))),
        granted: located(|key| matches!(key, ActionKey::Decide)),
    }
}

fn register_spec(
    graph: &Graph,
    actors: &Actors,
    register: &RegisterPlan,
    (slots, pieces_per_step): (u32, u32),
    place: &RegisterPlace,
) -> RegisterSpec {
    RegisterSpec {
        name: register_name(graph, register),
        producer: locate(actors, register.producer).actor,
        slots,
        slot_bytes: place.stride,
        pieces_per_step,
        initial: register.initial.into(),
        slot_of: Arc::default(),
        readers: register.readers.iter().map(|site| locate(actors, *site)).collect(),
    }
}

fn register_name(graph: &Graph, register: &RegisterPlan) -> String {
    let (device, key) = register.producer;
    let first = register.tensors.first().map_or("done".to_string(), |v| graph.tensor(*v).name.clone());
    let more = register.tensors.len().saturating_sub(1);
    let rest = if more > 0 { format!(" (+{more})") } else { String::new() };
    let action = if register.initial { "parameters".into() } else { action_name(graph, key) };
    format!("device {device} {action}/{first}{rest}")
}

fn rate_of(assignment: &Assignment, site: DeviceAction) -> Rate {
    match site.1 {
        ActionKey::Feed(rate) | ActionKey::Fetch(rate) => rate,
        ActionKey::Forward | ActionKey::Backward => Rate::MicroBatch,
        ActionKey::Norm | ActionKey::Decide | ActionKey::Update | ActionKey::Bucket(_) => Rate::Step,
        ActionKey::Pull(_) => {
            let output = assignment.registers.iter().find(|r| r.producer == site);
            output.map_or(Rate::MicroBatch, |r| r.rate)
        }
    }
}

/// True for actions that depend on nothing within the step: feeds, and actions that read only parameters (a transfer of
/// tied weights, or a device with an empty part of the batch). Without the host's permission, they would run ahead.
fn starts_a_step(assignment: &Assignment, site: DeviceAction, inputs: &[usize]) -> bool {
    matches!(site.1, ActionKey::Feed(_) | ActionKey::Decide) || inputs.iter().all(|r| assignment.registers[*r].initial)
}

fn action_spec(
    assignment: &Assignment,
    site: DeviceAction,
    emitted: &EmittedAction,
    (micro_batches, schedule): (usize, Schedule),
    groups: &mut Groups,
) -> ActionSpec {
    let per_step = |rate: Rate| rate.per_step(micro_batches) as u32;
    let firings = per_step(rate_of(assignment, site));
    let pieces = |register: usize| per_step(assignment.registers[register].rate);
    let inputs = emitted
        .inputs
        .iter()
        .map(|r| InputSpec { register: RegisterId(*r as u32), pieces: Pieces::Rate(firings / pieces(*r)) });
    let outputs = emitted.outputs.iter().enumerate().map(|(port, r)| OutputSpec {
        register: RegisterId(*r as u32),
        pieces: Pieces::Rate(firings / pieces(*r)),
        early: emitted.plan.signals.iter().any(|s| s.1 == port as u32),
    });
    let forward_first = schedule == Schedule::GPipe;
    let priority = match site.1 {
        ActionKey::Forward => i32::from(!forward_first),
        ActionKey::Backward => i32::from(forward_first),
        _ => 0,
    };
    let firing_groups = emitted.groups.iter().map(|ranks| groups.firing_group(site.1, ranks)).collect();
    let communicators: BTreeSet<u32> = emitted.plan.collectives().map(|call| call.group.id).collect();
    ActionSpec {
        name: emitted.plan.name.clone(),
        priority,
        per_step: firings,
        inputs: inputs.collect(),
        outputs: outputs.collect(),
        external: starts_a_step(assignment, site, &emitted.inputs),
        groups: firing_groups,
        communicators: communicators.into_iter().collect(),
    }
}

/// The order in which an actor fires. If its actions call collectives, all members of a group must fire in the same
/// order independent of timing, so the schedule is an explicit list; otherwise credits decide.
fn firing(sites: &[DeviceAction], specs: &[ActionSpec], micro_batches: usize, in_flight: usize) -> Firing {
    if specs.iter().all(|s| s.groups.is_empty()) {
        return Firing::Credit;
    }
    let index = |key: ActionKey| sites.iter().position(|s| s.1 == key).map(|i| i as u32);
    let mut list = Vec::new();
    let (forward, backward) = (index(ActionKey::Forward), index(ActionKey::Backward));
    let ahead = if backward.is_some() { in_flight.min(micro_batches) } else { micro_batches };
    list.extend((0..ahead).filter_map(|_| forward));
    for micro_batch in 0..micro_batches {
        list.extend(backward);
        if micro_batch + ahead < micro_batches {
            list.extend(forward);
        }
    }
    // Buckets, then norm and update; no action of the copy stream calls collectives.
    let others = sites.iter().enumerate().filter(|(_, s)| !matches!(s.1, ActionKey::Forward | ActionKey::Backward));
    list.extend(others.flat_map(|(i, _)| std::iter::repeat_n(i as u32, specs[i].per_step as usize)));
    Firing::Ordered(list)
}

/// Ids of communicators (by stream and ranks) and of firing groups (by action and ranks).
#[derive(Default)]
struct Groups {
    communicators: BTreeMap<(StreamKind, Vec<usize>), Arc<Group>>,
    firing_groups: BTreeMap<(ActionKey, Vec<usize>), u32>,
}

impl Groups {
    fn communicator(&mut self, stream: StreamKind, ranks: &[usize]) -> Arc<Group> {
        let id = self.communicators.len() as u32;
        let make = || Arc::new(Group { id, ranks: ranks.to_vec() });
        self.communicators.entry((stream, ranks.to_vec())).or_insert_with(make).clone()
    }

    fn firing_group(&mut self, key: ActionKey, ranks: &[usize]) -> u32 {
        let id = self.firing_groups.len() as u32;
        *self.firing_groups.entry((key, ranks.to_vec())).or_insert(id)
    }
}
