//! The part of a plan that a session loads: actors, registers and programs of devices, with their memory.

use std::collections::{BTreeMap, BTreeSet};
use std::ops::Deref;
use std::sync::Arc;

use shardflow_actors::spec::{
    ActionRef, ActionSpec, ActorId, ActorSpec, Decision, Firing, InputSpec, OutputSpec, Pieces, RegisterId,
    RegisterSpec, Spec, StreamKind,
};
use shardflow_kernels::op::Op;

use crate::graph::{NodeId, Rate, Var};
use crate::plan::Plan;
use crate::plan::action::{ActionPlan, DeviceRegister, EmittedAction};
use crate::plan::assign::RegisterPlan;
use crate::plan::classes::ClassId;
use crate::plan::emit::emit;
use crate::plan::error::PlanError;
use crate::plan::groups::collective_axes;
use crate::plan::memory::{DeviceMemory, RegisterPlace, ResidentTensor};
use crate::plan::segments::{HostTransfer, SegmentId};
use crate::plan::slots::Slots;

/// A plan with the actors and registers of all devices.
#[derive(Clone, Debug)]
pub struct Instance {
    /// The plan.
    pub plan: Arc<Plan>,
    /// Actors and registers.
    pub spec: Spec,
    /// `[actor][action]`.
    pub actions: Vec<Vec<ActionPlan>>,
    /// The memory of each register.
    pub registers: Vec<RegisterPlace>,
    /// The memory of each device, by rank.
    pub memory: Vec<DeviceMemory>,
    /// The parameters and states of each device, by rank.
    pub residents: Vec<Vec<ResidentTensor>>,
}

impl Deref for Instance {
    type Target = Plan;

    fn deref(&self) -> &Plan {
        &self.plan
    }
}

impl Instance {
    /// The parts of a resident tensor, in the placement's order: `(device, index among the device's residents, part)`.
    pub(crate) fn resident_parts(&self, var: Var) -> Vec<(usize, usize, &ResidentTensor)> {
        let placement = &self.graph.placements[self.graph.placement_of(var)];
        let part = |device: &usize| {
            let mut residents = self.residents[*device].iter().enumerate();
            let (index, resident) = residents.find(|(_, r)| r.var == var)?;
            Some((*device, index, resident))
        };
        placement.devices().iter().filter_map(part).collect()
    }

    /// Checks that no device needs more than the plan's memory limit, including the mirrors of this process.
    ///
    /// # Errors
    /// [`PlanError::Memory`].
    pub(crate) fn check_memory(&self) -> Result<(), PlanError> {
        let Some(budget) = self.memory_bytes.filter(|_| !self.fits(self.memory.iter())) else { return Ok(()) };
        let table = self.memory.iter().enumerate().map(|(device, memory)| memory.row(device)).collect();
        Err(PlanError::Memory { budget, table })
    }

    /// Like [`Plan::set_threads`], but also updates the memory in this instance.
    pub(crate) fn set_threads(&mut self, threads_per_device: usize) {
        let plan = Arc::make_mut(&mut self.plan);
        plan.set_threads(threads_per_device);
        for (device, memory) in self.memory.iter_mut().enumerate() {
            memory.stream_bytes = plan.memory(device).stream_bytes;
        }
    }

    /// The memory of a register.
    pub fn register_place(&self, id: RegisterId) -> RegisterPlace {
        self.registers[id.0 as usize]
    }
}

impl Plan {
    /// The actors and registers of all devices.
    pub fn instance(self) -> Instance {
        let devices: Vec<usize> = (0..self.device_count()).collect();
        let mut builder = Builder::new(&self, devices.clone(), View::Devices);
        for device in devices.iter().copied() {
            let ids = self.class_plan(device).storage.segments.iter();
            let emitted: Vec<EmittedAction> = ids.map(|id| emit(&self, device, *id)).collect();
            builder.add_device(device, &emitted);
        }
        let (spec, actions, registers) = builder.finish();
        let memory = devices.iter().map(|device| self.memory(*device).clone()).collect();
        let residents = devices.iter().map(|device| self.residents(*device)).collect();
        Instance { spec, actions, registers, memory, residents, plan: Arc::new(self) }
    }

    /// See [`Quotient`].
    pub(crate) fn quotient(&self) -> Quotient {
        let devices: Vec<usize> = self.classes.ids().map(|class| self.classes.representative(class)).collect();
        let mut builder = Builder::new(self, devices.clone(), View::Classes);
        for device in devices {
            builder.add_device(device, &self.class_plan(device).actions);
        }
        let calls = std::mem::take(&mut builder.calls);
        let (spec, actions, _) = builder.finish();
        Quotient { spec, actions, calls }
    }
}

/// The actors and registers of one device of each class. A register has the readers of all devices of its class. An
/// action is in one group for each set of classes that occurs in its devices' groups. So a cycle of waits among devices
/// is also a cycle among classes, and a quotient without a cycle proves that the plan is live.
pub(crate) struct Quotient {
    pub(crate) spec: Spec,
    /// `[actor][action]`.
    pub(crate) actions: Vec<Vec<ActionPlan>>,
    /// For each action, in the order of the actors: the firing groups of each collective that it calls.
    pub(crate) calls: Vec<Vec<BTreeSet<u32>>>,
}

