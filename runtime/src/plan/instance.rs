//! The part of a plan that a process loads: the actors, registers and programs of its devices. Ids follow from the
//! device by arithmetic, so all processes use the same ids, and a process makes only its part.

use std::collections::{BTreeMap, BTreeSet};
use std::ops::{Deref, Range};
use std::sync::Arc;

use shardflow_actors::spec::{
    ActionRef, ActionSpec, ActorId, ActorSpec, Decision, Firing, InputSpec, OutputSpec, Pieces, RegisterId,
    RegisterSpec, Spec, StreamKind, actor_name,
};
use shardflow_actors::table::Table;
use shardflow_kernels::op::Op;

use crate::graph::{NodeId, Rate};
use crate::plan::Plan;
use crate::plan::action::{ActionPlan, DeviceRegister, EmittedAction};
use crate::plan::assign::RegisterPlan;
use crate::plan::classes::ClassId;
use crate::plan::emit::{emit, inputs};
use crate::plan::error::PlanError;
use crate::plan::groups::collective_axes;
use crate::plan::memory::{DeviceMemory, RegisterPlace};
use crate::plan::segments::{HostTransfer, SegmentId};
use crate::plan::slots::Slots;

/// A plan with the actors and registers of some devices, usually those of one process.
#[derive(Clone, Debug)]
pub struct Instance {
    /// The plan.
    pub plan: Arc<Plan>,
    /// Actors and registers of these devices, and the parts of other devices that exchange registers with them.
    pub spec: Spec,
    /// The actions of the devices' actors.
    pub actions: Table<ActorId, Vec<ActionPlan>>,
    /// The memory of each register of `spec`.
    pub registers: Table<RegisterId, RegisterPlace>,
    /// For each device of this node's processes: bytes of its mirrors ([`DeviceMemory::mirror_bytes`]).
    pub mirrors: BTreeMap<usize, usize>,
    numbering: Numbering,
}

impl Deref for Instance {
    type Target = Plan;

    fn deref(&self) -> &Plan {
        &self.plan
    }
}

impl Instance {
    /// The memory of a device, including its mirrors.
    pub fn memory(&self, device: usize) -> DeviceMemory {
        let mirror_bytes = self.mirrors.get(&device).copied().unwrap_or(0);
        DeviceMemory { mirror_bytes, ..self.plan.memory(device).clone() }
    }

    /// Checks that no device needs more than the plan's memory limit, including the mirrors of this node's processes.
    ///
    /// # Errors
    /// [`PlanError::Memory`].
    pub(crate) fn check_memory(&self) -> Result<(), PlanError> {
        let memory: Vec<(usize, DeviceMemory)> = self.mirrors.keys().map(|d| (*d, self.memory(*d))).collect();
        let Some(budget) = self.memory_bytes.filter(|_| !self.fits(memory.iter().map(|(_, memory)| memory))) else {
            return Ok(());
        };
        let table = memory.iter().map(|(device, memory)| memory.row(*device)).collect();
        Err(PlanError::Memory { budget, table })
    }

    /// Sets the number of threads of compute streams.
    pub(crate) fn set_threads(&mut self, threads_per_device: usize) {
        Arc::make_mut(&mut self.plan).set_threads(threads_per_device);
    }

    /// The memory of a register.
    pub fn register_place(&self, id: RegisterId) -> RegisterPlace {
        self.registers[id]
    }

    /// The device and the index of a register.
    pub(crate) fn register_at(&self, id: RegisterId) -> DeviceRegister {
        let device = self.spec.actor(self.spec.register(id).producer).device;
        DeviceRegister { device, register: (id.0 - self.numbering.first[device].1) as usize }
    }

    /// The device and the segment of an action.
    pub(crate) fn segment_at(&self, at: ActionRef) -> (usize, SegmentId) {
        let actor = self.spec.actor(at.actor);
        let segments = &self.numbering.streams[self.classes.of[actor.device].index()][&actor.stream];
        (actor.device, segments[at.action as usize])
    }
}

