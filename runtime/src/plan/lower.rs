//! Lowers a graph after all passes to a plan: segments, classes of devices, lists, registers, launches and memory.

use std::collections::BTreeMap;

use shardflow_actors::label::Role;
use shardflow_kernels::device::DeviceKind;

use crate::graph::{Graph, Node, NodeOp, Rate, Var};
use crate::plan::action::{ActionPlan, EmittedAction, HostPort};
use crate::plan::assign::assign;
use crate::plan::classes::classify;
use crate::plan::emit::{emit, fuse_accumulation};
use crate::plan::groups::Patterns;
use crate::plan::memory::{StagingPlace, align, lay_out, residents};
use crate::plan::schedule::Schedule;
use crate::plan::schedule::work::{WorkGraph, work_graph};
use crate::plan::segments::divide;
use crate::plan::slots::Times;
use crate::plan::{ClassPlan, Plan, most_by_stream};

/// Lowers a graph on which the layout, boxing and bucket passes have run. If a device then needs more than
/// `memory_bytes`, plans the schedule again with fewer micro-batches in flight.
pub fn lower(
    mut graph: Graph,
    micro_batches: usize,
    schedule: Schedule,
    (threads_per_device, device): (usize, DeviceKind),
    memory_bytes: Option<usize>,
) -> Plan {
    add_fetches(&mut graph);
    let program = if graph.objective.is_some() { "train" } else { "evaluate" };
    let segments = divide(&graph, &program.into());
    let classes = classify(&graph);
    let (storages, aliases) = assign(&graph, &segments, &classes);
    let (work, site_of) = work_graph(&graph, &segments, micro_batches);
    let class_plan = |storage| ClassPlan { storage, ..ClassPlan::default() };
    let mut plan = Plan {
        in_flight: vec![1; graph.placements.len()],
        fused: fuse_accumulation(&graph, &segments),
        patterns: Patterns::of(&graph),
        lists: Vec::new(),
        priorities: BTreeMap::new(),
        class_plans: storages.into_iter().map(class_plan).collect(),
        graph,
        segments,
        classes,
        aliases,
        site_of,
        micro_batches,
        schedule,
        threads_per_device,
        device,
        memory_bytes,
    };
    schedule_step(&mut plan, &work, false);
    if !plan.fits(plan.memories()) {
        schedule_step(&mut plan, &work, true);
    }
    plan
}

/// Plans the lists of the schedule, then the slots, memory and actions of each class.
fn schedule_step(plan: &mut Plan, work: &WorkGraph, saves_memory: bool) {
    let step = plan.schedule.plan(work, saves_memory);
    let times = Times::of(&plan.segments, work, &step);
    for class in plan.classes.ids() {
        let ClassPlan { storage, slots, arena, residents: of_class, .. } = &mut plan.class_plans[class.index()];
        let device = plan.classes.representative(class);
        *slots = times.slots(storage);
        *arena = lay_out(&plan.graph, storage, slots, device);
        *of_class = residents(&plan.graph, storage, arena, device);
    }
    plan.in_flight.fill(1);
    for (work, in_flight) in work.work.iter().zip(&step.in_flight) {
        let most = &mut plan.in_flight[plan.segments.get(work.segment).placement];
        *most = (*in_flight).max(*most);
    }
    let segments_of = |list: &Vec<usize>| list.iter().map(|index| work.work[*index].segment).collect();
    plan.lists = step.lists.iter().map(segments_of).collect();
    plan.priorities = work.work.iter().map(|work| work.segment).zip(step.priorities).collect();
    emit_classes(plan);
    plan.set_threads(plan.threads_per_device);
}

/// Emits the actions of each class's representative. Places their scratch after the registers, and lays out staging.
fn emit_classes(plan: &mut Plan) {
    for class in plan.classes.ids() {
        let device = plan.classes.representative(class);
        let ids = plan.class_plan(device).storage.segments.iter();
        let actions: Vec<EmittedAction> = ids.map(|id| emit(plan, device, *id)).collect();
        let scratch = most_by_stream(&plan.segments, &actions, |_, action| action.scratch_bytes);
        let own = &mut plan.class_plans[class.index()];
        for (stream, bytes) in scratch {
            let memory = &mut own.arena.memory;
            memory.scratch.insert(stream, (memory.arena_bytes, bytes));
            memory.arena_bytes += align(bytes);
        }
        let memory = &mut own.arena.memory;
        for ActionPlan { segment, host, .. } in actions.iter().map(|action| &action.plan) {
            let Some(&HostPort { slot_bytes: stride, .. }) = host.as_ref() else { continue };
            let slots = plan.segments.get(*segment).rate.per_step(plan.micro_batches);
            memory.staging.insert(*segment, StagingPlace { offset: memory.staging_end(), stride, slots });
        }
        memory.staging_bytes = if plan.device == DeviceKind::Cpu { memory.staging_end() } else { 0 };
        own.actions = actions;
    }
}

/// Adds a fetch node for the outputs of each placement and rate.
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