/// The devices that a specification contains.
#[derive(Clone, Copy, PartialEq, Eq)]
enum View {
    Devices,
    /// One device for each class.
    Classes,
}

/// For each class: the sets of classes that occur in the groups of its devices.
type ClassSets = BTreeMap<ClassId, BTreeSet<Vec<usize>>>;

struct Builder<'a> {
    plan: &'a Plan,
    view: View,
    /// First actor and register of each device of the instance. A device's actors are in the order of their streams.
    first: BTreeMap<usize, (u32, u32)>,
    /// For each class: the segments of each stream.
    streams: Vec<BTreeMap<StreamKind, Vec<SegmentId>>>,
    /// Ids of firing groups, by segment and members. The next field has ids of communicators, by stream and members.
    /// Members are classes or devices, as `view` determines.
    firing_groups: BTreeMap<(SegmentId, Vec<usize>), u32>,
    communicators: BTreeMap<(StreamKind, Vec<usize>), u32>,
    /// Sets of classes, by placement and axes.
    class_sets: BTreeMap<(usize, Vec<usize>), ClassSets>,
    /// For each action, in the order of the actors: the firing groups of each collective that it calls.
    calls: Vec<Vec<BTreeSet<u32>>>,
    spec: Spec,
    actions: Vec<Vec<ActionPlan>>,
    registers: Vec<RegisterPlace>,
}

impl<'a> Builder<'a> {
    fn new(plan: &'a Plan, devices: Vec<usize>, view: View) -> Self {
        let streams: Vec<BTreeMap<StreamKind, Vec<SegmentId>>> = (plan.class_plans.iter())
            .map(|class| {
                let mut streams: BTreeMap<StreamKind, Vec<SegmentId>> = BTreeMap::new();
                for id in &class.storage.segments {
                    streams.entry(plan.segments.get(*id).stream).or_default().push(*id);
                }
                streams
            })
            .collect();
        let (mut first, mut next) = (BTreeMap::new(), (0, 0));
        for device in devices {
            first.insert(device, next);
            next.0 += streams[plan.classes.of[device].index()].len() as u32;
            next.1 += plan.class_plan(device).storage.registers.len() as u32;
        }
        Self {
            plan,
            view,
            first,
            streams,
            firing_groups: BTreeMap::new(),
            communicators: BTreeMap::new(),
            class_sets: BTreeMap::new(),
            calls: Vec::new(),
            spec: Spec::default(),
            actions: Vec::new(),
            registers: Vec::new(),
        }
    }

    fn finish(mut self) -> (Spec, Vec<Vec<ActionPlan>>, Vec<RegisterPlace>) {
        let located = |transfer: HostTransfer| {
            let all = (0..).zip(&self.actions).flat_map(|(actor, actions)| {
                (0..).zip(actions).map(move |(action, plan)| (ActionRef { actor: ActorId(actor), action }, plan))
            });
            let is_wanted = |plan: &ActionPlan| plan.host.as_ref().is_some_and(|host| host.transfer == transfer);
            all.filter(|(_, plan)| is_wanted(plan)).map(|(at, _)| at).collect()
        };
        let (observed, granted) = (located(HostTransfer::Fetch), located(HostTransfer::Decide));
        self.spec.decision = Decision { observed, granted };
        (self.spec, self.actions, self.registers)
    }

    /// Adds a device's actors and registers. `emitted` has the device's actions, in the order of its segments.
    fn add_device(&mut self, device: usize, emitted: &[EmittedAction]) {
        let plan = self.plan;
        let class = plan.class_plan(device);
        let ids = &class.storage.segments;
        for (stream, of_stream) in self.streams[plan.classes.of[device].index()].clone() {
            let action = |id: &SegmentId| &emitted[ids.binary_search(id).expect("the class runs it")];
            let actions: Vec<&EmittedAction> = of_stream.iter().map(action).collect();
            let specs: Vec<ActionSpec> = actions.iter().map(|action| self.action_spec(device, action)).collect();
            let firing = self.firing(device, stream, &of_stream, &specs);
            let name = format!("device {device} {}", stream_name(stream));
            self.spec.actors.push(ActorSpec { name, device, stream, firing, actions: specs });
            self.actions.push(actions.into_iter().map(|action| action.plan.clone()).collect());
        }
        for (index, register) in class.storage.registers.iter().enumerate() {
            let place = RegisterPlace { device, ..class.arena.registers[index] };
            let spec = self.register_spec(device, register, (&class.slots[index], &place));
            self.spec.registers.push(spec);
            self.registers.push(place);
        }
    }

    /// The device of the instance that represents `device`.
    fn stand_in(&self, device: usize) -> usize {
        match self.view {
            View::Devices => device,
            View::Classes => self.plan.classes.representative(self.plan.classes.of[device]),
        }
    }