impl Plan {
    /// The actors and registers of all devices.
    pub fn instance(self) -> Instance {
        let devices = 0..self.device_count();
        Arc::new(self).instance_of(devices)
    }

    /// The actors and registers of these devices. Only the table of first ids grows with the number of other devices:
    /// it has one entry for each device of the mesh.
    pub fn instance_of(self: Arc<Self>, devices: Range<usize>) -> Instance {
        let numbering = Numbering::new(&self, 0..self.device_count());
        let mut known = BTreeSet::new();
        let mut neighbours = BTreeSet::new();
        for device in devices.clone() {
            let storage = &self.class_plan(device).storage;
            known.extend((0..storage.registers.len()).map(|register| DeviceRegister { device, register }));
            known.extend(storage.segments.iter().flat_map(|id| inputs(&self, device, *id)));
            let transfers = storage.registers.iter().flat_map(|register| &register.transfers);
            let nodes = transfers.flat_map(|id| &self.segments.get(*id).nodes);
            neighbours.extend(nodes.flat_map(|node| self.classes.readers(*node, device).iter().copied()));
        }
        neighbours.extend(known.iter().map(|at| at.device));
        neighbours.retain(|device| !devices.contains(device));
        let mut builder = Builder::new(&self, numbering, View::Devices { known });
        let before = neighbours.range(..devices.start).copied();
        before.for_each(|device| builder.add_neighbour(device));
        for device in devices.clone() {
            let ids = self.class_plan(device).storage.segments.iter();
            let emitted: Vec<EmittedAction> = ids.map(|id| emit(&self, device, *id)).collect();
            builder.add_device(device, &emitted.iter().collect::<Vec<_>>());
        }
        let after = neighbours.range(devices.end..).copied();
        after.for_each(|device| builder.add_neighbour(device));
        let (parts, numbering) = builder.finish();
        let Parts { spec, actions, registers, .. } = parts;
        Instance { spec, actions, registers, mirrors: BTreeMap::new(), numbering, plan: self }
    }

    /// See [`Quotient`].
    pub(crate) fn quotient(&self) -> Quotient {
        let devices: Vec<usize> = self.classes.ids().map(|class| self.classes.representative(class)).collect();
        let numbering = Numbering::new(self, devices.iter().copied());
        let mut builder = Builder::new(self, numbering, View::Classes);
        for device in devices {
            builder.add_device(device, &self.class_plan(device).actions.iter().collect::<Vec<_>>());
        }
        let (Parts { spec, actions, calls, .. }, _) = builder.finish();
        Quotient { spec, actions, calls }
    }
}

/// The actors and registers of one device of each class, which stands for all devices of the class. A register has the
/// readers of all these devices. A group of devices becomes a group of its members' classes, and an action is in the
/// groups of all these devices. So a cycle of waits among devices is also a cycle among classes. Hence the plan is live
/// if the quotient has no cycle.
pub(crate) struct Quotient {
    pub(crate) spec: Spec,
    pub(crate) actions: Table<ActorId, Vec<ActionPlan>>,
    /// For each action, in the order of the actors: the firing groups of each collective that it calls.
    pub(crate) calls: Vec<Vec<BTreeSet<u32>>>,
}

/// The ids of actors and registers. A device's actors are in the order of their streams.
#[derive(Clone, Debug)]
struct Numbering {
    /// First actor and first register of each device; unused for devices without ids.
    first: Vec<(u32, u32)>,
    /// Numbers of actors and registers.
    count: (u32, u32),
    /// For each class: the segments of each stream.
    streams: Vec<BTreeMap<StreamKind, Vec<SegmentId>>>,
}

