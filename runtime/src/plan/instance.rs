//! The part of a plan that a process loads: the actors, registers and programs of its devices. Ids follow from the
//! device by arithmetic, so all processes use the same ids, although each process builds only its own part.

use std::collections::{BTreeMap, BTreeSet};
use std::ops::{Deref, Range};
use std::slice;
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

/// A plan with the actors and registers of some devices, usually those of one process.
#[derive(Clone, Debug)]
pub struct Instance {
    /// The plan.
    pub plan: Arc<Plan>,
    /// Actors and registers of the instance's devices. Of other devices that exchange registers with them: the actors,
    /// and the registers that the instance's devices read.
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
        let mut builder = Builder::new(&self, numbering, Some(known));
        let before = neighbours.range(..devices.start).copied();
        let after = neighbours.range(devices.end..).copied();
        for device in before.chain(devices.clone()).chain(after) {
            let emit = |id: &SegmentId| emit(&self, device, *id);
            let ids = Some(&self.class_plan(device).storage.segments).filter(|_| devices.contains(&device));
            let own = ids.map(|ids| ids.iter().map(emit).collect::<Vec<_>>());
            builder.add_device(device, own.as_deref());
        }
        let Builder { spec, actions, registers, numbering, .. } = builder.finish();
        Instance { spec, actions, registers, mirrors: BTreeMap::new(), numbering, plan: self }
    }

    /// See [`Quotient`].
    pub(crate) fn quotient(&self) -> Quotient {
        let devices = || self.classes.representatives();
        let mut builder = Builder::new(self, Numbering::new(self, devices()), None);
        devices().for_each(|device| builder.add_device(device, Some(&self.class_plan(device).actions)));
        let Builder { spec, actions, calls, .. } = builder.finish();
        Quotient { spec, actions, calls }
    }
}

/// The actors and registers of one device of each class. This device stands for all devices of the class: its registers
/// have the readers, and its actions the groups, of all of them. A group of devices becomes a group of its members'
/// classes. So a cycle of waits among devices is also a cycle among classes. Hence the plan is live
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

    fn register(&self, at: DeviceRegister) -> RegisterId {
        RegisterId(self.first[at.device].1 + at.register as u32)
    }
}

/// For each class and each group that contains one of its devices: the set of the classes of the group's members.
type ClassSets = BTreeMap<ClassId, BTreeSet<Vec<usize>>>;

struct Builder<'a> {
    plan: &'a Plan,
    /// The registers of the instance's devices, and those that these devices read on other devices; `None` for a
    /// [`Quotient`].
    known: Option<BTreeSet<DeviceRegister>>,
    numbering: Numbering,
    /// Ids of firing groups, by segment and members. The key names the members by the id of their communicator or, for
    /// a quotient, by their classes.
    firing_groups: BTreeMap<(SegmentId, Vec<usize>), u32>,
    /// For a quotient: ids of communicators, by stream and classes of the members.
    communicators: BTreeMap<(StreamKind, Vec<usize>), u32>,
    /// Sets of classes, by placement and axes.
    class_sets: BTreeMap<(usize, Vec<usize>), ClassSets>,
    spec: Spec,
    actions: Table<ActorId, Vec<ActionPlan>>,
    registers: Table<RegisterId, RegisterPlace>,
    /// See [`Quotient::calls`].
    calls: Vec<Vec<BTreeSet<u32>>>,
}

impl<'a> Builder<'a> {
    fn new(plan: &'a Plan, numbering: Numbering, known: Option<BTreeSet<DeviceRegister>>) -> Self {
        let (actors, registers) = numbering.count;
        let (firing_groups, communicators, class_sets, calls) = Default::default();
        Self {
            plan,
            known,
            numbering,
            firing_groups,
            communicators,
            class_sets,
            spec: Spec {
                actors: Table::with_bound(actors),
                registers: Table::with_bound(registers),
                ..Spec::default()
            },
            actions: Table::with_bound(actors),
            registers: Table::with_bound(registers),
            calls,
        }
    }

    fn finish(mut self) -> Self {
        let located = |transfer: HostTransfer| {
            let all = self.actions.iter().flat_map(|(actor, actions)| {
                (0..).zip(actions).map(move |(action, plan)| (ActionRef { actor, action }, plan))
            });
            let is_wanted = |plan: &ActionPlan| plan.host.as_ref().is_some_and(|host| host.transfer == transfer);
            all.filter(|(_, plan)| is_wanted(plan)).map(|(at, _)| at).collect()
        };
        self.spec.decision =
            Decision { observed: located(HostTransfer::Fetch), granted: located(HostTransfer::Decide) };
        self
    }