    /// The action that runs a segment on a device of the instance.
    fn locate(&self, device: usize, id: SegmentId) -> ActionRef {
        let stream = self.plan.segments.get(id).stream;
        let streams = &self.streams[self.plan.classes.of[device].index()];
        let before = streams.range(..stream).count() as u32;
        let action = streams.get(&stream).and_then(|ids| ids.binary_search(&id).ok());
        let action = action.expect("a register's readers and producer run on its devices") as u32;
        ActionRef { actor: ActorId(self.first[&device].0 + before), action }
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

    /// Other devices that read from `device` in a transfer. A class has the readers of all its devices, as stand-ins.
    fn reading_devices(&self, transfer: NodeId, device: usize) -> BTreeSet<usize> {
        let classes = &self.plan.classes;
        let readers = |own: usize| classes.readers(transfer, own).iter().copied().filter(move |other| *other != own);
        match self.view {
            View::Devices => readers(device).collect(),
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

    fn action_spec(&mut self, device: usize, emitted: &EmittedAction) -> ActionSpec {
        let plan = self.plan;
        let segment = plan.segments.get(emitted.plan.segment);
        let register = |at: &DeviceRegister| &plan.class_plan(at.device).storage.registers[at.register];
        let per_step = |rate: Rate| rate.per_step(plan.micro_batches) as u32;
        let firings = per_step(segment.rate);
        let number = |at: &DeviceRegister| RegisterId(self.first[&at.device].1 + at.register as u32);
        // Two sources of one class are one register of the quotient.
        let mut sources: Vec<DeviceRegister> = Vec::new();
        for at in &emitted.inputs {
            let at = DeviceRegister { device: self.stand_in(at.device), ..*at };
            if !sources.contains(&at) {
                sources.push(at);
            }
        }
        let inputs = sources
            .iter()
            .map(|at| InputSpec { register: number(at), pieces: Pieces::Rate(firings / per_step(register(at).rate)) });
        let outputs = emitted.outputs.iter().enumerate().map(|(port, index)| {
            let at = DeviceRegister { device, register: *index };
            OutputSpec {
                register: number(&at),
                pieces: Pieces::Rate(firings / per_step(register(&at).rate)),
                early: emitted.plan.signals.iter().any(|signal| signal.1 == port as u32),
            }
        });
        // An action that depends on nothing within the step (a transfer of parameters, or one on a device with an empty
        // part of the batch) waits for the host's permission. Otherwise it would run ahead of the step.
        let is_fed = segment.host.is_some_and(|host| host != HostTransfer::Fetch);
        let (inputs, outputs) = (inputs.collect(), outputs.collect());
        let (groups, communicators) = self.groups(device, emitted);
        ActionSpec {
            name: segment.name.clone(),
            label: segment.label.clone(),
            priority: plan.priorities.get(&emitted.plan.segment).copied().unwrap_or(0),
            per_step: firings,
            inputs,
            outputs,
            external: is_fed || emitted.inputs.iter().all(|at| register(at).initial),
            groups,
            communicators,
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
                View::Devices => BTreeSet::from([call.group.ranks.iter().collect()]),
                View::Classes => self.class_sets(node.placement, axes.clone(), device),
            };
            let mut groups = BTreeSet::new();
            for members in member_sets {
                let next = self.firing_groups.len() as u32;
                groups.insert(*self.firing_groups.entry((segment, members.clone())).or_insert(next));
                let next = self.communicators.len() as u32;
                communicators.insert(match self.view {
                    View::Devices => call.group.id,
                    View::Classes => *self.communicators.entry((stream, members)).or_insert(next),
                });
            }
            known.insert((node.placement, axes), groups.clone());
            calls.push(groups);
        }
        let groups: BTreeSet<u32> = calls.iter().flatten().copied().collect();
        self.calls.push(calls);
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

    /// How an actor fires. If its actions call collectives, the actor follows a list, because all members of a group
    /// must fire in the same order. Otherwise the actor fires by credit.
    fn firing(&self, device: usize, stream: StreamKind, ids: &[SegmentId], specs: &[ActionSpec]) -> Firing {
        if specs.iter().all(|spec| spec.groups.is_empty()) {
            return Firing::Credit;
        }
        let action = |id: &SegmentId| ids.binary_search(id).ok().map(|action| action as u32);
        let list = match self.plan.site_of[device].filter(|_| stream == StreamKind::Compute) {
            Some(site) => self.plan.lists[site].iter().filter_map(action).collect(),
            // Other streams follow the order of the program, which is the same on all devices.
            None => (0..).zip(specs).flat_map(|(action, spec)| (0..spec.per_step).map(move |_| action)).collect(),
        };
        Firing::Ordered(list)
    }
}

fn stream_name(stream: StreamKind) -> &'static str {
    match stream {
        StreamKind::Compute => "compute",
        StreamKind::Communication => "communication",
        StreamKind::Copy => "copy",
    }
}