impl Numbering {
    /// Gives ids to the actors and registers of these devices.
    fn new(plan: &Plan, devices: impl Iterator<Item = usize>) -> Self {
        let streams: Vec<BTreeMap<StreamKind, Vec<SegmentId>>> = (plan.class_plans.iter())
            .map(|class| {
                let mut streams: BTreeMap<StreamKind, Vec<SegmentId>> = BTreeMap::new();
                for id in &class.storage.segments {
                    streams.entry(plan.segments.get(*id).stream).or_default().push(*id);
                }
                streams
            })
            .collect();
        let (mut first, mut count) = (vec![(0, 0); plan.device_count()], (0, 0));
        for device in devices {
            first[device] = count;
            count.0 += streams[plan.classes.of[device].index()].len() as u32;
            count.1 += plan.class_plan(device).storage.registers.len() as u32;
        }
        Self { first, count, streams }
    }

    /// The action that runs a segment on a device.
    fn action(&self, plan: &Plan, device: usize, id: SegmentId) -> ActionRef {
        let stream = plan.segments.get(id).stream;
        let streams = &self.streams[plan.classes.of[device].index()];
        let before = streams.range(..stream).count() as u32;
        let action = streams.get(&stream).and_then(|ids| ids.binary_search(&id).ok());
        let action = action.expect("a register's readers and producer run on its devices") as u32;
        ActionRef { actor: ActorId(self.first[device].0 + before), action }
    }

    fn register(&self, at: DeviceRegister) -> RegisterId {
        RegisterId(self.first[at.device].1 + at.register as u32)
    }
}

/// The devices that a specification contains.
enum View {
    Devices {
        /// The registers of the instance's devices, and those that these devices read on other devices.
        known: BTreeSet<DeviceRegister>,
    },
    /// One device for each class.
    Classes,
}

/// For each class: the sets of classes that occur in the groups of its devices.
type ClassSets = BTreeMap<ClassId, BTreeSet<Vec<usize>>>;

/// The result of a [`Builder`].
struct Parts {
    spec: Spec,
    actions: Table<ActorId, Vec<ActionPlan>>,
    registers: Table<RegisterId, RegisterPlace>,
    /// For each action, in the order of the actors: the firing groups of each collective that it calls.
    calls: Vec<Vec<BTreeSet<u32>>>,
}

struct Builder<'a> {
    plan: &'a Plan,
    view: View,
    numbering: Numbering,
    /// Ids of firing groups, by segment and members. The members are classes or, with [`View::Devices`], the id of
    /// their communicator.
    firing_groups: BTreeMap<(SegmentId, Vec<usize>), u32>,
    /// For [`View::Classes`]: ids of communicators, by stream and classes of the members.
    communicators: BTreeMap<(StreamKind, Vec<usize>), u32>,
    /// Sets of classes, by placement and axes.
    class_sets: BTreeMap<(usize, Vec<usize>), ClassSets>,
    parts: Parts,
}

impl<'a> Builder<'a> {
    fn new(plan: &'a Plan, numbering: Numbering, view: View) -> Self {
        let (actors, registers) = numbering.count;
        let spec =
            Spec { actors: Table::with_bound(actors), registers: Table::with_bound(registers), ..Spec::default() };
        let (actions, registers) = (Table::with_bound(actors), Table::with_bound(registers));
        Self {
            plan,
            view,
            numbering,
            firing_groups: BTreeMap::new(),
            communicators: BTreeMap::new(),
            class_sets: BTreeMap::new(),
            parts: Parts { spec, actions, registers, calls: Vec::new() },
        }
    }

    fn finish(mut self) -> (Parts, Numbering) {
        let located = |transfer: HostTransfer| {
            let all = self.parts.actions.iter().flat_map(|(actor, actions)| {
                (0..).zip(actions).map(move |(action, plan)| (ActionRef { actor, action }, plan))
            });
            let is_wanted = |plan: &ActionPlan| plan.host.as_ref().is_some_and(|host| host.transfer == transfer);
            all.filter(|(_, plan)| is_wanted(plan)).map(|(at, _)| at).collect()
        };
        let (observed, granted) = (located(HostTransfer::Fetch), located(HostTransfer::Decide));
        self.parts.spec.decision = Decision { observed, granted };
        (self.parts, self.numbering)
    }