    /// Adds a device's actors, and those of its registers that the instance has. `own` has the device's actions, in the
    /// order of its segments. It is `None` for a device that only exchanges registers with devices of the instance.
    fn add_device(&mut self, device: usize, own: Option<&[EmittedAction]>) {
        let plan = self.plan;
        let class = plan.class_plan(device);
        let all = own.unwrap_or(&class.actions);
        for (stream, ids) in self.numbering.streams[plan.classes.of[device].index()].clone() {
            let action = |id: &SegmentId| &all[class.storage.segments.binary_search(id).expect("the class runs it")];
            let of_stream: Vec<&EmittedAction> = ids.iter().map(action).collect();
            let spec = |action: &&EmittedAction| {
                if own.is_none() {
                    return self.action_spec(device, action, &inputs(plan, device, action.plan.segment));
                }
                let (groups, communicators) = self.groups(device, action);
                ActionSpec { groups, communicators, ..self.action_spec(device, action, &action.inputs) }
            };
            let actions: Vec<ActionSpec> = of_stream.iter().map(spec).collect();
            let calls = of_stream.iter().any(|action| action.plan.collectives().next().is_some());
            let firing = if calls { self.list(device, stream, &ids, &actions) } else { Firing::Credit };
            let (id, name) = (self.locate(device, ids[0]).actor, actor_name(device, stream));
            self.spec.actors.insert(id, ActorSpec { name, device, stream, firing, actions });
            if own.is_some() {
                self.actions.insert(id, of_stream.into_iter().map(|action| action.plan.clone()).collect());
            }
        }
        for register in 0..class.storage.registers.len() {
            let at = DeviceRegister { device, register };
            if self.is_known(at) {
                self.add_register(at);
            }
        }
    }

    fn add_register(&mut self, at: DeviceRegister) {
        let (plan, device) = (self.plan, at.device);
        let class = plan.class_plan(device);
        let place = RegisterPlace { device, ..class.arena.registers[at.register] };
        let (register, slots) = (&class.storage.registers[at.register], &class.slots[at.register]);
        let mut readers: BTreeSet<ActionRef> = register.readers.iter().map(|id| self.locate(device, *id)).collect();
        for id in &register.transfers {
            let reading = plan.segments.get(*id).nodes.iter().flat_map(|node| self.reading_devices(*node, device));
            readers.extend(reading.map(|other| self.locate(other, *id)));
        }
        let spec = RegisterSpec {
            name: self.register_name(device, register),
            producer: self.locate(device, register.producer).actor,
            slots: slots.count,
            slot_bytes: place.stride,
            pieces_per_step: register.rate.per_step(plan.micro_batches) as u32,
            initial: register.initial.into(),
            slot_of: slots.slot_of.clone(),
            readers: readers.into_iter().collect(),
        };
        let id = self.numbering.register(at);
        self.spec.registers.insert(id, spec);
        self.registers.insert(id, place);
    }

    /// The device that represents `device`: for a quotient the first device of its class, otherwise `device` itself.
    fn stand_in(&self, device: usize) -> usize {
        let classes = &self.plan.classes;
        if self.known.is_some() { device } else { classes.representative(classes.of[device]) }
    }

    /// True if the instance has the register.
    fn is_known(&self, at: DeviceRegister) -> bool {
        self.known.as_ref().is_none_or(|known| known.contains(&at))
    }

    /// The action that runs a segment on a device.
    fn locate(&self, device: usize, id: SegmentId) -> ActionRef {
        let stream = self.plan.segments.get(id).stream;
        let streams = &self.numbering.streams[self.plan.classes.of[device].index()];
        let before = streams.range(..stream).count() as u32;
        let action = streams.get(&stream).and_then(|ids| ids.binary_search(&id).ok());
        let action = action.expect("callers pass only segments that run on the device") as u32;
        ActionRef { actor: ActorId(self.numbering.first[device].0 + before), action }
    }

    /// Other devices that read from `device` in a transfer. For a quotient: representatives of the devices that read
    /// from the class.
    fn reading_devices(&self, transfer: NodeId, device: usize) -> BTreeSet<usize> {
        let classes = &self.plan.classes;
        let alike = &classes.devices[classes.of[device].index()];
        let own = if self.known.is_some() { slice::from_ref(&device) } else { alike };
        let readers =
            own.iter().flat_map(|own| classes.readers(transfer, *own).iter().filter(move |other| *other != own));
        readers.map(|other| self.stand_in(*other)).collect()
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
        // Registers of two devices of one class are one register of the quotient.
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
            let member_sets = match self.known {
                // The communicator's id identifies its members.
                Some(_) => BTreeSet::from([vec![call.group.id as usize]]),
                None => self.class_sets(node.placement, axes.clone(), device),
            };
            let mut groups = BTreeSet::new();
            for members in member_sets {
                let next = self.firing_groups.len() as u32;
                groups.insert(*self.firing_groups.entry((segment, members.clone())).or_insert(next));
                let next = self.communicators.len() as u32;
                communicators.insert(match self.known {
                    Some(_) => call.group.id,
                    None => *self.communicators.entry((stream, members)).or_insert(next),
                });
            }
            known.insert((node.placement, axes), groups.clone());
            calls.push(groups);
        }
        let groups: BTreeSet<u32> = calls.iter().flatten().copied().collect();
        self.calls.push(calls);
        (groups.into_iter().collect(), communicators.into_iter().collect())
    }

    /// The entry of the device's class in [`ClassSets`], for the groups along these axes of a placement.
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

    /// The fixed firing order of an actor that calls collectives. All members of a group must use the same order.
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
