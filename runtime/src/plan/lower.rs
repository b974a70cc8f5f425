//! Lowers a graph after all passes to a plan: segments, classes of devices, lists, registers, launches and memory.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;

use shardflow_actors::label::Role;
use shardflow_actors::spec::{
    ActionRef, ActionSpec, ActorId, ActorSpec, Decision, Firing, InputSpec, OutputSpec, RegisterId, RegisterSpec, Spec,
    StreamKind,
};
use shardflow_kernels::collective::Group;
use shardflow_kernels::device::DeviceKind;

use crate::graph::{Graph, Node, NodeOp, Rate, Var};
use crate::plan::assign::{RegisterPlan, assign};
use crate::plan::classes::classify;
use crate::plan::emit::{DeviceRegister, EmitContext, EmittedAction, emit, fuse_accumulation};
use crate::plan::memory::{ArenaMap, align, lay_out, residents};
use crate::plan::schedule::work::work_graph;
use crate::plan::schedule::{Schedule, StepPlan, WorkGraph};
use crate::plan::segments::{SegmentId, Segments, divide};
use crate::plan::slots::{Slots, Times};
use crate::plan::{ActionPlan, DeviceMemory, HostTransfer, Plan, RegisterPlace};

/// Lowers a graph on which the layout, boxing and bucket passes have run.
pub fn lower(
    mut graph: Graph,
    micro_batches: usize,
    schedule: Schedule,
    threads_per_device: usize,
    device: DeviceKind,
) -> Plan {
    add_fetches(&mut graph);
    let program = if graph.objective.is_some() { "train" } else { "evaluate" };
    let segments = divide(&graph, &program.into());
    let classes = classify(&graph);
    let assignment = assign(&graph, &segments, &classes);
    let (work, site_of) = work_graph(&graph, &segments, micro_batches);
    let step = schedule.plan(&work);
    let times = Times::of(&segments, &work, &step);
    let slots: Vec<Vec<Slots>> = assignment.classes.iter().map(|storage| times.slots(storage)).collect();
    let arenas = classes.ids().map(|class| {
        let storage = &assignment.classes[class.index()];
        lay_out(&graph, storage, &slots[class.index()], classes.representative(class))
    });
    let arenas: Vec<ArenaMap> = arenas.collect();
    let fused = fuse_accumulation(&graph, &segments);
    let in_flight = in_flight(&graph, &segments, &work, &step);
    let context = EmitContext {
        graph: &graph,
        segments: &segments,
        classes: &classes,
        assignment: &assignment,
        arenas: &arenas,
        fused: &fused,
        kind: device,
    };
    let instance =
        Lowering { context: &context, slots: &slots, work: &work, site_of: &site_of, step: &step, micro_batches };
    let Instance { spec, actions, registers, memory } = instance.all();
    let mut plan = Plan {
        spec,
        actions,
        registers,
        memory,
        segments,
        micro_batches,
        schedule,
        threads_per_device,
        device,
        memory_bytes: None,
        in_flight,
        graph,
    };
    plan.set_threads(threads_per_device);
    plan
}

/// Adds a node for the outputs of each placement and rate, which the host fetches.
fn add_fetches(graph: &mut Graph) {
    let mut fetched: BTreeMap<(Rate, usize), Vec<Var>> = BTreeMap::new();
    for output in &graph.outputs {
        let (rate, placement) = (graph.tensor(output.tensor).rate, graph.placement_of(output.tensor));
        fetched.entry((rate, placement)).or_default().push(output.tensor);
    }
    let location = graph.location;
    for ((rate, placement), inputs) in fetched {
        let (name, op, role) = ("fetch".to_owned(), NodeOp::Fetch, Role::Host);
        let (outputs, updates, signature) = (Vec::new(), Vec::new(), None);
        graph.nodes.push(Node { name, op, inputs, outputs, updates, placement, role, rate, location, signature });
    }
}

/// By placement: maximum number of micro-batches between forward and backward.
fn in_flight(graph: &Graph, segments: &Segments, work: &WorkGraph, step: &StepPlan) -> Vec<u32> {
    let mut out = vec![1; graph.placements.len()];
    for (work, in_flight) in work.work.iter().zip(&step.in_flight) {
        let own = &mut out[segments.get(work.segment).placement];
        *own = (*in_flight).max(*own);
    }
    out
}

/// The actors, registers, programs and memory of devices.
#[derive(Default)]
struct Instance {
    spec: Spec,
    actions: Vec<Vec<ActionPlan>>,
    registers: Vec<RegisterPlace>,
    memory: Vec<DeviceMemory>,
}

struct Lowering<'a> {
    context: &'a EmitContext<'a>,
    /// By class and register.
    slots: &'a [Vec<Slots>],
    work: &'a WorkGraph,
    site_of: &'a [Option<usize>],
    step: &'a StepPlan,
    micro_batches: usize,
}