    /// Adds a device's actors and registers. `emitted` has the device's actions, in the order of its segments.
    fn add_device(&mut self, device: usize, emitted: &[&EmittedAction]) {
        let plan = self.plan;
        let class = plan.class_plan(device);
        let ids = &class.storage.segments;
        for (stream, of_stream) in self.numbering.streams[plan.classes.of[device].index()].clone() {
            let action = |id: &SegmentId| emitted[ids.binary_search(id).expect("the class runs it")];
            let actions: Vec<&EmittedAction> = of_stream.iter().map(action).collect();
            let spec = |action: &&EmittedAction| {
                let (groups, communicators) = self.groups(device, action);
                ActionSpec { groups, communicators, ..self.action_spec(device, action, &action.inputs) }
            };
            let specs: Vec<ActionSpec> = actions.iter().map(spec).collect();
            let calls = actions.iter().any(|action| action.plan.collectives().next().is_some());
            let id = self.add_actor((device, stream), &of_stream, specs, calls);
            self.parts.actions.insert(id, actions.into_iter().map(|action| action.plan.clone()).collect());
        }
        (0..class.storage.registers.len()).for_each(|register| self.add_register(DeviceRegister { device, register }));
    }

    /// Adds the part of another process's device that exchanges registers with the devices of the instance.
    fn add_neighbour(&mut self, device: usize) {
        let plan = self.plan;
        let class = plan.class_plan(device);
        for (stream, of_stream) in self.numbering.streams[plan.classes.of[device].index()].clone() {
            let action =
                |id: &SegmentId| &class.actions[class.storage.segments.binary_search(id).expect("the class runs it")];
            let spec = |id: &SegmentId| self.action_spec(device, action(id), &inputs(plan, device, *id));
            let specs = of_stream.iter().map(spec).collect();
            let calls = of_stream.iter().any(|id| action(id).plan.collectives().next().is_some());
            self.add_actor((device, stream), &of_stream, specs, calls);
        }
        let View::Devices { known } = &self.view else { return };
        let start = DeviceRegister { device, register: 0 };
        let known: Vec<DeviceRegister> = known.range(start..).take_while(|at| at.device == device).copied().collect();
        known.into_iter().for_each(|at| self.add_register(at));
    }

    /// Adds an actor for these segments; `calls` is true if it calls collectives.
    fn add_actor(
        &mut self,
        (device, stream): (usize, StreamKind),
        ids: &[SegmentId],
        actions: Vec<ActionSpec>,
        calls: bool,
    ) -> ActorId {
        let firing = if calls { self.list(device, stream, ids, &actions) } else { Firing::Credit };
        let id = self.numbering.action(self.plan, device, ids[0]).actor;
        let name = actor_name(device, stream);
        self.parts.spec.actors.insert(id, ActorSpec { name, device, stream, firing, actions });
        id
    }

    fn add_register(&mut self, at: DeviceRegister) {
        let class = self.plan.class_plan(at.device);
        let place = RegisterPlace { device: at.device, ..class.arena.registers[at.register] };
        let register = &class.storage.registers[at.register];
        let spec = self.register_spec(at.device, register, (&class.slots[at.register], &place));
        let id = self.numbering.register(at);
        self.parts.spec.registers.insert(id, spec);
        self.parts.registers.insert(id, place);
    }

    /// The device of the instance that represents `device`.
    fn stand_in(&self, device: usize) -> usize {
        match self.view {
            View::Devices { .. } => device,
            View::Classes => self.plan.classes.representative(self.plan.classes.of[device]),
        }
    }

    /// True if the instance has the register.
    fn is_known(&self, at: DeviceRegister) -> bool {
        if let View::Devices { known } = &self.view { known.contains(&at) } else { true }
    }

    fn locate(&self, device: usize, id: SegmentId) -> ActionRef {
        self.numbering.action(self.plan, device, id)
    }

    fn register_spec(
        &self,
        device: usize,
        register: &RegisterPlan,
        (slots, place): (&Slots, &RegisterPlace),
    ) -> RegisterSpec {
        let own = register.readers.iter().map(|id| self.locate(device, *id));
        let mut readers: BTreeSet<ActionRef> = own.collect();
        for id in &register.transfers {
            let nodes = &self.plan.segments.get(*id).nodes;
            let reading = nodes.iter().flat_map(|node| self.reading_devices(*node, device));
            readers.extend(reading.map(|other| self.locate(other, *id)));
        }
        RegisterSpec {
            name: self.register_name(device, register),
            producer: self.locate(device, register.producer).actor,
            slots: slots.count,
            slot_bytes: place.stride,
            pieces_per_step: register.rate.per_step(self.plan.micro_batches) as u32,
            initial: register.initial.into(),
            slot_of: slots.slot_of.clone(),
            readers: readers.into_iter().collect(),
        }
    }

    /// Other devices that read from `device` in a transfer. With [`View::Classes`]: stand-ins of the class's readers.
    fn reading_devices(&self, transfer: NodeId, device: usize) -> BTreeSet<usize> {
        let classes = &self.plan.classes;
        let readers = |own: usize| classes.readers(transfer, own).iter().copied().filter(move |other| *other != own);
        match self.view {
            View::Devices { .. } => readers(device).collect(),
            View::Classes => {
                let own = classes.devices[classes.of[device].index()].iter();
                own.flat_map(|own| readers(*own)).map(|other| self.stand_in(other)).collect()
            }
        }
    }

    fn register_name(&self, device: usize, register: &RegisterPlan) -> String {
        let graph = &self.plan.graph;
        let first = register.tensors.first().map_or("done", |v| &graph.tensor(*v).name);
        let more = register.tensors.len().saturating_sub(1);
        let rest = if more > 0 { format!(" (+{more})") } else { String::new() };
        let producer = if register.initial { "parameters" } else { &self.plan.segments.get(register.producer).name };
        format!("device {device} {producer}/{first}{rest}")
    }

    /// The action with the ports whose registers the instance has, without groups.
    fn action_spec(&self, device: usize, emitted: &EmittedAction, inputs: &[DeviceRegister]) -> ActionSpec {
        let plan = self.plan;
        let segment = plan.segments.get(emitted.plan.segment);
        let register = |at: &DeviceRegister| &plan.class_plan(at.device).storage.registers[at.register];
        let per_step = |rate: Rate| rate.per_step(plan.micro_batches) as u32;
        let firings = per_step(segment.rate);
        let pieces = |at: &DeviceRegister| Pieces::Rate(firings / per_step(register(at).rate));
        // Two sources of one class are one register of the quotient.
        let mut sources: Vec<DeviceRegister> = Vec::new();
        for at in inputs {
            let at = DeviceRegister { device: self.stand_in(at.device), ..*at };
            if !sources.contains(&at) && self.is_known(at) {
                sources.push(at);
            }
        }
        let input = |at: &DeviceRegister| InputSpec { register: self.numbering.register(*at), pieces: pieces(at) };
        let output = |(port, register): (usize, &usize)| {
            let at = DeviceRegister { device, register: *register };
            let early = emitted.plan.signals.iter().any(|signal| signal.1 == port as u32);
            let spec = || OutputSpec { register: self.numbering.register(at), pieces: pieces(&at), early };
            self.is_known(at).then(spec)
        };
        // An action that depends on nothing within the step (a transfer of parameters, or one on a device with an empty
        // part of the batch) waits for the host's permission. Otherwise it would run ahead of the step.
        let is_fed = segment.host.is_some_and(|host| host != HostTransfer::Fetch);
        ActionSpec {
            name: segment.name.clone(),
            label: segment.label.clone(),
            priority: plan.priorities.get(&emitted.plan.segment).copied().unwrap_or(0),
            per_step: firings,
            inputs: sources.iter().map(input).collect(),
            outputs: emitted.outputs.iter().enumerate().filter_map(output).collect(),
            external: is_fed || inputs.iter().all(|at| register(at).initial),
            ..ActionSpec::default()
        }
    }