/// The first actor and the first register of each device; actors follow in the order of their streams.
struct Numbers {
    actors: Vec<u32>,
    registers: Vec<u32>,
    /// By class: the segments of each stream.
    streams: Vec<BTreeMap<StreamKind, Vec<SegmentId>>>,
}

impl Lowering<'_> {
    fn all(&self) -> Instance {
        let numbers = self.number();
        let mut groups = Groups::default();
        let mut out = Instance::default();
        for device in 0..self.context.classes.of.len() {
            self.add_device(device, &numbers, &mut groups, &mut out);
        }
        out.spec.decision = self.decision(&out.actions);
        out
    }

    fn number(&self) -> Numbers {
        let EmitContext { segments, classes, assignment, .. } = self.context;
        let streams: Vec<BTreeMap<StreamKind, Vec<SegmentId>>> = (assignment.classes.iter())
            .map(|storage| {
                let mut streams: BTreeMap<StreamKind, Vec<SegmentId>> = BTreeMap::new();
                for id in &storage.segments {
                    streams.entry(segments.get(*id).stream).or_default().push(*id);
                }
                streams
            })
            .collect();
        let (mut actors, mut registers, mut next) = (Vec::new(), Vec::new(), (0, 0));
        for class in &classes.of {
            actors.push(next.0);
            registers.push(next.1);
            next.0 += streams[class.index()].len() as u32;
            next.1 += assignment.classes[class.index()].registers.len() as u32;
        }
        Numbers { actors, registers, streams }
    }

    fn add_device(&self, device: usize, numbers: &Numbers, groups: &mut Groups, out: &mut Instance) {
        let EmitContext { graph, classes, assignment, arenas, .. } = self.context;
        let class = classes.of[device].index();
        let (storage, arena) = (&assignment.classes[class], &arenas[class]);
        let mut memory = arena.memory.clone();
        memory.residents = residents(graph, storage, arena, device);
        for (stream, ids) in &numbers.streams[class] {
            let emitted: Vec<EmittedAction> = (ids.iter())
                .map(|id| emit(self.context, (device, *id), &mut |ranks| groups.communicator(*stream, ranks)))
                .collect();
            let specs =
                ids.iter().zip(&emitted).map(|(id, action)| self.action_spec(device, *id, action, numbers, groups));
            let specs: Vec<ActionSpec> = specs.collect();
            let scratch_bytes = emitted.iter().map(|action| action.scratch_bytes).max().unwrap_or(0);
            let start = memory.arena_bytes;
            memory.arena_bytes += align(scratch_bytes);
            memory.scratch.insert(ActorId(out.spec.actors.len() as u32), (start, scratch_bytes));
            let firing = self.firing(device, *stream, ids, &specs);
            let name = format!("device {device} {}", stream_name(*stream));
            out.spec.actors.push(ActorSpec { name, device, stream: *stream, firing, actions: specs });
            out.actions.push(emitted.into_iter().map(|action| action.plan).collect());
        }
        for (index, register) in storage.registers.iter().enumerate() {
            let place = RegisterPlace { device, ..arena.registers[index] };
            let slots = self.slots[class][index].count;
            out.spec.registers.push(self.register_spec(device, register, (slots, &place), numbers));
            out.registers.push(place);
        }
        out.memory.push(memory);
    }

    /// The action that runs a segment on a device.
    fn locate(&self, numbers: &Numbers, device: usize, id: SegmentId) -> ActionRef {
        let stream = self.context.segments.get(id).stream;
        let streams = &numbers.streams[self.context.classes.of[device].index()];
        let before = streams.range(..stream).count() as u32;
        let action = streams.get(&stream).and_then(|ids| ids.binary_search(&id).ok());
        let action = action.expect("a register's readers and producer run on its devices") as u32;
        ActionRef { actor: ActorId(numbers.actors[device] + before), action }
    }

    fn register_spec(
        &self,
        device: usize,
        register: &RegisterPlan,
        (slots, place): (u32, &RegisterPlace),
        numbers: &Numbers,
    ) -> RegisterSpec {
        let EmitContext { segments, classes, .. } = self.context;
        let mut readers: Vec<ActionRef> = register.readers.iter().map(|id| self.locate(numbers, device, *id)).collect();
        for id in &register.transfers {
            let pulling = segments.get(*id).nodes.iter().flat_map(|node| classes.readers(*node, device));
            readers.extend(pulling.filter(|other| **other != device).map(|other| self.locate(numbers, *other, *id)));
        }
        readers.sort_unstable();
        RegisterSpec {
            name: self.register_name(device, register),
            producer: self.locate(numbers, device, register.producer).actor,
            slots,
            slot_bytes: place.stride,
            initial: register.initial,
            readers,
        }
    }

    fn register_name(&self, device: usize, register: &RegisterPlan) -> String {
        let graph = self.context.graph;
        let first = register.tensors.first().map_or("done", |v| &graph.tensor(*v).name);
        let more = register.tensors.len().saturating_sub(1);
        let rest = if more > 0 { format!(" (+{more})") } else { String::new() };
        let producer = if register.initial { "parameters" } else { &self.context.segments.get(register.producer).name };
        format!("device {device} {producer}/{first}{rest}")
    }

    fn action_spec(
        &self,
        device: usize,
        id: SegmentId,
        emitted: &EmittedAction,
        numbers: &Numbers,
        groups: &mut Groups,
    ) -> ActionSpec {
        let EmitContext { segments, classes, assignment, .. } = self.context;
        let segment = segments.get(id);
        let register = |at: &DeviceRegister| &assignment.classes[classes.of[at.device].index()].registers[at.register];
        let per_step = |rate: Rate| rate.per_step(self.micro_batches) as u32;
        let firings = per_step(segment.rate);
        let number = |at: &DeviceRegister| RegisterId(numbers.registers[at.device] + at.register as u32);
        let inputs = emitted
            .inputs
            .iter()
            .map(|at| InputSpec { register: number(at), firings_per_piece: firings / per_step(register(at).rate) });
        let outputs = emitted.outputs.iter().enumerate().map(|(port, index)| {
            let at = DeviceRegister { device, register: *index };
            OutputSpec {
                register: number(&at),
                firings_per_piece: firings / per_step(register(&at).rate),
                early: emitted.plan.signals.iter().any(|signal| signal.1 == port as u32),
            }
        });
        // Actions that depend on nothing within the step (a transfer of parameters, or a device with an empty part of
        // the batch) would run ahead of the step without the host's permission.
        let starts = segment.host.is_some_and(|host| host != HostTransfer::Fetch);
        let external = starts || emitted.inputs.iter().all(|at| register(at).initial);
        let communicators: BTreeSet<u32> = emitted.plan.collectives().map(|call| call.group.id).collect();
        let priority = self.work.work.iter().position(|work| work.segment == id);
        ActionSpec {
            name: segment.name.clone(),
            label: segment.label.clone(),
            priority: priority.map_or(0, |work| self.step.priorities[work]),
            per_step: firings,
            inputs: inputs.collect(),
            outputs: outputs.collect(),
            external,
            groups: emitted.groups.iter().map(|ranks| groups.firing_group(id, ranks)).collect(),
            communicators: communicators.into_iter().collect(),
        }
    }

    /// How an actor fires. If its actions call collectives, all members of a group must fire in the same order whatever
    /// the timing, so it follows the schedule's list; otherwise credits decide.
    fn firing(&self, device: usize, stream: StreamKind, ids: &[SegmentId], specs: &[ActionSpec]) -> Firing {
        if specs.iter().all(|spec| spec.groups.is_empty()) {
            return Firing::Credit;
        }
        let action = |id: SegmentId| ids.binary_search(&id).ok().map(|action| action as u32);
        let list = match self.site_of[device].filter(|_| stream == StreamKind::Compute) {
            Some(site) => {
                let entries = self.step.lists[site].iter();
                entries.filter_map(|entry| action(self.work.work[entry.work].segment)).collect()
            }
            // In the order of the program, on all devices.
            None => (0..).zip(specs).flat_map(|(action, spec)| (0..spec.per_step).map(move |_| action)).collect(),
        };
        Firing::Ordered(list)
    }

    fn decision(&self, actions: &[Vec<ActionPlan>]) -> Decision {
        let located = |transfer: HostTransfer| {
            let all = (0..).zip(actions).flat_map(|(actor, actions)| {
                (0..).zip(actions).map(move |(action, plan)| (ActionRef { actor: ActorId(actor), action }, plan))
            });
            all.filter(move |(_, plan)| plan.host.as_ref().is_some_and(|host| host.transfer == transfer))
                .map(|(at, _)| at)
        };
        Decision { observed: located(HostTransfer::Fetch).collect(), granted: located(HostTransfer::Decide).collect() }
    }
}

fn stream_name(stream: StreamKind) -> &'static str {
    match stream {
        StreamKind::Compute => "compute",
        StreamKind::Communication => "communication",
        StreamKind::Copy => "copy",
    }
}

/// Ids of communicators (by stream and ranks) and of firing groups (by segment and ranks).
#[derive(Default)]
struct Groups {
    communicators: BTreeMap<(StreamKind, Vec<usize>), Arc<Group>>,
    firing_groups: BTreeMap<(SegmentId, Vec<usize>), u32>,
}

impl Groups {
    fn communicator(&mut self, stream: StreamKind, ranks: &[usize]) -> Arc<Group> {
        let id = self.communicators.len() as u32;
        let make = || Arc::new(Group { id, ranks: ranks.to_vec() });
        self.communicators.entry((stream, ranks.to_vec())).or_insert_with(make).clone()
    }

    fn firing_group(&mut self, segment: SegmentId, ranks: &[usize]) -> u32 {
        let id = self.firing_groups.len() as u32;
        *self.firing_groups.entry((segment, ranks.to_vec())).or_insert(id)
    }
}