    /// Ids of an action's firing groups, and of the communicators of its collectives.
    fn groups(&mut self, device: usize, emitted: &EmittedAction) -> (Vec<u32>, Vec<u32>) {
        let (plan, segment) = (self.plan, emitted.plan.segment);
        let stream = plan.segments.get(segment).stream;
        let mut communicators = BTreeSet::new();
        let mut known: BTreeMap<(usize, Vec<usize>), BTreeSet<u32>> = BTreeMap::new();
        let mut calls: Vec<BTreeSet<u32>> = Vec::new();
        for (node, launch) in emitted.plan.nodes.iter().zip(&emitted.plan.launches) {
            let (node, Op::Collective(call)) = (&plan.graph.nodes[node.index()], &launch.op) else { continue };
            let Some((_, axes)) = collective_axes(&plan.graph, node) else { continue };
            if let Some(groups) = known.get(&(node.placement, axes.clone())) {
                calls.push(groups.clone());
                continue;
            }
            let member_sets = match self.view {
                // The communicator's id identifies its members.
                View::Devices { .. } => BTreeSet::from([vec![call.group.id as usize]]),
                View::Classes => self.class_sets(node.placement, axes.clone(), device),
            };
            let mut groups = BTreeSet::new();
            for members in member_sets {
                let next = self.firing_groups.len() as u32;
                groups.insert(*self.firing_groups.entry((segment, members.clone())).or_insert(next));
                let next = self.communicators.len() as u32;
                communicators.insert(match self.view {
                    View::Devices { .. } => call.group.id,
                    View::Classes => *self.communicators.entry((stream, members)).or_insert(next),
                });
            }
            known.insert((node.placement, axes), groups.clone());
            calls.push(groups);
        }
        let groups: BTreeSet<u32> = calls.iter().flatten().copied().collect();
        self.parts.calls.push(calls);
        (groups.into_iter().collect(), communicators.into_iter().collect())
    }

    /// The sets of classes that occur in the groups of a device's class, along these axes of a placement.
    fn class_sets(&mut self, placement: usize, axes: Vec<usize>, device: usize) -> BTreeSet<Vec<usize>> {
        let (plan, class) = (self.plan, self.plan.classes.of[device]);
        let sets = self.class_sets.entry((placement, axes)).or_insert_with_key(|(placement, axes)| {
            let mut sets = ClassSets::new();
            for group in plan.graph.placements[*placement].groups(axes) {
                let classes: BTreeSet<ClassId> = group.iter().map(|device| plan.classes.of[*device]).collect();
                let members: Vec<usize> = classes.iter().map(|class| class.index()).collect();
                for class in classes {
                    sets.entry(class).or_default().insert(members.clone());
                }
            }
            sets
        });
        sets.get(&class).cloned().unwrap_or_default()
    }

    /// The order of firings of an actor that calls collectives, because all members of a group must use one order.
    fn list(&self, device: usize, stream: StreamKind, ids: &[SegmentId], specs: &[ActionSpec]) -> Firing {
        let action = |id: &SegmentId| ids.binary_search(id).ok().map(|action| action as u32);
        Firing::Ordered(match self.plan.site_of[device].filter(|_| stream == StreamKind::Compute) {
            Some(site) => self.plan.lists[site].iter().filter_map(action).collect(),
            // Other streams follow the order of the program, which is the same on all devices.
            None => (0..).zip(specs).flat_map(|(action, spec)| (0..spec.per_step).map(move |_| action)).collect(),
        })
    }
}

#[cfg(test)]
mod tests;
